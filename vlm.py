"""The model: loading, LoRA, encoding, sampling, log-probs, distributed set-up and training state. Torch lives here.

Everything works on the parts that Qwen2.5-VL and LLaVA-1.5 share in transformers: `model.model` (vision + language),
`model.model.language_model` (the decoder), `model.lm_head`. Only `encode` and `load_processor` know an architecture.

    B prompts   G responses a prompt (group)   N = B·G rows   P prompt tokens   C completion tokens   V vocabulary   D hidden size
"""

import argparse
import fcntl
import functools
import hashlib
import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors import safe_open
from torch.nn.functional import linear, pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
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

from common import (
    DIRECT_PROMPT,
    REASON_PROMPT,
    InputError,
    Stopped,
    jsonl_line,
    load_image,
    parse_response,
    score,
    write_atomic,
)

PROMPTS = {"reason": REASON_PROMPT, "direct": DIRECT_PROMPT}
ARCHITECTURES = ("qwen2_5_vl", "llava")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"  # plain names hit the vision tower too
SHARED_PREFIX = "shared_prefix"  # our attention, by the name that transformers knows it under
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

    @contextmanager
    def together(self):
        """Inside, each rank works alone: no collectives. What one raises ends all of them with that cause, and none waits for it."""
        fault = None
        try:
            yield
        except Exception as error:  # KEEP: whatever it is, the other ranks must hear of it
            if self.world == 1:
                raise
            if not isinstance(error, (InputError, Stopped)):
                traceback.print_exc()
            fault = (
                (str(error), 2)
                if isinstance(error, InputError)
                else (_first(f"{type(error).__name__}: {error}"), 3)
            )
        faults = self.gather(fault)
        rank = next((rank for rank, fault in enumerate(faults) if fault), None)
        if rank is None:
            return
        text, code = faults[rank]
        if not self.main:
            sys.exit(code)  # rank 0 says why
        raise (InputError if code == 2 else Stopped)(f"rank {rank}: {text}" if rank else text)


def setup(distributed=False):
    """Device and ranks as the launcher set them; plain `python` is one rank. distributed: make a process group even for one (DeepSpeed)."""
    cuda = torch.cuda.is_available()
    rank, world, local = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world == 1 and distributed and "MASTER_ADDR" not in os.environ:
        with socket.socket() as probe:  # a free port, so that two runs on one machine do not meet
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
    if (world > 1 or distributed) and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return Ranks(rank, world, device)


# ------------------------------------------------------------------------------------------------ model


def load(name, dtype=torch.float32, device="cpu"):
    """Model (frozen, eval) and processor of a Qwen2.5-VL or LLaVA-1.5 checkpoint: a hub name or a folder. Raises InputError."""
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--model {name}: not a model folder, nor a hub model that can be had from here ({_first(error)})"
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
        raise InputError(f"--model {name}: cannot load ({_first(error)})") from None
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


def _first(error):
    return str(error).strip().split("\n")[0][:200]


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
        raise InputError(f"--adapter {folder}: does not fit this --model ({_first(error)})") from None
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


def _base(model):
    return model.get_base_model() if isinstance(model, PeftModel) else model


@torch.no_grad()
def encode(model, processor, items):
    """[(prompt text, image path)] → list of Prompt. The chat template and the image tokens are the processor's."""
    base = _base(model)
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
        inputs = processor(text=[chat], images=[load_image(image)], return_tensors="pt").to(device)
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
    configured = _base(model).generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return list(dict.fromkeys([processor.tokenizer.eos_token_id, *(i for i in configured if i is not None)]))


def image_ids(model):
    """Ids that stand for pictures: a response that held one would break the next forward pass."""
    config = _base(model).config
    names = (
        "image_token_id",
        "video_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
        "vision_token_id",
    )
    return sorted({getattr(config, name) for name in names if getattr(config, name, None) is not None})


def _positions(prompt, length):
    """[3 or 1, length]: positions of a response's tokens."""
    return (prompt.positions.max() + 1 + torch.arange(length, device=prompt.positions.device)).expand(
        len(prompt.positions), -1
    )


def _as_rope(positions):
    """[B, 3 or 1, L] → what the decoder takes: [3, B, L] or [B, L]."""
    return positions.transpose(0, 1) if positions.shape[1] == 3 else positions[:, 0]


# ------------------------------------------------------------------------------------------------ shared prefix


def _attention(module, query, key, value, attention_mask, layout=None, **kwargs):
    """The decoder's attention: sdpa, unless the caller hands in a layout (Packed or Decoding)."""
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return layout(module.layer_idx, query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(SHARED_PREFIX, _attention)
AttentionMaskInterface.register(SHARED_PREFIX, sdpa_mask)  # of passes without a layout


class Packed:
    """One row of real tokens, [prompt | c1 … cG] of each group behind the last. A response sees its prompt and itself.

    It needs no L × L mask: the prompt is causal over itself, each response is one causal block over [prompt, itself].
    """

    def __init__(self, groups, keep=False):
        self.groups = groups  # [(P, [C1 … CG])]
        self.kept = (
            [] if keep else None
        )  # (keys, values) [1, Hkv, L, d] of each layer: what decoding goes on from
        self.masks = {}

    def __call__(self, layer, query, key, value):
        """query [1, H, L, d], key and value [1, Hkv, L, d] → [1, H, L, d]"""
        if self.kept is not None:
            self.kept.append((key, value))
        outputs, start = [], 0
        for size, lengths in self.groups:
            prefix = slice(start, start + size)
            prefix_key, prefix_value = key[:, :, prefix], value[:, :, prefix]
            outputs.append(
                scaled_dot_product_attention(
                    query[:, :, prefix], prefix_key, prefix_value, is_causal=True, enable_gqa=True
                )
            )
            start += size
            for length in lengths:
                own = slice(start, start + length)
                q = (
                    query[:, :, own].unflatten(1, (key.shape[1], -1)).flatten(2, 3)
                )  # [1, Hkv, H/Hkv·C, d]: keys are not repeated a head
                k, v = (
                    torch.cat([prefix_key, key[:, :, own]], 2),
                    torch.cat([prefix_value, value[:, :, own]], 2),
                )  # [1, Hkv, P + C, d]
                out = scaled_dot_product_attention(q, k, v, attn_mask=self._mask(size, length, q))
                outputs.append(out.unflatten(2, (-1, length)).flatten(1, 2))  # [1, H, C, d]
                start += length
        return torch.cat(outputs, 2)

    def _mask(self, size, length, query):
        """[H/Hkv·C, P + C] additive: 0 on the prompt, causal on the response."""
        if (size, length) not in self.masks:
            causal = torch.full((length, length), -torch.inf, dtype=query.dtype, device=query.device).triu(1)
            self.masks[size, length] = pad(causal, (size, 0)).repeat(query.shape[2] // length, 1)
        return self.masks[size, length]


class Decoding:
    """Caches of N responses that grow a token at a time: B prompts' keys and values, each held once, and every response's own.

    Scores of all responses to a prompt are one matrix product with its keys; one softmax goes over prompt and response.
    static: shapes stay as they are from token to token, so that a CUDA graph can repeat them; places not yet filled are masked.
    """

    GROW = {False: 64, True: 256}  # tokens; static: a graph lives as long

    def __init__(self, kept, sizes, n, static=False):
        def by_prompt(x):  # [1, Hkv, ΣP, d] → [B, Hkv, P, d]
            return pad_sequence(
                [part.transpose(0, 1) for part in x[0].split(sizes, 1)], batch_first=True
            ).transpose(1, 2)

        self.prefix = [
            torch.stack([by_prompt(key), by_prompt(value)]) for key, value in kept
        ]  # a layer: [2, B, Hkv, P, d]
        device = kept[0][0].device
        self.hole = (
            torch.arange(max(sizes), device=device) >= torch.tensor(sizes, device=device)[:, None]
        )  # [B, P]
        self.own = [
            p.new_empty(2, len(sizes) * n, p.shape[2], 0, p.shape[4]) for p in self.prefix
        ]  # a layer: [2, N, Hkv, C, d]
        self.grow, self.static, self.step = self.GROW[static], static, -1
        self.at, self.places = (
            torch.full((1,), -1, device=device),
            None,
        )  # static: the token's place, and all places
        self._arrange(torch.arange(len(sizes), device=device).repeat_interleave(n))

    def _arrange(self, owner):
        """owner [N], ascending: each response's prompt. Responses stand in a grid [B, width], which has holes once some are done."""
        counts = owner.bincount()
        self.owner, self.width = owner, int(counts.max())
        self.slot = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner]
        self.full = len(owner) == len(counts) * self.width

    def _spread(self, x):
        """[N, Hkv, r, …] → [B, Hkv, width·r, …]"""
        shape = (self.prefix[0].shape[1], self.width, *x.shape[1:])
        grid = x.view(shape) if self.full else x.new_zeros(shape).index_put((self.owner, self.slot), x)
        return grid.transpose(1, 2).flatten(2, 3)

    def _collect(self, grid):
        """[B, Hkv, width·r, …] → [N, Hkv, r, …]"""
        grid = grid.unflatten(2, (self.width, -1)).transpose(1, 2)
        return grid.flatten(0, 1) if self.full else grid[self.owner, self.slot]

    def keep(self, rows):
        """Drop all responses but `rows` (ascending indices), and prompts that have none left."""
        self.own = [own[:, rows] for own in self.own]
        alive, owner = self.owner[rows].unique(return_inverse=True)
        if len(alive) < len(self.hole):
            self.prefix, self.hole = [prefix[:, alive] for prefix in self.prefix], self.hole[alive]
        self._arrange(owner)

    def advance(self):
        self.step, self.at = self.step + 1, self.at.add_(1)
        if self.step % self.grow == 0:
            self.own = [pad(own, (0, 0, 0, self.grow)) for own in self.own]
            self.places = torch.arange(self.own[0].shape[3], device=self.at.device)

    def __call__(self, layer, query, key, value):
        """query [N, H, 1, d], key and value [N, Hkv, 1, d] → [N, H, 1, d]"""
        own_key, own_value = self.own[layer].index_copy_(
            3, self.at, torch.stack([key, value])
        )  # [N, Hkv, C, d]
        if not self.static:
            own_key, own_value = own_key[:, :, : self.step + 1], own_value[:, :, : self.step + 1]
        prefix_key, prefix_value = self.prefix[layer]  # [B, Hkv, P, d]
        query = (
            query.unflatten(1, (key.shape[1], -1))[:, :, :, 0] * query.shape[-1] ** -0.5
        )  # [N, Hkv, H/Hkv, d]
        shared = self._spread(query) @ prefix_key.transpose(2, 3)  # [B, Hkv, width·H/Hkv, P]
        shared = self._collect(shared.masked_fill(self.hole[:, None, None], -torch.inf))  # [N, Hkv, H/Hkv, P]
        own = query @ own_key.transpose(2, 3)  # [N, Hkv, H/Hkv, C]
        own = own.masked_fill(self.places > self.at, -torch.inf) if self.static else own
        scores = torch.cat([shared, own], -1).softmax(-1, dtype=torch.float32).to(value.dtype)
        shared, own = scores.split([prefix_key.shape[2], own.shape[-1]], -1)
        out = self._collect(self._spread(shared) @ prefix_value) + own @ own_value  # [N, Hkv, H/Hkv, d]
        return out.flatten(1, 2)[:, :, None]


def _decoder(base, embeds, positions, layout):
    """[N, L, D], [N, 3 or 1, L] → last hidden state [N, L, D] under a layout's attention."""
    decoder = base.model.language_model
    assert decoder.config._attn_implementation == SHARED_PREFIX, (
        "the layout would be ignored: load the model with vlm.load"
    )
    unused = embeds.new_zeros(1, 1, 1, 1)  # a mask of four dimensions: transformers builds none
    return decoder(
        inputs_embeds=embeds,
        attention_mask=unused,
        position_ids=_as_rope(positions),
        use_cache=False,
        layout=layout,
    ).last_hidden_state


def _token(base, cache, tokens, position):
    """[N] token ids, [N, 3 or 1, 1] → their last hidden state [N, D]; the cache takes them in."""
    return _decoder(base, base.get_input_embeddings()(tokens[:, None]), position, cache)[:, 0]


class GraphedToken:
    """_token with a static cache as a CUDA graph: captured anew where rows have left or the cache has grown, replayed between."""

    def __init__(self):
        self.shape = None

    def __call__(self, base, cache, tokens, position):
        if self.shape != (shape := (len(tokens), cache.own[0].shape[3])):
            self.shape, self.graph, self.inputs = (
                shape,
                torch.cuda.CUDAGraph(),
                (tokens.clone(), position.clone()),
            )
            with torch.cuda.stream(
                side := torch.cuda.Stream()
            ):  # a run before the capture, as CUDA graphs ask for
                side.wait_stream(torch.cuda.default_stream())
                _token(base, cache, *self.inputs)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(self.graph):
                self.hidden = _token(base, cache, *self.inputs)
        for held, new in zip(self.inputs, (tokens, position)):
            held.copy_(new)
        self.graph.replay()
        return self.hidden


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


@contextmanager
def _folded(model):
    """Inside, each linear layer of the decoder is one matmul with a second copy of its weight: LoRA added in, laid out for few rows.

    On a CPU in fp32 only, where it halves the time of a token. In bf16 the sum would round small LoRA updates away.
    The base is untouched: merging and unmerging would let it drift.
    """
    base, folded = _base(model), []
    if base.lm_head.weight.dtype == torch.float32 and base.lm_head.weight.device.type == "cpu":
        modules = [*base.model.language_model.named_modules(), ("lm_head", base.lm_head)]
        loras = [(name, module) for name, module in modules if isinstance(module, LoraLayer)]
        inside = tuple(f"{name}." for name, _ in loras)
        linears = [
            (name, module)
            for name, module in modules
            if isinstance(module, torch.nn.Linear) and not name.startswith(inside)
        ]
        for _, module in loras + linears:
            plain = module.get_base_layer() if isinstance(module, LoraLayer) else module
            weight = plain.weight
            if isinstance(module, LoraLayer) and not module.disable_adapters:
                weight = sum((module.get_delta_weight(name) for name in module.active_adapters), weight)
            module.forward = functools.partial(
                linear, weight=weight.t().contiguous().t(), bias=plain.bias
            )  # laid out [in, out]
            folded.append(module)
    try:
        yield
    finally:
        for module in folded:
            del module.forward


@torch.no_grad()
def sample(
    model, processor, prompts, n, max_new_tokens, temperature, top_p=1.0, keys=None, part=None, static=False
):
    """n responses to each Prompt → list (a prompt) of lists of Sample. Prefills each prompt once.

    part: (first, last) of the n responses, where all of them would not fit: only these are drawn, and they are the same.

    keys: one hashable value a prompt; its responses are a function of it (seed, step, id), whatever the batch or the rank.
    temperature 0 is greedy. No top-k. Image ids are never drawn; every stop id ends a response.
    static: shapes that stay, on a GPU as CUDA graphs; rows that are done leave once half are. The same responses.
    """
    assert not model.training, "sampling in train() mode gives wrong text under gradient checkpointing"
    base = _base(model)
    device = base.lm_head.weight.device
    stops, images = torch.tensor(stop_ids(model, processor), device=device), image_ids(model)
    draws, (start, end) = keys or range(len(prompts)), part or (0, n)
    noise = (
        torch.cat([uniforms(n, max_new_tokens, key)[start:end] for key in draws]).to(device)
        if temperature
        else None
    )
    n = end - start

    with _folded(model):
        # 1. Prefill: all prompts in one row, nothing padded.
        sizes = [len(p.embeds) for p in prompts]
        layout = Packed([(size, []) for size in sizes], keep=True)
        positions = torch.cat([p.positions for p in prompts], 1)[None]  # [1, 3, ΣP]
        hidden = _decoder(base, torch.cat([p.embeds for p in prompts])[None], positions, layout)[0]  # [ΣP, D]
        hidden = hidden[torch.tensor(sizes, device=device).cumsum(0) - 1].repeat_interleave(n, 0)  # [N, D]
        cache = Decoding(layout.kept, sizes, n, static)
        token_step = GraphedToken() if static and device.type == "cuda" else _token
        del layout

        # 2. Decode all N = B·n rows together; rows that are done leave the batch.
        first = torch.stack([p.positions.max() + 1 for p in prompts]).repeat_interleave(
            n
        )  # [N] position of the first response token
        rows, drawn = torch.arange(len(first), device=device), [[] for _ in range(len(first))]
        going = torch.ones_like(rows, dtype=torch.bool)
        for step in range(max_new_tokens):
            logits = base.lm_head(hidden).float()  # [N, V]
            logits[:, images] = -torch.inf
            tokens = _draw(logits, temperature, top_p, noise[rows, step] if temperature else None)  # [N]
            for row, token in zip(rows[going].tolist(), tokens[going].tolist()):
                drawn[row].append(token)
            going = going & ~torch.isin(tokens, stops)
            if step == max_new_tokens - 1 or not going.any():
                break
            if going.sum() < len(going) / (2 if static else 1):
                keep = going.nonzero()[:, 0]
                rows, tokens, going = rows[keep], tokens[keep], going[keep]
                cache.keep(keep)
            cache.advance()
            position = (first[rows] + step)[:, None, None].expand(-1, positions.shape[1], 1)  # [N, 3, 1]
            hidden = token_step(base, cache, tokens, position)
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
    return torch.searchsorted(cdf, noise[:, None] * cdf[:, -1:], right=True)[:, 0].clamp(
        max=logits.shape[-1] - 1
    )


def generate(
    model,
    processor,
    items,
    n=1,
    max_new_tokens=2048,
    temperature=0.8,
    top_p=1.0,
    keys=None,
    batch_rows=64,
    progress=None,
    static=False,
):
    """sample() for any number of (prompt text, image path): longest prompts first, at most `batch_rows` rows at once. In order of items."""
    keys = list(keys) if keys is not None else list(range(len(items)))
    order = sorted(range(len(items)), key=lambda i: -len(items[i][0]))
    results, size = [None] * len(items), max(1, batch_rows // n)
    for start in range(0, len(order), size):
        chunk = order[start : start + size]
        prompts = encode(model, processor, [items[i] for i in chunk])
        for first in range(
            0, n, batch_rows
        ):  # more than one part only where a single prompt has more responses than fit
            part = first, min(first + batch_rows, n)
            groups = sample(
                model,
                processor,
                prompts,
                n,
                max_new_tokens,
                temperature,
                top_p,
                [keys[i] for i in chunk],
                part,
                static,
            )
            for i, samples in zip(chunk, groups):
                results[i] = (results[i] or []) + samples
        if progress is not None:
            progress.update(len(chunk))
    return results


# ------------------------------------------------------------------------------------------------ log-probs


def completion_logps(model, prompts, completions, temperature=1.0, shared_prefix=True):
    """Log-probs of responses under the model as it is now (adapter, grad mode).

    prompts: list of Prompt; completions: for each a list of id lists, stop id included.
    shared_prefix: each prompt once, in one row with its responses; else a padded row for every response. The same numbers.
    → logps [N, C], entropy [N, C] (no graph), mask [N, C]; N rows in the order of completions; fp32, at the sampling temperature.
    """
    base = _base(model)
    responses = [
        torch.tensor(ids, device=base.lm_head.weight.device) for group in completions for ids in group
    ]
    hidden = (_hidden_shared if shared_prefix else _hidden_plain)(base, prompts, completions)  # [T, D]
    logps, entropy = TokenLogps.apply(hidden, base.lm_head.weight, torch.cat(responses), temperature)  # [T]
    parts = (logps, entropy, torch.ones_like(logps, dtype=torch.bool))
    lengths = [len(ids) for ids in responses]
    return tuple(
        pad_sequence(flat.split(lengths), batch_first=True) for flat in parts
    )  # [T] → [N, C], False and 0 behind each response


def _hidden_shared(base, prompts, completions):
    """→ [T, D]: the state that predicts each response token, out of one packed row for all groups."""
    device, lookup = base.lm_head.weight.device, base.get_input_embeddings()
    embeds, positions, index, groups, start = [], [], [], [], 0
    for prompt, group in zip(prompts, completions, strict=True):
        embeds += [
            prompt.embeds,
            lookup(torch.tensor([i for ids in group for i in ids], device=device)).detach(),
        ]
        positions += [prompt.positions, *(_positions(prompt, len(ids)) for ids in group)]
        groups.append((len(prompt.embeds), [len(ids) for ids in group]))
        last = (
            start + len(prompt.embeds) - 1
        )  # the prompt's last position predicts every response's first token
        start = last + 1
        for ids in group:
            index += [last, *range(start, start + len(ids) - 1)]
            start += len(ids)
    hidden = _decoder(base, torch.cat(embeds)[None], torch.cat(positions, 1)[None], Packed(groups))[
        0
    ]  # [L, D]
    return hidden[torch.tensor(index, device=device)]


def _hidden_plain(base, prompts, completions):
    """→ [T, D]: the same from one row [prompt | response | padding] for every response."""
    device = base.lm_head.weight.device
    pairs = [(prompt, ids) for prompt, group in zip(prompts, completions, strict=True) for ids in group]
    longest = max(len(prompt.embeds) + len(ids) for prompt, ids in pairs)
    embeds, positions, mask, index = [], [], [], []
    for row, (prompt, ids) in enumerate(pairs):
        size, response = (
            len(prompt.embeds),
            base.get_input_embeddings()(torch.tensor(ids, device=device)).detach(),
        )
        short = longest - size - len(ids)
        embeds.append(pad(torch.cat([prompt.embeds, response]), (0, 0, 0, short)))
        positions.append(pad(torch.cat([prompt.positions, _positions(prompt, len(ids))], 1), (0, short)))
        mask.append([1] * (size + len(ids)) + [0] * short)
        index.append(
            row * longest + torch.arange(size - 1, size + len(ids) - 1, device=device)
        )  # the position that predicts each token
    hidden = base.model.language_model(
        inputs_embeds=torch.stack(embeds),
        attention_mask=torch.tensor(mask, device=device),
        position_ids=_as_rope(torch.stack(positions)),
        use_cache=False,
    ).last_hidden_state
    return hidden.flatten(0, 1)[torch.cat(index)]  # [N·L, D] → [T, D]


def zero_loss(model):
    """0 with a graph to every trainable parameter, for a rank that has nothing to add while the others do."""
    return sum(parameter.sum() for parameter in model.parameters() if parameter.requires_grad) * 0.0


class TokenLogps(torch.autograd.Function):
    """Head and log-softmax in one: hidden [T, D], weight [V, D], targets [T] → logps [T], entropy [T] (no graph), fp32.

    d logp / d hidden = (onehot − probs) · weight / temperature does not depend on the loss, so the forward pass leaves it
    behind: [HEAD_CHUNK, V] logits at most, and two head matmuls in all. The head is frozen.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        assert not weight.requires_grad, "the head is taken as frozen"
        logps, entropy, slopes = [], [], []
        for states, ids in zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK)):
            logits = linear(states, weight).float().div_(temperature)  # [chunk, V]
            logits -= logits.logsumexp(
                -1, keepdim=True
            )  # in place, and no elementwise product below: two [chunk, V] at once
            logps.append(logits.gather(-1, ids[:, None])[:, 0])
            probs = logits.exp()
            entropy.append(-torch.bmm(probs[:, None], logits[:, :, None])[:, 0, 0])
            if ctx.needs_input_grad[0]:
                probs.neg_()[torch.arange(len(ids), device=ids.device), ids] += 1  # onehot − probs
                slopes.append(probs.div_(temperature).to(weight.dtype) @ weight)  # [chunk, D]
        logps, entropy = torch.cat(logps), torch.cat(entropy)
        ctx.mark_non_differentiable(entropy)
        ctx.save_for_backward(torch.cat(slopes) if slopes else None)
        return logps, entropy

    @staticmethod
    def backward(ctx, grad, _):
        [slopes] = ctx.saved_tensors
        return (grad[:, None] * slopes).to(slopes.dtype), None, None, None


# ------------------------------------------------------------------------------------------------ training


def add_training_arguments(parser, epochs, lr, warmup_ratio, schedule, provenance):
    """The arguments that 03 and 04 share, in the order of every script; `provenance` tells where their defaults come from."""
    group = parser.add_argument_group("validation")
    group.add_argument(
        "--val",
        help="validation examples in any of the three formats; absent: best/ is the last state [paper App. A]",
    )
    group.add_argument(
        "--eval-every",
        type=float,
        default=1.0,
        help="epochs between validations [ours: the paper keeps the best checkpoint]",
    )
    group.add_argument(
        "--patience",
        type=int,
        help="stop after this many validations in succession without a better F1 [ours: never]",
    )
    group.add_argument("--eval-limit", type=int, help="validate on the first N examples [ours: all]")
    group.add_argument("--max-new-tokens", type=int, default=2048, help="longest response [paper §4]")
    group.add_argument(
        "--eval-rows",
        type=int,
        default=64,
        help="responses decoded together in validation [ours: fits 48 GB]",
    )
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=float, default=epochs, help=f"passes over --data [{provenance}]")
    group.add_argument("--lr", type=float, default=lr, help=f"peak learning rate of AdamW [{provenance}]")
    group.add_argument(
        "--warmup-ratio",
        type=float,
        default=warmup_ratio,
        help=f"share of the steps spent warming up [{provenance}]",
    )
    group.add_argument(
        "--schedule",
        choices=("cosine", "linear", "constant"),
        default=schedule,
        help="after the warm-up [ours: not in the paper]",
    )
    group.add_argument("--weight-decay", type=float, default=0.0, help="of AdamW [upstream default]")
    group.add_argument(
        "--clip", type=float, default=1.0, help="largest gradient norm; 0 clips nothing [upstream default]"
    )
    group.add_argument(
        "--batch-size", type=int, default=2, help="prompts a rank and step, or micro-step [paper App. A]"
    )
    group.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="trade time for memory [ours: off]",
    )
    group = parser.add_argument_group("logging and checkpoints")
    group.add_argument(
        "--save-every",
        type=int,
        default=50,
        help="steps between two states of OUT/last [ours: minutes, not hours, are lost]",
    )
    group.add_argument(
        "--stop-after",
        type=int,
        help="stop, saved, after this step of the schedule; the same command goes on [ours: for tests]",
    )
    group.add_argument(
        "--fresh",
        action="store_true",
        help="delete what OUT holds of an earlier run [ours: off, a run goes on]",
    )
    group = parser.add_argument_group("runtime")
    group.add_argument("--seed", type=int, default=0, help="of data order, LoRA and sampling [ours: 0]")
    group.add_argument(
        "--dtype",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="auto: as ds_zero2.json says on a GPU, fp32 on CPU [ours]",
    )
    group.add_argument(
        "--ds-config",
        default=str(Path(__file__).with_name("ds_zero2.json")),
        help="DeepSpeed's settings [paper App. A: ZeRO-2]",
    )
    group.add_argument(
        "--local_rank", "--local-rank", type=int, default=-1, help="set by the deepspeed launcher"
    )


def read_ds_config(args, ranks):
    """(DeepSpeed's settings, dtype): args.dtype resolved against ds_zero2.json and the device."""
    try:
        config = json.loads(Path(args.ds_config).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--ds-config {args.ds_config}: {_first(error)}") from None
    if "auto" in json.dumps(config):
        raise InputError(
            f'--ds-config {args.ds_config}: holds "auto", which only the HF Trainer fills in: write the value'
        )
    wanted = config.get("bf16", {}).get("enabled", False) and ranks.device.type == "cuda"
    bf16 = wanted if args.dtype == "auto" else args.dtype == "bf16"
    return config | {"bf16": {"enabled": bf16}}, DTYPES["bf16" if bf16 else "fp32"]


def make_engine(model, args, config, micro_steps):
    """DeepSpeed's engine for the trainable parameters. `micro_steps` backward() + step() make one update."""
    import deepspeed

    config = config | {
        "train_micro_batch_size_per_gpu": args.batch_size,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": args.clip,  # absent, DeepSpeed clips at 1.0 silently
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": args.lr, "weight_decay": args.weight_decay, "torch_adam": True},
        },
        "steps_per_print": 10**9,
    }
    for name in (
        "tensorboard",
        "csv_monitor",
    ):  # DeepSpeed's own default is a folder below the working directory
        if config.get(name, {}).get("enabled"):
            config[name] = {"output_path": str(Path(args.out) / "monitor"), "job_name": name} | config[name]
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainable = [parameter for parameter in check_lora(model).parameters() if parameter.requires_grad]
    engine = deepspeed.initialize(
        model=model, model_parameters=trainable, config=config, dist_init_required=False
    )[0]
    # DeepSpeed's own exclude_frozen_parameters keeps one of two tied weights: the whole head in every checkpoint
    engine.module_state_dict = lambda **_: {
        name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad
    }
    return engine


def check_arguments(args, rows=None, examples=None):
    """Numbers that would fail, or mean something else, hours later. rows: of one update, over all ranks. Raises InputError."""
    least = {
        "batch_size": 1,
        "grad_accum": 1,
        "save_every": 1,
        "max_new_tokens": 1,
        "eval_rows": 1,
        "patience": 1,
        "group_size": 2,
    }
    least |= {
        "lora_rank": 1,
        "limit": 1,
        "eval_limit": 1,
        "stop_after": 1,
        "log_samples_every": 1,
        "clip": 0,
        "warmup_ratio": 0,
        "kl_coef": 0,
    }
    for name, bound in least.items():
        value = getattr(args, name, None)
        if value is not None and not value >= bound:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected at least {bound}")
    for name in ("epochs", "lr", "eval_every", "temperature"):
        if hasattr(args, name) and not 0 < getattr(args, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected a number above 0")
    if args.patience and not args.val:
        raise InputError("--patience needs --val: without a validation F1 nothing can stop improving")
    if rows and rows > examples:
        raise InputError(
            f"one update takes {rows} rows over all ranks, --data has {examples}: lower --batch-size or --grad-accum"
        )


def seed_step(seed, step, rank):
    """What still draws from torch's own generator in a step (LoRA dropout) depends on (seed, step, rank) alone."""
    torch.manual_seed(
        int.from_bytes(hashlib.sha256(f"{seed}:{step}:{rank}".encode()).digest()[:8], "big") >> 1
    )


def lr_at(step, total, args):
    """Learning rate of update `step` (from 0) of `total`: linear warm-up, then args.schedule; never 0, so no update is wasted."""
    warmup = math.ceil(total * args.warmup_ratio)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return (
        args.lr
        * {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[args.schedule]
    )


def batch_indices(n, size, step, seed):
    """Indices of step's batch: the epochs' permutations of range(n), one after the other, cut into pieces of `size`.

    A function of (seed, epoch) alone: nothing to save, no row dropped, and 2 ranks × B see what 1 rank × 2B sees.
    """
    indices = []
    for position in range(step * size, (step + 1) * size):
        epoch, place = divmod(position, n)
        indices.append(_permutation(n, seed, epoch)[place])
    return indices


@functools.lru_cache(maxsize=4)
def _permutation(n, seed, epoch):
    return random.Random(f"{seed}:{epoch}").sample(range(n), n)


def fingerprint(model):
    """A number that changes when any trainable weight does."""
    return math.fsum(p.detach().double().abs().sum().item() for p in model.parameters() if p.requires_grad)


def peak_memory():
    """MiB: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Run:
    """OUT of a training run: config.json, metrics.jsonl, last/ (everything needed to go on) and best/ (the adapter to use).

    The same command on the same OUT goes on from last/; other arguments are refused unless --fresh. last/ is a link to a
    complete state, exchanged atomically, so a kill at any moment leaves the old state or the new one. With several nodes OUT
    must be on storage that all of them see.

    Signals: `kill -TERM $(cat OUT/.lock)` finishes the step, saves and ends all ranks with code 0, under the launcher too. The
    launcher itself, stopped by Ctrl-C or SIGTERM, passes SIGTERM on, but kills what still runs after 30 seconds and ends with
    code 1: a longer step is then lost, never last/.
    """

    FREE = ("fresh", "local_rank", "stop_after")  # arguments that may differ between the pieces of one run
    LOGS = ("metrics.jsonl", "samples.jsonl")

    def __init__(self, args, ranks):
        self.out, self.args, self.ranks, self.stopping, self.changed = (
            Path(args.out),
            args,
            ranks,
            False,
            False,
        )
        self.state = {
            "step": 0,
            "best": -1.0,
            "best_step": None,
            "worse": 0,
            "ended": False,
        }  # worse: validations since the best
        with ranks.together():
            if ranks.main:
                self._open()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _open(self):
        """Lock OUT and compare its arguments with ours. Raises InputError."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.out / ".lock", "a+")  # noqa: SIM115, held as long as the run
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.seek(0)
            holder = self.lock.read().strip()
            raise InputError(
                f"--out {self.out}: process {holder} trains into it: wait, stop it (kill {holder}), or choose another folder"
            ) from None
        except OSError as error:
            raise InputError(f"--out {self.out}: cannot write there ({error.strerror})") from None
        self.lock.truncate(0)
        self.lock.write(
            f"{os.getpid()}\n"
        )  # kill -TERM $(cat OUT/.lock) stops all ranks after the step they are in
        self.lock.flush()
        if self.args.fresh:
            for path in self.out.iterdir():
                if path.name.startswith(".step-") or path.name in (
                    "best",
                    "last",
                    "validation",
                    "monitor",
                    "config.json",
                    *self.LOGS,
                ):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self.config = {"script": Path(sys.argv[0]).name, "world": self.ranks.world}
        self.config |= {name: value for name, value in vars(self.args).items() if name not in self.FREE}
        self.config |= _hashes(self.args)
        known = self.out / "config.json"
        if not known.exists() or not any(
            (self.out / name).exists() for name in ("last", "best", "metrics.jsonl")
        ):
            return  # a start that failed before its first step protects nothing
        try:
            old = json.loads(known.read_text())
        except ValueError:
            raise InputError(f"{known}: not JSON: mend it, or start anew with --fresh") from None
        changed = [
            f"{name} {old.get(name)!r} → {value!r}"
            for name, value in self.config.items()
            if old.get(name) != value
        ]
        if changed:
            raise InputError(
                f"--out {self.out}: holds a run with other arguments ({'; '.join(changed)}): choose another folder, or --fresh"
            )

    def _on_signal(self, number, frame):
        self.stopping = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends at once
        if self.ranks.main:
            print("stopping: this step is finished and saved first", file=sys.stderr, flush=True)

    def should_stop(self):
        """Whether any rank was told to stop; every rank gets the same answer, so none waits for another."""
        return self.ranks.sum(self.stopping)[0] > 0

    def resume(self, engine, total):
        """Load OUT/last where there is one → the steps still to do. Log files lose what came after it."""
        self.monitor, last = engine.monitor, self.out / "last"
        with self.ranks.together():
            if self.ranks.main:
                self._check_space(engine.module)
                self._sweep()
                write_atomic(
                    self.out / "config.json",
                    json.dumps({**self.config, "versions": versions()}, indent=1) + "\n",
                )
        folder = self.ranks.gather(last.resolve().name if last.exists() else None)[
            0
        ]  # KEEP: rank 0 decides, file systems lag
        if folder:
            _, saved = engine.load_checkpoint(str(self.out), tag=folder, load_module_strict=False)
            self.state = {
                name: saved[name] for name in self.state
            }  # DeepSpeed adds keys of its own, which it then refuses to save
            if self.ranks.main:
                print(f"going on from step {self.state['step']} of {last}", flush=True)
        if self.ranks.main:
            for name in self.LOGS:
                self._cut(self.out / name)
            self._cut_csv(engine)
        self.ranks.barrier()
        return range(total if self.state["ended"] else self.state["step"], total)

    def _check_space(self, model):
        """Two states (the old one goes when the new one is whole) and two adapters must fit: weights, fp32 master, two moments."""
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        need, free = (
            2 * trainable * (4 + 4 + 4 + 4) + 2 * trainable * 4 + 2**24,
            shutil.disk_usage(self.out).free,
        )
        if free < need:
            raise InputError(
                f"--out {self.out}: {free / 2**20:.0f} MiB free, the states of this run take {need / 2**20:.0f}: make room"
            )

    def _sweep(self):
        """What a kill left behind: half-written states, adapters and files."""
        current = (self.out / "last").resolve().name
        if not (self.out / "best").exists() and (self.out / ".best.old").exists():
            (self.out / ".best.old").rename(self.out / "best")
        for path in self.out.glob(".step-*"):
            if path.name != current:
                shutil.rmtree(path)
        for name in (".best.new", ".best.old"):
            shutil.rmtree(self.out / name, ignore_errors=True)
        converters = [
            *self.out.glob("zero_to_*.py"),
            *self.out.glob(".step-*/zero_to_*.py"),
        ]  # DeepSpeed's: useless without frozen weights
        for path in [
            *converters,
            *self.out.glob(".*.tmp*"),
            *self.out.glob("*/.*.tmp*"),
            self.out / ".last.new",
        ]:
            path.unlink(missing_ok=True)

    def _cut(self, path):
        """Drop rows of steps that are not in last/, a torn last line among them: they will be done again."""
        if path.exists():
            lines = [
                line
                for line in path.read_text(encoding="utf-8").split("\n")[:-1]
                if json.loads(line)["step"] <= self.state["step"]
            ]
            write_atomic(path, "".join(line + "\n" for line in lines))

    def _cut_csv(self, engine):
        """The same for DeepSpeed's CSV monitor, which would also write each header again."""
        monitor = getattr(engine.monitor, "csv_monitor", None)
        for path in Path(monitor.log_dir).glob("*.csv") if monitor else []:
            bound = (
                engine.global_samples if path.stem.startswith("Train_Samples") else self.state["step"]
            )  # DeepSpeed's own count samples
            header, *lines = path.read_text().splitlines()[
                : -1 if not path.read_text().endswith("\n") else None
            ] or [""]
            write_atomic(
                path,
                "".join(
                    f"{line}\n" for line in [header, *(x for x in lines if int(x.split(",")[0]) <= bound)]
                ),
            )
            monitor.filenames.append(path.stem)

    def save(self, engine, step):
        """Everything needed to go on after `step` updates, frozen weights left out. Raises Stopped where it cannot be written."""
        self.state["step"] = step
        name = f".step-{step}"
        try:
            engine.save_checkpoint(
                str(self.out),
                tag=name,
                client_state=self.state,
                save_latest=False,
                exclude_frozen_parameters=True,
            )
        except (OSError, RuntimeError) as error:  # RuntimeError is how torch tells of a full disk
            raise Stopped(
                f"{self.out}: cannot save step {step} ({_first(error)}): make room; the same command goes on"
            ) from None
        if self.ranks.main:
            for path in [
                *(self.out / name).iterdir(),
                *(self.out / log for log in self.LOGS if (self.out / log).exists()),
            ]:
                with open(path, "rb") as handle:
                    os.fsync(handle.fileno())  # KEEP: on the disk before the link points to it
            link = self.out / ".last.new"
            link.unlink(missing_ok=True)
            link.symlink_to(name)
            os.replace(link, self.out / "last")
            self._sweep()
        self.ranks.barrier()

    def log(self, rows, name="metrics.jsonl"):
        """Append rows; those of metrics.jsonl go to DeepSpeed's monitors too (TensorBoard, W&B, CSV: ds_zero2.json)."""
        if not self.ranks.main:
            return
        with open(self.out / name, "a", encoding="utf-8") as handle:
            handle.write("".join(jsonl_line(row) for row in rows))
        if name == "metrics.jsonl" and self.monitor.enabled:
            self.monitor.write_events(
                [
                    (f"train/{key}", value, row["step"])
                    for row in rows
                    for key, value in row.items()
                    if key != "step"
                ]
            )

    def keep_best(self, model, processor, prompt, step, f1):
        """best/ holds the state of the best validation JMERE F1, never of the best reward; the newest, while nothing is right yet."""
        better = f1 > self.state["best"]
        self.state["worse"] = 0 if better else self.state["worse"] + 1
        if not better and (f1 or self.state["best"]):
            return
        self.state |= {"best": f1, "best_step": step}
        with self.ranks.together():
            if self.ranks.main:
                save_adapter(model, processor, self.out / "best", prompt)

    def out_of_patience(self):
        return bool(self.args.patience) and self.state["worse"] >= self.args.patience

    def check_step(self, model, step, numbers, before, rows):
        """Fail at once, not at hour ten: a number that is none, or a first update that changed nothing.

        numbers: {name: value}, the same on every rank; rows: this rank's ids and responses, kept where they are to blame.
        """
        bad = {name: value for name, value in numbers.items() if not math.isfinite(value)}
        if bad:
            rows = [row for part in self.ranks.gather(rows) for row in part]
            path = self.out / f"failed-step-{step + 1}.jsonl"
            if self.ranks.main:
                write_atomic(path, "".join(map(jsonl_line, rows)))
            ids = list(dict.fromkeys(row["id"] for row in rows))
            shown = ", ".join(ids[:8]) + (" …" if len(ids) > 8 else "")
            found = ", ".join(f"{name} {value}" for name, value in bad.items())
            self.fail(
                f"step {step + 1}: {found}; examples {shown}; kept in {path}; last/ is the state before: look at them, or lower --lr"
            )
        if not self.changed and before is not None and numbers["gradient norm"] > 0:
            if fingerprint(model) == before:
                self.fail(
                    f"the first update changed no weight (gradient norm {numbers['gradient norm']:.3g}): --lr is too small"
                )
            self.changed = True

    def fail(self, text):
        """Every rank knows of it: rank 0 says it."""
        if not self.ranks.main:
            sys.exit(InputError.exit_code)
        raise InputError(text)

    def finish_step(self, engine, step, total, drawn):
        """After step `step` (from 1): curves where validated, save where due → whether the run is over, at its end or before."""
        end = step == total or self.out_of_patience()
        if drawn and self.ranks.main:
            draw_curves(self.out)
        halt = self.should_stop() or step == self.args.stop_after
        self.state["ended"] = end
        if end or halt or step % self.args.save_every == 0:
            self.save(engine, step)
        if halt and not end and self.ranks.main:
            print(
                f"stopped after step {step} of {total}, saved in {self.out / 'last'}: the same command goes on",
                flush=True,
            )
        return end or halt

    def best_text(self):
        """For the progress bar."""
        return f" f1 {self.state['best']:.3f}" if self.args.val and self.state["best_step"] else ""

    def say_done(self, total):
        if self.ranks.main and self.state["ended"]:
            early = f" after step {self.state['step']} of {total}: {self.state['worse']} validations without a better F1"
            score = (
                f"validation JMERE F1 {self.state['best']:.4f} at step {self.state['best_step']}"
                if self.args.val
                else "the last step"
            )
            print(
                f"done{early if self.state['step'] < total else ''}: adapter in {self.out / 'best'}, {score}",
                flush=True,
            )


def _hashes(args):
    """Content of what the run reads: a file changed between two pieces of a run is another argument."""
    adapter = getattr(args, "adapter", None)
    paths = {
        "data": args.data,
        "val": args.val,
        "ds_config": args.ds_config,
        "adapter": adapter and f"{adapter}/adapter_model.safetensors",
    }
    return {
        f"{name}_sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
        for name, path in paths.items()
        if path
    }


def validate(model, processor, examples, prompt, ranks, args):
    """Greedy answers to `examples`, shared out over the ranks → (scores of common.score, answers as rows)."""
    mine = examples[ranks.rank :: ranks.world]
    items = [(PROMPTS[prompt].format(text=example.text), example.image) for example in mine]
    was_training = model.training
    model.eval()  # KEEP: generation in train() under gradient checkpointing is silently wrong
    bar = tqdm(
        total=len(items), desc="validate", unit="tweet", disable=None if ranks.main else True, leave=False
    )
    with bar, ranks.together():
        samples = generate(
            model, processor, items, 1, args.max_new_tokens, 0.0, batch_rows=args.eval_rows, progress=bar
        )
    model.train(was_training)
    rows = [
        {"id": example.id, "response": sample.text, "finished": sample.finished}
        for example, [sample] in zip(mine, samples)
    ]
    rows = {row["id"]: row for part in ranks.gather(rows) for row in part}
    rows = [rows[example.id] for example in examples]
    pred = [parse_response(row["response"], direct=prompt == "direct").quintuples for row in rows]
    return score(pred, [example.quintuples for example in examples]), rows


def versions():
    names = ("torch", "transformers", "peft", "deepspeed")
    commit = None
    if shutil.which("git"):
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
        ).stdout.strip()
    return {name: metadata.version(name) for name in names} | {"commit": commit or None}


def validate_and_keep(run, model, processor, val, prompt, step, ranks, args):
    """Validate, keep best/ → the row's validation fields. Without a validation set the newest state is the best."""
    if not val:
        run.keep_best(model, processor, prompt, step, run.state["best"] + 1)
        return {}
    scores, rows = validate(model, processor, val, prompt, ranks, args)
    with ranks.together():
        if ranks.main:
            write_atomic(run.out / "validation" / f"step-{step}.jsonl", "".join(map(jsonl_line, rows)))
    run.keep_best(model, processor, prompt, step, scores["jmere"]["f1"])
    return {f"val_{name}_f1": values["f1"] for name, values in scores.items()}


def draw_curves(out):
    """OUT/curves.png from metrics.jsonl: reward and its parts, loss, KL, length, validation F1, as far as the run logs them."""
    from matplotlib.figure import Figure  # here: only training needs it, and pyplot's global state nobody

    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    panels = (
        ("reward", "accuracy", "partial", "format"),
        ("loss",),
        ("kl",),
        ("length",),
        ("val_jmere_f1", "val_mner_f1"),
    )
    panels = [
        kept for panel in panels if (kept := [name for name in panel if any(name in row for row in rows)])
    ]
    figure = Figure(figsize=(7, 2.2 * len(panels)), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], panels):
        for name in panel:
            points = [(row["step"], row[name]) for row in rows if name in row]
            axes.plot(*zip(*points), label=name, marker="." if len(points) < 50 else None)
        axes.legend(loc="best", fontsize=8)
        axes.grid(alpha=0.3)
    axes.set_xlabel("step")
    figure.savefig(out / ".curves.tmp.png")
    os.replace(out / ".curves.tmp.png", out / "curves.png")


def merge(name, adapter, out):
    """Write base + adapter as one model into the folder `out`, and prove it. Raises InputError where the two do not agree.

    → {"difference", "effect", "tolerance", "dtype"}: largest difference of the logits of the *saved and reloaded* model from those of
    base + adapter on a probe tweet, and of the base alone from the same, as shares of the largest logit.
    """
    dtype = AutoConfig.from_pretrained(name).dtype or torch.float32
    tolerance = {torch.float32: 1e-4}.get(dtype, 5e-2)  # bf16 keeps 8 bits of each merged weight
    model, processor = load(name, dtype)
    model = load_adapter(model, adapter)
    with tempfile.NamedTemporaryFile(suffix=".png") as image:
        Image.linear_gradient("L").convert("RGB").save(image.name)
        [prompt] = encode(
            model,
            processor,
            [(REASON_PROMPT.format(text="Browns Placing WR Josh Gordon On Illness List"), image.name)],
        )

    def logits(model):
        with torch.no_grad():
            hidden = _base(model).model.language_model(
                inputs_embeds=prompt.embeds[None], position_ids=_as_rope(prompt.positions[None])
            )
            return _base(model).lm_head(hidden.last_hidden_state[0]).float()  # [P, V]

    wanted = logits(model)
    with model.disable_adapter():
        effect = _distance(logits(model), wanted)
    if effect == 0:
        raise InputError(
            f"--adapter {adapter}: changes no logit of {name}: it was never trained, or belongs to another model"
        )
    out = Path(out)
    if out.exists():
        raise InputError(f"{out}: exists already: choose another folder for the merged model")
    fresh = out.with_name(f".{out.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    model.merge_and_unload().save_pretrained(fresh)
    processor.save_pretrained(fresh)
    (fresh / "jmere.json").write_text(
        json.dumps({"prompt": adapter_prompt(adapter), "base": str(name)}) + "\n"
    )
    difference = _distance(logits(load(str(fresh), dtype)[0]), wanted)
    if not difference <= tolerance:
        raise InputError(
            f"{fresh}: the merged model's logits differ by {difference:.2g} of the largest, expected at most {tolerance:.0e}"
        )
    fresh.rename(out)
    return {
        "difference": difference,
        "effect": effect,
        "tolerance": tolerance,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _distance(found, wanted):
    return ((found - wanted).abs().max() / wanted.abs().max()).item()
