"""Keep the best chain of thought of each example: §3.2 and App. B of JMERE-R1.

Re-Prediction Filter: image, text and chain, without labels, go back to the model; the chain stays if the quintuples it then predicts
equal the gold set. Rule-Based Score Filter: the judge gives integers for common.SCORE_RULES, Python adds them up; below
`--threshold` of the points is dropped; the best chain per example stays, ties broken at random.

Deviations [ours]: rules and prompt wording (the paper describes, but does not print them); a chain that betrays that it saw the
labels ("the given quintuples") is rejected before anything is paid for it; `--hide-answer`.

    python 02_filter.py --cot cot.jsonl --out sft.jsonl --price 2.5 10 --dry-run
    python 02_filter.py --cot cot.jsonl --out sft.jsonl
    python 02_filter.py --cot cot.jsonl --out ablation.jsonl --no-score             # Table 2
    python 02_filter.py --cot cot.jsonl --out sft.jsonl --human human.jsonl        # Figure 6
    python 02_filter.py --cot cot.jsonl --out sft.jsonl --batch submit             # a day later: --batch collect (both passes)
    python 02_filter.py --cot cot.jsonl --out sft.jsonl --base-url http://127.0.0.1:8000/v1 --judge-model other

Both filters keep their answers in append-only files: another threshold or seed costs nothing, a killed run goes on.

Reads:  --cot, made by 01_distill.py
        {"id": "tw1", "text": "…", "image": "tw1.jpg", "quintuples": [[…]], "candidate": 0, "cot": "Image Desc…", "status": "ok", …}
Writes: --out, one row an example: the row of its best candidate and
        {…, "repredicted": [["Josh Gordon", "per", "Browns", "org", "member of"]], "scores": [2, 2, 2, 1, 1, 2], "score": 1.0}
        *.reprediction.jsonl and *.score.jsonl (the answers), *.rejected.jsonl (every other candidate, why),
        *.stats.json (the funnel), *.card.md (the data card), *.human.png
"""

import argparse
import importlib.util
import json
import math
import random
from collections import Counter
from fractions import Fraction
from pathlib import Path

import common
from lib import api, ask, data


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    io = parser.add_argument_group("files")
    io.add_argument("--cot", required=True, help="candidates made by 01_distill.py [paper §3.2]")
    io.add_argument("--out", required=True, help="training data for 03_sft.py, JSONL [paper §3.2]")
    io.add_argument("--image-dir", help="folder of the images [ours: default as --cot says]")
    io.add_argument(
        "--skip-bad",
        action="store_true",
        help="drop bad rows and images, and say how many [ours: default stops]",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", help="predicts again [paper App. B: the model that wrote the chains, the default]"
    )
    model.add_argument("--judge-model", help="scores [paper App. B: the same model, the default]")
    model.add_argument("--judge-base-url", help="its server [ours: default --base-url]")
    model.add_argument(
        "--judge-price", type=float, nargs=2, metavar=("IN", "OUT"), help="its price [ours: default --price]"
    )
    algorithm = parser.add_argument_group("algorithm")
    algorithm.add_argument(
        "--threshold",
        type=Fraction,
        default=Fraction(7, 10),
        help="lowest share of the points, 0.7 [paper §3.2]",
    )
    algorithm.add_argument(
        "--no-reprediction", action="store_true", help="leave that filter out [paper Table 2]"
    )
    algorithm.add_argument(
        "--no-score",
        action="store_true",
        help="leave that filter out; the chain is drawn at random [paper Table 2]",
    )
    algorithm.add_argument(
        "--hide-answer",
        action="store_true",
        help="strip stated quintuples before re-prediction [ours: a harder test]",
    )
    algorithm.add_argument(
        "--seed",
        type=int,
        default=0,
        help="breaks ties between equal scores [ours: the paper draws at random]",
    )
    algorithm.add_argument(
        "--human",
        help='human scores {"id", "candidate", "score"} to compare with; needs matplotlib [paper Figure 6]',
    )
    api.add_api_arguments(model, parser.add_argument_group("runtime"))
    args = parser.parse_args(argv)
    if not 0 <= args.threshold <= 1:
        parser.error(f"--threshold {float(args.threshold):g}, expected 0 to 1")
    if args.human and (args.no_score or not importlib.util.find_spec("matplotlib")):
        parser.error(
            "--human compares with the score filter, and draws with matplotlib: leave out --no-score, pip install matplotlib"
        )
    return args


def judge_prediction(row, gold):
    """→ (the quintuples predicted again, None or the reason to reject)."""
    if row is None:
        return None, "re-prediction: call failed"
    response = common.parse_response(row["response"], direct=True)
    pred = [list(q) for q in response.quintuples]
    if row["status"] != "ok":
        return pred, f"re-prediction: {row['status']}"
    if response.malformed:
        return pred, "re-prediction: unparsed"
    return pred, None if set(response.quintuples) == set(gold) else "re-prediction: differs from gold"


def judge_scores(row, threshold):
    """→ (integers, None or the reason to reject)."""
    if row is None:
        return None, "score: call failed"
    scores = common.parse_scores(row["response"]) if row["status"] == "ok" else None
    if scores is None:
        return None, f"score: {'unparsed' if row['status'] == 'ok' else row['status']}"
    return scores, None if Fraction(
        sum(scores), sum(common.POINTS)
    ) >= threshold else "score: below the threshold"


def ask_each(client, candidates, prompts, path, title, args):
    """One call a candidate → ({(id, candidate): its answer row}, number failed). Answers already in `path` cost nothing."""
    names = [name_of(candidate) for candidate in candidates]
    jobs = [
        client.job({"id": f"{id}#{k}"}, prompt, candidate.image)
        for (id, k), prompt, candidate in zip(names, prompts, candidates)
    ]
    if args.dry_run:
        ask.print_estimate(client, jobs, 60, title)
        return {}, 0
    with ask.AppendFile(path) as out:
        failed = ask.ask_all(client, jobs, out, batch=args.batch)
        answers = {row["key"]: row for _, row in data.read_jsonl(path)}
    return {name: answers[job.key] for name, job in zip(names, jobs) if job.key in answers}, failed


def agreement(path, points, png):
    """Figure 6: how the judge's points agree with human scores → figures, printed and drawn too. points: {(id, candidate): 0 … ten}."""
    import matplotlib.figure

    most, pairs, missing = sum(common.POINTS), [], 0
    for number, row in data.read_jsonl(path):
        share = row.get("score")
        if not isinstance(share, int | float) or not 0 <= share <= 1 or not {"id", "candidate"} <= row.keys():
            raise common.InputError(f'{path}:{number}: expected {{"id": …, "candidate": 0, "score": 0 to 1}}')
        name = str(row["id"]), row["candidate"]
        pairs += [(points[name], share)] if name in points else []
        missing += name not in points
    if not pairs:
        raise common.InputError(
            f"{path}: none of its {missing} candidates was scored by the judge: id and candidate as in --cot"
        )
    gaps = [judged / most - human for judged, human in pairs]
    rated = [
        (judged, math.floor(human * most + 0.5)) for judged, human in pairs
    ]  # kappa wants both on one scale: points
    seen = sum((a - b) ** 2 for a, b in rated)
    chance = sum((a - b) ** 2 for a, _ in rated for _, b in rated) / len(rated)
    bins = Counter(math.floor(gap * 10 + 0.5) for gap in gaps)
    result = {
        "compared": len(pairs),
        "not_judged": missing,
        "mean_absolute_error": sum(map(abs, gaps)) / len(gaps),
    }
    result |= {
        "within_0.1": sum(abs(gap) <= 0.1 + 1e-9 for gap in gaps) / len(gaps),
        "kappa": 1 - seen / chance if chance else None,
    }
    print(f"judge against people: {json.dumps(result)}\njudge − people, candidates")
    spread = range(min(bins), max(bins) + 1)
    for gap in spread:
        print(f"{gap / 10:+5.1f} {bins[gap]:>6} {'#' * round(50 * bins[gap] / max(bins.values()))}")
    figure = matplotlib.figure.Figure()
    axes = figure.subplots()
    axes.bar([gap / 10 for gap in spread], [bins[gap] for gap in spread], width=0.08)
    axes.set(
        xlabel="judge − people",
        ylabel="candidates",
        title=f"MAE {result['mean_absolute_error']:.3f}, n = {len(pairs)}",
    )
    figure.savefig(png)
    return result | {"histogram": {f"{gap / 10:+.1f}": bins[gap] for gap in spread}}


def name_of(candidate):
    return candidate.id, candidate.row["candidate"]


def count(candidates):
    return len(candidates), len({candidate.id for candidate in candidates})


@common.exit_codes
def main(args):
    params, out = api.request_params(args), Path(args.out)
    paid = not (args.no_reprediction and args.no_score)
    if paid and not args.dry_run:
        api.ChatClient.require_key()

    # 1. candidates, every fault found before the first paid call
    need = ("quintuples", "candidate", "cot", "status")
    loaded = data.load_examples(
        args.cot, args.image_dir, need, key=("id", "candidate"), skip_bad=args.skip_bad
    )
    loaded.sort(key=name_of)  # 01 writes as answers come in; the output should not depend on that
    firsts = list({example.id: example for example in reversed(loaded)}.values())[::-1][: args.limit]
    ids = (
        {example.id for example in data.check_images(firsts, args.skip_bad)}
        if paid
        else {example.id for example in firsts}
    )
    alive = [candidate for candidate in loaded if candidate.id in ids]
    stages, rejected, failed, extra = (
        [("distilled", *count(alive))],
        {},
        0,
        {},
    )  # rejected: (id, candidate) → reason; extra: → new fields

    def keep(stage, reasons):
        """Drop the candidates with a reason; one line of the funnel."""
        nonlocal alive
        rejected.update((name_of(c), reason) for c, reason in zip(alive, reasons, strict=True) if reason)
        alive = [candidate for candidate in alive if name_of(candidate) not in rejected]
        stages.append((stage, *count(alive)))

    keep("well formed", [None if c.row["status"] == "ok" else c.row["status"] for c in alive])
    leaks = [common.leaked(c.row["cot"], c.text) for c in alive]
    keep("no leaked label", [leak and f"leaked label: {leak}" for leak in leaks])

    # 2. who answers
    models = sorted({c.row.get("model") or "" for c in loaded})
    if paid and args.model is None and (len(models) > 1 or not models[0]):
        raise common.InputError(
            f"{args.cot}: chains by {len(models)} models ({', '.join(models)}): say with --model which predicts again"
        )
    model = args.model or models[0]
    limits = (args.concurrency, args.timeout)
    client = api.ChatClient(model, args.base_url, *limits, args.price, args.budget, params)
    judge_url, judge_price = args.judge_base_url or args.base_url, args.judge_price or args.price
    judge = api.ChatClient(args.judge_model or model, judge_url, *limits, judge_price, args.budget, params)

    # 3. Re-Prediction Filter
    if not args.no_reprediction:
        cots = [
            common.hide_answer(c.row["cot"], c.quintuples) if args.hide_answer else c.row["cot"]
            for c in alive
        ]
        prompts = [common.REPREDICT_PROMPT.format(text=c.text, cot=cot) for c, cot in zip(alive, cots)]
        answers, failed = ask_each(
            client, alive, prompts, out.with_suffix(".reprediction.jsonl"), "re-prediction", args
        )
        if args.batch == "submit" and len(answers) < len(alive):
            return 0  # --batch collect goes on from here
        verdicts = [judge_prediction(answers.get(name_of(c)), c.quintuples) for c in alive]
        extra = {name_of(c): {"repredicted": pred} for c, (pred, _) in zip(alive, verdicts)}
        if not args.dry_run:
            keep("re-prediction equals gold", [reason for _, reason in verdicts])

    # 4. Rule-Based Score Filter
    if not args.no_score:
        judge.spent = client.spent  # one budget for both
        prompts = [common.SCORE_PROMPT.format(text=c.text, cot=c.row["cot"]) for c in alive]
        answers, more = ask_each(
            judge, alive, prompts, out.with_suffix(".score.jsonl"), "score, at most", args
        )
        if args.batch == "submit" and len(answers) < len(alive):
            return 0
        failed += more
        verdicts = [judge_scores(answers.get(name_of(c)), args.threshold) for c in alive]
        for candidate, (scores, _) in zip(alive, verdicts):
            share = scores and sum(scores) / sum(common.POINTS)
            extra.setdefault(name_of(candidate), {}).update(scores=scores, score=share)
        if not args.dry_run:
            keep(f"score at least {float(args.threshold):g}", [reason for _, reason in verdicts])
    if args.dry_run:
        return 0

    # 5. the best chain of each example, ties at random
    best = {}
    for candidate in alive:
        points = sum(extra.get(name_of(candidate), {}).get("scores") or ())
        best.setdefault(candidate.id, []).append((points, candidate.row["candidate"]))
    for id, ranked in best.items():
        top = sorted(k for points, k in ranked if points == max(ranked)[0])
        best[id] = random.Random(f"{args.seed}:{id}").choice(top)
    keep(
        "best of its example",
        [None if best[c.id] == c.row["candidate"] else "not the best of its example" for c in alive],
    )

    # 6. write
    def line(candidate):
        return candidate.row | data.to_row(candidate, out) | extra.get(name_of(candidate), {})

    lines = [line(c) | {"reason": rejected[name_of(c)]} for c in loaded if name_of(c) in rejected]
    data.write_atomic(out.with_suffix(".rejected.jsonl"), "".join(map(data.jsonl_line, lines)))
    data.write_atomic(out, "".join(data.jsonl_line(line(c)) for c in alive))
    reasons = Counter(
        reason.partition(": ")[0] if reason.startswith("leaked") else reason for reason in rejected.values()
    )
    stats = {
        "leaks": Counter(leak for leak in leaks if leak),
        "dollars": max(client.spent, judge.spent) if args.price else None,
    }
    stats |= {
        "model": model,
        "judge_model": judge.model,
        "params": params,
        "threshold": float(args.threshold),
        "seed": args.seed,
    }
    if args.human:
        points = {name: sum(new["scores"]) for name, new in extra.items() if new.get("scores")}
        stats["human"] = agreement(args.human, points, out.with_suffix(".human.png"))
    prompts = {"re-prediction": common.REPREDICT_PROMPT, "score": common.SCORE_PROMPT}
    asked = {
        name: prompt for name, prompt in prompts.items() if not getattr(args, f"no_{name.replace('-', '')}")
    }
    ask.write_data_card(
        out,
        stages,
        reasons,
        stats,
        asked,
        [out.with_suffix(f".{name.replace('-', '')}.jsonl") for name in asked],
    )
    if not alive:
        raise common.Stopped(f"no example is left, see {out.with_suffix('.rejected.jsonl')} for the reasons")
    return 1 if failed else 0


if __name__ == "__main__":
    main(parse_args())
