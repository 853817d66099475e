r"""What a GRPO step costs: ours, ours without the shared prefix, and TRL's GRPOTrainer on the same tiny VLM, side by side.

One step = encode, sample, reference pass, policy forward and backward, AdamW; B prompts, G responses of exactly C tokens each.
Same weights, images, prompts, LoRA, KL and update; every measurement is a process of its own (a warm-up step of 2 tokens, then one
step), the ways take turns, medians are printed. CPU seconds are the steadier figure on a shared machine.

Made fair, in TRL's favour: on a CPU its fused head would score prompt positions too; it is held to its GPU behaviour (completions only).
Memory is what a step adds to the loaded model, weights read; glibc gives freed blocks of 1 MB and more back at once
(MALLOC_MMAP_THRESHOLD_, for all three), or its fragmentation would hide the figure.
Gradient checkpointing is off, use_bias_correction_kl is False (our k3), a group is a backward pass in all three.

    python -m bench.bench_grpo --prompt-tokens 512 --completion-tokens 128 --group-size 8 --prompts 4          # one row
    python -m bench.bench_grpo --group-size 2 4 8 16 32 --prompt-tokens 128 384 768 --completion-tokens 128 --ways ours plain   # a table
    python -m bench.bench_grpo --arch llava --hidden 64 --layers 2 --vocab 1000 --prompt-tokens 160 --completion-tokens 16 --rounds 1
    # the 7B's shape with random weights, on a GPU of 80 GB
    python -m bench.bench_grpo --device cuda --dtype bf16 --static-cache --hidden 3584 --layers 28 --heads 28 --kv-heads 4 --ffn 18944 \
      --vocab 152064 --lora-rank 128 --prompt-tokens 700 --completion-tokens 256 --group-size 8 --prompts 2

Reads:  nothing; needs `trl` and `datasets` for --ways trl.
Writes: OUT, if given: a line {"way": "ours", "P": 512, "C": 128, "G": 8, "B": 4, "cpu": 33.1, "wall": 34.0, "added_mib": 1490, …}
"""

import argparse
import importlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

import common
from demo.base import build
from lib import lora, rollout, vlm

WAYS = ("ours", "plain", "trl")
PARTS = ("sampling", "reference", "policy")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    group = parser.add_argument_group("io")
    group.add_argument("--out", help="append every measurement to this JSONL")
    group = parser.add_argument_group("model")
    group.add_argument("--arch", choices=build.ARCHS, default="qwen2_5_vl")
    for name, value in (
        ("hidden", 512),
        ("layers", 8),
        ("heads", 8),
        ("kv-heads", 4),
        ("ffn", 1536),
        ("vocab", 32000),
        ("lora-rank", 16),
    ):
        group.add_argument(f"--{name}", type=int, default=value)
    group = parser.add_argument_group("sizes, each one or several")
    group.add_argument("--prompt-tokens", type=int, nargs="+", default=[512], help="P")
    group.add_argument("--completion-tokens", type=int, nargs="+", default=[128], help="C")
    group.add_argument("--group-size", type=int, nargs="+", default=[8], help="G")
    group.add_argument("--prompts", type=int, nargs="+", default=[1], help="B")
    group = parser.add_argument_group("runtime")
    group.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    group.add_argument("--rounds", type=int, default=3)
    group.add_argument("--threads", type=int, default=1)
    group.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: wall-clock seconds, GPU memory; never run on one",
    )
    group.add_argument("--dtype", choices=tuple(vlm.DTYPES), default="fp32")
    group.add_argument("--static-cache", action="store_true", help="as in 04_grpo.py")
    group.add_argument(
        "--child", help=argparse.SUPPRESS
    )  # one measurement: {"way", "model", "P", "C", "G", "B"}
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------ the same for all ways


def make_model(args, folder):
    """A checkpoint with random weights in `folder`, its vocabulary widened to --vocab."""
    size = build.SIZE | {
        "hidden": args.hidden,
        "layers": args.layers,
        "heads": args.heads,
        "kv_heads": args.kv_heads,
        "ffn": args.ffn,
    }
    build.build(args.arch, folder, build.corpus(), size=size)
    config = vlm.AutoConfig.from_pretrained(folder)
    config.text_config.vocab_size = max(args.vocab, config.text_config.vocab_size)
    torch.manual_seed(0)
    vlm.AutoModelForImageTextToText.from_config(config).save_pretrained(folder)


def make_items(processor, folder, count, tokens):
    """[(text, image path)] whose prompts have exactly `tokens` tokens, image and chat template included."""
    from PIL import Image

    def size(text):
        chat = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        return processor(text=[chat], images=[image], return_tensors="pt")["input_ids"].shape[1]

    items, side = (
        [],
        build.SIDE * (4 if "qwen" in type(processor).__name__.lower() else 1),
    )  # 64 image tokens (Qwen), 16 (LLaVA)
    for i in range(count):
        image = Image.new("RGB", (side, side), (40 * i % 256, 90, 160))
        image.save(Path(folder) / f"{i}.png")
        words = max(0, tokens - size(""))
        while (found := size("a " * words)) != tokens:
            if words == 0:
                raise common.InputError(
                    f"--prompt-tokens {tokens}: image and template alone have {found}: ask for more"
                )
            words = max(0, words + tokens - found)
        items.append(("a " * words, str(Path(folder) / f"{i}.png")))
    return items


def memory(peak=False):
    """MiB of this process (GPU: allocated), now or at most since reset_peak()."""
    if torch.cuda.is_initialized():
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**20
    field = "VmHWM:" if peak else "VmRSS:"
    return next(
        int(line.split()[1]) / 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )


def settled_memory(model):
    """memory() once every weight has been read: a loaded file is mapped, and counts from its first use."""
    sum(parameter.detach().sum().item() for parameter in model.parameters())
    return memory()


def reset_peak():
    torch.cuda.reset_peak_memory_stats() if torch.cuda.is_initialized() else Path(
        "/proc/self/clear_refs"
    ).write_text("5")


def now():
    """CPU seconds; with a GPU, wall-clock seconds once it has done what it was given."""
    if not torch.cuda.is_initialized():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """Seconds of the parts of a step."""

    def __init__(self):
        self.parts, self.began = dict.fromkeys(PARTS, 0.0), (now(), time.perf_counter())

    def timed(self, part, function):
        def call(*args, **kwargs):
            name = part() if callable(part) else part
            start = now()
            try:
                return function(*args, **kwargs)
            finally:
                if name:
                    self.parts[name] += now() - start

        return call

    def row(self):
        cpu, wall = now() - self.began[0], time.perf_counter() - self.began[1]
        self.parts["policy"] = (
            cpu - self.parts["sampling"] - self.parts["reference"]
        )  # and whatever else a step does
        return {"cpu": cpu, "wall": wall, **self.parts}


# ------------------------------------------------------------------------------------------------ the ways


def measure_ours(job, args, shared_prefix):
    grpo = importlib.import_module("04_grpo")
    model, processor = vlm.load(job["model"], vlm.DTYPES[args.dtype], args.device)
    torch.manual_seed(0)
    model = lora.add_lora(model, args.lora_rank, args.lora_rank).eval()
    items = make_items(processor, job["model"], job["B"], job["P"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    vlm.stop_ids = lambda *_: [-1]  # responses of exactly C tokens

    def logps_of(prompts, samples, i):
        return rollout.completion_logps(
            model, prompts[i : i + 1], [[s.completion_ids for s in samples[i]]], 1.0, shared_prefix
        )

    def step(tokens, clock):
        prompts = clock.timed("sampling", vlm.encode)(model, processor, items)
        samples = clock.timed("sampling", rollout.sample)(
            model, processor, prompts, job["G"], tokens, 1.0, static=args.static_cache
        )
        for i in range(len(prompts)):
            with torch.no_grad(), lora.reference(model):
                ref_logps, _, _ = clock.timed("reference", logps_of)(prompts, samples, i)
            logps, _, mask = logps_of(prompts, samples, i)
            advantages = grpo.group_advantages(torch.rand(1, job["G"], dtype=torch.float64))[0]
            loss, _ = grpo.grpo_loss(logps, ref_logps, advantages, mask, 0.01)
            (loss / len(prompts)).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return clock

    base = settled_memory(model)
    step(2, Clock())
    reset_peak()
    row = step(job["C"], Clock()).row()
    return row | {"added_mib": memory(peak=True) - base}


def measure_trl(job, args):
    import trl.trainer.utils
    from datasets import Dataset
    from peft import LoraConfig
    from PIL import Image
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    trl.trainer.utils._use_triton = lambda device: True  # the head on completion positions only, as on a GPU
    processor = vlm.load_processor(job["model"])
    model = vlm.AutoModelForImageTextToText.from_pretrained(
        job["model"], dtype=vlm.DTYPES[args.dtype], attn_implementation="sdpa"
    )
    items = make_items(processor, job["model"], job["B"], job["P"])
    data = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": text}], "image": Image.open(path)} for text, path in items]
    )
    found = {}

    class Watch(TrainerCallback):
        def on_step_begin(self, config, state, control, **kwargs):
            trainer.generation_config.max_new_tokens = trainer.generation_config.min_new_tokens = (
                job["C"] if state.global_step else 2
            )
            if state.global_step == 1:
                reset_peak()
                found["clock"] = clock = Clock()
                trainer._generate = clock.timed("sampling", trainer._generate)
                trainer._get_per_token_logps_and_entropies = clock.timed(
                    lambda: None if torch.is_grad_enabled() else "reference",
                    trainer._get_per_token_logps_and_entropies,
                )

        def on_step_end(self, config, state, control, **kwargs):
            if state.global_step == 2:
                found["row"] = found["clock"].row() | {"added_mib": memory(peak=True) - found["base"]}

    def reward(completions, completion_ids, **kwargs):
        found["lengths"] = sorted({len(ids) for ids in completion_ids})
        return torch.rand(len(completions)).tolist()

    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(dir=job["model"]),
        use_cpu=args.device == "cpu",
        bf16=args.dtype == "bf16",
        gradient_checkpointing=False,
        per_device_train_batch_size=job["G"],
        gradient_accumulation_steps=job["B"],
        num_generations=job["G"],
        max_completion_length=job["C"],
        max_steps=2,
        learning_rate=1e-4,
        beta=0.01,
        use_bias_correction_kl=False,
        loss_type="grpo",
        temperature=1.0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    config_lora = LoraConfig(
        r=args.lora_rank, lora_alpha=args.lora_rank, target_modules=lora.TARGETS, task_type="CAUSAL_LM"
    )
    trainer = GRPOTrainer(
        model, reward, config, data, processing_class=processor, peft_config=config_lora, callbacks=[Watch()]
    )
    found["base"] = settled_memory(model)
    trainer.train()
    if found["lengths"] != [job["C"]]:
        raise common.InputError(
            f"TRL sampled responses of {found['lengths']} tokens, expected {job['C']}: the comparison is not one"
        )
    return found["row"]


# ------------------------------------------------------------------------------------------------ the floor


def matmul_rate(args, n=1024):
    """GFLOP/s of a large product on this machine."""
    n = 8 * n if args.device == "cuda" else n
    a, b = torch.randn(2, n, n, dtype=vlm.DTYPES[args.dtype], device=args.device)
    times = []
    for _ in range(5):
        start = now()
        a @ b
        times.append(now() - start)
    return 2 * n**3 / median(times) / 1e9


def gflop(args, job):
    """Of one step that computes P + G·C tokens a prompt: sampling, reference and policy forward, and the policy's d input (base frozen)."""
    head_dim = args.hidden // args.heads
    linear = args.layers * (
        2 * args.hidden * (args.hidden + args.kv_heads * head_dim) + 3 * args.hidden * args.ffn
    )
    prompt, own = job["P"], job["C"]
    pairs = prompt * prompt / 2 + job["G"] * (own * prompt + own * own / 2)  # query–key pairs
    forward = 2 * linear * (prompt + job["G"] * own) + 4 * args.layers * args.hidden * pairs
    backward = (
        forward + 4 * args.layers * args.hidden * pairs
    )  # d input of a linear layer is one product, of an attention product two
    head = 2 * args.hidden * args.vocab * job["G"] * own
    return job["B"] * (3 * forward + backward + 4 * head) / 1e9


# ------------------------------------------------------------------------------------------------ main


def child(job, args):
    torch.set_num_threads(args.threads)
    row = measure_trl(job, args) if job["way"] == "trl" else measure_ours(job, args, job["way"] == "ours")
    print(json.dumps({k: v for k, v in job.items() if k != "model"} | {"arch": args.arch} | row))


@common.exit_codes
def main(args):
    if args.child:
        return child(json.loads(args.child), args)
    torch.set_num_threads(args.threads)
    rate = matmul_rate(args)
    print(
        f"{args.arch}, {args.layers} × {args.hidden}, vocabulary {args.vocab}, {args.threads} threads; matmul {rate:.0f} GFLOP/s; medians"
    )
    print(
        "    P    C   G  B  way     CPU s  wall s  sampling  reference  policy  added MiB   × ours  × memory  floor s (share)"
    )
    with tempfile.TemporaryDirectory() as folder:
        make_model(args, folder)
        for prompt, own, n, count in itertools.product(
            args.prompt_tokens, args.completion_tokens, args.group_size, args.prompts
        ):
            rows = {way: [] for way in args.ways}
            for _, way in itertools.product(range(args.rounds), args.ways):  # in turns
                job = {"way": way, "model": folder, "P": prompt, "C": own, "G": n, "B": count}
                command = [
                    sys.executable,
                    "-m",
                    "bench.bench_grpo",
                    *sys.argv[1:],
                    "--child",
                    json.dumps(job),
                ]
                done = subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"},
                )
                if done.returncode:
                    raise common.InputError(f"{way}: {done.stderr.strip()[-1500:]}")
                rows[way].append(json.loads(done.stdout.strip().split("\n")[-1]))
                if args.out:
                    with open(args.out, "a", encoding="utf-8") as handle:
                        handle.write(json.dumps(rows[way][-1]) + "\n")
            floor, ours = gflop(args, job) / rate, None
            for way, found in rows.items():
                m = {key: median(row[key] for row in found) for key in ("cpu", "wall", *PARTS, "added_mib")}
                ours = ours or m
                parts = "".join(
                    f"{m[key]:{width}.2f}"
                    for key, width in (
                        ("cpu", 7),
                        ("wall", 8),
                        ("sampling", 10),
                        ("reference", 11),
                        ("policy", 8),
                    )
                )
                ratios = f"{m['cpu'] / ours['cpu']:8.2f}x{m['added_mib'] / ours['added_mib']:9.2f}x{floor:9.2f} ({floor / m['cpu']:.0%})"
                print(
                    f"{prompt:5}{own:5}{n:4}{count:3}  {way:6}{parts}{m['added_mib']:11.0f}{ratios}",
                    flush=True,
                )
    return None


if __name__ == "__main__":
    sys.exit(main(parse_args()))
