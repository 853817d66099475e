"""05 on stored files: what a response counts as, other systems' files, wrong files, arguments, screen and
exit codes."""

import importlib
import json
import random
import re
import subprocess
import sys

import pytest
from conftest import DATA, ROOT, needs_data
from eval_cases import GOLD, A, B, C, q, respond, run, stored, stored_row, write

import common
from lib import data, predictions, tables

ev = importlib.import_module("05_eval")

# -------------------------------------------------------------------------------- what a response counts as


@pytest.mark.parametrize(
    "prompt, text, finished, quintuples, unparsed, well_formed, malformed",
    [
        ("reason", respond("[A, per, B, per, peer]"), True, 1, 0, 1, 0),
        ("reason", respond("[]"), True, 0, 0, 1, 0),
        ("reason", respond("[A, per, B, per, peer]\n[A, B]"), True, 1, 0, 1, 1),
        ("reason", "<think>so A and B", False, 0, 1, 0, 0),
        ("reason", "<answer>[]</answer>", True, 0, 0, 0, 0),
        # no tags: nothing is read where the prompt asked for them
        ("reason", "[A, per, B, per, peer]", True, 0, 1, 0, 0),
        ("direct", "[A, per, B, per, peer]", True, 1, 0, 1, 0),
        ("direct", "[]", True, 0, 0, 1, 0),
        ("direct", "", True, 0, 0, 1, 0),
        ("direct", "[A, per, B", False, 0, 1, 0, 1),
    ],
)
def test_what_a_response_counts_as(prompt, text, finished, quintuples, unparsed, well_formed, malformed):
    prediction = predictions.read_row("p.jsonl:1", stored_row("1", [text], prompt=prompt, finished=finished))
    assert len(prediction.answers[0]) == quintuples and prediction.parsed == [not unparsed]
    assert prediction.counts == {
        "responses": 1,
        "well_formed": well_formed,
        "cut_off": int(not finished),
        "unparsed": unparsed,
        "malformed_items": malformed,
    }


def test_talk_in_place_of_an_answer_is_unparsed():
    prediction = predictions.read_row("p.jsonl:1", stored_row("1", [respond("I cannot say")]))
    assert prediction.parsed == [False] and prediction.counts["unparsed"] == 1


# -------------------------------------------------------------------------------- other systems


def gold_file(folder):
    rows = []
    for number in range(4):
        row = {"id": str(number), "text": f"tweet {number}", "image": "x.jpg", "quintuples": [list(GOLD)]}
        rows.append(row)
    return write(folder / "gold.jsonl", rows)


def test_items_as_lists_and_as_objects():
    items = [
        ["Josh Gordon ", "PERSON", "Browns", "organization", "member_of"],
        ["A", "per", "B"],
        ["A", "animal", "B", "per", "likes"],
        {"head": "A", "head_type": "per", "tail": "B", "tail_type": "org", "relation": "peer"},
        {"head": "A"},
        "A, per, B, org, peer",
    ]
    found = predictions.read_row("p.jsonl:1", {"id": "7", "quintuples": items})
    assert found.answers == [(GOLD, q("A, animal, B, per, likes"), q("A, per, B, org, peer"))]
    assert found.counts["malformed_items"] == 3 and found.counts["well_formed"] == 0
    assert predictions.read_row("p.jsonl:1", {"id": "8", "quintuples": []}).parsed == [True]
    assert predictions.read_row("p.jsonl:1", {"id": "9", "quintuples": ["x"]}).parsed == [False]


def test_scoring_another_systems_file(tmp_path):
    turned = GOLD[2:4] + GOLD[:2] + GOLD[4:]
    rows = [
        {"id": "0", "quintuples": [list(GOLD)]},
        {"id": "2", "quintuples": [list(turned)]},
        {"id": "3", "quintuples": [["?"]]},
    ]
    predicted = write(tmp_path / "p.jsonl", rows)
    done = run("--predictions", predicted, "--data", gold_file(tmp_path), "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "4 tweets, 1 without a prediction (counted as empty)" in done.stdout
    assert "1 unparsed, 1 malformed items" in done.stdout
    assert "all five parts equal, direction and case count" in done.stdout  # the rule stands beside the score
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert [metrics["scores"]["jmere"][name] for name in ("tp", "pred", "gold")] == [1, 2, 4]
    assert metrics["scores"]["jmere_undirected"]["tp"] == 2
    errors = {name: n for name, n in metrics["errors"].items() if any(n)}
    assert errors == {"direction": [1, 1], "missing": [0, 1], "unparsed": [0, 1]}
    again = run("--predictions", tmp_path / "out" / "quintuples.jsonl", "--data", tmp_path / "gold.jsonl")
    assert again.returncode == 0
    table = again.stdout.split("equal means")[1].split("gold quintuples")[0]
    assert table in done.stdout


@pytest.mark.parametrize("name", ["response", "responses"])
def test_scoring_another_systems_texts(tmp_path, name):
    answer = common.format_answer([GOLD])
    rows = []
    for number, text in enumerate([respond(answer), respond("[]"), answer, "no"]):
        rows.append({"id": str(number), name: [text] if name == "responses" else text})
    predicted = write(tmp_path / "p.jsonl", rows)
    command = ["--predictions", predicted, "--data", gold_file(tmp_path), "--out", tmp_path / "out"]
    nothing = run(*command)
    assert nothing.returncode == 2 and "p.jsonl:1: which prompt was answered?" in nothing.stderr
    reason = run(*command, "--prompt", "reason")
    assert reason.returncode == 0 and "4 responses, 2 well formed" in reason.stdout, reason.stderr
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["scores"]["jmere"]["tp"] == 1  # without tags nothing is read
    assert run(*command, "--prompt", "direct").returncode == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["scores"]["jmere"]["tp"] == 2
    assert "no" in (tmp_path / "out" / "report.html").read_text()


@needs_data
@pytest.mark.parametrize("file", ["jmere/test.json", "mnre/mnre_test.txt"])
def test_gold_against_itself_is_100(tmp_path, file):
    """Also in another order: ids follow from the content of a row."""
    examples = data.load_examples(DATA / file)
    rows = [{"id": e.id, "quintuples": [list(g) for g in e.quintuples]} for e in examples]
    releases = json.loads((DATA / "jmere/test.json").read_text())
    random.Random(0).shuffle(releases)
    (tmp_path / "gold.json").write_text(json.dumps(releases))
    predicted = write(tmp_path / "p.jsonl", rows)
    command = ["--predictions", predicted, "--data", tmp_path / "gold.json", "--resamples", 100]
    done = run(*command, "--out", tmp_path / "out", "--no-report")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert {s["f1"] for s in metrics["scores"].values()} == {1.0}
    assert metrics["scores"]["jmere"]["gold"] == 640 and metrics["scores"]["jmere"]["f1_95"] == [1, 1]
    assert not any(map(sum, metrics["errors"].values()))
    assert "ceiling 97.12: 15 tweets stand in 30 rows" in done.stdout
    assert "holds 21 of 640 gold quintuples" in done.stdout


# -------------------------------------------------------------------------------- our own files


def test_our_file_needs_no_data(tmp_path):
    answer = respond(common.format_answer([GOLD]))
    rows = [stored_row("1", [answer] * 2 + [respond("[]")], [GOLD]), stored_row("2", ["?"] * 3, [GOLD])]
    done = run("--predictions", write(tmp_path / "p.jsonl", rows))
    assert done.returncode == 0, done.stderr
    assert "2 tweets" in done.stdout and "6 responses, 3 well formed, 0 cut off, 3 unparsed" in done.stdout
    lines = [line.split()[1:7] for line in done.stdout.split("\n") if line.startswith("JMERE  ")]
    assert lines == [["100.00", "50.00", "66.67", "1", "1", "2"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.jsonl"]  # without --out nothing is written


def test_diversity_by_hand(tmp_path):
    answers = [[[A], [B], [A], None], [[q("C, per, Browns, org, member of")], [A, B], [A], [A]]]
    path = stored(tmp_path / "p.jsonl", answers, [[A], [A, B]])
    done = run("--predictions", path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    many = json.loads((tmp_path / "out/metrics.json").read_text())["samples"]
    single = [2 * tp / (pred + 3) for tp, pred in ((1, 2), (2, 3), (2, 2), (1, 1))]  # gold 3
    assert many["single_mean"] == pytest.approx(sum(single) / 4)
    assert many["single_std"] == pytest.approx((sum((s - sum(single) / 4) ** 2 for s in single) / 4) ** 0.5)
    assert many["best_of_n"] == 1.0 and many["distinct_answers"] == 2.5 and many["distinct_paths"] == 3
    assert many["f1_at_k"][3] == [4, pytest.approx(0.8), None]  # all four are one subset: no deviation
    assert many["f1_at_k"][1][2] > 0
    assert "best of 4 (oracle) 100.00" in done.stdout and "all 4 responses are one subset" in done.stdout


def test_tau_is_found_on_other_tweets(tmp_path):
    """On validation A stands in 3 of 5 responses and is right, B in 2 and is wrong: any τ above 0.4 up to
    0.6 is best there, 0.45 to 0.6 in steps of 0.05, and of these four the third."""
    votes = [[[A, B], [A, B], [A], [C], []]]
    validation = stored(tmp_path / "val.jsonl", votes, [[A]])
    test = stored(tmp_path / "test.jsonl", votes, [[A, B]])
    done = run("--predictions", test, "--vote", "tuple", "--tau-from", validation)
    assert f"--tau 0.55, the best on {validation} (F1 100.00 %)" in done.stdout
    assert re.search(r"JMERE +100.00 +50.00 +66.67 ", done.stdout)
    for wrong, message in (
        (["--tau-from", validation], "--tau-from belongs to --vote tuple"),
        (["--vote", "tuple", "--tau", "0.3", "--tau-from", validation], "leave one of them out"),
    ):
        done = run("--predictions", test, *wrong)
        assert done.returncode == 2 and message in done.stderr


def test_other_gold_than_the_data_has_is_said(tmp_path):
    path = stored(tmp_path / "p.jsonl", [[[A]]] * 3, [[A], [A], [B]])
    rows = [
        {"id": f"t{i}", "text": f"tweet t{i}", "image": "x.jpg", "quintuples": [list(A)]} for i in range(3)
    ]
    gold = write(tmp_path / "gold.jsonl", rows)
    done = run("--predictions", path, "--data", gold)
    assert (
        done.returncode == 0
        and "note: 1 tweets have other gold there than --data, which counts: t2" in done.stdout
    )
    assert "JMERE F1 100.00" in done.stdout  # of --data
    assert "note:" not in run("--predictions", path).stdout


def test_what_made_a_score_stands_in_it(tmp_path):
    settings = {"temperature": 0.8, "image": "own"}
    source = {"model": "a/model", "adapter": "runs/x/best"}
    rows = [{**stored_row("1", ["[]"], [A], prompt="direct"), "settings": settings, "source": source}]
    path = write(tmp_path / "p.jsonl", rows)
    assert run("--predictions", path, "--out", tmp_path / "out").returncode == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["provenance"]
    assert found["made_by"] == {**source, "prompt": "direct", "settings": settings}
    assert found["predictions"] == {"file": str(path), "sha256": predictions.file_hash(path)}
    assert found["data"] is None and found["date"].endswith("Z") and found["versions"]["numpy"]


# -------------------------------------------------------------------------------- wrong files

OTHER = {"id": "0", "quintuples": [list(GOLD)]}


@pytest.mark.parametrize(
    "rows, data, message",
    [
        ([OTHER], False, "p.jsonl:1: holds no tweet beside its prediction: give the tweets with --data"),
        ([OTHER, {"id": "9", "quintuples": []}], True, "1 of 2 ids are not in the data (9"),
        ([OTHER, OTHER], True, "p.jsonl:2: id 0 stands there twice"),
        ([{"quintuples": []}], True, "p.jsonl:1: missing 'id'"),
        ([{"id": 0, "quintuples": []}], True, "p.jsonl:1: 'id' is of type int, expected a string"),
        ([{"id": "0", "quintuples": "none"}], True, "p.jsonl:1: expected 'responses' (ours), 'response'"),
        ([stored_row("0", [])], True, "p.jsonl:1: expected a list of 'responses'"),
        ([{**stored_row("0", ["x"]), "text": "other"}], True, "p.jsonl:1: id 0 has another text"),
        ([{**stored_row("0", ["x"], finished="yes"), "text": "tweet 0"}], True, "'finished' is of type str"),
        (
            [{**stored_row("0", ["x"]), "settings": [1]}],
            True,
            "'settings' is of type list, expected an object",
        ),
        ([{**stored_row("0", ["x"]), "prompt": "other"}], True, "which prompt was answered?"),
        ([{**stored_row("0", []), "responses": [3]}], True, "a response without 'text'"),
        ([{"id": str(i), "quintuples": [["?"]]} for i in range(3)], True, "none of its 3 rows can be read"),
        ([], True, "no prediction in it"),
    ],
)
def test_wrong_predictions_are_named(tmp_path, rows, data, message):
    path = write(tmp_path / "p.jsonl", rows)
    done = run("--predictions", path, *(["--data", gold_file(tmp_path)] if data else []))
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_prompt_that_the_rows_say_themselves_is_refused(tmp_path):
    path = write(tmp_path / "p.jsonl", [stored_row("1", ["x"], [A])])
    done = run("--predictions", path, "--prompt", "direct")
    assert done.returncode == 2 and "p.jsonl:1: says its 'prompt' itself" in done.stderr


# -------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "args, message",
    [
        (["--predictions", "p", "--model", "m"], "--model belongs to"),
        (["--predictions", "p", "--compare", "a"], "not allowed with argument --predictions"),
        (["--merge", "m", "--data", "d"], "--data belongs to"),
        (["--merge", "m", "--zero-shot", "--adapter", "a"], "not allowed with argument"),
        (["--compare", "a", "--subsets", "5"], "--subsets belongs to"),
        (["--compare", "a", "b", "--report"], "--report needs --out"),
        (["--compare", "a", "b", "c", "--report", "--out", "o"], "--report shows two runs side by side"),
        (["--check-data", "a", "--out", "o"], "--out belongs to"),
        (["--adapter", "a", "--zero-shot"], "not allowed with argument --adapter"),
        (["--predictions", "p", "--report"], "--report needs --out"),
        (["--predictions", "p", "--samples", "5"], "--samples belongs to"),
        (["--predictions", "p", "--image", "blank"], "--image belongs to"),
        (["--predictions", "p", "--subset", "no-relation"], "--subset needs --data"),
        (["--subset", "no-relation", "--data", "d", "--merge-repeats"], "do not belong to --subset"),
        (["--tau", "0"], "expected a share"),
        (["--tau", "0.4"], "--tau belongs to --vote tuple"),
        (["--tau", "nan", "--vote", "tuple"], "expected a share"),
        (["--top-p", "0"], "expected a share"),
        (["--top-p", "1.5"], "expected a share"),
        (["--samples", "5", "--temperature", "0"], "--samples 5 with --temperature 0"),
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--seed", "-1"], "expected at least 0"),
        (["--resamples", "0"], "expected at least 10"),
        (["--subsets", "0"], "expected at least 1"),
        (["--max-new-tokens", "0"], "expected at least 1"),
        (["--limit", "0"], "expected at least 1"),
        (["--vote", "majority"], "invalid choice"),
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
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1, error


def test_defaults_are_the_ones_of_the_readme():
    args = ev.parse_args([])
    assert (args.adapter, args.data, args.out) == ("runs/grpo/best", "data/test.json", "runs/test")
    assert (args.image_dir, args.temperature, args.max_new_tokens, args.report) == (
        "data/img",
        0.8,
        2048,
        True,
    )
    assert ev.parse_args(["--api"]).model == "gpt-4o-2024-11-20"
    stored = ev.parse_args(["--predictions", "p"])
    assert (stored.data, stored.out, stored.report) == (None, None, False)


def test_help_tells_every_default_and_how_to_call_it(capsys):
    with pytest.raises(SystemExit):
        ev.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "deepspeed 05_eval.py" in text and "--compare SFT=" in text  # examples
    for default in ("runs/grpo/best", "data/test.json", "data/img", "runs/test", "(default: 10000)", "0.8"):
        assert default in text
    assert "--seed SEED of sampling and bootstrap [ours] (default: 0)" in text


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "--adapter runs/grpo/best: no such file: made by 04_grpo.py; --zero-shot predicts without one"),
        (["--api"], "--data data/test.json: no such file: the EEGA release goes there (README, Data)"),
        (["--predictions", "runs/test"], "runs/test: no such file: made by 05_eval.py"),
        (["--compare", "runs/a", "runs/b"], "runs/a: no such file: made by 05_eval.py"),
        (["--merge", "merged"], "--adapter runs/grpo/best: no such file"),
        (["--check-data", "data/test.json"], "--check-data data/test.json: no such file"),
    ],
)
def test_a_bare_command_in_an_empty_folder_says_what_is_missing(tmp_path, args, message):
    done = run(*args, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_what_is_scored_is_not_written_over(tmp_path):
    """Another system's file is called quintuples.jsonl, as ours would be."""
    row = {"id": "1", "text": "x", "image": "x.jpg", "quintuples": [list(A)]}
    gold = write(tmp_path / "gold.jsonl", [row])
    theirs = write(tmp_path / "out" / "quintuples.jsonl", [{"id": "1", "quintuples": []}])
    before = theirs.read_text()
    done = run("--predictions", theirs, "--data", gold, "--out", tmp_path / "out")
    assert done.returncode == 2 and "would be overwritten, and it is an input" in done.stderr
    again = write(tmp_path / "again.jsonl", [{"id": "1", "quintuples": [list(A)]}])
    done = run("--predictions", again, "--data", gold, "--out", tmp_path / "out")
    assert done.returncode == 2 and "this tool did not write it" in done.stderr
    assert theirs.read_text() == before
    assert run("--predictions", again, "--data", gold, "--out", tmp_path / "new").returncode == 0
    assert run("--predictions", again, "--data", gold, "--out", tmp_path / "new").returncode == 0  # is ours


def test_out_that_is_a_file_is_refused(tmp_path):
    path = write(tmp_path / "p.jsonl", [stored_row("1", ["x"], [A])])
    done = run("--predictions", path, "--out", path)
    assert done.returncode == 2 and f"--out {path}: is a file, expected a folder" in done.stderr
    assert path.stat().st_size > 0


# -------------------------------------------------------------------------------- the screen


def test_head_ends_it_quietly(tmp_path):
    answers = [[[A._replace(relation=f"relation {i}")]] for i in range(400)]
    path = stored(tmp_path / "p.jsonl", answers, [[A]] * 400)
    command = f'"{sys.executable}" "{ROOT / "05_eval.py"}" --predictions "{path}" --out "{tmp_path / "out"}"'
    shell = ["bash", "-o", "pipefail", "-c", f"{command} | head -n 1"]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("\n") == 1
    assert (tmp_path / "out" / "report.html").exists()  # files come before the screen


def test_escape_codes_are_shown_not_sent(tmp_path):
    name = "\x1b[31mred\u202e"
    path = write(tmp_path / "p.jsonl", [{**stored_row(name, [respond("[]")] * 2, [A]), "text": "x"}])
    done = run("--predictions", path)
    assert done.returncode == 0 and "\\x1b[31mred\\u202e, holds 1 of 1 gold" in done.stdout
    assert "\x1b" not in done.stdout and "\u202e" not in done.stdout
    wrong = run("--predictions", write(tmp_path / "q.jsonl", [stored_row(name, [])]))
    assert "\x1b" not in wrong.stderr
    twice = write(tmp_path / "twice.jsonl", [stored_row(name, ["x"], [A])] * 2)
    wrong = run("--predictions", twice)
    assert wrong.returncode == 2 and "id \\x1b[31mred" in wrong.stderr and "\x1b" not in wrong.stderr


def test_table_columns_line_up():
    lines = tables.table(("name", "n"), [("a", 1), ("long name", 1000)]).splitlines()
    assert lines == ["name          n", "a             1", "long name  1000"]
