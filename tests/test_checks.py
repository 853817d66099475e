"""What is met at the start of a run and not in its middle: images, prompts, our passes; memory; what a run's
figures say."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import ARCHITECTURES, run_script
from PIL import Image

import common
from common import InputError, Stopped
from lib import checks, data, lora, rollout, training, vlm
from lib.alarms import WINDOW, alarms

ONE = training.Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def loaded(request, tiny, world):
    folder = str(tiny(request.param))
    model, processor = vlm.load(folder)
    args = SimpleNamespace(model=folder, prompt="reason", max_new_tokens=64, skip_bad=False)
    return model, processor, data.load_examples(world / "test.jsonl"), args


# -------------------------------------------------------------------------------- images and prompts


@pytest.mark.parametrize("size", [(56, 56), (300, 90), (64, 1000)])
def test_prompt_length_is_that_of_the_processor(loaded, size, tmp_path):
    _, processor, examples, args = loaded
    if "qwen" in type(processor).__name__.lower():
        processor = vlm.load_processor(
            args.model, max_pixels=50_000
        )  # the tiny model's own are those of one size
    Image.new("RGB", size).save(tmp_path / "a.png")
    text = common.REASON_PROMPT.format(text=examples[0].text + " <|im_end|> <image>")
    inputs = vlm.processor_inputs(processor, text, str(tmp_path / "a.png"))
    assert vlm.prompt_length(processor, text, size) == inputs["input_ids"].shape[1]


def test_what_the_processor_refuses_is_named_and_may_be_skipped(loaded, tmp_path, capsys):
    _, processor, examples, args = loaded
    bad = []
    for name, size in (("thin", (2100, 10)), ("gone", None)):
        if size:
            Image.new("RGB", size).save(tmp_path / f"{name}.png")
        bad.append(data.Example(name, "t", str(tmp_path / f"{name}.png"), (), {}))
    refuses = 2 if "qwen" in type(processor).__name__.lower() else 1  # LLaVA cuts a square out of anything
    with pytest.raises(InputError, match=f"{refuses} of {len(examples) + 2} examples cannot be used: .*gone"):
        checks.usable([*examples, *bad], processor, args, ONE)
    skipping = SimpleNamespace(**{**vars(args), "skip_bad": True})
    kept, digest = checks.usable([*examples, *bad], processor, skipping, ONE)
    assert len(kept) == len(examples) + 2 - refuses and "--skip-bad" in capsys.readouterr().out
    if refuses == 2:
        assert "2100 × 10 pixels, refused by the processor" in str(_error(examples + bad, processor, args))
        assert checks.usable(examples, processor, args, ONE) == (kept, digest)


def _error(examples, processor, args):
    with pytest.raises(InputError) as error:
        checks.usable(examples, processor, args, ONE)
    return error.value


def test_prompts_that_pass_the_models_positions(loaded):
    _, processor, examples, args = loaded
    room = vlm.read_config(args.model).get_text_config().max_position_embeddings
    longest = SimpleNamespace(**{**vars(args), "max_new_tokens": room - 20})
    message = str(_error(examples, processor, longest))
    assert examples[0].id in message and "--max-new-tokens leaves it 20 positions" in message


def test_each_image_is_opened_by_one_rank(loaded, monkeypatch):
    _, processor, examples, args = loaded
    opened = []
    real = data.load_image
    monkeypatch.setattr(data, "load_image", lambda path: opened.append(path) or real(path))

    class Rank(training.Ranks):
        def gather(self, value):
            return [value, value]  # the other rank found the same; here only who opens what is counted

    checks.usable(examples, processor, args, Rank(1, 2, torch.device("cpu")))
    assert opened == [example.image for example in examples[1::2]]


def test_special_tokens_in_a_target_stay_text(loaded):
    import importlib

    sft = importlib.import_module("03_sft")
    _, processor, _, _ = loaded
    special = processor.tokenizer.all_special_tokens[0]
    ids = sft.target_ids(processor, f"[{special}, per, B, org, peer]", 7)
    assert not set(ids[:-1]) & set(processor.tokenizer.all_special_ids)


# -------------------------------------------------------------------------------- pixels


def test_pixels_are_limited_and_follow_the_adapter(tiny, world, tmp_path):
    qwen, llava = tiny("qwen2_5_vl"), tiny("llava")
    options = f"--data {world}/train.jsonl --no-val --target answer --limit 2 --batch-size 1"
    options += " --epochs 1 --lora-rank 4"
    run_script(f"03_sft.py --model {qwen} {options} --max-pixels 8000 --min-pixels 8000 --out {tmp_path}/sft")
    recipe = lora.read_recipe(tmp_path / "sft" / "best")
    assert (recipe.min_pixels, recipe.max_pixels) == (8000, 8000)
    stored = vlm.load_processor(str(qwen), recipe.min_pixels, recipe.max_pixels)
    own = vlm.load_processor(str(qwen))
    text, image = "t", data.load_examples(world / "test.jsonl")[0].image
    tokens = [vlm.processor_inputs(p, text, image)["input_ids"].shape[1] for p in (own, stored)]
    assert tokens[1] - tokens[0] == 9 - 4  # 84 × 84 pixels, 28 × 28 a token
    args = SimpleNamespace(adapter=str(tmp_path / "sft" / "best"), only_rl=False, model=None, prompt=None)
    args.min_pixels = args.max_pixels = None
    lora.resolve_start(args)
    assert (args.model, args.prompt, args.max_pixels) == (str(qwen), "direct", 8000)
    with pytest.raises(InputError, match="takes images of its own sizes"):
        vlm.load_processor(str(llava), max_pixels=1000)


def test_a_photograph_costs_about_a_thousand_tokens(tiny, tmp_path, monkeypatch):
    """The real processor's own limit is 16 million pixels; ours is a million tokens' worth less."""
    processor = vlm.load_processor(str(tiny("qwen2_5_vl")), max_pixels=vlm.MAX_PIXELS)
    for size in ((4032, 3024), (1200, 675)):
        assert 800 < vlm.prompt_length(processor, "", size) < 1100


# -------------------------------------------------------------------------------- our passes


def test_our_passes_prove_themselves(loaded):
    model, processor, examples, args = loaded
    assert checks.prove(model, processor, examples[0], args, ONE) < 1e-4


@pytest.mark.parametrize("fault", ["positions", "features", "cache"])
def test_planted_faults_are_caught(loaded, fault, monkeypatch):
    model, processor, examples, args = loaded
    if fault == "positions":  # responses begin one place late
        right = vlm.response_positions
        monkeypatch.setattr(vlm, "response_positions", lambda *a: right(*a) + 1)
    elif fault == "features":  # the picture is handed over in another order
        right_features = vlm._image_features
        monkeypatch.setattr(vlm, "_image_features", lambda *inputs: _turned(right_features(*inputs)))
    else:  # the cache forgets the prompt
        monkeypatch.setattr(rollout, "_prefill", _without_prompt(rollout._prefill))
    with pytest.raises(
        InputError, match=f"{model.config.model_type}: .* nats off the model's own, expected at most 0.0001"
    ):
        checks.prove(model, processor, examples[0], args, ONE)


def _turned(seen):
    seen.pooler_output = [features.flip(0) for features in seen.pooler_output]
    return seen


def _without_prompt(prefill):
    def broken(*args):
        hidden, cache = prefill(*args)
        for values in cache.values:
            values.zero_()
        return -hidden, cache

    return broken


# -------------------------------------------------------------------------------- memory


def test_sampling_halves_its_rows_until_they_fit(loaded, monkeypatch, capsys):
    model, processor, examples, args = loaded
    items = [("t", example.image) for example in examples]
    whole = rollout.generate(model, processor, items, 4, 6, 1.0, keys="abcd")
    real = rollout.sample

    def small(model, processor, prompts, n, *rest, part=None, **more):
        if len(prompts) * (part[1] - part[0]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return real(model, processor, prompts, n, *rest, part=part, **more)

    monkeypatch.setattr(rollout, "sample", small)
    parts = rollout.generate(model, processor, items, 4, 6, 1.0, keys="abcd")
    assert [[s.completion_ids for s in group] for group in parts] == [
        [s.completion_ids for s in group] for group in whole
    ]
    assert "out of memory: going on with 2 responses at once" in capsys.readouterr().out
    monkeypatch.setattr(rollout, "sample", _no_room)
    with pytest.raises(Stopped, match="no room for a single response .*: lower --max-new-tokens"):
        rollout.generate(model, processor, items, 4, 6, 1.0, keys="abcd")


def _no_room(*args, **more):
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_gpu_without_room_names_the_arguments():
    with pytest.raises(Stopped, match="--pack-tokens"), training.out_of_memory("--pack-tokens"):
        _no_room()


# -------------------------------------------------------------------------------- what a run's figures say


def _rows(n, **figures):
    good = {"reward": 0.5, "constant_groups": 0.2, "format": 0.9, "entropy": 1.0, "cut_off": 0.0, "kl": 0.01}
    return [{"step": i + 1, **good, **figures} for i in range(n)]


@pytest.mark.parametrize(
    "early, late, cause",
    [
        ({}, {"constant_groups": 1.0}, "constant"),
        ({}, {"format": 0.0}, "format"),
        ({}, {"entropy": 0.05}, "entropy"),
        ({}, {"cut_off": 0.4}, "cut_off"),
        ({}, {"kl": 1.5}, "kl"),
    ],
)
def test_alarms_by_cause(early, late, cause):
    assert alarms(_rows(3 * WINDOW)) == {}
    rows = _rows(WINDOW, **early) + _rows(WINDOW, **late)
    assert list(alarms(rows)) == [cause]
    assert alarms(rows[:-1] + _rows(1)) == {} or cause in ("entropy", "cut_off", "kl")


def test_reward_up_while_f1_falls():
    rows = _rows(9)
    for i, (reward, f1) in enumerate(
        zip((1, 1, 1, 2, 2, 2, 3, 3, 3), (0, 0, 0.5, 0, 0, 0.4, 0, 0, 0.3), strict=True)
    ):
        rows[i]["reward"] = reward
        if f1:
            rows[i]["val_jmere_f1"] = f1
    assert list(alarms(rows)) == ["reward"]
    rows[-1]["val_jmere_f1"] = 0.6
    assert alarms(rows) == {}


def test_alarms_are_loud_once(tiny, world, tmp_path):
    """A random model earns nothing: one line after twenty updates, and not another one."""
    options = (
        f"--only-rl --data {world}/train.jsonl --no-val --limit 12 --epochs 2 --batch-size 1 --group-size 2"
    )
    command = (
        f"04_grpo.py --model {tiny('llava')} {options} --max-new-tokens 4 --lora-rank 4 --out {tmp_path}/out"
    )
    _, _, stderr = run_script(command)
    loud = [line for line in stderr.splitlines() if line.startswith("!! ")]
    assert sorted(line.split(":")[0] for line in loud) == ["!! step 20", "!! step 20"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert max(row["sampling_gap"] for row in rows) < 1e-2  # image ids are never drawn
