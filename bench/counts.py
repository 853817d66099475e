"""What a GRPO step does at the 7B's shapes, counted and not measured: ours and TRL's own code, side by side.

The models have the published sizes and no numbers (shadows.py), in bf16 with LoRA; one prompt with one
picture, G responses of exactly C tokens, KL on. Counted are, for the whole step and by part, floating-point
operations, for each decoded token (of all G responses) operations, bytes read and host syncs, and the bytes
saved for the backward pass. The figures are the same on every machine.

The decoder is run with 2 and with 3 layers; every layer beyond adds what the third added, so the rest is
arithmetic (tests/test_bench.py runs four). The vision tower is counted once, for one picture, times the
pictures that pass it. Ours is counted as on a GPU: the device is looked at every 16 tokens. Left out: the
optimiser, the processor.

    python -m bench.counts                               # P 700, C 256, G 8, both classes; some minutes
    python -m bench.counts --completion-tokens 64 256 1024 --group-size 2 8 16                # a table
    python -m bench.counts --where                       # and the lines that wait for the device

Reads:  nothing; needs `trl` and `datasets`.
Writes: OUT, if given: a line {"arch": "llava", "way": "ours", "P": 700, "C": 256, "G": 8, "tflop": 91.3, …}
"""

import argparse
import itertools
import json
import tempfile
from unittest import mock

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import common
from bench import steps
from bench.shadows import Meter
from demo.base import build
from lib import lora, rollout, vlm

IMAGE = 672  # pixels a side of the picture for Qwen2.5-VL: 576 tokens, as many as LLaVA-1.5 always has
SHAPES = {  # of Qwen/Qwen2.5-VL-7B-Instruct and llava-hf/llava-1.5-7b-hf, but for the number of layers
    "qwen2_5_vl": {
        "layers": 28,
        "picture_tokens": 576,
        "text": {
            "hidden_size": 3584,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "intermediate_size": 18944,
            "vocab_size": 152064,
        },
        "vision": {
            "depth": 32,
            "hidden_size": 1280,
            "num_heads": 16,
            "intermediate_size": 3420,
            "out_hidden_size": 3584,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    },
    "llava": {
        "layers": 32,
        "picture_tokens": 576,
        "text": {
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "intermediate_size": 11008,
            "vocab_size": 32064,
        },
        "vision": {
            "num_hidden_layers": 24,
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "image_size": 336,
            "projection_dim": 768,
        },
    },
}
WAYS = ("ours", "trl")
PARTS = ("sampling", "reference", "policy")


# ------------------------------------------------------------------------------------------------ models


def make_model(folder, shape, layers, rank, device="meta", dtype=torch.bfloat16):
    """A model of this shape on `device`, with LoRA; `folder` holds its tokenizer and what else is not a
    size."""
    config = AutoConfig.from_pretrained(folder)
    for part, values in ((config.text_config, shape["text"]), (config.vision_config, shape["vision"])):
        for name, value in values.items():
            setattr(part, name, value)
    text = config.text_config
    text.num_hidden_layers = layers
    text.head_dim = text.hidden_size // text.num_attention_heads
    text.tie_word_embeddings = config.tie_word_embeddings = False
    if "mrope_section" in text.rope_parameters:
        eighth = text.head_dim // 8
        text.rope_parameters["mrope_section"] = [eighth, eighth * 3 // 2, eighth * 3 // 2]
        text.layer_types = ["full_attention"] * layers
    else:
        side = config.vision_config.image_size // config.vision_config.patch_size
        config.image_seq_length = side**2
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
        model = lora.add_lora(model.requires_grad_(False), rank, rank).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)  # PEFT does so unless the device is "meta"
    return model


def make_processor(folder, shape):
    """That makes 576 tokens of a picture at the 7B's shape."""
    if "image_size" not in shape["vision"]:
        return vlm.load_processor(folder, IMAGE**2, IMAGE**2)
    processor = vlm.load_processor(folder)
    side = shape["vision"]["image_size"]
    processor.image_processor.size = {"shortest_edge": side}
    processor.image_processor.crop_size = {"height": side, "width": side}
    return processor


class Pictures:
    """In place of the vision tower:

    counts the pictures and gives features without numbers. It is frozen, and the same for every step.
    """

    def __init__(self, model):
        self.inner = vlm.base_model(model).model
        self.inner.get_image_features = self
        self.meter = None

    def __call__(self, pixel_values, image_grid_thw=None, **kwargs):
        if image_grid_thw is None:
            counts = [self.inner.config.image_seq_length] * len(pixel_values)
        else:
            counts = [grid.prod().item() // 4 for grid in image_grid_thw]
        self.meter.count(pictures=len(counts))
        table = self.inner.get_input_embeddings().weight
        features = [table.new_zeros(count, table.shape[1]) for count in counts]
        return argparse.Namespace(pooler_output=features)


# ------------------------------------------------------------------------------------------------ one step


def count_ours(model, processor, items, lengths, pictures):
    """One step of ours → Meter."""
    vlm.base_model(model).model.language_model.config._attn_implementation = vlm.SHARED_PREFIX
    look_every = rollout.LOOK_EVERY | {"meta": rollout.LOOK_EVERY["cuda"]}
    with Meter() as meter, mock.patch.object(rollout, "LOOK_EVERY", look_every):
        pictures.meter = meter
        meter.leave_out(model)

        def update(loss, last):
            loss.backward()

        with meter.part("policy"):
            steps.step_of_ours(meter, model, processor, items, lengths, update, "ours")
    return meter


def count_trl(model, processor, items, lengths, pictures):
    """One training_step of GRPOTrainer a prompt → Meter."""
    with tempfile.TemporaryDirectory() as out, Meter() as meter:
        pictures.meter = meter
        config = steps.trl_config(steps.Job("trl", out, 0, lengths), use_cpu=True)
        trainer = steps.make_trainer(model, processor, items, config)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.current_gradient_accumulation_steps = len(lengths)
        trainer.generation_config.max_new_tokens = lengths[0][0]
        steps.time_trl(trainer, meter)
        meter.leave_out(trainer.model)  # whose weights it has moved
        with meter.part("policy"), mock.patch("torch.is_autocast_enabled", return_value=False):
            for _ in lengths:  # the patch: autocast knows no device "meta"
                trainer.training_step(trainer.model, batch, None)
    steps.check_lengths("TRL", trainer.found_lengths, steps.flat(lengths))
    return meter


COUNT = {"ours": count_ours, "trl": count_trl}


def count(way, folder, shape, layers, sizes, rank=128, device="meta", dtype=torch.bfloat16):
    """One step at so many layers → Meter; sizes: (P, C, G)."""
    prompt_tokens, length, group_size = sizes
    model = make_model(folder, shape, layers, rank, device, dtype)
    processor = make_processor(folder, shape)
    items = steps.make_items(processor, folder, 1, prompt_tokens)
    return COUNT[way](model, processor, items, [[length] * group_size], Pictures(model))


def tower_flop(folder, shape):
    """Of the vision tower for one picture."""
    model = make_model(folder, shape, 1, 1)
    [item] = steps.make_items(make_processor(folder, shape), folder, 1, shape["picture_tokens"] + 100)
    inputs = vlm.processor_inputs(make_processor(folder, shape), *item)
    arguments = [inputs["pixel_values"].to("meta", torch.bfloat16)]
    if "image_grid_thw" in inputs:
        arguments.append(inputs["image_grid_thw"])
    with Meter() as meter, torch.no_grad():
        vlm.base_model(model).model.get_image_features(*arguments)
    return meter.parts["rest"]["flop"]


# ------------------------------------------------------------------------------------------------ figures


def flat_counts(meter):
    """{(part, what): count} of a step, saved bytes among them."""
    counts = {(part, what): n for part, counter in meter.parts.items() for what, n in counter.items()}
    return counts | {("policy", "saved"): meter.saved}


def at_depth(count_layers, layers):
    """A function of the number of layers → its counts at `layers`:

    each beyond two adds what the third added.
    """
    two, three = flat_counts(count_layers(2)), flat_counts(count_layers(3))
    return {key: two.get(key, 0) + (layers - 2) * (three[key] - two.get(key, 0)) for key in three}


def figures(way, folder, shape, sizes, picture_flop):
    """{name: figure} of one way at the whole depth; a token:

    of all G responses, the mean over C − 1 of them.
    """
    prompt_tokens, length, group_size = sizes

    def whole(layers):
        return count(way, folder, shape, layers, sizes)

    def first_token(layers):
        return count(way, folder, shape, layers, (prompt_tokens, 1, group_size))

    step = at_depth(whole, shape["layers"])
    first = at_depth(first_token, shape["layers"])
    row = {"pictures": sum(step.get((part, "pictures"), 0) for part in PARTS)}
    for part in PARTS:
        flop = step[part, "flop"] + picture_flop * step.get((part, "pictures"), 0)
        row[f"{part}_tflop"] = flop / 1e12
    row["tflop"] = sum(row[f"{part}_tflop"] for part in PARTS)
    for what in ("operations", "bytes_read", "syncs"):
        drawn = step["sampling", what] - first["sampling", what]
        row[f"{what}_a_token"] = drawn / (length - 1)
    row["saved_gib"] = step["policy", "saved"] / 2**30
    return row


def waits(way, folder, shape, sizes):
    """{line: times a token} that the device is waited for while tokens are drawn."""
    prompt_tokens, length, group_size = sizes
    step = count(way, folder, shape, 2, sizes).sites
    step.subtract(count(way, folder, shape, 2, (prompt_tokens, 1, group_size)).sites)
    return {site: times / (length - 1) for site, times in step.most_common() if times > 0}


# ------------------------------------------------------------------------------------------------ main


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--arch", choices=SHAPES, nargs="+", default=list(SHAPES), help="[paper §4]")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[700], help="P, above 676 [ours]")
    parser.add_argument("--completion-tokens", type=int, nargs="+", default=[256], help="C [ours]")
    parser.add_argument("--group-size", type=int, nargs="+", default=[8], help="G [paper Figure 3]")
    parser.add_argument("--where", action="store_true", help="the lines that wait for the device [ours: off]")
    parser.add_argument("--out", help="append every line to this JSONL [ours: none]")
    return parser.parse_args(argv)


HEADERS = (
    "                       TFLOP a step                        a token of all G responses       saved",
    "    P    C   G  way     sampling reference    policy     whole operations  GB read    syncs       GiB",
)


def show(way, sizes, row):
    prompt_tokens, length, group_size = sizes
    flop = "".join(f"{row[f'{part}_tflop']:10.1f}" for part in PARTS) + f"{row['tflop']:10.1f}"
    token = (
        f"{row['operations_a_token']:11.0f}{row['bytes_read_a_token'] / 1e9:9.2f}{row['syncs_a_token']:9.3f}"
    )
    print(
        f"{prompt_tokens:5}{length:5}{group_size:4}  {way:6}{flop}{token}{row['saved_gib']:10.2f}", flush=True
    )


@common.exit_codes
def main(args):
    for arch in args.arch:
        with tempfile.TemporaryDirectory() as folder:
            build.build(arch, folder, build.corpus())
            show_arch(arch, folder, args)


def show_arch(arch, folder, args):
    shape = SHAPES[arch]
    picture_flop = tower_flop(folder, shape)
    print(f"{arch}, {shape['layers']} layers; {picture_flop / 1e12:.2f} TFLOP for a picture")
    print("\n".join(HEADERS))
    grid = itertools.product(args.prompt_tokens, args.completion_tokens, args.group_size)
    for sizes, way in itertools.product(grid, WAYS):
        row = figures(way, folder, shape, sizes, picture_flop)
        show(way, sizes, row)
        if args.out:
            known = {"arch": arch, "way": way} | dict(zip("PCG", sizes, strict=True))
            with open(args.out, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(known | row) + "\n")
        if args.where:
            for site, times in waits(way, folder, shape, sizes).items():
                print(f"        {times:.3f} a token: {site}")


if __name__ == "__main__":
    main(parse_args())
