"""Stored runs beside each other: the paper's tables, several seeds as one row, differences by a paired
bootstrap. Knows no page."""

from pathlib import Path
from typing import NamedTuple

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
JMERE_COLUMNS = ("P %", "R %", "F1 %", "95 % of F1", "ΔF1", "95 % of Δ", "p", "paper P", "R", "F1")
MNER_COLUMNS = ("F1 %", "95 % of F1", "ΔF1", "95 % of Δ", "p", "paper F1")


class Comparison(NamedTuple):
    """What --compare found."""

    rows: list  # of the paper's tables, as dicts, in the order of SECTIONS
    notes: list  # what a reader of the rows must know
    first: str  # the name of the method that the others are compared with
    methods: list  # [(name, [StoredRun])], as given


def letters_only(name):
    """The name as rows are told apart by it: case, spaces and signs do not count."""
    return "".join(c for c in name.casefold() if c.isalnum())


def split_name(spec):
    """[NAME=]RUN[,RUN …] → (name, [path]); the name of a run without one is its folder's or file's."""
    if Path(spec).exists():  # a path that holds "=" or "," is still a path
        name = ""
        paths = [spec]
    else:
        name, _, rest = spec.rpartition("=")
        paths = [rest] if Path(rest).exists() else rest.split(",")
    stem = Path(paths[0]).stem
    if stem == "predictions":
        stem = Path(paths[0]).absolute().parent.name
    return name or stem, paths


def compare(args, known=None):
    """The methods of args.compare, each against the first by a paired bootstrap over tweets → Comparison.

    Several runs of one method (seeds) are one row: means, with their standard deviation. known: {id:
    Example}, the gold; None: the gold that the first run stores. args: compare, limit, vote, tau,
    resamples, seed. Raises InputError where a run cannot be read, or is of other data.
    """
    methods = {}
    for spec in args.compare:
        name, paths = split_name(spec)
        key = letters_only(name)
        if key in methods:
            raise InputError(f"--compare: two runs are named {name}: name them, as in SFT={paths[0]}")
        runs = []
        for path in paths:
            runs.append(stored_run(path, known, args.limit))
            known = known or {example.id: example for example in runs[0].examples}
        methods[key] = (name, runs)
    rows = {}
    first = None
    for key, (name, runs) in methods.items():
        rows[key], samples = score_method(args, name, runs)
        if first is None:
            first = rows[key], samples
        else:
            for metric in METRICS:
                add_difference(rows[key], samples, *first, metric)
    names = [row["name"] for row in rows.values()]
    return Comparison(beside_the_paper(rows), notes(methods.values()), names[0], list(methods.values()))


def final_answers(args, run):
    """[N] the answer to each tweet after the vote, empty where there is no prediction."""
    preds = []
    for example in run.examples:
        given = run.predictions.get(example.id)
        preds.append(scoring.vote(given.answers, given.parsed, args.vote, args.tau) if given else [])
    return preds


def score_method(args, name, runs):
    """→ the row of one method, {metric: F1 of its resamples [resamples], the mean over its runs}."""
    examples = runs[0].examples
    if any(example.quintuples is None for example in examples):
        raise InputError(f"{runs[0].path}: has tweets without gold: give the gold with --data")
    golds = [example.quintuples for example in examples]
    tweets = scoring.tweet_numbers(examples)
    answers = [final_answers(args, run) for run in runs]
    row = {"name": name, "runs": [str(run.path) for run in runs], "tweets": len(examples)}
    row["without_prediction"] = [sum(e.id not in run.predictions for e in examples) for run in runs]
    row["responses"] = [responses_of(run) for run in runs]
    row["scores"] = {}
    samples = {}
    for metric in METRICS:
        counts = [scoring.match_counts(preds, golds, common.MATCHING[metric]) for preds in answers]
        sums = scoring.resample(np.hstack(counts), tweets, args.resamples, args.seed)  # [resamples, 3 · runs]
        shares = scoring.micro_shares(sums.reshape(len(sums), len(runs), 3))  # [3, resamples, runs]
        samples[metric] = shares[2].mean(1)
        row["scores"][metric] = means([common.micro(*part.sum(0).tolist()) for part in counts])
        row["scores"][metric]["f1_95"] = np.percentile(samples[metric], (2.5, 97.5)).tolist()
    labels = [scoring.per_label(preds, golds) for preds in answers]
    row["per_relation"] = label_means(labels)
    return row, samples


def responses_of(run):
    """(least, most) responses of a tweet."""
    sizes = [len(given.answers) for given in run.predictions.values()]
    return min(sizes), max(sizes)


def means(scores):
    """Micro scores of several runs → means, and with more than one run their standard deviations; counts of
    one."""
    if len(scores) == 1:
        return dict(scores[0])
    result = {}
    for name in scoring.SHARES:
        values = [run[name] for run in scores]
        result[name] = float(np.mean(values))
        result[f"{name}_sd"] = float(np.std(values, ddof=1))
    return result


def label_means(labels):
    """{label: {"f1": mean over runs, "gold": count}}; a run without the label has F1 0 there."""
    result = {}
    for name in dict.fromkeys(name for scores in labels for name in scores):
        found = [scores.get(name, {"f1": 0.0, "gold": 0}) for scores in labels]
        result[name] = {"f1": float(np.mean([f["f1"] for f in found])), "gold": max(f["gold"] for f in found)}
    return result


def add_difference(row, samples, first, first_samples, metric):
    """ΔF1 against the first method, its interval and its two-sided p."""
    difference = samples[metric] - first_samples[metric]
    tail = min((difference <= 0).sum(), (difference >= 0).sum()).item()
    scores = row["scores"][metric]
    scores["difference"] = scores["f1"] - first["scores"][metric]["f1"]
    scores["difference_95"] = np.percentile(difference, (2.5, 97.5)).tolist()
    scores["p"] = min(1.0, 2 * (1 + tail) / (len(difference) + 1))  # + 1: no number of resamples shows p = 0


def notes(methods):
    """What differs between the runs besides what is compared. methods: (name, [StoredRun])."""
    lines = []
    sizes = set()
    images = set()
    seeds = set()
    for name, runs in methods:
        seeds.add(len(runs))
        for run in runs:
            absent = sum(example.id not in run.predictions for example in run.examples)
            if absent:
                lines.append(
                    f"{name}: {absent} of {len(run.examples)} tweets have no prediction in {run.path}: "
                    "counted as empty"
                )
            if run.other_gold:
                lines.append(
                    f"{name}: {run.path} stores another gold for {len(run.other_gold)} tweets "
                    f"({run.other_gold[0]}, …): not the gold that counts here"
                )
            sizes.add(responses_of(run))
            images.add(run.source.get("settings", {}).get("image", "own"))
    if len(sizes) > 1 or any(least != most for least, most in sizes):
        shown = ", ".join(
            f"{least}" if least == most else f"{least} to {most}" for least, most in sorted(sizes)
        )
        lines.append(f"unequal responses a tweet: {shown}: a vote of many stands beside fewer")
    if len(seeds) > 1:
        lines.append("unequal numbers of seeds: a mean stands beside fewer runs")
    if len(images) > 1:
        lines.append(f"other images: the runs saw {' and '.join(sorted(images))} images (--image)")
    return lines


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


def spread(scores, name):
    """A share in percent, ± its standard deviation over seeds."""
    text = tables.percent(scores[name])
    if f"{name}_sd" in scores:
        text += f" ± {tables.percent(scores[f'{name}_sd'])}"
    return text


def difference_cells(scores):
    if "p" not in scores:
        return ["–"] * 3
    low, high = scores["difference_95"]
    bounds = f"{number(100 * low, '+')} … {number(100 * high, '+')}"
    return [number(100 * scores["difference"], "+"), bounds, f"{scores['p']:.4f}"]


def jmere_cells(row):
    """A row under JMERE_COLUMNS."""
    precision, recall, f1, _ = row["paper"] or [None] * 4
    paper = [number(precision), number(recall), number(f1)]
    if "scores" not in row:
        return ["–"] * 7 + paper
    scores = row["scores"][HEADLINE]
    shares = [spread(scores, name) for name in scoring.SHARES]
    return [*shares, tables.interval(scores["f1_95"]), *difference_cells(scores), *paper]


def mner_cells(row):
    """A row under MNER_COLUMNS."""
    paper = number((row["paper"] or [None] * 4)[3])
    if "scores" not in row:
        return ["–"] * 5 + [paper]
    scores = row["scores"]["mner"]
    return [spread(scores, "f1"), tables.interval(scores["f1_95"]), *difference_cells(scores), paper]


def show(comparison, markdown=False):
    """Yield Tables 1 to 3, quintuples and then entities, as text or Markdown.

    A section is left out that has neither a run of ours nor a figure of the paper.
    """
    draw = markdown_table if markdown else tables.table
    for metric, columns, cells in (
        (HEADLINE, JMERE_COLUMNS, jmere_cells),
        ("mner", MNER_COLUMNS, mner_cells),
    ):
        title, _ = scoring.RULES[metric]
        for section in SECTIONS:
            body = []
            for row in comparison.rows:
                if row["section"] == section and ("scores" in row or cells(row)[-1] != "–"):
                    body.append((row["name"], *cells(row)))
            if body:
                yield draw((f"{title}: {section}", *columns), body)
    two = [row for row in comparison.rows if "scores" in row]
    if len(two) == 2:
        yield draw(*label_table(comparison, two))


def label_table(comparison, rows):
    """(header, rows) of ΔF1 by label of two methods."""
    first, second = sorted(rows, key=lambda row: row["name"] != comparison.first)
    body = []
    absent = {"f1": 0.0, "gold": 0}
    for name in dict.fromkeys([*first["per_relation"], *second["per_relation"]]):
        scores = first["per_relation"].get(name, absent)
        other = second["per_relation"].get(name, absent)
        delta = number(100 * (other["f1"] - scores["f1"]), "+")
        body.append((name, scores["gold"], tables.percent(scores["f1"]), tables.percent(other["f1"]), delta))
    header = (scoring.LABEL, "gold", f"F1 % {first['name']}", f"F1 % {second['name']}", "ΔF1")
    return header, body


def markdown_table(header, rows):
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    text = ""
    for line in lines:
        cells = [str(cell).replace("|", "\\|") for cell in line]
        text += f"| {' | '.join(cells)} |\n"
    return text
