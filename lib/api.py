"""One call to a chat server: client, request, what a reply means (SPEC §8). Knows no task: a prompt goes in, text comes out."""

import asyncio
import base64
import functools
import hashlib
import io
import json
import os
import random
import re
import time
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NamedTuple

from PIL import ExifTags, Image

from common import InputError, Stopped
from lib.data import load_image

SENT_AS_IS = (
    "JPEG",
    "PNG",
    "GIF",
    "WEBP",
)  # what OpenAI-compatible servers read; anything else travels as PNG
FATAL = {
    401: "check OPENAI_API_KEY",
    402: "no credit left",
    403: "this key may not",
    404: "check --model and --base-url",
}
FILTERED = (
    "content_filter",
    "content_policy_violation",
    "moderation_blocked",
)  # error codes of a filtered prompt
REFUSAL = re.compile(r"\s*(?:i['’]?m sorry|sorry, |i (?:cannot|can['’]t|am unable to|won['’]t) )", re.I)
TOKENS = ("prompt_tokens", "completion_tokens")


class CallFailed(Exception):
    """One row's call failed for good; the run goes on and exits with 1."""


class Choice(NamedTuple):
    text: str
    status: str  # ok | refusal | content_filter | length
    finish_reason: str | None


class Reply(NamedTuple):
    choices: list[Choice]
    usage: dict | None  # of TOKENS; None where the server tells none
    model: str | None  # the model that answered


class Job(NamedTuple):
    """n answers wanted to one prompt about one image. `key` names its content: what was paid for under it is never paid for again."""

    row: dict  # what each output row begins with, "id" among it
    prompt: str
    image: str | None
    n: int
    stamp: dict  # model, params, prompt_hash, image_hash
    key: str


def add_api_arguments(model, runtime):
    """The arguments of every script that asks a server; model, runtime: argument groups."""
    model.add_argument(
        "--base-url", help="OpenAI-compatible server [ours: default OPENAI_BASE_URL, else OpenAI]"
    )
    model.add_argument(
        "--temperature", type=float, help="sent only when given: newer models refuse it [upstream default]"
    )
    model.add_argument(
        "--max-tokens", type=int, help="sent as max_tokens, only when given [upstream default]"
    )
    model.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="other request field, repeatable [ours]",
    )
    runtime.add_argument(
        "--concurrency", type=int, default=16, help="calls in flight [ours: fits common rate limits]"
    )
    runtime.add_argument(
        "--timeout",
        type=float,
        default=180.0,
        help="seconds a call may take, wall clock [ours: 5 chains need 30]",
    )
    runtime.add_argument(
        "--price",
        type=float,
        nargs=2,
        metavar=("IN", "OUT"),
        help="dollars per million tokens [ours: prices change]",
    )
    runtime.add_argument(
        "--budget",
        type=float,
        help="stop before so many dollars, earlier runs on this output included [ours: no limit]",
    )
    runtime.add_argument(
        "--batch",
        choices=("submit", "collect"),
        help="Batch API: give its own --price [ours: half the price]",
    )
    runtime.add_argument("--limit", type=int, help="only the first so many examples [ours: to try things]")
    runtime.add_argument(
        "--dry-run",
        action="store_true",
        help="print calls, tokens and dollars, and ask nothing [ours: look first]",
    )


def request_params(args):
    """Optional request fields: only what the user gave."""
    params = {"temperature": args.temperature, "max_tokens": args.max_tokens}
    for item in args.param:
        name, equals, value = item.partition("=")
        if not name or not equals:
            raise InputError(f"--param {item!r}: expected NAME=JSON, such as max_completion_tokens=800")
        try:
            params[name] = json.loads(value)
        except ValueError:
            params[name] = value  # a bare word is a string
    return {name: value for name, value in params.items() if value is not None}


class ChatClient:
    """Asks one model of one OpenAI-compatible server; retries, waits and stops by the table of SPEC §8.

    Use through `ask_all`, or alone: `async with ChatClient(...) as client: reply = await client.chat(prompt, image)`.
    price: (in, out) dollars per million tokens. budget: dollars. params: optional request fields, sent as they are.
    """

    tries = 6  # of one call, 429 not counted
    backoff = 0.5  # seconds before the second try, doubled each time, with jitter
    poll = float(os.environ.get("JMERE_POLL", "60"))  # seconds between two looks at a batch
    patience = 1800.0  # longest time without an answer because of 429 alone

    def __init__(
        self, model, base_url=None, concurrency=16, timeout=180.0, price=None, budget=None, params=None
    ):
        if budget is not None and price is None:
            raise InputError("--budget needs --price IN OUT, dollars per million tokens of the model")
        for name, value in (("--concurrency", concurrency), ("--timeout", timeout), ("--budget", budget)):
            if value is not None and value <= 0:
                raise InputError(f"{name} {value}, expected more than 0")
        self.model, self.base_url, self.concurrency, self.timeout = model, base_url, concurrency, timeout
        self.price, self.budget, self.params = price, budget, params or {}
        self.spent, self.calls, self.called, self.in_flight = (
            0.0,
            0,
            0.0,
            0,
        )  # dollars in all; calls of this run, their dollars
        self.open_at, self.rounds, self.limited_since = 0.0, 0, None  # the 429 gate, shared by all workers
        self.reason = None  # why the run stops

    @staticmethod
    def require_key():
        if not os.environ.get("OPENAI_API_KEY", "").strip():
            raise Stopped("OPENAI_API_KEY is not set: export your key (for a local server any value will do)")

    async def __aenter__(self):
        import httpx2  # the SDK's HTTP client
        import openai  # here: a second at start that training need not pay

        self.require_key()
        self.openai, self.httpx, self.stopping = openai, httpx2, asyncio.Event()
        # Key and base URL are the SDK's. Its `create` takes 3.5 ms of CPU a call, its HTTP client 1.3, one connection a client 0.8.
        self.free, self.tls = [], httpx2.create_ssl_context()  # free: clients between two calls
        self.api = openai.AsyncOpenAI(base_url=self.base_url, max_retries=0)
        self.url = f"{str(self.api.base_url).rstrip('/')}/chat/completions"
        headers = {**self.api.default_headers, **self.api.auth_headers}
        self.headers = {name: value for name, value in headers.items() if isinstance(value, str)}
        return self

    async def __aexit__(self, *error):
        for http in (self.api, *self.free):
            await http.close() if http is self.api else await http.aclose()

    def job(self, row, prompt, image=None, n=1):
        stamp = {
            "model": self.model,
            "params": self.params,
            "prompt_hash": _hash(prompt),
            "image_hash": image and image_hash(image),
        }
        return Job(row, prompt, image, n, stamp, _hash(json.dumps([row["id"], stamp], sort_keys=True)))

    def body(self, prompt, image, n):
        """The request as bytes. The image, already ASCII without anything to escape, is put in after the JSON is made."""
        content = [{"type": "image_url", "image_url": {"url": "@"}}] if image else []
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]
        extra = {**self.params, **({"n": n} if n > 1 else {})}
        body = json.dumps({"messages": messages, "model": self.model, **extra}, ensure_ascii=False).encode()
        return body.replace(b'"@"', b'"%b"' % data_url(image), 1) if image else body

    def stop(self, reason):
        """No new call, no retry; calls in flight are waited for and recorded."""
        self.reason = self.reason or reason
        self.stopping.set()

    def cost(self, usage):
        return (
            sum(usage[name] * price for name, price in zip(TOKENS, self.price)) / 1e6
            if usage and self.price
            else 0.0
        )

    async def afford(self, prior):
        """Wait until the budget holds another call beside those in flight. `prior`: dollars a call may take before any was paid."""
        while self.budget is not None:
            mean = self.called / self.calls if self.calls else prior
            if self.spent + (self.in_flight + 1) * mean <= self.budget:
                return
            if not self.in_flight:
                raise Stopped(
                    f"budget: ${self.spent:.4f} of ${self.budget:g} spent, the next call takes about ${mean:.4f}"
                )
            await self._sleep(0.05)

    async def chat(self, prompt, image=None, n=1):
        """→ Reply of 1 to n choices. Raises CallFailed where this call is lost, Stopped where every call would be."""
        body, tried = self.body(prompt, image, n), 0
        while True:
            while (wait := self.open_at - time.monotonic()) > 0:
                await self._sleep(wait + random.uniform(0, min(wait, 1) / 10))  # not all at the same instant
            sent, status, headers, content = time.monotonic(), None, {}, b""
            try:
                raw = await asyncio.wait_for(self._post(body), self.timeout)  # wall clock, not per read
                status, headers, content = raw.status_code, raw.headers, raw.content
                fault = f"{status} {raw.text[:200]}"
            except (asyncio.TimeoutError, self.httpx.TimeoutException):
                fault = f"no answer within {self.timeout:g} s"
            except self.httpx.HTTPError as error:
                fault = f"connection failed ({error or type(error).__name__})"
            reply, status, fault = self.verdict(status, content, fault, n)
            if reply:
                self.rounds, self.limited_since = 0, None
                self._heed(headers)
                return reply
            if status == 429:
                self._close_gate(headers, sent, fault)
                continue
            tried += 1
            if tried >= self.tries:
                raise CallFailed(f"{fault}, {tried} times")
            wait = min(30.0, self.backoff * 2 ** (tried - 1)) * random.uniform(0.5, 1.0)
            await self._sleep(max(wait, min(_retry_after(headers) or 0.0, self.patience)))

    async def _post(self, body):
        http = (
            self.free.pop()
            if self.free
            else self.openai.DefaultAsyncHttpxClient(timeout=None, verify=self.tls)
        )
        try:
            return await http.post(self.url, content=body, headers=self.headers)
        finally:
            self.free.append(http)

    def verdict(self, status, content, fault, n):
        """What an HTTP answer means → (Reply, or None where another try may help; status; fault). Raises CallFailed and Stopped."""
        message = code = kind = None
        try:
            body = json.loads(content) if content else None
            error = body.get("error") if isinstance(body, dict) else None
            if status == 200 and not error:
                return parse_reply(body, n), status, None
            message, code, kind = (
                [error.get(k) for k in ("message", "code", "type")]
                if isinstance(error, dict)
                else (error, None, None)
            )
        except (ValueError, RecursionError) as error:
            fault = f"{status} that is no chat completion: {error}" if status == 200 else fault
        if status == 200:  # some servers put their errors into a 200
            status = code if isinstance(code, int) and code >= 400 else None
        fault = " ".join(f"{status or ''} {message}".split() if message else fault.split()).replace(
            os.environ["OPENAI_API_KEY"], "…"
        )[:300]
        if "insufficient_quota" in (code, kind):
            raise Stopped(f"quota used up: {fault}")
        if status in FATAL:
            raise Stopped(f"{fault} ({FATAL[status]})")
        if code in FILTERED:
            return Reply([Choice("", "content_filter", code)] * n, None, None), status, fault
        if status is not None and status < 500 and status not in (408, 409, 429):
            raise CallFailed(fault)
        return None, status, fault

    async def _sleep(self, seconds):
        try:
            await asyncio.wait_for(self.stopping.wait(), seconds)
        except asyncio.TimeoutError:
            return
        raise Stopped(self.reason)

    def _close_gate(self, headers, sent, fault):
        """429: nobody asks before the server's time is up."""
        now, wait = time.monotonic(), _retry_after(headers)
        self.limited_since = self.limited_since or now
        if wait is None:
            wait = min(60.0, self.backoff * 2**self.rounds) * random.uniform(0.5, 1.0)
        if now + wait - self.limited_since > self.patience:
            raise Stopped(
                f"rate limit: {fault}; the server asks to wait {wait:.0f} s more, {now - self.limited_since:.0f} s gone by"
            )
        self.rounds += sent >= self.open_at  # the others in flight hit the same limit: one round
        self.open_at = max(self.open_at, now + wait)

    def _heed(self, headers):
        """The rate-limit headers say that nothing is left: wait before the server has to refuse."""
        for kind in ("requests", "tokens"):
            if headers.get(f"x-ratelimit-remaining-{kind}") == "0":
                parts = re.findall(r"([\d.]+)(ms|[smhd]?)", headers.get(f"x-ratelimit-reset-{kind}", ""))
                wait = sum(
                    float(number) * {"ms": 0.001, "m": 60, "h": 3600, "d": 86400}.get(unit, 1)
                    for number, unit in parts
                )
                self.open_at = max(self.open_at, time.monotonic() + min(wait, self.patience))


def _retry_after(headers):
    """Seconds the server asks to wait, or None."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers.get(name, "")) * unit)
        except ValueError:
            continue
    try:
        return max(0.0, parsedate_to_datetime(headers.get("retry-after")).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def parse_reply(body, n=1):
    """A decoded chat completion → Reply of at most n choices. Raises ValueError where it is none."""
    try:
        choices = []
        for choice in body["choices"][:n]:
            text, finish, refusal = (
                choice["message"].get("content") or "",
                choice.get("finish_reason"),
                choice["message"].get("refusal"),
            )
            if isinstance(text, list):  # content in parts
                text = "".join(part.get("text", "") for part in text)
            refused = refusal or len(text) < 300 and REFUSAL.match(text)
            status = finish if finish in ("content_filter", "length") else "refusal" if refused else "ok"
            choices.append(Choice(text or refusal or "", status, finish))
        usage = body.get("usage") and {name: int(body["usage"][name]) for name in TOKENS}
        model = body.get("model")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if not choices:
        raise ValueError("no choices")
    return Reply(choices, usage or None, model)


def _hash(content):
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


@functools.lru_cache(maxsize=64)  # the candidates of an example follow each other
def image_hash(path):
    try:
        return _hash(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot read ({error.strerror})") from None


@functools.lru_cache(maxsize=64)
def data_url(path):
    """The image file as a data URL, in bytes: its own bytes where servers read them and it needs no turning, else PNG."""
    try:
        data = Path(path).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            kind, turned = image.format, image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        if kind not in SENT_AS_IS or turned:
            buffer, kind = io.BytesIO(), "PNG"
            load_image(path).save(buffer, kind)
            data = buffer.getvalue()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, InputError) as error:
        raise CallFailed(f"{path}: unreadable image ({error})") from None
    return b"data:image/%b;base64,%b" % (kind.lower().encode(), base64.b64encode(data))
