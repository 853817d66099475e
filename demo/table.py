"""The table of paradigms (Table 1) from the metrics.json files that 05 left: quintuple P, R, F1, typed-entity F1, 95 % intervals.

    python demo/table.py zero-shot=runs/demo/test-zero JMERE-R1=runs/demo/test-grpo

Reads:  FOLDER/metrics.json of each NAME=FOLDER.  Writes: the table, to the screen.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER", help="a name for the row, and what 05 had as --out [ours]")
    return parser.parse_args(argv)


def row(name, folder):
    path = Path(folder) / "metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        jmere, mner, responses = metrics["scores"]["jmere"], metrics["scores"]["mner"], metrics["responses"]
        formed = responses["well_formed"] / responses["responses"]
    except (OSError, ValueError, KeyError) as error:
        raise common.InputError(
            f"{path}: no scores to read ({type(error).__name__}: {error}): made by 05_eval.py on data with gold"
        ) from None
    low, high = jmere["f1_95"]
    figures = [f"{100 * x:.1f}" for x in (jmere["precision"], jmere["recall"], jmere["f1"])]
    return [name, *figures, f"{100 * low:.1f}–{100 * high:.1f}", f"{100 * mner['f1']:.1f}", f"{100 * formed:.0f}"]


@common.cli
def main(args):
    wrong = [run for run in args.runs if "=" not in run]
    if wrong:
        raise common.InputError(f"{wrong[0]}: expected NAME=FOLDER")
    lines = [
        ["test set (%)", "JMERE P", "R", "F1", "95 % of F1", "MNER F1", "well formed"],
        *(row(*run.split("=", 1)) for run in args.runs),
    ]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    print("\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines))


if __name__ == "__main__":
    main(parse_args())
