"""LoRA adapters: put on a model, loaded, checked, saved. Knows PEFT, and of a model only which layers are the
decoder's."""

import json
import re
import shutil
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftModel,
    PeftModelForCausalLM,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

import common
from common import InputError
from lib import data, vlm

LINEAR = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
TARGETS = rf".*language_model.*\.({LINEAR})"  # plain names hit the vision tower too
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's, before the name of each module
DECODER = "model.language_model.layers."  # in all families, since transformers 4.52
# before: Qwen, LLaVA; and of a model without its head. PEFT 0.21 renames LLaVA's and loads nothing of Qwen's.
OLDER_DECODER = r"^(model|language_model\.model|language_model)\.layers\."
PLAIN = {  # what plain LoRA says in adapter_config.json; the rest would be left out by our passes
    "use_dora": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # others change the base
}


@dataclass
class Recipe:
    """jmere.json of an adapter's folder: what besides the weights an answer depends on. 04 and 05 obey it."""

    prompt: str  # "reason" or "direct", the prompt it was trained with
    min_pixels: int | None = None  # of an image, where the family scales images; None: the processor's own
    max_pixels: int | None = None


def resolve_start(args):
    """Settle what 04 starts from: args.adapter (None with --only-rl), args.model, args.prompt, args.*_pixels.
    Raises InputError."""
    if args.only_rl:
        args.adapter = None
        args.model = args.model or vlm.DEFAULT_MODEL
        args.prompt = args.prompt or "reason"
        return
    data.existing("--adapter", args.adapter, "made by 03_sft.py; --only-rl starts without it")
    recipe = read_recipe(args.adapter, args.prompt)
    if args.prompt not in (None, recipe.prompt):
        raise InputError(
            f"--prompt {args.prompt}: --adapter {args.adapter} was trained with the {recipe.prompt} prompt: "
            "leave --prompt out"
        )
    args.prompt = recipe.prompt
    args.min_pixels = args.min_pixels or recipe.min_pixels
    args.max_pixels = args.max_pixels or recipe.max_pixels
    args.model = args.model or base_name(args.adapter)


def add_lora(model, rank, alpha, dropout=0.0):
    """A fresh trainable LoRA on every linear layer of the decoder [ours: the paper gives rank and alpha
    only]."""
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    # in the base's own dtype, as DeepSpeed trains it and as 05 loads it: elsewhere the log-probs would differ
    try:
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError:
        kind = model.config.model_type
        layers = LINEAR.replace("|", ", ")
        raise InputError(f"{kind}: its decoder has none of the layers that get LoRA ({layers})") from None
    return check_lora(model)


def load_adapter(model, folder, trainable=False, name="default"):
    """`model`, plain or already a PeftModel, with the adapter of `folder`, ours or made elsewhere by PEFT.
    Raises InputError where the two do not fit."""
    check_folder(folder)
    try:
        config, tensors = _read_adapter(Path(folder))
        config.inference_mode = not trainable
        if isinstance(model, PeftModel):
            model.add_adapter(name, config, autocast_adapter_dtype=False)
        else:
            model = PeftModelForCausalLM(model, config, name, autocast_adapter_dtype=False)
        set_peft_model_state_dict(model, tensors, name)
        held = get_peft_model_state_dict(model, adapter_name=name)
    except SafetensorError as error:
        fault = common.first_line(error)
        weights = Path(folder) / WEIGHTS
        raise InputError(f"{weights}: cut off or broken ({fault}): copy or train it again") from None
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        fault = common.first_line(error)
        raise InputError(f"--adapter {folder}: does not fit this --model ({fault})") from None
    # PEFT only warns of tensors that found no place: the run would train from a random adapter
    lost = held.keys() ^ tensors.keys()
    for key in held.keys() & tensors.keys():
        wanted = tensors[key].to(held[key])
        if not torch.equal(held[key], wanted):
            lost.add(key)
    if lost:
        shown = sorted(lost)[0]
        raise InputError(f"--adapter {folder}: {len(lost)} tensors do not fit this --model: {shown}, …")
    return check_lora(model) if trainable else model.eval()


def _read_adapter(folder):
    """→ (LoraConfig, {key: tensor}), modules named as transformers does today.

    Of an adapter made elsewhere exactly the modules whose tensors it holds are given LoRA: its own targets
    may mean others today, or the vision tower too.
    """
    tensors = {}
    for key, tensor in load_file(folder / WEIGHTS).items():
        tensors[todays_key(key)] = tensor
    config = LoraConfig.from_pretrained(folder)
    config.task_type = "CAUSAL_LM"
    if config.target_modules == TARGETS:
        return config, tensors
    modules = {key.removeprefix(PREFIX).split(".lora_")[0] for key in tensors}
    config.target_modules = modules
    config.exclude_modules = None
    config.layers_to_transform = None
    config.layers_pattern = None
    config.rank_pattern = _todays_pattern(config.rank_pattern, modules)
    config.alpha_pattern = _todays_pattern(config.alpha_pattern, modules)
    return config, tensors


def todays_key(key):
    """
    >>> todays_key("base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_A.weight")
    'base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight'
    """
    return PREFIX + re.sub(OLDER_DECODER, DECODER, key.removeprefix(PREFIX))


def _todays_pattern(pattern, modules):
    """Ranks or scales of single modules. Raises ValueError where one means none: PEFT would take the
    default."""
    renamed = {}
    for name, value in (pattern or {}).items():
        name = re.sub(OLDER_DECODER, DECODER, name)
        if not any(re.match(rf"(.*\.)?({name})$", module) for module in modules):  # PEFT's own rule
            raise ValueError(f"its rank_pattern or alpha_pattern {name} means no module with LoRA")
        renamed[name] = value
    return renamed


def check_folder(folder):
    """Raises InputError unless `folder` is plain LoRA on the decoder alone, as far as its names tell."""
    for name in (CONFIG, WEIGHTS):
        if not (Path(folder) / name).is_file():
            raise InputError(
                f"--adapter {folder}: no {name} in it; expected a best/ folder of 03_sft.py or 04_grpo.py, "
                "or one with LoRA made by PEFT"
            )
    config = _read_json(Path(folder) / CONFIG)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"--adapter {folder}: is a {kind} adapter, expected LORA")
    for name, plain in PLAIN.items():
        if config.get(name, plain[0]) not in plain:
            raise InputError(
                f"--adapter {folder}: {name} is {config[name]}, expected {plain[0]}: plain LoRA only"
            )
    try:
        with safe_open(Path(folder) / WEIGHTS, "pt") as stored:
            keys = list(stored.keys())
    except (SafetensorError, OSError) as error:
        fault = common.first_line(error)
        raise InputError(
            f"{Path(folder) / WEIGHTS}: cut off or broken ({fault}): copy or train it again"
        ) from None
    outside = [key for key in keys if not todays_key(key).startswith(PREFIX + DECODER)]
    if outside:
        place = "on the vision tower" if re.search("vis|projector", outside[0]) else "outside the decoder"
        raise InputError(
            f"--adapter {folder}: has LoRA {place} ({len(outside)} of {len(keys)} tensors, {outside[0]}): "
            "the image is computed once, for policy and reference alike, without it: train the decoder alone"
        )
    if len(set(map(todays_key, keys))) < len(keys):
        raise InputError(f"--adapter {folder}: holds tensors of one module under an older name and today's")


def check_lora(model):
    """`model`. Raises InputError unless something is trainable and all of it is LoRA inside the decoder:
    otherwise a run finishes without having learnt."""
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


def save_adapter(model, processor, folder, recipe, card):
    """The policy's adapter as plain PEFT, with its processor, its Recipe and its model card. Whole or not at
    all."""
    folder = Path(folder)
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh, selected_adapters=["default"])
    processor.save_pretrained(fresh)
    (fresh / "jmere.json").write_text(json.dumps(asdict(recipe)) + "\n")
    (fresh / "README.md").write_text(card, encoding="utf-8")  # in place of PEFT's empty form
    # a kill between the renames leaves this one; Run puts it back
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def read_recipe(folder, prompt=None):
    """The Recipe of an adapter's folder. prompt: takes the place of a jmere.json that is not there. Raises
    InputError where the adapter is none that 04 and 05 can use."""
    check_folder(folder)
    path = Path(folder) / "jmere.json"
    expected = " or ".join(common.PROMPTS)
    if not path.exists():
        if prompt is None:
            raise InputError(
                f"--adapter {folder}: no jmere.json in it, which tells the prompt: if it was made elsewhere, "
                f"give --prompt {expected}"
            )
        return Recipe(prompt)
    stored = _read_json(path)
    if stored.get("prompt") not in common.PROMPTS:
        raise InputError(f"{path}: 'prompt' is {stored.get('prompt')!r}, expected {expected}")
    return Recipe(stored["prompt"], stored.get("min_pixels"), stored.get("max_pixels"))


def base_name(folder):
    """The base model that the adapter was trained on: a hub name, or a folder as it was given. Raises
    InputError."""
    name = _read_json(Path(folder) / "adapter_config.json").get("base_model_name_or_path")
    if not name:
        raise InputError(f"--adapter {folder}: its adapter_config.json names no base model: give --model")
    return name


def _read_json(path):
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read ({common.first_line(error)}): copy or train it again"
        ) from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: found a JSON {type(value).__name__}, expected an object")
    return value


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
