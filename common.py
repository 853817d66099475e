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

from lib import leaks, prose, reader, signs

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


def visible(text):
    """`text` with what a terminal would obey or hide written out: escape codes, line breaks, bidi marks.

    >>> visible("a" + chr(27) + "[31m")
    'a\\\\x1b[31m'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Parser(argparse.ArgumentParser):
    """argparse with a script's docstring and all defaults in --help; one line for a wrong argument."""

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
    """Decorate `main(args)`: exit codes 0 done, 1 some rows failed, 2 input, 3 stopped.

    No traceback for what a user can cause.
    """

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
    thoughts, said, answers = prose.take_apart(text)
    if answers:
        given = [answer for answer in answers if answer.strip(signs.BLANK)]
        answer = given[-1] if given else ""
    else:
        answer = "".join(said) if direct or thoughts else ""
    found = READER.read(answer)
    return Response(
        think="\n".join(thoughts).strip(),
        answer=answer.strip(signs.BLANK),
        quintuples=tuple(quintuple(*item) for _, item in found.items),
        malformed=found.malformed,
        stray=found.stray,
        well_formed=is_well_formed(text, direct),
    )


def is_well_formed(text, direct):
    """The format of Eq. 5. direct: no thoughts, and no answer tags or one pair around everything."""
    counts = [text.count(tag) for tag in prose.TAGS]
    if direct:
        around = text.strip().startswith("<answer>") and text.strip().endswith("</answer>")
        return counts == [0, 0, 0, 0] or (counts == [0, 0, 1, 1] and around)
    match = prose.WELL_FORMED.fullmatch(text)
    return counts == [1, 1, 1, 1] and match is not None and bool(match[1].strip())


# -------------------------------------------------------------------------------- chains, judgements

COT_HEADING = prose.heading_pattern(COT_PARTS)


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
    pieces = prose.cut_at_headings(text, COT_HEADING)
    headings = [heading for heading, _ in pieces]
    bodies = [body for _, body in pieces]
    if headings != list(map(prose.only_letters, COT_PARTS)) or not all(bodies):
        return None
    if any(tag in text.lower() for tag in prose.TAGS):
        return None
    return "\n".join(f"{part}: {body}" for part, body in zip(COT_PARTS, bodies, strict=True))


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
    found = (match[0].lower() for match in leaks.LEAK.finditer(cot))
    return next((phrase for phrase in found if phrase not in text.lower()), None)


def parse_scores(text):
    """One integer a rule from what the judge says; None where one is missing, no integer or out of range.

    Reads lines, tables, JSON, reasons before or after, `2/2`, "2 out of 2". The last complete set counts,
    but none behind the words "Example 1": that is quoted from the prompt.

    >>> parse_scores("R1: 2 (names the men)\\nR2: 2/2\\nR3 = 1\\n| R4 | 0 |\\n\\"R5\\": 1, R6 → 2")
    (2, 2, 1, 0, 1, 2)
    """
    points = prose.points(text, len(POINTS))
    if points is None or any(not 0 <= point <= most for point, most in zip(points, POINTS, strict=True)):
        return None
    return points


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
            predicted = keys(predicted)
            wanted = keys(wanted)
            tp += len(predicted & wanted)
            pred += len(predicted)
            gold += len(wanted)
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
