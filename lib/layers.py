"""The decoder's layers written out for fp32 on a CPU: fewer, larger products, LoRA folded into the weights.

For layers of one form (vlm.WRITTEN_OUT): two norms, q k v o, gate up down, rotary positions. q, k and v are
one product, gate and up another, each with its W + s·B·A; the last layer goes on only where its states are
wanted. Up to the rounding of fp32 the numbers are those of transformers' own layers. Knows no sampling, no
reward.

    N rows   L positions of a row   D hidden size   H heads   Hkv key/value heads   d head size   r LoRA rank
"""

from functools import partial

import torch
from peft.tuners.lora import LoraLayer
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lib import vlm
from lib.products import PRODUCTS, few_rows_linear, linear

# Of a layer its products are kept for the backward pass; all else is cheap, and computed again. Only where
# the input of a layer has so many numbers: with 190 000 it costs an eighth of a step, with 790 000 3 %.
RECOMPUTE_FROM = 2**18
KEEP_PRODUCTS = {
    "use_reentrant": False,
    "preserve_rng_state": False,  # there is no dropout
    # the last product of a layer becomes its output, in place
    "context_fn": partial(create_selective_checkpoint_contexts, PRODUCTS, allow_cache_entry_mutation=True),
}


def written_out(model, few_rows=False):
    """The decoder as a WrittenOut, under the adapter that is active now; None where transformers' own layers
    serve better or alone:

    on a GPU; in bf16, where the sum would round small LoRA updates away; under gradient checkpointing; with
    dropout; in families of another form.
    few_rows: without gradients, weights laid out for the products of decoding, the head's too.

    Weights are folded layer by layer, and again for the backward pass; few_rows: once, which costs the memory
    of all of them and the head. The model is untouched: merging and unmerging would let it drift.
    """
    base = vlm.base_model(model)
    decoder = base.model.language_model
    head = base.lm_head.weight
    plain = head.dtype == torch.float32 and head.device.type == "cpu"
    if not plain or not _known(decoder) or base.is_gradient_checkpointing or _has_dropout(decoder):
        return None
    return WrittenOut(base, few_rows)


def _known(decoder):
    """Whether all layers are of the written-out form; one that looks back a window is not."""
    for layer in decoder.layers:
        if type(layer).__name__ not in vlm.WRITTEN_OUT:
            return False
        if getattr(layer.self_attn, "sliding_window", None):
            return False
    return True


def _has_dropout(decoder):
    for module in decoder.modules():
        if isinstance(module, torch.nn.Dropout) and module.p and module.training:
            return True
    return False


class WrittenOut:
    """The whole decoder. head: hidden states → logits."""

    def __init__(self, base, few_rows):
        decoder = base.model.language_model
        self.rotary = decoder.rotary_emb
        self.norm = decoder.norm
        self.layers = [Layer(layer, few_rows) for layer in decoder.layers]
        self.head = few_rows_linear(base.lm_head.weight, base.lm_head.bias) if few_rows else base.lm_head

    def __call__(self, inputs, layout, wanted=None):
        """vlm.decoder_inputs or vlm.token_inputs of N rows → last hidden state [N, L, D] under a layout's
        attention. wanted: the places of these rows [T] alone → [N, T, D]."""
        x = inputs["inputs_embeds"]
        cos, sin = self.rotary(x, inputs["position_ids"])  # [N, L, d]
        before, behind = sin.chunk(2, -1)
        sin = torch.cat([-before, behind], -1)
        cos = cos[:, None]
        sin = sin[:, None]
        added = inputs.get("deepstack_visual_embeds", ())
        for i, layer in enumerate(self.layers):
            last = i + 1 == len(self.layers)
            if torch.is_grad_enabled() and x.numel() >= RECOMPUTE_FROM:
                layer = partial(checkpoint, layer, **KEEP_PRODUCTS)
            x = layer(x, cos, sin, partial(layout, i), wanted if last else None)
            if i < len(added):
                x = x + added[i].view_as(x)
        return self.norm(x)


class Layer:
    """One decoder layer."""

    def __init__(self, layer, few_rows):
        attention = layer.self_attn
        mlp = layer.mlp
        self.head_dim = attention.head_dim
        self.key_heads = attention.k_proj.out_features // attention.head_dim
        self.norms = layer.input_layernorm, layer.post_attention_layernorm
        self.query_norm = getattr(attention, "q_norm", torch.nn.Identity())  # Qwen3-VL
        self.key_norm = getattr(attention, "k_norm", torch.nn.Identity())
        product = _few_rows if few_rows else Folded
        self.query_key_value = product([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out = product([attention.o_proj])
        self.gate_up = product([mlp.gate_proj, mlp.up_proj])
        self.down = product([mlp.down_proj])
        self.activation = mlp.act_fn

    def __call__(self, x, cos, sin, attend, wanted):
        """x [N, L, D], cos and sin [N, 1, L, d], attend(query, key, value) → [N, L or T, D]."""
        heads = self.query_key_value(self.norms[0](x))
        heads = heads.unflatten(-1, (-1, self.head_dim))  # [N, L, H + 2·Hkv, d]
        heads = heads.transpose(1, 2)
        query_heads = heads.shape[1] - 2 * self.key_heads
        query, key, value = heads.split([query_heads, self.key_heads, self.key_heads], 1)
        query = self.query_norm(query)
        key = self.key_norm(key)
        query = rotate(query, cos, sin)
        key = rotate(key, cos, sin)
        out = attend(query, key, value).transpose(1, 2).flatten(2)  # [N, L, H·d]
        if wanted is not None:
            x = x[:, wanted]
            out = out[:, wanted]
        x = x + self.out(out)
        gate_up = self.gate_up(self.norms[1](x))
        gate, up = gate_up.chunk(2, -1)
        out = self.down(self.activation(gate) * up)
        return out.add_(x)  # in place, or both would be kept; no gradient asks for the product


def rotate(x, cos, sin):
    """Rotary positions. sin: its first half negative, so that the halves of x need only change places."""
    half = x.shape[-1] // 2
    return torch.addcmul(x * cos, x.roll(half, -1), sin)


class Folded:
    """x → the outputs of linear layers behind each other, in one product; LoRA as it is active now."""

    def __init__(self, modules):
        self.weights = []
        self.biases = []
        self.lora = []  # of each pair of factors: its first output, its last + 1, its scale
        self.factors = []  # A and B of each of `lora`
        start = 0
        for module in modules:
            plain = module.get_base_layer() if isinstance(module, LoraLayer) else module
            self.weights.append(plain.weight.detach())
            if plain.bias is not None:
                self.biases.append(plain.bias.detach())
            end = start + module.out_features
            for name in _active(module):
                self.lora.append((start, end, module.scaling[name]))
                self.factors += [module.lora_A[name].weight, module.lora_B[name].weight]
            start = end
        assert len(self.biases) in (0, len(modules)), "some of these layers have a bias, and some none"

    def fold(self):
        """→ weight [out, in], a copy, bias [out] or None."""
        weight = torch.cat(self.weights)
        pairs = zip(self.lora, self.factors[::2], self.factors[1::2], strict=True)
        for (start, end, scale), down, up in pairs:
            weight[start:end].addmm_(up.detach(), down.detach(), alpha=scale)
        return weight, torch.cat(self.biases) if self.biases else None

    def __call__(self, x):
        rows = x.flatten(0, -2)
        out = FoldedLinear.apply(rows, *self.fold(), self.lora, *self.factors)
        return out.view(*x.shape[:-1], -1)


def _few_rows(modules):
    """What Folded is, for decoding: folded once."""
    return few_rows_linear(*Folded(modules).fold())


def _active(module):
    """Names of the adapters that a linear layer adds now."""
    if not isinstance(module, LoraLayer) or module.disable_adapters or module.merged:
        return []
    return [name for name in module.active_adapters if name in module.lora_A]


class FoldedLinear(torch.autograd.Function):
    """linear(x, weight, bias), where `weight` has LoRA in it, with gradients of x and of LoRA's factors.

    x [R, in], weight [out, in]. lora: of each pair of factors A [r, in], B [out', r] its first output, its
    last + 1, its scale. Of the pass only x is saved. The frozen weight has no gradient.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, lora, *factors):
        ctx.lora = lora
        ctx.save_for_backward(x, weight, *factors)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight, *factors = ctx.saved_tensors
        grad_x = linear(grad, weight.t()) if ctx.needs_input_grad[0] else None
        slopes = []
        for start, end, scale in ctx.lora:
            down = factors.pop(0)
            up = factors.pop(0)
            part = grad[:, start:end]  # [R, out']
            inner = x @ down.T  # [R, r]
            inner_slope = part @ up
            slopes.append((scale * inner_slope).T @ x)
            slopes.append(part.T @ (scale * inner))
        return grad_x, None, None, None, *slopes
