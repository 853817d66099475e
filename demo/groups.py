"""How often GRPO's division by the standard deviation bites: what the rewards of a group differ in, and how
much of the update each kind of group gets under each way to normalise.

    python 04_grpo.py … --log-samples-every 1 --out runs/grpo     # keep the responses of every update
    python -m demo.groups runs/grpo                               # one table over all runs that are named

Reads: OUT/samples.jsonl of 04 with the rewards of the paper.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from statistics import mean, pstdev, stdev

import common
from demo.tables import print_rows
from lib import data

WEIGHTS = {"accuracy": 1.0, "partial": 0.2, "format": 0.1}  # Eq. 5
KINDS = ("nothing", "accuracy", "format alone", "distance alone, all wrong", "distance alone, part right")
SAME = 1e-6  # rewards that differ by less are equal, as in 04


def read_batches(path):
    """{step: [group]} of a samples.jsonl; a group is a list of its responses' rows."""
    batches = defaultdict(lambda: defaultdict(list))
    for number, row in data.read_jsonl(path):
        missing = [name for name in ("step", "id", "reward", *WEIGHTS) if name not in row]
        if missing:
            raise common.InputError(f"{path}:{number}: missing {missing[0]!r} (made by 04_grpo.py)")
        batches[row["step"]][row["id"]].append(row)
    return {step: list(groups.values()) for step, groups in batches.items()}


def differs(group, part):
    values = [row[part] for row in group]
    return max(values) - min(values) >= SAME


def kind(group):
    """What the responses of a group differ in, as far as the reward sees it: one of KINDS."""
    if not differs(group, "reward"):
        return "nothing"
    if differs(group, "accuracy"):
        return "accuracy"
    if differs(group, "format"):
        return "format alone"
    if group[0]["accuracy"] == 0:
        return "distance alone, all wrong"
    return "distance alone, part right"


def centred(group, part):
    middle = mean(row[part] for row in group)
    return [row[part] - middle for row in group]


def normalised(group, part):
    """(r − mean) / (std + 1e-4), 0 where the part is constant."""
    if not differs(group, part):
        return [0.0] * len(group)
    deviation = stdev(row[part] for row in group)
    return [value / (deviation + 1e-4) for value in centred(group, part)]


def by_part(group):
    """GDPO: each part normalised by itself, then added up."""
    parts = [[weight * value for value in normalised(group, part)] for part, weight in WEIGHTS.items()]
    return [sum(values) for values in zip(*parts, strict=True)]


def pulls(batch):
    """{way to normalise: [Σ|A| of each group, as a share of its batch]}: the batch's own scale drops out."""
    ways = {
        "paper": [normalised(group, "reward") for group in batch],
        "no_std, batch_std, rloo": [centred(group, "reward") for group in batch],
        "gdpo": [by_part(group) for group in batch],
    }
    shares = {}
    for way, advantages in ways.items():
        sizes = [sum(map(abs, values)) for values in advantages]
        total = sum(sizes)
        shares[way] = [size / total if total else 0.0 for size in sizes]
    return shares


def table(batches):
    """Rows: a kind of group, how many there are, the spread of their rewards, their share of an update."""
    count = defaultdict(int)
    spreads = defaultdict(list)
    share = defaultdict(lambda: defaultdict(float))
    for batch in batches:
        kinds = [kind(group) for group in batch]
        for name, group in zip(kinds, batch, strict=True):
            count[name] += 1
            spreads[name].append(pstdev(row["reward"] for row in group))
        for way, values in pulls(batch).items():
            for name, value in zip(kinds, values, strict=True):
                share[name][way] += value / len(batches)
    rows = []
    for name in KINDS:
        row = {"the group's responses differ in": name, "groups": f"{count[name]}"}
        row["share"] = f"{100 * count[name] / sum(count.values()):.1f} %"
        row["std of the reward"] = f"{mean(spreads[name]):.3f}" if spreads[name] else "–"
        for way in pulls(batches[0]):
            row[f"of the update: {way}"] = f"{100 * share[name][way]:.1f} %"
        rows.append(row)
    return rows


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", type=Path, help="OUT of 04_grpo.py, one or several [ours]")
    return parser.parse_args(argv)


@common.exit_codes
def main(args):
    batches = []
    for run in args.runs:
        batches += read_batches(run / "samples.jsonl").values()
    print_rows(table(batches))


if __name__ == "__main__":
    main(parse_args())
