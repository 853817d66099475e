"""What models write around quintuples: thoughts and tags, parts under headings, the points of a judge.

Knows the spellings of these, but no prompt: headings and the number of rules come from common.
"""

import re

# -------------------------------------------------------------------------------- thoughts and answers

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
TAG = re.compile("|".join(TAGS))
WELL_FORMED = re.compile(r"\s*<think>(.*)</think>\s*<answer>.*</answer>\s*", re.S)
# as other models spell <think> and </think>
NAME = r"(?:seed:)?(?:think(?:ing)?|thoughts?|reasoning)"
OPENED = rf"[<◁]\s*{NAME}\s*[>▷]|\[THINK\]|<\|begin_of_thought\|>"
CLOSED = rf"[<◁]\s*/\s*{NAME}\s*[>▷]|\[/THINK\]|<\|end_of_thought\|>"
CHANNEL = r"<\|channel\|>(?:analysis|(final))(?:<\|message\|>)?"  # gpt-oss's
THOUGHT_TAG = re.compile(rf"{OPENED}|({CLOSED})|{CHANNEL}", re.I)
ANSWER_TAG = re.compile(r"<\s*(/?)\s*answer\s*>", re.I)


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
            thoughts += said
            said.clear()
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


# -------------------------------------------------------------------------------- parts under headings

SIGN = r"(?:[^\w\n]|_)"
NUMBERING = rf"{SIGN}*(?:(?:part|step|section){SIGN}*)?(?:(?:\d{{1,2}}|[ivx]{{1,3}}){SIGN}+)?"
COURTESY = re.compile(
    r"\W*(?:(?:i )?hope (?:this|that)|let me know|feel free|please (?:let|feel)|if you (?:need|have|want)"
    r"|is there any|would you like|thank)[^\n]*|\W*",
    re.I,
)


def heading_pattern(headings):
    """A heading of a part, however it is marked; it fills its line, or a colon or a dash ends it."""
    words = "|".join((SIGN + "{0,3}").join(re.findall(r"\w+", heading)) for heading in headings)
    return re.compile(  # group 1 holds its words
        rf"^{NUMBERING}({words})(?:[ *_]*\([^()\n]*\))?"
        rf"(?:(?:[^\w\n:：]|_)*[:：]\**[ \t]*|{SIGN}*$|[ \t*_]+[-–—]+[ \t]+)",
        re.I | re.M,
    )


def cut_at_headings(text, pattern):
    """→ [(the letters of a heading, the body under it)]; what stands before the first heading is left out."""
    text = re.sub(r"</?(?:b|i|u|em|strong|h\d)>", "", text.replace("\r\n", "\n"))
    pieces = pattern.split(text)  # [before, heading, body, heading, body, …]
    headings = map(only_letters, pieces[1::2])
    return list(zip(headings, map(without_rules, pieces[2::2]), strict=True))


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


# -------------------------------------------------------------------------------- points

RULE = re.compile(
    r"(?<![^\W_])(?:R_?|Rule[\s\"':#_-]{0,9}|Criterion\s{0,9})(\d{1,2})(?!\d)(?:\s*\([^()\n]*\))?"
    r"|^[^\w\n]*(\d)[.):](?=\s)",
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


def points(text, rules):
    """The points that a judge gives rules 1 … `rules`, or None where one has none; −1 for no integer.

    The last complete set counts, but none behind the words "Example 1": that is quoted from the prompt.
    """
    _, said, answers = take_apart(text)
    text = "\n".join(said + answers).replace("\\n", "\n")
    before_example = re.split(r"\bexample \d", text, maxsplit=1, flags=re.I)[0]
    return last_points(before_example, rules) or last_points(text, rules)


def last_points(text, rules):
    """The points of the last run of rules in which each stands once, or as many bare integers, or None."""
    mentions = list(RULE.finditer(text))
    if any(mention[1] for mention in mentions):
        mentions = [mention for mention in mentions if mention[1]]
    rated = []
    for n, mention in enumerate(mentions):
        end = mentions[n + 1].start() if n + 1 < len(mentions) else len(text)
        point = point_in(text[mention.end() : end])
        if point is not None:
            rated.append((int(mention[1] or mention[2]), point))
    for last in range(len(rated), rules - 1, -1):
        run = dict(rated[last - rules : last])
        if sorted(run) == list(range(1, rules + 1)):
            return tuple(run[rule] for rule in sorted(run))
    number = r"(\d+)(?:\s*/\s*\d+)?"
    bare = re.findall(r"(?:^|[\[:=])\W{0,9}" + r"[\s,;|]+".join([number] * rules) + r"\W*$", text, re.M)
    return tuple(map(int, bare[-1])) if bare and len(rated) < 2 else None


def point_in(text):
    """The number that a rule gets in what is said of it, or None. −1, out of range, if it is no integer."""
    later = list(POINT_LATER.finditer(text))
    match = POINT_FIRST.match(text) or (later[-1] if later else None)
    if match is None:
        return None
    number = float(next(group for group in match.groups() if group))
    return int(number) if number.is_integer() else -1
