"""Base + adapter → one model, for servers; proved equal before it is kept."""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from PIL import Image
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
