"""The table of paradigms (Table 1) from what 05 left: quintuple P, R, F1, typed-entity F1, 95 % intervals, mean reward (Eq. 5).

    python -m demo.table zero-shot=runs/demo/test-zero JMERE-R1=runs/demo/test-grpo
    python -m demo.table JMERE-R1=runs/a/test-grpo,runs/b/test-grpo     # several seeds: mean ± standard deviation over them
    python -m demo.table --votes JMERE-R1=runs/a/vote,runs/b/vote       # what many responses are worth (Figure 5)

Reads:  metrics.json and predictions.jsonl in FOLDER of each NAME=FOLDER.  Writes: the table, to the screen.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

import common
from lib import data


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="NAME=FOLDER[,…]",
        help="a name for the row, and what 05 had as --out [ours]",
    )
    parser.add_argument("--votes", action="store_true", help="F1@k instead, of runs with --samples [ours]")
    return parser.parse_args(argv)


def read(folder, *parts):
    """metrics.json of a run, as a dict that has these parts. Raises InputError otherwise."""
    path = Path(folder) / "metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        return {part: metrics[part] for part in parts}
    except (OSError, ValueError, KeyError) as error:
        fault = f"{path}: no scores to read ({type(error).__name__}: {error})"
        raise common.InputError(
            f"{fault}: made by 05_eval.py on data with gold{', with --samples' * ('samples' in parts)}"
        ) from None


def reward(folder):
    """Mean reward (Eq. 5) of a run's responses, as 04 would give it: 0 … 1.5; None where they were asked for the answer alone."""
    rewards = []
    for _, row in data.read_jsonl(Path(folder) / "predictions.jsonl"):
        if row["prompt"] == "direct":
            return None
        gold = [common.quintuple(*q) for q in row["quintuples"]]
        rewards += [common.reward(response["text"], gold).total for response in row["responses"]]
    return mean(rewards)


def scores(folder):
    """{column: figure} of one run; the interval as (low, high)."""
    metrics = read(folder, "scores", "responses")
    jmere, responses = metrics["scores"]["jmere"], metrics["responses"]
    return {
        "JMERE P": 100 * jmere["precision"],
        "R": 100 * jmere["recall"],
        "F1": 100 * jmere["f1"],
        "95 % of F1": tuple(100 * x for x in jmere["f1_95"]),
        "MNER F1": 100 * metrics["scores"]["mner"]["f1"],
        "parsed": 100 - 100 * responses["unparsed"] / responses["responses"],
        "reward (≤ 1.5)": reward(folder),
    }


def votes(folder):
    """{column: figure} of one run with many responses: F1@1, F1@2, F1@4, … and the spread of the responses."""
    many = read(folder, "samples")["samples"]
    curve = {k: 100 * f1 for k, f1, _ in many["f1_at_k"]}
    shown = {f"F1@{k}": curve[k] for k in sorted({*(2**i for i in range(many["n"].bit_length())), many["n"]})}
    rest = {
        "best of N": 100 * many["best_of_n"],
        "distinct answers": many["distinct_answers"],
        "paths": many["distinct_paths"],
    }
    return shown | rest


def spread(values, digits=1, sign=""):
    """Mean of one figure over seeds, ± its standard deviation."""
    return f"{mean(values):{sign}.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def row(name, folders, figures):
    runs = [figures(folder) for folder in folders]
    cells = {}
    for column, first in runs[0].items():
        values = [run[column] for run in runs]
        if None in values:
            cells[column] = "–"
        elif isinstance(first, tuple):  # the interval over tweets of one run says nothing of several
            cells |= {column: "–".join(f"{x:.1f}" for x in first)} if len(runs) == 1 else {}
        else:
            cells[column] = spread(values, digits=2 if column.startswith("reward") else 1)
    return {"test set (%)": name, **cells}


def print_rows(rows):
    """Rows, dicts with the columns of the first one, as Markdown that aligns."""
    lines = [list(rows[0]), *([row.get(column, "") for column in rows[0]] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print(f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths))} |")


@common.exit_codes
def main(args):
    wrong = [run for run in args.runs if "=" not in run]
    if wrong:
        raise common.InputError(f"{wrong[0]}: expected NAME=FOLDER")
    named = [run.split("=", 1) for run in args.runs]
    print_rows([row(name, folders.split(","), votes if args.votes else scores) for name, folders in named])


if __name__ == "__main__":
    main(parse_args())
