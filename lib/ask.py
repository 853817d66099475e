"""Many calls to a chat server: answers file, live and Batch API, price, data card (SPEC §8). Knows no task."""

import asyncio
import contextlib
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from common import InputError, Stopped
from lib import data
from lib.api import TOKENS, CallFailed

# ------------------------------------------------------------------------------------------------ answers file


class AppendFile:
    """Append-only JSONL under an exclusive lock. Opening cuts a last line torn by a kill; `done` counts the rows of each key."""

    def __init__(self, path):
        self.path, self.done, self.usage = Path(path), Counter(), dict.fromkeys(TOKENS, 0.0)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.handle = open(path, "a+b", buffering=0)  # noqa: SIM115, open as long as this object
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{path}: another process writes to it (file lock): wait for it, or choose another --out"
            ) from None
        except OSError as error:
            raise InputError(f"{path}: cannot write ({error.strerror})") from None
        self._cut_torn_line()
        for number, row in data.read_jsonl(path):
            if "key" not in row:
                raise InputError(
                    f"{path}:{number}: missing 'key', so this tool did not write it: choose another --out"
                )
            self.done[row["key"]] += 1
            for name in TOKENS if row["usage"] else ():
                self.usage[name] += row["usage"][name] / row["usage"]["choices"]

    def _cut_torn_line(self):
        size, tail = self.handle.seek(0, os.SEEK_END), b""
        while (at := size - len(tail)) and b"\n" not in tail:
            self.handle.seek(max(0, at - 65536))
            tail = self.handle.read(at - max(0, at - 65536)) + tail
        torn = tail.rpartition(b"\n")[2]
        if torn:
            self.handle.truncate(size - len(torn))
            print(f"{self.path}: cut a torn last line of {len(torn)} bytes", file=sys.stderr)

    def append(self, rows):
        """One write a call: a kill leaves whole lines and at most one torn one."""
        block = "".join(map(data.jsonl_line, rows)).encode(
            errors="replace"
        )  # a server may send half a surrogate pair
        try:
            if self.handle.write(block) != len(block):
                raise OSError(None, "disk full")
        except OSError as error:
            raise Stopped(
                f"{self.path}: cannot write ({error.strerror}): make room; the same command goes on"
            ) from None

    def add(self, client, job, reply, finish):
        """One row a choice still wanted, in one write."""
        cost, first = client.cost(reply.usage or estimate([job], 300)), self.done[job.key]
        client.spent, client.called, client.calls = (
            client.spent + cost,
            client.called + cost,
            client.calls + 1,
        )
        told = {
            "model_answered": reply.model,
            "usage": reply.usage and {**reply.usage, "choices": len(reply.choices)},
        }
        rows = [
            {
                **job.row,
                "candidate": k,
                "status": choice.status,
                "response": choice.text,
                **told,
                "finish_reason": choice.finish_reason,
            }
            for k, choice in enumerate(reply.choices[: job.n - first], first)
        ]
        self.append(finish({**row, **job.stamp, "key": job.key}) for row in rows)
        self.done[job.key] += len(rows)

    def fail(self, job, error):
        """A failed job goes to *.errors.jsonl, written anew by each run."""
        with open(self.path.with_suffix(".errors.jsonl"), "a", encoding="utf-8") as handle:
            handle.write(
                data.jsonl_line(
                    {"id": job.row["id"], "status": "error", "error": str(error), **job.stamp, "key": job.key}
                )
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.handle.close()  # gives the lock back


# ------------------------------------------------------------------------------------------------ asking


def ask_all(client, jobs, out, finish=lambda row: row, batch=None):
    """Answer every job not answered yet, appending one row a choice to the AppendFile `out`. → number of jobs that failed.

    A row: job.row, candidate, status, response, model_answered, usage, finish_reason, job.stamp, key; `finish` may change it.
    Failed jobs go to *.errors.jsonl and are asked again by the next run. The first Ctrl-C or SIGTERM waits for the calls in
    flight. batch: None, or "submit" / "collect" for the Batch API. Raises Stopped: key, quota, budget, interrupt, ten failures.
    """
    client.spent += client.cost(out.usage)
    todo, errors = [job for job in jobs if out.done[job.key] < job.n], out.path.with_suffix(".errors.jsonl")
    errors.unlink(missing_ok=True)
    try:
        if batch:
            failed = _ask_batches(client, todo, out, finish, batch == "collect")
        else:
            failed = asyncio.run(_ask_live(client, todo, out, finish)) if todo else 0
    except KeyboardInterrupt:
        raise Stopped(
            "interrupted: calls in flight are lost, batches go on; run the same command to go on"
        ) from None
    if client.reason:
        raise Stopped(
            f"{client.reason}; {sum(out.done.values())} rows are in {out.path}, the same command goes on from there"
        )
    if failed:
        print(
            f"{failed} of {len(jobs)} calls failed, see {errors}; the same command asks them again",
            file=sys.stderr,
        )
    return failed


async def _ask_live(client, todo, out, finish):
    tally, queue, loop, successive = Counter(), iter(todo), asyncio.get_running_loop(), 0
    prior = client.cost(estimate(todo[:1], 300))  # what a call may cost, until some were paid

    def interrupt():
        client.stop("interrupted")
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)  # the second one ends the program

    async def answer(job):
        while (left := job.n - out.done[job.key]) > 0:  # a server may give fewer choices than asked for
            await client.afford(prior)
            client.in_flight += 1
            try:
                reply = await client.chat(job.prompt, job.image, left)
            finally:
                client.in_flight -= 1
            out.add(client, job, reply, finish)

    async def work():
        nonlocal successive
        for job in queue:  # one iterator for all workers
            try:
                if client.reason:
                    return
                await answer(job)
                tally["ok"], successive = tally["ok"] + 1, 0
            except CallFailed as error:
                tally["failed"], successive = tally["failed"] + 1, successive + 1
                out.fail(job, error)
                if successive >= 10:
                    client.stop(f"{successive} rows failed in succession, the last: {error}")
            except Stopped as stop:
                client.stop(str(stop))
                return
            dollars = client.spent + client.called / tally.total() * (len(todo) - tally.total())
            bar.set_postfix_str(
                f"ok {tally['ok']} failed {tally['failed']} ${client.spent:.2f} of ${dollars:.2f}",
                refresh=False,
            )
            bar.update()

    async with client:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, interrupt)
        await _announce(client)
        with tqdm(
            total=len(todo), desc=out.path.name, unit="job", mininterval=0.5 if sys.stderr.isatty() else 30
        ) as bar:
            await asyncio.gather(*(work() for _ in range(min(client.concurrency, len(todo)))))
    return tally["failed"]


# ------------------------------------------------------------------------------------------------ Batch API


BATCH_LIMITS = (50_000, 200_000_000)  # requests and bytes a file, of OpenAI's Batch API


def _ask_batches(client, todo, out, finish, collect):
    """The Batch API, at half the price: submit what is missing; with `collect`, wait, read, and submit again what did not come.

    *.batches.json holds [{"file", "batch", "keys"}] of the batches not read yet. It is written before a batch is created (with
    batch null) and after, so a run killed in between finds its batch by the file, and none is paid for twice.
    """
    import openai

    client.require_key()
    api, state = (
        openai.OpenAI(base_url=client.base_url, max_retries=client.tries),
        out.path.with_suffix(".batches.json"),
    )
    batches, jobs, rounds, failed = (
        json.loads(state.read_text()) if state.exists() else [],
        {job.key: job for job in todo},
        Counter(),
        {},
    )

    def fail(job, error):
        failed[job.key] = error
        out.fail(job, error)

    def save():
        data.write_atomic(state, json.dumps(batches))

    def submit():
        waiting = {key for batch in batches for key in batch["keys"]} | failed.keys()
        missing = [job for job in jobs.values() if out.done[job.key] < job.n and job.key not in waiting]
        for job in missing:
            rounds[job.key] += 1
            if rounds[job.key] > client.tries:
                fail(job, f"{client.tries} batches gave no answer")
        missing = [job for job in missing if job.key not in failed]
        if client.budget and client.spent + client.cost(estimate(missing, 300)) > client.budget:
            raise Stopped(
                f"budget: ${client.spent:.2f} of ${client.budget:g} spent, {len(missing)} requests do not fit"
            )
        for chunk, keys in _batch_chunks(client, missing, out, fail):
            batches.append(
                {
                    "file": api.files.create(file=("batch.jsonl", chunk), purpose="batch").id,
                    "batch": None,
                    "keys": keys,
                }
            )
            save()
        for batch in batches:
            if not batch["batch"]:
                sent = [
                    known.id for known in api.batches.list(limit=100) if known.input_file_id == batch["file"]
                ]
                options = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
                batch["batch"] = (
                    sent[0]
                    if sent
                    else api.with_options(max_retries=0)
                    .batches.create(input_file_id=batch["file"], **options)
                    .id
                )
                save()

    def read(file):
        for line in api.files.content(file).iter_lines() if file else ():
            line = json.loads(line)
            job, response = jobs.get(line["custom_id"]), line.get("response") or {}
            if job and out.done[job.key] < job.n:
                try:
                    content = json.dumps(response.get("body") or {"error": line.get("error")})
                    reply, *_ = client.verdict(
                        response.get("status_code"), content, "no answer", job.n - out.done[job.key]
                    )
                    if reply:
                        out.add(client, job, reply, finish)
                except (
                    CallFailed,
                    Stopped,
                ) as error:  # one line of a file that is paid for: the others count
                    fail(job, error)

    try:
        submit()
        print(
            f"{sum(len(batch['keys']) for batch in batches)} requests in {len(batches)} batches, see {state}",
            file=sys.stderr,
        )
        while collect and batches:
            batch = api.batches.retrieve(batches[0]["batch"])
            if batch.status not in ("completed", "failed", "expired", "cancelled"):
                counts = batch.request_counts
                print(
                    f"{batch.id}: {batch.status}, {counts.completed if counts else 0} done", file=sys.stderr
                )
                time.sleep(client.poll)
                continue
            read(batch.output_file_id)
            read(batch.error_file_id)
            del batches[0]
            save()
            if batch.status == "failed":
                faults = "; ".join(
                    fault.message or "" for fault in (batch.errors and batch.errors.data) or ()
                )
                raise Stopped(
                    f"batch {batch.id} refused: {faults}; the same command sends its requests again"
                )
            submit()
    except openai.OpenAIError as error:
        raise Stopped(
            f"batch: {str(error)[:300]}; what was submitted is in {state}, the same command goes on"
        ) from None
    return len(failed)


def _batch_chunks(client, jobs, out, fail):
    """Yield (file of request lines, their keys) within BATCH_LIMITS."""
    keys, chunk = [], tempfile.TemporaryFile()  # noqa: SIM115, closed by going away
    for job in jobs:
        try:
            body = client.body(job.prompt, job.image, job.n - out.done[job.key])
        except CallFailed as error:
            fail(job, error)
            continue
        line = b'{"custom_id":"%b","method":"POST","url":"/v1/chat/completions","body":%b}\n' % (
            job.key.encode(),
            body,
        )
        if keys and (len(keys) >= BATCH_LIMITS[0] or chunk.tell() + len(line) > BATCH_LIMITS[1]):
            chunk.seek(0)
            yield chunk, keys
            keys, chunk = [], tempfile.TemporaryFile()  # noqa: SIM115
        keys.append(job.key)
        chunk.write(line)
    if keys:
        chunk.seek(0)
        yield chunk, keys


async def _announce(client):
    """Say when the server means to shut the model down; most servers tell nothing, and then neither do we."""
    try:
        model = await asyncio.wait_for(client.api.models.retrieve(client.model), 10)
    except (client.openai.OpenAIError, asyncio.TimeoutError, ValueError):
        return
    if date := getattr(model, "shutdown_date", None):
        print(f"{client.model}: the server announces its shutdown for {date}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------ price and data card


def estimate(jobs, completion_tokens):
    """Tokens jobs will take, roughly: 4 characters a token, an image as GPT-4o counts it, `completion_tokens` an answer."""
    prompt = sum(len(job.prompt) / 4 + image_tokens(job.image) for job in jobs)
    return {
        "prompt_tokens": round(prompt),
        "completion_tokens": completion_tokens * sum(job.n for job in jobs),
    }


def image_tokens(path):
    """Tokens of an image at high detail: 85, and 170 for each tile of 512² once it fits 2048² with its short side at most 768."""
    if not path:
        return 0
    with Image.open(path) as image:
        short, long = sorted(image.size)
    scale = min(1, 2048 / long, 768 / short)
    return 85 + 170 * math.ceil(short * scale / 512) * math.ceil(long * scale / 512)


def print_estimate(client, jobs, completion_tokens, title):
    """--dry-run: one line a pass."""
    tokens = estimate(jobs, completion_tokens)
    dollars = f"${client.cost(tokens):.2f}" if client.price else "dollars unknown without --price"
    counts = f"{len(jobs)} calls, about {tokens['prompt_tokens']} prompt and {tokens['completion_tokens']} completion tokens"
    print(f"{title}, {client.model}: {counts}, {dollars}")


def write_data_card(out, stages, reasons, stats, prompts, answers):
    """How a file came about: the funnel of Figure 7 on screen, *.stats.json, and the data card *.card.md beside it.

    stages: [(stage, candidates, examples)]; reasons: {why a candidate left: how many}; answers: the append-only files paid for.
    """
    lines = [
        f"{'stage':<40}{'candidates':>11}{'examples':>10}",
        *(f"{stage:<40}{a:>11}{b:>10}" for stage, a, b in stages),
    ]
    lines += [
        f"  left: {reason:<32}{count:>11}"
        for reason, count in sorted(reasons.items(), key=lambda item: -item[1])
    ]
    print("\n".join(lines))
    stats = {"funnel": stages, "left": reasons, **stats}
    data.write_atomic(Path(out).with_suffix(".stats.json"), json.dumps(stats, indent=1) + "\n")
    models = Counter(
        (row["model"], row["model_answered"]) for path in answers for _, row in data.read_jsonl(path)
    )
    versions = {"python": platform.python_version()}
    for package in ("openai", "pillow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    card = [
        f"# {Path(out).name}\n\nMade by `{Path(sys.argv[0]).name}` on {time.strftime('%Y-%m-%d', time.gmtime())} (UTC).",
        f"## Counts\n\n```\n{chr(10).join(lines)}\n```",
        "## Models\n\n"
        + "\n".join(f"- asked {asked}, answered {told}: {n} answers" for (asked, told), n in models.items()),
        f"## Settings and price\n\n```json\n{json.dumps({k: v for k, v in stats.items() if k not in ('funnel', 'left')}, indent=1)}\n```",
        *(f"## Prompt: {name}\n\n````\n{prompt}\n````" for name, prompt in prompts.items()),
        "## Versions\n\n" + ", ".join(f"{name} {version}" for name, version in versions.items()),
        "## Rights\n\nTexts and images are tweets, whose rights stay with their authors: no licence is stated here, and none is implied. "
        "The reasoning is model output; the terms of the model's provider apply.",
    ]
    data.write_atomic(Path(out).with_suffix(".card.md"), "\n\n".join(card) + "\n")
