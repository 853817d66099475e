"""Stage 4 — group relative policy optimisation, written out (§3.3, Eq. 2–7): rollout, rewards, advantages, loss, one update.

Deviations and decisions
1. One update a sampled batch, so the ratio of Eq. 6 is 1 and nothing is clipped (as in the paper); exp(logp − sg(logp)) keeps its gradient.
2. The mean is over each response's tokens, then over the group, then over prompts; the stop id is a token of the response.
3. A group whose rewards differ by less than 1e-6 has advantage 0; its KL still counts.
4. The policy goes on from the SFT adapter; the reference is a frozen second copy of it.
   Without --adapter (Only-RL): a fresh LoRA, the reference is the base.

    deepspeed 04_grpo.py --model Qwen/Qwen2.5-VL-7B-Instruct --adapter runs/sft/best --data train.json --val val.json \\
        --image-dir img --out runs/grpo --group-size 8                                                        # all GPUs
    deepspeed --num_gpus 1 04_grpo.py …                                                                       # one GPU
    python 04_grpo.py --model runs/tiny --adapter runs/sft/best --data train.jsonl --out runs/grpo --max-new-tokens 96   # CPU, tiny model
    deepspeed --hostfile hosts 04_grpo.py …   # several nodes: a line `NAME slots=GPUS` each in `hosts`, OUT on shared storage
    kill -TERM $(cat runs/grpo/.lock)                        # finish the step, save, end; the same command goes on

Reads:  --data  {"id": "a", "text": "…", "image": "img/a.jpg", "quintuples": [["A", "per", "B", "org", "member of"]]}, JMERE or MNRE
Writes: OUT/best/ (PEFT adapter), OUT/last/, OUT/config.json, OUT/samples.jsonl, OUT/validation/step-N.jsonl, OUT/curves.png,
        OUT/metrics.jsonl  {"step": 1, "reward": 0.41, "accuracy": 0.1, "partial": 1.2, "format": 0.7, "kl": 0.0, "loss": 0.0, …}
"""

import argparse
import time

import torch
from tqdm import tqdm

import common
from lib import data, rollout, training, vlm
from lib.run import Run

# B prompts a rank and step   G responses a prompt   N = B·G   C completion tokens


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    group = parser.add_argument_group("io")
    group.add_argument("--data", required=True, help="training examples in any of the three formats")
    group.add_argument("--image-dir", help="folder of the images [ours: beside the file that names them]")
    group.add_argument("--out", required=True, help="folder of the run")
    group.add_argument(
        "--skip-bad",
        action="store_true",
        help="drop rows without usable image or fields, and say how many [ours: stop]",
    )
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", required=True, help="Qwen2.5-VL or LLaVA-1.5 checkpoint: hub name or folder"
    )
    group.add_argument("--adapter", help="best/ of 03_sft.py; absent: Only-RL [paper §4]")
    group.add_argument(
        "--lora-rank", type=int, default=128, help="of the fresh LoRA in Only-RL [paper App. A]"
    )
    group.add_argument(
        "--lora-alpha", type=int, default=64, help="of the fresh LoRA in Only-RL [paper App. A]"
    )
    group = parser.add_argument_group("sampling")
    group.add_argument("--group-size", type=int, default=8, help="G, responses a prompt [paper Figure 3]")
    group.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="of sampling and of the log-probs [ours: samples of the policy itself]",
    )
    group.add_argument(
        "--static-cache",
        action="store_true",
        help="shapes that stay in sampling, CUDA graphs on a GPU; never run on one [ours: off]",
    )
    group.add_argument("--limit", type=int, help="train on the first N examples [ours: all]")
    group = parser.add_argument_group("algorithm")
    group.add_argument(
        "--alpha",
        type=float,
        default=0.2,
        help="weight of the partial reward, Eq. 5; 0 is the ablation [paper App. A]",
    )
    group.add_argument(
        "--beta", type=float, default=0.1, help="weight of the format reward, Eq. 5 [paper App. A]"
    )
    group.add_argument("--kl-coef", type=float, default=0.01, help="λ of Eq. 7 [paper App. A]")
    group.add_argument(
        "--skip-constant-groups",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="leave groups of equal rewards out of the update; their KL then does not count [ours: off, as in the paper]",
    )
    group.add_argument(
        "--shared-prefix",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute each prompt once a group, not once a response: same loss and gradients [ours: on]",
    )
    group.add_argument(
        "--pack-tokens",
        type=int,
        help="most tokens of a packed row; a larger group is split, to save memory [ours: no limit]",
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
        "--log-samples-every",
        type=int,
        default=10,
        help="steps between two batches of responses in samples.jsonl [ours]",
    )
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------ pure functions


def group_advantages(rewards):
    """Eq. 6: (r − mean) / (std + 1e-4) within each group, sample standard deviation. [B, G] → [B, G].

    A constant group has nothing to teach: advantage 0. The test is on the spread in float64, because eight equal fp32
    rewards can leave a non-zero r − mean.
    VARIANT: no division by std (Dr. GRPO), baselines over the batch, leave-one-out.
    """
    rewards = rewards.double()
    spread = rewards.amax(1, keepdim=True) - rewards.amin(1, keepdim=True)  # [B, 1]
    if rewards.shape[1] == 1:
        return torch.zeros_like(rewards).float()
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    return torch.where(spread < 1e-6, 0.0, advantages).float()


def grpo_loss(logps, ref_logps, advantages, completion_mask, kl_coef):
    """Eq. 7: −[ratio · A − λ · k3], mean over each response's tokens, then over responses.

    logps [N, C] with graph, ref_logps [N, C], advantages [N], completion_mask [N, C] → scalar loss, metrics.
    VARIANT: clipping, token-mean over the batch (DAPO), other KL estimators.
    """
    assert logps.shape == ref_logps.shape == completion_mask.shape and advantages.shape == logps.shape[:1]
    ratio = torch.exp(logps - logps.detach())  # [N, C], 1 in value: one update a batch
    gap = ref_logps - logps
    per_token_kl = torch.exp(gap) - gap - 1  # k3, never negative
    per_token_loss = -(ratio * advantages[:, None] - kl_coef * per_token_kl)
    lengths = completion_mask.sum(1).clamp(min=1)  # [N]
    loss = ((per_token_loss * completion_mask).sum(1) / lengths).mean()
    kl = ((per_token_kl.detach() * completion_mask).sum(1) / lengths).mean()
    return loss, {"kl": kl.item()}


def summarise(rewards, samples):
    """Sums over this rank's responses, to be added up over ranks: rewards [B][G] of Reward, samples [B][G] of Sample."""
    flat = [reward for group in rewards for reward in group]
    drawn = [sample for group in samples for sample in group]
    constant = sum(max(r.total for r in group) - min(r.total for r in group) < 1e-6 for group in rewards)
    parts = list(zip(*flat))  # total, accuracy, partial, format
    return [
        *map(sum, parts),
        *(sum(x * x for x in values) for values in parts),
        constant,
        len(rewards),
        len(flat),
        sum(len(s.ids) for s in drawn),
        sum(not s.finished for s in drawn),
    ]


def metrics_row(sums):
    """summarise() summed over ranks → what is logged."""
    parts, squares, (constant, groups, n, tokens, cut) = sums[:4], sums[4:8], sums[8:]
    row = {}
    for name, total, square in zip(("reward", "accuracy", "partial", "format"), parts, squares):
        row |= {name: total / n, f"{name}_std": max(0.0, square / n - (total / n) ** 2) ** 0.5}
    return row | {"constant_groups": constant / groups, "length": tokens / n, "cut_off": cut / n}


def pack_rows(prompt_sizes, lengths, limit=None, skip=()):
    """Which responses go through the decoder in one row behind their prompt: [(group, [response, …])], most tokens first.

    prompt_sizes [B], lengths [B][G] in tokens. limit: tokens of a row; a response that alone exceeds it still gets a row.
    """
    rows = []
    for group, sizes in enumerate(lengths):
        room = 0
        for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]) if group not in skip else ():
            if not rows or rows[-1][0] != group or (limit and sizes[i] > room):
                rows.append((group, []))
                room = (limit or 0) - prompt_sizes[group]
            rows[-1][1].append(i)
            room -= sizes[i]
    return sorted(rows, key=lambda row: -prompt_sizes[row[0]] - sum(lengths[row[0]][i] for i in row[1]))


def row_positions(rows, prompt_sizes, lengths, shared_prefix):
    """(needed, computed) positions of a pass: each prompt and response once; and with repeated prompts and padding."""
    sizes = [(prompt_sizes[group], [lengths[group][i] for i in row]) for group, row in rows]
    needed = sum(prompt_sizes[group] for group in {group for group, _ in rows}) + sum(
        sum(row) for _, row in sizes
    )
    return needed, sum(
        size + sum(row) if shared_prefix else len(row) * (size + max(row)) for size, row in sizes
    )


# ------------------------------------------------------------------------------------------------ main


def load_data(args):
    if args.adapter and vlm.adapter_prompt(args.adapter) != "reason":
        raise common.InputError(
            f"--adapter {args.adapter}: trained with the direct prompt; GRPO needs 03_sft.py --target cot"
        )
    train = data.load_examples(args.data, args.image_dir, need=("quintuples",), skip_bad=args.skip_bad)[
        : args.limit
    ]
    val = (
        data.load_examples(args.val, args.image_dir, need=("quintuples",), skip_bad=args.skip_bad)[
            : args.eval_limit
        ]
        if args.val
        else []
    )
    return data.check_images(train, args.skip_bad), data.check_images(val, args.skip_bad) if val else []


def load_policy(args, dtype, device):
    """Policy: one LoRA on the untouched base. Reference: a frozen second copy of the SFT adapter, or (Only-RL) the base."""
    model, processor = vlm.load(args.model, dtype, device)
    if args.adapter is None:
        return vlm.add_lora(model, args.lora_rank, args.lora_alpha), processor
    model = vlm.load_adapter(model, args.adapter, trainable=True)
    model = vlm.load_adapter(model, args.adapter, name="reference")
    return vlm.no_dropout(vlm.check_lora(model)), processor  # the SFT adapter may have been trained with some


@common.exit_codes
def main(args):
    # 1. Data, policy, engine
    ranks = training.setup(distributed=True)
    torch.manual_seed(args.seed)  # KEEP: Only-RL draws its LoRA here, the same on every rank
    batch_prompts = args.batch_size * ranks.world
    with ranks.together():
        training.check_arguments(args)
        config, dtype = training.read_ds_config(args, ranks)
        train, val = load_data(args)
        training.check_arguments(args, batch_prompts, len(train))
    run = Run(args, ranks)
    with ranks.together():
        model, processor = load_policy(args, dtype, ranks.device)
    engine = training.make_engine(
        model, args, config, args.batch_size
    )  # a group each; 3c sets the boundary itself

    # 2. Sizes
    total = -(-int(len(train) * args.epochs) // batch_prompts)
    eval_steps = max(1, round(len(train) * args.eval_every / batch_prompts))
    if ranks.main:
        sizes = f"{len(train)} prompts, {batch_prompts} an update ({ranks.world} ranks × {args.batch_size}), G = {args.group_size}"
        print(
            f"{sizes}: {total} updates in {dtype}; reference: {args.adapter or 'the base model (Only-RL)'}",
            flush=True,
        )

    # 3. Train
    steps = run.resume(engine, total)
    bar = tqdm(
        total=total,
        initial=total - len(steps),
        desc="grpo",
        unit="step",
        disable=None if ranks.main else True,
    )
    for step in steps:
        began, before = time.perf_counter(), None if run.changed else training.fingerprint(model)
        lr = training.lr_at(step, total, args)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        training.seed_step(args.seed, step, ranks.rank)
        places = range(ranks.rank * args.batch_size, (ranks.rank + 1) * args.batch_size)  # of the whole batch
        batch = training.batch_indices(len(train), batch_prompts, step, args.seed)
        batch = [train[batch[place]] for place in places]

        # 3a. Rollout: G responses of the current policy to each prompt
        model.eval()  # KEEP: generation in train() under gradient checkpointing is silently wrong
        with ranks.together():
            prompts = vlm.encode(
                model,
                processor,
                [(common.PROMPTS["reason"].format(text=example.text), example.image) for example in batch],
            )
            keys = [
                (args.seed, step, place) for place in places
            ]  # KEEP: the place in the whole batch: ranks do not change the samples
            drawing = args.group_size, args.max_new_tokens, args.temperature
            samples = rollout.sample(model, processor, prompts, *drawing, keys=keys, static=args.static_cache)
            sampled = time.perf_counter()

            # 3b. Rewards and advantages. VARIANT: any function of (response text, gold) that returns its parts by name
            rewards = [
                [common.reward(s.text, e.quintuples, args.alpha, args.beta) for s in group]
                for e, group in zip(batch, samples)
            ]
            advantages = group_advantages(
                torch.tensor([[r.total for r in group] for group in rewards], dtype=torch.float64)
            )  # [B, G]

        # 3c. One backward a packed row, one update a batch
        sizes, lengths = (
            [len(prompt.embeds) for prompt in prompts],
            [[len(s.ids) for s in group] for group in samples],
        )
        constant = {group for group, values in enumerate(advantages.tolist()) if not any(values)}
        rows = pack_rows(sizes, lengths, args.pack_tokens, constant if args.skip_constant_groups else ())
        micro_steps = max(
            1, *ranks.gather(len(rows))
        )  # KEEP: as many backward passes on every rank, or they wait for each other for ever
        losses, kls, entropies = 0.0, 0.0, 0.0
        for micro in range(micro_steps):
            engine.set_gradient_accumulation_boundary(micro == micro_steps - 1)
            if micro < len(rows):
                group, row = rows[micro]
                ids, share = [[samples[group][i].ids for i in row]], len(row) / args.group_size
                with torch.no_grad(), vlm.reference(model):
                    ref_logps, _, _ = rollout.completion_logps(
                        model, prompts[group : group + 1], ids, args.temperature, args.shared_prefix
                    )
                model.train()
                logps, entropy, mask = rollout.completion_logps(
                    model, prompts[group : group + 1], ids, args.temperature, args.shared_prefix
                )
                model.eval()
                loss, metrics = grpo_loss(
                    logps, ref_logps, advantages[group, row].to(ranks.device), mask, args.kl_coef
                )  # [row, C]
                engine.backward(
                    loss * share
                )  # DeepSpeed divides by --batch-size and the ranks: the mean over groups
                losses, kls = losses + loss.item() * share, kls + metrics["kl"] * share
                entropies += entropy.sum().item()
            else:
                engine.backward(training.zero_loss(model))
            engine.step()

        # 4. Log
        counts = (
            len({group for group, _ in rows}),
            sum(lengths[group][i] for group, row in rows for i in row),
        )
        sums = ranks.sum(
            losses, kls, entropies, *counts, *row_positions(rows, sizes, lengths, args.shared_prefix)
        )
        loss, kl, entropy = sums[0] / batch_prompts, sums[1] / max(1, sums[3]), sums[2] / max(1, sums[4])
        waste = 1 - sums[5] / max(1, sums[6])
        sums = ranks.sum(*summarise(rewards, samples))
        grad_norm, row = float(engine.get_global_grad_norm()), metrics_row(sums)
        drawn = [
            {
                "step": step + 1,
                "id": e.id,
                "response": s.text,
                "finished": s.finished,
                **r._asdict(),
                "advantage": a,
            }
            for e, group, parts, scale in zip(batch, samples, rewards, advantages.tolist())
            for s, r, a in zip(group, parts, scale)
        ]
        run.check_step(
            model,
            step,
            {"loss": loss, "gradient norm": grad_norm, "reward": row["reward"], "KL": kl},
            before,
            drawn,
        )
        if step == 0 and kl != 0:
            run.fail(
                f"KL is {kl:.3g} before the first update, expected 0: policy and reference start apart (dropout? other adapter?)"
            )
        seconds = time.perf_counter() - began
        row = {"step": step + 1, "epoch": round((step + 1) * batch_prompts / len(train), 4), **row}
        row |= {
            "kl": kl,
            "loss": loss,
            "entropy": entropy,
            "lr": lr,
            "grad_norm": grad_norm,
            "waste": waste,
            "seconds": round(seconds, 3),
        }
        row |= {
            "sampling_seconds": round(sampled - began, 3),
            "tokens_per_second": round(sums[-2] / seconds, 1),
        }
        row |= {"peak_memory_mib": round(training.peak_memory())}
        if (step + 1) % args.log_samples_every == 0 or step == 0:
            run.log([row for part in ranks.gather(drawn) for row in part], "samples.jsonl")

        # 5. Validate, save
        validated = (step + 1) % eval_steps == 0 or step + 1 == total
        if validated:
            row |= training.validate_and_keep(run, model, processor, val, "reason", step + 1, ranks, args)
        run.log([row])
        shown = f"reward {row['reward']:.3f}{run.best_text()} kl {kl:.4f} length {row['length']:.0f} {row['tokens_per_second']:.0f} tok/s"
        bar.set_postfix_str(shown, refresh=False)
        bar.update()
        if run.finish_step(engine, step + 1, total, validated):
            break
    bar.close()
    run.say_done(total)


if __name__ == "__main__":
    main(parse_args())
