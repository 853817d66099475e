"""The tables and figures of demo/RESULTS.md, from the folders that run.sh and ablations.sh left.

    python -m demo.tables runs/demo-llava                                    # of one run
    python -m demo.tables runs/ablations/seed-* --figures figures.png        # of several seeds: mean ± sd

Reads:  WORK/*/metrics.json and predictions.jsonl of 05; for --figures also WORK/grpo/metrics.jsonl of 04.
Writes: the tables, to the screen, each over the seeds that have all its runs, and naming what the others
lack. --figures: of what was run, the reward before, in and after GRPO, every training of the part `gain`
with its interval, Figure 3 (gain by size of the group), Figure 5 (F1 of the vote of k responses).
"""

import argparse
import json
from functools import cache
from pathlib import Path
from statistics import mean, stdev

import common
from lib import compare, data

PARADIGMS = {  # row: the folder that run.sh gives it
    "zero-shot": "test-zero",
    "SFT": "test-answer",
    "CoT-SFT": "test-sft",
    "Only-RL": "test-only-rl",
    "SFT + GRPO, no thoughts": "test-grpo-answer",
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
SWEEP = ("F1", "MNER F1", "reward (≤ 1.5)", "tokens")
VOTES = {"CoT-SFT": "vote-sft", "JMERE-R1": "vote"}
WINDOW = 8  # updates of the running mean: one batch of prompts is easier than the next


# ------------------------------------------------------------------------------------------------ one run


def read(folder, *parts):
    """metrics.json of a run → {part: what it holds}. Raises InputError where a part is not there."""
    path = Path(folder) / "metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        return {part: metrics[part] for part in parts}
    except (OSError, ValueError, KeyError) as error:
        maker = "05_eval.py --samples" if "samples" in parts else "05_eval.py"
        fault = f"no scores to read ({type(error).__name__}: {error})"
        raise common.InputError(f"{path}: {fault}: made by {maker} on data with gold") from None


def f1(folder):
    """JMERE F1 of a run, in percent."""
    return 100 * read(folder, "scores")["scores"][common.HEADLINE]["f1"]


def reward(folder):
    """Mean reward of a run's responses as 04 gives it by default (Eq. 5): 0 … 1.5.

    None where they were asked for the answer alone.
    """
    rewards = []
    for _, row in data.read_jsonl(Path(folder) / "predictions.jsonl"):
        if row["prompt"] == "direct":
            return None
        gold = [common.quintuple(*q) for q in row["quintuples"]]
        rewards += [reward_of(response["text"], gold) for response in row["responses"]]
    return mean(rewards)


def tokens(folder):
    """Mean length of a run's responses in tokens; None where they were not counted."""
    rows = [row for _, row in data.read_jsonl(folder / "predictions.jsonl")]
    lengths = [response.get("tokens") for row in rows for response in row["responses"]]
    return None if None in lengths else mean(lengths)


def reward_of(text, gold):
    """Eq. 5 with the paper's weights."""
    response = common.parse_response(text)
    accuracy = common.accuracy_reward(response, gold)
    partial = common.partial_reward(response, gold)
    return accuracy + 0.2 * partial + 0.1 * common.format_reward(response)


def scores(folder):
    """{column: figure} of one run; the interval as (low, high)."""
    metrics = read(folder, "scores", "responses")
    jmere = metrics["scores"][common.HEADLINE]
    low, high = jmere["f1_95"]
    responses = metrics["responses"]
    return {
        "JMERE P": 100 * jmere["precision"],
        "R": 100 * jmere["recall"],
        "F1": 100 * jmere["f1"],
        "95 % of F1": (100 * low, 100 * high),
        "MNER F1": 100 * metrics["scores"]["mner"]["f1"],
        "parsed": 100 - 100 * responses["unparsed"] / responses["responses"],
        "reward (≤ 1.5)": reward(folder),
        "tokens": tokens(folder),
    }


def sweep(folder):
    """{column: figure} of one run among many that differ in one thing."""
    return {name: value for name, value in scores(folder).items() if name in SWEEP}


def votes(folder):
    """{column: figure} of one run with many responses: F1@1, F1@2, F1@4, …, and how much they differ."""
    many = read(folder, "samples")["samples"]
    curve = {k: 100 * f1 for k, f1, _ in many["f1_at_k"]}
    shown = [k for k in curve if k & (k - 1) == 0 or k == many["n"]]  # powers of 2, and the last
    cells = {f"F1@{k}": curve[k] for k in shown}
    cells["best of N"] = 100 * many["best_of_n"]
    cells["distinct answers"] = many["distinct_answers"]
    cells["paths"] = many["distinct_paths"]
    return cells


# ------------------------------------------------------------------------------------------------ tables


def spread(values, digits=1, sign=""):
    """Mean of one figure over seeds, ± its standard deviation."""
    text = f"{mean(values):{sign}.{digits}f}"
    if len(values) > 1:
        text += f" ± {stdev(values):.{digits}f}"
    return text


def table_row(name, folders, figures):
    """{column: cell} of a run over its seeds. figures: `scores`, `sweep` or `votes`."""
    runs = [figures(folder) for folder in folders]
    cells = {"test set (%)": name}
    for column, first in runs[0].items():
        values = [run[column] for run in runs]
        if None in values:
            cells[column] = "–"
        elif not isinstance(first, tuple):
            cells[column] = spread(values, digits=2 if column.startswith("reward") else 1)
        elif len(runs) == 1:  # the interval over tweets of one run says nothing of several
            cells[column] = "–".join(f"{x:.1f}" for x in first)
    return cells


def print_rows(rows):
    """Rows, dicts with the columns of the first one, as Markdown that aligns."""
    header = list(rows[0])
    lines = [header] + [[row.get(column, "") for column in header] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        print(f"| {' | '.join(cells)} |")


def having(folders, runs):
    """Those seeds that have scores of each run; what the others lack is named. runs: {row: its folder}."""
    complete = []
    missing = []
    for folder in folders:
        lack = lacking(folder, runs)
        if lack:
            missing.append(f"{folder.name}/{lack.name}")
        else:
            complete.append(folder)
    if missing:
        print(f"Left out, not made (demo/run.sh or demo/ablations.sh makes it): {', '.join(missing)}.\n")
    return complete


def lacking(folder, runs):
    """The first of a seed's runs that has no scores, or None."""
    return next((folder / run for run in runs.values() if not scored(folder / run)), None)


def scored(run):
    return (run / "metrics.json").exists()


def show(title, folders, runs, figures=scores):
    """Print one table over seeds; runs: {row: folder}. ΔF1 is against JMERE-R1 of the same seed."""
    print(f"\n**{title}**\n")
    folders = having(folders, runs)
    if not folders:
        return
    rows = []
    for name, run in runs.items():
        row = table_row(name, [folder / run for folder in folders], figures)
        if figures is sweep:
            row["above CoT-SFT"] = above(folders, "test-sft", run)
        if figures is not votes:
            row["ΔF1"] = above(folders, "test-grpo", run)
        rows.append(row)
    print_rows(rows)


def paired_gain(folder):
    """GRPO's gain over CoT-SFT: paired() of the two."""
    return paired(folder / "test-sft", folder / "test-grpo")


@cache
def paired(base, run):
    """A run's gain over another on the same tweets, as 05_eval.py --compare has it → ([low, high], p).

    low, high: 95 %, in points.
    """
    runs = [f"base={base}", f"run={run}"]
    settings = argparse.Namespace(compare=runs, limit=None, vote="set", tau=0.5, resamples=1000, seed=0)
    rows = compare.compare(settings).rows
    scores = next(row["scores"][common.HEADLINE] for row in rows if row["name"] == "run")
    return [100 * end for end in scores["difference_95"]], scores["p"]


def above(folders, base, run):
    """How far a run is above another, in points: of one seed with its interval, of several ± over them."""
    if base == run:
        return ""
    deltas = [f1(folder / run) - f1(folder / base) for folder in folders]
    if len(folders) > 1:
        return spread(deltas, sign="+")
    low, high = paired(folders[0] / base, folders[0] / run)[0]
    return f"{deltas[0]:+.1f} ({low:.1f} … {high:.1f})"


def gain_row(folder):
    """{column: cell} of one training: what GRPO adds to the test F1 and to the test reward."""
    sft, grpo = (f1(folder / run) for run in ("test-sft", "test-grpo"))
    (low, high), p = paired_gain(folder)
    rewards = [reward(folder / run) for run in ("test-sft", "test-grpo")]
    return {
        "CoT-SFT": f"{sft:.1f}",
        "JMERE-R1": f"{grpo:.1f}",
        "GRPO's gain (95 %)": f"{grpo - sft:+.1f} ({low:.1f} … {high:.1f})",
        "p": f"{p:.3f}",
        "test reward": " → ".join(f"{value:.2f}" for value in rewards),
    }


def seed_row(folder):
    """{column: cell} of one seed: what SFT and GRPO each add."""
    zero, sft, grpo = (f1(folder / run) for run in ("test-zero", "test-sft", "test-grpo"))
    row = {"seed": folder.name.removeprefix("seed-"), "zero-shot": f"{zero:.1f}"}
    row |= {"from SFT": share(sft - zero, grpo - zero), "from GRPO": share(grpo - sft, grpo - zero)}
    return row | gain_row(folder)


def share(part, whole):
    """In percent, where there was something to share."""
    if whole <= 0:
        return "no gain"
    return f"{100 * part / whole:.0f} %"


def found(folders, prefix):
    """{what follows the prefix: its run} of the runs that every seed has scores of."""
    names = [{path.parent.name for path in folder.glob(f"{prefix}*/metrics.json")} for folder in folders]
    shared = sorted(set.intersection(*names), key=lambda run: (len(run), run))  # 4 before 16
    return {run.removeprefix(prefix): run for run in shared}


def group_sizes(folders):
    """{size of a group: its run} of those that every seed has; 8 is the main one."""
    runs = {8: "test-grpo"}
    for size, run in found(folders, "test-group-").items():
        runs[int(size)] = run
    return dict(sorted(runs.items()))


def show_sweep(title, folders, prefix, label, main_run):
    """Print one table of all that a part of ablations.sh varied; main_run: what JMERE-R1 itself is in it."""
    folders = [folder for folder in folders if found([folder], prefix)]
    if not folders:
        return
    runs = {"CoT-SFT": "test-sft", f"JMERE-R1: {label.format(main_run)}": "test-grpo"}
    runs |= {label.format(value): run for value, run in found(folders, prefix).items()}
    show(title, folders, runs, sweep)


# ------------------------------------------------------------------------------------------------ the gain


def trainings(folders):
    """The finished trainings of the part `gain`: SEED/gain/CLASS-TRAINING_SEED."""
    runs = [run for folder in folders for run in sorted(folder.glob("gain/*-*"))]
    return [run for run in runs if scored(run / "test-sft") and scored(run / "test-grpo")]


def arch(run):
    """The class of a training of the part `gain`."""
    return run.name.rpartition("-")[0]


def training_row(run):
    """{column: cell} of one training of the part `gain`."""
    world = run.parent.parent.name.removeprefix("seed-")
    training = run.name.rpartition("-")[2]
    return {"class": arch(run), "world": world, "training": training} | gain_row(run)


def gains(runs):
    """GRPO's gain over CoT-SFT in points, of each training."""
    return [f1(run / "test-grpo") - f1(run / "test-sft") for run in runs]


def count_row(name, runs):
    """{column: cell} over trainings: in how many GRPO gains, in how many beyond chance, and how much."""
    values = gains(runs)
    beyond = [paired_gain(run)[0] for run in runs]
    sft, grpo = ([f1(run / test) for run in runs] for test in ("test-sft", "test-grpo"))
    return {
        "class": name,
        "trainings": f"{len(runs)}",
        "CoT-SFT": spread(sft),
        "JMERE-R1": spread(grpo),
        "GRPO's gain": spread(values, sign="+"),
        "gains": f"{sum(value > 0 for value in values)} of {len(runs)}",
        "interval above 0": f"{sum(low > 0 for low, _ in beyond)}",
        "interval below 0": f"{sum(high < 0 for _, high in beyond)}",
    }


def show_trainings(folders):
    """Print the tables of the part `gain`, if it was run: how often GRPO gains, and every training."""
    runs = sorted(trainings(folders), key=lambda run: run.name)
    if not runs:
        return
    print("\n**Every training: does GRPO gain?** (gain: JMERE-R1 − CoT-SFT; interval: paired, 95 %)\n")
    classes = sorted({arch(run) for run in runs})
    rows = [count_row(name, [run for run in runs if arch(run) == name]) for name in classes]
    if len(rows) > 1:
        rows.append(count_row("both", runs))
    print_rows(rows)
    print()
    print_rows([training_row(run) for run in runs])


# ------------------------------------------------------------------------------------------------ figures


def draw(folders, out):
    from matplotlib.figure import Figure

    panels = {
        draw_rewards: [folder for folder in folders if scored(folder / "test-grpo")],
        draw_trainings: trainings(folders),
        draw_intervals: trainings(folders),
        draw_group_sizes: [folder for folder in folders if found([folder], "test-group-")],
        draw_votes: [folder for folder in folders if scored(folder / "vote")],
    }
    panels = {panel: runs for panel, runs in panels.items() if runs}
    figure = Figure(figsize=(4 * len(panels), 3.6), layout="constrained")
    for number, (panel, runs) in enumerate(panels.items(), 1):
        panel(figure.add_subplot(1, len(panels), number), runs)
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
        ends = [reward(folder / run) for run in ("test-sft", "test-grpo")]
        axes.plot([0, len(rewards)], ends, "--o", color=colour, label=folder.name.replace("-", " "))
    axes.set(title="reward: test set (dots), training (lines)", xlabel="update")
    axes.set(ylabel=f"mean; training: of {WINDOW} updates")


def draw_trainings(axes, runs):
    """Every training of the part `gain`: from CoT-SFT to JMERE-R1, dashed where it lost."""
    classes = sorted({arch(run) for run in runs})
    for run in runs:
        place = classes.index(arch(run))
        ends = [f1(run / test) for test in ("test-sft", "test-grpo")]
        style = "-o" if ends[1] > ends[0] else "--o"
        axes.plot([2 * place, 2 * place + 1], ends, style, color=f"C{place}", markersize=3)
    ticks = [f"{name}\n{name_of_class}" for name_of_class in classes for name in ("CoT-SFT", "JMERE-R1")]
    axes.set_xticks(range(len(ticks)), ticks, fontsize=7)
    axes.set(title=f"{len(runs)} trainings", ylabel="test F1 (%)")


def draw_intervals(axes, runs):
    """GRPO's gain in every training of the part `gain`, the smallest below, with its paired interval."""
    classes = sorted({arch(run) for run in runs})
    ordered = sorted(zip(gains(runs), runs, strict=True))
    for row, (gain, run) in enumerate(ordered):
        colour = f"C{classes.index(arch(run))}"
        low, high = paired_gain(run)[0]
        axes.plot([low, high], [row, row], color=colour)
        axes.plot(gain, row, "o", color=colour, markersize=4)
    axes.axvline(0, color="grey", linestyle="--")
    axes.set_yticks([])
    axes.set(title="GRPO's gain, 95 % over tweets", xlabel="JMERE-R1 − CoT-SFT (points of F1)")


def draw_group_sizes(axes, folders):
    """Figure 3."""
    sizes = group_sizes(folders)
    for number, folder in enumerate(folders):
        gains = [f1(folder / run) - f1(folder / "test-sft") for run in sizes.values()]
        axes.plot(range(len(sizes)), gains, "-o", color=f"C{number}", label=folder.name.replace("-", " "))
    axes.axhline(0, color="grey", linestyle="--")
    axes.set_xticks(range(len(sizes)), sizes)
    axes.set(title="Figure 3: size of a group", xlabel="responses a prompt")
    axes.set(ylabel="test F1 above CoT-SFT (points)")


def draw_votes(axes, folders):
    """Figure 5."""
    for name, run in VOTES.items():
        curves = [read(folder / run, "samples")["samples"]["f1_at_k"] for folder in folders]
        responses = [k for k, _, _ in curves[0]]
        means = [100 * mean(f1 for _, f1, _ in points) for points in zip(*curves, strict=True)]
        axes.plot(responses, means, marker=".", label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(title="Figure 5: vote of many responses", xlabel="responses k")
    axes.set(ylabel="test F1@k (%), mean of seeds")


# ------------------------------------------------------------------------------------------------ main


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("work", nargs="+", type=Path, help="WORK of run.sh, one or a seed each [ours]")
    parser.add_argument("--figures", type=Path, help="picture to draw [ours: none]")
    return parser.parse_args(argv)


@common.exit_codes
def main(args):
    folders = args.work
    if not any(any(folder.glob("**/metrics.json")) for folder in folders):
        raise common.InputError(f"{folders[0]}: no scores to read: made by demo/run.sh")
    show("Paradigms (Tables 1 and 3)", folders, PARADIGMS)
    shares = [seed_row(folder) for folder in folders if not lacking(folder, PARADIGMS)]
    if shares:
        print("\n**Share of the gain over zero-shot, and what GRPO adds to CoT-SFT**\n")
        print_rows(shares)
    show_trainings(folders)
    show("Ablations (Table 2)", folders, WITHOUT)
    show_sweep("Size of a group (Figure 3)", folders, "test-group-", "group of {}", "8")
    show_sweep("Variants", folders, "test-variant-", "{}", "the paper's")
    show_sweep("Learning rates of GRPO", folders, "test-rate-", "{}", "1e-4")
    title = "Many responses (Figure 5): temperature 0.8, most frequent set of quintuples"
    show(title, folders, VOTES, votes)
    if args.figures:
        draw(folders, args.figures)


if __name__ == "__main__":
    main(parse_args())
