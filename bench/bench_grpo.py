"""What a GRPO step costs: ours, and TRL's GRPOTrainer on the same tiny VLM, side by side.

One step = encode, sample, reference pass, policy forward and backward, AdamW; B prompts, G responses each.
Same weights, images, prompts, LoRA, KL, lengths of the responses and update. Every measurement is a process
of its own (a warm-up step of 2 tokens, then one step); the ways take turns, medians are printed with the
least and the most. CPU seconds are the steadier figure on a shared machine.

    ours         lib/rollout, plain AdamW               plain        ours without the shared prefix
    engine       ours through DeepSpeed, as 04          trl-static   TRL with cache_implementation="static"

    no-layers    ours with transformers' decoder layers, LoRA beside the weights
    no-onednn    ours with MKL's products               no-tiles     ours with logits [T, V] at once
    no-wanted    ours, the last layer everywhere        no-recompute ours, all kept for the backward pass

Time is measured with the default allocator. Memory is what a step adds to the loaded model, in a run of its
own under MALLOC_MMAP_THRESHOLD_=1000000: freed blocks of 1 MB and more go back at once, or fragmentation
would hide the figure. In TRL's favour: on a CPU its fused head would score prompt positions too; it is held
to its GPU behaviour. Gradient checkpointing is off, a group is a backward pass, use_bias_correction_kl is
False (our k3).

    python -m bench.bench_grpo --prompt-tokens 512 --completion-tokens 128 --group-size 8 --prompts 2
    python -m bench.bench_grpo --completion-tokens 200 --shortest 30 --prompts 2       # ragged lengths
    python -m bench.bench_grpo --ways ours engine --prompts 2                          # DeepSpeed's share
    python -m bench.bench_grpo --ways ours no-layers no-onednn no-wanted no-recompute no-tiles --prompts 2
    python -m bench.bench_grpo --group-size 2 8 32 --prompt-tokens 128 384 --ways ours plain         # a table
    python -m bench.bench_grpo --arch llava --hidden 64 --layers 2 --heads 4 --kv-heads 2 --ffn 128 \\
        --vocab 1000 --prompt-tokens 160 --completion-tokens 16 --rounds 1             # seconds
    # the 7B's shape with random weights, on a GPU of 80 GB
    python -m bench.bench_grpo --device cuda --dtype bf16 --static-cache --hidden 3584 --layers 28 \\
        --heads 28 --kv-heads 4 --ffn 18944 --vocab 152064 --lora-rank 128 \\
        --prompt-tokens 700 --completion-tokens 256

Reads:  nothing; needs `trl` and `datasets` for TRL's ways.
Writes: OUT, if given: a line {"way": "ours", "measured": "time", "P": 512, "C": 128, "G": 8, "B": 2, …}
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict
from statistics import median

import torch

import common
from bench.floor import floor
from bench.steps import PARTS, WAYS, Job, make_model
from demo.base import build
from lib import vlm

MEMORY_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "1000000"}
COLUMNS = {"CPU s": 7, "least": 7, "most": 7, "wall s": 8, "sampling": 10, "reference": 11, "policy": 8}
SHAPE = {
    "hidden": 512,
    "layers": 8,
    "heads": 8,
    "kv-heads": 4,
    "ffn": 1536,
    "vocab": 32000,
    "lora-rank": 16,
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    group = parser.add_argument_group("io")
    group.add_argument("--out", help="append every measurement to this JSONL [ours: none]")
    group = parser.add_argument_group("model")
    group.add_argument("--arch", choices=build.ARCHS, default="qwen2_5_vl", help="whose classes [ours]")
    for name, value in SHAPE.items():
        group.add_argument(f"--{name}", type=int, default=value, help="of the decoder [ours]")
    group = parser.add_argument_group("sizes, each one or several")
    group.add_argument("--prompt-tokens", type=int, nargs="+", default=[512], help="P [ours]")
    group.add_argument("--completion-tokens", type=int, nargs="+", default=[128], help="C, the most [ours]")
    group.add_argument("--shortest", type=int, help="draw the lengths between this and C [ours: all are C]")
    group.add_argument("--group-size", type=int, nargs="+", default=[8], help="G [paper Figure 3]")
    group.add_argument("--prompts", type=int, nargs="+", default=[1], help="B [ours]")
    group = parser.add_argument_group("runtime")
    group.add_argument(
        "--ways", nargs="+", choices=WAYS, default=["ours", "trl"], help="in this order [ours]"
    )
    group.add_argument("--rounds", type=int, default=3, help="of time [ours]")
    group.add_argument("--memory-rounds", type=int, default=1, help="of memory [ours]")
    group.add_argument("--threads", type=int, default=1, help="of torch [ours]")
    group.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: wall-clock seconds; never run on one"
    )
    group.add_argument("--dtype", choices=tuple(vlm.DTYPES), default="fp32", help="of all weights [ours]")
    group.add_argument("--static-cache", action="store_true", help="as in 04_grpo.py [ours: off]")
    group.add_argument("--child", help=argparse.SUPPRESS)  # a Job, measured in this process
    return parser.parse_args(argv)


def draw_lengths(args, prompts, group_size, longest):
    """[B][G] tokens of the responses; one of them has C."""
    shortest = args.shortest or longest
    rng = random.Random(0)
    lengths = []
    for _ in range(prompts):
        group = [rng.randint(shortest, longest) for _ in range(group_size)]
        lengths.append(group)
    lengths[0][0] = longest
    return lengths


def measure(job, environment):
    """One Job in a process of its own → its row."""
    command = [sys.executable, "-m", "bench.bench_grpo", *sys.argv[1:]]
    command += ["--child", json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        raise common.InputError(f"{job.way}: {done.stderr.strip()[-1500:]}")
    return json.loads(done.stdout.strip().split("\n")[-1])


def measure_rounds(jobs, rounds, environment, measured, args, sizes):
    """{way: [its rows]}, the ways in turns."""
    found = {job.way: [] for job in jobs}
    for _, job in itertools.product(range(rounds), jobs):
        row = measure(job, environment)
        found[job.way].append(row)
        if args.out:
            known = {"way": job.way, "arch": args.arch, "measured": measured, **sizes}
            with open(args.out, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(known | row) + "\n")
    return found


def summary(times, memories):
    """Medians over the rounds."""
    row = {}
    for name in ("cpu", "wall", *PARTS):
        row[name] = median(time[name] for time in times)
    row["least"] = min(time["cpu"] for time in times)
    row["most"] = max(time["cpu"] for time in times)
    row["added_mib"] = float("nan")
    if memories:
        row["added_mib"] = median(memory["added_mib"] for memory in memories)
    return row


def show(way, row, first, sizes, floor_seconds):
    """A line of the table; ratios are to the first way."""
    figures = [row[name] for name in ("cpu", "least", "most", "wall", *PARTS)]
    cells = []
    for figure, width in zip(figures, COLUMNS.values(), strict=True):
        cells.append(f"{figure:{width}.2f}")
    ratio = row["cpu"] / first["cpu"]
    memory_ratio = row["added_mib"] / first["added_mib"]
    head = f"{sizes['P']:5}{sizes['C']:5}{sizes['G']:4}{sizes['B']:3}  {way:11}"
    tail = f"{row['added_mib']:11.0f}{ratio:8.2f}x{memory_ratio:9.2f}x{floor_seconds / row['cpu']:8.0%}"
    print(head + "".join(cells) + tail, flush=True)


def compare(args, folder, sizes):
    """The lines of one size."""
    lengths = draw_lengths(args, sizes["B"], sizes["G"], sizes["C"])
    jobs = [Job(way, folder, sizes["P"], lengths) for way in args.ways]
    own, least, rate = floor(args, sizes["P"], lengths)
    times = measure_rounds(jobs, args.rounds, {}, "time", args, sizes)
    memories = measure_rounds(jobs, args.memory_rounds, MEMORY_ENVIRONMENT, "memory", args, sizes)
    rows = {way: summary(times[way], memories[way]) for way in args.ways}
    for way, row in rows.items():
        show(way, row, rows[args.ways[0]], sizes, own)
    print(f"floor: {own:.2f} s, each product at the best rate of its shape; ", end="")
    print(f"{least:.2f} s at {rate / 1e9:.0f} GFLOP/s, the best of any shape", flush=True)


@common.exit_codes
def main(args):
    torch.set_num_threads(args.threads)
    if args.child:
        job = Job(**json.loads(args.child))
        print(json.dumps(WAYS[job.way](job, args)))
        return
    print(f"{args.arch}, {args.layers} × {args.hidden}, vocabulary {args.vocab}, {args.threads} threads")
    columns = "".join(f"{name:>{width}}" for name, width in COLUMNS.items())
    print(f"    P    C   G  B  way        {columns}  added MiB  × first  × memory   floor")
    with tempfile.TemporaryDirectory() as folder:
        make_model(args, folder)
        sizes = (args.prompt_tokens, args.completion_tokens, args.group_size, args.prompts)
        for values in itertools.product(*sizes):
            compare(args, folder, dict(zip("PCGB", values, strict=True)))


if __name__ == "__main__":
    main(parse_args())
