"""Stage 4 — group relative policy optimisation, written out (§3.3, Eq. 2–7): rollout, reward, loss, one
update.

Deviations and decisions
1. One update a sampled batch, so the ratio of Eq. 6 is 1 and nothing is clipped (as in the paper);
   exp(logp − sg(logp)) keeps its gradient.
2. The mean is over each response's tokens, then over the group, then over prompts; the stop id is a token.
3. A group whose rewards differ by less than 1e-6 has advantage 0; its KL still counts.
4. The policy goes on from the SFT adapter; the reference is a frozen second copy of it.
   With --only-rl: a fresh LoRA, and the reference is the base.
5. The adapter's prompt is the prompt: one trained on the answer alone is reinforced on the answer alone.

    deepspeed 04_grpo.py --group-size 8                  # all GPUs: runs/sft/best → runs/grpo
    deepspeed --num_gpus 1 04_grpo.py                    # one GPU
    deepspeed 04_grpo.py --only-rl --out runs/only-rl    # without warm-up [paper §4]
    python    04_grpo.py --no-val --max-new-tokens 96    # CPU, tiny model
    deepspeed --hostfile hosts 04_grpo.py                # nodes: a line `NAME slots=GPUS` each, shared OUT
    kill -TERM $(cat runs/grpo/.lock)                    # finish the step, save, end; the same command goes
    on

Reads:  --data, any of the three formats of annotations
        {"id": "a", "text": "…", "image": "a.jpg", "quintuples": [["A", "per", "B", "org", "member of"]]}
Writes: OUT/best/ (PEFT adapter), OUT/last/, OUT/config.json, OUT/validation/step-N.jsonl, OUT/curves.png
        OUT/metrics.jsonl  {"step": 1, "reward": 0.41, "accuracy": 0.1, "partial": 1.2, "format": 0.7, "kl":
        0.0, …}
        OUT/samples.jsonl  {"step": 1, "id": "a", "response": "<think>…", "reward": 1.5, …, "advantage": 0.7}
        OUT/samples.html, the latest of them beside their images, at each validation
"""

import argparse
import time

import torch
from torch.nn.utils.rnn import pad_sequence

import common
from common import above, at_least
from lib import checks, lora, rollout, samples_page, served, training, vlm
from lib.run import Run

# B prompts a rank and step   G responses a prompt   N responses of a packed row   C completion tokens


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    training.add_io_arguments(parser, data="data/train.json", out="runs/grpo")
    group = parser.add_argument_group("model")
    start = group.add_mutually_exclusive_group()
    start.add_argument("--adapter", default="runs/sft/best", help="best/ of 03_sft.py [paper §3.3]")
    start.add_argument(
        "--only-rl", action="store_true", help="start from the base with a fresh LoRA [paper §4]"
    )
    group.add_argument(
        "--model", help=f"base model [ours: the adapter's; with --only-rl {vlm.DEFAULT_MODEL}]"
    )
    group.add_argument(
        "--prompt",
        choices=tuple(common.PROMPTS),
        help="[ours: the adapter's own; needed where it was made elsewhere; with --only-rl reason]",
    )
    group.add_argument("--lora-rank", type=at_least(1), default=128, help="with --only-rl [paper App. A]")
    group.add_argument("--lora-alpha", type=at_least(1), default=64, help="with --only-rl [paper App. A]")
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--group-size", type=at_least(2), default=8, help="G, responses a prompt [paper Figure 3]"
    )
    group.add_argument(
        "--temperature",
        type=above(0),
        default=1.0,
        help="of sampling and log-probs [ours: samples of the policy]",
    )
    group.add_argument(
        "--rollout-rows", type=at_least(1), help="responses drawn at once, for memory [ours: all of a step]"
    )
    group.add_argument("--static-cache", action="store_true", help=rollout.STATIC_CACHE_HELP)
    served.add_arguments(group)
    group = parser.add_argument_group("algorithm")
    group.add_argument(
        "--alpha", type=float, default=0.2, help="weight of the partial reward, Eq. 5 [paper App. A]"
    )
    group.add_argument(
        "--beta", type=float, default=0.1, help="weight of the format reward, Eq. 5 [paper App. A]"
    )
    group.add_argument("--kl-coef", type=at_least(0, float), default=0.01, help="λ of Eq. 7 [paper App. A]")
    group.add_argument(
        "--skip-constant-groups",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="leave groups of equal rewards out of the update; then their KL does not count [ours: off]",
    )
    group.add_argument(
        "--shared-prefix",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute each prompt once a group, not once a response: same loss and gradients [ours: on]",
    )
    group.add_argument(
        "--pack-tokens", type=at_least(1), help="most tokens of a packed row, for memory [ours: no limit]"
    )
    training.add_training_arguments(
        parser,
        epochs=30,
        lr=2e-6,
        warmup_ratio=0.0,
        schedule="constant",
        provenance="paper App. A; warm-up ours: none",
    )
    group = parser.add_argument_group("samples")
    group.add_argument(
        "--log-samples-every", type=at_least(1), default=10, help="steps between samples kept [ours]"
    )
    return parser.parse_args(argv)


# -------------------------------------------------------------------------------- pure functions


def reward(sample, example, args):
    """Eq. 5 of one response → {"reward": total, part: value, …}. Every name becomes a metric, a field of
    samples.jsonl and a curve; nothing else lists them. VARIANT: change, add or drop a part."""
    response = common.parse_response(sample.text, direct=args.prompt == "direct")
    accuracy = common.accuracy_reward(response, example.quintuples)
    partial = common.partial_reward(response, example.quintuples)
    form = common.format_reward(response)
    total = accuracy + args.alpha * partial + args.beta * form
    return {"reward": total, "accuracy": accuracy, "partial": partial, "format": form}


def group_advantages(rewards):
    """Eq. 6: (r − mean) / (std + 1e-4) within each group, sample standard deviation. [B, G] → [B, G].

    A constant group has nothing to teach: advantage 0. The test is on the spread in float64, because eight
    equal fp32 rewards can leave a non-zero r − mean.
    VARIANT: no division by std (Dr. GRPO), baselines over the batch, leave-one-out.
    """
    rewards = rewards.double()
    spread = rewards.amax(1, keepdim=True) - rewards.amin(1, keepdim=True)  # [B, 1]
    if rewards.shape[1] == 1:
        return torch.zeros_like(rewards).float()
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    return torch.where(spread < 1e-6, 0.0, advantages).float()


def token_weight(length, responses, tokens):
    """What one token of a response of `length` tokens counts in the loss; over the whole batch the weights
    sum to 1.

    responses, tokens: of the whole batch, over all ranks. Eq. 6: the mean over tokens, then over responses.
    VARIANT: 1 / tokens is DAPO; 1 / (responses * max_new_tokens) is Dr. GRPO.
    """
    return 1 / (responses * length)


def rollout_weight(logps, samples, cap):
    """What the policy term of each token is weighted with: min(π / π of the server that drew it, cap), since
    its arithmetic is not ours; 1 where no server did. logps [N, C] → [N, C]. VARIANT: a weight a response."""
    if cap is None:
        return torch.ones_like(logps)
    drawn = [torch.tensor(sample.logps, device=logps.device) for sample in samples]
    return torch.exp(logps - pad_sequence(drawn, batch_first=True)).clamp(max=cap)


def grpo_loss(logps, old_logps, ref_logps, advantages, weights, kl_coef, importance=1.0):
    """Eq. 7: −[ratio · A − λ · k3], summed over tokens with their weights. VARIANT: clipping, other KL
    estimators.

    logps [N, C] with graph; old_logps, ref_logps [N, C]; advantages [N]; weights [N, C], 0 on padding;
    importance [N, C] of samples that another engine drew → loss, KL (scalars).
    """
    assert (
        logps.shape == old_logps.shape == ref_logps.shape == weights.shape
        and advantages.shape == logps.shape[:1]
    )
    ratio = torch.exp(logps - old_logps)  # [N, C], 1 in value: one update a batch
    gap = ref_logps - logps
    per_token_kl = torch.exp(gap) - gap - 1  # k3, never negative
    per_token_loss = -(importance * ratio * advantages[:, None] - kl_coef * per_token_kl)
    return (per_token_loss * weights).sum(), (per_token_kl * weights).sum().detach()


def summarise(rewards, samples):
    """{name: sum over this rank's responses}, to be added up over ranks; rewards, samples: [B][G] of
    reward(), Sample."""
    sums = {"groups": len(rewards), "constant_groups": 0, "responses": 0, "tokens": 0, "cut_off": 0}
    for group, drawn in zip(rewards, samples, strict=True):
        totals = [parts["reward"] for parts in group]
        sums["constant_groups"] += max(totals) - min(totals) < 1e-6
        for parts, sample in zip(group, drawn, strict=True):
            sums["responses"] += 1
            sums["tokens"] += len(sample.completion_ids)
            sums["cut_off"] += not sample.finished
            for name, value in parts.items():
                sums[f"{name} sum"] = sums.get(f"{name} sum", 0.0) + value
                sums[f"{name} squares"] = sums.get(f"{name} squares", 0.0) + value**2
    return sums


def metrics_row(sums):
    """summarise() added up over ranks → what is logged: mean and standard deviation of each part of the
    reward, shares."""
    count = sums["responses"]
    row = {
        "constant_groups": sums["constant_groups"] / sums["groups"],
        "length": sums["tokens"] / count,
        "cut_off": sums["cut_off"] / count,
    }
    parts = {}
    for name in [key.removesuffix(" sum") for key in sums if key.endswith(" sum")]:
        assert name not in row, (
            f"reward() returns a part named {name}, which another metric is called: rename it"
        )
        mean = sums[f"{name} sum"] / count
        parts[name] = mean
        parts[f"{name}_std"] = max(0.0, sums[f"{name} squares"] / count - mean**2) ** 0.5
    return parts | row


def sample_rows(step, batch, samples, rewards, advantages):
    """This rank's responses as rows of samples.jsonl; samples, rewards: [B][G], advantages [B, G]."""
    rows = []
    for example, group, parts, scale in zip(batch, samples, rewards, advantages.tolist(), strict=True):
        for sample, values, advantage in zip(group, parts, scale, strict=True):
            row = {"step": step, "id": example.id, "response": sample.text, "finished": sample.finished}
            rows.append(row | values | {"advantage": advantage})
    return rows


def sampling_gap(logps, samples):
    """Σ |log-prob in training − log-prob when it was drawn| over the tokens of samples; logps [N, C]. Near 0,
    or the samples are not the policy's."""
    gap = 0.0
    for row, sample in zip(logps, samples, strict=True):
        drawn = torch.tensor(sample.logps, device=row.device)
        gap += (row[: len(drawn)] - drawn).abs().sum().item()
    return gap


def pack_rows(prompt_sizes, lengths, limit=None, skip=()):
    """Which responses go through the decoder in one row behind their prompt: [(prompt, [response, …])], most
    tokens first.

    prompt_sizes [B], lengths [B][G] in tokens. limit: tokens of a row; a response that alone exceeds it still
    gets a row.
    """
    rows = []
    for prompt, sizes in enumerate(lengths):
        if prompt in skip:
            continue
        room = 0
        for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            if not rows or rows[-1][0] != prompt or (limit and sizes[i] > room):
                rows.append((prompt, []))
                room = (limit or 0) - prompt_sizes[prompt]
            rows[-1][1].append(i)
            room -= sizes[i]
    return sorted(rows, key=lambda row: -prompt_sizes[row[0]] - sum(lengths[row[0]][i] for i in row[1]))


def row_positions(rows, prompt_sizes, lengths, shared_prefix):
    """(needed, computed) positions of a pass: each prompt and response once; and with repeated prompts and
    padding."""
    needed = sum(prompt_sizes[prompt] for prompt in {prompt for prompt, _ in rows})
    computed = 0
    for prompt, row in rows:
        sizes = [lengths[prompt][i] for i in row]
        needed += sum(sizes)
        if shared_prefix:
            computed += prompt_sizes[prompt] + sum(sizes)
        else:
            computed += len(row) * (prompt_sizes[prompt] + max(sizes))
    return needed, computed


# -------------------------------------------------------------------------------- main


def load_policy(args, processor, dtype, device):
    """Policy: one LoRA on the untouched base. Reference: a frozen second copy of the SFT adapter, or
    (Only-RL) the base."""
    model, _ = vlm.load(args.model, dtype, device, processor)
    if args.only_rl:
        return lora.add_lora(model, args.lora_rank, args.lora_alpha)
    model = lora.load_adapter(model, args.adapter, trainable=True)
    model = lora.load_adapter(model, args.adapter, name="reference")
    return lora.no_dropout(lora.check_lora(model))  # the SFT adapter may have been trained with some


def check_first_kl(run, kl, dtype):
    """Policy and reference are the same before the first update: KL is 0, in bf16 next to it, since kernels
    differ."""
    if run.ranks.main and dtype != torch.float32:
        print(f"KL before the first update: {kl:.2g}", flush=True)
    limit = 0 if dtype == torch.float32 else 1e-3
    if kl > limit:
        run.fail(
            f"KL is {kl:.3g} before the first update, expected at most {limit}: policy and reference differ "
            "(dropout? other adapter?)"
        )


@common.exit_codes
def main(args):
    # 1. Data, policy, engine; whatever would stop the run later stops it here
    ranks = training.setup(distributed=True, hours=args.timeout)
    torch.manual_seed(args.seed)  # KEEP: Only-RL draws its LoRA here, the same on every rank
    batch_prompts = args.batch_size * ranks.world
    with ranks.together():
        lora.resolve_start(args)  # → args.model, args.prompt
        config, dtype = training.read_ds_config(args, ranks)
        train, val = training.load_splits(args, ("quintuples",))
        processor = vlm.load_processor(args.model, args.min_pixels, args.max_pixels)
        server = served.connect(args, processor, ranks)
    train, val, content = checks.usable_splits(train, val, processor, dtype, args, ranks, server)
    with ranks.together():
        training.check_sizes(args, batch_prompts, len(train))
    run = Run(args, ranks, content, batch_prompts)
    with ranks.together():
        model = load_policy(args, processor, dtype, ranks.device)
    checks.prove(model, processor, train[0], args, ranks)
    if server:
        server.prove(common.PROMPTS[args.prompt].format(text=train[0].text), train[0].image)
    # a number is wanted; 3c marks the last step
    engine = training.make_engine(model, args, config, args.batch_size)

    # 2. Sizes
    total, eval_steps = training.count_steps(args, len(train), batch_prompts)
    if ranks.main:
        sizes = f"{len(train)} prompts, {batch_prompts} an update ({ranks.world} ranks × {args.batch_size})"
        start = "the base model (Only-RL)" if args.only_rl else args.adapter
        print(f"{sizes}, G = {args.group_size}: {total} updates in {dtype}; reference: {start}", flush=True)

    # 3. Train
    steps = run.resume(engine, total)
    bar = training.progress_bar("grpo", total, steps, ranks)
    for step in steps:
        began = time.perf_counter()
        before = None if run.changed else training.fingerprint(model)
        lr = training.set_learning_rate(engine, step, total, args)
        training.seed_step(args.seed, step, ranks.rank)
        places = range(ranks.rank * args.batch_size, (ranks.rank + 1) * args.batch_size)  # of the whole batch
        indices = training.batch_indices(len(train), batch_prompts, step, args.seed)
        batch = [train[indices[place]] for place in places]

        # 3a. Rollout: G responses of the current policy to each prompt
        training.say(bar, "sampling")
        model.eval()  # KEEP: generation in train() under gradient checkpointing is silently wrong
        if server:
            server.publish(model)
        with ranks.together():
            items = [
                (common.PROMPTS[args.prompt].format(text=example.text), example.image) for example in batch
            ]
            prompts = vlm.encode(model, processor, items)
            # KEEP: keyed by the place in the whole batch, so that 2 ranks draw the samples that 1 rank would
            keys = [(args.seed, step, place) for place in places]
            drawing = args.group_size, args.max_new_tokens, args.temperature
            if server:
                samples = server.sample(items, *drawing, keys=keys)
            else:
                samples, _ = rollout.sample_in_parts(
                    *(model, processor, prompts, *drawing),
                    rows=args.rollout_rows or args.batch_size * args.group_size,
                    keys=keys,
                    static=args.static_cache,
                )
            sampled = time.perf_counter()

            # 3b. Rewards and advantages
            rewards = [
                [reward(sample, example, args) for sample in group]
                for example, group in zip(batch, samples, strict=True)
            ]
            totals = [[parts["reward"] for parts in group] for group in rewards]
            advantages = group_advantages(torch.tensor(totals, dtype=torch.float64))  # [B, G]

        # 3c. One backward a packed row, one update a batch; the batch's loss is the plain sum over rows and
        # ranks
        batch_sums = ranks.sum_by_name(summarise(rewards, samples))
        prompt_sizes = [len(prompt.embeds) for prompt in prompts]
        lengths = [[len(sample.completion_ids) for sample in group] for group in samples]
        constant = [prompt for prompt, values in enumerate(advantages.tolist()) if not any(values)]
        rows = pack_rows(
            prompt_sizes, lengths, args.pack_tokens, constant if args.skip_constant_groups else ()
        )
        micro_steps = max(
            1, *ranks.gather(len(rows))
        )  # KEEP: the same on every rank, or they wait for each other for ever
        training.say(bar, "update")
        sums = dict.fromkeys(("loss", "kl", "entropy", "gap", "importance"), 0.0)
        with training.out_of_memory("--pack-tokens, --gradient-checkpointing or a smaller --batch-size"):
            for micro in range(micro_steps):
                engine.set_gradient_accumulation_boundary(micro == micro_steps - 1)
                if micro < len(rows):
                    prompt, row = rows[micro]
                    ids = [[samples[prompt][i].completion_ids for i in row]]
                    scored = prompts[prompt : prompt + 1], ids, args.temperature, args.shared_prefix
                    ref_logps = None
                    if args.kl_coef:
                        with torch.no_grad(), lora.reference(model):
                            ref_logps, _, _ = rollout.completion_logps(model, *scored)  # [N, C]
                    model.train()
                    logps, entropy, completion_mask = rollout.completion_logps(model, *scored)  # [N, C]
                    model.eval()
                    old_logps = logps.detach()
                    if ref_logps is None:  # λ = 0: no reference pass, and the KL term is 0
                        ref_logps = old_logps
                    weights = [
                        token_weight(lengths[prompt][i], batch_sums["responses"], batch_sums["tokens"])
                        for i in row
                    ]
                    weights = torch.tensor(weights, device=ranks.device)[:, None] * completion_mask  # [N, C]
                    scale = advantages[prompt, row].to(ranks.device)  # [N]
                    responses = [samples[prompt][i] for i in row]
                    importance = rollout_weight(old_logps, responses, args.rollout_cap)  # [N, C]
                    loss, kl = grpo_loss(
                        logps, old_logps, ref_logps, scale, weights, args.kl_coef, importance
                    )
                    sums["loss"] += loss.item()
                    sums["kl"] += kl.item()
                    sums["entropy"] += entropy.sum().item()
                    sums["gap"] += sampling_gap(old_logps, responses)
                    sums["importance"] += (importance * completion_mask).sum().item()
                else:
                    loss = training.zero_loss(model)
                # gradients add up over micro-steps and ranks
                engine.backward(loss * ranks.world, scale_wrt_gas=False)
                engine.step()

        # 4. Log
        needed, computed = row_positions(rows, prompt_sizes, lengths, args.shared_prefix)
        sums |= {"prompts": len({prompt for prompt, _ in rows}), "needed": needed, "computed": computed}
        sums["tokens"] = sum(lengths[prompt][i] for prompt, row in rows for i in row)
        sums = ranks.sum_by_name(sums)
        row = {
            "step": step + 1,
            "epoch": round((step + 1) * batch_prompts / len(train), 4),
            **metrics_row(batch_sums),
        }
        row["kl"] = sums["kl"] * batch_prompts / max(1, sums["prompts"])  # of the groups that were trained on
        row["loss"] = sums["loss"]
        row["entropy"] = sums["entropy"] / max(1, sums["tokens"])
        row["sampling_gap"] = sums["gap"] / max(1, sums["tokens"])
        if server:
            row["rollout_weight"] = sums["importance"] / max(1, sums["tokens"])
            server.check_gap(run, row["sampling_gap"])
        row["lr"] = lr
        row["grad_norm"] = float(engine.get_global_grad_norm())
        row["waste"] = 1 - sums["needed"] / max(1, sums["computed"])
        drawn = sample_rows(step + 1, batch, samples, rewards, advantages)
        run.check_step(model, step, row, before, drawn)
        if step == 0:
            check_first_kl(run, row["kl"], dtype)
        seconds = time.perf_counter() - began
        row["seconds"] = round(seconds, 3)
        row["sampling_seconds"] = round(sampled - began, 3)
        row["tokens_per_second"] = round(batch_sums["tokens"] / seconds, 1)
        row["peak_memory_mib"] = round(training.peak_memory())
        if (step + 1) % args.log_samples_every == 0 or step == 0:
            run.log([sample for part in ranks.gather(drawn) for sample in part], "samples.jsonl")

        # 5. Validate, save
        validated = (step + 1) % eval_steps == 0 or step + 1 == total
        if validated:
            row |= training.validate_and_keep(run, model, processor, val, step + 1, ranks, args, server)
        run.log([row])
        bar.set_postfix_str(
            f"reward {row['reward']:.3f}{run.best_text()} kl {row['kl']:.4f} length {row['length']:.0f} "
            f"{row['tokens_per_second']:.0f} tok/s",
            refresh=False,
        )
        bar.update()
        if validated and ranks.main:
            samples_page.write(run.out, train, args.prompt)
        if run.finish_step(engine, step + 1, total, validated):
            break
    bar.close()
    if server:
        server.close()
    run.say_done(total)


if __name__ == "__main__":
    main(parse_args())
