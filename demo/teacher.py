"""The demo's teacher: an OpenAI-compatible server on loopback that looks at the image it is sent and answers.

It knows the picture world (world.py) and nothing of the files: what it says comes from the pixels and the
prompt. A seeded share of its answers is wrong, careless, malformed, leaking or refused, so that the filters
of 02 have something to catch; the shares below were chosen before any result was looked at. The same request
gets the same answer. Needs Pillow and what common.py does.

    python -m demo.teacher --port 0 --ready-file runs/teacher.url

writes http://127.0.0.1:PORT/v1 into that file when it listens; SIGTERM ends it.

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
LEAKED = 0.04  # says that it was given the labels: LEAKING_CLUES, LEAKING_SENTENCES
REFUSED = 0.03  # one half by the field for it, the other in words: REFUSALS
# … of the other answers is …
SLIP = 0.04  # a re-prediction that loses or turns a quintuple
UNSCORED = 0.02  # a judgement without scores
NOISE = 0.10  # a judgement one point up or down in one rule; up on full points stays
ZERO_SHOT = 0.15  # right, when nothing was distilled: a model that sees but does not know the label set

REFUSAL = "I'm sorry, I can't assist with that."
BLIND = "I cannot make out this image."

# How GPT-4o betrays that it was given the labels, and how it refuses. These lists were written before the
# filters (lib/leaks, lib/reply), which do not know them: tests/test_reader.py counts what the filters miss.
LEAKING_CLUES = [
    "the given quintuples say",
    "as annotated",
    "the label tells",
    "according to the ground truth",
    "as stated in the input",
    "the provided answer is",
    "we already know from the labels",
    "to match the expected output",
]
LEAKING_SENTENCES = [
    "Given the quintuple ({0}, {1}, {2}, {3}, {4}), the picture bears it out.",
    "The provided quintuple identifies {0} as {1} and {2} as {3}.",
    "What the image shows aligns with the quintuple provided.",
    "The annotation marks {0} as {1}, and rightly so.",
    "The quintuple specifies that {0} and {2} stand in the relation {4}.",
    "The relation {4} was given, and the sign supports it.",
    "We were told that {0} is {1}.",
    "This is in line with the 5-tuple above.",
    "The target quintuple has {0} as its head.",
    "Since the user states the relation {4}, the picture is read that way.",
    "The input already labels {2} as {3}.",
    "This corresponds to the first quintuple in the list.",
    "The correct relation, as annotated, is {4}.",
    "It is known from the quintuple that {2} is {3}.",
    "Each of the listed quintuples can be verified in the image.",
    "The quintuples supplied with the tweet are all confirmed by the picture.",
    "In accordance with the labels, {0} comes first.",
    "The reference answer names {4}, which the image supports.",
    "Our task states the entities {0} and {2} and their types.",
    "Hence the predefined relation {4} is justified.",
]
REFUSALS = [
    "I'm sorry, but I can't assist with that request.",
    "I'm sorry, I can't identify the people in this image.",
    "I’m unable to help with identifying individuals in photographs.",
    "I can't determine who is shown here, so I won't be able to write this.",
    "Sorry, but I can't help with that.",
    "I apologize, but I cannot provide an analysis of the people in this picture.",
    "Unfortunately, I'm not able to process this image.",
    "As an AI language model, I cannot recognise real persons.",
    "I must respectfully decline this request.",
    "My guidelines do not allow me to identify people from their faces.",
    "It is against my policies to name individuals in images.",
    "I won't identify people based on their appearance.",
]


# ------------------------------------------------------------------------------------------------ prompts


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
    """→ (task, {name: what was filled in}), or (None, {}) where the prompt is none of ours."""
    for task, regex in TASKS.items():
        match = regex.fullmatch(prompt.strip())
        if match:
            return task, match.groupdict()
    return None, {}


# ------------------------------------------------------------------------------------------------ answers
# Each function takes what was filled into its prompt, the scene that the picture shows and a random
# generator, and returns a text.


def distill(fields, scene, rng):
    """The three parts of MP-CoT, or one of the faults above. None is a refusal by the field for it."""
    text = fields["text"]
    gold = common.parse_response(fields["gold"], direct=True).quintuples
    good = world.chain(text, scene, gold)
    lines = good.split("\n")
    parts = [line.partition(": ")[2] for line in lines]
    lost = rng.randrange(len(lines))
    careless = world.describe(misread(scene, rng))
    other = other_scene(world.names_in(text), scene, rng)
    kinds = ["refused", "malformed", "leaked", "careless", "wrong", "good"]
    shares = [REFUSED, MALFORMED, LEAKED, CARELESS, WRONG]
    kind = rng.choices(kinds, [*shares, 1 - sum(shares)])[0]
    if kind == "refused":
        return rng.choice([None, rng.choice(REFUSALS)])
    if kind == "malformed":
        return "\n".join(lines[:lost] + lines[lost + 1 :])
    if kind == "leaked":
        return world.cot(*parts[:2], leaking(parts[2], gold, rng))
    if kind == "careless":
        return world.cot(careless, "the tweet fits the image.", parts[2])
    return world.chain(text, other) if kind == "wrong" else good


def leaking(reasoning, gold, rng):
    """The reasoning, and in it or before it that the quintuples were given."""
    clue = rng.choice(LEAKING_CLUES)
    sentence = rng.choice(LEAKING_SENTENCES)
    if not gold:
        return f"{clue}, nothing relates."
    if rng.random() < len(LEAKING_CLUES) / len(LEAKING_CLUES + LEAKING_SENTENCES):
        return " ".join(world.step(q, clue) for q in gold)
    return f"{sentence.format(*gold[0])} {reasoning}"


def misread(scene, rng):
    """The scene with both colours and the time of day mistaken."""
    figures = []
    for figure in (scene.left, scene.right):
        others = [colour for colour in world.COLOURS if colour != figure.colour]
        figures.append(figure._replace(colour=rng.choice(others)))
    return scene._replace(left=figures[0], right=figures[1], night=not scene.night)


def other_scene(names, scene, rng):
    """Another scene in which the names can be; this one where there is no other."""
    others = [other for other in world.scenes() if other != scene and world.fits(names, other)]
    return rng.choice(others or [scene])


def repredict(fields, scene, rng):
    """What the reasoning states, whatever the picture shows."""
    last_heading = list(common.COT_PARTS)[-1]
    reasoning = fields["cot"].rpartition(last_heading)[2].lstrip(": ")
    found = [q for q, _ in world.steps(reasoning)]
    if found and rng.random() < SLIP:
        first = found[0]
        found = found[1:] or [first._replace(head=first.tail, tail=first.head)]
    return common.format_answer(found)


def score(fields, scene, rng):
    """One integer per rule of common.SCORE_RULES, from the chain and the true scene."""
    if rng.random() < UNSCORED:
        return "The reasoning is good overall."
    points = judge(fields["text"], fields["cot"], scene)
    if rng.random() < NOISE:
        i = rng.randrange(len(points))
        _, _, most = common.SCORE_RULES[i]
        points[i] = min(max(points[i] + rng.choice((-1, 1)), 0), most)
    return "Scores: " + " ".join(f"R{i}={value}" for i, value in enumerate(points, 1))


def judge(text, chain, scene):
    """→ [R1 … R6] by comparing each part with what the picture shows; all 0 where a part is missing."""
    chain = common.parse_cot(chain)
    if chain is None:
        return [0] * len(common.SCORE_RULES)
    description, alignment, reasoning = (line.partition(": ")[2] for line in chain.split("\n"))
    names = world.names_in(text)
    shown = Counter(MENTION.findall(world.describe(scene)))
    said = Counter(MENTION.findall(description))
    ties = set(world.align(names, scene).rstrip(".").split(", "))
    tied = set(alignment.rstrip(".").split(", "))
    truth = dict(world.read(names, scene))
    steps = world.steps(reasoning)
    typed = common.entities(q for q, _ in steps) <= common.entities(truth)
    derived = sum(truth.get(q) == clue for q, clue in steps)
    return [
        share_points((said & shown).total(), shown.total()),
        max(0, 2 - (said - shown).total()),
        share_points(len(ties & tied), len(ties)),
        int(bool(ties & tied)),  # a name tied to a figure is what the text alone does not say
        int(bool(steps) and typed),
        share_points(derived, max(len(steps), len(truth))),
    ]


FIGURES = [str(figure) for kind in world.TYPE for figure in world.in_each_colour(kind)]
MENTION = re.compile("|".join([*FIGURES, *world.SIGNS, "Day", "Night"]))


def share_points(part, whole):
    """2 for all, 1 for at least half, else 0."""
    if part == whole:
        return 2
    return int(2 * part >= whole)


def direct(fields, scene, rng):
    """A zero-shot model: it finds the names, sees something, and knows the label set badly."""
    names = world.names_in(fields["text"])
    if rng.random() < ZERO_SHOT:
        return common.format_answer([q for q, _ in world.read(names, scene)])
    head_type = rng.choice(common.TYPES)
    tail_type = rng.choice(common.TYPES)
    relation = rng.choice(common.RELATIONS)
    if len(names) < 2:
        return common.format_answer([])
    return common.format_answer([common.quintuple(names[0], head_type, names[1], tail_type, relation)])


def reason(fields, scene, rng):
    """The same in our format, now and then without its tags."""
    answer = direct(fields, scene, rng)
    seen = world.describe(scene)
    if rng.random() < MALFORMED:
        return f"{seen}\n{answer}"
    return f"<think>\n{seen}\n</think>\n<answer>\n{answer}\n</answer>"


ANSWER = {"distill": distill, "repredict": repredict, "score": score, "reason": reason, "direct": direct}


# ------------------------------------------------------------------------------------------------ protocol


class BadRequest(Exception):
    """Answered as the API does: status 400 with an error object."""


@functools.lru_cache(maxsize=4096)
def see(content):
    """Encoded image → Scene, or None if it shows nothing of this world.

    Raises BadRequest where it is no image.
    """
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise BadRequest("You uploaded an unsupported image. Please make sure your image is valid.") from None
    try:
        return world.look(image)
    except ValueError:
        return None


def read_request(body):
    """→ (prompt text, image bytes, or None where none was sent). Raises BadRequest."""
    texts, urls = [], []
    try:
        for message in body["messages"]:
            content = message["content"]
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            texts += [part["text"] for part in content if part["type"] == "text"]
            urls += [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
        if not urls:
            return "\n".join(texts), None
        header, _, payload = urls[0].partition(",")
        if not re.fullmatch(r"data:image/\w+;base64", header):
            raise BadRequest("Only data URLs are read here: data:image/…;base64,…")
        return "\n".join(texts), base64.b64decode(payload, validate=True)
    except (KeyError, TypeError, ValueError) as error:
        raise BadRequest(f"Not a chat completion request: {type(error).__name__}: {error}") from None


def complete(body, seed):
    """A chat completion request → (task, response): the same for the same request and seed."""
    prompt, image = read_request(body)
    scene = see(image) if image else None
    task, fields = recognise(prompt)
    content = hashlib.sha256(prompt.encode() + (image or b"")).hexdigest()
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    choices = []
    for index in range(body.get("n") or 1):
        rng = random.Random(f"{seed}:{body.get('seed')}:{content}:{index}")
        if scene is None or task is None:
            text = BLIND
        else:
            text = ANSWER[task](fields, scene, rng)
        choices.append(as_choice(index, text, limit))
    asked = len(prompt) // 4 + (85 if image else 0)
    written = sum(len(choice["message"]["content"] or REFUSAL) // 4 + 1 for choice in choices)
    return task, {
        "id": f"chatcmpl-{content[:24]}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": body.get("model", MODEL),
        "choices": choices,
        "usage": {"prompt_tokens": asked, "completion_tokens": written, "total_tokens": asked + written},
    }


def as_choice(index, text, limit):
    """text: None is a refusal; limit: in tokens of four characters, or None."""
    cut = bool(text and limit and len(text) > 4 * limit)
    if cut:
        text = text[: 4 * limit]
    refusal = REFUSAL if text is None else None
    return {
        "index": index,
        "message": {"role": "assistant", "content": text, "refusal": refusal},
        "logprobs": None,
        "finish_reason": "length" if cut else "stop",
    }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keep-alive
    disable_nagle_algorithm = True
    wbufsize = -1  # headers and body leave together

    def do_GET(self):
        if self.path.rstrip("/") != "/v1/models":
            return self.fail(404, f"Unknown request URL: GET {self.path}", "unknown_url")
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "demo"}
        return self.reply(200, {"object": "list", "data": [model]})

    def do_POST(self):
        payload = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path.rstrip("/") != "/v1/chat/completions":
            return self.fail(404, f"Unknown request URL: POST {self.path}", "unknown_url")
        if not self.headers.get("Authorization", "").startswith("Bearer "):
            return self.fail(401, "You didn't provide an API key.", "invalid_api_key")
        time.sleep(self.server.latency)
        try:
            task, response = complete(json.loads(payload), self.server.seed)
        except (ValueError, BadRequest) as error:
            return self.fail(400, str(error), "invalid_request")
        self.server.served[task or "unknown prompt"] += 1
        return self.reply(200, response)

    def fail(self, status, message, code):
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
        self.reply(status, {"error": error})

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
        self.seed = seed
        self.latency = latency  # seconds
        self.served = Counter()  # task: answers

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


# ------------------------------------------------------------------------------------------------ main


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ready-file", help="the base URL is written here once the server listens [ours]")
    parser.add_argument("--seed", type=int, default=0, help="of its faults [ours]")
    parser.add_argument("--port", type=int, default=0, help="0: any free one [ours]")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before each answer [ours]")
    return parser.parse_args(argv)


@common.exit_codes
def main(args):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        server = Teacher(args.port, args.seed, args.latency)
    except OSError as error:
        advice = "choose another --port, or 0 for a free one"
        raise common.InputError(f"port {args.port}: {error.strerror}: {advice}") from None
    try:  # from here on a SIGTERM ends in the line below
        if args.ready_file:
            data.write_atomic(args.ready_file, server.url + "\n")
        print(f"teacher listens on {server.url}", flush=True)
        server.serve_forever()
    finally:
        served = ", ".join(f"{count} {task}" for task, count in sorted(server.served.items()))
        print("teacher served", served or "nothing", flush=True)


if __name__ == "__main__":
    main(parse_args())
