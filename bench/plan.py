"""What a run needs of your GPUs, before you have them: memory of each phase, work, hours.

Nothing here is measured: simulate.py runs the scripts' own passes on the whole model without numbers.

    load         weights, LoRA and, in 04, the reference's LoRA
    images       vision tower, one picture at a time
    rollout      prefill, the cache's last growth and the last token of responses that never end (worst case)
    reference    log-probs without gradient of one packed row
    policy       log-probs and backward pass of one packed row; ZeRO-2's bucket and share of the gradient
    optimiser    by formula, L trainable numbers over n GPUs: fp32 weights and two moments 12 L/n bytes;
                 at the step 12 L/n more, the fp32 gradient and AdamW's two temporaries
    validation   as rollout, one greedy response for each of --eval-rows prompts; in 05 of --batch-rows

--reserve is left to what no tensor of ours is: CUDA's context, kernels' scratch, NCCL, fragmentation. GB are
2^30 bytes. Attention's masks are counted as on a CPU; flash attention needs none. Hours, without validation:
a part takes as long as its FLOP or its bytes read, the longer, at the assumed --utilisation of the peaks.

    python -m bench.plan --model qwen2.5-vl-7b --card 48 --gpus 4 --group-size 8
    python -m bench.plan --table                                # your card → flags; some minutes

Reads:  --ds-config; config.json of --model where it is a folder.
Writes: nothing.
"""

import argparse
import math
from pathlib import Path
from types import SimpleNamespace

import common
from bench import simulate
from bench.simulate import MODELS, TEXT
from common import above, at_least
from lib import training, vlm

GB = 2**30
CARDS = {24: (165, 1008), 48: (155, 768), 80: (312, 2039)}  # RTX 4090, A6000, A100: bf16 TFLOP/s, GB/s
EXAMPLES = {"sft": 3534 * 5, "grpo": 3618 * 30, "eval": 475}  # of the paper's run, epochs included
HOLDS = {
    "load": "weights, LoRA",
    "images": "activations of the vision tower",
    "rollout": "caches, logits, both copies while the caches grow",
    "reference": "activations of one layer, a tile of logits",
    "policy": "activations saved for the backward pass, gradients",
    "optimiser": "fp32 gradient, AdamW's temporaries",
    "validation": "caches, logits, both copies while the caches grow",
}


def planned(args):
    sizes = args.lora_rank, vlm.DTYPES[args.dtype], args.max_pixels, args.prompt_tokens
    return simulate.shadow_of(args.model, *sizes)


# ------------------------------------------------------------------------------------------------ memory


def zero_shares(trained, itemsize, gpus, bucket):
    """Bytes of ZeRO-2 on each GPU for so many trainable numbers; bucket: numbers that are reduced at once."""
    share = trained / gpus
    fp32 = 12 * share
    return SimpleNamespace(states=fp32, gradient=itemsize * share, bucket=itemsize * bucket, step=fp32)


def peaks(args):
    """{phase: bytes at most on each GPU}."""
    shadow = planned(args)
    itemsize = vlm.DTYPES[args.dtype].itemsize
    config, _ = training.read_ds_config(args, None)
    bucket = config["zero_optimization"]["reduce_bucket_size"]
    zero = zero_shares(shadow.trained, itemsize, args.gpus, bucket)
    grpo = args.stage == "grpo"
    weights = shadow.weights
    if not grpo:  # no reference
        weights -= shadow.trained * itemsize
    base = weights if args.stage == "eval" else weights + zero.states
    found = {"load": weights, "images": base + shadow.images}
    length = args.completion_tokens
    if grpo:
        rise = simulate.sampling(shadow, args.batch_size, args.group_size, length, args.rollout_rows, 1.0)
        found["rollout"] = base + rise
    if args.stage != "eval":
        sizes = passed_together(args)
        rises, _ = simulate.micro_step(shadow, *sizes, length, grpo, args.gradient_checkpointing)
        if grpo:
            found["reference"] = base + zero.gradient + rises["reference"]
        found["policy"] = base + zero.gradient + zero.bucket + rises["policy"]
        found["optimiser"] = base + zero.step
    rows = args.eval_rows
    found["validation"] = base + simulate.sampling(shadow, rows, 1, args.max_new_tokens, rows, 0.0)
    return found


def passed_together(args):
    """(prompts, responses to each) that pass the decoder together: 03's rows, 04's largest packed row."""
    if args.stage == "sft":
        return args.batch_size, 1
    if not args.pack_tokens:
        return 1, args.group_size
    left = args.pack_tokens - planned(args).prompt_tokens
    return 1, max(1, min(args.group_size, left // args.completion_tokens))


def changed(args, **changes):
    return argparse.Namespace(**vars(args) | changes)


def fits(args, phase=None):
    """Whether the card has room for one phase, or for all."""
    found = peaks(args)
    most = found.get(phase, 0) if phase else max(found.values())
    return most <= (args.card - args.reserve) * GB


def fitted(args):
    """`args` with the flags that make every phase fit, what costs least first; None where none do."""
    trial = next((trial for trial in cheaper_updates(args) if fits(trial, "policy")), None)
    if trial is None:
        return None
    for phase, name in (("rollout", "rollout_rows"), ("validation", "eval_rows")):
        while not fits(trial, phase) and getattr(trial, name) > 1:
            trial = changed(trial, **{name: getattr(trial, name) // 2})
    return trial if fits(trial) else None


def cheaper_updates(args):
    """Yield `args`, then with fewer rows at once, then all of these with activations computed anew."""
    for recompute in sorted({args.gradient_checkpointing, True}):
        trial = changed(args, gradient_checkpointing=recompute)
        yield trial
        prompts, responses = passed_together(args)
        while args.stage == "sft" and prompts > 1:
            accum = args.grad_accum * args.batch_size
            prompts //= 2
            yield changed(trial, batch_size=prompts, grad_accum=accum // prompts)
        while args.stage == "grpo" and responses > 1:
            responses //= 2
            limit = planned(args).prompt_tokens + responses * args.completion_tokens
            yield changed(trial, pack_tokens=limit)


def flags(args, before):
    """The command-line flags in which `args` differs from `before`."""
    words = []
    for name, value in vars(args).items():
        option = name.replace("_", "-")
        if (args.stage, name) == ("eval", "eval_rows"):
            option = "batch-rows"
        if value != getattr(before, name):
            words.append(f"--{option}" if value is True else f"--{option} {value}")
    return " ".join(words)


# ------------------------------------------------------------------------------------------------ time


def step_work(args):
    """[(part, times a step on each GPU, (FLOP, bytes read))] at --mean-tokens a response."""
    shadow = planned(args)
    length = args.mean_tokens
    grpo = args.stage == "grpo"
    rows = step_rows(args)
    parts = [("images", rows, shadow.image_work)]
    if args.stage != "sft":
        n, at_once = (args.group_size, args.rollout_rows) if grpo else (1, rows)
        prefill, token = simulate.sampling_work(shadow, rows, n, length, at_once)
        parts += [("prefill", 1, prefill), ("token", length - 1, token)]
    if args.stage != "eval":
        prompts, responses = passed_together(changed(args, completion_tokens=length))
        _, found = simulate.micro_step(shadow, prompts, responses, length, grpo, args.gradient_checkpointing)
        times = rows * (args.group_size if grpo else 1) / (prompts * responses)
        parts += [(name, times, found[name]) for name in ("reference", "policy") if name in found]
    return parts


def seconds(args):
    """Of a step, under the assumed share of the card's peaks."""
    total = 0.0
    for _, times, (flop, read) in step_work(args):
        total += times * max(flop / args.tflops / 1e12, read / args.bandwidth / 1e9)
    return total / args.utilisation


def step_rows(args):
    """Prompts of a step on each GPU."""
    return args.eval_rows if args.stage == "eval" else args.batch_size * args.grad_accum


def step_count(args):
    return math.ceil(EXAMPLES[args.stage] / (step_rows(args) * args.gpus))


def hours(args):
    return step_count(args) * seconds(args) / 3600


# ------------------------------------------------------------------------------------------------ main


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    count = at_least(1)
    settings = Path(__file__).parent.parent / "ds_zero2.json"
    add("--model", default="qwen2.5-vl-7b", help=f"{', '.join(MODELS)}, or a folder [paper §4]")
    add("--stage", choices=EXAMPLES, default="grpo", help="03, 04 or 05 [ours]")
    add("--card", type=above(0), default=48, help="GB of a GPU [ours]")
    add("--gpus", type=count, default=4, help="[paper App. A]")
    add("--reserve", type=at_least(0, float), default=3.0, help="GB left to CUDA and chance [ours, a guess]")
    add("--batch-size", type=count, default=2, help="as in 03 and 04 [paper App. A]")
    add("--grad-accum", type=count, default=1, help="as in 03 [paper App. A]")
    add("--group-size", type=at_least(2), default=8, help="as in 04 [paper Figure 3]")
    add("--prompt-tokens", type=count, help=f"[ours: the picture's, and {TEXT} of text]")
    add("--completion-tokens", type=count, help="longest in training [ours: --max-new-tokens; sft 512]")
    add("--max-new-tokens", type=count, default=2048, help="longest in validation [paper §4]")
    add("--mean-tokens", type=at_least(2), default=250, help="of a response, for hours [ours, a guess]")
    add("--max-pixels", type=count, default=vlm.MAX_PIXELS, help="of an image, Qwen [ours]")
    add("--lora-rank", type=count, default=128, help="[paper App. A]")
    add("--dtype", choices=vlm.DTYPES, default="bf16", help="[ours]")
    add("--gradient-checkpointing", action="store_true", help="as in 03 and 04 [ours: off]")
    add("--rollout-rows", type=count, help="as in 04 [ours: all of a step]")
    add("--pack-tokens", type=count, help="as in 04 [ours: no limit]")
    add("--eval-rows", type=count, default=64, help="as in 03 and 04; --batch-rows of 05 [ours]")
    add("--ds-config", default=str(settings), help="DeepSpeed's settings [paper App. A: ZeRO-2]")
    add("--utilisation", type=above(0), default=0.4, help="share of the card's peaks [ours, assumed]")
    add("--tflops", type=above(0), help="the card's peak in bf16 [ours: of a usual card of that size]")
    add("--bandwidth", type=above(0), help="GB/s of its memory [ours: likewise]")
    add("--table", action="store_true", help="your card → flags, in markdown [ours: off]")
    return parser.parse_args(argv)


def resolve(args):
    """`args` with the defaults that depend on others."""
    tflops, bandwidth = CARDS[min(CARDS, key=lambda card: abs(card - args.card))]
    longest = 512 if args.stage == "sft" else args.max_new_tokens
    return changed(
        args,
        tflops=args.tflops or tflops,
        bandwidth=args.bandwidth or bandwidth,
        completion_tokens=args.completion_tokens or longest,
        rollout_rows=args.rollout_rows or args.batch_size * args.group_size,
    )


def show(args):
    found = peaks(args)
    print(f"{args.model}, {args.stage}, {args.gpus} GPUs; simulated, never measured on a GPU")
    print("phase            GB   above load  what the phase adds")
    for phase, size in found.items():
        print(f"{phase:12}{size / GB:7.1f}{(size - found['load']) / GB:13.1f}  {HOLDS[phase]}")
    worst = max(found, key=found.get)
    limit = f"{found[worst] / GB:.1f} GB in {worst}, {args.card:g} GB less {args.reserve:g} in reserve"
    if fits(args):
        print(f"fits: {limit}")
    else:
        best = fitted(args)
        advice = f"fits with {flags(best, args)}" if best else "none of these flags make it fit"
        print(f"does not fit: {limit}; {advice}")
    flop = sum(times * flop for _, times, (flop, _) in step_work(args)) / 1e12
    read = sum(times * read for _, times, (_, read) in step_work(args)) / 1e12
    assumed = f"{args.utilisation:.0%} of {args.tflops:g} TFLOP/s and {args.bandwidth:g} GB/s, assumed"
    print(f"a step of a GPU: {flop:.0f} TFLOP, {read:.2f} TB read, {seconds(args):.1f} s at {assumed}")
    print(f"the paper's run: {step_count(args)} steps, {hours(args):.1f} hours")


def show_table(args):
    """Markdown: for each card, model and stage the flags that fit, GB at most, hours."""
    print("| card | model | 03 | 04 | 05 |\n|---|---|---|---|---|")
    for card in CARDS:
        for model in MODELS:
            cells = []
            for stage in EXAMPLES:
                cells.append(cell(resolve(changed(args, card=card, model=model, stage=stage))))
            print(f"| {card} GB | {model} | {' | '.join(cells)} |", flush=True)


def cell(args):
    best = fitted(args)
    if best is None:
        return "does not fit"
    added = flags(best, args)
    most = max(peaks(best).values()) / GB
    text = f"{f'`{added}`' if added else 'defaults'}; {most:.0f} GB, {hours(best):.1f} h"
    batch = best.batch_size
    while args.stage == "sft" and fits(changed(best, batch_size=2 * batch), "policy"):
        batch *= 2
    return f"{text}, batch to {batch}" if args.stage == "sft" else text


@common.exit_codes
def main(args):
    if args.table:
        show_table(args)
    else:
        show(resolve(args))


if __name__ == "__main__":
    main(parse_args())
