"""lib/scoring.py and lib/limits.py: every rule by hand, and against computations that share no code with
it."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest
from conftest import DATA, needs_data
from eval_cases import GOLD, A, B, C, q
from hypothesis import given
from hypothesis import strategies as st

import common
from lib import data, limits, predictions, scoring

# -------------------------------------------------------------------------------- error classes


@pytest.mark.parametrize(
    "pred, gold, expected",
    [
        ("Gordon, per, Browns, org, member of", "Josh Gordon, per, Browns, org, member of", "span"),
        (
            "Gordon, org, Browns, org, peer",
            "Josh Gordon, per, Browns, org, member of",
            "span",
        ),  # the first that applies
        (
            "josh gordon, per, Browns, org, member of",
            "Josh Gordon, per, Browns, org, member of",
            "span",
        ),  # case counts
        ("Josh Gordon, per, Browns, loc, member of", "Josh Gordon, per, Browns, org, member of", "type"),
        ("Josh Gordon, per, Browns, loc, peer", "Josh Gordon, per, Browns, org, member of", "type"),
        ("Josh Gordon, per, Browns, org, peer", "Josh Gordon, per, Browns, org, member of", "relation"),
        ("Browns, org, Josh Gordon, per, member of", "Josh Gordon, per, Browns, org, member of", "direction"),
        (
            "Browns, org, Josh Gordon, per, contain",
            "Josh Gordon, per, Browns, org, member of",
            "relation",
        ),  # crosswise
        (
            "Josh Gordon, per, Giants, org, member of",
            "Josh Gordon, per, Browns, org, member of",
            None,
        ),  # another fact
        ("LeBron, per, Lakers, org, member of", "Josh Gordon, per, Browns, org, member of", None),
    ],
)
def test_error_class_of_a_pair(pred, gold, expected):
    errors = scoring.classify([q(pred)], [q(gold)])
    if expected:
        assert errors == [(expected, q(pred), q(gold))]
    else:
        assert errors == [("spurious", q(pred), None), ("missing", None, q(gold))]


def test_pairing_takes_the_most_equal_components_first():
    near, far = q("Josh Gordon, per, Browns, org, peer"), q("Gordon, org, Browns, loc, peer")
    assert scoring.classify([far, near], [GOLD]) == [("relation", near, GOLD), ("spurious", far, None)]
    assert scoring.classify([GOLD, near], [GOLD]) == [("spurious", near, None)]  # what is right is no partner


def test_unparsed_is_the_class_of_gold_nobody_could_find():
    assert scoring.classify([], [GOLD], parsed=False) == [("unparsed", None, GOLD)]
    assert scoring.classify([], [GOLD]) == [("missing", None, GOLD)]


ENTITY = st.sampled_from(["A", "a", "B", "A B", "C"])
TYPE = st.sampled_from(common.TYPES)
QUINTUPLE = st.builds(common.quintuple, ENTITY, TYPE, ENTITY, TYPE, st.sampled_from(["peer", "member of"]))
SETS = st.lists(
    st.tuples(st.lists(QUINTUPLE, max_size=5), st.lists(QUINTUPLE, max_size=5)), min_size=1, max_size=8
)


@given(st.lists(QUINTUPLE, max_size=6), st.lists(QUINTUPLE, max_size=6))
def test_every_false_positive_and_negative_has_one_class(pred, gold):
    errors = scoring.classify(pred, gold)
    assert Counter(p for _, p, _ in errors if p) == Counter(set(pred) - set(gold))
    assert Counter(g for _, _, g in errors if g) == Counter(set(gold) - set(pred))
    for kind, p, g in errors:
        assert (p is None, g is None) == {"spurious": (False, True), "missing": (True, False)}.get(
            kind, (False, False)
        )


# -------------------------------------------------------------------------------- scores


def independent(preds, golds):
    """Micro F1 under every rule, by nested loops over lists and with no shared code."""
    result = {}
    for metric in scoring.RULES:
        tp = n = m = 0
        for pred, gold in zip(preds, golds, strict=True):
            p, g = [], []
            for source, target in ((pred, p), (gold, g)):
                for h, ht, t, tt, r in source:
                    if metric == "jmere":
                        keys = [[h, ht, t, tt, r]]
                    elif metric == "jmere_folded":
                        keys = [[h.lower(), ht, t.lower(), tt, r]]
                    elif metric == "mner":
                        keys = [[h, ht], [t, tt]]
                    else:
                        keys = [[min((h, ht), (t, tt)), max((h, ht), (t, tt)), r]]
                    for key in keys:
                        if key not in target:
                            target.append(key)
            tp, n, m = tp + sum(key in g for key in p), n + len(p), m + len(g)
        precision, recall = tp / n if n else 0, tp / m if m else 0
        result[metric] = 2 * precision * recall / (precision + recall) if tp else 0.0
    return result


@given(SETS)
def test_scores_equal_an_independent_computation(pairs):
    preds = [pred for pred, _ in pairs]
    golds = [gold for _, gold in pairs]
    scores = scoring.headline(preds, golds, np.arange(len(preds)), 10, 0)
    assert {name: pytest.approx(s["f1"]) for name, s in scores.items()} == independent(preds, golds)
    for name, wanted in common.score(preds, golds).items():
        assert {key: scores[name][key] for key in wanted} == wanted
    assert {key: scores["jmere"][key] for key in ("tp", "pred", "gold")} == {
        key: sum(s[key] for s in scoring.per_label(preds, golds).values()) for key in ("tp", "pred", "gold")
    }
    assert scores["jmere"]["tp"] == sum(s["tp"] for s in scoring.per_size(preds, golds).values())


def test_each_rule_by_hand():
    golds = [[GOLD, q("Browns, org, Ohio, loc, locate at")], [q("A, per, B, per, peer")], []]
    preds = [
        [GOLD, GOLD, q("Ohio, loc, Browns, org, locate at")],
        [q("a, per, B, per, peer")],
        [q("X, per, Y, per, peer")],
    ]
    scores = scoring.headline(preds, golds, np.arange(3), 10, 0)
    counts = {name: (s["tp"], s["pred"], s["gold"]) for name, s in scores.items()}
    assert counts == {
        "jmere": (1, 4, 3),
        "jmere_undirected": (2, 4, 3),
        "jmere_folded": (2, 4, 3),
        "mner": (4, 7, 5),
    }
    assert scores["jmere"]["f1"] == pytest.approx(2 / 7)
    sizes = {
        name: (s["examples"], s["tp"], s["pred"], s["gold"])
        for name, s in scoring.per_size(preds, golds).items()
    }
    assert sizes == {"0": (1, 0, 1, 0), "1": (1, 0, 1, 1), "2": (1, 1, 2, 2)}


def published_undirected(preds, golds):
    """EEGA's scorer: every triple enters one set of strings twice, once in each order of its entities."""
    pools = []
    for side in (preds, golds):
        pool = set()
        for i, quintuples in enumerate(side):
            for h, ht, t, tt, r in quintuples:
                pool |= {f"{i}-{h}-{ht}-{t}-{tt}-{r}", f"{i}-{t}-{tt}-{h}-{ht}-{r}"}
        pools.append(pool)
    pred, gold = pools
    precision, recall = len(pred & gold) / len(pred), len(pred & gold) / len(gold)
    return precision, recall, 2 * precision * recall / (precision + recall)


def spoil(examples, seed=0):
    """Predictions with every kind of error, from gold."""
    rng, preds = random.Random(seed), []
    for example in examples:
        pred = []
        for h, ht, t, tt, r in example.quintuples:
            kind = rng.random()
            swapped, retyped, related = (
                (t, tt, h, ht, r),
                (h, ht, t, "misc", r),
                (h, ht, t, tt, rng.choice(common.RELATIONS)),
            )
            pred.append(
                common.quintuple(
                    *(
                        swapped
                        if kind < 0.3
                        else retyped
                        if kind < 0.5
                        else related
                        if kind < 0.7
                        else (h, ht, t, tt, r)
                    )
                )
            )
        preds.append(pred if rng.random() < 0.9 else [])
    return preds


@needs_data
def test_undirected_equals_the_published_scorer_on_the_real_test_set():
    examples = data.load_examples(DATA / "mnre" / "mnre_test.txt")
    preds, golds = spoil(examples), [e.quintuples for e in examples]
    scores = scoring.headline(preds, golds, np.arange(len(preds)), 10, 0)
    ours = [scores["jmere_undirected"][name] for name in ("precision", "recall", "f1")]
    assert ours == pytest.approx(published_undirected(preds, golds), abs=1e-12)
    assert scores["jmere"]["f1"] < scores["jmere_undirected"]["f1"] < 1


# -------------------------------------------------------------------------------- bootstrap


def test_bootstrap_resamples_tweets_together():
    counts = np.array([[1, 1, 1], [0, 1, 1], [3, 4, 5]])
    sums = scoring.resample(counts, np.array([0, 0, 1]), 400, seed=3)
    one, two = np.array([1, 2, 2]), np.array([3, 4, 5])  # each drawn once, or one of them twice
    assert {tuple(row) for row in sums.tolist()} == {tuple(one + two), tuple(2 * one), tuple(2 * two)}
    assert (scoring.resample(counts, np.array([0, 0, 1]), 400, seed=3) == sums).all()


def test_resamples_do_not_depend_on_how_many_are_drawn_at_once(monkeypatch):
    counts = np.random.default_rng(0).integers(0, 4, (30, 3))
    whole = scoring.resample(counts, np.arange(30), 250, seed=1)
    monkeypatch.setattr(scoring, "CHUNK", 7)
    assert (scoring.resample(counts, np.arange(30), 250, seed=1) == whole).all()


def test_bootstrap_interval_is_the_binomial_one_where_it_is_known():
    golds = [[A]] * 300
    preds = [[A]] * 150 + [[B]] * 150
    low, high = scoring.headline(preds, golds, np.arange(300), 4000, 0)["jmere"]["f1_95"]
    error = 1.96 * (0.25 / 300) ** 0.5
    assert low == pytest.approx(0.5 - error, abs=0.008) and high == pytest.approx(0.5 + error, abs=0.008)


def test_scores_of_nothing_are_zero():
    scores = scoring.headline([[]] * 4, [[]] * 4, np.arange(4), 10, 0)["jmere"]
    assert scores["f1"] == 0 and scores["f1_95"] == [0, 0]


# -------------------------------------------------------------------------------- components and labels


def test_components_by_hand():
    gold = [GOLD, q("A, per, B, per, peer")]
    pred = [q("A, org, B, per, peer"), q("Gordon, per, Browns, org, member of"), q("X, loc, Y, loc, race")]
    found = {name: s["tp"] for name, s in scoring.per_component([pred], [gold]).items()}
    # the third prediction is left over; the first is A's, the second Gordon's
    assert found == {"head": 1, "head_type": 1, "tail": 2, "tail_type": 2, "relation": 2}
    head = scoring.per_component([pred], [gold])["head"]
    assert (head["pred"], head["gold"], head["precision"], head["recall"]) == (3, 2, 1 / 3, 1 / 2)


@given(SETS)
def test_components_add_up_to_the_w_of_the_partial_reward(pairs):
    preds = [scoring.distinct(pred) for pred, _ in pairs]
    golds = [scoring.distinct(gold) for _, gold in pairs]
    total = sum(common.matched_components(pred, gold) for pred, gold in zip(preds, golds, strict=True))
    assert sum(s["tp"] for s in scoring.per_component(preds, golds).values()) == total


def test_labels_outside_the_set_are_one_row_the_last():
    preds = [[GOLD._replace(relation="likes"), GOLD._replace(relation="hates"), GOLD]]
    rows = scoring.per_label(preds, [[GOLD]])
    assert list(rows) == ["member of", scoring.OUTSIDE] and rows[scoring.OUTSIDE]["pred"] == 2
    _, confusion = scoring.count_errors([[GOLD._replace(relation="likes")]], [[GOLD]], [True])
    assert confusion == [("member of", scoring.OUTSIDE, 1)]


# -------------------------------------------------------------------------------- votes


@pytest.mark.parametrize(
    "how, tau, answers, expected",
    [
        ("set", 0.5, ["x", "y", "y"], "y"),
        ("set", 0.5, ["x", "y"], "x"),  # a tie: the earliest
        ("set", 0.5, ["xy", "x", "yx"], "xy"),  # order does not matter
        ("set", 0.5, ["xx", "x", "y"], "x"),  # nor do repeats
        ("set", 0.5, [None, None, "x"], "x"),  # unparsed responses do not vote
        ("set", 0.5, ["", "", "x"], ""),  # an empty answer does
        ("set", 0.5, [None, None], ""),
        ("tuple", 0.5, ["xy", "xz", None], "xyz"),
        ("tuple", 0.6, ["xy", "xz", None], "x"),
        ("tuple", 1.0, ["xy", "x", "z"], ""),
        ("tuple", 0.3, ["x"] * 3 + ["y"] * 7, "xy"),  # 0.3 · 10 is not above 3
    ],
)
def test_vote(how, tau, answers, expected):
    given = [tuple(answer or "") for answer in answers]
    assert "".join(scoring.vote(given, [answer is not None for answer in answers], how, tau)) == expected


def test_staged_vote_takes_the_entities_first():
    peer, couple, parent = (q(f"A, per, B, per, {name}") for name in ("peer", "couple", "parent"))
    other = q("A, per, C, per, peer")
    answers = [[other], [other], [peer], [couple], [couple, parent], [parent], [parent]]
    # A and B are in five answers, A and C in two; of the five [parent] is given twice
    assert scoring.vote(answers, [True] * 7, "set") == [other]
    assert scoring.vote(answers, [True] * 7, "staged") == [parent]
    assert scoring.vote([[other], [peer]], [True, True], "staged") == [other]  # a tie: the earliest
    assert scoring.vote([[other], [peer]], [False, False], "staged") == []


def voted(answers, how, tau):
    """The votes again, written another way. answers: frozensets in the order of their places, without
    unparsed."""
    if not answers:
        return frozenset()
    if how == "tuple":
        units = frozenset().union(*answers)
        return frozenset(u for u in units if sum(u in a for a in answers) >= tau * len(answers) - 1e-9)
    if how == "staged":
        names = [frozenset((n, t) for h, ht, e, et, _ in a for n, t in ((h, ht), (e, et))) for a in answers]
        top = sorted(names, key=lambda name: (-names.count(name), names.index(name)))[0]
        answers = [a for a, name in zip(answers, names, strict=True) if name == top]
    return sorted(answers, key=lambda answer: (-answers.count(answer), answers.index(answer)))[0]


def random_predictions(examples=12, n=7, seed=0):
    rng = random.Random(seed)
    preds, golds = [], []
    for _ in range(examples):
        answers = [
            tuple(rng.choices((A, B, C, A._replace(relation="peer")), k=rng.randint(0, 2))) for _ in range(n)
        ]
        parsed = [bool(answer) or rng.random() < 0.5 for answer in answers]
        preds.append(predictions.Prediction(answers, parsed, Counter(), n))
        golds.append(rng.choice([(A,), (A, B), ()]))
    return preds, golds


@pytest.mark.parametrize(
    "how, tau", [("set", 0.5), ("staged", 0.5), ("tuple", 0.3), ("tuple", 0.5), ("tuple", 1.0)]
)
def test_f1_at_k_is_the_vote_of_every_subset(how, tau):
    preds, golds = random_predictions()
    curve = scoring.f1_at_k(preds, golds, how, tau, subsets=5, seed=9)
    rng = np.random.default_rng(9)
    orders = [rng.permuted(np.tile(np.arange(7), (5, 1)), axis=1) for _ in preds]
    for s, k in itertools.product(range(5), range(1, 8)):
        answers = []
        for p, order in zip(preds, orders, strict=True):
            places = sorted(order[s, :k])
            answers.append(voted([frozenset(p.answers[i]) for i in places if p.parsed[i]], how, tau))
        assert curve[s, k - 1] == pytest.approx(common.score(answers, golds)["jmere"]["f1"])
    assert np.ptp(curve[:, 6]) == 0 and curve[:, 1:6].std() > 0  # all of K is one subset
    final = [scoring.vote(p.answers, p.parsed, how, tau) for p in preds]
    assert common.score(final, golds)["jmere"]["f1"] == pytest.approx(curve[0, 6])


def test_f1_at_1_is_the_mean_of_single_responses():
    preds, golds = random_predictions(30, 4)
    curve = scoring.f1_at_k(preds, golds, subsets=3000)
    single = [common.score([p.answers[i] for p in preds], golds)["jmere"]["f1"] for i in range(4)]
    assert curve[:, 0].mean() == pytest.approx(np.mean(single), abs=0.01)


# -------------------------------------------------------------------------------- what a score can tell


def brute_force_ceiling(rows):
    """The best F1 over every answer to every tweet. rows: [(tweet, gold)]."""
    tweets = sorted({tweet for tweet, _ in rows})
    units = {tweet: sorted({q for t, gold in rows if t == tweet for q in gold}) for tweet in tweets}
    subsets = []
    for tweet in tweets:
        sizes = range(len(units[tweet]) + 1)
        subsets.append(
            [set(chosen) for size in sizes for chosen in itertools.combinations(units[tweet], size)]
        )
    best = 0.0
    for answers in itertools.product(*subsets):
        answer = dict(zip(tweets, answers, strict=True))
        preds = [answer[tweet] for tweet, _ in rows]
        best = max(best, common.score(preds, [gold for _, gold in rows])["jmere"]["f1"])
    return best


@pytest.mark.parametrize("seed", range(12))
def test_ceiling_is_the_best_of_every_system(seed):
    rng = random.Random(seed)
    rows = [(rng.randrange(3), rng.sample((A, B, C), rng.randint(0, 2))) for _ in range(rng.randint(2, 7))]
    found = limits.ceiling([gold for _, gold in rows], np.array([tweet for tweet, _ in rows]))
    assert found["f1"] == pytest.approx(brute_force_ceiling(rows))


@needs_data
@pytest.mark.parametrize("split, tweets, rows, f1", [("train", 137, 287, 95.9), ("test", 15, 30, 97.1)])
def test_ceiling_of_the_cut_rows(split, tweets, rows, f1):
    examples = data.load_examples(DATA / "jmere" / f"{split}.json")
    found = limits.ceiling([e.quintuples for e in examples], scoring.tweet_numbers(examples))
    assert (found["tweets"], found["rows"]) == (tweets, rows) and 100 * found["f1"] == pytest.approx(
        f1, abs=0.06
    )
    joined = data.load_examples(DATA / "jmere" / f"{split}.json", merge_repeats=True)
    whole = limits.ceiling([e.quintuples for e in joined], scoring.tweet_numbers(joined))
    assert whole == {"f1": 1.0, "tweets": 0, "rows": 0}


def influence(preds, golds):
    examples = [data.Example(str(i), f"tweet {i}", "x.png", tuple(gold)) for i, gold in enumerate(golds)]
    counts = scoring.match_counts(preds, golds, set)
    return limits.influence(examples, counts, np.arange(len(golds)))


def test_influence_by_hand():
    golds = [[A], [A, B, C], [A]]
    found = influence([[A], [A], []], golds)  # tp 2, pred 2, gold 5
    assert (found["ids"], found["gold"]) == (["1"], 3)
    assert found["f1_missed"] == pytest.approx(2 * 1 / (1 + 5))
    assert found["f1_right"] == pytest.approx(2 * 4 / (4 + 5))
    assert found["f1_without"] == pytest.approx(2 * 1 / (1 + 2))
    assert influence([[A]], [[]]) is None


@given(SETS)
def test_influence_is_that_of_trying_every_tweet(pairs):
    preds, golds = [pred for pred, _ in pairs], [gold for _, gold in pairs]
    ranges = []
    for i in range(len(pairs)):
        rest = preds[:i] + preds[i + 1 :], golds[:i] + golds[i + 1 :]
        right = preds[:i] + [golds[i]] + preds[i + 1 :]
        missed = preds[:i] + [[]] + preds[i + 1 :]
        tried = [rest, (right, golds), (missed, golds)]
        f1 = [common.score(*case)["jmere"]["f1"] for case in tried]
        ranges.append(max(f1) - min(f1))
    found = influence(preds, golds)
    if found is None:
        assert not any(golds)
    else:
        f1 = [found[name] for name in ("f1_without", "f1_right", "f1_missed")]
        assert max(f1) - min(f1) == pytest.approx(max(ranges))


@needs_data
def test_one_tweet_holds_21_of_the_640():
    examples = data.load_examples(DATA / "jmere" / "test.json")
    golds = [e.quintuples for e in examples]
    found = limits.limits(examples, golds, golds, scoring.tweet_numbers(examples))["influence"]
    assert (
        found["gold"] == 21 and found["f1_right"] == 1 and found["f1_missed"] == pytest.approx(2 * 619 / 1259)
    )
