"""What models write is read: cases, a perfect system in every form, round trips, leaks, refusals, judges."""

import json
import random
import time
from pathlib import Path

import pytest
from conftest import DATA, needs_data
from forms import FORMS
from hypothesis import given, settings
from hypothesis import strategies as st

import common
from common import quintuple
from demo import teacher
from lib import data, leaks, prose, reply

CASES = Path(__file__).parent / "cases"
A = quintuple("Ann Lee", "per", "Acme", "org", "member of")
R = quintuple("Rome", "loc", "Italy", "loc", "contain")


def cases(*names):
    lines = []
    for name in names:
        lines += (CASES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return list(map(json.loads, lines))


def gold_sets():
    """Every set of quintuples in the real annotations."""
    splits = ("train", "val", "test")
    examples = [data.load_examples(DATA / "jmere" / f"{split}.json") for split in splits]
    return [example.quintuples for split in examples for example in split]


# -------------------------------------------------------------------------------- quintuples


@pytest.mark.parametrize("name", ["answers", "more_answers"])
def test_answers(name):
    wrong = []
    for case in cases(name):
        response = common.parse_response(case["text"], case["direct"])
        right = list(map(list, response.quintuples)) == case["expected"]
        if "malformed" in case:
            right = right and bool(response.malformed) == case["malformed"]
        if not right:
            wrong.append((case, response))
    print(f"{name}: {len(cases(name)) - len(wrong)} of {len(cases(name))} read as meant")
    assert not wrong, wrong[:3]


def f1_in_form(write, golds):
    read = [common.parse_response(write(gold), direct=True).quintuples for gold in golds]
    return common.score(read, golds)["jmere"]["f1"]


def test_a_perfect_system_in_every_form_made_up():
    """Names with commas, brackets, quotes and signs, several a tweet; as many forms as the next test."""
    names = ["Ann Lee", "Acme, Inc.", "A. (Al) Bo", "AC / DC", "#Rome", "U.S.", "Dwayne - Johnson", "50 Cent"]
    rng = random.Random(0)
    golds = []
    for _ in range(40):
        size = rng.randrange(1, 4)
        gold = [made_up(names, rng) for _ in range(size)]
        golds.append(list(dict.fromkeys(gold)))
    scores = {form: f1_in_form(write, golds) for form, write in FORMS.items()}
    assert len(FORMS) >= 40 and sum(score == 1 for score in scores.values()) / len(scores) > 0.8, scores
    assert min(scores.values()) > 0.7, min(scores.items(), key=lambda item: item[1])


def made_up(names, rng):
    head, tail = rng.sample(names, 2)
    types = rng.choices(common.TYPES, k=2)
    return quintuple(head, types[0], tail, types[1], rng.choice(common.RELATIONS))


@needs_data
def test_a_perfect_system_in_every_form():
    golds = gold_sets()
    scores = {form: f1_in_form(write, golds) for form, write in FORMS.items()}
    print(f"\nF1 of a perfect system on {len(golds)} real gold sets, {len(FORMS)} forms")
    for form, score in scores.items():
        print(f"  {form:44} {score:.4f}")
    whole = sum(score == 1 for score in scores.values())
    print(f"every set whole in {whole} forms")
    assert len(golds) == 4589 and whole >= 90
    # "Doc ) Owens" stands in round brackets like the end of an item; 'America Bitch"---' ends a string.
    assert min(scores.values()) > 0.9998, min(scores.items(), key=lambda item: item[1])


plain = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
syntax = st.sampled_from(
    [*"[]()\"';:-\\{}*|`$=#_（，【“”<>.\u200b\x01", ", ", "per", "org", "None", "head: ", "\\n", "member of"]
    + ["Answer: ", "1. ", "<br>", "[THINK]", "Final answer:", "<|x|>", "\\boxed{", "->", " and ", "//", "<b>"]
    + ["</answer>", "<think>", "```", "type: ", "a"]
)
names = st.one_of(plain, st.lists(syntax, min_size=1).map("".join)).map(common.normalise_text).filter(bool)
quintuples = st.builds(
    quintuple,
    names,
    st.sampled_from(common.TYPES),
    names,
    st.sampled_from(common.TYPES),
    st.sampled_from(common.RELATIONS),
)


@given(st.lists(quintuples, max_size=4))
@settings(max_examples=800, deadline=None)
def test_every_name_survives(items):
    direct = common.parse_response(common.format_answer(items), direct=True)
    reasoned = common.parse_response(common.format_response("x", items))
    for response in (direct, reasoned):
        assert response.quintuples == tuple(items)
        assert (response.malformed, response.stray, response.well_formed) == (0, 0, True)


@given(st.one_of(st.text(), st.lists(syntax).map("".join)), st.booleans())
@settings(max_examples=500, deadline=None)
def test_any_text_is_read(text, direct):
    response = common.parse_response(text, direct)
    assert min(response.malformed, response.stray) >= 0
    assert all(all(q) for q in response.quintuples)
    json.dumps(response, ensure_ascii=False)
    common.parse_scores(text)
    common.parse_cot(text)


ITEM_A, ITEM_R = common.format_answer([A]), common.format_answer([R])


@pytest.mark.parametrize(
    ("answer", "found", "malformed", "stray"),
    [
        ("", 0, 0, 0),
        ("[]", 0, 0, 0),
        ("None.", 0, 0, 0),
        ("No quintuples.", 0, 0, 0),
        (f"{ITEM_A}\n{ITEM_A}", 2, 0, 0),  # repeats are kept
        (f"Here are the quintuples I found:\n{ITEM_A}", 1, 0, 1),
        (f"{ITEM_A}\nI hope this helps", 1, 0, 1),
        (f"{ITEM_A} because she works there", 1, 0, 1),
        ("[Ann Lee, per, Acme, org]", 0, 1, 0),
        ("[Ann Lee, per, , org, peer]", 0, 1, 0),
        ("[Ann Lee, member of, Acme]", 0, 1, 0),
        (f"[foo], {ITEM_A}", 1, 1, 0),
        ("[Ann Lee, animal, Acme, org, eats]", 1, 0, 0),  # a wrong quintuple, not a malformed one
    ],
)
def test_two_questions(answer, found, malformed, stray):
    """Evaluation asks for the set; the reward also for malformed and stray: either one costs all but form."""
    response = common.parse_response(f"<think>so</think><answer>{answer}</answer>")
    assert len(response.quintuples) == found
    assert (response.malformed, bool(response.stray)) == (malformed, bool(stray))
    gold = list(response.quintuples)
    paid = common.accuracy_reward(response, gold) > 0 and common.partial_reward(response, gold) > 0
    assert paid == (not malformed and not stray)
    assert common.format_reward(response) == 1


def cpu_seconds(text, read):
    began = time.process_time()
    read(text)
    return time.process_time() - began


SIZES = (6_000, 48_000, 1_000_000)  # characters


def grows_linearly(piece, read):
    """CPU time at 6, 48 and 1000 kB of a piece: far below the square. The better of two tries."""
    for _ in range(2):
        small, middle, large = (cpu_seconds(piece * (n // len(piece)), read) for n in SIZES)
        if middle < 30 * max(small, 0.01) and large < 100 * max(middle, 0.02):
            return large
    raise AssertionError((piece, small, middle, large))


def read_direct(text):
    common.parse_response(text, direct=True)


def test_time_grows_linearly():
    """1 MB takes under a second; only the growth is asserted, which no busy machine changes."""
    pieces = json.loads((CASES / "nasty.json").read_text(encoding="utf-8"))
    seconds = {piece: grows_linearly(piece, read_direct) for piece in pieces}
    print("\nCPU seconds for 1 MB of a piece, the slowest ten of", len(pieces))
    for piece, taken in sorted(seconds.items(), key=lambda item: -item[1])[:10]:
        print(f"  {taken:.2f} {piece!r}")


@pytest.mark.parametrize(
    "piece",
    ["\n", " ", ":", "1,", "1 ", "R1", "R1: ", "R1=2 ", "**", "Image Description: ", "quintuple [a ", "x"],
)
def test_other_readers_grow_linearly(piece):
    for read in (common.parse_scores, common.parse_cot, leaks.LEAK.search):
        grows_linearly(piece, read)


# -------------------------------------------------------------------------------- chains and judgements

CHAIN = "Image Description: a\nVisual-Text Alignment: b\nQuintuple Reasoning: c"


def test_chains():
    assert common.parse_cot(CHAIN) == CHAIN
    for case in cases("chains"):
        assert common.parse_cot(case["text"]) == CHAIN, case


@pytest.mark.parametrize(
    "line",
    [
        "Image description matters here.",
        "Image Description of the man: tall",
        "Visual-text alignment shows b, so c",
        "Quintuple reasoning is simple: c",
    ],
)
def test_a_line_that_begins_like_a_heading_is_body(line):
    chain = f"{CHAIN}\n{line}"
    assert common.parse_cot(chain) == chain


@pytest.mark.parametrize(
    "chain",
    [
        CHAIN.replace("b", ""),
        CHAIN.rpartition("\n")[0],
        f"{CHAIN}\n{CHAIN}",
        f"{CHAIN} </think>",
        "\n".join(reversed(CHAIN.split("\n"))),
        "",
        "I'm sorry, I can't help with that.",
    ],
)
def test_what_is_no_chain(chain):
    assert common.parse_cot(chain) is None


body = st.lists(st.sampled_from(["so", "per", "[A, per]", "- x", "Image", "a:", "1.", "**b**"]), min_size=1)


@given(body.map(" ".join), body.map("\n".join), body.map(" ".join))
@settings(max_examples=200, deadline=None)
def test_a_canonical_chain_stays(description, alignment, reasoning):
    bodies = (description, alignment, reasoning)
    chain = "\n".join(f"{part}: {body}" for part, body in zip(common.COT_PARTS, bodies, strict=True))
    canonical = common.parse_cot(chain)
    if canonical is not None:
        assert common.parse_cot(canonical) == canonical


@pytest.mark.parametrize("name", ["scores", "more_scores"])
def test_scores(name):
    for case in cases(name):
        expected = case["expected"] and tuple(case["expected"])
        assert common.parse_scores(case["text"]) == expected, case


def test_the_example_line_of_the_prompt_is_read():
    best = tuple(common.POINTS)
    assert common.parse_scores(common.score_line(best)) == best


# -------------------------------------------------------------------------------- leaks and refusals


def measured(name, positives, negatives, flagged):
    """Print and give precision and recall of a filter."""
    true = sum(map(flagged, positives))
    false = sum(map(flagged, negatives))
    precision = true / max(true + false, 1)
    recall = true / len(positives)
    print(f"\n{name}: precision {precision:.3f}, recall {recall:.3f} ({len(positives)} / {len(negatives)})")
    for text in positives:
        if not flagged(text):
            print(f"  missed: {text}")
    for text in negatives:
        if flagged(text):
            print(f"  wrongly flagged: {text}")
    return precision, recall


def is_leak(text):
    return common.leaked(text, "") is not None


def told_apart(*names):
    """→ (chains that leak, chains that do not)"""
    known = cases(*names)
    return [[case["cot"] for case in known if case["leak"] == leak] for leak in (True, False)]


def test_leaks():
    """unseen_leaks was written after the filter and never used to change it: what it is worth elsewhere."""
    positives, negatives = told_apart("leaks", "more_leaks")
    assert measured("leaks, cases", positives, negatives, is_leak) == (1, 1)
    gold = ("Emma", "per", "Paris", "loc", "place of birth")
    told = [sentence.format(*gold) for sentence in teacher.LEAKING_SENTENCES]
    told += [f"{clue}: Emma (per) place of birth Paris (loc)." for clue in teacher.LEAKING_CLUES]
    precision, recall = measured("leaks, the demo's teacher", told, negatives, is_leak)
    assert precision == 1 and recall > 0.9
    precision, recall = measured("leaks, unseen sentences", *told_apart("unseen_leaks"), is_leak)
    assert precision > 0.8 and recall > 0.6


def test_what_the_tweet_says_is_no_leak():
    sentence = "The text says that the label is given at the door."
    assert common.leaked("the annotations of the map", "See the annotations of the map") is None
    assert common.leaked("the annotations of the map", sentence) == "annotations"


def test_refusals():
    known = cases("refusals", "more_refusals")
    positives = [case["text"] for case in known if case["refusal"]]
    positives += [*teacher.REFUSALS, teacher.REFUSAL, teacher.BLIND]
    negatives = [case["text"] for case in known if not case["refusal"]]
    precision, recall = measured("refusals", positives, negatives, reply.refused)
    assert precision == 1 and recall > 0.9


def test_thoughts_come_off_first():
    for text in (f"<think>Maybe {ITEM_R}</think>{ITEM_A}", f"Maybe {ITEM_R}</think>{ITEM_A}"):
        for direct in (True, False):
            assert common.parse_response(text, direct).quintuples == (A,)
    assert common.parse_response(f"<think>Maybe {ITEM_R}", direct=True).quintuples == ()
    thoughts, said, answers = prose.take_apart(f"<THINK>x</THINK> y <Answer>{ITEM_A}</ANSWER>")
    assert ("".join(thoughts), "".join(said).strip(), answers) == ("x", "y", [ITEM_A])
