"""The demo: picture world, tiny models, teacher."""

import base64
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from PIL import Image

import common
from demo import teacher, world
from lib import data

ROOT = Path(__file__).resolve().parent.parent


def encode(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def shifts(i):
    return i % 3 - 1, i // 3 % 3 - 1


# ------------------------------------------------------------------------------------------------ world


def test_look_reads_back_every_scene():
    scenes = world.scenes()
    assert len(set(scenes)) == len(scenes) > 1000
    wrong = [scene for i, scene in enumerate(scenes) if world.look(world.draw(scene, shifts(i))) != scene]
    assert wrong == []


@pytest.mark.parametrize("side", [224, 112, 56])
def test_look_survives_jpeg_and_resizing(side):
    for i, scene in enumerate(world.scenes()[::11]):
        image = world.draw(scene, shifts(i)).resize((side, side), Image.Resampling.BICUBIC)
        assert world.look(Image.open(io.BytesIO(encode(image, "JPEG", quality=85)))) == scene


@pytest.mark.parametrize("colour", ["grey", "black", "white", "red"])
def test_look_refuses_other_pictures(colour):
    with pytest.raises(ValueError, match="resembles nothing"):
        world.look(Image.new("RGB", (224, 224), colour))


def test_rules_stay_in_the_label_set_and_are_rich_enough():
    relations = {relation for relation, _ in world.RULES.values()} | set(world.POSTERS.values())
    assert relations <= set(common.RELATIONS)
    assert len(relations) >= 8
    assert set(world.TYPE.values()) == set(common.TYPES)
    assert all(set(types) <= set(common.TYPES) for types in world.LEXICON.values())


def test_direction_and_type_come_from_the_picture():
    red, blue = world.Figure("person", "red"), world.Figure("child", "blue")
    scene = world.Scene(red, blue, None, None, False)
    assert [tuple(q) for q, _ in world.read(["Paris", "Emma"], scene)] == [
        ("Paris", "per", "Emma", "per", "parent")
    ]
    turned = scene._replace(left=blue, right=red)
    assert [tuple(q) for q, _ in world.read(["Paris", "Emma"], turned)] == [
        ("Emma", "per", "Paris", "per", "parent")
    ]
    city = scene._replace(left=world.Figure("city", "red"), right=red)
    assert [tuple(q) for q, _ in world.read(["Paris", "Emma"], city)] == [
        ("Emma", "per", "Paris", "loc", "place of residence")
    ]


def test_only_who_wears_the_colour_of_the_poster_has_to_do_with_it():
    scene = world.Scene(
        world.Figure("person", "red"),
        world.Figure("person", "blue"),
        "heart",
        world.Figure("crest", "blue"),
        True,
    )
    found = [tuple(q) for q, _ in world.read(["Emma", "Noah", "Nike"], scene)]
    assert found == [("Emma", "per", "Noah", "per", "couple"), ("Noah", "per", "Nike", "org", "member of")]


def test_written_world_loads_and_the_image_decides(tmp_path):
    sizes = {"train": 120, "val": 20, "test": 40}
    world.write(tmp_path, sizes)
    pairs, relations, types, counts = {}, set(), set(), set()
    for split, size in sizes.items():
        examples = data.check_images(data.load_examples(tmp_path / f"{split}.jsonl", need=("quintuples",)))
        assert len(examples) == size
        golds = defaultdict(set)
        for example in examples:
            scene = world.look(data.load_image(example.image))
            assert example.quintuples == tuple(q for q, _ in world.read(world.names_in(example.text), scene))
            assert pairs.setdefault((example.text, scene), split) == split, (
                "one (text, picture) in two splits"
            )
            golds[example.text].add(example.quintuples)
            relations |= {q.relation for q in example.quintuples}
            types |= {label for _, label in common.entities(example.quintuples)}
            counts.add(len(example.quintuples))
        assert all(len(found) >= 2 for found in golds.values()), (
            "a text whose gold does not depend on its picture"
        )
    assert len(relations) >= 8
    assert types == set(common.TYPES)
    assert counts == {1, 2, 3}


def test_grey_control_keeps_texts_and_gold_and_hides_the_picture(tmp_path):
    world.write(tmp_path, {"train": 4, "test": 8})
    test, grey = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("test.jsonl", "grey.jsonl")
    )
    assert [{**row, "image": "img/grey.png"} for row in test] == grey
    assert len(Image.open(tmp_path / "img" / "grey.png").getcolors()) == 1


def test_same_seed_same_world(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        world.write(tmp_path / name, {"train": 8}, seed)
    content = {name: [path.read_bytes() for path in sorted((tmp_path / name).rglob("*.*"))] for name in "abc"}
    assert content["a"] == content["b"]
    assert content["a"] != content["c"]


def test_chains_are_well_formed_and_lead_to_their_quintuples():
    for text, scene in world.make({"x": 200})["x"]:
        chain = world.chain(text, scene)
        assert common.parse_cot(chain) == chain
        assert world.steps(chain.split("\n")[2].partition(": ")[2]) == world.read(world.names_in(text), scene)


# ------------------------------------------------------------------------------------------------ teacher, without the network

PAIRS = world.make({"teacher": 120}, seed=7)["teacher"]


def gold_of(text, scene):
    return [q for q, _ in world.read(world.names_in(text), scene)]


def ask(prompt, scene, n=1, seed=0, **more):
    url = "data:image/png;base64," + base64.b64encode(encode(world.draw(scene))).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]
    task, response = teacher.complete(
        {"messages": [{"role": "user", "content": content}], "n": n, **more}, seed
    )
    return task, [choice["message"] for choice in response["choices"]]


def distilled(n=5):
    for text, scene in PAIRS:
        task, messages = ask(
            common.DISTILL_PROMPT.format(text=text, gold=common.format_answer(gold_of(text, scene))), scene, n
        )
        assert task == "distill"
        yield from ((text, scene, message) for message in messages)


def test_distillation_has_the_stated_shares_of_faults():
    kinds = Counter()
    for text, scene, message in distilled():
        chain = message["content"] and common.parse_cot(message["content"])
        if message["refusal"]:
            kinds["refused"] += 1
        elif chain is None:
            kinds["malformed"] += 1
        elif "the given quintuples" in chain:
            kinds["leaked"] += 1
        elif chain == world.chain(text, scene):
            kinds["good"] += 1
        elif {q for q, _ in world.steps(chain)} == set(gold_of(text, scene)):
            kinds["careless"] += 1  # or wrong by a picture of the same quintuples
        else:
            kinds["wrong"] += 1
    total = kinds.total()
    assert total == 5 * len(PAIRS)
    shares = {"refused": teacher.REFUSED, "malformed": teacher.MALFORMED, "leaked": teacher.LEAKED}
    shares["good"] = 1 - sum(shares.values()) - teacher.CARELESS - teacher.WRONG
    for kind, share in shares.items():
        assert abs(kinds[kind] / total - share) < 4 * (share * (1 - share) / total) ** 0.5, (kind, kinds)
    assert min(kinds["careless"], kinds["wrong"]) > 0


def test_reprediction_follows_the_reasoning_not_the_picture():
    slipped = 0
    for text, scene in PAIRS:
        other = next(s for t, s in PAIRS if t == text and gold_of(text, s) != gold_of(text, scene))
        task, [message] = ask(common.REPREDICT_PROMPT.format(text=text, cot=world.chain(text, other)), scene)
        assert task == "repredict"
        slipped += common.parse_response(message["content"], direct=True).quintuples != tuple(
            gold_of(text, other)
        )
    assert 0 < slipped < 0.15 * len(PAIRS)


def test_judge_takes_points_for_what_is_wrong():
    text, scene = (
        "Emma x Noah # Nike",
        world.Scene(world.Figure("person", "red"), world.Figure("person", "blue"), "heart", None, True),
    )
    full = [most for _, _, most in common.SCORE_RULES]
    good = world.chain(text, scene)
    assert teacher.judge(text, good, scene) == full
    description, alignment, reasoning = good.split("\n")
    assert teacher.judge(text, good.replace("a heart above", "a cap above"), scene)[:2] == [1, 1]
    assert teacher.judge(text, "\n".join([description, "Visual-Text Alignment: it fits.", reasoning]), scene)[
        2:4
    ] == [0, 0]
    assert teacher.judge(text, good.replace("Emma (per) couple", "Emma (per) peer"), scene)[4:] == [1, 0]
    assert teacher.judge(text, good.replace("Emma (per)", "Emma (loc)"), scene)[4:] == [0, 0]
    assert teacher.judge(text, "\n".join([description, alignment]), scene) == [0] * 6


def test_scores_come_one_integer_a_rule_within_bounds():
    unscored = 0
    for text, scene in PAIRS:
        task, [message] = ask(common.SCORE_PROMPT.format(text=text, cot=world.chain(text, scene)), scene)
        assert task == "score"
        points = [int(pair.partition("=")[2]) for pair in message["content"].split()[1:] if "=" in pair]
        unscored += not points
        assert not points or len(points) == len(common.SCORE_RULES)
        assert all(0 <= point <= most for point, (_, _, most) in zip(points, common.SCORE_RULES))
    assert unscored < 0.1 * len(PAIRS)


@pytest.mark.parametrize("prompt", ["REASON_PROMPT", "DIRECT_PROMPT"])
def test_zero_shot_is_mediocre(prompt):
    predictions = []
    for text, scene in PAIRS:
        task, [message] = ask(getattr(common, prompt).format(text=text), scene)
        assert task == prompt.partition("_")[0].lower()
        predictions.append(common.parse_response(message["content"], direct=task == "direct").quintuples)
    f1 = common.score(predictions, [gold_of(*pair) for pair in PAIRS])["jmere"]["f1"]
    assert 0.02 < f1 < 0.4


def test_answers_repeat_and_depend_on_seed_and_choice():
    text, scene = PAIRS[0]
    prompt = common.DISTILL_PROMPT.format(text=text, gold="[]")
    first = ask(prompt, scene, 20)
    assert first == ask(prompt, scene, 20)
    assert first != ask(prompt, scene, 20, seed=1)
    assert len({message["content"] for message in first[1]}) > 1


# ------------------------------------------------------------------------------------------------ teacher, over the network


@pytest.fixture(scope="module")
def server():
    running = teacher.Teacher()
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


def test_server_speaks_to_the_real_client(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=server.url, api_key="any", max_retries=0)
    assert [model.id for model in client.models.list()] == [teacher.MODEL]
    text, scene = PAIRS[0]
    url = "data:image/jpeg;base64," + base64.b64encode(encode(world.draw(scene), "JPEG", quality=90)).decode()
    content = [
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
        {
            "type": "text",
            "text": common.DISTILL_PROMPT.format(text=text, gold=common.format_answer(gold_of(text, scene))),
        },
    ]
    reply = client.chat.completions.create(
        model="any-name", messages=[{"role": "user", "content": content}], n=5
    )
    assert [choice.index for choice in reply.choices] == list(range(5))
    assert {choice.finish_reason for choice in reply.choices} == {"stop"}
    assert world.chain(text, scene) in {choice.message.content for choice in reply.choices}
    assert reply.model == "any-name"
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens > 100
    cut = client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": content}], max_tokens=3
    )
    assert cut.choices[0].finish_reason == "length" or cut.choices[0].message.refusal

    with pytest.raises(openai.BadRequestError, match="unsupported image"):
        content[0]["image_url"]["url"] = "data:image/png;base64,AAAA"
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": content}])
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="m", input="x")
    assert (
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hello"}])
        .choices[0]
        .message.content
        == teacher.BLIND
    )


def test_program_tells_its_url_and_ends_on_sigterm(tmp_path):
    ready = tmp_path / "url"
    command = [sys.executable, "-m", "demo.teacher", "--port", "0", "--ready-file", str(ready)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        line = process.stdout.readline()
        assert line.strip().endswith(ready.read_text().strip())
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0
    assert rest.strip() == "teacher served nothing"


# ------------------------------------------------------------------------------------------------ tiny models


@pytest.mark.parametrize("arch", ["qwen2_5_vl", "llava"])
def test_base_loads_forwards_and_generates(arch, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    from demo.base import build

    texts = build.corpus()
    made = build.build(arch, tmp_path, texts)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    again = build.build(arch, tmp_path / "again", texts)
    assert all(
        torch.equal(a, b) and torch.equal(a, c)
        for a, b, c in zip(made.parameters(), model.parameters(), again.parameters())
    )
    assert (
        type(model).__name__
        == {"qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration", "llava": "LlavaForConditionalGeneration"}[
            arch
        ]
    )
    assert model.config.get_text_config().max_position_embeddings >= 2048
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    images = AutoImageProcessor.from_pretrained(tmp_path)

    # every placeholder the image needs, as the processors put them in
    message = {
        "role": "user",
        "content": [
            {"type": "image"},
            {"type": "text", "text": common.REASON_PROMPT.format(text=PAIRS[0][0])},
        ],
    }
    prompt = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    placeholder, count, end = (
        ("<|image_pad|>", 4, "<|im_start|>assistant\n")
        if arch == "qwen2_5_vl"
        else ("<image>", 16, "ASSISTANT:")
    )
    assert prompt.count(placeholder) == 1
    assert prompt.endswith(end)
    ids = tokenizer(prompt.replace(placeholder, placeholder * count), return_tensors="pt").input_ids
    assert (ids == model.config.image_token_id).sum() == count
    assert ids.shape[1] < 300
    pixels = images(images=[world.draw(PAIRS[0][1])], return_tensors="pt")
    if arch == "qwen2_5_vl":
        assert pixels["image_grid_thw"].tolist() == [[1, 4, 4]]
        pixels["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        assert model(input_ids=ids, attention_mask=torch.ones_like(ids), **pixels).logits.isfinite().all()
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **pixels, max_new_tokens=4, do_sample=False
        )
    assert ids.shape[1] < out.shape[1] <= ids.shape[1] + 4

    # text comes back as it went in; names of the world are one token a word
    for text in (
        PAIRS[0][0],
        world.chain(*PAIRS[0]),
        "<think>\nÉ…漢 🏆\n</think>\n<answer>\n[A, per, B, org, member of]\n</answer>",
    ):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    lead = len(tokenizer("x", add_special_tokens=False).input_ids)
    for name in world.LEXICON:
        assert len(tokenizer(f"x {name}", add_special_tokens=False).input_ids) == lead + len(name.split())
    end_ids = model.generation_config.eos_token_id
    assert tokenizer.eos_token_id in (end_ids if isinstance(end_ids, list) else [end_ids])


SHIPPED = {  # arch: sha256 of the weights that the command in demo/base/school.py's docstring makes
    "qwen2_5_vl": "7838ffe81788183a4871d38fa3fb7533d938e51b5791280006c82035e706ea30",
    "llava": "e81361ef87ce5fd042a77b75e54c0b946e3b4523761f3bf790e0140f63a2c9fb",
}


@pytest.mark.parametrize("arch", SHIPPED)
def test_shipped_base_is_the_one_made_here_and_sees_and_copies(arch):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    from demo.base import school

    folder = ROOT / "demo" / "base" / arch
    weights = (folder / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == SHIPPED[arch]
    assert len(weights) <= 8 * 2**20
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    scenes = world.scenes()[::30]  # it met none of the grammar's scenes
    pictures = school.Pictures(arch, folder, seed=1)
    chat = school.Chat(arch, AutoTokenizer.from_pretrained(folder))
    exact = school.check(model, chat, pictures, scenes, seed=3)
    assert exact["captions"] > 0.9
    assert exact["names"] > 0.8
    pictures.values = {scene: torch.zeros_like(pixels) for scene, pixels in pictures.values.items()}
    assert school.check(model, chat, pictures, scenes, seed=3)["captions"] < 0.1


def test_base_never_meets_the_answer_format():
    """What the base learns from: no prompt of ours, no tag, no two things in one bracket, and no name with a type or a relation."""
    from demo.base import lessons

    texts = "\n".join(lessons.generic(3000))
    assert len(texts) > 50000
    for forbidden in (
        "<",
        "think",
        "answer",
        *common.COT_PARTS,
        *(f"({label})" for label in common.TYPES),
        " is the ",
    ):
        assert forbidden not in texts, forbidden
    assert not any(f" {relation} " in texts for relation in common.RELATIONS)
    assert "[" in texts and not re.search(r"\[[^]]*,", texts)  # names in brackets, each alone


def test_training_is_seeded_and_changes_every_part(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    from demo.base import build, school

    texts = build.corpus()
    start = {
        name: value.clone()
        for name, value in build.build("qwen2_5_vl", tmp_path / "start", texts).state_dict().items()
    }
    chat = school.Chat("qwen2_5_vl", AutoTokenizer.from_pretrained(tmp_path / "start"))
    ends = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        args = school.parse_args(
            ["--out", str(tmp_path / name), "--steps", "2", "--tokens", "300", "--seed", seed]
        )
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "start")
        school.learn(
            model, chat, school.Pictures("qwen2_5_vl", tmp_path / "start", 0), world.scenes()[:40], args
        )
        school.save(model, tmp_path / name)
        ends.append(load_file(tmp_path / name / "model.safetensors"))
        again = AutoModelForImageTextToText.from_pretrained(tmp_path / name, dtype=torch.float32).state_dict()
        assert all(
            torch.equal(again[key], value.bfloat16().float()) for key, value in model.state_dict().items()
        )
    a, b, c = ends
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)
    assert {value.dtype for value in a.values()} == {torch.bfloat16}
    assert not any(torch.equal(start[name], again[name]) for name in again if name.endswith("proj.weight"))


def test_command_line_writes_what_it_says(tmp_path):
    command = [
        sys.executable,
        "-m",
        "demo.world",
        "--out",
        str(tmp_path),
        "--train",
        "4",
        "--val",
        "2",
        "--test",
        "2",
    ]
    environment = {**os.environ, "PYTHONPATH": ""}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True)
    row = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])
    assert list(row) == ["id", "text", "image", "quintuples"]
    assert (tmp_path / row["image"]).exists()
