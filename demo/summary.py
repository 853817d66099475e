"""What the seeds of ablations.sh come to: each stage's share of the gain, and the figures of demo/RESULTS.md.

    python demo/summary.py runs/ablations --seeds 3 4 5 --out runs/ablations/figures.png

Reads:  ROOT/seed-N/{test-zero,test-sft,test-grpo}/metrics.json and grpo/metrics.jsonl; group-G and vote runs, where every seed has them.
Writes: the table, to the screen; --out: reward over updates, Figure 3 (F1 by size of the group), Figure 5 (F1 of the vote of k responses).
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common

WINDOW = 8  # updates of the running mean: one batch of prompts is easier than the next


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("root", type=Path, help="ROOT of ablations.sh [ours]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5], help="which of its folders [ours]")
    parser.add_argument("--out", type=Path, help="figure to draw [ours: none]")
    return parser.parse_args(argv)


def read(folder, run):
    """metrics.json of `run` of a seed. Raises InputError where it is not there."""
    path = folder / run / "metrics.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise common.InputError(f"{path}: no scores to read ({type(error).__name__}): ablations.sh makes them") from None


def f1(folder, run):
    return 100 * read(folder, run)["scores"]["jmere"]["f1"]


def training(folder):
    """Rows of GRPO's metrics.jsonl, a row an update."""
    return [json.loads(line) for line in (folder / "grpo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def share_row(folder):
    """One seed's cells: what SFT and GRPO each add to the test F1, and how the reward went."""
    zero, sft, grpo = (f1(folder, run) for run in ("test-zero", "test-sft", "test-grpo"))
    shares = [f"{100 * part / (grpo - zero):.0f} %" if grpo > zero else "no gain" for part in (sft - zero, grpo - sft)]
    rewards = [row["reward"] for row in training(folder)]
    third = -(-len(rewards) // 3)
    reward = f"{mean(rewards[:third]):.2f} → {mean(rewards[-third:]):.2f}"
    return [folder.name.removeprefix("seed-"), f"{zero:.1f}", f"{sft:.1f}", f"{grpo:.1f}", *shares, reward]


def group_sizes(folders):
    """[size of a group] of which every seed has a run; 8 is the main one."""
    sizes = {path.name.removeprefix("test-group-") for path in folders[0].glob("test-group-*")}
    return sorted(map(int, {"8", *(size for size in sizes if all((f / f"test-group-{size}" / "metrics.json").exists() for f in folders))}))


def draw(folders, out):
    sizes = group_sizes(folders)
    votes = all((folder / run / "metrics.json").exists() for folder in folders for run in ("vote", "vote-sft"))
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    reward, group, vote = figure.subplots(1, 3)
    for folder in folders:
        rewards = [row["reward"] for row in training(folder)]
        smooth = [mean(rewards[i : i + WINDOW]) for i in range(len(rewards) - WINDOW + 1)]
        reward.plot(range(WINDOW, len(rewards) + 1), smooth, label=folder.name.replace("-", " "))
    reward.set(title="GRPO", xlabel="update", ylabel=f"reward, mean of {WINDOW} updates")
    curve = [[f1(folder, f"test-group-{size}" if size != 8 else "test-grpo") for folder in folders] for size in sizes]
    start = mean(f1(folder, "test-sft") for folder in folders)
    spread = [stdev(values) if len(values) > 1 else 0 for values in curve]
    group.errorbar(range(len(sizes)), [mean(values) for values in curve], spread, marker="o", capsize=3, label="JMERE-R1")
    group.axhline(start, color="grey", linestyle="--", label="CoT-SFT")
    group.set_xticks(range(len(sizes)), sizes)
    group.set(title="Figure 3: size of a group", xlabel="responses a prompt", ylabel="test F1 (%)")
    for name, run in (("CoT-SFT", "vote-sft"), ("JMERE-R1", "vote")) if votes else ():
        curves = [read(folder, run)["samples"]["f1_at_k"] for folder in folders]
        vote.plot([k for k, _, _ in curves[0]], [100 * mean(at[1] for at in ats) for ats in zip(*curves)], marker=".", label=name)
    vote.set_xscale("log", base=2)
    vote.xaxis.set_major_formatter("{x:.0f}")
    vote.set(title="Figure 5: vote of many responses", xlabel="responses k", ylabel="test F1@k (%)")
    for axes in (reward, group, vote):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.savefig(out, dpi=80)


@common.cli
def main(args):
    folders = [args.root / f"seed-{seed}" for seed in args.seeds]
    head = ["seed", "zero-shot", "CoT-SFT", "JMERE-R1", "of the gain from SFT", "from GRPO", "reward, first → last third of GRPO"]
    for cells in (head, ["---"] * len(head), *map(share_row, folders)):
        print(f"| {' | '.join(cells)} |")
    if args.out:
        draw(folders, args.out)


if __name__ == "__main__":
    main(parse_args())
