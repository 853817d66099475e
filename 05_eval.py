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
import base64
import contextlib
import dataclasses
import hashlib
import io
import json
import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

import common
from common import InputError

MATCHING = {
    **common.MATCHING,
    "jmere_folded": lambda quintuples: {tuple(map(str.casefold, q)) for q in quintuples},
}
RULES = {  # metric: (title, matching rule), in the order they are shown
    "jmere": ("JMERE", "all five parts equal, direction and case count"),
    "jmere_undirected": ("JMERE undirected", "head and tail may swap (EEGA's published scorer)"),
    "jmere_folded": ("JMERE case-folded", "as JMERE, upper and lower case alike"),
    "mner": ("MNER", "text and type of the quintuples' entities, distinct per tweet"),
}
ERRORS = {  # class: what is wrong, the first that applies; every false positive and false negative is in exactly one
    "span": "text of an entity differs, the two texts overlap",
    "type": "entities right, a type is wrong",
    "relation": "entities and types right, relation wrong",
    "direction": "all right but head and tail are exchanged",
    "missing": "gold with no predicted counterpart",
    "spurious": "predicted with no gold counterpart",
    "unparsed": "gold of a tweet whose responses hold no readable answer",
}
TABLES = {  # section: {row: the paper's JMERE P, R, F1 and MNER F1 on the test set, %; None: not known here}
    "Zero-shot (Table 3)": {
        "zero-shot GPT-4o": (None, None, 12.68, None),
        "zero-shot Qwen2.5-VL-7B": (None, None, 9.60, None),
        "zero-shot LLaVA-1.5-7B": (None, None, 9.52, None),
    },
    "Trained (Table 1)": {
        "EEGA": (58.26, 52.61, 55.29, 78.59),
        "SFT": (56.88, 47.81, 51.95, 78.67),
        "CoT-SFT": (50.54, 43.59, 46.77, 74.75),
        "Only-RL": (40.11, 34.53, 37.11, 71.89),
        "JMERE-R1": (58.99, 54.84, 56.84, 79.20),
    },
    "Ablations (Table 2)": dict.fromkeys(
        ("no partial reward", "no score filter", "no re-prediction filter", "no filter"), (None,) * 4
    ),
    "Other runs": {},
}


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
    common.add_api_arguments(g, g)
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


def adapter_hash(folder):
    """Of the adapter's weights and config: another training run into the same folder must not meet the old predictions."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("adapter_*")):
        with open(file, "rb") as handle:
            while chunk := handle.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def stored(out, known, settings):
    """{id: (file, byte offset)} of the rows in OUT; raises InputError where they were made from other data or settings."""
    where = {}
    for path in sorted(out.glob("predictions*.jsonl")):
        with open(path, "rb") as handle:
            offset = 0
            for number, line in enumerate(handle, 1):
                try:
                    row = json.loads(line)
                    here, example = row["settings"], known.get(row["id"])
                except (ValueError, KeyError, TypeError):
                    raise InputError(
                        f"{path}:{number}: not a prediction of 05_eval.py: delete the line, or start anew with --fresh"
                    ) from None
                other = [f"{k} {here.get(k)!r} (now {v!r})" for k, v in settings.items() if here.get(k) != v]
                if other:
                    raise InputError(
                        f"{path}:{number}: stored with {', '.join(other)}: use another --out, or delete it with --fresh"
                    )
                expected = example and common.to_row(example, path)
                if not expected or (row["text"], row["image"]) != (expected["text"], expected["image"]):
                    raise InputError(
                        f"{path}:{number}: id {row['id']} is not this tweet of --data: use another --out, or --fresh"
                    )
                where.setdefault(row["id"], (path, offset))
                offset += len(line)
    return where


def merge(out, known, settings):
    """The rows of all ranks → predictions.jsonl in the order of the data, with its gold of today; then the parts go."""
    target, where = out / "predictions.jsonl", stored(out, known, settings)
    with contextlib.ExitStack() as stack:
        sources = {path: stack.enter_context(open(path, "rb")) for path, _ in where.values()}
        handle = stack.enter_context(open(f"{target}.tmp", "w", encoding="utf-8", newline="\n"))
        for example in (e for e in known.values() if e.id in where):
            path, offset = where[example.id]
            sources[path].seek(offset)
            row = json.loads(sources[path].readline())
            row = {name: value for name, value in row.items() if name not in ("quintuples", "key", "usage")}
            handle.write(common.jsonl_line({**common.to_row(example, target), **row}))
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(f"{target}.tmp", target)
    for part in out.glob("predictions.rank*.jsonl"):
        part.unlink()


def take(args, out, stack):
    """Rank 0, before anybody reads OUT: lock it for this run, delete or mend what a killed run left. → what is wrong, or None."""
    try:
        stack.enter_context(common.AppendFile(out / ".lock"))
        for path in [*out.glob("predictions*.jsonl"), *out.glob("answers.*")] if args.fresh else ():
            path.unlink()
        for path in out.glob("predictions.rank*.jsonl"):  # perhaps of more ranks than today
            common.AppendFile(path).handle.close()  # opening cuts a torn last line
    except InputError as error:
        return error


def predict(args, examples, known, out):
    """Store --samples responses for each example that has none yet. → True on the rank that goes on to score."""
    import vlm  # torch lives there: scoring a stored file needs none of it

    ranks, stack = vlm.setup(), contextlib.ExitStack()
    own = vlm.adapter_prompt(args.adapter) if args.adapter else "direct"
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
            model = vlm.load_adapter(model, args.adapter) if args.adapter else model
            sampling = {
                "max_new_tokens": args.max_new_tokens,
                "temperature": args.temperature,
                "top_p": args.top_p,
            }
            sampling |= {"static": args.static_cache}
            part, size = out / f"predictions.rank{ranks.rank}.jsonl", max(1, args.batch_rows // args.samples)
            bar = tqdm(total=len(todo), unit="tweet", disable=not ranks.main or None)
            with common.AppendFile(part) as file, bar:
                for start in range(0, len(todo), size):
                    batch = todo[start : start + size]
                    items = [(template.format(text=e.text), e.image) for e in batch]
                    keys = [
                        (args.seed, e.id) for e in batch
                    ]  # the same answers whatever the batch, the ranks or --limit
                    answers = vlm.generate(
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
                            {"text": s.text, "finished": s.finished, "tokens": len(s.ids)} for s in samples
                        ]
                        row = {
                            **common.to_row(example, part),
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


def ask(args, examples, known, out):
    """--api: --samples choices of the server for each example, kept in OUT/answers.jsonl. → calls that failed; None: nothing to score."""
    prompt, path = args.prompt or "direct", out / "answers.jsonl"
    template = common.REASON_PROMPT if prompt == "reason" else common.DIRECT_PROMPT
    params = common.request_params(args)
    client = common.ChatClient(
        args.model, args.base_url, args.concurrency, args.timeout, args.price, args.budget, params
    )
    jobs = {
        e.id: client.job(common.to_row(e, path), template.format(text=e.text), e.image, args.samples)
        for e in known.values()
    }
    wanted = [jobs[e.id] for e in examples]
    if args.dry_run:
        return common.print_estimate(client, wanted, 300, "predict")
    client.require_key()
    settings = {
        "model": args.model,
        "params": params,
        "prompt": hashlib.sha256(template.encode()).hexdigest()[:16],
    }
    with contextlib.ExitStack() as stack:
        if fault := take(args, out, stack):
            raise fault
        stored(out, known, settings)
        file = stack.enter_context(common.AppendFile(path))
        for number, row in common.read_jsonl(path):
            if row["id"] in jobs and row["key"] != jobs[row["id"]].key:
                raise InputError(
                    f"{path}:{number}: answers another prompt, image or model than this command: use another --out, or --fresh"
                )
        failed, answers = common.ask_all(client, wanted, file, batch=args.batch), defaultdict(list)
        if args.batch == "submit":
            return None  # --batch collect goes on from here
        for _, row in common.read_jsonl(
            path
        ):  # a refusal or a filtered answer is stored, and read as no answer
            answer = {"text": row["response"], "finished": row["status"] != "length", "status": row["status"]}
            answers[row["id"]].append({**answer, "model": row["model_answered"]})
        target = out / "predictions.jsonl"
        rows = [(common.to_row(e, target), answers[e.id]) for e in known.values() if answers[e.id]]
        lines = [
            common.jsonl_line({**row, "prompt": prompt, "responses": given, "settings": settings})
            for row, given in rows
        ]
        common.write_atomic(target, "".join(lines))
    return failed


# ------------------------------------------------------------------------------------------------ read and vote


class Prediction(NamedTuple):
    answers: list  # one tuple of Quintuples a response
    parsed: list  # one bool a response: an answer was there to read, be it empty
    counts: Counter  # responses, well_formed, cut_off, unparsed, malformed items
    paths: int  # distinct reasonings


def read_predictions(path, known=None):
    """{id: Prediction} of our file or another system's; one row in memory at a time. known: {id: Example} its ids must be among."""
    predictions, unknown = {}, []
    for number, row in common.read_jsonl(path):
        if row.get("id") is None:
            raise InputError(f"{path}:{number}: missing 'id'")
        name = str(row["id"])
        if name in predictions:
            raise InputError(f"{path}:{number}: id {name} stands there twice, expected once")
        if known is not None and name not in known:
            unknown.append(name)
        elif known is not None and "responses" in row and row.get("text") != known[name].text:
            raise InputError(
                f"{path}:{number}: id {name} has another text in --data: these predictions are of other data"
            )
        predictions[name] = (
            _from_responses(path, number, row) if "responses" in row else _from_quintuples(path, number, row)
        )
    if unknown:
        raise InputError(
            f"{path}: {len(unknown)} of {len(predictions)} ids are not in the data ({', '.join(unknown[:3])}, …): other data?"
        )
    if not predictions:
        raise InputError(f"{path}: no prediction in it")
    return predictions


def _from_responses(path, number, row):
    if (
        row.get("prompt") not in ("reason", "direct")
        or not isinstance(row["responses"], list)
        or not row["responses"]
    ):
        raise InputError(
            f"{path}:{number}: expected 'prompt' reason or direct and a list of 'responses' (made by 05_eval.py)"
        )
    direct, answers, parsed, counts, thoughts = row["prompt"] == "direct", [], [], Counter(), set()
    for item in row["responses"]:
        if not isinstance(item, dict) or not isinstance(item.get("text"), str):
            raise InputError(f"{path}:{number}: a response without 'text' (made by 05_eval.py)")
        response, finished = common.parse_response(item["text"], direct), item.get("finished", True)
        # an empty answer that was given is an answer; one that was cut off, refused or filtered is none
        said = finished and item.get("status", "ok") == "ok" if direct else "</answer>" in item["text"]
        answers.append(response.quintuples)
        parsed.append(bool(response.quintuples or said and not response.malformed))
        thoughts |= {hash(" ".join(response.think.split()))} if response.think else set()
        shape = {
            "well_formed": response.well_formed and finished,
            "cut_off": not finished,
            "unparsed": not parsed[-1],
        }
        counts.update(
            {
                "responses": 1,
                **{name: int(value) for name, value in shape.items()},
                "malformed_items": response.malformed,
            }
        )
    return Prediction(answers, parsed, counts, len(thoughts))


def _from_quintuples(path, number, row):
    items = row.get("quintuples")
    if not isinstance(items, list):
        raise InputError(
            f"{path}:{number}: expected 'responses' (ours) or a list of 'quintuples' [[e1, t1, e2, t2, r], …]"
        )
    good = [
        q
        for q in items
        if isinstance(q, list) and len(q) == 5 and all(isinstance(x, str) and x.strip() for x in q)
    ]
    parsed, malformed = bool(good) or not items, len(items) - len(good)
    counts = Counter(
        responses=1,
        well_formed=int(not malformed),
        cut_off=0,
        unparsed=int(not parsed),
        malformed_items=malformed,
    )
    return Prediction([tuple(common.quintuple(*q) for q in good)], [parsed], counts, 0)


def vote(answers, parsed, how="set", tau=0.5):
    """Several answers → one, a list without repeats; unparsed answers do not vote.

    >>> vote([("a",), ("b", "a"), ("a", "b"), ()], [1, 1, 1, 0]), vote([("a",), ("b",), ("a", "c")], [1, 1, 1], "tuple", 0.5)
    (['b', 'a'], ['a'])
    """
    voters = [tuple(dict.fromkeys(answer)) for answer, ok in zip(answers, parsed) if ok]
    if not voters:
        return []
    if how == "tuple":
        return [
            q
            for q, n in Counter(q for answer in voters for q in answer).items()
            if n >= tau * len(voters) - 1e-9
        ]
    winner = max(
        counts := Counter(map(frozenset, voters)), key=counts.get
    )  # a Counter keeps order: the earliest on a tie
    return list(next(answer for answer in voters if frozenset(answer) == winner))


# ------------------------------------------------------------------------------------------------ metrics


def match_counts(preds, golds, keys):
    """True positives, predicted and gold of each example, as sets of `keys` → int array [N, 3]."""
    sets = [(keys(pred), keys(gold)) for pred, gold in zip(preds, golds, strict=True)]
    return np.array([(len(pred & gold), len(pred), len(gold)) for pred, gold in sets]).reshape(-1, 3)


def bootstrap(counts, tweets, resamples, seed):
    """Micro precision, recall, F1 of resampled tweets → [3, resamples]. Same seed, same tweets: the same resamples, so paired.

    counts: [N, 3] of match_counts; tweets: [N], number of the tweet each example belongs to.
    """
    clusters = np.zeros((tweets.max() + 1, 3), int)
    np.add.at(clusters, tweets, counts)
    rng, n = np.random.default_rng(seed), len(clusters)
    tp, pred, gold = (rng.multinomial(n, np.full(n, 1 / n), size=resamples) @ clusters).T  # each [resamples]
    return np.stack([tp / np.maximum(pred, 1), tp / np.maximum(gold, 1), 2 * tp / np.maximum(pred + gold, 1)])


def headline(preds, golds, tweets, resamples, seed):
    """{metric: micro scores with 95 % intervals} for each matching rule."""
    result = {}
    for metric in RULES:
        counts = match_counts(preds, golds, MATCHING[metric])
        low, high = np.percentile(bootstrap(counts, tweets, resamples, seed), (2.5, 97.5), axis=1)
        result[metric] = common.micro(*counts.sum(0).tolist())
        result[metric] |= {
            f"{name}_95": [low[i], high[i]] for i, name in enumerate(("precision", "recall", "f1"))
        }
    return result


def per_relation(preds, golds):
    """{relation: micro scores}, most frequent in gold first."""
    counts = defaultdict(lambda: [0, 0, 0])
    for pred, gold in zip(preds, golds, strict=True):
        pred, gold = set(pred), set(gold)
        for i, group in enumerate((pred & gold, pred, gold)):
            for q in group:
                counts[q.relation][i] += 1
    return {
        name: common.micro(*counts[name])
        for name in sorted(counts, key=lambda name: (-counts[name][2], -counts[name][1], name))
    }


def per_size(preds, golds):
    """{number of gold quintuples: micro scores, examples}."""
    counts, sizes = match_counts(preds, golds, set), np.array([min(len(set(gold)), 4) for gold in golds])
    groups = {name: sizes == size for size, name in enumerate(("0", "1", "2", "3", "4 or more"))}
    return {
        name: {"examples": int(m.sum())} | common.micro(*counts[m].sum(0).tolist())
        for name, m in groups.items()
        if m.any()
    }


def overlap(a, b):
    """Whether two entity texts share a word, or one lies within the other; case does not count."""
    a, b = a.casefold(), b.casefold()
    return a in b or b in a or not set(a.split()).isdisjoint(b.split())


def compare_quintuples(pred, gold):
    """(equal components, error class) of two unequal quintuples about the same two entities, else None.

    They are aligned head to head, or crosswise where only that fits or more components are equal then.
    """
    fits = []
    for crossed in (False, True):
        p = (
            common.Quintuple(pred.tail, pred.tail_type, pred.head, pred.head_type, pred.relation)
            if crossed
            else pred
        )
        if overlap(p.head, gold.head) and overlap(p.tail, gold.tail):
            same = [a == b for a, b in zip(p, gold)]
            kind = (
                "span"
                if not (same[0] and same[2])
                else "type"
                if not (same[1] and same[3])
                else "direction"
                if same[4]
                else "relation"
            )
            fits.append((sum(same), not crossed, kind))
    return max(fits)[::2] if fits else None


def classify(pred, gold, parsed=True):
    """The errors of one example → [(class, false positive or None, false negative or None)].

    False positives and negatives about the same entities are paired one to one, most equal components first; the rest is
    spurious, and missing (unparsed where no response could be read).
    """
    wrong, missed = (
        [q for q in dict.fromkeys(pred) if q not in gold],
        [q for q in dict.fromkeys(gold) if q not in pred],
    )
    links = [
        (-fit[0], i, j, fit[1])
        for i, p in enumerate(wrong)
        for j, g in enumerate(missed)
        if (fit := compare_quintuples(p, g))
    ]
    errors, used_wrong, used_missed = [], set(), set()
    for _, i, j, kind in sorted(links):
        if i not in used_wrong and j not in used_missed:
            errors.append((kind, wrong[i], missed[j]))
            used_wrong.add(i)
            used_missed.add(j)
    errors += [("spurious", q, None) for i, q in enumerate(wrong) if i not in used_wrong]
    return errors + [
        ("missing" if parsed else "unparsed", None, q) for j, q in enumerate(missed) if j not in used_missed
    ]


# ------------------------------------------------------------------------------------------------ many responses (Figure 5)


def f1_at_k(preds, golds, how="set", tau=0.5, subsets=20, seed=0):
    """Micro F1 of `vote` over k of the N responses of each example, for k = 1 … N → [subsets S, N].

    preds: one Prediction an example. Each subset shuffles the responses of each example; its first k are a random subset of size k.
    """
    n, rng = min(len(p.answers) for p in preds), np.random.default_rng(seed)
    tp, pred = np.zeros((2, subsets, n), int)
    for p, gold in zip(preds, golds, strict=True):
        order = rng.permuted(np.tile(np.arange(n), (subsets, 1)), axis=1)  # [S, N]
        sets = [frozenset(answer) if ok else None for answer, ok in zip(p.answers[:n], p.parsed)]
        units = sets if how == "set" else [q for answer in sets if answer for q in answer]
        index = {
            unit: i for i, unit in enumerate(dict.fromkeys(unit for unit in units if unit is not None))
        }  # what is voted on: U units
        if not index:
            continue
        ballots = np.zeros((n, len(index)), np.int32)  # [N, U]
        for i, answer in enumerate(sets):
            if answer is not None:
                ballots[i, [index[answer]] if how == "set" else [index[q] for q in answer]] = 1
        votes = ballots[order].cumsum(1, dtype=np.int32)  # [S, N, U]
        if how == "set":
            first = np.minimum.accumulate(
                np.where(ballots[order], order[..., None].astype(np.int32), n), 1
            )  # ties: the earliest
            winner, cast = (votes * (n + 1) - first).argmax(2), votes.any(2)  # [S, N]
            tp += np.array([len(unit & set(gold)) for unit in index])[winner] * cast
            pred += np.array([len(unit) for unit in index])[winner] * cast
        else:
            voters = np.array([answer is not None for answer in sets])[order].cumsum(1)  # [S, N]
            chosen = (votes >= tau * voters[..., None] - 1e-9) & (votes > 0)
            tp += (chosen & np.array([unit in gold for unit in index])).sum(2)
            pred += chosen.sum(2)
    return 2 * tp / np.maximum(pred + sum(len(set(gold)) for gold in golds), 1)


def diversity(preds, golds, args):
    """What many responses are worth: F1@k, single responses, the best of N by an oracle, distinct answers and reasoning paths."""
    curve = f1_at_k(preds, golds, args.vote, args.tau, args.subsets, args.seed)
    n = curve.shape[1]
    counts = np.stack(
        [match_counts([p.answers[i] for p in preds], golds, set) for i in range(n)]
    )  # [N, examples, 3]
    tp, pred, gold = np.moveaxis(counts, 2, 0)
    best = np.where(pred + gold > 0, 2 * tp / np.maximum(pred + gold, 1), 1).argmax(0)  # [examples]
    single = [common.micro(*total)["f1"] for total in counts.sum(1).tolist()]
    answers = [len({frozenset(answer) for answer, ok in zip(p.answers, p.parsed) if ok}) for p in preds]
    return {
        "n": n,
        "subsets": args.subsets,
        "f1_at_k": [
            [k, m, d] for k, (m, d) in enumerate(zip(curve.mean(0).tolist(), curve.std(0).tolist()), 1)
        ],
        "single_mean": float(np.mean(single)),
        "single_std": float(np.std(single)),
        "best_of_n": common.micro(*counts[best, np.arange(len(preds))].sum(0).tolist())["f1"],
        "distinct_paths": float(np.mean([p.paths for p in preds])),
        "distinct_answers": float(np.mean(answers)),
    }


# ------------------------------------------------------------------------------------------------ tables


def table(header, rows):
    """Aligned columns: text to the left, numbers to the right."""
    lines = [[str(x) for x in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    right = [
        i > 0 and all(not isinstance(row[i], str) or row[i][:1] in "0123456789+-–" for row in rows)
        for i in range(len(header))
    ]
    return (
        "\n".join(
            "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right)).rstrip()
            for row in lines
        )
        + "\n"
    )


def cells(scores):
    return [f"{100 * scores[name]:.2f}" for name in ("precision", "recall", "f1")] + [
        scores[name] for name in ("tp", "pred", "gold")
    ]


def show(metrics):
    """The tables of metrics.json, as text."""
    columns = ("P %", "R %", "F1 %", "tp", "pred", "gold")
    rows = [
        (RULES[name], s, "–".join(f"{100 * x:.2f}" for x in s["f1_95"]))
        for name, s in metrics["scores"].items()
    ]
    yield table(
        ("", *columns, "95 % of F1", "equal means"),
        [(title, *cells(s), interval, rule) for (title, rule), s, interval in rows],
    )
    if many := metrics.get("samples"):
        ks = sorted(
            {k for k in (1, 2, 3, 5, 10, 20, 30, 50, 70, 100, 200, 500) if k < many["n"]} | {many["n"]}
        )
        rows = [(k, f"{100 * mean:.2f}", f"{100 * std:.2f}") for k, mean, std in many["f1_at_k"] if k in ks]
        yield table(
            ("k responses", f"F1@k by {metrics['vote']} vote, %", f"± over {many['subsets']} subsets"), rows
        )
        yield (
            f"single response {100 * many['single_mean']:.2f} ± {100 * many['single_std']:.2f}, best of {many['n']} (oracle) "
            f"{100 * many['best_of_n']:.2f}; a tweet has {many['distinct_answers']:.1f} distinct answers on {many['distinct_paths']:.1f} "
            "distinct reasoning paths\n"
        )
    yield table(
        ("gold quintuples", "tweets", *columns),
        [(name, s["examples"], *cells(s)) for name, s in metrics["per_size"].items()],
    )
    yield table(("relation", *columns), [(name, *cells(s)) for name, s in metrics["per_relation"].items()])
    yield table(
        ("error", "false pos.", "false neg.", "what it is"),
        [(name, *n, ERRORS[name]) for name, n in metrics["errors"].items()],
    )
    if metrics["confusion"]:
        yield table(("gold relation", "predicted", "times"), metrics["confusion"][:10])


def tweet_numbers(examples):
    """[N] the tweet each example belongs to: rows with the same text and image are one."""
    return np.unique([f"{e.text}\0{e.image}" for e in examples], return_inverse=True)[1]


def evaluate(args, examples, predictions):
    """All figures of one stored file: what metrics.json holds."""
    finals = {name: vote(p.answers, p.parsed, args.vote, args.tau) for name, p in predictions.items()}
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
        errors = [error for p, g, ok in zip(preds, golds, parsed) for error in classify(p, g, ok)]
        confusion = Counter((g.relation, p.relation) for kind, p, g in errors if kind == "relation")
        metrics["scores"] = headline(preds, golds, tweet_numbers(scored), args.resamples, args.seed)
        metrics["matching"] = {name: rule for name, (_, rule) in RULES.items()}
        metrics |= {"per_relation": per_relation(preds, golds), "per_size": per_size(preds, golds)}
        metrics["errors"] = {
            name: [sum(k == name and e[i] is not None for k, *e in errors) for i in (0, 1)] for name in ERRORS
        }
        metrics["confusion"] = [(*pair, n) for pair, n in confusion.most_common()]
        n = min((len(predictions[e.id].answers) for e in scored if e.id in predictions), default=1)
        if n > 1:
            nothing = Prediction([()] * n, [False] * n, Counter(), 0)
            metrics["samples"] = diversity([predictions.get(e.id, nothing) for e in scored], golds, args)
    return metrics, finals


def stored_file(path):
    """A stored file, or the one in an --out folder."""
    return Path(path) / "predictions.jsonl" if Path(path).is_dir() else Path(path)


def stored_run(path, known=None, limit=None):
    """(examples, {id: Prediction}) of a stored file or an --out folder. known: the gold of --data, else the file's own."""
    path = stored_file(path)
    if known is None:
        if "responses" not in next(common.read_jsonl(path), (0, {}))[1]:
            raise InputError(
                f"{path}: holds quintuples without the tweets they are of: give the gold with --data"
            )
        known = {
            e.id: dataclasses.replace(e, row={}) for e in common.load_examples(path)
        }  # the responses are read one row at a time
    return list(known.values())[:limit], read_predictions(path, known)


def best_tau(args):
    """The τ of the tuple vote with the best F1 on stored validation predictions; the middle one of equals."""
    examples, predictions = stored_run(args.tau_from)
    if any(e.quintuples is None for e in examples):
        raise InputError(f"--tau-from {args.tau_from}: has tweets without gold, so no F1")
    scores, golds = {}, [e.quintuples for e in examples]
    for tau in (i / 20 for i in range(1, 21)):
        preds = [vote(predictions[e.id].answers, predictions[e.id].parsed, "tuple", tau) for e in examples]
        scores[tau] = common.micro(*match_counts(preds, golds, set).sum(0).tolist())["f1"]
    equals = [tau for tau in scores if scores[tau] == max(scores.values())]
    print(
        f"--tau {equals[len(equals) // 2]:g}, the best on {args.tau_from} (F1 {100 * max(scores.values()):.2f} %)"
    )
    return equals[len(equals) // 2]


def plain(name):
    return "".join(c for c in name.casefold() if c.isalnum())


def compare(args, known):
    """The runs of --compare in the layout of the paper's tables, each against the first by a paired bootstrap. → rows, as dicts."""
    rows, first, gold = {}, None, known
    for spec in args.compare:
        name, _, path = ("", "", spec) if Path(spec).exists() else spec.rpartition("=")
        name = name or (
            Path(path).stem if Path(path).stem != "predictions" else Path(path).absolute().parent.name
        )
        if plain(name) in rows:
            raise InputError(f"--compare: two runs are named {name}: name them, as in SFT={path}")
        examples, predictions = stored_run(path, gold, args.limit)
        gold = gold or {e.id: e for e in examples}
        if any(e.quintuples is None for e in examples):
            raise InputError(f"{path}: has tweets without gold: give the gold with --data")
        preds = [
            vote(p.answers, p.parsed, args.vote, args.tau) if (p := predictions.get(e.id)) else []
            for e in examples
        ]
        golds, tweets = [e.quintuples for e in examples], tweet_numbers(examples)
        samples = bootstrap(match_counts(preds, golds, set), tweets, args.resamples, args.seed)[
            2
        ]  # same seed: paired
        scores = headline(preds, golds, tweets, args.resamples, args.seed)
        row = {
            "name": name,
            "run": path,
            "tweets": len(examples),
            "without_prediction": sum(e.id not in predictions for e in examples),
        }
        row["scores"] = {metric: scores[metric] for metric in ("jmere", "mner")}
        if first is None:
            first = (scores["jmere"]["f1"], samples)
        else:
            difference = samples - first[1]
            tail = (
                1 + min((difference <= 0).sum(), (difference >= 0).sum()).item()
            )  # + 1: no finite number of resamples shows p = 0
            row |= {
                "f1_difference": scores["jmere"]["f1"] - first[0],
                "p": min(1.0, 2 * tail / (args.resamples + 1)),
            }
            row["difference_95"] = np.percentile(difference, (2.5, 97.5)).tolist()
        rows[plain(name)] = row
    papers = {
        plain(name): (section, name, row) for section, group in TABLES.items() for name, row in group.items()
    }
    result = [
        {"section": section, "name": name, "paper": paper, **rows.pop(key, {})}
        for key, (section, name, paper) in papers.items()
    ]
    starts = {
        "zero-shot": "Zero-shot (Table 3)",
        **dict.fromkeys(("no ", "without ", "w/o "), "Ablations (Table 2)"),
    }
    for row in rows.values():  # runs that are no row of the paper
        section = next((starts[s] for s in starts if row["name"].casefold().startswith(s)), "Other runs")
        result.append({"section": section, "paper": None, **row})
    return sorted(result, key=lambda row: list(TABLES).index(row["section"]))


COMPARED = (
    "P %",
    "R %",
    "F1 %",
    "95 % of F1",
    "MNER F1",
    "ΔF1",
    "95 % of Δ",
    "p",
    "paper P",
    "R",
    "F1",
    "MNER F1",
)


def compared_cells(row):
    def number(x, sign=""):
        return "–" if x is None else f"{x:{sign}.2f}"

    scores, difference = row.get("scores"), row.get("difference_95")
    ours = ["–"] * 5
    if scores:
        s = scores["jmere"]
        ours = [
            *cells(s)[:3],
            "–".join(number(100 * x) for x in s["f1_95"]),
            number(100 * scores["mner"]["f1"]),
        ]
    delta = ["–"] * 3
    if difference:
        delta = [
            number(100 * row["f1_difference"], "+"),
            " … ".join(number(100 * x, "+") for x in difference),
            f"{row['p']:.3f}",
        ]
    return [*ours, *delta, *map(number, row["paper"] or [None] * 4)]


def show_comparison(rows, markdown=False):
    """Tables 1 to 3 as text or Markdown; a section without a run of ours and without a figure of the paper is left out."""
    for section in TABLES:
        body = [
            (r["name"], *compared_cells(r))
            for r in rows
            if r["section"] == section and (r.get("scores") or any(r["paper"]))
        ]
        if body and markdown:
            lines = [(section, *COMPARED), ("---", *["---:"] * len(COMPARED)), *body]
            yield "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
        elif body:
            yield table((section, *COMPARED), body)


# ------------------------------------------------------------------------------------------------ report.html


def thumbnail(path, side=480):
    """The image as a small data URL, or None where it cannot be read (a file of another system may come without images)."""
    try:
        image = common.load_image(path)
    except InputError:
        return None
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=75)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def shown_example(example, prediction, final, row):
    """What the page says of one tweet: items [class, predicted or None, gold or None], the reasoning of the answer that won."""
    gold = example.quintuples
    items = [("correct", q, q) for q in gold or () if q in final] + (
        [("predicted", q, None) for q in final]
        if gold is None
        else classify(final, gold, prediction is None or any(prediction.parsed))
    )
    shown = {
        "id": example.id,
        "text": example.text,
        "image": thumbnail(example.image),
        "items": items,
        "reason": [],
        "raw": None,
    }
    if prediction and "responses" in row:
        sets = [frozenset(a) if ok else None for a, ok in zip(prediction.answers, prediction.parsed)]
        distance = [len(answer ^ frozenset(final)) if answer is not None else float("inf") for answer in sets]
        text = row["responses"][distance.index(min(distance))]["text"]
        think = common.parse_response(text, row["prompt"] == "direct").think
        before, *parts = common.COT_HEADING.split(think)  # [before, heading, body, heading, body, …]
        pieces = [("Reasoning", before), *zip(parts[::2], parts[1::2])]
        shown["reason"] = [(title, body.strip()) for title, body in pieces if body.strip()]
        shown["raw"] = None if any(prediction.parsed) else text
        shown["votes"] = [sets.count(frozenset(final)), len(sets), len(set(sets) - {None})]
    return shown


def write_report(args, out, path, examples, predictions, finals, metrics):
    """Fill the template report.html, which stands beside this script, with one JSON block."""
    rest, shown, settings = {e.id: e for e in examples[: args.report_examples]}, {}, {}
    for _, row in common.read_jsonl(
        path
    ):  # again, one row at a time: the texts of all responses need not be in memory
        name, settings = str(row["id"]), settings or row.get("settings", {})
        if name in rest:
            shown[name] = shown_example(rest.pop(name), predictions[name], finals[name], row)
    shown |= {name: shown_example(example, None, [], {}) for name, example in rest.items()}
    facts = {
        "tweets": metrics["examples"],
        "from": Path(path).name,
        **{n: settings.get(n) for n in ("model", "adapter", "temperature")},
    }
    facts |= {
        "responses": metrics["responses"].get("responses"),
        "vote": metrics["vote"] if "samples" in metrics else None,
    }
    facts |= {"without prediction": metrics["without_prediction"]}
    data = {
        "run": out.absolute().name,
        "facts": {name: value for name, value in facts.items() if value},
        "metrics": metrics,
    }
    data |= {
        "rules": RULES,
        "errors": ERRORS,
        "shown": [shown[e.id] for e in examples[: args.report_examples]],
    }
    data["paper"] = [(name, row[2]) for group in TABLES.values() for name, row in group.items() if row[2]]
    template = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    common.write_atomic(
        out / "report.html", template.replace("{{DATA}}", json.dumps(data).replace("<", "\\u003c"), 1)
    )
    pictures = sum(row["image"] is not None for row in data["shown"])
    print(f"written: {out}/report.html, {len(shown)} of {len(examples)} tweets, {pictures} with their image")


@common.cli
def main(args):
    if args.merge:
        import vlm

        proof = vlm.merge(args.model, args.adapter, args.merge)
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
        examples = common.load_examples(
            args.data, args.image_dir, skip_bad=args.skip_bad, merge_repeats=args.merge_repeats
        )
        if not (args.predictions or args.compare):
            examples = common.check_images(examples, args.skip_bad)
        known = {e.id: e for e in examples}
        examples = examples[: args.limit]
    if args.tau_from:
        args.tau = best_tau(args)
    if args.compare:
        rows = compare(args, known)
        print(*show_comparison(rows), sep="\n")
        print(
            f"Δ, its interval and p (two-sided): against {args.compare[0]}, paired bootstrap of {args.resamples} resamples over tweets."
        )
        if out:
            common.write_atomic(out / "compare.md", "\n".join(show_comparison(rows, markdown=True)))
            common.write_atomic(out / "compare.json", json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
            print(f"written: {out}/compare.md, {out}/compare.json")
        return None

    # 2. Predictions, stored
    path, failed = stored_file(args.predictions) if args.predictions else out / "predictions.jsonl", 0
    if args.api:
        failed = ask(args, examples, known, out)
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
        common.write_atomic(out / "metrics.json", json.dumps(metrics, ensure_ascii=False, indent=1) + "\n")
        rows = ({"id": e.id, "quintuples": [list(q) for q in finals.get(e.id, [])]} for e in examples)
        common.write_atomic(out / "quintuples.jsonl", "".join(map(common.jsonl_line, rows)))
        print(
            f"written: {out}/metrics.json, {out}/quintuples.jsonl" + ("" if args.predictions else f", {path}")
        )
        if args.report:
            write_report(args, out, path, examples, predictions, finals, metrics)
    return 1 if failed else 0


if __name__ == "__main__":
    main(parse_args())
