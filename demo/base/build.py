"""Make a tiny vision-language model of the real classes, Qwen2.5-VL or LLaVA-1.5: two million parameters, tokenizer trained on the spot.

The folder has the layout of the published checkpoint (config, weights, tokenizer, preprocessor, chat template, generation config), so
what loads `Qwen/Qwen2.5-VL-7B-Instruct` or `llava-hf/llava-1.5-7b-hf` loads this too. 56 × 56 pixels become 4 (Qwen) or 16 (LLaVA) tokens.

    python -m demo.base.build --arch qwen2_5_vl --out runs/tiny        # weights drawn from --seed, a few seconds

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

ARCHS = ("qwen2_5_vl", "llava")
SIDE, PATCH = 56, 14  # pixels
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
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

QWEN_SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
# The published template: a default system turn, then the turns; an image part becomes one placeholder, which the processor expands.
QWEN_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA_TEMPLATE = (  # "USER: <image>\n… ASSISTANT:" as LLaVA-1.5 was trained
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--arch",
        choices=ARCHS,
        default="qwen2_5_vl",
        help="whose classes [ours: the paper's two base models]",
    )
    parser.add_argument("--out", required=True, help="folder to write [ours]")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights [ours]")
    return parser.parse_args(argv)


def corpus():
    """Texts the tokenizer is trained on: every prompt and what the world can say, so that a prompt stays near 200 tokens."""
    prompts = (common.REASON_PROMPT, common.DIRECT_PROMPT)
    return [prompt.format(text="") for prompt in prompts] * 40 + world.corpus() + lessons.generic()


def train_bpe(texts, arch, vocab_size):
    """→ (vocab, merges) of a BPE over `texts`, special tokens first. Qwen's is over bytes, LLaMA's over characters with byte fallback."""
    if arch == "qwen2_5_vl":
        bpe = Tokenizer(models.BPE())
        bpe.normalizer, bpe.pre_tokenizer = (
            normalizers.NFC(),
            Qwen2Tokenizer()._tokenizer.pre_tokenizer,
        )  # exactly Qwen's splitting
        specials, alphabet = QWEN_SPECIALS, pre_tokenizers.ByteLevel.alphabet()
    else:
        bpe = Tokenizer(models.BPE(byte_fallback=True))
        # LLaMA's tokenizer does not split at spaces; training must, or whole sentences become tokens.
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Punctuation()]
        )
        specials, alphabet = (
            ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<image>", "<pad>"],
            [],
        )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    model = json.loads(bpe.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def qwen(texts, size, vocab_size):
    """→ (model, tokenizer, preprocessor files, chat template, generation config) of a tiny Qwen2.5-VL."""
    vocab, merges = train_bpe(texts, "qwen2_5_vl", vocab_size)
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=merges, eos_token="<|im_end|>", extra_special_tokens=QWEN_SPECIALS[1:]
    )
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in QWEN_SPECIALS}
    head_dim = size["hidden"] // size["heads"]
    config = Qwen2_5_VLConfig(
        text_config={
            **text_sizes(size, len(tokenizer)),
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            # time, height, width share the rotary pairs 1:1.5:1.5, as in the 7B (16, 24, 24)
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [head_dim // 8, head_dim * 3 // 16, head_dim * 3 // 16],
            },
        },
        vision_config={
            "depth": size["vision_layers"],
            "hidden_size": size["vision_hidden"],
            "num_heads": size["vision_heads"],
            "intermediate_size": 2 * size["vision_hidden"],
            "out_hidden_size": size["hidden"],
            "patch_size": PATCH,
            "fullatt_block_indexes": [size["vision_layers"] - 1],
        },
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
        bos_token_id=ids["<|endoftext|>"],
        pad_token_id=ids["<|endoftext|>"],
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
        do_sample=True,
        repetition_penalty=1.05,
        temperature=1e-6,
    )
    return (
        Qwen2_5_VLForConditionalGeneration(config),
        tokenizer,
        {"preprocessor_config.json": preprocessor},
        QWEN_TEMPLATE,
        generation,
    )


def llava(texts, size, vocab_size):
    """→ (model, tokenizer, preprocessor files, chat template, generation config) of a tiny LLaVA-1.5."""
    vocab, merges = train_bpe(texts, "llava", vocab_size)
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
    image_id, pad_id = tokenizer.convert_tokens_to_ids(["<image>", "<pad>"])
    config = LlavaConfig(
        text_config={
            "model_type": "llama",
            **text_sizes(size, len(tokenizer)),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": pad_id,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": size["vision_hidden"],
            "intermediate_size": 2 * size["vision_hidden"],
            "num_hidden_layers": size["vision_layers"]
            + 1,  # features come from the layer before the last (vision_feature_layer -2)
            "num_attention_heads": size["vision_heads"],
            "image_size": SIDE,
            "patch_size": PATCH,
            "projection_dim": size["vision_hidden"],
        },
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
    generation = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=pad_id
    )
    files = {"preprocessor_config.json": preprocessor, "processor_config.json": processor}
    return LlavaForConditionalGeneration(config), tokenizer, files, LLAVA_TEMPLATE, generation


def text_sizes(size, vocab_size):
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


def build(arch, out, corpus_texts, seed=0, size=SIZE, vocab_size=1200):
    """Write a tiny `arch` into the folder `out`. Returns the model. size: a dict with SIZE's keys; corpus_texts: for the tokenizer."""
    torch.manual_seed(seed)
    make = {"qwen2_5_vl": qwen, "llava": llava}[arch]
    model, tokenizer, files, template, generation = make(corpus_texts, size, vocab_size)
    out = Path(out)
    tokenizer.chat_template = template
    model.generation_config = generation
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    for name, content in files.items():
        data.write_atomic(out / name, json.dumps(content, indent=2) + "\n")
    return model


def say_made(model, args):
    count, vocabulary = (
        sum(parameter.numel() for parameter in model.parameters()),
        model.config.get_text_config().vocab_size,
    )
    print(
        f"{args.out}: {args.arch}, {count:,} parameters, {vocabulary} tokens, weights at random (seed {args.seed})"
    )


@common.exit_codes
def main(args):
    say_made(build(args.arch, args.out, corpus(), args.seed), args)


if __name__ == "__main__":
    main(parse_args())
