"""Lists of quintuples as models write them: in brackets, JSON, tables, lines, arrows, with talk around.

However an item is written, it holds two names, two types and a relation, and types and relations come from
closed sets. So a text is cut once, at its brackets, quotes and separators, and the reader looks for those
five among the pieces: by the keys before them, or by their order.
Knows no prompt and no reward, and no label but those that common hands it; a synonym stays what it is.
"""

import re
from itertools import pairwise
from types import SimpleNamespace
from typing import NamedTuple

from lib import signs

MOST_READ = 50_000  # characters; what follows in a longer answer counts as one malformed item
FINAL = re.compile(
    r"^[ \t#*_>-]*(?:the )?final (?:answer|output|result|quintuple|list)s?\b[\w *]{0,20}(?:[:：]|$)",
    re.I | re.M,
)
SAID = re.compile(r"\w|[?？…]|\.\.")  # without a word, ? and … say neither this nor that
NOTHING = re.compile(
    r"(?!\W*(?:[?？…]|\.\.)\W*$)"
    r"\W*(?:there (?:is|are) )?(?:none|no|null|nil|n/?a|nothing|empty|无|没有)?(?: ?(?:list|set|answer))?\W*"
    r"|.*\b(?:none|nothing|no|not|cannot|\w+n['’]t)\b[^.\n]*\b"
    r"(?:found|extracted|quintuples?|relations?(?:hips?)?|tuples?|entit(?:y|ies)|pairs?)\b.*",
    re.I | re.S,
)
# The pieces of a text as letters: N a name, T a type (P in brackets), R a relation, each small behind a line
# break; K a key in quotes, X an item that has been read. An item is then a word: head (h), its type (a), tail
# (t), its type (b), relation (r), in one of five orders.
NAME = "[nrNR][NR]{0,30}"
ITEM = re.compile(
    rf"(?P<r0>[rR])(?P<h0>{NAME})(?P<a0>[tTP])(?P<t0>{NAME})(?P<b0>[tTP])"
    rf"|(?P<h1>{NAME})(?P<a1>[tTP])(?P<r1>[rR])(?P<t1>{NAME})(?P<b1>[tTP])(?!R)"
    rf"|(?P<h2>{NAME})(?P<a2>[tTP])(?P<t2>{NAME})(?P<b2>[tTP])(?P<r2>[rR]|(?<!P)N(?=$|[ntrxX]))"
    r"|(?P<h3>[nrNR])(?P<t3>[nrNR])(?P<a3>[tT])(?P<b3>[tT])(?P<r3>[rR])"
    rf"|(?P<h4>{NAME})(?P<r4>[rR])(?P<t4>{NAME})(?P<a4>[tT])(?P<b4>[tT])"
)


class Piece(NamedTuple):
    kind: str  # N, T, R, K or X, see ITEM
    start: int
    end: int
    text: str
    sign: str  # what ends it


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
        in_brackets = rf"(\s?[{signs.LEFT}][\s*]{{0,3}}{a_type}[\s*]{{0,3}}[{signs.RIGHT}])"
        self.type_word = re.compile(rf"\b{a_type}\b", re.I)
        self.type = re.compile(rf"[\W_]*{a_type}(?:\W*[(/]\W*{a_type})?[\W_]*", re.I)
        self.relation = re.compile(rf"\W*(?:is\W+)?(?:/?\w+/\w+/)?{a_relation}\s*($|[^\w\s].*)", re.I)
        self.typed = re.compile(rf'"([^",([\n]*){in_brackets}"', re.I)  # "Ann Lee (per)"
        verb = rf"\s?(?:is )?(?:an? |the )?{a_relation} (?:the )?(?=[\w@#\"'*])"
        self.verb = re.compile(in_brackets + verb, re.I)  # Ann Lee (per) is a member of Acme

    def type_of(self, text):
        """'PER.', '"per"', 'org (organization)' → the type, or None."""
        match = self.type.fullmatch(text)
        return self.types[match[1].lower()] if match else None

    def relation_of(self, text):
        """→ (the relation that `text` begins with, the comment after it), or None."""
        match = self.relation.match(text)
        if match is None:
            return None
        spelling = re.sub(r"[\W_]", "", match[1]).lower()
        return self.relations[spelling], match[2]

    def read(self, text):
        """An answer → what was found in it: items, malformed, stray, empty.

        items: (place in the text, five strings); malformed: how many items are no quintuple; stray: how many
        pieces are talk; empty: whether `[]` or its like stands there.
        """
        parts = FINAL.split(signs.rewritten(text))
        text = next((part for part in reversed(parts) if SAID.search(part)), parts[-1])
        found = SimpleNamespace(items=[], malformed=0, stray=len(parts) - 1, empty=False)
        found.malformed += len(text) > MOST_READ
        text = self.typed.sub(r'"\1"\2', text[:MOST_READ])
        found.text = self.verb.sub(r"\1|\3|", text)
        left = self.items(self.pieces(found), found)
        if found.items:
            found.stray += has_letters(left)
        elif not found.malformed:
            lines = [line for line in found.text.split("\n") if SAID.search(line)]
            talk = [line for line in lines if not is_nothing(line)]
            found.empty = found.empty or len(talk) < len(lines)
            if found.empty:
                found.stray += len(talk)
            else:
                found.malformed += bool(talk)
        found.items.sort(key=lambda item: item[0])
        return found

    def pieces(self, found):
        """The text cut at its signs. What stands in brackets is read as soon as they close."""
        pieces = []  # of the innermost bracket that is open
        opened = []  # (where it stands, where the piece before it begins, the pieces before that)
        start = 0
        for match in signs.cuts(found.text):
            sign, place = match[1], match.start()
            if sign in signs.OPENERS:
                opened.append((place, start, pieces))
                pieces = []
                start = match.end()
                continue
            self.cut(start, place, sign, pieces, found)
            start = match.end()
            if sign in signs.CLOSERS:
                inside = pieces
                begin, before, pieces = opened.pop()
                words = found.text[max(before, begin - 99) : begin].strip(signs.BLANK)
                if self.bracket(begin, start, words, inside, not opened, found):
                    self.cut(before, begin, "", pieces, found)
                    pieces.append(Piece("X", begin, start, "", ""))
                elif any(piece.kind == "T" for piece in inside) and not self.type_of(words):
                    self.cut(before, begin, "", pieces, found)
                    pieces += inside
                else:
                    start = before  # it is part of a piece
        self.cut(start, len(found.text), "", pieces, found)
        return pieces

    def cut(self, start, end, sign, pieces, found):
        """Add text[start:end] to the pieces, if it says anything. sign: what ends it."""
        piece = found.text[start:end]
        if not re.search(r'\w|"[^"\s][^"]*"', piece):
            return
        kind = "N"
        if self.type_of(piece):
            kind = "T"
        elif self.relation_of(piece):
            kind = "R"
        elif sign in signs.AFTER_KEY and signs.STRING.fullmatch(piece.strip()):
            kind = "K"
        pieces.append(Piece(kind, start, end, piece, sign))

    def bracket(self, begin, end, words, inside, at_root, found):
        """Read one bracket → whether it was read; otherwise it belongs to the text around it.

        words: what stands directly before it; inside: its pieces.
        """
        if words[:1] in signs.OPENERS and not signs.bare(words):
            return False  # it closes another bracket, which stands in those words
        left = self.items(inside, found)
        if len(left) < len(inside):
            if not any(piece.kind == "K" for piece in inside):  # what has another key is not asked for
                found.malformed += any(piece.kind == "T" or "," in piece.text for piece in left)
                found.stray += has_letters(left)
            return True
        if is_nothing(found.text[begin + 1 : end - 1]):
            found.empty = True
            return True
        is_list = signs.OPENERS[found.text[begin]] == "["
        in_sentence = not is_list and signs.LETTER.search(words)
        fields = [signs.bare(piece.text) for piece in inside]
        if len(fields) == 5 and not in_sentence and None in map(signs.role, fields):
            self.add(found, begin, *fields)  # of unknown labels
            return True
        kinds = "".join(piece.kind for piece in inside)
        is_label = re.fullmatch("N*T|R", kinds) or not has_letters(inside)
        is_item = is_list or (len(inside) > 2 and not in_sentence)
        broken = at_root and is_item and not is_label
        found.malformed += bool(broken)
        return bool(broken)

    def items(self, pieces, found):
        """Read the items among some pieces → the pieces that are left over."""
        for way in (self.keyed, self.ordered, self.nested):
            left = way(pieces, found)
            if len(left) < len(pieces):
                break
        return left

    def keyed(self, pieces, found):
        """Read items whose parts have names: objects, keyword arguments, `Head: …` → the pieces left over."""
        names = [signs.role(piece.text) if piece.sign in signs.AFTER_KEY else None for piece in pieces]
        if len(set(names) - {None}) < 3:
            return pieces
        marks = [n for n, name in enumerate(names) if name is not None or pieces[n].kind == "K"]
        left = pieces[: marks[0]]
        items = [{}]
        side = 0  # 0 or 2: the name to which "name" and "type" belong
        for n, end in pairwise([*marks, len(pieces)]):
            name = names[n]
            values = pieces[n + 1 : end]
            line = [value for value in values if "\n" not in found.text[values[0].start : value.start]]
            left += values[len(line) :]
            fields = items[-1]
            if name == "name":
                name = side if side not in fields else 2
            elif name == "type":
                name = side + 1 if side + 1 not in fields else 4
            side = name if name in (0, 2) else side
            if name is None or not line or line[0].text.strip() in ("null", "None"):
                continue
            if name in fields:
                fields = {}
                items.append(fields)
            if len(line) > 1 and line[-1].kind == "T":  # ["Ann Lee", "per"]
                fields[name + 1] = line.pop().text
            fields[name] = signs.outer(found.text[line[0].start : line[-1].end])
        for fields in items:
            if len(fields) == 5:
                self.add(found, pieces[0].start, *map(fields.get, range(5)))
            found.malformed += 2 < len(fields) < 5
        return left if max(map(len, items)) > 2 else pieces

    def ordered(self, pieces, found):
        """Read items by the order of names and labels → the pieces that are left over."""
        kinds = ""
        for before, piece in zip([*pieces[:1], *pieces], pieces, strict=False):
            gap = found.text[before.end : piece.start]
            letter = piece.kind
            if "\n" in gap:
                letter = letter.lower()
            elif letter == "T" and gap.strip() in signs.OPENERS:
                letter = "P"
            kinds += letter
        if re.fullmatch(".[tT].[tT].", kinds):
            kinds = "NTNTR"  # whatever the others read like
        for match in ITEM.finditer(kinds):
            raw = {}
            for name, letters in match.groupdict().items():
                if letters:
                    own = pieces[match.start(name) : match.end(name)]
                    raw[name[0]] = found.text[own[0].start : own[-1].end]
            head = signs.unlabelled(raw["h"])
            found.stray += head != raw["h"]
            head = signs.bare(head) or signs.outer(head)  # its bracket may not have been closed
            tail = signs.bare(raw["t"])
            if not tail or raw["b"].rstrip()[-1] in signs.CLOSERS:  # (A, per), (B (C), org)
                tail = signs.outer(raw["t"])
            self.add(found, pieces[match.start()].start, head, raw["a"], tail, raw["b"], raw["r"])
        kinds = ITEM.sub(lambda match: "X" * len(match[0]), kinds)
        return [piece for kind, piece in zip(kinds, pieces, strict=True) if kind not in "xX"]

    def nested(self, pieces, found):
        """Read items that stand whole in strings: `["Ann Lee, per, Acme, …"]` → the pieces left over."""
        left = []
        for piece in pieces:
            string = piece.text.strip(signs.BLANK + "*.")
            if signs.STRING.fullmatch(string) and len(self.type_word.findall(string)) > 1:
                inner = self.read(signs.unquoted(string))
                found.items += [(piece.start, item) for _, item in inner.items]
                found.malformed += inner.malformed
                found.stray += inner.stray
            else:
                left.append(piece)
        return left

    def add(self, found, place, head, head_type, tail, tail_type, relation):
        """Take in an item: names as meant, labels as they stand in the text. An empty field is a fault."""
        head_type = self.type_of(head_type) or signs.bare(head_type)
        tail_type = self.type_of(tail_type) or signs.bare(tail_type)
        label, comment = self.relation_of(relation) or (signs.bare(relation), "")
        item = (head, head_type, tail, tail_type, label)
        found.stray += signs.LETTER.search(comment) is not None
        if all(field.strip() for field in item):
            found.items.append((place, item))
        else:
            found.malformed += 1


def has_letters(pieces):
    return any(signs.LETTER.search(piece.text) for piece in pieces)


def is_nothing(text):
    """Whether a text says that there is no quintuple: "", "None.", "No relations were found"."""
    return len(text) < 300 and NOTHING.fullmatch(signs.unlabelled(text)) is not None
