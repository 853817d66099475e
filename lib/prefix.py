"""Attention over a shared prefix: a prompt is computed and held once, whatever the number of its responses.

Two layouts, handed to the decoder's attention (vlm): Packed, one row of real tokens, and Decoding, caches
that grow a token at a time. Knows no sampling, no reward, no architecture.

    B prompts   N responses   P prompt tokens   C completion tokens   L positions of a packed row
    H heads   Hkv key/value heads   d head size   D hidden size
"""

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from lib import vlm


class Packed:
    """One row of real tokens, [prompt | c1 … cG] of each group behind the last. A response sees its prompt
    and itself.

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
        sizes = []
        for size, lengths in self.groups:
            sizes += [size, *lengths]
        # one split, whose gradient is one cat: that of a slice is as large as the row
        queries = query.split(sizes, 2)
        keys = key.split(sizes, 2)
        values = value.split(sizes, 2)
        pieces = zip(queries, keys, values, strict=True)
        outputs = []
        for _, lengths in self.groups:
            q, prefix_key, prefix_value = next(pieces)
            out = scaled_dot_product_attention(q, prefix_key, prefix_value, is_causal=True, enable_gqa=True)
            outputs.append(out)
            for _ in lengths:
                q, own_key, own_value = next(pieces)
                k = torch.cat([prefix_key, own_key], 2)  # [1, Hkv, P + C, d]
                v = torch.cat([prefix_value, own_value], 2)
                out = self._response(q, k, v)
                outputs.append(out)  # [1, H, C, d]
        return torch.cat(outputs, 2)

    def _response(self, query, key, value):
        """query [1, H, C, d] of a response, key and value [1, Hkv, P + C, d] of prompt and response → [1, H,
        C, d]."""
        length = query.shape[2]
        total = key.shape[2]
        if query.is_cuda:  # no mask in memory, and flash attention can take it
            bias = causal_lower_right(length, total)
            return scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=True)
        # the heads of one key/value head become rows of one product, so that keys are not repeated a head
        heads = key.shape[1]
        q = query.unflatten(1, (heads, -1))  # [1, Hkv, H/Hkv, C, d]
        q = q.flatten(2, 3)
        mask = self._mask(total - length, length, q)
        out = scaled_dot_product_attention(q, key, value, attn_mask=mask)
        out = out.unflatten(2, (-1, length))
        return out.flatten(1, 2)

    def _mask(self, size, length, query):
        """[H/Hkv·C, P + C] additive: 0 on the prompt, causal on the response."""
        if (size, length) not in self.masks:
            causal = query.new_full((length, length), -torch.inf)
            causal = causal.triu(1)
            mask = pad(causal, (size, 0))
            repeats = query.shape[2] // length
            self.masks[size, length] = mask.repeat(repeats, 1)
        return self.masks[size, length]


class Decoding:
    """Caches of N responses that grow a token at a time: B prompts' keys and values, each held once, and
    every response's own.

    Scores of all responses to a prompt are one matrix product with its keys; one softmax goes over prompt and
    response.

        grid  responses laid out as [prompt, slot], with empty slots once some are done
        slot  a response's place among those of its prompt
        own   a response's keys and values, without its prompt's

    kept: of a Packed pass over the prompts, [(keys, values)] a layer; it is emptied on the way, so that no
    layer is held twice. sizes: [B] prompt lengths. n: responses a prompt. fixed_shapes: shapes stay as they
    are from token to token, so that a CUDA graph can repeat them; places not yet filled are masked.
    """

    GROW = {False: 64, True: 256}  # tokens by which the caches grow; fixed shapes: a graph lives as long

    def __init__(self, kept, sizes, n, fixed_shapes=False):
        device = kept[0][0].device
        lengths = torch.tensor(sizes, device=device)
        places = torch.arange(max(sizes), device=device)
        self.padding = places >= lengths[:, None]  # [B, P]
        self.padded = min(sizes) < max(sizes)
        self.keys = []  # of the prompts, a layer: [B, Hkv, d, P], as the product reads them
        self.values = []  # [B, Hkv, P, d]
        self.own = []  # a layer: keys and values of the responses in the grid, [2, B, Hkv, width, C, d]
        prompts = torch.arange(len(sizes), device=device)
        self._arrange(prompts.repeat_interleave(n))
        while kept:
            key, value = kept.pop(0)
            key = _by_prompt(key, sizes)
            value = _by_prompt(value, sizes)
            _, heads, _, size = key.shape
            self.keys.append(key.transpose(2, 3).contiguous())
            self.values.append(value.contiguous())
            own = key.new_empty(2, len(sizes), heads, n, 0, size)
            self.own.append(own)
        self.fixed_shapes = fixed_shapes
        self.grow = self.GROW[fixed_shapes]
        self.step = -1  # the response token being computed, from 0
        self.at = lengths.new_full((1,), -1)  # the same, as a tensor that a graph can read
        self.places = None  # fixed shapes: 0, 1, … of every place of the caches

    def _arrange(self, owner):
        """owner [N], ascending: each response's prompt. Sets slots and width of the grid."""
        counts = owner.bincount()
        before = counts.cumsum(0) - counts  # responses of earlier prompts
        self.owner = owner
        self.width = int(counts.max())
        rows = torch.arange(len(owner), device=owner.device)
        self.slot = rows - before[owner]
        self.full = len(owner) == len(counts) * self.width

    def _to_grid(self, x):
        """[N, Hkv, …] → [B, Hkv, width, …]: lay the rows out as a grid, a line a prompt, so that one matrix
        product serves all its responses; empty slots are 0."""
        shape = (len(self.padding), self.width, *x.shape[1:])
        if self.full:
            grid = x.reshape(shape)
        else:
            grid = x.new_zeros(shape)
            grid[self.owner, self.slot] = x
        return grid.transpose(1, 2)

    def _from_grid(self, grid):
        """[B, Hkv, width, …] → [N, Hkv, …]."""
        grid = grid.transpose(1, 2)
        if self.full:
            return grid.flatten(0, 1)
        return grid[self.owner, self.slot]

    def keep(self, rows):
        """Drop all responses but `rows` (ascending indices), and prompts that have none left."""
        old_owner = self.owner[rows]
        old_slot = self.slot[rows]
        alive, owner = old_owner.unique(return_inverse=True)
        if len(alive) < len(self.padding):
            self.padding = self.padding[alive]
            for layer, key in enumerate(self.keys):  # one by one: all layers are never held twice
                self.keys[layer] = key[alive]
                self.values[layer] = self.values[layer][alive]
        self._arrange(owner)
        for layer, own in enumerate(self.own):
            kept = own[:, old_owner, :, old_slot]  # [N, 2, Hkv, C, d]
            _, _, heads, _, *size = own.shape
            own = own.new_zeros(2, len(alive), heads, self.width, *size)
            own[:, self.owner, :, self.slot] = kept
            self.own[layer] = own

    def advance(self):
        """Make room for the next token. To be called before each decoder pass."""
        self.step += 1
        self.at.add_(1)
        if self.step % self.grow == 0:
            room = (0, 0, 0, self.grow)
            for layer, own in enumerate(self.own):  # as in keep()
                self.own[layer] = pad(own, room)
            size = self.own[0].shape[4]
            self.places = torch.arange(size, device=self.at.device)

    def __call__(self, layer, query, key, value):
        """query [N, H, 1, d], key and value [N, Hkv, 1, d] → [N, H, 1, d]."""
        heads = key.shape[1]
        key = self._to_grid(key)
        value = self._to_grid(value)
        new = torch.stack([key, value])  # [2, B, Hkv, width, 1, d]
        own = self.own[layer]
        own.index_copy_(4, self.at, new)
        if not self.fixed_shapes:
            own = own[:, :, :, :, : self.step + 1]
        own_key, own_value = own  # [B, Hkv, width, C, d]
        prefix_key = self.keys[layer]
        prefix_value = self.values[layer]
        scale = query.shape[-1] ** -0.5
        query = query.unflatten(1, (heads, -1))  # [N, Hkv, H/Hkv, 1, d]
        query = query.squeeze(3) * scale
        query = self._to_grid(query).contiguous()  # [B, Hkv, width, H/Hkv, d]

        to_prefix = query.flatten(2, 3) @ prefix_key  # [B, Hkv, width·H/Hkv, P]
        if self.padded:
            to_prefix.masked_fill_(self.padding[:, None, None], -torch.inf)
        to_own = query @ own_key.transpose(3, 4)  # [B, Hkv, width, H/Hkv, C]
        if self.fixed_shapes:
            to_own.masked_fill_(self.places > self.at, -torch.inf)
        to_prefix = to_prefix.unflatten(2, (self.width, -1))
        weights = torch.cat([to_prefix, to_own], -1)
        weights = weights.softmax(-1, dtype=torch.float32)
        weights = weights.to(value.dtype)
        size = prefix_value.shape[2]
        to_prefix, to_own = weights.tensor_split([size], -1)
        of_prefix = to_prefix.flatten(2, 3) @ prefix_value
        out = to_own @ own_value  # [B, Hkv, width, H/Hkv, d]
        out += of_prefix.view_as(out)
        out = self._from_grid(out).flatten(1, 2)
        return out[:, :, None]


def _by_prompt(x, sizes):
    """[1, Hkv, ΣP, d] → [B, Hkv, P, d], padded."""
    parts = x[0].transpose(0, 1).split(sizes)
    return pad_sequence(parts, batch_first=True).transpose(1, 2)


def decoder(base, inputs, layout, wanted=None):
    """vlm.decoder_inputs or vlm.token_inputs of N rows → last hidden state [N, L, D] under a layout's
    attention; of the places `wanted` [T] alone, [N, T, D]."""
    language_model = base.model.language_model
    known = language_model.config._attn_implementation == vlm.SHARED_PREFIX
    assert known, "the layout would be ignored: load the model with vlm.load"
    # with four dimensions transformers builds no mask of its own
    unused = inputs["inputs_embeds"].new_zeros(1, 1, 1, 1)
    outputs = language_model(**inputs, attention_mask=unused, use_cache=False, layout=layout)
    hidden = outputs.last_hidden_state
    return hidden if wanted is None else hidden[:, wanted]


def token(base, run, cache, tokens, positions):
    """[N] token ids, [N, 3 or 1] → their last hidden state [N, D]; the cache (Decoding) takes them in.

    run(inputs, layout): the decoder."""
    embeds = base.get_input_embeddings()(tokens)
    inputs = vlm.token_inputs(embeds, positions)
    hidden = run(inputs, cache)
    return hidden[:, 0]


class GraphedToken:
    """token() in fixed shapes as a CUDA graph: captured anew where rows have left or the cache has grown,
    else replayed."""

    def __init__(self):
        self.shape = None

    def __call__(self, base, run, cache, tokens, positions):
        shape = len(tokens), cache.own[0].shape[4]
        if self.shape != shape:
            self.shape = shape
            self._capture(base, run, cache, tokens, positions)
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        self.graph.replay()
        return self.hidden

    def _capture(self, base, run, cache, tokens, positions):
        self.tokens = tokens.clone()
        self.positions = positions.clone()
        self.graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(side):  # a run before the capture, as CUDA graphs ask for
            token(base, run, cache, self.tokens, self.positions)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self.graph):
            self.hidden = token(base, run, cache, self.tokens, self.positions)
