"""What the wrong answers of a run in the demo's world are wrong in: seeing, tying names to figures, copying
names, or the rest of the reasoning.

    python -m demo.errors runs/ablations/seed-*/test-sft runs/ablations/seed-*/test-grpo

Reads:  predictions.jsonl of 05_eval.py with thoughts, and the pictures that it names.
Writes: one table, to the screen; runs whose folders have the same name are one column, their mean.
"""

import argparse
from collections import Counter, defaultdict
from pathlib import Path
from statistics import mean

import common
from demo import world
from demo.tables import print_rows
from lib import data

RIGHT = "nothing: right"
KINDS = (
    RIGHT,
    "the description of the picture",
    "which name is which figure",
    "a name that the tweet does not have",
    "one name twice in a quintuple",
    "how many quintuples",
    "head, tail, type or relation",
)


def kind(text, gold, names, scene):
    """What a response is wrong in first, in the order of KINDS. names: of the tweet; scene: its picture."""
    pred = set(common.parse_response(text).quintuples)
    if pred == set(gold):
        return RIGHT
    _, seen = world.describe(scene).split("; ")  # day or night has no bearing on the answer
    if seen not in text:
        return KINDS[1]
    if world.align(names, scene) not in text:
        return KINDS[2]
    if any(name not in names for q in pred for name in (q.head, q.tail)):
        return KINDS[3]
    if any(q.head == q.tail for q in pred):
        return KINDS[4]
    if len(pred) != len(gold):
        return KINDS[5]
    return KINDS[6]


def count(run):
    """{kind: share of the first responses} of a folder of 05. Raises InputError."""
    path = run / "predictions.jsonl"
    kinds = Counter()
    for number, row in data.read_jsonl(path):
        gold = [common.quintuple(*q) for q in row["quintuples"]]
        picture = data.load_image(run / row["image"])
        try:
            scene = world.look(picture)
        except ValueError as error:
            raise common.InputError(f"{path}:{number}: no picture of demo/world.py ({error})") from None
        text = row["responses"][0]["text"]
        kinds[kind(text, gold, world.names_in(row["text"]), scene)] += 1
    if not kinds:
        raise common.InputError(f"{path}: no rows (made by 05_eval.py)")
    return {name: kinds[name] / kinds.total() for name in KINDS}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", type=Path, help="OUT of 05_eval.py, one or several [ours]")
    return parser.parse_args(argv)


@common.exit_codes
def main(args):
    columns = defaultdict(list)
    for run in args.runs:
        columns[run.name].append(count(run))
    rows = []
    for name in KINDS:
        row = {"wrong in (% of tweets)": name}
        row |= {run: f"{100 * mean(c[name] for c in counts):.1f}" for run, counts in columns.items()}
        rows.append(row)
    print_rows(rows)


if __name__ == "__main__":
    main(parse_args())
