"""Tables on the screen and in Markdown: of one run's metrics. Knows no file."""

from lib import scoring

COLUMNS = ("P %", "R %", "F1 %", "tp", "pred", "gold")
SHOWN_K = {1, 2, 3, 5, 10, 20, 30, 50, 70, 100, 200, 500}  # points of F1@k that are printed, besides the last


def table(header, rows):
    """Aligned columns: text to the left, numbers to the right."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numeric = [i > 0 and all(is_number(row[i]) for row in rows) for i in range(len(header))]
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
    shares = [percent(scores[name]) for name in ("precision", "recall", "f1")]
    return [*shares, scores["tp"], scores["pred"], scores["gold"]]


def show(metrics):
    """Yield the tables of metrics.json."""
    rows = []
    for name, scores in metrics["scores"].items():
        title, rule = scoring.RULES[name]
        rows.append((title, *cells(scores), interval(scores["f1_95"]), rule))
    yield table(("", *COLUMNS, "95 % of F1", "equal means"), rows)
    if "samples" in metrics:
        yield from show_samples(metrics)
    rows = [(name, scores["examples"], *cells(scores)) for name, scores in metrics["per_size"].items()]
    yield table(("gold quintuples", "tweets", *COLUMNS), rows)
    rows = [(name, *cells(scores)) for name, scores in metrics["per_relation"].items()]
    yield table((scoring.LABEL, *COLUMNS), rows)
    rows = [(name, *counts, scoring.ERRORS[name]) for name, counts in metrics["errors"].items()]
    yield table(("error", "false pos.", "false neg.", "what it is"), rows)
    if metrics["confusion"]:
        yield table((f"gold {scoring.LABEL}", "predicted", "times"), metrics["confusion"][:10])


def show_samples(metrics):
    """Yield F1@k and what single responses are worth."""
    many = metrics["samples"]
    rows = [(k, percent(f1), percent(std)) for k, f1, std in many["f1_at_k"] if k in SHOWN_K | {many["n"]}]
    header = ("k responses", f"F1@k by {metrics['vote']} vote, %", f"± over {many['subsets']} subsets")
    yield table(header, rows)
    single = f"{percent(many['single_mean'])} ± {percent(many['single_std'])}"
    yield (
        f"single response {single}, best of {many['n']} (oracle) {percent(many['best_of_n'])}; "
        f"a tweet has {many['distinct_answers']:.1f} distinct answers on {many['distinct_paths']:.1f} "
        "distinct reasoning paths\n"
    )
