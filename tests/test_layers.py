"""The decoder's layers written out, against transformers' own: states, gradients, adapters, and when they are
off."""

import gc
import weakref

import pytest
import torch
from test_families import ALL
from torch.nn.functional import linear

from lib import layers, lora, prefix, vlm
from tests import families

GROUPS = [(7, [5, 1]), (4, [3])]  # prompts and their responses, 20 positions
TOLERANCE = 1e-5


@pytest.fixture
def recompute(monkeypatch):
    """As in rows of the usual size."""
    monkeypatch.setattr(layers, "RECOMPUTE_FROM", 0)


@pytest.fixture(params=ALL)
def model(request, tmp_path):
    """A tiny model with a LoRA that does something."""
    families.make(request.param, tmp_path)
    model, _ = vlm.load(str(tmp_path))
    model = lora.add_lora(model, 8, 16).eval()
    noise = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1, generator=noise)
    return model


def row(model):
    """What the decoder takes of one row of 20 positions, deepstack included where the family has it."""
    base = vlm.base_model(model)
    noise = torch.Generator().manual_seed(2)
    size = base.model.language_model.config.hidden_size
    wide = hasattr(base.model, "get_rope_index")
    positions = torch.arange(20).expand(3 if wide else 1, -1)
    deepstack = None
    if "Qwen3" in type(base).__name__:
        deepstack = torch.randn(2, 20, size, generator=noise)
    return vlm.decoder_inputs([vlm.Prompt(torch.randn(20, size, generator=noise), positions, deepstack)])


def off(a, b):
    return ((a - b).norm() / b.norm()).item()


def states(model, written_out, wanted=None):
    run = layers.written_out(model) if written_out else None
    if run is None:
        assert not written_out
        return prefix.decoder(vlm.base_model(model), row(model), prefix.Packed(GROUPS), wanted)
    return run(row(model), prefix.Packed(GROUPS), wanted)


def gradients(model, hidden):
    model.zero_grad()
    slope = torch.linspace(-1, 1, hidden.numel()).view_as(hidden)
    (hidden * slope).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("smallest", [0, 2**60])
@pytest.mark.parametrize("wanted", [None, [6, 7, 6, 19]])
def test_states_and_gradients_equal_transformers(model, wanted, smallest, monkeypatch):
    monkeypatch.setattr(layers, "RECOMPUTE_FROM", smallest)
    wanted = None if wanted is None else torch.tensor(wanted)
    ours = states(model, True, wanted)
    our_gradients = gradients(model, ours)
    theirs = states(model, False, wanted)
    assert ours.shape == theirs.shape
    found = off(ours.detach(), theirs.detach()), off(our_gradients, gradients(model, theirs))
    print(f"states {found[0]:.1e}, gradients {found[1]:.1e}")
    assert max(found) <= TOLERANCE


@torch.no_grad()
def test_weights_for_few_rows_give_the_same(model):
    run = layers.written_out(model, few_rows=True)
    ours = run(row(model), prefix.Packed(GROUPS))
    theirs = states(model, False)
    assert off(ours, theirs) <= TOLERANCE
    assert off(run.head(ours), vlm.base_model(model).lm_head(theirs)) <= TOLERANCE


@torch.no_grad()
def test_adapters_switched_off_changed_and_merged(model):
    """Off and changed give other states than the policy's; merged gives the same; unmerged again gives
    these."""
    policy = states(model, True)
    with model.disable_adapter():
        off_now = states(model, True)
        assert off(off_now, states(model, False)) <= TOLERANCE
    assert off(off_now, policy) > 1e-2
    model.add_adapter("reference", model.peft_config["default"], autocast_adapter_dtype=False)
    with lora.reference(model):  # a fresh one: the base
        assert torch.equal(states(model, True), off_now)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert torch.equal(states(model, True), policy)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.merge_adapter()
    assert off(states(model, True), policy) <= TOLERANCE
    model.unmerge_adapter()
    assert off(states(model, True), policy) <= TOLERANCE


def test_a_fresh_lora_starts_at_the_base_bit_by_bit(tmp_path):
    families.make("llava", tmp_path)
    model = lora.add_lora(vlm.load(str(tmp_path))[0], 4, 8)
    policy = states(model, True)
    with torch.no_grad(), lora.reference(model):
        assert policy.requires_grad and torch.equal(states(model, True), policy)


@pytest.mark.parametrize("model", ["qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize("why", ["bf16", "checkpointing", "dropout", "window", "family"])
def test_transformers_layers_where_they_serve_better_or_alone(model, why, monkeypatch):
    assert layers.written_out(model) is not None
    if why == "bf16":
        model.bfloat16()
    elif why == "checkpointing":
        model.gradient_checkpointing_enable()
    elif why == "dropout":
        model = lora.add_lora(vlm.base_model(model), 4, 8, dropout=0.1)
        assert layers.written_out(model.eval()) is not None
        model.train()
    elif why == "window":
        vlm.base_model(model).model.language_model.layers[1].self_attn.sliding_window = 512
    else:
        monkeypatch.setattr(vlm, "WRITTEN_OUT", ())
    assert layers.written_out(model) is None


@pytest.mark.parametrize("model", ["qwen2_5_vl"], indirect=True)
def test_no_folded_weight_outlives_its_layer(model, monkeypatch, recompute):
    """Without the collector of cycles: each is gone after its product, folded again for the backward pass,
    and gone."""
    copies = []
    most = []
    right = layers.FoldedLinear.apply

    def apply(x, weight, *others):
        copies.append(weakref.ref(weight))
        most.append(alive())
        return right(x, weight, *others)

    def alive():
        return sum(copy() is not None for copy in copies)

    monkeypatch.setattr(layers.FoldedLinear, "apply", apply)
    gc.disable()
    try:
        hidden = states(model, True)
        assert len(copies) == 4 * families.LAYERS and max(most) <= 1 and not alive()
        hidden.sum().backward()
        assert len(copies) == 8 * families.LAYERS and max(most) <= 4 and not alive()
    finally:
        gc.enable()


@pytest.mark.parametrize("model", ["qwen2_5_vl", "llava"], indirect=True)
def test_a_layer_leaves_its_products_to_the_backward_pass_and_nothing_else(model, recompute):
    """What is alive between the passes: a layer's input, attention, the outputs of its first three products;
    the last is the next layer's input."""
    text = vlm.base_model(model).model.language_model.config
    run = layers.written_out(model)
    inputs = row(model)
    gc.collect()
    before = tensors_alive()
    hidden = run(inputs, prefix.Packed([(20, [])]))
    gc.collect()
    held = tensors_alive() - before
    heads = text.num_attention_heads + 2 * text.num_key_value_heads
    head_dim = text.hidden_size // text.num_attention_heads
    columns = 3 * text.hidden_size + heads * head_dim + 2 * text.intermediate_size
    wanted = 4 * 20 * columns * families.LAYERS
    small = 4 * 20 * (4 * text.hidden_size + 2 * head_dim)  # the last norm's, positions
    assert hidden.requires_grad and wanted <= held <= wanted + small + 4 * 20 * families.LAYERS * 16


def tensors_alive():
    """Bytes of all storages that Python or a graph's Python part can reach."""
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_gradients_of_a_folded_product_by_autograd():
    """Of three outputs behind each other the first has one pair of factors, the second none, the third two;
    float64."""
    noise = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=noise, dtype=torch.float64)

    x = random(10, 6).requires_grad_()
    weight = random(9, 6)
    bias = random(9)
    lora_parts = [(0, 4, 0.5), (7, 9, 2.0), (7, 9, -1.0)]
    factors = []
    for start, end, _ in lora_parts:
        factors += [random(3, 6).requires_grad_(), random(end - start, 3).requires_grad_()]
    whole = weight.clone()
    for (start, end, scale), down, up in zip(lora_parts, factors[::2], factors[1::2], strict=True):
        added = torch.zeros(9, 6, dtype=torch.float64)
        added[start:end] = scale * up.detach() @ down.detach()
        whole += added
    ours = layers.FoldedLinear.apply(x, whole, bias, lora_parts, *factors)
    theirs = linear(x, weight, bias)
    for (start, end, scale), down, up in zip(lora_parts, factors[::2], factors[1::2], strict=True):
        added = scale * (x @ down.T) @ up.T
        theirs = theirs + torch.nn.functional.pad(added, (start, 9 - end))
    slope = random(10, 9)
    assert torch.allclose(ours, theirs)
    found = torch.autograd.grad(ours, [x, *factors], slope)
    wanted = torch.autograd.grad(theirs, [x, *factors], slope)
    assert all(torch.allclose(a, b) for a, b in zip(found, wanted, strict=True))
