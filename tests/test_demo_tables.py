"""demo/tables.py on folders written by hand, as 05 and 04 leave them."""

import json

import pytest
from conftest import run_script
from PIL import Image

from demo import tables

GOLD = [["Emma", "per", "Noah", "per", "couple"]]
RIGHT = "<think>\nx\n</think>\n<answer>\n[Emma, per, Noah, per, couple]\n</answer>"  # reward 1 + 0.2·2 + 0.1
WRONG = "no answer"  # reward 0


def write_run(folder, f1, responses, prompt="reason"):
    """A run of 05. responses: {id of a tweet: its responses}; all tweets have the same gold."""
    folder.mkdir(parents=True)
    jmere = {"precision": f1, "recall": f1, "f1": f1, "f1_95": [0, 1]}
    samples = {"n": 3, "f1_at_k": [[1, f1, 0], [2, f1 / 2, 0], [3, f1 / 4, 0]], "best_of_n": f1}
    samples |= {"distinct_answers": 1.5, "distinct_paths": 2}
    metrics = {
        "scores": {"jmere": jmere, "mner": {"f1": 0.75}},
        "responses": {"responses": 8, "unparsed": 2},
        "samples": samples,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    lines = []
    for name, texts in responses.items():
        row = {"id": name, "text": name, "image": "x.png", "quintuples": GOLD, "prompt": prompt}
        row["responses"] = [{"text": text, "finished": True} for text in texts]
        lines.append(json.dumps(row) + "\n")
    (folder / "predictions.jsonl").write_text("".join(lines))


HALF = {"a": [RIGHT], "b": [WRONG]}
ALL = {"a": [RIGHT], "b": [RIGHT]}
NONE = {"a": [WRONG], "b": [WRONG]}


def write_seed(folder, grpo_f1, grpo):
    """What run.sh and the figures of ablations.sh leave of one seed."""
    write_run(folder / "test-zero", 0.25 * grpo_f1, {"a": [""], "b": [""]}, prompt="direct")
    write_run(folder / "test-grpo", grpo_f1, grpo)
    for run in ("test-sft", "test-answer", "test-only-rl", "test-grey", "test-group-2", "vote", "vote-sft"):
        write_run(folder / run, 0.5, HALF)
    (folder / "grpo").mkdir()
    rows = [json.dumps({"step": i, "reward": i / 12}) + "\n" for i in range(12)]
    (folder / "grpo" / "metrics.jsonl").write_text("".join(rows))


@pytest.fixture
def seeds(tmp_path):
    """GRPO gets every tweet right in the first world and none in the second; the start has one of two in
    both."""
    folders = [tmp_path / "seed-1", tmp_path / "seed-2"]
    write_seed(folders[0], 1.0, ALL)
    write_seed(folders[1], 0.0, NONE)
    return folders


def cells(text):
    """The cells of each line of Markdown tables."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]


def test_reward_is_the_mean_over_responses(tmp_path):
    write_run(tmp_path / "run", 0.5, {"a": [RIGHT, WRONG], "b": [RIGHT, RIGHT]})
    assert tables.reward(tmp_path / "run") == pytest.approx(3 * 1.5 / 4)
    write_run(tmp_path / "zero", 0.5, ALL, prompt="direct")
    assert tables.reward(tmp_path / "zero") is None


def test_row_of_one_run_has_its_interval(tmp_path):
    write_run(tmp_path / "run", 1 / 3, HALF)
    row = tables.table_row("SFT", [tmp_path / "run"], tables.scores)
    assert list(row.values()) == ["SFT", "33.3", "33.3", "33.3", "0.0–100.0", "75.0", "75.0", "0.75"]


def test_row_of_several_seeds_has_their_spread(seeds):
    row = tables.table_row("JMERE-R1", [seed / "test-grpo" for seed in seeds], tables.scores)
    assert "95 % of F1" not in row
    assert row["F1"] == "50.0 ± 70.7"  # 100 and 0
    assert row["reward (≤ 1.5)"] == "0.75 ± 1.06"


def test_votes_show_powers_of_two_and_the_last(tmp_path):
    write_run(tmp_path / "vote", 0.8, HALF)
    row = tables.table_row("x", [tmp_path / "vote"], tables.votes)
    assert row == {
        "test set (%)": "x",
        "F1@1": "80.0",
        "F1@2": "40.0",
        "F1@3": "20.0",
        "best of N": "80.0",
        "distinct answers": "1.5",
        "paths": "2.0",
    }


def test_gain_is_shared_and_has_a_paired_bootstrap(seeds):
    won, lost = tables.gain_row(seeds[0]), tables.gain_row(seeds[1])
    assert [won["zero-shot"], won["CoT-SFT"], won["JMERE-R1"]] == ["25.0", "50.0", "100.0"]
    assert (won["from SFT"], won["from GRPO"]) == ("33 %", "67 %")
    assert won["GRPO's gain (95 %)"] == "+50.0 (0.0 … 100.0)"
    # Both tweets right against one. A quarter of all resamples holds only what both get right: p is about ½.
    assert 0.4 < float(won["p"]) < 0.6
    assert won["test reward"] == "0.75 → 1.50"
    assert (lost["from SFT"], lost["from GRPO"]) == ("no gain", "no gain")
    assert lost["GRPO's gain (95 %)"] == "-50.0 (-100.0 … 0.0)"


def test_group_sizes_are_those_that_every_seed_has(seeds):
    write_run(seeds[0] / "test-group-4", 0.4, HALF)
    assert tables.group_sizes(seeds) == {2: "test-group-2", 8: "test-grpo"}


def test_command_prints_every_table_and_draws(seeds, tmp_path):
    _, printed, _ = run_script("-m", "demo.tables", *seeds, "--figures", tmp_path / "x.png")
    rows = cells(printed)
    start = ["CoT-SFT", "50.0 ± 0.0", "50.0 ± 0.0", "50.0 ± 0.0", "75.0 ± 0.0", "75.0 ± 0.0", "0.75 ± 0.00"]
    assert [*start, "+0.0 ± 70.7"] in rows  # 50 points below JMERE-R1 in one seed, 50 above in the other
    assert ["group of 2", *start[1:], "+0.0 ± 70.7"] in rows
    assert ["zero-shot", "12.5 ± 17.7"] in [row[:2] for row in rows]
    assert [row[0] for row in rows if row[:1] in (["1"], ["2"])] == ["1", "2"]
    assert f"{seeds[0] / 'test-no-partial'} was not made" in printed
    assert Image.open(tmp_path / "x.png").size == (960, 288)


def test_what_is_missing_is_said_in_one_line(seeds, tmp_path):
    (seeds[1] / "grpo" / "metrics.jsonl").unlink()
    code, _, error = run_script("-m", "demo.tables", *seeds, "--figures", tmp_path / "x.png", fails=True)
    assert code == 2
    assert "seed-2/grpo/metrics.jsonl: cannot read" in error
    code, _, error = run_script("-m", "demo.tables", tmp_path / "seed-3", fails=True)
    assert code == 2
    assert "seed-3/test-zero/metrics.json: no scores to read" in error
