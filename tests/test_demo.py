"""The demo: its picture world and its teacher."""

import base64
import io
import signal
import subprocess
import sys
import threading
from collections import Counter, defaultdict

import pytest
from conftest import ROOT, run_script
from PIL import Image

import common
from demo import teacher, world
from lib import data

RED, BLUE = world.Figure("person", "red"), world.Figure("person", "blue")


def encode(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def gold_of(text, scene):
    return [q for q, _ in world.read(world.names_in(text), scene)]


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


def said(names, scene):
    """The quintuples as plain tuples."""
    return [tuple(q) for q, _ in world.read(names, scene)]


def test_direction_and_type_come_from_the_picture():
    child = world.Figure("child", "blue")
    scene = world.Scene(RED, child, None, None, False)
    assert said(["Paris", "Emma"], scene) == [("Paris", "per", "Emma", "per", "parent")]
    turned = scene._replace(left=child, right=RED)
    assert said(["Paris", "Emma"], turned) == [("Emma", "per", "Paris", "per", "parent")]
    city = scene._replace(left=world.Figure("city", "red"), right=RED)
    assert said(["Paris", "Emma"], city) == [("Emma", "per", "Paris", "loc", "place of residence")]


def test_only_who_wears_the_colour_of_the_poster_has_to_do_with_it():
    scene = world.Scene(RED, BLUE, "heart", world.Figure("crest", "blue"), True)
    couple = ("Emma", "per", "Noah", "per", "couple")
    assert said(["Emma", "Noah", "Nike"], scene) == [couple, ("Noah", "per", "Nike", "org", "member of")]
    assert said(["Emma", "Noah"], scene) == [couple]
    assert said(["Emma"], scene) == []


def test_written_world_loads_and_the_image_decides(tmp_path):
    sizes = {"train": 120, "val": 20, "test": 40}
    world.write(tmp_path, sizes)
    split_of, quintuples, counts = {}, set(), set()
    for split, size in sizes.items():
        examples = data.check_images(data.load_examples(tmp_path / f"{split}.jsonl", need=("quintuples",)))
        assert len(examples) == size
        golds = defaultdict(set)
        for example in examples:
            scene = world.look(data.load_image(example.image))
            assert example.quintuples == tuple(gold_of(example.text, scene))
            assert split_of.setdefault((example.text, scene), split) == split  # no pair is in two splits
            golds[example.text].add(example.quintuples)
            quintuples.update(example.quintuples)
            counts.add(len(example.quintuples))
        assert all(len(found) >= 2 for found in golds.values())  # the gold of a text depends on its picture
    assert len({q.relation for q in quintuples}) >= 8
    assert {label for _, label in common.entities(quintuples)} == set(common.TYPES)
    assert counts == {1, 2, 3}


def test_grey_control_keeps_texts_and_gold_and_hides_the_picture(tmp_path):
    world.write(tmp_path, {"train": 4, "test": 8})
    test = [row for _, row in data.read_jsonl(tmp_path / "test.jsonl")]
    grey = [row for _, row in data.read_jsonl(tmp_path / "grey.jsonl")]
    assert [row | {"image": "img/grey.png"} for row in test] == grey
    assert len(Image.open(tmp_path / "img" / "grey.png").getcolors()) == 1


def test_same_seed_same_world(tmp_path):
    def written(name, seed):
        world.write(tmp_path / name, {"train": 8}, seed)
        return [path.read_bytes() for path in sorted((tmp_path / name).rglob("*.*"))]

    first = written("a", 0)
    assert first == written("b", 0)
    assert first != written("c", 1)


def test_chains_are_well_formed_and_lead_to_their_quintuples():
    for text, scene in world.make({"x": 200})["x"]:
        chain = world.chain(text, scene)
        assert common.parse_cot(chain) == chain
        reasoning = chain.split("\n")[-1].partition(": ")[2]
        assert world.steps(reasoning) == world.read(world.names_in(text), scene)


def test_a_chain_has_exactly_the_parts_of_common():
    with pytest.raises(ValueError, match="shorter"):
        world.cot("one part")


def test_command_line_writes_what_it_says(tmp_path):
    sizes = ("--train", 4, "--val", 2, "--test", 2)
    run_script("-m", "demo.world", "--out", tmp_path, *sizes, env={"PYTHONPATH": ""})
    _, row = next(data.read_jsonl(tmp_path / "train.jsonl"))
    assert list(row) == ["id", "text", "image", "quintuples"]
    assert (tmp_path / row["image"]).exists()


# ------------------------------------------------------------------------------------------------ teacher

PAIRS = world.make({"teacher": 120}, seed=7)["teacher"]


def request(prompt, image, form="PNG"):
    """The messages of a chat completion request."""
    url = f"data:image/{form.lower()};base64,{base64.b64encode(encode(image, form)).decode()}"
    picture = {"type": "image_url", "image_url": {"url": url, "detail": "high"}}
    return [{"role": "user", "content": [picture, {"type": "text", "text": prompt}]}]


def ask(prompt, scene, n=1, seed=0):
    """→ (task that the teacher recognised, its n messages)"""
    body = {"messages": request(prompt, world.draw(scene)), "n": n}
    task, response = teacher.complete(body, seed)
    return task, [choice["message"] for choice in response["choices"]]


def distill_prompt(text, scene):
    return common.DISTILL_PROMPT.format(text=text, gold=common.format_answer(gold_of(text, scene)))


def distilled(n=5):
    """Yield (text, scene, message): n for each pair."""
    for text, scene in PAIRS:
        task, messages = ask(distill_prompt(text, scene), scene, n)
        assert task == "distill"
        for message in messages:
            yield text, scene, message


def leaks(chain, gold):
    """Whether the chain holds one of the teacher's own leaking phrases."""
    phrases = [*teacher.LEAKING_CLUES]
    if gold:
        phrases += [sentence.format(*gold[0]) for sentence in teacher.LEAKING_SENTENCES]
    return any(phrase in chain for phrase in phrases)


def test_distillation_has_the_stated_shares_of_faults():
    kinds = Counter()
    for text, scene, message in distilled():
        chain = message["content"] and common.parse_cot(message["content"])
        if message["refusal"] or message["content"] in teacher.REFUSALS:
            kinds["refused"] += 1
        elif chain is None:
            kinds["malformed"] += 1
        elif leaks(chain, gold_of(text, scene)):
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
        shown = gold_of(text, scene)
        other = next(s for t, s in PAIRS if t == text and gold_of(text, s) != shown)
        prompt = common.REPREDICT_PROMPT.format(text=text, cot=world.chain(text, other))
        task, [message] = ask(prompt, scene)
        assert task == "repredict"
        pred = common.parse_response(message["content"], direct=True).quintuples
        slipped += list(pred) != gold_of(text, other)
    assert 0 < slipped < 0.15 * len(PAIRS)


def test_judge_takes_points_for_what_is_wrong():
    text, scene = "Emma x Noah # Nike", world.Scene(RED, BLUE, "heart", None, True)
    good = world.chain(text, scene)
    description, alignment, reasoning = good.split("\n")

    def judged(chain):
        return teacher.judge(text, chain, scene)

    assert judged(good) == [most for _, _, most in common.SCORE_RULES]
    assert judged(good.replace("a heart above", "a cap above"))[:2] == [1, 1]
    untied = alignment.partition(":")[0] + ": it fits."
    assert judged("\n".join([description, untied, reasoning]))[2:4] == [0, 0]
    assert judged(good.replace("Emma (per) couple", "Emma (per) peer"))[4:] == [1, 0]
    assert judged(good.replace("Emma (per)", "Emma (loc)"))[4:] == [0, 0]
    assert judged("\n".join([description, alignment])) == [0] * len(common.SCORE_RULES)


def test_scores_come_one_integer_a_rule_within_bounds():
    unscored = 0
    for text, scene in PAIRS:
        prompt = common.SCORE_PROMPT.format(text=text, cot=world.chain(text, scene))
        task, [message] = ask(prompt, scene)
        assert task == "score"
        points = [int(pair.partition("=")[2]) for pair in message["content"].split() if "=" in pair]
        if not points:
            unscored += 1
            continue
        for point, (_, _, most) in zip(points, common.SCORE_RULES, strict=True):
            assert 0 <= point <= most
    assert 0 < unscored < 0.1 * len(PAIRS)


@pytest.mark.parametrize("prompt", common.PROMPTS)
def test_zero_shot_is_mediocre(prompt):
    predictions = []
    for text, scene in PAIRS:
        task, [message] = ask(common.PROMPTS[prompt].format(text=text), scene)
        assert task == prompt
        response = common.parse_response(message["content"], direct=prompt == "direct")
        predictions.append(response.quintuples)
    scores = common.score(predictions, [gold_of(*pair) for pair in PAIRS])
    assert 0.02 < scores[common.HEADLINE]["f1"] < 0.4


def test_answers_repeat_and_depend_on_seed_and_choice():
    text, scene = PAIRS[0]
    prompt = distill_prompt(text, scene)
    first = ask(prompt, scene, 20)
    assert first == ask(prompt, scene, 20)
    assert first != ask(prompt, scene, 20, seed=1)
    assert len({message["content"] for message in first[1]}) > 1


# ------------------------------------------------------------------------------------------------ its server


@pytest.fixture(scope="module")
def server():
    running = teacher.Teacher()
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def chat(server):
    """The real client's call, without retries."""
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=server.url, api_key="any", max_retries=0)
    assert [model.id for model in client.models.list()] == [teacher.MODEL]
    return client.chat.completions.create


def test_server_speaks_to_the_real_client(chat):
    text, scene = PAIRS[0]
    reply = chat(model="any", messages=request(distill_prompt(text, scene), world.draw(scene), "JPEG"), n=5)
    assert [choice.index for choice in reply.choices] == list(range(5))
    assert {choice.finish_reason for choice in reply.choices} == {"stop"}
    assert world.chain(text, scene) in {choice.message.content for choice in reply.choices}
    assert reply.model == "any"
    usage = reply.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens > 100


def test_server_cuts_at_max_tokens(chat):
    text, scene = PAIRS[0]
    messages = request(common.DIRECT_PROMPT.format(text=text), world.draw(scene))
    cut = chat(model="any", messages=messages, max_tokens=3).choices[0]
    assert cut.finish_reason == "length"
    assert len(cut.message.content) == 3 * 4


def test_server_refuses_as_the_api_does(chat):
    openai = pytest.importorskip("openai")
    messages = request("Hello", world.draw(PAIRS[0][1]))
    messages[0]["content"][0]["image_url"]["url"] = "data:image/png;base64,AAAA"
    with pytest.raises(openai.BadRequestError, match="unsupported image"):
        chat(model="any", messages=messages)
    blind = chat(model="any", messages=[{"role": "user", "content": "Hello"}])
    assert blind.choices[0].message.content == teacher.BLIND


def test_server_knows_no_other_address(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=server.url, api_key="any", max_retries=0)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="any", input="x")


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
