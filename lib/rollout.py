"""Sampling and log-probs over a shared prefix. Knows no reward, no optimiser, no architecture.

B prompts   G responses a prompt (group)   N = B·G rows   P prompt tokens   C completion tokens   V vocabulary   D hidden size
"""

import functools
import hashlib
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch.nn.functional import linear, pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from lib import vlm

HEAD_CHUNK = 256  # response tokens whose [256, V] logits are alive at once


# ------------------------------------------------------------------------------------------------ shared prefix


class Packed:
    """One row of real tokens, [prompt | c1 … cG] of each group behind the last. A response sees its prompt and itself.

    It needs no L × L mask: the prompt is causal over itself, each response is one causal block over [prompt, itself].
    """

    def __init__(self, groups, keep=False):
        self.groups = groups  # [(P, [C1 … CG])]
        self.kept = (
            [] if keep else None
        )  # (keys, values) [1, Hkv, L, d] of each layer: what decoding goes on from
        self.masks = {}

    def __call__(self, layer, query, key, value):
        """query [1, H, L, d], key and value [1, Hkv, L, d] → [1, H, L, d]"""
        if self.kept is not None:
            self.kept.append((key, value))
        outputs, start = [], 0
        for size, lengths in self.groups:
            prefix = slice(start, start + size)
            prefix_key, prefix_value = key[:, :, prefix], value[:, :, prefix]
            outputs.append(
                scaled_dot_product_attention(
                    query[:, :, prefix], prefix_key, prefix_value, is_causal=True, enable_gqa=True
                )
            )
            start += size
            for length in lengths:
                own = slice(start, start + length)
                q = (
                    query[:, :, own].unflatten(1, (key.shape[1], -1)).flatten(2, 3)
                )  # [1, Hkv, H/Hkv·C, d]: keys are not repeated a head
                k, v = (
                    torch.cat([prefix_key, key[:, :, own]], 2),
                    torch.cat([prefix_value, value[:, :, own]], 2),
                )  # [1, Hkv, P + C, d]
                out = scaled_dot_product_attention(q, k, v, attn_mask=self._mask(size, length, q))
                outputs.append(out.unflatten(2, (-1, length)).flatten(1, 2))  # [1, H, C, d]
                start += length
        return torch.cat(outputs, 2)

    def _mask(self, size, length, query):
        """[H/Hkv·C, P + C] additive: 0 on the prompt, causal on the response."""
        if (size, length) not in self.masks:
            causal = torch.full((length, length), -torch.inf, dtype=query.dtype, device=query.device).triu(1)
            self.masks[size, length] = pad(causal, (size, 0)).repeat(query.shape[2] // length, 1)
        return self.masks[size, length]


class Decoding:
    """Caches of N responses that grow a token at a time: B prompts' keys and values, each held once, and every response's own.

    Scores of all responses to a prompt are one matrix product with its keys; one softmax goes over prompt and response.
    static: shapes stay as they are from token to token, so that a CUDA graph can repeat them; places not yet filled are masked.
    """

    GROW = {False: 64, True: 256}  # tokens; static: a graph lives as long

    def __init__(self, kept, sizes, n, static=False):
        def by_prompt(x):  # [1, Hkv, ΣP, d] → [B, Hkv, P, d]
            return pad_sequence(
                [part.transpose(0, 1) for part in x[0].split(sizes, 1)], batch_first=True
            ).transpose(1, 2)

        self.prefix = [
            torch.stack([by_prompt(key), by_prompt(value)]) for key, value in kept
        ]  # a layer: [2, B, Hkv, P, d]
        device = kept[0][0].device
        self.hole = (
            torch.arange(max(sizes), device=device) >= torch.tensor(sizes, device=device)[:, None]
        )  # [B, P]
        self.own = [
            p.new_empty(2, len(sizes) * n, p.shape[2], 0, p.shape[4]) for p in self.prefix
        ]  # a layer: [2, N, Hkv, C, d]
        self.grow, self.static, self.step = self.GROW[static], static, -1
        self.at, self.places = (
            torch.full((1,), -1, device=device),
            None,
        )  # static: the token's place, and all places
        self._arrange(torch.arange(len(sizes), device=device).repeat_interleave(n))

    def _arrange(self, owner):
        """owner [N], ascending: each response's prompt. Responses stand in a grid [B, width], which has holes once some are done."""
        counts = owner.bincount()
        self.owner, self.width = owner, int(counts.max())
        self.slot = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner]
        self.full = len(owner) == len(counts) * self.width

    def _spread(self, x):
        """[N, Hkv, r, …] → [B, Hkv, width·r, …]"""
        shape = (self.prefix[0].shape[1], self.width, *x.shape[1:])
        grid = x.view(shape) if self.full else x.new_zeros(shape).index_put((self.owner, self.slot), x)
        return grid.transpose(1, 2).flatten(2, 3)

    def _collect(self, grid):
        """[B, Hkv, width·r, …] → [N, Hkv, r, …]"""
        grid = grid.unflatten(2, (self.width, -1)).transpose(1, 2)
        return grid.flatten(0, 1) if self.full else grid[self.owner, self.slot]

    def keep(self, rows):
        """Drop all responses but `rows` (ascending indices), and prompts that have none left."""
        self.own = [own[:, rows] for own in self.own]
        alive, owner = self.owner[rows].unique(return_inverse=True)
        if len(alive) < len(self.hole):
            self.prefix, self.hole = [prefix[:, alive] for prefix in self.prefix], self.hole[alive]
        self._arrange(owner)

    def advance(self):
        self.step, self.at = self.step + 1, self.at.add_(1)
        if self.step % self.grow == 0:
            self.own = [pad(own, (0, 0, 0, self.grow)) for own in self.own]
            self.places = torch.arange(self.own[0].shape[3], device=self.at.device)

    def __call__(self, layer, query, key, value):
        """query [N, H, 1, d], key and value [N, Hkv, 1, d] → [N, H, 1, d]"""
        own_key, own_value = self.own[layer].index_copy_(
            3, self.at, torch.stack([key, value])
        )  # [N, Hkv, C, d]
        if not self.static:
            own_key, own_value = own_key[:, :, : self.step + 1], own_value[:, :, : self.step + 1]
        prefix_key, prefix_value = self.prefix[layer]  # [B, Hkv, P, d]
        query = (
            query.unflatten(1, (key.shape[1], -1))[:, :, :, 0] * query.shape[-1] ** -0.5
        )  # [N, Hkv, H/Hkv, d]
        shared = self._spread(query) @ prefix_key.transpose(2, 3)  # [B, Hkv, width·H/Hkv, P]
        shared = self._collect(shared.masked_fill(self.hole[:, None, None], -torch.inf))  # [N, Hkv, H/Hkv, P]
        own = query @ own_key.transpose(2, 3)  # [N, Hkv, H/Hkv, C]
        own = own.masked_fill(self.places > self.at, -torch.inf) if self.static else own
        scores = torch.cat([shared, own], -1).softmax(-1, dtype=torch.float32).to(value.dtype)
        shared, own = scores.split([prefix_key.shape[2], own.shape[-1]], -1)
        out = self._collect(self._spread(shared) @ prefix_value) + own @ own_value  # [N, Hkv, H/Hkv, d]
        return out.flatten(1, 2)[:, :, None]


def _decoder(base, embeds, positions, layout):
    """[N, L, D], [N, 3 or 1, L] → last hidden state [N, L, D] under a layout's attention."""
    decoder = base.model.language_model
    assert decoder.config._attn_implementation == vlm.SHARED_PREFIX, (
        "the layout would be ignored: load the model with vlm.load"
    )
    unused = embeds.new_zeros(1, 1, 1, 1)  # a mask of four dimensions: transformers builds none
    return decoder(
        inputs_embeds=embeds,
        attention_mask=unused,
        position_ids=vlm.as_rope(positions),
        use_cache=False,
        layout=layout,
    ).last_hidden_state


def _token(base, cache, tokens, position):
    """[N] token ids, [N, 3 or 1, 1] → their last hidden state [N, D]; the cache takes them in."""
    return _decoder(base, base.get_input_embeddings()(tokens[:, None]), position, cache)[:, 0]


class GraphedToken:
    """_token with a static cache as a CUDA graph: captured anew where rows have left or the cache has grown, replayed between."""

    def __init__(self):
        self.shape = None

    def __call__(self, base, cache, tokens, position):
        if self.shape != (shape := (len(tokens), cache.own[0].shape[3])):
            self.shape, self.graph, self.inputs = (
                shape,
                torch.cuda.CUDAGraph(),
                (tokens.clone(), position.clone()),
            )
            with torch.cuda.stream(
                side := torch.cuda.Stream()
            ):  # a run before the capture, as CUDA graphs ask for
                side.wait_stream(torch.cuda.default_stream())
                _token(base, cache, *self.inputs)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(self.graph):
                self.hidden = _token(base, cache, *self.inputs)
        for held, new in zip(self.inputs, (tokens, position)):
            held.copy_(new)
        self.graph.replay()
        return self.hidden


# ------------------------------------------------------------------------------------------------ sampling


@dataclass
class Sample:
    text: str
    ids: list[int]  # [C], the stop id included where the response ended by itself
    finished: bool  # False: cut off at max_new_tokens


def uniforms(n, length, *key):
    """[n, length] random numbers in [0, 1) that depend on `key` alone: not on batch, rank or what was drawn before."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1
    return torch.rand(n, length, generator=torch.Generator().manual_seed(seed))


@contextmanager
def _folded(model):
    """Inside, each linear layer of the decoder is one matmul with a second copy of its weight: LoRA added in, laid out for few rows.

    On a CPU in fp32 only, where it halves the time of a token. In bf16 the sum would round small LoRA updates away.
    The base is untouched: merging and unmerging would let it drift.
    """
    base, folded = vlm.base_model(model), []
    if base.lm_head.weight.dtype == torch.float32 and base.lm_head.weight.device.type == "cpu":
        modules = [*base.model.language_model.named_modules(), ("lm_head", base.lm_head)]
        loras = [(name, module) for name, module in modules if isinstance(module, LoraLayer)]
        inside = tuple(f"{name}." for name, _ in loras)
        linears = [
            (name, module)
            for name, module in modules
            if isinstance(module, torch.nn.Linear) and not name.startswith(inside)
        ]
        for _, module in loras + linears:
            plain = module.get_base_layer() if isinstance(module, LoraLayer) else module
            weight = plain.weight
            if isinstance(module, LoraLayer) and not module.disable_adapters:
                weight = sum((module.get_delta_weight(name) for name in module.active_adapters), weight)
            module.forward = functools.partial(
                linear, weight=weight.t().contiguous().t(), bias=plain.bias
            )  # laid out [in, out]
            folded.append(module)
    try:
        yield
    finally:
        for module in folded:
            del module.forward


@torch.no_grad()
def sample(
    model, processor, prompts, n, max_new_tokens, temperature, top_p=1.0, keys=None, part=None, static=False
):
    """n responses to each Prompt → list (a prompt) of lists of Sample. Prefills each prompt once.

    part: (first, last) of the n responses, where all of them would not fit: only these are drawn, and they are the same.

    keys: one hashable value a prompt; its responses are a function of it (seed, step, id), whatever the batch or the rank.
    temperature 0 is greedy. No top-k. Image ids are never drawn; every stop id ends a response.
    static: shapes that stay, on a GPU as CUDA graphs; rows that are done leave once half are. The same responses.
    """
    assert not model.training, "sampling in train() mode gives wrong text under gradient checkpointing"
    base = vlm.base_model(model)
    device = base.lm_head.weight.device
    stops, images = torch.tensor(vlm.stop_ids(model, processor), device=device), vlm.image_ids(model)
    draws, (start, end) = keys or range(len(prompts)), part or (0, n)
    noise = (
        torch.cat([uniforms(n, max_new_tokens, key)[start:end] for key in draws]).to(device)
        if temperature
        else None
    )
    n = end - start

    with _folded(model):
        # 1. Prefill: all prompts in one row, nothing padded.
        sizes = [len(p.embeds) for p in prompts]
        layout = Packed([(size, []) for size in sizes], keep=True)
        positions = torch.cat([p.positions for p in prompts], 1)[None]  # [1, 3, ΣP]
        hidden = _decoder(base, torch.cat([p.embeds for p in prompts])[None], positions, layout)[0]  # [ΣP, D]
        hidden = hidden[torch.tensor(sizes, device=device).cumsum(0) - 1].repeat_interleave(n, 0)  # [N, D]
        cache = Decoding(layout.kept, sizes, n, static)
        token_step = GraphedToken() if static and device.type == "cuda" else _token
        del layout

        # 2. Decode all N = B·n rows together; rows that are done leave the batch.
        first = torch.stack([p.positions.max() + 1 for p in prompts]).repeat_interleave(
            n
        )  # [N] position of the first response token
        rows, drawn = torch.arange(len(first), device=device), [[] for _ in range(len(first))]
        going = torch.ones_like(rows, dtype=torch.bool)
        for step in range(max_new_tokens):
            logits = base.lm_head(hidden).float()  # [N, V]
            logits[:, images] = -torch.inf
            tokens = _draw(logits, temperature, top_p, noise[rows, step] if temperature else None)  # [N]
            for row, token in zip(rows[going].tolist(), tokens[going].tolist()):
                drawn[row].append(token)
            going = going & ~torch.isin(tokens, stops)
            if step == max_new_tokens - 1 or not going.any():
                break
            if going.sum() < len(going) / (2 if static else 1):
                keep = going.nonzero()[:, 0]
                rows, tokens, going = rows[keep], tokens[keep], going[keep]
                cache.keep(keep)
            cache.advance()
            position = (first[rows] + step)[:, None, None].expand(-1, positions.shape[1], 1)  # [N, 3, 1]
            hidden = token_step(base, cache, tokens, position)
    ends = set(stops.tolist())
    samples = [Sample(vlm.decode(processor, ids), ids, ids[-1] in ends) for ids in drawn]
    return [samples[i : i + n] for i in range(0, len(samples), n)]


def _draw(logits, temperature, top_p, noise):
    """[N, V] logits → [N] token ids by inverse CDF of one random number a row."""
    if not temperature:
        return logits.argmax(-1)
    probs = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, index = probs.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0  # the token that crosses top_p stays
        probs = torch.zeros_like(probs).scatter_(-1, index, ordered)
    cdf = probs.cumsum(-1)
    return torch.searchsorted(cdf, noise[:, None] * cdf[:, -1:], right=True)[:, 0].clamp(
        max=logits.shape[-1] - 1
    )


def generate(
    model,
    processor,
    items,
    n=1,
    max_new_tokens=2048,
    temperature=0.8,
    top_p=1.0,
    keys=None,
    batch_rows=64,
    progress=None,
    static=False,
):
    """sample() for any number of (prompt text, image path): longest prompts first, at most `batch_rows` rows at once. In order of items."""
    keys = list(keys) if keys is not None else list(range(len(items)))
    order = sorted(range(len(items)), key=lambda i: -len(items[i][0]))
    results, size = [None] * len(items), max(1, batch_rows // n)
    for start in range(0, len(order), size):
        chunk = order[start : start + size]
        prompts = vlm.encode(model, processor, [items[i] for i in chunk])
        for first in range(
            0, n, batch_rows
        ):  # more than one part only where a single prompt has more responses than fit
            part = first, min(first + batch_rows, n)
            groups = sample(
                model,
                processor,
                prompts,
                n,
                max_new_tokens,
                temperature,
                top_p,
                [keys[i] for i in chunk],
                part,
                static,
            )
            for i, samples in zip(chunk, groups):
                results[i] = (results[i] or []) + samples
        if progress is not None:
            progress.update(len(chunk))
    return results


# ------------------------------------------------------------------------------------------------ log-probs


def completion_logps(model, prompts, completions, temperature=1.0, shared_prefix=True):
    """Log-probs of responses under the model as it is now (adapter, grad mode).

    prompts: list of Prompt; completions: for each a list of id lists, stop id included.
    shared_prefix: each prompt once, in one row with its responses; else a padded row for every response. The same numbers.
    → logps [N, C], entropy [N, C] (no graph), mask [N, C]; N rows in the order of completions; fp32, at the sampling temperature.
    """
    base = vlm.base_model(model)
    responses = [
        torch.tensor(ids, device=base.lm_head.weight.device) for group in completions for ids in group
    ]
    hidden = (_hidden_shared if shared_prefix else _hidden_plain)(base, prompts, completions)  # [T, D]
    logps, entropy = TokenLogps.apply(hidden, base.lm_head.weight, torch.cat(responses), temperature)  # [T]
    parts = (logps, entropy, torch.ones_like(logps, dtype=torch.bool))
    lengths = [len(ids) for ids in responses]
    return tuple(
        pad_sequence(flat.split(lengths), batch_first=True) for flat in parts
    )  # [T] → [N, C], False and 0 behind each response


def _hidden_shared(base, prompts, completions):
    """→ [T, D]: the state that predicts each response token, out of one packed row for all groups."""
    device, lookup = base.lm_head.weight.device, base.get_input_embeddings()
    embeds, positions, index, groups, start = [], [], [], [], 0
    for prompt, group in zip(prompts, completions, strict=True):
        embeds += [
            prompt.embeds,
            lookup(torch.tensor([i for ids in group for i in ids], device=device)).detach(),
        ]
        positions += [prompt.positions, *(vlm.response_positions(prompt, len(ids)) for ids in group)]
        groups.append((len(prompt.embeds), [len(ids) for ids in group]))
        last = (
            start + len(prompt.embeds) - 1
        )  # the prompt's last position predicts every response's first token
        start = last + 1
        for ids in group:
            index += [last, *range(start, start + len(ids) - 1)]
            start += len(ids)
    hidden = _decoder(base, torch.cat(embeds)[None], torch.cat(positions, 1)[None], Packed(groups))[
        0
    ]  # [L, D]
    return hidden[torch.tensor(index, device=device)]


def _hidden_plain(base, prompts, completions):
    """→ [T, D]: the same from one row [prompt | response | padding] for every response."""
    device = base.lm_head.weight.device
    pairs = [(prompt, ids) for prompt, group in zip(prompts, completions, strict=True) for ids in group]
    longest = max(len(prompt.embeds) + len(ids) for prompt, ids in pairs)
    embeds, positions, mask, index = [], [], [], []
    for row, (prompt, ids) in enumerate(pairs):
        size, response = (
            len(prompt.embeds),
            base.get_input_embeddings()(torch.tensor(ids, device=device)).detach(),
        )
        short = longest - size - len(ids)
        embeds.append(pad(torch.cat([prompt.embeds, response]), (0, 0, 0, short)))
        positions.append(
            pad(torch.cat([prompt.positions, vlm.response_positions(prompt, len(ids))], 1), (0, short))
        )
        mask.append([1] * (size + len(ids)) + [0] * short)
        index.append(
            row * longest + torch.arange(size - 1, size + len(ids) - 1, device=device)
        )  # the position that predicts each token
    hidden = base.model.language_model(
        inputs_embeds=torch.stack(embeds),
        attention_mask=torch.tensor(mask, device=device),
        position_ids=vlm.as_rope(torch.stack(positions)),
        use_cache=False,
    ).last_hidden_state
    return hidden.flatten(0, 1)[torch.cat(index)]  # [N·L, D] → [T, D]


class TokenLogps(torch.autograd.Function):
    """Head and log-softmax in one: hidden [T, D], weight [V, D], targets [T] → logps [T], entropy [T] (no graph), fp32.

    d logp / d hidden = (onehot − probs) · weight / temperature does not depend on the loss, so the forward pass leaves it
    behind: [HEAD_CHUNK, V] logits at most, and two head matmuls in all. The head is frozen.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        assert not weight.requires_grad, "the head is taken as frozen"
        logps, entropy, slopes = [], [], []
        for states, ids in zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK)):
            logits = linear(states, weight).float().div_(temperature)  # [chunk, V]
            logits -= logits.logsumexp(
                -1, keepdim=True
            )  # in place, and no elementwise product below: two [chunk, V] at once
            logps.append(logits.gather(-1, ids[:, None])[:, 0])
            probs = logits.exp()
            entropy.append(-torch.bmm(probs[:, None], logits[:, :, None])[:, 0, 0])
            if ctx.needs_input_grad[0]:
                probs.neg_()[torch.arange(len(ids), device=ids.device), ids] += 1  # onehot − probs
                slopes.append(probs.div_(temperature).to(weight.dtype) @ weight)  # [chunk, D]
        logps, entropy = torch.cat(logps), torch.cat(entropy)
        ctx.mark_non_differentiable(entropy)
        ctx.save_for_backward(torch.cat(slopes) if slopes else None)
        return logps, entropy

    @staticmethod
    def backward(ctx, grad, _):
        [slopes] = ctx.saved_tensors
        return (grad[:, None] * slopes).to(slopes.dtype), None, None, None
