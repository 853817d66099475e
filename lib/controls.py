"""Controls: does a system look, and does it invent? Other images for the same tweets, tweets without a
relation, and pairs of tweets that only their images tell apart. Knows no model."""

import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from PIL import Image

from common import InputError
from lib import data, formats

IMAGES = ("own", "blank", "shuffled")
SUBSETS = {  # of MNRE text: what its tweets have in common
    "no-relation": "tweets of which no line has a relation: there is nothing to find",
    "image-decides": "two tweets of the same text, of which one has a relation and the other, with another "
    "image, has none",
}
GREY = (128, 128, 128)

# -------------------------------------------------------------------------------- other images


def with_images(examples, mode, seed, folder):
    """The examples with the images of `mode`: their own, a grey one of the same size, or another tweet's.

    examples: all of the data, so that --limit changes no image. Grey ones are written into `folder`.
    Shuffled ones go round by `seed`: no tweet keeps its own. Raises InputError where there are not two
    images to exchange.
    """
    if mode == "own":
        return list(examples)
    if mode == "shuffled":
        others = exchanged([example.image for example in examples], seed)
        return [replace(example, image=others[example.image]) for example in examples]
    return [replace(example, image=grey(example.image, folder)) for example in examples]


def exchanged(images, seed):
    """{image: the one that stands in for it}, each for one other."""
    distinct = sorted(set(images))
    if len(distinct) < 2:
        raise InputError("--image shuffled: all tweets have the same image, so none has another's")
    random.Random(seed).shuffle(distinct)
    following = distinct[1:] + distinct[:1]
    return dict(zip(distinct, following, strict=True))


def grey(image, folder):
    """Path of a grey image as large as `image`; `image` itself where it cannot be read, for the check of
    images to name."""
    try:
        width, height = data.load_image(image).size
    except InputError:
        return image
    path = Path(folder) / f"{width}x{height}.png"
    if not path.exists():
        Image.new("RGB", (width, height), GREY).save(path)
    return str(path)


# -------------------------------------------------------------------------------- subsets of MNRE


def load_tweets(args):
    """--data, or its --subset → {id: Example}. Raises InputError."""
    return load_subset(args) if args.subset else data.load_tweets(args)


def load_subset(args):
    """--subset of the MNRE text --data → {id: Example}; gold is empty where there is nothing to find. Raises
    InputError. args: data, image_dir, subset."""
    data.existing("--data", args.data, "MNRE's text (README, Data)")
    gold = mnre_gold(args.data)
    if args.subset == "no-relation":
        chosen = [tweet for tweet, items in gold.items() if not items]
    else:
        chosen = decided_by_image(gold)
    if not chosen:
        raise InputError(f"--data {args.data}: holds none of the --subset {args.subset}")
    examples = []
    for text, image in chosen:
        quintuples = tuple(dict.fromkeys(gold[text, image]))
        path = data.find_image(image, args.image_dir, args.data)
        row = {"id": Path(image).stem, "text": text, "image": image}
        examples.append(data.Example(row["id"], text, path, quintuples, row))
    return {example.id: example for example in data.numbered(examples)}


def mnre_gold(path):
    """{(text, image): [Quintuple]} of every tweet of MNRE text, also those without a relation. Raises
    InputError."""
    rows = formats.decoded_rows(path)
    gold = defaultdict(list)
    for where, line in formats.mnre_lines(rows):
        if isinstance(line, InputError):
            raise InputError(f"{line} (--subset reads MNRE's text)")
        row = formats.from_release(where, line._asdict() | {"label_list": [line.label] if line.label else []})
        gold[row["text"], row["image"]] += data.read_gold(where, [list(item) for item in row["quintuples"]])
    return dict(gold)


def decided_by_image(gold):
    """The (text, image) of both tweets of each pair."""
    by_text = defaultdict(list)
    for text, image in gold:
        by_text[text].append((text, image))
    chosen = []
    for tweets in by_text.values():
        if len(tweets) == 2 and sum(bool(gold[tweet]) for tweet in tweets) == 1:
            chosen += tweets
    return chosen


# -------------------------------------------------------------------------------- what is counted


def controls(examples, preds):
    """{"invented": …, "pairs": …} of examples with gold, each where there is something to count. preds: [N]
    lists."""
    result = {}
    nothing = [bool(pred) for example, pred in zip(examples, preds, strict=True) if not example.quintuples]
    if nothing:
        result["invented"] = {"tweets": len(nothing), "with_prediction": sum(nothing)}
    pairs = told_apart(examples, preds)
    if pairs:
        result["pairs"] = {"pairs": len(pairs), "told_apart": sum(pairs)}
    return result


def told_apart(examples, preds):
    """For each pair of the same text and other images, of which one has gold and the other none: whether
    something is predicted for the first and nothing for the second. A system that reads the text alone
    tells none apart."""
    by_text = defaultdict(list)
    for example, pred in zip(examples, preds, strict=True):
        by_text[example.text].append((bool(example.quintuples), example.image, bool(pred)))
    result = []
    for tweets in by_text.values():
        if len(tweets) != 2 or tweets[0][1] == tweets[1][1]:
            continue
        (gold, _, found), (other_gold, _, other_found) = tweets
        if gold != other_gold:
            result.append(found == gold and other_found == other_gold)
    return result
