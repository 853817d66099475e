"""Every family that lib/vlm.py claims, against plain transformers: log-probs, gradients, greedy tokens, and
through 03, 04, 05. What they found is printed as a table, with -s."""

import json
import random
import shutil
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from conftest import run_script
from PIL import Image
from transformers.utils import is_torchvision_available

import common
from common import InputError
from lib import checks, data, lora, merge, rollout, training, vlm
from tests import families

ALL = vlm.ARCHITECTURES
ONE = training.Ranks(0, 1, torch.device("cpu"))
LENGTHS = ((9, 1, 4), (2, 6))


@pytest.fixture(scope="module")
def found():
    """{family: {what: difference from transformers}}, printed when all tests are through."""
    table = defaultdict(dict)
    yield table
    columns = []
    for row in table.values():
        columns += [column for column in row if column not in columns]
    print("\n\n| family |", " | ".join(columns), "|")
    print("|---" * (len(columns) + 1) + "|")
    for family, row in table.items():
        cells = [row.get(column, "") for column in columns]
        print("|", family, "|", " | ".join(cells), "|")


@pytest.fixture(scope="module", params=ALL)
def family(request, tmp_path_factory):
    """(name, folder of a tiny model)"""
    folder = tmp_path_factory.mktemp(request.param)
    families.make(request.param, folder)
    return request.param, folder


@pytest.fixture(scope="module")
def loaded(family, tmp_path_factory):
    """Model with a LoRA that does something, processor, two items of different image sizes."""
    name, folder = family
    model, processor = vlm.load(str(folder))
    model = lora.add_lora(model, 8, 16).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            # at 0.2 fp32 itself, ours and transformers' alike, is up to 2e-5 off float64
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    images = tmp_path_factory.mktemp("images")
    items = []
    for number, (size, text) in enumerate(
        (((56, 56), "Emma meets Noah"), ((180, 90), "the Browns of Paris"))
    ):
        gradient = Image.linear_gradient("L").resize(size)
        Image.merge("RGB", (gradient, gradient.rotate(90), gradient.rotate(180))).save(
            images / f"{number}.png"
        )
        items.append((common.REASON_PROMPT.format(text=text), str(images / f"{number}.png")))
    return name, model, processor, items


def completions_of(model):
    rng = random.Random(0)
    legal = [i for i in range(20, 400) if i not in vlm.image_ids(model)]
    return [[[rng.choice(legal) for _ in range(length)] for length in lengths] for lengths in LENGTHS]


def off(a, b):
    return ((a - b).norm() / b.norm()).item()


def gradients(model, logps):
    model.zero_grad()
    weights = torch.linspace(-1, 1, len(logps))
    (logps * weights).sum().backward()
    trained = [parameter.grad.flatten() for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat(trained)


def own_logps(model, processor, items, completions):
    """Log-probs of transformers' own forward, response by response, with graph → [T]."""
    found = []
    for (text, image), group in zip(items, completions, strict=True):
        for ids in group:
            logits = vlm.own_logits(model, processor, text, image, ids)[:-1]
            chosen = torch.tensor(ids)[:, None]
            found.append(logits.log_softmax(-1).gather(1, chosen)[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize("shared", [True, False])
def test_log_probs_and_gradients_equal_transformers(loaded, shared, found):
    name, model, processor, items = loaded
    completions = completions_of(model)
    prompts = vlm.encode(model, processor, items)
    logps, _, mask = rollout.completion_logps(model, prompts, completions, shared_prefix=shared)
    ours = logps[mask]
    our_gradients = gradients(model, ours)
    theirs = own_logps(model, processor, items, completions)
    their_gradients = gradients(model, theirs)
    apart = off(ours.detach(), theirs.detach()), off(our_gradients, their_gradients)
    found[name]["log-probs, gradients " + ("packed" if shared else "plain")] = "{:.1e}, {:.1e}".format(*apart)
    assert max(apart) <= 1e-5


def own_greedy(model, processor, text, image, length):
    """Token ids that transformers' generate answers with."""
    inputs = vlm.processor_inputs(processor, text, image)
    plain = {"do_sample": False, "suppress_tokens": vlm.image_ids(model), "repetition_penalty": 1.0}
    ids = model.generate(**inputs, max_new_tokens=length, temperature=None, **plain)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture
def livelier(loaded):
    """The same with twice the LoRA, which answers two tweets in two ways."""
    trained = [parameter for parameter in loaded[1].parameters() if parameter.requires_grad]
    with torch.no_grad():
        torch._foreach_mul_(trained, 2)
        yield loaded
        torch._foreach_mul_(trained, 0.5)


@pytest.mark.parametrize("static", [False, True])
def test_greedy_tokens_equal_generate(livelier, static, found):
    name, model, processor, items = livelier
    ours = rollout.generate(model, processor, items, n=2, max_new_tokens=40, temperature=0.0, static=static)
    for (text, image), samples in zip(items, ours, strict=True):
        wanted = own_greedy(model, processor, text, image, 40)
        assert [sample.completion_ids for sample in samples] == [wanted, wanted]
    assert len({tuple(group[0].completion_ids) for group in ours}) == 2, (
        "both tweets got one answer: the test is blind"
    )
    lengths = [str(len(group[0].completion_ids)) for group in ours]
    found[name]["greedy, static" if static else "greedy"] = f"{' + '.join(lengths)} tokens equal"


@pytest.mark.parametrize("size", [(56, 56), (180, 90), (45, 200), (150, 140), (30, 29), (1000, 64)])
def test_prompt_lengths(loaded, size, tmp_path):
    """Tokens by arithmetic, by the processor, and as the model features them: in tiles of any number."""
    _, model, processor, items = loaded
    image = tmp_path / "a.png"
    Image.linear_gradient("L").convert("RGB").resize(size).save(image)
    text = items[0][0]
    length = vlm.prompt_length(processor, text, size)
    assert vlm.processor_inputs(processor, text, image)["input_ids"].shape[1] == length
    [prompt] = vlm.encode(model, processor, [(text, image)])
    assert len(prompt.embeds) == length


# -------------------------------------------------------------------------------- the proof at the start


def prove(model, processor, items):
    example = data.Example("a", "Emma meets Noah", items[1][1], (), {})
    return checks.prove(model, processor, example, SimpleNamespace(prompt="reason"), ONE)


def test_the_proof_passes(loaded, found):
    name, model, processor, items = loaded
    difference = prove(model, processor, items)
    found[name]["proof at the start"] = f"{difference:.1e} nats"
    assert difference < 1e-5


def test_positions_off_by_one_are_caught(loaded, monkeypatch, found):
    name, model, processor, items = loaded
    right = vlm.response_positions
    monkeypatch.setattr(vlm, "response_positions", lambda *arguments: right(*arguments) + 1)
    with pytest.raises(InputError, match=f"{name}: the packed pass is .* nats off the model's own") as error:
        prove(model, processor, items)
    found[name]["positions off by one"] = str(error.value).split(" is ")[1].split(" the model")[0]


def test_dropped_deepstack_is_caught(tmp_path, monkeypatch, found):
    """What a family let in carelessly does: it trains, without a word, on wrong log-probs."""
    families.make("qwen3_vl", tmp_path)
    model, processor = vlm.load(str(tmp_path))
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "a.png")
    items = [None, ("", str(tmp_path / "a.png"))]
    assert prove(model, processor, items) < 1e-5
    encode = vlm.encode

    def careless(*args):
        prompts = encode(*args)
        for prompt in prompts:
            prompt.deepstack = None
        return prompts

    monkeypatch.setattr(vlm, "encode", careless)
    with pytest.raises(InputError, match="qwen3_vl: the packed pass is .* nats off the model's own") as error:
        prove(model, processor, items)
    found["qwen3_vl"]["DeepStack dropped"] = str(error.value).split(" is ")[1].split(" the model")[0]


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    """{family: its processor} of three kinds of pictures: tiles, one square, patches."""
    made = {}
    for name in ("llava_next", "llava", "qwen2_vl"):
        folder = tmp_path_factory.mktemp(name)
        families.make(name, folder)
        made[name] = vlm.load_processor(str(folder))
    return made


def test_another_processor_is_caught(loaded, processors, found):
    """In one line, and not by its class: Qwen's processors may stand for each other. Were there as many
    tokens, both passes would be wrong alike."""
    name, model, _, items = loaded
    for other, processor in processors.items():
        if other == name or "qwen" in name and "qwen" in other:
            continue
        with pytest.raises(InputError, match=f"processor does not belong to this {name} model"):
            prove(model, processor, items)
    found[name]["another processor"] = "refused"


# -------------------------------------------------------------------------------- other families


REFUSED = {
    "gemma3": "gemma3: the packed pass is .* nats off the model's own.*take another model",
    "gemma3_window": "gemma3_text: its layers look back 512 tokens, ours all the way: take another model",
    "qwen3_5": "qwen3_5: the packed pass is .* nats off the model's own.*take another model",
    "idefics3": "idefics3 has no model.language_model: take a model of qwen2_5_vl, .*",
}


def start(family, folder):
    """All that 03, 04 and 05 ask of a model before they train or store anything → nats."""
    families.make(family, folder)
    image = folder / "a.png"
    Image.linear_gradient("L").convert("RGB").resize((180, 90)).save(image)
    processor = vlm.load_processor(str(folder))
    vlm.prompt_length(processor, "", (180, 90))
    model, _ = vlm.load(str(folder), processor=processor)
    return prove(lora.add_lora(model, 8, 16), processor, [None, ("", str(image))])


def test_another_family_runs_if_it_proves_itself(tmp_path, found, capsys):
    difference = start("internvl", tmp_path)
    found["internvl"]["proof at the start"] = f"{difference:.1e} nats"
    assert difference < 1e-5
    assert "internvl is not among the tested families: its log-probs are" in capsys.readouterr().out


@pytest.mark.parametrize("family", REFUSED)
def test_another_family_is_refused(family, tmp_path, found):
    with pytest.raises(InputError, match=REFUSED[family]) as error:
        start(family, tmp_path)
    message = str(error.value).replace(f"--model {tmp_path}: ", "")
    found[family]["proof at the start"] = message.split(": take")[0].split(", expected")[0]


def test_the_script_refuses_it_in_one_line(world, tmp_path):
    families.make("gemma3", tmp_path / "gemma3")
    command = f"03_sft.py --model {tmp_path}/gemma3 --data {world}/sft.jsonl --no-val --out {tmp_path}/out"
    code, _, stderr = run_script(command, fails=True)
    assert code == 2 and "gemma3: the packed pass is" in stderr.strip().splitlines()[-1]
    assert not (tmp_path / "out" / "best").exists()


@pytest.mark.skipif(is_torchvision_available(), reason="with torchvision it is Pixtral's own")
def test_a_processor_that_needs_torchvision_says_so(tiny, tmp_path):
    shutil.copytree(tiny("llava"), tmp_path / "pixtral")
    for path in (tmp_path / "pixtral").glob("*processor_config.json"):
        path.write_text(path.read_text().replace("LlavaProcessor", "PixtralProcessor"))
    with pytest.raises(
        InputError, match="cannot load its processor .PixtralProcessor requires the Torchvision"
    ):
        vlm.load_processor(str(tmp_path / "pixtral"))


def test_a_decoder_without_the_layers_that_get_lora(tiny, monkeypatch):
    model, _ = vlm.load(str(tiny("llava")))
    monkeypatch.setattr(lora, "TARGETS", r".*language_model.*\.Wqkv")
    with pytest.raises(
        InputError, match="llava: its decoder has none of the layers that get LoRA .q_proj, k"
    ):
        lora.add_lora(model, 4, 8)


def test_quantized_weights_are_refused(tiny, tmp_path):
    shutil.copytree(tiny("llava"), tmp_path / "awq")
    config = json.loads((tmp_path / "awq" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "awq" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="its weights are quantized: take the model they were made from"):
        vlm.load(str(tmp_path / "awq"))


def test_a_model_without_eyes_is_refused(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=50)).save_pretrained(
        tmp_path
    )
    with pytest.raises(InputError, match="a llama model, which reads no images"):
        vlm.load(str(tmp_path))


# -------------------------------------------------------------------------------- 03 → 04 → 05 → merge


def test_through_all_stages(family, world, tmp_path, found):
    name, folder = family
    options = f"--val {world}/val.jsonl --eval-limit 2 --max-new-tokens 8 --limit 4 --batch-size 2 --lr 1e-3"
    sft = f"03_sft.py --model {folder} --data {world}/sft.jsonl {options} --out {tmp_path}/sft"
    run_script(sft, "--lora-rank 4 --lora-alpha 8 --epochs 2")
    probe = tmp_path / "grpo.py"  # a random model earns nothing: its groups get something to tell apart
    probe.write_text(
        'import importlib, sys\ngrpo = importlib.import_module("04_grpo")\n'
        'grpo.reward = lambda sample, *rest: {"reward": len(sample.text) % 7 / 7}\n'
        "grpo.main(grpo.parse_args())\n"
    )
    start = f"--adapter {tmp_path}/sft/best --data {world}/train.jsonl"
    run_script(probe, start, options, f"--epochs 1 --group-size 3 --out {tmp_path}/grpo")
    rows = [json.loads(line) for line in (tmp_path / "grpo" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["kl"] == 0 and rows[0]["grad_norm"] > 0 and rows[1]["kl"] > 0
    evaluate = f"05_eval.py --model {folder} --adapter {tmp_path}/grpo/best --data {world}/test.jsonl"
    run_script(evaluate, f"--limit 2 --max-new-tokens 8 --temperature 0 --out {tmp_path}/test")
    adapter, merged = str(tmp_path / "grpo" / "best"), str(tmp_path / "merged")
    proof = merge.merge_adapter(str(folder), adapter, merged)
    assert proof["difference"] < 1e-5 < proof["effect"]
    found[name]["merged logits (base's)"] = f"{proof['difference']:.1e} ({proof['effect']:.1e})"
    answers = {}  # what 05 stored, against the merged model as anyone would run it
    for _, row in data.read_jsonl(tmp_path / "test" / "predictions.jsonl"):
        answers[row["id"]] = row["responses"][0]["text"]
    model, processor = vlm.load(merged)
    template = common.PROMPTS[lora.read_recipe(adapter).prompt]
    for example in data.load_examples(world / "test.jsonl")[:2]:
        ids = own_greedy(model, processor, template.format(text=example.text), example.image, 8)
        assert answers.pop(example.id) == vlm.decode(processor, ids)
    assert not answers
    kl = rows[1]["kl"]
    found[name]["03 → 04 → 05"] = f"KL 0, then {kl:.1e}; 05 answers as generate of the merged model"
