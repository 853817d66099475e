"""Stage 3 — supervised fine-tuning with LoRA (§3.2, Eq. 1): the response tokens of reasoning and answer, or of the answer alone.

Deviations and decisions
1. LoRA sits on every linear layer of the language model; the paper gives rank and alpha only.
2. The loss is the mean over all response tokens of the whole batch, ranks and micro-steps included: the number of ranks does not change it.
3. Batches run on over the end of an epoch: no row is dropped.

    deepspeed --num_gpus 1 03_sft.py --model Qwen/Qwen2.5-VL-7B-Instruct --data sft.jsonl --val val.json --image-dir img --out runs/sft
    deepspeed 03_sft.py --model Qwen/Qwen2.5-VL-7B-Instruct --data sft.jsonl --val val.json --image-dir img --out runs/sft  # all GPUs
    deepspeed 03_sft.py … --target answer --epochs 20 --data train.json --out runs/sft-answer    # SFT baseline
    python 03_sft.py --model runs/tiny --data sft.jsonl --out runs/sft --lora-rank 8 --lora-alpha 16    # CPU, tiny model
    deepspeed --hostfile hosts 03_sft.py …    # several nodes: a line `NAME slots=GPUS` each in `hosts`, OUT on shared storage
    kill -TERM $(cat runs/sft/.lock)    # finish the step, save, end; the same command goes on

Reads:  --data  {"id": "a", "text": "…", "image": "img/a.jpg", "quintuples": [["A", "per", "B", "org", "member of"]], "cot": "Image Desc…"}
Writes: OUT/best/ (PEFT adapter), OUT/last/, OUT/config.json, OUT/validation/step-N.jsonl, OUT/curves.png,
        OUT/metrics.jsonl  {"step": 1, "loss": 2.1, "lr": 1e-06, "grad_norm": 3.2, "tokens": 410, "tokens_per_second": 900.0, …}
"""

import argparse
import time

import torch
from tqdm import tqdm

import common
from common import InputError
from lib import data, rollout, training, vlm
from lib.run import Run

# B rows a rank and micro-step   C response tokens, the stop id included


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    group = parser.add_argument_group("io")
    group.add_argument(
        "--data", required=True, help="sft.jsonl of 02_filter.py; with --target answer any annotated file"
    )
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
    group.add_argument("--lora-rank", type=int, default=128, help="[paper App. A]")
    group.add_argument("--lora-alpha", type=int, default=64, help="[paper App. A]")
    group.add_argument("--lora-dropout", type=float, default=0.0, help="[ours: the paper names none]")
    group = parser.add_argument_group("data")
    group.add_argument(
        "--target",
        choices=("cot", "answer"),
        default="cot",
        help="CoT-SFT, or the SFT baseline without reasoning [paper §4]",
    )
    group.add_argument("--limit", type=int, help="train on the first N rows [ours: all]")
    training.add_training_arguments(
        parser, epochs=5, lr=2e-5, warmup_ratio=0.06, schedule="cosine", provenance="paper App. A"
    )
    group = parser.add_argument_group("accumulation")
    group.add_argument(
        "--grad-accum",
        type=int,
        default=1,
        help="micro-steps of --batch-size rows a rank and update [paper App. A: 2 per GPU × 4]",
    )
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------ pure functions


def target_text(example, target):
    """What the model learns to write: §3.2 reasoning and answer, or the answer alone."""
    if target == "answer":
        return common.format_answer(example.quintuples)
    return common.format_response(example.row["cot"], example.quintuples)


def target_ids(tokenizer, text, stop):
    """Response tokens and the stop id: exactly these carry loss."""
    return tokenizer(text, add_special_tokens=False)["input_ids"] + [stop]


def sft_loss(logps, completion_mask, batch_tokens):
    """Eq. 1: negative log-likelihood of the response. [B, C], [B, C], tokens of the whole batch → scalar.

    VARIANT: per-example means, label smoothing, token weights.
    """
    return -(logps * completion_mask).sum() / batch_tokens


# ------------------------------------------------------------------------------------------------ main


def load_data(args):
    need = ("quintuples", "cot") if args.target == "cot" else ("quintuples",)
    train = data.load_examples(args.data, args.image_dir, need=need, skip_bad=args.skip_bad)[: args.limit]
    val = (
        data.load_examples(args.val, args.image_dir, need=("quintuples",), skip_bad=args.skip_bad)[
            : args.eval_limit
        ]
        if args.val
        else []
    )
    if args.target == "cot":
        for example in train:
            if common.parse_cot(example.row["cot"]) is None:
                raise InputError(
                    f"{args.data}: id {example.id}: 'cot' lacks one of its three parts (made by 01_distill.py, kept by 02_filter.py)"
                )
    return data.check_images(train, args.skip_bad), data.check_images(val, args.skip_bad) if val else []


@common.exit_codes
def main(args):
    # 1. Data, model, engine
    ranks = training.setup(distributed=True)
    torch.manual_seed(args.seed)  # KEEP: LoRA's A is drawn here, the same on every rank
    rank_rows = args.batch_size * args.grad_accum
    rows = rank_rows * ranks.world
    with ranks.together():
        training.check_arguments(args)
        config, dtype = training.read_ds_config(args, ranks)
        train, val = load_data(args)
        training.check_arguments(args, rows, len(train))
    run = Run(args, ranks)
    with ranks.together():
        model, processor = vlm.load(args.model, dtype, ranks.device)
        model = vlm.add_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout)
    stop = vlm.stop_ids(model, processor)[0]
    engine = training.make_engine(model, args, config, args.grad_accum)

    # 2. Sizes
    prompt = "reason" if args.target == "cot" else "direct"
    total = -(-int(len(train) * args.epochs) // rows)
    eval_steps = max(1, round(len(train) * args.eval_every / rows))
    if ranks.main:
        sizes = f"{len(train)} rows, {rows} an update ({ranks.world} ranks × {args.grad_accum} × {args.batch_size})"
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"{sizes}: {total} updates; {trainable:,} trainable parameters in {dtype}", flush=True)

    # 3. Train
    steps = run.resume(engine, total)
    bar = tqdm(
        total=total, initial=total - len(steps), desc="sft", unit="step", disable=None if ranks.main else True
    )
    for step in steps:
        began, before = time.perf_counter(), None if run.changed else training.fingerprint(model)
        lr = training.lr_at(step, total, args)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        training.seed_step(args.seed, step, ranks.rank)
        batch = training.batch_indices(len(train), rows, step, args.seed)[
            ranks.rank * rank_rows : (ranks.rank + 1) * rank_rows
        ]
        with ranks.together():
            texts = [target_text(train[i], args.target) for i in batch]
            targets = [target_ids(processor.tokenizer, text, stop) for text in texts]
            prompts = vlm.encode(
                model,
                processor,
                [(common.PROMPTS[prompt].format(text=train[i].text), train[i].image) for i in batch],
            )
        tokens = ranks.sum(sum(map(len, targets)))[0]  # of the whole batch: 2 ranks × B = 1 rank × 2B
        model.train()
        nll = 0.0
        for start in range(0, rank_rows, args.batch_size):
            micro = slice(start, start + args.batch_size)
            logps, _, mask = rollout.completion_logps(
                model, prompts[micro], [[ids] for ids in targets[micro]]
            )  # [B, C]
            loss = sft_loss(logps, mask, tokens)
            nll += loss.item()
            engine.backward(
                loss * args.grad_accum * ranks.world
            )  # DeepSpeed takes the mean over micro-steps and ranks; Eq. 1 sums them
            engine.step()
        loss, grad_norm = ranks.sum(nll)[0], float(engine.get_global_grad_norm())
        rows_here = [{"id": train[i].id, "response": text} for i, text in zip(batch, texts)]
        run.check_step(model, step, {"loss": loss, "gradient norm": grad_norm}, before, rows_here)
        if grad_norm == 0:
            run.fail(f"step {step + 1}: gradient norm 0 at loss {loss:.3g}: nothing is being trained")
        seconds = time.perf_counter() - began
        row = {
            "step": step + 1,
            "epoch": round((step + 1) * rows / len(train), 4),
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
        }
        row |= {
            "tokens": int(tokens),
            "tokens_per_second": round(tokens / seconds, 1),
            "peak_memory_mib": round(training.peak_memory()),
        }

        # 4. Validate, save
        validated = (step + 1) % eval_steps == 0 or step + 1 == total
        if validated:
            row |= training.validate_and_keep(run, model, processor, val, prompt, step + 1, ranks, args)
        run.log([row])
        bar.set_postfix_str(
            f"loss {loss:.3f}{run.best_text()} {row['tokens_per_second']:.0f} tok/s", refresh=False
        )
        bar.update()
        if run.finish_step(engine, step + 1, total, validated):
            break
    bar.close()
    run.say_done(total)


if __name__ == "__main__":
    main(parse_args())
