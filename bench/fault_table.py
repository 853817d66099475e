"""What the chat client does about each fault, observed: ten rows are asked of a local server whose first answer is the fault.

    python bench/fault_table.py

Reads: nothing.  Writes: the table, to the screen.
"""

import contextlib
import io
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from fake_openai import FAULTS, FakeOpenAI

import common
from lib import api, ask, data

WRITTEN_OUT = ("reset", "truncated", "hang", "drip", "nothing-left")  # faults that are no plain answer


def observe(fault, always):
    """→ (requests sent, rows stored, jobs failed, seconds, how it ended) of ten jobs, two at a time."""
    with (
        tempfile.TemporaryDirectory() as folder,
        FakeOpenAI(lambda body, prompt: ["fine"], lambda i: fault if always or not i else None) as server,
    ):
        client, path = (
            api.ChatClient("m", server.url, concurrency=2, timeout=0.5),
            Path(folder) / "out.jsonl",
        )
        jobs, end, began = [client.job({"id": f"j{i}"}, f"p{i}") for i in range(10)], "done", time.monotonic()
        with ask.AppendFile(path) as out, contextlib.redirect_stderr(io.StringIO()):
            try:
                ask.ask_all(client, jobs, out)
            except common.Stopped as stop:
                end = str(stop).partition(";")[0][:70]
        rows = [row for _, row in data.read_jsonl(path)] if path.stat().st_size else []
        errors = path.with_suffix(".errors.jsonl")
        failed = sum(1 for _ in data.read_jsonl(errors)) if errors.exists() else 0
        kinds = ", ".join(sorted({row["status"] for row in rows} - {"ok"}))
        return (
            len(server.requests),
            f"{len(rows)}{f' ({kinds})' if kinds else ''}",
            failed,
            time.monotonic() - began,
            end,
        )


def main():
    os.environ["OPENAI_API_KEY"] = "sk-local"
    api.ChatClient.backoff, api.ChatClient.patience = 0.02, 5.0
    print(f"{'fault':<14}{'when':<8}{'requests':>8}  {'rows of 10':<20}{'failed':>6}{'seconds':>9}  end")
    for fault in (*FAULTS, *WRITTEN_OUT):
        for always in (False, True):
            if always and fault in ("hang", "drip", "nothing-left", "429-ms", "429-s", "429"):
                continue  # the same, for minutes
            requests, rows, failed, seconds, end = observe(fault, always)
            print(
                f"{fault:<14}{'always' if always else 'once':<8}{requests:>8}  {rows:<20}{failed:>6}{seconds:>9.2f}  {end}"
            )


if __name__ == "__main__":
    main()
