"""The task, in plain Python: labels, prompts, what models write and how it is read, rewards, metrics.

Imports neither torch nor transformers, so that 01 and 02 run on a laptop with openai, pillow, tqdm and
Levenshtein alone.
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

from lib import phrases, reader

# -------------------------------------------------------------------------------- errors and exit codes


class InputError(Exception):
    """Something the user can mend: wrong argument, file, image or model. One line; exit code 2."""

    exit_code = 2


class Stopped(Exception):
    """The run stopped early for a reason outside the data: key, quota, budget. One line; exit code 3."""

    exit_code = 3


def first_line(error):
    """The first line of what `error` says, at most 200 characters."""
    return str(error).strip().split("\n")[0][:200]


class Parser(argparse.ArgumentParser):
    """argparse with a script's docstring and all defaults in --help; one line for a wrong argument."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=_Help, allow_abbrev=False)
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # a latin-1 terminal shows ? for what it lacks

    def error(self, message):
        message = re.sub(r"^argument (\S+): ", r"\1 ", message)
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {message} (--help tells all arguments)", file=sys.stderr, flush=True)
        sys.exit(InputError.exit_code)


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        if action.default in (None, False, argparse.SUPPRESS) or action.default == []:
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
    """Decorate `main(args)`: exit codes 0 done, 1 some rows failed, 2 input, 3 stopped.

    No traceback for what a user can cause.
    """

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


# -------------------------------------------------------------------------------- labels and normalisation

TYPE_MEANINGS = {
    "per": "people, real or not",
    "org": "organisations: clubs, companies, parties, bands, media",
    "loc": "places",
    "misc": "everything else that has a name: events, works, prizes, nationalities, religions",
}
# Which entity is the head: read off the annotations, relation by relation. Where a relation has no direction,
# the annotators made the name that stands first in the tweet the head, nine times in ten.
RELATION_MEANINGS = {
    "parent": "head (per) is the mother or father of tail (per)",
    "siblings": "head and tail (per) are brothers or sisters; head is the one named first",
    "couple": "head and tail (per) are married, engaged or dating; head is the one named first",
    "neighbor": "head and tail (per) live or stand next to each other; head is the one named first",
    "peer": "head and tail (per) meet as equals: colleagues, team mates, rivals; head is the one named first",
    "charges": "head (per) is in charge of tail (per): leads, coaches, appoints, dismisses",
    "alumi": "head and tail (per) went to the same school; head is the one named first",
    "alternate names": "head and tail (two per or two org) are one and the same; head is the one named first",
    "place of residence": "head (per) lives, works or stays in tail (loc)",
    "place of birth": "head (per) was born in tail (loc) or comes from there",
    "member of": "head (per) plays, works or speaks for tail (org)",
    "subsidiary": "head (org) is a part of tail (org) or belongs to it",
    "locate at": "head (org) is in tail (loc) or acts there",
    "contain": "head (loc) is the larger place, in which tail (loc) lies",
    "present in": "head (per) takes part or appears in tail (misc): an event, a show, a work",
    "awarded": "head (per) won, or is up for, tail (misc): a prize or a title",
    "race": "head (per) is of tail (misc): a people or ethnic group",
    "religion": "head (per) follows tail (misc): a religion",
    "nationality": "head (per) is of tail (misc): a nation",
    "part of": "head (misc) is a part of tail (misc)",
    "held on": "head (misc) takes place, or is found, at tail (loc)",
}
TYPES = tuple(TYPE_MEANINGS)
RELATIONS = tuple(RELATION_MEANINGS)
ALIASES = {  # another spelling: the label
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
    """A type or relation as the label set spells it; what is not in the set comes back folded, to be shown.

    >>> normalise_label("Member_Of"), normalise_label("PERSON"), normalise_label("alumni")
    ('member of', 'per', 'alumi')
    """
    label = normalise_text(label.replace("_", " ")).casefold()
    return ALIASES.get(label, label)


def as_item(value):
    """The five fields of `value` as a tuple, or None where it is no list of five non-empty strings.

    >>> as_item(["A", "per", "B", "org", "peer"]), as_item(["A", "per", "", "org", "peer"])
    (('A', 'per', 'B', 'org', 'peer'), None)
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


# -------------------------------------------------------------------------------- prompts
# Every prompt is sent with the tweet's image before the text. The paper prints most of the distillation
# prompt (Figure 10) and the end of the reasoning prompt (App. E); the others it describes (§3.2, App. B).
# Their wording is [ours]. The shipped bases of demo/ were schooled on REASON_PROMPT and DIRECT_PROMPT: leave
# these two to the letter, or school the bases again.

LABELS = f"Entity types: {', '.join(TYPES)}.\nRelations: {', '.join(RELATIONS)}."
TASK = (
    "Extract every quintuple (head entity, head type, tail entity, tail type, relation) that the tweet "
    "and its image express together.\nCopy entity names from the tweet.\n" + LABELS
)
ANSWER_FORM = "one quintuple a line as [head, head type, tail, tail type, relation], or [] if there is none"
MEANINGS = (
    "Entity types:\n"
    + "\n".join(f"- {label}: {meaning}" for label, meaning in TYPE_MEANINGS.items())
    + "\nRelations, from head to tail:\n"
    + "\n".join(f"- {label}: {meaning}" for label, meaning in RELATION_MEANINGS.items())
)

REASON_PROMPT = (  # App. E: text, image, type ranges; the think/answer sentence is the paper's
    TASK + "\nTweet: {text}\n"
    "First output the thinking process in <think> </think> tags and then output the final answer in "
    "<answer> </answer> tags. "
    f"Write in the answer {ANSWER_FORM}."
)
DIRECT_PROMPT = (  # SFT baseline and zero-shot, Tables 1 and 3
    TASK + f"\nTweet: {{text}}\nOutput only the final answer: {ANSWER_FORM}."
)
PROMPTS = {"reason": REASON_PROMPT, "direct": DIRECT_PROMPT}  # by the name that an adapter's folder records

COT_PARTS = {  # MP-CoT, §3.2: heading of a part: what to write there
    "Image Description": "what the image shows: people, objects, places, writing, as far as it matters here",
    "Visual-Text Alignment": "how text and image are connected: which words belong to which part of the "
    "image, and what it adds to them",
    "Quintuple Reasoning": "step by step, how entities, types, relations and their direction follow; concise",
}
DISTILL_PROMPT = (  # Figure 10, App. D: image, text and gold → the parts of MP-CoT
    "A quintuple of a tweet and its image is [head entity, head type, tail entity, tail type, relation].\n"
    f"{MEANINGS}\n\n"
    "Write down how a careful reader extracts the quintuples below from the tweet and its image, "
    f"in exactly {len(COT_PARTS)} parts. Each begins on a new line with its heading and a colon:\n"
    + "\n".join(f"{i}. {part}: {task}." for i, (part, task) in enumerate(COT_PARTS.items(), 1))
    + "\n\nEvery quintuple below must follow from your reasoning, and no other. Reason as if you found them "
    "yourself: never say or hint that quintuples, labels or answers were given to you.\n\n"
    "<tweet>\n{text}\n</tweet>\nQuintuples:\n{gold}"
)
FENCED = "<tweet>\n{text}\n</tweet>\n<reasoning>\n{cot}\n</reasoning>\n"
REPREDICT_PROMPT = (  # App. B, Re-Prediction Filter: image, text and MP-CoT, no labels
    "A quintuple of a tweet and its image is [head entity, head type, tail entity, tail type, relation].\n"
    f"{MEANINGS}\n\n"
    f"{FENCED}"
    f"Which quintuples does this reasoning lead to? Output nothing but their list: {ANSWER_FORM}. "
    "Copy entity names from the tweet."
)

SCORE_RULES = (  # App. B, Rule-Based Score Filter: (aspect, rule, most points); ten points in all
    (
        "image description",
        "names what matters for the tweet: people, objects, places and writing in the image",
        2,
    ),
    ("image description", "says nothing about the image that it does not show", 2),
    ("image-text association", "ties each entity that is visible to the part of the image that shows it", 2),
    ("image-text association", "says what the image adds to the text, or that it adds nothing", 1),
    ("reasoning", "gives a reason for the type of every entity it uses", 1),
    ("reasoning", "derives every relation from text or image in steps that follow", 2),
)
POINTS = [most for _, _, most in SCORE_RULES]
SCORE_EXAMPLES = (  # image, tweet, the parts of the chain, the points of each rule
    (
        "two footballers in red shirts shake hands",
        "Messi meets Xavi before the match",
        (
            "Two football players in red shirts shake hands on a pitch.",
            "Messi and Xavi are the two players; their shirts show one team, which the text does not say.",
            "Messi and Xavi are people, so per. They wear one shirt and meet as equals, so they are peers.",
        ),
        (2, 2, 2, 1, 1, 2),
    ),
    (
        "a woman in a lab coat beside a sign that reads CERN",
        "Proud of Anna Berg today !",
        (
            "A smiling woman stands beside a sign.",
            "Anna Berg is the woman; the sign says where she works.",
            "Anna Berg is a person, so per. She stands at the sign of CERN, so she is a member of CERN.",
        ),
        (1, 2, 2, 1, 0, 1),
    ),
    (
        "a stadium at night",
        "Lakers back at Staples Center",
        (
            "A basketball player holds a trophy in a stadium.",
            "Staples Center is the stadium.",
            "The Lakers are located at Staples Center.",
        ),
        (1, 0, 1, 0, 0, 1),
    ),
)


def score_line(points):
    """The line in which the judge gives its points."""
    return "Scores: " + " ".join(f"R{i}={point}" for i, point in enumerate(points, 1))


def score_example(number, image, tweet, parts, points):
    """A worked example of the judge's prompt."""
    chain = "\n".join(f"{heading}: {part}" for heading, part in zip(COT_PARTS, parts, strict=True))
    return f"Example {number}. Image: {image}.\n{FENCED.format(text=tweet, cot=chain)}{score_line(points)}\n"


SCORE_PROMPT = (
    "Score the reasoning that a model wrote about a tweet and its image. Be strict. Judge only by these "
    "rules, in whole points:\n"
    + "\n".join(
        f"R{i} ({aspect}; 0 to {most}): {rule}." for i, (aspect, rule, most) in enumerate(SCORE_RULES, 1)
    )
    + "\n\n"
    + "\n".join(score_example(i, *example) for i, example in enumerate(SCORE_EXAMPLES, 1))
    + f"\nNow score this one.\n{FENCED}"
    + "You may first give reasons, one short sentence a rule. End with a line like that of the examples: "
    + score_line("…" * len(SCORE_RULES))
)


# -------------------------------------------------------------------------------- answers (SPEC §4)

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
TAG = re.compile("|".join(TAGS))
WELL_FORMED = re.compile(r"\s*<think>(.*)</think>\s*<answer>.*</answer>\s*", re.S)
THOUGHT_TAG = re.compile(  # as other models spell <think> and </think>
    r"[<◁]\s*(/?)\s*(?:seed:)?(?:think(?:ing)?|thoughts?|reasoning)\s*[>▷]|\[(/?)THINK\]"
    r"|<\|(?:begin|(end))_of_thought\|>|<\|channel\|>(?:analysis|(final))(?:<\|message\|>)?",
    re.I,
)
ANSWER_TAG = re.compile(r"<\s*(/?)\s*answer\s*>", re.I)
READER = reader.Reader(TYPES, RELATIONS, ALIASES)


class Response(NamedTuple):
    think: str  # the reasoning, stripped; "" where there is none
    answer: str  # the answer text, stripped
    quintuples: tuple[Quintuple, ...]  # what was meant: repeats kept, in order
    malformed: int  # items that are no quintuple, and an answer without any item that does not say so
    stray: int  # pieces of talk around the items
    well_formed: bool  # <think> </think> <answer> </answer>, each once, nothing around


def format_answer(quintuples):
    """The canonical answer: one `[e1, t1, e2, t2, r]` a line, `[]` for none. parse_response reads it back.

    >>> print(format_answer([quintuple("Josh Gordon", "per", "Browns", "org", "member_of")]))
    [Josh Gordon, per, Browns, org, member of]
    """
    return "\n".join(map(format_item, quintuples)) or "[]"


@functools.lru_cache(maxsize=4096)
def format_item(q):
    """`[e1, t1, e2, t2, r]`. A name that reads like syntax ("a, per, b") puts all five into JSON strings."""
    line = f"[{', '.join(q)}]"
    other = Quintuple("a", "per", "b", "org", "peer")
    line_of_other = f"[{', '.join(other)}]"
    read = parse_response(f"{line_of_other}\n{line}\n{line_of_other}", direct=True)
    if read.quintuples == (other, q, other) and read.well_formed and not read.malformed and not read.stray:
        return line
    return f"[{', '.join(map(json_string, q))}]"


def json_string(text):
    """`text` as a JSON string in which each sign that could mean something outside of a string is escaped."""

    def escaped(sign):
        return json.dumps(sign[0])[1:-1] if sign[0] > "~" else f"\\u{ord(sign[0]):04x}"

    return '"' + re.sub(r"[^\w ,.'-]", escaped, text) + '"'


def format_response(cot, quintuples):
    """The training target of CoT-SFT, §3.2: reasoning first, then the answer."""
    return f"<think>\n{cot}\n</think>\n<answer>\n{format_answer(quintuples)}\n</answer>"


def parse_response(text, direct=False):
    """What a model wrote → Response: one reader for filter, reward and evaluation, linear in `text`'s length.

    direct: the prompt asked for no reasoning; the answer is the whole response, <answer> tags optional.
    Filter and evaluation ask for the set of quintuples, however it is written; the reward also asks for
    well_formed, malformed and stray. A label outside the label set makes a wrong quintuple, no malformed one.

    >>> parse_response("<think>x</think> <answer>[A, per, B, org, member_of]</answer>").quintuples[0].relation
    'member of'
    >>> parse_response("Here it is: `A (per) -> peer -> B (per)`.", direct=True).quintuples
    (Quintuple(head='A', head_type='per', tail='B', tail_type='per', relation='peer'),)
    """
    thoughts, said, answers = take_apart(text)
    if answers:
        given = [answer for answer in answers if answer.strip(reader.BLANK)]
        answer = given[-1] if given else ""
    else:
        answer = "".join(said) if direct or thoughts else ""
    found = READER.read(answer)
    return Response(
        think="\n".join(thoughts).strip(),
        answer=answer.strip(reader.BLANK),
        quintuples=tuple(quintuple(*item) for _, item in found.items),
        malformed=found.malformed,
        stray=found.stray,
        well_formed=is_well_formed(text, direct),
    )


def is_well_formed(text, direct):
    """The format of Eq. 5. direct: no thoughts, and no answer tags or one pair around everything."""
    counts = [text.count(tag) for tag in TAGS]
    if direct:
        around = text.strip().startswith("<answer>") and text.strip().endswith("</answer>")
        return counts == [0, 0, 0, 0] or (counts == [0, 0, 1, 1] and around)
    match = WELL_FORMED.fullmatch(text)
    return counts == [1, 1, 1, 1] and match is not None and bool(match[1].strip())


def take_apart(text):
    """A response → (its thoughts, what it says besides, its answers between tags): three lists of texts.

    The chat template may have begun the thoughts, and they may be cut off. An answer that was not closed is
    given only where no other says anything.
    """
    text = THOUGHT_TAG.sub(lambda match: "</think>" if any(match.groups()) else "<think>", text)
    text = ANSWER_TAG.sub(r"<\1answer>", text)
    last_close = text.rfind("</think>")
    thoughts, said, answers = [], [], []
    inside = said  # where the text goes
    start = 0
    for match in TAG.finditer(text):
        tag = match[0]
        following = None
        if tag == "<think>" and inside is said:
            following = thoughts
        elif tag == "</think>" and inside is thoughts:
            following = said
        elif tag == "</think>" and inside is said and not answers:  # the template had begun them
            thoughts, said = [*thoughts, *said], []
            inside, following = thoughts, said
        elif tag == "<answer>" and (inside is said or (inside is thoughts and start > last_close)):
            following = answers
        elif tag == "</answer>" and inside is answers:
            following = said
        if following is not None:
            inside.append(text[start : match.start()])
            inside = following
            start = match.end()
        elif tag == "<answer>" and inside is answers:  # begun again
            start = match.end()
    if inside is not answers:
        inside.append(text[start:])
    elif not any(answer.strip() for answer in answers):
        answers.append(text[start:])
    return thoughts, said, answers


# -------------------------------------------------------------------------------- chains, judgements

SIGN = r"(?:[^\w\n]|_)"
NUMBERING = rf"{SIGN}*(?:(?:part|step|section){SIGN}*)?(?:(?:\d{{1,2}}|[ivx]{{1,3}}){SIGN}+)?"
HEADINGS = "|".join((SIGN + "{0,3}").join(re.findall(r"\w+", part)) for part in COT_PARTS)
COT_HEADING = re.compile(  # a heading fills its line, or a colon or a dash ends it; group 1 holds its words
    rf"^{NUMBERING}({HEADINGS})(?:[ *_]*\([^()\n]*\))?"
    rf"(?:(?:[^\w\n:：]|_)*[:：]\**[ \t]*|{SIGN}*$|[ \t*_]+[-–—]+[ \t]+)",
    re.I | re.M,
)
COURTESY = re.compile(
    r"\W*(?:(?:i )?hope (?:this|that)|let me know|feel free|please (?:let|feel)|if you (?:need|have|want)"
    r"|is there any|would you like|thank)[^\n]*|\W*",
    re.I,
)


def parse_cot(text):
    """A teacher's MP-CoT → its canonical form, or None where it is malformed.

    Well formed: the parts, each once, in order, none empty. Rules and courtesies at the end of a part are cut
    off. A chain that holds one of our tags is malformed too: inside <think> it would break the response.

    >>> text = "**1. Image Description**\\na man\\nVisual–Text Alignment: Bob\\n# Quintuple Reasoning\\nper"
    >>> print(parse_cot(text))
    Image Description: a man
    Visual-Text Alignment: Bob
    Quintuple Reasoning: per
    """
    text = re.sub(r"</?(?:b|i|u|em|strong|h\d)>", "", text.replace("\r\n", "\n"))
    pieces = COT_HEADING.split(text)  # [before, heading, body, heading, body, …]
    headings = [only_letters(heading) for heading in pieces[1::2]]
    bodies = [without_rules(body) for body in pieces[2::2]]
    if headings != [only_letters(part) for part in COT_PARTS] or not all(bodies):
        return None
    if any(tag in text.lower() for tag in TAGS):
        return None
    return "\n".join(f"{part}: {body}" for part, body in zip(COT_PARTS, bodies, strict=True))


def only_letters(text):
    return re.sub(r"\W", "", text).lower()


def without_rules(body):
    """The body of a part without rules (`---`) around it, and without the courtesies that end an answer."""
    lines = body.strip().split("\n")
    while lines and COURTESY.fullmatch(lines[-1]):
        lines.pop()
    while lines and not re.search(r"\w", lines[0]):
        lines.pop(0)
    return "\n".join(lines).strip()


def hide_answer(cot, gold):
    """The chain without quintuples written out: lines of nothing else, and the gold ones anywhere."""
    for q in gold:
        fields = r"[\"'*`]*\s*,\s*[\"'*`]*".join(re.escape(part).replace(r"\ ", r"[ _]") for part in q)
        cot = re.sub(rf"[\[(]?[\"'*`]*{fields}[\"'*`]*[\])]?", "", cot, flags=re.I)
    return "\n".join(line for line in cot.split("\n") if not states_quintuples(line))


def states_quintuples(line):
    """Whether a line holds quintuples and nothing else."""
    found = parse_response(line, direct=True)
    known = all(q.head_type in TYPES and q.tail_type in TYPES for q in found.quintuples)
    return bool(found.quintuples) and known and not found.malformed and not found.stray


def leaked(cot, text):
    """The phrase by which a chain betrays that it saw the labels, or None. What the tweet says is no leak.

    >>> leaked("As the given quintuples state, Bob is a person.", "Bob"), leaked("He wears a gold medal.", "")
    ('given quintuples', None)
    """
    found = (match[0].lower() for match in phrases.LEAK.finditer(cot))
    return next((phrase for phrase in found if phrase not in text.lower()), None)


def refused(text):
    """Whether a model declines to answer: it begins so, and then gives no quintuple, no chain and no scores.

    >>> refused("I'm sorry, I can't identify people."), refused("I can't see it, but: [A, per, B, org, peer]")
    (True, False)
    """
    if not phrases.REFUSAL.match(text) or COT_HEADING.search(text) or parse_scores(text):
        return False
    found = READER.read(text)
    answers_nothing = found.empty and not phrases.REGRET.match(text)  # "I cannot find any quintuples"
    return not found.items and not answers_nothing


RULE = re.compile(
    r"(?<![^\W_])(?:R_?|Rule[\s\"':#_-]*|Criterion\s*)(\d{1,2})(?!\d)(?:\s*\([^()\n]*\))?|^\W*(\d)[.):](?=\s)",
    re.I | re.M,
)
POINT = r"(?<![\d.,−-])(\d+(?:\.\d+)?)(?![\d.,]*\d)"
OUT_OF = r"(?:\s*(?:/|\(?out of|of)\s*(\d+))"
POINT_FIRST = re.compile(
    rf"(?:\W|_|\b(?:gets?|scores?|is|earns|deserves|receives|points?|rating|value)(?:\b|_))*?{POINT}{OUT_OF}?"
    r"(?=$|\W)(?!\s+(?!because|as|since|for|points?|and|out|with|R\d)[a-z])",
    re.I,
)
POINT_LATER = re.compile(
    rf"\b(?:scores?|points?|rating|value)\W+{POINT}{OUT_OF}?|{POINT}{OUT_OF}|\|\s*{POINT}\s*\||{POINT}\W*$",
    re.I,
)
SIX_POINTS = re.compile(
    r"(?:^|[\[:=])\W*" + r"[\s,;|]+".join([r"(\d+)(?:\s*/\s*\d+)?"] * len(POINTS)) + r"\W*$", re.M
)


def parse_scores(text):
    """One integer a rule from what the judge says; None where one is missing, no integer or out of range.

    Reads lines, tables, JSON, reasons before or after, `2/2`, "2 out of 2". The last complete set counts,
    but none behind the words "Example 1": that is quoted from the prompt.

    >>> parse_scores("R1: 2 (names the men)\\nR2: 2/2\\nR3 = 1\\n| R4 | 0 |\\n\\"R5\\": 1, R6 → 2")
    (2, 2, 1, 0, 1, 2)
    """
    _, said, answers = take_apart(text)
    text = "\n".join(said + answers).replace("\\n", "\n")
    before_example = re.split(r"\bexample \d", text, maxsplit=1, flags=re.I)[0]
    points = last_points(before_example) or last_points(text)
    if points is None or any(not 0 <= point <= most for point, most in zip(points, POINTS, strict=True)):
        return None
    return points


def last_points(text):
    """The points of the last run of rules in which each stands once, or six bare integers, or None."""
    mentions = list(RULE.finditer(text))
    if any(mention[1] for mention in mentions):
        mentions = [mention for mention in mentions if mention[1]]
    rated = []
    for n, mention in enumerate(mentions):
        end = mentions[n + 1].start() if n + 1 < len(mentions) else len(text)
        point = point_in(text[mention.end() : end])
        if point is not None:
            rated.append((int(mention[1] or mention[2]), point))
    for last in range(len(rated), len(POINTS) - 1, -1):
        run = dict(rated[last - len(POINTS) : last])
        if sorted(run) == list(range(1, len(POINTS) + 1)):
            return tuple(run[rule] for rule in sorted(run))
    bare = SIX_POINTS.findall(text)
    return tuple(map(int, bare[-1])) if bare and len(rated) < 2 else None


def point_in(text):
    """The number that a rule gets in what is said of it, or None. −1, out of range, if it is no integer."""
    later = list(POINT_LATER.finditer(text))
    match = POINT_FIRST.match(text) or (later[-1] if later else None)
    if match is None:
        return None
    number = float(next(group for group in match.groups() if group))
    return int(number) if number.is_integer() else -1


# -------------------------------------------------------------------------------- rewards (Eq. 2–5)


# Each part is a pure function of a Response and the gold quintuples; 04_grpo.py adds them up (Eq. 5).


def answer_counts(response, gold):
    """Whether an answer can earn accuracy and partial reward ("invalid quintuple structure is assigned a
    reward of zero"): well formed, all items quintuples, no talk around them, not empty if there is gold."""
    if response.malformed or response.stray:
        return False
    return response.well_formed and bool(response.quintuples or not gold)


def accuracy_reward(response, gold):
    """Eq. 2: 2c / (m + n), 0 … 1; m gold and n predicted quintuples, repeats counted, c the size of their
    multiset intersection. Nothing to find and nothing said is 1 [ours].

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
    """Eq. 3 and 4: w / 5n + 1 − ED(Ŷ, Y) / max(|Ŷ|, |Y|), 0 … 2; w of matched_components, ED the Levenshtein
    distance in characters between the answer and the canonical gold answer.

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
    """w of Eq. 3: the equal components of pred and gold, paired one to one so that there are most [ours].

    pred, gold: quintuples, in any number. An integer, 0 … 5·min(m, n).
    """
    equal = [[sum(a == b for a, b in zip(p, g, strict=True)) for g in gold] for p in pred]
    return best_assignment(equal)


def best_assignment(worth):
    """The highest sum of worth[i][j] over pairs (i, j) in which no row i and no column j occurs twice.

    Kuhn–Munkres: each row in turn finds the cheapest augmenting path, potentials keep the reduced costs ≥ 0.
    O(min² · max) for a table of min × max, so a gold set of 21 against a runaway answer of hundreds takes
    milliseconds. SciPy's linear_sum_assignment does the same; 01 and 02 run without SciPy.
    """
    if not worth or not worth[0]:
        return 0
    if len(worth) > len(worth[0]):
        worth = [list(column) for column in zip(*worth, strict=True)]
    rows, columns = range(1, len(worth) + 1), range(1, len(worth[0]) + 1)  # 0 is the free row, and the start
    row_potential = [0] * (len(rows) + 1)
    column_potential = [0] * (len(columns) + 1)
    row_of = [0] * (len(columns) + 1)  # column → the row that has it
    for row in rows:
        row_of[0] = row
        column = 0
        cheapest = [float("inf")] * (len(columns) + 1)  # column → the cost of the cheapest path to it
        reached_from = [0] * (len(columns) + 1)  # column → the column before it on that path
        visited = [False] * (len(columns) + 1)
        while row_of[column]:
            visited[column] = True
            here = row_of[column]
            open_columns = [k for k in columns if not visited[k]]
            for k in open_columns:
                cost = -worth[here - 1][k - 1] - row_potential[here] - column_potential[k]
                if cost < cheapest[k]:
                    cheapest[k] = cost
                    reached_from[k] = column
            column = min(open_columns, key=cheapest.__getitem__)
            step = cheapest[column]
            for k in range(len(columns) + 1):
                if visited[k]:
                    row_potential[row_of[k]] += step
                    column_potential[k] -= step
                else:
                    cheapest[k] -= step
        while column:  # along the path, each column goes to the row that reached it
            row_of[column] = row_of[reached_from[column]]
            column = reached_from[column]
    return sum(worth[row_of[k] - 1][k - 1] for k in columns if row_of[k])


# -------------------------------------------------------------------------------- metrics (§4)


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

    predictions, golds: one list of Quintuples an example, in the same order. An unparsable response is an
    empty list: it stays in. → {metric: {precision, recall, f1, tp, pred, gold}}.
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
