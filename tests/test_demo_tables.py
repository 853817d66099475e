"""demo/measures.py, tables.py, figures.py, groups.py and errors.py on folders written by hand."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_script, stage
from PIL import Image

import common
from demo import errors, figures, groups, measures, tables, world

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
    others = ("sft", "answer", "only-rl", "grpo-answer", "grey", "group-2")
    for run in [*(f"test-{name}" for name in others), "vote", "vote-sft"]:
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
    assert measures.reward(tmp_path / "run") == pytest.approx(3 * 1.5 / 4)
    write_run(tmp_path / "zero", 0.5, ALL, prompt="direct")
    assert measures.reward(tmp_path / "zero") is None


def test_row_of_one_run_has_its_interval(tmp_path):
    write_run(tmp_path / "run", 1 / 3, HALF)
    row = tables.table_row("SFT", [tmp_path / "run"], measures.scores)
    assert list(row.values()) == ["SFT", "33.3", "33.3", "33.3", "0.0–100.0", "75.0", "75.0", "0.75", "–"]


def test_row_of_several_seeds_has_their_spread(seeds):
    row = tables.table_row("JMERE-R1", [seed / "test-grpo" for seed in seeds], measures.scores)
    assert "95 % of F1" not in row
    assert row["F1"] == "50.0 ± 70.7"  # 100 and 0
    assert row["reward (≤ 1.5)"] == "0.75 ± 1.06"


def test_votes_show_powers_of_two_and_the_last(tmp_path):
    write_run(tmp_path / "vote", 0.8, HALF)
    row = tables.table_row("x", [tmp_path / "vote"], measures.votes)
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
    won, lost = tables.seed_row(seeds[0]), tables.seed_row(seeds[1])
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
    assert measures.group_sizes(seeds) == {2: "test-group-2", 8: "test-grpo"}


def write_training(folder, before, after):
    """A training of the part `gain`; before, after: the answers of CoT-SFT and JMERE-R1, by name."""
    scores = {"ALL": (1.0, ALL), "HALF": (0.5, HALF), "NONE": (0.0, NONE)}
    write_run(folder / "test-sft", *scores[before])
    write_run(folder / "test-grpo", *scores[after])


def test_gains_are_counted_over_classes_worlds_and_trainings(seeds, capsys):
    write_training(seeds[0] / "gain" / "llava-0", "HALF", "ALL")
    write_training(seeds[0] / "gain" / "llava-1", "NONE", "ALL")
    write_training(seeds[1] / "gain" / "llava-0", "HALF", "HALF")
    write_training(seeds[1] / "gain" / "qwen2_5_vl-0", "HALF", "NONE")
    write_run(seeds[1] / "gain" / "qwen2_5_vl-1" / "test-sft", 0.5, HALF)  # not finished
    tables.show_trainings(seeds)
    rows = cells(capsys.readouterr().out)
    # Of two tweets, both gained: every resample gains. One gained: a quarter of them gains nothing.
    assert ["llava", "3", "33.3 ± 28.9", "83.3 ± 28.9", "+50.0 ± 50.0", "2 of 3", "1", "0"] in rows
    assert ["qwen2_5_vl", "1", "50.0", "0.0", "-50.0", "0 of 1", "0", "0"] in rows
    assert [row[1] for row in rows if row[:1] == ["both"]] == ["4"]
    trainings = [row[:5] for row in rows if len(row) == 8 and row[1] in "12" and row[2] in "01"]
    assert ["llava", "1", "1", "0.0", "100.0"] in trainings
    assert len(trainings) == 4
    assert trainings[-1] == ["qwen2_5_vl", "2", "0", "50.0", "0.0"]


def test_a_sweep_is_shown_over_the_seeds_that_have_it(seeds, capsys):
    for folder in seeds:
        write_run(folder / "test-variant-rloo", 0.4, HALF)
    write_run(seeds[0] / "test-rate-1e-5", 0.4, HALF)
    tables.show_sweep("Variants", seeds, "test-variant-", "{}", "the paper's")
    tables.show_sweep("Rates", seeds, "test-rate-", "{}", "1e-4")
    rows = {row[0]: row[1:] for row in cells(capsys.readouterr().out) if row}
    # F1, MNER F1, reward, tokens, above CoT-SFT (50 and 50), above JMERE-R1 (100 and 0)
    assert rows["rloo"] == ["40.0 ± 0.0", "75.0 ± 0.0", "0.75 ± 0.00", "–", "-10.0 ± 0.0", "-10.0 ± 70.7"]
    # Of one seed the intervals: of two tweets both runs have one right, and the paper's both.
    assert rows["1e-5"] == ["40.0", "75.0", "0.75", "–", "-10.0 (0.0 … 0.0)", "-60.0 (-100.0 … 0.0)"]
    assert rows["JMERE-R1: 1e-4"] == ["100.0", "75.0", "1.50", "–", "+50.0 (0.0 … 100.0)", ""]


def test_command_prints_every_table_and_draws(seeds, tmp_path):
    _, printed, _ = run_script("-m", "demo.tables", *seeds, "--figures", tmp_path / "x.png")
    rows = cells(printed)
    start = [
        "CoT-SFT",
        "50.0 ± 0.0",
        "50.0 ± 0.0",
        "50.0 ± 0.0",
        "75.0 ± 0.0",
        "75.0 ± 0.0",
        "0.75 ± 0.00",
        "–",
    ]
    assert [*start, "+0.0 ± 70.7"] in rows  # 50 points below JMERE-R1 in one seed, 50 above in the other
    group_of_2 = ["group of 2", "50.0 ± 0.0", "75.0 ± 0.0", "0.75 ± 0.00", "–", "+0.0 ± 0.0", "+0.0 ± 70.7"]
    assert group_of_2 in rows
    assert ["zero-shot", "12.5 ± 17.7"] in [row[:2] for row in rows]
    assert [row[0] for row in rows if row[:1] in (["1"], ["2"])] == ["1", "2"]
    assert "seed-1/test-no-partial, seed-2/test-no-partial.\n" in printed
    assert Image.open(tmp_path / "x.png").size == (960, 288)


def test_figures_of_the_gain_alone(tmp_path):
    write_training(tmp_path / "seed-3" / "gain" / "llava-0", "NONE", "ALL")
    write_training(tmp_path / "seed-3" / "gain" / "qwen2_5_vl-0", "HALF", "NONE")
    figures.draw([tmp_path / "seed-3"], tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").size == (640, 288)  # two panels: the others have no runs


def test_tables_of_what_results_sh_has_run_so_far(seeds, tmp_path):
    """Without the part `gain` there is nothing to tell of its answers and groups."""
    env = os.environ | {"ROOT": str(tmp_path), "WHAT": "tables", "DEMO_VENV": sys.prefix}
    command = ["bash", str(ROOT / "demo" / "results.sh")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert "**Paradigms (Tables 1 and 3)**" in done.stdout
    assert "part gain" not in done.stdout
    assert (tmp_path / "figures.png").exists()


def test_what_is_missing_is_said_in_one_line(seeds, tmp_path):
    (seeds[1] / "grpo" / "metrics.jsonl").unlink()
    code, _, error = run_script("-m", "demo.tables", *seeds, "--figures", tmp_path / "x.png", fails=True)
    assert code == 2
    assert "seed-2/grpo/metrics.jsonl: cannot read" in error
    code, _, error = run_script("-m", "demo.tables", tmp_path / "seed-3", fails=True)
    assert code == 2
    assert "seed-3: no scores to read" in error


# -------------------------------------------------------------------------------- demo/groups.py


def group(name, step=1, **parts):
    """A group's rows of samples.jsonl; parts: a list of values each, the others 1."""
    size = len(next(iter(parts.values())))
    rows = []
    for i in range(size):
        row = {"step": step, "id": name}
        row |= {part: parts.get(part, [1.0] * size)[i] for part in groups.WEIGHTS}
        row["reward"] = sum(weight * row[part] for part, weight in groups.WEIGHTS.items())
        rows.append(row)
    return rows


def test_kinds_of_groups():
    assert groups.kind(group("a", partial=[1.0, 1.0 + 1e-7])) == "nothing"
    assert groups.kind(group("a", accuracy=[0.0, 1.0], format=[0.0, 1.0])) == "accuracy"
    assert groups.kind(group("a", partial=[0.0, 1.0], format=[0.0, 1.0])) == "format alone"
    assert groups.kind(group("a", accuracy=[0.0, 0.0], partial=[0.5, 1.0])) == "distance alone, all wrong"
    assert groups.kind(group("a", accuracy=[0.5, 0.5], partial=[0.5, 1.0])) == "distance alone, part right"


def test_shares_of_an_update_by_hand():
    """Accuracy 0 and 1 against a distance of 0.1: rewards differ by 1 and by 0.02."""
    batch = [group("a", accuracy=[0.0, 1.0]), group("b", accuracy=[0.0, 0.0], partial=[1.0, 1.1])]
    shares = groups.pulls(batch)
    # standard deviations 0.7071 and 0.01414, to each of which 04 adds 1e-4
    assert shares["paper"][1] == pytest.approx(0.5, abs=0.003)
    assert shares["no_std, batch_std, rloo"][1] == pytest.approx(0.02 / 1.02)
    assert shares["gdpo"][1] == pytest.approx(0.2 / 1.2, abs=0.001)
    assert [sum(values) for values in shares.values()] == pytest.approx([1.0] * 3)


def test_advantages_are_those_of_04():
    parts = {
        "accuracy": [0.0, 0.5, 1.0, 1.0],
        "partial": [0.2, 0.9, 2.0, 1.7],
        "format": [0.0, 1.0, 1.0, 1.0],
    }
    rows = group("a", **parts)
    rewards = torch.tensor([[row["reward"] for row in rows]], dtype=torch.float64)
    ours = stage("04_grpo").group_advantages(rewards)[0].tolist()
    assert groups.normalised(rows, "reward") == pytest.approx(ours, abs=1e-6)


def test_groups_command(tmp_path):
    for number in (1, 2):
        rows = group("a", step=1, accuracy=[0.0, 1.0]) + group("b", step=number, accuracy=[1.0, 1.0])
        (tmp_path / f"run{number}").mkdir()
        (tmp_path / f"run{number}" / "samples.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    _, printed, _ = run_script("-m", "demo.groups", tmp_path / "run1", tmp_path / "run2")
    rows = {row[0]: row[1:] for row in cells(printed)}
    assert rows["nothing"][:3] == ["2", "50.0 %", "0.000"]
    assert rows["accuracy"][:4] == [
        "2",
        "50.0 %",
        "0.500",
        "66.7 %",
    ]  # all of two batches, nothing of a third
    assert rows["format alone"][:3] == ["0", "0.0 %", "–"]
    (tmp_path / "run1" / "samples.jsonl").write_text('{"step": 1, "id": "a"}\n')
    code, _, error = run_script("-m", "demo.groups", tmp_path / "run1", fails=True)
    assert code == 2 and "samples.jsonl:1: missing 'reward' (made by 04_grpo.py)" in error


# ------------------------------------------------------------------------------------------------ errors

COUPLE = world.Scene(world.Figure("person", "red"), world.Figure("person", "blue"), "heart", None, False)
NAMES = ["Emma", "Noah"]
CHAIN = world.chain("Emma x Noah # news", COUPLE)


def couple(head, tail, relation="couple"):
    return common.quintuple(head, "per", tail, "per", relation)


@pytest.mark.parametrize(
    ("chain", "answer", "wrong"),
    [
        (CHAIN, [couple(*NAMES)], "nothing: right"),
        (CHAIN.replace("left a person", "left a child"), [], "the description of the picture"),
        (CHAIN.replace("Emma is the person in red", "Emma is not shown"), [], "which name is which figure"),
        (CHAIN, [couple("Emma", "Mia")], "a name that the tweet does not have"),
        (CHAIN, [couple("Emma", "Emma")], "one name twice in a quintuple"),
        (CHAIN, [], "how many quintuples"),
        (CHAIN, [couple(*NAMES, "peer")], "head, tail, type or relation"),
    ],
)
def test_what_an_answer_is_wrong_in(chain, answer, wrong):
    text = common.format_response(chain, answer)
    assert errors.kind(text, [couple(*NAMES)], NAMES, COUPLE) == wrong


def test_errors_are_shares_and_runs_of_one_name_their_mean(tmp_path):
    world.draw(COUPLE).save(tmp_path / "couple.png")
    for seed, answer in {"a": [couple(*NAMES)], "b": []}.items():
        folder = tmp_path / seed / "test-sft"
        folder.mkdir(parents=True)
        row = {"id": "1", "text": "Emma x Noah # news", "image": "../../couple.png"}
        row |= {"quintuples": [couple(*NAMES)]}
        row |= {"responses": [{"text": common.format_response(CHAIN, answer)}]}
        (folder / "predictions.jsonl").write_text(json.dumps(row) + "\n")
    _, printed, _ = run_script("-m", "demo.errors", tmp_path / "a/test-sft", tmp_path / "b/test-sft")
    assert_errors_are_one_line(tmp_path)
    rows = cells(printed)
    assert ["nothing: right", "50.0"] in rows
    assert ["how many quintuples", "50.0"] in rows


def assert_errors_are_one_line(folder):
    picture = folder / "couple.png"
    Image.new("RGB", (112, 112), "white").save(picture)
    code, _, error = run_script("-m", "demo.errors", folder / "a/test-sft", fails=True)
    assert code == 2 and "predictions.jsonl:1: no picture of demo/world.py" in error
    picture.unlink()
    code, _, error = run_script("-m", "demo.errors", folder / "a/test-sft", fails=True)
    assert code == 2 and "couple.png: no such file" in error
    (folder / "a/test-sft/predictions.jsonl").write_text("")
    code, _, error = run_script("-m", "demo.errors", folder / "a/test-sft", fails=True)
    assert code == 2 and "predictions.jsonl: no rows (made by 05_eval.py)" in error
