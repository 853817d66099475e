"""Answers files: append-only JSONL, one row a choice, and the side files of an output. Knows no task."""

import fcntl
import os
import sys
from collections import Counter
from pathlib import Path

from common import InputError, Stopped
from lib import data
from lib.api import TOKENS, estimate


def side_file(path, ending):
    """`ending` after the whole name of `path`, or in place of its .jsonl.

    >>> str(side_file("runs/sft-0.7", ".score.jsonl")), str(side_file("runs/sft.jsonl", ".card.md"))
    ('runs/sft-0.7.score.jsonl', 'runs/sft.card.md')
    """
    path = Path(path)
    return path.with_name(path.name.removesuffix(".jsonl") + ending)


class AppendFile:
    """Append-only JSONL under an exclusive lock. Opening cuts a last line torn by a kill.

    done: how many rows stand under each key; usage: the tokens of all rows. Raises InputError where another
    process writes to the file, where it cannot be written, or where a row has no key.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.done = Counter()
        self.usage = dict.fromkeys(TOKENS, 0.0)
        self.handle = self._open()
        self._cut_torn_line()
        self._count()

    def _open(self):
        """The file, locked."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = self.path.open("a+b", buffering=0)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{self.path}: another process writes to it (file lock): wait, or choose another --out"
            ) from None
        except OSError as error:
            raise InputError(f"{self.path}: cannot write ({error.strerror})") from None
        return handle

    def _cut_torn_line(self):
        size = self.handle.seek(0, os.SEEK_END)
        tail = b""
        while len(tail) < size and b"\n" not in tail:
            end = size - len(tail)
            start = max(0, end - 65536)
            self.handle.seek(start)
            tail = self.handle.read(end - start) + tail
        torn = tail.rpartition(b"\n")[2]
        if torn:
            self.handle.truncate(size - len(torn))
            print(f"{self.path}: cut a torn last line of {len(torn)} bytes", file=sys.stderr)

    def _count(self):
        for number, row in data.read_jsonl(self.path):
            if "key" not in row:
                raise InputError(
                    f"{self.path}:{number}: missing 'key', so this tool did not write it: "
                    "choose another --out"
                )
            self.done[row["key"]] += 1
            usage = row["usage"] or {}
            for name in usage.keys() & self.usage.keys():
                self.usage[name] += usage[name] / usage["choices"]

    def append(self, rows):
        """One write: a kill leaves whole lines and at most one torn one. Raises Stopped: disk full."""
        text = "".join(map(data.jsonl_line, rows))
        block = text.encode(errors="replace")  # a server may send half a surrogate pair
        try:
            if self.handle.write(block) != len(block):
                raise OSError(None, "disk full")
        except OSError as error:
            raise Stopped(
                f"{self.path}: cannot write ({error.strerror}): make room; the same command goes on"
            ) from None
        for row in rows:
            self.done[row["key"]] += 1

    def add(self, client, job, reply, finish):
        """Pay for a reply, and append one row a choice still wanted; `finish` may change a row."""
        client.pay(client.cost(reply.usage or estimate([job], 300)))
        first = self.done[job.key]
        server_fields = {"model_answered": reply.model, "usage": None}
        if reply.usage:
            server_fields["usage"] = {**reply.usage, "choices": len(reply.choices)}
        rows = []
        for k, choice in enumerate(reply.choices[: job.n - first], first):
            row = {**job.row, "candidate": k, "status": choice.status, "response": choice.text}
            row |= {**server_fields, "finish_reason": choice.finish_reason}
            rows.append(finish({**row, **job.provenance, "key": job.key}))
        self.append(rows)

    def fail(self, job, error):
        """A failed job goes to *.errors.jsonl, written anew by each run."""
        row = {"id": job.row["id"], "status": "error", "error": str(error)}
        row |= {**job.provenance, "key": job.key}
        with side_file(self.path, ".errors.jsonl").open("a", encoding="utf-8") as handle:
            handle.write(data.jsonl_line(row))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.handle.close()  # gives the lock back
