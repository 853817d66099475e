"""variants/: each diff applies, is short, runs two updates, and computes what an independent formula says."""

import importlib
import inspect
import json
import random
import re
import shutil
import subprocess
import sys
import textwrap
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_script
from PIL import Image
from test_train import trl_loss
from trl import GRPOTrainer, RLOOTrainer
from trl.rewards import get_soft_overlong_punishment

import common
from lib import data, lora, training, vlm

NAMES = sorted(path.stem for path in (ROOT / "variants").glob("*.diff"))
OF_04 = [name for name in NAMES if name != "drop_thoughts"]
MOST_CHANGED_LINES = 22
GROUP = 4  # responses a prompt, of two prompts, in the runs of two updates
TOKENS = 8  # most of a response there
# A tiny model with random weights earns nothing and never stops: in these runs the rewards are made up, and
# its responses are cut to different lengths. The ids that are left are written down, a line a step.
FAULTS = """
import itertools, json, sys
import common
from lib import rollout
sys.path.insert(0, {folder!r})
def made_up(*values):
    endless = itertools.cycle(values)
    return lambda response, gold=None: next(endless)
common.accuracy_reward = made_up(0.0, 0.5, 1.0, 0.5, 0.0)
common.partial_reward = made_up(0.3, 1.0, 1.9, 0.7, 0.2, 1.1, 1.6)
common.format_reward = made_up(1.0, 0.0, 1.0)
sample = rollout.sample_in_parts
def cut(*args, **options):
    groups, rows = sample(*args, **options)
    lengths = itertools.cycle((8, 3, 5, 1, 7))
    for one in itertools.chain(*groups):
        length = next(lengths)
        one.completion_ids, one.logps = one.completion_ids[:length], one.logps[:length]
    with open({seen!r}, "a") as handle:
        handle.write(json.dumps([[one.completion_ids for one in group] for group in groups]) + chr(10))
    return groups, rows
rollout.sample_in_parts = cut
"""


def make(folder, name):
    """bash variants/make.sh NAME in a copy of the repository → what it did."""
    command = ["bash", "variants/make.sh", name]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def copy_of_the_scripts(folder):
    for script in ("03_sft.py", "04_grpo.py"):
        shutil.copy(ROOT / script, folder)
    shutil.copytree(ROOT / "variants", folder / "variants")
    return folder


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """A folder with every variant made."""
    folder = copy_of_the_scripts(tmp_path_factory.mktemp("copies"))
    for name in NAMES:
        done = make(folder, name)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def variant(copies):
    """variant(name) → the variant of 04 or 03 as a module."""
    sys.path.insert(0, str(copies))
    yield lambda name: importlib.import_module(script_of(name))
    sys.path.remove(str(copies))


def script_of(name):
    return f"04_grpo_{name}" if name in OF_04 else f"03_sft_{name}"


def rows_of(path):
    return [row for _, row in data.read_jsonl(path)]


# -------------------------------------------------------------------------------- the diffs


@pytest.mark.parametrize("name", NAMES)
def test_a_diff_is_short_and_has_one_place(name):
    head, *hunks = re.split(r"^@@.*@@.*\n", (ROOT / "variants" / f"{name}.diff").read_text(), flags=re.M)
    script = re.search("^copy from (.*)$", head, re.M)[1]
    text = (ROOT / script).read_text()
    changed = 0
    for hunk in hunks:
        lines = hunk.splitlines(keepends=True)
        changed += sum(line[0] in "+-" for line in lines)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        assert text.count(before) == 1, f"{name}: these lines are not there once:\n{before}"
    assert changed <= MOST_CHANGED_LINES
    told = [
        line for line in (ROOT / "variants" / "README.md").read_text().splitlines() if f"`{name}`" in line
    ]
    assert told[0].split("|")[4].strip() == str(changed)


def test_copies_are_clean(copies):
    command = ["ruff", "check", "--config", ROOT / "pyproject.toml", *copies.glob("0*_*_*.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_make_touches_no_file_that_is_there(tmp_path):
    folder = copy_of_the_scripts(tmp_path)
    mine = folder / "04_grpo_no_std.py"
    mine.write_text("mine")
    done = make(folder, "no_std")
    assert done.returncode == 2
    assert done.stderr == "error: 04_grpo_no_std.py is there already: move or delete it first\n"
    assert mine.read_text() == "mine"
    done = make(folder, "nostd")
    assert done.returncode == 2
    assert done.stderr == f"error: variant 'nostd': expected one of {' '.join(NAMES)}\n"


def test_make_says_that_the_script_has_changed(tmp_path):
    folder = copy_of_the_scripts(tmp_path)
    script = folder / "04_grpo.py"
    text = script.read_text()
    script.write_text("# a line more\n" * 30 + text)
    assert make(folder, "token_mean").stdout == "04_grpo_token_mean.py\n"  # elsewhere: it still applies
    script.write_text(text.replace("return 1 / (responses * length)", "return 2 / (responses * length)"))
    (folder / "04_grpo_token_mean.py").unlink()
    done = make(folder, "token_mean")
    assert done.returncode == 2
    assert "error: 04_grpo.py is no longer as variants/token_mean.diff expects it" in done.stderr
    assert not (folder / "04_grpo_token_mean.py").exists()


# -------------------------------------------------------------------------------- formulas, against TRL's own


def trl_advantages(
    parts, weights, scale_rewards="group", aggregation="sum_then_normalize", trainer=GRPOTrainer
):
    """TRL's own lines between rewards and advantages, run on parts [N, K] of N = B·G responses. → [N]."""
    source = inspect.getsource(trainer._generate_and_score_completions)
    if trainer is GRPOTrainer:
        start = source.index('        if self.multi_objective_aggregation == "sum_then_normalize":')
    else:
        start = source.index("        # Apply weights to each reward function's output and sum")
    end = source.index("        advantages = torch.nan_to_num(")
    itself = SimpleNamespace(
        multi_objective_aggregation=aggregation,
        scale_rewards=scale_rewards,
        reward_weights=torch.tensor(weights, dtype=torch.float64),
        reward_funcs=weights,
        reward_clip_range=None,
        beta=0.0,
        normalize_advantages=False,
    )
    names = {
        "self": itself,
        "torch": torch,
        "nanstd": sys.modules[trainer.__module__].nanstd,
        "rewards_per_func": parts.double(),
        "num_generations": GROUP,
        "device": "cpu",
        "unscorable_mask": torch.zeros(len(parts), dtype=torch.bool),
    }
    exec(textwrap.dedent(source[start:end]), names)
    return names["advantages"]


def rloo_loss(logps, advantages, mask):
    """TRL's own loss of RLOO, before its KL, which is part of the reward there."""
    trainer = SimpleNamespace(
        epsilon_low=0.2,
        epsilon_high=0.2,
        aux_loss_enabled=False,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logps, torch.zeros_like(logps), None),
    )
    nothing = torch.zeros_like(mask, dtype=torch.long)
    inputs = {"prompt_ids": nothing[:, :1], "prompt_mask": nothing[:, :1], "completion_ids": nothing}
    inputs |= {"completion_mask": mask.long(), "advantages": advantages}
    inputs["old_logps"] = (logps * mask).sum(1).detach()
    return RLOOTrainer._compute_loss(trainer, None, inputs)


def batch(seed):
    """Log-probs with a graph [N, C], those of the reference, rewards [B, G], mask [N, C]."""
    torch.manual_seed(seed)
    groups, length = 3, 7
    n = groups * GROUP
    logps = (-torch.rand(n, length) * 3).requires_grad_()
    mask = torch.arange(length)[None] < torch.randint(1, length + 1, (n, 1))
    rewards = torch.rand(groups, GROUP, dtype=torch.float64)
    rewards[1] = 0.7  # a constant group
    return logps, -torch.rand(n, length) * 3, rewards, mask


def our_gradient(module, logps, ref_logps, advantages, mask, kl_coef):
    """Loss of the module's own functions, and its gradient."""
    lengths = mask.sum(1).tolist()
    weights = [module.token_weight(length, len(mask), sum(lengths)) for length in lengths]
    weights = torch.tensor(weights)[:, None] * mask
    loss, _ = module.grpo_loss(logps, logps.detach(), ref_logps, advantages, weights, kl_coef)
    [gradient] = torch.autograd.grad(loss, logps)
    return loss, gradient


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "name, scale_rewards, loss_type", [("no_std", "none", "grpo"), ("token_mean", "group", "dapo")]
)
def test_gradient_equals_trl(variant, name, scale_rewards, loss_type, seed):
    logps, ref_logps, rewards, mask = batch(seed)
    module = variant(name)
    advantages = module.group_advantages(rewards).flatten()
    theirs = trl_advantages(rewards.reshape(-1, 1), [1.0], scale_rewards)
    assert_close(advantages, theirs)
    loss, gradient = our_gradient(module, logps, ref_logps, advantages, mask, 0.1)
    their_loss = trl_loss(logps, ref_logps, theirs.float(), mask, 0.1, loss_type)
    assert_close(loss, their_loss)
    assert_close(gradient, torch.autograd.grad(their_loss, logps)[0])


@pytest.mark.parametrize("seed", range(3))
def test_rloo_equals_trl(variant, seed):
    logps, ref_logps, rewards, mask = batch(seed)
    module = variant("rloo")
    advantages = module.group_advantages(rewards).flatten()
    assert_close(advantages, trl_advantages(rewards.reshape(-1, 1), [1.0], trainer=RLOOTrainer))
    loss, gradient = our_gradient(module, logps, ref_logps, advantages, mask, 0.0)
    their_loss = rloo_loss(logps, advantages, mask)
    # in value their ratio is 1 a response and ours 1 a token: only the gradients can be equal
    assert_close(gradient, torch.autograd.grad(their_loss, logps)[0])


@pytest.mark.parametrize("seed", range(3))
def test_std_of_the_batch_from_its_sums(variant, seed):
    _, _, rewards, _ = batch(seed)
    module = variant("batch_std")
    sums = {"responses": rewards.numel(), "reward sum": rewards.sum().item()}
    sums["reward squares"] = rewards.square().sum().item()
    advantages = module.group_advantages(rewards) / (module.batch_std(sums) + 1e-4)
    assert_close(advantages.flatten(), trl_advantages(rewards.reshape(-1, 1), [1.0], "batch"))


def test_masked_picture(variant, tmp_path):
    picture = tmp_path / "picture.png"
    Image.effect_noise((280, 300), 90).convert("RGB").save(picture)
    module = variant("papo")
    whole = data.load_image(picture)
    file = module.masked(picture, 0)
    masked = data.load_image(file)
    black = 0
    for left in range(0, 280, 14):
        for top in range(0, 300, 14):
            box = (left, top, min(left + 14, 280), min(top + 14, 300))
            patch = masked.crop(box)
            if patch.getextrema() == ((0, 0),) * 3:
                black += 1
            else:
                assert patch.tobytes() == whole.crop(box).tobytes()
    assert 0.5 < black / (20 * 22) < 0.7
    assert module.masked(picture, 0).getvalue() == file.getvalue()
    assert module.masked(picture, 1).getvalue() != file.getvalue()


# -------------------------------------------------------------------------------- two updates of each


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    """An adapter of the tiny model, not zero."""
    torch.manual_seed(0)
    model, processor = vlm.load(str(tiny("qwen2_5_vl")))
    model = lora.add_lora(model, 4, 8)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("adapter") / "best"
    lora.save_adapter(model, processor, folder, lora.Recipe("reason"), "")
    return folder


@pytest.fixture
def two_updates(zygote, copies, adapter, tiny, world, tmp_path):
    """two_updates(name, *options) → metrics rows, samples of step 1 as rows, and their token ids."""

    def run(name, *options):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        seen = tmp_path / f"{out.name}.seen"
        argv = [
            "--model",
            tiny("qwen2_5_vl"),
            "--adapter",
            adapter,
            "--data",
            world / "train.jsonl",
            "--no-val",
        ]
        argv += ["--group-size", GROUP, "--batch-size", 2, "--epochs", 0.25, "--max-new-tokens", TOKENS]
        argv += ["--lr", 1e-3, "--log-samples-every", 1, "--out", out, *options]
        patch = FAULTS.format(folder=str(copies), seen=str(seen))
        script = script_of(name) if name else "04_grpo"
        answer = zygote.run(script, argv, f"{out}.log", patch=patch)
        assert answer["code"] == 0, answer["text"]
        rows = rows_of(out / "metrics.jsonl")
        assert [row["step"] for row in rows] == [1, 2]
        assert rows[0]["kl"] == 0 and rows[1]["kl"] > 0 and rows[0]["grad_norm"] > 0
        samples = [row for row in rows_of(out / "samples.jsonl") if row["step"] == 1]
        first = json.loads(seen.read_text().splitlines()[0])
        ids = [one for group in first for one in group]
        assert len(samples) == len(ids) == 2 * GROUP
        return rows, samples, ids

    return run


def parts_of(samples):
    return torch.tensor([[row["accuracy"], row["partial"], row["format"]] for row in samples])


def expected_loss(weights, ids, samples):
    """Before the first update the ratio is 1 and KL 0: −Σ weight · A over tokens. weights: of one token."""
    lengths = [len(one) for one in ids]
    advantages = [row["advantage"] for row in samples]
    return -sum(w * c * a for w, c, a in zip(weights, lengths, advantages, strict=True))


@pytest.mark.parametrize(
    "name, scale_rewards, aggregation",
    [
        ("no_std", "none", "sum_then_normalize"),
        ("batch_std", "batch", "sum_then_normalize"),
        ("gdpo", "none", "normalize_then_sum"),
        ("token_mean", "group", "sum_then_normalize"),
    ],
)
def test_advantages_of_a_run_equal_trl(two_updates, name, scale_rewards, aggregation):
    rows, samples, ids = two_updates(name)
    parts = parts_of(samples)
    theirs = trl_advantages(parts, [1.0, 0.2, 0.1], scale_rewards, aggregation)
    ours = torch.tensor([row["advantage"] for row in samples])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, check_dtype=False)
    tokens = sum(len(one) for one in ids)
    weights = [1 / tokens if name == "token_mean" else 1 / (len(ids) * len(one)) for one in ids]
    assert rows[0]["loss"] == pytest.approx(expected_loss(weights, ids, samples), abs=1e-6)


def test_rloo_runs(two_updates):
    rows, samples, ids = two_updates("rloo")
    for place, row in enumerate(samples):
        start = place // GROUP * GROUP
        others = [samples[i]["reward"] for i in range(start, start + GROUP) if i != place]
        assert row["advantage"] == pytest.approx(row["reward"] - sum(others) / len(others), abs=1e-6)
    weights = [1 / len(ids)] * len(ids)
    assert rows[0]["loss"] == pytest.approx(expected_loss(weights, ids, samples), abs=1e-5)


def test_length_penalty_equals_trl(two_updates):
    rows, samples, ids = two_updates("length_penalty", "--length-coef", 0.5)
    penalties = get_soft_overlong_punishment(TOKENS, TOKENS)(ids)
    assert len(set(penalties)) > 1
    for row, penalty in zip(samples, penalties, strict=True):
        assert row["length_penalty"] == pytest.approx(penalty)
        plain = row["accuracy"] + 0.2 * row["partial"] + 0.1 * row["format"]
        assert row["reward"] == pytest.approx(plain + 0.5 * penalty)
    assert rows[0]["length_penalty"] == pytest.approx(sum(penalties) / len(penalties))


def test_hard_tweets_first(two_updates, world, tmp_path):
    examples = data.load_examples(world / "train.jsonl")
    right = {example.id: random.Random(example.id).randrange(4) for example in examples}
    lines = []
    for example in examples:
        texts = [common.format_response("x", example.quintuples)] * right[example.id]
        texts += ["<answer>[A, per, B, per, peer]</answer>"] * (3 - right[example.id])
        row = data.to_row(example, tmp_path / "predictions.jsonl") | {"prompt": "reason"}
        row["responses"] = [{"text": text, "finished": True} for text in texts]
        lines.append(data.jsonl_line(row))
    (tmp_path / "predictions.jsonl").write_text("".join(lines))
    _, samples, _ = two_updates("hard_first", "--votes", tmp_path)
    places = list(right)
    hardest = sorted(right, key=lambda name: (right[name], places.index(name)))
    assert list(dict.fromkeys(row["id"] for row in samples)) == hardest[:2]
    (tmp_path / "predictions.jsonl").write_text(lines[0])
    with pytest.raises(AssertionError, match=f"error: --votes .*: no answer to id {examples[1].id}"):
        two_updates("hard_first", "--votes", tmp_path)


def test_papo_adds_the_gap_between_seeing_and_not(two_updates, variant, adapter, tiny, world):
    """With weight 0 it is 04; else its loss falls by weight × k3, here of the model's own forward passes."""
    plain, samples, ids = two_updates("")
    clock = {name for name in plain[0] if "second" in name or "memory" in name}
    without, _, _ = two_updates("papo", "--perception-coef", 0)
    for ours, theirs in zip(without, plain, strict=True):
        assert {k: v for k, v in ours.items() if k not in clock} == {
            k: v for k, v in theirs.items() if k not in clock
        }
    rows, _, _ = two_updates("papo", "--perception-coef", 5)
    model, processor = vlm.load(str(tiny("qwen2_5_vl")))
    model = lora.load_adapter(model, str(adapter))
    examples = {example.id: example for example in data.load_examples(world / "train.jsonl")}
    gaps = []
    for row, one in zip(samples, ids, strict=True):
        example = examples[row["id"]]
        text = common.REASON_PROMPT.format(text=example.text)
        logps = []
        for picture in (example.image, variant("papo").masked(example.image, 0)):
            with torch.no_grad():
                logits = vlm.own_logits(model, processor, text, picture, one)[:-1]
            logps.append(logits.log_softmax(-1).gather(1, torch.tensor(one)[:, None])[:, 0].double())
        seeing, blind = logps
        gaps.append(((blind - seeing).exp() - (blind - seeing) - 1).mean().item())
    expected = plain[0]["loss"] - 5 * sum(gaps) / len(gaps)
    assert sum(gaps) > 1e-4
    assert rows[0]["loss"] == pytest.approx(expected, rel=1e-3)
    assert rows[0]["grad_norm"] != pytest.approx(plain[0]["grad_norm"], rel=1e-5)


def test_thoughts_dropped(zygote, copies, tiny, world, tmp_path):
    """A third of the targets has an empty thought, whatever the ranks: drawn by seed, step and place."""
    seen = tmp_path / "seen"
    spy = f"""
import sys, common
sys.path.insert(0, {str(copies)!r})
format_response = common.format_response
def spied(cot, quintuples):
    with open({str(seen)!r}, "a") as handle:
        handle.write(("kept" if cot else "dropped") + chr(10))
    return format_response(cot, quintuples)
common.format_response = spied
"""
    argv = ["--model", tiny("qwen2_5_vl"), "--data", world / "sft.jsonl", "--no-val", "--lora-rank", 4]
    argv += [
        "--batch-size",
        4,
        "--epochs",
        0.5,
        "--lr",
        1e-3,
        "--out",
        tmp_path / "out",
        "--drop-thoughts",
        0.4,
    ]
    answer = zygote.run("03_sft_drop_thoughts", argv, tmp_path / "log", patch=spy)
    assert answer["code"] == 0, answer["text"]
    rows = rows_of(tmp_path / "out" / "metrics.jsonl")
    assert len(rows) == 2
    drawn = [random.Random(f"0:{step}:{place}").random() for step in range(2) for place in range(4)]
    told = seen.read_text().split()
    assert told[-8:] == ["dropped" if x < 0.4 else "kept" for x in drawn]
    assert {"dropped", "kept"} == set(told)
    # the empty thought is trained on: its rows are shorter
    processor = vlm.load_processor(str(tiny("qwen2_5_vl")))
    examples = data.load_examples(world / "sft.jsonl", need=("quintuples", "cot"))
    for step, row in enumerate(rows):
        tokens = 0
        for place, index in enumerate(training.batch_indices(len(examples), 4, step, 0)):
            example = examples[index]
            cot = "" if drawn[4 * step + place] < 0.4 else example.row["cot"]
            text = common.format_response(cot, example.quintuples)
            tokens += len(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) + 1
        assert row["tokens"] == tokens


def test_two_ranks_share_one_batch(copies, adapter, tiny, world, tmp_path):
    """gdpo normalises over all ranks: together they have the advantages that TRL gives the whole batch."""
    argv = f"--model {tiny('qwen2_5_vl')} --adapter {adapter} --data {world}/train.jsonl --no-val --lr 1e-3"
    argv += (
        f" --group-size {GROUP} --batch-size 1 --epochs 0.25 --max-new-tokens {TOKENS} --out {tmp_path}/out"
    )
    faults = FAULTS.format(folder=str(copies), seen=str(tmp_path / "seen"))
    start = "import importlib\nscript = importlib.import_module('04_grpo_gdpo')\n"
    (copies / "rewarded.py").write_text(f"{faults}{start}script.main(script.parse_args())\n")
    run_script(f"{copies}/rewarded.py {argv}", ranks=2)
    samples = [row for row in rows_of(tmp_path / "out" / "samples.jsonl") if row["step"] == 1]
    assert len(samples) == 2 * GROUP
    theirs = trl_advantages(parts_of(samples), [1.0, 0.2, 0.1], "none", "normalize_then_sum")
    ours = torch.tensor([row["advantage"] for row in samples])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, check_dtype=False)
