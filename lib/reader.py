"""Lists of quintuples as models write them: in brackets, JSON, tables, lines, arrows, with talk around.

However an item is written, it holds two names, two types and a relation, and types and relations come from
closed sets. So a text is cut at its brackets, quotes and separators, and the reader looks for those five.
Knows no prompt and no reward, and no label but those that common hands it; a synonym stays what it is.
"""

import re
from types import SimpleNamespace

from lib.signs import (
    ALL_PIECES,
    BLANK,
    BRACKET,
    BULLET,
    CLOSERS,
    INNERMOST,
    KEY,
    LEFT,
    LETTER,
    OPENERS,
    PIECES,
    RIGHT,
    STRING,
    TAKEN,
    bare,
    outer,
    pieces,
    rewritten,
    role,
    unlabelled,
    unquoted,
)

MOST_READ = 50_000  # characters; what follows in a longer answer counts as one malformed item
BETWEEN = re.compile(r"\b(?:the )?relation(?:ship)? between\b", re.I)
FINAL = re.compile(
    r"^[ \t#*_>-]*(?:the )?final (?:answer|output|result|quintuple|list)s?\b[^\n:：]{0,20}(?:[:：]|$)",
    re.I | re.M,
)
SHRUG = re.compile(r"[?？…]|\.\.")  # without a word or a whole bracket it says neither this nor that
NOTHING = re.compile(
    r"\W*(?:there (?:is|are) )?(?:none|no|null|nil|n/?a|nothing|empty|无|没有)?(?: ?(?:list|set|answer))?\W*"
    r"|.*\b(?:none|nothing|no|not|cannot|\w+n['’]t)\b[^.\n]*\b"
    r"(?:found|extracted|quintuples?|relations?(?:hips?)?|tuples?|entit(?:y|ies)|pairs?)\b.*",
    re.I | re.S,
)
# The pieces of a text as letters: N a name, T a type, R a relation; M, U, S the same behind a semicolon, and
# n, t, r behind a line break. An item is then a word: head (h), its type (a), tail (t), its type (b),
# relation (r), in one of five orders.
KINDS = {
    ";": str.maketrans("NTR", "MUS"),
    "；": str.maketrans("NTR", "MUS"),
    "\n": str.maketrans("NTR", "ntr"),
}
NAME = "[nrNRMS][NRMS]{0,30}"
ITEM = re.compile(
    rf"(?P<h0>{NAME})(?P<a0>[tTU])(?P<t0>{NAME})(?P<b0>[tTU])(?P<r0>[rRS]|[nNM](?=$|[ntrMUS]))"
    r"([NR]+(?=[MS]))?"
    rf"|(?P<h1>{NAME})(?P<a1>[tTU])(?P<r1>[rRS])(?P<t1>{NAME})(?P<b1>[tTU])"
    rf"|(?P<r2>[rRS])(?P<h2>{NAME})(?P<a2>[tTU])(?P<t2>{NAME})(?P<b2>[tTU])"
    r"|(?P<h3>[nrNRMS])(?P<t3>[nrNRMS])(?P<a3>[tTU])(?P<b3>[tTU])(?P<r3>[rRS])"
    rf"|(?P<h4>{NAME})(?P<r4>[rRS])(?P<t4>{NAME})(?P<a4>[tTU])(?P<b4>[tTU])"
)


def closes(kind, opened):
    """Whether a closing bracket has its partner among the opened ones; ) and > only in the last."""
    return kind in opened if kind in "[{" else kind in opened[-1:]


class Reader:
    """Reads lists of (name, type, name, type, relation) of one label set. aliases: {spelling: label}."""

    def __init__(self, types, relations, aliases):
        labels = {label: label for label in (*types, *relations)} | aliases
        self.types = {spelling: label for spelling, label in labels.items() if label in types}
        spellings = [spelling for spelling, label in labels.items() if label in relations]
        self.relations = {spelling.replace(" ", ""): labels[spelling] for spelling in spellings}
        a_type = f"({'|'.join(self.types)})"
        longest_first = sorted(spellings, key=len, reverse=True)
        a_relation = f"({'|'.join(longest_first)})".replace(" ", r"[\s_\\-]*")
        self.type_word = re.compile(rf"\b{a_type}\b", re.I)
        self.type = re.compile(rf"[\W_]*{a_type}(?:\W*[(/]\W*{a_type})?[\W_]*", re.I)
        self.type_in_brackets = re.compile(rf"\s*[{LEFT}]\W{{0,3}}{a_type}\W{{0,3}}[{RIGHT}]", re.I)
        self.after_type = re.compile(rf"\|\s*(?:is\s)?(?:an?\s|the\s)?{a_relation}\s+(?:the\s)?", re.I)
        self.relation = re.compile(
            rf"\W*(?:(?:relation\W+)?is\W+)?(?:/?\w+/\w+/)?{a_relation}\s*($|[^\w\s].*|\n.*)", re.I | re.S
        )

    def type_of(self, text):
        """'PER.', '"per"', 'org (organization)' → the type, or None."""
        match = self.type.fullmatch(text)
        if match is None or len(text) > 40:
            return None
        labels = {self.types[word.lower()] for word in match.groups() if word}
        return labels.pop() if len(labels) == 1 else None

    def relation_of(self, text):
        """→ (the relation that `text` begins with, the comment after it), or None."""
        match = self.relation.match(text)
        if match is None:
            return None
        spelling = re.sub(r"[\W_]", "", match[1]).lower()
        return self.relations[spelling], match[2]

    def kind(self, piece):
        """The letter of a piece, see ITEM."""
        kind = "N"
        if self.type_of(piece.text):
            kind = "T"
        elif self.relation_of(piece.text):
            kind = "R"
        before = piece.before.replace(TAKEN, "\n")[:1]
        return kind.translate(KINDS.get(before, {}))

    def add(self, found, place, head, head_type, tail, tail_type, relation):
        """Take in an item: names as meant, labels as they stand in the text. An empty field is a fault."""
        head_type = self.type_of(head_type) or bare(head_type)
        tail_type = self.type_of(tail_type) or bare(tail_type)
        label, comment = self.relation_of(relation) or (bare(relation), "")
        item = (head, head_type, tail, tail_type, label)
        found.stray += LETTER.search(comment) is not None
        if all(field.strip() for field in item):
            found.items.append((place, item))
        else:
            found.malformed += 1

    def read(self, text):
        """An answer → what was found in it: items, malformed, stray, empty.

        items: (place in the text, five strings); malformed: how many items are no quintuple; stray: how many
        pieces are talk; empty: whether `[]` or its like stands there.
        """
        found = SimpleNamespace(items=[], malformed=0, stray=0, empty=False)
        text = rewritten(text)
        if SHRUG.search(text) and not re.search(r"\w|[\[({]\s*[\])}]", text):
            found.malformed = 1
            return found
        finals = [match.end() for match in FINAL.finditer(text)]
        if finals and re.search(r"\w", text[finals[-1] :]):
            text = text[finals[-1] :]
            found.stray += 1
        found.malformed += len(text) > MOST_READ
        rest = self.lines(self.brackets(text[:MOST_READ], found), found)
        talk = [line for line in rest if LETTER.search(line.replace(" and ", ""))]
        if talk and not found.items and not found.malformed:
            whole = [BULLET.sub("", line, count=1) for line in rest]
            if self.fields("\n".join(whole), found, 0):
                talk = []  # it was one item, a field a line
        if not found.items:
            said = [line for line in talk if len(line) > 300 or not NOTHING.fullmatch(unlabelled(line))]
            found.empty = found.empty or len(said) < len(talk)
            talk = said
            if talk and not found.empty and not found.malformed:
                found.malformed = 1
        found.stray += len(talk)
        found.items.sort(key=lambda item: item[0])
        return found

    def fields(self, text, found, place):
        """Read the items of a stretch of text from its pieces → whether there are any."""
        if len(self.type_word.findall(text)) < 2:
            return False
        if self.word(text, PIECES, "", found, place):
            return True
        if len(text) > 1000 or TAKEN in text:
            return False
        typed = self.type_in_brackets.sub(r"|\1|", BETWEEN.sub("", text))
        typed = self.after_type.sub(r"|\1|", typed)  # Ann Lee (per) is a member of Acme (org)
        if self.word(typed, PIECES, ".", found, place):
            return True
        return self.word(text, ALL_PIECES, ".", found, place)

    def word(self, text, pattern, end, found, place):
        """Read the items of a text cut by `pattern`. end: "" if the last piece may be an unknown relation."""
        parts = [part for part in pieces(text, pattern) if re.search(r"\w", part.text)]
        kinds = "".join(map(self.kind, parts))
        if not end and len(parts) == 5 and kinds[1] in "tTU" and kinds[3] in "tTU":
            kinds = "NTNTR"  # whatever the others read like
        matches = list(ITEM.finditer(kinds + end))
        for match in matches:
            self.item(text, parts, match, found, place)
        if matches:
            left = ITEM.sub(lambda match: "_" * len(match[0]), kinds)
            talk = {kind for kind, part in zip(left, parts, strict=True) if LETTER.search(part.text)}
            found.malformed += not talk.isdisjoint("tTU")
            found.stray += not talk.issubset("_")
        return bool(matches)

    def item(self, text, parts, match, found, place):
        """Read the item that ITEM matched. A name is all that stands from its first piece to its last."""
        raw = {}
        for name, kinds in match.groupdict().items():
            if kinds:
                own = parts[match.start(name) : match.end(name)]
                raw[name[0]] = text[own[0].start : own[-1].end]
                if name[0] == "h" and own[0].before == "\n":
                    raw["h"] = BULLET.sub("", raw["h"], count=1)
        head = unlabelled(raw["h"])
        head = bare(head) or outer(head)  # its bracket may not have been closed
        tail = bare(raw["t"])
        if {raw["a"].strip()[-1], raw["b"].strip()[-1]} <= CLOSERS.keys():  # (name, type), (name, type)
            tail = outer(raw["t"])
        place += parts[match.start()].start
        self.add(found, place, head, raw["a"], tail, raw["b"], raw["r"])

    def keyed(self, text, found, place):
        """Read items whose parts have names: objects, keyword arguments, `Head: …` → whether there is any."""
        marks = []
        for match in KEY.finditer(text):
            name = role(match[2].strip())
            if name is not None or match[1] or match[0][0] == "\n":
                marks.append((name, match))
        if len({name for name, _ in marks} - {None}) < 3:
            return False
        ends = [match.start() for _, match in marks[1:]]
        ends.append(len(text))
        items = [{}]
        side = None  # 0 or 2: the name to which "name" and "type" belong
        for (name, match), end in zip(marks, ends, strict=True):
            value = text[match.end() : end].strip(BLANK + ",;，；|")
            fields = items[-1]
            if name == "name":
                name = side if side is not None and side not in fields else 2 * (0 in fields)
            elif name == "type":
                name = side + 1 if side is not None and side + 1 not in fields else 4
                if name in fields:
                    continue
            side = name if name in (0, 2) else side
            if name is None or value in ("null", "None") or not re.search(r"\w", value):
                continue
            if name in fields:
                items.append({})
            items[-1][name] = value
        sizes = set()
        for fields in map(self.with_types, items):
            sizes.add(len(fields))
            if len(fields) == 5:
                self.add(found, place, *map(fields.get, range(5)))
            found.malformed += 2 < len(fields) < 5
        return max(sizes) > 2

    def with_types(self, fields):
        """Values as meant; a name beside its type, `Ann Lee (per)` or `["Ann Lee", "per"]`, gives both."""
        result = {}
        for k, value in fields.items():
            string = STRING.match(value)
            whole = unquoted(string[0]) if string else value.partition("\n")[0]
            result[k] = whole if string else outer(whole)
            typed = self.type_in_brackets.sub(r"|\1|", whole[:1000])
            *name, last = pieces(typed) or [None]
            if k in (0, 2) and k + 1 not in fields and name and self.type_of(last.text):
                result[k] = outer(typed[: name[-1].end])
                result[k + 1] = last.text
        return result

    def nested(self, text, found, place):
        """Read items that stand whole in strings: `["Ann Lee, per, Acme, …"]` → whether there are any."""
        strings = [match[0] for match in STRING.finditer(text)]
        readings = [self.read(unquoted(string)) for string in strings if self.type_word.search(string)]
        if not any(inner.items for inner in readings):
            return False
        for inner in readings:
            found.items += [(place, item) for _, item in inner.items]
            found.malformed += inner.malformed
            found.stray += inner.stray
        return True

    def five(self, text, found, place):
        """Read five fields of unknown labels: a wrong item, or the prompt's template → whether it is five."""
        fields = [bare(piece.text) for piece in pieces(text)]
        if len(fields) != 5:
            return False
        if None in map(role, fields):
            self.add(found, place, *fields)
        else:
            found.stray += 1
        return True

    def brackets(self, text, found):
        """Read what stands in brackets, innermost first → `text` with TAKEN in the place of what was read."""
        stack = [(0, "", [])]  # open brackets: (place, sign, the text in it so far)
        last = 0
        for match in BRACKET.finditer(text):
            sign, place = match[0], match.start()
            kinds = [OPENERS.get(opener) for _, opener, _ in stack]
            if sign in OPENERS and len(stack) < 20:
                stack[-1][2].append(text[last:place])
                stack.append((place, sign, []))
                last = match.end()
            elif sign in CLOSERS and closes(CLOSERS[sign], kinds):
                stack[-1][2].append(text[last:place])
                last = match.end()
                while OPENERS.get(stack[-1][1]) != CLOSERS[sign]:  # one that was not closed
                    _, unclosed, parts = stack.pop()
                    stack[-1][2].extend([unclosed, *parts])
                begin, opener, parts = stack.pop()
                inside = "".join(parts)
                if self.bracket(inside, OPENERS[opener], text, begin, len(stack) == 1, found):
                    stack[-1][2].append(TAKEN * (last - begin))
                else:
                    stack[-1][2].extend([opener, inside, sign])
        stack.append((last, text[last:], []))
        return "".join(sign + "".join(parts) for _, sign, parts in stack)

    def bracket(self, inside, kind, text, begin, at_root, found):
        """Read one bracket → whether it was read; otherwise it belongs to the text around it."""
        words = inside.replace(TAKEN, "")
        if len(words) < 40 and NOTHING.fullmatch(unlabelled(words)):
            found.empty = found.empty or TAKEN not in inside
            return True
        if not at_root and kind in "(<" and text[begin - 1] not in " \n,;:=([{\"'":
            return False  # part of a name
        long_enough = len(inside) > 8  # five fields and four separators
        if long_enough and self.keyed(inside, found, begin):
            return True
        if kind == "{" and TAKEN in inside:  # what has another key is not asked for
            return True
        if long_enough and self.fields(inside, found, begin):
            return True
        unread = sum("," in match[1] for match in INNERMOST.finditer(inside))
        if TAKEN in inside:
            found.malformed += unread
            found.stray += bool(LETTER.search(words))
            return True
        before = text[max(0, begin - 80) : begin].rpartition("\n")[2]
        in_sentence = kind == "(" and at_root and LETTER.search(unlabelled(before))
        if self.nested(inside, found, begin):
            return True
        if not in_sentence and self.five(inside, found, begin):
            return True
        is_label = self.type_of(inside) or self.relation_of(inside) or not LETTER.search(inside)
        is_item = kind == "[" or (not in_sentence and kind != "<" and len(pieces(inside)) > 2)
        if len(inside) > 5000 or (at_root and is_item and not is_label):
            found.malformed += unread or 1
            return True
        return False

    def lines(self, text, found):
        """Read what stands in no brackets: bare items, tables, `Head: …` → the lines without any."""
        block = []  # neighbouring lines with keys
        rest = []
        place = 0
        for line in [*text.split("\n"), "the end"]:
            body = line[BULLET.match(line).end() :].strip(BLANK + "*`$")
            key = KEY.match(body)
            in_row = key and key[0].strip("* ")[-1] == "|" and body.count("|") > 3  # the head of a table
            if key and role(key[2].strip()) is not None and not in_row:
                block.append(body)
            elif LETTER.search(body):
                if self.keyed("\n".join(block), found, place):
                    block = []
                rest += [body for body in (*block, body) if not self.line(body, found, place)]
                block = []
            place += len(line) + 1
        return rest[:-1]

    def line(self, body, found, place):
        """Read one line → whether an item was in it."""
        text = unlabelled(body)
        read = self.fields(text, found, place) or self.nested(text, found, place)
        found.stray += read and text != body
        return read
