"""One call to a chat server: client, request, what a reply means (SPEC §8).

Knows no task: a prompt goes in, text comes out.
"""

import asyncio
import base64
import functools
import hashlib
import io
import json
import math
import os
import random
import re
import time
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NamedTuple

from PIL import ExifTags, Image

from common import InputError, Stopped, above, at_least
from lib.data import load_image

TOKENS = ("prompt_tokens", "completion_tokens")  # what a server counts and charges
# What OpenAI-compatible servers read; anything else travels as PNG.
SENT_AS_IS = ("JPEG", "PNG", "GIF", "WEBP")
FATAL = {
    401: "check OPENAI_API_KEY",
    402: "no credit left",
    403: "this key may not",
    404: "check --model and --base-url",
}
# Error codes of a filtered prompt.
FILTERED = ("content_filter", "content_policy_violation", "moderation_blocked")
REFUSAL = re.compile(r"\s*(?:i['’]?m sorry|sorry, |i (?:cannot|can['’]t|am unable to|won['’]t) )", re.I)
UNITS = {"ms": 0.001, "s": 1, "": 1, "m": 60, "h": 3600, "d": 86400}  # of a duration in a header, in seconds


class CallFailed(Exception):
    """One row's call failed for good; the run goes on and exits with 1."""


class Again(Exception):
    """Another try may help. status: of the answer, None where none came."""

    def __init__(self, fault, status=None):
        super().__init__(fault)
        self.status = status


class Choice(NamedTuple):
    text: str
    status: str  # ok | refusal | content_filter | length
    finish_reason: str | None


class Reply(NamedTuple):
    choices: list[Choice]
    usage: dict | None  # of TOKENS; None where the server tells none
    model: str | None  # the model that answered


class Job(NamedTuple):
    """n answers wanted to one prompt about one image.

    `key` names its content: what was paid for under it is never paid for again.
    """

    row: dict  # what each output row begins with, "id" among it
    prompt: str
    image: str | None
    n: int
    provenance: dict  # model, params, prompt_hash, image_hash
    key: str


# -------------------------------------------------------------------------------- arguments


def add_api_arguments(model, runtime):
    """The arguments of every script that asks a server; model, runtime: argument groups."""
    model.add_argument(
        "--base-url", help="OpenAI-compatible server [ours: default OPENAI_BASE_URL, else OpenAI]"
    )
    model.add_argument(
        "--temperature",
        type=at_least(0, float),
        help="sent only when given: newer models refuse it [upstream default]",
    )
    model.add_argument(
        "--max-tokens", type=at_least(1), help="sent as max_tokens, only when given [upstream default]"
    )
    model.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="other request field, repeatable [ours]",
    )
    runtime.add_argument(
        "--concurrency", type=at_least(1), default=16, help="calls in flight [ours: fits common rate limits]"
    )
    runtime.add_argument(
        "--timeout",
        type=above(0),
        default=180.0,
        help="seconds a call may take, wall clock [ours: 5 chains need 30]",
    )
    runtime.add_argument(
        "--price",
        type=at_least(0, float),
        nargs=2,
        metavar=("IN", "OUT"),
        help="dollars per million tokens [ours: prices change]",
    )
    runtime.add_argument(
        "--budget",
        type=above(0),
        help="stop before so many dollars, earlier runs on this output included [ours: no limit]",
    )
    runtime.add_argument(
        "--batch",
        choices=("submit", "collect"),
        help="Batch API: give its own --price [ours: half the price]",
    )
    runtime.add_argument(
        "--limit", type=at_least(1), help="only the first so many examples [ours: to try things]"
    )
    runtime.add_argument(
        "--dry-run",
        action="store_true",
        help="print calls, tokens and dollars, and ask nothing [ours: look first]",
    )


def request_params(args):
    """Optional request fields: only what the user gave."""
    params = {}
    if args.temperature is not None:
        params["temperature"] = args.temperature
    if args.max_tokens is not None:
        params["max_tokens"] = args.max_tokens
    for item in args.param:
        name, equals, value = item.partition("=")
        if not name or not equals:
            raise InputError(f"--param {item!r}: expected NAME=JSON, such as max_completion_tokens=800")
        try:
            params[name] = json.loads(value)
        except ValueError:
            params[name] = value  # a bare word is a string
    return params


# -------------------------------------------------------------------------------- client


class ChatClient:
    """Asks one model of one OpenAI-compatible server; retries, waits and stops by the table of SPEC §8.

    Use through `ask_all`, or alone: `async with ChatClient(...) as client: await client.chat(prompt, image)`.
    price: (in, out) dollars per million tokens. budget: dollars. params: optional request fields.
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
        self.model = model
        self.base_url = base_url
        self.concurrency = concurrency
        self.timeout = timeout
        self.price = price
        self.budget = budget
        self.params = params or {}
        self.spent = 0.0  # dollars paid for this output, earlier runs included
        self.calls = 0  # calls of this run that were answered
        self.paid = 0.0  # dollars of those calls
        self.in_flight = 0  # calls sent and not answered yet
        self.paused_until = 0.0  # no worker asks before this time
        self.limit_hits = 0  # pauses since the last answer
        self.limited_since = None  # when the first of those pauses began
        self.reason = None  # why the run stops

    @staticmethod
    def require_key():
        if not os.environ.get("OPENAI_API_KEY", "").strip():
            raise Stopped("OPENAI_API_KEY is not set: export your key (for a local server any value will do)")

    async def __aenter__(self):
        import httpx2  # the SDK's HTTP client
        import openai  # here: a second at start that training need not pay

        self.require_key()
        self.openai = openai
        self.httpx = httpx2
        self.stopping = asyncio.Event()
        # Key and base URL are the SDK's. Its `create` takes 3.5 ms of CPU a call, its HTTP client 1.3, and
        # one connection a client 0.8.
        self.free = []  # clients between two calls
        self.tls = httpx2.create_ssl_context()
        self.api = openai.AsyncOpenAI(base_url=self.base_url, max_retries=0)
        self.url = f"{str(self.api.base_url).rstrip('/')}/chat/completions"
        headers = {**self.api.default_headers, **self.api.auth_headers}
        self.headers = {name: value for name, value in headers.items() if isinstance(value, str)}
        return self

    async def __aexit__(self, *error):
        await self.api.close()
        for http in self.free:
            await http.aclose()

    def job(self, row, prompt, image=None, n=1):
        provenance = {
            "model": self.model,
            "params": self.params,
            "prompt_hash": _hash(prompt),
            "image_hash": image and image_hash(image),
        }
        key = _hash(json.dumps([row["id"], provenance], sort_keys=True))
        return Job(row, prompt, image, n, provenance, key)

    def body(self, prompt, image, n):
        """The request as bytes. The image, ASCII with nothing to escape, is put in after the JSON is made."""
        content = [{"type": "text", "text": prompt}]
        if image:
            content.insert(0, {"type": "image_url", "image_url": {"url": "@"}})
        request = {"messages": [{"role": "user", "content": content}], "model": self.model, **self.params}
        if n > 1:
            request["n"] = n
        body = json.dumps(request, ensure_ascii=False).encode()
        if image:
            body = body.replace(b'"@"', b'"%b"' % data_url(image), 1)
        return body

    def stop(self, reason):
        """No new call, no retry; calls in flight are waited for and recorded."""
        self.reason = self.reason or reason
        self.stopping.set()

    def cost(self, usage):
        """Dollars of {"prompt_tokens", "completion_tokens"}; 0 without a price or usage."""
        if not usage or not self.price:
            return 0.0
        prompt, completion = self.price
        return (usage["prompt_tokens"] * prompt + usage["completion_tokens"] * completion) / 1e6

    def pay(self, dollars):
        """One more answered call."""
        self.spent += dollars
        self.paid += dollars
        self.calls += 1

    async def afford(self, prior):
        """Wait until the budget holds another call beside those in flight. Raises Stopped if it never will.

        prior: dollars that a call may take before any was paid.
        """
        while self.budget is not None:
            mean = self.paid / self.calls if self.calls else prior
            if self.spent + (self.in_flight + 1) * mean <= self.budget:
                return
            if not self.in_flight:
                raise Stopped(
                    f"budget: ${self.spent:.4f} of ${self.budget:g} spent, "
                    f"the next call takes about ${mean:.4f}"
                )
            await self._sleep(0.05)

    async def chat(self, prompt, image=None, n=1):
        """→ Reply of 1 to n choices. Raises CallFailed: this call is lost; Stopped: every call would be."""
        body = self.body(prompt, image, n)
        tried = 0
        while True:
            await self._wait_for_turn()
            sent = time.monotonic()
            headers = {}
            try:
                status, headers, content = await self._post(body)
                reply = self.verdict(status, content, n)
            except Again as fault:
                if fault.status == 429:
                    self._pause_all(headers, sent, fault)
                    continue
                tried += 1
                if tried >= self.tries:
                    raise CallFailed(f"{fault}, {tried} times") from None
                wait = min(30.0, self.backoff * 2 ** (tried - 1)) * random.uniform(0.5, 1.0)
                await self._sleep(max(wait, min(_retry_after(headers) or 0.0, self.patience)))
                continue
            self.limit_hits = 0
            self.limited_since = None
            self._wait_if_limit_reached(headers)
            return reply

    async def _post(self, body):
        """Send one request → (status, headers, content). Raises Again where no answer came."""
        if self.free:
            http = self.free.pop()
        else:
            http = self.openai.DefaultAsyncHttpxClient(timeout=None, verify=self.tls)
        try:
            call = http.post(self.url, content=body, headers=self.headers)
            raw = await asyncio.wait_for(call, self.timeout)  # wall clock, not per read
        except (asyncio.TimeoutError, self.httpx.TimeoutException):
            raise Again(f"no answer within {self.timeout:g} s") from None
        except self.httpx.HTTPError as error:
            raise Again(one_line(f"connection failed ({error or type(error).__name__})")) from None
        finally:
            self.free.append(http)
        return raw.status_code, raw.headers, raw.content

    def verdict(self, status, content, n):
        """What an HTTP answer means → Reply. Raises Again, CallFailed or Stopped: the table of SPEC §8."""
        try:
            body = json.loads(content) if content else None
        except (ValueError, RecursionError):
            body = None
        message, code, kind = error_of(body)
        if status == 200 and message is None:
            try:
                return parse_reply(body, n)
            except ValueError as error:
                raise Again(one_line(f"200 that is no chat completion: {error}")) from None
        if status == 200:  # some servers put their errors into a 200
            status = code if isinstance(code, int) and code >= 400 else None
        if message is None:
            message = content[:200].decode(errors="replace") if content else "no content"
        fault = one_line(f"{status or ''} {message}")
        if "insufficient_quota" in (code, kind):
            raise Stopped(f"quota used up: {fault}")
        if status in FATAL:
            raise Stopped(f"{fault} ({FATAL[status]})")
        if code in FILTERED:
            return Reply([Choice("", "content_filter", code)] * n, None, None)
        if status is not None and status < 500 and status not in (408, 409, 429):
            raise CallFailed(fault)
        raise Again(fault, status)

    async def _sleep(self, seconds):
        """Sleep, unless the run stops: then raise Stopped."""
        try:
            await asyncio.wait_for(self.stopping.wait(), seconds)
        except asyncio.TimeoutError:
            return
        raise Stopped(self.reason)

    async def _wait_for_turn(self):
        while (wait := self.paused_until - time.monotonic()) > 0:
            await self._sleep(wait + random.uniform(0, min(wait, 1) / 10))  # not all at the same instant

    def _pause_all(self, headers, sent, fault):
        """429: nobody asks before the server's time is up. sent: when the refused call was sent."""
        now = time.monotonic()
        wait = _retry_after(headers)
        if self.limited_since is None:
            self.limited_since = now
        if wait is None:
            wait = min(60.0, self.backoff * 2**self.limit_hits) * random.uniform(0.5, 1.0)
        gone = now - self.limited_since
        if gone + wait > self.patience:
            raise Stopped(
                f"rate limit: {fault}; the server asks to wait {wait:.0f} s more, {gone:.0f} s gone by"
            )
        if sent >= self.paused_until:  # the others in flight hit the same limit: that is one pause
            self.limit_hits += 1
        self.paused_until = max(self.paused_until, now + wait)

    def _wait_if_limit_reached(self, headers):
        """The rate-limit headers say that nothing is left: wait before the server has to refuse."""
        for kind in ("requests", "tokens"):
            if headers.get(f"x-ratelimit-remaining-{kind}") == "0":
                told = headers.get(f"x-ratelimit-reset-{kind}", "")
                parts = re.findall(r"([\d.]+)(ms|[smhd]?)", told)
                wait = sum(float(number) * UNITS[unit] for number, unit in parts)
                self.paused_until = max(self.paused_until, time.monotonic() + min(wait, self.patience))


# -------------------------------------------------------------------------------- what a reply means


def one_line(text):
    """White space folded, the key hidden, at most 300 characters."""
    text = " ".join(str(text).split())
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if key:
        text = text.replace(key, "…")
    return text[:300]


def error_of(body):
    """The error of an answer → (message, code, type). Servers write an object, or a bare string."""
    error = body.get("error") if isinstance(body, dict) else None
    if not error:
        return None, None, None
    if not isinstance(error, dict):
        return str(error), None, None
    return error.get("message") or str(error), error.get("code"), error.get("type")


def _retry_after(headers):
    """Seconds the server asks to wait: retry-after-ms, then retry-after in seconds or as a date; or None."""
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
        choices = [_parse_choice(choice) for choice in body["choices"][:n]]
        usage = None
        if body.get("usage"):
            usage = {name: int(body["usage"][name]) for name in TOKENS}
        model = body.get("model")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if not choices:
        raise ValueError("no choices")
    return Reply(choices, usage, model)


def _parse_choice(choice):
    text = choice["message"].get("content") or ""
    finish = choice.get("finish_reason")
    refusal = choice["message"].get("refusal")
    if isinstance(text, list):  # content in parts
        text = "".join(part.get("text", "") for part in text)
    if finish in ("content_filter", "length"):
        status = finish
    elif refusal or (len(text) < 300 and REFUSAL.match(text)):
        status = "refusal"
    else:
        status = "ok"
    return Choice(text or refusal or "", status, finish)


# -------------------------------------------------------------------------------- hashes and images


def _hash(content):
    if isinstance(content, str):
        content = content.encode()
    return hashlib.sha256(content).hexdigest()[:16]


@functools.lru_cache(maxsize=64)  # the candidates of an example follow each other
def image_hash(path):
    try:
        return _hash(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot read ({error.strerror})") from None


@functools.lru_cache(maxsize=64)
def data_url(path):
    """The image as a data URL, in bytes: the file as it is where servers read it and it needs no turning."""
    try:
        content = Path(path).read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            kind = image.format
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        if kind not in SENT_AS_IS or turned:
            kind = "PNG"
            buffer = io.BytesIO()
            load_image(path).save(buffer, kind)
            content = buffer.getvalue()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, InputError) as error:
        raise CallFailed(f"{path}: unreadable image ({error})") from None
    return b"data:image/%b;base64,%b" % (kind.lower().encode(), base64.b64encode(content))


# -------------------------------------------------------------------------------- what calls will take


def estimate(jobs, completion_tokens):
    """Tokens that jobs will take, roughly: 4 characters a token, an image as GPT-4o counts it."""
    prompt = sum(len(job.prompt) / 4 + image_tokens(job.image) for job in jobs)
    answers = sum(job.n for job in jobs)
    return {"prompt_tokens": round(prompt), "completion_tokens": completion_tokens * answers}


def image_tokens(path):
    """Tokens of an image at high detail: 85, and 170 for each tile of 512² once it is within 2048 × 768."""
    if not path:
        return 0
    with Image.open(path) as image:
        short, long = sorted(image.size)
    scale = min(1, 2048 / long, 768 / short)
    return 85 + 170 * math.ceil(short * scale / 512) * math.ceil(long * scale / 512)
