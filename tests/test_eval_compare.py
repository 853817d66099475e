"""05 --compare: the paper's tables, pairs, seeds, what is said of runs that do not match, the page of two
runs."""

import json

import numpy as np
import pytest
from eval_cases import GOLD, A, B, C, run, stored, write

import common
from lib import compare, data, report


def rows_of(folder):
    return {row["name"]: row for row in json.loads((folder / "compare.json").read_text())["rows"]}


def jmere(row):
    return row["scores"]["jmere"]


def test_compare_prints_the_papers_tables(tmp_path):
    golds = [[A]] * 40
    stored(tmp_path / "sft" / "predictions.jsonl", [[[A] if i < 10 else [B]] for i in range(40)], golds)
    stored(tmp_path / "r1" / "predictions.jsonl", [[[A] if i < 30 else [B]] for i in range(40)], golds)
    other = write(tmp_path / "mine.jsonl", [{"id": f"t{i}", "quintuples": [list(A)]} for i in range(10)])
    specs = [tmp_path / "sft", f"jmere_r1={tmp_path / 'r1'}", f"no filters at all={other}"]
    done = run("--compare", *specs, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "out")
    assert jmere(rows["sft"])["f1"] == 0.25 and rows["sft"]["paper"][2] == 51.95
    assert "p" not in jmere(rows["sft"])
    assert jmere(rows["jmere_r1"])["difference"] == pytest.approx(0.5) and jmere(rows["jmere_r1"])["p"] < 0.01
    low, high = jmere(rows["jmere_r1"])["difference_95"]
    assert 0.3 < low < 0.5 < high < 0.7
    assert rows["no filters at all"]["without_prediction"] == [30]
    assert rows["no filters at all"]["section"] == "Ablations (Table 2)"
    assert rows["EEGA"]["paper"] == [58.26, 52.61, 55.29, 78.59] and "scores" not in rows["EEGA"]
    line, entities = (line for line in done.stdout.splitlines() if line.startswith("jmere_r1"))
    assert line.split()[1:4] == ["75.00"] * 3 and line.split()[-3:] == ["58.99", "54.84", "56.84"]
    assert "+50.00" in line and line.split()[-4] == f"{jmere(rows['jmere_r1'])['p']:.4f}"
    # entities: Browns is right everywhere, the person in 30 of 40
    assert entities.split()[1:2] == ["87.50"] and entities.split()[-1] == "79.20" and "+25.00" in entities
    places = [done.stdout.index(name) for name in ("zero-shot GPT-4o", "EEGA", "no filters at all")]
    assert places == sorted(places)
    assert "note: no filters at all: 30 of 40 tweets have no prediction" in done.stdout
    markdown = (tmp_path / "out/compare.md").read_text(encoding="utf-8").splitlines()
    assert {line.count("|") for line in markdown if line} == {12, 8}
    assert any(line.startswith("| jmere_r1 | 75.00 |") for line in markdown)


def test_the_paired_bootstrap_is_paired(tmp_path):
    """Two runs that fail on the same tweets: the interval of each is wide, that of the difference is a
    point."""
    golds = [[A, B]] * 60
    one = stored(tmp_path / "one.jsonl", [[[A] if i % 2 else [C]] for i in range(60)], golds)
    two = stored(tmp_path / "two.jsonl", [[[B] if i % 2 else [C]] for i in range(60)], golds)
    assert run("--compare", one, two, "--out", tmp_path).returncode == 0
    row = jmere(rows_of(tmp_path)["two"])
    assert row["difference_95"] == [0, 0] and row["p"] == 1.0
    low, high = row["f1_95"]
    assert high - low > 0.1


def test_p_of_the_entities_is_its_own(tmp_path):
    """Relations wrong, entities right: F1 differs, MNER does not."""
    golds = [[A]] * 30
    one = stored(tmp_path / "one.jsonl", [[[A._replace(relation="peer")]]] * 30, golds)
    two = stored(tmp_path / "two.jsonl", [[[A]]] * 30, golds)
    assert run("--compare", one, two, "--out", tmp_path).returncode == 0
    row = rows_of(tmp_path)["two"]
    assert jmere(row)["difference"] == 1 and jmere(row)["p"] < 0.001
    assert row["scores"]["mner"]["difference"] == 0 and row["scores"]["mner"]["p"] == 1.0
    assert row["scores"]["mner"]["f1_95"] == [1, 1]


def test_seeds_of_a_method_are_one_row(tmp_path):
    golds = [[A]] * 40
    runs = []
    for right in (10, 20, 30):
        answers = [[[A] if i < right else [B]] for i in range(40)]
        runs.append(stored(tmp_path / f"{right}.jsonl", answers, golds))
    base = stored(tmp_path / "base.jsonl", [[[B]]] * 40, golds)
    done = run("--compare", f"SFT={base}", f"JMERE-R1={','.join(map(str, runs))}", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    row = jmere(rows_of(tmp_path)["JMERE-R1"])
    assert row["f1"] == pytest.approx(0.5) and row["f1_sd"] == pytest.approx(
        np.std([0.25, 0.5, 0.75], ddof=1)
    )
    assert row["difference"] == pytest.approx(0.5) and row["p"] < 0.001
    # the interval is that of the mean over seeds, tweets drawn anew: narrower than that of a single run
    low, high = row["f1_95"]
    assert 0.3 < low < 0.5 < high < 0.7
    assert "50.00 ± 25.00" in done.stdout and rows_of(tmp_path)["JMERE-R1"]["runs"] == [
        str(path) for path in runs
    ]
    assert "note: unequal numbers of seeds" in done.stdout


def test_one_seed_is_the_plain_row(tmp_path):
    golds = [[A], [A, B], [C]] * 10
    one = stored(tmp_path / "one.jsonl", [[[A]], [[A]], [[B]]] * 10, golds)
    two = stored(tmp_path / "two.jsonl", [[[A]], [[A, B]], [[B]]] * 10, golds)
    assert run("--compare", f"a={one}", f"b={two}", "--out", tmp_path).returncode == 0
    single = jmere(rows_of(tmp_path)["b"])
    assert run("--compare", f"a={one}", f"b={two},{two}", "--out", tmp_path).returncode == 0
    twice = jmere(rows_of(tmp_path)["b"])
    for name in ("f1", "f1_95", "difference", "difference_95", "p"):
        assert twice[name] == pytest.approx(single[name])
    assert twice["f1_sd"] == 0


def test_difference_by_relation(tmp_path):
    peer = GOLD._replace(relation="peer")
    golds = [[A], [peer]] * 5
    one = stored(tmp_path / "one.jsonl", [[[A]], [[GOLD]]] * 5, golds)
    two = stored(tmp_path / "two.jsonl", [[[B]], [[peer]]] * 5, golds)
    done = run("--compare", one, two)
    lines = {
        line.split()[0]: line.split()
        for line in done.stdout.splitlines()
        if line.startswith(("peer", "member"))
    }
    # member of: five right of ten predicted and five gold, then none; peer: none, then all
    assert lines["peer"] == ["peer", "5", "0.00", "100.00", "+100.00"]
    assert lines["member"] == ["member", "of", "5", "66.67", "0.00", "-66.67"]


def test_unequal_responses_and_other_gold_are_said(tmp_path):
    one = stored(tmp_path / "one.jsonl", [[[A]]] * 3, [[A]] * 3)
    two = stored(tmp_path / "two.jsonl", [[[A]] * 5, [[A]] * 5, [[A]] * 4], [[A], [A], [B]])
    done = run("--compare", one, two)
    assert "note: unequal responses a tweet: 1, 4 to 5" in done.stdout
    assert "stores another gold for 1 tweets (t2, …): not the gold that counts here" in done.stdout


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


def test_names_of_runs(tmp_path):
    (tmp_path / "a=b,c").mkdir()
    assert compare.split_name(str(tmp_path / "a=b,c")) == ("a=b,c", [str(tmp_path / "a=b,c")])
    assert compare.split_name("SFT=x/predictions.jsonl") == ("SFT", ["x/predictions.jsonl"])
    assert compare.split_name("SFT=x,y") == ("SFT", ["x", "y"])
    assert compare.split_name("runs/test/predictions.jsonl")[0] == "test"


# -------------------------------------------------------------------------------- what became of a tweet


@pytest.mark.parametrize(
    "first, second, expected",
    [
        ([B], [A], ("better", 2)),
        ([A], [A, B], ("worse", 1)),
        ([], [A], ("better", 1)),
        ([B], [C], ("both wrong", 2)),
        ([A], [A], ("both right", 0)),
    ],
)
def test_better_worse_both(first, second, expected):
    assert report.changed(data.Example("t", "x", "x.png", (A,)), first, second) == expected


def test_the_order_is_better_worse_both_wrong_both_right():
    cases = [("better", 5), ("better", 1), ("worse", 9), ("worse", 1), ("both wrong", 50), ("both right", 0)]
    keys = [report.change_key(*case) for case in cases]
    assert keys == sorted(keys, reverse=True) and len(set(keys)) == len(keys)


def test_f1_of_the_tables_is_that_of_common(tmp_path):
    golds = [[A, B], [C], [A]]
    answers = [[[A], [B]], [[C], [C]], [[], [A]]]
    path = stored(tmp_path / "p.jsonl", answers, golds)
    assert run("--compare", path, "--out", tmp_path, "--vote", "tuple", "--tau", "0.9").returncode == 0
    wanted = common.score([[], [C], []], golds, ("jmere", "mner"))
    found = rows_of(tmp_path)["p"]["scores"]
    assert {name: found[name]["f1"] for name in wanted} == {
        name: scores["f1"] for name, scores in wanted.items()
    }
