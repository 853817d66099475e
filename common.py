"""The task, in plain Python: labels, data, prompts, parsing, rewards, metrics, JSONL and the chat API client.

Imports neither torch nor transformers, so that 01 and 02 run on a laptop with openai, pillow, tqdm and Levenshtein alone.
§, Eq. and App. refer to the paper (JMERE-R1); [ours] marks a decision where the paper is silent.

    m  gold quintuples of one example        n  predicted quintuples, repeats counted
"""

import ast
import asyncio
import base64
import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import random
import re
import signal
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple

import Levenshtein
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------ errors and exit codes


class InputError(Exception):
    """Something the user can mend: wrong argument, file, image or model. One line; exit code 2."""

    exit_code = 2


class Stopped(Exception):
    """The run stopped before its end for a reason outside the data: key, quota, budget. One line; exit code 3."""

    exit_code = 3


def cli(main):
    """Decorate `main(args)`: exit codes 0 done, 1 some rows failed, 2 input, 3 stopped; no traceback for what a user can cause."""

    @functools.wraps(main)
    def run(args):
        try:
            code = main(args)
        except (InputError, Stopped) as error:
            rank = os.environ.get("RANK", "0")
            print(f"{'' if rank == '0' else f'[rank {rank}] '}error: {error}", file=sys.stderr, flush=True)
            code = error.exit_code
        if code:
            sys.exit(code)

    return run


# ------------------------------------------------------------------------------------------------ labels and normalisation

TYPES = ("per", "org", "loc", "misc")
RELATIONS = (
    "parent", "siblings", "couple", "neighbor", "peer", "charges", "alumi", "alternate names", "place of residence",
    "place of birth", "member of", "subsidiary", "locate at", "contain", "present in", "awarded", "race", "religion",
    "nationality", "part of", "held on",
)  # fmt: skip
ALIASES = {
    "person": "per",
    "organization": "org",
    "organisation": "org",
    "location": "loc",
    "miscellaneous": "misc",
    "alumni": "alumi",
}


class Quintuple(NamedTuple):
    """(e1, t1, e2, t2, r) of §2, already normalised: make one with `quintuple(...)`."""

    head: str
    head_type: str
    tail: str
    tail_type: str
    relation: str


def normalise_text(text):
    """NFC, outer space stripped, inner runs of white space → one space; case kept.

    >>> normalise_text("  Josh \\n Gordon ")
    'Josh Gordon'
    """
    return " ".join(unicodedata.normalize("NFC", text).split())


@functools.lru_cache(maxsize=1024)
def normalise_label(label):
    """A type or relation as the label set spells it; what is not in the set comes back folded, so it can be shown.

    >>> normalise_label("Member_Of"), normalise_label("PERSON"), normalise_label("alumni")
    ('member of', 'per', 'alumi')
    """
    label = normalise_text(label.replace("_", " ")).casefold()
    return ALIASES.get(label, label)


def quintuple(head, head_type, tail, tail_type, relation):
    return Quintuple(
        normalise_text(head),
        normalise_label(head_type),
        normalise_text(tail),
        normalise_label(tail_type),
        normalise_label(relation),
    )


# ------------------------------------------------------------------------------------------------ JSONL


def read_jsonl(path):
    """Yield (line number, row). Lines end at \\n alone: a tweet may hold U+2028. Raises InputError naming file and line."""
    for number, row in _parsed_lines(path):
        if isinstance(row, InputError):
            raise row
        if not isinstance(row, dict):
            raise InputError(
                f"{path}:{number}: found a JSON {type(row).__name__}, expected an object {{…}} on every line"
            )
        yield number, row


def _parsed_lines(path):
    """Yield (number, value), or (number, InputError) for a line that is no JSON."""
    for number, line in _lines(path):
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, InputError(f"{path}:{number}: not JSON ({error}): mend or delete this line")


def _lines(path):
    """Yield (number, line) of the non-blank lines."""
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as handle:
            for number, line in enumerate(handle, 1):
                if line.strip():
                    yield number, line
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 ({error.reason} at byte {error.start}): save the file as UTF-8"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot read ({error.strerror})") from None


def jsonl_line(row):
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_atomic(path, text):
    """Replace `path` as a whole: a reader, or a run killed half way, sees the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    with open(temporary, "w", encoding="utf-8", newline="\n") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)


# ------------------------------------------------------------------------------------------------ data (SPEC §3)


@dataclass(frozen=True)
class Example:
    """One tweet. `image` is a path usable from here; `quintuples` is None where the file has no gold; `row` keeps every field."""

    id: str
    text: str
    image: str
    quintuples: tuple[Quintuple, ...] | None
    row: dict[str, Any] = field(default_factory=dict, repr=False)


MADE_BY = {
    "cot": "01_distill.py",
    "candidate": "01_distill.py",
    "score": "02_filter.py",
}  # else: the annotations themselves


def load_examples(path, image_dir=None, need=(), key=("id",), skip_bad=False, merge_repeats=False):
    """Read our JSONL, the JMERE release (one JSON list) or MNRE text (one Python literal a line); the content tells which.

    need: fields every row must have besides id, text and image, such as ("quintuples",) or ("cot",).
    key: the fields that together name a row once; ("id", "candidate") for the output of 01.
    skip_bad: drop rows that are wrong, and say how many, instead of stopping at the first.
    merge_repeats: join examples of the same text and image, as the V2 release does.
    An image name is looked up in image_dir, else beside the file itself. Raises InputError: file, line, what is missing.
    """
    path = Path(path)
    first = next(_lines(path), None)
    if first is None:
        raise InputError(f"{path}: empty file, expected our JSONL, a JMERE JSON list or MNRE text")
    if first[1].lstrip()[0] == "[":
        rows, convert = _jmere_rows(path), _from_jmere
    elif _is_mnre(first[1]):
        rows, convert = _mnre_rows(path), _from_jmere
    else:
        rows, convert = ((f"{path}:{number}", row) for number, row in _parsed_lines(path)), _from_jsonl
    examples, seen, stems, bad = [], {}, Counter(), 0
    for where, row in rows:
        try:
            if isinstance(row, InputError):
                raise row
            example = convert(where, row, stems, need)
            name = tuple(example.row[field] for field in key)
            if name in seen:
                raise InputError(
                    f"{where}: {', '.join(key)} {', '.join(map(str, name))} stands already at {seen[name]}, expected it once"
                )
        except InputError as error:
            if not skip_bad:
                raise
            print(f"skipped: {error}", file=sys.stderr)
            bad += 1
            continue
        seen[name] = where
        examples.append(
            Example(
                example.id,
                example.text,
                find_image(example.image, image_dir, path),
                example.quintuples,
                example.row,
            )
        )
    if bad:
        print(f"{path}: {bad} bad rows skipped, {len(examples)} kept (--skip-bad)", file=sys.stderr)
    if not examples:
        raise InputError(f"{path}: no example in it")
    return _merged(examples) if merge_repeats else examples


def find_image(name, image_dir, path):
    """image_dir/name where it exists, else beside `path` where it exists there; `name` itself where absolute."""
    beside = Path(path).parent / name  # an absolute name stays itself: pathlib drops the left side
    inside = Path(image_dir) / name if image_dir else beside
    return str(beside if beside.exists() and not inside.exists() else inside)


def to_row(example, out):
    """The four input fields of `example` as our JSONL spells them, image path relative to the folder of `out`."""
    row = {
        "id": example.id,
        "text": example.text,
        "image": os.path.relpath(example.image, Path(out).absolute().parent),
    }
    return row if example.quintuples is None else {**row, "quintuples": [list(q) for q in example.quintuples]}


def check_images(examples, skip_bad=False):
    """Decode every image before anything is trained or paid for. Returns the examples whose image is good.

    Raises InputError naming the first bad ids; with skip_bad drops them and says how many.
    """
    with ThreadPoolExecutor() as pool:  # PIL decodes without the GIL
        faults = list(
            tqdm(
                pool.map(_image_fault, examples),
                total=len(examples),
                desc="check images",
                unit="img",
                disable=None,
            )
        )
    bad = [(example, fault) for example, fault in zip(examples, faults) if fault]
    if not bad:
        return examples
    shown = "; ".join(f"{example.id}: {fault}" for example, fault in bad[:3]) + (
        "; …" if len(bad) > 3 else ""
    )
    if not skip_bad or len(bad) == len(examples):
        raise InputError(
            f"{len(bad)} of {len(examples)} images cannot be used: {shown} (check --image-dir, or drop them with --skip-bad)"
        )
    print(
        f"skipped {len(bad)} of {len(examples)} examples for their image: {shown} (--skip-bad)",
        file=sys.stderr,
    )
    return [example for example, fault in zip(examples, faults) if not fault]


def _image_fault(example):
    try:
        load_image(example.image)
    except InputError as error:
        return str(error)


def load_image(path):
    """The image as RGB, turned the way its EXIF says. Raises InputError where it is missing, broken or absurdly large."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:  # what PIL raises on broken files
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"unreadable image ({error})"
        raise InputError(f"{path}: {reason}") from None


def _jmere_rows(path):
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: begins like a JMERE file (one JSON list) but is not JSON: {error}"
        ) from None
    for number, row in enumerate(rows, 1):
        yield f"{path}: item {number}", row


def _is_mnre(line):
    try:
        row = _literal(line)
    except ValueError:
        return line.lstrip().startswith("{'")  # meant as MNRE, broken: the error will say so
    return isinstance(row, dict) and "token" in row and "relation" in row


def _literal(line):
    """A JSON object, or the Python literal MNRE writes. Raises ValueError."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        try:
            return ast.literal_eval(line.strip())
        except (SyntaxError, MemoryError, RecursionError) as error:
            raise ValueError(str(error)) from None


def _mnre_rows(path):
    """MNRE lines joined into JMERE rows by the published rule, which reproduces the paper's split exactly (SPEC §3).

    A typed line starts an example, which takes in each following line of the same text while typed; the first untyped
    line of the same text is consumed and ends it; any other untyped line is skipped.
    """
    current = None  # the example being filled
    for number, line in _lines(path):
        where = f"{path}:{number}"
        try:
            row = _literal(line)
            relation = row["relation"].split("/")  # '/per/org/member_of', or 'None'
            token, img_id, names = row["token"], row["img_id"], [row[end]["name"] for end in "ht"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            yield (
                where,
                InputError(
                    f"{where}: not an MNRE line with token, h, t, img_id and relation ({type(error).__name__}: {error})"
                ),
            )
            continue
        same, typed = current is not None and current["token"] == token, len(relation) == 4
        if not (same and typed) and current is not None:
            yield current["where"], current
            current = None
        if typed:
            ends = [{"name": name, "tags": tag} for name, tag in zip(names, relation[1:3])]
            label = [{"beg_ent": ends[0], "sec_ent": ends[1], "relation": relation[3]}]
            current = current or {"token": token, "img_id": img_id, "label_list": [], "where": where}
            current["label_list"].append(label)
    if current is not None:
        yield current["where"], current


def _from_jmere(where, row, stems, need):
    try:
        text, image = " ".join(row["token"]), row["img_id"]
        labels = [label for group in row["label_list"] for label in group]
        parts = [
            (
                q["beg_ent"]["name"],
                q["beg_ent"]["tags"],
                q["sec_ent"]["name"],
                q["sec_ent"]["tags"],
                q["relation"],
            )
            for q in labels
        ]
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{where}: not a JMERE row with token, img_id and label_list ({type(error).__name__}: {error})"
        ) from None
    stem = Path(image).stem
    stems[stem] += 1
    name = stem if stems[stem] == 1 else f"{stem}-{stems[stem]}"  # one image may serve several rows
    fields = {"id": name, "text": text, "image": image, "quintuples": parts}
    return _from_jsonl(where, fields, stems, need)


def _from_jsonl(where, row, stems, need):
    if not isinstance(row, dict):
        raise InputError(
            f"{where}: found a JSON {type(row).__name__}, expected an object with id, text and image"
        )
    for name in ("id", "text", "image", *need):
        if row.get(name) is None or row[name] == "" and name in ("id", "image"):
            raise InputError(
                f"{where}: missing {name!r} ({'made by ' + MADE_BY[name] if name in MADE_BY else 'part of the annotations'})"
            )
        if name in ("text", "image", "cot") and not isinstance(row[name], str):
            raise InputError(f"{where}: {name!r} is a {type(row[name]).__name__}, expected a string")
    try:
        jsonl_line(row).encode()
    except (
        UnicodeEncodeError
    ) as error:  # half of a surrogate pair, written \\ud83d: no later stage could store it
        raise InputError(
            f"{where}: holds half a character ({error.reason} {error.object[error.start]!r}): mend the escape"
        ) from None
    gold = row.get("quintuples")
    return Example(
        str(row["id"]), row["text"], row["image"], None if gold is None else _gold(where, gold), row
    )


def _gold(where, items):
    if not isinstance(items, list):
        raise InputError(
            f"{where}: 'quintuples' is a {type(items).__name__}, expected a list [[e1, t1, e2, t2, r], …]"
        )
    out = []
    for item in items:
        if not (
            isinstance(item, list | tuple)
            and len(item) == 5
            and all(isinstance(x, str) and x.strip() for x in item)
        ):
            raise InputError(
                f"{where}: quintuple {json.dumps(item, ensure_ascii=False)[:80]}, expected five non-empty strings"
            )
        q = quintuple(*item)
        for label, known in ((q.head_type, TYPES), (q.tail_type, TYPES), (q.relation, RELATIONS)):
            if label not in known:
                raise InputError(f"{where}: unknown label {label!r}, expected one of: {', '.join(known)}")
        out.append(q)
    return tuple(out)


def _merged(examples):
    groups = {}
    for example in examples:
        groups.setdefault((example.text, example.image), []).append(example)
    merged = []
    for first, *others in groups.values():
        gold = [q for example in (first, *others) for q in example.quintuples or ()]
        quintuples = None if first.quintuples is None else tuple(dict.fromkeys(gold))
        merged.append(Example(first.id, first.text, first.image, quintuples, first.row))
    return merged


# ------------------------------------------------------------------------------------------------ prompts
# The paper prints the final lines of the reasoning prompt (App. E) and describes the others (§3.2, App. B, D); the wording
# around them is [ours]. Every prompt is sent with the tweet's image before the text.

LABELS = f"Entity types: {', '.join(TYPES)}.\nRelations: {', '.join(RELATIONS)}."
TASK = (
    "Extract every quintuple (head entity, head type, tail entity, tail type, relation) that the tweet and its image express together.\n"
    "Copy entity names from the tweet.\n" + LABELS
)
ANSWER_FORM = "one quintuple a line as [head, head type, tail, tail type, relation], or [] if there is none"

REASON_PROMPT = (  # App. E: text, image, type ranges; the think/answer sentence is the paper's
    TASK + "\nTweet: {text}\n"
    "First output the thinking process in <think> </think> tags and then output the final answer in <answer> </answer> tags. "
    f"Write in the answer {ANSWER_FORM}."
)
DIRECT_PROMPT = (
    TASK + f"\nTweet: {{text}}\nOutput only the final answer: {ANSWER_FORM}."
)  # SFT baseline and zero-shot, Tables 1 and 3

COT_PARTS = ("Image Description", "Visual-Text Alignment", "Quintuple Reasoning")  # MP-CoT, §3.2
DISTILL_PROMPT = (  # App. D: image, text and gold → the three parts of MP-CoT
    "You write the reasoning by which a careful reader gets from a tweet and its image to its quintuples.\n"
    + LABELS
    + "\nTweet: {text}\nQuintuples:\n{gold}\n"
    "Write exactly three parts, each beginning on a new line with its heading:\n"
    "Image Description: what the image shows that matters here.\n"
    "Visual-Text Alignment: which words of the tweet belong to which parts of the image.\n"
    "Quintuple Reasoning: how entities, types and relations follow, step by step.\n"
    "Be concise. Reason as if you found the quintuples yourself: never mention or hint that they were given. "
    "Every quintuple above must follow from your reasoning, and no other."
)
REPREDICT_PROMPT = (  # App. B, Re-Prediction Filter: image, text and MP-CoT, no labels
    TASK + "\nTweet: {text}\nReasoning of a colleague:\n{cot}\n"
    f"Follow this reasoning and output only the quintuples it leads to: {ANSWER_FORM}."
)

SCORE_RULES = (  # App. B, Rule-Based Score Filter: (aspect, rule, most points); ten points in all
    (
        "image description",
        "names the people, objects, places and writing in the image that matter for the tweet",
        2,
    ),
    ("image description", "says nothing about the image that it does not show", 2),
    (
        "image-text association",
        "ties each entity of the tweet that is visible to the part of the image that shows it",
        2,
    ),
    ("image-text association", "says what the image adds to the text, or that it adds nothing", 1),
    ("reasoning", "gives a reason for the type of every entity it uses", 1),
    ("reasoning", "derives every relation from text or image in steps that follow", 2),
)
SCORE_PROMPT = (
    "Score the reasoning that a model wrote about a tweet and its image. Be strict; judge only by these rules, in integers:\n"
    + "\n".join(
        f"R{i} ({aspect}; 0 to {most}): {rule}." for i, (aspect, rule, most) in enumerate(SCORE_RULES, 1)
    )
    + "\n\nExample 1. Image: two footballers in red shirts shake hands. Tweet: Messi meets Xavi before the match\n"
    "Image Description: Two football players in red shirts shake hands on a pitch.\n"
    "Visual-Text Alignment: Messi and Xavi are the two players; the shared shirt shows one team, which the text does not say.\n"
    "Quintuple Reasoning: Messi and Xavi are people, so per. They wear the same shirt and meet as equals, so they are peers.\n"
    "Scores: R1=2 R2=2 R3=2 R4=1 R5=1 R6=2\n"
    "Example 2. Image: a stadium at night. Tweet: Lakers back at Staples Center\n"
    "Image Description: A basketball player holds a trophy in a stadium.\n"
    "Visual-Text Alignment: Staples Center is the stadium.\n"
    "Quintuple Reasoning: The Lakers are located at Staples Center.\n"
    "Scores: R1=1 R2=0 R3=1 R4=0 R5=0 R6=1\n\n"
    "Now score this one.\nTweet: {text}\n{cot}\n"
    "Answer with one line in the form of the examples: Scores: "
    + " ".join(f"R{i}=…" for i in range(1, len(SCORE_RULES) + 1))
)

COT_HEADING = re.compile(
    r"^[ \t#*>\d.()-]*(Image Description|Visual-Text Alignment|Quintuple Reasoning)[ \t*]*:?[ \t*]*",
    re.I | re.M,
)


def parse_cot(text):
    """A teacher's MP-CoT → its canonical form, or None where it is malformed: the three parts, each once, in order, none empty.

    A chain that holds one of our tags is malformed too: inside <think> it would break the response.

    >>> parse_cot("**Image Description:** a man\\n**Visual-Text Alignment:** he is Bob\\n**Quintuple Reasoning:** so per")
    'Image Description: a man\\nVisual-Text Alignment: he is Bob\\nQuintuple Reasoning: so per'
    """
    pieces = COT_HEADING.split(text)  # [before, heading, body, heading, body, heading, body]
    headings, bodies = pieces[1::2], [body.strip().removesuffix("```").strip() for body in pieces[2::2]]
    if [heading.casefold() for heading in headings] != [part.casefold() for part in COT_PARTS] or not all(
        bodies
    ):
        return None
    if any(tag in text for tag in TAGS):
        return None
    return "\n".join(f"{part}: {body}" for part, body in zip(COT_PARTS, bodies))


# ------------------------------------------------------------------------------------------------ answers (SPEC §4)

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
BRACKETS = "[](){}\"' \t\r,;"
CLOSES = {"[": "]", "(": ")"}
QUOTES = {'"': '"', "'": "'", "`": "`", "“": "”", "‘": "’", "*": "*"}
BULLET = re.compile(r"(?:[-*•]|\d{1,3}[.)])\s+")
FENCE = re.compile(r"^[ \t]*```[^\n\[({]*|```[ \t]*$", re.M)
BOUNDARY = {
    "[": re.compile(r"\]\s*(?:[,;]\s*)?\["),
    "(": re.compile(r"\)\s*(?:[,;]\s*)?\("),
}  # between two items of a line
TYPE_SPELLINGS = frozenset((*TYPES, *(alias for alias, label in ALIASES.items() if label in TYPES)))


class Response(NamedTuple):
    think: str  # the reasoning, stripped; "" where there is none
    answer: str  # the answer text, stripped
    quintuples: tuple[Quintuple, ...]  # repeats kept, in order
    malformed: int  # items that are no quintuple
    well_formed: bool  # <think> </think> <answer> </answer>, each once, nothing around


def format_answer(quintuples):
    """The canonical answer: one `[e1, t1, e2, t2, r]` a line, `[]` for none. `parse_response` reads back exactly `quintuples`.

    >>> print(format_answer([quintuple("Josh Gordon", "per", "Browns", "org", "member_of")]))
    [Josh Gordon, per, Browns, org, member of]
    """
    return "\n".join(_format_item(q) for q in quintuples) or "[]"


def _format_item(q):
    line = f"[{', '.join(q)}]"
    if _parse_line(line) == ([tuple(q)], 0) and not any(tag in line for tag in TAGS):
        return line
    quoted = ", ".join(
        json.dumps(part, ensure_ascii=False) for part in q
    )  # an entity that reads like syntax, such as 'a, per, b'
    return f"[{quoted}]".replace("<", "\\u003c")


def format_response(cot, quintuples):
    """The training target of CoT-SFT, §3.2: reasoning first, then the answer."""
    return f"<think>\n{cot}\n</think>\n<answer>\n{format_answer(quintuples)}\n</answer>"


def parse_response(text, direct=False):
    """What a model wrote → Response. One parser for filter, reward and evaluation; linear in the length of `text`.

    direct: the prompt asked for no reasoning; the answer is the whole response, <answer> tags optional.
    A response that is not well formed still gives what stands after its last <answer>, so that it can be scored as it is;
    well_formed tells the reward. An item of five non-empty fields is a quintuple, be its labels known or not; any
    other item counts in malformed, and so does an answer text with no item in it.

    >>> parse_response("<think>x</think> <answer>[A, per, B, org, member_of]</answer>").quintuples[0].relation
    'member of'
    """
    counts = [text.count(tag) for tag in TAGS]
    think_end, answer_start = text.find("</think>"), text.rfind("<answer>")
    think = text[: max(think_end, 0)].partition("<think>")[2].strip()
    if answer_start >= 0:
        answer = text[answer_start + len("<answer>") :].partition("</answer>")[0].strip()
    else:
        answer = text.strip() if direct else ""
    if direct:
        outside = not counts[2] or text.strip().startswith("<answer>") and text.strip().endswith("</answer>")
        well_formed = outside and counts[:2] == [0, 0] and counts[2] == counts[3] <= 1
    else:
        bare = text.strip()
        between = text[think_end + len("</think>") : answer_start]
        well_formed = counts == [1, 1, 1, 1] and bare.startswith("<think>") and bare.endswith("</answer>")
        well_formed = well_formed and think_end < answer_start and not between.strip() and bool(think)
    quintuples, malformed = parse_answer(answer)
    return Response(think, answer, tuple(quintuple(*item) for item in quintuples), malformed, well_formed)


def parse_answer(answer):
    """Answer text → (items as tuples of five strings, number of malformed items)."""
    answer = FENCE.sub("", answer).strip()
    if re.fullmatch(r"(?:\[\s*\])?", answer):
        return [], 0
    whole = _parse_json(answer)
    found = [whole] if whole else [_parse_line(line) for line in answer.split("\n") if line.strip(BRACKETS)]
    items, malformed = [item for items, _ in found for item in items], sum(bad for _, bad in found)
    return items, malformed or int(not items)


def _parse_json(text):
    """Items of a JSON list of lists, objects or strings, or of one item; None where `text` is no JSON."""
    if text[:1] not in ("[", "{"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):  # {"quintuples": [...]}, or one item with its fields named
        value = list(value.values())
        value = value[0] if len(value) == 1 and isinstance(value[0], list) else value
    if len(value) == 5 and not any(isinstance(x, list | dict) for x in value):
        value = [value]
    items, malformed = [], 0
    for item in value:
        if isinstance(item, str):
            more, bad = _parse_line(item)
            items, malformed = items + more, malformed + (bad if more or bad else 1)
            continue
        fields = list(item.values()) if isinstance(item, dict) else item
        fields = (
            [str(x) if isinstance(x, int | float) else x for x in fields] if isinstance(fields, list) else []
        )
        if len(fields) == 5 and all(isinstance(x, str) and x.strip() for x in fields):
            items.append(tuple(fields))
        else:
            malformed += 1
    return items, malformed


def _parse_line(line):
    """Items of one line → (tuples, malformed). Brackets and `;` separate items, the closed set of types separates fields."""
    line = line.strip().rstrip(",;").rstrip()
    bullet = BULLET.match(line)
    line = line[bullet.end() :] if bullet else line
    if not line.strip(BRACKETS):
        return [], 0  # the bracket of a list that spans lines
    parsed = _parse_json(line)
    if parsed:
        return parsed
    for opening, closing in CLOSES.items():
        if line[0] not in CLOSES and line[-1] == closing and opening in line:
            line = line[line.index(opening) :]  # "Answer: [A, per, …]"
    if line[0] not in CLOSES:
        groups = _loose_items(line.split(","))
    else:
        inner = line[1:].lstrip()
        line = inner if inner[:1] in CLOSES else line  # the outer bracket of a list of lists
        closing = CLOSES[line[0]]
        groups = [segment.split(",") for segment in BOUNDARY[line[0]].split(line[1:])]
        for pieces in groups:
            pieces[-1] = pieces[-1].partition(closing)[0]  # what follows the bracket is comment
    items = [_item(pieces) for pieces in groups]
    return [item for item in items if item], items.count(None)


def _loose_items(pieces):
    """Comma pieces of a line without brackets, cut into items: after the second type comes the relation, up to `;` or `,`."""
    groups, current, types, since = [], [], 0, 0
    for piece in pieces:
        if types == 2:
            relation, _, rest = piece.partition(";")
            groups.append([*current, relation])
            current, types, since = [rest] if rest.strip() else [], 0, 1 if rest.strip() else 0
            continue
        current.append(piece)
        if since and _is_type(piece):
            types, since = types + 1, 0
        else:
            since += 1  # pieces of the entity so far: it must have one
    return groups + [current] if any(piece.strip() for piece in current) else groups


def _item(pieces):
    """Comma pieces of one item → five fields, or None. An entity may hold commas: its pieces are what stands between types."""
    if len(pieces) >= 5 and _is_type(pieces[-2]):
        for i in range(1, len(pieces) - 3):
            if _is_type(pieces[i]):
                pieces = [",".join(pieces[:i]), pieces[i], ",".join(pieces[i + 1 : -2]), *pieces[-2:]]
                break
    fields = tuple(_bare(piece) for piece in pieces)
    return fields if len(fields) == 5 and all(fields) else None


def _is_type(piece):
    return len(piece) < 40 and piece.strip(" \t\"'`*“”‘’").casefold() in TYPE_SPELLINGS


def _bare(piece):
    """Without white space, quotes and bold around it."""
    piece = piece.strip()
    for _ in range(3):
        if len(piece) < 2 or QUOTES.get(piece[0]) != piece[-1]:
            break
        piece = piece[1:-1].replace('\\"', '"').replace("\\'", "'").strip()
    return piece


# ------------------------------------------------------------------------------------------------ rewards (Eq. 2–5)


class Reward(NamedTuple):
    total: float  # accuracy + α·partial + β·format
    accuracy: float  # Eq. 2: 2c / (m + n), 0 … 1
    partial: float  # Eq. 3–4: w / 5n + string similarity, 0 … 2
    format: float  # Eq. 5: 1 if well formed


def reward(text, gold, alpha=0.2, beta=0.1):
    """The rule-based reward of one response to the reason prompt. SPEC §5.

    >>> gold = [quintuple("Josh Gordon", "per", "Browns", "org", "member of")]
    >>> r = reward("<think>x</think><answer>[Josh Gordon, per, Browns, org, peer]</answer>", gold)
    >>> [round(part, 6) for part in r]
    [0.431429, 0.0, 1.657143, 1.0]
    """
    response = parse_response(text)
    if not response.well_formed:
        return Reward(0.0, 0.0, 0.0, 0.0)
    pred, gold = response.quintuples, tuple(gold)
    if response.malformed or (
        gold and not pred
    ):  # "invalid quintuple structure is assigned a reward of zero"
        return Reward(beta, 0.0, 0.0, 1.0)
    found = sum(q in pred for q in gold)
    accuracy = (
        2 * found / (len(gold) + len(pred)) if gold or pred else 1.0
    )  # [ours]: nothing to find, nothing said
    components = matched_components(pred, gold) / (5 * len(pred)) if pred else 1.0
    canonical = format_answer(gold)
    distance = Levenshtein.distance(response.answer, canonical)
    partial = components + 1 - distance / max(len(response.answer), len(canonical))
    return Reward(accuracy + alpha * partial + beta, accuracy, partial, 1.0)


def matched_components(pred, gold):
    """w: equal components under the one-to-one pairing of pred and gold that makes it largest [ours]. An integer, 0 … 5·min(m, n).

    The assignment problem by successive shortest paths with potentials (Kuhn–Munkres), O(min² · max); a gold set of 21 against
    a runaway answer of hundreds stays in milliseconds, and 01 and 02 need no SciPy.
    """
    rows, columns = sorted((pred, gold), key=len)
    if not rows:
        return 0
    cost = [[-sum(a == b for a, b in zip(row, column)) for column in columns] for row in rows]
    n, m = len(rows), len(columns)
    u, v, owner = (
        [0] * (n + 1),
        [0] * (m + 1),
        [0] * (m + 1),
    )  # potentials; owner[column] = row, 1-based, 0 free
    for i in range(1, n + 1):
        owner[0], j = i, 0
        slack, way, used = [float("inf")] * (m + 1), [0] * (m + 1), [False] * (m + 1)
        while owner[j]:
            used[j], row = True, owner[j]
            for k in range(1, m + 1):
                if not used[k] and (gap := cost[row - 1][k - 1] - u[row] - v[k]) < slack[k]:
                    slack[k], way[k] = gap, j
            following = min((k for k in range(1, m + 1) if not used[k]), key=slack.__getitem__)
            delta = slack[following]
            for k in range(m + 1):
                if used[k]:
                    u[owner[k]] += delta
                    v[k] -= delta
                else:
                    slack[k] -= delta
            j = following
        while j:
            owner[j], j = owner[way[j]], way[j]
    return -sum(cost[owner[k] - 1][k - 1] for k in range(1, m + 1) if owner[k])


# ------------------------------------------------------------------------------------------------ metrics (§4)


def entities(quintuples):
    """Typed entities of quintuples, distinct: MNER counts these."""
    return {entity for q in quintuples for entity in ((q.head, q.head_type), (q.tail, q.tail_type))}


def undirected(quintuples):
    """Quintuples whose head and tail may swap: the convention of EEGA's published scorer."""
    return {(*sorted([(q.head, q.head_type), (q.tail, q.tail_type)]), q.relation) for q in quintuples}


MATCHING = {  # metric: what of an example counts, as a set
    "jmere": set,  # the exact, directed quintuple: the headline
    "mner": entities,
    "jmere_undirected": undirected,
}


def score(predictions, golds):
    """Micro precision, recall and F1 over examples; per example sets. → {metric: {precision, recall, f1, tp, pred, gold}}.

    predictions, golds: one list of Quintuples an example, in the same order. An unparsable response is an empty list: it stays in.
    """
    result = {}
    for metric, keys in MATCHING.items():
        tp = pred = gold = 0
        for predicted, wanted in zip(predictions, golds, strict=True):
            predicted, wanted = keys(predicted), keys(wanted)
            tp, pred, gold = tp + len(predicted & wanted), pred + len(predicted), gold + len(wanted)
        result[metric] = micro(tp, pred, gold)
    return result


def micro(tp, pred, gold):
    """Counts → scores; 0 where a denominator is 0."""
    f1 = 2 * tp / (pred + gold) if pred + gold else 0.0
    return {
        "precision": tp / pred if pred else 0.0,
        "recall": tp / gold if gold else 0.0,
        "f1": f1,
        "tp": tp,
        "pred": pred,
        "gold": gold,
    }


# ------------------------------------------------------------------------------------------------ chat API client (SPEC §8)

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
        for number, row in read_jsonl(path):
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
        data = "".join(map(jsonl_line, rows)).encode(
            errors="replace"
        )  # a server may send half a surrogate pair
        try:
            if self.handle.write(data) != len(data):
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
                jsonl_line(
                    {"id": job.row["id"], "status": "error", "error": str(error), **job.stamp, "key": job.key}
                )
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.handle.close()  # gives the lock back


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
        write_atomic(state, json.dumps(batches))

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


def report(out, stages, reasons, stats, prompts, answers):
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
    write_atomic(Path(out).with_suffix(".stats.json"), json.dumps(stats, indent=1) + "\n")
    models = Counter((row["model"], row["model_answered"]) for path in answers for _, row in read_jsonl(path))
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
    write_atomic(Path(out).with_suffix(".card.md"), "\n\n".join(card) + "\n")
