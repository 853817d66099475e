"""The demo's teacher: an OpenAI-compatible server on loopback that looks at the image it is sent, reads the prompt, and answers.

It knows the picture world (world.py) and nothing of the files: what it says comes from the pixels and the prompt. A seeded share of its
answers is wrong, careless, malformed, leaking or refused, so that the filters of 02 have something to catch; the shares below were chosen
before any result was looked at. The same request gets the same answer. Needs Pillow and what common.py does.

    python -m demo.teacher --port 0 --ready-file runs/teacher.url      # writes http://127.0.0.1:PORT/v1 when it listens; SIGTERM ends it

Speaks: POST /v1/chat/completions (n, max_tokens, seed, usage, finish_reason, refusal), GET /v1/models.
"""

import argparse
import base64
import functools
import hashlib
import io
import json
import random
import re
import signal
import sys
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

import common
from demo import world
from lib import data

MODEL = "gpt-4o-2024-11-20"  # the default of 01 and 02: the scripts know nothing of the demo

# What share of the distilled candidates is …
WRONG = 0.15  # the chain of another picture: mostly other quintuples (the re-prediction filter's catch)
CARELESS = 0.10  # the right quintuples after a wrong description and no alignment (the score filter's catch)
MALFORMED = 0.06  # without one of the three parts
LEAKED = 0.04  # "the given quintuples say …"
REFUSED = 0.03
# … of the other answers is …
SLIP = 0.04  # a re-prediction that loses or turns a quintuple
UNSCORED = 0.02  # a judgement without scores
NOISE = 0.10  # a judgement one point up or down in one rule; up on full points stays
ZERO_SHOT = (
    0.15  # right, when asked without reasoning to follow: a model that sees but does not know the label set
)

REFUSAL = "I'm sorry, I can't assist with that."
BLIND = "I cannot make out this image."


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ready-file", help="the base URL is written here once the server listens [ours]")
    parser.add_argument("--seed", type=int, default=0, help="of its faults [ours]")
    parser.add_argument("--port", type=int, default=0, help="0: any free one [ours]")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer [ours]")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------ reading the prompt


def pattern(template):
    """A prompt of common.py as a regular expression that gives back what was filled in."""
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.*?)", re.escape(template)), re.S)


TASKS = {  # task: how its prompt reads
    "distill": pattern(common.DISTILL_PROMPT),
    "score": pattern(common.SCORE_PROMPT),
    "repredict": pattern(common.REPREDICT_PROMPT),
    "reason": pattern(common.REASON_PROMPT),
    "direct": pattern(common.DIRECT_PROMPT),
}


def recognise(prompt):
    """→ (task, what was filled in), or (None, {})."""
    for task, regex in TASKS.items():
        match = regex.fullmatch(prompt.strip())
        if match:
            return task, match.groupdict()
    return None, {}


# ------------------------------------------------------------------------------------------------ answering: (fields, scene, rng) → text


def distill(fields, scene, rng):
    """The three parts of MP-CoT, or one of the faults above. None is a refusal."""
    text, gold = fields["text"], common.parse_response(fields["gold"], direct=True).quintuples
    names, good = world.names_in(text), world.chain(text, scene, gold)
    lines = good.split("\n")
    parts = [line.partition(": ")[2] for line in lines]
    leak = " ".join(world.step(q, "the given quintuples say") for q in gold)
    lost = rng.randrange(3)
    faults = (
        (REFUSED, None),
        (MALFORMED, "\n".join(lines[:lost] + lines[lost + 1 :])),
        (LEAKED, world.cot(*parts[:2], leak)),
        (CARELESS, world.cot(world.describe(misread(scene, rng)), "the tweet fits the image.", parts[2])),
        (WRONG, world.chain(text, other_scene(names, scene, rng))),
    )
    shares, answers = zip(*faults)
    return rng.choices((*answers, good), (*shares, 1 - sum(shares)))[0]


def misread(scene, rng):
    """The scene with both colours and the time of day mistaken."""
    recolour = [
        f._replace(colour=rng.choice([c for c in world.COLOURS if c != f.colour]))
        for f in (scene.left, scene.right)
    ]
    return scene._replace(left=recolour[0], right=recolour[1], night=not scene.night)


def other_scene(names, scene, rng):
    return rng.choice(
        [other for other in world.scenes() if other != scene and world.fits(names, other)] or [scene]
    )


def repredict(fields, scene, rng):
    """What the reasoning states, whatever the picture shows."""
    reasoning = fields["cot"].rpartition(common.COT_PARTS[2])[2].lstrip(": ")
    found = [q for q, _ in world.steps(reasoning)]
    if found and rng.random() < SLIP:
        found = found[1:] or [found[0]._replace(head=found[0].tail, tail=found[0].head)]
    return common.format_answer(found)


def score(fields, scene, rng):
    """One integer per rule of common.SCORE_RULES, from the chain and the true scene."""
    if rng.random() < UNSCORED:
        return "The reasoning is good overall."
    points = judge(fields["text"], fields["cot"], scene)
    if rng.random() < NOISE:
        i = rng.randrange(len(points))
        points[i] = min(max(points[i] + rng.choice((-1, 1)), 0), common.SCORE_RULES[i][2])
    return "Scores: " + " ".join(f"R{i}={value}" for i, value in enumerate(points, 1))


def judge(text, chain, scene):
    """→ [R1 … R6] by comparing each part with what the picture shows; all 0 where a part is missing."""
    chain = common.parse_cot(chain)
    if chain is None:
        return [0] * len(common.SCORE_RULES)
    description, alignment, reasoning = (line.partition(": ")[2] for line in chain.split("\n"))
    names = world.names_in(text)
    shown, said = (Counter(MENTION.findall(part)) for part in (world.describe(scene), description))
    ties = set(world.align(names, scene).rstrip(".").split(", "))
    tied = set(alignment.rstrip(".").split(", "))
    truth, steps = dict(world.read(names, scene)), world.steps(reasoning)
    types = {entity for q in truth for entity in ((q.head, q.head_type), (q.tail, q.tail_type))}
    typed = all({(q.head, q.head_type), (q.tail, q.tail_type)} <= types for q, _ in steps)
    derived = sum(truth.get(q) == clue for q, clue in steps)
    return [
        share_points((said & shown).total(), shown.total()),
        max(0, 2 - (said - shown).total()),
        share_points(len(ties & tied), len(ties)),
        int(bool(ties & tied)),  # a name tied to a figure is what the text alone does not say
        int(bool(steps) and typed),
        share_points(derived, max(len(steps), len(truth))),
    ]


MENTION = re.compile(
    "|".join(
        (
            *(str(world.Figure(kind, colour)) for kind in world.TYPE for colour in world.COLOURS),
            *world.SIGNS,
            "Day",
            "Night",
        )
    )
)


def share_points(part, whole):
    """2 for all, 1 for at least half, else 0."""
    return 2 if part == whole else int(2 * part >= whole)


def direct(fields, scene, rng):
    """A zero-shot model: it finds the names, sees something, and knows the label set badly."""
    names = world.names_in(fields["text"])
    if rng.random() < ZERO_SHOT:
        return common.format_answer([q for q, _ in world.read(names, scene)])
    guesses = [(rng.choice(common.TYPES), rng.choice(common.TYPES), rng.choice(common.RELATIONS))]
    return common.format_answer(
        [common.quintuple(a, t1, b, t2, r) for a, b, (t1, t2, r) in zip(names, names[1:], guesses)]
    )


def reason(fields, scene, rng):
    answer = direct(fields, scene, rng)
    if rng.random() < MALFORMED:
        return f"{world.describe(scene)}\n{answer}"
    return f"<think>\n{world.describe(scene)}\n</think>\n<answer>\n{answer}\n</answer>"


ANSWER = {"distill": distill, "repredict": repredict, "score": score, "reason": reason, "direct": direct}


# ------------------------------------------------------------------------------------------------ the protocol


class BadRequest(Exception):
    """Answered as the API does: status 400 with an error object."""


@functools.lru_cache(maxsize=4096)
def see(data):
    """Encoded image → Scene, or None if it shows nothing of this world. Raises BadRequest where it is no image."""
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise BadRequest("You uploaded an unsupported image. Please make sure your image is valid.") from None
    try:
        return world.look(image)
    except ValueError:
        return None


def read_request(body):
    """→ (prompt text, image bytes, or None where none was sent). Raises BadRequest."""
    try:
        messages = body["messages"]
        contents = [m["content"] for m in messages]
        parts = [
            part for c in contents for part in ([{"type": "text", "text": c}] if isinstance(c, str) else c)
        ]
        prompt = "\n".join(part["text"] for part in parts if part["type"] == "text")
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        if not urls:
            return prompt, None
        header, _, data = urls[0].partition(",")
        if not re.fullmatch(r"data:image/\w+;base64", header):
            raise BadRequest("Only data URLs are read here: data:image/…;base64,…")
        return prompt, base64.b64decode(data, validate=True)
    except (KeyError, TypeError, ValueError) as error:
        raise BadRequest(f"Not a chat completion request: {type(error).__name__}: {error}") from None


def complete(body, seed):
    """A chat completion request → its response, the same for the same request."""
    prompt, data = read_request(body)
    scene = see(data) if data else None
    task, fields = recognise(prompt)
    content = hashlib.sha256(prompt.encode() + (data or b"")).hexdigest()
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    choices, tokens = [], 0
    for index in range(body.get("n") or 1):
        rng = random.Random(f"{seed}:{body.get('seed')}:{content}:{index}")
        text = BLIND if scene is None or task is None else ANSWER[task](fields, scene, rng)
        cut = bool(text and limit and len(text) > 4 * limit)  # four characters to a token, roughly
        message = {
            "role": "assistant",
            "content": text[: 4 * limit] if cut else text,
            "refusal": REFUSAL if text is None else None,
        }
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": None,
                "finish_reason": "length" if cut else "stop",
            }
        )
        tokens += len(message["content"] or REFUSAL) // 4 + 1
    asked = len(prompt) // 4 + (85 if data else 0)
    return task, {
        "id": f"chatcmpl-{content[:24]}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": body.get("model", MODEL),
        "choices": choices,
        "usage": {"prompt_tokens": asked, "completion_tokens": tokens, "total_tokens": asked + tokens},
    }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keep-alive
    disable_nagle_algorithm = True
    wbufsize = -1  # headers and body leave together

    def do_GET(self):
        if self.path.rstrip("/") != "/v1/models":
            return self.fail(404, f"Unknown request URL: GET {self.path}", "unknown_url")
        return self.reply(
            200,
            {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "demo"}]},
        )

    def do_POST(self):
        payload = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path.rstrip("/") != "/v1/chat/completions":
            return self.fail(404, f"Unknown request URL: POST {self.path}", "unknown_url")
        if not self.headers.get("Authorization", "").startswith("Bearer "):
            return self.fail(401, "You didn't provide an API key.", "invalid_api_key")
        time.sleep(self.server.latency)
        try:
            body = json.loads(payload)
            task, response = complete(body, self.server.seed)
        except (ValueError, BadRequest) as error:
            return self.fail(400, str(error), "invalid_request")
        self.server.served[task or "unknown prompt"] += 1
        return self.reply(200, response)

    def fail(self, status, message, code):
        self.reply(
            status,
            {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}},
        )

    def reply(self, status, content):
        payload = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *args):
        """Quiet: one line at the end says what was served."""


class Teacher(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # 01 opens many connections at once

    def __init__(self, port=0, seed=0, latency=0.0):
        super().__init__(("127.0.0.1", port), Handler)
        self.seed, self.latency, self.served = seed, latency, Counter()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


@common.exit_codes
def main(args):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        server = Teacher(args.port, args.seed, args.latency)
    except OSError as error:
        raise common.InputError(
            f"port {args.port}: {error.strerror}: choose another --port, or 0 for a free one"
        ) from None
    try:  # from here on a SIGTERM ends in the line below
        if args.ready_file:
            data.write_atomic(args.ready_file, server.url + "\n")
        print(f"teacher listens on {server.url}", flush=True)
        server.serve_forever()
    finally:
        print(
            "teacher served",
            ", ".join(f"{count} {task}" for task, count in sorted(server.served.items())) or "nothing",
            flush=True,
        )


if __name__ == "__main__":
    main(parse_args())
