"""What stands in a file of annotations: our JSONL, the JMERE release, MNRE text → rows in our field names.
Knows no image and no label set."""

import ast
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import common
from common import InputError

FORMATS = "id, text, image (ours); token, img_id, label_list (JMERE); token, h, t, img_id, relation (MNRE)"


def lines(path):
    """Yield (number, line) of the lines that are not blank. Raises InputError where the file cannot be
    read."""
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as handle:
            for number, line in enumerate(handle, 1):
                if line.strip():
                    yield number, line
    except UnicodeDecodeError as error:
        fault = f"{error.reason} at byte {error.start}"
        raise InputError(f"{path}: not UTF-8 ({fault}): save the file as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read ({error.strerror})") from None


def read_rows(path):
    """Yield (where, row, released) of a file in any of the formats, MNRE's lines joined.

    row: fields by our names, or an InputError in place of a bad row; released: whether it is of a release,
    its id being the stem of its image alone.
    """
    rows = decoded_rows(path)
    first = next(rows, None)
    if first is None:
        raise InputError(f"{path}: empty file, expected rows with {FORMATS}")
    rows = itertools.chain([first], rows)
    if is_mnre(first[1]):
        rows = joined(mnre_lines(rows))
    for where, row in rows:
        released = isinstance(row, dict) and ("token" in row or "label_list" in row)
        if released:
            try:
                row = from_release(where, row)
            except InputError as error:
                row = error
        yield where, row, released


def is_mnre(row):
    return isinstance(row, dict) and "relation" in row and "token" in row


def decoded_rows(path):
    """Yield (where, value) of the items of a JSON list, or of lines of JSON or of Python literals; an
    InputError in place of one that is neither."""
    first = next(lines(path), (1, ""))[1].lstrip()
    if first.startswith("["):
        yield from list_items(path)
        return
    for number, line in lines(path):
        where = f"{path}:{number}"
        try:
            yield where, literal(line)
        except ValueError as error:
            yield where, InputError(f"{where}: {error}: mend or delete this line")


def list_items(path):
    try:
        items = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: begins like a JSON list but is not JSON: {error}") from None
    for number, item in enumerate(items, 1):
        yield f"{path}: item {number}", item


def literal(line):
    """A JSON value, or the Python literal that MNRE writes. Raises ValueError."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        fault = error
    if not line.lstrip().startswith("{'"):
        raise ValueError(f"not JSON ({fault})")
    try:
        return ast.literal_eval(line.strip())
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"not an MNRE line ({error})") from None


class MnreLine(NamedTuple):
    """One line of MNRE text: a tweet, and two entities with or without a relation."""

    where: str
    token: list
    img_id: str
    label: dict | None  # as in JMERE's label_list; None: relation 'None'


def mnre_lines(rows):
    """Yield (where, MnreLine) of decoded rows; an InputError in place of a bad one."""
    for where, row in rows:
        try:
            if isinstance(row, InputError):
                raise row
            relation = row["relation"].split("/")  # '/per/org/member_of', or 'None'
            label = None
            if len(relation) == 4:
                _, head, tail, name = relation
                beg_ent = {"name": row["h"]["name"], "tags": head}
                sec_ent = {"name": row["t"]["name"], "tags": tail}
                label = {"beg_ent": beg_ent, "sec_ent": sec_ent, "relation": name}
            yield where, MnreLine(where, row["token"], row["img_id"], label)
        except InputError as error:
            yield where, error
        except (KeyError, TypeError, AttributeError) as error:
            fault = f"{type(error).__name__}: {error}"
            yield where, InputError(f"{where}: not an MNRE line with token, h, t, img_id, relation ({fault})")


def joined(lines):
    """Yield (where, JMERE row) of MNRE lines by the published rule, which reproduces the paper's split
    (SPEC §3).

    A typed line starts an example, which takes in each following line of the same text while typed; the first
    untyped line of the same text is consumed and ends it; any other untyped line is skipped.
    """
    current = None  # the row being filled
    begun = None  # where
    for where, line in lines:
        if isinstance(line, InputError):
            yield where, line
            continue
        goes_on = current is not None and current["token"] == line.token and line.label
        if current is not None and not goes_on:
            yield begun, current
            current = None
        if not line.label:
            continue
        if current is None:
            current = {"token": line.token, "img_id": line.img_id, "label_list": []}
            begun = where
        current["label_list"].append([line.label])
    if current is not None:
        yield begun, current


def from_release(where, row):
    """A JMERE row in our field names; without 'quintuples' where it has no label_list. Raises InputError."""
    for name, kind in (("token", list), ("img_id", str)):
        if not isinstance(row.get(name), kind):
            found = type(row.get(name)).__name__
            raise InputError(
                f"{where}: {name!r} is of type {found}, expected {kind.__name__}: a JMERE row has "
                "token (a list of words), img_id (a file name) and label_list"
            )
    if not all(isinstance(word, str) for word in row["token"]):
        raise InputError(f"{where}: 'token' holds what is no string, expected a list of words")
    fields = {"id": Path(row["img_id"]).stem, "text": " ".join(row["token"]), "image": row["img_id"]}
    if row.get("label_list") is not None:
        fields["quintuples"] = released_items(where, row["label_list"])
    return fields


def released_items(where, label_list):
    """The items of a JMERE row's label_list: labels, or lists of labels."""
    items = []
    try:
        for group in label_list:
            for label in [group] if isinstance(group, dict) else group:
                items += common.released_items(label)
    except (KeyError, TypeError) as error:
        fault = f"{type(error).__name__}: {error}"
        raise InputError(
            f"{where}: not a JMERE row: a label without an entity or relation ({fault})"
        ) from None
    return items
