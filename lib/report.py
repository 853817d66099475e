"""report.html: one page that opens from disk. The template report.html stands beside this file."""

import base64
import io
import json
from pathlib import Path

import common
from common import InputError
from lib import data, scoring


def thumbnail(path, side=480):
    """The image as a small data URL, or None where it cannot be read (a file of another system may come without images)."""
    try:
        image = data.load_image(path)
    except InputError:
        return None
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=75)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def shown_example(example, prediction, final, row):
    """What the page says of one tweet: items [class, predicted or None, gold or None], the reasoning of the answer that won."""
    gold = example.quintuples
    items = [("correct", q, q) for q in gold or () if q in final] + (
        [("predicted", q, None) for q in final]
        if gold is None
        else scoring.classify(final, gold, prediction is None or any(prediction.parsed))
    )
    shown = {
        "id": example.id,
        "text": example.text,
        "image": thumbnail(example.image),
        "items": items,
        "reason": [],
        "raw": None,
    }
    if prediction and "responses" in row:
        sets = [frozenset(a) if ok else None for a, ok in zip(prediction.answers, prediction.parsed)]
        distance = [len(answer ^ frozenset(final)) if answer is not None else float("inf") for answer in sets]
        text = row["responses"][distance.index(min(distance))]["text"]
        think = common.parse_response(text, row["prompt"] == "direct").think
        before, *parts = common.COT_HEADING.split(think)  # [before, heading, body, heading, body, …]
        pieces = [("Reasoning", before), *zip(parts[::2], parts[1::2])]
        shown["reason"] = [(title, body.strip()) for title, body in pieces if body.strip()]
        shown["raw"] = None if any(prediction.parsed) else text
        shown["votes"] = [sets.count(frozenset(final)), len(sets), len(set(sets) - {None})]
    return shown


def write_report(args, out, path, examples, predictions, finals, metrics):
    """Fill the template report.html, which stands beside this script, with one JSON block."""
    rest, shown, settings = {e.id: e for e in examples[: args.report_examples]}, {}, {}
    for _, row in data.read_jsonl(
        path
    ):  # again, one row at a time: the texts of all responses need not be in memory
        name, settings = str(row["id"]), settings or row.get("settings", {})
        if name in rest:
            shown[name] = shown_example(rest.pop(name), predictions[name], finals[name], row)
    shown |= {name: shown_example(example, None, [], {}) for name, example in rest.items()}
    facts = {
        "tweets": metrics["examples"],
        "from": Path(path).name,
        **{n: settings.get(n) for n in ("model", "adapter", "temperature")},
    }
    facts |= {
        "responses": metrics["responses"].get("responses"),
        "vote": metrics["vote"] if "samples" in metrics else None,
    }
    facts |= {"without prediction": metrics["without_prediction"]}
    block = {
        "run": out.absolute().name,
        "facts": {name: value for name, value in facts.items() if value},
        "metrics": metrics,
    }
    block |= {
        "rules": scoring.RULES,
        "errors": scoring.ERRORS,
        "shown": [shown[e.id] for e in examples[: args.report_examples]],
    }
    block["paper"] = [
        (name, row[2]) for group in scoring.TABLES.values() for name, row in group.items() if row[2]
    ]
    template = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    data.write_atomic(
        out / "report.html", template.replace("{{DATA}}", json.dumps(block).replace("<", "\\u003c"), 1)
    )
    pictures = sum(row["image"] is not None for row in block["shown"])
    print(f"written: {out}/report.html, {len(shown)} of {len(examples)} tweets, {pictures} with their image")
