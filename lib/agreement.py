"""Figure 6: how the judge's scores agree with those of people. Knows no server."""

import csv
import json
import math
from collections import Counter
from pathlib import Path

from common import POINTS, InputError
from lib import data

MOST = sum(POINTS)  # points of a perfect chain


def read_human(path):
    """{(id, candidate): mean of its raters} of rows {"id", "candidate", "score"}, JSONL or CSV.

    Raises InputError.
    """
    scores = {}
    for number, row in read_rows(path):
        share = row.get("score")
        complete = {"id", "candidate"} <= row.keys()
        if not complete or isinstance(share, bool) or not isinstance(share, int | float):
            raise InputError(f'{path}:{number}: expected {{"id": …, "candidate": 0, "score": 0 to 1}}')
        if not 0 <= share <= 1:
            raise InputError(
                f"{path}:{number}: score {share}, expected a share from 0 to 1: divide by the scale"
            )
        scores.setdefault((str(row["id"]), row["candidate"]), []).append(share)
    return {key: sum(given) / len(given) for key, given in scores.items()}


def read_rows(path):
    """Yield (line number, row) of JSONL, or of a .csv with a heading line, numbers read as such."""
    if Path(path).suffix.lower() != ".csv":
        yield from data.read_jsonl(path)
        return
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        for row in reader:
            try:
                row["candidate"] = int(row["candidate"])
                row["score"] = float(row["score"])
            except (KeyError, TypeError, ValueError):
                fault = "expected columns id, candidate (0, 1, …) and score (0 to 1), separated by commas"
                raise InputError(f"{path}:{reader.line_num}: {fault}") from None
            yield reader.line_num, row


def agreement(human, points, png):
    """Mean absolute error, share within 0.1, kappa and histogram, printed and drawn → figures.

    human: {candidate key: 0 to 1}; points: {candidate key: points of the judge}. Raises InputError where no
    candidate has both.
    """
    pairs = [(points[key], share) for key, share in human.items() if key in points]
    if not pairs:
        raise InputError(
            f"--human: none of its {len(human)} candidates was scored by the judge: "
            "id and candidate as in --cot"
        )
    gaps = [judged / MOST - share for judged, share in pairs]
    bins = Counter(math.floor(gap * 10 + 0.5) for gap in gaps)
    result = {
        "compared": len(pairs),
        "not_judged": len(human) - len(pairs),
        "mean_absolute_error": sum(map(abs, gaps)) / len(gaps),
        "within_0.1": sum(abs(gap) <= 0.1 + 1e-9 for gap in gaps) / len(gaps),
        "kappa": kappa(pairs),
    }
    print(f"judge against people: {json.dumps(result)}\njudge − people, candidates")
    spread = range(min(bins), max(bins) + 1)
    for gap in spread:
        print(f"{gap / 10:+5.1f} {bins[gap]:>6} {'#' * round(50 * bins[gap] / max(bins.values()))}")
    draw([gap / 10 for gap in spread], [bins[gap] for gap in spread], result, png)
    return {**result, "histogram": {f"{gap / 10:+.1f}": bins[gap] for gap in spread}}


def kappa(pairs):
    """Cohen's, with quadratic weights, both raters in points; None where chance agrees wholly."""
    rated = [(judged, math.floor(share * MOST + 0.5)) for judged, share in pairs]
    seen = sum((a - b) ** 2 for a, b in rated)
    chance = 0
    for judged, _ in rated:
        for _, human in rated:
            chance += (judged - human) ** 2
    chance /= len(rated)
    return 1 - seen / chance if chance else None


def draw(gaps, counts, result, png):
    import matplotlib.figure

    figure = matplotlib.figure.Figure()
    axes = figure.subplots()
    axes.bar(gaps, counts, width=0.08)
    title = f"MAE {result['mean_absolute_error']:.3f}, n = {result['compared']}"
    axes.set(xlabel="judge − people", ylabel="candidates", title=title)
    figure.savefig(png, metadata={"Software": "02_filter.py"})
