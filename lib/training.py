"""What 03 and 04 share of training: ranks, arguments, engine, schedule, batches, validation, curves. Knows no
loss."""

import argparse
import atexit
import functools
import hashlib
import io
import json
import math
import os
import random
import resource
import socket
import sys
import time
import traceback
import warnings
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

import common
from common import InputError, Stopped, above, at_least
from lib import data, lora, rollout, vlm

# Seconds before the interpreter tears itself down. A thread of gloo frees the tensors of the last collective,
# and wants Python's lock for it: refused in the teardown, it aborts the process (3 of 50 exits, measured).
GLOO_LETS_GO = 0.5

# -------------------------------------------------------------------------------- ranks


@dataclass(frozen=True)
class Ranks:
    """The processes of this run: this one's number, how many there are, and the device it computes on."""

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

    def sum_by_name(self, numbers):
        """{name: number}, the same names on every rank → {name: sum over ranks}."""
        return dict(zip(numbers, self.sum(*numbers.values()), strict=True))

    def gather(self, value):
        """Every rank's picklable value, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self):
        """All ranks fail together. Inside, each works alone, without collectives; what one raises ends all of
        them with that cause, and none waits for it."""
        fault = None
        try:
            yield
        except Exception as error:  # KEEP: whatever it is, the other ranks must hear of it
            if self.world == 1:
                raise
            if isinstance(error, InputError):
                fault = str(error), InputError.exit_code
            else:
                if not isinstance(error, Stopped):
                    traceback.print_exc()
                fault = common.first_line(f"{type(error).__name__}: {error}"), Stopped.exit_code
        faults = self.gather(fault)
        rank = next((rank for rank, fault in enumerate(faults) if fault), None)
        if rank is None:
            return
        text, code = faults[rank]
        if not self.main:
            sys.exit(code)  # rank 0 prints the message; this rank only ends with the same exit code
        raise (InputError if code == InputError.exit_code else Stopped)(
            f"rank {rank}: {text}" if rank else text
        )


def setup(distributed=False, hours=None):
    """Ranks as the launcher set them; plain `python` is one. distributed: make a process group even for one
    (DeepSpeed).

    hours: how long a rank may wait for the others before it gives up [NCCL's own default: ten minutes].
    """
    cuda = torch.cuda.is_available()
    quieten(cuda)
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
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
        timeout = timedelta(hours=hours) if hours else None
        dist.init_process_group(
            "nccl" if cuda else "gloo", device_id=device if cuda else None, timeout=timeout
        )
        if not cuda:
            atexit.register(time.sleep, GLOO_LETS_GO)
    return Ranks(rank, world, device)


def quieten(cuda):
    """What libraries say to each other's authors would bury what is said to the user: deprecations, choices
    without choice."""
    for package in ("torch", "transformers", "deepspeed", "peft"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=rf"{package}\.")
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it chose so
    if os.environ.get("RANK", "0") != "0":
        transformers.utils.logging.disable_progress_bar()  # rank 0 shows its own


def progress_bar(name, total, steps, ranks):
    """The bar of a run, on rank 0 and a terminal alone; steps: those still to do."""
    hidden = None if ranks.main else True
    return tqdm(total=total, initial=total - len(steps), desc=name, unit="step", disable=hidden)


def say(bar, text):
    """A sign of life inside a long step: what it is at, on a terminal."""
    if sys.stderr.isatty():
        bar.set_postfix_str(text)


# -------------------------------------------------------------------------------- arguments


def add_io_arguments(parser, data, out):
    """Where a training run reads and writes; data, out: the script's own defaults."""
    group = parser.add_argument_group("io")
    group.add_argument("--data", default=data, help="training examples, in any of the three formats [ours]")
    group.add_argument(
        "--image-dir", default="data/img", help="folder of the images, or beside the file [ours]"
    )
    group.add_argument("--out", default=out, help="folder of the run [ours]")
    group.add_argument(
        "--val", default="data/val.json", help="validation examples, in any format [paper App. A]"
    )
    group.add_argument(
        "--no-val", action="store_true", help="no validation: best/ is the last state [ours: off]"
    )
    group.add_argument(
        "--skip-bad", action="store_true", help="drop bad rows and images, with a count [ours: stop]"
    )
    group.add_argument(
        "--merge-repeats", action="store_true", help="join rows of the same text and image [ours: as in V2]"
    )
    group.add_argument("--limit", type=at_least(1), help="train on the first N examples [ours: all]")


def add_training_arguments(parser, epochs, lr, warmup_ratio, schedule, provenance):
    """The other arguments that 03 and 04 share; `provenance` tells where these defaults come from."""
    group = parser.add_argument_group("validation")
    group.add_argument("--eval-every", type=above(0), default=1.0, help="epochs between validations [ours]")
    group.add_argument(
        "--patience", type=at_least(1), help="stop after N validations without a better F1 [ours: never]"
    )
    group.add_argument("--eval-limit", type=at_least(1), help="validate on the first N examples [ours: all]")
    group.add_argument("--max-new-tokens", type=at_least(1), default=2048, help="longest response [paper §4]")
    group.add_argument(
        "--eval-rows", type=at_least(1), default=64, help="responses decoded together [ours: fits 48 GB]"
    )
    group = parser.add_argument_group("images")
    group.add_argument(
        "--max-pixels",
        type=at_least(1),
        help=f"an image is scaled down to so many, where its family scales [ours: {vlm.MAX_PIXELS}]",
    )
    group.add_argument(
        "--min-pixels", type=at_least(1), help="an image is scaled up to so many [upstream default]"
    )
    _add_optimisation_arguments(parser, epochs, lr, warmup_ratio, schedule, provenance)
    group = parser.add_argument_group("logging and checkpoints")
    group.add_argument(
        "--save-every", type=at_least(1), default=50, help="steps between two states of OUT/last [ours]"
    )
    group.add_argument(
        "--stop-after", type=at_least(1), help="stop, saved, after this step [ours: for tests]"
    )
    group.add_argument(
        "--fresh", action="store_true", help="delete an earlier run in OUT [ours: a run goes on]"
    )
    group = parser.add_argument_group("runtime")
    group.add_argument("--seed", type=int, default=0, help="of data order, LoRA and sampling [ours]")
    group.add_argument(
        "--dtype",
        choices=("auto", *vlm.DTYPES),
        default="auto",
        help="auto: as ds_zero2.json says on a GPU, fp32 on CPU [ours]",
    )
    settings = Path(__file__).parent.parent / "ds_zero2.json"
    group.add_argument(
        "--ds-config", default=str(settings), help="DeepSpeed's settings [paper App. A: ZeRO-2]"
    )
    group.add_argument("--timeout", type=above(0), default=6.0, help="hours a rank waits for another [ours]")
    group.add_argument(
        "--local_rank", "--local-rank", type=int, default=-1, help="set by the deepspeed launcher"
    )


def _add_optimisation_arguments(parser, epochs, lr, warmup_ratio, schedule, provenance):
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=above(0), default=epochs, help=f"passes over --data [{provenance}]")
    group.add_argument("--lr", type=above(0), default=lr, help=f"peak learning rate of AdamW [{provenance}]")
    group.add_argument(
        "--warmup-ratio",
        type=share,
        default=warmup_ratio,
        help=f"share of the steps that warm up [{provenance}]",
    )
    schedules = ("cosine", "linear", "constant")
    group.add_argument("--schedule", choices=schedules, default=schedule, help="after the warm-up [ours]")
    group.add_argument(
        "--weight-decay", type=at_least(0, float), default=0.0, help="of AdamW [upstream default]"
    )
    group.add_argument(
        "--clip",
        type=at_least(0, float),
        default=1.0,
        help="largest gradient norm; 0: none [upstream default]",
    )
    group.add_argument(
        "--batch-size", type=at_least(1), default=2, help="prompts a rank and (micro-)step [paper App. A]"
    )
    group.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="trade time for memory [ours: off]",
    )


def share(text):
    """An argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a share, 0 to 1")
    return value


def load_splits(args, need, made_by=data.RELEASE):
    """--data and --val → two lists of Example, images not looked at yet. Raises InputError.

    need: fields every row of --data must have; made_by: where --data comes from.
    """
    if args.patience and args.no_val:
        raise InputError("--patience needs --val: without a validation F1 nothing can stop improving")
    data.existing("--data", args.data, made_by)
    if not args.no_val:
        data.existing("--val", args.val, f"{data.RELEASE}; --no-val trains without")
    options = {"skip_bad": args.skip_bad, "merge_repeats": args.merge_repeats}
    train = data.load_examples(args.data, args.image_dir, need=need, **options)[: args.limit]
    if args.no_val:
        return train, []
    return train, data.load_examples(args.val, args.image_dir, need=("quintuples",), **options)[
        : args.eval_limit
    ]


def check_sizes(args, rows, examples):
    """Raises InputError where an update takes more rows than there are, or there is no update. rows: over all
    ranks."""
    if rows > examples:
        raise InputError(
            f"one update takes {rows} rows over all ranks, --data has {examples}: "
            "lower --batch-size or --grad-accum"
        )
    if int(examples * args.epochs) == 0:
        raise InputError(f"--epochs {args.epochs:g} of {examples} rows: no update at all")


# -------------------------------------------------------------------------------- engine


def read_ds_config(args, ranks):
    """(DeepSpeed's settings, dtype): args.dtype resolved against ds_zero2.json and the device. Raises
    InputError."""
    try:
        config = json.loads(Path(args.ds_config).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--ds-config {args.ds_config}: {common.first_line(error)}") from None
    if "auto" in json.dumps(config):
        raise InputError(
            f'--ds-config {args.ds_config}: holds "auto", which only the HF Trainer fills in: write the value'
        )
    bf16 = args.dtype == "bf16"
    if args.dtype == "auto":
        bf16 = config.get("bf16", {}).get("enabled", False) and ranks.device.type == "cuda"
    return config | {"bf16": {"enabled": bf16}}, vlm.DTYPES["bf16" if bf16 else "fp32"]


def make_engine(model, args, config, micro_steps):
    """DeepSpeed's engine for the trainable parameters. `micro_steps` backward() + step() make one update."""
    import deepspeed

    adamw = {"lr": args.lr, "weight_decay": args.weight_decay, "torch_adam": True}
    config = config | {
        "train_micro_batch_size_per_gpu": args.batch_size,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": args.clip,  # absent, DeepSpeed clips at 1.0 silently
        "optimizer": {"type": "AdamW", "params": adamw},
        "steps_per_print": 10**9,
    }
    # DeepSpeed's own default is a folder below the working directory
    if config.get("tensorboard", {}).get("enabled"):
        where = {"output_path": str(Path(args.out) / "monitor"), "job_name": "tensorboard"}
        config["tensorboard"] = where | config["tensorboard"]
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainable = [parameter for parameter in lora.check_lora(model).parameters() if parameter.requires_grad]
    # each rank would say what it built
    said = sys.stdout if os.environ.get("RANK", "0") == "0" else io.StringIO()
    with redirect_stdout(said):
        engine = deepspeed.initialize(
            model=model, model_parameters=trainable, config=config, dist_init_required=False
        )[0]

    def adapter_state(**_):
        return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}

    # DeepSpeed's own exclude_frozen_parameters keeps one of two tied weights: the whole head in every
    # checkpoint
    engine.module_state_dict = adapter_state
    return engine


@contextmanager
def out_of_memory(advice):
    """Inside, a GPU without room ends the run with one line that names the arguments that help, and loses no
    state."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        fault = common.first_line(error)
        raise Stopped(
            f"no room on the GPU ({fault}): {advice}; with them the run goes on from last/"
        ) from None


def zero_loss(model):
    """0 with a graph to every trainable parameter, for a rank that has nothing to add while the others do."""
    return sum(parameter.sum() for parameter in model.parameters() if parameter.requires_grad) * 0.0


def fingerprint(model):
    """A number that changes when any trainable weight does."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return math.fsum(parameter.detach().double().abs().sum().item() for parameter in trainable)


def peak_memory():
    """MiB: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# -------------------------------------------------------------------------------- schedule and batches


def count_steps(args, examples, rows):
    """→ (updates in all, updates between two validations); rows: examples of one update. The last update may
    run over."""
    total = math.ceil(int(examples * args.epochs) / rows)
    return total, max(1, round(examples * args.eval_every / rows))


def seed_step(seed, step, rank):
    """What still draws from torch's own generator in a step (LoRA dropout) depends on (seed, step, rank)
    alone."""
    digest = hashlib.sha256(f"{seed}:{step}:{rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def lr_at(step, total, args):
    """Learning rate of update `step` (from 0) of `total`: linear warm-up, then args.schedule; never 0: no
    update is wasted."""
    warmup = math.ceil(total * args.warmup_ratio)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return args.lr * left[args.schedule]


def set_learning_rate(engine, step, total, args):
    """Give the optimiser the rate of update `step`, and return it."""
    lr = lr_at(step, total, args)
    for parameters in engine.optimizer.param_groups:
        parameters["lr"] = lr
    return lr


def batch_indices(n, size, step, seed):
    """Indices of step's batch: the epochs' permutations of range(n), one after the other, cut into pieces of
    `size`.

    A function of (seed, epoch) alone: nothing to save, no row dropped, and 2 ranks × B see what 1 rank × 2B
    sees.
    """
    indices = []
    for position in range(step * size, (step + 1) * size):
        epoch, place = divmod(position, n)
        indices.append(_permutation(n, seed, epoch)[place])
    return indices


@functools.lru_cache(maxsize=4)
def _permutation(n, seed, epoch):
    return random.Random(f"{seed}:{epoch}").sample(range(n), n)


# -------------------------------------------------------------------------------- validation


def validate(model, processor, examples, ranks, args, server=None):
    """Greedy answers to `examples`, shared out over the ranks → (scores of common.score, answers as rows).

    server: the served.Server that gives them, where one does.
    """
    mine = examples[ranks.rank :: ranks.world]
    items = [(common.PROMPTS[args.prompt].format(text=example.text), example.image) for example in mine]
    was_training = model.training
    model.eval()  # KEEP: generation in train() under gradient checkpointing is silently wrong
    bar = tqdm(
        total=len(items), desc="validate", unit="tweet", disable=None if ranks.main else True, leave=False
    )
    if server:
        server.publish(model)
    with bar, ranks.together():
        if server:
            samples = server.sample(items, 1, args.max_new_tokens, 0.0)
        else:
            samples = rollout.generate(
                model, processor, items, 1, args.max_new_tokens, 0.0, batch_rows=args.eval_rows, progress=bar
            )
    model.train(was_training)
    rows = {}
    for example, [sample] in zip(mine, samples, strict=True):
        rows[example.id] = {"id": example.id, "response": sample.text, "finished": sample.finished}
    for part in ranks.gather(rows):
        rows |= part
    rows = [rows[example.id] for example in examples]
    direct = args.prompt == "direct"
    pred = [common.parse_response(row["response"], direct).quintuples for row in rows]
    return common.score(pred, [example.quintuples for example in examples]), rows


def validate_and_keep(run, model, processor, val, step, ranks, args, server=None):
    """Validate, keep best/ → the row's validation fields. Without a validation set the newest state is the
    best."""
    if not val:
        run.keep_best(model, processor, step, run.state["best"] + 1)
        return {}
    scores, rows = validate(model, processor, val, ranks, args, server)
    with ranks.together():
        if ranks.main:
            lines = "".join(map(data.jsonl_line, rows))
            data.write_atomic(run.out / "validation" / f"step-{step}.jsonl", lines)
    run.keep_best(model, processor, step, scores[common.HEADLINE]["f1"])
    return {f"val_{name}_f1": values["f1"] for name, values in scores.items()}


def draw_curves(out):
    """OUT/curves.png from metrics.jsonl: the reward and its parts, loss, KL, length, validation F1, as far as
    they are there."""
    from matplotlib.figure import Figure  # here: only training needs it, and pyplot's global state nobody

    rows = [row for _, row in data.read_jsonl(out / "metrics.jsonl")]
    # of the reward, by the names that 04 gave them
    parts = [name for name in rows[0] if f"{name}_std" in rows[0]]
    panels = []
    for panel in (parts, ["loss"], ["kl"], ["length"], ["val_jmere_f1", "val_mner_f1"]):
        names = [name for name in panel if any(name in row for row in rows)]
        if names:
            panels.append(names)
    figure = Figure(figsize=(7, 2.2 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, names in zip(grid, panels, strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, label=name, marker="." if len(points) < 50 else None)
        axes.legend(loc="best", fontsize=8)
        axes.grid(alpha=0.3)
    axes.set_xlabel("step")
    figure.savefig(out / ".curves.tmp.png")
    os.replace(out / ".curves.tmp.png", out / "curves.png")
