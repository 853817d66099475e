"""What the seeds of ablations.sh come to: the tables and the figures of demo/RESULTS.md.

    python -m demo.summary runs/ablations                                   # seeds 3 4 5
    python -m demo.summary runs/ablations --seeds 4 --out figures.png

Reads:  ROOT/seed-N/…, what 04 and 05 left there.  Writes: the tables, to the screen, each naming the run it lacks, if it does.
        --out: reward before, in and after GRPO, Figure 3 (gain by size of the group), Figure 5 (F1 of the vote of k responses).
"""

import argparse
import importlib
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

import common
from demo import table
from lib import data, scoring

evaluation = importlib.import_module("05_eval")

PARADIGMS = {
    "zero-shot": "test-zero",
    "SFT": "test-answer",
    "CoT-SFT": "test-sft",
    "Only-RL": "test-only-rl",
    "JMERE-R1": "test-grpo",
    "JMERE-R1, grey images": "test-grey",
}
WITHOUT = {
    "JMERE-R1": "test-grpo",
    "no partial reward": "test-no-partial",
    "no score filter": "test-no-score",
    "no re-prediction filter": "test-no-reprediction",
    "no filter": "test-no-filter",
}
VOTES = {"CoT-SFT": "vote-sft", "JMERE-R1": "vote"}
WINDOW = 8  # updates of the running mean: one batch of prompts is easier than the next


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("root", type=Path, help="ROOT of ablations.sh [ours]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5], help="which of its folders [ours]")
    parser.add_argument("--out", type=Path, help="figure to draw [ours: none]")
    return parser.parse_args(argv)


def missing(folders, run):
    """The run of the first seed that has no scores of it, or None."""
    return next((folder / run for folder in folders if not (folder / run / "metrics.json").exists()), None)


def show(title, folders, runs, figures=table.scores):
    """Print one table over seeds; runs: {name of the row: folder of the run}. ΔF1: against JMERE-R1 of the same seed."""
    print(f"\n**{title}**\n")
    lacking = [folder for folder in (missing(folders, run) for run in runs.values()) if folder]
    if lacking:
        print(f"{lacking[0]} was not made.")
        return
    rows = [table.row(name, [folder / run for folder in folders], figures) for name, run in runs.items()]
    for row, run in zip(rows, runs.values()) if figures is table.scores else ():
        row["ΔF1"] = (
            ""
            if run == "test-grpo"
            else table.spread([f1(folder, run) - f1(folder, "test-grpo") for folder in folders], sign="+")
        )
    table.print_rows(rows)


def group_sizes(folders):
    """{size of a group: its run} of those that every seed has; 8 is the main one."""
    sizes = {
        int(path.name.removeprefix("test-group-"))
        for path in folders[0].glob("test-group-*")
        if path.is_dir()
    }
    runs = {8: "test-grpo"} | {size: f"test-group-{size}" for size in sizes}
    return {size: runs[size] for size in sorted(runs) if not missing(folders, runs[size])}


def f1(folder, run):
    return 100 * table.read(folder / run, "scores")["scores"]["jmere"]["f1"]


def gain_row(folder):
    """One seed: what SFT and GRPO each add to the test F1, GRPO's gain with a paired bootstrap over tweets (05), and to the test reward."""
    zero, sft, grpo = (f1(folder, run) for run in ("test-zero", "test-sft", "test-grpo"))
    shares = [
        f"{100 * part / (grpo - zero):.0f} %" if grpo > zero else "no gain"
        for part in (sft - zero, grpo - sft)
    ]
    runs = [f"{name}={folder / PARADIGMS[name]}" for name in ("CoT-SFT", "JMERE-R1")]
    compared = next(
        row for row in scoring.compare(evaluation.parse_args(["--compare", *runs]), None) if "p" in row
    )
    low, high = (100 * x for x in compared["difference_95"])
    return {
        "seed": folder.name.removeprefix("seed-"),
        "zero-shot": f"{zero:.1f}",
        "CoT-SFT": f"{sft:.1f}",
        "JMERE-R1": f"{grpo:.1f}",
        "from SFT": shares[0],
        "from GRPO": shares[1],
        "GRPO's gain (95 %)": f"{grpo - sft:+.1f} ({low:.1f} … {high:.1f})",
        "p": f"{compared['p']:.3f}",
        "test reward": " → ".join(f"{table.reward(folder / run):.2f}" for run in ("test-sft", "test-grpo")),
    }


def draw(folders, out):
    sizes = group_sizes(folders)
    votes = {} if any(missing(folders, run) for run in VOTES.values()) else VOTES
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    reward, group, vote = figure.subplots(1, 3)
    for number, folder in enumerate(folders):  # a colour a seed
        rewards = [row["reward"] for _, row in data.read_jsonl(folder / "grpo" / "metrics.jsonl")]
        smooth = [mean(rewards[i : i + WINDOW]) for i in range(len(rewards) - WINDOW + 1)]
        name, colour = folder.name.replace("-", " "), f"C{number}"
        reward.plot(range(WINDOW, len(rewards) + 1), smooth, color=colour, alpha=0.4)
        ends = [table.reward(folder / run) for run in ("test-sft", "test-grpo")]
        reward.plot([0, len(rewards)], ends, "--o", color=colour, label=name)
        gains = [f1(folder, run) - f1(folder, "test-sft") for run in sizes.values()]
        group.plot(range(len(sizes)), gains, "-o", color=colour, label=name)
    reward.set(
        title="reward: test set (dots), training (lines)",
        xlabel="update",
        ylabel=f"mean; training: of {WINDOW} updates",
    )
    group.axhline(0, color="grey", linestyle="--")
    group.set_xticks(range(len(sizes)), sizes)
    group.set(
        title="Figure 3: size of a group",
        xlabel="responses a prompt",
        ylabel="test F1 above CoT-SFT (points)",
    )
    for name, run in votes.items():
        curves = [table.read(folder / run, "samples")["samples"]["f1_at_k"] for folder in folders]
        vote.plot(
            [k for k, _, _ in curves[0]],
            [100 * mean(at[1] for at in ats) for ats in zip(*curves)],
            marker=".",
            label=name,
        )
    vote.set_xscale("log", base=2)
    vote.xaxis.set_major_formatter("{x:.0f}")
    vote.set(
        title="Figure 5: vote of many responses", xlabel="responses k", ylabel="test F1@k (%), mean of seeds"
    )
    for axes in (reward, group, vote):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.savefig(out, dpi=80)


@common.exit_codes
def main(args):
    folders = [args.root / f"seed-{seed}" for seed in args.seeds]
    show("Five paradigms (Tables 1 and 3)", folders, PARADIGMS)
    print("\n**Share of the gain over zero-shot, and what GRPO adds to CoT-SFT**\n")
    table.print_rows([gain_row(folder) for folder in folders])
    show("Ablations (Table 2)", folders, WITHOUT)
    show(
        "Size of a group (Figure 3)",
        folders,
        {f"group of {size}": run for size, run in group_sizes(folders).items()},
    )
    show(
        "Many responses (Figure 5): temperature 0.8, most frequent set of quintuples",
        folders,
        VOTES,
        table.votes,
    )
    if args.out:
        draw(folders, args.out)


if __name__ == "__main__":
    main(parse_args())
