"""Stage 3 — supervised fine-tuning with LoRA (§3.2, Eq. 1): the response tokens of reasoning and answer, or
of the answer alone.

Deviations and decisions
1. LoRA sits on every linear layer of the language model; the paper gives rank and alpha only.
2. The loss is the mean over all response tokens of the whole batch, ranks and micro-steps included: the
   number of ranks does not change it.
3. Batches run on over the end of an epoch: no row is dropped.

    deepspeed 03_sft.py                                  # all GPUs: runs/sft.jsonl → runs/sft
    deepspeed --num_gpus 1 03_sft.py                     # one GPU
    deepspeed 03_sft.py --target answer --epochs 20 --data data/train.json --out runs/sft-answer    # SFT
    baseline python    03_sft.py --model runs/tiny --lora-rank 8 --lora-alpha 16    # CPU, tiny model
    deepspeed --hostfile hosts 03_sft.py                 # nodes: a line `NAME slots=GPUS` each, shared OUT
    kill -TERM $(cat runs/sft/.lock)                     # finish the step, save, end; the same command goes
    on

Reads:  --data, sft.jsonl of 02_filter.py, or with --target answer any of the three formats of annotations
        {"id": "a", "text": "…", "image": "a.jpg", "quintuples": [["A", "per", "B", "org", "member of"]],
        "cot": "…"}
Writes: OUT/best/ (PEFT adapter), OUT/last/, OUT/config.json, OUT/validation/step-N.jsonl, OUT/curves.png
        OUT/metrics.jsonl  {"step": 1, "loss": 2.1, "lr": 1e-06, "grad_norm": 3.2, "tokens": 410, …}
"""

import time

import torch

import common
from common import InputError, at_least
from lib import checks, lora, rollout, training, vlm
from lib.run import Run

# B rows a rank and micro-step   C response tokens, the stop id included


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    training.add_io_arguments(parser, data="runs/sft.jsonl", out="runs/sft")
    group = parser.add_argument_group("model")
    group.add_argument("--model", default=vlm.DEFAULT_MODEL, help="hub name or folder [paper §4]")
    group.add_argument("--lora-rank", type=at_least(1), default=128, help="[paper App. A]")
    group.add_argument("--lora-alpha", type=at_least(1), default=64, help="[paper App. A]")
    group.add_argument("--lora-dropout", type=training.share, default=0.0, help="[ours: not in the paper]")
    group = parser.add_argument_group("algorithm")
    group.add_argument(
        "--target",
        choices=("cot", "answer"),
        default="cot",
        help="CoT-SFT, or the SFT baseline without reasoning [paper §4]",
    )
    training.add_training_arguments(
        parser, epochs=5, lr=2e-5, warmup_ratio=0.06, schedule="cosine", provenance="paper App. A"
    )
    group = parser.add_argument_group("accumulation")
    group.add_argument(
        "--grad-accum",
        type=at_least(1),
        default=1,
        help="micro-steps of --batch-size rows a rank and update [paper App. A: 2 per GPU × 4]",
    )
    return parser.parse_args(argv)


# -------------------------------------------------------------------------------- pure functions


def target_text(example, target):
    """What the model learns to write: §3.2 reasoning and answer, or the answer alone."""
    if target == "answer":
        return common.format_answer(example.quintuples)
    return common.format_response(example.row["cot"], example.quintuples)


def target_ids(processor, text, stop):
    """Response tokens and the stop id: exactly these carry loss. A special token that the text spells stays
    text."""
    text = vlm.plain_text(processor, text)
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"] + [stop]


def sft_loss(logps, completion_mask, batch_tokens):
    """Eq. 1: negative log-likelihood of the response. [B, C], [B, C], tokens of the whole batch → scalar.

    VARIANT: per-example means, label smoothing, token weights.
    """
    return -(logps * completion_mask).sum() / batch_tokens


# -------------------------------------------------------------------------------- main


def load_data(args):
    """→ (training examples, validation examples), images not looked at yet. Raises InputError."""
    if args.target == "answer":
        return training.load_splits(args, ("quintuples",))
    train, val = training.load_splits(args, ("quintuples", "cot"), made_by="made by 02_filter.py")
    for example in train:
        if common.parse_cot(example.row["cot"]) is None:
            parts = ", ".join(common.COT_PARTS)
            raise InputError(
                f"{args.data}: id {example.id}: 'cot' lacks one of its parts ({parts}): "
                "take the file of 02_filter.py"
            )
    return train, val


@common.exit_codes
def main(args):
    # 1. Data, model, engine; whatever would stop the run later stops it here
    ranks = training.setup(distributed=True, hours=args.timeout)
    torch.manual_seed(args.seed)  # KEEP: LoRA's A is drawn here, the same on every rank
    args.prompt = "reason" if args.target == "cot" else "direct"
    rank_rows = args.batch_size * args.grad_accum
    rows = rank_rows * ranks.world
    with ranks.together():
        config, dtype = training.read_ds_config(args, ranks)
        train, val = load_data(args)
        processor = vlm.load_processor(args.model, args.min_pixels, args.max_pixels)
    train, val, content = checks.usable_splits(train, val, processor, dtype, args, ranks)
    with ranks.together():
        training.check_sizes(args, rows, len(train))
    run = Run(args, ranks, content, rows)
    with ranks.together():
        model, _ = vlm.load(args.model, dtype, ranks.device, processor)
    checks.prove(model, processor, train[0], args, ranks)
    with ranks.together():
        model = lora.add_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout)
    stop = vlm.stop_ids(model, processor)[0]
    engine = training.make_engine(model, args, config, args.grad_accum)

    # 2. Sizes
    total, eval_steps = training.count_steps(args, len(train), rows)
    if ranks.main:
        shares = f"{ranks.world} ranks × {args.grad_accum} × {args.batch_size}"
        sizes = f"{len(train)} rows, {rows} an update ({shares})"
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        print(f"{sizes}: {total} updates; {trainable:,} trainable parameters in {dtype}", flush=True)

    # 3. Train
    steps = run.resume(engine, total)
    bar = training.progress_bar("sft", total, steps, ranks)
    for step in steps:
        began = time.perf_counter()
        before = None if run.changed else training.fingerprint(model)
        lr = training.set_learning_rate(engine, step, total, args)
        training.seed_step(args.seed, step, ranks.rank)
        mine = slice(ranks.rank * rank_rows, (ranks.rank + 1) * rank_rows)
        indices = training.batch_indices(len(train), rows, step, args.seed)[mine]
        batch = [train[i] for i in indices]
        with ranks.together():
            texts = [target_text(example, args.target) for example in batch]
            targets = [target_ids(processor, text, stop) for text in texts]
            template = common.PROMPTS[args.prompt]
            items = [(template.format(text=example.text), example.image) for example in batch]
            prompts = vlm.encode(model, processor, items)
        [tokens] = ranks.sum(sum(map(len, targets)))  # of the whole batch: 2 ranks × B = 1 rank × 2B
        model.train()
        nll = 0.0
        with training.out_of_memory("--gradient-checkpointing or a smaller --batch-size"):
            for start in range(0, rank_rows, args.batch_size):
                micro = slice(start, start + args.batch_size)
                completions = [[ids] for ids in targets[micro]]  # one response a prompt
                logps, _, mask = rollout.completion_logps(model, prompts[micro], completions)  # [B, C]
                loss = sft_loss(logps, mask, tokens)
                nll += loss.item()
                # gradients add up over micro-steps and ranks: Eq. 1 is a sum, its denominator the tokens of
                # them all
                engine.backward(loss * ranks.world, scale_wrt_gas=False)
                engine.step()
        [loss] = ranks.sum(nll)
        row = {"step": step + 1, "epoch": round((step + 1) * rows / len(train), 4)}
        row["loss"] = loss
        row["lr"] = lr
        row["grad_norm"] = float(engine.get_global_grad_norm())
        responses = [{"id": example.id, "response": text} for example, text in zip(batch, texts, strict=True)]
        run.check_step(model, step, row, before, responses)
        if row["grad_norm"] == 0:
            run.fail(f"step {step + 1}: gradient norm 0 at loss {loss:.3g}: nothing is being trained")
        seconds = time.perf_counter() - began
        row["tokens"] = int(tokens)
        row["tokens_per_second"] = round(tokens / seconds, 1)
        row["peak_memory_mib"] = round(training.peak_memory())

        # 4. Validate, save
        validated = (step + 1) % eval_steps == 0 or step + 1 == total
        if validated:
            row |= training.validate_and_keep(run, model, processor, val, step + 1, ranks, args)
        run.log([row])
        shown = f"loss {loss:.3f}{run.best_text()} {row['tokens_per_second']:.0f} tok/s"
        bar.set_postfix_str(shown, refresh=False)
        bar.update()
        if run.finish_step(engine, step + 1, total, validated):
            break
    bar.close()
    run.say_done(total)


if __name__ == "__main__":
    main(parse_args())
