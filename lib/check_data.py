"""--check-data: what files of annotations hold, and what is wrong with them. Knows no score of a system."""

import hashlib
import re
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import common
from lib import data, limits, scoring, tables

KNOWN = {  # sha256 of a file: what it is
    "645add6b05e238370d6dabd67f4c5d9d467d8d90c0a89f4e44a4416d7adffe58": "JMERE V1, train (EEGA)",
    "48453dbd9ae93ffc0e9825ea69093f092eafb3ddd0b5c8940b5d5e9ccb3164ff": "JMERE V1, val (EEGA)",
    "1572b0c24be6c3f9b79f31698ef461d185e429bde4a3e2531c841ddf6cad336b": "JMERE V1, test (EEGA)",
    "1cc34438a00e2a2db73e4eba297820f926f62abd1fddc693caa13c58b62428b7": "MNRE text, train",
    "c76865179b5678167b164c21fd25ed31f9a1416da393ac93ce70f32b00352b75": "MNRE text, val",
    "f53c2f9b7739bea7d08aee4a91bfd6ec7432e1d0eeb83debf10f5d3291bc5215": "MNRE text, test",
}
SHOWN = 3  # ids that a line names
NAMES = re.compile(r"https?\s*:\s*//\S+|@\s?\w+|\bRT\b")  # links, mentions, retweet marks


def check_data(args):
    """Print what is in the files args.check_data, each a split of one data set → exit code, 1 where a row
    or an image is wrong. args: image_dir, model (then its tokens are counted)."""
    counted = prompt_counter(args.model)
    splits = {}
    wrong = 0
    for path in args.check_data:
        data.existing("--check-data", path, data.RELEASE)
        examples, faults = data.read_examples(path, args.image_dir)
        splits[path] = examples
        print("\n".join(map(common.visible, describe(path, examples))))
        wrong += show_faults("rows that are wrong", [str(fault) for fault in faults])
        unreadable = data.image_faults(examples)
        print("\n".join(map(common.visible, images(examples, unreadable))))
        wrong += len(unreadable)
        if len(unreadable) == len(examples):
            print(f"  no image can be used: where are they? --image-dir {common.visible(args.image_dir)}")
        else:
            show_faults("images that cannot be used", [f"{n}: {f}" for n, f in unreadable.items()])
        good = [example for example in examples if example.id not in unreadable]
        print(f"  {common.visible(longest(good or examples, counted))}\n")
    for first, second in combinations(splits, 2):
        print(common.visible(leaks(first, splits[first], second, splits[second])))
    return 1 if wrong else 0


def show_faults(title, faults):
    """Print a list, one a line → how many."""
    print(f"  {title}: {len(faults)}")
    for fault in faults:
        print(f"    {common.visible(fault)}")
    return len(faults)


def describe(path, examples):
    """Lines on a file: what it is, rows, quintuples, cut rows."""
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    lines = [f"{path}: {KNOWN.get(digest, 'no release known here')}, sha256 {digest}"]
    golds = [example.quintuples for example in examples if example.quintuples is not None]
    counts = [len(gold) for gold in golds]
    lines.append(
        f"  {len(examples)} tweets, {len(examples) - len(golds)} without gold; {sum(counts)} quintuples, "
        f"{min(counts, default=0)} to {max(counts, default=0)} a tweet"
    )
    labels = Counter(scoring.label_of(q) for gold in golds for q in gold)
    lines.append(f"  {scoring.LABEL}s: {', '.join(f'{name} {n}' for name, n in labels.most_common())}")
    if golds and len(golds) == len(examples):
        tweets = scoring.tweet_numbers(examples)
        cut = limits.ceiling(golds, tweets)
        lines.append(
            f"  cut: {cut['tweets']} tweets stand in {cut['rows']} rows with other gold; ceiling F1 "
            f"{tables.percent(cut['f1'])}; joined (--merge-repeats) {tweets.max() + 1} tweets"
        )
    return lines


def images(examples, unreadable):
    """Lines on images that serve several tweets, by name and by content."""
    texts = defaultdict(set)
    names = defaultdict(set)
    for example in examples:
        texts[example.image].add(example.text)
        if example.id not in unreadable:
            digest = hashlib.sha256(Path(example.image).read_bytes()).hexdigest()
            names[digest].add(Path(example.image).name)
    shared = [Path(image).name for image, group in texts.items() if len(group) > 1]
    twins = [" = ".join(sorted(group)) for group in names.values() if len(group) > 1]
    return [
        f"  images: {len(texts)}; of several texts: {some(shared)}; "
        f"of the same content under several names: {some(twins)}"
    ]


def some(names, what=""):
    """How many, and the first of them."""
    if not names:
        return f"0{what}"
    more = ", …" if len(names) > SHOWN else ""
    return f"{len(names)}{what} ({', '.join(names[:SHOWN])}{more})"


def prompt_counter(model):
    """(unit, function of an Example): the length of its prompt, in tokens of `model` or, without one, in
    characters."""
    template = common.PROMPTS["reason"]
    if not model:
        return "characters", lambda example: len(template.format(text=example.text))
    from lib import vlm  # torch lives there

    processor = vlm.load_processor(model)

    def tokens(example):
        size = data.load_image(example.image).size
        return vlm.prompt_length(processor, template.format(text=example.text), size)

    return "tokens", tokens


def longest(examples, counted):
    """A line on the longest prompts."""
    unit, length = counted
    lengths = sorted(((length(example), example.id) for example in examples), reverse=True)
    shown = ", ".join(f"{size} ({name})" for size, name in lengths[:SHOWN])
    return f"longest prompts, in {unit}: {shown}"


def leaks(first, a, second, b):
    """A line on what two splits share."""
    texts = shared(a, b, lambda example: example.text)
    bare = shared(a, b, lambda example: " ".join(NAMES.sub(" ", example.text).casefold().split()))
    pictures = shared(a, b, lambda example: Path(example.image).name)
    return (
        f"{first} and {second} share {some(texts, ' texts')}, {some(bare, ' without links and mentions')}, "
        f"{some(pictures, ' images')}"
    )


def shared(a, b, key):
    """Ids of b whose key stands in a, too."""
    known = {key(example) for example in a}
    return [example.id for example in b if key(example) in known]
