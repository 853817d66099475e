"""The plan's simulated peaks against what torch's allocator gave out, phase by phase, on real tiny models."""

import contextlib
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ARCHITECTURES
from transformers import AutoConfig, AutoModelForImageTextToText

import common
from bench import plan, simulate, steps
from demo.base import build
from lib import lora, rollout, training, vlm

RANK = 8
SIZE = build.SIZE | {"hidden": 256, "layers": 3, "heads": 8, "kv_heads": 4, "ffn": 704}
BUCKET = 500_000  # numbers
SIDE = 448  # pixels of the large picture
PROMPT, LENGTH, GROUP = 300, 66, 4


class Allocator:
    """In place of simulate.Ledger: what torch's allocator gave out and took back, by torch.profiler."""

    def __init__(self):
        self.rises = {}

    @contextlib.contextmanager
    def part(self, name):
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
            yield
        events = profiler.profiler.kineto_results.events()
        memory = [event for event in events if event.name() == "[memory]"]
        now = peak = 0
        for event in sorted(memory, key=lambda event: event.start_ns()):
            now += event.nbytes()
            peak = max(peak, now)
        self.rises[name] = peak


@pytest.fixture(scope="module", params=ARCHITECTURES)
def models(request, tmp_path_factory):
    """(real model in bf16 with its processor, prompt and items; plan's shadow of it)."""
    folder = tmp_path_factory.mktemp(request.param)
    build.build(request.param, folder, build.corpus(), size=SIZE)
    pixels = None if request.param == "llava" else 112 * 112
    processor = vlm.load_processor(folder, pixels, pixels)
    model, _ = vlm.load(folder, torch.bfloat16, processor=processor)
    model = lora.add_lora(model, RANK, RANK).eval()
    simulate.add_reference(model, RANK, torch.bfloat16)
    items = steps.make_items(processor, folder, 1, PROMPT)
    shadow = simulate.Shadow(folder, RANK, torch.bfloat16, 112 * 112, PROMPT)
    return model, processor, items, shadow


def close(simulated, measured):
    print(f"\n{simulated:12,} simulated {measured:12,} measured {simulated / measured:.3f}")
    return simulated == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_images(arch, tmp_path):
    """A picture large enough that kernels' own scratch is small beside the tower's tensors."""
    build.build(arch, tmp_path, build.corpus(), size=SIZE | {"vision_hidden": 256})
    config = AutoConfig.from_pretrained(tmp_path)
    if arch == "llava":
        config.vision_config.image_size = SIDE
        config.image_seq_length = (SIDE // build.PATCH) ** 2
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval()
    model.config.save_pretrained(tmp_path)
    shadow = simulate.Shadow(tmp_path, RANK, torch.bfloat16, SIDE**2, None)
    items = steps.make_items(shadow.processor, tmp_path, 1, shadow.prompt_tokens)
    watch = Allocator()
    with simulate.tower_in(watch):
        vlm.encode(model, shadow.processor, items)
    assert close(shadow.images, watch.rises["images"])


def test_weights(models):
    model, _, _, shadow = models
    storages = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    assert shadow.weights == sum(storages.values())


@pytest.mark.parametrize("prompts, n, rows, temperature", [(1, 24, 24, 1.0), (6, 1, 6, 0)])
def test_sampling(models, prompts, n, rows, temperature):
    model, processor, items, shadow = models
    watch = Allocator()
    [prompt] = vlm.encode(model, processor, items)
    part = watch.part("sampling")
    simulate.draw(part, model, processor, prompt, prompts, n, LENGTH, rows, temperature)
    assert close(simulate.sampling(shadow, prompts, n, LENGTH, rows, temperature), watch.rises["sampling"])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("prompts, n, reference", [(1, GROUP, True), (3, 1, False)])
def test_update(models, prompts, n, reference, recompute):
    model, processor, items, shadow = models
    watch = Allocator()
    [prompt] = vlm.encode(model, processor, items)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    completions = [[[simulate.shadows.TOKEN] * LENGTH] * n] * prompts
    simulate.update(watch, model, simulate.copies(prompt, prompts), completions, reference)
    model.gradient_checkpointing_disable()
    rises, _ = simulate.micro_step(shadow, prompts, n, LENGTH, reference, recompute)
    for name, measured in watch.rises.items():
        assert close(rises[name], measured)


# ------------------------------------------------------------------------------------------------ ZeRO-2


def measure_engine(folder):
    """(peaks of the allocator in backward pass and step of DeepSpeed's own engine, numbers trained, prompt
    tokens); in a process of its own, because it makes a process group."""
    ranks = training.setup(distributed=True)
    model, processor = vlm.load(folder, torch.bfloat16)
    model = lora.add_lora(model, RANK, RANK)
    [prompt] = vlm.encode(model, processor, steps.make_items(processor, folder, 1, PROMPT))
    args = SimpleNamespace(lr=1e-4, weight_decay=0.0, batch_size=1, clip=1.0, out=folder)
    args.gradient_checkpointing = False
    args.dtype = "bf16"
    args.ds_config = plan.parse_args([]).ds_config
    config, _ = training.read_ds_config(args, ranks)
    config["zero_optimization"]["reduce_bucket_size"] = BUCKET
    engine = training.make_engine(model, args, config, 1)
    watch = Allocator()
    for _ in range(2):  # the first step makes the moments; the second is measured
        with watch.part("policy"):
            completions = [[[simulate.shadows.TOKEN] * LENGTH] * GROUP]
            logps, _, mask = rollout.completion_logps(model, [prompt], completions)
            engine.backward(-(logps * mask).sum(), scale_wrt_gas=False)
        with watch.part("step"):
            engine.step()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return watch.rises, trained


def test_zero_formula_is_what_the_engine_takes(tmp_path):
    build.build("llava", tmp_path, build.corpus(), size=SIZE)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        measured, trained = pool.submit(measure_engine, tmp_path).result()
    shadow = simulate.Shadow(tmp_path, RANK, torch.bfloat16, SIDE**2, PROMPT)
    assert shadow.trained == trained
    zero = plan.zero_shares(trained, 2, 1, BUCKET)
    rises, _ = simulate.micro_step(shadow, 1, GROUP, LENGTH, False, False)
    assert close(rises["policy"] + zero.gradient + zero.bucket, measured["policy"])
    # the gradient was there before the step began, and is let go inside it
    assert close(zero.step, measured["step"] + zero.gradient)


def test_zero_shares_by_hand():
    zero = plan.zero_shares(trained=1000, itemsize=2, gpus=4, bucket=50)
    assert vars(zero) == {"states": 3000, "gradient": 500, "bucket": 100, "step": 3000}


# ------------------------------------------------------------------------------------------------ the plan


@pytest.fixture(scope="module")
def ask(tiny, tmp_path_factory):
    """ask(words) → arguments of a plan for a tiny LLaVA-1.5; a small bucket, which else were most of it."""
    settings = json.loads(Path(plan.parse_args([]).ds_config).read_text())
    settings["zero_optimization"]["reduce_bucket_size"] = BUCKET
    path = tmp_path_factory.mktemp("plan") / "settings.json"
    path.write_text(json.dumps(settings))
    known = f"--model {tiny('llava')} --ds-config {path} --prompt-tokens {PROMPT} --lora-rank {RANK}"
    known += f" --max-new-tokens {LENGTH} --mean-tokens 20 --eval-rows 2 --group-size 4 --reserve 0"

    def get(words=""):
        return plan.resolve(plan.parse_args(f"{known} {words}".split()))

    return get


def test_flags_that_are_named_make_it_fit(ask):
    args = ask()
    assert plan.fitted(args) == args
    found = plan.peaks(args)
    card = (0.8 * found["policy"] + 0.2 * found["optimiser"]) / plan.GB
    args = plan.changed(args, card=card)
    assert not plan.fits(args)
    best = plan.fitted(args)
    assert plan.fits(best)
    words = plan.flags(best, args)
    assert "--pack-tokens" in words
    assert plan.peaks(ask(words)) == plan.peaks(best)
    assert plan.fitted(plan.changed(args, card=0.9 * found["load"] / plan.GB)) is None


def test_flop_and_hours_by_hand(ask):
    args = ask("--stage sft --gpus 2 --tflops 1e-3 --bandwidth 1e9")
    work = {name: (times, flop) for name, times, (flop, _) in plan.step_work(args)}
    assert [work["images"][0], work["policy"][0]] == [2, 1]
    size = build.SIZE
    hidden, ffn = size["hidden"], size["ffn"]
    kv = hidden * size["kv_heads"] // size["heads"]
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * ffn
    low_rank = RANK * (2 * 2 * hidden + 2 * (hidden + kv) + 3 * (hidden + ffn))
    rows, tokens = 2, PROMPT + 20
    attention = 4 * hidden * (PROMPT * PROMPT + 20 * tokens)
    # forward, and the gradient of what goes in; of LoRA also its own; attention's backward pass is 2.5 of it
    decoder = size["layers"] * rows * (4 * layer * tokens + 6 * low_rank * tokens + 3.5 * attention)
    vocabulary = vlm.read_config(args.model).text_config.vocab_size
    head = 4 * hidden * vocabulary * rows * 20
    assert work["policy"][1] == pytest.approx(decoder + head, rel=0.05)  # but the first layer's input
    flop = sum(times * flop for times, flop in work.values())
    assert plan.hours(args) == pytest.approx(flop / 1e9 / 0.4 * 4418 / 3600)  # 3534 · 5 / (2 · 2) steps


def test_command_prints_a_table_and_a_verdict(ask, capsys):
    plan.show(ask())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:9]] == list(plan.HOLDS)
    assert lines[9].startswith("fits: ")
    plan.show(ask("--card 0.001"))
    assert "none of these flags make it fit" in capsys.readouterr().out


def test_other_models_are_refused_with_a_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    with pytest.raises(common.InputError, match="is a qwen2_vl; a plan can be made of qwen2_5_vl, llava"):
        simulate.find_shape(tmp_path)
