"""Pages that open from disk: report.html of one run, compare.html of two. Template and tweets; the figures
above them are overview.py's."""

from collections import Counter
from pathlib import Path

import common
from lib import compare, data, overview, page, scoring

TOP = 3  # most frequent answers shown of many


# -------------------------------------------------------------------------------- one run


def write_report(args, run, finals, metrics):
    """Write OUT/report.html of a StoredRun → how many of its tweets have their image. args: out,
    report_examples.

    finals: {id: the answer after the vote}.
    """
    examples = run.examples[: args.report_examples]
    answers = shown_answers(run, finals, examples)
    shown = []
    for place, example in enumerate(examples):
        answer = answers[example.id]
        kinds = [kind for kind, _, _ in answer["items"]]
        errors = sum(kind in scoring.ERRORS for kind in kinds)
        tags = set(kinds)
        if example.quintuples is not None:
            tags.add("any error" if errors else "all right")
        gold = len(example.quintuples or ())
        keys = {"errors": errors, "place": -place, "gold": gold}
        shown.append(shown_tweet(example, [answer], tags, keys))
    tags = [
        ("any error", "missing", "a tweet with at least one"),
        ("all right", "correct", "nothing wrong or missed"),
    ]
    tags.append(("correct", "correct", ""))
    tags.append(("predicted", "predicted", "no gold to compare with"))
    for kind, meaning in scoring.ERRORS.items():
        tags.append((kind, kind, meaning))
    orders = {"errors": "most errors first", "gold": "most gold first", "place": "as in the data"}
    name = Path(args.out).absolute().name
    block = page_block(shown, tags, orders, len(run.examples))
    figures = overview.run_page(name, metrics)
    filled = page.fill("report.html", block, f"{name}: evaluation", figures)
    data.write_atomic(Path(args.out) / "report.html", filled)
    return sum(row["image"] is not None for row in shown)


def page_block(shown, tags, orders, total):
    """The JSON block of a page. tags: (name, colour, meaning); orders: {key: name}; total: tweets of the
    run."""
    used = Counter()
    for row in shown:
        used.update(row["tags"])
    return {
        "tags": [(*tag, used[tag[0]]) for tag in tags if used[tag[0]]],
        "orders": list(orders.items()),
        "errors": scoring.ERRORS,
        "total": total,
        "shown": shown,
    }


def shown_tweet(example, answers, tags, keys):
    """What the page says of one tweet; keys: {order: number, the largest first}."""
    return {
        "id": example.id,
        "text": example.text,
        "image": page.thumbnail(example.image),
        "answers": answers,
        "tags": sorted(tags),
        "keys": keys,
    }


def shown_answers(run, finals, examples, name=""):
    """{id: what the page says of a run's answer to it}, the stored file read again, one row at a time."""
    rest = {example.id: example for example in examples}
    answers = {}
    for _, row in data.read_jsonl(run.path):
        if row["id"] in rest:
            example = rest.pop(row["id"])
            final = finals.get(example.id, [])
            answers[example.id] = shown_answer(example, run, final, row, name)
    for example in rest.values():
        answers[example.id] = shown_answer(example, run, [], {}, name)
    return answers


def shown_answer(example, run, final, row, name):
    """Items [class, predicted or None, gold or None]; of the response nearest to the answer its reasoning
    and text; of many responses the most frequent answers."""
    given = run.predictions.get(example.id)
    items = shown_items(example.quintuples, final, given)
    shown = {"name": name, "items": items, "reason": [], "raw": None}
    if given is None or ("responses" not in row and "response" not in row):
        return shown
    sets = scoring.readable_sets(given.answers, given.parsed)
    final = frozenset(final)
    text = response_text(row, nearest(sets, final))
    shown["raw"] = text
    shown["reason"] = reasoning(text, row.get("prompt") == "direct")
    votes = Counter(sets)
    distinct = len(set(sets) - {None})
    shown["votes"] = [votes[final], len(sets), distinct]
    if len(sets) > 1:
        shown["top"] = []
        for answer, count in votes.most_common(TOP):
            shown["top"].append((count, top_answer(given, sets, answer)))
    return shown


def response_text(row, place):
    """The text of a stored response, ours or another system's."""
    response = row.get("responses", [row.get("response")])[place]
    return response if isinstance(response, str) else response["text"]


def top_answer(given, sets, answer):
    """An answer in the order of the first response that gave it; None: no readable one."""
    if answer is None:
        return None
    first = sets.index(answer)
    return scoring.distinct(given.answers[first])


def shown_items(gold, final, given):
    """[(class, predicted or None, gold or None)] of an answer."""
    if gold is None:
        return [("predicted", q, None) for q in final]
    items = []
    for q in scoring.distinct(gold):
        if q in final:
            items.append(("correct", q, q))
    parsed = given is None or any(given.parsed)
    return items + scoring.classify(final, gold, parsed)


def nearest(sets, final):
    """The place of the answer that differs least from `final`; None is an unparsed one."""

    def distance(place):
        answer = sets[place]
        return float("inf") if answer is None else len(answer ^ final)

    return min(range(len(sets)), key=distance)


def reasoning(text, direct):
    """[(title, body)] of a response's reasoning: its parts, or one piece without headings."""
    think = common.parse_response(text, direct).think
    before, *parts = common.COT_HEADING.split(think)  # [before, heading, body, heading, body, …]
    titles = ["Reasoning", *parts[::2]]
    bodies = [before, *parts[1::2]]
    pieces = []
    for title, body in zip(titles, bodies, strict=True):
        if body.strip():
            pieces.append((title, body.strip()))
    return pieces


# -------------------------------------------------------------------------------- two runs

BETTER, WORSE, WRONG, RIGHT = "better", "worse", "both wrong", "both right"
MEANINGS = {
    BETTER: "the second run has fewer errors",
    WORSE: "the second run has more errors",
    WRONG: "as many errors in both",
    RIGHT: "no error in either",
}


def write_comparison(args, comparison):
    """Write OUT/compare.html of the first runs of two methods → how many tweets it shows. args: out,
    report_examples, vote, tau, resamples."""
    names = [name for name, _ in comparison.methods]
    runs = [runs[0] for _, runs in comparison.methods]
    examples = runs[0].examples
    finals = []
    for run in runs:
        preds = compare.final_answers(args, run)
        ids = [example.id for example in examples]
        finals.append(dict(zip(ids, preds, strict=True)))
    first, second = finals
    change = {}
    counts = dict.fromkeys(MEANINGS, 0)
    for example in examples:
        tag, difference = changed(example, first[example.id], second[example.id])
        counts[tag] += 1
        change[example.id] = tag, change_key(tag, difference)
    ranked = sorted(examples, key=lambda example: change[example.id][1], reverse=True)
    ranked = ranked[: args.report_examples]
    answers = []
    for run, final, name in zip(runs, finals, names, strict=True):
        answers.append(shown_answers(run, final, ranked, name))
    shown = []
    for example in ranked:
        tag, key = change[example.id]
        keys = {"change": key, "gold": len(example.quintuples)}
        both = [answer[example.id] for answer in answers]
        shown.append(shown_tweet(example, both, {tag}, keys))
    tags = []
    for tag, meaning in MEANINGS.items():
        tags.append((tag, tag.replace(" ", "-"), meaning))
    orders = {"change": "better, worse, both wrong", "gold": "most gold first"}
    title = " → ".join(names)
    block = page_block(shown, tags, orders, len(examples))
    figures = overview.comparison_page(title, comparison, counts, args)
    filled = page.fill("report.html", block, f"{title}: comparison", figures)
    data.write_atomic(Path(args.out) / "compare.html", filled)
    return len(shown)


def changed(example, first, second):
    """(what became of a tweet, by how many errors)."""
    before = len(set(first) ^ set(example.quintuples))
    after = len(set(second) ^ set(example.quintuples))
    if after < before:
        return BETTER, before - after
    if after > before:
        return WORSE, after - before
    return (WRONG, after) if after else (RIGHT, 0)


def change_key(tag, difference):
    """To be sorted by, the largest first: in the order of MEANINGS, the largest change first."""
    return 1000 * (len(MEANINGS) - list(MEANINGS).index(tag)) + min(difference, 999)
