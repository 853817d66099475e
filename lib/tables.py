"""Tables and lines on the screen: of one run's metrics. Knows no file."""

from common import HEADLINE, visible
from lib import scoring

COLUMNS = ("P %", "R %", "F1 %", "tp", "pred", "gold")
SHOWN_K = {1, 2, 3, 5, 10, 20, 30, 50, 70, 100, 200, 500}  # points of F1@k that are printed, besides the last


def table(header, rows):
    """Aligned columns: text to the left, numbers to the right."""
    lines = []
    for row in (header, *rows):
        lines.append([visible(str(cell)) for cell in row])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numeric = [column > 0 and all(is_number(row[column]) for row in rows) for column in range(len(header))]
    text = ""
    for line in lines:
        cells = []
        for cell, width, right in zip(line, widths, numeric, strict=True):
            cells.append(cell.rjust(width) if right else cell.ljust(width))
        text += "  ".join(cells).rstrip() + "\n"
    return text


def is_number(cell):
    """Whether a cell stands to the right: a number, its text, or a dash in its place."""
    return not isinstance(cell, str) or cell[:1] in "0123456789+-–"


def percent(share, digits=2):
    return f"{100 * share:.{digits}f}"


def interval(pair):
    low, high = pair
    return f"{percent(low)}–{percent(high)}"


def cells(scores):
    """Micro scores under COLUMNS."""
    shares = [percent(scores[name]) for name in scoring.SHARES]
    return [*shares, scores["tp"], scores["pred"], scores["gold"]]


def show(metrics):
    """Yield the tables of metrics.json."""
    rows = []
    for name, scores in metrics["scores"].items():
        title, rule = scoring.RULES[name]
        rows.append((title, *cells(scores), interval(scores["f1_95"]), rule))
    yield table(("", *COLUMNS, "95 % of F1", "equal means"), rows)
    yield "\n".join(map(visible, reading(metrics))) + "\n"
    if "samples" in metrics:
        yield from show_samples(metrics)
    rows = [(name, scores["examples"], *cells(scores)) for name, scores in metrics["per_size"].items()]
    yield table(("gold quintuples", "tweets", *COLUMNS), rows)
    yield table((scoring.LABEL, *COLUMNS), labelled(metrics["per_relation"]))
    yield table(("component", *COLUMNS), labelled(metrics["per_component"]))
    rows = [(name, *counts, scoring.ERRORS[name]) for name, counts in metrics["errors"].items()]
    yield table(("error", "false pos.", "false neg.", "what it is"), rows)
    if metrics["confusion"]:
        yield table((f"gold {scoring.LABEL}", "predicted", "times"), metrics["confusion"][:10])


def labelled(scores):
    """{name: micro scores} as rows."""
    return [(name.replace("_", " "), *cells(values)) for name, values in scores.items()]


def reading(metrics):
    """Sentences on what these scores can tell."""
    title, _ = scoring.RULES[HEADLINE]
    scores = metrics["scores"][HEADLINE]
    ceiling = metrics["limits"]["ceiling"]
    influence = metrics["limits"]["influence"]
    lines = [
        f"{title} F1 {percent(scores['f1'])}: 95 % interval {interval(scores['f1_95'])} over tweets, "
        f"{metrics['resamples']} resamples"
    ]
    if ceiling["tweets"]:
        lines.append(
            f"ceiling {percent(ceiling['f1'])}: {ceiling['tweets']} tweets stand in {ceiling['rows']} rows "
            "with other gold: no deterministic system passes it"
        )
    if influence:
        lines.append(
            f"range {percent(influence['f1_missed'])}–{percent(influence['f1_right'])}: one tweet, "
            f"{influence['ids'][0]}, holds {influence['gold']} of {scores['gold']} gold quintuples: with "
            f"none of them found and with all. Without it {percent(influence['f1_without'])}"
        )
    return lines + control_lines(metrics["controls"])


def control_lines(controls):
    lines = []
    if "invented" in controls:
        tweets = controls["invented"]["tweets"]
        count = controls["invented"]["with_prediction"]
        lines.append(
            f"invented: something is predicted on {count} of {tweets} tweets without gold "
            f"({percent(count / tweets, 1)} %)"
        )
    if "pairs" in controls:
        pairs = controls["pairs"]["pairs"]
        count = controls["pairs"]["told_apart"]
        lines.append(
            f"decided by the image: {count} of {pairs} pairs of the same text told apart "
            f"({percent(count / pairs, 1)} %; a reader of the text alone: 0)"
        )
    return lines


def show_samples(metrics):
    """Yield F1@k and what single responses are worth."""
    many = metrics["samples"]
    shown = SHOWN_K | {many["n"]}
    rows = []
    for k, f1, deviation in many["f1_at_k"]:
        if k in shown:
            rows.append((k, percent(f1), "–" if deviation is None else percent(deviation)))
    header = ("k responses", f"F1@k by {metrics['vote']} vote, %", f"± over {many['subsets']} subsets")
    yield table(header, rows)
    single = f"{percent(many['single_mean'])} ± {percent(many['single_std'])}"
    yield (
        f"vote: {scoring.VOTES[metrics['vote']]}; all {many['n']} responses are one subset, so without ±\n"
        f"single response {single}, best of {many['n']} (oracle) {percent(many['best_of_n'])}; "
        f"a tweet has {many['distinct_answers']:.1f} distinct answers on {many['distinct_paths']:.1f} "
        "distinct reasoning paths\n"
    )
