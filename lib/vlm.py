"""The model: loading, processors, LoRA, adapters, encoding. The only file that knows an architecture.

Everything works on the parts that Qwen2.5-VL and LLaVA-1.5 share in transformers: `model.model` (vision + language),
`model.model.language_model` (the decoder), `model.lm_head`. It knows neither sampling nor training.

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

ARCHITECTURES = ("qwen2_5_vl", "llava")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"  # plain names hit the vision tower too
SHARED_PREFIX = "shared_prefix"  # our attention, by the name that transformers knows it under


# ------------------------------------------------------------------------------------------------ model


def load(name, dtype=torch.float32, device="cpu"):
    """Model (frozen, eval) and processor of a Qwen2.5-VL or LLaVA-1.5 checkpoint: a hub name or a folder. Raises InputError."""
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--model {name}: not a model folder, nor a hub model that can be had from here ({common.first_line(error)})"
        ) from None
    if config.model_type not in ARCHITECTURES:
        raise InputError(
            f"--model {name}: is a {config.model_type} model, expected one of {', '.join(ARCHITECTURES)}"
        )
    try:
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, attn_implementation="sdpa").to(
            device
        )
        processor = load_processor(name)
    except (OSError, ValueError) as error:
        raise InputError(f"--model {name}: cannot load ({common.first_line(error)})") from None
    model.model.language_model.config._attn_implementation = (
        SHARED_PREFIX  # the decoder alone, not the vision tower
    )
    return model.requires_grad_(False).eval(), processor


def load_processor(name):
    """AutoProcessor. Without torchvision (a CPU machine) it cannot build Qwen2.5-VL's, whose video part needs it: leave that part out."""
    if is_torchvision_available() or AutoConfig.from_pretrained(name).model_type != "qwen2_5_vl":
        return AutoProcessor.from_pretrained(name)
    from transformers import AutoImageProcessor, AutoTokenizer
    from transformers.models.qwen2_5_vl import processing_qwen2_5_vl

    class Qwen2_5_VLProcessor(
        processing_qwen2_5_vl.Qwen2_5_VLProcessor
    ):  # same name: it is written into saved files
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            super().__init__(image_processor, tokenizer, None, chat_template=chat_template)

    tokenizer = AutoTokenizer.from_pretrained(name)
    return Qwen2_5_VLProcessor(
        AutoImageProcessor.from_pretrained(name), tokenizer, chat_template=tokenizer.chat_template
    )


def base_model(model):
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _attention(module, query, key, value, attention_mask, layout=None, **kwargs):
    """The decoder's attention: sdpa, unless the caller hands in a layout (Packed or Decoding)."""
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return layout(module.layer_idx, query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(SHARED_PREFIX, _attention)
AttentionMaskInterface.register(SHARED_PREFIX, sdpa_mask)  # of passes without a layout


# ------------------------------------------------------------------------------------------------ LoRA


def add_lora(model, rank, alpha, dropout=0.0):
    """A fresh trainable LoRA on every linear layer of the language model [ours: the paper gives rank and alpha only]."""
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=LORA_TARGETS, task_type="CAUSAL_LM"
    )
    return check_lora(get_peft_model(model, config))


def load_adapter(model, folder, trainable=False, name="default"):
    """Put the adapter of `folder` on `model`, plain or already a PeftModel. Raises InputError where the two do not fit."""
    adapter_prompt(folder)
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(folder, adapter_name=name, is_trainable=trainable)
        else:
            model = PeftModel.from_pretrained(model, folder, adapter_name=name, is_trainable=trainable)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(
            f"--adapter {folder}: does not fit this --model ({common.first_line(error)})"
        ) from None
    with safe_open(
        Path(folder) / "adapter_model.safetensors", "pt"
    ) as stored:  # PEFT only warns of keys that found no place
        missing = set(get_peft_model_state_dict(model, adapter_name=name)) ^ set(stored.keys())
    if missing:
        raise InputError(
            f"--adapter {folder}: {len(missing)} tensors do not fit this --model, such as {sorted(missing)[0]}"
        )
    return check_lora(model) if trainable else model


def check_lora(model):
    """The two silent failures of a LoRA run: nothing trains, or the wrong modules do."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained or not all("lora_" in name and "language_model" in name for name in trained):
        raise InputError(
            f"LoRA must train the language model only; trainable now: {trained[:3] or 'nothing'}"
        )
    return model


def no_dropout(model):
    """Dropout would move the log-probs between two passes of one policy: KL would not start at 0."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def save_adapter(model, processor, folder, prompt):
    """The policy's adapter as plain PEFT, with its processor and the prompt it was trained with. Whole or not at all."""
    folder = Path(folder)
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh, selected_adapters=["default"])
    processor.save_pretrained(fresh)
    (fresh / "jmere.json").write_text(json.dumps({"prompt": prompt}) + "\n")
    old = folder.with_name(
        f".{folder.name}.old"
    )  # a kill between the two renames leaves this one; Run.resume puts it back
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def adapter_prompt(folder):
    """ "reason" or "direct": the prompt the adapter was trained with. Raises InputError where `folder` is no adapter of ours."""
    folder = Path(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors", "jmere.json"):
        if not (folder / name).is_file():
            raise InputError(
                f"--adapter {folder}: no {name} in it; expected a best/ folder made by 03_sft.py or 04_grpo.py"
            )
    return json.loads((folder / "jmere.json").read_text())["prompt"]


@contextmanager
def reference(model):
    """Inside, `model` is the reference policy: the frozen second copy of the SFT adapter, or the base alone (Only-RL)."""
    if "reference" not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    model.base_model.set_adapter(
        "reference", inference_mode=True
    )  # without inference_mode PEFT would make it trainable
    try:
        yield
    finally:
        model.base_model.set_adapter("default")


# ------------------------------------------------------------------------------------------------ encoding


@dataclass
class Prompt:
    """One prompt, image included, ready for the decoder. Computed once a step; sampling, reference and policy pass share it."""

    embeds: torch.Tensor  # [P, D] token embeddings with the image features in place, no graph: embeddings and vision tower are frozen
    positions: (
        torch.Tensor
    )  # [3, P] (Qwen2.5-VL: time, height, width) or [1, P]; a response goes on at max + 1


@torch.no_grad()
def encode(model, processor, items):
    """[(prompt text, image path)] → list of Prompt. The chat template and the image tokens are the processor's."""
    base = base_model(model)
    inner, device = base.model, base.lm_head.weight.device
    prompts = []
    for text, image in items:
        for (
            token
        ) in processor.tokenizer.all_special_tokens:  # a tweet may spell one: it is text, not structure
            text = text.replace(token, f"{token[0]} {token[1:]}")
        content = [{"type": "image"}, {"type": "text", "text": text}]
        chat = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = processor(text=[chat], images=[data.load_image(image)], return_tensors="pt").to(device)
        ids = inputs["input_ids"]  # [1, P]
        if "image_grid_thw" in inputs:
            features = inner.get_image_features(
                inputs["pixel_values"], inputs["image_grid_thw"]
            ).pooler_output
            positions = inner.get_rope_index(ids, inputs["mm_token_type_ids"], inputs["image_grid_thw"])[0][
                :, 0
            ]  # [3, P]
        else:
            features = inner.get_image_features(inputs["pixel_values"].to(base.dtype)).pooler_output
            positions = torch.arange(ids.shape[1], device=device)[None]  # [1, P]
        embeds, features = inner.get_input_embeddings()(ids), torch.cat(list(features))
        place = ids == base.config.image_token_id
        if place.sum() != len(features):
            found = f"{int(place.sum())} image tokens in the prompt, {len(features)} image features"
            raise InputError(f"{image}: {found}: the processor does not belong to this model")
        embeds = embeds.masked_scatter(place[..., None], features.to(embeds.dtype))
        prompts.append(Prompt(embeds[0], positions))
    return prompts


def decode(processor, ids):
    return processor.tokenizer.decode(ids, skip_special_tokens=True)


def stop_ids(model, processor):
    """Every id that ends a response; the first is the one that SFT teaches."""
    configured = base_model(model).generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return list(dict.fromkeys([processor.tokenizer.eos_token_id, *(i for i in configured if i is not None)]))


def image_ids(model):
    """Ids that stand for pictures: a response that held one would break the next forward pass."""
    config = base_model(model).config
    names = (
        "image_token_id",
        "video_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
        "vision_token_id",
    )
    return sorted({getattr(config, name) for name in names if getattr(config, name, None) is not None})


def response_positions(prompt, length):
    """[3 or 1, length]: positions of a response's tokens."""
    return (prompt.positions.max() + 1 + torch.arange(length, device=prompt.positions.device)).expand(
        len(prompt.positions), -1
    )


def as_rope(positions):
    """[B, 3 or 1, L] → what the decoder takes: [3, B, L] or [B, L]."""
    return positions.transpose(0, 1) if positions.shape[1] == 3 else positions[:, 0]
