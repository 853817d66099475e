"""Sampling and log-probs of responses. Knows no reward, no optimiser, no architecture.

B prompts   G responses a prompt (group)   N = B·G rows   P prompt tokens   C completion tokens
V vocabulary   D hidden size   L positions of a packed row   T response tokens in all
"""

import hashlib
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.utils.rnn import pad_sequence

import common
from common import Stopped
from lib import layers, vlm
from lib.prefix import Decoding, GraphedToken, Packed, decoder, token
from lib.products import linear

VOCABULARY_TILE = 1024  # columns of [T, V] logits that are alive at once
# tokens between two looks at which rows are done: a look waits for the GPU
LOOK_EVERY = {"cpu": 1, "cuda": 16}
STATIC_CACHE_HELP = "sampling in fixed shapes, as CUDA graphs on a GPU; never run on one [ours: off]"

# -------------------------------------------------------------------------------- sampling


@dataclass
class Sample:
    text: str
    completion_ids: list[int]  # [C], the stop id included where the response ended by itself
    finished: bool  # False: cut off at max_new_tokens
    logps: list[float] | None = None  # [C] as they were drawn, at the sampling temperature; None where greedy


def uniforms(n, length, *key):
    """[n, length] random numbers in [0, 1) that depend on `key` alone: not on batch, rank or what was drawn
    before."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(n, length, generator=generator)


@torch.no_grad()
def sample(
    model,
    processor,
    prompts,
    n,
    max_new_tokens,
    temperature,
    top_p=1.0,
    keys=None,
    part=None,
    static=False,
):
    """n responses to each Prompt → list (a prompt) of lists of Sample. Prefills each prompt once.

    keys: one hashable value a prompt; its responses are a function of it (seed, step, id), whatever the batch
    or rank.
    part: (first, last) of the n responses, where all would not fit: only these are drawn, and they are the
    same. temperature 0 is greedy. No top-k. Image ids are never drawn; every stop id ends a response.
    static: shapes that stay, on a GPU as CUDA graphs; rows that are done leave once half are. The same
    responses.
    """
    assert not model.training, "sampling in train() mode gives wrong text under gradient checkpointing"
    base = vlm.base_model(model)
    device = base.lm_head.weight.device
    start, end = part or (0, n)
    n = end - start
    stops = vlm.stop_ids(model, processor)
    rules = Rules(
        temperature,
        top_p,
        torch.tensor(stops, device=device),
        torch.tensor(vlm.image_ids(model), device=device),
    )
    noise = None
    if temperature:
        draws = [uniforms(end, max_new_tokens, key)[start:] for key in keys or range(len(prompts))]
        noise = torch.cat(draws).to(device)  # [N, C]
    written_out = layers.written_out(model, few_rows=True)
    run = written_out or partial(decoder, base)
    head = written_out.head if written_out else base.lm_head
    hidden, cache = _prefill(run, prompts, n, static)
    token_step = GraphedToken() if cache.fixed_shapes and device.type == "cuda" else token
    advance = partial(token_step, base, run, cache)
    completions = _decode(head, advance, cache, hidden, prompts, max_new_tokens, rules, noise)
    samples = []
    for ids, logps in completions:
        logps = logps if temperature else None
        samples.append(Sample(vlm.decode(processor, ids), ids, ids[-1] in stops, logps))
    return [samples[i : i + n] for i in range(0, len(samples), n)]


@dataclass
class Rules:
    """How a token is drawn, and which ids end a response (stops) or are never drawn (banned)."""

    temperature: float
    top_p: float
    stops: torch.Tensor
    banned: torch.Tensor


def _prefill(run, prompts, n, static):
    """All prompts in one row, nothing padded → states that predict the first tokens [N, D], Decoding."""
    sizes = [len(prompt.embeds) for prompt in prompts]
    layout = Packed([(size, []) for size in sizes], keep=True)
    inputs = vlm.decoder_inputs([vlm.join(prompts)])
    last = torch.tensor(sizes, device=prompts[0].embeds.device).cumsum(0) - 1
    hidden = run(inputs, layout, last)[0]  # [B, D]
    hidden = hidden.repeat_interleave(n, 0)
    return hidden, Decoding(layout.kept, sizes, n, static)


def _decode(head, advance, cache, hidden, prompts, max_new_tokens, rules, noise):
    """Draw token after token for all N rows together; rows that are done leave the batch. → [N] lists of
    ids."""
    device = hidden.device
    shrink_at = 0.5 if cache.fixed_shapes else 1.0  # rows leave once no more than this share goes on
    first = torch.stack([prompt.positions.max() + 1 for prompt in prompts])
    first = first.repeat_interleave(len(hidden) // len(prompts))  # [N] position of the first response token
    rows = torch.arange(len(hidden), device=device)
    going = torch.ones_like(rows, dtype=torch.bool)
    drawn = rows.new_zeros(len(rows), max_new_tokens)
    drawn_logps = drawn.float()
    lengths = torch.full_like(rows, max_new_tokens)
    for step in range(max_new_tokens):
        logits = head(hidden).float()  # [N, V]
        logits.index_fill_(1, rules.banned, -torch.inf)
        chance = None if noise is None else noise[rows, step]
        tokens, logps = _draw(logits, rules.temperature, rules.top_p, chance)  # [N], [N]
        drawn[rows, step] = tokens
        drawn_logps[rows, step] = logps
        stopped = going & torch.isin(tokens, rules.stops)
        lengths[rows] = torch.where(stopped, step + 1, lengths[rows])
        going = going & ~stopped
        if step + 1 == max_new_tokens:
            break
        if (step + 1) % LOOK_EVERY[device.type] == 0:
            left = going.nonzero()[:, 0]  # KEEP: the only line of this loop that waits for a GPU
            if len(left) == 0:
                break
            if len(left) < len(going) and len(left) <= shrink_at * len(going):
                rows = rows[left]
                tokens = tokens[left]
                going = going[left]
                cache.keep(left)
        cache.advance()
        positions = first[rows] + step
        positions = positions[:, None].expand(-1, len(prompts[0].positions))  # [N, 3 or 1]
        hidden = advance(tokens, positions)
    lengths = lengths.tolist()
    both = zip(drawn.tolist(), drawn_logps.tolist(), lengths, strict=True)
    return [(ids[:length], logps[:length]) for ids, logps, length in both]


def _draw(logits, temperature, top_p, noise):
    """[N, V] logits → [N] token ids by inverse CDF of one random number a row, [N] their log-probs (before
    top-p)."""
    if not temperature:
        return logits.argmax(-1), logits.new_zeros(len(logits))
    probs = (logits / temperature).softmax(-1)
    allowed = probs
    if top_p < 1:
        ordered, index = probs.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered[before >= top_p] = 0  # the token that crosses top_p stays
        allowed = torch.zeros_like(probs).scatter_(-1, index, ordered)
    cdf = allowed.cumsum(-1)
    threshold = noise[:, None] * cdf[:, -1:]
    tokens = torch.searchsorted(cdf, threshold, right=True)  # [N, 1]
    tokens = tokens.clamp(max=logits.shape[-1] - 1)
    return tokens[:, 0], probs.gather(1, tokens)[:, 0].log()


def sample_in_parts(model, processor, prompts, n, max_new_tokens, temperature, rows, keys=None, **options):
    """sample() with at most `rows` responses at once, and fewer where a GPU has no room for them.

    → (list (a prompt) of lists of n Sample, rows that fitted). Raises Stopped where not even one fits.
    """
    if keys is None:
        keys = range(len(prompts))
    keys = list(keys)
    groups = []
    while len(groups) < len(prompts):
        size = max(1, rows // n)
        chunk = slice(len(groups), len(groups) + size)
        found = [[] for _ in prompts[chunk]]
        try:
            for first in range(0, n, rows):  # several parts only where one prompt has more responses than fit
                part = first, min(first + rows, n)
                drawn = sample(
                    *(model, processor, prompts[chunk], n, max_new_tokens, temperature),
                    keys=keys[chunk],
                    part=part,
                    **options,
                )
                for group, samples in zip(found, drawn, strict=True):
                    group += samples
        except torch.OutOfMemoryError as error:
            if rows == 1:
                fault = common.first_line(error)
                raise Stopped(f"no room for a single response ({fault}): lower --max-new-tokens") from None
        else:
            groups += found
            continue
        rows = max(1, min(rows, n * len(prompts)) // 2)
        torch.cuda.empty_cache()
        print(f"out of memory: going on with {rows} responses at once", flush=True)
    return groups, rows


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
    if keys is None:
        keys = range(len(items))
    keys = list(keys)
    results = [[] for _ in items]
    order = sorted(range(len(items)), key=lambda i: -len(items[i][0]))
    while order:
        size = max(1, batch_rows // n)
        chunk = order[:size]
        order = order[size:]
        prompts = vlm.encode(model, processor, [items[i] for i in chunk])
        groups, batch_rows = sample_in_parts(
            *(model, processor, prompts, n, max_new_tokens, temperature, batch_rows),
            keys=[keys[i] for i in chunk],
            top_p=top_p,
            static=static,
        )
        for i, samples in zip(chunk, groups, strict=True):
            results[i] = samples
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
    → logps [N, C], entropy [N, C] (no graph; 0 under no_grad), completion_mask [N, C]; rows in the order of
    completions.
    """
    base = vlm.base_model(model)
    weight = base.lm_head.weight
    responses = [torch.tensor(ids, device=weight.device) for group in completions for ids in group]
    hidden_states = _hidden_shared if shared_prefix else _hidden_plain
    hidden = hidden_states(model, prompts, completions)  # [T, D]
    logps, entropy = TokenLogps.apply(hidden, weight, torch.cat(responses), temperature)  # [T]
    lengths = [len(ids) for ids in responses]
    parts = (logps, entropy, torch.ones_like(logps, dtype=torch.bool))
    # [T] → [N, C]: 0 and False behind each response
    return tuple(pad_sequence(part.split(lengths), batch_first=True) for part in parts)


def _hidden_shared(model, prompts, completions):
    """→ [T, D]: the state that predicts each response token, out of one packed row for all groups."""
    base = vlm.base_model(model)
    device = base.lm_head.weight.device
    lookup = base.get_input_embeddings()
    pieces, groups, index = [], [], []
    start = 0
    for prompt, group in zip(prompts, completions, strict=True):
        pieces.append(prompt)
        groups.append((len(prompt.embeds), [len(ids) for ids in group]))
        last = start + len(prompt.embeds) - 1  # predicts every response's first token
        start = last + 1
        for ids in group:
            pieces.append(vlm.respond(prompt, lookup(torch.tensor(ids, device=device)).detach()))
            index += [last, *range(start, start + len(ids) - 1)]
            start += len(ids)
    run = layers.written_out(model) or partial(decoder, base)
    inputs = vlm.decoder_inputs([vlm.join(pieces)])
    return run(inputs, Packed(groups), torch.tensor(index, device=device))[0]


def _hidden_plain(model, prompts, completions):
    """→ [T, D]: the same from one row [prompt | response | padding] for every response."""
    base = vlm.base_model(model)
    device = base.lm_head.weight.device
    lookup = base.get_input_embeddings()
    rows, sizes = [], []
    for prompt, group in zip(prompts, completions, strict=True):
        for ids in group:
            response = vlm.respond(prompt, lookup(torch.tensor(ids, device=device)).detach())
            rows.append(vlm.join([prompt, response]))
            sizes.append(len(prompt.embeds))
    totals = [len(row.embeds) for row in rows]
    longest = max(totals)
    places = torch.arange(longest, device=device)
    mask = places < torch.tensor(totals, device=device)[:, None]  # [N, L]
    inputs = vlm.decoder_inputs([vlm.pad_to(row, longest) for row in rows])
    outputs = base.model.language_model(**inputs, attention_mask=mask.long(), use_cache=False)
    hidden = outputs.last_hidden_state  # [N, L, D]
    # the position that predicts each token
    return torch.cat([hidden[i, size - 1 : totals[i] - 1] for i, size in enumerate(sizes)])


class TokenLogps(torch.autograd.Function):
    """Head and log-softmax in one: hidden [T, D], weight [V, D], targets [T] → logps [T], entropy [T], fp32.

    Over tiles of the vocabulary with a running maximum, so that [T, V] never exists. d logp / d hidden =
    (weight[target] − Σ probs · weight) / temperature does not depend on the loss, so the forward pass leaves
    it behind: two head products in all. The head is frozen. Entropy has no graph, and is 0 where no gradient
    is wanted.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        assert not weight.requires_grad, "the head is taken as frozen"
        wanted = ctx.needs_input_grad[0]
        peak = hidden.new_full(targets.shape, -1e30, dtype=torch.float32)  # [T] largest logit so far
        total = torch.zeros_like(peak)  # Σ exp(logit − peak)
        weighted = torch.zeros_like(peak)  # Σ exp(logit − peak) · (logit − peak)
        target = torch.zeros_like(peak)  # the target's logit
        # Σ exp(logit − peak) · weight
        mean = torch.zeros_like(hidden, dtype=torch.float32) if wanted else None
        start = 0
        for tile in weight.split(VOCABULARY_TILE):
            logits = linear(hidden, tile).float().div_(temperature)  # [T, tile]
            place = targets - start
            here = (place >= 0) & (place < len(tile))
            found = logits.gather(1, place.clamp(0, len(tile) - 1)[:, None])
            target = torch.where(here, found[:, 0], target)
            start += len(tile)

            higher = torch.maximum(peak, logits.amax(-1))
            shift = peak - higher
            shrink = shift.exp()
            logits -= higher[:, None]
            if wanted:
                weighted += shift * total
                weighted *= shrink
                exps = logits.exp()
                weighted += logits.mul_(exps).sum(-1)
            else:
                exps = logits.exp_()
            total *= shrink
            total += exps.sum(-1)
            if wanted:
                mean *= shrink[:, None]
                mean += linear(exps.to(tile.dtype), tile.t())
            peak = higher
        log_total = total.log()
        logps = target - peak - log_total
        entropy = torch.zeros_like(logps)
        slopes = None
        if wanted:
            entropy = log_total - weighted / total
            slopes = weight[targets] - mean / total[:, None]
            slopes = (slopes / temperature).to(hidden.dtype)  # [T, D]
        ctx.mark_non_differentiable(entropy)
        ctx.save_for_backward(slopes)
        return logps, entropy

    @staticmethod
    def backward(ctx, grad, _):
        [slopes] = ctx.saved_tensors
        grad = grad[:, None] * slopes
        return grad.to(slopes.dtype), None, None, None
