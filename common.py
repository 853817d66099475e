"""The task, in plain Python: labels, data, prompts, parsing, rewards, metrics, JSONL and the chat API client.

Imports neither torch nor transformers, so that 01 and 02 run on a laptop with openai, pillow, tqdm and Levenshtein alone.
§, Eq. and App. refer to the paper (JMERE-R1); [ours] marks a decision where the paper is silent.

    m  gold quintuples of one example        n  predicted quintuples, repeats counted
"""

import argparse
import functools
import json
import math
import os
import re
import sys
import unicodedata
from collections import Counter
from typing import NamedTuple

import Levenshtein

# ------------------------------------------------------------------------------------------------ errors and exit codes


class InputError(Exception):
    """Something the user can mend: wrong argument, file, image or model. One line; exit code 2."""

    exit_code = 2


class Stopped(Exception):
    """The run stopped before its end for a reason outside the data: key, quota, budget. One line; exit code 3."""

    exit_code = 3


def first_line(error):
    """The first line of what `error` says, at most 200 characters."""
    return str(error).strip().split("\n")[0][:200]


def visible(text):
    """`text` with what a terminal would obey or hide written out: escape codes, line breaks, bidi marks.

    >>> visible("a" + chr(27) + "[31m")
    'a\\\\x1b[31m'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Parser(argparse.ArgumentParser):
    """argparse with a script's docstring and every default in --help, and one line, from one rank, where an argument is wrong."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=_Help, allow_abbrev=False)
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a latin-1 terminal shows ? for what it lacks

    def error(self, message):
        message = re.sub(r"^argument (\S+): ", r"\1 ", message)
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {visible(message)} (--help tells all arguments)", file=sys.stderr, flush=True)
        sys.exit(InputError.exit_code)


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        if action.default is False or action.default in (None, argparse.SUPPRESS, []):  # 0 is a default
            return action.help
        return f"{action.help} (default: %(default)s)"


def at_least(bound, number=int):
    """An argparse type: a finite `number` not below `bound`."""

    def parse(text):
        value = number(text)
        if not bound <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text}: expected at least {bound}")
        return value

    parse.__name__ = number.__name__  # argparse names it where `text` is no number
    return parse


def above(bound, number=float):
    """An argparse type: a finite `number` above `bound`."""

    def parse(text):
        value = number(text)
        if not bound < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text}: expected a number above {bound}")
        return value

    parse.__name__ = number.__name__
    return parse


def exit_codes(main):
    """Decorate `main(args)`: exit codes 0 done, 1 some rows failed, 2 input, 3 stopped; no traceback for what a user can cause."""

    @functools.wraps(main)
    def run(args):
        try:
            code = main(args)
            sys.stdout.flush()
        except (InputError, Stopped) as error:
            rank = os.environ.get("RANK", "0")
            where = "" if rank == "0" else f"[rank {rank}] "
            print(f"{where}error: {visible(str(error))}", file=sys.stderr, flush=True)
            code = error.exit_code
        except BrokenPipeError:  # `| head` has seen enough: what comes after goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 0
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


def as_item(value):
    """The five fields of `value` as a tuple, or None where it is no list of five non-empty strings.

    >>> as_item(["A", "per", "B", "org", "peer"]), as_item(["A", "per", "B"]), as_item(["A", "per", "", "org", "peer"])
    (('A', 'per', 'B', 'org', 'peer'), None, None)
    """
    if not isinstance(value, list | tuple) or len(value) != len(Quintuple._fields):
        return None
    if not all(isinstance(field, str) and field.strip() for field in value):
        return None
    return tuple(value)


def quintuple(head, head_type, tail, tail_type, relation):
    return Quintuple(
        normalise_text(head),
        normalise_label(head_type),
        normalise_text(tail),
        normalise_label(tail_type),
        normalise_label(relation),
    )


def released_items(label):
    """The items of one label of the JMERE release, as five fields."""
    head = label["beg_ent"]
    tail = label["sec_ent"]
    return [(head["name"], head["tags"], tail["name"], tail["tags"], label["relation"])]


def label_fault(q):
    """What is wrong with the labels of a quintuple, or None."""
    for label, known in ((q.head_type, TYPES), (q.tail_type, TYPES), (q.relation, RELATIONS)):
        if label not in known:
            return f"unknown label {label!r}, expected one of: {', '.join(known)}"
    return None


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

PROMPTS = {"reason": REASON_PROMPT, "direct": DIRECT_PROMPT}  # by the name that an adapter's folder records

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


# ------------------------------------------------------------------------------------------------ chains and judgements (02)

POINTS = [most for _, _, most in SCORE_RULES]
SCORES = re.compile(
    r"[\s,;|*-]*".join(rf"R{i}\**\s*[=:]\s*\**(\d+)(?!\.?\d)(?:/\d+)?" for i in range(1, len(POINTS) + 1))
)  # integers only
LABELLED = r"(?:quintuples?|labels?|annotations?|tuples?|answers?|relations?|triples?)"
LEAK = re.compile(
    rf"\b(?:given|provided|supplied|annotated|listed|gold(?:en)?|ground[- ]truth|target|expected|reference) {LABELLED}\b"
    rf"|\b{LABELLED} (?:(?:that )?(?:is|are|was|were) )?(?:given|provided|supplied|listed|above)\b"
    r"|\bas (?:given|provided|annotated|labell?ed)\b(?! by)|\bground[- ]truth\b|\bgold(?:en)?[- ](?:standard|data)\b",
    re.I,
)


def leaked(cot, text):
    """The phrase by which a chain betrays that it saw the labels, or None. What the tweet itself says is no leak.

    >>> leaked("As the given quintuples state, Bob is a person.", "Bob"), leaked("He wears a gold medal.", "Bob")
    ('given quintuples', None)
    """
    phrases = (match[0] for match in LEAK.finditer(cot))
    return next((phrase.lower() for phrase in phrases if phrase.lower() not in text.lower()), None)


def hide_answer(cot, gold):
    """The chain without quintuples written out: lines that hold nothing else, and the gold ones wherever they stand."""
    for q in gold:
        fields = r"[\"'*`]*\s*,\s*[\"'*`]*".join(re.escape(part).replace(r"\ ", r"[ _]") for part in q)
        cot = re.sub(rf"[\[(]?[\"'*`]*{fields}[\"'*`]*[\])]?", "", cot, flags=re.I)
    return "\n".join(line for line in cot.split("\n") if not states_quintuples(line))


def states_quintuples(line):
    items, malformed = parse_answer(line)
    return (
        bool(items)
        and not malformed
        and all(normalise_label(item[i]) in TYPES for item in items for i in (1, 3))
    )


def parse_scores(text):
    """One integer a rule from the judge's last line of scores, or None where one is missing or out of range.

    >>> parse_scores("Scores: R1=2 R2=2 R3=1 R4=0 R5=1 R6=2")
    (2, 2, 1, 0, 1, 2)
    """
    found = SCORES.findall(text)
    scores = tuple(int(number) for number in found[-1]) if found else ()
    return scores if scores and all(number <= most for number, most in zip(scores, POINTS)) else None


# ------------------------------------------------------------------------------------------------ rewards (Eq. 2–5)


# Each part is a pure function of a Response and the gold quintuples; 04_grpo.py adds them up (Eq. 5).


def answer_counts(response, gold):
    """Whether the answer can earn accuracy and partial reward: it is well formed, every item is a quintuple, and it is
    not empty where there is gold ("invalid quintuple structure is assigned a reward of zero")."""
    return response.well_formed and not response.malformed and bool(response.quintuples or not gold)


def accuracy_reward(response, gold):
    """Eq. 2: 2c / (m + n), 0 … 1; m gold and n predicted quintuples, repeats counted, c the size of their multiset
    intersection. Nothing to find and nothing said is 1 [ours].

    >>> q = quintuple("A", "per", "B", "org", "peer")
    >>> accuracy_reward(parse_response(format_response("x", [q])), [q, q])
    0.6666666666666666
    """
    if not answer_counts(response, gold):
        return 0.0
    pred = response.quintuples
    if not pred and not gold:
        return 1.0
    found = (Counter(pred) & Counter(gold)).total()
    return 2 * found / (len(gold) + len(pred))


def partial_reward(response, gold):
    """Eq. 3 and 4: w / 5n + 1 − ED(Ŷ, Y) / max(|Ŷ|, |Y|), 0 … 2; w of matched_components, ED the Levenshtein distance in
    characters between the answer and the canonical gold answer.

    >>> gold = [quintuple("Josh Gordon", "per", "Browns", "org", "member of")]
    >>> answer = "<think>x</think><answer>[Josh Gordon, per, Browns, org, peer]</answer>"
    >>> round(partial_reward(parse_response(answer), gold), 6)
    1.657143
    """
    if not answer_counts(response, gold):
        return 0.0
    pred = response.quintuples
    components = 1.0
    if pred:
        components = matched_components(pred, gold) / (len(Quintuple._fields) * len(pred))
    canonical = format_answer(gold)
    distance = Levenshtein.distance(response.answer, canonical)
    return components + 1 - distance / max(len(response.answer), len(canonical))


def format_reward(response):
    """Eq. 5: 1 where the response is well formed, else 0."""
    return float(response.well_formed)


def matched_components(pred, gold):
    """w: equal components under the one-to-one pairing of pred and gold that makes it largest [ours]. An
    integer, 0 … 5·min(m, n)."""
    return sum(equal_components(pred[i], gold[j]) for i, j in best_pairs(pred, gold))


def equal_components(a, b):
    return sum(x == y for x, y in zip(a, b, strict=True))


def best_pairs(pred, gold):
    """The one-to-one pairing with the most equal components → [(place in pred, place in gold)], min(m, n)
    of them.

    The assignment problem by successive shortest paths with potentials (Kuhn–Munkres), O(min² · max); a
    gold set of 21 against a runaway answer of hundreds stays in milliseconds, and 01 and 02 need no SciPy.
    """
    rows = min(pred, gold, key=len)
    columns = gold if rows is pred else pred
    cost = [[-equal_components(row, column) for column in columns] for row in rows]
    row_potential = [0] * (len(rows) + 1)
    column_potential = [0] * (len(columns) + 1)
    owner = [0] * (len(columns) + 1)  # row of a column; both count from 1, row 0 is none, column 0 the start
    for row in range(1, len(rows) + 1):
        owner[0] = row
        column = 0
        slack = [float("inf")] * (len(columns) + 1)  # the cheapest way to a column, beyond the potentials
        reached_from = [0] * (len(columns) + 1)
        used = [False] * (len(columns) + 1)
        while owner[column]:
            used[column] = True
            here = owner[column]
            for k in range(1, len(columns) + 1):
                gap = cost[here - 1][k - 1] - row_potential[here] - column_potential[k]
                if not used[k] and gap < slack[k]:
                    slack[k] = gap
                    reached_from[k] = column
            following = min((k for k in range(1, len(columns) + 1) if not used[k]), key=slack.__getitem__)
            step = slack[following]
            for k in range(len(columns) + 1):
                if used[k]:
                    row_potential[owner[k]] += step
                    column_potential[k] -= step
                else:
                    slack[k] -= step
            column = following
        while column:  # along the way back every column changes its row
            owner[column] = owner[reached_from[column]]
            column = reached_from[column]
    pairs = [(owner[k] - 1, k - 1) for k in range(1, len(columns) + 1) if owner[k]]
    return pairs if rows is pred else [(column, row) for row, column in pairs]


# ------------------------------------------------------------------------------------------------ metrics (§4)


def entities(quintuples):
    """Typed entities of quintuples, distinct: MNER counts these."""
    return {entity for q in quintuples for entity in ((q.head, q.head_type), (q.tail, q.tail_type))}


def undirected(quintuples):
    """Quintuples whose head and tail may swap: the convention of EEGA's published scorer."""
    return {(*sorted([(q.head, q.head_type), (q.tail, q.tail_type)]), q.relation) for q in quintuples}


def folded(quintuples):
    """Quintuples with upper and lower case alike."""
    return {tuple(map(str.casefold, q)) for q in quintuples}


HEADLINE = "jmere"  # the metric that best/ goes by and that every table begins with
MATCHING = {  # metric: what of an example counts, as a set
    "jmere": set,  # the exact, directed quintuple
    "mner": entities,
    "jmere_undirected": undirected,
    "jmere_folded": folded,
}


def score(predictions, golds, metrics=("jmere", "mner", "jmere_undirected")):
    """Micro precision, recall and F1 over examples; per example sets.

    predictions, golds: one list of Quintuples an example, in the same order. An unparsable response is an empty list:
    it stays in. → {metric: {precision, recall, f1, tp, pred, gold}}.
    """
    result = {}
    for metric in metrics:
        keys = MATCHING[metric]
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
