"""The user's files (SPEC §8): which of them may be written, and answers files, which only grow.

An output that is an input, or that this tool did not write, is refused before it is opened for writing. Knows
no task.
"""

import contextlib
import errno
import fcntl
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from common import InputError, Stopped
from lib import data
from lib.api import estimate
from lib.reply import TOKENS

BEGINS = '{"key": "'  # every line of an answers file
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


# -------------------------------------------------------------------------------- outputs


def side_file(path, ending):
    """`ending` after the whole name of `path`, or in place of its .jsonl.

    >>> str(side_file("runs/sft-0.7", ".score.jsonl")), str(side_file("runs/sft.jsonl", ".card.md"))
    ('runs/sft-0.7.score.jsonl', 'runs/sft.card.md')
    """
    path = Path(path)
    return path.with_name(path.name.removesuffix(".jsonl") + ending)


def check_outputs(outputs, inputs):
    """Raise InputError unless every output may be written: it is no input, and absent or one of ours.

    outputs: {path: what each line of a JSONL file of ours holds, or what the head of another file of ours
    holds}; None for an answers file, which AppendFile checks.
    """
    for path, mark in outputs.items():
        for source in inputs:
            if source and Path(source).exists() and Path(path).exists() and Path(path).samefile(source):
                raise InputError(f"{path} would be overwritten, and it is an input: choose another --out")
        folder = next(parent for parent in Path(path).absolute().parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise InputError(f"{path}: {folder} is no folder that can be written")
        if mark and os.path.lexists(path):
            refuse_foreign(Path(path), mark)


def beside(out):
    """What stands beside an output: funnel and card → {path: mark}, for check_outputs."""
    name = Path(out).name
    return {
        side_file(out, ".stats.json"): f'"out": {json.dumps(name)}',
        side_file(out, ".card.md"): f"# {name}\n\nMade by `",
    }


def beside_answers(path):
    """An answers file and what stands beside it → {path: mark}, for check_outputs."""
    return {
        path: None,
        side_file(path, ".errors.jsonl"): '"status": "error"',
        side_file(path, ".unclaimed.jsonl"): BEGINS,
        side_file(path, ".batches.json"): '"about": "',
    }


def refuse_foreign(path, mark):
    """Raise InputError where the file is not ours: none of the user's is overwritten."""
    if not path.is_file():
        raise InputError(f"{path} is no regular file: choose another --out")
    with path.open("rb") as handle:
        if path.suffix == ".jsonl":
            ours = all(mark.encode() in line for line in handle)
        else:
            head = handle.read(4096)
            ours = not head or mark.encode() in head
    if not ours:
        raise InputError(f"{path}: this tool did not write it: move it, or choose another --out")


# -------------------------------------------------------------------------------- answers files


class Stored(NamedTuple):
    """What an answers file holds."""

    done: Counter  # key → rows that count as answers
    rows: Counter  # key → all rows
    usage: dict  # tokens of all rows
    torn: int  # bytes of a last line torn by a kill
    ended: bool  # whether the last line has its line break


def read_stored(path, made_by=None, asked_again=lambda row: False):
    """→ Stored, empty where there is no file. Raises InputError where this tool did not write it.

    made_by: what the rows say of the pass that made them; asked_again(row): this row is no answer.
    """
    stored = Stored(Counter(), Counter(), dict.fromkeys(TOKENS, 0.0), 0, True)
    path = Path(path)
    if not os.path.lexists(path):
        return stored
    if not path.is_file():
        raise InputError(f"{path} is no regular file: choose another --out")
    try:
        with path.open("rb") as handle:
            for number, line in enumerate(handle, 1):
                if is_torn(line):
                    return stored._replace(torn=len(line))
                stored = stored._replace(ended=line.endswith(b"\n"))
                row = _own_row(path, number, line, made_by)
                stored.rows[row["key"]] += 1
                stored.done[row["key"]] += not asked_again(row)
                usage = row.get("usage") or {}
                for name in usage.keys() & stored.usage.keys():
                    stored.usage[name] += usage[name] / usage["choices"]
    except OSError as error:
        raise InputError(f"{path}: cannot read ({error.strerror})") from None
    return stored


def is_torn(line):
    """Whether a kill has cut this line of ours: it has no end, begins like ours, and is no whole row."""
    begins = BEGINS.encode()
    if line.endswith(b"\n") or not (line.startswith(begins) or begins.startswith(line)):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return False


def _own_row(path, number, line, made_by):
    """A whole line as a row of ours."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or not isinstance(row.get("key"), str):
        raise InputError(f"{path}:{number}: this tool did not write it (no 'key'): choose another --out")
    maker = row.get("filtered_by") or row.get("made_by")
    if made_by and maker and maker != made_by:
        raise InputError(f"{path}:{number}: made by {maker}, not by {made_by}: choose another --out")
    return row


class AppendFile:
    """Append-only JSONL under an exclusive lock. Opening cuts a last line of ours that a kill has torn.

    done: rows that count as answers, of each key; rows: all of them; usage: the tokens of all rows.
    Raises InputError where another process writes to the file, where it cannot be written or is not ours.
    """

    def __init__(self, path, made_by=None, asked_again=lambda row: False):
        self.path = Path(path)
        self.made_by = made_by
        self.unwritten = []  # blocks that the disk refused
        read_stored(path, made_by)  # refuse before anything is opened for writing
        self.handle = self._open()
        stored = read_stored(path, made_by, asked_again)
        self.done = stored.done
        self.rows = stored.rows
        self.usage = stored.usage
        if stored.torn:
            self.handle.truncate(self.path.stat().st_size - stored.torn)
            print(f"{self.path}: cut a torn last line of {stored.torn} bytes", file=sys.stderr)
        elif not stored.ended:
            self.handle.write(b"\n")

    def _open(self):
        """The file, locked."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = self.path.open("ab", buffering=0)
        except OSError as error:
            raise InputError(f"{self.path}: cannot write ({error.strerror})") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            raise InputError(
                f"{self.path}: another process writes to it (file lock): wait, or choose another --out"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(f"{self.path}: no file locks here: start no second run on it", file=sys.stderr)
        return handle

    def append(self, rows):
        """One write: a kill leaves whole lines and at most one torn one. Raises Stopped: disk full."""
        lines = [data.jsonl_line({"key": row["key"], **row}) for row in rows]
        block = "".join(lines).encode(errors="replace")  # a server may send half a surrogate pair
        for row in rows:
            self.rows[row["key"]] += 1
            self.done[row["key"]] += 1
        try:
            self._write(block)
        except OSError as error:
            self.unwritten.append(block)
            raise Stopped(f"{self.path}: cannot write ({error.strerror}): make room") from None

    def _write(self, block):
        """All of `block`, or nothing: only whole lines stay. Raises OSError."""
        size = os.fstat(self.handle.fileno()).st_size
        if self.handle.write(block) != len(block):
            os.ftruncate(self.handle.fileno(), size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def rescue(self):
        """Store what the disk refused, here or in the system's temporary folder → what to say of it."""
        if not self.unwritten:
            return ""
        block = b"".join(self.unwritten)
        self.unwritten = []
        with contextlib.suppress(OSError):
            self._write(block)
            return ""
        try:  # still full: elsewhere then
            with tempfile.NamedTemporaryFile(prefix="jmere-answers-", suffix=".jsonl", delete=False) as file:
                file.write(block)
        except OSError as error:
            return f"; paid answers could be stored nowhere ({error.strerror})"
        return f"; paid answers that did not fit are in {file.name}: append them to {self.path}"

    def add(self, client, job, reply, finish):
        """Pay for a reply; append one row a choice still wanted, `finish`ed → these rows."""
        usage = reply.usage or estimated_usage(job, reply)
        client.pay(client.cost(usage))
        wanted = reply.choices[: max(0, job.n - self.done[job.key])]
        first = self.rows[job.key]
        shared = {
            **job.provenance,
            "params": client.sent_params(first),
            "server": client.server.shown,
            "model_answered": reply.model,
            "usage": {**usage, "choices": len(wanted)},
            "made_by": self.made_by,
            "key": job.key,
        }
        rows = []
        for k, choice in enumerate(wanted, first):
            row = {**job.row, "candidate": k, "status": choice.status, "response": choice.text}
            rows.append(row | shared | {"finish_reason": choice.finish_reason})
        try:
            rows = [finish(row) for row in rows]
        except Exception as error:
            body = {"choices": [], "usage": reply.usage, "model": reply.model}
            for choice in reply.choices:
                message = {"content": choice.text}
                body["choices"].append({"message": message, "finish_reason": choice.finish_reason})
            self.set_aside(job.key, 200, body, f"{type(error).__name__}: {error}")  # it is paid for
            raise
        self.append(rows)
        return rows

    def set_aside(self, key, status, body, why):
        """An answer that this command cannot take goes to *.unclaimed.jsonl: a later one may."""
        row = {"key": key, "http_status": status, "body": body, "why": why}
        append_lines(side_file(self.path, ".unclaimed.jsonl"), [row])

    def fail(self, job, error, trace=None):
        """A failed job goes to *.errors.jsonl, written anew by each run. Raises Stopped: disk full."""
        row = {"id": job.row["id"], "status": "error", "error": str(error), **job.provenance, "key": job.key}
        if trace:
            row["traceback"] = trace
        append_lines(side_file(self.path, ".errors.jsonl"), [row])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.handle.close()  # gives the lock back


def append_lines(path, rows):
    """Raises Stopped: disk full."""
    try:
        with path.open("a", encoding="utf-8", errors="replace") as handle:
            handle.write("".join(map(data.jsonl_line, rows)))
    except OSError as error:
        raise Stopped(f"{path}: cannot write ({error.strerror})") from None


def estimated_usage(job, reply):
    """Tokens of a reply whose server does not tell: 4 characters a token."""
    written = sum(len(choice.text) for choice in reply.choices)
    return {**estimate([job], 0), "completion_tokens": round(written / 4), "estimated": True}
