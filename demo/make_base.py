"""Make a tiny vision-language model of the real classes, Qwen2.5-VL or LLaVA-1.5: two million parameters, tokenizer trained on the spot.

The folder has the layout of the published checkpoint (config, weights, tokenizer, preprocessor, chat template, generation config), so
what loads `Qwen/Qwen2.5-VL-7B-Instruct` or `llava-hf/llava-1.5-7b-hf` loads this too. 56 × 56 pixels become 4 (Qwen) or 16 (LLaVA) tokens.

With --train it learns, from scratch, what a published model brings along: to see and to copy. It is shown conversations about a picture
and a text of the world: describe the picture, what is on the left, repeat the text, list its names, say these words after me. It never
meets our prompts, tags, quintuples, a name with a type or a relation, nor which name belongs to which figure: that is left to 03 and 04.
(Single tokens of all these it meets, drawn at random to be said again, so that none is a stranger.) Its pictures are figures, signs and
posters thrown together at random: it meets no scene of the grammar, and does not learn what goes with what.

demo/base-* are what the second command makes, half an hour on one core each (3000 tokens a step, float32). Of scenes and texts never seen:
Qwen2.5-VL captions exact on 100 %, names on 91.7 %, random tokens said again on 99.1 %; LLaVA 100 %, 93.2 %, 99.1 %.

    python demo/make_base.py --arch qwen2_5_vl --out runs/tiny        # weights drawn from --seed, a few seconds
    OMP_NUM_THREADS=1 python demo/make_base.py --arch qwen2_5_vl --out demo/base-qwen2_5_vl --train 2400 --tokens 3000

Reads: nothing but common.py's prompts and the world's texts.  Writes: OUT/, with bf16 weights after --train, else fp32.
"""

import argparse
import json
import math
import random
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
from demo import world
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
    parser.add_argument(
        "--seed", type=int, default=0, help="of the random weights and of the training [ours]"
    )
    parser.add_argument(
        "--train", type=int, metavar="STEPS", help="learn to see and to copy for so many steps [ours: none]"
    )
    parser.add_argument(
        "--see",
        type=int,
        default=200,
        metavar="STEPS",
        help="of 64 pictures: the vision tower's own schooling [ours]",
    )
    parser.add_argument("--tokens", type=int, default=4000, help="of a step, padding included [ours]")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak, cosine to a tenth [ours]")
    return parser.parse_args(argv)


def corpus():
    """Texts the tokenizer is trained on: every prompt and what the world can say, so that a prompt stays near 200 tokens."""
    prompts = (common.REASON_PROMPT, common.DIRECT_PROMPT)
    return [prompt.format(text="") for prompt in prompts] * 40 + world.corpus() + generic()


def generic(size=1500):
    """Turns of the conversations below, as text."""
    rng = random.Random("generic")
    return [
        part
        for _ in range(size)
        for turn in turns(rng, rng.choice(world.scenes()), tweet(rng), 1)
        for part in turn
        if isinstance(part, str)
    ]


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


# ------------------------------------------------------------------------------------------------ what the base learns

PLAIN = (
    "{} and {} met today",
    "I saw {} , then {}",
    "{} {}",
    "No news of {} or {} yet",
    "{} , {} and {} again",
    "First {} , later {} and {} !",
)
# fmt: off
WORDS = (
    "red", "blue", "green", "day", "night", "left", "right", "person", "child", "city", "hut", "stage", "trophy",
    "crest", "heart", "cap", "ball", "cradle", "poster", "above", "picture",
)
# fmt: on


def tweet(rng):
    """A text with names drawn at random: in the world's words, or plain."""
    template = rng.choice((*world.TEMPLATES[2], *world.TEMPLATES[3], *PLAIN))
    return template.format(*rng.sample(sorted(world.LEXICON), template.count("{}")))


def captions(scene):
    time_of_day = "night" if scene.night else "day"
    sign = f" Above is a {scene.sign}." if scene.sign else ""
    poster = f" A poster has a {scene.poster}." if scene.poster else ""
    return (
        (
            "Describe the picture.",
            f"A picture by {time_of_day}. On the left is a {scene.left}, on the right a {scene.right}.{sign}{poster}",
        ),
        (
            "What can you see?",
            f"I see a {scene.left} and a {scene.right}.{poster}{sign} It is {time_of_day}.",
        ),
    )


def questions(scene):
    return (
        ("What is on the left?", f"A {scene.left}."),
        ("What is on the right?", f"A {scene.right}."),
        ("What is above?", f"A {scene.sign}." if scene.sign else "Nothing."),
        ("Is there a poster?", f"A poster of a {scene.poster}." if scene.poster else "No."),
        ("Day or night?", "Night." if scene.night else "Day."),
    )


LISTS = {  # what stands before, between and after the names
    "List the names.": ("", ", ", "."),
    "The names in braces?": ("{", " | ", "}"),
    "Each name in stars.": ("*", "* *", "*"),
    "A line for each name.": ("- ", "\n- ", ""),
    "Names in brackets?": ("[", "] [", "]"),  # Qwen's tokenizer glues a bracket to the word behind it
}


def list_names(text, question="List the names.", backwards=False):
    before, between, after = LISTS[question]
    names = world.names_in(text)[:: -1 if backwards else 1]
    return question + " Backwards." * backwards, before + between.join(names) + after


def ordinal(rng, text):
    names, (before, between, after) = world.names_in(text), rng.choice(list(LISTS.values()))
    numbers = rng.choices(range(len(names)), k=rng.randint(1, 3))
    asked = before + between.join(str(i + 1) for i in numbers) + after
    return f"Which names are these? {asked}", before + between.join(names[i] for i in numbers) + after


def after(rng, text):
    words = text.split()
    i = rng.choice([i for i, word in enumerate(words[:-1]) if words.count(word) == 1])
    return f"Which word stands after {words[i]} ?", words[i + 1]


def say_after_me(rng):
    words = [
        rng.choice((rng.choice(WORDS), rng.choice(sorted(world.LEXICON)))) for _ in range(rng.randint(3, 9))
    ]
    return f"Say: {' '.join(words)}", " ".join(words)


def turns(rng, scene, text, count):
    """[(question, answer)]; (SCRAMBLE, "") stands for tokens drawn at random, to be said again."""
    made = []
    for _ in range(count):
        kind = rng.random()
        if kind < 0.25:
            made.append(rng.choice(captions(scene)))
        elif kind < 0.45:
            made.append(rng.choices(questions(scene), (1, 1, 3, 1, 2))[0])  # signs are small, and learnt last
        elif kind < 0.58:
            made.append(list_names(text, rng.choice(list(LISTS)), rng.random() < 0.3))
        elif kind < 0.66:
            made.append(("Repeat the text.", text))
        elif kind < 0.77:
            made.append(ordinal(rng, text))
        elif kind < 0.81:
            made.append(after(rng, text))
        elif kind < 0.91:
            made.append(say_after_me(rng))
        else:
            made.append((SCRAMBLE, ""))
        if len(made) > 1 and SCRAMBLE not in (made[-1][0], made[-2][0]) and rng.random() < 0.3:  # two at once
            (asked, said), (then, more) = made.pop(-2), made.pop()
            made.append((f"{asked} Then: {then}", f"{said}\n{more}"))
    return made


SCRAMBLE = "Say again: "


class Chat:
    """Conversations as token ids, in the model's own chat template; which of them carry loss."""

    def __init__(self, arch, tokenizer):
        self.tokenizer, self.stop = tokenizer, tokenizer.eos_token_id
        mark = "\x00"
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": mark}]}
        opening = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        if arch == "qwen2_5_vl":
            opening, self.between = (
                opening.replace("<|image_pad|>", "<|image_pad|>" * 4),
                "\n<|im_start|>user\n" + mark + "<|im_end|>\n<|im_start|>assistant\n",
            )
        else:
            opening, self.between = (
                opening.replace("<image>", "<image>" * (SIDE // PATCH) ** 2),
                " USER: " + mark + " ASSISTANT:",
            )
        self.opening, self.mark, self.lead = opening, mark, "" if arch == "qwen2_5_vl" else " "
        # Every token a prompt or response of the world uses, so that each has met the model; drawn singly, in no order.
        # One left out stays at 8 % when LoRA is sure of it: it cannot be told from the other tokens that never were an answer.
        tags = common.format_response("", []) + common.format_response(".", []).replace("\n", "")
        self.known = sorted({i for text in {*corpus(), tags} for i in self.ids(text)})

    def ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def build(self, rng, text, made, preamble=0):
        """→ (ids, weights): 1 on the answers' tokens and the stop that ends each. preamble: tokens without sense before the text."""
        ids, weights = [], []
        for i, (question, answer) in enumerate(made):
            frame = self.opening if i == 0 else self.between
            asked = f"Text: {text}\n{question}" if i == 0 else question
            before, behind = frame.replace(self.mark, asked + self.mark).split(self.mark)
            said = self.ids(self.lead + answer)
            drawn = []
            if question == SCRAMBLE:
                said = drawn = rng.choices(self.known, k=rng.randint(3, 8))
            asked = self.ids(before) + drawn + self.ids(behind)
            if i == 0 and preamble:  # a prompt of ours is long: the text must be found behind much else
                head = self.ids(before[: before.index("Text: ")])
                asked = head + rng.choices(self.known, k=preamble) + asked[len(head) :]
            if i == 0 and self.tokenizer.bos_token_id is not None and self.lead:
                asked = [self.tokenizer.bos_token_id, *asked]
            ids += asked + said + [self.stop]
            weights += [0] * len(asked) + [1] * (len(said) + 1)
        return ids, weights


def thrown_together(seed, count=3000):
    """Scenes of any figures with any sign and poster, to learn to see, and not what goes with what."""
    rng, kinds, colours = random.Random(f"scenes:{seed}"), list(world.TYPE), list(world.COLOURS)

    def figure(kinds):
        return world.Figure(rng.choice(kinds), rng.choice(colours))

    def scene():
        left, right, sign = figure(kinds), figure(kinds), rng.choice((None, *world.SIGNS))
        return world.Scene(
            left, right, sign, rng.choice((None, figure(list(world.POSTERS)))), rng.random() < 0.5
        )

    return [scene() for _ in range(count)]


class Pictures:
    """Pictures of scenes as the model's own preprocessor gives them, each drawn twice, its figures a little aside, when first asked for."""

    def __init__(self, arch, folder, seed):
        self.arch, self.processor, self.seed, self.values = (
            arch,
            AutoImageProcessor.from_pretrained(folder),
            seed,
            {},
        )

    def draw(self, scene):
        rng = random.Random(f"pictures:{self.seed}:{scene}")
        drawn = [world.draw(scene, (rng.randint(-1, 1), rng.randint(-1, 1))) for _ in range(2)]
        pixels = self.processor(images=drawn, return_tensors="pt")["pixel_values"]
        return (
            pixels.view(2, -1, *pixels.shape[1:]) if self.arch == "qwen2_5_vl" else pixels
        ).half()  # half: all of them fit in memory

    def batch(self, rng, scenes):
        for scene in scenes:
            if scene not in self.values:
                self.values[scene] = self.draw(scene)
        pixels = torch.stack([self.values[scene][rng.randrange(2)] for scene in scenes]).float()
        if self.arch == "llava":
            return {"pixel_values": pixels}
        side = SIDE // PATCH
        return {
            "pixel_values": pixels.flatten(0, 1),
            "image_grid_thw": torch.tensor([[1, side, side]] * len(scenes)),
        }


LOUD = (
    3.0  # standard deviation of the image features: captions exact after 500 steps on 68 %, with 0.2 on none
)


def facts(scene):
    """{(quarter of the picture, what is asked): answer}: all that a scene shows, and which quarter it is."""
    figures = {
        "left": scene.left,
        "right": scene.right,
        "poster": scene.poster,
        "sign": world.Figure(scene.sign, None),
    }
    found = {
        (place, key): getattr(figure, key, None)
        for place, figure in figures.items()
        for key in ("kind", "colour")
    }
    return found | {(place, "place"): place for place in world.QUARTERS} | {("sign", "night"): scene.night}


def is_vision(name):
    return "visual." in name or "vision_tower." in name or "multi_modal_projector." in name


def see(model, pictures, scenes, args, batch=64):
    """School the vision tower before it meets a word, as CLIP's was: linear heads, thrown away after, name what each quarter shows.

    And which quarter it is: Qwen's rotary frequencies for the column are so low that left and right look alike to the decoder.
    """
    rng, places, answers = random.Random(f"see:{args.seed}"), list(world.QUARTERS), {}
    for scene in scenes:
        for fact, answer in facts(scene).items():
            answers.setdefault(fact[1], {}).setdefault(answer, len(answers[fact[1]]))
    heads = {
        key: torch.nn.Linear(model.config.get_text_config().hidden_size, len(known))
        for key, known in answers.items()
    }
    tower = [parameter for name, parameter in model.named_parameters() if is_vision(name)]
    optimizer = torch.optim.AdamW(
        [*tower, *(p for head in heads.values() for p in head.parameters())], betas=(0.9, 0.98)
    )
    bar = tqdm(range(args.see), desc="see", unit="step", disable=None)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 60) * (1 + math.cos(math.pi * step / args.see)) / 2
        drawn = rng.choices(scenes, k=batch)
        features = torch.stack(
            list(model.model.get_image_features(**pictures.batch(rng, drawn)).pooler_output)
        )  # [B, tokens, D]
        half = int(features.shape[1] ** 0.5) // 2
        quarters = features.unflatten(1, (2, half, 2, half)).mean((2, 4)).flatten(1, 2)  # [B, 4, D]
        # Normalised, or a few loud features drown what the decoder must tell apart.
        quarters = torch.nn.functional.layer_norm(quarters, quarters.shape[-1:])
        loss, right = 0.0, torch.ones(batch, dtype=torch.bool)
        for place, key in facts(drawn[0]):
            logits = heads[key](quarters[:, places.index(place)])
            target = torch.tensor([answers[key][facts(scene)[place, key]] for scene in drawn])
            loss, right = (
                loss + torch.nn.functional.cross_entropy(logits, target),
                right & (logits.argmax(-1) == target),
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            tqdm.write(
                f"see, step {step + 1}: loss {loss.item():.3f}, all right in {right.float().mean():.2f}",
                file=sys.stdout,
            )
    # Image tokens far larger than word embeddings: what the decoder's first layers add leaves them readable.
    last = [m for name, m in model.named_modules() if is_vision(name) and isinstance(m, torch.nn.Linear)][-1]
    for parameter in last.parameters():
        parameter.data *= LOUD / features.std().item()


def forward(model, pictures, rng, rows):
    """rows [(scene, ids, weights)] → logits [T, V] that predict the answers' tokens, targets [T], row of each [T]."""
    longest = max(len(ids) for _, ids, _ in rows)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for _, ids, _ in rows])  # [B, L]
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for _, ids, _ in rows])
    answer = torch.tensor([weights + [0] * (longest - len(weights)) for _, _, weights in rows]).bool()
    inputs = pictures.batch(rng, [scene for scene, _, _ in rows])
    if pictures.arch == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    hidden = model.model(
        input_ids=ids, attention_mask=mask, use_cache=False, **inputs
    ).last_hidden_state  # [B, L, D]
    logits = model.lm_head(hidden[:, :-1][answer[:, 1:]])  # [T, V]
    return logits, ids[answer], answer.nonzero()[:, 0]


def learn(model, chat, pictures, scenes, args):
    """Train the decoder alone, the tower stays as `see` left it. Conversations get longer: near copies first, then from afar."""
    rng = random.Random(f"learn:{args.seed}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_vision(name))
    decay = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    model.train()
    began, recent = time.perf_counter(), Counter()
    bar = tqdm(total=args.train, desc="learn", unit="step", disable=None)
    for step in range(args.train):
        done = step / args.train
        lr = args.lr * min(1, (step + 1) / 60) * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = lr
        count, rows, size = rng.randint(1, 3) if done < 0.3 else rng.randint(2, 7), [], 0
        preamble = rng.choice((0, 0, 60, 180)) if done > 0.6 else 0
        while not rows or size + max(len(ids) for _, ids, _ in rows) <= args.tokens:
            scene, text = rng.choice(scenes), tweet(rng)
            rows.append((scene, *chat.build(rng, text, turns(rng, scene, text, count), preamble)))
            size = len(rows) * max(len(ids) for _, ids, _ in rows)
        logits, targets, _ = forward(model, pictures, rng, rows)
        loss = torch.nn.functional.cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
        recent["loss"] += loss.item()
        if (step + 1) % 50 == 0:
            bar.set_postfix(loss=f"{recent['loss'] / 50:.3f}", refresh=False)
            if (step + 1) % 250 == 0 or step < 250:
                tqdm.write(
                    f"step {step + 1}: loss {recent['loss'] / 50:.3f}, {percent(check(model, chat, pictures, scenes[::31]))}",
                    file=sys.stdout,
                )
                sys.stdout.flush()
            recent.clear()
        if (step + 1) % 250 == 0:
            save(model, args.out)
    bar.close()
    return time.perf_counter() - began


@torch.no_grad()
def check(model, chat, pictures, scenes, seed=1):
    """{kind of answer: share of greedy answers that are exact}: those whose every token is the likeliest."""
    model.eval()
    rng, exact = random.Random(f"check:{seed}"), {}
    for place in range(0, len(scenes), 32):
        part = scenes[place : place + 32]
        for kind in ("captions", "names", "scrambled tokens"):
            rows = []
            for scene in part:
                text = tweet(rng)
                last = {
                    "captions": captions(scene)[0],
                    "names": list_names(text),
                    "scrambled tokens": (SCRAMBLE, ""),
                }[kind]
                made = turns(rng, scene, text, 2)
                ids, weights = chat.build(rng, text, [*made, last])
                begin = len(weights) - 1 - weights[::-1].index(0) + 1  # the last answer only
                rows.append((scene, ids, [0] * begin + weights[begin:]))
            logits, targets, row = forward(model, pictures, rng, rows)
            right = torch.ones(len(rows)).scatter_reduce(
                0, row, (logits.argmax(-1) == targets).float(), "amin"
            )
            exact.setdefault(kind, []).extend(right.tolist())
    model.train()
    return {kind: sum(right) / len(right) for kind, right in exact.items()}


def percent(exact):
    return ", ".join(f"{kind} exact {100 * share:.1f} %" for kind, share in exact.items())


def save(model, out):
    """Stored as bf16, half the size; config.json says fp32, which is what loading gives."""
    state = {
        name: value.to(torch.bfloat16)
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }  # tied
    model.save_pretrained(out, state_dict=state)


@common.exit_codes
def main(args):
    model = build(args.arch, args.out, corpus(), args.seed)
    count, vocabulary = (
        sum(parameter.numel() for parameter in model.parameters()),
        model.config.get_text_config().vocab_size,
    )
    print(
        f"{args.out}: {args.arch}, {count:,} parameters, {vocabulary} tokens, weights at random (seed {args.seed})"
    )
    if args.train:
        chat, grammar = Chat(args.arch, AutoTokenizer.from_pretrained(args.out)), set(world.scenes())
        pictures = Pictures(args.arch, args.out, args.seed)
        seen = [scene for scene in thrown_together(args.seed) if scene not in grammar]
        see(model, pictures, seen, args)
        seconds = learn(model, chat, pictures, seen, args)
        save(model, args.out)
        held_out = check(model, chat, pictures, world.scenes()[::5], seed=2)
        print(
            f"{args.out}: {args.train} steps in {seconds / 60:.1f} minutes; scenes never seen: {percent(held_out)}"
        )


if __name__ == "__main__":
    main(parse_args())
