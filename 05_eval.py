"""Evaluate: predict quintuples for tweets, store every response, and score the stored file (§4, Tables 1–3, Figure 5).

Headline: micro F1 of exact, directed quintuples over per-example sets; an unparsable response is an empty prediction, never dropped.

Deviations and decisions:
  1. [ours] `set` vote: the most frequent set of quintuples, the earliest one on a tie; unparsed responses do not vote.
  2. [ours] `tuple` vote: every quintuple in at least a share --tau of the parsed responses.
  3. [ours] 95 % intervals: percentile bootstrap that resamples tweets (rows with the same text and image together).
  4. [ours] zero-shot asks for the answer alone (`direct`); an adapter is asked with the prompt it was trained with.

    python    05_eval.py --model Qwen/Qwen2.5-VL-7B-Instruct --adapter runs/grpo/best --data test.json --image-dir img --out runs/test
    deepspeed 05_eval.py --model … --adapter … --data test.json --image-dir img --out runs/test100 --samples 100 --vote set
    python    05_eval.py --predictions runs/test/predictions.jsonl                 # score again, no model
    python    05_eval.py --predictions eega.jsonl --data test.json --out runs/eega # another system's quintuples

Reads:  --data, any of the three formats; without gold it is prediction only
        --predictions, ours, or {"id": "17_06_4705", "quintuples": [["Josh Gordon", "per", "Browns", "org", "member of"]]}
Writes: OUT/predictions.jsonl {"id", "text", "image", "quintuples": gold, "prompt": "reason", "responses": [{"text", "finished"}], …}
        OUT/quintuples.jsonl  {"id", "quintuples": predicted, after the vote}    OUT/metrics.json
"""

import argparse
import contextlib
import dataclasses
import hashlib
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

MATCHING = {**common.MATCHING, "jmere_folded": lambda quintuples: {tuple(map(str.casefold, q)) for q in quintuples}}
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


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    g = p.add_argument_group("input and output")
    g.add_argument("--data", help="tweets, with or without gold; JSONL, JMERE or MNRE (with --predictions: the gold to score against)")
    g.add_argument("--image-dir", help="folder of the images; default: beside --data")
    g.add_argument("--predictions", help="score this stored file; no model is loaded")
    g.add_argument("--out", help="output folder; with --predictions it may be absent: tables on screen only")
    g.add_argument("--fresh", action="store_true", help="delete the predictions stored in --out first")
    g.add_argument("--limit", type=int, help="only the first N tweets of --data")
    g.add_argument("--skip-bad", action="store_true", help="drop wrong rows and unreadable images, and say how many")
    g.add_argument("--merge-repeats", action="store_true", help="join rows of the same text and image, as the V2 release does")
    g = p.add_argument_group("model")
    g.add_argument("--model", help="name or folder [paper §4: Qwen/Qwen2.5-VL-7B-Instruct, llava-hf/llava-1.5-7b-hf]")
    g.add_argument("--adapter", help="LoRA folder made by 03 or 04; absent: zero-shot")
    g.add_argument("--prompt", choices=("reason", "direct"), help="default: the adapter's own; zero-shot: direct [ours: not stated]")
    dtypes = ("auto", "bfloat16", "float32")
    g.add_argument(
        "--dtype", choices=dtypes, default="auto", help="of the weights; auto: bfloat16 on a GPU, float32 on CPU [ours: not stated]"
    )
    g = p.add_argument_group("sampling")
    g.add_argument("--samples", type=int, default=1, help="responses per tweet, 100 in Figure 5 [paper §4]")
    g.add_argument("--temperature", type=float, default=0.8, help="0 is greedy [paper §4]")
    g.add_argument("--top-p", type=float, default=1.0, help="[ours: not stated, so none]")
    g.add_argument("--max-new-tokens", type=int, default=2048, help="[paper §4]")
    g.add_argument("--batch-rows", type=int, default=64, help="responses decoded together; changes speed, not answers [ours: fits 80 GB]")
    g = p.add_argument_group("scoring")
    g.add_argument("--vote", choices=("set", "tuple"), default="set", help="how several responses become one answer [paper §4; rule ours]")
    g.add_argument("--tau", type=float, default=0.5, help="share of responses a quintuple needs under --vote tuple [ours: majority]")
    g.add_argument("--resamples", type=int, default=1000, help="of the bootstrap [ours: usual]")
    g = p.add_argument_group("runtime")
    g.add_argument("--seed", type=int, default=0, help="of sampling and bootstrap [ours]")
    g.add_argument("--local_rank", type=int, help="set by the deepspeed launcher [upstream default]")
    args = p.parse_args(argv)
    if args.predictions and (args.model or args.adapter or args.prompt):
        p.error("--predictions scores what is stored: --model, --adapter and --prompt do not apply")
    if not args.predictions and not (args.model and args.data and args.out):
        p.error("give --model, --data and --out to predict, or --predictions FILE to score")
    if min(args.samples, args.batch_rows, args.resamples, args.max_new_tokens, args.limit or 1) < 1 or args.limit == 0:
        p.error("--samples, --batch-rows, --resamples, --max-new-tokens and --limit start at 1")
    if args.samples > 1 and args.temperature == 0:
        p.error(f"--samples {args.samples} with --temperature 0 would store one answer {args.samples} times: drop one of the two")
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
                    raise InputError(f"{path}:{number}: stored with {', '.join(other)}: use another --out, or delete it with --fresh")
                expected = example and common.to_row(example, path)
                if not expected or (row["text"], row["image"]) != (expected["text"], expected["image"]):
                    raise InputError(f"{path}:{number}: id {row['id']} is not this tweet of --data: use another --out, or --fresh")
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
        for path in out.glob("predictions*.jsonl") if args.fresh else ():
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
    settings = {name: getattr(args, name) for name in ("model", "samples", "temperature", "top_p", "max_new_tokens", "seed")}
    settings["dtype"] = args.dtype if args.dtype != "auto" else "float32" if ranks.device.type == "cpu" else "bfloat16"
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
        todo = sorted((e for e in examples if e.id not in done), key=prompt_length, reverse=True)[ranks.rank :: ranks.world]
        if ranks.main:
            old = sum(e.id in done for e in examples)
            print(f"{len(examples)} tweets, {old} stored already, {args.samples} responses each, {prompt} prompt, {settings['dtype']}")
        if todo:
            model, processor = vlm.load(args.model, getattr(vlm.torch, settings["dtype"]), ranks.device)
            model = vlm.load_adapter(model, args.adapter) if args.adapter else model
            sampling = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_p": args.top_p}
            part, size = out / f"predictions.rank{ranks.rank}.jsonl", max(1, args.batch_rows // args.samples)
            bar = tqdm(total=len(todo), unit="tweet", disable=not ranks.main or None)
            with common.AppendFile(part) as file, bar:
                for start in range(0, len(todo), size):
                    batch = todo[start : start + size]
                    items = [(template.format(text=e.text), e.image) for e in batch]
                    keys = [(args.seed, e.id) for e in batch]  # the same answers whatever the batch, the ranks or --limit
                    answers = vlm.generate(model, processor, items, args.samples, **sampling, keys=keys, batch_rows=args.batch_rows)
                    for example, samples in zip(batch, answers, strict=True):
                        responses = [{"text": s.text, "finished": s.finished, "tokens": len(s.ids)} for s in samples]
                        row = {**common.to_row(example, part), "prompt": prompt, "responses": responses, "settings": settings}
                        file.append([{**row, "key": example.id, "usage": None}])
                    bar.update(len(batch))
        ranks.barrier()
        if ranks.main:
            merge(out, known, settings)
    return ranks.main


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
            raise InputError(f"{path}:{number}: id {name} has another text in --data: these predictions are of other data")
        predictions[name] = _from_responses(path, number, row) if "responses" in row else _from_quintuples(path, number, row)
    if unknown:
        raise InputError(f"{path}: {len(unknown)} of {len(predictions)} ids are not in the data ({', '.join(unknown[:3])}, …): other data?")
    if not predictions:
        raise InputError(f"{path}: no prediction in it")
    return predictions


def _from_responses(path, number, row):
    if row.get("prompt") not in ("reason", "direct") or not isinstance(row["responses"], list) or not row["responses"]:
        raise InputError(f"{path}:{number}: expected 'prompt' reason or direct and a list of 'responses' (made by 05_eval.py)")
    direct, answers, parsed, counts, thoughts = row["prompt"] == "direct", [], [], Counter(), set()
    for item in row["responses"]:
        if not isinstance(item, dict) or not isinstance(item.get("text"), str):
            raise InputError(f"{path}:{number}: a response without 'text' (made by 05_eval.py)")
        response, finished = common.parse_response(item["text"], direct), item.get("finished", True)
        said = finished if direct else "</answer>" in item["text"]  # an empty answer that was given, not one that never came
        answers.append(response.quintuples)
        parsed.append(bool(response.quintuples or said and not response.malformed))
        thoughts.add(hash(" ".join(response.think.split())))
        shape = {"well_formed": response.well_formed and finished, "cut_off": not finished, "unparsed": not parsed[-1]}
        counts.update({"responses": 1, **{name: int(value) for name, value in shape.items()}, "malformed_items": response.malformed})
    return Prediction(answers, parsed, counts, len(thoughts))


def _from_quintuples(path, number, row):
    items = row.get("quintuples")
    if not isinstance(items, list):
        raise InputError(f"{path}:{number}: expected 'responses' (ours) or a list of 'quintuples' [[e1, t1, e2, t2, r], …]")
    good = [q for q in items if isinstance(q, list) and len(q) == 5 and all(isinstance(x, str) and x.strip() for x in q)]
    parsed, malformed = bool(good) or not items, len(items) - len(good)
    counts = Counter(responses=1, well_formed=int(not malformed), cut_off=0, unparsed=int(not parsed), malformed_items=malformed)
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
        return [q for q, n in Counter(q for answer in voters for q in answer).items() if n >= tau * len(voters) - 1e-9]
    winner = max(counts := Counter(map(frozenset, voters)), key=counts.get)  # a Counter keeps order: the earliest on a tie
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
        result[metric] |= {f"{name}_95": [low[i], high[i]] for i, name in enumerate(("precision", "recall", "f1"))}
    return result


def per_relation(preds, golds):
    """{relation: micro scores}, most frequent in gold first."""
    counts = defaultdict(lambda: [0, 0, 0])
    for pred, gold in zip(preds, golds, strict=True):
        pred, gold = set(pred), set(gold)
        for i, group in enumerate((pred & gold, pred, gold)):
            for q in group:
                counts[q.relation][i] += 1
    return {name: common.micro(*counts[name]) for name in sorted(counts, key=lambda name: (-counts[name][2], -counts[name][1], name))}


def per_size(preds, golds):
    """{number of gold quintuples: micro scores, examples}."""
    counts, sizes = match_counts(preds, golds, set), np.array([min(len(set(gold)), 4) for gold in golds])
    groups = {name: sizes == size for size, name in enumerate(("0", "1", "2", "3", "4 or more"))}
    return {name: {"examples": int(m.sum())} | common.micro(*counts[m].sum(0).tolist()) for name, m in groups.items() if m.any()}


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
        p = common.Quintuple(pred.tail, pred.tail_type, pred.head, pred.head_type, pred.relation) if crossed else pred
        if overlap(p.head, gold.head) and overlap(p.tail, gold.tail):
            same = [a == b for a, b in zip(p, gold)]
            kind = "span" if not (same[0] and same[2]) else "type" if not (same[1] and same[3]) else "direction" if same[4] else "relation"
            fits.append((sum(same), not crossed, kind))
    return max(fits)[::2] if fits else None


def classify(pred, gold, parsed=True):
    """The errors of one example → [(class, false positive or None, false negative or None)].

    False positives and negatives about the same entities are paired one to one, most equal components first; the rest is
    spurious, and missing (unparsed where no response could be read).
    """
    wrong, missed = [q for q in dict.fromkeys(pred) if q not in gold], [q for q in dict.fromkeys(gold) if q not in pred]
    links = [(-fit[0], i, j, fit[1]) for i, p in enumerate(wrong) for j, g in enumerate(missed) if (fit := compare_quintuples(p, g))]
    errors, used_wrong, used_missed = [], set(), set()
    for _, i, j, kind in sorted(links):
        if i not in used_wrong and j not in used_missed:
            errors.append((kind, wrong[i], missed[j]))
            used_wrong.add(i)
            used_missed.add(j)
    errors += [("spurious", q, None) for i, q in enumerate(wrong) if i not in used_wrong]
    return errors + [("missing" if parsed else "unparsed", None, q) for j, q in enumerate(missed) if j not in used_missed]


# ------------------------------------------------------------------------------------------------ tables


def table(header, rows):
    """Aligned columns: text to the left, numbers to the right."""
    lines = [[str(x) for x in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    right = [i > 0 and all(not isinstance(row[i], str) or row[i][:1].isdigit() for row in rows) for i in range(len(header))]
    return "\n".join("  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right)).rstrip() for row in lines) + "\n"


def cells(scores):
    return [f"{100 * scores[name]:.2f}" for name in ("precision", "recall", "f1")] + [scores[name] for name in ("tp", "pred", "gold")]


def show(metrics):
    """The tables of metrics.json, as text."""
    columns = ("P %", "R %", "F1 %", "tp", "pred", "gold")
    rows = [(RULES[name], s, "–".join(f"{100 * x:.2f}" for x in s["f1_95"])) for name, s in metrics["scores"].items()]
    yield table(("", *columns, "95 % of F1", "equal means"), [(title, *cells(s), interval, rule) for (title, rule), s, interval in rows])
    yield table(("gold quintuples", "tweets", *columns), [(name, s["examples"], *cells(s)) for name, s in metrics["per_size"].items()])
    yield table(("relation", *columns), [(name, *cells(s)) for name, s in metrics["per_relation"].items()])
    yield table(("error", "false pos.", "false neg.", "what it is"), [(name, *n, ERRORS[name]) for name, n in metrics["errors"].items()])
    if metrics["confusion"]:
        yield table(("gold relation", "predicted", "times"), metrics["confusion"][:10])


def evaluate(args, examples, predictions):
    """All figures of one stored file: what metrics.json holds."""
    finals = {name: vote(p.answers, p.parsed, args.vote, args.tau) for name, p in predictions.items()}
    total = Counter()
    for example in examples:
        total.update(predictions[example.id].counts if example.id in predictions else {})
    metrics = {"examples": len(examples), "without_prediction": sum(e.id not in predictions for e in examples), "responses": dict(total)}
    metrics |= {"vote": args.vote, "tau": args.tau if args.vote == "tuple" else None, "seed": args.seed, "resamples": args.resamples}
    scored = [e for e in examples if e.quintuples is not None]
    metrics |= {"without_gold": len(examples) - len(scored)}
    if scored:
        preds, golds = [finals.get(e.id, []) for e in scored], [e.quintuples for e in scored]
        _, tweets = np.unique([f"{e.text}\0{e.image}" for e in scored], return_inverse=True)
        parsed = [e.id not in predictions or any(predictions[e.id].parsed) for e in scored]
        errors = [error for p, g, ok in zip(preds, golds, parsed) for error in classify(p, g, ok)]
        confusion = Counter((g.relation, p.relation) for kind, p, g in errors if kind == "relation")
        metrics["scores"] = headline(preds, golds, tweets, args.resamples, args.seed)
        metrics["matching"] = {name: rule for name, (_, rule) in RULES.items()}
        metrics |= {"per_relation": per_relation(preds, golds), "per_size": per_size(preds, golds)}
        metrics["errors"] = {name: [sum(k == name and e[i] is not None for k, *e in errors) for i in (0, 1)] for name in ERRORS}
        metrics["confusion"] = [(*pair, n) for pair, n in confusion.most_common()]
    return metrics, finals


@common.cli
def main(args):
    # 1. The tweets
    out, known, examples = args.out and Path(args.out), None, None
    if args.data:
        examples = common.load_examples(args.data, args.image_dir, skip_bad=args.skip_bad, merge_repeats=args.merge_repeats)
        if not args.predictions:
            examples = common.check_images(examples, args.skip_bad)
        known = {e.id: e for e in examples}
        examples = examples[: args.limit]

    # 2. Predictions, stored
    path = Path(args.predictions) if args.predictions else out / "predictions.jsonl"
    if not args.predictions and not predict(args, examples, known, out):
        return
    if examples is None:
        if "responses" not in next(common.read_jsonl(path), (0, {}))[1]:
            raise InputError(f"{path}: holds quintuples without the tweets they are of: give the gold with --data")
        examples = [dataclasses.replace(e, row={}) for e in common.load_examples(path)][: args.limit]  # responses are read below
    predictions = read_predictions(path, known)

    # 3. Score that file
    metrics, finals = evaluate(args, examples, predictions)
    without = (
        f"{metrics['without_prediction']} without a prediction (counted as empty), {metrics['without_gold']} without gold (not scored)"
    )
    print(f"{path}: {len(examples)} tweets, {without}")
    print("responses: " + ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in metrics["responses"].items()) + "\n")
    if "scores" in metrics:
        print(*show(metrics), sep="\n")
    else:
        print(f"{sum(map(len, finals.values()))} quintuples predicted; no gold, so no score")
    if out:
        common.write_atomic(out / "metrics.json", json.dumps(metrics, ensure_ascii=False, indent=1) + "\n")
        rows = ({"id": e.id, "quintuples": [list(q) for q in finals.get(e.id, [])]} for e in examples)
        common.write_atomic(out / "quintuples.jsonl", "".join(map(common.jsonl_line, rows)))
        print(f"written: {out}/metrics.json, {out}/quintuples.jsonl" + ("" if args.predictions else f", {path}"))


if __name__ == "__main__":
    main(parse_args())
