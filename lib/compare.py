"""Stored runs side by side: the paper's tables, differences by a paired bootstrap. Knows no page."""

from pathlib import Path

import numpy as np

import common
from common import HEADLINE, InputError
from lib import scoring, tables
from lib.predictions import stored_run

PAPER = {  # section: {row: the paper's JMERE P, R, F1 and MNER F1 on the test set, %; None: not known here}
    "Zero-shot (Table 3)": {
        "zero-shot GPT-4o": (None, None, 12.68, None),
        "zero-shot Qwen2.5-VL-7B": (None, None, 9.60, None),
        "zero-shot LLaVA-1.5-7B": (None, None, 9.52, None),
    },
    "Trained (Table 1)": {
        "EEGA": (58.26, 52.61, 55.29, 78.59),
        "SFT": (56.88, 47.81, 51.95, 78.67),
        "CoT-SFT": (50.54, 43.59, 46.77, 74.75),
        "Only-RL": (40.11, 34.53, 37.11, 71.89),
        "JMERE-R1": (58.99, 54.84, 56.84, 79.20),
    },
    "Ablations (Table 2)": {
        "no partial reward": (None,) * 4,
        "no score filter": (None,) * 4,
        "no re-prediction filter": (None,) * 4,
        "no filter": (None,) * 4,
    },
}
OTHERS = "Other runs"
STARTS = {  # how the name of a run begins that is no row of the paper: its section
    "zero-shot": "Zero-shot (Table 3)",
    "no ": "Ablations (Table 2)",
    "without ": "Ablations (Table 2)",
    "w/o ": "Ablations (Table 2)",
}
SECTIONS = (*PAPER, OTHERS)
METRICS = (HEADLINE, "mner")
COLUMNS = (
    *("P %", "R %", "F1 %", "95 % of F1", "MNER F1", "ΔF1", "95 % of Δ", "p"),
    *("paper P", "R", "F1", "MNER F1"),
)


def letters_only(name):
    """The name as rows are told apart by it: case, spaces and signs do not count."""
    return "".join(c for c in name.casefold() if c.isalnum())


def split_name(spec):
    """[NAME=]RUN → (name, path)."""
    if Path(spec).exists():  # a path that holds "=" is still a path
        name = ""
        path = spec
    else:
        name, _, path = spec.rpartition("=")
    stem = Path(path).stem
    if stem == "predictions":
        stem = Path(path).absolute().parent.name
    return name or stem, path


def compare(args, known=None):
    """The runs of args.compare, each against the first by a paired bootstrap → rows of the paper's tables, as
    dicts, in the order of SECTIONS.

    known: {id: Example}, the gold; None: the gold that the first run stores. args: compare, limit, vote, tau,
    resamples, seed. Raises InputError where a run cannot be read, or is of other data.
    """
    rows = {}
    first = None
    for spec in args.compare:
        name, path = split_name(spec)
        key = letters_only(name)
        if key in rows:
            raise InputError(f"--compare: two runs are named {name}: name them, as in SFT={path}")
        examples, predictions = stored_run(path, known, args.limit)
        known = known or {example.id: example for example in examples}
        rows[key] = {"name": name, "run": path}
        samples = score_run(args, path, examples, predictions, rows[key])
        if first is None:
            first = rows[key], samples
        else:
            add_difference(rows[key], samples, *first)
    return beside_the_paper(rows)


def score_run(args, path, examples, predictions, row):
    """Fill in the scores of one run → F1 of its resamples [resamples]."""
    if any(example.quintuples is None for example in examples):
        raise InputError(f"{path}: has tweets without gold: give the gold with --data")
    preds = []
    for example in examples:
        given = predictions.get(example.id)
        preds.append(scoring.vote(given.answers, given.parsed, args.vote, args.tau) if given else [])
    golds = [example.quintuples for example in examples]
    tweets = scoring.tweet_numbers(examples)
    scores = scoring.headline(preds, golds, tweets, args.resamples, args.seed)
    row["tweets"] = len(examples)
    row["without_prediction"] = sum(example.id not in predictions for example in examples)
    row["scores"] = {metric: scores[metric] for metric in METRICS}
    counts = scoring.match_counts(preds, golds, common.MATCHING[HEADLINE])
    _, _, f1 = scoring.bootstrap(counts, tweets, args.resamples, args.seed)  # the same seed: paired
    return f1


def add_difference(row, samples, first, first_samples):
    """ΔF1 against the first run, its interval and its two-sided p."""
    difference = samples - first_samples
    tail = min((difference <= 0).sum(), (difference >= 0).sum()).item()
    row["f1_difference"] = row["scores"][HEADLINE]["f1"] - first["scores"][HEADLINE]["f1"]
    row["difference_95"] = np.percentile(difference, (2.5, 97.5)).tolist()
    row["p"] = min(1.0, 2 * (1 + tail) / (len(samples) + 1))  # + 1: no number of resamples shows p = 0


def beside_the_paper(rows):
    """{letters of the name: row} → rows with `section` and `paper`, the paper's own where we have no run."""
    rows = dict(rows)
    result = []
    for section, names in PAPER.items():
        for name, figures in names.items():
            own = rows.pop(letters_only(name), {})
            result.append({"section": section, "name": name, "paper": figures, **own})
    for row in rows.values():
        begun = (section for start, section in STARTS.items() if row["name"].casefold().startswith(start))
        result.append({"section": next(begun, OTHERS), "paper": None, **row})
    return sorted(result, key=lambda row: SECTIONS.index(row["section"]))


# -------------------------------------------------------------------------------- shown


def number(value, sign=""):
    return "–" if value is None else f"{value:{sign}.2f}"


def compared_cells(row):
    """A row under COLUMNS."""
    ours = ["–"] * 5
    if "scores" in row:
        scores = row["scores"][HEADLINE]
        ours = [*tables.cells(scores)[:3], tables.interval(scores["f1_95"])]
        ours.append(tables.percent(row["scores"]["mner"]["f1"]))
    delta = ["–"] * 3
    if "p" in row:
        low, high = row["difference_95"]
        bounds = f"{number(100 * low, '+')} … {number(100 * high, '+')}"
        delta = [number(100 * row["f1_difference"], "+"), bounds, f"{row['p']:.3f}"]
    return [*ours, *delta, *map(number, row["paper"] or [None] * 4)]


def show(rows, markdown=False):
    """Yield Tables 1 to 3 as text or Markdown, without a section that has neither a run of ours nor a
    figure of the paper."""
    for section in SECTIONS:
        body = []
        for row in rows:
            if row["section"] == section and ("scores" in row or any(row["paper"])):
                body.append((row["name"], *compared_cells(row)))
        if body and markdown:
            lines = [(section, *COLUMNS), ("---", *["---:"] * len(COLUMNS)), *body]
            yield "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
        elif body:
            yield tables.table((section, *COLUMNS), body)
