"""The signs of written lists: brackets, quotes, separators, bullets, keys. Knows what none of the words mean
but those of keys ("head", "subject type"), and no label.
"""

import functools
import json
import re
from typing import NamedTuple

SAME = "[[[[[[({({<<<<"  # the kind of each bracket
OPENERS = dict(zip("[［【〔「『({（｛<《〈⟨", SAME, strict=True))  # opening bracket → its kind
CLOSERS = dict(zip("]］】〕」』)}）｝>》〉⟩", SAME, strict=True))  # closing bracket → what it closes
LEFT = re.escape("".join(OPENERS))
RIGHT = re.escape("".join(CLOSERS))
TAKEN = "\x01"  # fills the place of a bracket that has been read
BLANK = " \t\r\n\u200b\u200c\u200d\u2060\ufeff"  # white space and signs without width
QUOTED = (  # a string in quotes, between two of: separator, bracket, end of the line
    rf"(?:^|(?<=[\n,，、;；:：|=>.*{LEFT}{RIGHT}{TAKEN}])|(?<=[\s,，、;；:：|=>.*{LEFT}{RIGHT}{TAKEN}-]\s))"
    r"""(?:"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.|(?<=\w)'(?=\w))*'"""
    r"""|“[^“”\n]*”|‘(?:[^‘’\n]|’(?=\w))*’|`[^`\n]*`)"""
    rf"(?=\s*(?:[,，、;；:：|=→#/–—{LEFT}{RIGHT}{TAKEN}.*-]|$|and\b))"
)
SEPARATOR = rf"(<\|>|\|+|##|[,，、;；\t\n]|{TAKEN}+|\s[-–—/]+\s|[-–—=]+>|[→⟶⇒]|\sand\s)"
STRING = re.compile(QUOTED, re.M)
BRACKET = re.compile(rf"{QUOTED}|<(?=[\w\"'@#(\[])|(?<![-–—=])>|[{LEFT}{RIGHT}](?<![<>])", re.M)
INNERMOST = re.compile(rf"[{LEFT}]([^{LEFT}{RIGHT}]*)[{RIGHT}]")
PIECES = re.compile(f"{QUOTED}|{SEPARATOR}", re.M)
ALL_PIECES = re.compile(f"{QUOTED}|{SEPARATOR[:-1]}|[:：{LEFT}{RIGHT}])", re.M)  # brackets and colons too
LETTER = re.compile(r"[^\W\d_①-⑳]")
BULLET = re.compile(r"(?:\s|[-*•·▪‣◦+–—]+\s|\(?\d{1,3}[.):、）](?!\d)|\|\s*\d{1,3}\s*(?=\|)|[①-⑳])*")
LABEL = re.compile(  # "Quintuple 1:", "Here are the final answers:", "The result is"
    r"\W*(?:\b(?:the|my|here|is|are|following|final|extracted|correct)\b\W*)*?"
    r"\b(?:answer|output|result|quintuple|tuple|relation|item|list|prediction|response|solution)s?\b\W*"
    r"(?:\b\d+\b)?\W*(?:\b(?:is|are)\b|[:：=]|\s[-–—]\s)[\s*]*",
    re.I,
)
REWRITES = [  # what is only another way to write a line break or a bracket
    (re.compile(pattern, re.I), replacement)
    for pattern, replacement in (
        (TAKEN, " "),
        (r"```(?:[\w+-]*[ \t]*(?=\n)|(?:json|python|text|xml|csv|markdown|yaml)\b)?|~~~", "\n"),
        (r"(?<!\\)(?:\\r)?\\n|\r\n?", "\n"),
        (r"<(\w+)>([^<>\n]*)</\1>", r"\n\1: \2\n"),
        (r"<[|｜][^|｜<>\s]{1,40}[|｜]>", "\n"),
        (r"</?(?:s|br|p|b|i|[uo]l|li|pre|code|output|results?|\w*tuples?)\s*/?>", "\n"),
        (r"\\(?:left|right)\b|\\(?:text\w*|math\w*)\{([^{}]*)\}", r"\1"),
        (r"\\[a-z]+\{", "{"),
        (r"\\([\[\](){}])", r"\1"),
        (r"((?:[\[\](){}<>,;|\"'`]\s*){1,4}?)\1{5,}", r"\1\1\1"),  # a runaway answer
    )
]
KEY = re.compile(  # `"head":`, `head=`, `- **Head Type**:`, `| Head |`; group 1 a quote, group 2 the key
    rf"(?:^|[\n,，;；|({TAKEN}（{{\[])(?:[ \t*•·+>#|-]|\d{{1,3}}[.)])*([\"'`“]?)\**"
    r"([A-Za-z][A-Za-z0-9 _-]{0,30}?)\**[\"'`”]?\s*(?:[:：]|=>?|\|)\**(?!/)"
)
KEY_WORDS = {  # what a word of a key says: a side (0 head, 2 tail), or what it holds of it
    0: re.compile("head|subj(?:ect)?|source|src|from|h|s|beg(?:in)?|first|1"),
    2: re.compile("tail|obj(?:ect)?|target|tgt|to|t|o|sec(?:ond)?|2"),
    "relation": re.compile("relation(?:s|ship)?|rel|predicate|r"),
    "type": re.compile("types?|category|class|label|tags?"),
    "name": re.compile("name|text|ent(?:ity)?|e|id|mention|value|span|node|arg|of|the"),
}


class Piece(NamedTuple):
    text: str
    start: int
    end: int
    before: str  # the separator before it


def rewritten(text):
    """`text` with one spelling of line breaks and brackets, and without fences and markup."""
    first_quote = text.find('"')
    if first_quote > 0 and text[first_quote - 1] == "\\":  # JSON within a string
        text = text.replace('\\"', '"')
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    return text


def pieces(text, pattern=PIECES):
    """`text` cut at its separators; pieces without content are left out."""
    found = []
    start = 0
    before = ""
    for match in pattern.finditer(text):
        if match[1]:  # a separator, not a string in quotes
            found.append(Piece(text[start : match.start()], start, match.start(), before))
            start = match.end()
            before = match[1]
    found.append(Piece(text[start:], start, len(text), before))
    return [piece for piece in found if piece.text.strip(BLANK + "*`$")]


def unquoted(text):
    """What a string in quotes says; in double quotes as JSON reads it."""
    body = text[1:-1].replace("\\'", "'")
    if text[0] == '"':
        try:
            body = json.loads(text, strict=False)
        except ValueError:
            body = body.replace('\\"', '"')
    return re.sub("[\ud800-\udfff]", "\ufffd", body)  # half a character, which no file can hold


def bare(text):
    """A field without the signs around it; "" where a bracket without its partner sticks to it."""
    text = text.strip(BLANK)
    if not STRING.fullmatch(text):
        text = text.strip(BLANK + "*`")
    if STRING.fullmatch(text):
        return unquoted(text)
    if len(text) > 1 and text[0] + text[-1] in ('""', "''", "“”", "‘’", "$$"):
        text = text[1:-1]
    opened = text[:1] in OPENERS and not any(CLOSERS.get(sign) == OPENERS[text[0]] for sign in text)
    closed = text[-1:] in CLOSERS and not any(OPENERS.get(sign) == CLOSERS[text[-1]] for sign in text)
    return "" if opened or closed else re.sub(r"\\([_&#*$%])", r"\1", text)


def outer(text):
    """A field that was cut out of brackets, without them."""
    return bare(text.strip(BLANK + "*`" + "".join(OPENERS) + "".join(CLOSERS)))


def unlabelled(text):
    """Without what announces an answer."""
    label = LABEL.match(text)
    return text[label.end() :] if label else text


@functools.lru_cache(maxsize=1024)
def role(key):
    """What a key names: a place in the quintuple, "name" or "type" of an entity named elsewhere, or None.

    >>> [role(key) for key in ("head_type", "e2", "relationType", "name", "confidence")]
    [1, 2, 4, 'name', None]
    """
    words = re.findall(r"[a-z]+|\d", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", key).lower())
    if words in (["t", "1"], ["t", "2"]):
        return 1 if words[1] == "1" else 3
    meanings = [what for word in words for what, spelled in KEY_WORDS.items() if spelled.fullmatch(word)]
    sides = {meaning for meaning in meanings if meaning in (0, 2)}
    if not words or len(meanings) < len(words) or len(sides) + ("relation" in meanings) > 1:
        return None
    if "relation" in meanings:
        return 4
    if sides:
        return sides.pop() + ("type" in meanings)
    return "type" if "type" in meanings else "name"
