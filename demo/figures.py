"""The figures of demo/RESULTS.md, drawn by demo/tables.py --figures of what was run."""

import math
from statistics import mean

from demo import measures
from lib import data

ENDS = ("test-sft", "test-grpo")  # before and after GRPO
COLUMNS = 3  # panels side by side
WINDOW = 8  # updates of the running mean: one batch of prompts is easier than the next


def draw(folders, out):
    """One picture with a panel for each thing that was run."""
    from matplotlib.figure import Figure

    trainings = measures.trainings(folders)
    with_grpo = [folder for folder in folders if measures.scored(folder / "test-grpo")]
    with_sizes = [folder for folder in folders if measures.found([folder], "test-group-")]
    with_votes = [folder for folder in folders if measures.scored(folder / "vote")]
    panels = {
        draw_rewards: with_grpo,
        draw_trainings: trainings,
        draw_intervals: trainings,
        draw_group_sizes: with_sizes,
        draw_votes: with_votes,
    }
    drawn = [panel for panel, runs in panels.items() if runs]
    columns = min(len(drawn), COLUMNS)
    rows = math.ceil(len(drawn) / COLUMNS)
    size = (4 * columns, 3.6 * rows)
    figure = Figure(figsize=size, layout="constrained")
    for number, panel in enumerate(drawn, 1):
        axes = figure.add_subplot(rows, columns, number)
        panel(axes, panels[panel])
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        handles, _ = axes.get_legend_handles_labels()
        if handles:
            axes.legend(fontsize=8)
    figure.savefig(out, dpi=80)


def draw_rewards(axes, folders):
    """The training reward of each seed, between the test reward before and after."""
    for number, folder in enumerate(folders):
        colour = f"C{number}"
        logged = data.read_jsonl(folder / "grpo" / "metrics.jsonl")
        rewards = [row["reward"] for _, row in logged]
        updates = range(WINDOW, len(rewards) + 1)
        smooth = [mean(rewards[update - WINDOW : update]) for update in updates]
        axes.plot(updates, smooth, color=colour, alpha=0.4)
        ends = [measures.reward(folder / run) for run in ENDS]
        places = [0, len(rewards)]
        axes.plot(places, ends, "--o", color=colour, label=label(folder))
    axes.set_title("reward: test set (dots), training (lines)")
    axes.set_xlabel("update")
    axes.set_ylabel(f"mean; training: of {WINDOW} updates")


def label(folder):
    """seed-3 → seed 3."""
    return folder.name.replace("-", " ")


def draw_trainings(axes, runs):
    """Every training of the part `gain`: from CoT-SFT to JMERE-R1, dashed where it lost."""
    classes = sorted({measures.arch(run) for run in runs})
    for run in runs:
        place = classes.index(measures.arch(run))
        before, after = (measures.f1(run / test) for test in ENDS)
        style = "-o" if after > before else "--o"
        left = 2 * place
        colour = f"C{place}"
        axes.plot([left, left + 1], [before, after], style, color=colour, markersize=3)
    ticks = []
    for name in classes:
        ticks += [f"CoT-SFT\n{name}", f"JMERE-R1\n{name}"]
    axes.set_xticks(range(len(ticks)), ticks, fontsize=7)
    axes.set_title(f"{len(runs)} trainings")
    axes.set_ylabel("test F1 (%)")


def draw_intervals(axes, runs):
    """GRPO's gain in every training of the part `gain`, the smallest below, with its paired interval."""
    classes = sorted({measures.arch(run) for run in runs})
    gains = measures.gains(runs)
    ordered = sorted(zip(gains, runs, strict=True))
    for row, (gain, run) in enumerate(ordered):
        place = classes.index(measures.arch(run))
        colour = f"C{place}"
        (low, high), _ = measures.paired_gain(run)
        axes.plot([low, high], [row, row], color=colour)
        axes.plot(gain, row, "o", color=colour, markersize=4)
    axes.axvline(0, color="grey", linestyle="--")
    axes.set_yticks([])
    axes.set_title("GRPO's gain, 95 % over tweets")
    axes.set_xlabel("JMERE-R1 − CoT-SFT (points of F1)")


def draw_group_sizes(axes, folders):
    """Figure 3."""
    sizes = measures.group_sizes(folders)
    places = range(len(sizes))
    for number, folder in enumerate(folders):
        start = measures.f1(folder / "test-sft")
        gains = [measures.f1(folder / run) - start for run in sizes.values()]
        axes.plot(places, gains, "-o", color=f"C{number}", label=label(folder))
    axes.axhline(0, color="grey", linestyle="--")
    axes.set_xticks(places, sizes)
    axes.set_title("Figure 3: size of a group")
    axes.set_xlabel("responses a prompt")
    axes.set_ylabel("test F1 above CoT-SFT (points)")


def draw_votes(axes, folders):
    """Figure 5."""
    for name, run in measures.VOTES.items():
        curves = []
        for folder in folders:
            samples = measures.read(folder / run, "samples")["samples"]
            curves.append([100 * f1 for _, f1, _ in samples["f1_at_k"]])
        responses = [k for k, _, _ in samples["f1_at_k"]]
        means = [mean(points) for points in zip(*curves, strict=True)]
        axes.plot(responses, means, marker=".", label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_title("Figure 5: vote of many responses")
    axes.set_xlabel("responses k")
    axes.set_ylabel("test F1@k (%), mean of seeds")
