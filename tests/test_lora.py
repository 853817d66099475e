"""Adapters made elsewhere by PEFT: older names of the same modules, no jmere.json, and what is refused."""

import json
import shutil

import pytest
import torch
from conftest import run_script
from PIL import Image
from safetensors.torch import load_file, save_file
from test_families import ALL

import common
from common import InputError
from lib import lora, rollout, vlm
from tests import families

LLAVA = "language_model.model.layers."
QWEN = "model.layers."
OLDER = {"qwen2_vl": QWEN, "qwen2_5_vl": QWEN, "llava": LLAVA, "llava_next": LLAVA}  # qwen3_vl came later
PLAIN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = [[[30, 40, 50, 60], [70, 80]]]


@pytest.fixture(scope="module", params=ALL)
def made(request, tmp_path_factory):
    """(family, folder of its tiny model, folder of an adapter of ours that was trained)"""
    folder = tmp_path_factory.mktemp(request.param)
    families.make(request.param, folder / "base")
    model, processor = vlm.load(str(folder / "base"))
    model = lora.add_lora(model, 4, 8)
    noise = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2, generator=noise)
    lora.save_adapter(model, processor, folder / "ours", lora.Recipe("reason"), "")
    return request.param, folder / "base", folder / "ours"


def foreign(ours, folder, older, **config):
    """`ours` as another tool leaves it: PEFT's two files, plain targets, modules named `older`."""
    folder.mkdir()
    tensors = {}
    for key, tensor in load_file(ours / lora.WEIGHTS).items():
        tensors[key.replace(lora.DECODER, older)] = tensor
    save_file(tensors, folder / lora.WEIGHTS)
    content = json.loads((ours / lora.CONFIG).read_text())
    content |= {"target_modules": PLAIN, "task_type": None} | config
    (folder / lora.CONFIG).write_text(json.dumps(content))
    return folder


def log_probs(model, processor, folder):
    image = folder / "probe.png"
    Image.radial_gradient("L").convert("RGB").save(image)
    items = [(common.REASON_PROMPT.format(text="Emma meets Noah"), str(image))]
    prompts = vlm.encode(model, processor, items)
    with torch.no_grad():
        logps, _, mask = rollout.completion_logps(model, prompts, IDS)
    return logps[mask]


def held_by(model, name):
    """{module.lora_A or lora_B: tensor} of an adapter, from the model itself."""
    held = {}
    for key, parameter in model.named_parameters():
        if f".{name}.weight" in key:
            held[key.replace(f".{name}.", ".")] = parameter
    return held


def test_every_tensor_lands_and_the_answers_are_the_same(made, tmp_path):
    family, base, ours = made
    older = OLDER.get(family, lora.DECODER)
    folder = foreign(ours, tmp_path / "foreign", older)
    stored = load_file(ours / lora.WEIGHTS)
    model, processor = vlm.load(str(base))
    wanted = log_probs(lora.load_adapter(model, ours), processor, tmp_path)
    model, _ = vlm.load(str(base))
    without = log_probs(model, processor, tmp_path)
    model = lora.load_adapter(model, folder, trainable=True)
    model = lora.load_adapter(model, folder, name="reference")
    for name in ("default", "reference"):
        held = held_by(model, name)
        equal = sum(torch.equal(held[key], tensor) for key, tensor in stored.items())
        assert held.keys() == stored.keys() and equal == len(stored) == 4 * 7 * 2
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {key.replace(".weight", ".default.weight") for key in stored}
    found = log_probs(model.eval(), processor, tmp_path)
    assert torch.equal(found, wanted) and (found - without).abs().max() > 1e-3
    with lora.reference(model):
        assert torch.equal(log_probs(model, processor, tmp_path), wanted)
    print(f"{family}: {equal} of {len(stored)} tensors of {older}… equal, log-probs equal")


def test_what_is_saved_again_is_the_same(made, tmp_path):
    """best/ of a run that started from such an adapter."""
    family, base, ours = made
    folder = foreign(ours, tmp_path / "foreign", OLDER.get(family, lora.DECODER))
    model, processor = vlm.load(str(base))
    model = lora.load_adapter(model, folder, trainable=True)
    lora.save_adapter(model, processor, tmp_path / "best", lora.Recipe("direct"), "")
    saved = load_file(tmp_path / "best" / lora.WEIGHTS)
    assert all(torch.equal(saved[key], tensor) for key, tensor in load_file(ours / lora.WEIGHTS).items())
    again = lora.load_adapter(vlm.load(str(base))[0], tmp_path / "best")
    assert held_by(again, "default").keys() == saved.keys()
    assert lora.base_name(tmp_path / "best") == str(base)


@pytest.mark.parametrize("made", ["qwen2_5_vl"], indirect=True)
def test_ranks_and_scales_of_single_modules_are_renamed(made, tmp_path):
    _, base, ours = made
    module = "layers.1.self_attn.q_proj"
    folders = []
    for name, older in (("today", lora.DECODER), ("older", QWEN)):
        pattern = {older.removesuffix("layers.") + module: 80}
        folders.append(foreign(ours, tmp_path / name, older, alpha_pattern=pattern))
    found = []
    for folder in (*folders, ours):
        model, processor = vlm.load(str(base))
        found.append(log_probs(lora.load_adapter(model, folder), processor, tmp_path))
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2])
    lost = foreign(ours, tmp_path / "lost", QWEN, alpha_pattern={r"^model\.layers\.1\.self_attn.q_proj": 80})
    with pytest.raises(InputError, match="alpha_pattern .* means no module with LoRA"):
        lora.load_adapter(vlm.load(str(base))[0], lost)


@pytest.mark.parametrize("made", ["llava"], indirect=True)
def test_what_is_refused(made, tmp_path):
    _, base, ours = made
    tensors = load_file(ours / lora.WEIGHTS)
    first = next(iter(tensors))
    vision = "base_model.model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    changes = {
        vision: "has LoRA on the vision tower .1 of 57 tensors, .*: the image is computed once",
        "base_model.model.model.visual.blocks.0.attn.qkv.lora_A.weight": "has LoRA on the vision tower",
        "base_model.model.multi_modal_projector.linear_1.lora_A.weight": "has LoRA on the vision tower",
        "base_model.model.lm_head.lora_A.weight": "has LoRA outside the decoder",
        first.replace(lora.DECODER, LLAVA): "under an older name and today's",
    }
    for key, message in changes.items():
        folder = foreign(ours, tmp_path / str(len(list(tmp_path.iterdir()))), lora.DECODER)
        save_file(tensors | {key: tensors[first].clone()}, folder / lora.WEIGHTS)
        with pytest.raises(InputError, match=message):
            lora.read_recipe(folder, "reason")
    for name, value in (("init_lora_weights", "pissa"), ("use_dora", True), ("layer_replication", [[0, 2]])):
        folder = foreign(ours, tmp_path / name, LLAVA, **{name: value})
        with pytest.raises(InputError, match=f"{name} is .* plain LoRA only"):
            lora.read_recipe(folder, "reason")
    other = foreign(ours, tmp_path / "deep", LLAVA)
    model, _ = vlm.load(str(base))
    del model.model.language_model.layers[3]
    with pytest.raises(InputError, match="14 tensors do not fit this --model|does not fit this --model"):
        lora.load_adapter(model, other)


def test_a_tensor_that_lands_nowhere_is_found(tiny, tmp_path, monkeypatch):
    """PEFT warns, or says nothing, and trains from noise."""
    model, processor = vlm.load(str(tiny("llava")))
    lora.save_adapter(lora.add_lora(model, 4, 8), processor, tmp_path / "ours", lora.Recipe("reason"), "")
    load = lora.set_peft_model_state_dict

    def careless(model, tensors, name):
        return load(model, dict(list(tensors.items())[1:]), name)

    monkeypatch.setattr(lora, "set_peft_model_state_dict", careless)
    with pytest.raises(InputError, match="1 tensors do not fit"):
        lora.load_adapter(vlm.load(str(tiny("llava")))[0], tmp_path / "ours")


# -------------------------------------------------------------------------------- the scripts


@pytest.mark.parametrize("made", ["qwen2_5_vl"], indirect=True)
def test_prompt_in_place_of_jmere_json(made, world, tmp_path):
    _, base, ours = made
    folder = foreign(ours, tmp_path / "foreign", QWEN)
    train = f"04_grpo.py --adapter {folder} --data {world}/train.jsonl --no-val --limit 1 --epochs 1"
    train += f" --batch-size 1 --group-size 2 --max-new-tokens 4 --out {tmp_path}/grpo"
    evaluate = f"05_eval.py --adapter {folder}"
    predict = f"{evaluate} --data {world}/test.jsonl --limit 1 --max-new-tokens 4 --out {tmp_path}/test"
    merge = f"{evaluate} --merge {tmp_path}/merged"
    for command in (train, predict, merge):
        code, _, stderr = run_script(command, fails=True)
        errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(errors) == 1 and "Traceback" not in stderr, stderr
        assert "no jmere.json in it" in errors[0] and "give --prompt reason or direct" in errors[0]
    run_script(train, "--prompt direct")
    assert lora.read_recipe(tmp_path / "grpo" / "best").prompt == "direct"
    [row] = [json.loads(line) for line in (tmp_path / "grpo" / "metrics.jsonl").read_text().splitlines()]
    assert row["kl"] == 0
    _, stdout, _ = run_script(predict, "--prompt reason")
    assert "reason prompt" in stdout
    _, stdout, _ = run_script(merge, "--prompt direct")
    assert "merged in float32" in stdout
    assert json.loads((tmp_path / "merged" / "jmere.json").read_text())["prompt"] == "direct"


@pytest.mark.parametrize("made", ["llava"], indirect=True)
def test_faults_of_other_folders_are_one_line(made, world, tmp_path):
    _, _, ours = made
    elsewhere = foreign(ours, tmp_path / "elsewhere", LLAVA, base_model_name_or_path="/home/else/llava")
    seeing = foreign(ours, tmp_path / "seeing", "vision_tower.vision_model.encoder.layers.")
    pickled = foreign(ours, tmp_path / "pickled", LLAVA)
    (pickled / lora.WEIGHTS).rename(pickled / "adapter_model.bin")
    known = shutil.copytree(ours, tmp_path / "known")
    wrong = [
        (elsewhere, "reason", "--model /home/else/llava: not a model folder"),
        (seeing, "reason", "has LoRA on the vision tower (56 of 56 tensors"),
        (pickled, "reason", "no adapter_model.safetensors in it"),
        (known, "direct", "was trained with the reason prompt: leave --prompt out"),
    ]
    for folder, prompt, message in wrong:
        command = f"04_grpo.py --adapter {folder} --prompt {prompt} --data {world}/train.jsonl --no-val"
        code, _, stderr = run_script(command, f"--out {tmp_path}/out", fails=True)
        errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(errors) == 1 and message in errors[0], stderr
        assert "Traceback" not in stderr
