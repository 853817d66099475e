"""Base + adapter → one model, for servers; proved equal before it is kept."""

import json
import re
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import common
from common import InputError
from lib import lora, vlm
from lib.predict import resolve_model

PROBE = "Browns Placing WR Josh Gordon On Illness List"
TOLERANCE = {torch.float32: 1e-4}  # of the largest logit; else 5e-2: bf16 keeps 8 bits of each merged weight


def merge(args):
    """Write the base and --adapter as one model into the folder --merge, prove it, and say how well. Raises
    InputError."""
    resolve_model(args)
    proof = merge_adapter(args.model, args.adapter, args.merge, args.prompt)
    print(f"{args.merge}: merged in {proof['dtype']}, for every server that loads a model folder")
    print(
        f"logits differ from base + adapter by {proof['difference']:.1e} of the largest (allowed "
        f"{proof['tolerance']:.0e}); without the adapter they would differ by {proof['effect']:.1e}"
    )


def merge_adapter(name, adapter, out, prompt=None):
    """Write base + adapter as one model into the folder `out`. Raises InputError where the two do not agree.
    prompt: of an adapter whose folder does not tell.

    → {"difference", "effect", "tolerance", "dtype"}: largest difference of the logits of the *saved and
    reloaded* model from those of base + adapter on a probe tweet, and of the base alone from the same, as
    shares of the largest logit.
    """
    out = Path(out)
    if out.exists():
        raise InputError(f"{out}: exists already: choose another folder for the merged model")
    dtype = AutoConfig.from_pretrained(name).dtype or torch.float32
    tolerance = TOLERANCE.get(dtype, 5e-2)
    recipe = lora.read_recipe(adapter, prompt)
    recipe.prompt = prompt or recipe.prompt
    processor = vlm.load_processor(name, recipe.min_pixels, recipe.max_pixels)
    model, _ = vlm.load(name, dtype, processor=processor)
    model = lora.load_adapter(model, adapter)
    prompt = probe_prompt(model, processor)
    wanted = logits(model, prompt)
    with model.disable_adapter():
        effect = distance(logits(model, prompt), wanted)
    if effect == 0:
        raise InputError(
            f"--adapter {adapter}: changes no logit of {name}: never trained, or of another model"
        )
    fresh = out.with_name(f".{out.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    model.merge_and_unload().save_pretrained(fresh)
    published_layout(fresh)
    processor.save_pretrained(fresh)
    processor.image_processor.save_pretrained(fresh)  # a file of its own, as servers look for it
    (fresh / "jmere.json").write_text(json.dumps(asdict(recipe) | {"base": str(name)}) + "\n")
    merged, _ = vlm.load(str(fresh), dtype)
    difference = distance(logits(merged, prompt), wanted)
    if not difference <= tolerance:
        raise InputError(
            f"{fresh}: the merged model's logits differ by {difference:.2g} of the largest, expected at most "
            f"{tolerance:.0e}"
        )
    fresh.rename(out)
    name = str(dtype).removeprefix("torch.")
    return {"difference": difference, "effect": effect, "tolerance": tolerance, "dtype": name}


def published_layout(folder):
    """Name the tensors of LLaVA's vision tower as the hub has them, and as servers read them: transformers 5
    leaves `vision_model.` out when it writes, and takes both when it reads."""
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
    >>> published_key("vision_tower.vision_model.embeddings.class_embedding")
    'vision_tower.vision_model.embeddings.class_embedding'
    """
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", key)


def probe_prompt(model, processor):
    """An encoded prompt about a picture of every shade."""
    text = common.REASON_PROMPT.format(text=PROBE)
    with tempfile.NamedTemporaryFile(suffix=".png") as image:
        Image.linear_gradient("L").convert("RGB").save(image.name)
        [prompt] = vlm.encode(model, processor, [(text, image.name)])
    return prompt


@torch.no_grad()
def logits(model, prompt):
    """[P, V], fp32."""
    base = vlm.base_model(model)
    hidden = base.model.language_model(**vlm.decoder_inputs([prompt])).last_hidden_state
    return base.lm_head(hidden[0]).float()


def distance(found, wanted):
    return ((found - wanted).abs().max() / wanted.abs().max()).item()
