"""Many calls by the Batch API, at half the price and a day's patience (SPEC §8). Knows no task."""

import json
import sys
import tempfile
import time
from collections import Counter, deque

from common import InputError, Stopped
from lib import data
from lib.answers import side_file
from lib.api import estimate
from lib.reply import Again, CallFailed, decoded

BATCH_LIMITS = (50_000, 200_000_000)  # requests and bytes a file, of OpenAI's Batch API
ENDED = ("completed", "failed", "expired", "cancelled")
STATE = "Batch API of JMERE-R1"  # what a state file of ours begins with


def read_state(out):
    """The state beside an answers file → dict, empty where there is none. Raises InputError: not ours."""
    path = side_file(out, ".batches.json")
    if not path.exists():
        return {"about": STATE, "batches": []}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: cannot read ({error})") from None
    if not isinstance(state, dict) or state.get("about") != STATE:
        raise InputError(f"{path}: this tool did not write it: move it, or choose another --out")
    return state


def open_batches(state):
    """The entries of batches whose answers are not read yet."""
    return [entry for entry in state["batches"] if entry["status"] == "open"]


def requests_in(entries):
    return sum(len(entry["requests"]) for entry in entries)


def refuse_beside_batches(out):
    """Raise InputError where an open batch may still answer what a live run would pay for again."""
    entries = open_batches(read_state(out.path))
    if entries:
        names = ", ".join(str(entry["batch"]) for entry in entries)
        raise InputError(
            f"{out.path}: {requests_in(entries)} requests are in open batches ({names}): "
            "--batch collect reads them, --batch cancel gives them up"
        )


class Batches:
    """The batches of one answers file: submit, status, collect, cancel.

    *.batches.json tells of each batch what it was asked with, and of an open one its requests. It is written
    before a batch is created (with batch null) and after, so a run killed in between finds its batch by the
    file, and none is paid for twice. Answers that this command does not want go to *.unclaimed.jsonl.
    """

    def __init__(self, client, jobs, out, finish):
        import openai

        client.check()
        self.openai = openai
        self.api = connect(client)
        self.client = client
        self.jobs = {job.key: job for job in jobs}
        self.out = out
        self.finish = finish
        self.path = side_file(out.path, ".batches.json")
        self.state = read_state(out.path)
        self.rounds = Counter()  # how often each key was sent
        self.failed = set()  # keys that are lost
        self.causes = Counter()  # of failures

    def run(self, action):
        """action: submit, status, collect, cancel → how many jobs failed. Raises InputError, Stopped."""
        try:
            if action == "status":
                self.show()
            elif action == "cancel":
                self.cancel()
            else:
                self.check_settings()
                self.submit()
                entries = open_batches(self.state)
                say(f"{requests_in(entries)} requests in {len(entries)} batches, see {self.path}")
                while action == "collect" and open_batches(self.state):
                    self.look()
        except self.openai.OpenAIError as error:
            fault = self.client.server.one_line(error)
            raise Stopped(
                f"batch: {fault}; what was submitted is in {self.path}, the same command goes on"
            ) from None
        return len(self.failed)

    def check_settings(self):
        """Raise InputError where the open batches were submitted with other settings than this command's."""
        now = {
            "model": self.client.model,
            "params": self.client.params,
            "server": self.client.server.shown,
        }
        entries = open_batches(self.state)
        differ = []
        for name, value in now.items():
            if entries and self.state[name] != value:
                differ.append(f"{name} {self.state[name]} (now {value})")
        differ = differ or self.changed_contents(entries)
        if differ:
            raise InputError(
                f"{self.path}: the open batches were submitted with {', '.join(differ)}: collect them "
                "with the command that submitted them, or give them up with --batch cancel"
            )
        self.state |= now

    def changed_contents(self, entries):
        """What of the first request that this command would ask otherwise, if any."""
        by_id = {job.row["id"]: job for job in self.jobs.values()}
        for entry in entries:
            for request in entry["requests"].values():
                job = by_id.get(request["id"])
                if job is None or job.key == request["key"]:
                    continue
                for name in ("prompt_hash", "image_hash"):
                    if job.provenance[name] != request[name]:
                        return [f"{name} {request[name]} of {request['id']} (now {job.provenance[name]})"]
        return []

    # ------------------------------------------------------------ submit

    def submit(self):
        """Send every job that is neither answered nor waited for."""
        missing = self.missing()
        client = self.client
        if client.budget and client.spent + client.cost(estimate(missing, 300)) > client.budget:
            raise Stopped(
                f"budget: ${client.spent:.2f} of ${client.budget:g} spent, {len(missing)} requests do not fit"
            )
        waiting = deque(missing)
        while waiting:
            with tempfile.TemporaryFile() as file:
                requests = self.fill(file, waiting)
                if requests:
                    file.seek(0)
                    sent = self.api.files.create(file=("batch.jsonl", file), purpose="batch")
                    self.add_entry(sent.id, requests)
        for entry in open_batches(self.state):
            if not entry["batch"]:
                entry["batch"] = self.find(entry["file"]) or self.create(entry["file"])
                self.save()

    def missing(self):
        """The jobs to send; one that was sent `tries` times has failed."""
        waiting = set()
        for entry in open_batches(self.state):
            waiting |= {request["key"] for request in entry["requests"].values()}
        missing = []
        for key, job in self.jobs.items():
            if self.out.done[key] >= job.n or key in waiting or key in self.failed:
                continue
            self.rounds[key] += 1
            if self.rounds[key] > self.client.tries:
                self.fail(job, f"{self.client.tries} batches gave no answer")
            else:
                missing.append(job)
        return missing

    def fill(self, file, waiting):
        """Move jobs from `waiting` to request lines in `file`, within BATCH_LIMITS → {custom id: request}."""
        requests = {}
        while waiting:
            job = waiting[0]
            try:
                lines = self.lines(job)
            except CallFailed as error:
                self.fail(waiting.popleft(), error)
                continue
            size = file.tell() + sum(map(len, lines.values()))
            if requests and (len(requests) + len(lines) > BATCH_LIMITS[0] or size > BATCH_LIMITS[1]):
                break
            waiting.popleft()
            file.writelines(lines.values())
            told = {name: job.provenance[name] for name in ("prompt_hash", "image_hash")}
            for custom_id in lines:
                requests[custom_id] = {"key": job.key, "id": job.row["id"], **told}
        return requests

    def lines(self, job):
        """{custom id: request line}: one for all candidates wanted, or one each where `n` is refused."""
        left = job.n - self.out.done[job.key]
        first = self.out.rows[job.key]
        if self.client.one_by_one:
            wanted = {f"{job.key}-{k}": (1, first + k) for k in range(left)}
        else:
            wanted = {job.key: (left, first)}
        lines = {}
        for custom_id, (n, number) in wanted.items():
            fields = (custom_id.encode(), self.client.body(job.prompt, job.image, n, number))
            line = b'{"custom_id":"%b","method":"POST","url":"/v1/chat/completions","body":%b}\n' % fields
            lines[custom_id] = line
        return lines

    def add_entry(self, file, requests):
        submitted = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        entry = {"file": file, "batch": None, "status": "open", "submitted": submitted, "requests": requests}
        self.state["batches"].append(entry)
        self.save()

    def find(self, file):
        """The batch already made of `file`, or None."""
        for batch in self.api.batches.list(limit=100):
            if batch.input_file_id == file:
                return batch.id
        return None

    def create(self, file):
        once = self.api.with_options(max_retries=0)
        batch = once.batches.create(
            input_file_id=file, endpoint="/v1/chat/completions", completion_window="24h"
        )
        return batch.id

    # ------------------------------------------------------------ collect

    def look(self):
        """Read the first open batch if it has ended, else wait."""
        entry = open_batches(self.state)[0]
        batch = self.retrieve(entry)
        if batch.status not in ENDED:
            say(progress(batch))
            time.sleep(self.client.poll)
            return
        answers = self.read(entry, batch.output_file_id)
        self.read(entry, batch.error_file_id)
        keys = {request["key"] for request in entry["requests"].values()}
        self.close(entry, batch.status)
        say(f"{batch.id}: {batch.status}, {answers} answers read")
        if batch.status == "failed":
            errors = batch.errors.data if batch.errors else []
            faults = "; ".join(error.message or "" for error in errors)
            raise Stopped(f"batch {batch.id} refused: {faults}; the same command sends its requests again")
        if batch.status == "cancelled":  # it stays cancelled
            for key in keys & self.jobs.keys() - self.failed:
                if self.out.done[key] < self.jobs[key].n:
                    self.fail(self.jobs[key], f"its batch {batch.id} was cancelled")
            return
        self.submit()

    def retrieve(self, entry):
        """The server's word on a batch. Raises Stopped where it knows none."""
        try:
            return self.api.batches.retrieve(entry["batch"])
        except self.openai.NotFoundError as error:
            raise self.lost(entry, f"the server knows no such batch ({error})") from None

    def lost(self, entry, why):
        fault = self.client.server.one_line(why)
        return Stopped(
            f"{entry['batch']}: {fault}; --batch cancel forgets it, --batch submit then asks its "
            f"{len(entry['requests'])} requests again"
        )

    def read(self, entry, file):
        """Store the answers of an output or error file → how many. A line that cannot be read is missing."""
        if not file:
            return 0
        try:
            lines = self.api.files.content(file).iter_lines()
        except self.openai.NotFoundError as error:
            raise self.lost(entry, f"its answers are gone from the server ({error})") from None
        answers = 0
        bad = 0
        for line in lines:
            answer = decoded(line)
            if isinstance(answer, dict) and isinstance(answer.get("custom_id"), str):
                answers += self.take(entry, answer)
            elif line.strip():
                bad += 1
        if bad:
            say(f"{entry['batch']}: {bad} lines of {file} cannot be read, their requests count as missing")
        return answers

    def take(self, entry, answer):
        """Store one line of a batch's file → whether it is an answer. One that is lost fails its job."""
        request = entry["requests"].get(answer["custom_id"], {"key": answer["custom_id"]})
        job = self.jobs.get(request["key"])
        response = answer.get("response")
        response = response if isinstance(response, dict) else {}
        body = response.get("body") or {"error": answer.get("error")}
        status = response.get("status_code")
        if isinstance(body, dict) and body.get("choices"):
            status = 200
        left = job.n - self.out.done[job.key] if job else 1
        if left <= 0:
            return False  # read already, by a run that was killed
        try:
            reply = self.client.verdict(status, {}, json.dumps(body), left)
        except Again:
            return False  # it is missing, and sent again
        except (CallFailed, Stopped) as error:
            if getattr(error, "status", None) in (400, 422) and left > 1 and not self.client.takes_n:
                self.client.one_by_one = True  # perhaps the server refuses `n`: it is sent again, one by one
            elif job:
                self.fail(job, error)
            return False
        if job is None:
            self.out.set_aside(request["key"], status, body, f"batch {entry['batch']}")
            return True
        if len(reply.choices) > 1:
            self.client.takes_n = True
        self.out.add(self.client, job, reply, self.finish)
        return True

    def fail(self, job, error):
        self.failed.add(job.key)
        self.causes[self.client.server.one_line(error)[:120]] += 1
        self.out.fail(job, self.client.server.one_line(error))

    # ------------------------------------------------------------ status, cancel

    def show(self):
        """Say of each open batch how far it is."""
        entries = open_batches(self.state)
        if not entries:
            say(f"no open batch in {self.path}")
        for entry in entries:
            about = f"submitted {entry['submitted']}, {len(entry['requests'])} requests"
            if entry["batch"]:
                about = f"{progress(self.retrieve(entry))}, {about}"
            say(about)

    def cancel(self):
        """Ask the server to cancel the open batches; forget those that it has no more.

        What was answered before is paid for: --batch collect reads it.
        """
        for entry in open_batches(self.state):
            if not entry["batch"]:
                self.close(entry, "never created")
                continue
            try:
                batch = self.api.batches.retrieve(entry["batch"])
                if batch.status not in (*ENDED, "cancelling"):
                    batch = self.api.batches.cancel(entry["batch"])
                elif batch.output_file_id:
                    self.api.files.retrieve(batch.output_file_id)
            except self.openai.NotFoundError:
                self.close(entry, "lost at the server")
                say(f"{entry['batch']}: the server has it no more, it is forgotten")
            else:
                say(f"{batch.id}: {batch.status}; --batch collect reads what it answered")

    def close(self, entry, status):
        """Of a batch that is read only the number of its requests is kept."""
        entry["status"] = status
        entry["requests"] = len(entry["requests"])
        self.save()

    def save(self):
        data.write_atomic(self.path, json.dumps(self.state, indent=1) + "\n")


def connect(client):
    """The SDK's client of the same server, with the same key, headers and proxy."""
    import httpx2
    import openai

    server = client.server
    headers = dict(server.given_headers)
    key = "unused" if server.brings_key() else server.key()
    if server.brings_key() and "authorization" not in headers:
        headers["authorization"] = openai.Omit()
    base = f"{server.parts.scheme}://{server.parts.netloc}{server.path}"
    options = server.http_options() | {"timeout": 600.0}
    return openai.OpenAI(
        api_key=key,
        base_url=base,
        default_headers=headers,
        default_query=server.query,
        max_retries=client.tries,
        http_client=httpx2.Client(**options),
    )


def progress(batch):
    counts = batch.request_counts
    done = f"{counts.completed} of {counts.total} done" if counts else "0 done"
    return f"{batch.id}: {batch.status}, {done}"


def say(line):
    print(line, file=sys.stderr, flush=True)
