"""Files of tweets: JSONL, the three formats of annotations, images. Knows no model and no server.

§ refers to the paper (JMERE-R1); [ours] marks a decision where the paper is silent.
"""

import ast
import json
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from tqdm import tqdm

from common import RELATIONS, TYPES, InputError, Quintuple, as_item, quintuple

# -------------------------------------------------------------------------------- JSONL


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


# -------------------------------------------------------------------------------- examples (SPEC §3)


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


RELEASE = "the EEGA release goes there (README, Data)"  # where the default annotations come from


def existing(option, path, source):
    """`path`, where there is such a file or folder. Raises InputError: option, path, and where it comes from (`source`)."""
    if not Path(path).exists():
        raise InputError(f"{option} {path}: no such file: {source}, or name another")
    return path


def load_tweets(args):
    """--data → {id: Example}, in the order of the file, images not looked at yet. Raises InputError.

    args: data, image_dir, skip_bad, merge_repeats.
    """
    existing("--data", args.data, RELEASE)
    options = {"skip_bad": args.skip_bad, "merge_repeats": args.merge_repeats}
    return {example.id: example for example in load_examples(args.data, args.image_dir, **options)}


def find_image(name, image_dir, path):
    """image_dir/name, or `name` beside `path` where it exists there alone; `name` itself where absolute."""
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
            ends = [{"name": name, "tags": tag} for name, tag in zip(names, relation[1:3], strict=True)]
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
        if as_item(item) is None:
            shown = json.dumps(item, ensure_ascii=False)[:80]
            raise InputError(f"{where}: quintuple {shown}, expected five non-empty strings")
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


# -------------------------------------------------------------------------------- images


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
    bad = [(example, fault) for example, fault in zip(examples, faults, strict=True) if fault]
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
    return [example for example, fault in zip(examples, faults, strict=True) if not fault]


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
