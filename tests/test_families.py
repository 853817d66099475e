"""Every family that lib/vlm.py claims, against plain transformers: log-probs, gradients, greedy tokens, and
through 03, 04, 05."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import run_script
from PIL import Image

import common
from common import InputError
from lib import checks, data, lora, merge, rollout, training, vlm
from tests import families

ALL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "llava_next")
ONE = training.Ranks(0, 1, torch.device("cpu"))
LENGTHS = ((9, 1, 4), (2, 6))


@pytest.fixture(scope="module", params=ALL)
def family(request, tmp_path_factory):
    """(name, folder of a tiny model)"""
    folder = tmp_path_factory.mktemp(request.param)
    families.make(request.param, folder)
    return request.param, folder


@pytest.fixture(scope="module")
def loaded(family, tmp_path_factory):
    """Model with a LoRA that does something, processor, two items of different image sizes."""
    name, folder = family
    model, processor = vlm.load(str(folder))
    model = lora.add_lora(model, 8, 16).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            # at 0.2 fp32 itself, ours and transformers' alike, is up to 2e-5 off float64
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    images = tmp_path_factory.mktemp("images")
    items = []
    for number, (size, text) in enumerate(
        (((56, 56), "Emma meets Noah"), ((180, 90), "the Browns of Paris"))
    ):
        gradient = Image.linear_gradient("L").resize(size)
        Image.merge("RGB", (gradient, gradient.rotate(90), gradient.rotate(180))).save(
            images / f"{number}.png"
        )
        items.append((common.REASON_PROMPT.format(text=text), str(images / f"{number}.png")))
    return name, model, processor, items


def completions_of(model):
    rng = random.Random(0)
    legal = [i for i in range(20, 400) if i not in vlm.image_ids(model)]
    return [[[rng.choice(legal) for _ in range(length)] for length in lengths] for lengths in LENGTHS]


def off(a, b):
    return ((a - b).norm() / b.norm()).item()


def gradients(model, logps):
    model.zero_grad()
    weights = torch.linspace(-1, 1, len(logps))
    (logps * weights).sum().backward()
    trained = [parameter.grad.flatten() for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat(trained)


def own_logps(model, processor, items, completions):
    """Log-probs of transformers' own forward, response by response, with graph → [T]."""
    found = []
    for (text, image), group in zip(items, completions, strict=True):
        for ids in group:
            logits = vlm.own_logits(model, processor, text, image, ids)[:-1]
            chosen = torch.tensor(ids)[:, None]
            found.append(logits.log_softmax(-1).gather(1, chosen)[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize("shared", [True, False])
def test_log_probs_and_gradients_equal_transformers(loaded, shared):
    name, model, processor, items = loaded
    completions = completions_of(model)
    prompts = vlm.encode(model, processor, items)
    logps, _, mask = rollout.completion_logps(model, prompts, completions, shared_prefix=shared)
    ours = logps[mask]
    our_gradients = gradients(model, ours)
    theirs = own_logps(model, processor, items, completions)
    their_gradients = gradients(model, theirs)
    found = off(ours.detach(), theirs.detach()), off(our_gradients, their_gradients)
    print(f"{name} {'packed' if shared else 'plain'}: log-probs {found[0]:.1e}, gradients {found[1]:.1e}")
    assert max(found) <= 1e-5


@pytest.mark.parametrize("static", [False, True])
def test_greedy_tokens_equal_generate(loaded, static):
    name, model, processor, items = loaded
    ours = rollout.generate(model, processor, items, n=2, max_new_tokens=40, temperature=0.0, static=static)
    for (text, image), samples in zip(items, ours, strict=True):
        inputs = vlm.processor_inputs(processor, text, image)
        plain = {"do_sample": False, "suppress_tokens": vlm.image_ids(model), "repetition_penalty": 1.0}
        wanted = model.generate(**inputs, max_new_tokens=40, temperature=None, **plain)
        wanted = wanted[0, inputs["input_ids"].shape[1] :].tolist()
        assert [sample.completion_ids for sample in samples] == [wanted, wanted]
    assert len({tuple(group[0].completion_ids) for group in ours}) == 2, (
        "both tweets got one answer: the test is blind"
    )


def test_prompt_lengths(loaded):
    _, _, processor, items = loaded
    for text, image in items:
        with Image.open(image) as picture:
            size = picture.size
        wanted = vlm.processor_inputs(processor, text, image)["input_ids"].shape[1]
        assert vlm.prompt_length(processor, text, size) == wanted


# -------------------------------------------------------------------------------- the proof at the start


def prove(model, processor, items):
    example = data.Example("a", "Emma meets Noah", items[1][1], (), {})
    return checks.prove(model, processor, example, SimpleNamespace(prompt="reason"), ONE)


def test_the_proof_passes(loaded):
    name, model, processor, items = loaded
    assert prove(model, processor, items) < 1e-5


def test_dropped_deepstack_is_caught(tmp_path, monkeypatch):
    """What a family let in carelessly does: it trains, without a word, on wrong log-probs."""
    families.make("qwen3_vl", tmp_path)
    model, processor = vlm.load(str(tmp_path))
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "a.png")
    items = [None, ("", str(tmp_path / "a.png"))]
    assert prove(model, processor, items) < 1e-5
    encode = vlm.encode

    def careless(*args):
        prompts = encode(*args)
        for prompt in prompts:
            prompt.deepstack = None
        return prompts

    monkeypatch.setattr(vlm, "encode", careless)
    with pytest.raises(InputError, match="qwen3_vl: the packed pass is .* nats off the model's own") as error:
        prove(model, processor, items)
    print(error.value)


def test_another_processor_is_caught(tmp_path):
    """Other pixels than the model's: as many image tokens, other features, and both passes wrong alike; so
    tokens are counted."""
    families.make("llava", tmp_path / "llava")
    families.make("llava_next", tmp_path / "next")
    model, _ = vlm.load(str(tmp_path / "llava"))
    _, other = vlm.load(str(tmp_path / "next"))
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "a.png")
    with pytest.raises((InputError, RuntimeError, ValueError, TypeError)):
        prove(model, other, [None, ("", str(tmp_path / "a.png"))])


def test_a_model_without_eyes_is_refused(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=50)).save_pretrained(
        tmp_path
    )
    with pytest.raises(InputError, match="a llama model, which reads no images"):
        vlm.load(str(tmp_path))


# -------------------------------------------------------------------------------- 03 → 04 → 05 → merge


def test_through_all_stages(family, world, tmp_path):
    name, folder = family
    if name not in families.FAMILIES:
        pytest.skip("LLaVA-1.5 and Qwen2.5-VL go through all stages in test_train.py and the demo")
    options = f"--val {world}/val.jsonl --eval-limit 2 --max-new-tokens 8 --limit 4 --batch-size 2 --lr 1e-3"
    sft = f"03_sft.py --model {folder} --data {world}/sft.jsonl {options} --out {tmp_path}/sft"
    run_script(sft, "--lora-rank 4 --lora-alpha 8 --epochs 2")
    probe = tmp_path / "grpo.py"  # a random model earns nothing: its groups get something to tell apart
    probe.write_text(
        'import importlib, sys\ngrpo = importlib.import_module("04_grpo")\n'
        'grpo.reward = lambda sample, *rest: {"reward": len(sample.text) % 7 / 7}\n'
        "grpo.main(grpo.parse_args())\n"
    )
    start = f"--adapter {tmp_path}/sft/best --data {world}/train.jsonl"
    run_script(probe, start, options, f"--epochs 1 --group-size 3 --out {tmp_path}/grpo")
    rows = [json.loads(line) for line in (tmp_path / "grpo" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["kl"] == 0 and rows[0]["grad_norm"] > 0 and rows[1]["kl"] > 0
    evaluate = f"05_eval.py --model {folder} --adapter {tmp_path}/grpo/best --data {world}/test.jsonl"
    run_script(evaluate, f"--limit 2 --max-new-tokens 8 --temperature 0 --out {tmp_path}/test")
    assert (tmp_path / "test" / "predictions.jsonl").exists()
    proof = merge.merge_adapter(str(folder), str(tmp_path / "grpo" / "best"), str(tmp_path / "merged"))
    print(f"{name}: merged logits differ by {proof['difference']:.1e}, the base's by {proof['effect']:.1e}")
    assert proof["difference"] < 1e-5 < proof["effect"]
