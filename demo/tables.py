"""The tables and figures of demo/RESULTS.md, from the folders that run.sh and ablations.sh left.

    python -m demo.tables runs/demo-llava                                    # of one run
    python -m demo.tables runs/ablations/seed-* --figures figures.png        # of several seeds: mean ± sd

Reads:  WORK/*/metrics.json and predictions.jsonl of 05; for --figures also WORK/grpo/metrics.jsonl of 04.
Writes: the tables, to the screen, each over the seeds that have all its runs, and naming what the others
lack. --figures: of what was run, the reward before, in and after GRPO, every training of the part `gain`
with its interval, Figure 3 (gain by size of the group), Figure 5 (F1 of the vote of k responses).
"""

import argparse
from pathlib import Path
from statistics import mean, stdev

import common
from demo import figures, measures

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


def spread(values, digits=1, sign=""):
    """Mean of one figure over seeds, ± its standard deviation."""
    text = f"{mean(values):{sign}.{digits}f}"
    if len(values) > 1:
        text += f" ± {stdev(values):.{digits}f}"
    return text


def table_row(name, folders, measure):
    """{column: cell} of a run over its seeds. measure: scores, sweep or votes of measures."""
    runs = [measure(folder) for folder in folders]
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
        lack = measures.lacking(folder, runs)
        if lack:
            missing.append(f"{folder.name}/{lack.name}")
        else:
            complete.append(folder)
    if missing:
        print(f"Left out, not made (demo/run.sh or demo/ablations.sh makes it): {', '.join(missing)}.\n")
    return complete


def show(title, folders, runs, measure=measures.scores):
    """Print one table over seeds; runs: {row: folder}. ΔF1 is against JMERE-R1 of the same seed."""
    print(f"\n**{title}**\n")
    folders = having(folders, runs)
    if not folders:
        return
    rows = []
    for name, run in runs.items():
        row = table_row(name, [folder / run for folder in folders], measure)
        if measure is measures.sweep:
            row["above CoT-SFT"] = above(folders, "test-sft", run)
        if measure is not measures.votes:
            row["ΔF1"] = above(folders, "test-grpo", run)
        rows.append(row)
    print_rows(rows)


def above(folders, base, run):
    """How far a run is above another, in points: of one seed with its interval, of several ± over them."""
    if base == run:
        return ""
    deltas = [measures.f1(folder / run) - measures.f1(folder / base) for folder in folders]
    if len(folders) > 1:
        return spread(deltas, sign="+")
    low, high = measures.paired(folders[0] / base, folders[0] / run)[0]
    return f"{deltas[0]:+.1f} ({low:.1f} … {high:.1f})"


def gain_row(folder):
    """{column: cell} of one training: what GRPO adds to the test F1 and to the test reward."""
    sft, grpo = (measures.f1(folder / run) for run in ("test-sft", "test-grpo"))
    (low, high), p = measures.paired_gain(folder)
    rewards = [measures.reward(folder / run) for run in ("test-sft", "test-grpo")]
    return {
        "CoT-SFT": f"{sft:.1f}",
        "JMERE-R1": f"{grpo:.1f}",
        "GRPO's gain (95 %)": f"{grpo - sft:+.1f} ({low:.1f} … {high:.1f})",
        "p": f"{p:.3f}",
        "test reward": " → ".join(f"{value:.2f}" for value in rewards),
    }


def seed_row(folder):
    """{column: cell} of one seed: what SFT and GRPO each add."""
    zero, sft, grpo = (measures.f1(folder / run) for run in ("test-zero", "test-sft", "test-grpo"))
    row = {"seed": folder.name.removeprefix("seed-"), "zero-shot": f"{zero:.1f}"}
    row |= {"from SFT": share(sft - zero, grpo - zero), "from GRPO": share(grpo - sft, grpo - zero)}
    return row | gain_row(folder)


def share(part, whole):
    """In percent, where there was something to share."""
    if whole <= 0:
        return "no gain"
    return f"{round(100 * part / whole)} %"


def show_sweep(title, folders, prefix, label, main_run):
    """Print one table of all that a part of ablations.sh varied; main_run: what JMERE-R1 itself is in it."""
    folders = [folder for folder in folders if measures.found([folder], prefix)]
    if not folders:
        return
    runs = {"CoT-SFT": "test-sft", f"JMERE-R1: {label.format(main_run)}": "test-grpo"}
    runs |= {label.format(value): run for value, run in measures.found(folders, prefix).items()}
    show(title, folders, runs, measures.sweep)


# ------------------------------------------------------------------------------------------------ the gain


def training_row(run):
    """{column: cell} of one training of the part `gain`."""
    world = run.parent.parent.name.removeprefix("seed-")
    training = run.name.rpartition("-")[2]
    return {"class": measures.arch(run), "world": world, "training": training} | gain_row(run)


def count_row(name, runs):
    """{column: cell} over trainings: in how many GRPO gains, in how many beyond chance, and how much."""
    values = measures.gains(runs)
    beyond = [measures.paired_gain(run)[0] for run in runs]
    sft, grpo = ([measures.f1(run / test) for run in runs] for test in ("test-sft", "test-grpo"))
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
    runs = sorted(measures.trainings(folders), key=lambda run: run.name)
    if not runs:
        return
    print("\n**Every training: does GRPO gain?** (gain: JMERE-R1 − CoT-SFT; interval: paired, 95 %)\n")
    classes = sorted({measures.arch(run) for run in runs})
    rows = [count_row(name, [run for run in runs if measures.arch(run) == name]) for name in classes]
    if len(rows) > 1:
        rows.append(count_row("both", runs))
    print_rows(rows)
    print()
    print_rows([training_row(run) for run in runs])


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
    shares = [seed_row(folder) for folder in folders if not measures.lacking(folder, PARADIGMS)]
    if shares:
        print("\n**Share of the gain over zero-shot, and what GRPO adds to CoT-SFT**\n")
        print_rows(shares)
    show_trainings(folders)
    show("Ablations (Table 2)", folders, WITHOUT)
    show_sweep("Size of a group (Figure 3)", folders, "test-group-", "group of {}", "8")
    show_sweep("Variants", folders, "test-variant-", "{}", "the paper's")
    show_sweep("Learning rates of GRPO", folders, "test-rate-", "{}", "1e-4")
    title = "Many responses (Figure 5): temperature 0.8, most frequent set of quintuples"
    show(title, folders, measures.VOTES, measures.votes)
    if args.figures:
        figures.draw(folders, args.figures)


if __name__ == "__main__":
    main(parse_args())
