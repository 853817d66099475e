"""The signs of written lists: brackets, quotes, separators, bullets, keys. Knows what none of the words mean
but those of keys ("head", "subject type"), and no label.
"""

import json
import re

SAME = "[[[[[[({({<<<<"  # the kind of each bracket
OPENERS = dict(zip("[［【〔「『({（｛<《〈⟨", SAME, strict=True))  # opening bracket → its kind
CLOSERS = dict(zip("]］】〕」』)}）｝>》〉⟩", SAME, strict=True))  # closing bracket → what it closes
LEFT = re.escape("".join(OPENERS))
RIGHT = re.escape("".join(CLOSERS))
BLANK = " \t\r\n\u200b\u200c\u200d\u2060\ufeff"  # white space and signs without width
QUOTED = (  # a string in quotes, between two of: separator, bracket, end of the line
    rf"(?:^|(?<=[\n,，、;；:：|=>.*{LEFT}{RIGHT}])|(?<=[\s,，、;；:：|=>.*{LEFT}{RIGHT}-]\s))"
    r"""(?:"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.|(?<=\w)'(?=\w))*'"""
    r"""|“[^“”\n]*”|‘(?:[^‘’\n]|’(?=\w))*’|`[^`\n]*`)"""
    rf"(?=\s*(?:[,，、;；:：|=→#/–—{LEFT}{RIGHT}.*-]|$|and\b))"
)
STRING = re.compile(QUOTED, re.M)
SIGN = re.compile(  # group 1: a bracket or a separator; a string has none
    rf"{QUOTED}|(<\|>|\|+|##|[,，、;；:：\t\n]|=>?|\s[-–—/]+\s|[-–—=]{{1,9}}>|[→⟶⇒]|\sand\s|[{LEFT}{RIGHT}])",
    re.M,
)
AFTER_KEY = (":", "：", "=", "=>")
LETTER = re.compile(r"[^\W\d_①-⑳]")
LABEL = re.compile(  # "Quintuple 1:", "Here are the final answers:", "The result is", "The relation between"
    r"(?:\W*(?:\b(?:the|my|here|is|are|following|final|extracted|correct)\b\W*)*?"
    r"\b(?:answer|output|result|quintuple|tuple|relation(?:ship)?|item|list|prediction|response|solution)s?\b"
    r"\W*(?:\b\d+\b)?\W*(?:\b(?:is|are|between)\b|[:：=]|\s[-–—]\s)[\s*|]*){1,2}",
    re.I,
)
REWRITES = [  # what is only another way to write a line break or a bracket
    (re.compile(pattern, re.I | re.M), replacement)
    for pattern, replacement in (
        (r"```(?:\w*\s*$)?|~~~", "\n"),
        (r"(?<!\\)(?:\\r)?\\n|\r\n?", "\n"),
        (r"<(\w+)>([^<>\n]*)</\1>", r"\n\1: \2\n"),
        (r"^\|([^|\n:]*)\|([^|\n]*)\|?$", r"\1: \2"),  # a table of two columns
        (r"<[|｜][^|｜<>\s]{1,40}[|｜]>", "\n"),
        (r"</?(?:s|br|p|b|i|[uo]l|li|pre|code|output|results?|\w*tuples?)\s*/?>", "\n"),
        (r"\\(?:text|math)\w*\{([^{}]*)\}", r"\1"),
        (r"\\(?:left\b|right\b|[a-z]+(?=\{)|(?=[\[\](){}]))", ""),
        (r"^(?:\s|[-*•·▪‣◦+–—]+\s|\(?\d{1,3}[.):、）](?!\d)|\|\s*\d{1,3}\s*(?=\|)|[①-⑳])*", ""),  # bullets
        (r'(?<=[,"])[ \t]+//.*$', ""),  # a comment in JSON
        (r"^(\$\$?)(.+)\1$", r"\2"),
    )
]
MEANINGS = """\
head subj subject source src from h s beg begin first 1
tail obj object target tgt to t o sec second 2
relation relations relationship rel predicate r
type types category class label tag tags
name text ent entity e id mention value span node arg of the
"""  # words of keys; the first of a line is what all of them say
KEY_WORDS = {word: line.split()[0] for line in MEANINGS.splitlines() for word in line.split()}
PLACES = {"head": 0, "head type": 1, "tail": 2, "tail type": 3, "relation": 4, "relation type": 4}


def rewritten(text):
    """`text` with one spelling of line breaks and brackets, and without fences and markup."""
    if re.match(r'[^"]*\\"', text):  # JSON within a string
        text = text.replace('\\"', '"')
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    return text


def cuts(text):
    """The matches of SIGN outside of strings: separators, and brackets that have a partner."""
    found = [match for match in SIGN.finditer(text) if match[1]]
    opened = []
    paired = set()
    for match in found:
        sign = match[1]
        if sign in OPENERS and len(opened) < 20:
            opened.append(match)
        elif sign in CLOSERS:
            kinds = [OPENERS[opener[1]] for opener in opened]
            if CLOSERS[sign] in kinds:
                while OPENERS[opened[-1][1]] != CLOSERS[sign]:  # one that is not closed
                    opened.pop()
                paired |= {opened.pop().start(), match.start()}
    brackets = OPENERS | CLOSERS
    return [match for match in found if match[1] not in brackets or match.start() in paired]


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
    text = text.lstrip(BLANK + "*`" + "".join(OPENERS))
    return bare(text) or bare(text.rstrip(BLANK + "*`" + "".join(CLOSERS)))


def unlabelled(text):
    """Without what announces an answer."""
    label = LABEL.match(text)
    return text[label.end() :] if label else text


def role(key):
    """What a key names: a place in the quintuple, "name" or "type" of an entity named elsewhere, or None.

    >>> [role(key) for key in ("head_type", "e2", "relationType", "name", "confidence")]
    [1, 2, 4, 'name', None]
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", key).lower()
    words = re.findall(r"[a-z]+|\d", re.sub(r"\bt(?=\d)", "type", spaced))
    if not words or not all(word in KEY_WORDS for word in words):
        return None
    meaning = " ".join(sorted({KEY_WORDS[word] for word in words} - {"name"}))
    return PLACES.get(meaning, meaning or "name")
