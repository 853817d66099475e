"""02's page: every candidate beside its image, what each filter said, and why it left.

The template funnel.html stands beside this file.
"""

import time
from pathlib import Path

from lib import data, page
from lib.answers import side_file

KEPT = "kept"


def write(out, rows, stages, limit, made_by):
    """Write *.report.html beside `out` for the first `limit` examples.

    rows: of all candidates, as 02 writes them ("reason" where one left); stages: of the funnel.
    """
    shown = {}
    for row in rows:
        if row["id"] not in shown and len(shown) == limit:
            continue
        example = shown.setdefault(row["id"], [])
        example.append(row)
    examples = [shown_example(group, out) for group in shown.values()]
    block = {
        "title": Path(out).name,
        "made": f"{made_by}, {time.strftime('%Y-%m-%d', time.gmtime())}",
        "stages": stages,
        "examples": examples,
        "total": len({row["id"] for row in rows}),
    }
    target = side_file(out, ".report.html")
    data.write_atomic(target, page.fill("funnel.html", block))
    print(f"written: {target}, {len(examples)} of {block['total']} examples")


def shown_example(rows, out):
    """What the page says of one example."""
    first = rows[0]
    chains = {row["cot"] for row in rows if row["cot"]}
    return {
        "id": first["id"],
        "text": first["text"],
        "image": page.thumbnail(data.find_image(first["image"], None, out)),
        "gold": first["quintuples"],
        "distinct": len(chains),
        "candidates": [shown_candidate(row) for row in rows],
    }


def shown_candidate(row):
    """What the page says of one candidate. `outcome` is the word that one filters by."""
    reason = row.get("reason")
    outcome = reason or KEPT
    if outcome.startswith("leaked label"):
        outcome = "leaked label"
    return {
        "number": row["candidate"],
        "outcome": outcome,
        "reason": reason,
        "chain": row["cot"],
        "response": None if row["cot"] else row.get("response"),
        "repredicted": row.get("repredicted"),
        "scores": row.get("scores"),
        "score": row.get("score"),
        "model": row.get("model_answered") or row.get("model"),
        "finish": row.get("finish_reason"),
    }
