"""OUT of a run as people copy, move and lose it; what may change between two pieces of a run, and what may
not."""

import json
import os
import shutil
import signal

import pytest
from PIL import Image

from lib import state
from tests import kill_points
from tests.test_survive import rows_of


@pytest.fixture
def stopped(start):
    """OUT of 03, stopped after step 3 of 6: best/ of two validations, a state at step 2 gone for the one at
    3."""
    answer = start("03_sft", "--stop-after", 3)
    assert answer["code"] == 0 and (answer["out"] / "state-3").is_dir(), answer["text"]
    return answer["out"]


def error_of(answer):
    lines = [line for line in answer["text"].splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in answer["text"], answer["text"][-3000:]
    return lines[0]


# -------------------------------------------------------------------------------- copies


def test_a_lost_link_is_not_a_new_run(start, sft, stopped):
    (stopped / "last").unlink()  # as after rsync without -l
    answer = start("03_sft", out=stopped)
    assert "going on from step 3" in answer["text"]
    assert kill_points.contents(stopped) == kill_points.contents(sft)


def test_a_dangling_link_stops_and_deletes_nothing(start, stopped):
    shutil.rmtree(stopped / "state-3")
    before = kill_points.contents(stopped)
    answer = start("03_sft", out=stopped)
    assert answer["code"] == 2 and "step 3 was saved there, but no whole state is left" in error_of(answer)
    assert kill_points.contents(stopped) == before
    assert start("03_sft", "--fresh", "--stop-after", 1, out=stopped)["code"] == 0
    assert [row["step"] for row in rows_of(stopped / "metrics.jsonl")] == [1]


def test_a_copy_with_links_followed_goes_on(start, sft, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "copy", symlinks=False)
    shutil.rmtree(tmp_path / "copy" / "state-3")  # only last/, a folder now, is left
    answer = start("03_sft", out=tmp_path / "copy")
    assert "going on from step 3" in answer["text"]
    assert kill_points.contents(tmp_path / "copy") == kill_points.contents(sft)


def test_a_half_copied_state_is_no_state(start, stopped):
    weights = stopped / "state-3" / "mp_rank_00_model_states.pt"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert state.newest(stopped) is None
    answer = start("03_sft", out=stopped)
    assert answer["code"] == 2 and "no whole state is left" in error_of(answer)


def test_a_broken_state_of_the_right_size_is_one_line(start, stopped):
    weights = stopped / "state-3" / "mp_rank_00_model_states.pt"
    weights.write_bytes(bytes(weights.stat().st_size))
    answer = start("03_sft", out=stopped)
    assert answer["code"] == 2 and "state-3: broken state" in error_of(answer)


def test_without_links_the_newest_state_counts(start, sft):
    patch = "from pathlib import Path\ndef none(self, *a): raise OSError(95, 'not supported')\n"
    patch += "Path.symlink_to = none"
    answer = start("03_sft", "--stop-after", 4, patch=patch)
    assert answer["code"] == 0 and "no links on this file system" in answer["text"]
    assert start("03_sft")["code"] == 0
    assert kill_points.contents(answer["out"]) == kill_points.contents(sft)


def test_without_locks_it_runs_with_a_warning(start):
    patch = "import fcntl\ndef none(*a): raise OSError(37, 'No locks available')\nfcntl.flock = none"
    answer = start("03_sft", "--stop-after", 1, patch=patch)
    assert answer["code"] == 0 and "this file system has no locks" in answer["text"]


def test_a_junk_line_in_a_log_is_one_line(start, stopped):
    lines = (stopped / "metrics.jsonl").read_text().splitlines()
    (stopped / "metrics.jsonl").write_text("\n".join([lines[0], "<<<<<<< HEAD", *lines[1:]]) + "\n")
    answer = start("03_sft", out=stopped)
    assert answer["code"] == 2 and "metrics.jsonl:2: not a row of this log" in error_of(answer)


# -------------------------------------------------------------------------------- what may change, and what
# may not


def test_memory_speed_place_and_spelling_may_change(start, inputs, stopped, tmp_path):
    moved = tmp_path / "moved"
    shutil.move(stopped, moved)
    data = os.path.relpath(inputs["sft"])
    more = ("--eval-rows", 1, "--gradient-checkpointing", "--save-every", 1, "--data", data, "--timeout", 2)
    answer = start("03_sft", *more, out=moved)
    assert answer["code"] == 0 and "going on from step 3" in answer["text"], answer["text"][-2000:]


def test_other_images_under_the_same_names_are_other_data(start, inputs, tmp_path):
    copy = tmp_path / "world"
    shutil.copytree(inputs["sft"].parent, copy)
    more = ("--data", copy / "sft.jsonl", "--val", copy / "val.jsonl")
    assert start("03_sft", *more, "--stop-after", 1)["code"] == 0
    image = copy / rows_of(copy / "sft.jsonl")[0]["image"]
    Image.open(image).transpose(Image.Transpose.ROTATE_180).save(image)
    answer = start("03_sft", *more)
    assert answer["code"] == 2 and "training data" in error_of(answer)


def test_other_base_weights_under_the_same_name_are_another_run(start, inputs, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(inputs["model"], base)
    assert start("03_sft", "--model", base, "--stop-after", 1)["code"] == 0
    weights = bytearray((base / "model.safetensors").read_bytes())
    for place in range(len(weights) // 2, len(weights), 64):
        weights[place] ^= 1
    (base / "model.safetensors").write_bytes(weights)
    answer = start("03_sft", "--model", base)
    assert answer["code"] == 2 and "base model" in error_of(answer)


def test_a_run_may_not_replace_what_it_starts_from(start, sft):
    for more in ((), ("--fresh",)):
        answer = start("04_grpo", *more, out=sft)
        assert answer["code"] == 2 and "which this run would replace" in error_of(answer)
    assert (sft / "best" / "adapter_model.safetensors").exists()


def test_fresh_deletes_nothing_before_the_new_run_can_start(start, stopped):
    before = kill_points.contents(stopped)
    answer = start("03_sft", "--fresh", "--model", "nowhere", out=stopped)
    assert answer["code"] == 2 and kill_points.contents(stopped) == before
    patch = "from lib import training\ndef broken(*a): raise MemoryError('no room')\n"
    patch += "training.make_engine = broken"
    start("03_sft", "--fresh", out=stopped, patch=patch)
    assert kill_points.contents(stopped) == before


def test_sigusr1_is_taken_like_sigterm(start):
    answer = start("03_sft", kill_at=40, signal=signal.SIGUSR1)
    assert answer["code"] == 0 and "stopping: this step is finished and saved first" in answer["text"]


def test_config_holds_what_was_resolved(sft):
    config = json.loads((sft / "config.json").read_text())
    assert config["lora_rank"] == 4 and config["identity"]["rows_an_update"] == 2
    assert config["identity"]["dtype"] == "torch.float32" and "torch" in config["versions"]
