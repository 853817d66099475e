"""The figures of demo/RESULTS.md, drawn by demo/tables.py --figures of what was run."""

import math
from statistics import mean

from demo import measures
from lib import data

COLUMNS = 3  # panels side by side
WINDOW = 8  # updates of the running mean: one batch of prompts is easier than the next


def draw(folders, out):
    """One picture with a panel for each thing that was run."""
    from matplotlib.figure import Figure

    panels = {
        draw_rewards: [folder for folder in folders if measures.scored(folder / "test-grpo")],
        draw_trainings: measures.trainings(folders),
        draw_intervals: measures.trainings(folders),
        draw_group_sizes: [folder for folder in folders if measures.found([folder], "test-group-")],
        draw_votes: [folder for folder in folders if measures.scored(folder / "vote")],
    }
    panels = {panel: runs for panel, runs in panels.items() if runs}
    columns = min(len(panels), COLUMNS)
    rows = math.ceil(len(panels) / COLUMNS)
    figure = Figure(figsize=(4 * columns, 3.6 * rows), layout="constrained")
    for number, (panel, runs) in enumerate(panels.items(), 1):
        panel(figure.add_subplot(rows, columns, number), runs)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.savefig(out, dpi=80)


def draw_rewards(axes, folders):
    """The training reward of each seed, between the test reward before and after."""
    for number, folder in enumerate(folders):
        colour = f"C{number}"
        rewards = [row["reward"] for _, row in data.read_jsonl(folder / "grpo" / "metrics.jsonl")]
        smooth = [mean(rewards[i : i + WINDOW]) for i in range(len(rewards) - WINDOW + 1)]
        axes.plot(range(WINDOW, len(rewards) + 1), smooth, color=colour, alpha=0.4)
        ends = [measures.reward(folder / run) for run in ("test-sft", "test-grpo")]
        axes.plot([0, len(rewards)], ends, "--o", color=colour, label=folder.name.replace("-", " "))
    axes.set(title="reward: test set (dots), training (lines)", xlabel="update")
    axes.set(ylabel=f"mean; training: of {WINDOW} updates")


def draw_trainings(axes, runs):
    """Every training of the part `gain`: from CoT-SFT to JMERE-R1, dashed where it lost."""
    classes = sorted({measures.arch(run) for run in runs})
    for run in runs:
        place = classes.index(measures.arch(run))
        ends = [measures.f1(run / test) for test in ("test-sft", "test-grpo")]
        style = "-o" if ends[1] > ends[0] else "--o"
        axes.plot([2 * place, 2 * place + 1], ends, style, color=f"C{place}", markersize=3)
    ticks = [f"{name}\n{name_of_class}" for name_of_class in classes for name in ("CoT-SFT", "JMERE-R1")]
    axes.set_xticks(range(len(ticks)), ticks, fontsize=7)
    axes.set(title=f"{len(runs)} trainings", ylabel="test F1 (%)")


def draw_intervals(axes, runs):
    """GRPO's gain in every training of the part `gain`, the smallest below, with its paired interval."""
    classes = sorted({measures.arch(run) for run in runs})
    ordered = sorted(zip(measures.gains(runs), runs, strict=True))
    for row, (gain, run) in enumerate(ordered):
        colour = f"C{classes.index(measures.arch(run))}"
        low, high = measures.paired_gain(run)[0]
        axes.plot([low, high], [row, row], color=colour)
        axes.plot(gain, row, "o", color=colour, markersize=4)
    axes.axvline(0, color="grey", linestyle="--")
    axes.set_yticks([])
    axes.set(title="GRPO's gain, 95 % over tweets", xlabel="JMERE-R1 − CoT-SFT (points of F1)")


def draw_group_sizes(axes, folders):
    """Figure 3."""
    sizes = measures.group_sizes(folders)
    for number, folder in enumerate(folders):
        gains = [measures.f1(folder / run) - measures.f1(folder / "test-sft") for run in sizes.values()]
        axes.plot(range(len(sizes)), gains, "-o", color=f"C{number}", label=folder.name.replace("-", " "))
    axes.axhline(0, color="grey", linestyle="--")
    axes.set_xticks(range(len(sizes)), sizes)
    axes.set(title="Figure 3: size of a group", xlabel="responses a prompt")
    axes.set(ylabel="test F1 above CoT-SFT (points)")


def draw_votes(axes, folders):
    """Figure 5."""
    for name, run in measures.VOTES.items():
        curves = [measures.read(folder / run, "samples")["samples"]["f1_at_k"] for folder in folders]
        responses = [k for k, _, _ in curves[0]]
        means = [100 * mean(f1 for _, f1, _ in points) for points in zip(*curves, strict=True)]
        axes.plot(responses, means, marker=".", label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(title="Figure 5: vote of many responses", xlabel="responses k")
    axes.set(ylabel="test F1@k (%), mean of seeds")
