"""Many calls by the Batch API, at half the price and a day's patience (SPEC §8). Knows no task."""

import json
import sys
import tempfile
import time
from collections import Counter, deque

from common import Stopped
from lib import data
from lib.answers import side_file
from lib.api import Again, CallFailed, estimate

BATCH_LIMITS = (50_000, 200_000_000)  # requests and bytes a file, of OpenAI's Batch API
ENDED = ("completed", "failed", "expired", "cancelled")


class Batches:
    """The batches of one answers file.

    `submit` sends what is missing; `collect` waits, reads, and sends again what did not come.
    *.batches.json holds [{"file", "batch", "keys"}] of the batches not read yet. It is written before a batch
    is created (with batch null) and after, so a run killed in between finds its batch by the file, and none
    is paid for twice.
    """

    def __init__(self, client, jobs, out, finish):
        import openai

        client.require_key()
        self.openai = openai
        self.api = openai.OpenAI(base_url=client.base_url, max_retries=client.tries)
        self.client = client
        self.jobs = {job.key: job for job in jobs}
        self.out = out
        self.finish = finish
        self.path = side_file(out.path, ".batches.json")
        self.batches = json.loads(self.path.read_text()) if self.path.exists() else []
        self.rounds = Counter()  # how often each key was sent
        self.failed = set()  # keys that are lost

    def run(self, collect):
        """→ number of jobs that failed. Raises Stopped."""
        try:
            self.submit()
            requests = sum(len(batch["keys"]) for batch in self.batches)
            print(f"{requests} requests in {len(self.batches)} batches, see {self.path}", file=sys.stderr)
            while collect and self.batches:
                self.look()
        except self.openai.OpenAIError as error:
            raise Stopped(
                f"batch: {str(error)[:300]}; what was submitted is in {self.path}, the same command goes on"
            ) from None
        return len(self.failed)

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
                keys = self.fill(file, waiting)
                if keys:
                    file.seek(0)
                    sent = self.api.files.create(file=("batch.jsonl", file), purpose="batch")
                    self.batches.append({"file": sent.id, "batch": None, "keys": keys})
                    self.save()
        for batch in self.batches:
            if not batch["batch"]:
                batch["batch"] = self.find(batch["file"]) or self.create(batch["file"])
                self.save()

    def missing(self):
        """The jobs to send; one that was sent `tries` times has failed."""
        waiting = {key for batch in self.batches for key in batch["keys"]}
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
        """Move jobs from `waiting` to request lines in `file`, within BATCH_LIMITS → their keys."""
        keys = []
        while waiting and len(keys) < BATCH_LIMITS[0]:
            job = waiting[0]
            try:
                body = self.client.body(job.prompt, job.image, job.n - self.out.done[job.key])
            except CallFailed as error:
                self.fail(waiting.popleft(), error)
                continue
            fields = (job.key.encode(), body)
            line = b'{"custom_id":"%b","method":"POST","url":"/v1/chat/completions","body":%b}\n' % fields
            if keys and file.tell() + len(line) > BATCH_LIMITS[1]:
                break
            file.write(line)
            keys.append(waiting.popleft().key)
        return keys

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

    def look(self):
        """Read the first batch if it has ended, else wait."""
        batch = self.api.batches.retrieve(self.batches[0]["batch"])
        if batch.status not in ENDED:
            done = batch.request_counts.completed if batch.request_counts else 0
            print(f"{batch.id}: {batch.status}, {done} done", file=sys.stderr)
            time.sleep(self.client.poll)
            return
        self.read(batch.output_file_id)
        self.read(batch.error_file_id)
        del self.batches[0]
        self.save()
        if batch.status == "failed":
            errors = batch.errors.data if batch.errors else []
            faults = "; ".join(error.message or "" for error in errors)
            raise Stopped(f"batch {batch.id} refused: {faults}; the same command sends its requests again")
        self.submit()

    def read(self, file):
        """Store the answers of an output or error file; a line that is lost for good fails its job alone."""
        lines = self.api.files.content(file).iter_lines() if file else ()
        for line in lines:
            line = json.loads(line)
            job = self.jobs.get(line["custom_id"])
            if job is None or self.out.done[job.key] >= job.n:
                continue
            response = line.get("response") or {}
            content = json.dumps(response.get("body") or {"error": line.get("error")}).encode()
            try:
                reply = self.client.verdict(
                    response.get("status_code"), content, job.n - self.out.done[job.key]
                )
            except Again:
                continue  # it is missing, and sent again
            except (CallFailed, Stopped) as error:
                self.fail(job, error)
            else:
                self.out.add(self.client, job, reply, self.finish)

    def fail(self, job, error):
        self.failed.add(job.key)
        self.out.fail(job, error)

    def save(self):
        data.write_atomic(self.path, json.dumps(self.batches))
