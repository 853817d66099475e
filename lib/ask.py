"""Many calls to a chat server: live or by batches, price, data card (SPEC §8). Knows no task."""

import asyncio
import contextlib
import importlib.metadata
import json
import platform
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from common import Stopped
from lib import data
from lib.answers import AppendFile, side_file
from lib.api import CallFailed, estimate
from lib.batches import Batches

__all__ = ["AppendFile", "ask_all", "print_estimate", "side_file", "write_data_card"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def ask_all(client, jobs, out, finish=lambda row: row, batch=None):
    """Answer every job not answered yet, one row a choice, in the AppendFile `out` → number that failed.

    A row: job.row, candidate, status, response, model_answered, usage, finish_reason, job.provenance, key;
    `finish` may change it. Failed jobs go to *.errors.jsonl and are asked again by the next run. The first
    Ctrl-C or SIGTERM waits for the calls in flight. batch: None, or "submit" / "collect" for the Batch API.
    Raises Stopped: key, quota, budget, interrupt, ten failures in succession.
    """
    client.spent += client.cost(out.usage)
    todo = [job for job in jobs if out.done[job.key] < job.n]
    errors = side_file(out.path, ".errors.jsonl")
    errors.unlink(missing_ok=True)
    failed = 0
    try:
        if batch:
            failed = Batches(client, todo, out, finish).run(collect=batch == "collect")
        elif todo:
            failed = asyncio.run(Live(client, todo, out, finish).run())
    except KeyboardInterrupt:
        raise Stopped(
            "interrupted: calls in flight are lost, batches go on; run the same command to go on"
        ) from None
    if client.reason:
        rows = out.done.total()
        raise Stopped(f"{client.reason}; {rows} rows are in {out.path}, the same command goes on from there")
    if failed:
        print(
            f"{failed} of {len(jobs)} calls failed, see {errors}; the same command asks them again",
            file=sys.stderr,
        )
    return failed


class Live:
    """Asks jobs with client.concurrency workers, which share one queue, one rate-limit gate and one bar."""

    def __init__(self, client, todo, out, finish):
        self.client = client
        self.todo = todo
        self.queue = iter(todo)  # one iterator for all workers
        self.out = out
        self.finish = finish
        self.ok = 0
        self.failed = 0
        self.successive = 0  # failures since the last answer
        self.prior = client.cost(estimate(todo[:1], 300))  # what a call may cost, until some were paid

    async def run(self):
        """→ number of jobs that failed."""
        workers = min(self.client.concurrency, len(self.todo))
        interval = 0.5 if sys.stderr.isatty() else 30
        loop = asyncio.get_running_loop()
        async with self.client:
            for number in SIGNALS:
                loop.add_signal_handler(number, self.interrupt)
            await announce(self.client)
            with tqdm(
                total=len(self.todo), desc=self.out.path.name, unit="job", mininterval=interval
            ) as self.bar:
                await asyncio.gather(*(self.work() for _ in range(workers)))
        return self.failed

    def interrupt(self):
        self.client.stop("interrupted")
        for number in SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)  # the second one ends the program

    async def work(self):
        for job in self.queue:
            if self.client.reason:
                return
            try:
                await self.answer(job)
            except CallFailed as error:
                self.fail(job, error)
            except Stopped as stop:
                self.client.stop(str(stop))
                return
            else:
                self.ok += 1
                self.successive = 0
            self.show()

    async def answer(self, job):
        while (left := job.n - self.out.done[job.key]) > 0:  # a server may give fewer choices than asked for
            await self.client.afford(self.prior)
            self.client.in_flight += 1
            try:
                reply = await self.client.chat(job.prompt, job.image, left)
            finally:
                self.client.in_flight -= 1
            self.out.add(self.client, job, reply, self.finish)

    def fail(self, job, error):
        self.failed += 1
        self.successive += 1
        self.out.fail(job, error)
        if self.successive >= 10:
            self.client.stop(f"{self.successive} rows failed in succession, the last: {error}")

    def show(self):
        done = self.ok + self.failed
        projected = self.client.spent + self.client.paid / done * (len(self.todo) - done)
        dollars = f"${self.client.spent:.2f} of ${projected:.2f}"
        self.bar.set_postfix_str(f"ok {self.ok} failed {self.failed} {dollars}", refresh=False)
        self.bar.update()


async def announce(client):
    """Say when the server means to shut the model down, where it tells."""
    try:
        model = await asyncio.wait_for(client.api.models.retrieve(client.model), 10)
    except (client.openai.OpenAIError, asyncio.TimeoutError, ValueError):
        return
    if date := getattr(model, "shutdown_date", None):
        print(f"{client.model}: the server announces its shutdown for {date}", file=sys.stderr)


# -------------------------------------------------------------------------------- price and data card


def print_estimate(client, jobs, completion_tokens, title):
    """--dry-run: one line a pass."""
    tokens = estimate(jobs, completion_tokens)
    dollars = f"${client.cost(tokens):.2f}" if client.price else "dollars unknown without --price"
    told = f"{tokens['prompt_tokens']} prompt and {tokens['completion_tokens']} completion tokens"
    print(f"{title}, {client.model}: {len(jobs)} calls, about {told}, {dollars}")


def write_data_card(out, stages, reasons, stats, prompts, answers):
    """How a file came about: the funnel of Figure 7 on screen, *.stats.json, and the data card *.card.md.

    stages: [(stage, candidates, examples)]; reasons: {why a candidate left: how many}; prompts: {name: text};
    answers: the append-only files paid for.
    """
    funnel = [f"{'stage':<40}{'candidates':>11}{'examples':>10}"]
    for stage, candidates, examples in stages:
        funnel.append(f"{stage:<40}{candidates:>11}{examples:>10}")
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
        funnel.append(f"  left: {reason:<32}{count:>11}")
    funnel = "\n".join(funnel)
    print(funnel)
    settings = json.dumps(stats, indent=1)
    stats = {"funnel": stages, "left": reasons, **stats}
    data.write_atomic(side_file(out, ".stats.json"), json.dumps(stats, indent=1) + "\n")
    today = time.strftime("%Y-%m-%d", time.gmtime())
    card = [
        f"# {Path(out).name}",
        f"Made by `{Path(sys.argv[0]).name}` on {today} (UTC).",
        f"## Counts\n\n```\n{funnel}\n```",
        f"## Models\n\n{models(answers)}",
        f"## Settings and price\n\n```json\n{settings}\n```",
        *(f"## Prompt: {name}\n\n````\n{prompt}\n````" for name, prompt in prompts.items()),
        f"## Versions\n\n{versions()}",
        "## Rights\n\nTexts and images are tweets, whose rights stay with their authors: no licence is "
        "stated here, and none is implied. The reasoning is model output; the terms of its provider apply.",
    ]
    data.write_atomic(side_file(out, ".card.md"), "\n\n".join(card) + "\n")


def models(answers):
    """A line for each pair of model asked and model that answered."""
    pairs = Counter()
    for path in answers:
        for _, row in data.read_jsonl(path):
            pairs[row["model"], row["model_answered"]] += 1
    return "\n".join(f"- asked {asked}, answered {told}: {n} answers" for (asked, told), n in pairs.items())


def versions():
    found = [f"python {platform.python_version()}"]
    for package in ("openai", "pillow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(found)
