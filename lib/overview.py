"""The upper part of a page: what metrics.json or a comparison holds, as figures and tables that need no
script."""

import json

from common import HEADLINE
from lib import compare, scoring, tables
from lib.figures import (
    Markup,
    bars,
    curve,
    div,
    diverging,
    dot,
    element,
    escaped,
    figure,
    isolated,
    percent,
    small,
    table,
    whisker,
)

SCORE_COLUMNS = ("", "F1 %", "95 % of F1", "P %", "R %", "found", "predicted", "gold")
LABEL_COLUMNS = ("P %", "R %", "F1 %", "gold", "predicted")


def heading(over, title, facts):
    """The top of a page. facts: [(what, value)]."""
    line = [element("span", {}, f"{name} ", element("b", {}, isolated(value))) for name, value in facts]
    return [element("p", {"class": "over"}, over), element("h1", {}, isolated(title)), div("facts", *line)]


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
    parts = heading("Evaluation", run, [(name, value) for name, value in facts.items() if value is not None])
    if "scores" in metrics:
        parts += [div("hero", headline(metrics), beside_paper(run, metrics))]
        parts += [element("h2", {}, "Scores, and what counts as equal"), score_table(metrics)]
        parts += [element("h2", {}, "Where it is right and wrong"), div("grid", *details(metrics))]
    parts.append(all_settings(metrics["provenance"] | {"vote": metrics["vote"], "tau": metrics["tau"]}))
    return Markup("".join(map(escaped, parts)))


def headline(metrics):
    """The card with the large number and what it can tell."""
    title, rule = scoring.RULES[HEADLINE]
    scores = metrics["scores"][HEADLINE]
    low, high = scores["f1_95"]
    stats = [("precision", scores["precision"]), ("recall", scores["recall"])]
    stats += [(f"{name} F1", metrics["scores"]["mner"]["f1"]) for name in ("MNER",)]
    shown = [element("div", {}, element("b", {}, percent(value)), small(name)) for name, value in stats]
    counts = metrics["responses"]
    responses = (
        f"{counts.get('responses', 0)} responses: {counts.get('well_formed', 0)} well formed, "
        f"{counts.get('cut_off', 0)} cut off, {counts.get('unparsed', 0)} unparsed. A tweet without a "
        "readable answer counts as an empty prediction."
    )
    _, *lines = tables.reading(metrics)
    return element(
        "section",
        {"class": "card column"},
        element("p", {"class": "over"}, f"{title} F1"),
        element("p", {"class": "big num"}, percent(scores["f1"]), element("small", {}, "%")),
        element("p", {"class": "soft num"}, f"95 % interval {percent(low)} – {percent(high)}, over tweets"),
        div("stats", *shown),
        element("p", {"class": "soft small"}, f"Equal means: {rule}."),
        [element("p", {"class": "small num reading"}, isolated(line)) for line in lines],
        element("p", {"class": "soft small num last"}, responses),
    )


def beside_paper(run, metrics):
    scores = metrics["scores"][HEADLINE]
    rows = [(name, f1 / 100, None) for name, f1 in paper_rows()]
    rows.append((f"this run: {run}", scores["f1"], scores["f1_95"]))
    rows.sort(key=lambda row: -row[1])
    top = max([f1 for _, f1, _ in rows] + [scores["f1_95"][1]])
    drawn = []
    for name, f1, interval in rows:
        colour = "accent" if interval else "paper"
        more = [whisker(interval[0] / top, interval[1] / top)] if interval else []
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
    for name, scores in metrics["scores"].items():
        title, rule = scoring.RULES[name]
        low, high = scores["f1_95"]
        shares = [percent(scores["f1"], 2), f"{percent(low)} – {percent(high)}"]
        shares += [percent(scores["precision"], 2), percent(scores["recall"], 2)]
        rows.append(([title, small(rule)], *shares, scores["tp"], scores["pred"], scores["gold"]))
    return element("section", {"class": "card lead"}, table(SCORE_COLUMNS, rows))


def details(metrics):
    """The cards below the scores."""
    cards = [samples(metrics)] if "samples" in metrics else []
    errors = []
    for name, (wrong, missed) in metrics["errors"].items():
        errors.append((name, name, wrong, missed, scoring.ERRORS[name]))
    note = "Each wrong prediction and each gold quintuple not found is in one class"
    cards.append(figure("What goes wrong", note, diverging(("wrongly predicted", "not found"), errors)))
    sizes = []
    for name, scores in metrics["per_size"].items():
        value = [percent(scores["f1"]), element("span", {"class": "soft"}, f" · {scores['examples']}")]
        sizes.append((f"{name} in gold", scores["f1"], value, "accent", []))
    stack = [component_figure(metrics), figure("By number of gold quintuples", "F1, % · tweets", bars(sizes))]
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
        arrow = element("span", {"class": "soft"}, " → ")
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
    shown = [element("div", {}, element("b", {}, value), small(label)) for value, label in stats]
    drawing = curve(points, f"F1 by number of responses; {first}; {last}")
    legend = element("p", {"class": "small num soft"}, f"{first}, {last}")
    return figure("F1 by number of responses", note, drawing, legend, div("stats four", *shown))


def all_settings(values):
    """A fold with everything that is known of how this came about."""
    rows = []
    for name, value in flat(values):
        rows.append((name, isolated(value if isinstance(value, str) else json.dumps(value))))
    summary = element("summary", {}, "All settings, files, versions")
    return element("details", {"class": "card settings"}, summary, table(("", ""), rows))


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
    parts += [element("p", {"class": "small reading"}, isolated(note)) for note in comparison.notes]
    rows = [row for row in comparison.rows if "scores" in row]
    rows.sort(key=lambda row: row["name"] != comparison.first)
    cells = [(isolated(row["name"]), *compare.jmere_cells(row)[:7]) for row in rows]
    parts += [element("h2", {}, "Quintuples"), card_table(("", *compare.JMERE_COLUMNS[:7]), cells)]
    cells = [(isolated(row["name"]), *compare.mner_cells(row)[:5]) for row in rows]
    parts += [element("h2", {}, "Entities"), card_table(("", *compare.MNER_COLUMNS[:5]), cells)]
    note = (
        f"Δ, its interval and p (two-sided): against {comparison.first}, paired bootstrap of "
        f"{args.resamples} resamples over tweets."
    )
    parts.append(element("p", {"class": "soft small reading"}, isolated(note)))
    most = max(counts.values()) or 1
    tweets = []
    for tag, count in counts.items():
        colour = tag.replace(" ", "-")
        tweets.append(([dot(colour), tag], count / most, count, colour, []))
    shown = figure("Tweets", "by number of errors, from the first run to the second", bars(tweets))
    header, body = compare.label_table(comparison, rows)
    labels = figure(f"By {scoring.LABEL}", None, div("figure-table", table(header, body)))
    parts += [element("h2", {}, "Where they differ"), div("grid", shown, labels)]
    return Markup("".join(map(escaped, parts)))


def card_table(header, rows):
    return element("section", {"class": "card lead"}, table(header, rows))
