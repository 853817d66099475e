"""05: every scoring rule by hand and against an independent computation; predict, resume, shard with a
stand-in for vlm."""

import contextlib
import importlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import types
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, ROOT, needs_data
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import common
from lib import ask, data, predict, predictions, scoring, tables

ev = importlib.import_module("05_eval")


def q(line):
    return common.quintuple(*line.split(", "))


GOLD = q("Josh Gordon, per, Browns, org, member of")

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
    samples = scoring.bootstrap(counts, np.array([0, 0, 1]), 400, seed=3)
    possible = []  # both tweets drawn once, or one of them twice
    for a, b in ((1, 1), (2, 0), (0, 2)):
        tp, pred, gold = a * np.array([1, 2, 2]) + b * np.array([3, 4, 5])
        possible.append((tp / pred, tp / gold, 2 * tp / (pred + gold)))
    seen = {tuple(np.round(column, 12)) for column in samples.T}
    assert seen == {tuple(np.round(row, 12)) for row in possible}
    assert (scoring.bootstrap(counts, np.array([0, 0, 1]), 400, seed=3) == samples).all()


def test_bootstrap_interval_is_the_binomial_one_where_it_is_known():
    hits = np.array([1] * 150 + [0] * 150)
    counts = np.stack([hits, np.ones(300, int), np.ones(300, int)], axis=1)
    low, high = np.percentile(scoring.bootstrap(counts, np.arange(300), 4000, 0)[2], (2.5, 97.5))
    error = 1.96 * (0.25 / 300) ** 0.5
    assert low == pytest.approx(0.5 - error, abs=0.008) and high == pytest.approx(0.5 + error, abs=0.008)


def test_bootstrap_of_nothing_is_zero():
    assert (scoring.bootstrap(np.zeros((4, 3), int), np.arange(4), 10, 0) == 0).all()


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
    assert (
        "".join(scoring.vote([tuple(a or "") for a in answers], [a is not None for a in answers], how, tau))
        == expected
    )


# -------------------------------------------------------------------------------- reading predictions


def respond(answer, think="x"):
    return f"<think>{think}</think><answer>{answer}</answer>"


def write(path, rows):
    path.write_text("".join(data.jsonl_line(row) for row in rows), encoding="utf-8")
    return path


def stored_row(name, texts, gold=(), prompt="reason", finished=True):
    responses = [{"text": text, "finished": finished} for text in texts]
    return {
        "id": name,
        "text": f"tweet {name}",
        "image": "x.jpg",
        "quintuples": [list(g) for g in gold],
        "responses": responses,
        "prompt": prompt,
    }


@pytest.mark.parametrize(
    "prompt, text, finished, quintuples, unparsed, well_formed, malformed",
    [
        ("reason", respond("[A, per, B, per, peer]"), True, 1, 0, 1, 0),
        ("reason", respond("[]"), True, 0, 0, 1, 0),
        ("reason", respond("I cannot say"), True, 0, 1, 1, 1),
        ("reason", respond("[A, per, B, per, peer]\n[A, B]"), True, 1, 0, 1, 1),
        ("reason", "<think>so A and B", False, 0, 1, 0, 0),
        ("reason", "<answer>[]</answer>", True, 0, 0, 0, 0),
        (
            "reason",
            "[A, per, B, per, peer]",
            True,
            0,
            1,
            0,
            0,
        ),  # no tags: nothing is read where the prompt asked for them
        ("direct", "[A, per, B, per, peer]", True, 1, 0, 1, 0),
        ("direct", "[]", True, 0, 0, 1, 0),
        ("direct", "", True, 0, 0, 1, 0),
        ("direct", "[A, per, B", False, 0, 1, 0, 1),
    ],
)
def test_what_a_response_counts_as(
    tmp_path, prompt, text, finished, quintuples, unparsed, well_formed, malformed
):
    path = write(tmp_path / "p.jsonl", [stored_row("1", [text], prompt=prompt, finished=finished)])
    prediction = predictions.read_predictions(path)["1"]
    assert len(prediction.answers[0]) == quintuples and prediction.parsed == [not unparsed]
    counts = {
        "responses": 1,
        "well_formed": well_formed,
        "cut_off": int(not finished),
        "unparsed": unparsed,
        "malformed_items": malformed,
    }
    assert prediction.counts == counts


def test_other_systems_quintuples(tmp_path):
    items = [
        ["Josh Gordon ", "PERSON", "Browns", "organization", "member_of"],
        ["A", "per", "B"],
        ["A", "animal", "B", "per", "likes"],
    ]
    path = write(
        tmp_path / "p.jsonl",
        [{"id": 7, "quintuples": items}, {"id": "8", "quintuples": []}, {"id": "9", "quintuples": ["x"]}],
    )
    found = predictions.read_predictions(path)
    assert (
        found["7"].answers == [(GOLD, q("A, animal, B, per, likes"))]
        and found["7"].counts["malformed_items"] == 1
    )
    assert found["8"].parsed == [True] and found["9"].parsed == [False]


# -------------------------------------------------------------------------------- the command line


def run(*args, cwd=None):
    return subprocess.run(
        [sys.executable, ROOT / "05_eval.py", *map(str, args)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=cwd,
        timeout=120,
    )


def gold_file(folder):
    rows = [
        {"id": str(i), "text": f"tweet {i}", "image": "x.jpg", "quintuples": [list(GOLD)]} for i in range(4)
    ]
    return write(folder / "gold.jsonl", rows)


def test_scoring_another_systems_file(tmp_path):
    rows = [
        {"id": "0", "quintuples": [list(GOLD)]},
        {"id": "2", "quintuples": [list(GOLD[2:4] + GOLD[:2] + GOLD[4:])]},
        {"id": "3", "quintuples": [["?"]]},
    ]
    done = run(
        "--predictions",
        write(tmp_path / "p.jsonl", rows),
        "--data",
        gold_file(tmp_path),
        "--out",
        tmp_path / "out",
    )
    assert done.returncode == 0, done.stderr
    assert (
        "4 tweets, 1 without a prediction (counted as empty)" in done.stdout
        and "1 unparsed, 1 malformed items" in done.stdout
    )
    assert "all five parts equal, direction and case count" in done.stdout  # the rule stands beside the score
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert [metrics["scores"]["jmere"][name] for name in ("tp", "pred", "gold")] == [1, 2, 4]
    assert metrics["scores"]["jmere_undirected"]["tp"] == 2
    assert {name: n for name, n in metrics["errors"].items() if any(n)} == {
        "direction": [1, 1],
        "missing": [0, 1],
        "unparsed": [0, 1],
    }
    again = run("--predictions", tmp_path / "out" / "quintuples.jsonl", "--data", tmp_path / "gold.jsonl")
    assert (
        again.returncode == 0
        and again.stdout.split("equal means")[1].split("gold quintuples")[0] in done.stdout
    )


@needs_data
@pytest.mark.parametrize("file", ["jmere/test.json", "mnre/mnre_test.txt"])
def test_gold_against_itself_is_100(tmp_path, file):
    examples = data.load_examples(DATA / file)
    rows = [{"id": e.id, "quintuples": [list(g) for g in e.quintuples]} for e in examples]
    done = run(
        "--predictions", write(tmp_path / "p.jsonl", rows), "--data", DATA / file, "--out", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert {s["f1"] for s in metrics["scores"].values()} == {1.0} and metrics["scores"]["jmere"][
        "gold"
    ] == 640
    assert not any(map(sum, metrics["errors"].values())) and metrics["scores"]["jmere"]["f1_95"] == [1, 1]


def test_our_file_needs_no_data(tmp_path):
    rows = [
        stored_row("1", [respond(common.format_answer([GOLD]))] * 2 + [respond("[]")], [GOLD]),
        stored_row("2", ["?"] * 3, [GOLD]),
    ]
    done = run("--predictions", write(tmp_path / "p.jsonl", rows))
    assert done.returncode == 0, done.stderr
    assert "2 tweets" in done.stdout and "6 responses, 3 well formed, 0 cut off, 3 unparsed" in done.stdout
    assert [line.split()[1:7] for line in done.stdout.split("\n") if line.startswith("JMERE  ")] == [
        ["100.00", "50.00", "66.67", "1", "1", "2"]
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.jsonl"]  # without --out nothing is written


@pytest.mark.parametrize(
    "rows, data, message",
    [
        ([{"id": "0", "quintuples": []}], False, "give the gold with --data"),
        (
            [{"id": "0", "quintuples": []}, {"id": "9", "quintuples": []}],
            True,
            "1 of 2 ids are not in the data (9",
        ),
        (
            [{"id": "0", "quintuples": []}, {"id": "0", "quintuples": []}],
            True,
            "p.jsonl:2: id 0 stands there twice",
        ),
        ([{"quintuples": []}], True, "p.jsonl:1: missing 'id'"),
        (
            [{"id": "0", "quintuples": "none"}],
            True,
            "p.jsonl:1: expected 'responses' (ours) or a list of 'quintuples'",
        ),
        ([stored_row("0", [])], True, "p.jsonl:1: expected 'prompt'"),
        ([{**stored_row("0", ["x"]), "text": "other"}], True, "p.jsonl:1: id 0 has another text"),
        (
            [{"id": "0", "responses": [3], "prompt": "reason", "text": "tweet 0"}],
            True,
            "a response without 'text'",
        ),
    ],
)
def test_wrong_predictions_are_named(tmp_path, rows, data, message):
    done = run(
        "--predictions", write(tmp_path / "p.jsonl", rows), *(["--data", gold_file(tmp_path)] if data else [])
    )
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "args, message",
    [
        (
            ["--predictions", "p", "--model", "m"],
            "--model belongs to a model that runs here and --api and --merge",
        ),
        (["--predictions", "p", "--compare", "a"], "not allowed with argument --predictions"),
        (["--merge", "m", "--data", "d"], "--data belongs to"),
        (["--compare", "a", "--no-report"], "--report belongs to"),
        (["--adapter", "a", "--zero-shot"], "not allowed with argument --adapter"),
        (["--predictions", "p", "--report"], "--report needs --out"),
        (["--tau", "0"], "expected a share"),
        (["--tau", "0.4"], "--tau belongs to --vote tuple"),
        (["--top-p", "0"], "expected a share"),
        (["--samples", "5", "--temperature", "0"], "--samples 5 with --temperature 0"),
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--seed", "-1"], "expected at least 0"),
        (["--resamples", "0"], "expected at least 10"),
        (["--limit", "0"], "expected at least 1"),
        (["--budget", "3"], "--budget belongs to --api"),
        (["--dry-run"], "--dry-run belongs to --api"),
        (["--batch", "submit"], "--batch belongs to --api"),
        (["--api", "--adapter", "a"], "--adapter belongs to"),
        (["--api", "--zero-shot"], "--zero-shot belongs to"),
    ],
)
def test_wrong_arguments(args, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        ev.parse_args(args)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1


def test_defaults_are_the_ones_of_the_readme():
    args = ev.parse_args([])
    assert (args.adapter, args.data, args.image_dir, args.out) == (
        *("runs/grpo/best", "data/test.json", "data/img", "runs/test"),
    )
    assert (args.temperature, args.max_new_tokens, args.report) == (0.8, 2048, True)
    assert ev.parse_args(["--api"]).model == "gpt-4o-2024-11-20"
    stored = ev.parse_args(["--predictions", "p"])
    assert (stored.data, stored.out, stored.report) == (None, None, False)


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "--adapter runs/grpo/best: no such file: made by 04_grpo.py; --zero-shot predicts without one"),
        (["--zero-shot"], "--data data/test.json: no such file: the EEGA release goes there (README, Data)"),
        (["--api"], "--data data/test.json: no such file"),
        (["--predictions", "runs/test"], "runs/test: no such file"),
        (["--merge", "merged"], "--adapter runs/grpo/best: no such file"),
    ],
)
def test_a_bare_command_in_an_empty_folder_says_what_is_missing(tmp_path, args, message):
    done = run(*args, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


# -------------------------------------------------------------------------------- predict, with a stand-in for vlm


class FakeRanks:
    """training.Ranks for threads of one process."""

    device = torch.device("cpu")

    def __init__(self, rank, values, meeting):
        self.rank = rank
        self.world = len(values)
        self.main = rank == 0
        self.values = values
        self.meeting = meeting

    def barrier(self):
        self.meeting.wait()

    def gather(self, value):
        self.values[self.rank] = value
        self.meeting.wait()
        return list(self.values)

    def together(self):
        return contextlib.nullcontext()


class FakeVlm(types.SimpleNamespace):
    """What lib.predict uses of vlm, lora, rollout, training and checks.

    Answers depend on the tweet's key alone; dies before tweet number `dies_at`.
    """

    DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
    DEFAULT_MODEL = "paper's"

    def __init__(self, ranks=(0,), dies_at=None, own="reason"):
        meeting = threading.Barrier(len(ranks), timeout=60)
        values = [None] * len(ranks)
        super().__init__(dies_at=dies_at, own=own, items=[], loaded=[], calls=[], proved=[])
        self.ranks = iter([FakeRanks(rank, values, meeting) for rank in ranks])

    def setup(self):
        return next(self.ranks)

    def load_processor(self, name, min_pixels, max_pixels):
        return f"processor {max_pixels}"

    def load(self, name, dtype, device, processor):
        assert dtype is torch.float32 and device.type == "cpu" and processor.startswith("processor")
        self.loaded.append(name)
        return name, processor

    def load_adapter(self, model, folder):
        self.loaded.append(str(folder))
        return model

    def read_recipe(self, folder):
        return types.SimpleNamespace(prompt=self.own, min_pixels=None, max_pixels=784)

    def base_name(self, folder):
        return "base"

    def weights_digest(self, name):
        return {"base": "1", "tiny": "1"}.get(name, "2")

    def usable(self, examples, processor, args, ranks):
        return data.check_images(examples, args.skip_bad), ""

    def prove(self, model, processor, example, args, ranks):
        self.proved.append(example.id)

    def generate(
        self, model, processor, items, n, max_new_tokens, temperature, top_p, keys, batch_rows, static
    ):
        settings = {"n": n, "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        self.calls.append({**settings, "rows": len(items) * n})
        if self.dies_at is not None and len(self.items) + len(items) > self.dies_at:
            raise KeyboardInterrupt
        self.items += items
        groups = []
        for key in keys:
            text = respond(common.format_answer([GOLD]), think=f"key {key}")
            groups.append([types.SimpleNamespace(text=text, completion_ids=[1, 2], finished=True)] * n)
        return groups


@pytest.fixture
def tweets(tmp_path):
    for size in (28, 280):
        Image.new("RGB", (size, size)).save(tmp_path / f"{size}.png")
    rows = [
        {
            "id": f"t{i}",
            "text": "word " * i + "{text}",
            "image": "280.png" if i == 3 else "28.png",
            "quintuples": [list(GOLD)],
        }
        for i in range(6)
    ]
    return write(tmp_path / "data.jsonl", rows)


def stand_in(monkeypatch, fake):
    for name in ("vlm", "rollout", "training", "lora", "checks"):
        monkeypatch.setattr(predict, name, fake)


def evaluate(monkeypatch, vlm, data, out, *more):
    stand_in(monkeypatch, vlm)
    start = [] if "--adapter" in more else ["--zero-shot"]
    command = ["--model", "tiny", "--data", str(data), "--out", str(out), "--batch-rows", "2", *start]
    ev.main(ev.parse_args([*command, *more]))
    return vlm


def test_predict_stores_then_scores(monkeypatch, tweets, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    out = tmp_path / "run"
    vlm = evaluate(
        monkeypatch, FakeVlm(), tweets, out, "--adapter", str(adapter), "--samples", "3", "--batch-rows", "7"
    )
    assert vlm.loaded == ["tiny", str(adapter)]
    assert vlm.calls[0] == {
        "n": 3,
        "max_new_tokens": 2048,
        "temperature": 0.8,
        "top_p": 1.0,
        "rows": 6,
    }  # the paper's
    order = [prompt.split("Tweet: ")[1].split("{text}")[0].count("word") for prompt, _ in vlm.items]
    assert order == [3, 5, 4, 2, 1, 0]  # longest first, the image included; a brace in a tweet is text
    assert "<think>" in vlm.items[0][0] and Path(vlm.items[0][1]).name == "280.png"
    rows = [row for _, row in data.read_jsonl(out / "predictions.jsonl")]
    assert [row["id"] for row in rows] == [f"t{i}" for i in range(6)] and len(
        rows[0]["responses"]
    ) == 3  # in the order of the data
    assert (
        rows[0]["image"] == "../28.png"
        and rows[0]["prompt"] == "reason"
        and rows[0]["quintuples"] == [list(GOLD)]
    )
    assert sorted(path.name for path in out.iterdir()) == [
        ".lock",
        "metrics.json",
        "predictions.jsonl",
        "quintuples.jsonl",
        "report.html",
    ]
    assert json.loads((out / "metrics.json").read_text())["scores"]["jmere"]["f1"] == 1.0
    assert vlm.proved == ["t0"]  # the packed pass, once, on a real tweet
    capsys.readouterr()
    # same folder, other weights: not the old predictions
    (adapter / "adapter_model.safetensors").write_bytes(b"trained on")
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, FakeVlm(), tweets, out, "--adapter", str(adapter), "--samples", "3")
    assert "adapter" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, own, expected",
    [
        ([], "reason", "direct"),  # zero-shot
        (["--prompt", "reason"], "direct", "reason"),
        (["--adapter", "."], "direct", "direct"),
        (["--adapter", "."], "reason", "reason"),
        (["--adapter", ".", "--prompt", "direct"], "reason", "direct"),
    ],
)
def test_prompt_follows_the_adapter(monkeypatch, tweets, tmp_path, more, own, expected):
    vlm = evaluate(monkeypatch, FakeVlm(own=own), tweets, tmp_path / "run", *more)
    assert {"<think>" in prompt for prompt, _ in vlm.items} == {expected == "reason"}
    assert next(data.read_jsonl(tmp_path / "run" / "predictions.jsonl"))[1]["prompt"] == expected


def test_a_killed_run_goes_on_and_ends_the_same(monkeypatch, tweets, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    evaluate(monkeypatch, FakeVlm(), tweets, whole)
    with pytest.raises(KeyboardInterrupt):
        evaluate(monkeypatch, FakeVlm(dies_at=4), tweets, broken)
    part = broken / "predictions.rank0.jsonl"
    torn = part.read_bytes()
    assert torn.count(b"\n") == 4
    part.write_bytes(torn[:-20])  # the last line was being written
    vlm = evaluate(monkeypatch, FakeVlm(), tweets, broken)
    assert len(vlm.items) == 3  # two never asked and the torn one
    assert (broken / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()
    vlm = evaluate(monkeypatch, FakeVlm(), tweets, broken)
    assert vlm.items == vlm.loaded == []  # all stored: no model is loaded
    assert len(evaluate(monkeypatch, FakeVlm(), tweets, broken, "--fresh").items) == 6


def test_ranks_share_the_work_and_rank_0_merges(monkeypatch, tweets, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    evaluate(monkeypatch, FakeVlm(), tweets, one)
    vlm = FakeVlm(ranks=(1, 0))
    with ThreadPoolExecutor(2) as pool:  # one thread a rank, with a real barrier
        stand_in(monkeypatch, vlm)
        args = [
            "--zero-shot",
            "--model",
            "tiny",
            "--data",
            str(tweets),
            "--out",
            str(two),
            "--batch-rows",
            "2",
        ]
        assert [done.result() for done in [pool.submit(ev.main, ev.parse_args(args)) for _ in (0, 1)]] == [
            None,
            None,
        ]
    assert len(vlm.items) == len(set(vlm.items)) == 6 and sorted(c["rows"] for c in vlm.calls) == [1, 1, 2, 2]
    assert sorted(path.name for path in two.iterdir()) == [
        ".lock",
        "metrics.json",
        "predictions.jsonl",
        "quintuples.jsonl",
        "report.html",
    ]
    assert (two / "predictions.jsonl").read_bytes() == (one / "predictions.jsonl").read_bytes()


def test_limit_keeps_what_is_stored(monkeypatch, tweets, tmp_path, capsys):
    out = tmp_path / "run"
    assert len(evaluate(monkeypatch, FakeVlm(), tweets, out, "--limit", "2").items) == 2
    assert len(evaluate(monkeypatch, FakeVlm(), tweets, out).items) == 4
    before = (out / "predictions.jsonl").read_bytes()
    evaluate(monkeypatch, FakeVlm(), tweets, out, "--limit", "2")
    assert (
        out / "predictions.jsonl"
    ).read_bytes() == before and "2 tweets, 2 stored already" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        (["--samples", "2"], "samples 1 (now 2)"),
        (["--temperature", "0"], "temperature 0.8 (now 0.0)"),
        (["--prompt", "reason"], "prompt"),
    ],
)
def test_other_settings_on_the_same_out_are_refused(monkeypatch, tweets, tmp_path, capsys, change, message):
    evaluate(monkeypatch, FakeVlm(), tweets, tmp_path / "run")
    with pytest.raises(SystemExit) as stopped:
        evaluate(monkeypatch, FakeVlm(), tweets, tmp_path / "run", *change)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and "--fresh" in error


def test_other_data_on_the_same_out_is_refused(monkeypatch, tweets, tmp_path, capsys):
    evaluate(monkeypatch, FakeVlm(), tweets, tmp_path / "run")
    rows = [{**row, "text": row["text"] + "!"} for _, row in data.read_jsonl(tweets)]
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, FakeVlm(), write(tmp_path / "other.jsonl", rows), tmp_path / "run")
    assert "is not this tweet of --data" in capsys.readouterr().err


def test_tweets_without_gold_are_predicted_and_not_scored(monkeypatch, tweets, tmp_path, capsys):
    rows = [{name: row[name] for name in ("id", "text", "image")} for _, row in data.read_jsonl(tweets)]
    evaluate(monkeypatch, FakeVlm(), write(tmp_path / "plain.jsonl", rows), tmp_path / "run")
    assert "6 quintuples predicted; no gold, so no score" in capsys.readouterr().out
    answer = next(data.read_jsonl(tmp_path / "run" / "quintuples.jsonl"))[1]
    assert answer == {"id": "t0", "quintuples": [list(GOLD)]}
    assert "scores" not in json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (
        ev.main(
            ev.parse_args(
                ["--predictions", str(tmp_path / "run" / "predictions.jsonl"), "--data", str(tweets)]
            )
        )
        is None
    )  # gold later
    assert "100.00" in capsys.readouterr().out


def test_a_bad_image_is_found_before_the_model_is_loaded(monkeypatch, tweets, tmp_path, capsys):
    (tmp_path / "280.png").write_bytes(b"no image")
    vlm = FakeVlm()
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, vlm, tweets, tmp_path / "run")
    assert "t3" in capsys.readouterr().err and vlm.loaded == []
    vlm = evaluate(monkeypatch, FakeVlm(), tweets, tmp_path / "run", "--skip-bad")
    assert len(vlm.items) == 5
    assert "1 without a prediction (counted as empty)" in capsys.readouterr().out  # not left out of the score


def test_a_second_run_on_the_same_out_is_refused(monkeypatch, tweets, tmp_path, capsys):
    with ask.AppendFile(tmp_path / "run" / ".lock"), pytest.raises(SystemExit) as stopped:
        evaluate(monkeypatch, FakeVlm(), tweets, tmp_path / "run", "--fresh")
    assert stopped.value.code == 2 and "another process writes to it" in capsys.readouterr().err


# -------------------------------------------------------------------------------- predict, with a real tiny model

ENV = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    out = tmp_path_factory.mktemp("world")
    subprocess.run(
        [sys.executable, "-m", "demo.world", "--out", out, "--train", "1", "--val", "1", "--test", "5"],
        check=True,
        cwd=ROOT,
        env=ENV,
    )
    return out


@pytest.fixture(scope="module", params=["qwen2_5_vl", "llava"])
def tiny(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param)
    subprocess.run(
        [sys.executable, "-m", "demo.base.build", "--arch", request.param, "--out", out],
        check=True,
        cwd=ROOT,
        env=ENV,
    )
    return out


def shell(command, *args):
    done = subprocess.run(
        [*map(str, command), *map(str, args)], capture_output=True, text=True, env=ENV, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def texts(out):
    return {
        row["id"]: [r["text"] for r in row["responses"]]
        for _, row in data.read_jsonl(out / "predictions.jsonl")
    }


def test_a_real_model_predicts_the_same_on_any_number_of_ranks(tiny, small_world, tmp_path):
    from lib import lora, vlm

    model, processor = vlm.load(tiny)
    torch.manual_seed(1)
    model = lora.add_lora(model, 4, 8)
    lora.save_adapter(model, processor, tmp_path / "adapter", lora.Recipe("direct"), "")
    common_args = [
        "--model",
        tiny,
        "--adapter",
        tmp_path / "adapter",
        "--data",
        small_world / "test.jsonl",
        "--max-new-tokens",
        "12",
    ]
    sampled = [*common_args, "--samples", "3"]
    one = shell([sys.executable, "05_eval.py"], *sampled, "--out", tmp_path / "one", "--batch-rows", "3")
    assert (
        "5 tweets, 0 stored already, 3 responses each, direct prompt, fp32" in one and "15 responses" in one
    )
    launcher = shutil.which("deepspeed", path=ENV["PATH"])
    if launcher is None:
        pytest.skip("the deepspeed launcher is not installed")
    with socket.socket() as probe:  # not the launcher's default, which another run on this machine may hold
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shell(
        [launcher, "--num_gpus", "2", "--master_port", port, "05_eval.py"],
        *sampled,
        "--out",
        tmp_path / "two",
        "--batch-rows",
        "6",
    )
    assert texts(tmp_path / "one") == texts(tmp_path / "two")
    assert (
        len({text for answers in texts(tmp_path / "one").values() for text in answers}) > 10
    )  # sampled, not one text for all
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        *(".lock", "metrics.json", "predictions.jsonl", "quintuples.jsonl", "report.html")
    ]
    again = shell([sys.executable, "05_eval.py"], *sampled, "--out", tmp_path / "two")
    assert "5 tweets, 5 stored already" in again


def test_table_columns_line_up():
    lines = tables.table(("name", "n"), [("a", 1), ("long name", 1000)]).splitlines()
    assert lines == ["name          n", "a             1", "long name  1000"]


def test_a_model_that_the_adapter_was_not_trained_on_is_refused(monkeypatch, tweets, tmp_path, capsys):
    stand_in(monkeypatch, FakeVlm())
    command = ["--data", str(tweets), "--out", str(tmp_path / "run"), "--adapter", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        ev.main(ev.parse_args([*command, "--model", "another"]))
    assert stopped.value.code == 2 and "other weights than base" in capsys.readouterr().err
    vlm = FakeVlm()
    stand_in(monkeypatch, vlm)
    ev.main(ev.parse_args(command))
    assert vlm.loaded == ["base", str(tmp_path)]  # from adapter_config.json
