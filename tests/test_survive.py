"""03 and 04 survive what a long run meets (SPEC §7): kills, signals, full disks, ranks that fail, numbers
that are none."""

import fcntl
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common import InputError
from lib import lora, merge, vlm
from tests import kill_points
from tests.zygote import ROOT


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# -------------------------------------------------------------------------------- killed, stopped, refused


def test_killed_anywhere_bitwise_the_same(work):
    assert (
        kill_points.run(work, points=2, seed=os.getpid()) == 0
    )  # other points in each run of the tests; they are printed


def test_sigterm_and_sigint_finish_the_step_and_save(start, sft):
    for number in (signal.SIGTERM, signal.SIGINT):
        answer = start("03_sft", kill_at=25, signal=number)
        assert answer["code"] == 0 and "stopping: this step is finished and saved first" in answer["text"], (
            answer["text"]
        )
        stopped = re.search(
            r"stopped after step (\d) of 6, saved in .*last: the same command goes on", answer["text"]
        )
        if stopped:  # the second signal may fall into the last step
            assert rows_of(answer["out"] / "metrics.jsonl")[-1]["step"] == int(stopped[1])
    answer = start("03_sft")
    assert "done" in answer["text"] and kill_points.contents(answer["out"]) == kill_points.contents(sft)


def test_logs_lose_the_steps_that_are_done_again(start, sft):
    answer = start(
        "03_sft", "--stop-after", 3
    )  # a save at 3, then rows of a step that was never saved, and a torn one
    with open(answer["out"] / "metrics.jsonl", "a") as handle:
        handle.write('{"step": 4, "loss": 99}\n{"step": 5, "lo')
    start("03_sft")
    assert [row["step"] for row in rows_of(answer["out"] / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert kill_points.contents(answer["out"]) == kill_points.contents(sft)


def test_refused(start, sft, inputs, tmp_path):
    before = kill_points.contents(sft)
    answer = start("03_sft", "--seed", 5, "--lr", 3, out=sft)
    assert (
        answer["code"] == 2
        and "other arguments (lr 0.001 → 3.0; seed 0 → 5): choose another folder, or --fresh"
        in answer["text"]
    )
    with open(sft / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        answer = start("03_sft", out=sft)
    assert answer["code"] == 2 and re.search(r"process \d+ trains into it", answer["text"])
    changed = tmp_path / "sft.jsonl"
    changed.write_text(inputs["sft"].read_text().replace('"img/', f'"{inputs["sft"].parent}/img/'))
    start("03_sft", "--data", changed, "--stop-after", 1)
    changed.write_text(changed.read_text().replace("RT @fan", "RT @foe"))
    answer = start("03_sft", "--data", changed)
    assert answer["code"] == 2 and "training data" in answer["text"]
    assert kill_points.contents(sft) == before


def test_a_start_that_failed_protects_nothing(start):
    assert start("03_sft", "--model", "nowhere")["code"] == 2
    assert start("03_sft", "--stop-after", 1)["code"] == 0


def test_patience_ends_the_run_for_good(start):
    more = (
        "--patience",
        1,
        "--eval-every",
        0.34,
    )  # a random model answers nothing right: F1 0 at each validation
    answer = start("03_sft", *more)
    assert "done after step 2 of 6: 1 validations without a better F1" in answer["text"], answer["text"]
    again = start("03_sft", *more)
    assert (
        again["code"] == 0
        and "done after step 2" in again["text"]
        and len(rows_of(again["out"] / "metrics.jsonl")) == 2
    )


def test_frozen_weights_are_not_written(sft, inputs):
    frozen = (inputs["model"] / "model.safetensors").stat().st_size
    assert sum(path.stat().st_size for path in (sft / "last").resolve().iterdir()) < frozen
    state = torch.load(sft / "last" / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    assert state and not [name for name in state if "lora_" not in name]


# -------------------------------------------------------------------------------- what a run leaves


def test_curves_validation_and_metrics(start):
    start("04_grpo", "--stop-after", 3)
    answer = start("04_grpo")
    out = answer["out"]
    assert answer["code"] == 0, answer["text"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "samples.html").read_text()
    assert page.count('class="response"') == 12 and page.count("data:image/webp") == 4  # steps 6, 4, 2 and 1
    answered = [row["id"] for row in rows_of(out / "validation" / "step-6.jsonl")]
    assert answered == ["val-00000", "val-00001", "val-00002"]
    first = rows_of(out / "metrics.jsonl")[0]
    assert first["kl"] == 0
    assert {"reward_std", "partial_std", "constant_groups", "length", "cut_off", "entropy"} <= first.keys()


@pytest.mark.parametrize("arch", ["qwen2_5_vl", "llava"])
def test_merge_is_base_plus_adapter(arch, tmp_path):
    inputs = kill_points.make_inputs(tmp_path, arch)
    model, processor = vlm.load(str(inputs["model"]))
    model = lora.add_lora(model, 4, 8)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    lora.save_adapter(model, processor, tmp_path / "adapter", lora.Recipe("reason"), "")
    proof = merge.merge_adapter(str(inputs["model"]), tmp_path / "adapter", tmp_path / "merged")
    print(arch, proof)
    assert proof["difference"] < 1e-5 < 1e-2 < proof["effect"]
    assert json.loads((tmp_path / "merged" / "jmere.json").read_text())["prompt"] == "reason"
    for parameter in (p for name, p in model.named_parameters() if "lora_B" in name):
        parameter.data.zero_()
    lora.save_adapter(model, processor, tmp_path / "untrained", lora.Recipe("reason"), "")
    with pytest.raises(InputError, match="changes no logit"):
        merge.merge_adapter(str(inputs["model"]), tmp_path / "untrained", tmp_path / "merged2")


# -------------------------------------------------------------------------------- named at the start

FREEZE = "from lib import lora; add = lora.add_lora; lora.add_lora = lambda *a: add(*a).requires_grad_(False)"
IMAGE_TOKENS = """
import torch
from lib import lora, vlm
load = vlm.load
def other(*args):
    model, processor = load(*args)
    features = model.model.get_image_features
    def twice(*args, **more):
        found = features(*args, **more)
        found.pooler_output = [torch.cat([f, f]) for f in found.pooler_output]
        return found
    model.model.get_image_features = twice
    return model, processor
vlm.load = other
"""
APART = """
import torch
from lib import lora, vlm
load = lora.load_adapter
def moved(model, folder, **more):
    model = load(model, folder, **more)
    if more.get("name") == "reference":
        for name, p in model.named_parameters():
            if "lora_B.reference" in name: p.data += 0.01
    return model
lora.load_adapter = moved
"""
NO_SPACE = """
import collections, shutil
shutil.disk_usage = lambda path: collections.namedtuple("usage", "free")(2**20)
"""
NAN_REWARD = """
import importlib
grpo = importlib.import_module("04_grpo")
reward, seen = grpo.reward, []
def broken(sample, *rest):
    seen.append(sample)
    return reward(sample, *rest) | {"reward": float("nan") if len(seen) == 8 else 0.5}
grpo.reward = broken
"""
FULL_DISK = """
import torch
save = torch.save
def full(state, path, *args, **more):
    raise OSError(28, "No space left on device")
torch.save = full
"""
STILL = "import deepspeed; from torch.optim import AdamW; AdamW.step = lambda self, *a, **k: None"

FAULTS = [
    ("03_sft", [], FREEZE, 2, "LoRA must train the language model only; trainable now: nothing"),
    (
        "03_sft",
        [],
        IMAGE_TOKENS,
        2,
        "4 image tokens in the prompt, 8 image features: the processor does not belong to this qwen2_5",
    ),
    ("04_grpo", [], APART, 2, r"KL is .* before the first update, expected at most 0"),
    ("03_sft", [], STILL, 2, r"the first update changed no weight \(gradient norm .*\): --lr is too small"),
    ("03_sft", [], NO_SPACE, 2, r"1 MiB free, this run needs \d+: make room"),
    (
        "03_sft",
        [],
        FULL_DISK,
        3,
        r"state-2: cannot save \(.*No space left.*\): make room; the same command goes on",
    ),
    (
        "03_sft",
        ["--batch-size", 4],
        "",
        2,
        r"one update takes 8 rows over all ranks, --data has 6: lower --batch-size or --grad-accum",
    ),
    (
        "03_sft",
        ["--lr", 1e30],
        "",
        2,
        r"step 2: loss nan.*; examples .*train-0000.*; kept in .*failed-step-2.jsonl; last/ is",
    ),
    (
        "04_grpo",
        [],
        NAN_REWARD,
        2,
        r"step 3: reward nan, loss nan, .*; examples train-0000\d; kept in .*failed-step-3.jsonl",
    ),
]


@pytest.mark.parametrize(
    "script, more, patch, code, message", FAULTS, ids=[fault[-1][:40] for fault in FAULTS]
)
def test_faults_are_named(start, script, more, patch, code, message):
    answer = start(script, *more, patch=patch)
    errors = [
        line for line in answer["text"].splitlines() if line.startswith("error: ")
    ]  # not the last: what DeepSpeed prints is buffered
    assert answer["code"] == code and len(errors) == 1 and re.search(message, errors[0]), answer["text"][
        -3000:
    ]
    assert "Traceback" not in answer["text"]
    print(errors[0])
    if kept := list(answer["out"].glob("failed-step-*.jsonl")):
        assert all(row["id"].startswith("train-") and "response" in row for row in rows_of(kept[0]))


@pytest.mark.parametrize(
    "more, message",
    [
        (["--group-size", "1"], "--group-size 1: expected at least 2"),
        (["--epochs", "0"], "--epochs 0: expected a number above 0"),
        (["--lr", "nan"], "--lr nan: expected a number above 0"),
        (["--lr", "inf"], "--lr inf: expected a number above 0"),
        (["--save-every", "0"], "--save-every 0: expected at least 1"),
        (["--save-every", "1.5"], "--save-every invalid int value: '1.5'"),
        (["--warmup-ratio", "6"], "--warmup-ratio 6: expected a share, 0 to 1"),
    ],
)
def test_numbers_that_mean_nothing(more, message, capsys):
    grpo = importlib.import_module("04_grpo")
    with pytest.raises(SystemExit) as stopped:
        grpo.parse_args(more)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {message} (--help tells all arguments)\n"


# -------------------------------------------------------------------------------- two ranks

GRADIENTS = """
import os, sys, torch
from lib import training
from deepspeed.utils import safe_get_full_grad
out, make, seen = sys.argv[sys.argv.index("--out") + 1], training.make_engine, []
def probed(model, *rest):
    engine = make(model, *rest)
    step = engine.step
    def spy():
        if engine.is_gradient_accumulation_boundary():
            grads = {name: safe_get_full_grad(p) for name, p in model.named_parameters() if p.requires_grad}
            seen.append(grads)
            if int(os.environ["RANK"]) == 0:
                torch.save(grads, f"{out}-gradient-{len(seen)}.pt")
        step()
    engine.step = spy
    return engine
training.make_engine = probed
import importlib
grpo = importlib.import_module("04_grpo")
def reward(sample, *rest):  # a random model earns nothing: give its groups something to tell apart
    return {"reward": len(sample.text) % 7 / 7}
grpo.reward = reward
"""


def launch(script, argv, patch, tmp_path, ranks=2):
    """Under the real launcher → completed process; a hang is a failure."""
    (tmp_path / "patch.py").write_text(patch)
    bin_folder = Path(sys.executable).parent
    command = [bin_folder / "deepspeed", "--num_gpus", ranks, "--master_port", 20000 + os.getpid() % 20000]
    command = list(
        map(str, [*command, ROOT / "tests" / "rank_probe.py", tmp_path / "patch.py", script, *argv])
    )
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
    }
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=env, timeout=400
    )


@pytest.mark.parametrize("script", ["03_sft", "04_grpo"])
def test_two_ranks_equal_one_of_twice_the_batch(script, start, inputs, sft, tmp_path):
    more = (
        ["--stop-after", 2, "--lr", 1e-3, "--lora-dropout", 0, "--grad-accum", 1]
        if script == "03_sft"
        else ["--stop-after", 2]
    )
    one = start(script, *more, "--batch-size", 2, out=tmp_path / "one", patch=GRADIENTS)
    assert one["code"] == 0, one["text"]
    two = launch(
        script,
        kill_points.command(script, inputs, tmp_path / "two", sft / "best") + more,
        GRADIENTS,
        tmp_path,
    )
    assert two.returncode == 0, two.stdout
    for step in (1, 2):
        a, b = (torch.load(f"{tmp_path / name}-gradient-{step}.pt") for name in ("one", "two"))
        a, b = (torch.cat([grad.double().flatten() for grad in grads.values()]) for grads in (a, b))
        relative = ((a - b).norm() / a.norm()).item()
        print(f"{script} step {step}: gradient norm {a.norm():.4g}, relative difference {relative:.2g}")
        assert a.norm() > 1e-4 and relative < 1e-4
    for a, b in zip(
        rows_of(tmp_path / "one" / "metrics.jsonl"), rows_of(tmp_path / "two" / "metrics.jsonl"), strict=True
    ):
        print(f"{script} loss {a['loss']:.8g} {b['loss']:.8g}")
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=1e-6) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-4
        )
        assert a.get("reward", 0) == pytest.approx(b.get("reward", 0), rel=1e-12)
    a, b = (
        torch.load(tmp_path / name / "last" / "mp_rank_00_model_states.pt", weights_only=False)["module"]
        for name in ("one", "two")
    )
    worst = max((a[name] - b[name]).abs().max().item() for name in a)
    print(f"{script}: adapters after two updates differ by at most {worst:.2g} at learning rate 1e-3")
    assert a.keys() == b.keys() and worst < 1e-3 * 0.05


@pytest.mark.parametrize("first, second", [(1, 2), (2, 1)])
def test_another_number_of_ranks_goes_on(first, second, start, inputs, tmp_path):
    """Stopped by one number of ranks, finished by another: the moments are shared out anew, and the end is
    the same to the tolerance of sums taken in another order."""
    more = ["--lr", 1e-3, "--lora-dropout", 0, "--grad-accum", 1]

    def run(ranks, out, *stop):
        options = [*more, "--batch-size", 2 // ranks, *stop]
        if ranks == 1:
            answer = start("03_sft", *options, out=out)
            return answer["code"], answer["text"]
        done = launch("03_sft", kill_points.command("03_sft", inputs, out) + options, "", tmp_path)
        return done.returncode, done.stdout

    assert run(1, tmp_path / "whole")[0] == 0
    code, text = run(first, tmp_path / "both", "--stop-after", 3)
    assert code == 0, text
    code, text = run(second, tmp_path / "both")
    assert code == 0 and f"saved by {first} ranks, shared out to {second}" in text, text[-3000:]
    a, b = (
        torch.load(tmp_path / name / "last" / "mp_rank_00_model_states.pt", weights_only=False)["module"]
        for name in ("whole", "both")
    )
    worst = max((a[name] - b[name]).abs().max().item() for name in a)
    print(f"{first} → {second} ranks: adapters differ by at most {worst:.2g} after six updates at 1e-3")
    assert a.keys() == b.keys() and worst < 1e-3 * 0.1


def test_one_rank_failing_ends_all_with_the_cause(inputs, sft, tmp_path):
    patch = """
import os
from lib import lora, vlm
encode, calls = vlm.encode, []
def broken(*args):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 3:
        raise ZeroDivisionError("in the reward of rank 1")
    return encode(*args)
vlm.encode = broken
"""
    argv = kill_points.command("04_grpo", inputs, tmp_path / "out", sft / "best")
    ended = launch("04_grpo", argv, patch, tmp_path)
    assert (
        ended.returncode != 0 and "error: rank 1: ZeroDivisionError: in the reward of rank 1" in ended.stdout
    ), ended.stdout[-3000:]
    assert len(rows_of(tmp_path / "out" / "metrics.jsonl")) == 1


def test_one_rank_failing_in_a_collective_ends_all(inputs, tmp_path):
    patch = """
import os
from lib import training
make = training.make_engine
def probed(*args):
    engine = make(*args)
    def broken(loss, **more):
        raise ZeroDivisionError("backward on rank 1")
    if os.environ["RANK"] == "1":
        engine.backward = broken
    return engine
training.make_engine = probed
"""
    ended = launch("03_sft", kill_points.command("03_sft", inputs, tmp_path / "out"), patch, tmp_path)
    assert ended.returncode != 0 and "ZeroDivisionError: backward on rank 1" in ended.stdout, ended.stdout[
        -3000:
    ]


def test_a_signal_to_one_rank_stops_all_and_the_command_goes_on(inputs, tmp_path):
    patch = """
import os, signal
from lib import lora, vlm
encode, calls = vlm.encode, []
def told(*args):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return encode(*args)
vlm.encode = told
"""
    argv = kill_points.command("03_sft", inputs, tmp_path / "out")
    argv[argv.index("--grad-accum") + 1] = 1
    ended = launch("03_sft", argv, patch, tmp_path)
    assert ended.returncode == 0 and "stopped after step 2 of 6" in ended.stdout, ended.stdout[-3000:]
    ended = launch("03_sft", argv, "", tmp_path)
    assert ended.returncode == 0 and "going on from step 2" in ended.stdout, ended.stdout[-3000:]
    assert [row["step"] for row in rows_of(tmp_path / "out" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
