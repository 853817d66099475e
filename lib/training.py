"""What 03 and 04 share of training: ranks, arguments, engine, schedule, batches, validation, curves. Knows no loss."""

import argparse
import functools
import hashlib
import json
import math
import os
import random
import resource
import socket
import sys
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import common
from common import InputError, Stopped
from lib import data, rollout, vlm

# ------------------------------------------------------------------------------------------------ ranks


@dataclass(frozen=True)
class Ranks:
    rank: int
    world: int
    device: torch.device

    @property
    def main(self):
        return self.rank == 0

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def sum(self, *values):
        """Sums over ranks, in float64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, value):
        """Every rank's picklable value, in rank order, on every rank."""
        values = [None] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values if self.world > 1 else [value]

    @contextmanager
    def together(self):
        """Inside, each rank works alone: no collectives. What one raises ends all of them with that cause, and none waits for it."""
        fault = None
        try:
            yield
        except Exception as error:  # KEEP: whatever it is, the other ranks must hear of it
            if self.world == 1:
                raise
            if not isinstance(error, (InputError, Stopped)):
                traceback.print_exc()
            fault = (
                (str(error), 2)
                if isinstance(error, InputError)
                else (common.first_line(f"{type(error).__name__}: {error}"), 3)
            )
        faults = self.gather(fault)
        rank = next((rank for rank, fault in enumerate(faults) if fault), None)
        if rank is None:
            return
        text, code = faults[rank]
        if not self.main:
            sys.exit(code)  # rank 0 says why
        raise (InputError if code == 2 else Stopped)(f"rank {rank}: {text}" if rank else text)


def setup(distributed=False):
    """Device and ranks as the launcher set them; plain `python` is one rank. distributed: make a process group even for one (DeepSpeed)."""
    cuda = torch.cuda.is_available()
    rank, world, local = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world == 1 and distributed and "MASTER_ADDR" not in os.environ:
        with socket.socket() as probe:  # a free port, so that two runs on one machine do not meet
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    if (world > 1 or distributed) and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return Ranks(rank, world, device)


# ------------------------------------------------------------------------------------------------ arguments and engine


def add_training_arguments(parser, epochs, lr, warmup_ratio, schedule, provenance):
    """The arguments that 03 and 04 share, in the order of every script; `provenance` tells where their defaults come from."""
    group = parser.add_argument_group("validation")
    group.add_argument(
        "--val",
        help="validation examples in any of the three formats; absent: best/ is the last state [paper App. A]",
    )
    group.add_argument(
        "--eval-every",
        type=float,
        default=1.0,
        help="epochs between validations [ours: the paper keeps the best checkpoint]",
    )
    group.add_argument(
        "--patience",
        type=int,
        help="stop after this many validations in succession without a better F1 [ours: never]",
    )
    group.add_argument("--eval-limit", type=int, help="validate on the first N examples [ours: all]")
    group.add_argument("--max-new-tokens", type=int, default=2048, help="longest response [paper §4]")
    group.add_argument(
        "--eval-rows",
        type=int,
        default=64,
        help="responses decoded together in validation [ours: fits 48 GB]",
    )
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=float, default=epochs, help=f"passes over --data [{provenance}]")
    group.add_argument("--lr", type=float, default=lr, help=f"peak learning rate of AdamW [{provenance}]")
    group.add_argument(
        "--warmup-ratio",
        type=float,
        default=warmup_ratio,
        help=f"share of the steps spent warming up [{provenance}]",
    )
    group.add_argument(
        "--schedule",
        choices=("cosine", "linear", "constant"),
        default=schedule,
        help="after the warm-up [ours: not in the paper]",
    )
    group.add_argument("--weight-decay", type=float, default=0.0, help="of AdamW [upstream default]")
    group.add_argument(
        "--clip", type=float, default=1.0, help="largest gradient norm; 0 clips nothing [upstream default]"
    )
    group.add_argument(
        "--batch-size", type=int, default=2, help="prompts a rank and step, or micro-step [paper App. A]"
    )
    group.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="trade time for memory [ours: off]",
    )
    group = parser.add_argument_group("logging and checkpoints")
    group.add_argument(
        "--save-every",
        type=int,
        default=50,
        help="steps between two states of OUT/last [ours: minutes, not hours, are lost]",
    )
    group.add_argument(
        "--stop-after",
        type=int,
        help="stop, saved, after this step of the schedule; the same command goes on [ours: for tests]",
    )
    group.add_argument(
        "--fresh",
        action="store_true",
        help="delete what OUT holds of an earlier run [ours: off, a run goes on]",
    )
    group = parser.add_argument_group("runtime")
    group.add_argument("--seed", type=int, default=0, help="of data order, LoRA and sampling [ours: 0]")
    group.add_argument(
        "--dtype",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="auto: as ds_zero2.json says on a GPU, fp32 on CPU [ours]",
    )
    group.add_argument(
        "--ds-config",
        default=str(Path(__file__).parent.parent / "ds_zero2.json"),
        help="DeepSpeed's settings [paper App. A: ZeRO-2]",
    )
    group.add_argument(
        "--local_rank", "--local-rank", type=int, default=-1, help="set by the deepspeed launcher"
    )


def read_ds_config(args, ranks):
    """(DeepSpeed's settings, dtype): args.dtype resolved against ds_zero2.json and the device."""
    try:
        config = json.loads(Path(args.ds_config).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--ds-config {args.ds_config}: {common.first_line(error)}") from None
    if "auto" in json.dumps(config):
        raise InputError(
            f'--ds-config {args.ds_config}: holds "auto", which only the HF Trainer fills in: write the value'
        )
    wanted = config.get("bf16", {}).get("enabled", False) and ranks.device.type == "cuda"
    bf16 = wanted if args.dtype == "auto" else args.dtype == "bf16"
    return config | {"bf16": {"enabled": bf16}}, vlm.DTYPES["bf16" if bf16 else "fp32"]


def make_engine(model, args, config, micro_steps):
    """DeepSpeed's engine for the trainable parameters. `micro_steps` backward() + step() make one update."""
    import deepspeed

    config = config | {
        "train_micro_batch_size_per_gpu": args.batch_size,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": args.clip,  # absent, DeepSpeed clips at 1.0 silently
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": args.lr, "weight_decay": args.weight_decay, "torch_adam": True},
        },
        "steps_per_print": 10**9,
    }
    for name in (
        "tensorboard",
        "csv_monitor",
    ):  # DeepSpeed's own default is a folder below the working directory
        if config.get(name, {}).get("enabled"):
            config[name] = {"output_path": str(Path(args.out) / "monitor"), "job_name": name} | config[name]
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainable = [parameter for parameter in vlm.check_lora(model).parameters() if parameter.requires_grad]
    engine = deepspeed.initialize(
        model=model, model_parameters=trainable, config=config, dist_init_required=False
    )[0]
    # DeepSpeed's own exclude_frozen_parameters keeps one of two tied weights: the whole head in every checkpoint
    engine.module_state_dict = lambda **_: {
        name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad
    }
    return engine


def check_arguments(args, rows=None, examples=None):
    """Numbers that would fail, or mean something else, hours later. rows: of one update, over all ranks. Raises InputError."""
    least = {
        "batch_size": 1,
        "grad_accum": 1,
        "save_every": 1,
        "max_new_tokens": 1,
        "eval_rows": 1,
        "patience": 1,
        "group_size": 2,
    }
    least |= {
        "lora_rank": 1,
        "limit": 1,
        "eval_limit": 1,
        "stop_after": 1,
        "log_samples_every": 1,
        "clip": 0,
        "warmup_ratio": 0,
        "kl_coef": 0,
    }
    for name, bound in least.items():
        value = getattr(args, name, None)
        if value is not None and not value >= bound:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected at least {bound}")
    for name in ("epochs", "lr", "eval_every", "temperature"):
        if hasattr(args, name) and not 0 < getattr(args, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected a number above 0")
    if args.patience and not args.val:
        raise InputError("--patience needs --val: without a validation F1 nothing can stop improving")
    if rows and rows > examples:
        raise InputError(
            f"one update takes {rows} rows over all ranks, --data has {examples}: lower --batch-size or --grad-accum"
        )


def zero_loss(model):
    """0 with a graph to every trainable parameter, for a rank that has nothing to add while the others do."""
    return sum(parameter.sum() for parameter in model.parameters() if parameter.requires_grad) * 0.0


# ------------------------------------------------------------------------------------------------ schedule and batches


def seed_step(seed, step, rank):
    """What still draws from torch's own generator in a step (LoRA dropout) depends on (seed, step, rank) alone."""
    torch.manual_seed(
        int.from_bytes(hashlib.sha256(f"{seed}:{step}:{rank}".encode()).digest()[:8], "big") >> 1
    )


def lr_at(step, total, args):
    """Learning rate of update `step` (from 0) of `total`: linear warm-up, then args.schedule; never 0, so no update is wasted."""
    warmup = math.ceil(total * args.warmup_ratio)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return (
        args.lr
        * {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[args.schedule]
    )


def batch_indices(n, size, step, seed):
    """Indices of step's batch: the epochs' permutations of range(n), one after the other, cut into pieces of `size`.

    A function of (seed, epoch) alone: nothing to save, no row dropped, and 2 ranks × B see what 1 rank × 2B sees.
    """
    indices = []
    for position in range(step * size, (step + 1) * size):
        epoch, place = divmod(position, n)
        indices.append(_permutation(n, seed, epoch)[place])
    return indices


@functools.lru_cache(maxsize=4)
def _permutation(n, seed, epoch):
    return random.Random(f"{seed}:{epoch}").sample(range(n), n)


def fingerprint(model):
    """A number that changes when any trainable weight does."""
    return math.fsum(p.detach().double().abs().sum().item() for p in model.parameters() if p.requires_grad)


def peak_memory():
    """MiB: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ------------------------------------------------------------------------------------------------ validation


def validate(model, processor, examples, prompt, ranks, args):
    """Greedy answers to `examples`, shared out over the ranks → (scores of common.score, answers as rows)."""
    mine = examples[ranks.rank :: ranks.world]
    items = [(common.PROMPTS[prompt].format(text=example.text), example.image) for example in mine]
    was_training = model.training
    model.eval()  # KEEP: generation in train() under gradient checkpointing is silently wrong
    bar = tqdm(
        total=len(items), desc="validate", unit="tweet", disable=None if ranks.main else True, leave=False
    )
    with bar, ranks.together():
        samples = rollout.generate(
            model, processor, items, 1, args.max_new_tokens, 0.0, batch_rows=args.eval_rows, progress=bar
        )
    model.train(was_training)
    rows = [
        {"id": example.id, "response": sample.text, "finished": sample.finished}
        for example, [sample] in zip(mine, samples)
    ]
    rows = {row["id"]: row for part in ranks.gather(rows) for row in part}
    rows = [rows[example.id] for example in examples]
    pred = [common.parse_response(row["response"], direct=prompt == "direct").quintuples for row in rows]
    return common.score(pred, [example.quintuples for example in examples]), rows


def validate_and_keep(run, model, processor, val, prompt, step, ranks, args):
    """Validate, keep best/ → the row's validation fields. Without a validation set the newest state is the best."""
    if not val:
        run.keep_best(model, processor, prompt, step, run.state["best"] + 1)
        return {}
    scores, rows = validate(model, processor, val, prompt, ranks, args)
    with ranks.together():
        if ranks.main:
            data.write_atomic(
                run.out / "validation" / f"step-{step}.jsonl", "".join(map(data.jsonl_line, rows))
            )
    run.keep_best(model, processor, prompt, step, scores["jmere"]["f1"])
    return {f"val_{name}_f1": values["f1"] for name, values in scores.items()}


def draw_curves(out):
    """OUT/curves.png from metrics.jsonl: reward and its parts, loss, KL, length, validation F1, as far as the run logs them."""
    from matplotlib.figure import Figure  # here: only training needs it, and pyplot's global state nobody

    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    panels = (
        ("reward", "accuracy", "partial", "format"),
        ("loss",),
        ("kl",),
        ("length",),
        ("val_jmere_f1", "val_mner_f1"),
    )
    panels = [
        kept for panel in panels if (kept := [name for name in panel if any(name in row for row in rows)])
    ]
    figure = Figure(figsize=(7, 2.2 * len(panels)), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], panels):
        for name in panel:
            points = [(row["step"], row[name]) for row in rows if name in row]
            axes.plot(*zip(*points), label=name, marker="." if len(points) < 50 else None)
        axes.legend(loc="best", fontsize=8)
        axes.grid(alpha=0.3)
    axes.set_xlabel("step")
    figure.savefig(out / ".curves.tmp.png")
    os.replace(out / ".curves.tmp.png", out / "curves.png")
