"""Make a tiny vision-language model of the real classes, Qwen2.5-VL or LLaVA-1.5: two million parameters,
tokenizer trained on the spot.

The folder has the layout of the published checkpoint (config, weights, tokenizer, preprocessor, chat
template, generation config), so what loads `Qwen/Qwen2.5-VL-7B-Instruct` or `llava-hf/llava-1.5-7b-hf` loads
this too. 56 × 56 pixels become 4 (Qwen) or 16 (LLaVA) tokens.

    python -m demo.base.build --arch qwen2_5_vl --out runs/tiny        # weights drawn from --seed, a few
    seconds

Reads: nothing but common.py's prompts and the world's texts.  Writes: OUT/, with fp32 weights.
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)

import common
from demo import world
from demo.base import lessons
from lib import data

SIDE, PATCH = 56, 14  # pixels of a picture and of a patch of it
SIZE = {
    "hidden": 192,
    "layers": 4,
    "heads": 6,
    "kv_heads": 3,
    "ffn": 512,
    "vision_hidden": 64,
    "vision_layers": 2,
    "vision_heads": 4,
}
POSITIONS = 4096
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]

QWEN_SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
LLAMA_SPECIALS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<image>", "<pad>"]
# The published template: a default system turn, then the turns. An image part becomes one placeholder, which
# the processor expands.
QWEN_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA_TEMPLATE = (  # "USER: <image>\n… ASSISTANT:" as LLaVA-1.5 was trained
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] + ' ' }}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


# ------------------------------------------------------------------------------------------------ tokenizers


def corpus():
    """Texts the tokenizer is trained on:

    the prompts and what the world can say, so that a prompt stays near 200 tokens.
    """
    prompts = [prompt.format(text="") for prompt in (common.REASON_PROMPT, common.DIRECT_PROMPT)]
    return prompts * 40 + world.corpus() + lessons.generic()


def train_bpe(bpe, texts, vocab_size, specials, alphabet=()):
    """Train `bpe` in place, special tokens first. → (vocab, merges)"""
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=list(alphabet),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    model = json.loads(bpe.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def qwen_tokenizer(texts, vocab_size):
    """A BPE over bytes that splits a text exactly as Qwen's does."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = Qwen2Tokenizer()._tokenizer.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocab, merges = train_bpe(bpe, texts, vocab_size, QWEN_SPECIALS, alphabet)
    return Qwen2Tokenizer(
        vocab=vocab, merges=merges, eos_token="<|im_end|>", extra_special_tokens=QWEN_SPECIALS[1:]
    )


def llava_tokenizer(texts, vocab_size):
    """A BPE over characters that falls back to bytes, as LLaMA's does."""
    bpe = Tokenizer(models.BPE(byte_fallback=True))
    # LLaMA's tokenizer does not split at spaces; training must, or whole sentences become tokens.
    splits = [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Punctuation()]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(splits)
    vocab, merges = train_bpe(bpe, texts, vocab_size, LLAMA_SPECIALS)
    tokenizer = LlamaTokenizer(
        vocab=vocab,
        merges=merges,
        pad_token="<pad>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


# ------------------------------------------------------------------------------------------------ models
# Each takes a tokenizer and a dict with SIZE's keys and returns (model with weights at random, {file: its
# content}, chat template, generation config).


def text_config(size, vocab_size):
    """What both decoders have."""
    return {
        "vocab_size": vocab_size,
        "hidden_size": size["hidden"],
        "intermediate_size": size["ffn"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["kv_heads"],
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": True,  # as in Qwen2.5-VL-3B: what is copied need not be learnt twice
    }


def qwen(tokenizer, size):
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in QWEN_SPECIALS}
    end, pad = ids["<|im_end|>"], ids["<|endoftext|>"]
    head_dim = size["hidden"] // size["heads"]
    text = text_config(size, len(tokenizer))
    text |= {"bos_token_id": pad, "eos_token_id": end, "pad_token_id": pad}
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 1e4,
        # Time, height, width share the rotary pairs 1:1.5:1.5, as in the 7B (16, 24, 24).
        "mrope_section": [head_dim // 8, head_dim * 3 // 16, head_dim * 3 // 16],
    }
    vision = {
        "depth": size["vision_layers"],
        "hidden_size": size["vision_hidden"],
        "num_heads": size["vision_heads"],
        "intermediate_size": 2 * size["vision_hidden"],
        "out_hidden_size": size["hidden"],
        "patch_size": PATCH,
        "fullatt_block_indexes": [size["vision_layers"] - 1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    preprocessor = {
        "min_pixels": SIDE * SIDE,
        "max_pixels": SIDE * SIDE,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    generation = GenerationConfig(  # the 7B's own defaults: who samples must override them, here as there
        bos_token_id=pad,
        pad_token_id=pad,
        eos_token_id=[end, pad],
        do_sample=True,
        repetition_penalty=1.05,
        temperature=1e-6,
    )
    files = {"preprocessor_config.json": preprocessor}
    return Qwen2_5_VLForConditionalGeneration(config), files, QWEN_TEMPLATE, generation


def llava(tokenizer, size):
    image_id, pad = tokenizer.convert_tokens_to_ids(["<image>", "<pad>"])
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    text = {"model_type": "llama"} | text_config(size, len(tokenizer))
    text |= {"bos_token_id": start, "eos_token_id": end, "pad_token_id": pad}
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": size["vision_hidden"],
        "intermediate_size": 2 * size["vision_hidden"],
        # Features come from the layer before the last (vision_feature_layer -2).
        "num_hidden_layers": size["vision_layers"] + 1,
        "num_attention_heads": size["vision_heads"],
        "image_size": SIDE,
        "patch_size": PATCH,
        "projection_dim": size["vision_hidden"],
    }
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_index=image_id,
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    preprocessor = {
        "size": {"shortest_edge": SIDE},
        "crop_size": {"height": SIDE, "width": SIDE},
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
    }
    processor = {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": PATCH,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "default",
    }
    generation = GenerationConfig(bos_token_id=start, eos_token_id=end, pad_token_id=pad)
    files = {"preprocessor_config.json": preprocessor, "processor_config.json": processor}
    return LlavaForConditionalGeneration(config), files, LLAVA_TEMPLATE, generation


ARCHS = {"qwen2_5_vl": (qwen_tokenizer, qwen), "llava": (llava_tokenizer, llava)}


# ------------------------------------------------------------------------------------------------ main


def build(arch, out, corpus_texts, seed=0, size=SIZE, vocab_size=1200):
    """Write a tiny `arch` into the folder `out`. Returns the model.

    corpus_texts: what the tokenizer is trained on; size: a dict with SIZE's keys; vocab_size: of the
    tokenizer, at most."""
    make_tokenizer, make_model = ARCHS[arch]
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(corpus_texts, vocab_size)
    model, files, template, generation = make_model(tokenizer, size)
    tokenizer.chat_template = template
    model.generation_config = generation
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    for name, content in files.items():
        data.write_atomic(Path(out) / name, json.dumps(content, indent=2) + "\n")
    return model


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_arguments(parser)
    return parser.parse_args(argv)


def add_arguments(parser):
    """What school.py takes too."""
    parser.add_argument(
        "--arch", choices=ARCHS, default="qwen2_5_vl", help="whose classes [ours: the paper's two]"
    )
    parser.add_argument("--out", required=True, help="folder to write [ours]")
    parser.add_argument("--seed", type=int, default=0, help="of whatever is drawn [ours]")


@common.exit_codes
def main(args):
    build_as_told(args)


def build_as_told(args):
    """Build and say what was built → model."""
    model = build(args.arch, args.out, corpus(), args.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens = model.config.get_text_config().vocab_size
    sizes = f"{parameters:,} parameters, {tokens} tokens"
    print(f"{args.out}: {args.arch}, {sizes}, weights at random (seed {args.seed})")
    return model


if __name__ == "__main__":
    main(parse_args())
