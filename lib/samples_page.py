"""04's page: the latest responses beside their image, with the parts of their reward and their advantage.

No script draws it, and neither clock nor folder stands in it: a run that was killed ends with the same page.
"""

import collections
import itertools
import json

import common
from lib import page, scoring
from lib.data import write_atomic
from lib.figures import div, dot, element, isolated, paragraph, span
from lib.overview import heading, section
from lib.run import warn

RESPONSES = 200  # most of a page
BYTES = 4_000_000  # most of its cards; older groups are left out
SIDE = 320  # of an image, pixels
LONG = 240  # characters; a longer response stands behind a fold
OWN = ("step", "id", "response", "finished", "advantage")  # fields of a row that are no part of its reward


def write(out, examples, prompt):
    """Write OUT/samples.html from OUT/samples.jsonl. One line says what is missing, and training goes on.

    examples: what is trained on; prompt: a name of common.PROMPTS.
    """
    try:
        groups = latest_groups(out / "samples.jsonl")
        ids = {rows[0]["id"] for rows in groups}
        known = {}
        pictures = {}
        for example in examples:
            if example.id in ids:
                known[example.id] = example
                pictures[example.id] = page.thumbnail(example.image, SIDE)
        write_atomic(out / "samples.html", drawn_page(groups, known, pictures, prompt == "direct"))
    except (common.InputError, common.Stopped, OSError, ValueError) as error:
        warn(f"samples.html is not written, training goes on: {common.first_line(error)}")
        return
    blind = [known[name].image for name in known if pictures[name] is None]
    if blind:
        warn(f"samples.html lacks {len(blind)} of {len(pictures)} images: {blind[0]} cannot be read")


def latest_groups(path):
    """The last RESPONSES rows of samples.jsonl as groups, the newest step first; a group that begins before
    them is left out."""
    with open(path, encoding="utf-8", newline="\n") as lines:
        tail = collections.deque(lines, maxlen=RESPONSES + 1)
    groups = []
    for _, group in itertools.groupby(map(json.loads, tail), key=lambda row: (row["step"], row["id"])):
        groups.append(list(group))
    if len(tail) > RESPONSES and len(groups) > 1:
        del groups[0]
    return sorted(groups, key=lambda group: -group[0]["step"])


def drawn_page(groups, known, pictures, direct):
    """HTML of the page. known: {id: Example}; pictures: {id: data URL, or None}; direct: without thoughts."""
    size = 0
    cards = collections.defaultdict(list)  # step: cards
    shown = 0
    for rows in groups:
        name = rows[0]["id"]
        card = group_card(rows, known.get(name), pictures.get(name), direct)
        size += len(card.encode())
        if shown and size > BYTES:
            break
        cards[rows[0]["step"]].append(card)
        shown += len(rows)
    facts = [("responses", shown), ("of step", ", ".join(map(str, cards)))]
    content = heading("04_grpo.py: each group's best response first", "Latest rollouts", facts)
    for step, group in cards.items():
        content += section(f"Step {step}", *group)
    return page.fill("samples.html", None, "Latest rollouts", div("rollouts", *content))


def group_card(rows, example, picture, direct):
    """One prompt and its responses. example: None where --data holds it no longer."""
    image = div("noimg", "no image here")
    if picture:
        image = element("img", {"src": picture, "alt": "image of the tweet"})
    name = span("mono", isolated(rows[0]["id"]))
    about = paragraph("soft small num", name, f" · {len(rows)} responses")
    tweet = paragraph("soft", "not in --data any more")
    gold = ()
    if example:
        gold = scoring.distinct(example.quintuples)
        tweet = element("p", {"class": "tweet", "dir": "auto"}, example.text)
    shown = [about, tweet]
    for q in gold:
        shown.append(item("gold", "ink", q))
    if not gold:
        shown.append(paragraph("soft small", "gold: nothing"))
    for row in sorted(rows, key=lambda row: -row["advantage"]):
        shown.append(response(row, gold, direct))
    columns = element("div", {}, image), element("div", {}, *shown)
    return element("article", {"class": "card example"}, *columns)


def response(row, gold, direct):
    """A response: advantage, reward and its parts, what it answers against gold, its text."""
    advantage = row["advantage"]
    hue = "better" if advantage > 0 else "worse"
    style = {"style": f"color: var(--{hue})"} if advantage else {}
    scores = [element("span", {}, "advantage ", element("b", style, f"{advantage:+.2f}"))]
    for name, value in row.items():
        if name not in OWN:
            value = element("b", {}, f"{value:.3g}")
            scores.append(element("span", {}, f"{name} ", value))
    if not row["finished"]:
        scores.append("cut off")
    scores = div("scores small num", *scores)
    return div("response", scores, answer(row["response"], gold, direct), text(row["response"]))


def answer(written, gold, direct):
    """What a response predicts, each with its class as in 05, and how much of gold it misses."""
    read = common.parse_response(written, direct)
    if read.malformed and not read.quintuples:
        return [paragraph("soft small", "no readable answer")]
    pred = scoring.distinct(read.quintuples)
    shown = [item("correct", "correct", q) for q in pred if q in gold]
    errors = scoring.classify(pred, gold)
    shown += [item(kind, kind, q) for kind, q, _ in errors if q]
    missing = sum(q is None for _, q, _ in errors)
    missed = f"{missing} of {len(gold)} missing"
    if not shown:
        missed = f"nothing predicted · {missed}"
    return [*shown, paragraph("soft small", missed)]


def item(kind, colour, q):
    """A quintuple behind the class it is in."""
    tag = element("div", {"class": "tag", "style": f"--c: var(--{colour})"}, dot(colour), kind)
    head = span("ent", isolated(q.head), element("small", {}, q.head_type))
    tail = span("ent", isolated(q.tail), element("small", {}, q.tail_type))
    relation = span("rel", "— ", element("b", {}, isolated(q.relation)), " → ")
    return div("item", tag, element("div", {}, head, relation, tail))


def text(written):
    """The response as it was written, folded where it is long."""
    shown = element("pre", {"class": "raw mono", "dir": "auto"}, written)
    if len(written) <= LONG:
        return shown
    summary = element("summary", {}, f"response, {len(written)} characters")
    return element("details", {}, summary, shown)
