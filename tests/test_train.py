"""vlm.py, 03 and 04: the loss against TRL's, the model against plain transformers, the scripts as the README runs them."""

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
from lib import data, rollout, training, vlm

sft, grpo = stage("03_sft"), stage("04_grpo")

# ------------------------------------------------------------------------------------------------ GRPO's formulas


def trl_loss(logps, ref_logps, advantages, mask, kl_coef):
    """TRL's own loss code on the same numbers: loss_type grpo, k3 as in the paper, one update. Everything else it reads is off."""
    from trl import GRPOTrainer

    trainer = SimpleNamespace(
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x),
        model=SimpleNamespace(training=True),
        beta=kl_coef,
        loss_type="grpo",
        epsilon_low=0.2,
        epsilon_high=0.2,
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        current_gradient_accumulation_steps=1,
        use_vllm=False,
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
    return GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize("seed", range(5))
def test_loss_and_gradient_equal_trl(seed):
    torch.manual_seed(seed)
    groups, size, length, kl_coef = 3, 4, 7, [0.0, 0.01, 0.5][seed % 3]
    n = groups * size
    logps = (-torch.rand(n, length) * 3).requires_grad_()
    ref_logps, rewards = -torch.rand(n, length) * 3, torch.rand(groups, size)
    mask = torch.arange(length)[None] < torch.randint(1, length + 1, (n, 1))
    advantages = (
        (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    ).flatten()  # as TRL computes them
    torch.testing.assert_close(grpo.group_advantages(rewards).flatten(), advantages, rtol=1e-5, atol=1e-6)
    loss, _ = grpo.grpo_loss(logps, ref_logps, grpo.group_advantages(rewards).flatten(), mask, kl_coef)
    [gradient] = torch.autograd.grad(loss, logps)
    theirs = trl_loss(logps, ref_logps, advantages, mask, kl_coef)
    [their_gradient] = torch.autograd.grad(theirs, logps)
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-5, atol=1e-7)


def test_loss_by_hand():
    logps, ref = (
        torch.tensor([[math.log(0.5), -9.0]], requires_grad=True),
        torch.tensor([[math.log(0.25), 5.0]]),
    )
    mask = torch.tensor([[True, False]])
    loss, metrics = grpo.grpo_loss(logps, ref, torch.tensor([2.0]), mask, 0.1)
    k3 = 0.5 - math.log(0.5) - 1
    assert metrics["kl"] == pytest.approx(k3) and loss.item() == pytest.approx(-(2 - 0.1 * k3))
    loss.backward()
    assert logps.grad[0, 0].item() == pytest.approx(-(2 - 0.1 * (1 - 0.5))) and logps.grad[0, 1] == 0


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
    good, bad = common.Reward(1.5, 1.0, 2.0, 1.0), common.Reward(0.0, 0.0, 0.0, 0.0)
    sample = rollout.Sample("", [1, 2, 3], True)
    rewards, samples = (
        [[good, bad], [good, good]],
        [[sample, rollout.Sample("", [1], False)], [sample, sample]],
    )
    row = grpo.metrics_row(grpo.summarise(rewards, samples))
    assert (
        row["reward"] == 4.5 / 4
        and row["accuracy"] == 0.75
        and row["format"] == 0.75
        and row["constant_groups"] == 0.5
    )
    assert row["reward_std"] == pytest.approx(torch.tensor([1.5, 0, 1.5, 1.5]).std(correction=0).item())
    assert row["length"] == 2.5 and row["cut_off"] == 0.25


# ------------------------------------------------------------------------------------------------ data order, schedule


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


# ------------------------------------------------------------------------------------------------ the model against plain transformers


@pytest.fixture(scope="module", params=ARCHITECTURES)
def loaded(request, tiny, world):
    model, processor = vlm.load(str(tiny(request.param)))
    examples = data.load_examples(world / "test.jsonl")
    texts = [common.REASON_PROMPT, common.DIRECT_PROMPT]
    return (
        model,
        processor,
        [(text.format(text=example.text), example.image) for text, example in zip(texts, examples)],
    )


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
    for item, [sample] in zip(items, ours):
        inputs = plain_inputs(processor, item)
        out = model.generate(
            **inputs,
            max_new_tokens=24,
            do_sample=False,
            suppress_tokens=vlm.image_ids(model),
            repetition_penalty=1.0,
            temperature=None,
        )
        assert out[0, inputs["input_ids"].shape[1] :].tolist() == sample.ids


def test_logps_equal_the_plain_forward(loaded):
    model, processor, items = loaded
    rng = random.Random(0)
    legal = [i for i in range(10, 200) if i not in vlm.image_ids(model)]
    completions = [
        [[rng.choice(legal) for _ in range(length)] for length in lengths] for lengths in ((9, 1, 4), (2, 6))
    ]
    logps, entropy, mask = rollout.completion_logps(
        model, vlm.encode(model, processor, items), completions, temperature=0.7
    )
    assert logps.shape == entropy.shape == mask.shape == (5, 9) and mask.sum(1).tolist() == [9, 1, 4, 2, 6]
    rows = iter(range(5))
    for item, group in zip(items, completions):
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
    assert [s.ids for s in together[1]] == [s.ids for s in alone[0]]
    assert len({tuple(s.ids) for s in together[0]}) > 1
    parts = rollout.generate(
        model, processor, items[1:], n=3, max_new_tokens=8, temperature=1.0, keys=["b"], batch_rows=2
    )
    assert [s.ids for s in parts[0]] == [s.ids for s in alone[0]]


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
        drawn = rollout._draw(logits.expand(40000, 6), temperature, top_p, torch.rand(40000))
        torch.testing.assert_close(drawn.bincount(minlength=6) / 40000, probs, atol=0.01, rtol=0)
    assert rollout._draw(logits, 0.0, 1.0, None).item() == logits.argmax()


def test_special_tokens_in_a_tweet_are_text(loaded):
    model, processor, items = loaded
    special = " ".join(processor.tokenizer.all_special_tokens)
    prompt = vlm.encode(model, processor, [(common.DIRECT_PROMPT.format(text=special), items[0][1])])[0]
    assert torch.isfinite(prompt.embeds).all()


def test_lora_hits_the_language_model_only(loaded, tiny):
    model, _ = vlm.load(str(tiny(loaded[0].config.model_type)))
    model = vlm.add_lora(model, 4, 8)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = model.config.get_text_config().num_hidden_layers
    assert len(trained) == layers * 7 * 2 and all(
        "language_model.layers" in name and ".lora_" in name for name in trained
    )
    with pytest.raises(InputError, match="LoRA must train"):
        vlm.check_lora(model.requires_grad_(False))


# ------------------------------------------------------------------------------------------------ SFT's mask


def test_loss_covers_response_and_stop_id_and_nothing_else(loaded):
    """Against HF's own labels loss, where the prompt is -100."""
    model, processor, items = loaded
    stop = vlm.stop_ids(model, processor)[0]
    ids = sft.target_ids(processor.tokenizer, "<think>\nx\n</think>", stop)
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


# ------------------------------------------------------------------------------------------------ the scripts, as the README runs them


def rows_of(path):
    return [row for _, row in data.read_jsonl(path)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sft_then_grpo_then_eval(arch, tiny, world, tmp_path):
    lora = ("--lora-rank", 8, "--lora-alpha", 16)
    model, out = tiny(arch), tmp_path / "sft"
    val = ("--val", world / "val.jsonl", "--max-new-tokens", 12)
    run_script(
        "03_sft.py",
        "--model",
        model,
        "--data",
        world / "sft.jsonl",
        *val,
        "--out",
        out,
        "--epochs",
        1,
        "--lr",
        1e-3,
        *lora,
    )
    rows = rows_of(out / "metrics.jsonl")
    assert (
        [row["step"] for row in rows] == list(range(1, 9))
        and rows[-1]["loss"] < rows[0]["loss"]
        and "val_jmere_f1" in rows[-1]
    )
    assert (
        vlm.adapter_prompt(out / "best") == "reason"
        and json.loads((out / "config.json").read_text())["lora_rank"] == 8
    )

    grpo_data = (
        "--data",
        world / "train.jsonl",
        "--group-size",
        4,
        "--epochs",
        0.5,
        "--max-new-tokens",
        12,
        "--lr",
        1e-3,
    )
    _, stdout, _ = run_script(
        "04_grpo.py",
        "--model",
        model,
        "--adapter",
        out / "best",
        *grpo_data,
        "--out",
        tmp_path / "grpo",
        ranks=2,
    )
    rows = rows_of(tmp_path / "grpo" / "metrics.jsonl")
    assert (
        [row["step"] for row in rows] == [1, 2]
        and rows[0]["kl"] == 0
        and {"reward", "entropy", "cut_off", "grad_norm"} <= set(rows[0])
    )
    assert (
        len(rows_of(tmp_path / "grpo" / "samples.jsonl")) == 2 * 2 * 4
    )  # ranks × prompts × group, at the first step
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
    ev = ("--max-new-tokens", 12, "--temperature", 0)
    run_script(
        "05_eval.py",
        "--model",
        model,
        "--adapter",
        out / "best",
        "--data",
        world / "test.jsonl",
        "--out",
        tmp_path / "test",
        *ev,
    )
    first = rows_of(tmp_path / "test" / "predictions.jsonl")[0]
    assert first["id"] == example.id and first["responses"][0]["text"] == text


def test_merge_writes_one_model_and_proves_it(tiny, tmp_path):
    model, processor = vlm.load(str(tiny("llava")))
    model = vlm.add_lora(model, 4, 8)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(
                parameter, std=0.1
            )  # B starts at 0: an adapter that was never trained is refused
    vlm.save_adapter(model, processor, tmp_path / "best", "reason")
    merge = (
        "05_eval.py",
        "--model",
        tiny("llava"),
        "--adapter",
        tmp_path / "best",
        "--merge",
        tmp_path / "merged",
    )
    _, stdout, _ = run_script(*merge)
    assert "merged in float32" in stdout and "allowed 1e-04" in stdout
    assert (tmp_path / "merged" / "model.safetensors").exists()
    code, _, stderr = run_script(*merge, fails=True)
    assert code == 2 and "exists already" in stderr


def test_only_rl_and_answer_sft(tiny, world, tmp_path):
    model, lora = tiny("qwen2_5_vl"), ("--lora-rank", 4, "--lora-alpha", 8)
    data = ("--data", world / "train.jsonl", "--limit", 4, "--epochs", 1, "--batch-size", 1)
    run_script(
        "04_grpo.py",
        "--model",
        model,
        *data,
        "--out",
        tmp_path / "rl",
        "--group-size",
        2,
        "--max-new-tokens",
        8,
        *lora,
    )
    assert rows_of(tmp_path / "rl" / "metrics.jsonl")[0]["kl"] == 0
    run_script(
        "03_sft.py",
        "--model",
        model,
        *data,
        "--out",
        tmp_path / "sft",
        "--target",
        "answer",
        "--grad-accum",
        2,
        *lora,
        ranks=2,
    )
    assert [row["step"] for row in rows_of(tmp_path / "sft" / "metrics.jsonl")] == [1]
    assert vlm.adapter_prompt(tmp_path / "sft" / "best") == "direct"
    code, _, stderr = run_script(
        "04_grpo.py",
        "--model",
        model,
        "--adapter",
        tmp_path / "sft" / "best",
        *data,
        "--out",
        tmp_path / "no",
        fails=True,
    )
    assert code == 2 and "trained with the direct prompt" in stderr


def test_bad_input_is_one_line(tiny, world, tmp_path):
    model, data = tiny("llava"), world / "train.jsonl"
    (tmp_path / "gone.jsonl").write_text(json.dumps({**rows_of(data)[0], "image": "gone.png"}) + "\n")
    (tmp_path / "broken.jsonl").write_text("{broken\n")
    (tmp_path / "no_gold.jsonl").write_text(
        json.dumps({k: v for k, v in rows_of(data)[0].items() if k != "quintuples"}) + "\n"
    )
    base = {"--model": model, "--data": data, "--out": tmp_path / "out"}
    wrong = [
        ("03_sft.py", {"--data": tmp_path / "gone.jsonl", "--target": "answer"}, "no such file"),
        ("03_sft.py", {"--data": tmp_path / "broken.jsonl"}, "broken.jsonl:1: not JSON"),
        ("03_sft.py", {}, "train.jsonl:1: missing 'cot' (made by 01_distill.py)"),
        ("04_grpo.py", {"--data": tmp_path / "no_gold.jsonl"}, "no_gold.jsonl:1: missing 'quintuples'"),
        ("04_grpo.py", {"--model": tmp_path / "nothing"}, "not a model folder, nor a hub model"),
        ("04_grpo.py", {"--adapter": world}, "no adapter_config.json in it"),
        ("04_grpo.py", {"--group-size": 1}, "--group-size 1: expected at least 2"),
        (
            "04_grpo.py",
            {"--val": tmp_path / "none.jsonl"},
            "none.jsonl: cannot read (No such file or directory)",
        ),
    ]
    for script, change, message in wrong:
        code, _, stderr = run_script(
            script, *[part for pair in {**base, **change}.items() for part in pair], fails=True
        )
        errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(errors) == 1 and message in errors[0], (script, change, stderr)


def test_an_adapter_of_another_model_is_refused(tiny, tmp_path):
    model, processor = vlm.load(str(tiny("qwen2_5_vl")))
    vlm.save_adapter(vlm.add_lora(model, 4, 8), processor, tmp_path / "best", "reason")
    other, _ = vlm.load(str(tiny("llava")))
    other.model.language_model.layers = other.model.language_model.layers[:2]
    with pytest.raises(InputError, match="does not fit this --model|do not fit this --model"):
        vlm.load_adapter(other, str(tmp_path / "best"))
