"""Evaluate: predict quintuples for tweets, store every response, and score the stored file (§4, Tables 1–3, Figure 5).

Headline: micro F1 of exact, directed quintuples over per-example sets; an unparsable response is an empty prediction, never dropped.

Deviations and decisions:
  1. [ours] `set` vote: the most frequent set of quintuples, the earliest one on a tie; unparsed responses do not vote.
  2. [ours] `tuple` vote: every quintuple in at least a share --tau of the parsed responses.
  3. [ours] 95 % intervals: percentile bootstrap that resamples tweets (rows with the same text and image together).
  4. [ours] zero-shot asks for the answer alone (`direct`); an adapter is asked with the prompt it was trained with.
  5. [ours] F1@k: random subsets of k of the N stored responses, drawn for each tweet by itself; ± is the standard deviation over subsets.

    python    05_eval.py --model Qwen/Qwen2.5-VL-7B-Instruct --adapter runs/grpo/best --data test.json --image-dir img --out runs/test
    deepspeed 05_eval.py --model … --adapter … --data test.json --image-dir img --out runs/test100 --samples 100 --vote set
    python    05_eval.py --predictions runs/test/predictions.jsonl                 # score again, no model
    python    05_eval.py --predictions eega.jsonl --data test.json --out runs/eega # another system's quintuples
    python    05_eval.py --api --model gpt-4o-2024-11-20 --data test.json --image-dir img --out runs/gpt4o --price 2.5 10 --dry-run
    python    05_eval.py --merge merged/ --model Qwen/Qwen2.5-VL-7B-Instruct --adapter runs/grpo/best   # one model, for servers
    python    05_eval.py --compare SFT=runs/sft-test JMERE-R1=runs/test --out runs/table1   # the paper's tables, differences, p

Reads:  --data, any of the three formats; without gold it is prediction only
        --predictions, ours, or {"id": "17_06_4705", "quintuples": [["Josh Gordon", "per", "Browns", "org", "member of"]]}
Writes: OUT/predictions.jsonl {"id", "text", "image", "quintuples": gold, "prompt": "reason", "responses": [{"text", "finished"}], …}
        OUT/quintuples.jsonl  {"id", "quintuples": predicted, after the vote}    OUT/metrics.json    OUT/report.html (--report)
        OUT/answers.jsonl     every choice an API model gave, append-only        OUT/compare.md, OUT/compare.json (--compare)
"""

import argparse
import contextlib
import hashlib
import json
from collections import Counter, defaultdict
from pathlib import Path

from PIL import Image
from tqdm import tqdm

import common
from common import InputError
from lib import api, ask, data, report, scoring
from lib.predictions import Prediction, adapter_hash, merge, stored, stored_file, stored_run, take


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    g = p.add_argument_group("input and output")
    g.add_argument(
        "--data",
        help="tweets, with or without gold; JSONL, JMERE or MNRE (with --predictions: the gold to score against)",
    )
    g.add_argument("--image-dir", help="folder of the images; default: beside --data")
    g.add_argument("--predictions", help="score this stored file; no model is loaded")
    g.add_argument("--out", help="output folder; with --predictions it may be absent: tables on screen only")
    g.add_argument(
        "--compare",
        nargs="+",
        metavar="[NAME=]RUN",
        help="stored predictions (file or --out folder) against the first of them",
    )
    g.add_argument(
        "--merge",
        metavar="FOLDER",
        help="write --model + --adapter as one model into FOLDER, prove it equal, and end [ours]",
    )
    g.add_argument(
        "--report", action="store_true", help="write OUT/report.html, one page that opens from disk [ours]"
    )
    g.add_argument(
        "--report-examples", type=int, default=500, help="tweets shown on that page, 15 kB each [ours]"
    )
    g.add_argument("--fresh", action="store_true", help="delete the predictions stored in --out first")
    g.add_argument(
        "--skip-bad", action="store_true", help="drop wrong rows and unreadable images, and say how many"
    )
    g.add_argument(
        "--merge-repeats",
        action="store_true",
        help="join rows of the same text and image, as the V2 release does",
    )
    g = p.add_argument_group("model")
    g.add_argument(
        "--model", help="name or folder [paper §4: Qwen/Qwen2.5-VL-7B-Instruct, llava-hf/llava-1.5-7b-hf]"
    )
    g.add_argument("--adapter", help="LoRA folder made by 03 or 04; absent: zero-shot")
    g.add_argument(
        "--prompt",
        choices=("reason", "direct"),
        help="default: the adapter's own; zero-shot: direct [ours: not stated]",
    )
    g.add_argument(
        "--dtype",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="auto: bf16 on a GPU, fp32 on CPU [ours: not stated]",
    )
    g = p.add_argument_group("sampling")
    g.add_argument("--samples", type=int, default=1, help="responses per tweet, 100 in Figure 5 [paper §4]")
    g.add_argument("--top-p", type=float, default=1.0, help="[ours: not stated, so none]")
    g.add_argument("--max-new-tokens", type=int, default=2048, help="[paper §4]")
    g.add_argument(
        "--static-cache",
        action="store_true",
        help="fixed shapes, CUDA graphs on a GPU; never run on one [ours: off]",
    )
    g.add_argument(
        "--batch-rows",
        type=int,
        default=64,
        help="responses decoded together; changes speed, not answers [ours: fits 80 GB]",
    )
    g = p.add_argument_group("scoring")
    g.add_argument(
        "--vote",
        choices=("set", "tuple"),
        default="set",
        help="how several responses become one answer [paper §4; rule ours]",
    )
    g.add_argument(
        "--tau",
        type=float,
        default=0.5,
        help="share of responses a quintuple needs under --vote tuple [ours: majority]",
    )
    g.add_argument("--resamples", type=int, default=1000, help="of the bootstrap [ours: usual]")
    g.add_argument(
        "--tau-from",
        metavar="RUN",
        help="stored validation predictions: take the --tau best there [ours: never on test]",
    )
    g.add_argument("--subsets", type=int, default=20, help="random subsets for F1@k [ours]")
    g = p.add_argument_group(
        "API models and shared settings", "--temperature is 0.8 without --api [paper §4]; 0 is greedy"
    )
    g.add_argument(
        "--api",
        action="store_true",
        help="--model is an OpenAI-compatible server's, key in OPENAI_API_KEY [paper §4: GPT-4o]",
    )
    api.add_api_arguments(g, g)
    g = p.add_argument_group("runtime")
    g.add_argument("--seed", type=int, default=0, help="of sampling and bootstrap [ours]")
    g.add_argument(
        "--local_rank", "--local-rank", type=int, help="set by the deepspeed launcher [upstream default]"
    )
    args = p.parse_args(argv)
    stored_only = args.predictions or args.compare
    if stored_only and (args.model or args.adapter or args.prompt or args.api):
        p.error(
            "--predictions and --compare score what is stored: --model, --adapter, --prompt and --api do not apply"
        )
    if args.merge and not (args.model and args.adapter):
        p.error("--merge needs --model and --adapter")
    if not stored_only and not args.merge and not (args.model and args.data and args.out):
        p.error("give --model, --data and --out to predict, --predictions FILE to score, or --compare A B")
    if (
        min(
            args.samples,
            args.batch_rows,
            args.resamples,
            args.subsets,
            args.max_new_tokens,
            1 if args.limit is None else args.limit,
        )
        < 1
    ):
        p.error("--samples, --batch-rows, --resamples, --subsets, --max-new-tokens and --limit start at 1")
    if args.report and (not args.out or args.compare):
        p.error("--report needs --out, and one run")
    if args.tau_from and args.vote != "tuple":
        p.error("--tau-from belongs to --vote tuple")
    if args.api and args.adapter:
        p.error("--api asks a server: --adapter does not apply")
    if not args.api:
        if (
            args.base_url
            or args.max_tokens
            or args.param
            or args.price
            or args.budget
            or args.batch
            or args.dry_run
        ):
            p.error("--base-url, --max-tokens, --param, --price, --budget, --batch and --dry-run need --api")
        args.temperature = 0.8 if args.temperature is None else args.temperature
    if args.samples > 1 and args.temperature == 0:
        p.error(
            f"--samples {args.samples} with --temperature 0 would store one answer {args.samples} times: drop one of the two"
        )
    if not 0 < args.tau <= 1:
        p.error(f"--tau {args.tau}: expected a share, above 0 and at most 1")
    return args


# ------------------------------------------------------------------------------------------------ predict and store


def prompt_length(example):
    """Relative length of a prompt, to sort by: Qwen2.5-VL turns 28 × 28 pixels into one token; LLaVA's images are all equal."""
    with Image.open(example.image) as image:
        return image.width * image.height // 784 + len(example.text) // 4


def predict(args, examples, known, out):
    """Store --samples responses for each example that has none yet. → True on the rank that goes on to score."""
    from lib import lora, rollout, training, vlm  # torch lives there: scoring a stored file needs none of it

    ranks, stack = training.setup(), contextlib.ExitStack()
    own = lora.read_recipe(args.adapter).prompt if args.adapter else "direct"
    prompt = args.prompt or own
    if ranks.main and args.adapter and prompt != own:
        print(f"note: the adapter was trained with the {own} prompt, --prompt {prompt} overrides it")
    template = common.REASON_PROMPT if prompt == "reason" else common.DIRECT_PROMPT
    settings = {
        name: getattr(args, name)
        for name in ("model", "samples", "temperature", "top_p", "max_new_tokens", "seed")
    }
    settings["dtype"] = (
        args.dtype if args.dtype != "auto" else "fp32" if ranks.device.type == "cpu" else "bf16"
    )
    settings["adapter"] = adapter_hash(args.adapter) if args.adapter else None
    settings["prompt"] = hashlib.sha256(template.encode()).hexdigest()[:16]

    with stack:
        # 1. What is stored already. KEEP: all ranks read between gather and barrier, so none appends while another reads.
        fault = ranks.gather(take(args, out, stack) if ranks.main else None)[0]
        if fault:
            raise fault
        done = stored(out, known, settings)
        ranks.barrier()

        # 2. Generate, longest prompts first: memory runs out at the start or never. Each rank appends to its own file.
        todo = sorted((e for e in examples if e.id not in done), key=prompt_length, reverse=True)[
            ranks.rank :: ranks.world
        ]
        if ranks.main:
            old = sum(e.id in done for e in examples)
            print(
                f"{len(examples)} tweets, {old} stored already, {args.samples} responses each, {prompt} prompt, {settings['dtype']}"
            )
        if todo:
            model, processor = vlm.load(args.model, vlm.DTYPES[settings["dtype"]], ranks.device)
            model = lora.load_adapter(model, args.adapter) if args.adapter else model
            sampling = {
                "max_new_tokens": args.max_new_tokens,
                "temperature": args.temperature,
                "top_p": args.top_p,
            }
            sampling |= {"static": args.static_cache}
            part, size = out / f"predictions.rank{ranks.rank}.jsonl", max(1, args.batch_rows // args.samples)
            bar = tqdm(total=len(todo), unit="tweet", disable=not ranks.main or None)
            with ask.AppendFile(part) as file, bar:
                for start in range(0, len(todo), size):
                    batch = todo[start : start + size]
                    items = [(template.format(text=e.text), e.image) for e in batch]
                    keys = [
                        (args.seed, e.id) for e in batch
                    ]  # the same answers whatever the batch, the ranks or --limit
                    answers = rollout.generate(
                        model,
                        processor,
                        items,
                        args.samples,
                        **sampling,
                        keys=keys,
                        batch_rows=args.batch_rows,
                    )
                    for example, samples in zip(batch, answers, strict=True):
                        responses = [
                            {"text": s.text, "finished": s.finished, "tokens": len(s.completion_ids)}
                            for s in samples
                        ]
                        row = {
                            **data.to_row(example, part),
                            "prompt": prompt,
                            "responses": responses,
                            "settings": settings,
                        }
                        file.append([{**row, "key": example.id, "usage": None}])
                    bar.update(len(batch))
        ranks.barrier()
        if ranks.main:
            merge(out, known, settings)
    return ranks.main


def ask_server(args, examples, known, out):
    """--api: --samples choices of the server for each example, kept in OUT/answers.jsonl. → calls that failed; None: nothing to score."""
    prompt, path = args.prompt or "direct", out / "answers.jsonl"
    template = common.REASON_PROMPT if prompt == "reason" else common.DIRECT_PROMPT
    params = api.request_params(args)
    client = api.client_of(args, args.model)
    jobs = {
        e.id: client.job(data.to_row(e, path), template.format(text=e.text), e.image, args.samples)
        for e in known.values()
    }
    wanted = [jobs[e.id] for e in examples]
    if args.dry_run:
        return ask.print_estimate(client, wanted, 300, "predict", path)
    client.check()
    settings = {
        "model": args.model,
        "params": params,
        "prompt": hashlib.sha256(template.encode()).hexdigest()[:16],
    }
    with contextlib.ExitStack() as stack:
        if fault := take(args, out, stack):
            raise fault
        stored(out, known, settings)
        file = stack.enter_context(ask.AppendFile(path, "05_eval.py", ask.asked_again(args.retry)))
        for number, row in data.read_jsonl(path):
            if row["id"] in jobs and row["key"] != jobs[row["id"]].key:
                raise InputError(
                    f"{path}:{number}: answers another prompt, image or model than this command: use another --out, or --fresh"
                )
        failed, answers = ask.ask_all(client, wanted, file, batch=args.batch), defaultdict(list)
        if args.batch in ask.NO_ANSWERS:
            return None  # --batch collect goes on from here
        for _, row in data.read_jsonl(
            path
        ):  # a refusal or a filtered answer is stored, and read as no answer
            answer = {"text": row["response"], "finished": row["status"] != "length", "status": row["status"]}
            answers[row["id"]].append({**answer, "model": row["model_answered"]})
        target = out / "predictions.jsonl"
        rows = [(data.to_row(e, target), answers[e.id]) for e in known.values() if answers[e.id]]
        lines = [
            data.jsonl_line({**row, "prompt": prompt, "responses": given, "settings": settings})
            for row, given in rows
        ]
        data.write_atomic(target, "".join(lines))
    return failed


# ------------------------------------------------------------------------------------------------ read and vote


# ------------------------------------------------------------------------------------------------ metrics


# ------------------------------------------------------------------------------------------------ many responses (Figure 5)


# ------------------------------------------------------------------------------------------------ tables


def show(metrics):
    """The tables of metrics.json, as text."""
    columns = ("P %", "R %", "F1 %", "tp", "pred", "gold")
    rows = [
        (scoring.RULES[name], s, "–".join(f"{100 * x:.2f}" for x in s["f1_95"]))
        for name, s in metrics["scores"].items()
    ]
    yield scoring.table(
        ("", *columns, "95 % of F1", "equal means"),
        [(title, *scoring.cells(s), interval, rule) for (title, rule), s, interval in rows],
    )
    if many := metrics.get("samples"):
        ks = sorted(
            {k for k in (1, 2, 3, 5, 10, 20, 30, 50, 70, 100, 200, 500) if k < many["n"]} | {many["n"]}
        )
        rows = [(k, f"{100 * mean:.2f}", f"{100 * std:.2f}") for k, mean, std in many["f1_at_k"] if k in ks]
        yield scoring.table(
            ("k responses", f"F1@k by {metrics['vote']} vote, %", f"± over {many['subsets']} subsets"), rows
        )
        yield (
            f"single response {100 * many['single_mean']:.2f} ± {100 * many['single_std']:.2f}, best of {many['n']} (oracle) "
            f"{100 * many['best_of_n']:.2f}; a tweet has {many['distinct_answers']:.1f} distinct answers on {many['distinct_paths']:.1f} "
            "distinct reasoning paths\n"
        )
    yield scoring.table(
        ("gold quintuples", "tweets", *columns),
        [(name, s["examples"], *scoring.cells(s)) for name, s in metrics["per_size"].items()],
    )
    yield scoring.table(
        ("relation", *columns), [(name, *scoring.cells(s)) for name, s in metrics["per_relation"].items()]
    )
    yield scoring.table(
        ("error", "false pos.", "false neg.", "what it is"),
        [(name, *n, scoring.ERRORS[name]) for name, n in metrics["errors"].items()],
    )
    if metrics["confusion"]:
        yield scoring.table(("gold relation", "predicted", "times"), metrics["confusion"][:10])


def evaluate(args, examples, predictions):
    """All figures of one stored file: what metrics.json holds."""
    finals = {name: scoring.vote(p.answers, p.parsed, args.vote, args.tau) for name, p in predictions.items()}
    total = Counter()
    for example in examples:
        total.update(predictions[example.id].counts if example.id in predictions else {})
    metrics = {
        "examples": len(examples),
        "without_prediction": sum(e.id not in predictions for e in examples),
        "responses": dict(total),
    }
    metrics |= {
        "vote": args.vote,
        "tau": args.tau if args.vote == "tuple" else None,
        "seed": args.seed,
        "resamples": args.resamples,
    }
    scored = [e for e in examples if e.quintuples is not None]
    metrics |= {"without_gold": len(examples) - len(scored)}
    if scored:
        preds, golds = [finals.get(e.id, []) for e in scored], [e.quintuples for e in scored]
        parsed = [e.id not in predictions or any(predictions[e.id].parsed) for e in scored]
        errors = [error for p, g, ok in zip(preds, golds, parsed) for error in scoring.classify(p, g, ok)]
        confusion = Counter((g.relation, p.relation) for kind, p, g in errors if kind == "relation")
        metrics["scores"] = scoring.headline(
            preds, golds, scoring.tweet_numbers(scored), args.resamples, args.seed
        )
        metrics["matching"] = {name: rule for name, (_, rule) in scoring.RULES.items()}
        metrics |= {
            "per_relation": scoring.per_relation(preds, golds),
            "per_size": scoring.per_size(preds, golds),
        }
        metrics["errors"] = {
            name: [sum(k == name and e[i] is not None for k, *e in errors) for i in (0, 1)]
            for name in scoring.ERRORS
        }
        metrics["confusion"] = [(*pair, n) for pair, n in confusion.most_common()]
        n = min((len(predictions[e.id].answers) for e in scored if e.id in predictions), default=1)
        if n > 1:
            nothing = Prediction([()] * n, [False] * n, Counter(), 0)
            metrics["samples"] = scoring.diversity(
                [predictions.get(e.id, nothing) for e in scored], golds, args
            )
    return metrics, finals


def best_tau(args):
    """The τ of the tuple vote with the best F1 on stored validation predictions; the middle one of equals."""
    examples, predictions = stored_run(args.tau_from)
    if any(e.quintuples is None for e in examples):
        raise InputError(f"--tau-from {args.tau_from}: has tweets without gold, so no F1")
    scores, golds = {}, [e.quintuples for e in examples]
    for tau in (i / 20 for i in range(1, 21)):
        preds = [
            scoring.vote(predictions[e.id].answers, predictions[e.id].parsed, "tuple", tau) for e in examples
        ]
        scores[tau] = common.micro(*scoring.match_counts(preds, golds, set).sum(0).tolist())["f1"]
    equals = [tau for tau in scores if scores[tau] == max(scores.values())]
    print(
        f"--tau {equals[len(equals) // 2]:g}, the best on {args.tau_from} (F1 {100 * max(scores.values()):.2f} %)"
    )
    return equals[len(equals) // 2]


# ------------------------------------------------------------------------------------------------ report.html


@common.exit_codes
def main(args):
    if args.merge:
        from lib.merge import merge_adapter

        proof = merge_adapter(args.model, args.adapter, args.merge)
        print(
            "{}: merged in {dtype}; logits differ from base + adapter by {difference:.1e} of the largest".format(
                args.merge, **proof
            )
        )
        print(
            "allowed {tolerance:.0e}; without the adapter they would differ by {effect:.1e}".format(**proof)
        )
        return None

    # 1. The tweets
    out, known, examples = args.out and Path(args.out), None, None
    if args.data:
        examples = data.load_examples(
            args.data, args.image_dir, skip_bad=args.skip_bad, merge_repeats=args.merge_repeats
        )
        if not (args.predictions or args.compare):
            examples = data.check_images(examples, args.skip_bad)
        known = {e.id: e for e in examples}
        examples = examples[: args.limit]
    if args.tau_from:
        args.tau = best_tau(args)
    if args.compare:
        rows = scoring.compare(args, known)
        print(*scoring.show_comparison(rows), sep="\n")
        print(
            f"Δ, its interval and p (two-sided): against {args.compare[0]}, paired bootstrap of {args.resamples} resamples over tweets."
        )
        if out:
            data.write_atomic(out / "compare.md", "\n".join(scoring.show_comparison(rows, markdown=True)))
            data.write_atomic(out / "compare.json", json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
            print(f"written: {out}/compare.md, {out}/compare.json")
        return None

    # 2. Predictions, stored
    path, failed = stored_file(args.predictions) if args.predictions else out / "predictions.jsonl", 0
    if args.api:
        failed = ask_server(args, examples, known, out)
        if failed is None:
            return None
    elif not args.predictions and not predict(args, examples, known, out):
        return None
    examples, predictions = stored_run(path, known, args.limit)

    # 3. Score that file
    metrics, finals = evaluate(args, examples, predictions)
    absent = f"{metrics['without_prediction']} without a prediction (counted as empty), {metrics['without_gold']} without gold (not scored)"
    print(f"{path}: {len(examples)} tweets, {absent}")
    print(
        "responses: "
        + ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in metrics["responses"].items())
        + "\n"
    )
    if "scores" in metrics:
        print(*show(metrics), sep="\n")
    else:
        print(f"{sum(map(len, finals.values()))} quintuples predicted; no gold, so no score")
    if out:
        data.write_atomic(out / "metrics.json", json.dumps(metrics, ensure_ascii=False, indent=1) + "\n")
        rows = ({"id": e.id, "quintuples": [list(q) for q in finals.get(e.id, [])]} for e in examples)
        data.write_atomic(out / "quintuples.jsonl", "".join(map(data.jsonl_line, rows)))
        print(
            f"written: {out}/metrics.json, {out}/quintuples.jsonl" + ("" if args.predictions else f", {path}")
        )
        if args.report:
            report.write_report(args, out, path, examples, predictions, finals, metrics)
    return 1 if failed else 0


if __name__ == "__main__":
    main(parse_args())
