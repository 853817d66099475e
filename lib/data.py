"""Files of tweets: JSONL, examples, ids, images. Knows no model and no server, and formats.py the
annotations.

§ refers to the paper (JMERE-R1); [ours] marks a decision where the paper is silent.
"""

import itertools
import json
import os
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from tqdm import tqdm

import common
from common import InputError, Quintuple, Stopped
from lib import formats

# -------------------------------------------------------------------------------- JSONL


def read_jsonl(path):
    """Yield (line number, row). Lines end at \\n alone: a tweet may hold U+2028. Raises InputError naming
    file and line."""
    for number, line in formats.lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not JSON ({error}): mend or delete this line") from None
        if not isinstance(row, dict):
            found = type(row).__name__
            raise InputError(f"{path}:{number}: found a JSON {found}, expected an object {{…}} on every line")
        yield number, row


def jsonl_line(row):
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_atomic(path, text):
    """Replace `path` as a whole: a reader, or a run killed half way, sees the old file or the new one. Raises
    Stopped where it cannot be written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8", newline="\n") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise Stopped(f"{path}: cannot write ({error.strerror})") from None


# -------------------------------------------------------------------------------- examples (SPEC §3)


@dataclass(frozen=True)
class Example:
    """One tweet."""

    id: str
    text: str
    image: str  # a path usable from here
    quintuples: tuple[Quintuple, ...] | None  # None where the file has no gold
    row: dict[str, Any] = field(default_factory=dict, repr=False)  # every field of the file


MADE_BY = {  # field: the stage that adds it; else the annotations themselves
    "cot": "01_distill.py",
    "candidate": "01_distill.py",
    "score": "02_filter.py",
}
RELEASE = "the EEGA release goes there (README, Data)"  # where the default annotations come from


def load_examples(path, image_dir=None, need=(), key=("id",), skip_bad=False, merge_repeats=False):
    """Tweets of our JSONL, of the JMERE release or of MNRE text → list of Example. The content tells which: a
    JSON list or a row a line, and by the keys of its rows.

    need: fields every row must have besides id, text and image, such as ("quintuples",) or ("cot",).
    key: the fields that together name a row once; ("id", "candidate") for the output of 01.
    skip_bad: drop rows that are wrong, and say how many, instead of stopping at the first.
    merge_repeats: join rows of the same text and image, as the V2 release does.
    An image is looked up in image_dir, else beside the file. Raises InputError: file, row, what is missing.
    """
    examples, faults = read_examples(path, image_dir, need, key, merge_repeats)
    if faults and not skip_bad:
        raise faults[0]
    for fault in faults:
        print(f"skipped: {fault}", file=sys.stderr)
    if faults:
        print(f"{path}: {len(faults)} bad rows skipped, {len(examples)} kept (--skip-bad)", file=sys.stderr)
    if not examples:
        raise InputError(f"{path}: no example in it")
    return examples


def read_examples(path, image_dir=None, need=(), key=("id",), merge_repeats=False):
    """As load_examples → (examples, [InputError of a row that is wrong]). Raises where the file cannot be
    read."""
    examples = []
    faults = []
    seen = {}
    named_by_image = False
    for where, row, released in formats.read_rows(path):
        try:
            if isinstance(row, InputError):
                raise row
            example = to_example(where, row, need)
            if released:
                named_by_image = True
            else:
                refuse_second(where, example, key, seen)
        except InputError as error:
            faults.append(error)
            continue
        examples.append(replace(example, image=find_image(example.image, image_dir, path)))
    if merge_repeats:
        examples = merged(path, examples)
    return numbered(examples) if named_by_image else examples, faults


def refuse_second(where, example, key, seen):
    """Raise InputError where another row has the same key; seen: {key: where it stood}."""
    name = tuple(example.row[part] for part in key)
    if name in seen:
        shown = f"{', '.join(key)} {', '.join(map(str, name))}"
        raise InputError(f"{where}: {shown} stands already at {seen[name]}, expected it once")
    seen[name] = where


def load_tweets(args):
    """--data → {id: Example}, in the order of the file, images not looked at yet. Raises InputError.

    args: data, image_dir, skip_bad, merge_repeats.
    """
    existing("--data", args.data, RELEASE)
    options = {"skip_bad": args.skip_bad, "merge_repeats": args.merge_repeats}
    return {example.id: example for example in load_examples(args.data, args.image_dir, **options)}


def existing(option, path, source):
    """`path`, where there is such a file or folder. Raises InputError: option, path, and where it comes
    from."""
    if not Path(path).exists():
        raise InputError(f"{option} {path}: no such file: {source}, or name another")
    return path


def find_image(name, image_dir, path):
    """image_dir/name, or `name` beside `path` where it exists there alone; `name` itself where absolute."""
    beside = Path(path).parent / name  # an absolute name stays itself: pathlib drops the left side
    inside = Path(image_dir) / name if image_dir else beside
    return str(beside if beside.exists() and not inside.exists() else inside)


def to_row(example, out):
    """The four input fields of `example` as our JSONL spells them, image path relative to the folder of
    `out`."""
    image = os.path.relpath(example.image, Path(out).absolute().parent)
    row = {"id": example.id, "text": example.text, "image": image}
    if example.quintuples is not None:
        row["quintuples"] = [list(q) for q in example.quintuples]
    return row


def to_example(where, row, need):
    """A row in our field names → Example. Raises InputError: what is missing, or of the wrong type."""
    if not isinstance(row, dict):
        found = type(row).__name__
        raise InputError(f"{where}: found a JSON {found}, expected an object with {formats.FORMATS}")
    if not row.keys() & {"id", "text", "image"}:
        raise InputError(f"{where}: keys {', '.join(row) or 'none'}, expected {formats.FORMATS}")
    for name in ("id", "text", "image", *need):
        check_field(where, row, name)
    try:
        jsonl_line(row).encode()
    except UnicodeEncodeError as error:
        # half of a surrogate pair, written \\ud83d: no later stage could store it
        fault = f"{error.reason} {error.object[error.start]!r}"
        raise InputError(f"{where}: holds half a character ({fault}): mend the escape") from None
    gold = row.get("quintuples")
    if gold is not None:
        gold = read_gold(where, gold)
    return Example(row["id"], row["text"], row["image"], gold, row)


def check_field(where, row, name):
    """Raise InputError where a row lacks a field, or it is of the wrong type."""
    value = row.get(name)
    if value is None or (name in ("id", "image") and value == ""):
        source = f"made by {MADE_BY[name]}" if name in MADE_BY else "part of the annotations"
        raise InputError(f"{where}: missing {name!r} ({source})")
    if name in ("id", "text", "image", "cot") and not isinstance(value, str):
        raise InputError(f"{where}: {name!r} is of type {type(value).__name__}, expected a string")


def read_gold(where, items):
    """'quintuples' of a row → tuple of Quintuples with known labels. Raises InputError."""
    if not isinstance(items, list):
        found = type(items).__name__
        raise InputError(
            f"{where}: 'quintuples' is of type {found}, expected a list [[e1, t1, e2, t2, r], …]"
        )
    gold = []
    for item in items:
        fields = common.as_item(item)
        if fields is None:
            shown = json.dumps(item, ensure_ascii=False)[:80]
            raise InputError(
                f"{where}: quintuple {shown}, expected {len(Quintuple._fields)} non-empty strings"
            )
        gold.append(common.quintuple(*fields))
        if fault := common.label_fault(gold[-1]):
            raise InputError(f"{where}: {fault}")
    return tuple(gold)


# -------------------------------------------------------------------------------- repeats and ids


def merged(path, examples):
    """Rows of the same text and image as one, with the gold of all. Whatever their order, the same result."""
    groups = defaultdict(list)
    for example in examples:
        groups[example.text, example.image].append(example)
    result = []
    for group in groups.values():
        group.sort(key=lambda example: (len(example.id), example.id, example.quintuples or ()))
        first = group[0]
        if len(group) > 1 and any("cot" in example.row for example in group):
            ids = ", ".join(example.id for example in group)
            raise InputError(
                f"{path}: --merge-repeats would join {ids}, whose chains ('cot') explain their own "
                "quintuples alone: join them in 01_distill.py"
            )
        gold = [q for example in group for q in example.quintuples or ()]
        quintuples = None if first.quintuples is None else tuple(dict.fromkeys(gold))
        result.append(replace(first, quintuples=quintuples))
    return result


def numbered(examples):
    """Examples with unique ids. Rows of a release are named by their image alone; where one image serves
    several, they are numbered in the order of their content: a shuffled file gives each the same id."""
    places = defaultdict(list)
    for place, example in enumerate(examples):
        places[example.id].append(place)
    result = list(examples)
    for stem, group in places.items():
        group.sort(key=lambda place: content(examples[place]))
        names = (f"{stem}-{number}" for number in itertools.count(2))
        free = (name for name in names if name not in places)
        for place in group[1:]:
            name = next(free)
            result[place] = replace(examples[place], id=name, row={**examples[place].row, "id": name})
    return result


def content(example):
    """What an example says, to be sorted by."""
    return example.text, Path(example.image).name, sorted(example.quintuples or ())


# -------------------------------------------------------------------------------- images


def check_images(examples, skip_bad=False):
    """Decode every image before anything is trained or paid for. Returns the examples whose image is good.

    Raises InputError naming the first bad ids; with skip_bad drops them and says how many.
    """
    faults = image_faults(examples)
    if not faults:
        return examples
    shown = "; ".join(f"{name}: {fault}" for name, fault in list(faults.items())[:3])
    if len(faults) > 3:
        shown += "; …"
    if not skip_bad or len(faults) == len(examples):
        raise InputError(
            f"{len(faults)} of {len(examples)} images cannot be used: {shown} "
            "(check --image-dir, or drop them with --skip-bad)"
        )
    counts = f"{len(faults)} of {len(examples)} examples"
    print(f"skipped {counts} for their image: {shown} (--skip-bad)", file=sys.stderr)
    return [example for example in examples if example.id not in faults]


def image_faults(examples):
    """{id: what is wrong with its image}, each decoded once."""
    with ThreadPoolExecutor() as pool:  # PIL decodes without the GIL
        found = pool.map(_image_fault, examples)
        bar = tqdm(found, total=len(examples), desc="check images", unit="img", disable=None)
        return {example.id: fault for example, fault in zip(examples, bar, strict=True) if fault}


def _image_fault(example):
    try:
        load_image(example.image)
    except InputError as error:
        return str(error)
    return None


# what PIL raises on broken files; RuntimeError of AVIF alone
BROKEN = (OSError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError)


def load_image(path):
    """The image as RGB, turned the way its EXIF says. Raises InputError where it is missing, broken or
    absurdly large."""
    try:
        with Image.open(path) as image:
            return eight_bits(ImageOps.exif_transpose(image)).convert("RGB")
    except BROKEN as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"unreadable image ({error})"
        raise InputError(f"{path}: {reason}") from None


def eight_bits(image):
    """An image of 16 or 32 bits or floats scaled to 8; another as it is. PIL's own conversion clips: white.

    White is 65535 in 16 bits; else the least of 1 (floats), 255 and 65535 that holds every pixel, or the
    brightest pixel; black is 0, or the darkest pixel below it.
    """
    if image.mode.startswith("I;16"):
        image = image.convert("I")
        white = 65535
    elif image.mode in ("I", "F"):
        _, most = image.getextrema()
        steps = (1, 255, 65535) if image.mode == "F" else (255, 65535)
        white = next((step for step in steps if most <= step), most)
    else:
        return image
    image = image.convert("F")
    black = min(0, image.getextrema()[0])
    scale = 255 / (white - black)
    return image.point(lambda value: value * scale - black * scale + 0.5).convert("L")
