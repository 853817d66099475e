"""vlm.py, 03 and 04: the loss against TRL's, the model against plain transformers, the scripts as the README
runs them."""

import json
import math
import random
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from conftest import ARCHITECTURES, run_script, stage

import common
from common import InputError
from lib import data, lora, rollout, training, vlm

sft, grpo = stage("03_sft"), stage("04_grpo")

# -------------------------------------------------------------------------------- GRPO's formulas


def trl_loss(logps, ref_logps, advantages, mask, kl_coef, loss_type="grpo", importance=None):
    """TRL's own loss code on the same numbers: k3 as in the paper, one update. Everything else it reads is
    off, but for the importance weights [N, C] of vLLM's samples, where given."""
    from trl import GRPOTrainer

    trainer = SimpleNamespace(
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1),
        model=SimpleNamespace(training=True),
        beta=kl_coef,
        loss_type=loss_type,
        epsilon_low=0.2,
        epsilon_high=0.2,
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        current_gradient_accumulation_steps=1,
        use_vllm=importance is not None,
        vllm_importance_sampling_correction=True,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logps, torch.zeros_like(logps), None),
    )
    nothing = torch.zeros_like(mask, dtype=torch.long)
    inputs = {
        "prompt_ids": nothing[:, :1],
        "prompt_mask": nothing[:, :1],
        "completion_ids": nothing,
        "completion_mask": mask.long(),
    }
    inputs |= {"advantages": advantages, "ref_per_token_logps": ref_logps, "num_items_in_batch": mask.sum()}
    inputs["importance_sampling_ratio"] = importance
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def weights_of(mask):
    """04's weights of all tokens of one batch. mask [N, C] → [N, C]."""
    lengths = mask.sum(1).tolist()
    rows = [grpo.token_weight(length, len(mask), sum(lengths)) for length in lengths]
    return torch.tensor(rows)[:, None] * mask


@pytest.mark.parametrize("seed", range(5))
def test_loss_and_gradient_equal_trl(seed):
    torch.manual_seed(seed)
    groups, size, length, kl_coef = 3, 4, 7, [0.0, 0.01, 0.5][seed % 3]
    n = groups * size
    logps = (-torch.rand(n, length) * 3).requires_grad_()
    ref_logps, rewards = -torch.rand(n, length) * 3, torch.rand(groups, size)
    mask = torch.arange(length)[None] < torch.randint(1, length + 1, (n, 1))
    deviation = rewards.std(1, keepdim=True)
    theirs = (
        (rewards - rewards.mean(1, keepdim=True)) / (deviation + 1e-4)
    ).flatten()  # as TRL computes them
    advantages = grpo.group_advantages(rewards).flatten()
    torch.testing.assert_close(advantages, theirs, rtol=1e-5, atol=1e-6)
    loss, _ = grpo.grpo_loss(logps, logps.detach(), ref_logps, advantages, weights_of(mask), kl_coef)
    [gradient] = torch.autograd.grad(loss, logps)
    their_loss = trl_loss(logps, ref_logps, theirs, mask, kl_coef)
    [their_gradient] = torch.autograd.grad(their_loss, logps)
    torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-5, atol=1e-7)


def test_loss_by_hand():
    logps = torch.tensor([[math.log(0.5), -9.0]], requires_grad=True)
    ref_logps = torch.tensor([[math.log(0.25), 5.0]])
    weights = torch.tensor([[1.0, 0.0]])
    loss, kl = grpo.grpo_loss(logps, logps.detach(), ref_logps, torch.tensor([2.0]), weights, 0.1)
    k3 = 0.5 - math.log(0.5) - 1
    assert kl.item() == pytest.approx(k3) and loss.item() == pytest.approx(-(2 - 0.1 * k3))
    loss.backward()
    assert logps.grad[0, 0].item() == pytest.approx(-(2 - 0.1 * (1 - 0.5))) and logps.grad[0, 1] == 0


def test_token_weights_sum_to_one():
    mask = torch.arange(5)[None] < torch.tensor([[5], [1], [3]])
    assert weights_of(mask).sum().item() == pytest.approx(1)
    assert weights_of(mask)[1, 0].item() == pytest.approx(1 / 3)


def test_advantages_by_hand_and_constant_groups():
    advantages = grpo.group_advantages(torch.tensor([[0.0, 1.0], [0.1 + 0.2, 0.3]]))
    std = math.sqrt(0.5)
    torch.testing.assert_close(
        advantages, torch.tensor([[-0.5 / (std + 1e-4), 0.5 / (std + 1e-4)], [0.0, 0.0]])
    )
    for value in (0.431429, 0.1, 1.1, 0.7):  # equal fp32 rewards whose mean differs from them in the last bit
        assert not grpo.group_advantages(torch.full((1, 8), value)).any()
    assert grpo.group_advantages(torch.rand(5, 8)).sum(1).abs().max() < 1e-4


def test_metrics_row_by_hand():
    good = {"reward": 1.5, "accuracy": 1.0, "own part": 2.0}
    bad = {"reward": 0.0, "accuracy": 0.0, "own part": 0.0}
    long, short = rollout.Sample("", [1, 2, 3], True), rollout.Sample("", [1], False)
    sums = grpo.summarise([[good, bad], [good, good]], [[long, short], [long, long]])
    assert sums["responses"] == 4 and sums["tokens"] == 10
    row = grpo.metrics_row(sums)
    assert row["reward"] == 4.5 / 4 and row["accuracy"] == 0.75 and row["own part"] == 1.5
    assert row["reward_std"] == pytest.approx(torch.tensor([1.5, 0, 1.5, 1.5]).std(correction=0).item())
    assert row["constant_groups"] == 0.5 and row["length"] == 2.5 and row["cut_off"] == 0.25


def test_a_part_may_not_take_the_name_of_a_metric():
    sums = grpo.summarise([[{"reward": 1.0, "length": 2.0}]], [[rollout.Sample("", [1], True)]])
    with pytest.raises(AssertionError, match="a part named length"):
        grpo.metrics_row(sums)


# -------------------------------------------------------------------------------- data order, schedule


def test_batches_cover_every_row_once_an_epoch_whatever_the_ranks():
    stream = [i for step in range(9) for i in training.batch_indices(10, 4, step, seed=3)]
    assert sorted(stream[:10]) == sorted(stream[10:20]) == list(range(10)) and stream[:10] != stream[10:20]
    assert stream == [i for step in range(36) for i in training.batch_indices(10, 1, step, seed=3)]
    assert stream != [i for step in range(9) for i in training.batch_indices(10, 4, step, seed=4)]


def test_learning_rate():
    args = SimpleNamespace(lr=1.0, warmup_ratio=0.1, schedule="cosine")
    rates = [training.lr_at(step, 100, args) for step in range(100)]
    assert rates[0] == 0.1 and max(rates) == rates[9] == rates[10] == 1.0 and 0 < rates[-1] < 0.01
    assert training.lr_at(99, 100, SimpleNamespace(lr=1.0, warmup_ratio=0, schedule="constant")) == 1.0
    assert training.lr_at(60, 100, SimpleNamespace(lr=1.0, warmup_ratio=0.2, schedule="linear")) == 0.5


# -------------------------------------------------------------------------------- the model and transformers


@pytest.fixture(scope="module", params=ARCHITECTURES)
def loaded(request, tiny, world):
    model, processor = vlm.load(str(tiny(request.param)))
    first, second, *_ = data.load_examples(world / "test.jsonl")
    reason = (common.REASON_PROMPT.format(text=first.text), first.image)
    direct = (common.DIRECT_PROMPT.format(text=second.text), second.image)
    return model, processor, [reason, direct]


def plain_inputs(processor, item):
    """What a user of plain transformers writes."""
    content = [{"type": "image"}, {"type": "text", "text": item[0]}]
    chat = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return dict(processor(text=[chat], images=[data.load_image(item[1])], return_tensors="pt"))


def test_greedy_tokens_equal_generate(loaded):
    model, processor, items = loaded
    ours = rollout.generate(model, processor, items, max_new_tokens=24, temperature=0.0)
    for item, [sample] in zip(items, ours, strict=True):
        inputs = plain_inputs(processor, item)
        out = model.generate(
            **inputs,
            max_new_tokens=24,
            do_sample=False,
            suppress_tokens=vlm.image_ids(model),
            repetition_penalty=1.0,
            temperature=None,
        )
        assert out[0, inputs["input_ids"].shape[1] :].tolist() == sample.completion_ids


def test_logps_equal_the_plain_forward(loaded):
    model, processor, items = loaded
    rng = random.Random(0)
    legal = [i for i in range(10, 200) if i not in vlm.image_ids(model)]
    completions = [
        [[rng.choice(legal) for _ in range(length)] for length in lengths] for lengths in ((9, 1, 4), (2, 6))
    ]
    prompts = vlm.encode(model, processor, items)
    for prompt in prompts:
        prompt.embeds.requires_grad_()  # the entropy comes with the gradient
    logps, entropy, mask = rollout.completion_logps(model, prompts, completions, temperature=0.7)
    logps = logps.detach()
    assert logps.shape == entropy.shape == mask.shape == (5, 9) and mask.sum(1).tolist() == [9, 1, 4, 2, 6]
    rows = iter(range(5))
    for item, group in zip(items, completions, strict=True):
        inputs = plain_inputs(processor, item)
        start = inputs["input_ids"].shape[1]
        for ids in group:
            row = next(rows)
            full = {**inputs, "input_ids": torch.cat([inputs["input_ids"], torch.tensor([ids])], 1)}
            full["attention_mask"] = torch.ones_like(full["input_ids"])
            if "mm_token_type_ids" in full:
                full["mm_token_type_ids"] = torch.nn.functional.pad(
                    inputs["mm_token_type_ids"], (0, len(ids))
                )
            with torch.no_grad():
                expected = (model(**full).logits[0, start - 1 : -1].float() / 0.7).log_softmax(-1)
            torch.testing.assert_close(
                logps[row, : len(ids)],
                expected.gather(1, torch.tensor(ids)[:, None])[:, 0],
                rtol=1e-5,
                atol=1e-5,
            )
            torch.testing.assert_close(
                entropy[row, : len(ids)], -(expected.exp() * expected).sum(1), rtol=1e-5, atol=1e-5
            )
            assert not logps[row, len(ids) :].any() and not entropy[row, len(ids) :].any()


def test_a_response_depends_on_its_key_alone(loaded):
    model, processor, items = loaded
    together = rollout.generate(
        model, processor, items, n=3, max_new_tokens=8, temperature=1.0, keys=["a", "b"]
    )
    alone = rollout.generate(
        model, processor, items[1:], n=3, max_new_tokens=8, temperature=1.0, keys=["b"], batch_rows=1
    )
    assert [s.completion_ids for s in together[1]] == [s.completion_ids for s in alone[0]]
    assert len({tuple(s.completion_ids) for s in together[0]}) > 1
    parts = rollout.generate(
        model, processor, items[1:], n=3, max_new_tokens=8, temperature=1.0, keys=["b"], batch_rows=2
    )
    assert [s.completion_ids for s in parts[0]] == [s.completion_ids for s in alone[0]]


def test_sampling_follows_the_distribution():
    torch.manual_seed(0)
    logits = torch.randn(1, 6) * 2
    logits[0, 4] = -torch.inf
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8)):
        probs = (logits / temperature).softmax(-1)[0]
        if top_p < 1:
            order = probs.argsort(descending=True)
            keep = order[: int((probs[order].cumsum(0) < top_p).sum()) + 1]
            probs = torch.zeros(6).index_put((keep,), probs[keep]) / probs[keep].sum()
        drawn, logps = rollout._draw(logits.expand(40000, 6), temperature, top_p, torch.rand(40000))
        expected = (logits / temperature).log_softmax(-1)[0, drawn]
        torch.testing.assert_close(logps, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(drawn.bincount(minlength=6) / 40000, probs, atol=0.01, rtol=0)
    assert rollout._draw(logits, 0.0, 1.0, None)[0].item() == logits.argmax()


def test_special_tokens_in_a_tweet_are_text(loaded):
    model, processor, items = loaded
    special = " ".join(processor.tokenizer.all_special_tokens)
    prompt = vlm.encode(model, processor, [(common.DIRECT_PROMPT.format(text=special), items[0][1])])[0]
    assert torch.isfinite(prompt.embeds).all()


def test_lora_hits_the_language_model_only(loaded, tiny):
    model, _ = vlm.load(str(tiny(loaded[0].config.model_type)))
    model = lora.add_lora(model, 4, 8)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = model.config.get_text_config().num_hidden_layers
    assert len(trained) == layers * 7 * 2 and all(
        "language_model.layers" in name and ".lora_" in name for name in trained
    )
    with pytest.raises(InputError, match="LoRA must train"):
        lora.check_lora(model.requires_grad_(False))


# -------------------------------------------------------------------------------- SFT's mask


def test_loss_covers_response_and_stop_id_and_nothing_else(loaded):
    """Against HF's own labels loss, where the prompt is -100."""
    model, processor, items = loaded
    stop = vlm.stop_ids(model, processor)[0]
    ids = sft.target_ids(processor, "<think>\nx\n</think>", stop)
    assert ids[-1] == stop and processor.tokenizer.decode(ids[:-1]).strip() == "<think>\nx\n</think>"
    logps, _, mask = rollout.completion_logps(model, vlm.encode(model, processor, items[:1]), [[ids]])
    inputs = plain_inputs(processor, items[0])
    full = {**inputs, "input_ids": torch.cat([inputs["input_ids"], torch.tensor([ids])], 1)}
    full["attention_mask"] = torch.ones_like(full["input_ids"])
    if "mm_token_type_ids" in full:
        full["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(ids)))
    labels = full["input_ids"].clone()
    labels[:, : inputs["input_ids"].shape[1]] = -100
    with torch.no_grad():
        theirs = model(**full, labels=labels).loss
    torch.testing.assert_close(sft.sft_loss(logps, mask, len(ids)), theirs, rtol=1e-5, atol=1e-6)


def test_target_texts():
    q = [common.quintuple("A", "per", "B", "org", "peer")]
    example = data.Example("i", "t", "x.png", tuple(q), {"cot": "why"})
    assert sft.target_text(example, "answer") == "[A, per, B, org, peer]"
    assert (
        sft.target_text(example, "cot")
        == "<think>\nwhy\n</think>\n<answer>\n[A, per, B, org, peer]\n</answer>"
    )


# -------------------------------------------------------------------------------- the scripts, as the README
# runs them


def rows_of(path):
    return [row for _, row in data.read_jsonl(path)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sft_then_grpo_then_eval(arch, tiny, world, tmp_path):
    model, out = tiny(arch), tmp_path / "sft"
    val = f"--val {world}/val.jsonl --max-new-tokens 12"
    rank = "--lora-rank 8 --lora-alpha 16"
    run_script(
        f"03_sft.py --model {model} --data {world}/sft.jsonl {val} --out {out} --epochs 1 --lr 1e-3 {rank}"
    )
    rows = rows_of(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["loss"] < rows[0]["loss"] and "val_jmere_f1" in rows[-1]
    assert lora.read_recipe(out / "best").prompt == "reason"
    assert json.loads((out / "config.json").read_text())["lora_rank"] == 8
    card = (out / "best" / "README.md").read_text()
    assert (
        f"base_model: {model}" in card and "training data" in card and "More Information Needed" not in card
    )

    options = "--no-val --group-size 4 --epochs 0.5 --max-new-tokens 12 --lr 1e-3"
    adapter = f"--adapter {out}/best"  # the base model is the adapter's
    command = f"04_grpo.py {adapter} --data {world}/train.jsonl {options} --out {tmp_path}/grpo"
    _, stdout, _ = run_script(command, ranks=2)
    rows = rows_of(tmp_path / "grpo" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and rows[0]["kl"] == 0
    assert {"reward", "entropy", "cut_off", "grad_norm"} <= set(rows[0])
    samples = rows_of(tmp_path / "grpo" / "samples.jsonl")  # of the first step
    assert len(samples) == 2 * 2 * 4  # ranks × prompts × group
    assert "2 ranks" in stdout

    # plain transformers + peft read the folder and write the same text
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    plain = AutoModelForImageTextToText.from_pretrained(model)
    plain = PeftModel.from_pretrained(plain, out / "best").eval()
    processor = vlm.load_processor(str(model))
    example = data.load_examples(world / "test.jsonl")[0]
    item = (common.REASON_PROMPT.format(text=example.text), example.image)
    inputs = plain_inputs(processor, item)
    ids = plain.generate(
        **inputs,
        max_new_tokens=12,
        do_sample=False,
        suppress_tokens=vlm.image_ids(plain),
        repetition_penalty=1.0,
    )
    text = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    command = f"05_eval.py --model {model} {adapter} --data {world}/test.jsonl --out {tmp_path}/test"
    run_script(command, "--max-new-tokens 12 --temperature 0")
    first = rows_of(tmp_path / "test" / "predictions.jsonl")[0]
    assert first["id"] == example.id and first["responses"][0]["text"] == text


def test_merge_writes_one_model_and_proves_it(tiny, tmp_path):
    model, processor = vlm.load(str(tiny("llava")))
    model = lora.add_lora(model, 4, 8)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # B starts at 0: an adapter that was never trained is refused
            torch.nn.init.normal_(parameter, std=0.1)
    lora.save_adapter(model, processor, tmp_path / "best", lora.Recipe("reason"), "")
    merge = f"05_eval.py --model {tiny('llava')} --adapter {tmp_path}/best --merge {tmp_path}/merged"
    _, stdout, _ = run_script(merge)
    assert "merged in float32" in stdout and "allowed 1e-04" in stdout
    assert (tmp_path / "merged" / "model.safetensors").exists()
    code, _, stderr = run_script(merge, fails=True)
    assert code == 2 and "exists already" in stderr


def test_only_rl_and_the_answer_alone(tiny, world, tmp_path):
    """GRPO from the base; SFT on the answer alone, and GRPO from there: the adapter decides which prompt."""
    model = f"--model {tiny('qwen2_5_vl')}"
    rank = "--lora-rank 4 --lora-alpha 8"
    options = f"--data {world}/train.jsonl --no-val --limit 4 --epochs 1 --batch-size 1"
    sampling = "--group-size 2 --max-new-tokens 8"
    run_script(f"04_grpo.py --only-rl {model} {options} --out {tmp_path}/rl {sampling} {rank}")
    assert rows_of(tmp_path / "rl" / "metrics.jsonl")[0]["kl"] == 0
    sft = f"03_sft.py {model} {options} --out {tmp_path}/sft --target answer --grad-accum 2 {rank}"
    run_script(sft, ranks=2)
    assert [row["step"] for row in rows_of(tmp_path / "sft" / "metrics.jsonl")] == [1]
    assert lora.read_recipe(tmp_path / "sft" / "best").prompt == "direct"
    run_script(f"04_grpo.py --adapter {tmp_path}/sft/best {options} --out {tmp_path}/direct {sampling}")
    assert lora.read_recipe(tmp_path / "direct" / "best").prompt == "direct"


def test_reward_follows_the_prompt():
    gold = (common.quintuple("A", "per", "B", "org", "peer"),)
    example = data.Example("i", "t", "x.png", gold, {})
    for prompt, text in (
        ("direct", "[A, per, B, org, peer]"),
        ("reason", common.format_response("so", gold)),
    ):
        args = SimpleNamespace(prompt=prompt, alpha=0.2, beta=0.1)
        parts = grpo.reward(rollout.Sample(text, [1], True), example, args)
        assert parts == {"reward": pytest.approx(1.5), "accuracy": 1, "partial": 2, "format": 1}
        args.prompt = "reason" if prompt == "direct" else "direct"
        assert grpo.reward(rollout.Sample(text, [1], True), example, args)["reward"] == 0


def test_bad_input_is_one_line(tiny, world, tmp_path):
    good = rows_of(world / "train.jsonl")[0]
    unlabelled = {name: value for name, value in good.items() if name != "quintuples"}
    (tmp_path / "gone.jsonl").write_text(json.dumps({**good, "image": "gone.png"}) + "\n")
    (tmp_path / "broken.jsonl").write_text("{broken\n")
    (tmp_path / "no_gold.jsonl").write_text(json.dumps(unlabelled) + "\n")
    model, train = f"--model {tiny('llava')}", f"--data {world}/train.jsonl"
    wrong = [
        (f"03_sft.py {model} --data {tmp_path}/gone.jsonl --target answer", "no such file"),
        (f"03_sft.py {model} --data {tmp_path}/broken.jsonl", "broken.jsonl:1: not JSON"),
        (f"03_sft.py {model} {train}", "train.jsonl:1: missing 'cot' (made by 01_distill.py)"),
        (f"04_grpo.py --only-rl --data {tmp_path}/no_gold.jsonl", "no_gold.jsonl:1: missing 'quintuples'"),
        (f"04_grpo.py --only-rl --model {tmp_path} {train}", "not a model folder, nor a hub model"),
        (f"04_grpo.py --adapter {world} {train}", "no adapter_config.json in it"),
        (f"04_grpo.py --adapter {world} --only-rl {train}", "--only-rl not allowed with argument --adapter"),
        (f"04_grpo.py --only-rl {train} --group-size 1", "--group-size 1: expected at least 2"),
    ]
    for command, message in wrong:
        options = f"--no-val --batch-size 1 --out {tmp_path}/out"
        code, _, stderr = run_script(command, options, fails=True)
        errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(errors) == 1 and message in errors[0], (command, stderr)


def test_an_adapter_of_another_model_is_refused(tiny, tmp_path):
    model, processor = vlm.load(str(tiny("qwen2_5_vl")))
    lora.save_adapter(lora.add_lora(model, 4, 8), processor, tmp_path / "best", lora.Recipe("reason"), "")
    other, _ = vlm.load(str(tiny("llava")))
    other.model.language_model.layers = other.model.language_model.layers[:2]
    with pytest.raises(InputError, match="does not fit this --model|do not fit this --model"):
        lora.load_adapter(other, str(tmp_path / "best"))
