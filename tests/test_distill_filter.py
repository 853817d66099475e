"""01 and 02 as a user runs them, against a teacher that answers by rule."""

import importlib
import json
import random
import re
from collections import Counter
from fractions import Fraction

import pytest
from fake_openai import FakeOpenAI
from PIL import Image
from stages import CHAIN, FULL, GOLD, distil, rows_of, run, select, teacher

import common
from lib import agreement
from lib import data as files

filter_script = importlib.import_module("02_filter")


def stats_of(folder, name="sft"):
    return json.loads((folder / f"{name}.stats.json").read_text())


def reasons_of(folder, name="sft"):
    return Counter(row["reason"].partition(":")[0] for row in rows_of(folder / f"{name}.rejected.jsonl"))


def test_whole_chain(folder):
    """Five candidates: one malformed, one refused, one leaks, two good; the judge prefers the last."""
    chains = {
        0: "no parts",
        1: "I'm sorry, I can't help with that.",
        2: CHAIN.format("As the given quintuples say,"),
    }

    def scores(prompt):
        last = "2" if "Description: 4" in prompt else "0"
        return f"R1 looks fine.\nScores: R1=2 R2=2 R3=2 R4=1 R5=1 R6={last}"

    with FakeOpenAI(teacher(chains, scores)) as server:
        price = ("--price", 1, 1)
        done = distil(folder, server, *price)
        assert done.returncode == 0, done.stderr
        assert "distil, gpt-4o-2024-11-20 at" in done.stderr and ": 4 calls, about" in done.stderr
        cot = rows_of(folder / "cot.jsonl")
        assert len(cot) == 20 and len(server.requests) == 4
        assert Counter(row["status"] for row in cot) == {"ok": 12, "malformed": 4, "refusal": 4}
        assert {row["cot"] for row in cot if row["status"] != "ok"} == {""}
        assert "a chain of three parts" in done.stdout
        assert stats_of(folder, "cot")["funnel"] == [
            ["asked", 20, None, 4],
            ["answered", 20, 20, 4],
            ["a chain of three parts", 12, 12, 4],
        ]
        done = select(folder, server, *price)
        assert done.returncode == 0, done.stderr
        paid = len(server.requests)
        assert paid == 4 + 8 + 8
        again = select(folder, server, *price, "--threshold", "0.9")
        assert again.returncode == 0 and len(server.requests) == paid  # another threshold costs nothing
        assert "0 calls (4 answered already)" in distil(folder, server, *price).stderr
        assert len(server.requests) == paid  # all is there
    sft = rows_of(folder / "sft.jsonl")
    assert [row["id"] for row in sft] == ["t0", "t1", "t2", "t3"]
    for row in sft:
        assert row["candidate"] == 4 and row["score"] == 1.0 and row["scores"] == [2, 2, 2, 1, 1, 2]
        assert row["repredicted"] == GOLD and row["quintuples"] == GOLD
    assert len(sft) + len(rows_of(folder / "sft.rejected.jsonl")) == 20
    # 8 points of 10 against 0.9
    assert reasons_of(folder) == {"malformed": 4, "refusal": 4, "leaked label": 4, "score": 4}
    stats = stats_of(folder)
    counts = [tuple(stage[1:]) for stage in stats["funnel"]]
    assert counts == [(20, 20, 4), (12, 12, 4), (8, 8, 4), (8, 8, 4), (4, 4, 4), (4, 4, 4)]
    assert stats["leaks"] == {"given quintuples": 4} and stats["left"]["leaked label"] == 4
    assert stats["finished"] and stats["server"] == server.url
    examples = files.load_examples(folder / "sft.jsonl", need=("quintuples", "cot", "score"))
    assert files.check_images(examples) == examples
    card = (folder / "sft.card.md").read_text()
    assert f"asked gpt-4o-2024-11-20 at {server.url}, answered fake-1: 16 answers" in card
    assert "best of its example" in card and common.SCORE_PROMPT in card and "no licence" in card
    assert common.DISTILL_PROMPT in (folder / "cot.card.md").read_text()


def test_equal_candidates_are_counted_in_the_funnel(folder):
    with FakeOpenAI(teacher(dict.fromkeys(range(5), CHAIN.format("the same")))) as server:
        done = distil(folder, server)
        assert "4 of 4 examples: all candidates are equal" in done.stderr
        select(folder, server, "--no-score", "--no-reprediction", key=None)
    assert stats_of(folder, "cot")["funnel"][1] == ["answered", 20, 4, 4]
    assert stats_of(folder)["funnel"][0] == ["distilled", 20, 4, 4]


def test_output_loads_with_datasets(folder):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    with FakeOpenAI(teacher()) as server:
        distil(folder, server)
        select(folder, server)
    path = str(folder / "sft.jsonl")
    loaded = datasets.load_dataset("json", data_files=path, cache_dir=str(folder / "cache"), split="train")
    assert loaded["id"][:] == ["t0", "t1", "t2", "t3"]
    assert loaded[0]["quintuples"] == GOLD and loaded[0]["score"] == 1.0


def test_human_scores_as_csv(tmp_path):
    path = tmp_path / "human.csv"
    path.write_text("id,rater,candidate,score\nt0,a,0,1\nt0,b,0,0.5\n7,a,1,0\n", encoding="utf-8-sig")
    assert agreement.read_human(path) == {("t0", 0): 0.75, ("7", 1): 0}
    faults = {"t0,a,0,7": "divide by the scale", "t0,a,first,1": "expected columns", "t0": "expected columns"}
    for line, fault in faults.items():
        path.write_text(f"id,rater,candidate,score\n{line}\n")
        with pytest.raises(common.InputError, match=f"human.csv:2: .*{fault}"):
            agreement.read_human(path)
    path.write_text("id;candidate;score\nt0;0;1\n")
    with pytest.raises(common.InputError, match="separated by commas"):
        agreement.read_human(path)


def test_human_agreement(folder):
    """Judge 10, 8, 6, 10 points of 10 against people 1.0, 0.8, 0.9, 0.5 (a mean of two); t9 is not judged."""
    ends = {"tweet 1": "R5=1 R6=0", "tweet 2": "R5=0 R6=0"}

    def scores(prompt):
        middle = 0 if "tweet 2" in prompt else 1
        end = next((end for name, end in ends.items() if name in prompt), "R5=1 R6=2")
        return f"R1=2 R2=2 R3=2 R4={middle} {end}"

    human = [("t0", 1.0), ("t1", 0.8), ("t2", 0.9), ("t3", 0.25), ("t3", 0.75), ("t9", 1)]
    lines = [files.jsonl_line({"id": i, "candidate": 0, "score": s}) for i, s in human]
    (folder / "human.jsonl").write_text("".join(lines))
    with FakeOpenAI(teacher(scores=scores)) as server:
        distil(folder, server, "--n", 1)
        done = select(folder, server, "--human", folder / "human.jsonl")
        assert done.returncode == 0, done.stderr
        asked = len(server.requests)
        (folder / "human.jsonl").write_text('{"id": "t0", "candidate": 0, "score": 7}\n')
        bad = select(folder, server, "--human", folder / "human.jsonl", out="other.jsonl")
    assert bad.returncode == 2 and "human.jsonl:1: score 7" in bad.stderr
    assert len(server.requests) == asked  # found before any call
    found = stats_of(folder)["human"]
    assert (found["compared"], found["not_judged"], found["within_0.1"]) == (4, 1, 0.5)
    assert found["mean_absolute_error"] == pytest.approx(0.2)
    assert found["histogram"]["-0.3"] == 1 and found["histogram"]["+0.5"] == 1
    # Squared gaps 0 + 0 + 9 + 25 = 34; all 16 pairings of (10, 8, 6, 10) with (10, 8, 9, 5):
    # 30 + 14 + 30 + 30 = 104, over 4 = 26.
    assert found["kappa"] == pytest.approx(1 - 34 / 26)
    assert Image.open(folder / "sft.human.png").size[0] > 100 and "+0.5      1 #" in done.stdout


def test_reprediction_compares_sets(folder):
    verdicts = {
        "0 a": common.format_answer(
            [common.quintuple(*q) for q in GOLD] * 2
        ),  # twice the same is the same set
        "1 a": "[Browns, org, Josh Gordon, per, member of]",  # direction swapped
        "2 a": "I see nothing of the kind here.",
        "3 a": "[]",
        "4 a": "<think>Josh Gordon, hm</think>[Josh Gordon, per, Browns, org, member of]",
    }

    def prediction(prompt):
        return next(answer for name, answer in verdicts.items() if f"Description: {name}" in prompt)

    with FakeOpenAI(teacher(prediction=prediction)) as server:
        distil(folder, server)
        done = select(folder, server, "--no-score")
    assert done.returncode == 0, done.stderr
    assert all(row["candidate"] in (0, 4) for row in rows_of(folder / "sft.jsonl"))
    reasons = {(row["candidate"], row["reason"]) for row in rows_of(folder / "sft.rejected.jsonl")}
    assert {pair for pair in reasons if pair[1] != "not the best"} == {
        (1, "re-prediction: differs from gold"),
        (2, "re-prediction: unparsed"),
        (3, "re-prediction: differs from gold"),
    }


def test_ablations_and_ties(folder):
    with FakeOpenAI(teacher()) as server:
        distil(folder, server)
        before = len(server.requests)
        for seed in (0, 1):
            out = f"none{seed}.jsonl"
            done = select(
                folder, server, "--no-score", "--no-reprediction", "--seed", seed, out=out, key=None
            )
            assert done.returncode == 0 and len(server.requests) == before  # no key, no call
            drawn = [random.Random(f"{seed}:t{i}").choice(range(5)) for i in range(4)]
            rows = rows_of(folder / out)
            assert [row["candidate"] for row in rows] == drawn
            assert "scores" not in rows[0] and "repredicted" not in rows[0]
        select(folder, server, "--no-reprediction", "--judge-model", "judge", out="s.jsonl")
        asked = [request["body"]["model"] for request in server.requests[before:]]
    assert asked == ["judge"] * 20
    drawn = [random.Random(f"0:t{i}").choice(range(5)) for i in range(4)]
    assert [row["candidate"] for row in rows_of(folder / "s.jsonl")] == drawn


def test_failed_rows_exit_1_and_are_mended(folder):
    with FakeOpenAI(teacher(), [None, "413"]) as server:
        done = distil(folder, server, "--concurrency", 1)
        assert done.returncode == 1 and "cot.errors.jsonl" in done.stderr and "no answer yet" in done.stdout
        assert "failed, 1 ×: 413 refused with 413" in done.stderr
        assert len(rows_of(folder / "cot.jsonl")) == 15
        assert distil(folder, server).returncode == 0
    assert Counter(row["id"] for row in rows_of(folder / "cot.jsonl")) == {f"t{i}": 5 for i in range(4)}
    with FakeOpenAI(teacher(), lambda number: "422" if number == 3 else None) as server:
        done = select(folder, server, "--concurrency", 1)
        assert done.returncode == 1 and "re-prediction: no answer" in done.stdout
        assert select(folder, server).returncode == 0


def test_02_ends_with_funnel_and_card_however_it_ends(folder):
    """The key fails in the middle of the second pass: exit 3, the funnel as far as it came, no --out."""
    with FakeOpenAI(teacher()) as server:
        distil(folder, server)
    with FakeOpenAI(teacher(), lambda number: "401" if number == 25 else None) as server:
        done = select(folder, server, "--concurrency", 1, "--report")
    assert done.returncode == 3 and "401" in done.stderr
    assert "re-prediction equals gold" in done.stdout and "score at least" not in done.stdout
    stats = stats_of(folder)
    assert not stats["finished"] and [stage[1] for stage in stats["funnel"]] == [20, 20, 20, 20]
    assert (folder / "sft.card.md").exists() and not (folder / "sft.jsonl").exists()
    assert (folder / "sft.report.html").exists()


def test_stops_and_messages(folder):
    done = distil(folder, "http://127.0.0.1:9/v1", key=None)
    assert done.returncode == 3 and "OPENAI_API_KEY" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (folder / "cot.jsonl").exists()
    with FakeOpenAI(teacher(), ["401"]) as server:
        done = distil(folder, server, "--concurrency", 1)
        assert done.returncode == 3 and "401" in done.stderr and len(server.requests) == 1
        assert "a chain of three parts" in done.stdout and (folder / "cot.card.md").exists()
        done = distil(folder, server, "--limit", 2, "--param", "seed=7", "--temperature", 0.5)
        assert done.returncode == 0 and len(server.requests) == 3
        assert server.requests[-1]["body"]["seed"] == 7 and server.requests[-1]["body"]["temperature"] == 0.5
        done = distil(folder, server)  # other parameters on the same output
        assert done.returncode == 2 and "choose another --out" in done.stderr and len(server.requests) == 3
        (folder / "2.jpg").write_bytes(b"broken")
        done = distil(folder, server)
        assert done.returncode == 2 and "t2" in done.stderr and len(server.requests) == 3
    done = select(folder, "http://127.0.0.1:9/v1", cot="train.jsonl")
    assert done.returncode == 2 and "01_distill.py" in done.stderr


def test_dry_run_knows_what_is_done(folder):
    """What is still to be spent, before any key is needed: all, the half, nothing."""
    with FakeOpenAI(teacher()) as server:
        options = ("--dry-run", "--price", 2.5, 10)
        done = distil(folder, server, *options, key=None)
        assert (
            "4 calls, about" in done.stdout and "$0.0" in done.stdout and not (folder / "cot.jsonl").exists()
        )
        distil(folder, server, "--limit", 2)
        done = distil(folder, server, *options, key=None)
        assert "2 calls (2 answered already)" in done.stdout
        distil(folder, server)
        assert (
            "0 calls (4 answered already), about 0 prompt and 0 completion tokens, $0.00"
            in distil(folder, server, *options, key=None).stdout
        )
        asked = len(server.requests)
        done = select(folder, server, *options, key=None)
        assert done.returncode == 0 and done.stdout.count("20 calls,") == 2
        assert len(server.requests) == asked and not (folder / "sft.jsonl").exists()
        assert not (folder / "sft.score.jsonl").exists() and not (folder / "sft.card.md").exists()
    other = "[Browns, org, Josh Gordon, per, member of]"
    with FakeOpenAI(teacher(prediction=lambda prompt: GOLD_TEXT if "1 a man" in prompt else other)) as server:
        select(folder, server, "--no-score")
        done = select(folder, server, *options, key=None)
    assert "0 calls (20 answered already)" in done.stdout and "score, at most" in done.stdout
    assert "4 calls, about" in done.stdout  # only what re-prediction has left


GOLD_TEXT = common.format_answer([common.quintuple(*q) for q in GOLD])


def test_retry_asks_only_what_failed_for_that_reason(folder):
    bad = {0: "no parts", 1: {"finish_reason": "length", "message": {"content": "Image Descr"}}}
    with FakeOpenAI(teacher(bad)) as server:
        distil(folder, server)
        statuses = Counter(row["status"] for row in rows_of(folder / "cot.jsonl"))
        assert statuses == {"ok": 12, "malformed": 4, "length": 4}
    with FakeOpenAI(teacher()) as server:
        assert distil(folder, server).returncode == 0 and not server.requests
        done = distil(folder, server, "--retry", "length,refusal")
        assert (
            done.returncode == 0 and [request["body"].get("n") for request in server.requests] == [None] * 4
        )
        rows = rows_of(folder / "cot.jsonl")
        assert (
            len(rows) == 24 and Counter(row["candidate"] for row in rows)[5] == 4
        )  # new numbers, nothing lost
        assert (
            distil(folder, server, "--retry", "length,refusal").returncode == 0 and len(server.requests) == 4
        )
    with FakeOpenAI(teacher(scores=lambda prompt: "good overall" if "2 a man" in prompt else FULL)) as server:
        select(folder, server)
        assert reasons_of(folder)["score"] == 4
    with FakeOpenAI(teacher()) as server:
        select(folder, server, "--retry", "unparsed")
        assert len(server.requests) == 4 and "Description: 2 a man" in server.requests[0]["prompt"]
    assert reasons_of(folder)["score"] == 0


def test_the_budget_holds_both_passes_of_02(folder):
    with FakeOpenAI(teacher()) as server:
        distil(folder, server)
    with FakeOpenAI(teacher()) as server:  # 110 tokens a call: $0.11
        done = select(folder, server, "--price", 1000, 1000, "--budget", 4, "--concurrency", 1)
        assert done.returncode == 3 and "budget" in done.stderr
        assert len(server.requests) == 36  # 20 re-predictions and 16 scores
        again = select(folder, server, "--price", 1000, 1000, "--budget", 4, "--concurrency", 1)
        assert again.returncode == 3 and len(server.requests) == 36
    assert stats_of(folder)["dollars"] == pytest.approx(3.96)


def test_a_run_where_nothing_is_left(folder):
    with FakeOpenAI(teacher(dict.fromkeys(range(5), "I'm sorry, I can't."))) as server:
        distil(folder, server)
        done = select(folder, server)
    assert done.returncode == 3 and "no example is left" in done.stderr
    assert len(rows_of(folder / "sft.rejected.jsonl")) == 20


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
        filter_script.judge_scores(row, Fraction("0.7"))[1] is None
    )  # 7 of 10 is not below 0.7, whatever floats say
    assert filter_script.judge_scores(row, Fraction("0.71"))[1] is not None


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


def test_bare_commands(folder):
    """With the release in data/ and the pictures in data/img, nothing else need be said."""
    (folder / "data" / "img").mkdir(parents=True)
    (folder / "train.jsonl").rename(folder / "data" / "train.json")
    for i in range(4):
        (folder / f"{i}.jpg").rename(folder / "data" / "img" / f"{i}.jpg")
    with FakeOpenAI(teacher()) as server:
        for script in ("01_distill.py", "02_filter.py"):
            done = run(script, cwd=folder, OPENAI_BASE_URL=server.url)
            assert done.returncode == 0, done.stderr
    assert len(rows_of(folder / "runs" / "cot.jsonl")) == 20
    images = [row["image"] for row in rows_of(folder / "runs" / "sft.jsonl")]
    assert images == [f"../data/img/{i}.jpg" for i in range(4)]


@pytest.mark.parametrize(
    "script, message",
    [
        ("01_distill.py", "--data data/train.json: no such file: the EEGA release goes there (README, Data)"),
        ("02_filter.py", "--cot runs/cot.jsonl: no such file: made by 01_distill.py"),
    ],
)
def test_bare_commands_in_an_empty_folder(tmp_path, script, message):
    done = run(script, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
