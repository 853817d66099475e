"""What one reply of a chat server means (SPEC §8): text, status, usage, error, time to wait.

Sends nothing, and knows no task. The shapes are those of OpenAI, vLLM, SGLang, Gemini, Mistral, DeepSeek and
of Anthropic-like gateways, as found in public reports.
"""

import json
import math
import re
import time
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import NamedTuple

from common import Stopped
from lib.prose import CLOSED, OPENED

TOKENS = ("prompt_tokens", "completion_tokens")  # what a server counts and charges


class Choice(NamedTuple):
    text: str  # as the server sent it, thoughts included
    status: str  # ok | empty | refusal | content_filter | length | the server's own finish reason
    finish_reason: str | None


class Reply(NamedTuple):
    choices: list[Choice]
    usage: dict | None  # of TOKENS; None where the server does not tell both
    model: str | None  # the model that answered


class Asked(NamedTuple):
    """What a request was, as far as its reply needs it."""

    n: int  # choices asked for
    model: str
    key_env: str  # the variable that holds the key
    answered: bool  # whether the server has answered a call before


class CallFailed(Exception):
    """One row's call failed for good; the run goes on and exits with 1. status: of HTTP, None without one."""

    def __init__(self, fault, status=None):
        super().__init__(fault)
        self.status = status


class Again(Exception):
    """Another try may help.

    status: of HTTP, None where no answer came. wait: seconds that the server asks for, or None. gone: the
    server is not there at all. answered: it did answer, so that somebody may have paid for it.
    """

    def __init__(self, fault, status=None, wait=None, gone=False, answered=False):
        super().__init__(fault)
        self.status = status
        self.wait = wait
        self.gone = gone
        self.answered = answered


# -------------------------------------------------------------------------------- a good answer

COMPLETE = ("", "none", "null", "stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete")
FINISHES = {  # status: how finish reasons of that kind are spelled
    "refusal": r"refus",
    "content_filter": r"filter|safety|block|prohibit|spii|recit|guardrail|moderat|toxic|policy|sensitive",
    "length": r"length|max\w*tokens|token_limit|error_limit|context_window",
    "again": r"error|abort|network|cancel|time_?out|overload|unavailable|insufficient_sys|connection",
}


def parse_reply(body, n=1):
    """A decoded chat completion → Reply of at most n choices. Raises ValueError where none can be used.

    Only choices with text are needed: nothing else that is odd or missing costs an answer.
    """
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list):
        raise ValueError("no choices")
    read = [parse_choice(choice) for choice in choices[:n]]
    usable = [choice for choice in read if choice and choice.status != "again"]
    if not usable:
        broken = [choice.finish_reason for choice in read if choice]
        raise ValueError(f"finish reason {broken[0]}" if broken else "no choices")
    model = body.get("model")
    return Reply(usable, read_usage(body.get("usage")), model if isinstance(model, str) else None)


def parse_choice(choice):
    """→ Choice, of status "again" where the server broke off, or None where it holds nothing."""
    if not isinstance(choice, dict):
        return None
    message = choice.get("message")
    if not isinstance(message, dict):
        message = {"content": message if isinstance(message, str) else choice.get("text")}
    finish = choice.get("finish_reason")
    if isinstance(finish, dict):  # SGLang's {"type": "stop", "matched": …}
        finish = finish.get("type")
    if finish is not None:
        finish = str(finish)
    status = status_of(finish)
    text = text_of(message.get("content"))
    refusal = message.get("refusal")
    if status == "ok" and not any(value is not None for value in message.values()):
        return None
    if status == "ok":
        if refusal or refused(spoken(text)):
            status = "refusal"
        elif not spoken(text):
            status = "empty"
    return Choice(text or text_of(refusal), status, finish)


def status_of(finish):
    """The status that a finish reason stands for; its own name where it is of no kind we know.

    >>> [status_of(finish) for finish in (None, "STOP", "FinishReason.MAX_TOKENS", "SAFETY", "tool_calls")]
    ['ok', 'ok', 'length', 'content_filter', 'tool_calls']
    """
    name = (finish or "").strip().lower().rpartition(".")[2].removeprefix("finish_reason_")
    if name in COMPLETE:
        return "ok"
    for status, spelled in FINISHES.items():
        if re.search(spelled, name):
            return status
    return name[:40]


def text_of(content):
    """The text of a message's content: a string, parts, or nothing. Parts that hold thoughts are left out."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(map(text_of, content))
    if isinstance(content, dict) and content.get("type") not in ("thinking", "reasoning"):
        return text_of(content.get("text") or content.get("value") or content.get("content"))
    return ""


def read_usage(usage):
    """What a server tells of its accounting → {name: tokens} of TOKENS, or None where it does not tell both.

    >>> read_usage({"input_tokens": "7", "output_tokens": 2.0}), read_usage({"prompt_tokens": None})
    ({'prompt_tokens': 7, 'completion_tokens': 2}, None)
    """
    if not isinstance(usage, dict):
        return None
    prompt = _tokens(usage, "prompt_tokens", "input_tokens")
    completion = _tokens(usage, "completion_tokens", "output_tokens")
    total = _tokens(usage, "total_tokens")
    if completion is None and total is not None and prompt is not None:
        completion = max(0, total - prompt)
    if prompt is None or completion is None:
        return None
    return {"prompt_tokens": prompt, "completion_tokens": completion}


def _tokens(usage, *names):
    """The first of `names` that is a count, or None."""
    for name in names:
        try:
            count = float(usage.get(name))
        except (TypeError, ValueError):
            continue
        if math.isfinite(count) and count >= 0:
            return round(count)
    return None


# -------------------------------------------------------------------------------- thoughts and refusals

THOUGHTS = re.compile(rf"\s*(?:(?:{OPENED}).*?(?:{CLOSED}|\Z)|analysis.*?assistantfinal)", re.I | re.S)
OPENED_BY_TEMPLATE = re.compile(rf".*(?:{CLOSED})", re.I | re.S)
FINAL = re.compile(r"<\|channel\|>\s*final[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>")
MARKS = re.compile(r"<\|(?:start|end|return|message|channel|im_end|eot_id)\|>(?:assistant)?")


def spoken(text):
    """What `text` says once its thoughts are taken off: think blocks at its beginning, be they opened by the
    chat template or cut off, and the channels of gpt-oss.

    >>> spoken("<think>so</think> [A]"), spoken("so</think>[A]"), spoken("<think>cut off")
    ('[A]', '[A]', '')
    """
    if "<|channel|>" in text:
        final = list(FINAL.finditer(text))
        text = text[final[-1].end() :] if final else ""
        text = MARKS.sub("", text)
    while thoughts := THOUGHTS.match(text):
        text = text[thoughts.end() :]
    if opened := OPENED_BY_TEMPLATE.match(text):
        text = text[opened.end() :]
    return text.strip()


# A refusal is told by what it says: the speaker, where a clause begins, and soon after a word of not doing.
CLAUSE = r"(?:^|[,;—–-]|\b(?:but|that|afraid|however)\b)\W*"
SPEAKER = r"(?:i|we)\b(?:['’](?:m|d|ve|re|ll))?"
FILLER = (
    r"(?:\W+(?:am|are|would|do|have|must|just|simply|only|really|an?|ai|and|to|been|programmed|designed"
    r"|prefer))*"
)
NOT_DOING = (
    r"\W+(?:(?:ca|wo|do|could|would)n['’]?t|can['’]t|cannot|can not|will not|not|unable|decline|refuse)\b"
)
OTHER_WORDS = (
    r"not something i can|against my|\brequest (?:denied|violates|cannot)|violates (?:my|our|the)"
    r"|抱歉|对不起|无法(?:协助|提供|识别|回答|帮)|申し訳|できません|죄송"
    r"|lo siento|no puedo|desculpe|não posso|désolé|ne peux pas|tut mir leid|kann ich (?:\w+ )?nicht"
    r"|ich kann (?:\w+ )?(?:\w+ )?nicht|mi dispiace|non posso|извините|не могу"
)
DECLINES = re.compile(f"{CLAUSE}{SPEAKER}{FILLER}{NOT_DOING}|{OTHER_WORDS}", re.I)
NOTHING_THERE = re.compile(r"\b(?:any|no)\b[\w ,-]{0,30}\b(?:quintuple|relation|entit|triple)", re.I)
ITEM = re.compile(r"[\[({（【][^\n]*,[^\n]*,[^\n]*,|(?:\|[^|\n]*){4}|->|→|[=:|][*\"]*\s*\d")
HEADED = re.compile(r"^[\W_]*\w[\w‑– -]{2,40}\**[:：]\**[ \t]*\S", re.M)


def refused(text):
    """Whether `text` declines to answer, and neither items nor headed parts answer all the same.

    >>> refused("Unfortunately, I cannot help with that."), refused("I can't read it: [A, per, B, org, peer]")
    (True, False)
    """
    if len(text) > 1000:
        return False
    sentences = [sentence[:200] for sentence in re.split(r"(?<=[.!?])\s+|\n", text, maxsplit=3)[:3]]
    declines = any(DECLINES.search(sentence) and not NOTHING_THERE.search(sentence) for sentence in sentences)
    return declines and not ITEM.search(text) and len(HEADED.findall(text)) < 2


# -------------------------------------------------------------------------------- errors

BILLING = re.compile(
    r"insufficient.{0,12}(?:quota|balance|credit|fund)|billing|exceeded your \w* ?quota|overdue"
    r"|payment (?:required|method|failed)|arrear"
    r"|quota (?:is |has been )?(?:used up|exhausted|exceeded)|(?:out of|no|not enough) (?:credits?|funds)"
    r"|credits? (?:balance|limit|are exhausted)|balance (?:is )?(?:too low|insufficient|not enough)"
    r"|spend(?:ing)? limit|top up|recharge|余额|欠费",
    re.I,
)
PASSING = re.compile(r"per[ -](?:second|minute|min|hour)|try again in|retry in|too many requests", re.I)
KEY_FAULT = re.compile(
    r"(?:incorrect|invalid|missing|expired|bad) api[ _-]?key|api[ _-]?key.{0,20}(?:not valid|invalid)",
    re.I,
)
KEY_OR_MODEL = re.compile(r"\bkey\b|\bmodels?\b|deployment|engine|account|organi[sz]ation|permission", re.I)
FILTERED = re.compile(
    r"content_?filter|content[ _-](?:management|policy|filter)|moderation|responsibleai|data_?inspection"
    r"|flagged|safety system|usage polic|敏感",
    re.I,
)
STATUSES = {  # of an error inside a 200 that has words for a code
    429: r"rate_?limit|resource_exhausted|too_many",
    401: r"authentic|api_key|unauthori[sz]ed",
    403: r"permission|forbidden",
    404: r"not_found",
    400: r"invalid_request|invalid_argument|bad_request",
    503: r"overload|unavailable",
}


def verdict(status, headers, text, asked, shown):
    """What an HTTP answer means → Reply. Raises Again, CallFailed or Stopped: the table of SPEC §8.

    asked: Asked; shown(text): one line of it, keys hidden.
    """
    body = decoded(text)
    good = 200 <= (status or 0) < 300
    unusable = ""
    if good:
        try:
            return parse_reply(body, asked.n)
        except (ValueError, RecursionError) as error:
            unusable = f"{status} that is no chat completion: {error}"
    message, code, kind = error_of(body)
    words = f"{message} {code} {kind}"
    in_vain = good and not message
    if good:  # some servers put their errors into a 200
        status = status_told(code, kind) if message else None
    message = message or unusable or text[:200] or "no content"
    fault = shown(f"{status or ''} {message}")
    wait = wait_told(headers, message)

    refusing = status is None or status < 500
    if status == 401 or (refusing and KEY_FAULT.search(words)):
        raise Stopped(f"{fault} (check {asked.key_env})")
    if status == 402 or (refusing and out_of_credit(words, wait)):
        raise Stopped(f"quota or credit used up: {fault}")
    if status in (400, 403, 422, 451) and FILTERED.search(words):
        return Reply([Choice("", "content_filter", code or "content_filter")] * asked.n, None, None)
    names_model = re.search(rf"(?<!\w){re.escape(asked.model)}(?!\w)", message)
    if status in (400, 422) and not asked.answered and names_model:
        raise Stopped(f"{fault} (check --model)")
    if status in (403, 404) and (not asked.answered or KEY_OR_MODEL.search(words)):
        raise Stopped(f"{fault} ({'this key may not' if status == 403 else 'check --model, --base-url'})")
    if status and 300 <= status < 400:
        target = headers.get("location")
        raise Stopped(shown(f"{status}: the server sends on to {target}: name that in --base-url"))
    if status and status < 500 and status not in (408, 409, 425, 429):
        raise CallFailed(fault, status)
    gone = status in (502, 503, 504) or (status or 0) >= 520
    raise Again(fault, status, wait, gone, answered=in_vain)


def decoded(text):
    """The JSON of an answer, or None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def out_of_credit(words, wait):
    """Whether an error says that nothing is left to pay with; a limit that passes by itself is none."""
    if "insufficient_quota" in words:
        return True
    return bool(BILLING.search(words)) and wait is None and not PASSING.search(words)


def error_of(body):
    """The error of an answer → (message, code, type), "" for what it does not tell.

    Servers write an object, a bare string, a list around either (Gemini), or a detail (FastAPI).
    """
    if isinstance(body, list) and body:
        body = body[0]
    if not isinstance(body, dict):
        return "", "", ""
    error = body.get("error") or body.get("detail") or body.get("errors")
    if not error and "message" in body:  # {"object": "error", "message": …}
        error = body
    if isinstance(error, list) and error:
        error = error[0]
    if not isinstance(error, dict):
        return _text(error), "", ""
    message = error.get("message") or error.get("msg") or error
    return _text(message), _text(error.get("code")), _text(error.get("type") or error.get("status"))


def _text(value):
    """A value of a JSON object as one string; "" for nothing."""
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def status_told(code, kind):
    """The HTTP status that an error inside a 200 means, or None."""
    if code.isdigit() and 400 <= int(code) < 600:
        return int(code)
    for status, spelled in STATUSES.items():
        if re.search(spelled, f"{code} {kind}", re.I):
            return status
    return None


# -------------------------------------------------------------------------------- time

UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
DURATION = re.compile(r"([\d.]+)\s*(ms|s|m|h|d)[a-z]*\s*", re.I)
RETRY_IN = re.compile(
    r"(?:try again|retry|wait)\w*(?: in| after| for)? ((?:[\d.]+\s*(?:ms|[smhd])[a-z]*\s*)+)", re.I
)


def seconds_told(text):
    """Seconds from now that a header means: 12.5, 6m0s, an epoch (s or ms), an ISO or HTTP date; or None.

    >>> seconds_told("6m0s"), seconds_told("300ms"), seconds_told("1.5"), seconds_told("soon")
    (360.0, 0.3, 1.5, None)
    """
    text = (text or "").strip()
    try:
        number = float(text)
    except ValueError:
        return _duration(text) if DURATION.match(text) else _until(text)
    if not math.isfinite(number):
        return None
    if number > 1e11:  # an epoch in ms
        number /= 1000
    if number > 1e9:  # an epoch
        number -= time.time()
    return max(0.0, number)


def _duration(text):
    """Seconds of "6m0s" or "1 min 3 sec"; None where something else stands there too."""
    if DURATION.sub("", text):
        return _until(text)
    try:
        return sum(float(number) * UNITS[unit.lower()] for number, unit in DURATION.findall(text))
    except ValueError:
        return None


def _until(text):
    """Seconds until an ISO or HTTP date, 0 where it has passed, or None."""
    try:
        date = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        try:
            date = parsedate_to_datetime(text)
        except (TypeError, ValueError):
            return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=timezone.utc)
    return max(0.0, date.timestamp() - time.time())


def wait_told(headers, message=""):
    """Seconds that a refusing server asks to wait, or None.

    In this order: retry-after-ms; retry-after, in seconds or as a date; the reset of a limit that is used up;
    "try again in 20 s" in the message.
    """
    milliseconds = seconds_told(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    wait = seconds_told(headers.get("retry-after"))
    if wait is None:
        wait = used_up(headers)
    if wait is None and (told := RETRY_IN.search(message)):
        wait = _duration(told[1].strip())
    return wait


def used_up(headers):
    """Seconds until the rate limit is reset of which nothing remains, or None where there is none.

    Reads x-ratelimit-reset-requests beside x-ratelimit-remaining-requests, and names like these.
    """
    waits = []
    for name, value in headers.items():
        name = name.lower()
        if "ratelimit" not in name or "reset" not in name:
            continue
        try:
            nothing_left = float(headers.get(name.replace("reset", "remaining"), "")) <= 0
        except ValueError:
            continue
        wait = seconds_told(value)
        if nothing_left and wait is not None:
            waits.append(wait)
    return max(waits, default=None)
