"""The benches: what they count is what runs, what they time has the lengths it was asked for."""

import copy
import json
from collections import Counter

import pytest
import torch
from conftest import ARCHITECTURES, run_script
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench import bench_grpo, counts, floor, shadows, steps
from lib import layers, lora, rollout, vlm
from tests import families

P, C, G = 160, 36, 3
SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
VISION = {
    "qwen2_5_vl": {"depth": 2, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64},
    "llava": {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 2, "image_size": 56},
}


def small_shape(arch):
    """A shape of counts.SHAPES that a real model can have here."""
    shape = copy.deepcopy(counts.SHAPES[arch])
    shape["text"] = SMALL | {"vocab_size": 1500}
    shape["vision"] = VISION[arch]
    return shape


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(counts, "IMAGE", 56)
    monkeypatch.setitem(rollout.LOOK_EVERY, "cpu", rollout.LOOK_EVERY["cuda"])


# ------------------------------------------------------------------------------------------------ shadows


def test_shadows_have_no_numbers_and_integers_do():
    with shadows.Meter():
        weight = torch.empty(10, 4, device="meta")
        ids = torch.tensor([1, 2, 3], device="meta")
        hidden = weight[ids]
        tokens = (hidden @ weight.t()).argmax(-1)
        mask = torch.ones_like(hidden, dtype=torch.bool)
    assert hidden.is_meta
    assert ids.tolist() == [1, 2, 3]
    assert tokens.tolist() == [shadows.TOKEN] * 3
    assert mask.all()


def test_flop_bytes_and_operations_of_a_product_by_hand():
    with shadows.Meter() as meter:
        a, b = torch.empty(3, 5, device="meta"), torch.empty(5, 7, device="meta")
        a @ b.t().t()
        a[None].expand(100, 3, 5) + 1
    assert meter.parts["rest"]["flop"] == 2 * 3 * 5 * 7
    assert meter.parts["rest"]["operations"] == 2
    assert meter.parts["rest"]["bytes_read"] == 4 * (3 * 5 + 5 * 7) + 4 * 3 * 5  # expanded: once


def test_every_way_to_ask_for_a_value_is_a_sync():
    x = torch.arange(4)
    with shadows.Meter() as meter:
        x.tolist()
        x.sum().item()
        int(x.max())
        if x.any():
            x.cpu()
        x[x > 1]
        x.nonzero()
    assert meter.parts["rest"]["syncs"] == 7
    assert {site.rpartition(":")[0] for site in meter.sites} == {__file__}
    with shadows.Meter() as meter:
        torch.where(x > 1, x + 1, x).cumsum(0)[:2].view(1, 2)
    assert meter.parts["rest"]["syncs"] == 0


def test_saved_bytes_are_those_held_at_once():
    weight = torch.nn.Parameter(torch.randn(8, 4))
    x = torch.randn(3, 4)
    model = torch.nn.ParameterList([weight])
    with shadows.Meter() as meter:
        meter.leave_out(model)
        hidden = torch.nn.functional.linear(x, weight)  # saves x; the weight is left out
        loss = hidden.exp().sum()  # saves its result
        assert meter.saved == 4 * (3 * 4 + 3 * 8)
        loss.backward()
        del hidden, loss
    assert meter.saved_now == 0


# ------------------------------------------------------------------------------------------------ counts


@pytest.mark.parametrize("way", counts.WAYS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_is_counted_on_shadows_is_what_runs(arch, way, tiny, as_on_a_gpu):
    shape, folder = small_shape(arch), tiny(arch)

    def per_token(device):
        torch.manual_seed(0)
        whole = counts.count(way, folder, shape, 2, (P, C, G), rank=4, device=device)
        first = counts.count(way, folder, shape, 2, (P, 1, G), rank=4, device=device)
        drawn = dict(whole.parts["sampling"])
        for what, number in first.parts["sampling"].items():
            drawn[what] -= number
        flop = {part: whole.parts[part]["flop"] for part in counts.PARTS}
        return drawn, flop, whole.saved

    assert per_token("meta") == per_token("cpu")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_flop_are_those_of_the_formula_and_of_flop_counter_mode(arch, tiny, as_on_a_gpu):
    shape = small_shape(arch)
    with FlopCounterMode(display=False) as counter:
        meter = counts.count("ours", tiny(arch), shape, 2, (P, C, G), rank=4, device="cpu")

    # The reference pass by hand, without LoRA: two layers of P + G·C positions, head of G·C, attention.
    hidden, ffn = SMALL["hidden_size"], SMALL["intermediate_size"]
    layer = 2 * hidden * hidden + 2 * hidden * (hidden // 2) + 3 * hidden * ffn
    linear = 2 * 2 * layer * (P + G * C) + 2 * hidden * 1500 * G * C
    prompt_attention = 2 * 4 * hidden * P * P
    attention = prompt_attention + 2 * 4 * hidden * G * C * (P + C)
    assert meter.parts["reference"]["flop"] == linear + attention

    # FlopCounterMode does not know the CPU's attention: of the prefill, two passes and the backward pass.
    unknown = prompt_attention + 2 * attention + attention * 5 // 2
    assert sum(part["flop"] for part in meter.parts.values()) == counter.get_total_flops() + unknown


@pytest.mark.parametrize("way", counts.WAYS)
def test_layers_beyond_three_are_arithmetic(way, tiny, as_on_a_gpu):
    shape, folder = small_shape("llava"), tiny("llava")

    def at(layers):
        return counts.count(way, folder, shape, layers, (P, C, G), rank=4)

    assert counts.at_depth(at, 4) == counts.flat_counts(at(4))


def test_ours_waits_for_the_device_once_in_sixteen_tokens(tiny, as_on_a_gpu):
    shape, folder = small_shape("llava"), tiny("llava")
    waited = counts.waits("ours", folder, shape, (P, 65, G))
    assert sum(waited.values()) * 64 == 4  # at 16, 32, 48, 64
    assert all("lib/rollout.py" in site for site in waited)


# ------------------------------------------------------------------------------------------------ steps


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_responses_have_the_lengths_asked_for(arch, tiny, tmp_path):
    model, processor = vlm.load(tiny(arch))
    model = lora.add_lora(model, 4, 4).eval()
    items = steps.make_items(processor, tmp_path, 2, 150)
    prompts = vlm.encode(model, processor, items)
    assert [len(prompt.embeds) for prompt in prompts] == [150, 150]
    lengths = [[3, 9, 1], [9, 2, 5]]
    samples = steps.sample(model, processor, prompts, lengths, static=False)
    last = vlm.base_model(model).lm_head.weight.shape[0] - 1
    for sample in steps.flat(samples):
        assert sample.completion_ids.index(last) == len(sample.completion_ids) - 1
    with pytest.raises(steps.common.InputError, match="the comparison is not one"):
        steps.check_lengths("ours", [[3]], [[4]])


def test_trls_responses_have_the_lengths_asked_for():
    end_at = steps.EndAt([1, 3], stops=[5, 6])
    for drawn, ends in ((1, [True, False]), (2, [False, False]), (3, [False, True])):
        scores = end_at(torch.zeros(2, drawn), torch.zeros(2, 8))
        for row, end in zip(scores, ends, strict=True):
            allowed = row.isfinite().nonzero()[:, 0].tolist()
            assert allowed == ([5] if end else [0, 1, 2, 3, 4, 7])


def test_lengths_are_drawn_between_the_shortest_and_c():
    args = bench_grpo.parse_args(["--shortest", "4"])
    lengths = steps.flat(bench_grpo.draw_lengths(args, 3, 8, 20))
    assert max(lengths) == 20
    assert 4 <= min(lengths) < 12
    assert bench_grpo.draw_lengths(bench_grpo.parse_args([]), 2, 3, 20) == [[20] * 3] * 2


def test_floor_counts_each_position_once_a_pass():
    args = bench_grpo.parse_args(["--layers", "2", "--hidden", "64", "--ffn", "96", "--vocab", "1500"])
    args.heads, args.kv_heads = 4, 2
    lengths = [[5, 9], [9, 9]]
    total = sum(rows * inputs * outputs * n for (rows, inputs, outputs), n in products(args, lengths))
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96
    drawn = 5 + 9 + 9 + 9
    decoder = 2 * layer * (4 * 2 * 100 + 4 * drawn)  # prefill and decoding, reference, policy, its d input
    assert total == decoder + 64 * 1500 * 4 * drawn


def products(args, lengths):
    return floor.products(args, 100, lengths).items()


@pytest.mark.parametrize("way", steps.WITHOUT)
def test_ours_less_a_part_gives_the_same_by_other_means(way, tmp_path, monkeypatch):
    """Log-probs and gradients; each replaced part is one that ours asks."""
    families.make("llava", tmp_path)
    model, _ = vlm.load(str(tmp_path))
    torch.manual_seed(0)
    model = lora.add_lora(model, 4, 8).eval()
    size = vlm.base_model(model).lm_head.weight.shape[1]
    prompt = vlm.Prompt(torch.randn(6, size), torch.arange(6)[None])
    monkeypatch.setattr(rollout, "VOCABULARY_TILE", 500)  # of 1018
    monkeypatch.setattr(layers, "RECOMPUTE_FROM", 0)
    asked = counted_operations(lambda: score(model, prompt))
    ours = score(model, prompt)
    monkeypatch.setattr(*steps.WITHOUT[way])
    theirs = score(model, prompt)
    assert counted_operations(lambda: score(model, prompt)) != asked
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def score(model, prompt):
    """→ log-probs [2, 3], all gradients of their sum."""
    model.zero_grad()
    logps, _, _ = rollout.completion_logps(model, [prompt], [[[5, 6, 7], [8, 9, 10]]])
    logps.sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
    return logps.detach(), torch.cat(gradients)


def counted_operations(work):
    """Counter of the operations that torch was given, and of their shapes."""
    with Operations() as operations:
        work()
    return operations.found


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, operation, types, inputs=(), options=None):
        outputs = operation(*inputs, **(options or {}))
        self.found[operation, getattr(outputs, "shape", None)] += 1
        return outputs


def test_bench_runs_and_stores_every_measurement(tmp_path):
    sizes = "--hidden 64 --layers 2 --heads 4 --kv-heads 2 --ffn 96 --vocab 1500 --arch llava --prompts 2"
    sizes += " --prompt-tokens 150 --completion-tokens 8 --shortest 3 --group-size 3"
    rounds = ("--rounds", 1, "--memory-rounds", 0, "--out", tmp_path / "out.jsonl")
    _, printed, _ = run_script("-m", "bench.bench_grpo", *sizes.split(), *rounds, "--ways", "engine", "trl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["way"], row["measured"]) for row in rows] == [("engine", "time"), ("trl", "time")]
    for row in rows:
        assert row["P"] == 150
        assert row["cpu"] == pytest.approx(sum(row[part] for part in steps.PARTS))
        assert min(row[part] for part in steps.PARTS) > 0
    assert "engine" in printed
    assert "floor:" in printed
