"""The model: loading, LoRA, encoding, sampling, log-probs, distributed set-up and training state. Torch lives here.

Everything works on the parts that Qwen2.5-VL and LLaVA-1.5 share in transformers: `model.model` (vision + language),
`model.model.language_model` (the decoder), `model.lm_head`. Only `encode` and `image_features` know an architecture.

    B prompts   G responses a prompt (group)   N = B·G rows   P prompt tokens   C completion tokens   V vocabulary   D hidden size
"""

import fcntl
import hashlib
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, DynamicCache
from transformers.utils import is_torchvision_available

from common import DIRECT_PROMPT, REASON_PROMPT, InputError, Stopped, load_image, parse_response, read_jsonl, score, write_atomic

PROMPTS = {"reason": REASON_PROMPT, "direct": DIRECT_PROMPT}
ARCHITECTURES = ("qwen2_5_vl", "llava")
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"  # plain names hit the vision tower too
HEAD_CHUNK = 256  # response tokens whose [256, V] logits are alive at once

# ------------------------------------------------------------------------------------------------ ranks


@dataclass(frozen=True)
class Ranks:
    rank: int
    world: int
    device: torch.device

    @property
    def main(self):
        return self.rank == 0

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def sum(self, *values):
        """Sums over ranks, in float64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, value):
        """Every rank's picklable value, in rank order, on every rank."""
        values = [None] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values if self.world > 1 else [value]


def setup(distributed=False):
    """Device and ranks as the launcher set them; plain `python` is one rank. distributed: make a process group even for one (DeepSpeed)."""
    cuda = torch.cuda.is_available()
    rank, world, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world == 1 and distributed and "MASTER_ADDR" not in os.environ:
        with socket.socket() as probe:  # a free port, so that two runs on one machine do not meet
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if (world > 1 or distributed) and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return Ranks(rank, world, device)


# ------------------------------------------------------------------------------------------------ model


def load(name, dtype=torch.float32, device="cpu"):
    """Model (frozen, eval) and processor of a Qwen2.5-VL or LLaVA-1.5 checkpoint: a hub name or a folder. Raises InputError."""
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"--model {name}: not a model folder, nor a hub model that can be had from here ({_first(error)})") from None
    if config.model_type not in ARCHITECTURES:
        raise InputError(f"--model {name}: is a {config.model_type} model, expected one of {', '.join(ARCHITECTURES)}")
    try:
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, attn_implementation="sdpa").to(device)
        processor = load_processor(name)
    except (OSError, ValueError) as error:
        raise InputError(f"--model {name}: cannot load ({_first(error)})") from None
    return model.requires_grad_(False).eval(), processor


def load_processor(name):
    """AutoProcessor. Without torchvision (a CPU machine) it cannot build Qwen2.5-VL's, whose video part needs it: leave that part out."""
    if is_torchvision_available() or AutoConfig.from_pretrained(name).model_type != "qwen2_5_vl":
        return AutoProcessor.from_pretrained(name)
    from transformers import AutoImageProcessor, AutoTokenizer
    from transformers.models.qwen2_5_vl import processing_qwen2_5_vl

    class Qwen2_5_VLProcessor(processing_qwen2_5_vl.Qwen2_5_VLProcessor):  # same name: it is written into saved files
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            super().__init__(image_processor, tokenizer, None, chat_template=chat_template)

    tokenizer = AutoTokenizer.from_pretrained(name)
    return Qwen2_5_VLProcessor(AutoImageProcessor.from_pretrained(name), tokenizer, chat_template=tokenizer.chat_template)


def _first(error):
    return str(error).strip().split("\n")[0][:200]


# ------------------------------------------------------------------------------------------------ LoRA


def add_lora(model, rank, alpha, dropout=0.0):
    """A fresh trainable LoRA on every linear layer of the language model [ours: the paper gives rank and alpha only]."""
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=LORA_TARGETS, task_type="CAUSAL_LM")
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
        raise InputError(f"--adapter {folder}: does not fit this --model ({_first(error)})") from None
    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as stored:  # PEFT only warns of keys that found no place
        missing = set(get_peft_model_state_dict(model, adapter_name=name)) ^ set(stored.keys())
    if missing:
        raise InputError(f"--adapter {folder}: {len(missing)} tensors do not fit this --model, such as {sorted(missing)[0]}")
    return check_lora(model) if trainable else model


def check_lora(model):
    """The two silent failures of a LoRA run: nothing trains, or the wrong modules do."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained or not all("lora_" in name and "language_model" in name for name in trained):
        raise InputError(f"LoRA must train the language model only; trainable now: {trained[:3] or 'nothing'}")
    return model


def save_adapter(model, processor, folder, prompt):
    """The policy's adapter as plain PEFT, with its processor and the prompt it was trained with. Whole or not at all."""
    folder = Path(folder)
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh, selected_adapters=["default"])
    processor.save_pretrained(fresh)
    (fresh / "jmere.json").write_text(json.dumps({"prompt": prompt}) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def adapter_prompt(folder):
    """ "reason" or "direct": the prompt the adapter was trained with. Raises InputError where `folder` is no adapter of ours."""
    folder = Path(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors", "jmere.json"):
        if not (folder / name).is_file():
            raise InputError(f"--adapter {folder}: no {name} in it; expected a best/ folder made by 03_sft.py or 04_grpo.py")
    return json.loads((folder / "jmere.json").read_text())["prompt"]


@contextmanager
def reference(model):
    """Inside, `model` is the reference policy: the frozen second copy of the SFT adapter, or the base alone (Only-RL)."""
    if "reference" not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    model.base_model.set_adapter("reference", inference_mode=True)  # without inference_mode PEFT would make it trainable
    try:
        yield
    finally:
        model.base_model.set_adapter("default")


# ------------------------------------------------------------------------------------------------ encoding


@dataclass
class Prompt:
    """One prompt, image included, ready for the decoder. Computed once a step; sampling, reference and policy pass share it."""

    embeds: torch.Tensor  # [P, D] token embeddings with the image features in place, no graph: embeddings and vision tower are frozen
    positions: torch.Tensor  # [3, P] (Qwen2.5-VL: time, height, width) or [1, P]; a response goes on at max + 1


def _base(model):
    return model.get_base_model() if isinstance(model, PeftModel) else model


@torch.no_grad()
def encode(model, processor, items):
    """[(prompt text, image path)] → list of Prompt. The chat template and the image tokens are the processor's."""
    base = _base(model)
    inner, device = base.model, base.lm_head.weight.device
    prompts = []
    for text, image in items:
        for token in processor.tokenizer.all_special_tokens:  # a tweet may spell one: it is text, not structure
            text = text.replace(token, f"{token[0]} {token[1:]}")
        content = [{"type": "image"}, {"type": "text", "text": text}]
        chat = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
        inputs = processor(text=[chat], images=[load_image(image)], return_tensors="pt").to(device)
        ids = inputs["input_ids"]  # [1, P]
        if "image_grid_thw" in inputs:
            features = inner.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
            positions = inner.get_rope_index(ids, inputs["mm_token_type_ids"], inputs["image_grid_thw"])[0][:, 0]  # [3, P]
        else:
            features = inner.get_image_features(inputs["pixel_values"].to(base.dtype)).pooler_output
            positions = torch.arange(ids.shape[1], device=device)[None]  # [1, P]
        embeds, features = inner.get_input_embeddings()(ids), torch.cat(list(features))
        place = ids == base.config.image_token_id
        if place.sum() != len(features):
            raise InputError(f"{image}: {int(place.sum())} image tokens in the prompt, {len(features)} image features: processor and model differ")
        embeds = embeds.masked_scatter(place[..., None], features.to(embeds.dtype))
        prompts.append(Prompt(embeds[0], positions))
    return prompts


def decode(processor, ids):
    return processor.tokenizer.decode(ids, skip_special_tokens=True)


def stop_ids(model, processor):
    """Every id that ends a response; the first is the one that SFT teaches."""
    configured = _base(model).generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return list(dict.fromkeys([processor.tokenizer.eos_token_id, *(i for i in configured if i is not None)]))


def image_ids(model):
    """Ids that stand for pictures: a response that held one would break the next forward pass."""
    config = _base(model).config
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id")
    return sorted({getattr(config, name) for name in names if getattr(config, name, None) is not None})


def _positions(model, prompt, length):
    """[3 or 1, length]: positions of a response's tokens."""
    return (prompt.positions.max() + 1 + torch.arange(length, device=prompt.positions.device)).expand(len(prompt.positions), -1)


def _as_rope(positions):
    """[B, 3 or 1, L] → what the decoder takes: [3, B, L] or [B, L]."""
    return positions.transpose(0, 1) if positions.shape[1] == 3 else positions[:, 0]


# ------------------------------------------------------------------------------------------------ sampling


@dataclass
class Sample:
    text: str
    ids: list[int]  # [C], the stop id included where the response ended by itself
    finished: bool  # False: cut off at max_new_tokens


def uniforms(n, length, *key):
    """[n, length] random numbers in [0, 1) that depend on `key` alone: not on batch, rank or what was drawn before."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1
    return torch.rand(n, length, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sample(model, processor, prompts, n, max_new_tokens, temperature, top_p=1.0, keys=None):
    """n responses to each Prompt → list (a prompt) of lists of Sample. Prefills each prompt once.

    keys: one hashable value a prompt; its responses are a function of it (seed, step, id), whatever the batch or the rank.
    temperature 0 is greedy. No top-k. Image ids are never drawn; every stop id ends a response.
    """
    assert not model.training, "sampling in train() mode gives wrong text under gradient checkpointing"
    base = _base(model)
    decoder, head, device = base.model.language_model, base.lm_head, base.lm_head.weight.device
    stops = torch.tensor(stop_ids(model, processor), device=device)
    noise = torch.cat([uniforms(n, max_new_tokens, key) for key in keys or range(len(prompts))]).to(device) if temperature else None

    # 1. Prefill, left-padded so that every row's next token is the last one.
    longest = max(len(p.embeds) for p in prompts)
    embeds = torch.stack([torch.nn.functional.pad(p.embeds, (0, 0, longest - len(p.embeds), 0)) for p in prompts])  # [B, P, D]
    positions = torch.stack([torch.nn.functional.pad(p.positions, (longest - len(p.embeds), 0)) for p in prompts])  # [B, 3, P]
    mask = torch.tensor([[0] * (longest - len(p.embeds)) + [1] * len(p.embeds) for p in prompts], device=device)  # [B, P]
    cache = DynamicCache(config=decoder.config)
    hidden = decoder(inputs_embeds=embeds, attention_mask=mask, position_ids=_as_rope(positions), past_key_values=cache).last_hidden_state

    # 2. Decode all N = B·n rows together; rows that are done leave the batch.
    cache.batch_repeat_interleave(n)
    hidden = hidden[:, -1].repeat_interleave(n, 0)  # [N, D]
    mask = torch.nn.functional.pad(mask, (0, max_new_tokens), value=1).repeat_interleave(n, 0)  # [N, P + C]
    first = (positions.amax((1, 2)) + 1).repeat_interleave(n)  # [N] position of the first response token
    rows, drawn = torch.arange(len(first), device=device), [[] for _ in range(len(first))]
    for step in range(max_new_tokens):
        logits = head(hidden).float()  # [N, V]
        logits[:, image_ids(model)] = -torch.inf
        tokens = _draw(logits, temperature, top_p, noise[rows, step] if temperature else None)  # [N]
        for row, token in zip(rows.tolist(), tokens.tolist()):
            drawn[row].append(token)
        going = ~torch.isin(tokens, stops)
        if step == max_new_tokens - 1 or not going.any():
            break
        if not going.all():
            keep = going.nonzero()[:, 0]
            rows, tokens, mask = rows[keep], tokens[keep], mask[keep]
            cache.batch_select_indices(keep)
        position = (first[rows] + step)[:, None, None].expand(-1, positions.shape[1], 1)  # [N, 3, 1]
        hidden = decoder(
            inputs_embeds=base.get_input_embeddings()(tokens[:, None]),
            attention_mask=mask[:, : longest + step + 1],
            position_ids=_as_rope(position),
            past_key_values=cache,
        ).last_hidden_state[:, -1]
    ends = set(stops.tolist())
    samples = [Sample(decode(processor, ids), ids, ids[-1] in ends) for ids in drawn]
    return [samples[i : i + n] for i in range(0, len(samples), n)]


def _draw(logits, temperature, top_p, noise):
    """[N, V] logits → [N] token ids by inverse CDF of one random number a row."""
    if not temperature:
        return logits.argmax(-1)
    probs = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, index = probs.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0  # the token that crosses top_p stays
        probs = torch.zeros_like(probs).scatter_(-1, index, ordered)
    cdf = probs.cumsum(-1)
    return torch.searchsorted(cdf, noise[:, None] * cdf[:, -1:], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def generate(model, processor, items, n=1, max_new_tokens=2048, temperature=0.8, top_p=1.0, keys=None, batch_rows=64, progress=None):
    """sample() for any number of (prompt text, image path): longest prompts first, at most `batch_rows` rows at once. In order of items."""
    keys = list(keys) if keys is not None else list(range(len(items)))
    order = sorted(range(len(items)), key=lambda i: -len(items[i][0]))
    results, size = [None] * len(items), max(1, batch_rows // n)
    for start in range(0, len(order), size):
        chunk = order[start : start + size]
        prompts = encode(model, processor, [items[i] for i in chunk])
        for i, samples in zip(chunk, sample(model, processor, prompts, n, max_new_tokens, temperature, top_p, [keys[i] for i in chunk])):
            results[i] = samples
        if progress is not None:
            progress.update(len(chunk))
    return results


# ------------------------------------------------------------------------------------------------ log-probs


def completion_logps(model, prompts, completions, temperature=1.0):
    """Log-probs of responses under the model as it is now (adapter, grad mode). The one function that shared-prefix exchanges.

    prompts: list of Prompt; completions: for each a list of id lists, stop id included.
    → logps [N, C], entropy [N, C] (no graph), mask [N, C]; N rows in the order of completions; fp32, at the sampling temperature.
    """
    base = _base(model)
    device = base.lm_head.weight.device
    pairs = [(prompt, ids) for prompt, group in zip(prompts, completions, strict=True) for ids in group]
    longest = max(len(prompt.embeds) + len(ids) for prompt, ids in pairs)
    embeds, positions, mask, index, targets = [], [], [], [], []
    for row, (prompt, ids) in enumerate(pairs):
        size, response = len(prompt.embeds), torch.tensor(ids, device=device)
        pad = longest - size - len(ids)
        whole = torch.cat([prompt.embeds, base.get_input_embeddings()(response).detach()])
        embeds.append(torch.nn.functional.pad(whole, (0, 0, 0, pad)))
        positions.append(torch.nn.functional.pad(torch.cat([prompt.positions, _positions(model, prompt, len(ids))], 1), (0, pad)))
        mask.append([1] * (size + len(ids)) + [0] * pad)
        index.append(row * longest + torch.arange(size - 1, size + len(ids) - 1, device=device))  # the position that predicts each token
        targets.append(response)
    hidden = base.model.language_model(
        inputs_embeds=torch.stack(embeds),
        attention_mask=torch.tensor(mask, device=device),
        position_ids=_as_rope(torch.stack(positions)),
        use_cache=False,
    ).last_hidden_state.flatten(0, 1)  # [N·L, D]
    logps, entropy = token_logps(base.lm_head, hidden[torch.cat(index)], torch.cat(targets), temperature)  # [T]
    lengths = [len(ids) for _, ids in pairs]
    stack = lambda flat: torch.nn.utils.rnn.pad_sequence(flat.split(lengths), batch_first=True)  # noqa: E731
    return stack(logps), stack(entropy), stack(torch.ones_like(logps)).bool()


def token_logps(head, hidden, targets, temperature):
    """[T, D], [T] → logps [T], entropy [T] in fp32; logits exist for HEAD_CHUNK tokens at a time, in backward too."""

    def chunk(hidden, targets):
        logps = (head(hidden).float() / temperature).log_softmax(-1)  # [chunk, V]
        with torch.no_grad():
            entropy = -(logps.exp() * logps).sum(-1)
        return logps.gather(-1, targets[:, None])[:, 0], entropy

    parts = [
        checkpoint(chunk, h, t, use_reentrant=False) if torch.is_grad_enabled() else chunk(h, t)
        for h, t in zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK))
    ]
    return torch.cat([logps for logps, _ in parts]), torch.cat([entropy for _, entropy in parts])
