"""The picture world of the demo: tweets whose image decides the quintuples, in the real label set.

A tweet names two or three things in words that say nothing about them ("RT @fan : Paris and Emma tonight"). The picture shows, in the order
of the names, a figure on the left, one on the right and perhaps one on a poster, and perhaps a sign in a bubble. The figures decide the
types (Paris is a person, a city …), figures and sign decide relation and direction, and who wears the poster's colour has to do with it:

    person + person   heart couple · cap alumi · ball peer      person + child, child + child    parent · siblings
    person + crest    member of                                 person + city       place of residence, with a cradle place of birth
    person + trophy   awarded                                   person + stage      present in
    crest + city      locate at                                 stage + city        held on            city + hut  contain

Each text comes with several pictures and different gold, so a model that does not look cannot know. No torch: the teacher imports this.

    python -m demo.world --out runs/world --train 200 --val 40 --test 80

Reads: nothing.
Writes: OUT/{train,val,test}.jsonl and OUT/img/*.png; OUT/grey.jsonl, the last split again with one grey picture for all: the control
    {"id": "train-00000", "text": "RT @fan : Paris and Emma tonight", "image": "img/train-00000.png",
     "quintuples": [["Emma", "per", "Paris", "loc", "place of birth"]]}
"""

import argparse
import functools
import itertools
import random
import re
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageChops, ImageDraw

import common
from lib import data

# ------------------------------------------------------------------------------------------------ lexicon

NAMES = {  # what a name can stand for: most can be several things, and only the picture tells
    "per": "Emma Liam Noah Olivia Mia Lucas Ava Ethan",
    "org": "Google|Nike|Real Madrid",
    "loc": "Berlin|Tokyo|New York",
    "misc": "Grammy|Eurovision|Golden Globe",
    "per loc": "Jordan Paris Austin Sydney Florence",
    "per org": "Disney Ford Tesla Hilton",
    "per misc": "Oscar Emmy Tony",
    "org loc": "Amazon Chelsea Liverpool",
    "loc misc": "Coachella Monaco Wimbledon",
    "per org loc": "Washington Phoenix Lincoln",
}
LEXICON = {
    name: types.split()
    for types, names in NAMES.items()
    for name in (names.split("|") if "|" in names else names.split())
}
TEMPLATES = {
    2: (
        "RT @fan : {} and {} tonight",
        "{} x {} # news",
        "So happy for {} and {} !",
        "Look : {} with {} again",
        "{} & {} , what a day",
    ),
    3: (
        "RT @fan : {} and {} , {} tonight",
        "{} x {} # {}",
        "So happy for {} and {} ! # {}",
        "Look : {} with {} @ {}",
        "{} & {} , {} , what a day",
    ),
}

# ------------------------------------------------------------------------------------------------ scenes

TYPE = {
    "person": "per",
    "child": "per",
    "crest": "org",
    "city": "loc",
    "hut": "loc",
    "trophy": "misc",
    "stage": "misc",
}
COLOURS = {"red": (214, 39, 40), "blue": (31, 100, 220), "green": (30, 150, 60)}
SIGNS = ("heart", "cap", "ball", "cradle")
POSTERS = {
    "crest": "member of",
    "city": "place of residence",
    "stage": "present in",
    "trophy": "awarded",
}  # for who wears its colour
RULES = {  # (head's figure, tail's figure, sign): (relation, the clue in words); as drawn either way round, but for equal figures
    ("person", "person", "heart"): ("couple", "a heart"),
    ("person", "person", "cap"): ("alumi", "a cap"),
    ("person", "person", "ball"): ("peer", "a ball"),
    ("person", "child", None): ("parent", "a person with a child"),
    ("child", "child", None): ("siblings", "two children"),
    ("person", "crest", None): ("member of", "a person with a crest"),
    ("person", "city", None): ("place of residence", "a person with a city"),
    ("person", "city", "cradle"): ("place of birth", "a cradle"),
    ("person", "trophy", None): ("awarded", "a person with a trophy"),
    ("person", "stage", None): ("present in", "a person with a stage"),
    ("crest", "city", None): ("locate at", "a crest with a city"),
    ("city", "hut", None): ("contain", "a hut with a city"),
    ("stage", "city", None): ("held on", "a stage with a city"),
}


class Figure(NamedTuple):
    kind: str
    colour: str

    def __str__(self):
        return f"{self.kind} in {self.colour}" if TYPE[self.kind] == "per" else f"{self.colour} {self.kind}"


class Scene(NamedTuple):
    left: Figure
    right: Figure
    sign: str | None
    poster: Figure | None
    night: bool

    @property
    def figures(self):
        """In the order of the text's names."""
        return [figure for figure in (self.left, self.right, self.poster) if figure]


@functools.cache
def scenes():
    """Every scene the grammar allows; a poster only beside two people."""
    orders = {(*kinds, sign) for first, second, sign in RULES for kinds in ((first, second), (second, first))}
    figures = {kind: [Figure(kind, colour) for colour in COLOURS] for kind in TYPE}
    posters = [None, *(figure for kind in POSTERS for figure in figures[kind])]
    result = []
    for left, right, sign in sorted(orders, key=str):
        people = TYPE[left] == TYPE[right] == "per"
        choices = itertools.product(
            figures[left], figures[right], [sign], posters if people else [None], [False, True]
        )
        result += [Scene(*choice) for choice in choices]
    return result


def names_in(text):
    """Names of the lexicon in `text`, in order."""
    return re.findall("|".join(sorted(LEXICON, key=len, reverse=True)), text)


def read(names, scene):
    """What names and scene say together → [(quintuple, clue in words)]. Names beyond the scene's figures are not in the picture."""
    named = list(zip(names, scene.figures))
    if len(named) < 2:
        return []
    (a, left), (b, right) = named[:2]
    if (left.kind, right.kind, scene.sign) in RULES:
        relation, clue = RULES[left.kind, right.kind, scene.sign]
    elif (right.kind, left.kind, scene.sign) in RULES:
        relation, clue = RULES[right.kind, left.kind, scene.sign]
        (a, left), (b, right) = (b, right), (a, left)
    else:
        return []
    found = [(common.quintuple(a, TYPE[left.kind], b, TYPE[right.kind], relation), clue)]
    for name, figure in named[:2]:
        if len(named) == 3 and figure.colour == scene.poster.colour:
            tail, kind = named[2][0], scene.poster.kind
            found.append(
                (
                    common.quintuple(name, "per", tail, TYPE[kind], POSTERS[kind]),
                    f"{figure.colour} as the {kind}",
                )
            )
    return found


def fits(names, scene):
    """Whether each name can be what the scene shows for it. A third name may be absent from the picture, a third figure needs a name."""
    return len(scene.figures) <= len(names) and all(
        TYPE[f.kind] in LEXICON[name] for name, f in zip(names, scene.figures)
    )


# ------------------------------------------------------------------------------------------------ the chain of thought in words


def describe(scene):
    above = [f"a {scene.sign} above"] if scene.sign else []
    poster = [f"a poster of a {scene.poster}"] if scene.poster else []
    return (
        f"{'Night' if scene.night else 'Day'}; left a {scene.left}, right a {scene.right}"
        + "".join(f", {x}" for x in above + poster)
        + "."
    )


def align(names, scene):
    ties = [f"{name} is the {figure}" for name, figure in zip(names, scene.figures)]
    return ", ".join(ties + [f"{name} is not shown" for name in names[len(ties) :]]) + "."


def step(quintuple, clue):
    """One step of the reasoning, which `steps` reads back."""
    return f"{clue}: {quintuple.head} ({quintuple.head_type}) {quintuple.relation} {quintuple.tail} ({quintuple.tail_type})."


def chain(text, scene, gold=None):
    """The MP-CoT a good teacher writes for this text and scene. gold: quintuples it must lead to; default: what the picture says.

    >>> emma = Scene(Figure("city", "red"), Figure("person", "blue"), "cradle", None, False)
    >>> print(chain("Paris x Emma # news", emma))
    Image Description: Day; left a red city, right a person in blue, a cradle above.
    Visual-Text Alignment: Paris is the red city, Emma is the person in blue.
    Quintuple Reasoning: a cradle: Emma (per) place of birth Paris (loc).
    """
    names = names_in(text)
    clues = dict(read(names, scene))
    reasoning = (
        " ".join(step(q, clues.get(q, "the tweet")) for q in (clues if gold is None else gold))
        or "nothing relates."
    )
    return cot(describe(scene), align(names, scene), reasoning)


def cot(*parts):
    return "\n".join(f"{heading}: {part}" for heading, part in zip(common.COT_PARTS, parts))


STEP = re.compile(
    r"(?P<clue>[^:.\n]*): (?P<head>[^:\n]+?) \((?P<t1>\w+)\) (?P<relation>{}) (?P<tail>[^:\n]+?) \((?P<t2>\w+)\)".format(
        "|".join(sorted(common.RELATIONS, key=len, reverse=True))
    )
)


def steps(reasoning):
    """Reasoning in words → [(quintuple, clue)]: the inverse of `step`."""
    found = STEP.finditer(reasoning)
    return [
        (common.quintuple(m["head"], m["t1"], m["tail"], m["t2"], m["relation"]), m["clue"].strip())
        for m in found
    ]


# ------------------------------------------------------------------------------------------------ drawing and looking

SIDE, UNIT = 56, 4  # coordinates are in a 56 × 56 grid, a file has 4 pixels to the unit, for people
DAY, NIGHT, GROUND = (205, 228, 250), (40, 38, 78), (205, 190, 150)
SKIN, DARK, GOLD, WHITE, BROWN = (240, 195, 155), (45, 40, 45), (240, 185, 30), (255, 255, 255), (130, 85, 45)


class Pen:
    """ImageDraw in grid coordinates around (x, y), scaled."""

    def __init__(self, draw, x, y, scale=1.0):
        self.draw, self.x, self.y, self.scale = draw, x, y, scale

    def at(self, *points):
        return [UNIT * (o + self.scale * p) for o, p in zip(itertools.cycle((self.x, self.y)), points)]

    def box(self, fill, x0, y0, x1, y1):
        self.draw.rectangle(self.at(x0, y0, x1, y1), fill=fill)

    def oval(self, fill, x0, y0, x1, y1):
        self.draw.ellipse(self.at(x0, y0, x1, y1), fill=fill)

    def shape(self, fill, *points):
        self.draw.polygon(self.at(*points), fill=fill)


def draw_figure(pen, figure):
    """Stands on (0, 0), about 18 wide and 24 high."""
    colour = COLOURS[figure.colour]
    if figure.kind in ("person", "child"):
        if figure.kind == "child":
            pen.scale *= 0.58
        pen.oval(SKIN, -4, -24, 4, -15.5)
        pen.shape(DARK, -4, -20, -3.5, -24, 0, -25.5, 3.5, -24, 4, -20, 0, -22.5)  # hair
        pen.shape(
            colour,
            -5,
            -15,
            5,
            -15,
            9.5,
            -6.5,
            7,
            -5.5,
            5.5,
            -8,
            5.5,
            -5,
            -5.5,
            -5,
            -5.5,
            -8,
            -7,
            -5.5,
            -9.5,
            -6.5,
        )
        pen.box(DARK, -4.5, -5, -1, 0)
        pen.box(DARK, 1, -5, 4.5, 0)
    elif figure.kind == "crest":
        pen.shape(WHITE, -10, -24, 10, -24, 10, -9, 0, 0, -10, -9)
        pen.shape(colour, -8.5, -22.5, 8.5, -22.5, 8.5, -9.5, 0, -2, -8.5, -9.5)
        pen.shape(WHITE, -8.5, -19.5, -8.5, -15.5, 8.5, -9.5, 8.5, -13.5)
    elif figure.kind == "city":
        for x, top in ((-10, -15), (-3, -25), (4, -19)):
            pen.box(DARK, x - 0.3, top - 0.6, x + 6.3, 0)
            pen.box(colour, x + 0.3, top, x + 5.7, 0)
            for y in range(top + 2, -2, 4):
                pen.box(GOLD, x + 1.5, y, x + 2.5, y + 1.5)
                pen.box(GOLD, x + 3.5, y, x + 4.5, y + 1.5)
    elif figure.kind == "hut":
        pen.box(colour, -7, -9, 7, 0)
        pen.shape(BROWN, -9.5, -8.5, 0, -16, 9.5, -8.5)
        pen.box(DARK, -2, -6, 2, 0)
    elif figure.kind == "trophy":
        pen.oval(GOLD, -10, -22, 10, -12)
        pen.oval(WHITE, -7.5, -20, 7.5, -14)
        pen.shape(GOLD, -7, -24, 7, -24, 5, -13, 1.5, -10, 1.5, -6, -1.5, -6, -1.5, -10, -5, -13)
        pen.box(colour, -7.5, -7, 7.5, 0)
    else:  # stage: curtains, lamps, microphone
        pen.box(DARK, -11, -24, 11, 0)
        pen.shape(
            colour,
            -10,
            -23,
            10,
            -23,
            10,
            -18.5,
            5,
            -17,
            8.5,
            -3.5,
            10,
            -3.5,
            -10,
            -3.5,
            -8.5,
            -3.5,
            -5,
            -17,
            -10,
            -18.5,
        )
        pen.shape(DARK, -4, -16, 4, -16, 6, -4, -6, -4)
        pen.box(WHITE, -0.6, -10, 0.6, -4)
        pen.oval(GOLD, -2, -14, 2, -10)
        pen.box(BROWN, -11, -3.5, 11, 0)


def draw_sign(pen, sign):
    """In a bubble around (0, 0)."""
    pen.oval(WHITE, -11, -11, 11, 11)
    if sign == "heart":
        pink = (235, 30, 130)
        pen.oval(pink, -7.5, -6.5, 0.5, 1.5)
        pen.oval(pink, -0.5, -6.5, 7.5, 1.5)
        pen.shape(pink, -7, 0, 0, 8.5, 7, 0, 0, -2.5)
    elif sign == "cap":
        pen.shape(DARK, -9, -2, 0, -6.5, 9, -2, 0, 2.5)
        pen.shape(DARK, -5, 0.5, 0, 3, 5, 0.5, 5, 4.5, 0, 6.5, -5, 4.5)
        pen.box(GOLD, 6.5, -2, 7.7, 5.5)
    elif sign == "ball":
        pen.oval(DARK, -7.5, -7.5, 7.5, 7.5)
        pen.oval((250, 130, 20), -6.8, -6.8, 6.8, 6.8)
        pen.box(DARK, -0.5, -6.8, 0.5, 6.8)
        pen.box(DARK, -6.8, -0.5, 6.8, 0.5)
    else:  # cradle
        pen.shape(BROWN, -8, -2, 8, -2, 5.5, 4, -5.5, 4)
        pen.oval(SKIN, 1.5, -6.5, 6.5, -1.5)
        pen.box((120, 190, 230), -6.5, -4, 1.5, -2)
        pen.shape(DARK, -7, 4, 7, 4, 3.5, 6.5, -3.5, 6.5)


def draw(scene, shifts=(0, 0)):
    """The scene as a picture of 224 × 224. shifts: how far left and right figure step aside, each -1, 0 or 1 unit; it means nothing."""
    image = Image.new("RGB", (SIDE * UNIT, SIDE * UNIT), NIGHT if scene.night else DAY)
    canvas = ImageDraw.Draw(image)
    Pen(canvas, 0, 0).box(GROUND, 0, 49, SIDE, SIDE)
    if scene.sign:
        draw_sign(Pen(canvas, 14, 13), scene.sign)
    if scene.poster:
        frame = Pen(canvas, 42, 26)
        frame.box(BROWN, -13, -25, 13, 0)
        frame.box(WHITE, -12, -24, 12, -1)
        draw_figure(Pen(canvas, 42, 24, 0.82), scene.poster)
    draw_figure(Pen(canvas, 14 + shifts[0], 54), scene.left)
    draw_figure(Pen(canvas, 42 + shifts[1], 54), scene.right)
    return image


QUARTERS = {
    "sign": (0, 0, 28, 27),
    "poster": (28, 0, 56, 27),
    "left": (0, 28, 28, 56),
    "right": (28, 28, 56, 56),
}
UNLIKE = (
    24  # mean difference of a quarter from its best match, of 255, above which a picture is not of this world
)


def look(image):
    """A picture of this world → its scene, from the pixels alone: each quarter is what it resembles most. Raises ValueError on others."""
    small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    corner = small.getpixel((28, 1))
    night = sum(corner) < 384
    best = {}
    for place, box in QUARTERS.items():
        quarter = small.crop(box)
        known = gallery(place, night)
        distances = [sum(ImageChops.difference(quarter, picture).tobytes()) for _, picture in known]
        index = min(range(len(known)), key=distances.__getitem__)
        distance = distances[index] / len(quarter.tobytes())
        if distance > UNLIKE:
            raise ValueError(
                f"the {place} quarter resembles nothing of this world (difference {distance:.0f})"
            )
        best[place] = known[index][0]
    return Scene(best["left"], best["right"], best["sign"], best["poster"], night)


@functools.cache
def gallery(place, night):
    """[(what, picture of that quarter)] of everything that can stand there."""
    figures = [Figure(kind, colour) for kind in TYPE for colour in COLOURS]
    plain = Scene(figures[0], figures[0], None, None, night)
    options = {
        "sign": (None, *SIGNS),
        "poster": (None, *(f for f in figures if f.kind in POSTERS)),
        "left": figures,
        "right": figures,
    }
    shifts = (-1, 0, 1) if place in ("left", "right") else (0,)
    return [
        (
            what,
            draw(plain._replace(**{place: what}), (shift, shift))
            .resize((SIDE, SIDE), Image.Resampling.BOX)
            .crop(QUARTERS[place]),
        )
        for what in options[place]
        for shift in shifts
    ]


# ------------------------------------------------------------------------------------------------ the data set

PER_TEXT = 4  # pictures of a text
PATTERNS = (  # types of a text's names, drawn with equal chance; the third stands for whatever a poster can show
    ("per", "per"), ("per", "per", "org"), ("per", "per", "loc"), ("per", "per", "misc"), ("per", "org"), ("per", "loc"), ("misc", "per"),
    ("loc", "per"), ("org", "loc"), ("loc", "loc"), ("misc", "loc"),
)  # fmt: skip


def group(rng):
    """A text with PER_TEXT scenes: different pictures that share their gold as little as the text's names allow, but never all."""
    by_type = {label: [name for name, types in LEXICON.items() if label in types] for label in common.TYPES}
    while True:
        names = [rng.choice(by_type[label]) for label in rng.choice(PATTERNS)]
        pools = {}  # gold: scenes that have it
        for scene in scenes():
            if fits(names, scene):
                pools.setdefault(tuple(q for q, _ in read(names, scene)), []).append(scene)
        if len(set(names)) < len(names) or len(pools) < 2:
            continue
        golds = rng.sample(sorted(pools), min(PER_TEXT, len(pools)))
        picked = [rng.sample(pools[golds[i % len(golds)]], PER_TEXT)[i] for i in range(PER_TEXT)]
        if len(set(picked)) == PER_TEXT:
            return rng.choice(TEMPLATES[len(names)]).format(*names), picked


def make(sizes, seed=0):
    """{split: number} → {split: [(text, scene)]}. A text with all its pictures stays in one split, so no pair is in two."""
    rng, seen, splits = random.Random(f"world:{seed}"), set(), {}
    for split, size in sizes.items():
        pairs = splits.setdefault(split, [])
        while len(pairs) < size:
            text, picked = group(rng)
            if text not in seen:
                seen.add(text)
                pairs += [(text, scene) for scene in picked]
        del pairs[size:]
        rng.shuffle(pairs)
    return splits


def write(out, sizes, seed=0):
    """Write the splits as our JSONL with their pictures, and grey.jsonl."""
    out = Path(out)
    (out / "img").mkdir(parents=True, exist_ok=True)
    for split, pairs in make(sizes, seed).items():
        lines = []
        for i, (text, scene) in enumerate(pairs):
            name = f"{split}-{i:05d}"
            rng = random.Random(f"{seed}:{name}")
            draw(scene, (rng.randint(-1, 1), rng.randint(-1, 1))).save(out / "img" / f"{name}.png")
            gold = [list(q) for q, _ in read(names_in(text), scene)]
            lines.append(
                data.jsonl_line({"id": name, "text": text, "image": f"img/{name}.png", "quintuples": gold})
            )
        data.write_atomic(out / f"{split}.jsonl", "".join(lines))
    Image.new("RGB", (SIDE * UNIT, SIDE * UNIT), "grey").save(out / "img" / "grey.png")
    data.write_atomic(
        out / "grey.jsonl", "".join(re.sub(r"img/[\w-]+\.png", "img/grey.png", line) for line in lines)
    )


def corpus(seed=1, size=1200):
    """Texts and chains, for the tokenizer: every name and word of the world often enough to become one token."""
    pairs = make({"corpus": size}, seed)["corpus"]
    answers = [common.format_answer(q for q, _ in read(names_in(text), scene)) for text, scene in pairs]
    return [text for text, _ in pairs] + [chain(*pair) for pair in pairs] + answers


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", required=True, help="folder to write [ours]")
    parser.add_argument("--train", type=int, default=200, help="training examples [ours]")
    parser.add_argument("--val", type=int, default=40, help="validation examples [ours]")
    parser.add_argument("--test", type=int, default=80, help="test examples [ours]")
    parser.add_argument("--seed", type=int, default=0, help="of texts and pictures [ours]")
    return parser.parse_args(argv)


@common.exit_codes
def main(args):
    write(args.out, {"train": args.train, "val": args.val, "test": args.test}, args.seed)
    print(
        f"{args.out}: {args.train} training, {args.val} validation, {args.test} test examples (seed {args.seed})"
    )


if __name__ == "__main__":
    main(parse_args())
