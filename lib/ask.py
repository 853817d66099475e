"""Many calls to a chat server: live or by batches, their price, the data card (SPEC §8). Knows no task."""

import asyncio
import contextlib
import importlib.metadata
import json
import platform
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from urllib.parse import quote

from tqdm import tqdm

from common import InputError, Stopped
from lib import data
from lib.answers import AppendFile, beside, beside_answers, check_outputs, read_stored, side_file
from lib.api import estimate
from lib.batches import Batches, open_batches, read_state, refuse_beside_batches, requests_in
from lib.reply import Again, CallFailed

__all__ = [
    "AppendFile",
    "ask_all",
    "asked_again",
    "beside",
    "beside_answers",
    "check_outputs",
    "print_estimate",
    "read_stored",
    "side_file",
    "write_data_card",
]

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NO_ANSWERS = ("submit", "status", "cancel")  # actions of the Batch API that bring none
FIRST_ANSWERS = 20  # of a pass: if all of them are useless, so will the others be
STATUSES = ("malformed", "unparsed", "length", "refusal", "content_filter", "empty")


def is_ok(row):
    return row["status"] == "ok"


def asked_again(retry, readable=is_ok):
    """The test of --retry: whether a stored row does not count as an answer. Raises InputError.

    readable(row): whether an answer of status ok can be read; where not, its reason is `unparsed`.
    """
    unknown = [name for name in retry if name not in STATUSES]
    if unknown:
        raise InputError(f"--retry {unknown[0]}: expected some of {','.join(STATUSES)}")

    def again(row):
        reason = row["status"]
        if reason == "ok" and not readable(row):
            reason = "unparsed"
        return reason in retry

    return again


def ask_all(
    client,
    jobs,
    out,
    finish=lambda row: row,
    batch=None,
    readable=is_ok,
    title=None,
    tokens=300,
    must_differ=False,
):
    """Answer every job not answered yet, one row a choice, in the AppendFile `out` → how many failed.

    A row: key, job.row, candidate, status, response, job.provenance, server, model_answered, usage, made_by,
    finish_reason; `finish` may change it. Failed jobs go to *.errors.jsonl and are asked again by the next
    run. The first Ctrl-C or SIGTERM waits for the calls in flight. batch: an action of Batches, or None.
    readable(row): whether an answer is of use; title, tokens: of the pass, for the line on what it will take;
    must_differ: equal candidates of one example are a fault.
    Raises Stopped: key, quota, budget, interrupt, ten failures in succession, twenty useless answers, a fault
    of ours; InputError: a live run beside open batches.
    """
    if not batch:
        refuse_beside_batches(out)
    errors = side_file(out.path, ".errors.jsonl")
    if batch not in NO_ANSWERS:
        errors.unlink(missing_ok=True)
    client.spent += client.cost(out.usage)
    claim(client, jobs, out, finish)
    if batch:
        worker = Batches(client, jobs, out, finish)
    else:
        worker = Live(client, jobs, out, finish, readable, must_differ)
        client.prior = client.cost(estimate(worker.todo[:1], tokens))
        print(plan(client, jobs, tokens, title or out.path.name, out.done), file=sys.stderr)
    failed = 0
    try:
        if batch:
            failed = worker.run(batch)
        elif worker.todo:
            failed = asyncio.run(worker.run())
            worker.report()
    except KeyboardInterrupt:
        client.reason = "interrupted: calls in flight are lost, batches go on"
    finally:
        saved = out.rescue()
        for cause, count in worker.causes.most_common(3):
            print(f"  failed, {count} ×: {cause}", file=sys.stderr)
    if client.reason:
        rows = out.rows.total()
        raise Stopped(f"{client.reason}; {rows} rows are in {out.path}, the same command goes on{saved}")
    if failed:
        told = f"{failed} of {len(jobs)} calls failed, see {errors}"
        print(f"{told}; the same command asks them again", file=sys.stderr)
    return failed


def claim(client, jobs, out, finish):
    """Take what an earlier command paid for and could not use: rows of *.unclaimed.jsonl with a job's key."""
    path = side_file(out.path, ".unclaimed.jsonl")
    if not path.exists():
        return
    AppendFile(path).handle.close()  # cuts a torn line
    wanted = {job.key: job for job in jobs}
    left = []
    claimed = 0
    for _, row in data.read_jsonl(path):
        job = wanted.get(row["key"])
        if job is None or out.done[job.key] >= job.n:
            left.append(row)
            continue
        try:
            text = json.dumps(row["body"])
            reply = client.verdict(row["http_status"], {}, text, job.n - out.done[job.key])
            out.add(client, job, reply, finish)
            claimed += 1
        except (Again, CallFailed, Stopped):
            left.append(row)
    if claimed:
        data.write_atomic(path, "".join(map(data.jsonl_line, left)))
        print(f"{claimed} answers taken from {path}, which were paid for already", file=sys.stderr)


# -------------------------------------------------------------------------------- live


class Live:
    """Asks jobs with client.concurrency workers, which share one queue, one gate and one bar."""

    def __init__(self, client, jobs, out, finish, readable, must_differ):
        self.client = client
        self.todo = [job for job in jobs if out.done[job.key] < job.n]
        self.queue = iter(self.todo)  # one iterator for all workers
        self.out = out
        self.finish = finish
        self.alarm = Alarm(out.rows.total(), readable, must_differ)
        self.wanted = sum(job.n - out.done[job.key] for job in self.todo)  # answers
        self.ok = 0
        self.failed = 0
        self.equal = 0  # jobs whose candidates are all equal
        self.successive = 0  # failures since the last answer
        self.causes = Counter()  # of failures
        self.empty = 0  # answers without text
        self.last_wait = -60.0  # when the screen last said what the run waits for

    async def run(self):
        """→ number of jobs that failed."""
        workers = min(self.client.concurrency, len(self.todo))
        interval = 0.5 if sys.stderr.isatty() else 30
        loop = asyncio.get_running_loop()
        async with self.client:
            for number in SIGNALS:
                loop.add_signal_handler(number, self.interrupt)
            await announce(self.client)
            self.client.waits_for = self.show_wait
            with tqdm(
                total=len(self.todo), desc=self.out.path.name, unit="job", mininterval=interval
            ) as self.bar:
                await asyncio.gather(*(self.work() for _ in range(workers)))
        return self.failed

    def interrupt(self):
        self.client.stop("interrupted")
        for number in SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)  # the second one ends the program
        flying = f"{self.client.in_flight} calls in flight, at most {self.client.timeout:g} s"
        tqdm.write(f"interrupted: finishing {flying}; once more loses their answers", file=sys.stderr)

    async def work(self):
        for job in self.queue:
            if self.client.reason:
                return
            try:
                await self.answer(job)
                self.ok += 1
                self.successive = 0
            except CallFailed as error:
                self.fail(job, error)
            except Stopped as stop:
                self.client.stop(str(stop))
                return
            except Exception as error:  # a fault of ours: what is in flight is stored, then the run ends
                self.fail(job, f"{type(error).__name__}: {error}", traceback.format_exc())
                self.client.stop(self.client.server.one_line(f"unexpected {type(error).__name__}: {error}"))
                return
            self.show()

    async def answer(self, job):
        rows = []
        while (left := job.n - self.out.done[job.key]) > 0:  # a server may give fewer choices than asked for
            await self.client.afford()
            self.client.in_flight += 1
            try:
                reply = await self.client.chat(job.prompt, job.image, left, self.out.rows[job.key])
            finally:
                self.client.in_flight -= 1
            new = self.out.add(self.client, job, reply, self.finish)
            rows += new
            self.empty += sum(row["status"] == "empty" for row in new)
            self.alarm.look(job, new)
            self.wanted -= len(new)
            if self.alarm.reason and self.wanted > self.client.in_flight:  # else a stop saves nothing
                self.client.stop(self.alarm.reason)
        self.equal += len(rows) > 1 and len({row["response"] for row in rows}) == 1

    def fail(self, job, error, trace=None):
        self.failed += 1
        self.successive += 1
        self.causes[self.client.server.one_line(error)[:120]] += 1
        if self.successive >= 10:
            self.client.stop(f"{self.successive} rows failed in succession, the last: {error}")
        try:
            self.out.fail(job, self.client.server.one_line(error), trace)
        except Stopped as stop:
            self.client.stop(str(stop))

    def show(self):
        done = self.ok + self.failed
        projected = self.client.spent + self.client.paid / done * (len(self.todo) - done)
        dollars = f"${self.client.spent:.2f} of ${projected:.2f}"
        self.bar.set_postfix_str(f"ok {self.ok} failed {self.failed} {dollars}", refresh=False)
        self.bar.update()

    def show_wait(self, what):
        """Say what the run waits for, unless something was said just now."""
        now = time.monotonic()
        if now - self.last_wait > (1 if sys.stderr.isatty() else 30):
            self.last_wait = now
            self.bar.set_postfix_str(f"ok {self.ok} failed {self.failed} {what[:150]}", refresh=True)

    def report(self):
        """Say what looks wrong."""
        if self.equal:
            told = f"{self.equal} of {self.ok} examples: all candidates are equal"
            print(f"{told}; {SAMPLING}", file=sys.stderr)
        if self.empty:
            print(f"{self.empty} answers are empty; {THINKING}", file=sys.stderr)


SAMPLING = "is sampling on? try --temperature, and no fixed --param seed"
THINKING = (
    "if the model spent its tokens thinking: a higher --max-tokens, or thinking switched off by --param"
)


class Alarm:
    """Says why a pass should stop after its first answers: none can be used, or all are equal.

    stored: rows that the pass has already; a run that goes on after an alarm is not stopped again.
    """

    def __init__(self, stored, readable, must_differ):
        self.off = stored >= FIRST_ANSWERS
        self.readable = readable
        self.must_differ = must_differ
        self.seen = []  # (job's key, status, text, whether it is of use)
        self.reason = None

    def look(self, job, rows):
        """Sets `reason` once FIRST_ANSWERS are seen."""
        if self.off:
            return
        for row in rows:
            useful = row["status"] == "ok" and self.readable(row)
            self.seen.append((job.key, row["status"], row["response"], useful))
        if len(self.seen) < FIRST_ANSWERS:
            return
        self.off = True
        texts = [text for _, _, text, _ in self.seen]
        shown = repr(texts[0][:200])
        if not any(useful for _, _, _, useful in self.seen):
            status = self.seen[0][1]
            self.reason = f"none of the first {len(texts)} answers can be used, such as ({status}): {shown}"
        elif len(set(texts)) == 1:
            self.reason = f"the first {len(texts)} answers are all equal: {shown}"
        elif self.must_differ and self.candidates_equal():
            told = f"each of the first examples has equal candidates, such as: {shown}"
            self.reason = f"{told}; {SAMPLING}"

    def candidates_equal(self):
        """Whether no example has two different candidates, and some have two."""
        texts = {}
        for key, _, text, _ in self.seen:
            texts.setdefault(key, []).append(text)
        several = [group for group in texts.values() if len(group) > 1]
        return bool(several) and all(len(set(group)) == 1 for group in several)


async def announce(client):
    """Say when the server means to shut the model down, where it tells."""
    url = client.server.url(f"models/{quote(client.model, safe='/:@')}")
    try:
        async with client.httpx.AsyncClient(**client.options) as http:
            answer = await asyncio.wait_for(http.get(url, headers=client.headers), 10)
            date = answer.json().get("shutdown_date")
    except (
        client.httpx.HTTPError,
        client.httpx.InvalidURL,
        asyncio.TimeoutError,
        ValueError,
        AttributeError,
    ):
        return
    if date:
        print(f"{client.model}: the server announces its shutdown for {date}", file=sys.stderr)


# -------------------------------------------------------------------------------- what it will take


def plan(client, jobs, tokens, title, done):
    """One line: what is asked of whom, how many calls, what they will take. done: {key: candidates there}."""
    todo = [job._replace(n=job.n - done[job.key]) for job in jobs if done[job.key] < job.n]
    used = estimate(todo, tokens)
    dollars = f"${client.cost(used):.2f}" if client.price else "dollars unknown without --price"
    told = f"{used['prompt_tokens']} prompt and {used['completion_tokens']} completion tokens"
    there = f" ({len(jobs) - len(todo)} answered already)" if len(todo) < len(jobs) else ""
    whom = f"{client.model} at {client.server.shown}"
    return f"{title}, {whom}: {len(todo)} calls{there}, about {told}, {dollars}"


def print_estimate(client, jobs, tokens, title, path=None, again=lambda row: False):
    """--dry-run: one line a pass. path: the answers file, whose answers are not to be paid for any more."""
    done = Counter()
    if path:
        done = read_stored(path, asked_again=again).done
        waiting = requests_in(open_batches(read_state(path)))
        if waiting:
            print(f"{waiting} requests are in open batches: --batch collect reads them")
    print(plan(client, jobs, tokens, title, done))


# -------------------------------------------------------------------------------- data card


def write_data_card(out, stages, reasons, stats, prompts, answers):
    """How a file came about: the funnel of Figure 7 on screen, *.stats.json, and the data card *.card.md.

    stages: [(stage, candidates, distinct candidates or None, examples)]; reasons: {why one left: how many};
    prompts: {name: text}; answers: the append-only files paid for.
    """
    funnel = [f"{'stage':<40}{'candidates':>11}{'distinct':>10}{'examples':>10}"]
    for stage, candidates, distinct, examples in stages:
        shown = "" if distinct is None else distinct
        funnel.append(f"{stage:<40}{candidates:>11}{shown:>10}{examples:>10}")
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
        funnel.append(f"  left: {reason:<32}{count:>11}")
    funnel = "\n".join(funnel)
    print(funnel)
    settings = json.dumps(stats, indent=1)
    stats = {"out": Path(out).name, "funnel": stages, "left": reasons, **stats}
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
    try:
        data.write_atomic(side_file(out, ".stats.json"), json.dumps(stats, indent=1) + "\n")
        data.write_atomic(side_file(out, ".card.md"), "\n\n".join(card) + "\n")
    except Stopped as fault:  # said, not raised: why the run ends is said after it
        print(f"error: {fault}", file=sys.stderr)


def models(answers):
    """A line for each model asked, where, and the model that answered."""
    told = Counter()
    for path in answers:
        if Path(path).exists():
            for _, row in data.read_jsonl(path):
                told[row["model"], row.get("server"), row["model_answered"]] += 1
    lines = []
    for (asked, server, answered), count in told.items():
        lines.append(f"- asked {asked} at {server}, answered {answered}: {count} answers")
    return "\n".join(lines)


def versions():
    found = [f"python {platform.python_version()}"]
    for package in ("openai", "pillow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(found)
