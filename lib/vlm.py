"""The model: loading, processors, LoRA, adapters, encoding. The only file that knows an architecture.

Everything works on the parts that Qwen2.5-VL and LLaVA-1.5 share in transformers: `model.model` (vision +
language), `model.model.language_model` (the decoder), `model.lm_head`. It knows neither sampling nor
training.

    P prompt tokens   D hidden size   L positions of a row   B rows
"""

import json
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_torchvision_available

import common
from common import InputError
from lib import data

DEFAULT_MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"
ARCHITECTURES = ("qwen2_5_vl", "llava")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LINEAR = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
LORA_TARGETS = rf".*language_model.*\.({LINEAR})"  # plain names hit the vision tower too
SHARED_PREFIX = "shared_prefix"  # our attention, by the name that transformers knows it under
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "jmere.json")

# -------------------------------------------------------------------------------- model


def resolve_start(args):
    """Settle what 04 starts from: args.adapter (None with --only-rl), args.model, args.prompt. Raises
    InputError."""
    if args.only_rl:
        args.adapter = None
        args.model = args.model or DEFAULT_MODEL
        args.prompt = "reason"
        return
    data.existing("--adapter", args.adapter, "made by 03_sft.py; --only-rl starts without it")
    args.prompt = adapter_prompt(args.adapter)
    args.model = args.model or adapter_base(args.adapter)


def load(name, dtype=torch.float32, device="cpu"):
    """(model, processor) of a Qwen2.5-VL or LLaVA-1.5 checkpoint, a hub name or a folder; the model frozen,
    in eval mode.

    Raises InputError.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        fault = common.first_line(error)
        raise InputError(
            f"--model {name}: not a model folder, nor a hub model that can be had from here ({fault})"
        ) from None
    if config.model_type not in ARCHITECTURES:
        raise InputError(
            f"--model {name}: is a {config.model_type} model, expected one of {', '.join(ARCHITECTURES)}"
        )
    try:
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, attn_implementation="sdpa")
        processor = load_processor(name)
    except (OSError, ValueError) as error:
        raise InputError(f"--model {name}: cannot load ({common.first_line(error)})") from None
    # the decoder alone, not the vision tower
    model.model.language_model.config._attn_implementation = SHARED_PREFIX
    return model.to(device).requires_grad_(False).eval(), processor


def load_processor(name):
    """AutoProcessor. Without torchvision (a CPU machine) it cannot build Qwen2.5-VL's, whose video part needs
    it: leave that part out."""
    if is_torchvision_available() or AutoConfig.from_pretrained(name).model_type != "qwen2_5_vl":
        return AutoProcessor.from_pretrained(name)
    from transformers import AutoImageProcessor, AutoTokenizer
    from transformers.models.qwen2_5_vl import processing_qwen2_5_vl

    # the parent's name, because it is written into saved files
    class Qwen2_5_VLProcessor(processing_qwen2_5_vl.Qwen2_5_VLProcessor):
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            super().__init__(image_processor, tokenizer, None, chat_template=chat_template)

    tokenizer = AutoTokenizer.from_pretrained(name)
    images = AutoImageProcessor.from_pretrained(name)
    return Qwen2_5_VLProcessor(images, tokenizer, chat_template=tokenizer.chat_template)


def base_model(model):
    """The transformers model, whether PEFT has wrapped it or not."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _attention(module, query, key, value, attention_mask, layout=None, **kwargs):
    """The decoder's attention: sdpa, unless the caller hands in a layout (rollout's Packed or Decoding)."""
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return layout(module.layer_idx, query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(SHARED_PREFIX, _attention)
AttentionMaskInterface.register(SHARED_PREFIX, sdpa_mask)  # of passes without a layout


# -------------------------------------------------------------------------------- LoRA


def add_lora(model, rank, alpha, dropout=0.0):
    """A fresh trainable LoRA on every linear layer of the language model [ours: the paper gives rank and
    alpha only]."""
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=LORA_TARGETS, task_type="CAUSAL_LM"
    )
    return check_lora(get_peft_model(model, config))


def load_adapter(model, folder, trainable=False, name="default"):
    """`model`, plain or already a PeftModel, with the adapter of `folder`. Raises InputError where the two do
    not fit."""
    adapter_prompt(folder)
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(folder, adapter_name=name, is_trainable=trainable)
        else:
            model = PeftModel.from_pretrained(model, folder, adapter_name=name, is_trainable=trainable)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        fault = common.first_line(error)
        raise InputError(f"--adapter {folder}: does not fit this --model ({fault})") from None
    # PEFT only warns of keys that found no place
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as stored:
        missing = set(get_peft_model_state_dict(model, adapter_name=name)) ^ set(stored.keys())
    if missing:
        raise InputError(
            f"--adapter {folder}: {len(missing)} tensors do not fit this --model: {sorted(missing)[0]}, …"
        )
    return check_lora(model) if trainable else model


def check_lora(model):
    """`model`. Raises InputError unless something is trainable and all of it is LoRA inside the language
    model: otherwise a run finishes without having learnt."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained or not all("lora_" in name and "language_model" in name for name in trained):
        shown = trained[:3] or "nothing"
        raise InputError(f"LoRA must train the language model only; trainable now: {shown}")
    return model


def no_dropout(model):
    """`model` without dropout, which would move the log-probs between two passes of one policy: KL would not
    start at 0."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def save_adapter(model, processor, folder, prompt, card):
    """The policy's adapter as plain PEFT, with its processor, its model card and the prompt it was trained
    with ("reason" or "direct"). Whole or not at all."""
    folder = Path(folder)
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh, selected_adapters=["default"])
    processor.save_pretrained(fresh)
    (fresh / "jmere.json").write_text(json.dumps({"prompt": prompt}) + "\n")
    (fresh / "README.md").write_text(card, encoding="utf-8")  # in place of PEFT's empty form
    # a kill between the renames leaves this one; Run puts it back
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def adapter_prompt(folder):
    """The prompt that the adapter was trained with, "reason" or "direct". Raises InputError where it is none
    of ours."""
    folder = Path(folder)
    for name in ADAPTER_FILES:
        if not (folder / name).is_file():
            raise InputError(
                f"--adapter {folder}: no {name} in it; expected a best/ folder of 03_sft.py or 04_grpo.py"
            )
    return json.loads((folder / "jmere.json").read_text())["prompt"]


def adapter_base(folder):
    """The base model that the adapter was trained on: a hub name, or a folder as it was given. Raises
    InputError."""
    name = json.loads((Path(folder) / "adapter_config.json").read_text()).get("base_model_name_or_path")
    if not name:
        raise InputError(
            f"--adapter {folder}: its adapter_config.json names no base model: name it with --model"
        )
    return name


@contextmanager
def reference(model):
    """Inside, `model` is the reference policy: the frozen second copy of the SFT adapter, or the base
    (Only-RL)."""
    if "reference" not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    model.base_model.set_adapter("reference", inference_mode=True)  # else PEFT would make it trainable
    try:
        yield
    finally:
        model.base_model.set_adapter("default")


# -------------------------------------------------------------------------------- encoding


@dataclass
class Prompt:
    """One prompt, image included, ready for the decoder. Computed once a step: sampling, reference and policy
    pass share it.

    No graph: embeddings and vision tower are frozen.
    """

    embeds: torch.Tensor  # [P, D] token embeddings with the image features in place
    # [3, P] (Qwen2.5-VL: time, height, width) or [1, P]; a response goes on at max + 1
    positions: torch.Tensor


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
        features, positions = _image_features(base, inputs)  # [image tokens, D], [3 or 1, P]
        place = ids == base.config.image_token_id
        if place.sum() != len(features):
            found = f"{int(place.sum())} image tokens in the prompt, {len(features)} image features"
            raise InputError(f"{image}: {found}: the processor does not belong to this model")
        embeds = base.model.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter(place[..., None], features.to(embeds.dtype))
        prompts.append(Prompt(embeds[0], positions))
    return prompts


def processor_inputs(processor, text, image):
    """What the model's own forward takes for one prompt: input_ids [1, P], pixel_values, and what its family
    adds."""
    for token in processor.tokenizer.all_special_tokens:  # a tweet may spell one: it is text, not structure
        text = text.replace(token, f"{token[0]} {token[1:]}")
    content = [{"type": "image"}, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    chat = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return processor(text=[chat], images=[data.load_image(image)], return_tensors="pt")


def _image_features(base, inputs):
    """→ image features [image tokens, D], positions [3 or 1, P]."""
    inner = base.model
    ids = inputs["input_ids"]
    if "image_grid_thw" in inputs:
        grid = inputs["image_grid_thw"]
        features = inner.get_image_features(inputs["pixel_values"], grid).pooler_output
        positions = inner.get_rope_index(ids, inputs["mm_token_type_ids"], grid)[0][:, 0]  # [3, P]
    else:
        features = inner.get_image_features(inputs["pixel_values"].to(base.dtype)).pooler_output
        positions = torch.arange(ids.shape[1], device=ids.device)[None]  # [1, P]
    return torch.cat(list(features)), positions


def response_positions(prompt, length):
    """[3 or 1, length]: the positions of a response's tokens."""
    first = prompt.positions.max() + 1
    places = first + torch.arange(length, device=prompt.positions.device)
    return places.expand(len(prompt.positions), -1)


def as_rope(positions):
    """[B, 3 or 1, L] → what the decoder takes: [3, B, L] or [B, L]."""
    return positions.transpose(0, 1) if positions.shape[1] == 3 else positions[:, 0]


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
