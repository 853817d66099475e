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
        errors = [kind for kind, _, _ in answer["items"] if kind in scoring.ERRORS]
        tags = {kind for kind, _, _ in answer["items"]}
        if example.quintuples is not None:
            tags.add("any error" if errors else "all right")
        keys = {"errors": len(errors), "place": -place, "gold": len(example.quintuples or ())}
        shown.append(shown_tweet(example, [answer], tags, keys))
    tags = [
        ("any error", "missing", "a tweet with at least one"),
        ("all right", "correct", "nothing wrong or missed"),
    ]
    tags += [("correct", "correct", ""), ("predicted", "predicted", "no gold to compare with")]
    tags += [(kind, kind, meaning) for kind, meaning in scoring.ERRORS.items()]
    orders = [("errors", "most errors first"), ("gold", "most gold first"), ("place", "as in the data")]
    name = Path(args.out).absolute().name
    block = page_block(shown, tags, orders, len(run.examples))
    filled = page.fill("report.html", block, f"{name}: evaluation", overview.run_page(name, metrics))
    data.write_atomic(Path(args.out) / "report.html", filled)
    return sum(row["image"] is not None for row in shown)


def page_block(shown, tags, orders, total):
    """The JSON block of a page. tags: (name, colour, meaning); orders: (key, name); total: tweets of the
    run."""
    used = Counter(tag for row in shown for tag in row["tags"])
    return {
        "tags": [(name, colour, meaning, used[name]) for name, colour, meaning in tags if used[name]],
        "orders": orders,
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
            answers[example.id] = shown_answer(example, run, finals.get(example.id, []), row, name)
    for example in rest.values():
        answers[example.id] = shown_answer(example, run, [], {}, name)
    return answers


def shown_answer(example, run, final, row, name):
    """Items [class, predicted or None, gold or None]; of the response nearest to the answer its reasoning
    and text; of many responses the most frequent answers."""
    given = run.predictions.get(example.id)
    shown = {"name": name, "items": shown_items(example.quintuples, final, given), "reason": [], "raw": None}
    if given and ("responses" in row or "response" in row):
        pairs = zip(given.answers, given.parsed, strict=True)
        sets = [frozenset(answer) if ok else None for answer, ok in pairs]
        text = response_text(row, nearest(sets, frozenset(final)))
        shown["raw"] = text
        shown["reason"] = reasoning(text, row.get("prompt") == "direct")
        votes = Counter(sets)
        shown["votes"] = [votes[frozenset(final)], len(sets), len(set(sets) - {None})]
        if len(sets) > 1:
            shown["top"] = [
                (count, top_answer(given, sets, answer)) for answer, count in votes.most_common(TOP)
            ]
    return shown


def response_text(row, place):
    """The text of a stored response, ours or another system's."""
    response = row.get("responses", [row.get("response")])[place]
    return response if isinstance(response, str) else response["text"]


def top_answer(given, sets, answer):
    """An answer in the order of the first response that gave it; None: no readable one."""
    return None if answer is None else scoring.distinct(given.answers[sets.index(answer)])


def shown_items(gold, final, given):
    if gold is None:
        return [("predicted", q, None) for q in final]
    right = [("correct", q, q) for q in scoring.distinct(gold) if q in final]
    return right + scoring.classify(final, gold, given is None or any(given.parsed))


def nearest(sets, final):
    """The place of the answer that differs least from `final`; None is an unparsed one."""
    distances = [float("inf") if answer is None else len(answer ^ final) for answer in sets]
    return distances.index(min(distances))


def reasoning(text, direct):
    """[(title, body)] of a response's reasoning: its parts, or one piece without headings."""
    think = common.parse_response(text, direct).think
    before, *parts = common.COT_HEADING.split(think)  # [before, heading, body, heading, body, …]
    pieces = [("Reasoning", before), *zip(parts[::2], parts[1::2], strict=True)]
    return [(title, body.strip()) for title, body in pieces if body.strip()]


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
        finals.append({example.id: pred for example, pred in zip(examples, preds, strict=True)})
    change = {example.id: changed(example, *(final[example.id] for final in finals)) for example in examples}
    counts = Counter(tag for tag, _ in change.values())
    ranked = sorted(examples, key=lambda example: -change_key(*change[example.id]))[: args.report_examples]
    answers = [
        shown_answers(run, final, ranked, name) for run, final, name in zip(runs, finals, names, strict=True)
    ]
    shown = []
    for example in ranked:
        tag, difference = change[example.id]
        keys = {"change": change_key(tag, difference), "gold": len(example.quintuples)}
        shown.append(shown_tweet(example, [answer[example.id] for answer in answers], {tag}, keys))
    tags = [(tag, tag.replace(" ", "-"), meaning) for tag, meaning in MEANINGS.items()]
    orders = [("change", "better, worse, both wrong"), ("gold", "most gold first")]
    title = " → ".join(names)
    block = page_block(shown, tags, orders, len(examples))
    figures = overview.comparison_page(title, comparison, {tag: counts[tag] for tag in MEANINGS}, args)
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
