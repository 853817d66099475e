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

# -------------------------------------------------------------------------------- write


def adapter_hash(folder):
    """Of the adapter's weights and config: another training run into the same folder must not meet the old
    predictions."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("adapter_*")):
        with open(file, "rb") as handle:
            while chunk := handle.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()[:16]


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
        found = (row["text"], row["image"])
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{where}: not a prediction of 05_eval.py: delete the line, or start anew with --fresh"
        ) from None
    other = [f"{k} {here.get(k)!r} (now {v!r})" for k, v in settings.items() if here.get(k) != v]
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


def unanswered(n):
    """The Prediction of a tweet without one: n responses that say nothing."""
    return Prediction([()] * n, [False] * n, Counter(), 0)


def read_predictions(path, known=None):
    """{id: Prediction} of our file or another system's; one row in memory at a time. Raises InputError.

    known: {id: Example} that its ids must be among.
    """
    predictions = {}
    unknown = []
    for number, row in data.read_jsonl(path):
        where = f"{path}:{number}"
        if row.get("id") is None:
            raise InputError(f"{where}: missing 'id'")
        name = str(row["id"])
        if name in predictions:
            raise InputError(f"{where}: id {name} stands there twice, expected once")
        if known is not None and name not in known:
            unknown.append(name)
        elif known is not None and "responses" in row and row.get("text") != known[name].text:
            raise InputError(
                f"{where}: id {name} has another text in --data: these predictions are of other data"
            )
        read = from_responses if "responses" in row else from_quintuples
        predictions[name] = read(where, row)
    if unknown:
        shown = ", ".join(unknown[:3])
        raise InputError(
            f"{path}: {len(unknown)} of {len(predictions)} ids are not in the data ({shown}, …): other data?"
        )
    if not predictions:
        raise InputError(f"{path}: no prediction in it")
    return predictions


def from_responses(where, row):
    """The Prediction of a row of 05."""
    responses = row["responses"]
    if row.get("prompt") not in common.PROMPTS or not isinstance(responses, list) or not responses:
        raise InputError(
            f"{where}: expected 'prompt' reason or direct and a list of 'responses' (made by 05_eval.py)"
        )
    direct = row["prompt"] == "direct"
    answers = []
    parsed = []
    counts = Counter(dict.fromkeys(COUNTED, 0))
    thoughts = set()
    for item in responses:
        if not isinstance(item, dict) or not isinstance(item.get("text"), str):
            raise InputError(f"{where}: a response without 'text' (made by 05_eval.py)")
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


def answered(item, direct):
    """Whether a response holds an answer, be it empty; one that was cut off, refused or filtered holds
    none."""
    if direct:
        return item.get("finished", True) and item.get("status", "ok") == "ok"
    return "</answer>" in item["text"]


def from_quintuples(where, row):
    """The Prediction of a row of another system."""
    items = row.get("quintuples")
    if not isinstance(items, list):
        raise InputError(
            f"{where}: expected 'responses' (ours) or a list of 'quintuples' [[e1, t1, e2, t2, r], …]"
        )
    good = [item for item in map(common.as_item, items) if item]
    readable = bool(good) or not items
    malformed = len(items) - len(good)
    counts = Counter(dict.fromkeys(COUNTED, 0), responses=1, malformed_items=malformed)
    counts["well_formed"] = int(not malformed)
    counts["unparsed"] = int(not readable)
    return Prediction([tuple(common.quintuple(*q) for q in good)], [readable], counts, 0)


def stored_file(path):
    """A stored file, or the one in an --out folder."""
    path = Path(path)
    return path / "predictions.jsonl" if path.is_dir() else path


def stored_run(path, known=None, limit=None):
    """([Example], {id: Prediction}) of a stored file or an --out folder. Raises InputError.

    known: the gold of --data; None: the file's own.
    """
    path = stored_file(path)
    if not path.exists():
        raise InputError(f"{path}: no such file: made by 05_eval.py, or name another")
    if known is None:
        _, first = next(data.read_jsonl(path), (0, {}))
        if "responses" not in first:
            raise InputError(
                f"{path}: holds quintuples without the tweets they are of: give the gold with --data"
            )
        # without `row`: the responses are read again, one row at a time
        known = {e.id: dataclasses.replace(e, row={}) for e in data.load_examples(path)}
    return list(known.values())[:limit], read_predictions(path, known)
