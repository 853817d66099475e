"""The least time a GRPO step can take on this machine: its products at the best rate that a library reaches.

It computes each prompt and each response once a pass: P + ΣC positions a prompt. Counted are the linear
layers and attention of sampling, reference pass, policy pass and the policy's d input (the base is frozen),
and the head. LoRA, norms, softmax and the update are left out, so no step reaches it.
"""

from collections import Counter
from functools import partial
from statistics import median

import torch
from torch.nn.functional import linear

from bench.steps import now
from lib import vlm


def products(args, prompt_tokens, lengths):
    """{(rows, inputs, outputs): times} of a step; lengths: [B][G] response tokens."""
    head_dim = args.hidden // args.heads
    layer = [
        (args.hidden, args.hidden),  # q, and the output
        (args.hidden, args.hidden),
        (args.hidden, args.kv_heads * head_dim),  # k and v
        (args.hidden, args.kv_heads * head_dim),
        (args.hidden, args.ffn),  # gate and up
        (args.hidden, args.ffn),
        (args.ffn, args.hidden),  # down
    ]
    drawn = sum(map(sum, lengths))
    rows = sum(map(len, lengths))
    decoded = drawn / rows  # passes of all rows that hold as many tokens
    found = Counter()
    for inputs, outputs in layer:
        found[len(lengths) * prompt_tokens, inputs, outputs] += args.layers  # prefill, all prompts in one row
        found[rows, inputs, outputs] += args.layers * decoded
        for group in lengths:
            packed = prompt_tokens + sum(group)
            found[packed, inputs, outputs] += 2 * args.layers  # reference and policy
            found[packed, outputs, inputs] += args.layers  # d input
    found[rows, args.hidden, args.vocab] += decoded
    for group in lengths:
        found[sum(group), args.hidden, args.vocab] += 2
        found[sum(group), args.vocab, args.hidden] += 1
    return found


def attention_flop(args, prompt_tokens, lengths):
    """Of the query–key pairs that count: two products each forward, four more for d query, d key, d value."""
    pairs = 0
    for group in lengths:
        pairs += prompt_tokens**2 / 2
        pairs += sum(length * prompt_tokens + length**2 / 2 for length in group)
    forward = 4 * args.layers * args.hidden * pairs
    return 3 * forward + 2 * forward


def rate(args, rows, inputs, outputs):
    """FLOP/s of the best way to multiply [rows, inputs] by [inputs, outputs]:

    MKL's or, on a CPU, oneDNN's.
    """
    options = {"device": args.device, "dtype": vlm.DTYPES[args.dtype]}
    x = torch.randn(rows, inputs, **options)
    weight = torch.randn(outputs, inputs, **options)
    ways = [partial(linear, x, weight)]
    if args.device == "cpu" and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))
    flop = 2 * rows * inputs * outputs
    return flop / min(seconds(way, flop) for way in ways)


def seconds(product, flop):
    """Median of several; small ones are repeated within a measurement, since clocks are coarse."""
    repeats = max(1, int(1e9 / flop))
    times = []
    for _ in range(5):
        start = now()
        for _ in range(repeats):
            product()
        times.append((now() - start) / repeats)
    return median(times)


def floor(args, prompt_tokens, lengths):
    """→ (seconds with each product at the best rate of its own shape, seconds at the best rate of any, that
    rate)."""
    rates = {shape: rate(args, *shape) for shape in products(args, prompt_tokens, lengths)}
    best = max(rates.values())
    own = attention_flop(args, prompt_tokens, lengths) / best
    total = attention_flop(args, prompt_tokens, lengths)
    for (rows, inputs, outputs), times in products(args, prompt_tokens, lengths).items():
        flop = 2 * rows * inputs * outputs * times
        total += flop
        own += flop / rates[rows, inputs, outputs]
    return own, total / best, best
