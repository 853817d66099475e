"""LoRA adapters: put on a model, loaded, checked, saved. Knows PEFT, and of a model only which layers are the
decoder's."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

import common
from common import InputError
from lib import data, vlm

LINEAR = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
TARGETS = rf".*language_model.*\.({LINEAR})"  # plain names hit the vision tower too
FILES = ("adapter_config.json", "adapter_model.safetensors", "jmere.json")


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
        args.prompt = "reason"
        return
    data.existing("--adapter", args.adapter, "made by 03_sft.py; --only-rl starts without it")
    recipe = read_recipe(args.adapter)
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
    return check_lora(get_peft_model(model, config, autocast_adapter_dtype=False))


def load_adapter(model, folder, trainable=False, name="default"):
    """`model`, plain or already a PeftModel, with the adapter of `folder`. Raises InputError where the two do
    not fit."""
    read_recipe(folder)
    _refuse_other_kinds(folder)
    options = {"adapter_name": name, "is_trainable": trainable, "autocast_adapter_dtype": False}
    weights = Path(folder) / "adapter_model.safetensors"
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(folder, **options)
        else:
            model = PeftModel.from_pretrained(model, folder, **options)
        # PEFT only warns of keys that found no place
        with safe_open(weights, "pt") as stored:
            keys = set(stored.keys())
        missing = set(get_peft_model_state_dict(model, adapter_name=name)) ^ keys
    except SafetensorError as error:
        fault = common.first_line(error)
        raise InputError(f"{weights}: cut off or broken ({fault}): copy or train it again") from None
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        fault = common.first_line(error)
        raise InputError(f"--adapter {folder}: does not fit this --model ({fault})") from None
    outside = [key for key in keys if "language_model" not in key]
    if outside:
        raise InputError(
            f"--adapter {folder}: has LoRA outside the decoder ({outside[0]}): the image is computed once, "
            "for policy and reference alike, without it"
        )
    if missing:
        shown = sorted(missing)[0]
        raise InputError(f"--adapter {folder}: {len(missing)} tensors do not fit this --model: {shown}, …")
    return check_lora(model) if trainable else model


def _refuse_other_kinds(folder):
    """What PEFT would load and our passes would leave out: other methods than plain LoRA, parts beside it."""
    config = _read_json(Path(folder) / "adapter_config.json")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"--adapter {folder}: is a {kind} adapter, expected LORA")
    for name, plain in (("use_dora", False), ("bias", "none"), ("modules_to_save", None)):
        if config.get(name, plain) not in (plain, []):
            raise InputError(
                f"--adapter {folder}: {name} is {config[name]}, expected {plain}: plain LoRA only"
            )


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


def read_recipe(folder):
    """The Recipe of an adapter's folder. Raises InputError where it is none of ours."""
    folder = Path(folder)
    for name in FILES:
        if not (folder / name).is_file():
            raise InputError(
                f"--adapter {folder}: no {name} in it; expected a best/ folder of 03_sft.py or 04_grpo.py"
            )
    stored = _read_json(folder / "jmere.json")
    if stored.get("prompt") not in common.PROMPTS:
        expected = " or ".join(common.PROMPTS)
        raise InputError(
            f"{folder / 'jmere.json'}: 'prompt' is {stored.get('prompt')!r}, expected {expected}"
        )
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
