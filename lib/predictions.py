"""predictions.jsonl: written, resumed and read in one place; other systems' files too. Knows neither model nor score."""

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

# ------------------------------------------------------------------------------------------------ write


def adapter_hash(folder):
    """Of the adapter's weights and config: another training run into the same folder must not meet the old predictions."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("adapter_*")):
        with open(file, "rb") as handle:
            while chunk := handle.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def stored(out, known, settings):
    """{id: (file, byte offset)} of the rows in OUT; raises InputError where they were made from other data or settings."""
    where = {}
    for path in sorted(out.glob("predictions*.jsonl")):
        with open(path, "rb") as handle:
            offset = 0
            for number, line in enumerate(handle, 1):
                try:
                    row = json.loads(line)
                    here, example = row["settings"], known.get(row["id"])
                except (ValueError, KeyError, TypeError):
                    raise InputError(
                        f"{path}:{number}: not a prediction of 05_eval.py: delete the line, or start anew with --fresh"
                    ) from None
                other = [f"{k} {here.get(k)!r} (now {v!r})" for k, v in settings.items() if here.get(k) != v]
                if other:
                    raise InputError(
                        f"{path}:{number}: stored with {', '.join(other)}: use another --out, or delete it with --fresh"
                    )
                expected = example and data.to_row(example, path)
                if not expected or (row["text"], row["image"]) != (expected["text"], expected["image"]):
                    raise InputError(
                        f"{path}:{number}: id {row['id']} is not this tweet of --data: use another --out, or --fresh"
                    )
                where.setdefault(row["id"], (path, offset))
                offset += len(line)
    return where


def merge(out, known, settings):
    """The rows of all ranks → predictions.jsonl in the order of the data, with its gold of today; then the parts go."""
    target, where = out / "predictions.jsonl", stored(out, known, settings)
    with contextlib.ExitStack() as stack:
        sources = {path: stack.enter_context(open(path, "rb")) for path, _ in where.values()}
        handle = stack.enter_context(open(f"{target}.tmp", "w", encoding="utf-8", newline="\n"))
        for example in (e for e in known.values() if e.id in where):
            path, offset = where[example.id]
            sources[path].seek(offset)
            row = json.loads(sources[path].readline())
            row = {name: value for name, value in row.items() if name not in ("quintuples", "key", "usage")}
            handle.write(data.jsonl_line({**data.to_row(example, target), **row}))
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(f"{target}.tmp", target)
    for part in out.glob("predictions.rank*.jsonl"):
        part.unlink()


def take(args, out, stack):
    """Rank 0, before anybody reads OUT: lock it for this run, delete or mend what a killed run left. → what is wrong, or None."""
    try:
        stack.enter_context(ask.AppendFile(out / ".lock"))
        for path in [*out.glob("predictions*.jsonl"), *out.glob("answers.*")] if args.fresh else ():
            path.unlink()
        for path in out.glob("predictions.rank*.jsonl"):  # perhaps of more ranks than today
            ask.AppendFile(path).handle.close()  # opening cuts a torn last line
    except InputError as error:
        return error


# ------------------------------------------------------------------------------------------------ read


class Prediction(NamedTuple):
    answers: list  # one tuple of Quintuples a response
    parsed: list  # one bool a response: an answer was there to read, be it empty
    counts: Counter  # responses, well_formed, cut_off, unparsed, malformed items
    paths: int  # distinct reasonings


def read_predictions(path, known=None):
    """{id: Prediction} of our file or another system's; one row in memory at a time. known: {id: Example} its ids must be among."""
    predictions, unknown = {}, []
    for number, row in data.read_jsonl(path):
        if row.get("id") is None:
            raise InputError(f"{path}:{number}: missing 'id'")
        name = str(row["id"])
        if name in predictions:
            raise InputError(f"{path}:{number}: id {name} stands there twice, expected once")
        if known is not None and name not in known:
            unknown.append(name)
        elif known is not None and "responses" in row and row.get("text") != known[name].text:
            raise InputError(
                f"{path}:{number}: id {name} has another text in --data: these predictions are of other data"
            )
        predictions[name] = (
            _from_responses(path, number, row) if "responses" in row else _from_quintuples(path, number, row)
        )
    if unknown:
        raise InputError(
            f"{path}: {len(unknown)} of {len(predictions)} ids are not in the data ({', '.join(unknown[:3])}, …): other data?"
        )
    if not predictions:
        raise InputError(f"{path}: no prediction in it")
    return predictions


def _from_responses(path, number, row):
    if (
        row.get("prompt") not in ("reason", "direct")
        or not isinstance(row["responses"], list)
        or not row["responses"]
    ):
        raise InputError(
            f"{path}:{number}: expected 'prompt' reason or direct and a list of 'responses' (made by 05_eval.py)"
        )
    direct, answers, parsed, counts, thoughts = row["prompt"] == "direct", [], [], Counter(), set()
    for item in row["responses"]:
        if not isinstance(item, dict) or not isinstance(item.get("text"), str):
            raise InputError(f"{path}:{number}: a response without 'text' (made by 05_eval.py)")
        response, finished = common.parse_response(item["text"], direct), item.get("finished", True)
        # an empty answer that was given is an answer; one that was cut off, refused or filtered is none
        said = finished and item.get("status", "ok") == "ok" if direct else "</answer>" in item["text"]
        answers.append(response.quintuples)
        parsed.append(bool(response.quintuples or said and not response.malformed))
        thoughts |= {hash(" ".join(response.think.split()))} if response.think else set()
        shape = {
            "well_formed": response.well_formed and finished,
            "cut_off": not finished,
            "unparsed": not parsed[-1],
        }
        counts.update(
            {
                "responses": 1,
                **{name: int(value) for name, value in shape.items()},
                "malformed_items": response.malformed,
            }
        )
    return Prediction(answers, parsed, counts, len(thoughts))


def _from_quintuples(path, number, row):
    items = row.get("quintuples")
    if not isinstance(items, list):
        raise InputError(
            f"{path}:{number}: expected 'responses' (ours) or a list of 'quintuples' [[e1, t1, e2, t2, r], …]"
        )
    good = [item for item in map(common.as_item, items) if item]
    parsed, malformed = bool(good) or not items, len(items) - len(good)
    counts = Counter(
        responses=1,
        well_formed=int(not malformed),
        cut_off=0,
        unparsed=int(not parsed),
        malformed_items=malformed,
    )
    return Prediction([tuple(common.quintuple(*q) for q in good)], [parsed], counts, 0)


def stored_file(path):
    """A stored file, or the one in an --out folder."""
    return Path(path) / "predictions.jsonl" if Path(path).is_dir() else Path(path)


def stored_run(path, known=None, limit=None):
    """(examples, {id: Prediction}) of a stored file or an --out folder. known: the gold of --data, else the file's own."""
    path = stored_file(path)
    if known is None:
        if "responses" not in next(data.read_jsonl(path), (0, {}))[1]:
            raise InputError(
                f"{path}: holds quintuples without the tweets they are of: give the gold with --data"
            )
        known = {
            e.id: dataclasses.replace(e, row={}) for e in data.load_examples(path)
        }  # the responses are read one row at a time
    return list(known.values())[:limit], read_predictions(path, known)
