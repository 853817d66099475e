"""Base + adapter → one model, for servers; proved equal before it is kept."""

import json
import re
import shutil
import tempfile
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import common
from common import InputError
from lib import lora, vlm


def merge_adapter(name, adapter, out):
    """Write base + adapter as one model into the folder `out`, and prove it. Raises InputError where the two do not agree.

    → {"difference", "effect", "tolerance", "dtype"}: largest difference of the logits of the *saved and reloaded* model from those of
    base + adapter on a probe tweet, and of the base alone from the same, as shares of the largest logit.
    """
    dtype = AutoConfig.from_pretrained(name).dtype or torch.float32
    tolerance = {torch.float32: 1e-4}.get(dtype, 5e-2)  # bf16 keeps 8 bits of each merged weight
    model, processor = vlm.load(name, dtype)
    model = lora.load_adapter(model, adapter)
    with tempfile.NamedTemporaryFile(suffix=".png") as image:
        Image.linear_gradient("L").convert("RGB").save(image.name)
        [prompt] = vlm.encode(
            model,
            processor,
            [(common.REASON_PROMPT.format(text="Browns Placing WR Josh Gordon On Illness List"), image.name)],
        )

    def logits(model):
        with torch.no_grad():
            hidden = vlm.base_model(model).model.language_model(**vlm.decoder_inputs([prompt]))
            return vlm.base_model(model).lm_head(hidden.last_hidden_state[0]).float()  # [P, V]

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
    published_layout(fresh)
    processor.save_pretrained(fresh)
    (fresh / "jmere.json").write_text(
        json.dumps({"prompt": lora.read_recipe(adapter).prompt, "base": str(name)}) + "\n"
    )
    difference = _distance(logits(vlm.load(str(fresh), dtype)[0]), wanted)
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


def published_layout(folder):
    """The keys of LLaVA's vision tower as the hub has them, and as servers read them: transformers 5 leaves
    `vision_model.` out when it writes, and takes both when it reads."""
    vision = getattr(AutoConfig.from_pretrained(folder), "vision_config", None)
    if getattr(vision, "model_type", None) != "clip_vision_model":
        return
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        renamed = {published_key(key): tensor for key, tensor in tensors.items()}
        save_file(renamed, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        places = content["weight_map"].items()
        content["weight_map"] = {published_key(key): name for key, name in places}
        index.write_text(json.dumps(content, indent=2) + "\n")


def published_key(key):
    """
    >>> published_key("vision_tower.embeddings.class_embedding")
    'vision_tower.vision_model.embeddings.class_embedding'
    """
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", key)
