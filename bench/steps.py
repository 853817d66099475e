"""One GRPO step of ours and one of TRL's on the same tiny model, with responses of given lengths.
bench_grpo.py runs each in a process of its own.

    B prompts   G responses a prompt   P prompt tokens   C response tokens   N = B·G rows   V vocabulary
"""

import argparse
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, LogitsProcessor

import common
from demo.base import build
from lib import layers, lora, products, rollout, training, vlm

PARTS = ("sampling", "reference", "policy")
WARM_UP = 2  # tokens of the responses of the step that is not measured
KL_COEF = 0.01
LR = 1e-4


@dataclass
class Job:
    """What one process measures."""

    way: str  # of WAYS
    model: str  # a folder
    prompt_tokens: int  # P
    lengths: list  # [B][G] response tokens


# ------------------------------------------------------------------------------------------------ inputs


def make_model(args, folder):
    """A checkpoint with random weights in `folder`, its vocabulary widened to --vocab."""
    shape = {name: getattr(args, name) for name in ("hidden", "layers", "heads", "kv_heads", "ffn")}
    build.build(args.arch, folder, build.corpus(), size=build.SIZE | shape)
    config = AutoConfig.from_pretrained(folder)
    config.text_config.vocab_size = max(args.vocab, config.text_config.vocab_size)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)


def make_items(processor, folder, count, tokens):
    """[(text, image path)] whose prompts have exactly `tokens` tokens, image and chat template included.

    An image has 64 (Qwen) or 16 (LLaVA) of them. Raises InputError where they alone are more.
    """
    scale = 4 if "Qwen" in type(processor).__name__ else 1
    items = []
    for i in range(count):
        path = str(Path(folder) / f"{i}.png")
        Image.new("RGB", (build.SIDE * scale, build.SIDE * scale), (40 * i % 256, 90, 160)).save(path)
        words = tokens
        found = 0
        while found != tokens:
            words += tokens - found if found else 0
            if words < 0:
                needed = prompt_size(processor, "", path)
                fault = f"image and template alone have {needed}"
                raise common.InputError(f"--prompt-tokens {tokens}: {fault}: ask for more")
            found = prompt_size(processor, "a " * words, path)
        items.append(("a " * words, path))
    return items


def prompt_size(processor, text, path):
    return vlm.processor_inputs(processor, text, path)["input_ids"].shape[1]


# ------------------------------------------------------------------------------------------------ clock


def now():
    """CPU seconds of this process; with a GPU, wall-clock seconds once it has done what it was given."""
    if not torch.cuda.is_initialized():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Clock:
    """Seconds of a step and of its parts."""

    def __init__(self):
        self.parts = dict.fromkeys(PARTS, 0.0)
        self.began = now()
        self.began_wall = time.perf_counter()

    @contextmanager
    def part(self, name):
        start = now()
        yield
        self.parts[name] += now() - start

    def row(self):
        """What is in no other part is the policy's: forward and backward pass, update, and whatever else."""
        cpu = now() - self.began
        self.parts["policy"] = cpu - self.parts["sampling"] - self.parts["reference"]
        return {"cpu": cpu, "wall": time.perf_counter() - self.began_wall, **self.parts}


def memory(field):
    """MiB of this process, VmRSS (now) or VmHWM (at most since reset_peak); on a GPU, what is allocated
    there."""
    if torch.cuda.is_initialized():
        peak = field == "VmHWM"
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**20
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise common.InputError(f"/proc/self/status has no {field}: memory is measured on Linux")


def settled_memory(model):
    """MiB once every weight has been read: a loaded file is mapped, and counts from its first use."""
    for parameter in model.parameters():
        parameter.detach().sum().item()
    return memory("VmRSS")


def reset_peak():
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


# ------------------------------------------------------------------------------------------------ ours


def measure_ours(job, args):
    """→ {"cpu", "wall", part: seconds, "added_mib"} of the second step."""
    if job.way in WITHOUT:
        setattr(*WITHOUT[job.way])  # for good: the process is this way's own
    model, processor = vlm.load(job.model, vlm.DTYPES[args.dtype], args.device)
    torch.manual_seed(0)
    model = lora.add_lora(model, args.lora_rank, args.lora_rank).eval()
    items = make_items(processor, job.model, len(job.lengths), job.prompt_tokens)
    update = engine_update(model, job, args) if job.way == "engine" else plain_update(model)
    base = settled_memory(model)
    step_of_ours(Clock(), model, processor, items, warm_up(job), update, job.way, args.static_cache)
    reset_peak()
    clock = Clock()
    step_of_ours(clock, model, processor, items, job.lengths, update, job.way, args.static_cache)
    return clock.row() | {"added_mib": memory("VmHWM") - base}


def warm_up(job):
    return [[WARM_UP] * len(group) for group in job.lengths]


def step_of_ours(clock, model, processor, items, lengths, update, way, static=False):
    """Encode, sample, score, update. clock: has part(name), told "sampling" and "reference".

    lengths: [B][G]; update(loss, last): takes the loss of one prompt of `items`.
    """
    with clock.part("sampling"):
        prompts = vlm.encode(model, processor, items)
        samples = sample(model, processor, prompts, lengths, static)
    losses = []
    for prompt, group in zip(prompts, samples, strict=True):
        ids = [sample.completion_ids for sample in group]
        scored = ([prompt], [ids], 1.0, way != "plain")
        with clock.part("reference"), torch.no_grad(), lora.reference(model):
            ref_logps, _, _ = rollout.completion_logps(model, *scored)
        logps, _, mask = rollout.completion_logps(model, *scored)
        loss = grpo_loss(logps, ref_logps, random_advantages(len(ids), logps.device), mask)
        losses.append(loss.item())
        update(loss / len(prompts), last=len(losses) == len(prompts))


def sample(model, processor, prompts, lengths, static):
    """Responses of these lengths, [B][G]:

    each draws the last id of the vocabulary at its end, and never before.
    """
    size = vlm.base_model(model).lm_head.weight.shape[0]
    plain_uniforms, plain_stop_ids = rollout.uniforms, vlm.stop_ids

    def uniforms(n, length, prompt):
        numbers = 0.999 * plain_uniforms(n, length, prompt)
        for row, end in enumerate(lengths[prompt]):
            numbers[row, end - 1] = 1 - 2**-24
        return numbers

    rollout.uniforms = uniforms
    vlm.stop_ids = lambda *_: [size - 1]
    try:
        group_size = len(lengths[0])
        longest = max(map(max, lengths))
        samples = rollout.sample(
            model, processor, prompts, group_size, longest, 1.0, keys=range(len(prompts)), static=static
        )
    finally:
        rollout.uniforms, vlm.stop_ids = plain_uniforms, plain_stop_ids
    found = [[len(sample.completion_ids) for sample in group] for group in samples]
    check_lengths("ours", found, lengths)
    return samples


def check_lengths(way, found, wanted):
    if found != wanted:
        fault = f"responses of {found} tokens, expected {wanted}"
        raise common.InputError(f"{way}: sampled {fault}: the comparison is not one")


def random_advantages(count, device):
    """Of rewards drawn at random: what they are does not change what a step costs."""
    rewards = torch.rand(count, device=device)
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


def grpo_loss(logps, ref_logps, advantages, mask):
    """Eq. 7 of one group: logps [G, C] with graph, ref_logps [G, C], advantages [G], mask [G, C] → scalar."""
    ratio = torch.exp(logps - logps.detach())
    gap = ref_logps - logps
    kl = torch.exp(gap) - gap - 1
    per_token_loss = KL_COEF * kl - ratio * advantages[:, None]
    per_response = (per_token_loss * mask).sum(1) / mask.sum(1)
    return per_response.mean()


def plain_update(model):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR)

    def update(loss, last):
        loss.backward()
        if last:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return update


def engine_update(model, job, args):
    """The same through DeepSpeed, as 04 does it."""
    parser = argparse.ArgumentParser()
    training.add_training_arguments(parser, 1, LR, 0.0, "constant", "")
    settings = parser.parse_args(["--dtype", args.dtype, "--batch-size", str(len(job.lengths))])
    ranks = training.setup(distributed=True)
    config, _ = training.read_ds_config(settings, ranks)
    engine = training.make_engine(model, settings, config, len(job.lengths))

    def update(loss, last):
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(loss, scale_wrt_gas=False)
        engine.step()

    return update


# ------------------------------------------------------------------------------------------------ TRL


class EndAt(LogitsProcessor):
    """Rows of generate() end at these lengths [N], and never before. stops: every id that ends a response."""

    def __init__(self, lengths, stops):
        self.lengths = torch.tensor(lengths)
        self.stops = stops
        self.drawn = 0  # tokens

    def __call__(self, input_ids, scores):
        self.drawn += 1
        scores[:, self.stops] = -torch.inf
        ends = (self.lengths == self.drawn).to(scores.device)
        scores[ends] = -torch.inf
        scores[ends, self.stops[0]] = 0.0
        return scores


def measure_trl(job, args):
    """→ what measure_ours returns."""
    processor = vlm.load_processor(job.model)
    model = AutoModelForImageTextToText.from_pretrained(
        job.model, dtype=vlm.DTYPES[args.dtype], attn_implementation="sdpa"
    )
    model = lora.add_lora(model.requires_grad_(False), args.lora_rank, args.lora_rank)
    items = make_items(processor, job.model, len(job.lengths), job.prompt_tokens)
    config = trl_config(job, use_cpu=args.device == "cpu", bf16=args.dtype == "bf16")
    trainer = make_trainer(model, processor, items, config)
    base = settled_memory(model)
    row = {}

    def begin():
        reset_peak()
        row["clock"] = Clock()
        return row["clock"]

    def end():
        row.update(row.pop("clock").row() | {"added_mib": memory("VmHWM") - base})

    run_trl(trainer, [warm_up(job), job.lengths], begin, end)
    return row


def trl_config(job, **options):
    """GRPOConfig of our step: a group is a backward pass, k3 is ours, nothing is recomputed."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=str(Path(job.model) / "trl"),
        gradient_checkpointing=False,
        per_device_train_batch_size=len(job.lengths[0]),
        gradient_accumulation_steps=len(job.lengths),
        num_generations=len(job.lengths[0]),
        max_completion_length=max(map(max, job.lengths)),
        cache_implementation="static" if job.way == "trl-static" else None,
        learning_rate=LR,
        beta=KL_COEF,
        use_bias_correction_kl=False,
        loss_type="grpo",
        temperature=1.0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )


def make_trainer(model, processor, items, config):
    """GRPOTrainer, with rewards drawn at random.

    Its fused head would score prompt positions on a CPU too; it is held to its GPU behaviour, completions
    only."""
    import trl.trainer.utils
    from datasets import Dataset
    from trl import GRPOTrainer

    def reward(completions, completion_ids, **kwargs):
        trainer.found_lengths = [len(ids) for ids in completion_ids]
        return torch.rand(len(completions)).tolist()

    trl.trainer.utils._use_triton = lambda device: True
    rows = []
    for text, path in items:
        rows.append({"prompt": [{"role": "user", "content": text}], "image": Image.open(path)})
    trainer = GRPOTrainer(model, reward, config, Dataset.from_list(rows), processing_class=processor)
    trainer.model.delete_adapter("ref")  # a copy of a fresh LoRA: the base is the reference, as in ours
    return trainer


def run_trl(trainer, steps, begin, end):
    """A step for each of `steps`, [B][G] lengths of its responses; the last is between begin() and end().

    begin: returns a clock, which is told "sampling" and "reference".
    """
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_step_begin(self, config, state, control, **kwargs):
            set_lengths(trainer, flat(steps[state.global_step]))
            if state.global_step == len(steps) - 1:
                time_trl(trainer, begin())

        def on_step_end(self, config, state, control, **kwargs):
            check_lengths("TRL", trainer.found_lengths, flat(steps[state.global_step - 1]))
            if state.global_step == len(steps):
                end()

    trainer.args.max_steps = len(steps)
    trainer.add_callback(Watch())
    trainer.train()


def set_lengths(trainer, lengths):
    """The rows that TRL samples next end at `lengths` [N]."""
    trainer.generation_config.max_new_tokens = max(lengths)
    if min(lengths) == max(lengths):
        trainer.generation_config.min_new_tokens = max(lengths)
        return
    end_at = EndAt(lengths, trainer.eos_token_ids)
    generate = type(trainer.model).generate.__get__(trainer.model)

    def generate_to_length(*args, **kwargs):
        return generate(*args, **kwargs, logits_processor=[end_at])

    trainer.model.generate = generate_to_length


def flat(lengths):
    return [length for group in lengths for length in group]


def time_trl(trainer, clock):
    """From here on `clock` is told when TRL samples, and when it scores without a gradient."""
    sampling = trainer._generate
    scoring = trainer._get_per_token_logps_and_entropies

    def timed_sampling(*args, **kwargs):
        with clock.part("sampling"):
            return sampling(*args, **kwargs)

    def timed_scoring(*args, **kwargs):
        if torch.is_grad_enabled():
            return scoring(*args, **kwargs)
        with clock.part("reference"):
            return scoring(*args, **kwargs)

    trainer._generate = timed_sampling
    trainer._get_per_token_logps_and_entropies = timed_scoring


def no_written_out_layers(model, few_rows=False):
    return None


def whole_last_layer(self, inputs, layout, wanted=None, run=layers.WrittenOut.__call__):
    hidden = run(self, inputs, layout)
    return hidden if wanted is None else hidden[:, wanted]


# ours less one of its parts: what of it is replaced, by what
WITHOUT = {
    "no-layers": (layers, "written_out", no_written_out_layers),
    "no-onednn": (products, "ONEDNN", False),
    "no-wanted": (layers.WrittenOut, "__call__", whole_last_layer),
    "no-recompute": (layers, "RECOMPUTE_FROM", 2**60),
    "no-tiles": (rollout, "VOCABULARY_TILE", 1_000_000),
}
WAYS = {
    "ours": measure_ours,
    "plain": measure_ours,
    "engine": measure_ours,
    "trl": measure_trl,
    "trl-static": measure_trl,
    **dict.fromkeys(WITHOUT, measure_ours),
}
