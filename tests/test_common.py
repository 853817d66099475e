"""common.py: labels, data, answers, rewards, metrics; by hand, on real annotations and random input."""

import hashlib
import itertools
from collections import Counter

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


# -------------------------------------------------------------------------------- answers

entity = st.text(min_size=1).map(common.normalise_text).filter(bool)
quintuples = st.builds(
    quintuple,
    entity,
    st.sampled_from(common.TYPES),
    entity,
    st.sampled_from(common.TYPES),
    st.sampled_from(common.RELATIONS),
)


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


def test_prompts_hold_what_the_paper_says():
    fill = {"text": "T {x} %s", "gold": "G", "cot": "C"}
    with_labels = [common.DISTILL_PROMPT, common.REPREDICT_PROMPT, common.REASON_PROMPT, common.DIRECT_PROMPT]
    for prompt in (*with_labels, common.SCORE_PROMPT):
        assert "T {x} %s" in prompt.format(**fill)
    for prompt in with_labels:
        assert all(label in prompt for label in (*common.TYPES, *common.RELATIONS))
        assert ("{gold}" in prompt) == (prompt is common.DISTILL_PROMPT)
    for prompt in (common.DISTILL_PROMPT, common.REPREDICT_PROMPT):
        meanings = [*common.TYPE_MEANINGS.values(), *common.RELATION_MEANINGS.values()]
        assert all(meaning in prompt for meaning in meanings)
    sentence = (
        "First output the thinking process in <think> </think> tags and then output the final answer in "
        "<answer> </answer> tags."
    )
    assert sentence in common.REASON_PROMPT and "<think>" not in common.DIRECT_PROMPT


def test_the_judge_has_ten_points_and_an_example_near_the_threshold():
    assert sum(common.POINTS) == 10
    assert common.SCORE_PROMPT.count("Example ") == len(common.SCORE_EXAMPLES) == 3
    shares = []
    for *_, points in common.SCORE_EXAMPLES:
        assert all(0 <= point <= most for point, most in zip(points, common.POINTS, strict=True))
        shares.append(sum(points) / 10)
    assert shares == [1, 0.7, 0.3]


def test_the_shipped_bases_know_these_prompts():
    """demo/base was schooled on these two to the letter; school it again before you change one."""
    digests = [hashlib.sha256(prompt.encode()).hexdigest() for prompt in common.PROMPTS.values()]
    assert digests == [
        "6036fa9f3ec6640cd1358e7f191bceedc4d09d7c0fd6fa38059fbd31f9a11d5b",
        "cfb3576ccf64e7f631fd6546ee8945d7e15158bdc988f1cb8e54a84fad87bbb3",
    ]


@needs_data
def test_the_meanings_name_the_types_of_the_annotations():
    """Each relation's line in the prompt names the types that its heads and tails mostly have in training."""
    seen = {}
    for example in data.load_examples(DATA / "jmere" / "train.json"):
        for q in example.quintuples:
            seen.setdefault(q.relation, Counter())[q.head_type, q.tail_type] += 1
    assert set(seen) == set(common.RELATION_MEANINGS)
    for relation, pairs in seen.items():
        (most, count), *_ = pairs.most_common(1)
        assert count > 0.5 * pairs.total()
        assert all(label in common.RELATION_MEANINGS[relation] for label in most), (relation, pairs)


# -------------------------------------------------------------------------------- rewards


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
        sum(a == b for p, g in zip(short, chosen, strict=True) for a, b in zip(p, g, strict=True))
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


# -------------------------------------------------------------------------------- metrics


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
