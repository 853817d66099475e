"""The tiny models: made here, taught here, and the two that ship."""

import hashlib
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ARCHITECTURES, ROOT
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

import common
from demo import world
from demo.base import build, lessons, school

TEXT, SCENE = world.make({"x": 1}, seed=7)["x"][0]
CLASSES = {"qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration", "llava": "LlavaForConditionalGeneration"}
IMAGE = {"qwen2_5_vl": "<|image_pad|>" * 4, "llava": "<image>" * 16}  # what the processors put in
OPENING = {"qwen2_5_vl": "<|im_start|>assistant\n", "llava": "ASSISTANT:"}
SHIPPED = {  # sha256 of the weights that the command in demo/base/school.py's docstring makes
    "qwen2_5_vl": "7838ffe81788183a4871d38fa3fb7533d938e51b5791280006c82035e706ea30",
    "llava": "e81361ef87ce5fd042a77b75e54c0b946e3b4523761f3bf790e0140f63a2c9fb",
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def made(request, tiny):
    """What loads from a folder that build.py wrote."""
    folder = tiny(request.param)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return SimpleNamespace(arch=request.param, folder=folder, model=model, tokenizer=tokenizer)


def test_it_is_the_real_class_and_the_same_for_the_same_seed(made, tmp_path):
    again = build.build(made.arch, tmp_path, build.corpus())
    assert type(made.model).__name__ == CLASSES[made.arch]
    assert made.model.config.get_text_config().max_position_embeddings >= 2048
    for first, second in zip(made.model.parameters(), again.parameters(), strict=True):
        assert torch.equal(first, second)


def test_a_prompt_with_its_picture_goes_through(made):
    content = [{"type": "image"}, {"type": "text", "text": common.REASON_PROMPT.format(text=TEXT)}]
    message = {"role": "user", "content": content}
    prompt = made.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    image = IMAGE[made.arch]
    placeholder = image[: image.index(">") + 1]
    assert prompt.count(placeholder) == 1
    assert prompt.endswith(OPENING[made.arch])

    inputs = dict(made.tokenizer(prompt.replace(placeholder, image), return_tensors="pt"))
    ids = inputs["input_ids"]
    image_tokens = ids == made.model.config.image_token_id
    assert image_tokens.sum() == image.count(placeholder)
    assert ids.shape[1] < 500
    processor = AutoImageProcessor.from_pretrained(made.folder)
    inputs |= processor(images=[world.draw(SCENE)], return_tensors="pt")
    if made.arch == "qwen2_5_vl":
        assert inputs["image_grid_thw"].tolist() == [[1, 4, 4]]
        inputs["mm_token_type_ids"] = image_tokens.int()
    with torch.no_grad():
        assert made.model(**inputs).logits.isfinite().all()
        out = made.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert ids.shape[1] < out.shape[1] <= ids.shape[1] + 4


def test_text_comes_back_as_it_went_in_and_a_name_is_a_token_a_word(made):
    def ids(text):
        return made.tokenizer(text, add_special_tokens=False).input_ids

    answer = "<think>\nÉ…漢 🏆\n</think>\n<answer>\n[A, per, B, org, member of]\n</answer>"
    for text in (TEXT, world.chain(TEXT, SCENE), answer):
        assert made.tokenizer.decode(ids(text)) == text
    for name in world.LEXICON:
        assert len(ids(f"x {name}")) == len(ids("x")) + len(name.split())


def test_its_end_token_is_among_those_that_end_a_response(made):
    end_ids = made.model.generation_config.eos_token_id
    if not isinstance(end_ids, list):
        end_ids = [end_ids]
    assert made.tokenizer.eos_token_id in end_ids


@pytest.mark.parametrize("arch", SHIPPED)
def test_shipped_base_is_the_one_made_here_and_sees_and_copies(arch):
    folder = ROOT / "demo" / "base" / arch
    weights = (folder / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == SHIPPED[arch]
    assert len(weights) <= 8 * 2**20
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    pictures = school.Pictures(arch, folder, seed=1)
    chat = school.Chat(arch, AutoTokenizer.from_pretrained(folder))
    scenes = world.scenes()[::30]  # it met none of the grammar's scenes
    exact = school.check(model, chat, pictures, scenes, seed=3)
    assert exact["captions"] > 0.9
    assert exact["names"] > 0.8
    pictures.values = {scene: torch.zeros_like(pixels) for scene, pixels in pictures.values.items()}
    assert school.check(model, chat, pictures, scenes, seed=3)["captions"] < 0.1


def test_base_never_meets_the_answer_format():
    """No prompt of ours, no tag, no two things in one bracket, and no name with a type or a relation."""
    texts = "\n".join(lessons.generic(3000))
    assert len(texts) > 50000
    types = [f"({label})" for label in common.TYPES]
    for forbidden in ["<", "think", "answer", " is the ", *common.COT_PARTS, *types]:
        assert forbidden not in texts
    for relation in common.RELATIONS:
        assert f" {relation} " not in texts
    assert "[" in texts  # names in brackets …
    assert not re.search(r"\[[^]]*,", texts)  # … each alone


def test_the_answers_carry_the_loss_and_nothing_else(made):
    chat = school.Chat(made.arch, made.tokenizer)
    conversation = [("What is above?", "A heart."), ("Say: red", "red")]
    rng = world.random.Random(0)
    row = chat.row(rng, SCENE, TEXT, conversation)
    said = [token for token, weight in zip(row.ids, row.weights, strict=True) if weight]
    stop = made.tokenizer.eos_token
    assert made.tokenizer.decode(said).replace(" ", "") == f"Aheart.{stop}red{stop}"
    assert made.tokenizer.decode(row.ids).count(TEXT) == 1
    longer = chat.row(rng, SCENE, TEXT, conversation, preamble=60)
    assert len(longer.ids) == len(row.ids) + 60
    assert longer.weights[60:] == row.weights


def test_training_is_seeded_and_changes_every_part(tiny, tmp_path):
    start = tiny("qwen2_5_vl")
    chat = school.Chat("qwen2_5_vl", AutoTokenizer.from_pretrained(start))
    pictures = school.Pictures("qwen2_5_vl", start, 0)

    def learnt(name, seed):
        out = tmp_path / name
        options = ["--out", str(out), "--steps", "2", "--tokens", "300", "--seed", str(seed)]
        model = AutoModelForImageTextToText.from_pretrained(start)
        school.learn(model, chat, pictures, world.scenes()[:40], school.parse_args(options))
        school.save(model, out)
        again = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).state_dict()
        for key, value in model.state_dict().items():
            assert torch.equal(again[key], value.bfloat16().float())
        return load_file(out / "model.safetensors")

    first, same, other = learnt("a", 0), learnt("b", 0), learnt("c", 1)
    assert {value.dtype for value in first.values()} == {torch.bfloat16}
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)
    before = load_file(start / "model.safetensors")
    same = {key for key in first if torch.equal(before[key].bfloat16(), first[key])}
    decoder = {key for key in first if re.search(r"layers\.\d+\..*proj\.weight", key)}
    tower = {key for key in first if school.is_vision(key)}
    assert len(decoder) == 4 * 7  # layers, matrices of a layer
    assert not decoder & same
    assert tower <= same  # left as `see` made it
