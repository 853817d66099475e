"""The upper part of a page: what metrics.json or a comparison holds, as figures and tables that need no
script."""

import json

from common import HEADLINE
from lib import compare, scoring, tables
from lib.figures import (
    bars,
    card,
    curve,
    div,
    diverging,
    dot,
    element,
    figure,
    isolated,
    joined,
    paragraph,
    percent,
    small,
    span,
    table,
    whisker,
)

SCORE_COLUMNS = ("", "F1 %", "95 % of F1", "P %", "R %", "found", "predicted", "gold")
LABEL_COLUMNS = ("P %", "R %", "F1 %", "gold", "predicted")


def heading(over, title, facts):
    """The top of a page. facts: [(what, value)]."""
    line = []
    for name, value in facts:
        value = element("b", {}, isolated(value))
        line.append(element("span", {}, f"{name} ", value))
    title = element("h1", {}, isolated(title))
    return [paragraph("over", over), title, div("facts", *line)]


def section(title, *content):
    return [element("h2", {}, title), *content]


def numbers(stats, name="stats"):
    """Figures beside each other. stats: [(value, what it is)]."""
    shown = []
    for value, label in stats:
        value = element("b", {}, value)
        shown.append(element("div", {}, value, small(label)))
    return div(name, *shown)


def run_page(run, metrics):
    """Everything above the tweets of report.html. run: its name."""
    made_by = metrics["provenance"]["made_by"]
    settings = made_by.get("settings") or {}
    facts = {
        "tweets": metrics["examples"],
        "from": metrics["provenance"]["predictions"]["file"],
        "model": made_by.get("model"),
        "adapter": made_by.get("adapter"),
        "prompt": made_by.get("prompt"),
        "temperature": settings.get("temperature"),
        "images": settings.get("image"),
        "vote": metrics["vote"] if "samples" in metrics else None,
        "without prediction": metrics["without_prediction"] or None,
    }
    known = [(name, value) for name, value in facts.items() if value is not None]
    parts = heading("Evaluation", run, known)
    if "scores" in metrics:
        parts.append(div("hero", headline(metrics), beside_paper(run, metrics)))
        parts += section("Scores, and what counts as equal", score_table(metrics))
        parts += section("Where it is right and wrong", div("grid", *details(metrics)))
    vote = {name: metrics[name] for name in ("vote", "tau")}
    parts.append(all_settings(metrics["provenance"] | vote))
    return joined(parts)


def headline(metrics):
    """The card with the large number and what it can tell."""
    title, rule = scoring.RULES[HEADLINE]
    scores = metrics["scores"][HEADLINE]
    low, high = scores["f1_95"]
    entities, _ = scoring.RULES["mner"]
    stats = (
        (percent(scores["precision"]), "precision"),
        (percent(scores["recall"]), "recall"),
        (percent(metrics["scores"]["mner"]["f1"]), f"{entities} F1"),
    )
    counts = metrics["responses"]
    responses = (
        f"{counts.get('responses', 0)} responses: {counts.get('well_formed', 0)} well formed, "
        f"{counts.get('cut_off', 0)} cut off, {counts.get('unparsed', 0)} unparsed. A tweet without a "
        "readable answer counts as an empty prediction."
    )
    _, *lines = tables.reading(metrics)
    return card(
        "column",
        paragraph("over", f"{title} F1"),
        paragraph("big num", percent(scores["f1"]), element("small", {}, "%")),
        paragraph("soft num", f"95 % interval {percent(low)} – {percent(high)}, over tweets"),
        numbers(stats),
        paragraph("soft small", f"Equal means: {rule}."),
        [paragraph("small num reading", isolated(line)) for line in lines],
        paragraph("soft small num last", responses),
    )


def beside_paper(run, metrics):
    scores = metrics["scores"][HEADLINE]
    rows = [(name, f1 / 100, None) for name, f1 in paper_rows()]
    rows.append((f"this run: {run}", scores["f1"], scores["f1_95"]))
    rows.sort(key=lambda row: -row[1])
    _, highest = scores["f1_95"]
    top = max(highest, rows[0][1])
    drawn = []
    for name, f1, interval in rows:
        colour = "paper"
        more = []
        if interval:
            low, high = interval
            colour = "accent"
            more.append(whisker(low / top, high / top))
        drawn.append((isolated(name), f1 / top, percent(f1, 2), colour, more))
    note = "F1 of quintuples, %. The paper's rows are its test set: compare only runs on that set."
    return figure("Beside the paper", note, bars(drawn))


def paper_rows():
    """[(row of the paper's tables, its F1)]."""
    rows = []
    for group in compare.PAPER.values():
        for name, (_, _, f1, _) in group.items():
            if f1:
                rows.append((name, f1))
    return rows


def score_table(metrics):
    rows = []
    for metric, scores in metrics["scores"].items():
        title, rule = scoring.RULES[metric]
        low, high = scores["f1_95"]
        shares = [percent(scores["f1"], 2), f"{percent(low)} – {percent(high)}"]
        for name in ("precision", "recall"):
            shares.append(percent(scores[name], 2))
        counts = [scores[name] for name in ("tp", "pred", "gold")]
        rows.append(([title, small(rule)], *shares, *counts))
    return card("lead", table(SCORE_COLUMNS, rows))


def details(metrics):
    """The cards below the scores."""
    cards = []
    if "samples" in metrics:
        cards.append(samples(metrics))
    errors = []
    for name, (wrong, missed) in metrics["errors"].items():
        errors.append((name, name, wrong, missed, scoring.ERRORS[name]))
    note = "Each wrong prediction and each gold quintuple not found is in one class"
    sides = ("wrongly predicted", "not found")
    cards.append(figure("What goes wrong", note, diverging(sides, errors)))
    sizes = []
    for name, scores in metrics["per_size"].items():
        value = [percent(scores["f1"]), span("soft", f" · {scores['examples']}")]
        sizes.append((f"{name} in gold", scores["f1"], value, "accent", []))
    by_size = figure("By number of gold quintuples", "F1, % · tweets", bars(sizes))
    stack = [component_figure(metrics), by_size]
    if metrics["confusion"]:
        stack.append(confusion_figure(metrics["confusion"]))
    return [*cards, div("stack", *stack), label_figure(metrics)]


def component_figure(metrics):
    rows = []
    for name, scores in metrics["per_component"].items():
        shares = [percent(scores[share]) for share in scoring.SHARES]
        rows.append((name.replace("_", " "), *shares, scores["tp"]))
    note = (
        "How often each part is right, whatever the others are: predicted and gold paired, most parts equal"
    )
    title = "Parts of a quintuple"
    columns = table(("part", "P %", "R %", "F1 %", "right"), rows, title)
    return figure(title, note, div("figure-table", columns))


def label_figure(metrics):
    rows = []
    for name, scores in metrics["per_relation"].items():
        shares = [percent(scores[share]) for share in scoring.SHARES]
        rows.append((name, *shares, scores["gold"], scores["pred"]))
    title = f"{scoring.LABEL}s".capitalize()
    columns = table((scoring.LABEL, *LABEL_COLUMNS), rows, title)
    return figure(title, "Most frequent in gold first", div("figure-table", columns))


def confusion_figure(confusion):
    most = confusion[0][2]
    rows = []
    for gold, pred, count in confusion[:10]:
        arrow = span("soft", " → ")
        rows.append(([gold, arrow, pred], count / most, count, scoring.CONFUSED, []))
    note = f"gold → predicted: entities and types right, {scoring.LABEL} wrong"
    return figure(f"{scoring.LABEL}s taken for others".capitalize(), note, bars(rows))


def samples(metrics):
    """F1@k and what single responses are worth."""
    many = metrics["samples"]
    points = many["f1_at_k"]
    first = f"k = 1: {percent(points[0][1], 2)} %"
    last = f"k = {many['n']}: {percent(points[-1][1], 2)} %"
    note = (
        f"{scoring.VOTES[metrics['vote']]} of k responses; mean ± standard deviation over {many['subsets']} "
        f"random subsets. All {many['n']} are one subset: no ±"
    )
    stats = (
        (percent(many["single_mean"]), "single response"),
        (percent(many["best_of_n"]), f"best of {many['n']} (oracle)"),
        (f"{many['distinct_answers']:.1f}", "answers a tweet"),
        (f"{many['distinct_paths']:.1f}", "reasonings a tweet"),
    )
    drawing = curve(points, f"F1 by number of responses; {first}; {last}")
    legend = paragraph("small num soft", f"{first}, {last}")
    title = "F1 by number of responses"
    return figure(title, note, drawing, legend, numbers(stats, "stats four"))


def all_settings(values):
    """A fold with everything that is known of how this came about."""
    rows = []
    for name, value in flat(values):
        if not isinstance(value, str):
            value = json.dumps(value)
        rows.append((name, isolated(value)))
    summary = element("summary", {}, "All settings, files, versions")
    settings = table(("", ""), rows)
    return element("details", {"class": "card settings"}, summary, settings)


def flat(values, prefix=""):
    """Yield (name, value) of nested dicts."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name} · ")
        else:
            yield f"{prefix}{name}", value


# -------------------------------------------------------------------------------- two runs


def comparison_page(title, comparison, counts, args):
    """Everything above the tweets of compare.html. counts: {tag: tweets}."""
    facts = [("vote", args.vote), ("resamples", args.resamples)]
    parts = heading("Comparison", title, facts)
    for note in comparison.notes:
        parts.append(paragraph("small reading", isolated(note)))
    rows = [row for row in comparison.rows if "scores" in row]
    rows.sort(key=lambda row: row["name"] != comparison.first)
    scores = own_columns(compare.JMERE_COLUMNS, compare.jmere_cells, rows)
    parts += section("Quintuples", scores)
    scores = own_columns(compare.MNER_COLUMNS, compare.mner_cells, rows)
    parts += section("Entities", scores)
    note = (
        f"Δ, its interval and p (two-sided): against {comparison.first}, paired bootstrap of "
        f"{args.resamples} resamples over tweets."
    )
    parts.append(paragraph("soft small reading", isolated(note)))
    most = max(counts.values()) or 1
    tweets = []
    for tag, count in counts.items():
        colour = tag.replace(" ", "-")
        name = [dot(colour), tag]
        tweets.append((name, count / most, count, colour, []))
    note = "by number of errors, from the first run to the second"
    shown = figure("Tweets", note, bars(tweets))
    header, body = compare.label_table(comparison, rows)
    labels = div("figure-table", table(header, body))
    labels = figure(f"By {scoring.LABEL}", None, labels)
    parts += section("Where they differ", div("grid", shown, labels))
    return joined(parts)


def own_columns(columns, cells, rows):
    """A table of compare.py without the paper's figures, which stand after p."""
    own = columns[: columns.index("p") + 1]
    body = []
    for row in rows:
        body.append((isolated(row["name"]), *cells(row)[: len(own)]))
    return card("lead", table(("", *own), body))
