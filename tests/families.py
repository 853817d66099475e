"""Tiny models of every family that lib/vlm.py is tested with, and of some that it does not list: of the real
classes, from configuration, with random weights."""

import json
from pathlib import Path

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from demo.base import build

LAYERS, HIDDEN, HEADS, SIDE = 4, 64, 4, 56
AT_MOST = "anyres_max_2"  # tiles' worth of tokens: LLaVA-OneVision scales four tiles down to two
TILES = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]  # heights and widths made of tiles


def text_config(tokenizer):
    size = {"hidden": HIDDEN, "layers": LAYERS, "heads": HEADS, "kv_heads": 2, "ffn": 128}
    text = build.text_config(size, len(tokenizer))
    return text | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}


def plain_text_config(kind, tokenizer):
    """Of a decoder whose positions are 0, 1, 2, …"""
    text = text_config(tokenizer)
    text.pop("rope_parameters")
    return text | {"model_type": kind}


def siglip(**more):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return sizes | {"image_size": SIDE, "patch_size": 14} | more


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
    config = LlavaNextConfig(
        text_config=plain_text_config("llama", tokenizer),
        vision_config=siglip(model_type="clip_vision_model", num_hidden_layers=3, projection_dim=32),
        image_grid_pinpoints=TILES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=False,
    )
    images = {
        "size": {"shortest_edge": SIDE},
        "crop_size": {"height": SIDE, "width": SIDE},
        "image_grid_pinpoints": TILES,
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


def llava_onevision(tokenizer):
    ids = qwen_ids(tokenizer)
    config = LlavaOnevisionConfig(
        text_config=plain_text_config("qwen2", tokenizer),
        vision_config=siglip(model_type="siglip_vision_model", vision_use_head=False),
        image_grid_pinpoints=TILES,
        image_token_index=ids["image_token_id"],
        video_token_index=ids["video_token_id"],
        vision_aspect_ratio=AT_MOST,
    )
    images = {
        "size": {"height": SIDE, "width": SIDE},
        "image_grid_pinpoints": TILES,
        "image_processor_type": "LlavaOnevisionImageProcessor",
        "processor_class": "LlavaOnevisionProcessor",
    }
    processor = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "num_image_tokens": (SIDE // 14) ** 2,
        "processor_class": "LlavaOnevisionProcessor",
        "vision_aspect_ratio": AT_MOST,
        "vision_feature_select_strategy": "full",
    }
    files = {"preprocessor_config.json": images, "processor_config.json": processor}
    return LlavaOnevisionForConditionalGeneration(config), files


# -------------------------------------------------------------------------------- not listed


def internvl(tokenizer):
    """Tiles, and a Qwen2 decoder as it is: fits by itself."""
    config = InternVLConfig(
        text_config=plain_text_config("qwen2", tokenizer),
        vision_config=siglip(),
        image_token_id=qwen_ids(tokenizer)["image_token_id"],
        image_seq_length=4,
    )
    names = {
        "start_image_token": "<|vision_start|>",
        "end_image_token": "<|vision_end|>",
        "context_image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
    }
    images = {
        "size": {"height": SIDE, "width": SIDE},
        "max_patches": 4,
        "image_processor_type": "GotOcr2ImageProcessor",
        "processor_class": "InternVLProcessor",
    }
    processor = {"image_seq_length": 4, "processor_class": "InternVLProcessor"}
    files = {"preprocessor_config.json": images, "processor_config.json": processor}
    return InternVLForConditionalGeneration(config), files | {"tokenizer_config.json": names}


def gemma3(tokenizer, window=False):
    """Its image tokens see each other, both ways; and most layers look back over a window only."""
    ids = qwen_ids(tokenizer)
    text = plain_text_config("gemma3_text", tokenizer)
    text |= {"head_dim": HIDDEN // HEADS, "query_pre_attn_scalar": HIDDEN // HEADS, "sliding_window": 512}
    text |= {"layer_types": ["sliding_attention" if window else "full_attention"] * LAYERS}
    config = Gemma3Config(
        text_config=text,
        vision_config=siglip(vision_use_head=False),
        mm_tokens_per_image=16,
        boi_token_index=ids["vision_start_token_id"],
        eoi_token_index=ids["vision_end_token_id"],
        image_token_index=ids["image_token_id"],
    )
    names = {"boi_token": "<|vision_start|>", "image_token": "<|image_pad|>", "eoi_token": "<|vision_end|>"}
    # its processor puts the other two behind the first
    tokenizer.chat_template = tokenizer.chat_template.replace("<|image_pad|><|vision_end|>", "")
    images = {
        "size": {"height": SIDE, "width": SIDE},
        "image_processor_type": "Gemma3ImageProcessor",
        "processor_class": "Gemma3Processor",
    }
    processor = {"image_seq_length": 16, "processor_class": "Gemma3Processor"}
    files = {"preprocessor_config.json": images, "processor_config.json": processor}
    return Gemma3ForConditionalGeneration(config), files | {"tokenizer_config.json": names}


def gemma3_window(tokenizer):
    return gemma3(tokenizer, window=True)


def qwen3_5(tokenizer):
    """Most of its layers are no attention: one state runs through all that stands in a row."""
    text = text_config(tokenizer) | {"head_dim": HIDDEN // HEADS}
    text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    text |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    text["rope_parameters"] |= {"mrope_interleaved": True, "partial_rotary_factor": 1.0}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 14,
        "out_hidden_size": HIDDEN,
        "num_position_embeddings": 64,
    }
    config = Qwen3_5Config(text_config=text, vision_config=vision, **qwen_ids(tokenizer))
    files = {"preprocessor_config.json": pixels(14, "Qwen3VLProcessor")}
    return Qwen3_5ForConditionalGeneration(config), files


def idefics3(tokenizer):
    """Its decoder goes by another name."""
    config = Idefics3Config(
        text_config=plain_text_config("llama", tokenizer),
        vision_config=siglip(),
        image_token_id=qwen_ids(tokenizer)["image_token_id"],
    )
    images = {
        "size": {"longest_edge": 2 * SIDE},
        "max_image_size": {"longest_edge": SIDE},
        "image_processor_type": "Idefics3ImageProcessor",
        "processor_class": "Idefics3Processor",
    }
    processor = {"image_seq_len": 4, "processor_class": "Idefics3Processor"}
    files = {"preprocessor_config.json": images, "processor_config.json": processor}
    return Idefics3ForConditionalGeneration(config), files


FAMILIES = {  # name: (tokenizer and chat template of, model); the rest is demo's
    "qwen2_vl": ("qwen2_5_vl", qwen2_vl),
    "qwen3_vl": ("qwen2_5_vl", qwen3_vl),
    "llava_next": ("llava", llava_next),
    "llava_onevision": ("qwen2_5_vl", llava_onevision),
}
OTHERS = {
    "internvl": ("qwen2_5_vl", internvl),
    "gemma3": ("qwen2_5_vl", gemma3),
    "gemma3_window": ("qwen2_5_vl", gemma3_window),
    "qwen3_5": ("qwen2_5_vl", qwen3_5),
    "idefics3": ("qwen2_5_vl", idefics3),
}


def make(family, folder):
    """Write a tiny model of `family` into `folder`: as FAMILIES and OTHERS say, or as demo/base/build.py does
    (LLaVA-1.5, Qwen2.5-VL with tied embeddings, as the 3B has them)."""
    described = FAMILIES | OTHERS
    if family not in described:
        build.build(family, folder, build.corpus())
        return
    like, model_of = described[family]
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
        path = Path(folder) / name
        written = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(written | content))
