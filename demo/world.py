"""The picture world of the demo: tweets whose image decides the quintuples, in the real label set.

A tweet names two or three things in words that say nothing about them ("RT @fan : Paris and Emma tonight").
The picture shows, in the order of the names, a figure on the left, one on the right and perhaps one on a
poster, and perhaps a sign in a bubble. The figures decide the types (Paris is a person, a city …), figures
and sign decide relation and direction, and who wears the poster's colour has to do with it:

    person + person   heart couple · cap alumi · ball peer      person + child    parent
    person + city     place of residence                        child + child     siblings
                      cradle place of birth                     crest + city      locate at
    person + crest    member of                                 stage + city      held on
    person + trophy   awarded                                   city + hut        contain
    person + stage    present in

Each text comes with several pictures and different gold, so a model that does not look cannot know. The
teacher imports this, so it does without torch.

    python -m demo.world --out runs/world --train 200 --val 40 --test 80

Reads: nothing.
Writes: OUT/{train,val,test}.jsonl, OUT/img/*.png, OUT/grey.jsonl (the last split, all pictures grey)
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
    "per": "Emma|Liam|Noah|Olivia|Mia|Lucas|Ava|Ethan",
    "org": "Google|Nike|Real Madrid",
    "loc": "Berlin|Tokyo|New York",
    "misc": "Grammy|Eurovision|Golden Globe",
    "per loc": "Jordan|Paris|Austin|Sydney|Florence",
    "per org": "Disney|Ford|Tesla|Hilton",
    "per misc": "Oscar|Emmy|Tony",
    "org loc": "Amazon|Chelsea|Liverpool",
    "loc misc": "Coachella|Monaco|Wimbledon",
    "per org loc": "Washington|Phoenix|Lincoln",
}
LEXICON = {name: types.split() for types, names in NAMES.items() for name in names.split("|")}
ANY_NAME = re.compile("|".join(sorted(LEXICON, key=len, reverse=True)))
TEMPLATES = {  # by the number of names
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


def names_in(text):
    """Names of the lexicon in `text`, in order."""
    return ANY_NAME.findall(text)


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
POSTERS = {  # what a poster shows: the relation of whoever wears its colour to it
    "crest": "member of",
    "city": "place of residence",
    "stage": "present in",
    "trophy": "awarded",
}
# (head's figure, tail's figure, sign): (relation, clue in words). A scene shows the two either way round.
RULES = {
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
    kind: str  # of TYPE
    colour: str  # of COLOURS

    def __str__(self):
        if TYPE[self.kind] == "per":
            return f"{self.kind} in {self.colour}"
        return f"{self.colour} {self.kind}"


class Scene(NamedTuple):
    left: Figure
    right: Figure
    sign: str | None
    poster: Figure | None
    night: bool

    @property
    def figures(self):
        """In the order of the text's names."""
        if self.poster is None:
            return [self.left, self.right]
        return [self.left, self.right, self.poster]


@functools.cache
def scenes():
    """Every scene the grammar allows; a poster only beside two people."""
    orders = set()
    for first, second, sign in RULES:
        orders |= {(first, second, sign), (second, first, sign)}
    posters = [None, *itertools.chain.from_iterable(map(in_each_colour, POSTERS))]
    result = []
    for left, right, sign in sorted(orders, key=str):
        people = TYPE[left] == TYPE[right] == "per"
        parts = (
            in_each_colour(left),
            in_each_colour(right),
            [sign],
            posters if people else [None],
            [False, True],
        )
        result += itertools.starmap(Scene, itertools.product(*parts))
    return result


def in_each_colour(kind):
    return [Figure(kind, colour) for colour in COLOURS]


def read(names, scene):
    """What names and scene say together → [(quintuple, clue in words)].

    A name beyond the scene's figures is not in the picture: nothing is said of it.
    """
    named = list(zip(names, scene.figures, strict=False))
    if len(named) < 2:
        return []
    head, tail = named[:2]
    rule = RULES.get((head[1].kind, tail[1].kind, scene.sign))
    if rule is None:
        head, tail = tail, head
        rule = RULES.get((head[1].kind, tail[1].kind, scene.sign))
    if rule is None:
        return []
    relation, clue = rule
    found = [(related(head, relation, tail), clue)]
    if len(named) == 3:
        poster = scene.poster
        for person in named[:2]:
            if person[1].colour == poster.colour:
                clue = f"{poster.colour} as the {poster.kind}"
                found.append((related(person, POSTERS[poster.kind], named[2]), clue))
    return found


def related(head, relation, tail):
    """head, tail: (name, Figure) → quintuple."""
    name, figure = head
    other, shown = tail
    return common.quintuple(name, TYPE[figure.kind], other, TYPE[shown.kind], relation)


def fits(names, scene):
    """Whether each name can be what the scene shows for it.

    A third name may be absent from the picture, a third figure needs a name.
    """
    if len(scene.figures) > len(names):
        return False
    shown = zip(names, scene.figures, strict=False)
    return all(TYPE[figure.kind] in LEXICON[name] for name, figure in shown)


# ------------------------------------------------------------------------------------------------ chains


def describe(scene):
    """The image description of a chain."""
    time_of_day = "Night" if scene.night else "Day"
    sentence = f"{time_of_day}; left a {scene.left}, right a {scene.right}"
    if scene.sign:
        sentence += f", a {scene.sign} above"
    if scene.poster:
        sentence += f", a poster of a {scene.poster}"
    return sentence + "."


def align(names, scene):
    """The visual-text alignment of a chain."""
    shown = len(scene.figures)
    ties = [f"{name} is the {figure}" for name, figure in zip(names, scene.figures, strict=False)]
    ties += [f"{name} is not shown" for name in names[shown:]]
    return ", ".join(ties) + "."


def step(quintuple, clue):
    """One step of the reasoning, which `steps` reads back."""
    q = quintuple
    return f"{clue}: {q.head} ({q.head_type}) {q.relation} {q.tail} ({q.tail_type})."


def chain(text, scene, gold=None):
    """The MP-CoT a good teacher writes for this text and scene.

    gold: the quintuples it must lead to; absent, what the picture says.

    >>> emma = Scene(Figure("city", "red"), Figure("person", "blue"), "cradle", None, False)
    >>> print(chain("Paris x Emma # news", emma))
    Image Description: Day; left a red city, right a person in blue, a cradle above.
    Visual-Text Alignment: Paris is the red city, Emma is the person in blue.
    Quintuple Reasoning: a cradle: Emma (per) place of birth Paris (loc).
    """
    names = names_in(text)
    clues = dict(read(names, scene))
    wanted = clues if gold is None else gold
    reasoning = " ".join(step(q, clues.get(q, "the tweet")) for q in wanted)
    return cot(describe(scene), align(names, scene), reasoning or "nothing relates.")


def cot(*parts):
    """The parts of MP-CoT, each behind its heading. Raises ValueError where one is missing."""
    headings = list(common.COT_PARTS)
    return "\n".join(f"{heading}: {part}" for heading, part in zip(headings, parts, strict=True))


ANY_RELATION = "|".join(sorted(common.RELATIONS, key=len, reverse=True))
STEP = re.compile(
    r"(?P<clue>[^:.\n]*): (?P<head>[^:\n]+?) \((?P<head_type>\w+)\) "
    rf"(?P<relation>{ANY_RELATION}) (?P<tail>[^:\n]+?) \((?P<tail_type>\w+)\)"
)


def steps(reasoning):
    """Reasoning in words → [(quintuple, clue)]: the inverse of `step`."""
    found = []
    for match in STEP.finditer(reasoning):
        fields = match.groupdict()
        clue = fields.pop("clue").strip()
        found.append((common.quintuple(**fields), clue))
    return found


# ------------------------------------------------------------------------------------------------ drawing

SIDE = 56  # coordinates are in a grid of 56 × 56 …
UNIT = 4  # … and a file has 4 × 4 pixels to the unit, for people
DAY, NIGHT, GROUND = (205, 228, 250), (40, 38, 78), (205, 190, 150)
SKIN, DARK, GOLD, WHITE, BROWN = (240, 195, 155), (45, 40, 45), (240, 185, 30), (255, 255, 255), (130, 85, 45)
PINK, ORANGE, QUILT = (235, 30, 130), (250, 130, 20), (120, 190, 230)
OWN = "own"  # stands for the figure's own colour

# A drawing is a list of strokes, the first at the bottom: (form, colour, points as in SVG, "x,y x,y …"). The
# forms are Pillow's. A figure stands on (0, 0), about 18 wide and 24 high; a sign lies around (0, 0).
PERSON = [
    ("ellipse", SKIN, "-4,-24 4,-15.5"),
    ("polygon", DARK, "-4,-20 -3.5,-24 0,-25.5 3.5,-24 4,-20 0,-22.5"),  # hair
    (
        "polygon",
        OWN,
        "-5,-15 5,-15 9.5,-6.5 7,-5.5 5.5,-8 5.5,-5 -5.5,-5 -5.5,-8 -7,-5.5 -9.5,-6.5",
    ),
    ("rectangle", DARK, "-4.5,-5 -1,0"),
    ("rectangle", DARK, "1,-5 4.5,0"),
]
CREST = [
    ("polygon", WHITE, "-10,-24 10,-24 10,-9 0,0 -10,-9"),
    ("polygon", OWN, "-8.5,-22.5 8.5,-22.5 8.5,-9.5 0,-2 -8.5,-9.5"),
    ("polygon", WHITE, "-8.5,-19.5 -8.5,-15.5 8.5,-9.5 8.5,-13.5"),
]
HUT = [
    ("rectangle", OWN, "-7,-9 7,0"),
    ("polygon", BROWN, "-9.5,-8.5 0,-16 9.5,-8.5"),
    ("rectangle", DARK, "-2,-6 2,0"),
]
TROPHY = [
    ("ellipse", GOLD, "-10,-22 10,-12"),
    ("ellipse", WHITE, "-7.5,-20 7.5,-14"),
    ("polygon", GOLD, "-7,-24 7,-24 5,-13 1.5,-10 1.5,-6 -1.5,-6 -1.5,-10 -5,-13"),
    ("rectangle", OWN, "-7.5,-7 7.5,0"),
]
STAGE = [
    ("rectangle", DARK, "-11,-24 11,0"),
    (  # curtains
        "polygon",
        OWN,
        "-10,-23 10,-23 10,-18.5 5,-17 8.5,-3.5 10,-3.5 -10,-3.5 -8.5,-3.5 -5,-17 -10,-18.5",
    ),
    ("polygon", DARK, "-4,-16 4,-16 6,-4 -6,-4"),
    ("rectangle", WHITE, "-0.6,-10 0.6,-4"),  # microphone
    ("ellipse", GOLD, "-2,-14 2,-10"),
    ("rectangle", BROWN, "-11,-3.5 11,0"),
]
HEART = [
    ("ellipse", PINK, "-7.5,-6.5 0.5,1.5"),
    ("ellipse", PINK, "-0.5,-6.5 7.5,1.5"),
    ("polygon", PINK, "-7,0 0,8.5 7,0 0,-2.5"),
]
CAP = [
    ("polygon", DARK, "-9,-2 0,-6.5 9,-2 0,2.5"),
    ("polygon", DARK, "-5,0.5 0,3 5,0.5 5,4.5 0,6.5 -5,4.5"),
    ("rectangle", GOLD, "6.5,-2 7.7,5.5"),
]
BALL = [
    ("ellipse", DARK, "-7.5,-7.5 7.5,7.5"),
    ("ellipse", ORANGE, "-6.8,-6.8 6.8,6.8"),
    ("rectangle", DARK, "-0.5,-6.8 0.5,6.8"),
    ("rectangle", DARK, "-6.8,-0.5 6.8,0.5"),
]
CRADLE = [
    ("polygon", BROWN, "-8,-2 8,-2 5.5,4 -5.5,4"),
    ("ellipse", SKIN, "1.5,-6.5 6.5,-1.5"),
    ("rectangle", QUILT, "-6.5,-4 1.5,-2"),
    ("polygon", DARK, "-7,4 7,4 3.5,6.5 -3.5,6.5"),
]
BUBBLE = [("ellipse", WHITE, "-11,-11 11,11")]
FRAME = [("rectangle", BROWN, "-13,-25 13,0"), ("rectangle", WHITE, "-12,-24 12,-1")]  # of a poster
EARTH = [("rectangle", GROUND, f"0,49 {SIDE},{SIDE}")]


def city():
    """Three towers with lit windows."""
    strokes = []
    for x, top in ((-10, -15), (-3, -25), (4, -19)):
        strokes.append(("rectangle", DARK, f"{x - 0.3},{top - 0.6} {x + 6.3},0"))
        strokes.append(("rectangle", OWN, f"{x + 0.3},{top} {x + 5.7},0"))
        for y in range(top + 2, -2, 4):
            strokes.append(("rectangle", GOLD, f"{x + 1.5},{y} {x + 2.5},{y + 1.5}"))
            strokes.append(("rectangle", GOLD, f"{x + 3.5},{y} {x + 4.5},{y + 1.5}"))
    return strokes


DRAWINGS = {
    "person": PERSON,
    "child": PERSON,
    "crest": CREST,
    "city": city(),
    "hut": HUT,
    "trophy": TROPHY,
    "stage": STAGE,
    "heart": BUBBLE + HEART,
    "cap": BUBBLE + CAP,
    "ball": BUBBLE + BALL,
    "cradle": BUBBLE + CRADLE,
}
CHILD = 0.58  # of a person's size


def paint(canvas, strokes, x, y, scale=1.0, own=None):
    """Lay strokes on an ImageDraw, their (0, 0) on (x, y), in units. own: the colour that OWN stands for."""
    for form, colour, points in strokes:
        pixels = []
        for point in points.split():
            right, down = point.split(",")
            pixels.append((UNIT * (x + scale * float(right)), UNIT * (y + scale * float(down))))
        getattr(canvas, form)(pixels, fill=own if colour == OWN else colour)


def paint_figure(canvas, figure, x, y, scale=1.0):
    """A figure that stands on (x, y)."""
    if figure.kind == "child":
        scale *= CHILD
    paint(canvas, DRAWINGS[figure.kind], x, y, scale, COLOURS[figure.colour])


def draw(scene, shifts=(0, 0)):
    """The scene as a picture of 224 × 224.

    shifts: how far left and right figure step aside, each -1, 0 or 1 unit; it means nothing.
    """
    image = Image.new("RGB", (SIDE * UNIT, SIDE * UNIT), NIGHT if scene.night else DAY)
    canvas = ImageDraw.Draw(image)
    paint(canvas, EARTH, 0, 0)
    if scene.sign:
        paint(canvas, DRAWINGS[scene.sign], 14, 13)
    if scene.poster:
        paint(canvas, FRAME, 42, 26)
        paint_figure(canvas, scene.poster, 42, 24, 0.82)
    paint_figure(canvas, scene.left, 14 + shifts[0], 54)
    paint_figure(canvas, scene.right, 42 + shifts[1], 54)
    return image


# ------------------------------------------------------------------------------------------------ looking

QUARTERS = {  # where each part of a scene is, in units: left, upper, right, lower
    "sign": (0, 0, 28, 27),
    "poster": (28, 0, 56, 27),
    "left": (0, 28, 28, 56),
    "right": (28, 28, 56, 56),
}
UNLIKE = 24  # of 255: a quarter that differs more from its best match, in the mean, is not of this world


def look(image):
    """A picture of this world → its scene, from the pixels alone: each quarter is what it resembles most.

    Raises ValueError on other pictures.
    """
    small = shrink(image.convert("RGB"))
    night = sum(small.getpixel((28, 1))) < 384
    seen = {}
    for place, box in QUARTERS.items():
        quarter = small.crop(box)
        known = gallery(place, night)
        distances = [mean_difference(quarter, picture) for _, picture in known]
        distance = min(distances)
        if distance > UNLIKE:
            raise ValueError(
                f"the {place} quarter resembles nothing of this world (difference {distance:.0f})"
            )
        seen[place], _ = known[distances.index(distance)]
    return Scene(seen["left"], seen["right"], seen["sign"], seen["poster"], night)


def shrink(image):
    """To a pixel a unit."""
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


def mean_difference(image, other):
    """0 … 255, over pixels and channels."""
    difference = ImageChops.difference(image, other).tobytes()
    return sum(difference) / len(difference)


@functools.cache
def gallery(place, night):
    """[(what, picture of that quarter)] of everything that can stand there."""
    figures = [figure for kind in TYPE for figure in in_each_colour(kind)]
    options = {
        "sign": [None, *SIGNS],
        "poster": [None, *(figure for figure in figures if figure.kind in POSTERS)],
        "left": figures,
        "right": figures,
    }
    plain = Scene(figures[0], figures[0], None, None, night)
    shifts = (-1, 0, 1) if place in ("left", "right") else (0,)
    pictures = []
    for what, shift in itertools.product(options[place], shifts):
        image = draw(plain._replace(**{place: what}), (shift, shift))
        pictures.append((what, shrink(image).crop(QUARTERS[place])))
    return pictures


# ------------------------------------------------------------------------------------------------ data set

PER_TEXT = 4  # pictures of a text
# Types of a text's names, drawn with equal chance. The third stands for whatever a poster can show.
PATTERNS = [
    "per per",
    "per per org",
    "per per loc",
    "per per misc",
    "per org",
    "per loc",
    "misc per",
    "loc per",
    "org loc",
    "loc loc",
    "misc loc",
]


def group(rng):
    """A text with PER_TEXT scenes.

    The pictures differ, and share their gold as little as the text's names allow, but never all.
    """
    while True:
        names = [rng.choice(names_for(label)) for label in rng.choice(PATTERNS).split()]
        pools = {}  # gold: scenes that have it
        for scene in scenes():
            if fits(names, scene):
                gold = tuple(q for q, _ in read(names, scene))
                pools.setdefault(gold, []).append(scene)
        if len(set(names)) < len(names) or len(pools) < 2:
            continue
        golds = rng.sample(sorted(pools), min(PER_TEXT, len(pools)))
        picked = []
        for i in range(PER_TEXT):
            pool = pools[golds[i % len(golds)]]
            picked.append(rng.sample(pool, PER_TEXT)[i])
        if len(set(picked)) == PER_TEXT:
            return rng.choice(TEMPLATES[len(names)]).format(*names), picked


@functools.cache
def names_for(label):
    """The names that can be of this entity type."""
    return [name for name, types in LEXICON.items() if label in types]


def make(sizes, seed=0):
    """{split: number} → {split: [(text, scene)]}.

    A text with all its pictures stays in one split, so no pair is in two.
    """
    rng = random.Random(f"world:{seed}")
    seen = set()
    splits = {}
    for split, size in sizes.items():
        pairs = []
        while len(pairs) < size:
            text, picked = group(rng)
            if text not in seen:
                seen.add(text)
                pairs += [(text, scene) for scene in picked]
        del pairs[size:]
        rng.shuffle(pairs)
        splits[split] = pairs
    return splits


def write(out, sizes, seed=0):
    """Write the splits as our JSONL with their pictures, and grey.jsonl."""
    out = Path(out)
    (out / "img").mkdir(parents=True, exist_ok=True)
    for split, pairs in make(sizes, seed).items():
        rows = []
        for i, (text, scene) in enumerate(pairs):
            name = f"{split}-{i:05d}"
            rng = random.Random(f"{seed}:{name}")
            shifts = (rng.randint(-1, 1), rng.randint(-1, 1))
            draw(scene, shifts).save(out / "img" / f"{name}.png")
            gold = [list(q) for q, _ in read(names_in(text), scene)]
            rows.append({"id": name, "text": text, "image": f"img/{name}.png", "quintuples": gold})
        data.write_atomic(out / f"{split}.jsonl", "".join(map(data.jsonl_line, rows)))
    Image.new("RGB", (SIDE * UNIT, SIDE * UNIT), "grey").save(out / "img" / "grey.png")
    grey = [row | {"image": "img/grey.png"} for row in rows]
    data.write_atomic(out / "grey.jsonl", "".join(map(data.jsonl_line, grey)))


def corpus(seed=1, size=1200):
    """Texts and chains, for the tokenizer: every name and word often enough to become one token."""
    pairs = make({"corpus": size}, seed)["corpus"]
    texts = [text for text, _ in pairs]
    chains = [chain(text, scene) for text, scene in pairs]
    answers = []
    for text, scene in pairs:
        gold = [q for q, _ in read(names_in(text), scene)]
        answers.append(common.format_answer(gold))
    return texts + chains + answers


# ------------------------------------------------------------------------------------------------ main


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
    sizes = f"{args.train} training, {args.val} validation, {args.test} test examples"
    print(f"{args.out}: {sizes} (seed {args.seed})")


if __name__ == "__main__":
    main(parse_args())
