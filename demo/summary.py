"""What the seeds of ablations.sh come to: each stage's share of the gain, and the figures of demo/RESULTS.md.

    python demo/summary.py runs/ablations --seeds 3 4 5 --out runs/ablations/figures.png

Reads:  ROOT/seed-N/{test-zero,test-sft,test-grpo} and grpo/metrics.jsonl; group-G and vote runs, where every seed has them.
Writes: the table, to the screen; --out: reward over updates, Figure 3 (F1 by size of the group), Figure 5 (F1 of the vote of k responses).
"""

import argparse
import sys
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from demo import table

WINDOW = 8  # updates of the running mean: one batch of prompts is easier than the next


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("root", type=Path, help="ROOT of ablations.sh [ours]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5], help="which of its folders [ours]")
    parser.add_argument("--out", type=Path, help="figure to draw [ours: none]")
    return parser.parse_args(argv)


def f1(folder, run):
    return 100 * table.read(folder / run, "scores")["scores"]["jmere"]["f1"]


def share_row(folder):
    """One seed's cells: what SFT and GRPO each add to the test F1, and what GRPO adds to the test reward."""
    zero, sft, grpo = (f1(folder, run) for run in ("test-zero", "test-sft", "test-grpo"))
    shares = [f"{100 * part / (grpo - zero):.0f} %" if grpo > zero else "no gain" for part in (sft - zero, grpo - sft)]
    rewards = " → ".join(f"{table.reward(folder / run):.2f}" for run in ("test-sft", "test-grpo"))
    return [folder.name.removeprefix("seed-"), f"{zero:.1f}", f"{sft:.1f}", f"{grpo:.1f}", *shares, rewards]


def group_sizes(folders):
    """[size of a group] of which every seed has a run; 8 is the main one."""
    sizes = {path.name.removeprefix("test-group-") for path in folders[0].glob("test-group-*")}
    return sorted(map(int, {"8", *(size for size in sizes if all((f / f"test-group-{size}" / "metrics.json").exists() for f in folders))}))


def draw(folders, out):
    sizes = group_sizes(folders)
    votes = all((folder / run / "metrics.json").exists() for folder in folders for run in ("vote", "vote-sft"))
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    reward, group, vote = figure.subplots(1, 3)
    for number, folder in enumerate(folders):  # a colour a seed
        rewards = [row["reward"] for _, row in common.read_jsonl(folder / "grpo" / "metrics.jsonl")]
        smooth = [mean(rewards[i : i + WINDOW]) for i in range(len(rewards) - WINDOW + 1)]
        name, colour = folder.name.replace("-", " "), f"C{number}"
        reward.plot(range(WINDOW, len(rewards) + 1), smooth, color=colour, alpha=0.4)
        ends = [table.reward(folder / run) for run in ("test-sft", "test-grpo")]
        reward.plot([0, len(rewards)], ends, "--o", color=colour, label=name)
        gains = [f1(folder, f"test-group-{size}" if size != 8 else "test-grpo") - f1(folder, "test-sft") for size in sizes]
        group.plot(range(len(sizes)), gains, "-o", color=colour, label=name)
    reward.set(title="reward: test set (dots), training (lines)", xlabel="update", ylabel=f"mean; training: of {WINDOW} updates")
    group.axhline(0, color="grey", linestyle="--")
    group.set_xticks(range(len(sizes)), sizes)
    group.set(title="Figure 3: size of a group", xlabel="responses a prompt", ylabel="test F1 above CoT-SFT (points)")
    for name, run in (("CoT-SFT", "vote-sft"), ("JMERE-R1", "vote")) if votes else ():
        curves = [table.read(folder / run, "samples")["samples"]["f1_at_k"] for folder in folders]
        vote.plot([k for k, _, _ in curves[0]], [100 * mean(at[1] for at in ats) for ats in zip(*curves)], marker=".", label=name)
    vote.set_xscale("log", base=2)
    vote.xaxis.set_major_formatter("{x:.0f}")
    vote.set(title="Figure 5: vote of many responses", xlabel="responses k", ylabel="test F1@k (%), mean of seeds")
    for axes in (reward, group, vote):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.savefig(out, dpi=80)


@common.cli
def main(args):
    folders = [args.root / f"seed-{seed}" for seed in args.seeds]
    head = ["seed", "zero-shot", "CoT-SFT", "JMERE-R1", "of the gain from SFT", "from GRPO", "test reward, CoT-SFT → JMERE-R1"]
    table.print_table([head, *map(share_row, folders)])
    if args.out:
        draw(folders, args.out)


if __name__ == "__main__":
    main(parse_args())
