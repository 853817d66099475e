"""Tiny models of every family that lib/vlm.py is tested with, of the real classes, from configuration, with
random weights."""

import json
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from demo.base import build

LAYERS, HIDDEN, HEADS, SIDE = 4, 64, 4, 56


def text_config(tokenizer):
    size = {"hidden": HIDDEN, "layers": LAYERS, "heads": HEADS, "kv_heads": 2, "ffn": 128}
    text = build.text_config(size, len(tokenizer))
    return text | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}


def qwen_ids(tokenizer):
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    fields = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = [tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names]
    return dict(zip(fields, ids, strict=True))


def pixels(patch, processor):
    return {
        "min_pixels": SIDE * SIDE,
        "max_pixels": 4 * SIDE * SIDE,
        "patch_size": patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": build.CLIP_MEAN,
        "image_std": build.CLIP_STD,
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": processor,
    }


def qwen2_vl(tokenizer):
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": HIDDEN,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 14,
    }
    config = Qwen2VLConfig(text_config=text_config(tokenizer), vision_config=vision, **qwen_ids(tokenizer))
    return Qwen2VLForConditionalGeneration(config), {
        "preprocessor_config.json": pixels(14, "Qwen2VLProcessor")
    }


def qwen3_vl(tokenizer):
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 14,
        "out_hidden_size": HIDDEN,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],  # features that enter behind the first two decoder layers
    }
    text = text_config(tokenizer) | {"head_dim": HIDDEN // HEADS}
    text["rope_parameters"] |= {"mrope_interleaved": True}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **qwen_ids(tokenizer))
    return Qwen3VLForConditionalGeneration(config), {
        "preprocessor_config.json": pixels(14, "Qwen3VLProcessor")
    }


def llava_next(tokenizer):
    text = {"model_type": "llama"} | text_config(tokenizer)
    text.pop("rope_parameters")
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 14,
        "projection_dim": 32,
    }
    pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    config = LlavaNextConfig(
        text_config=text,
        vision_config=vision,
        image_grid_pinpoints=pinpoints,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=False,
    )
    images = {
        "size": {"shortest_edge": SIDE},
        "crop_size": {"height": SIDE, "width": SIDE},
        "image_grid_pinpoints": pinpoints,
        "image_mean": build.CLIP_MEAN,
        "image_std": build.CLIP_STD,
        "image_processor_type": "LlavaNextImageProcessor",
        "processor_class": "LlavaNextProcessor",
    }
    processor = {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": 14,
        "processor_class": "LlavaNextProcessor",
        "vision_feature_select_strategy": "default",
    }
    files = {"preprocessor_config.json": images, "processor_config.json": processor}
    return LlavaNextForConditionalGeneration(config), files


FAMILIES = {  # name: (tokenizer and chat template of, model); the rest is demo's
    "qwen2_vl": ("qwen2_5_vl", qwen2_vl),
    "qwen3_vl": ("qwen2_5_vl", qwen3_vl),
    "llava_next": ("llava", llava_next),
}


def make(family, folder):
    """Write a tiny model of `family` into `folder`: as FAMILIES says, or as demo/base/build.py does
    (LLaVA-1.5, Qwen2.5-VL with tied embeddings, as the 3B has them)."""
    if family not in FAMILIES:
        build.build(family, folder, build.corpus())
        return
    like, model_of = FAMILIES[family]
    make_tokenizer = build.qwen_tokenizer if like == "qwen2_5_vl" else build.llava_tokenizer
    tokenizer = make_tokenizer(build.corpus(), 1200)
    tokenizer.chat_template = build.QWEN_TEMPLATE if like == "qwen2_5_vl" else build.LLAVA_TEMPLATE
    torch.manual_seed(0)
    model, files = model_of(tokenizer)
    # as loud as a trained model's: at 0.02 every fault would be a small one
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 4
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=[end], pad_token_id=pad or end)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, content in files.items():
        (Path(folder) / name).write_text(json.dumps(content))
