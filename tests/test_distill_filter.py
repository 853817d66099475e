"""01 and 02 as a user runs them, against a teacher that answers by rule."""

import importlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from fake_openai import FakeOpenAI
from PIL import Image

import common
from lib import data as files

ROOT = Path(__file__).parent.parent
distill, select = importlib.import_module("01_distill"), importlib.import_module("02_filter")
GOLD = [["Josh Gordon", "per", "Browns", "org", "member of"]]
CHAIN = (
    "Image Description: {0} a man\nVisual-Text Alignment: he is Josh Gordon\n"
    "Quintuple Reasoning: so per, and a member"
)


@pytest.fixture
def data(tmp_path):
    """Four annotated tweets with images."""
    rows = []
    for i in range(4):
        Image.new("RGB", (30 + i, 20), "red").save(tmp_path / f"{i}.jpg")
        rows.append(
            {
                "id": f"t{i}",
                "text": f"tweet {i} Josh Gordon of the Browns",
                "image": f"{i}.jpg",
                "quintuples": GOLD,
            }
        )
    (tmp_path / "train.jsonl").write_text("".join(map(files.jsonl_line, rows)))
    return tmp_path


def run(script, *args, key="sk-secret-1234", cwd=None, **env):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI")} | env
    environment |= {"OPENAI_API_KEY": key} if key else {}
    command = [sys.executable, ROOT / script, *map(str, args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=cwd)
    assert "Traceback" not in done.stderr, done.stderr
    assert key is None or key not in done.stdout + done.stderr
    return done


def rows_of(path):
    return [row for _, row in files.read_jsonl(path)]


def teacher(chains=None, scores=None, prediction=None):
    """chains: {k: text} of candidates that are not good; scores, prediction: functions of the prompt."""

    def answer(body, prompt):
        if prompt.startswith("Score"):
            return [scores(prompt) if scores else "Scores: R1=2 R2=2 R3=2 R4=1 R5=1 R6=2"]
        if "Reasoning of a colleague" in prompt:
            return [
                prediction(prompt)
                if prediction
                else common.format_answer([common.quintuple(*q) for q in GOLD])
            ]
        return [(chains or {}).get(i, CHAIN.format(i)) for i in range(body.get("n", 1))]

    return answer


def test_whole_chain(data):
    """Five candidates: one malformed, one refused, one leaks, two good; the judge prefers the last."""
    chains = {
        0: "no parts",
        1: "I'm sorry, I can't help with that.",
        2: CHAIN.format("As the given quintuples say,"),
    }

    def scores(prompt):
        return "R1 looks fine.\nScores: R1=2 R2=2 R3=2 R4=1 R5=1 R6=" + (
            "2" if "Description: 4" in prompt else "0"
        )

    with FakeOpenAI(teacher(chains, scores)) as server:
        common_args = ("--base-url", server.url, "--price", 1, 1)
        done = run("01_distill.py", "--data", data / "train.jsonl", "--out", data / "cot.jsonl", *common_args)
        assert done.returncode == 0, done.stderr
        cot = rows_of(data / "cot.jsonl")
        assert len(cot) == 20 and len(server.requests) == 4
        assert Counter(row["status"] for row in cot) == {"ok": 12, "malformed": 4, "refusal": 4}
        assert {row["cot"] for row in cot if row["status"] != "ok"} == {""}
        assert "a chain of three parts" in done.stdout
        done = run("02_filter.py", "--cot", data / "cot.jsonl", "--out", data / "sft.jsonl", *common_args)
        assert done.returncode == 0, done.stderr
        paid = len(server.requests)
        assert paid == 4 + 8 + 8
        again = run(
            "02_filter.py",
            "--cot",
            data / "cot.jsonl",
            "--out",
            data / "sft.jsonl",
            *common_args,
            "--threshold",
            "0.9",
        )
        assert again.returncode == 0 and len(server.requests) == paid  # another threshold costs nothing
        done = run("01_distill.py", "--data", data / "train.jsonl", "--out", data / "cot.jsonl", *common_args)
        assert done.returncode == 0 and len(server.requests) == paid  # all is there
    sft, rejected = rows_of(data / "sft.jsonl"), rows_of(data / "sft.rejected.jsonl")
    assert [row["id"] for row in sft] == ["t0", "t1", "t2", "t3"]
    assert all(
        row["candidate"] == 4 and row["score"] == 1.0 and row["scores"] == [2, 2, 2, 1, 1, 2] for row in sft
    )
    assert all(row["repredicted"] == GOLD and row["quintuples"] == GOLD for row in sft)
    assert len(sft) + len(rejected) == 20
    reasons = Counter(row["reason"].partition(":")[0] for row in rejected)
    assert reasons == {
        "malformed": 4,
        "refusal": 4,
        "leaked label": 4,
        "score": 4,
    }  # 8 points of 10 against 0.9
    stats = json.loads((data / "sft.stats.json").read_text())
    assert [tuple(stage[1:]) for stage in stats["funnel"]] == [
        (20, 4),
        (12, 4),
        (8, 4),
        (8, 4),
        (4, 4),
        (4, 4),
    ]
    examples = files.load_examples(data / "sft.jsonl", need=("quintuples", "cot", "score"))
    assert files.check_images(examples) == examples
    card = (data / "sft.card.md").read_text()
    assert (
        "answered fake-1: 16 answers" in card
        and "best of its example" in card
        and common.SCORE_PROMPT in card
        and "no licence" in card
    )
    assert common.DISTILL_PROMPT in (data / "cot.card.md").read_text()


def test_output_loads_with_datasets(data):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    with FakeOpenAI(teacher()) as server:
        run(
            "01_distill.py",
            "--data",
            data / "train.jsonl",
            "--out",
            data / "cot.jsonl",
            "--base-url",
            server.url,
        )
        run(
            "02_filter.py", "--cot", data / "cot.jsonl", "--out", data / "sft.jsonl", "--base-url", server.url
        )
    loaded = datasets.load_dataset(
        "json", data_files=str(data / "sft.jsonl"), cache_dir=str(data / "cache"), split="train"
    )
    assert (
        loaded["id"][:] == ["t0", "t1", "t2", "t3"]
        and loaded[0]["quintuples"] == GOLD
        and loaded[0]["score"] == 1.0
    )


def test_human_agreement(data):
    """Judge 10, 8, 6, 10 points of 10 against people 1.0, 0.8, 0.9, 0.5; t9 was never judged."""
    ends = {"tweet 1": "R5=1 R6=0", "tweet 2": "R5=0 R6=0"}

    def scores(prompt):
        middle = 0 if "tweet 2" in prompt else 1
        return f"R1=2 R2=2 R3=2 R4={middle} " + next(
            (end for name, end in ends.items() if name in prompt), "R5=1 R6=2"
        )

    human = [("t0", 1.0), ("t1", 0.8), ("t2", 0.9), ("t3", 0.5), ("t9", 1)]
    (data / "human.jsonl").write_text(
        "".join(files.jsonl_line({"id": i, "candidate": 0, "score": s}) for i, s in human)
    )
    with FakeOpenAI(teacher(scores=scores)) as server:
        url = ("--base-url", server.url)
        run("01_distill.py", "--data", data / "train.jsonl", "--out", data / "cot.jsonl", "--n", 1, *url)
        args = ("--cot", data / "cot.jsonl", "--out", data / "sft.jsonl", *url)
        done = run("02_filter.py", *args, "--human", data / "human.jsonl")
        assert done.returncode == 0, done.stderr
        (data / "human.jsonl").write_text('{"id": "t0", "candidate": 0, "score": 7}\n')
        bad = run("02_filter.py", *args, "--human", data / "human.jsonl")
    assert bad.returncode == 2 and "human.jsonl:1" in bad.stderr
    found = json.loads((data / "sft.stats.json").read_text())["human"]
    assert (found["compared"], found["not_judged"], found["within_0.1"]) == (4, 1, 0.5)
    assert (
        found["mean_absolute_error"] == pytest.approx(0.2)
        and found["histogram"]["-0.3"] == 1
        and found["histogram"]["+0.5"] == 1
    )
    # Squared gaps 0 + 0 + 9 + 25 = 34; all 16 pairings of (10, 8, 6, 10) with (10, 8, 9, 5):
    # 30 + 14 + 30 + 30 = 104, over 4 = 26.
    assert found["kappa"] == pytest.approx(1 - 34 / 26)
    assert Image.open(data / "sft.human.png").size[0] > 100 and "+0.5      1 #" in done.stdout


def test_reprediction_compares_sets(data):
    other = "[Browns, org, Josh Gordon, per, member of]"
    verdicts = {
        "0 a": common.format_answer(
            [common.quintuple(*q) for q in GOLD] * 2
        ),  # twice the same is the same set
        "1 a": other,  # direction swapped
        "2 a": "I see nothing of the kind here.",
        "3 a": "[]",
    }

    def prediction(prompt):
        return next(answer for name, answer in verdicts.items() if f"Description: {name}" in prompt)

    with FakeOpenAI(teacher(prediction=prediction)) as server:
        run(
            "01_distill.py",
            "--data",
            data / "train.jsonl",
            "--out",
            data / "cot.jsonl",
            "--base-url",
            server.url,
            "--n",
            4,
        )
        done = run(
            "02_filter.py",
            "--cot",
            data / "cot.jsonl",
            "--out",
            data / "sft.jsonl",
            "--base-url",
            server.url,
            "--no-score",
        )
    assert done.returncode == 0, done.stderr
    assert [row["candidate"] for row in rows_of(data / "sft.jsonl")] == [0] * 4
    reasons = {(row["candidate"], row["reason"]) for row in rows_of(data / "sft.rejected.jsonl")}
    assert reasons == {
        (1, "re-prediction: differs from gold"),
        (2, "re-prediction: unparsed"),
        (3, "re-prediction: differs from gold"),
    }


def test_ablations_and_ties(data):
    with FakeOpenAI(teacher()) as server:
        run(
            "01_distill.py",
            "--data",
            data / "train.jsonl",
            "--out",
            data / "cot.jsonl",
            "--base-url",
            server.url,
        )
        url = ("--base-url", server.url)
        before = len(server.requests)
        for seed in (0, 1):
            out = data / f"none{seed}.jsonl"
            done = run(
                "02_filter.py",
                "--cot",
                data / "cot.jsonl",
                "--out",
                out,
                "--no-score",
                "--no-reprediction",
                "--seed",
                seed,
                key=None,
            )
            assert done.returncode == 0 and len(server.requests) == before  # no key, no call
            drawn = [random.Random(f"{seed}:t{i}").choice(range(5)) for i in range(4)]
            assert [row["candidate"] for row in rows_of(out)] == drawn
            assert "scores" not in rows_of(out)[0] and "repredicted" not in rows_of(out)[0]
        run(
            "02_filter.py",
            "--cot",
            data / "cot.jsonl",
            "--out",
            data / "s.jsonl",
            "--no-reprediction",
            "--judge-model",
            "judge",
            *url,
        )
        asked = [request["body"]["model"] for request in server.requests[before:]]
    assert asked == ["judge"] * 20
    assert [row["candidate"] for row in rows_of(data / "s.jsonl")] == [
        random.Random(f"0:t{i}").choice(range(5)) for i in range(4)
    ]


def test_failed_rows_exit_1_and_are_mended(data):
    with FakeOpenAI(teacher(), [None, "400"]) as server:
        args = (
            "--data",
            data / "train.jsonl",
            "--out",
            data / "cot.jsonl",
            "--base-url",
            server.url,
            "--concurrency",
            1,
        )
        done = run("01_distill.py", *args)
        assert done.returncode == 1 and "cot.errors.jsonl" in done.stderr and "no answer yet" in done.stdout
        assert len(rows_of(data / "cot.jsonl")) == 15
        assert run("01_distill.py", *args).returncode == 0
    assert Counter(row["id"] for row in rows_of(data / "cot.jsonl")) == {f"t{i}": 5 for i in range(4)}
    with FakeOpenAI(teacher(), lambda number: "422" if number == 3 else None) as server:
        args = (
            "--cot",
            data / "cot.jsonl",
            "--out",
            data / "sft.jsonl",
            "--base-url",
            server.url,
            "--concurrency",
            1,
        )
        done = run("02_filter.py", *args)
        assert done.returncode == 1 and "call failed" in done.stdout
        assert run("02_filter.py", *args).returncode == 0


def test_stops_and_messages(data):
    args = ("--data", data / "train.jsonl", "--out", data / "cot.jsonl")
    done = run("01_distill.py", *args, key=None)
    assert done.returncode == 3 and "OPENAI_API_KEY" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (data / "cot.jsonl").exists()
    with FakeOpenAI(teacher(), ["401"]) as server:
        done = run("01_distill.py", *args, "--base-url", server.url, "--concurrency", 1)
        assert done.returncode == 3 and "401" in done.stderr and len(server.requests) == 1
        assert run("01_distill.py", *args, "--base-url", server.url, "--budget", 1).returncode == 2
        assert run("01_distill.py", *args, "--base-url", server.url, "--param", "x").returncode == 2
        asked = len(server.requests)
        done = run(
            "01_distill.py", *args, "--base-url", server.url, "--dry-run", "--price", 2.5, 10, key=None
        )
        assert (
            done.returncode == 0
            and "4 calls" in done.stdout
            and "$0.0" in done.stdout
            and len(server.requests) == asked
        )
        done = run(
            "01_distill.py",
            *args,
            "--base-url",
            server.url,
            "--limit",
            2,
            "--param",
            "seed=7",
            "--temperature",
            0.5,
        )
        assert done.returncode == 0 and len(server.requests) == asked + 2
        assert server.requests[-1]["body"]["seed"] == 7 and server.requests[-1]["body"]["temperature"] == 0.5
        done = run("01_distill.py", *args, "--base-url", server.url)  # other parameters on the same output
        assert (
            done.returncode == 2
            and "choose another --out" in done.stderr
            and len(server.requests) == asked + 2
        )
        (data / "2.jpg").write_bytes(b"broken")
        done = run("01_distill.py", *args, "--base-url", server.url)
        assert done.returncode == 2 and "t2" in done.stderr and len(server.requests) == asked + 2
    done = run("02_filter.py", "--cot", data / "train.jsonl", "--out", data / "sft.jsonl")
    assert done.returncode == 2 and "01_distill.py" in done.stderr
    done = run("02_filter.py", "--cot", data / "cot.jsonl", "--out", data / "x.jsonl", "--dry-run", key=None)
    assert done.returncode == 0 and done.stdout.count("10 calls") == 2 and not (data / "x.jsonl").exists()


def test_a_run_where_nothing_is_left(data):
    with FakeOpenAI(teacher(dict.fromkeys(range(5), "I'm sorry, I can't."))) as server:
        run(
            "01_distill.py",
            "--data",
            data / "train.jsonl",
            "--out",
            data / "cot.jsonl",
            "--base-url",
            server.url,
        )
        done = run(
            "02_filter.py", "--cot", data / "cot.jsonl", "--out", data / "sft.jsonl", "--base-url", server.url
        )
    assert (
        done.returncode == 3
        and "no example is left" in done.stderr
        and len(rows_of(data / "sft.rejected.jsonl")) == 20
    )


@pytest.mark.parametrize(
    "cot, text, phrase",
    [
        ("as seen in the given quintuples", "", "given quintuples"),
        ("the quintuples provided show", "", "quintuples provided"),
        ("Bob is per, as provided", "", "as provided"),
        ("matches the gold label", "", "gold label"),
        ("the ground truth says", "", "ground truth"),
        ("he wears a gold medal, given by the queen; the provided image shows it", "", None),
        ("as provided by the museum", "", None),
        ("the gold standard is a band", "We are the Gold Standard tonight", None),
    ],
)
def test_leaks(cot, text, phrase):
    assert common.leaked(cot, text) == phrase


def test_scores_are_integers_in_range():
    assert common.parse_scores("**R1**: 2, **R2**: 1, **R3**: 0, **R4**: 1, **R5**: 1, **R6**: 2") == (
        2,
        1,
        0,
        1,
        1,
        2,
    )
    assert (
        common.parse_scores("R1=2 R2=2 R3=2 R4=1 R5=1 R6=2\nno:\nR1=0 R2=0 R3=0 R4=0 R5=0 R6=0") == (0,) * 6
    )  # the last counts
    assert common.parse_scores("- R1: 2/2\n- R2: 1/2\n- R3: 0/2\n- R4: 1/1\n- R5: 1/1\n- R6: 2/2") == (
        2,
        1,
        0,
        1,
        1,
        2,
    )
    for text in (
        "",
        "R1=2 R2=2",
        "R1=3 R2=2 R3=2 R4=1 R5=1 R6=2",
        "R1=2 R2=2 R3=2 R4=1 R5=1 R6=1.5",
        "R1=2 R2=2 R3=2 R4=1 R5=1 R6=12",
        "0.9",
    ):
        assert common.parse_scores(text) is None, text
    row = {"status": "ok", "response": "R1=2 R2=2 R3=1 R4=1 R5=1 R6=0"}
    assert (
        select.judge_scores(row, Fraction("0.7"))[1] is None
    )  # 7 of 10 is not below 0.7, whatever floats say
    assert select.judge_scores(row, Fraction("0.71"))[1] is not None


def test_hide_answer():
    gold = [common.quintuple(*GOLD[0]), common.quintuple("A (b), c", "org", "D", "loc", "locate at")]
    cot = (
        CHAIN.format("")
        + "\nThus (Josh Gordon, per, Browns, org, member of) holds, "
        + "and [A (b), c, org, D, loc, locate_at] too.\n"
        + "- [X, per, Y, org, member of]\nJosh Gordon plays, in short, for the Browns."
    )
    hidden = common.hide_answer(cot, gold)
    assert "member of" not in hidden and "locate" not in hidden and "[X" not in hidden
    assert hidden.endswith("Josh Gordon plays, in short, for the Browns.") and hidden.startswith(
        "Image Description"
    )
    assert re.search(r"Thus +holds, and +too\.", hidden)


def test_bare_commands(data):
    """With the release in data/ and the pictures in data/img, nothing else need be said."""
    (data / "data" / "img").mkdir(parents=True)
    (data / "train.jsonl").rename(data / "data" / "train.json")
    for i in range(4):
        (data / f"{i}.jpg").rename(data / "data" / "img" / f"{i}.jpg")
    with FakeOpenAI(teacher()) as server:
        for script in ("01_distill.py", "02_filter.py"):
            done = run(script, cwd=data, OPENAI_BASE_URL=server.url)
            assert done.returncode == 0, done.stderr
    assert len(rows_of(data / "runs" / "cot.jsonl")) == 20
    assert [row["image"] for row in rows_of(data / "runs" / "sft.jsonl")] == [
        f"../data/img/{i}.jpg" for i in range(4)
    ]


@pytest.mark.parametrize(
    "script, message",
    [("01_distill.py", "--data data/train.json: no such file: the EEGA release goes there (README, Data)"),
     ("02_filter.py", "--cot runs/cot.jsonl: no such file: 01_distill.py writes it")],
)  # fmt: skip
def test_bare_commands_in_an_empty_folder(tmp_path, script, message):
    done = run(script, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
