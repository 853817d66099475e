"""Sampling and log-probs over a shared prefix. Knows no reward, no optimiser, no architecture.

B prompts   G responses a prompt (group)   N = B·G rows   P prompt tokens   C completion tokens
V vocabulary   D hidden size   d head size   H heads   Hkv key/value heads   L positions of a packed row
T tokens in all
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
STATIC_CACHE_HELP = "sampling in fixed shapes, as CUDA graphs on a GPU; never run on one [ours: off]"

# -------------------------------------------------------------------------------- shared prefix


class Packed:
    """Attention of one row of real tokens, [prompt | c1 … cG] of each group behind the last. A response sees
    its prompt and itself.

    It needs no L × L mask: the prompt is causal over itself, each response is one causal block over [prompt,
    itself].
    groups: [(P, [C1 … CG])]. keep: hold keys and values so that decoding can continue from them.
    """

    def __init__(self, groups, keep=False):
        self.groups = groups
        self.kept = [] if keep else None  # a layer: (keys, values), each [1, Hkv, L, d]
        self.masks = {}  # {(P, C): mask}, shared by the layers

    def __call__(self, layer, query, key, value):
        """query [1, H, L, d], key and value [1, Hkv, L, d] → [1, H, L, d]."""
        if self.kept is not None:
            self.kept.append((key, value))
        outputs = []
        start = 0
        for size, lengths in self.groups:
            prefix = slice(start, start + size)
            prefix_key = key[:, :, prefix]
            prefix_value = value[:, :, prefix]
            out = scaled_dot_product_attention(
                query[:, :, prefix], prefix_key, prefix_value, is_causal=True, enable_gqa=True
            )
            outputs.append(out)
            start += size
            for length in lengths:
                own = slice(start, start + length)
                # heads of one key/value head become rows of one product, so that keys are not repeated a head
                q = query[:, :, own].unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # [1, Hkv, H/Hkv·C, d]
                k = torch.cat([prefix_key, key[:, :, own]], 2)  # [1, Hkv, P + C, d]
                v = torch.cat([prefix_value, value[:, :, own]], 2)
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
    """Attention and caches of N responses that grow a token at a time: B prompts' keys and values, each held
    once, and every response's own.

    Scores of all responses to a prompt are one matrix product with its keys; one softmax goes over prompt and
    response.

        grid  responses laid out as [prompt, slot], with empty slots once some are done
        slot  a response's place among those of its prompt
        own   a response's keys and values, without its prompt's

    kept: of a Packed pass over the prompts, [(keys, values)] a layer. sizes: [B] prompt lengths. n: responses
    a prompt.
    fixed_shapes: shapes stay as they are from token to token, so that a CUDA graph can repeat them; places
    not yet filled are masked.
    """

    GROW = {False: 64, True: 256}  # tokens by which the caches grow; fixed shapes: a graph lives as long

    def __init__(self, kept, sizes, n, fixed_shapes=False):
        device = kept[0][0].device
        self.prefix = [torch.stack([_by_prompt(key, sizes), _by_prompt(value, sizes)]) for key, value in kept]
        lengths = torch.tensor(sizes, device=device)
        self.padding = torch.arange(max(sizes), device=device) >= lengths[:, None]  # [B, P]
        self.own = [p.new_empty(2, len(sizes) * n, p.shape[2], 0, p.shape[4]) for p in self.prefix]
        self.fixed_shapes = fixed_shapes
        self.grow = self.GROW[fixed_shapes]
        self.step = -1  # the response token being computed, from 0
        self.at = torch.full((1,), -1, device=device)  # the same, as a tensor that a graph can read
        self.places = None  # fixed shapes: 0, 1, … of every place of the caches
        self._arrange(torch.arange(len(sizes), device=device).repeat_interleave(n))

    def _arrange(self, owner):
        """owner [N], ascending: each response's prompt. Sets slots and width of the grid."""
        counts = owner.bincount()
        self.owner = owner
        self.width = int(counts.max())
        self.slot = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner]
        self.full = len(owner) == len(counts) * self.width

    def _to_grid(self, x):
        """[N, Hkv, r, …] → [B, Hkv, width·r, …]: lay the rows out as a grid, a line a prompt, so that one
        matrix product serves all its responses; empty slots are 0."""
        shape = (self.prefix[0].shape[1], self.width, *x.shape[1:])
        if self.full:
            grid = x.view(shape)
        else:
            grid = x.new_zeros(shape).index_put((self.owner, self.slot), x)
        return grid.transpose(1, 2).flatten(2, 3)

    def _from_grid(self, grid):
        """[B, Hkv, width·r, …] → [N, Hkv, r, …]."""
        grid = grid.unflatten(2, (self.width, -1)).transpose(1, 2)
        return grid.flatten(0, 1) if self.full else grid[self.owner, self.slot]

    def keep(self, rows):
        """Drop all responses but `rows` (ascending indices), and prompts that have none left."""
        self.own = [own[:, rows] for own in self.own]
        alive, owner = self.owner[rows].unique(return_inverse=True)
        if len(alive) < len(self.padding):
            self.prefix = [prefix[:, alive] for prefix in self.prefix]
            self.padding = self.padding[alive]
        self._arrange(owner)

    def advance(self):
        """Make room for the next token. To be called before each decoder pass."""
        self.step += 1
        self.at.add_(1)
        if self.step % self.grow == 0:
            self.own = [pad(own, (0, 0, 0, self.grow)) for own in self.own]
            self.places = torch.arange(self.own[0].shape[3], device=self.at.device)

    def __call__(self, layer, query, key, value):
        """query [N, H, 1, d], key and value [N, Hkv, 1, d] → [N, H, 1, d]."""
        own = self.own[layer].index_copy_(3, self.at, torch.stack([key, value]))  # [2, N, Hkv, C, d]
        own_key, own_value = own if self.fixed_shapes else own[:, :, :, : self.step + 1]
        prefix_key, prefix_value = self.prefix[layer]  # [B, Hkv, P, d]
        # [N, Hkv, H/Hkv, d]
        query = query.unflatten(1, (key.shape[1], -1))[:, :, :, 0] * query.shape[-1] ** -0.5
        to_prefix = self._to_grid(query) @ prefix_key.transpose(2, 3)  # [B, Hkv, width·H/Hkv, P]
        to_prefix = self._from_grid(to_prefix.masked_fill(self.padding[:, None, None], -torch.inf))
        to_own = query @ own_key.transpose(2, 3)  # [N, Hkv, H/Hkv, C]
        if self.fixed_shapes:
            to_own = to_own.masked_fill(self.places > self.at, -torch.inf)
        weights = torch.cat([to_prefix, to_own], -1).softmax(-1, dtype=torch.float32).to(value.dtype)
        to_prefix, to_own = weights.split([prefix_key.shape[2], own_key.shape[2]], -1)
        # [N, Hkv, H/Hkv, d]
        out = self._from_grid(self._to_grid(to_prefix) @ prefix_value) + to_own @ own_value
        return out.flatten(1, 2)[:, :, None]


def _by_prompt(x, sizes):
    """[1, Hkv, ΣP, d] → [B, Hkv, P, d], padded."""
    parts = [part.transpose(0, 1) for part in x[0].split(sizes, 1)]
    return pad_sequence(parts, batch_first=True).transpose(1, 2)


def _decoder(base, embeds, positions, layout):
    """[N, L, D], [N, 3 or 1, L] → last hidden state [N, L, D] under a layout's attention."""
    decoder = base.model.language_model
    known = decoder.config._attn_implementation == vlm.SHARED_PREFIX
    assert known, "the layout would be ignored: load the model with vlm.load"
    outputs = decoder(
        inputs_embeds=embeds,
        # unused; with four dimensions transformers builds none of its own
        attention_mask=embeds.new_zeros(1, 1, 1, 1),
        position_ids=vlm.as_rope(positions),
        use_cache=False,
        layout=layout,
    )
    return outputs.last_hidden_state


def _token(base, cache, tokens, position):
    """[N] token ids, [N, 3 or 1, 1] → their last hidden state [N, D]; the cache takes them in."""
    return _decoder(base, base.get_input_embeddings()(tokens[:, None]), position, cache)[:, 0]


class GraphedToken:
    """_token in fixed shapes as a CUDA graph: captured anew where rows have left or the cache has grown, else
    replayed."""

    def __init__(self):
        self.shape = None

    def __call__(self, base, cache, tokens, position):
        shape = len(tokens), cache.own[0].shape[3]
        if self.shape != shape:
            self.shape = shape
            self._capture(base, cache, tokens, position)
        self.tokens.copy_(tokens)
        self.position.copy_(position)
        self.graph.replay()
        return self.hidden

    def _capture(self, base, cache, tokens, position):
        self.tokens = tokens.clone()
        self.position = position.clone()
        self.graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(side):  # a run before the capture, as CUDA graphs ask for
            _token(base, cache, self.tokens, self.position)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self.graph):
            self.hidden = _token(base, cache, self.tokens, self.position)


# -------------------------------------------------------------------------------- sampling


@dataclass
class Sample:
    text: str
    completion_ids: list[int]  # [C], the stop id included where the response ended by itself
    finished: bool  # False: cut off at max_new_tokens


def uniforms(n, length, *key):
    """[n, length] random numbers in [0, 1) that depend on `key` alone: not on batch, rank or what was drawn
    before."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1
    return torch.rand(n, length, generator=torch.Generator().manual_seed(seed))


@contextmanager
def _folded(model):
    """Inside, each linear layer of the decoder is one product with a second copy of its weight, LoRA added
    in.

    On a CPU in fp32 only, where it halves the time of a token. In bf16 the sum would round small LoRA updates
    away. The base is untouched: merging and unmerging would let it drift.
    """
    base = vlm.base_model(model)
    weight = base.lm_head.weight
    folded = []
    if weight.dtype == torch.float32 and weight.device.type == "cpu":
        for module, plain in _linears(base):
            weight = plain.weight
            if isinstance(module, LoraLayer) and not module.disable_adapters:
                for name in module.active_adapters:
                    weight = weight + module.get_delta_weight(name)
            # stored [in, out], so that a product with few rows reads memory in order
            weight = weight.t().contiguous().t()
            module.forward = functools.partial(linear, weight=weight, bias=plain.bias)
            folded.append(module)
    try:
        yield
    finally:
        for module in folded:
            del module.forward


def _linears(base):
    """Yield (module that is called, plain linear layer in it) of decoder and head."""
    modules = [*base.model.language_model.named_modules(), ("lm_head", base.lm_head)]
    inside = tuple(f"{name}." for name, module in modules if isinstance(module, LoraLayer))
    for name, module in modules:
        if isinstance(module, LoraLayer):
            yield module, module.get_base_layer()
        elif isinstance(module, torch.nn.Linear) and not name.startswith(inside):
            yield module, module


@torch.no_grad()
def sample(
    model, processor, prompts, n, max_new_tokens, temperature, top_p=1.0, keys=None, part=None, static=False
):
    """n responses to each Prompt → list (a prompt) of lists of Sample. Prefills each prompt once.

    keys: one hashable value a prompt; its responses are a function of it (seed, step, id), whatever the batch
    or the rank.
    part: (first, last) of the n responses, where all of them would not fit: only these are drawn, and they
    are the same. temperature 0 is greedy. No top-k. Image ids are never drawn; every stop id ends a response.
    static: shapes that stay, on a GPU as CUDA graphs; rows that are done leave once half are. The same
    responses.
    """
    assert not model.training, "sampling in train() mode gives wrong text under gradient checkpointing"
    base = vlm.base_model(model)
    device = base.lm_head.weight.device
    start, end = part or (0, n)
    noise = None
    if temperature:
        keys = keys or range(len(prompts))
        noise = torch.cat([uniforms(n, max_new_tokens, key)[start:end] for key in keys]).to(device)  # [N, C]
    stops = torch.tensor(vlm.stop_ids(model, processor), device=device)
    with _folded(model):
        hidden, cache = _prefill(base, prompts, end - start, static)
        draw = functools.partial(_draw, temperature=temperature, top_p=top_p)
        drawn = _decode(
            base, cache, hidden, prompts, stops, vlm.image_ids(model), max_new_tokens, draw, noise
        )
    ends = set(stops.tolist())
    samples = [Sample(vlm.decode(processor, ids), ids, ids[-1] in ends) for ids in drawn]
    return [samples[i : i + end - start] for i in range(0, len(samples), end - start)]


def _prefill(base, prompts, n, static):
    """All prompts in one row, nothing padded → the state that predicts each response's first token [N, D],
    Decoding."""
    sizes = [len(prompt.embeds) for prompt in prompts]
    layout = Packed([(size, []) for size in sizes], keep=True)
    positions = torch.cat([prompt.positions for prompt in prompts], 1)[None]  # [1, 3 or 1, ΣP]
    embeds = torch.cat([prompt.embeds for prompt in prompts])[None]  # [1, ΣP, D]
    hidden = _decoder(base, embeds, positions, layout)[0]  # [ΣP, D]
    last = torch.tensor(sizes, device=hidden.device).cumsum(0) - 1
    return hidden[last].repeat_interleave(n, 0), Decoding(layout.kept, sizes, n, static)


def _decode(base, cache, hidden, prompts, stops, banned, max_new_tokens, draw, noise):
    """Draw token after token for all N rows together; rows that are done leave the batch. → [N] lists of
    ids."""
    device = hidden.device
    token_step = GraphedToken() if cache.fixed_shapes and device.type == "cuda" else _token
    first = torch.stack([prompt.positions.max() + 1 for prompt in prompts])
    first = first.repeat_interleave(len(hidden) // len(prompts))  # [N] position of the first response token
    rows = torch.arange(len(hidden), device=device)
    going = torch.ones_like(rows, dtype=torch.bool)
    drawn = [[] for _ in range(len(hidden))]
    for step in range(max_new_tokens):
        logits = base.lm_head(hidden).float()  # [N, V]
        logits[:, banned] = -torch.inf
        tokens = draw(logits, noise=None if noise is None else noise[rows, step])  # [N]
        for row, token in zip(rows[going].tolist(), tokens[going].tolist(), strict=True):
            drawn[row].append(token)
        going = going & ~torch.isin(tokens, stops)
        if step == max_new_tokens - 1 or not going.any():
            break
        if going.sum() < len(going) / (2 if cache.fixed_shapes else 1):
            keep = going.nonzero()[:, 0]
            rows = rows[keep]
            tokens = tokens[keep]
            going = going[keep]
            cache.keep(keep)
        cache.advance()
        position = (first[rows] + step)[:, None, None]  # [N, 1, 1]
        position = position.expand(-1, len(prompts[0].positions), 1)  # [N, 3 or 1, 1]
        hidden = token_step(base, cache, tokens, position)
    return drawn


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
    found = torch.searchsorted(cdf, noise[:, None] * cdf[:, -1:], right=True)[:, 0]
    return found.clamp(max=logits.shape[-1] - 1)


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
    """sample() for any number of (prompt text, image path): longest prompts first, at most `batch_rows` rows
    at once.

    → for each item, in the order of items, a list of n Sample. progress: a tqdm bar that counts items.
    """
    keys = list(keys) if keys is not None else list(range(len(items)))
    order = sorted(range(len(items)), key=lambda i: -len(items[i][0]))
    results = [[] for _ in items]
    size = max(1, batch_rows // n)
    for start in range(0, len(order), size):
        chunk = order[start : start + size]
        prompts = vlm.encode(model, processor, [items[i] for i in chunk])
        chunk_keys = [keys[i] for i in chunk]
        # more than one part only where a single prompt has more responses than fit
        for first in range(0, n, batch_rows):
            part = first, min(first + batch_rows, n)
            groups = sample(
                model, processor, prompts, n, max_new_tokens, temperature, top_p, chunk_keys, part, static
            )
            for i, samples in zip(chunk, groups, strict=True):
                results[i] += samples
        if progress is not None:
            progress.update(len(chunk))
    return results


# -------------------------------------------------------------------------------- log-probs


def completion_logps(model, prompts, completions, temperature=1.0, shared_prefix=True):
    """Log-probs of responses under the model as it is now (adapter, grad mode), fp32, at the sampling
    temperature.

    prompts: list of Prompt; completions: for each a list of id lists, stop id included. Raises ValueError
    where the two differ in number. shared_prefix: each prompt once, in one row with its responses; else a
    padded row for every
    response: the same numbers.
    → logps [N, C], entropy [N, C] (no graph), completion_mask [N, C]; N rows in the order of completions.
    """
    base = vlm.base_model(model)
    weight = base.lm_head.weight
    responses = [torch.tensor(ids, device=weight.device) for group in completions for ids in group]
    hidden_states = _hidden_shared if shared_prefix else _hidden_plain
    hidden = hidden_states(base, prompts, completions)  # [T, D]
    logps, entropy = TokenLogps.apply(hidden, weight, torch.cat(responses), temperature)  # [T]
    lengths = [len(ids) for ids in responses]
    parts = (logps, entropy, torch.ones_like(logps, dtype=torch.bool))
    # [T] → [N, C]: 0 and False behind each response
    return tuple(pad_sequence(part.split(lengths), batch_first=True) for part in parts)


def _hidden_shared(base, prompts, completions):
    """→ [T, D]: the state that predicts each response token, out of one packed row for all groups."""
    device = base.lm_head.weight.device
    lookup = base.get_input_embeddings()
    embeds, positions, index, groups = [], [], [], []
    start = 0
    for prompt, group in zip(prompts, completions, strict=True):
        tokens = torch.tensor([i for ids in group for i in ids], device=device)
        embeds += [prompt.embeds, lookup(tokens).detach()]
        positions += [prompt.positions, *(vlm.response_positions(prompt, len(ids)) for ids in group)]
        groups.append((len(prompt.embeds), [len(ids) for ids in group]))
        # the prompt's last position predicts every response's first token
        last = start + len(prompt.embeds) - 1
        start = last + 1
        for ids in group:
            index += [last, *range(start, start + len(ids) - 1)]
            start += len(ids)
    # [L, D]
    hidden = _decoder(base, torch.cat(embeds)[None], torch.cat(positions, 1)[None], Packed(groups))[0]
    return hidden[torch.tensor(index, device=device)]


def _hidden_plain(base, prompts, completions):
    """→ [T, D]: the same from one row [prompt | response | padding] for every response."""
    device = base.lm_head.weight.device
    lookup = base.get_input_embeddings()
    pairs = []
    for prompt, group in zip(prompts, completions, strict=True):
        pairs += [(prompt, torch.tensor(ids, device=device)) for ids in group]
    longest = max(len(prompt.embeds) + len(ids) for prompt, ids in pairs)
    embeds, positions, mask, index = [], [], [], []
    for row, (prompt, ids) in enumerate(pairs):
        size = len(prompt.embeds)
        short = longest - size - len(ids)
        embeds.append(pad(torch.cat([prompt.embeds, lookup(ids).detach()]), (0, 0, 0, short)))
        response = vlm.response_positions(prompt, len(ids))
        positions.append(pad(torch.cat([prompt.positions, response], 1), (0, short)))
        mask.append([1] * (size + len(ids)) + [0] * short)
        # the position that predicts each token
        before = torch.arange(size - 1, size + len(ids) - 1, device=device)
        index.append(row * longest + before)
    outputs = base.model.language_model(
        inputs_embeds=torch.stack(embeds),
        attention_mask=torch.tensor(mask, device=device),
        position_ids=vlm.as_rope(torch.stack(positions)),
        use_cache=False,
    )
    return outputs.last_hidden_state.flatten(0, 1)[torch.cat(index)]  # [N·L, D] → [T, D]


class TokenLogps(torch.autograd.Function):
    """Head and log-softmax in one: hidden [T, D], weight [V, D], targets [T] → logps [T], entropy [T] (no
    graph), fp32.

    d logp / d hidden = (onehot − probs) · weight / temperature does not depend on the loss, so the forward
    pass leaves it
    behind: [HEAD_CHUNK, V] logits at most, and two head matmuls in all. The head is frozen.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        assert not weight.requires_grad, "the head is taken as frozen"
        logps, entropy, slopes = [], [], []
        for states, ids in zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True):
            logits = linear(states, weight).float().div_(temperature)  # [chunk, V]
            logits -= logits.logsumexp(-1, keepdim=True)  # in place: two [chunk, V] at once, not three
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
