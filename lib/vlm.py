"""The model: loading, processors, LoRA, adapters, encoding. The only file that knows an architecture.

Everything works on the parts that Qwen2.5-VL and LLaVA-1.5 share in transformers: `model.model` (vision +
language), `model.model.language_model` (the decoder), `model.lm_head`. It knows neither sampling nor
training.

    P prompt tokens   D hidden size   L positions of a row   B rows
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch.nn.functional import pad
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name
from transformers.utils import cached_file, is_torchvision_available

import common
from common import InputError
from lib import data

DEFAULT_MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"
# tested; others must prove themselves
ARCHITECTURES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "llava", "llava_next", "llava_onevision")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# decoder layers of one form, which lib/layers.py writes out
WRITTEN_OUT = (
    "LlamaDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen2_5_VLDecoderLayer",
    "Qwen2VLDecoderLayer",
    "Qwen3VLTextDecoderLayer",
)
SHARED_PREFIX = "shared_prefix"  # our attention, by the name that transformers knows it under
MAX_PIXELS = 1024 * 28 * 28  # of an image: a phone photograph costs Qwen2.5-VL about a thousand tokens

# -------------------------------------------------------------------------------- model


def load(name, dtype=torch.float32, device="cpu", processor=None):
    """(model, processor) of a checkpoint, a hub name or a folder; the model frozen, in eval mode. Other
    families than ARCHITECTURES are let in if they have the same parts; checks.prove sees whether those fit.

    processor: one loaded before, else the checkpoint's own with its own pixels. Raises InputError.
    """
    config = read_config(name)
    if getattr(config, "quantization_config", None):  # sampling folds LoRA into the weights, as merging does
        raise InputError(f"--model {name}: its weights are quantized: take the model they were made from")
    processor = processor or load_processor(name)
    where = {"device_map": device} if torch.device(device).type == "cuda" else {}  # straight to the GPU
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype, attn_implementation="sdpa", **where
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise InputError(f"--model {name}: cannot load ({common.first_line(error)})") from None
    inner = getattr(model, "model", None)
    parts = {
        "model.language_model": hasattr(inner, "language_model"),
        "model.get_image_features": hasattr(inner, "get_image_features"),
        "lm_head": hasattr(model, "lm_head"),
    }
    lacking = ", ".join(part for part, there in parts.items() if not there)
    if lacking:
        kind = model.config.model_type
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"--model {name}: {kind} has no {lacking}: take a model of {known}")
    # the decoder alone, not the vision tower
    inner.language_model.config._attn_implementation = SHARED_PREFIX
    return model.requires_grad_(False).eval(), processor


def read_config(name):
    """The checkpoint's configuration. Raises InputError where there is none, or it is of a model without
    images."""
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        fault = common.first_line(error)
        raise InputError(
            f"--model {name}: not a model folder, nor a hub model that can be had from here ({fault})"
        ) from None
    if not hasattr(config, "vision_config"):
        raise InputError(f"--model {name}: is a {config.model_type} model, which reads no images")
    return config


def load_processor(name, min_pixels=None, max_pixels=None):
    """The checkpoint's processor, images limited to so many pixels. Raises InputError.

    Where the family scales images (Qwen), max_pixels None is the processor's own, at most MAX_PIXELS.
    LLaVA-1.5 makes one square of every image, its successors tiles: their pixels cannot be chosen.
    """
    kind = read_config(name).model_type
    try:
        processor = _processor(name, kind)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"--model {name}: cannot load its processor ({common.first_line(error)})") from None
    if not hasattr(processor, "_get_num_multimodal_tokens"):
        known = ", ".join(ARCHITECTURES)
        raise InputError(
            f"--model {name}: the processor of {kind} does not tell how many tokens an image takes: take a "
            f"model of {known}"
        )
    if not getattr(processor, "chat_template", None):
        raise InputError(
            f"--model {name}: its processor has no chat template: take the instruction-tuned model"
        )
    images = processor.image_processor
    if "qwen" not in kind:
        if min_pixels or max_pixels:
            raise InputError(
                f"--max-pixels, --min-pixels: {name} ({kind}) takes images of its own sizes: leave them out"
            )
        return processor
    # of these two names, which mean areas here, it makes its limits
    smallest = min_pixels or images.size["shortest_edge"]
    largest = max_pixels or min(images.size["longest_edge"], MAX_PIXELS)
    if smallest > largest:
        raise InputError(f"--min-pixels {smallest}: more than --max-pixels {largest}")
    images.size = {"shortest_edge": smallest, "longest_edge": largest}
    return processor


def _processor(name, kind):
    """AutoProcessor. Without torchvision (a CPU machine) it cannot build those that read videos too: leave
    that part out."""
    class_name = PROCESSOR_MAPPING_NAMES.get(kind, "")
    whole = processor_class_from_name(class_name)
    parts = whole.get_attributes() if whole else []
    if is_torchvision_available() or "video_processor" not in parts:
        return AutoProcessor.from_pretrained(name)
    parts.remove("video_processor")
    # the parent's name, because it is written into saved files
    images_only = type(class_name, (whole,), {"get_attributes": staticmethod(lambda: list(parts))})
    return images_only.from_pretrained(name)


def weights_digest(name):
    """A hash of a checkpoint's weights: the header of each file, and a sample of every tensor. Raises
    InputError."""
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(cached_file(name, "config.json")).parent
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as handle:
            size = int.from_bytes(handle.read(8), "little")
            header = handle.read(size)
            digest.update(header)
            for place in json.loads(header).values():
                if "data_offsets" in place:
                    start, end = place["data_offsets"]
                    handle.seek(8 + size + (start + end) // 2)
                    digest.update(handle.read(min(256, end - start)))
    return digest.hexdigest()[:16]


def base_model(model):
    """The transformers model, whether PEFT has wrapped it or not."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _attention(module, query, key, value, attention_mask, layout=None, **kwargs):
    """The decoder's attention: sdpa, unless the caller hands in a layout (rollout's Packed or Decoding)."""
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if window := kwargs.get("sliding_window"):  # short rows would pass the proof at the start
        kind = module.config.model_type
        raise InputError(
            f"{kind}: its layers look back {window} tokens, ours all the way: take another model"
        )
    return layout(module.layer_idx, query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(SHARED_PREFIX, _attention)
AttentionMaskInterface.register(SHARED_PREFIX, sdpa_mask)  # of passes without a layout


# -------------------------------------------------------------------------------- encoding


@dataclass
class Prompt:
    """One prompt, image included, ready for the decoder. Computed once a step: sampling, reference and policy
    pass share it.

    No graph: embeddings and vision tower are frozen. A response, and a row packed of both, have the same
    form.
    """

    embeds: torch.Tensor  # [P, D] token embeddings with the image features in place
    positions: torch.Tensor  # [3, P] (Qwen: time, height, width) or [1, P]; a response goes on at max + 1
    # [K, P, D] added behind the first K layers (Qwen3-VL), 0 outside the image
    deepstack: torch.Tensor | None = None


@torch.no_grad()
def encode(model, processor, items):
    """[(prompt text, image path)] → list of Prompt. The chat template and the image tokens are the
    processor's.

    Raises InputError where the processor makes another number of image tokens than the model features.
    """
    base = base_model(model)
    prompts = []
    for text, image in items:
        inputs = processor_inputs(processor, text, image).to(base.lm_head.weight.device)
        ids = inputs["input_ids"]  # [1, P]
        seen = _image_features(base, inputs)
        features = torch.cat(list(seen.pooler_output))  # [image tokens, D]
        place = ids == base.config.image_token_id
        if place.sum() != len(features):
            found = f"{int(place.sum())} image tokens in the prompt, {len(features)} image features"
            kind = base.config.model_type
            raise InputError(f"{image}: {found}: the processor does not belong to this {kind} model")
        embeds = base.model.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter(place[..., None], features.to(embeds.dtype))
        prompt = Prompt(embeds[0], _positions(base, inputs))
        if getattr(seen, "deepstack_features", None):
            prompt.deepstack = embeds.new_zeros(len(seen.deepstack_features), *embeds.shape[1:])
            for layer, parts in zip(prompt.deepstack, seen.deepstack_features, strict=True):
                layer[place[0]] = torch.cat(list(parts)).to(embeds.dtype)
        prompts.append(prompt)
    return prompts


def _image_features(base, inputs):
    """The vision tower's output, with pooler_output: a list of [image tokens, D]."""
    wanted = ("pixel_values", "image_grid_thw", "image_sizes")
    inputs = {name: inputs[name] for name in wanted if name in inputs}
    inputs["pixel_values"] = inputs["pixel_values"].to(base.dtype)
    return base.model.get_image_features(**inputs)


def _positions(base, inputs):
    """[3 or 1, P]."""
    ids = inputs["input_ids"]
    if hasattr(base.model, "get_rope_index"):
        positions, _ = base.model.get_rope_index(ids, inputs["mm_token_type_ids"], inputs["image_grid_thw"])
        return positions[:, 0]
    return torch.arange(ids.shape[1], device=ids.device)[None]


def respond(prompt, embeds):
    """A response to `prompt` as a piece of a row: [C, D] embeddings, positions that go on behind the
    prompt."""
    deepstack = prompt.deepstack
    if deepstack is not None:
        deepstack = deepstack.new_zeros(len(deepstack), *embeds.shape)
    return Prompt(embeds, response_positions(prompt, len(embeds)), deepstack)


def join(pieces):
    """Pieces behind each other, as one."""
    deepstack = None
    if pieces[0].deepstack is not None:
        deepstack = torch.cat([piece.deepstack for piece in pieces], 1)
    embeds = torch.cat([piece.embeds for piece in pieces])
    return Prompt(embeds, torch.cat([piece.positions for piece in pieces], 1), deepstack)


def pad_to(piece, length):
    """`piece` with zeros behind it, `length` positions in all."""
    short = length - len(piece.embeds)
    deepstack = None if piece.deepstack is None else pad(piece.deepstack, (0, 0, 0, short))
    return Prompt(pad(piece.embeds, (0, 0, 0, short)), pad(piece.positions, (0, short)), deepstack)


def decoder_inputs(rows):
    """What the decoder takes of rows of one length, N of them: embeddings [N, L, D], positions, and what its
    family adds."""
    positions = torch.stack([row.positions for row in rows])  # [N, 3 or 1, L]
    inputs = {
        "inputs_embeds": torch.stack([row.embeds for row in rows]),
        "position_ids": positions.transpose(0, 1) if positions.shape[1] == 3 else positions[:, 0],
    }
    if rows[0].deepstack is not None:
        layers = torch.stack([row.deepstack for row in rows], 1).flatten(1, 2)  # [K, N·L, D]
        inputs["visual_pos_masks"] = torch.ones_like(positions[:, 0], dtype=torch.bool)
        inputs["deepstack_visual_embeds"] = list(layers)
    return inputs


def token_inputs(embeds, positions):
    """The same for N single tokens of responses: embeds [N, D], positions [N, 3 or 1]."""
    positions = positions[:, :, None]  # [N, 3 or 1, 1]
    positions = positions.transpose(0, 1) if positions.shape[1] == 3 else positions[:, 0]
    return {"inputs_embeds": embeds[:, None], "position_ids": positions}


def processor_inputs(processor, text, image):
    """What the model's own forward takes for one prompt: input_ids [1, P], pixel_values, and what its family
    adds.

    image: its path.
    """
    return processor(text=[_chat(processor, text)], images=[data.load_image(image)], return_tensors="pt")


def prompt_length(processor, text, size):
    """Tokens of a prompt about an image of `size` (width, height), by arithmetic. Raises InputError where the
    processor refuses such an image."""
    width, height = size
    try:
        [image] = processor._get_num_multimodal_tokens(image_sizes=[(height, width)]).num_image_tokens
    except ValueError as error:
        raise InputError(f"{width} × {height} pixels, refused by the processor ({error})") from None
    # 1: the image's placeholder
    return len(processor.tokenizer(_chat(processor, text))["input_ids"]) - 1 + image


def _chat(processor, text):
    content = [{"type": "image"}, {"type": "text", "text": plain_text(processor, text)}]
    messages = [{"role": "user", "content": content}]
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def plain_text(processor, text):
    """`text` with every special token in it broken by a space: a tweet may spell one, and it is text, not
    structure."""
    for token in processor.tokenizer.all_special_tokens:
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def own_logits(model, processor, text, image, ids):
    """Logits of transformers' own forward over prompt and response `ids`, at the positions that predict the
    response and what follows it: [C + 1, V], fp32. What our passes are compared with."""
    base = base_model(model)
    inputs = dict(processor_inputs(processor, text, image).to(base.lm_head.weight.device))
    size = inputs["input_ids"].shape[1]
    response = torch.tensor([ids], device=inputs["input_ids"].device)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], response], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:  # omitted, or not as long, the logits differ without any error
            inputs[name] = pad(inputs[name], (0, len(ids)))
    inputs["pixel_values"] = inputs["pixel_values"].to(base.dtype)
    return model(**inputs).logits[0, size - 1 :].float()


def response_positions(prompt, length):
    """[3 or 1, length]: the positions of a response's tokens."""
    first = prompt.positions.max() + 1
    places = first + torch.arange(length, device=prompt.positions.device)
    return places.expand(len(prompt.positions), -1)


def decode(processor, ids):
    """Token ids → text, without special tokens."""
    return processor.tokenizer.decode(ids, skip_special_tokens=True)


def stop_ids(model, processor):
    """Every id that ends a response; the first is the one that SFT teaches."""
    configured = base_model(model).generation_config.eos_token_id
    if not isinstance(configured, list):
        configured = [configured]
    ids = [processor.tokenizer.eos_token_id, *configured]
    return list(dict.fromkeys(i for i in ids if i is not None))


def image_ids(model):
    """Ids that stand for pictures: a response that held one would break the next forward pass."""
    config = base_model(model).config
    kinds = ("image_token", "video_token", "vision_start_token", "vision_end_token", "vision_token")
    ids = {getattr(config, f"{kind}_id", None) for kind in kinds}
    return sorted(ids - {None})
