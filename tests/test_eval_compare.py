"""05: many responses (Figure 5), --compare, --api."""

import importlib
import json
import os
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT
from fake_openai import FakeOpenAI
from PIL import Image

import common
from lib import data, predictions, scoring

ev = importlib.import_module("05_eval")
A, B, C = (common.quintuple(name, "per", "Browns", "org", "member of") for name in "ABC")


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(map(data.jsonl_line, rows)), encoding="utf-8")
    return path


def stored(path, answers, golds):
    """predictions.jsonl of tweets t0, t1, …; answers: a list of quintuple lists a tweet, None where the
    response is no answer."""
    texts = [
        [
            f"<think>x{i % 3}</think><answer>{'?' if a is None else common.format_answer(a)}</answer>"
            for i, a in enumerate(r)
        ]
        for r in answers
    ]
    rows = [
        {
            "id": f"t{i}",
            "text": f"tweet {i}",
            "image": "x.png",
            "quintuples": [list(q) for q in gold],
            "prompt": "reason",
        }
        | {"responses": [{"text": text, "finished": True} for text in responses]}
        for i, (gold, responses) in enumerate(zip(golds, texts, strict=True))
    ]
    return write(path, rows)


def run(*args, **env):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI")} | env
    done = subprocess.run(
        [sys.executable, ROOT / "05_eval.py", *map(str, args)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


# -------------------------------------------------------------------------------- F1@k


def random_predictions(examples=12, n=7, seed=0):
    rng, preds, golds = random.Random(seed), [], []
    for _ in range(examples):
        answers = [tuple(rng.choices((A, B, C), k=rng.randint(0, 2))) for _ in range(n)]
        parsed = [bool(answer) or rng.random() < 0.5 for answer in answers]
        preds.append(predictions.Prediction(answers, parsed, Counter(), n))
        golds.append(rng.choice([(A,), (A, B), ()]))
    return preds, golds


@pytest.mark.parametrize("how, tau", [("set", 0.5), ("tuple", 0.3), ("tuple", 0.5), ("tuple", 1.0)])
def test_f1_at_k_is_the_vote_of_every_subset(how, tau):
    preds, golds = random_predictions()
    curve, rng, wanted = (
        scoring.f1_at_k(preds, golds, how, tau, subsets=5, seed=9),
        np.random.default_rng(9),
        np.zeros((5, 7)),
    )
    orders = [rng.permuted(np.tile(np.arange(7), (5, 1)), axis=1) for _ in preds]
    for s in range(5):
        for k in range(1, 8):
            chosen = [sorted(order[s, :k]) for order in orders]
            voted = [
                scoring.vote([p.answers[i] for i in c], [p.parsed[i] for i in c], how, tau)
                for p, c in zip(preds, chosen, strict=True)
            ]
            wanted[s, k - 1] = common.score(voted, golds)["jmere"]["f1"]
    assert curve == pytest.approx(wanted)
    assert np.ptp(curve[:, 6]) == 0 and curve[:, 1:6].std() > 0  # all of N is one subset


def test_f1_at_1_is_the_mean_of_single_responses():
    preds, golds = random_predictions(30, 4)
    curve = scoring.f1_at_k(preds, golds, subsets=3000)
    args = ev.parse_args(["--predictions", "p", "--subsets", "5"])
    assert curve[:, 0].mean() == pytest.approx(scoring.diversity(preds, golds, args)["single_mean"], abs=0.01)


def test_diversity_by_hand(tmp_path):
    answers = [[[A], [B], [A], None], [[C], [A, B], [A], [A]]]
    path = stored(tmp_path / "p.jsonl", answers, [[A], [A, B]])
    done = run("--predictions", path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    many = json.loads((tmp_path / "out/metrics.json").read_text())["samples"]
    single = [2 * tp / (pred + 3) for tp, pred in ((1, 2), (2, 3), (2, 2), (1, 1))]  # gold 3
    assert many["single_mean"] == pytest.approx(np.mean(single)) and many["single_std"] == pytest.approx(
        np.std(single)
    )
    assert many["best_of_n"] == 1.0 and many["distinct_answers"] == 2.5 and many["distinct_paths"] == 3
    assert many["f1_at_k"][3] == pytest.approx([4, 0.8, 0]) and "best of 4 (oracle) 100.00" in done.stdout


# -------------------------------------------------------------------------------- --compare


def test_compare_prints_the_papers_tables(tmp_path):
    golds = [[A]] * 40
    stored(tmp_path / "sft" / "predictions.jsonl", [[[A] if i < 10 else [B]] for i in range(40)], golds)
    stored(tmp_path / "r1" / "predictions.jsonl", [[[A] if i < 30 else [B]] for i in range(40)], golds)
    other = write(tmp_path / "mine.jsonl", [{"id": f"t{i}", "quintuples": [list(A)]} for i in range(10)])
    done = run(
        "--compare",
        tmp_path / "sft",
        f"jmere_r1={tmp_path / 'r1'}",
        f"no filters at all={other}",
        "--out",
        tmp_path / "out",
    )
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "out/compare.json").read_text())}
    assert (
        rows["sft"]["scores"]["jmere"]["f1"] == 0.25
        and rows["sft"]["paper"][2] == 51.95
        and "p" not in rows["sft"]
    )
    assert rows["jmere_r1"]["f1_difference"] == pytest.approx(0.5) and rows["jmere_r1"]["p"] < 0.01
    low, high = rows["jmere_r1"]["difference_95"]
    assert 0.3 < low < 0.5 < high < 0.7
    assert (
        rows["no filters at all"]["without_prediction"] == 30
        and rows["no filters at all"]["section"] == "Ablations (Table 2)"
    )
    assert rows["EEGA"]["paper"] == [58.26, 52.61, 55.29, 78.59] and "scores" not in rows["EEGA"]
    line = next(line for line in done.stdout.splitlines() if line.startswith("jmere_r1"))
    assert (
        line.split()[1:4] == ["75.00", "75.00", "75.00"]
        and line.split()[-4:] == ["58.99", "54.84", "56.84", "79.20"]
        and "+50.00" in line
    )
    assert (
        done.stdout.index("zero-shot GPT-4o")
        < done.stdout.index("EEGA")
        < done.stdout.index("no filters at all")
    )
    markdown = (tmp_path / "out/compare.md").read_text(encoding="utf-8").splitlines()
    assert {line.count("|") for line in markdown if line} == {14} and any(
        line.startswith("| jmere_r1 | 75.00 |") for line in markdown
    )


def test_the_paired_bootstrap_is_paired(tmp_path):
    """Two runs that fail on the same tweets: the interval of each is wide, that of the difference is a
    point."""
    golds = [[A, B]] * 60
    one = stored(tmp_path / "one.jsonl", [[[A] if i % 2 else [C]] for i in range(60)], golds)
    two = stored(tmp_path / "two.jsonl", [[[B] if i % 2 else [C]] for i in range(60)], golds)
    done = run("--compare", one, two, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "compare.json").read_text())}
    assert rows["two"]["difference_95"] == [0, 0] and rows["two"]["p"] == 1.0
    low, high = rows["two"]["scores"]["jmere"]["f1_95"]
    assert high - low > 0.1


@pytest.mark.parametrize(
    "golds, names, message",
    [
        ([[A]] * 3, ("a", "b"), "ids are not in the data"),
        ([[A]] * 2, ("SFT", "sft"), "two runs are named sft"),
    ],
)
def test_runs_that_cannot_be_compared(tmp_path, golds, names, message):
    one = stored(tmp_path / "1.jsonl", [[[A]]] * 2, [[A]] * 2)
    two = stored(tmp_path / "2.jsonl", [[[A]]] * len(golds), golds)
    done = run("--compare", f"{names[0]}={one}", f"{names[1]}={two}")
    assert done.returncode == 2 and message in done.stderr


# -------------------------------------------------------------------------------- --api


@pytest.fixture
def tweets(tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "x.png")
    rows = [
        {"id": f"t{i}", "text": f"tweet {i}", "image": "x.png", "quintuples": [list(A)]} for i in range(4)
    ]
    return write(tmp_path / "data.jsonl", rows)


def model(body, prompt):
    if "tweet 1" in prompt:
        return ["I'm sorry, I can't help with that."] * body.get("n", 1)
    return [common.format_answer([A])] * body.get("n", 1)


def test_api_model_is_asked_once_and_scored(tweets, tmp_path):
    out, key = tmp_path / "run", {"OPENAI_API_KEY": "sk-x"}
    with FakeOpenAI(model) as server:
        command = ["--api", "--model", "fake", "--base-url", server.url, "--data", tweets, "--out", out]
        dry = run(*command, "--dry-run")
        assert dry.returncode == 0 and "4 calls" in dry.stdout and not server.requests
        assert run(*command).returncode == 3 and not server.requests  # no key
        done = run(*command, "--samples", "3", **key)
        assert done.returncode == 0, done.stderr
        assert (
            len(server.requests) == 4
            and "temperature" not in server.requests[0]["body"]
            and server.requests[0]["body"]["n"] == 3
        )
        assert "Output only the final answer" in server.requests[0]["prompt"]
        assert "12 responses, 12 well formed, 0 cut off, 3 unparsed" in done.stdout
        metrics = json.loads((out / "metrics.json").read_text())
        assert [metrics["scores"]["jmere"][name] for name in ("tp", "pred", "gold")] == [3, 3, 4] and metrics[
            "errors"
        ]["unparsed"] == [
            0,
            1,
        ]
        more = run(*command, "--samples", "5", **key)  # only the two that are missing are paid for
        assert more.returncode == 0 and [r["body"].get("n") for r in server.requests[4:]] == [2] * 4
        assert run(*command, "--samples", "5", **key).returncode == 0 and len(server.requests) == 8
        other = run(*command, "--temperature", "0.1", **key)
        assert other.returncode == 2 and "--fresh" in other.stderr and len(server.requests) == 8
        again = run(*command, "--fresh", "--temperature", "0.1", "--limit", "1", **key)
        assert (
            again.returncode == 0
            and len(server.requests) == 9
            and server.requests[8]["body"]["temperature"] == 0.1
        )
        assert len((out / "answers.jsonl").read_text().splitlines()) == 1


def test_api_model_is_asked_by_batches(tweets, tmp_path):
    key = {"OPENAI_API_KEY": "sk-x", "JMERE_POLL": "0.05"}
    with FakeOpenAI(model) as server:
        command = ["--api", "--model", "fake", "--base-url", server.url, "--data", tweets]
        submitted = run(*command, "--out", tmp_path / "batched", "--batch", "submit", **key)
        assert (
            submitted.returncode == 0
            and len(server.batches) == 1
            and not (tmp_path / "batched" / "metrics.json").exists()
        )
        assert run(*command, "--out", tmp_path / "batched", "--batch", "collect", **key).returncode == 0
        assert run(*command, "--out", tmp_path / "live", **key).returncode == 0
    assert (tmp_path / "batched" / "metrics.json").read_text() == (
        tmp_path / "live" / "metrics.json"
    ).read_text()


def test_failed_calls_are_counted(tweets, tmp_path):
    with FakeOpenAI(model, faults=["400"]) as server:
        command = [
            "--api",
            "--model",
            "fake",
            "--base-url",
            server.url,
            "--data",
            tweets,
            "--out",
            tmp_path / "run",
            "--concurrency",
            "1",
        ]
        done = run(*command, OPENAI_API_KEY="sk-x")
        assert (
            done.returncode == 1
            and "1 without a prediction (counted as empty)" in done.stdout
            and "1 of 4 calls failed" in done.stderr
        )
        assert run(*command, OPENAI_API_KEY="sk-x").returncode == 0 and len(server.requests) == 5
