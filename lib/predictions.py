"""predictions.jsonl: written, resumed and read in one place; other systems' files too. Knows neither model
nor score."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import common
from common import InputError
from lib import ask, data

MADE_BY = "05_eval.py"

# -------------------------------------------------------------------------------- write


def check_out(args):
    """Raise InputError where scoring would overwrite in --out what this command reads, or what we did not
    write. args: out, report, compare, predictions, data, tau_from."""
    if not args.out:
        return
    out = Path(args.out)
    if args.compare:
        ours = {out / "compare.json": '"rows": ', out / "compare.md": "ΔF1"}
        page = out / "compare.html"
    else:
        ours = {out / "metrics.json": '"without_prediction": ', out / "quintuples.jsonl": MADE_BY}
        page = out / "report.html"
    if args.report:
        ours[page] = MADE_BY
    inputs = [args.data, args.tau_from, args.predictions]
    ask.check_outputs(ours, inputs)


def file_hash(*paths):
    """Of the content of files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as handle:
            while chunk := handle.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def adapter_hash(folder):
    """Of the adapter's weights and config: another training run into the same folder must not meet the old
    predictions."""
    return file_hash(*sorted(Path(folder).glob("adapter_*")))


def text_hash(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def lock_output(out, fresh, stack):
    """Lock the folder `out` until `stack` closes → the InputError that forbids it, or None.

    Called by rank 0 alone, before any rank reads OUT. With `fresh` old files are deleted; torn last lines
    are cut. The error is returned, not raised, so that all ranks can raise it together.
    """
    try:
        stack.enter_context(ask.AppendFile(out / ".lock"))
        if fresh:
            for path in (*out.glob("predictions*.jsonl"), *out.glob("answers.*")):
                path.unlink()
        for path in out.glob("predictions.rank*.jsonl"):  # perhaps of more ranks than today
            ask.AppendFile(path).handle.close()  # opening cuts a torn last line
    except InputError as error:
        return error
    return None


def stored_offsets(out, known, settings):
    """{id: (file, byte offset)} of the rows in OUT. Raises InputError where they are of other data or
    settings."""
    offsets = {}
    for path in sorted(out.glob("predictions*.jsonl")):
        with open(path, "rb") as handle:
            offset = 0
            for number, line in enumerate(handle, 1):
                name = check_stored(f"{path}:{number}", path, line, known, settings)
                offsets.setdefault(name, (path, offset))
                offset += len(line)
    return offsets


def check_stored(where, path, line, known, settings):
    """The id of a stored line. Raises InputError where this command would not have written it."""
    try:
        row = json.loads(line)
        here = row["settings"]
        example = known.get(row["id"])
        other = [f"{k} {here.get(k)!r} (now {v!r})" for k, v in settings.items() if here.get(k) != v]
        found = (row["text"], row["image"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{where}: not a prediction of 05_eval.py: delete the line, or start anew with --fresh"
        ) from None
    if other:
        raise InputError(
            f"{where}: stored with {', '.join(other)}: use another --out, or delete it with --fresh"
        )
    expected = data.to_row(example, path) if example else {"text": None, "image": None}
    if found != (expected["text"], expected["image"]):
        raise InputError(
            f"{where}: id {row['id']} is not this tweet of --data: use another --out, or --fresh"
        )
    return row["id"]


def gather_parts(out, known, settings):
    """The rows of all ranks → predictions.jsonl, in the order of the data, with its gold of today; then the
    parts go."""
    target = out / "predictions.jsonl"
    fresh = out / "predictions.jsonl.tmp"
    offsets = stored_offsets(out, known, settings)
    with contextlib.ExitStack() as stack:
        sources = {path: stack.enter_context(open(path, "rb")) for path, _ in offsets.values()}
        handle = stack.enter_context(open(fresh, "w", encoding="utf-8", newline="\n"))
        for example in known.values():
            if example.id not in offsets:
                continue
            path, offset = offsets[example.id]
            sources[path].seek(offset)
            row = json.loads(sources[path].readline())
            for name in ("quintuples", "key", "usage"):
                row.pop(name, None)
            handle.write(data.jsonl_line({**data.to_row(example, target), **row}))
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(fresh, target)
    for part in out.glob("predictions.rank*.jsonl"):
        part.unlink()


# -------------------------------------------------------------------------------- read

COUNTED = ("responses", "well_formed", "cut_off", "unparsed", "malformed_items")


class Prediction(NamedTuple):
    """What was predicted for one tweet."""

    answers: list  # one tuple of Quintuples a response
    parsed: list  # one bool a response: an answer was there to read, be it empty
    counts: Counter  # of COUNTED
    paths: int  # distinct reasonings


class StoredRun(NamedTuple):
    """A stored file, read."""

    path: Path
    examples: list  # of the data, in its order
    predictions: dict  # {id: Prediction}
    source: (
        dict  # what the file says of its making: model, adapter, prompt, settings, versions; {} if nothing
    )
    other_gold: list  # ids whose stored gold is not that of --data, which counts


def unanswered(n):
    """The Prediction of a tweet without one: n responses that say nothing."""
    return Prediction([()] * n, [False] * n, Counter(), 0)


def stored_file(path):
    """A stored file, or the one in an --out folder."""
    path = Path(path)
    return path / "predictions.jsonl" if path.is_dir() else path


def stored_run(path, known=None, limit=None, prompt=None):
    """The StoredRun of our own file, of an --out folder or of another system's file. Raises InputError.

    known: {id: Example}, the gold of --data; None: the file's own. prompt: that another system's responses
    answer. One row is in memory at a time: the texts of all responses need not be.
    """
    path = stored_file(path)
    data.existing("--predictions", path, "made by 05_eval.py")
    predictions = {}
    examples = {} if known is None else known
    source = {}
    other_gold = []
    unknown = []
    for number, row in data.read_jsonl(path):
        where = f"{path}:{number}"
        name = row_id(where, row)
        if name in predictions:
            raise InputError(f"{where}: id {name} stands there twice, expected once")
        if known is None:
            examples[name] = own_example(where, row, path)
        elif name not in known:
            unknown.append(name)
        else:
            refuse_other_text(where, row, known[name])
            if gold_differs(where, row, known[name]):
                other_gold.append(name)
        predictions[name] = read_row(where, row, prompt)
        source = source or read_source(where, row)
    refuse_useless(path, predictions, unknown, source)
    return StoredRun(path, list(examples.values())[:limit], predictions, source, other_gold)


def refuse_useless(path, predictions, unknown, source):
    """Raise InputError where a file holds nothing, other data, or (of another system) nothing to read."""
    if not predictions:
        raise InputError(f"{path}: no prediction in it")
    if unknown:
        shown = ", ".join(unknown[:3])
        raise InputError(
            f"{path}: {len(unknown)} of {len(predictions)} ids are not in the data ({shown}, …): other data?"
        )
    if not source and not any(any(p.parsed) for p in predictions.values()):
        raise InputError(
            f"{path}: none of its {len(predictions)} rows can be read, expected quintuples as "
            "[e1, t1, e2, t2, r] or as objects, or responses with --prompt"
        )


def row_id(where, row):
    """The id of a row. Raises InputError."""
    name = row.get("id")
    if name is None:
        raise InputError(f"{where}: missing 'id'")
    if not isinstance(name, str):
        raise InputError(f"{where}: 'id' is of type {type(name).__name__}, expected a string")
    return name


def own_example(where, row, path):
    """The tweet that a row of ours holds beside its responses. Raises InputError."""
    if "text" not in row or "image" not in row:
        raise InputError(f"{where}: holds no tweet beside its prediction: give the tweets with --data")
    kept = {name: value for name, value in row.items() if name in ("id", "text", "image", "quintuples")}
    example = data.to_example(where, kept, ())
    return dataclasses.replace(example, image=data.find_image(example.image, None, path), row={})


def refuse_other_text(where, row, example):
    if row.get("text", example.text) != example.text:
        raise InputError(
            f"{where}: id {example.id} has another text in --data: these predictions are of other data"
        )


def gold_differs(where, row, example):
    """Whether a row of ours stores another gold than --data has."""
    if "responses" not in row or row.get("quintuples") is None or example.quintuples is None:
        return False
    return set(data.read_gold(where, row["quintuples"])) != set(example.quintuples)


def read_source(where, row):
    """What a row says of its making, {} if nothing. Raises InputError where that is no object."""
    settings = row.get("settings")
    source = row.get("source")
    for name, value in (("settings", settings), ("source", source)):
        if not isinstance(value, dict | None):
            raise InputError(f"{where}: {name!r} is of type {type(value).__name__}, expected an object")
    if settings is None and "prompt" not in row:  # of another system
        return {}
    return {**(source or {}), "prompt": row.get("prompt"), "settings": settings or {}}


def read_row(where, row, prompt=None):
    """The Prediction of a row. Raises InputError.

    Ours: {"prompt", "responses": [{"text", "finished"}]}; others': {"response": text} with `prompt`, or
    {"quintuples": lists or objects}.
    """
    if "responses" not in row and "response" not in row:
        return from_quintuples(where, row)
    responses = row.get("responses", [row.get("response")])
    if not isinstance(responses, list) or not responses:
        raise InputError(f"{where}: expected a list of 'responses', one or more")
    if prompt and "prompt" in row:
        raise InputError(f"{where}: says its 'prompt' itself: leave --prompt out")
    prompt = row.get("prompt", prompt)
    if prompt not in common.PROMPTS:
        raise InputError(f"{where}: which prompt was answered? Expected 'prompt' in the row, or --prompt")
    return from_responses(where, responses, prompt == "direct")


def from_responses(where, responses, direct):
    answers = []
    parsed = []
    counts = Counter(dict.fromkeys(COUNTED, 0))
    thoughts = set()
    for item in responses:
        item = check_response(where, {"text": item} if isinstance(item, str) else item)
        response = common.parse_response(item["text"], direct)
        finished = item.get("finished", True)
        readable = bool(response.quintuples) or (answered(item, direct) and not response.malformed)
        answers.append(response.quintuples)
        parsed.append(readable)
        if response.think:
            thoughts.add(hash(" ".join(response.think.split())))
        counts["responses"] += 1
        counts["well_formed"] += response.well_formed and finished
        counts["cut_off"] += not finished
        counts["unparsed"] += not readable
        counts["malformed_items"] += response.malformed
    return Prediction(answers, parsed, counts, len(thoughts))


def check_response(where, item):
    """A stored response, an object. Raises InputError where a field is of the wrong type."""
    if not isinstance(item, dict) or not isinstance(item.get("text"), str):
        raise InputError(f"{where}: a response without 'text', a string")
    if not isinstance(item.get("finished", True), bool):
        found = type(item["finished"]).__name__
        raise InputError(f"{where}: 'finished' is of type {found}, expected true or false")
    return item


def answered(item, direct):
    """Whether a response holds an answer, be it empty; one that was cut off, refused or filtered holds
    none."""
    if direct:
        return item.get("finished", True) and item.get("status", "ok") == "ok"
    return "</answer>" in item["text"]


def from_quintuples(where, row):
    """The Prediction of a row of another system: items as lists, or as objects by the names of their keys."""
    items = row.get("quintuples")
    if not isinstance(items, list):
        raise InputError(
            f"{where}: expected 'responses' (ours), 'response' (a text) or 'quintuples' (a list of items)"
        )
    good = []
    for item in items:
        good += read_item(item)
    readable = bool(good) or not items
    counts = Counter(dict.fromkeys(COUNTED, 0), responses=1, malformed_items=len(items) - len(good))
    counts["well_formed"] = int(len(good) == len(items))
    counts["unparsed"] = int(not readable)
    return Prediction([tuple(good)], [readable], counts, 0)


def read_item(item):
    """An item of another system → one Quintuple in a list, or none. Objects go through the one reader of
    answers."""
    fields = common.as_item(item)
    if fields:
        return [common.quintuple(*fields)]
    if not isinstance(item, dict):
        return []
    read = common.parse_response(json.dumps([item], ensure_ascii=False), direct=True)
    return list(read.quintuples) if len(read.quintuples) == 1 and not read.malformed else []
