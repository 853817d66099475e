"""common.py: labels, data, answers, rewards, metrics; on worked examples, the real annotations and random input."""

import itertools
import time

import pytest
from conftest import DATA, needs_data
from hypothesis import example as also
from hypothesis import given, settings
from hypothesis import strategies as st

import common
from common import Quintuple, quintuple
from lib import data

GOLD = [quintuple("Josh Gordon", "per", "Browns", "org", "member of")]


def think(answer):
    return f"<think>because</think>\n<answer>{answer}</answer>"


# ------------------------------------------------------------------------------------------------ answers


@needs_data
def test_every_real_quintuple_survives_format_and_parse():
    seen = 0
    for split in ("train", "val", "test"):
        for example in data.load_examples(DATA / "jmere" / f"{split}.json"):
            answer = common.format_answer(example.quintuples)
            direct, reasoned = (
                common.parse_response(answer, direct=True),
                common.parse_response(common.format_response("x", example.quintuples)),
            )
            for response in (direct, reasoned):
                assert (response.quintuples, response.malformed, response.well_formed) == (
                    example.quintuples,
                    0,
                    True,
                )
            assert '["' not in answer  # the plain form is enough for every real name
            assert common.accuracy_reward(reasoned, example.quintuples) == 1
            seen += len(example.quintuples)
    assert seen == 5767

text_field = (
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1).map(common.normalise_text).filter(bool)
)
nasty = st.lists(
    st.sampled_from(
        [
            "per",
            ", ",
            "]",
            "[",
            '"',
            "'",
            ";",
            "(",
            ")",
            "a",
            "</answer>",
            "<think>",
            "```",
            " ",
            "-",
            "\\",
            "{",
            "*",
            "org",
        ]
    )
)
entity = st.one_of(text_field, nasty.map("".join).map(common.normalise_text).filter(bool))
quintuples = st.builds(
    quintuple,
    entity,
    st.sampled_from(common.TYPES),
    entity,
    st.sampled_from(common.TYPES),
    st.sampled_from(common.RELATIONS),
)


@given(st.lists(quintuples, max_size=4))
@settings(max_examples=1500, deadline=None)
def test_any_entity_survives_format_and_parse(items):
    for response in (
        common.parse_response(common.format_answer(items), direct=True),
        common.parse_response(common.format_response("x", items)),
    ):
        assert (response.quintuples, response.malformed, response.well_formed) == (tuple(items), 0, True)


@given(st.text(), st.booleans())
@settings(max_examples=500, deadline=None)
def test_any_text_parses(text, direct):
    response = common.parse_response(text, direct)
    assert response.malformed >= 0 and all(q.head and q.tail for q in response.quintuples)


@pytest.mark.parametrize(
    "answer",
    [
        '[["A", "per", "B", "org", "member_of"], ["C, D", "loc", "E", "misc", "held on"]]',
        '[\n  ["A", "PER", "B", "organization", "member_of"],\n  ["C, D", "loc", "E", "misc", "held on"]\n]',
        '```json\n[["A", "per", "B", "org", "member_of"],\n["C, D", "loc", "E", "misc", "held on"]]\n```',
        "(A, per, B, org, member_of); (C, D, loc, E, misc, held_on)",
        "[('A', 'per', 'B', 'org', 'member_of'), ('C, D', 'loc', 'E', 'misc', 'held_on')]",
        "[[A, per, B, org, member_of], [C, D, loc, E, misc, held_on]]",
        "[\n[A, per, B, org, member of],\n[C, D, location, E, misc, Held_On],\n]",
        "1. (A, person, B, org, member of)\n2. ('C, D', loc, \"E\", misc, held on)",
        "- **A**, per, B, org, member of\n- C, D, loc, E, misc, held on",
        "A, per, B, org, member_of; C, D, loc, E, misc, held_on",
        '{"quintuples": [["A", "per", "B", "org", "member of"], {"head": "C, D", "t1": "loc", "tail": "E", "t2": "misc", "r": "held on"}]}',
    ],
)
def test_what_real_models_write(answer):
    expected = (
        quintuple("A", "per", "B", "org", "member of"),
        quintuple("C, D", "loc", "E", "misc", "held on"),
    )
    for response in (common.parse_response(answer, direct=True), common.parse_response(think(answer))):
        assert (response.quintuples, response.malformed) == (expected, 0)


@pytest.mark.parametrize(
    ("answer", "found", "malformed"),
    [
        ("", 0, 0),
        ("[]", 0, 0),
        ("[ ]", 0, 0),
        ("none", 0, 1),
        ("[A, per, B, org]", 0, 1),
        ("[A, per, , org, peer]", 0, 1),
        ("[A, animal, B, org, eats]", 1, 0),  # wrong labels: a wrong quintuple, not a malformed one
        ("[foo], [A, per, B, org, peer]", 1, 1),
        ("[A, per, B, org, peer]\nI hope this helps", 1, 1),
        ('[["A", "per", "B", "org"], ["A", "per", "B", "org", "peer"]]', 1, 1),
        ("[A, per, B, org, peer]\n[A, per, B, org, peer]", 2, 0),  # repeats are kept
        ("[]]]", 0, 1),
    ],
)
def test_malformed_items(answer, found, malformed):
    response = common.parse_response(think(answer))
    assert (len(response.quintuples), response.malformed, response.well_formed) == (found, malformed, True)


@pytest.mark.parametrize(
    ("text", "well_formed"),
    [
        ("<think>x</think><answer>[]</answer>", True),
        ("  <think>\nx\n</think>\n\n<answer></answer>\n", True),
        ("<think> </think><answer>[]</answer>", False),
        ("<think>x</think><answer>[]", False),
        ("<think>x</think> so <answer>[]</answer>", False),
        ("<think>x</think><answer>[]</answer>.", False),
        ("<think>x</think><answer>[]</answer><answer>[]</answer>", False),
        ("<think>x <think> y</think><answer>[]</answer>", False),
        ("<answer>[]</answer><think>x</think>", False),
        ("<think>x<answer>[]</think></answer>", False),
        ("[]", False),
        ("", False),
    ],
)
def test_well_formed_is_that_and_nothing_else(text, well_formed):
    assert common.parse_response(text).well_formed is well_formed


def test_direct_answers():
    for text in ("[A, per, B, org, peer]", "<answer>\n[A, per, B, org, peer]\n</answer>"):
        response = common.parse_response(text, direct=True)
        assert response.well_formed and len(response.quintuples) == 1
    assert not common.parse_response("<think>x</think><answer>[]</answer>", direct=True).well_formed
    assert (
        common.parse_response("[A, per, B, org, peer]").quintuples == ()
    )  # reasoning asked for, no answer given


PIECES = [
    "[",
    "]",
    "],[",
    "(",
    ",",
    '"',
    ";",
    "per,x;",
    "a,per,",
    "```",
    "<answer>",
    "<think>",
    "\n[",
    "{",
    '["',
    "*",
    "] ",
    "a,per,b,org,peer;",
    "[[\n",
]


def test_parsing_time_grows_linearly():
    """1 MB of any of these took under a second when measured; here only the growth is looked at: 8× the text, far below 64× the time."""
    for piece in PIECES:

        def seconds(size, piece=piece):
            text = piece * (size // len(piece))
            began = time.process_time()
            common.parse_response(text, direct=True)
            common.parse_response(think(text))
            return time.process_time() - began

        assert seconds(400_000) < 30 * max(seconds(50_000), 0.002), piece


def test_mp_cot_has_three_parts():
    good = "Image Description: a\nVisual-Text Alignment: b\nQuintuple Reasoning: c"
    assert common.parse_cot(good) == good
    assert (
        common.parse_cot(
            "### 1. **Image Description**:\na\n\n**Visual-Text Alignment:** b\n3. Quintuple Reasoning: c"
        )
        == good
    )
    for bad in (
        good.replace("b", ""),
        good.rpartition("\n")[0],
        f"{good}\n{good}",
        good + " </think>",
        "\n".join(reversed(good.split("\n"))),
    ):
        assert common.parse_cot(bad) is None


def test_prompts_hold_what_the_paper_says():
    fill = {"text": "T {x} %s", "gold": "G", "cot": "C"}
    for prompt in (
        common.DISTILL_PROMPT,
        common.REPREDICT_PROMPT,
        common.SCORE_PROMPT,
        common.REASON_PROMPT,
        common.DIRECT_PROMPT,
    ):
        assert "T {x} %s" in prompt.format(**fill)
    for prompt in (common.REPREDICT_PROMPT, common.REASON_PROMPT, common.DIRECT_PROMPT):
        assert all(label in prompt for label in (*common.TYPES, *common.RELATIONS)) and "{gold}" not in prompt
    sentence = "First output the thinking process in <think> </think> tags and then output the final answer in <answer> </answer> tags."
    assert sentence in common.REASON_PROMPT and "<think>" not in common.DIRECT_PROMPT
    assert common.SCORE_PROMPT.count("Example ") == 2 and sum(most for _, _, most in common.SCORE_RULES) == 10


# ------------------------------------------------------------------------------------------------ rewards


@pytest.mark.parametrize(
    ("text", "gold", "expected"),  # total, accuracy, partial, format
    [
        (
            think("[Josh Gordon, per, Browns, org, peer]"),
            GOLD,
            (0.2 * 1.657143 + 0.1, 0, 1.657143, 1),
        ),  # SPEC §5: w = 4, ED = 6 of 42
        (think("[Josh Gordon, per, Browns, org, member of]"), GOLD, (1.5, 1, 2, 1)),
        (think("[]"), [], (1.5, 1, 2, 1)),
        (think(""), GOLD, (0.1, 0, 0, 1)),
        (think("[Josh Gordon, per, Browns, org]"), GOLD, (0.1, 0, 0, 1)),
        ("[Josh Gordon, per, Browns, org, member of]", GOLD, (0, 0, 0, 0)),
        # a repeat: n = 2, c = 1 → 2/3; w = 5, 5n = 10; 42 characters against 85 → ED 43
        (
            think(common.format_answer(GOLD * 2)),
            GOLD,
            (2 / 3 + 0.2 * (0.5 + 42 / 85) + 0.1, 2 / 3, 0.5 + 42 / 85, 1),
        ),
        # nothing to find, one thing said: accuracy 0; w = 0; "[]" against 42 characters: ED 40
        (think(common.format_answer(GOLD)), [], (0.2 * 2 / 42 + 0.1, 0, 2 / 42, 1)),
    ],
)
def test_reward_by_hand(text, gold, expected):
    response = common.parse_response(text)
    accuracy, partial = common.accuracy_reward(response, gold), common.partial_reward(response, gold)
    form = common.format_reward(response)
    total = accuracy + 0.2 * partial + 0.1 * form
    assert (total, accuracy, partial, form) == pytest.approx(expected, abs=1e-6)


def test_repeated_gold_never_lifts_accuracy_above_one():
    response = common.parse_response(think(common.format_answer(GOLD)))
    assert common.accuracy_reward(response, GOLD * 2) == 2 / 3


few = st.builds(Quintuple, *[st.sampled_from("ab")] * 5)


@given(st.lists(few, max_size=4), st.lists(few, max_size=4))
@settings(max_examples=400, deadline=None)
def test_matched_components_equals_brute_force(pred, gold):
    short, long = sorted((pred, gold), key=len)
    best = max(
        sum(a == b for p, g in zip(short, chosen) for a, b in zip(p, g))
        for chosen in itertools.permutations(long, len(short))
    )
    assert common.matched_components(pred, gold) == best


Q = common.quintuple("A", "per", "B", "org", "peer")


@given(st.lists(quintuples, max_size=3), st.lists(quintuples, max_size=3))
@also([Q], [Q, Q])  # repeated gold, which once gave an accuracy above 1
@also([Q, Q], [Q, Q])
@settings(max_examples=200, deadline=None)
def test_reward_stays_in_range_and_is_highest_for_gold(pred, gold):
    response = common.parse_response(think(common.format_answer(pred)))
    perfect = common.parse_response(think(common.format_answer(gold)))
    assert 0 <= common.accuracy_reward(response, gold) <= 1 == common.accuracy_reward(perfect, gold)
    assert 0 <= common.partial_reward(response, gold) <= 2 == common.partial_reward(perfect, gold)
    assert common.format_reward(response) == 1


# ------------------------------------------------------------------------------------------------ metrics


def test_score_by_hand():
    ab, ba, ac = (quintuple(h, "per", t, "per", "peer") for h, t in ("AB", "BA", "AC"))
    result = common.score([[ab, ab, ac], [], [ba]], [[ab], [ac], [ab]])
    assert result["jmere"] == {
        "precision": 1 / 3,
        "recall": 1 / 3,
        "f1": 1 / 3,
        "tp": 1,
        "pred": 3,
        "gold": 3,
    }
    assert result["jmere_undirected"] == {
        "precision": 2 / 3,
        "recall": 2 / 3,
        "f1": 2 / 3,
        "tp": 2,
        "pred": 3,
        "gold": 3,
    }
    assert result["mner"] == {
        "precision": 4 / 5,
        "recall": 4 / 6,
        "f1": 8 / 11,
        "tp": 4,
        "pred": 5,
        "gold": 6,
    }
    assert common.score([[]], [[]])["jmere"]["f1"] == 0
    with pytest.raises(ValueError):
        common.score([[]], [])
