"""The prompt computed once: packed rows and shared caches against the plain path and against plain
transformers."""

import pytest
import torch
from conftest import ARCHITECTURES, run_script, stage

import common
from lib import data, lora, rollout, vlm

LENGTHS = [[5, 1, 12], [9, 3, 2]]  # response tokens of two groups, ragged, one of length 1
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=ARCHITECTURES)
def loaded(request, tiny, world):
    """Tiny model with a LoRA that does something, processor, two prompts of different length as items."""
    model, processor = vlm.load(str(tiny(request.param)))
    torch.manual_seed(0)
    model = lora.add_lora(model, 8, 16)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    examples = data.load_examples(world / "train.jsonl", None, need=("quintuples",))
    items = [(common.REASON_PROMPT.format(text=examples[0].text), examples[0].image)]
    items.append((common.DIRECT_PROMPT.format(text=examples[1].text), examples[1].image))
    return model.eval(), processor, items


def decoder_config(model):
    return vlm.base_model(model).model.language_model.config


def completions_of(model, lengths):
    legal = torch.tensor([i for i in range(10, 200) if i not in vlm.image_ids(model)])
    generator = torch.Generator().manual_seed(1)
    return [
        [legal[torch.randint(len(legal), (n,), generator=generator)].tolist() for n in group]
        for group in lengths
    ]


def transformers_logps(model, processor, items, completions, temperature=1.0):
    """Log-probs [N, C] by the model's own forward pass, a row at a time: ids, image and token types in,
    logits out."""
    rows = []
    for (text, image), group in zip(items, completions, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": text}]
        chat = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = processor(text=[chat], images=[data.load_image(image)], return_tensors="pt")
        for ids in group:
            whole = dict(inputs, input_ids=torch.cat([inputs["input_ids"], torch.tensor([ids])], 1))
            whole["attention_mask"] = torch.ones_like(whole["input_ids"])
            if "mm_token_type_ids" in inputs:
                whole["mm_token_type_ids"] = torch.nn.functional.pad(
                    inputs["mm_token_type_ids"], (0, len(ids))
                )
            logits = model(**whole).logits[0, -len(ids) - 1 : -1].float() / temperature
            rows.append(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def loss_and_gradients(model, logps, mask):
    """04's loss on made-up advantages and reference → loss, all LoRA gradients as one vector."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(2)
    advantages = torch.randn(len(logps), generator=generator)
    ref_logps = logps.detach() + 0.3 * torch.randn(logps.shape, generator=generator)
    weights = mask / mask.sum(1, keepdim=True) / len(mask)
    loss, _ = stage("04_grpo").grpo_loss(logps, logps.detach(), ref_logps, advantages, weights, 0.1)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten().float() for p in model.parameters() if p.requires_grad])


def off(a, b):
    """Relative difference of two tensors, L2."""
    return ((a - b).norm() / b.norm()).item()


def compare(model, processor, items, lengths, attention="sdpa", checkpointing=False, temperature=0.7):
    """→ relative differences of packed log-probs, loss and gradients from {plain path, transformers}."""
    completions, config, found = completions_of(model, lengths), decoder_config(model), {}
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    prompts = vlm.encode(model, processor, items)
    try:
        logps, _, mask = rollout.completion_logps(model, prompts, completions, temperature)
        packed = (logps.detach(), *loss_and_gradients(model, logps, mask))
        for name in ("plain", "transformers"):
            config._attn_implementation = attention
            if name == "plain":
                logps = rollout.completion_logps(
                    model, prompts, completions, temperature, shared_prefix=False
                )[0]
            else:
                logps = transformers_logps(model, processor, items, completions, temperature)
            other = (logps.detach(), *loss_and_gradients(model, logps, mask))
            found[name] = [off(ours, theirs) for ours, theirs in zip(packed, other, strict=True)]
    finally:
        config._attn_implementation = vlm.SHARED_PREFIX
        model.gradient_checkpointing_disable()
        model.eval()
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_packed_row_equals_plain_and_transformers(loaded, attention, checkpointing, groups):
    model, processor, items = loaded
    found = compare(model, processor, items[:groups], LENGTHS[:groups], attention, checkpointing)
    for name, (logps, loss, gradients) in found.items():
        assert max(logps, loss, gradients) <= TOLERANCE, (
            f"{name}: log-probs {logps:.1e}, loss {loss:.1e}, gradients {gradients:.1e}"
        )


@pytest.mark.parametrize("fault", ["position", "neighbour", "head"])
def test_the_comparison_can_fail(loaded, fault, monkeypatch):
    model, processor, items = loaded
    if fault == "position":  # responses begin one place late
        right = vlm.response_positions
        monkeypatch.setattr(vlm, "response_positions", lambda prompt, length: right(prompt, length) + 1)
    elif fault == "neighbour":  # responses see nothing of their own
        monkeypatch.setattr(
            rollout.Packed,
            "_mask",
            lambda self, size, length, query: torch.zeros(query.shape[2], size + length),
        )
    else:  # the state of the token itself, not of the one before it
        right = rollout._hidden_shared
        monkeypatch.setattr(rollout, "_hidden_shared", lambda *args: right(*args).roll(-1, 0))
    _, loss, gradients = compare(model, processor, items[:1], LENGTHS[:1])["transformers"]
    assert gradients > 1e-3, f"gradients differ by {gradients:.1e} only"


def test_bf16_is_as_near_to_fp32_as_the_plain_path(loaded):
    """Measured against fp32 log-probs and gradients of the same weights; bf16's own noise is what the plain
    path shows."""
    model, processor, items = loaded
    completions = completions_of(model, LENGTHS)
    weights = {name: value.clone() for name, value in model.state_dict().items()}

    def run(shared_prefix):
        logps, _, mask = rollout.completion_logps(
            model, vlm.encode(model, processor, items), completions, 1.0, shared_prefix
        )
        return logps.detach(), loss_and_gradients(model, logps, mask)[1]

    try:
        model.bfloat16()  # bf16 weights, then the same numbers in fp32
        rounded = {name: value.clone() for name, value in model.state_dict().items()}
        shared, plain = run(True), run(False)
        model.float().load_state_dict(rounded)
        exact = run(False)
    finally:
        model.float().load_state_dict(weights)
        model.zero_grad()
    for what, ours, theirs, truth in zip(("log-probs", "gradients"), shared, plain, exact, strict=True):
        from_fp32 = f"shared {off(ours, truth):.1e}, plain {off(theirs, truth):.1e}"
        print(f"bf16 {what} from fp32: {from_fp32}; {off(ours, theirs):.1e} apart")
        assert off(ours, truth) <= 2 * off(theirs, truth)


@pytest.mark.parametrize("scale", [1, 40])
def test_head_and_loss_in_one_equal_autograd(monkeypatch, scale):
    """Tiles of 4 of 17 words, also where one word has nearly all the probability, against autograd in
    float64."""
    monkeypatch.setattr(rollout, "VOCABULARY_TILE", 4)
    torch.manual_seed(0)
    weight, targets = torch.randn(17, 6, dtype=torch.float64) * scale, torch.randint(17, (11,))
    hidden = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    logps, entropy = rollout.TokenLogps.apply(hidden.float(), weight.float(), targets, 0.7)
    expected = (hidden @ weight.T / 0.7).log_softmax(-1)
    slope = torch.randn(11, dtype=torch.float64)
    ours = torch.autograd.grad(logps @ slope.float(), hidden)[0]
    theirs = torch.autograd.grad(expected.gather(1, targets[:, None])[:, 0] @ slope, hidden)[0]
    assert off(logps, expected.gather(1, targets[:, None])[:, 0]) < 2e-6 and off(ours, theirs) < 2e-6
    exact = -(expected.exp() * expected).sum(-1)
    assert (entropy - exact).abs().max() < 1e-5 and not entropy.requires_grad
    with torch.no_grad():
        again, none = rollout.TokenLogps.apply(hidden.float(), weight.float(), targets, 0.7)
    assert torch.equal(again, logps) and not none.any()


def test_the_logits_of_all_tokens_never_exist(loaded, monkeypatch):
    """[T, V] is never there, nor any tensor as large, in the head's pass and its backward.

    The decoder's own states are made before: in its last layer they have T rows too.
    """
    model, processor, items = loaded
    monkeypatch.setattr(rollout, "VOCABULARY_TILE", 16)
    completions = completions_of(model, LENGTHS)
    prompts = vlm.encode(model, processor, items)
    hidden = rollout._hidden_shared(model, prompts, completions).detach().requires_grad_()
    monkeypatch.setattr(rollout, "_hidden_shared", lambda *_: hidden)
    tokens = sum(len(ids) for group in completions for ids in group)
    vocabulary = decoder_config(model).vocab_size
    widest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim == 2 and out.shape[0] == tokens:
                widest.append(out.shape[1])
            return out

    with Watch():
        logps, _, mask = rollout.completion_logps(model, prompts, completions)
        logps[mask].sum().backward()
    assert hidden.grad.any() and widest and max(widest) < vocabulary / 4


@pytest.mark.parametrize("static", [False, True])
def test_looks_at_the_device_once_in_sixteen_tokens(loaded, static, monkeypatch):
    """What makes a GPU wait is counted: reading numbers back (item, tolist), and shapes that depend on
    numbers (nonzero)."""
    model, processor, items = loaded
    monkeypatch.setitem(rollout.LOOK_EVERY, "cpu", 16)
    monkeypatch.setattr(vlm, "stop_ids", lambda *_: [-1])
    waiting = ("_local_scalar_dense", "nonzero", "unique", "is_nonzero", "equal")
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if any(name in str(function) for name in waiting):
                seen.append(str(function))
            return function(*args, **(kwargs or {}))

    prompts = vlm.encode(model, processor, items)
    counts = []
    for tokens in (16, 48, 80):
        seen.clear()
        with Watch():
            rollout.sample(model, processor, prompts, 3, tokens, 1.0, static=static)
        counts.append(len(seen))
    print(f"static {static}: {counts} waits for 16, 48, 80 tokens: {seen[:6]}")
    assert counts[1] - counts[0] <= 2 and counts[2] - counts[1] <= 2


def test_late_looks_change_no_response(loaded, monkeypatch):
    """Rows that are done go on unseen until the next look: what they draw then is no part of their
    response."""
    model, processor, items = loaded
    monkeypatch.setattr(vlm, "stop_ids", lambda *_: list(range(0, 120)))
    prompts = vlm.encode(model, processor, items)
    found = []
    for every in (1, 7):
        monkeypatch.setitem(rollout.LOOK_EVERY, "cpu", every)
        groups = rollout.sample(model, processor, prompts, 4, 20, 1.0, keys=["a", "b"])
        found.append([sample.completion_ids for group in groups for sample in group])
    assert found[0] == found[1] and len({len(ids) for ids in found[0]}) > 2


def test_reference_and_policy_start_bitwise_equal(loaded):
    model, processor, items = loaded
    prompts, completions = vlm.encode(model, processor, items), completions_of(model, LENGTHS)
    model.train()
    policy, _, _ = rollout.completion_logps(model, prompts, completions)
    model.eval()
    with torch.no_grad():
        again, _, _ = rollout.completion_logps(model, prompts, completions)
    assert policy.requires_grad and torch.equal(policy, again)


# -------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("static", [False, True])
def test_greedy_tokens_equal_generate(loaded, static):
    """Four rows of two prompts of different length, LoRA on, against `generate` of a plain transformers
    model."""
    model, processor, items = loaded
    items = [*items, items[1], items[0]]
    ours = rollout.generate(model, processor, items, n=2, max_new_tokens=80, temperature=0.0, static=static)
    config = decoder_config(model)
    try:
        config._attn_implementation = "sdpa"
        for (text, image), samples in zip(items, ours, strict=True):
            content = [{"type": "image"}, {"type": "text", "text": text}]
            chat = processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            inputs = processor(text=[chat], images=[data.load_image(image)], return_tensors="pt")
            plain = {
                "do_sample": False,
                "suppress_tokens": vlm.image_ids(model),
                "repetition_penalty": 1.0,
                "temperature": None,
            }
            expected = model.generate(**inputs, max_new_tokens=80, **plain)[
                0, inputs["input_ids"].shape[1] :
            ].tolist()
            assert [sample.completion_ids for sample in samples] == [expected, expected]
    finally:
        config._attn_implementation = vlm.SHARED_PREFIX


@pytest.mark.parametrize("static", [False, True])
def test_sampled_tokens_equal_a_loop_without_cache(loaded, static, monkeypatch):
    """Ragged ends: many ids stop a response, so rows and whole prompts leave the batch at different steps."""
    model, processor, items = loaded
    monkeypatch.setattr(rollout.Decoding, "GROW", {False: 4, True: 4})
    monkeypatch.setattr(vlm, "stop_ids", lambda *_: list(range(0, 120)))
    prompts = vlm.encode(model, processor, [*items, items[0]])
    groups = rollout.sample(model, processor, prompts, 4, 20, 1.0, keys=["a", "b", "c"], static=static)
    lengths = {len(sample.completion_ids) for group in groups for sample in group}
    assert len(lengths) > 3 and all(
        s.finished == (s.completion_ids[-1] < 120) for group in groups for s in group
    )
    base = vlm.base_model(model)
    for prompt, key, group in zip(prompts, "abc", groups, strict=True):
        noise = rollout.uniforms(4, 20, key)
        for row, sample in enumerate(group):
            for step, token in enumerate(sample.completion_ids):
                before = torch.tensor(sample.completion_ids[:step], dtype=torch.long)
                with torch.no_grad():
                    response = vlm.respond(prompt, base.get_input_embeddings()(before))
                    inputs = vlm.decoder_inputs([vlm.join([prompt, response])])
                    hidden = base.model.language_model(**inputs, use_cache=False)
                    logits = base.lm_head(hidden.last_hidden_state[:, -1])
                logits[:, vlm.image_ids(model)] = -torch.inf
                assert rollout._draw(logits, 1.0, 1.0, noise[row : row + 1, step])[0].item() == token


def test_sampling_leaves_the_model_as_it_was(loaded):
    model, processor, items = loaded
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rollout.sample(model, processor, vlm.encode(model, processor, items), 2, 4, 1.0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_disabled_adapter_samples_the_base(loaded, tiny):
    model, processor, items = loaded
    plain, _ = vlm.load(str(tiny(vlm.base_model(model).config.model_type)))
    with model.disable_adapter():
        ours = rollout.generate(model, processor, items, max_new_tokens=12, temperature=0.0)
    theirs = rollout.generate(plain, processor, items, max_new_tokens=12, temperature=0.0)
    assert [s.completion_ids for [s] in ours] == [s.completion_ids for [s] in theirs]


# -------------------------------------------------------------------------------- 04


def test_pack_rows_by_hand():
    grpo, sizes, lengths = stage("04_grpo"), [10, 4], [[5, 1, 12], [9, 3, 2]]
    assert grpo.pack_rows(sizes, lengths) == [(0, [2, 0, 1]), (1, [0, 1, 2])]  # 28 and 18 tokens
    assert grpo.pack_rows(sizes, lengths, limit=16) == [
        (0, [2]),
        (0, [0, 1]),
        (1, [0, 1]),
        (1, [2]),
    ]  # 22, 16, 16, 6
    assert (
        grpo.pack_rows(sizes, lengths, skip={0}) == [(1, [0, 1, 2])]
        and grpo.pack_rows(sizes, lengths, skip={0, 1}) == []
    )
    rows = grpo.pack_rows(sizes, lengths, limit=16)
    assert grpo.row_positions(rows, sizes, lengths, True) == (10 + 4 + 32, 22 + 16 + 16 + 6)
    assert grpo.row_positions(grpo.pack_rows(sizes, lengths), sizes, lengths, True) == (46, 46)
    assert grpo.row_positions(grpo.pack_rows(sizes, lengths), sizes, lengths, False) == (46, 3 * 22 + 3 * 13)


def test_split_group_has_the_gradient_of_the_whole(loaded):
    model, processor, items = loaded
    grpo, lengths = stage("04_grpo"), LENGTHS[0]
    [ids], prompts = completions_of(model, [lengths]), vlm.encode(model, processor, items[:1])
    ref_logps, advantages = -torch.rand(3, 12) - 5, torch.tensor([1.0, -2.0, 0.5])

    def gradient(limit):
        model.zero_grad()
        total, rows = 0.0, grpo.pack_rows([len(prompts[0].embeds)], [lengths], limit)
        for _, row in rows:
            logps, _, mask = rollout.completion_logps(model, prompts, [[ids[i] for i in row]])
            weights = [grpo.token_weight(lengths[i], len(lengths), sum(lengths)) for i in row]
            weights = torch.tensor(weights)[:, None] * mask
            ref = ref_logps[row, : logps.shape[1]]
            loss, _ = grpo.grpo_loss(logps, logps.detach(), ref, advantages[row], weights, 0.1)
            loss.backward()
            total += loss.item()
        return len(rows), total, torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    one, loss, whole = gradient(None)
    two, split_loss, split = gradient(len(prompts[0].embeds) + 12)
    assert (
        (one, two) == (1, 2)
        and off(split, whole) <= TOLERANCE
        and abs(split_loss - loss) <= TOLERANCE * abs(loss)
    )


REWARDS = """
import importlib, sys
import common
grpo = importlib.import_module("04_grpo")
def reward(sample, example, args):  # differs within every group but one
    same = str(example.quintuples) == {constant!r}
    return real(sample, example, args) | {{"reward": 0.5 if same else sum(map(ord, sample.text)) % 7 / 7}}
real, grpo.reward = grpo.reward, reward
sys.exit(grpo.main(grpo.parse_args()))
"""


def test_every_way_to_compute_an_update_gives_the_same(tiny, world, tmp_path):
    """Shared, plain, and on two ranks split into rows with the constant group left out, so that one rank has
    more to do."""
    constant = str(data.load_examples(world / "train.jsonl")[0].quintuples)
    (tmp_path / "grpo.py").write_text(REWARDS.format(constant=constant))
    shared = (
        f"--only-rl --model {tiny('qwen2_5_vl')} --data {world}/train.jsonl --no-val --limit 4 --epochs 1"
    )
    shared += " --lora-rank 4 --group-size 3 --max-new-tokens 8"
    ways = {
        "shared": ("--batch-size 4", None),
        "plain": ("--batch-size 4 --no-shared-prefix", None),
        "split": ("--batch-size 2 --skip-constant-groups --pack-tokens 150 --gradient-checkpointing", 2),
    }
    rows = {}
    for name, (options, ranks) in ways.items():
        out = tmp_path / name
        run_script(tmp_path / "grpo.py", shared, options, "--out", out, ranks=ranks)
        [rows[name]] = [row for _, row in data.read_jsonl(out / "metrics.jsonl")]
    first = rows["shared"]
    assert (
        first["grad_norm"] > 0
        and first["constant_groups"] == 0.25
        and first["waste"] == 0 < min(rows[n]["waste"] for n in ("plain", "split"))
    )
    for row in rows.values():
        assert row["kl"] == 0 and row["constant_groups"] == 0.25
        assert row["grad_norm"] == pytest.approx(first["grad_norm"], rel=TOLERANCE)
        assert row["reward"] == pytest.approx(first["reward"], rel=1e-9)
