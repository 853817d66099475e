"""The scripts' own passes on a model of full size without numbers: bytes alive at most, and work, a part.

The model is one of shadows.py; every storage that an operation makes is counted from then until it is gone.
Sampling is run at its end alone: a cache that is nearly full grows once, and one token passes the decoder.
Known from tests/test_plan.py: within a tenth of what torch's allocator gives out for tiny models on a CPU.
"""

import contextlib
import functools
import io
import tempfile
import weakref
from unittest import mock

import torch
from peft import LoraConfig
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode

from bench import counts, shadows, steps
from common import InputError
from demo.base import build
from lib import lora, prefix, rollout, vlm

TEXT = 300  # tokens of a prompt beside its picture: instructions and a tweet
QWEN_3B = {  # Qwen/Qwen2.5-VL-3B-Instruct, whose head is its embedding
    "layers": 36,
    "tied": True,
    "text": {
        "hidden_size": 2048,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "intermediate_size": 11008,
        "vocab_size": 151936,
    },
    "vision": counts.SHAPES["qwen2_5_vl"]["vision"] | {"out_hidden_size": 2048},
}
MODELS = {  # name: class, shape
    "qwen2.5-vl-7b": ("qwen2_5_vl", counts.SHAPES["qwen2_5_vl"]),
    "llava-1.5-7b": ("llava", counts.SHAPES["llava"]),
    "qwen2.5-vl-3b": ("qwen2_5_vl", QWEN_3B),
}


# ------------------------------------------------------------------------------------------------ counting


class Ledger(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still alive: now, and at most in each part."""

    def __init__(self, model, meter):
        super().__init__()
        self.meter = meter
        self.alive = {}  # storage: what tells that it is gone
        self.now = 0
        self.peak = 0
        self.rises = {}  # part: bytes at most, above those at its start
        for tensor in [*model.parameters(), *model.buffers()]:
            self.note(tensor)
        self.model = self.now

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in shadows.tensors([output]):
            self.note(tensor)
        return output

    def note(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        size = storage.nbytes()

        def gone(_):
            del self.alive[key]
            self.now -= size

        self.alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    @contextlib.contextmanager
    def part(self, name):
        start = self.now
        self.peak = start
        with self.meter.part(name):
            yield
        self.rises[name] = max(self.rises.get(name, 0), self.peak - start)


class Grown(prefix.Decoding):
    """A cache as it is near the end of responses of `length` tokens: it grows once, and its next token is the
    last to pass the decoder."""

    def __init__(self, length, kept, sizes, n, fixed_shapes=False):
        super().__init__(kept, sizes, n, fixed_shapes)
        self.last = max(0, length - 2)
        full = self.last // self.grow * self.grow
        self.own = [pad(own, (0, 0, 0, full)) for own in self.own]
        self.step = full - 1

    def advance(self):
        super().advance()
        self.step = self.last
        self.at.fill_(self.last)


class Halfway(Grown):
    """The same in the middle, without the growth: a token that costs what tokens cost in the mean."""

    def __init__(self, length, *others):
        super().__init__(length // 2, *others)
        room = (0, 0, 0, self.grow)
        self.own = [pad(own, room) for own in self.own]

    def advance(self):
        self.step = self.last
        self.at.fill_(self.last)


# ------------------------------------------------------------------------------------------------ phases


def tower_in(watch):
    """Inside, the vision tower of vlm.encode is the part "images"; what else encode does is a copy of the
    prompt."""
    features = vlm._image_features

    def watched(base, inputs):
        with watch.part("images"):
            return features(base, inputs)

    return mock.patch.object(vlm, "_image_features", watched)


def draw(part, model, processor, prompt, prompts, n, length, rows, temperature):
    """The sampling of 03, 04 and 05: n responses to so many prompts, `rows` at once; none ends early."""
    with part, mock.patch.object(vlm, "stop_ids", lambda *_: [-1]):
        copied = copies(prompt, prompts)
        rollout.sample_in_parts(model, processor, copied, n, length, temperature, rows)


def update(watch, model, prompts, completions, reference):
    """Passes of one micro-step as in 03 (reference False) or 04; gradients go to ZeRO as they come."""
    hooks = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            hooks.append(parameter.register_post_accumulate_grad_hook(drop))
    if reference:
        with watch.part("reference"), torch.no_grad(), lora.reference(model):
            ref_logps, _, _ = rollout.completion_logps(model, prompts, completions)
    model.train()
    with watch.part("policy"):
        logps, _, mask = rollout.completion_logps(model, prompts, completions)
        if reference:
            loss = steps.grpo_loss(logps, ref_logps, ref_logps[:, 0], mask)
        else:
            loss = -(logps * mask).sum()
        loss.backward()
    model.eval()
    for hook in hooks:
        hook.remove()


def drop(parameter):
    parameter.grad = None


def copies(prompt, count):
    """Prompts of the same size, each with its own embeddings."""
    return [vlm.Prompt(prompt.embeds.clone(), prompt.positions) for _ in range(count)]


# ------------------------------------------------------------------------------------------------ models


def find_shape(name):
    """(class, shape as in counts.SHAPES) of a name of MODELS, or of a model folder. Raises InputError."""
    if name in MODELS:
        return MODELS[name]
    config = vlm.read_config(name)
    arch = config.model_type
    if arch not in counts.SHAPES:
        raise InputError(f"--model {name}: is a {arch}; a plan can be made of {', '.join(counts.SHAPES)}")
    shape = {"layers": config.text_config.num_hidden_layers, "tied": config.tie_word_embeddings}
    for part, values in (("text", config.text_config), ("vision", config.vision_config)):
        shape[part] = {field: getattr(values, field) for field in counts.SHAPES[arch][part]}
    return arch, shape


class Shadow:
    """A model of full depth without numbers, with its policy and reference LoRA, and one prompt for it."""

    def __init__(self, name, rank, dtype, max_pixels, prompt_tokens):
        arch, shape = find_shape(name)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
            build.build(arch, folder, build.corpus())
            self.model = counts.make_model(folder, shape, shape["layers"], rank, dtype=dtype)
            self.processor = counts.make_processor(folder, shape)
            if arch != "llava":
                self.processor = vlm.load_processor(folder, max_pixels, max_pixels)
            picture = vlm.prompt_length(self.processor, "", (build.SIDE * 4, build.SIDE * 4))
            self.prompt_tokens = prompt_tokens or picture + TEXT
            items = steps.make_items(self.processor, folder, 1, self.prompt_tokens)
            base = vlm.base_model(self.model)
            base.model.language_model.config._attn_implementation = vlm.SHARED_PREFIX
            if shape.get("tied"):
                base.lm_head.weight = base.get_input_embeddings().weight
            self.trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
            add_reference(self.model, rank, dtype)
            with self.watch() as ledger, tower_in(ledger):
                [self.prompt] = vlm.encode(self.model, self.processor, items)
        self.images = ledger.rises["images"]
        self.image_work = work(ledger.meter.parts["images"])
        self.weights = ledger.model

    @contextlib.contextmanager
    def watch(self):
        """→ Ledger of what is done inside; its meter counts the work."""
        look = rollout.LOOK_EVERY | {"meta": rollout.LOOK_EVERY["cuda"]}
        meter = shadows.Meter()
        meter.leave_out(self.model)
        with meter, mock.patch.object(rollout, "LOOK_EVERY", look), Ledger(self.model, meter) as ledger:
            yield ledger


def work(counted):
    return counted["flop"], counted["bytes_read"]


def add_reference(model, rank, dtype):
    """The frozen second adapter of 04."""
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=lora.TARGETS, task_type="CAUSAL_LM")
    with vlm.base_model(model).lm_head.weight.device:
        model.add_adapter("reference", config)
    for name, parameter in model.named_parameters():
        if ".reference." in name:
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(False)


# ------------------------------------------------------------------------------------------------ results


@functools.cache
def shadow_of(*sizes):
    """The Shadow of these arguments, made once."""
    return Shadow(*sizes)


@functools.cache
def sampling(shadow, prompts, n, length, rows, temperature):
    """Bytes at most of `rows` responses at once, near their end."""
    cache = functools.partial(Grown, length)
    with shadow.watch() as ledger, mock.patch.object(rollout, "Decoding", cache):
        model = shadow.model, shadow.processor, shadow.prompt
        draw(ledger.part("sampling"), *model, prompts, n, min(2, length), rows, temperature)
    return ledger.rises["sampling"]


@functools.cache
def sampling_work(shadow, prompts, n, length, rows):
    """(prefill, a token of all responses), each (FLOP, bytes read)."""
    cache = functools.partial(Halfway, length)
    with shadow.watch() as ledger, mock.patch.object(rollout, "Decoding", cache):
        model = shadow.model, shadow.processor, shadow.prompt
        for drawn in (1, 2):
            draw(ledger.part(drawn), *model, prompts, n, drawn, rows, 1.0)
    prefill = work(ledger.meter.parts[1])
    both = work(ledger.meter.parts[2])
    return prefill, (both[0] - prefill[0], both[1] - prefill[1])


@functools.cache
def micro_step(shadow, prompts, responses, length, reference, recompute):
    """A micro-step → ({part: bytes at most}, {part: (FLOP, bytes read)})."""
    again = contextlib.nullcontext(), shadows.Functions(None)
    options = {"use_reentrant": False, "context_fn": lambda: again}
    if recompute:  # autograd leaves the mode of the forward pass
        shadow.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    with shadow.watch() as ledger:
        again[1].meter = ledger.meter
        completions = [[[shadows.TOKEN] * length] * responses] * prompts
        update(ledger, shadow.model, copies(shadow.prompt, prompts), completions, reference)
    shadow.model.gradient_checkpointing_disable()
    return ledger.rises, {name: work(part) for name, part in ledger.meter.parts.items()}
