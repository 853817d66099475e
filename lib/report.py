"""report.html: one page that opens from disk. The template report.html stands beside this file."""

import base64
import io
import json
from pathlib import Path

import common
from common import InputError
from lib import compare, data, scoring


def fill(template, block):
    """The page of lib/`template` with `block` as its one JSON block, which no text in it can leave."""
    page = (Path(__file__).parent / template).read_text(encoding="utf-8")
    return page.replace("{{DATA}}", json.dumps(block).replace("<", "\\u003c"), 1)


def thumbnail(path, side=480):
    """The image as a small data URL, or None where it cannot be read: another system's file may come without
    images."""
    try:
        image = data.load_image(path)
    except InputError:
        return None
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=75)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write_report(args, path, examples, predictions, finals, metrics):
    """Write OUT/report.html → how many of its tweets have their image. args: out, report_examples.

    path: the stored file; finals: {id: the answer after the vote}.
    """
    rest = {example.id: example for example in examples[: args.report_examples]}
    order = list(rest)
    shown = {}
    settings = {}
    for _, row in data.read_jsonl(path):  # again, one row at a time: all responses need not be in memory
        name = str(row["id"])
        settings = settings or row.get("settings", {})
        if name in rest:
            shown[name] = shown_example(rest.pop(name), predictions[name], finals[name], row)
    for name, example in rest.items():
        shown[name] = shown_example(example, None, [], {})
    block = {
        "run": Path(args.out).absolute().name,
        "facts": facts(path, settings, metrics),
        "metrics": metrics,
        "rules": scoring.RULES,
        "errors": scoring.ERRORS,
        "shown": [shown[name] for name in order],
        "paper": paper_rows(),
    }
    data.write_atomic(Path(args.out) / "report.html", fill("report.html", block))
    return sum(row["image"] is not None for row in block["shown"])


def paper_rows():
    """[(row of the paper's tables, its F1)]."""
    rows = []
    for group in compare.PAPER.values():
        for name, (_, _, f1, _) in group.items():
            if f1:
                rows.append((name, f1))
    return rows


def facts(path, settings, metrics):
    """{what: value} of the line below the title."""
    values = {
        "tweets": metrics["examples"],
        "from": Path(path).name,
        "model": settings.get("model"),
        "adapter": settings.get("adapter"),
        "temperature": settings.get("temperature"),
        "responses": metrics["responses"].get("responses"),
        "vote": metrics["vote"] if "samples" in metrics else None,
        "without prediction": metrics["without_prediction"],
    }
    return {name: value for name, value in values.items() if value}


def shown_example(example, prediction, final, row):
    """What the page says of one tweet: items [class, predicted or None, gold or None], and of the response
    that won its reasoning."""
    shown = {
        "id": example.id,
        "text": example.text,
        "image": thumbnail(example.image),
        "reason": [],
        "raw": None,
    }
    shown["items"] = shown_items(example.quintuples, final, prediction)
    if prediction and "responses" in row:
        pairs = zip(prediction.answers, prediction.parsed, strict=True)
        sets = [frozenset(answer) if ok else None for answer, ok in pairs]
        text = row["responses"][nearest(sets, frozenset(final))]["text"]
        shown["reason"] = reasoning(text, row["prompt"] == "direct")
        shown["raw"] = None if any(prediction.parsed) else text
        shown["votes"] = [sets.count(frozenset(final)), len(sets), len(set(sets) - {None})]
    return shown


def shown_items(gold, final, prediction):
    if gold is None:
        return [("predicted", q, None) for q in final]
    right = [("correct", q, q) for q in gold if q in final]
    return right + scoring.classify(final, gold, prediction is None or any(prediction.parsed))


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
