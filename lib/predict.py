"""Predictions of a model that runs here: load it, generate, store every response. Knows no score."""

import contextlib
import tempfile
from importlib import metadata
from pathlib import Path

from PIL import Image
from tqdm import tqdm

import common
from common import InputError
from lib import ask, checks, controls, data, lora, predictions, rollout, served, training, vlm


def predict(args):
    """Store --samples responses for each tweet of --data that has none yet → {id: Example}, all of --data.

    None on the ranks that do not go on to score. Raises InputError, on all ranks.
    """
    ranks = training.setup()
    out = Path(args.out)
    with contextlib.ExitStack() as stack:
        with ranks.together():
            own_prompt = resolve_model(args)
            predictions.check_out(args)
            known = controls.load_tweets(args)
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            shown = controls.with_images(known.values(), args.image, args.seed, folder)
            settings = describe(args, ranks.device)
        # KEEP: all ranks read between gather and barrier, so none appends while another reads
        fault = predictions.lock_output(out, args.fresh, stack) if ranks.main else None
        fault = ranks.gather(fault)[0]
        if fault:
            raise fault
        stored = predictions.stored_offsets(out, known, settings)
        ranks.barrier()
        shown = shown[: args.limit]
        done = sum(example.id in stored for example in shown)
        if ranks.main:
            if own_prompt and args.prompt != own_prompt:
                print(f"note: the adapter was trained with the {own_prompt} prompt, --prompt overrides it")
            what = f"{args.samples} responses each, {args.prompt} prompt, {settings['dtype']}"
            print(f"{len(shown)} tweets, {done} stored already, {what}", flush=True)
        if done < len(shown):
            generate(args, ranks, shown, stored, known, settings)
        ranks.barrier()
        if ranks.main:
            predictions.gather_parts(out, known, settings)
    return known if ranks.main else None


def resolve_model(args):
    """Settle what predicts: args.adapter (None with --zero-shot), args.model, args.prompt, args.*_pixels →
    the prompt that the adapter was trained with, or None.

    Raises InputError where the adapter is not there, or --model is another model than it was trained on.
    """
    if args.zero_shot:
        args.adapter = None
        args.model = args.model or vlm.DEFAULT_MODEL
        args.prompt = args.prompt or "direct"
        return None
    data.existing("--adapter", args.adapter, "made by 04_grpo.py; --zero-shot predicts without one")
    recipe = lora.read_recipe(args.adapter, args.prompt)
    base = lora.base_name(args.adapter)
    if args.model:
        refuse_other_weights(args, base)
    args.model = args.model or base
    args.prompt = args.prompt or recipe.prompt
    args.min_pixels = args.min_pixels or recipe.min_pixels
    args.max_pixels = args.max_pixels or recipe.max_pixels
    return recipe.prompt


def refuse_other_weights(args, base):
    """Raise InputError where --model and the adapter's own base are both here and differ."""
    if args.model == base:
        return
    try:
        own = vlm.weights_digest(base)
    except OSError:  # the folder it was trained from is not on this machine: nothing to compare with
        return
    if vlm.weights_digest(args.model) != own:
        raise InputError(
            f"--model {args.model}: other weights than {base}, which --adapter {args.adapter} "
            "was trained on: leave --model out"
        )


def describe(args, device):
    """What an answer depends on besides the tweet: stored with each row, and compared when a run goes on."""
    vlm.read_config(args.model)  # the one who says what is wrong with the model
    dtype = args.dtype
    if dtype == "auto":
        dtype = "fp32" if device.type == "cpu" else "bf16"
    if args.rollout_url:  # its own, and another engine draws other responses from the same seed
        dtype = "vllm"
    names = ("samples", "temperature", "top_p", "max_new_tokens", "min_pixels", "max_pixels", "image", "seed")
    settings = {name: getattr(args, name) for name in names}
    settings["dtype"] = dtype
    settings["weights"] = vlm.weights_digest(args.model)
    settings["adapter"] = predictions.adapter_hash(args.adapter) if args.adapter else None
    settings["prompt"] = predictions.text_hash(common.PROMPTS[args.prompt])
    return settings


def source(args):
    """What a prediction was made with, by the names that a reader knows; it decides nothing."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    return {"model": str(args.model), "adapter": args.adapter, "versions": versions}


def prompt_size(example):
    """Relative length of a prompt, to sort by: Qwen2.5-VL turns 28 × 28 pixels into one token; LLaVA's
    images are all equal."""
    with Image.open(example.image) as image:
        return image.width * image.height // 784 + len(example.text) // 4


def load_model(args, processor, first, ranks, dtype):
    """The model that answers, proved on the tweet `first`: nothing is stored before."""
    with ranks.together():
        model, _ = vlm.load(args.model, vlm.DTYPES[dtype], ranks.device, processor)
        if args.adapter:
            model = lora.load_adapter(model, args.adapter)
    checks.prove(model, processor, first, args, ranks)
    return model


@contextlib.contextmanager
def answering(args, processor, server, first, ranks, dtype):
    """draw(items, keys, rows) → (an item: a list of --samples rollout.Sample, rows that found room), by a
    model that runs here or by the server of --rollout-url."""
    if server:
        drawing = (args.samples, args.max_new_tokens, args.temperature, args.top_p)
        with contextlib.closing(server):
            server.prove(common.PROMPTS[args.prompt].format(text=first.text), first.image)
            if args.adapter:
                server.publish(args.adapter)
            yield lambda items, keys, rows: (server.sample(items, *drawing, keys=keys), rows)
            ranks.barrier()  # KEEP: closing unloads the adapter, which other ranks may still ask
        return
    model = load_model(args, processor, first, ranks, dtype)

    def draw(items, keys, rows):
        prompts = vlm.encode(model, processor, items)
        drawing = (args.samples, args.max_new_tokens, args.temperature, rows)
        extra = {"keys": keys, "top_p": args.top_p, "static": args.static_cache}
        return rollout.sample_in_parts(model, processor, prompts, *drawing, **extra)

    yield draw


def generate(args, ranks, shown, stored, known, settings):
    """Append --samples responses for each tweet that is not `stored` to this rank's own file, longest
    prompts first: memory runs out at the start or never.

    shown: with the images to be shown; known: {id: Example} with their own, which are stored.
    """
    with ranks.together():
        processor = vlm.load_processor(args.model, args.min_pixels, args.max_pixels)
        server = served.connect(args, processor, ranks)
    usable, _ = checks.usable(shown, processor, args, ranks, server)
    todo = [example for example in usable if example.id not in stored]
    mine = sorted(todo, key=prompt_size, reverse=True)[ranks.rank :: ranks.world]
    path = Path(args.out) / f"predictions.rank{ranks.rank}.jsonl"
    template = common.PROMPTS[args.prompt]
    made_by = source(args)
    if server:
        made_by["server"] = server.root
    rows = args.batch_rows  # responses at once; fewer where a GPU has no room for them
    hidden = None if ranks.main else True
    done = 0
    with contextlib.ExitStack() as stack:
        model = answering(args, processor, server, usable[0], ranks, settings["dtype"])
        draw = stack.enter_context(model)
        file = stack.enter_context(ask.AppendFile(path))
        bar = stack.enter_context(tqdm(total=len(mine), unit="tweet", disable=hidden))
        while done < len(mine):
            batch = mine[done : done + max(1, rows // args.samples)]
            items = [(template.format(text=example.text), example.image) for example in batch]
            # the same answers whatever the batch, the ranks or --limit
            keys = [(args.seed, example.id) for example in batch]
            groups, rows = draw(items, keys, rows)
            for example, samples in zip(batch, groups, strict=True):
                row = data.to_row(known[example.id], path)
                row |= {"prompt": args.prompt, "responses": [stored_response(sample) for sample in samples]}
                row |= {"settings": settings, "source": made_by, "key": example.id, "usage": None}
                file.append([row])
            done += len(batch)
            bar.update(len(batch))


def stored_response(sample):
    return {"text": sample.text, "finished": sample.finished, "tokens": len(sample.completion_ids)}
