"""lib/served.py and 04 --rollout-url against a fake of vLLM's routes (tests/vllm.sh: against vLLM itself)."""

import base64
import io
import json
import shutil
import time

import pytest
import torch
from conftest import ARCHITECTURES, run_script, stage
from fake_vllm import RAW, FakeVLLM
from PIL import Image
from test_train import trl_loss, weights_of

import common
from common import InputError, Stopped
from lib import data, lora, predict, rollout, served, training, vlm

grpo = stage("04_grpo")
SAME = 0.02  # a random model gives image ids, which are never drawn, a hundredth of the probability
ALONE = training.Ranks(0, 1, torch.device("cpu"))


def shake(model, seed, scale=0.1):
    """Another policy: each adapter weight moved at random."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def policy(request, tiny, world):
    """(folder of the base, PeftModel, processor, two items)"""
    folder = str(tiny(request.param))
    model, processor = vlm.load(folder)
    model = lora.add_lora(model, 4, 8).eval()
    shake(model, 0)
    examples = data.load_examples(world / "train.jsonl")[:2]
    return folder, model, processor, [(common.REASON_PROMPT.format(text=e.text), e.image) for e in examples]


@pytest.fixture
def fake(policy):
    with FakeVLLM(policy[0]) as fake:
        yield fake


@pytest.fixture
def server(fake, policy, tmp_path):
    folder, _, processor, _ = policy
    return served.Server(f"{fake.url}/v1/", folder, processor, tmp_path / "out", ALONE)


def gap(model, processor, items, groups, temperature=1.0):
    """Largest |log-prob of ours − as drawn|."""
    prompts = vlm.encode(model, processor, items)
    ids = [[sample.completion_ids for sample in group] for group in groups]
    with torch.no_grad():
        logps, _, _ = rollout.completion_logps(model, prompts, ids, temperature)
    samples = [sample for group in groups for sample in group]
    weights = grpo.rollout_weight(logps, samples, cap=1e9)
    return weights.log().abs().max().item()


# -------------------------------------------------------------------------------- what is asked


def test_what_is_asked_says_everything(fake, server, policy, tmp_path):
    _, model, processor, [(text, image), _] = policy
    shown = Image.open(image).convert("RGBA")
    shown.putalpha(100)
    shown.save(tmp_path / "clear.png")
    special = text + processor.tokenizer.eos_token
    server.sample([(special, tmp_path / "clear.png")], 3, 5, 0.7, keys=[(0, 4, 1)])
    [body] = fake.asked
    [message] = body.pop("messages")
    picture, question = message["content"]
    assert question["text"] == vlm.plain_text(processor, special) != special
    sent = Image.open(io.BytesIO(base64.b64decode(picture["image_url"]["url"].partition(",")[2])))
    assert (sent.format, sent.mode) == ("PNG", "RGB")
    assert sent.tobytes() == data.load_image(tmp_path / "clear.png").tobytes()
    assert body == {
        **{"model": "base", "n": 3, "max_tokens": 5, "temperature": 0.7, "top_p": 1.0},
        **{"seed": served.seed_of((0, 4, 1)), "stop_token_ids": vlm.stop_ids(model, processor)},
        "logit_bias": {str(i): -100 for i in vlm.image_ids(model)},
        **{"top_k": -1, "min_p": 0.0, "min_tokens": 0, "ignore_eos": False, "stop": []},
        **{"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
        **{"add_special_tokens": True, "return_token_ids": True, "logprobs": True, "top_logprobs": 0},
    }


def test_seeds_follow_from_the_key_and_leave_room():
    seeds = [served.seed_of((0, step, place)) for step in range(50) for place in range(8)]
    assert len(set(seeds)) == 400 and seeds[9] == served.seed_of((0, 1, 1))
    assert max(seeds) < 2**62  # + j stays a signed 64-bit number
    gaps = sorted(seeds)
    assert min(b - a for a, b in zip(gaps, gaps[1:], strict=False)) > 10**6  # children do not meet


def test_a_model_is_described_without_its_weights(policy):
    folder, model, processor, _ = policy
    described = served.describe(folder)
    assert vlm.stop_ids(described, processor) == vlm.stop_ids(model, processor)
    assert vlm.image_ids(described) == vlm.image_ids(model)


# -------------------------------------------------------------------------------- what comes back


def test_responses_are_the_adapters(server, policy):
    _, model, processor, items = policy
    ours = rollout.generate(model, processor, items, max_new_tokens=12, temperature=0.0)
    assert server.sample(items, 1, 12, 0.0) != ours  # the base's
    server.publish(model)
    assert server.sample(items, 1, 12, 0.0) == ours
    groups = server.sample(items, 4, 12, 0.7)
    assert [len(group) for group in groups] == [4, 4]
    assert gap(model, processor, items, groups, 0.7) < SAME
    for sample in groups[0] + groups[1]:
        assert sample.text == vlm.decode(processor, sample.completion_ids)
        assert sample.finished == (sample.completion_ids[-1] in vlm.stop_ids(model, processor))
    again = server.sample(items[1:], 4, 12, 0.7, keys=[1])  # the key alone decides, not the company
    assert again[0] == groups[1]


def test_each_adapter_has_a_name_and_a_folder_of_its_own(fake, server, policy):
    _, model, processor, items = policy
    kept = {name: weights.clone() for name, weights in model.state_dict().items()}
    for step in range(3):
        shake(model, step, 0.3)
        server.publish(model)
        assert list(fake.loaded) == [server.adapter]  # the last one is gone
        assert [path.name for path in server.folder.iterdir()] == [server.adapter]
        assert gap(model, processor, items, server.sample(items, 2, 12, 1.0)) < SAME
    names, folders = zip(*fake.loads, strict=True)
    assert len(set(names)) == len(set(folders)) == 3
    server.close()
    assert not fake.loaded and not server.folder.exists()

    # the fake does have the trap: a name, or a folder, met again answers with the weights of the first time
    for name, folder in ((names[0], "new"), ("new", folders[0])):
        served.write(model, server.folder / folder)
        fake.load(name, str(server.folder / folder))
        server.adapter = name
        assert gap(model, processor, items, server.sample(items, 2, 12, 1.0)) > 0.05
        fake.loaded.clear()
    model.load_state_dict(kept)


def test_a_stored_adapter_is_served_from_a_copy(fake, server, policy, tmp_path):
    _, model, processor, items = policy
    lora.save_adapter(model, processor, tmp_path / "best", lora.Recipe("reason"), "")
    server.publish(tmp_path / "best")
    assert server.sample(items, 1, 12, 0.0) == rollout.generate(model, processor, items, 1, 12, 0.0)
    assert str(tmp_path / "best") not in [folder for _, folder in fake.loads]


def test_what_a_killed_run_left_is_cleared_away(fake, server, policy, tmp_path):
    _, model, _, _ = policy
    served.write(model, server.folder / "jmere-old")
    served.write(model, tmp_path / "other")
    fake.load("jmere-old", str(server.folder / "jmere-old"))
    fake.load("someone-elses", str(tmp_path / "other"))
    server.publish(model)
    assert list(fake.loaded) == ["someone-elses", server.adapter]
    assert not (server.folder / "jmere-old").exists() and (tmp_path / "other").exists()


# -------------------------------------------------------------------------------- what goes wrong


def test_outages_are_waited_out_and_said_once(fake, server, policy, monkeypatch, capsys):
    _, model, _, items = policy
    waits = []
    monkeypatch.setattr(served.time, "sleep", waits.append)
    expected = server.sample(items[:1], 2, 6, 1.0)
    asked = len(fake.asked)
    fake.faults += ["503", "reset", "torn", "abort", "500"]
    assert server.sample(items[:1], 2, 6, 1.0) == expected
    assert len(fake.asked) == asked + 5  # all but the reset
    assert waits == [0.5, 1, 2, 4, 8]
    assert capsys.readouterr().out.count("waiting for") == 1


def test_a_server_that_stays_away_stops_the_run(fake, server, policy, monkeypatch):
    monkeypatch.setattr(served, "PATIENCE", 0.3)
    fake.__exit__()
    with pytest.raises(Stopped, match="start the server again; then the same command goes on"):
        server.sample(policy[3], 1, 4, 0.0)


def test_a_server_that_stays_away_is_waited_for_once(fake, server, policy, monkeypatch):
    """Not again by each request that stood in the queue, nor to unload what it has forgotten."""
    monkeypatch.setattr(served, "PATIENCE", 1)
    monkeypatch.setattr(served, "IN_FLIGHT", 1)
    server.publish(policy[1])
    fake.__exit__()
    began = time.monotonic()
    with pytest.raises(Stopped):
        server.sample(policy[3] * 4, 1, 4, 0.0)
    server.close()
    assert time.monotonic() - began < 4
    assert not server.folder.exists()


def test_a_restarted_server_gets_the_adapter_again(fake, server, policy):
    _, model, processor, items = policy
    server.publish(model)
    expected = server.sample(items, 2, 6, 1.0)
    fake.restart()
    assert server.sample(items, 2, 6, 1.0) == expected
    assert {name for name, _ in fake.loads} == {server.adapter}


def test_a_load_whose_answer_was_lost_is_no_fault(fake, server, policy):
    server.publish(policy[1])
    server._load(server.adapter)
    assert list(fake.loaded) == [server.adapter]


def refused(server, policy):
    """The one line that a run ends with."""
    _, model, _, items = policy
    with pytest.raises(InputError) as caught:
        server.prove(*items[0])
        server.publish(model)
        server.sample(items, 2, 6, 1.0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_options_that_the_server_lacks(fake, server, policy, monkeypatch):
    monkeypatch.setattr(served, "LAG", 0.2)
    fake.runtime = False
    assert "start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING" in refused(server, policy)
    fake.runtime = True
    fake.rank = 2
    assert "start it with --max-lora-rank 4" in refused(server, policy)
    fake.rank = 32
    fake.sees = False
    assert "--out must be on storage that both see" in refused(server, policy)
    fake.sees = True
    fake.raw = True
    assert f"log-prob {RAW}, expected 0: start it with --logprobs-mode" in refused(server, policy)


@pytest.mark.parametrize(
    ("words", "lie"),
    [
        ("tokens at http", lambda reply: reply["prompt_token_ids"].pop(0)),
        ("tells no token ids", lambda reply: reply.pop("prompt_token_ids")),
        ("gave 1 of 2 responses", lambda reply: len(reply["choices"]) > 1 and reply["choices"].pop()),
        ("without stop id or --max-new-tokens", lambda reply: cut(reply["choices"][0])),
        ("drew an image token", lambda reply: reply["choices"][0].update(token_ids=IMAGE)),
    ],
)
def test_answers_that_are_none(fake, server, policy, words, lie):
    IMAGE[:] = [server.banned[0]] * 6

    def lies(reply):
        if len(reply["choices"]) > 1 or words.startswith("t"):  # told of the prompt
            lie(reply)
        return reply

    fake.lies = lies
    assert words in refused(server, policy)


IMAGE = []


def cut(choice):
    choice["token_ids"] = choice["token_ids"][:2]
    choice["logprobs"]["content"] = choice["logprobs"]["content"][:2]


def test_image_sizes_are_probed(tiny, world, tmp_path):
    """A server that scales pictures otherwise is found at the start, though no picture of the data shows
    it."""
    folder = shutil.copytree(tiny("qwen2_5_vl"), tmp_path / "other")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings["max_pixels"] *= 4
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    processor = vlm.load_processor(str(tiny("qwen2_5_vl")))
    image = data.load_examples(world / "train.jsonl")[0].image
    Image.open(image).resize((56, 56)).save(tmp_path / "small.png")
    with FakeVLLM(folder) as fake:
        server = served.Server(fake.url, str(tiny("qwen2_5_vl")), processor, tmp_path, ALONE)
        server.sample([("x", tmp_path / "small.png")], 1, 4, 1.0)
        expected = r'max_pixels.png.*--mm-processor-kwargs .\{"min_pixels": \d+, "max_pixels": \d+\}'
        with pytest.raises(InputError, match=expected):
            server.prove("x", tmp_path / "small.png")


def test_addresses_and_keys(fake, policy, tmp_path, monkeypatch):
    folder, _, processor, items = policy

    def start(url=fake.url):
        return served.Server(url, folder, processor, tmp_path, ALONE)

    with pytest.raises(InputError, match="expected http://HOST:PORT"):
        start("localhost:8000")
    fake.key = "s3cret"
    with pytest.raises(InputError, match="VLLM_API_KEY must hold the server's key"):
        start()
    monkeypatch.setenv("VLLM_API_KEY", " s3cret\n")
    assert start().sample(items, 1, 4, 0.0)
    for wrong in ("s3\ncret", "s3crét"):
        monkeypatch.setenv("VLLM_API_KEY", wrong)
        with pytest.raises(InputError, match="VLLM_API_KEY: holds") as caught:
            start()
        assert "s3" not in str(caught.value)
    monkeypatch.setattr(fake, "cards", lambda: [{"id": "gpt"}])
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    with pytest.raises(InputError, match="not vLLM's"):
        start()


# -------------------------------------------------------------------------------- the importance weight


def test_rollout_weight_by_hand():
    logps = torch.tensor([[0.5, 0.2], [0.9, 0.0]]).log()
    logps[1, 1] = 0.0  # padding
    drawn = [rollout.Sample("", [1, 2], True, [-1.0, -4.0]), rollout.Sample("", [1], True, [-0.1])]
    weights = grpo.rollout_weight(logps, drawn, 2.0)
    e = torch.e
    torch.testing.assert_close(weights, torch.tensor([[0.5 * e, 2.0], [0.9 * e**0.1, 1.0]]))
    assert torch.equal(grpo.rollout_weight(logps, drawn, None), torch.ones(2, 2))


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_weighted_loss_and_gradient_equal_trl(kl_coef):
    torch.manual_seed(3)
    logps = (-torch.rand(6, 5) * 3).requires_grad_()
    ref_logps, importance, advantages = -torch.rand(6, 5) * 3, torch.rand(6, 5) * 2, torch.randn(6)
    mask = torch.arange(5)[None] < torch.randint(1, 6, (6, 1))
    weights = weights_of(mask)
    loss, _ = grpo.grpo_loss(logps, logps.detach(), ref_logps, advantages, weights, kl_coef, importance)
    theirs = trl_loss(logps, ref_logps, advantages, mask, kl_coef, importance=importance)
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-6)
    [ours] = torch.autograd.grad(loss, logps)
    [gradient] = torch.autograd.grad(theirs, logps)
    torch.testing.assert_close(ours, gradient, rtol=1e-5, atol=1e-7)


# -------------------------------------------------------------------------------- 04


# a random model earns nothing: its groups get something to tell apart
REWARD = """
import importlib
grpo = importlib.import_module("04_grpo")
grpo.reward = lambda sample, *rest: {"reward": len(sample.text) % 7 / 7}
"""


@pytest.fixture(scope="module")
def start(tiny, world, zygote, tmp_path_factory):
    """start(url, out, *more arguments, ranks, patch) → {"code", "text"} of 04 from a shaken adapter."""
    folder = tmp_path_factory.mktemp("grpo")
    model, processor = vlm.load(str(tiny("llava")))
    model = lora.add_lora(model, 4, 8)
    shake(model, 1)
    lora.save_adapter(model, processor, folder / "best", lora.Recipe("reason"), "")
    (folder / "reward.py").write_text(REWARD)

    def start(url, out, *more, ranks=None, patch=""):
        argv = ["--adapter", folder / "best", "--model", tiny("llava"), "--data", world / "train.jsonl"]
        argv += [] if "--val" in more else ["--no-val"]
        argv += ["--group-size", 3, "--limit", 8, "--epochs", 1.5, "--max-new-tokens", 8]
        argv += ["--lr", 1e-2, "--out", out, *more]
        if url:
            argv += ["--rollout-url", url]
        if ranks is None:
            return zygote.run("04_grpo", argv, folder / "log", patch=REWARD + patch)
        code, text, _ = run_script("tests/rank_probe.py", folder / "reward.py", "04_grpo", *argv, ranks=ranks)
        return {"code": code, "text": text}

    return start


def rows_of(path):
    return [row for _, row in data.read_jsonl(path)]


def error_of(answer):
    [line] = [line for line in answer["text"].splitlines() if line.startswith("error: ")]
    return line


def test_grpo_on_one_rank_and_on_two(start, tiny, tmp_path):
    asked = {}
    responses = {}
    for ranks, size in ((None, 4), (2, 2)):
        out = tmp_path / f"{ranks}"
        with FakeVLLM(tiny("llava")) as fake:
            answer = start(fake.url, out, "--batch-size", size, "--log-samples-every", 1, ranks=ranks)
        assert answer["code"] == 0, answer["text"]
        rows = rows_of(out / "metrics.jsonl")
        assert [row["step"] for row in rows] == [1, 2, 3]
        assert max(row["sampling_gap"] for row in rows) < SAME
        assert all(row["rollout_weight"] == pytest.approx(1, abs=SAME) for row in rows)
        assert rows[0]["kl"] == 0 and rows[2]["kl"] > 0.01  # so a stale adapter would show in the gap
        names, folders = zip(*fake.loads, strict=True)
        assert len(set(names)) == len(set(folders)) == 3  # once a step, by one rank
        assert not fake.loaded and not (out / "served").exists()
        asked[ranks] = sorted((body["seed"], body["n"]) for body in fake.asked if body["max_tokens"] == 8)
        samples = rows_of(out / "samples.jsonl")
        responses[ranks] = [row["response"] for row in samples if row["step"] == 1]
    assert asked[None] == asked[2] and len(asked[2]) == 12
    assert responses[None] == responses[2] and len(responses[2]) == 12


def test_grpo_validates_by_the_server(start, tiny, world, tmp_path):
    out = tmp_path / "out"
    with FakeVLLM(tiny("llava")) as fake:
        more = ["--batch-size", 4, "--val", world / "val.jsonl"]
        answer = start(fake.url, out, *more)
    assert answer["code"] == 0, answer["text"]
    files = list((out / "validation").iterdir())
    assert len(fake.loads) == 3 + len(files) and not fake.loaded
    model, processor = vlm.load(str(tiny("llava")))
    model = lora.load_adapter(model, str(out / "best")).eval()  # the newest: no F1
    examples = data.load_examples(world / "val.jsonl")
    items = [(common.REASON_PROMPT.format(text=e.text), e.image) for e in examples]
    ours = rollout.generate(model, processor, items, 1, 8, 0.0)
    stored = rows_of(out / "validation" / "step-3.jsonl")
    assert [row["response"] for row in stored] == [sample.text for [sample] in ours]


@pytest.mark.parametrize("adapted", [True, False])
def test_05_stores_the_same_answers(policy, world, tmp_path, adapted):
    """Greedy, drawn here and by a server; several responses come in one request a tweet."""
    folder, model, processor, _ = policy
    lora.save_adapter(model, processor, tmp_path / "best", lora.Recipe("reason"), "")
    start = ["--adapter", tmp_path / "best"] if adapted else ["--zero-shot"]
    command = ["05_eval.py", *start, "--model", folder, "--data", world / "test.jsonl", "--limit", 3]
    command += ["--max-new-tokens", 8, "--no-report"]
    run_script(*command, "--temperature", 0, "--out", tmp_path / "here")
    with FakeVLLM(folder) as fake:
        by_server = [*command, "--rollout-url", fake.url]
        run_script(*by_server, "--temperature", 0, "--out", tmp_path / "there")
        assert len(fake.loads) == adapted and not fake.loaded
        before = len(fake.asked)
        if adapted:
            run_script(*by_server, "--samples", 4, "--out", tmp_path / "four")
        asked = [body["n"] for body in fake.asked[before:] if body["max_tokens"] == 8]
    assert asked == [4, 4, 4] * adapted
    here, there = (rows_of(tmp_path / name / "predictions.jsonl") for name in ("here", "there"))
    assert [row["responses"] for row in here] == [row["responses"] for row in there]
    assert there[0]["settings"]["dtype"] == "vllm"  # not to be mixed with ours


def test_05_unloads_only_when_all_ranks_have_their_answers(policy, world, tmp_path):
    folder, model, processor, _ = policy
    lora.save_adapter(model, processor, tmp_path / "best", lora.Recipe("reason"), "")
    examples = data.load_examples(world / "test.jsonl")[:2]
    last = sorted(examples, key=predict.prompt_size, reverse=True)[1]  # rank 1's only tweet

    def before(body):
        if body["seed"] == served.seed_of((0, last.id)):
            time.sleep(3)

    command = ["05_eval.py", "--adapter", tmp_path / "best", "--data", world / "test.jsonl", "--limit", 2]
    command += ["--model", folder, "--max-new-tokens", 8, "--no-report", "--out", tmp_path / "out"]
    with FakeVLLM(folder) as fake:
        fake.before = before
        run_script(*command, "--rollout-url", fake.url, ranks=2)
        assert len(fake.loads) == 1 and not fake.loaded
    rows = rows_of(tmp_path / "out" / "predictions.jsonl")
    assert len(rows) == 2 and {row["source"]["server"] for row in rows} == {"/base"}


def test_grpo_stops_where_log_probs_are_not_its_own(start, tiny, tmp_path):
    out = tmp_path / "out"
    with FakeVLLM(tiny("llava")) as fake:
        fake.shift = -0.3
        answer = start(fake.url, out)
    assert answer["code"] == 2
    assert "0.3 nats a token off ours, expected at most 0.25" in error_of(answer)
    assert not (out / "last").exists() and not (out / "metrics.jsonl").exists()


def test_grpo_goes_on_with_another_server_and_not_without_one(start, tiny, tmp_path):
    out = tmp_path / "out"
    with FakeVLLM(tiny("llava")) as fake:
        assert start(fake.url, out, "--batch-size", 4, "--stop-after", 2)["code"] == 0
        loads = fake.loads
    with FakeVLLM(tiny("llava")) as fake:
        answer = start(fake.url, out, "--batch-size", 4)
        assert answer["code"] == 0 and "going on from step 2" in answer["text"]
        assert len(fake.loads) == 1 and fake.loads[0] not in loads
    assert [row["step"] for row in rows_of(out / "metrics.jsonl")] == [1, 2, 3]
    answer = start(None, out, "--batch-size", 4)
    assert answer["code"] == 2 and "rollout_cap 2.0 → None" in error_of(answer)


@pytest.mark.parametrize("longest", ["train", "val"])
def test_prompts_too_long_for_the_server_are_found_at_the_start(start, tiny, world, tmp_path, longest):
    positions = 100
    more = []
    if longest == "val":
        row = rows_of(world / "val.jsonl")[0]
        row |= {"text": "word " * 800, "image": f"{world}/{row['image']}"}
        data.write_atomic(tmp_path / "val.jsonl", data.jsonl_line(row))
        positions = 700
        more = ["--val", tmp_path / "val.jsonl"]
    with FakeVLLM(tiny("llava"), positions=positions) as fake:
        answer = start(fake.url, tmp_path / "out", *more)
        assert answer["code"] == 2 and not fake.asked
        assert f"--max-new-tokens leaves it {positions - 8} positions" in error_of(answer)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("runtime", False, "start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"),
        ("rank", 2, "start it with --max-lora-rank 4"),
        ("sees", False, "--out must be on storage that both see"),
        ("raw", True, "start it with --logprobs-mode processed_logprobs"),
        ("lies", lambda reply: reply | {"prompt_token_ids": [1, 2]}, "start it with this --model, without"),
    ],
)
def test_what_the_server_lacks_ends_grpo_in_one_line(start, tiny, tmp_path, option, value, words):
    with FakeVLLM(tiny("llava")) as fake:
        setattr(fake, option, value)
        answer = start(fake.url, tmp_path / "out", patch="from lib import served\nserved.LAG = 0.2\n")
    assert answer["code"] == 2 and words in error_of(answer)
    assert "Traceback" not in answer["text"]
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_grpo_lives_on_through_a_restart_and_stops_where_the_server_stays_away(start, tiny, tmp_path):
    out = tmp_path / "out"
    seeds = set()  # of prompts that were asked for; four a step
    happens = {3: lambda: fake.restart(), 11: lambda: fake.faults.extend(["503"] * 10_000)}

    def before(body):
        if body["max_tokens"] == 8:
            seeds.add(body["seed"])
            happens.pop(len(seeds), lambda: None)()

    with FakeVLLM(tiny("llava")) as fake:
        fake.before = before
        patch = "from lib import served\nserved.PATIENCE = 1\n"
        answer = start(fake.url, out, "--batch-size", 4, "--save-every", 1, patch=patch)
        assert answer["code"] == 3 and "then the same command goes on" in error_of(answer)
        assert "Traceback" not in answer["text"]
        assert [row["step"] for row in rows_of(out / "metrics.jsonl")] == [1, 2]
        fake.faults.clear()
        answer = start(fake.url, out, "--batch-size", 4, "--save-every", 1)
        assert answer["code"] == 0, answer["text"]
    rows = rows_of(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert max(row["sampling_gap"] for row in rows) < SAME
    assert not fake.loaded and not (out / "served").exists()
