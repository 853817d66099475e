"""What would stop a run in its middle, found at its start: images, prompts, positions, and whether our passes
are right for this model at all (SPEC §6, §7)."""

import hashlib
import json
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

import common
from common import InputError
from lib import data, rollout, vlm

SHOWN = 3  # faults that a message names


def usable_splits(train, val, processor, dtype, args, ranks, server=None):
    """→ (train, val, content): the examples that the model can take, and digests of all that determines the
    run besides its arguments. Raises InputError, on all ranks."""
    train, train_digest = usable(train, processor, args, ranks, server)
    content = {"dtype": str(dtype), "training data": train_digest}
    if val:
        val, content["validation data"] = usable(val, processor, args, ranks, server)
    with ranks.together():
        content["base model"] = vlm.weights_digest(args.model)
        if getattr(args, "adapter", None):
            weights = Path(args.adapter) / "adapter_model.safetensors"
            content["start adapter"] = _digest(weights)[:16]
    return train, val, content


def usable(examples, processor, args, ranks, server=None):
    """The examples that the model can take, and a digest of everything in them that training sees.

    Every image is opened by one rank, its tokens are counted by arithmetic, and prompt + --max-new-tokens
    compared with the positions of `model` (its configuration), and of the server where one draws responses.
    Raises InputError, on all ranks, where one fails and --skip-bad is not given.
    """
    mine = examples[ranks.rank :: ranks.world]
    template = common.PROMPTS[args.prompt]
    positions = vlm.read_config(args.model).get_text_config().max_position_embeddings
    if server:
        positions = min(positions, server.positions)
    room = positions - args.max_new_tokens
    looks = []
    hidden = None if ranks.main else True
    with ranks.together(), ThreadPoolExecutor() as pool:  # PIL decodes without the GIL
        found = pool.map(_look, mine)
        bar = tqdm(found, total=len(mine), desc="check images", unit="img", disable=hidden)
        for example, (size, digest, fault) in zip(mine, bar, strict=True):
            fault = fault or _prompt_fault(example, processor, template, size, room)
            looks.append((fault, digest))
    parts = ranks.gather(looks)
    found = [parts[i % ranks.world][i // ranks.world] for i in range(len(examples))]
    with ranks.together():
        if ranks.main:
            _report(examples, [fault for fault, _ in found], args.skip_bad)
    kept = []
    content = hashlib.sha256()
    for example, (fault, digest) in zip(examples, found, strict=True):
        if not fault:
            kept.append(example)
            row = [example.id, example.text, example.quintuples]
            row += [example.row.get("cot"), digest]
            content.update(json.dumps(row).encode())
    return kept, content.hexdigest()[:16]


def _look(example):
    """→ (size (width, height), digest of the file, None), or (None, None, what is wrong with it)."""
    try:
        size = data.load_image(example.image).size
        digest = _digest(example.image)
    except InputError as error:
        return None, None, str(error)
    return size, digest, None


def _digest(path):
    content = Path(path).read_bytes()
    return hashlib.sha256(content).hexdigest()


def _prompt_fault(example, processor, template, size, room):
    """Why the model cannot take this prompt, or None."""
    try:
        length = vlm.prompt_length(processor, template.format(text=example.text), size)
    except InputError as error:
        return f"{example.image}: {error}"
    if length > room:
        return f"{example.image}: a prompt of {length} tokens; --max-new-tokens leaves it {room} positions"
    return None


def _report(examples, faults, skip_bad):
    bad = [f"{example.id}: {fault}" for example, fault in zip(examples, faults, strict=True) if fault]
    if not bad:
        return
    shown = "; ".join(bad[:SHOWN])
    if len(bad) > SHOWN:
        shown += "; …"
    counts = f"{len(bad)} of {len(examples)} examples"
    if not skip_bad or len(bad) == len(examples):
        raise InputError(f"{counts} cannot be used: {shown} (mend them, or drop them with --skip-bad)")
    print(f"skipped {counts}: {shown} (--skip-bad)", flush=True)


# -------------------------------------------------------------------------------- our passes against the
# model's own

# nats a token, in the mean: bf16 rounds each pass by itself
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
PROBE = "[A, per, B, org, member of]"  # any response: two of it, so that one may not see the other


@torch.no_grad()
def prove(model, processor, example, args, ranks):
    """Compare our packed pass and our cache with the model's own forward on one real row → mean difference,
    nats a token.

    A family whose decoder needs more than embeddings and positions would otherwise train on wrong log-probs
    without a word. Raises InputError, on all ranks, with the architecture and the difference, or with what
    the model cannot take at all.
    """
    base = vlm.base_model(model)
    text = common.PROMPTS[args.prompt].format(text=example.text)
    was_training = model.training
    model.eval()
    with ranks.together(), _in_one_line(base):
        ids = processor.tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        [prompt] = vlm.encode(model, processor, [(text, example.image)])
        own = vlm.own_logits(model, processor, text, example.image, ids)  # [C + 1, V]
        own = own.log_softmax(-1)
        chosen = torch.tensor(ids, device=own.device)
        wanted = own[:-1].gather(1, chosen[:, None])[:, 0]
        packed, _, _ = rollout.completion_logps(model, [prompt], [[ids, ids]])
        difference = (packed - wanted).abs().mean().item()
        _refuse(difference, base, "the packed pass")
        # the second token comes from the cache
        [[sample]] = rollout.sample(model, processor, [prompt], 1, 2, 0.0)
        chosen = torch.tensor(sample.completion_ids, device=own.device)
        own = vlm.own_logits(model, processor, text, example.image, sample.completion_ids[:-1])
        own[:, vlm.image_ids(model)] = -torch.inf
        own = own.log_softmax(-1)
        loss = own.amax(1) - own.gather(1, chosen[:, None])[:, 0]  # 0 where ours is the best, too
        _refuse(loss.max().item(), base, "a greedy token by the cache")
    model.train(was_training)
    kind = base.config.model_type
    if ranks.main and kind not in vlm.ARCHITECTURES:
        limit = TOLERANCE[base.dtype]
        print(
            f"{kind} is not among the tested families: its log-probs are {difference:.2g} nats off "
            f"transformers' on one tweet, {limit:g} allowed",
            flush=True,
        )
    return difference


@contextmanager
def _in_one_line(base):
    """Inside, a picture or a pass that the model cannot take ends like one that is off, with the place in the
    code: the processor or the family is another than lib/vlm.py knows."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        fault = common.first_line(f"{type(error).__name__}: {error}")
        kind = base.config.model_type
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}, line {frame.lineno}"
        raise InputError(
            f"{kind}: the first pass ends in {fault} ({place}): the processor does not belong to this {kind} "
            "model, or lib/vlm.py does not hand it all it needs; take another model"
        ) from None


def _refuse(difference, base, what):
    limit = TOLERANCE[base.dtype]
    if not difference <= limit:  # also where it is no number
        raise InputError(
            f"{base.config.model_type}: {what} is {difference:.2g} nats off the model's own, expected at "
            f"most {limit:g}: lib/vlm.py does not hand this decoder all it needs; take another model"
        )
