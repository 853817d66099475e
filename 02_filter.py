"""Stage 2 — keep the best chain of thought of each example (§3.2 and App. B of JMERE-R1).

Re-Prediction Filter: image, text and chain, without labels, go back to the model; the chain stays if the
quintuples it then predicts equal the gold set. Rule-Based Score Filter: the judge gives integers for
common.SCORE_RULES, Python adds them up; below `--threshold` of the points is dropped; the best chain per
example stays, ties broken at random.

Deviations and decisions
1. Rules and prompt wording are ours (the paper describes, but does not print them).
2. A chain that betrays that it saw the labels is rejected before anything is paid for it.
3. `--hide-answer` strips stated quintuples before re-prediction.

    python 02_filter.py --price 2.5 10 --dry-run                  # runs/cot.jsonl → runs/sft.jsonl
    python 02_filter.py
    python 02_filter.py --out runs/no-score.jsonl --no-score      # Table 2
    python 02_filter.py --human human.jsonl                       # Figure 6
    python 02_filter.py --batch submit                            # a day later: --batch collect (both passes)
    python 02_filter.py --base-url http://127.0.0.1:8000/v1 --judge-model other

Both filters keep their answers in append-only files: another threshold or seed costs nothing, and a killed
run goes on.

Reads:  --cot, made by 01_distill.py
        {"id": "a", "text": "…", "image": "a.jpg", "quintuples": [[…]], "candidate": 0, "cot": "…", …}
Writes: --out, one row an example: the row of its best candidate and
        {…, "repredicted": [["A", "per", "B", "org", "peer"]], "scores": [2, 2, 2, 1, 1, 2], "score": 1.0}
        *.reprediction.jsonl and *.score.jsonl (the answers), *.rejected.jsonl (every other candidate, why),
        *.stats.json (the funnel), *.card.md (the data card), *.human.png
"""

import importlib.util
import json
import math
import random
from collections import Counter
from fractions import Fraction
from pathlib import Path

import common
from common import at_least
from lib import api, ask, data


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    group = parser.add_argument_group("io")
    group.add_argument("--cot", default="runs/cot.jsonl", help="candidates of 01_distill.py [paper §3.2]")
    group.add_argument("--out", default="runs/sft.jsonl", help="training data for 03_sft.py [paper §3.2]")
    group.add_argument(
        "--image-dir", default="data/img", help="folder of the images, or as --cot says [ours]"
    )
    group.add_argument(
        "--skip-bad", action="store_true", help="drop bad rows and images, with a count [ours: stop]"
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="predicts again [paper App. B: the model that wrote the chains]")
    model.add_argument("--judge-model", help="scores [paper App. B: the same model, the default]")
    model.add_argument("--judge-base-url", help="its server [ours: default --base-url]")
    model.add_argument(
        "--judge-price",
        type=at_least(0, float),
        nargs=2,
        metavar=("IN", "OUT"),
        help="its price [ours: default --price]",
    )
    group = parser.add_argument_group("algorithm")
    group.add_argument(
        "--threshold", type=Fraction, default=Fraction(7, 10), help="lowest share of the points [paper §3.2]"
    )
    group.add_argument("--no-reprediction", action="store_true", help="leave that filter out [paper Table 2]")
    group.add_argument("--no-score", action="store_true", help="leave that filter out [paper Table 2]")
    group.add_argument(
        "--hide-answer", action="store_true", help="strip stated quintuples before re-prediction [ours: off]"
    )
    group.add_argument("--seed", type=int, default=0, help="breaks ties [ours: the paper draws at random]")
    group.add_argument(
        "--human", help='human scores {"id", "candidate", "score"} to compare with [paper Figure 6]'
    )
    api.add_api_arguments(model, parser.add_argument_group("runtime"))
    args = parser.parse_args(argv)
    if not 0 <= args.threshold <= 1:
        parser.error(f"--threshold {float(args.threshold):g}: expected a share, 0 to 1")
    if args.human and args.no_score:
        parser.error("--human compares with the score filter: leave out --no-score")
    if args.human and not importlib.util.find_spec("matplotlib"):
        parser.error("--human draws with matplotlib: pip install matplotlib")
    return args


# -------------------------------------------------------------------------------- what an answer says


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
    if set(response.quintuples) != set(gold):
        return pred, "re-prediction: differs from gold"
    return pred, None


def judge_scores(row, threshold):
    """→ (integers, None or the reason to reject)."""
    if row is None:
        return None, "score: call failed"
    if row["status"] != "ok":
        return None, f"score: {row['status']}"
    scores = common.parse_scores(row["response"])
    if scores is None:
        return None, "score: unparsed"
    if Fraction(sum(scores), sum(common.POINTS)) < threshold:
        return scores, "score: below the threshold"
    return scores, None


# -------------------------------------------------------------------------------- the funnel of Figure 7


def candidate_key(candidate):
    return candidate.id, candidate.row["candidate"]


class Funnel:
    """The candidates still alive, why each of the others left, and what the filters said of each."""

    def __init__(self, candidates):
        self.loaded = candidates
        self.alive = candidates
        self.rejected = {}  # candidate key → reason
        self.new_fields = {candidate_key(c): {} for c in candidates}
        self.stages = []  # (stage, candidates, examples): one line of the funnel each
        self._count("distilled")

    def _count(self, stage):
        self.stages.append((stage, len(self.alive), len({candidate.id for candidate in self.alive})))

    def keep(self, stage, reasons):
        """reasons[i]: why candidate i of those alive leaves, or None. Records one line of the funnel."""
        alive = []
        for candidate, reason in zip(self.alive, reasons, strict=True):
            if reason:
                self.rejected[candidate_key(candidate)] = reason
            else:
                alive.append(candidate)
        self.alive = alive
        self._count(stage)

    def reasons(self):
        """{why candidates left: how many}; leaks counted together."""
        return Counter(
            "leaked label" if reason.startswith("leaked label") else reason
            for reason in self.rejected.values()
        )

    def line(self, candidate, out):
        """The row of `candidate` in `out`."""
        return candidate.row | data.to_row(candidate, out) | self.new_fields[candidate_key(candidate)]


def load_candidates(args, paid):
    """The candidates of the first --limit examples, in the order of their keys; images are looked at."""
    need = ("quintuples", "candidate", "cot", "status")
    key = ("id", "candidate")
    loaded = data.load_examples(args.cot, args.image_dir, need, key=key, skip_bad=args.skip_bad)
    loaded.sort(key=candidate_key)  # 01 writes as answers come in; the output should not depend on that
    first_of = {}
    for candidate in loaded:
        first_of.setdefault(candidate.id, candidate)
    firsts = list(first_of.values())[: args.limit]
    if paid:
        firsts = data.check_images(firsts, args.skip_bad)
    ids = {candidate.id for candidate in firsts}
    return [candidate for candidate in loaded if candidate.id in ids]


def best_of_each(funnel, seed):
    """Reject every candidate that is not the best of its example; ties are drawn at random."""
    ranked = {}
    for candidate in funnel.alive:
        points = sum(funnel.new_fields[candidate_key(candidate)].get("scores") or ())
        ranked.setdefault(candidate.id, []).append((points, candidate.row["candidate"]))
    best = {}
    for id, pairs in ranked.items():
        most = max(points for points, _ in pairs)
        ties = sorted(k for points, k in pairs if points == most)
        best[id] = random.Random(f"{seed}:{id}").choice(ties)
    reasons = []
    for candidate in funnel.alive:
        is_best = candidate.row["candidate"] == best[candidate.id]
        reasons.append(None if is_best else "not the best of its example")
    funnel.keep("best of its example", reasons)


# -------------------------------------------------------------------------------- asking


def ask_each(client, candidates, prompts, path, title, args):
    """One call a candidate, unless `path` has it → ({candidate key: its answer row}, number failed)."""
    jobs = {}
    for candidate, prompt in zip(candidates, prompts, strict=True):
        id, k = candidate_key(candidate)
        jobs[id, k] = client.job({"id": f"{id}#{k}"}, prompt, candidate.image)
    if args.dry_run:
        ask.print_estimate(client, list(jobs.values()), 60, title)
        return {}, 0
    with ask.AppendFile(path) as out:
        failed = ask.ask_all(client, list(jobs.values()), out, batch=args.batch)
        rows = {row["key"]: row for _, row in data.read_jsonl(path)}
    return {name: rows[job.key] for name, job in jobs.items() if job.key in rows}, failed


def make_clients(args, models):
    """→ (the client that predicts again, the judge). models: those that wrote the chains."""
    if args.model is None and len(models) != 1:
        raise common.InputError(
            f"{args.cot}: chains by {len(models)} models ({', '.join(models)}): "
            "say with --model which predicts again"
        )
    model = args.model or models[0]
    params = api.request_params(args)
    limits = (args.concurrency, args.timeout)
    client = api.ChatClient(model, args.base_url, *limits, args.price, args.budget, params)
    judge_url = args.judge_base_url or args.base_url
    judge_price = args.judge_price or args.price
    judge_model = args.judge_model or model
    judge = api.ChatClient(judge_model, judge_url, *limits, judge_price, args.budget, params)
    return client, judge


# -------------------------------------------------------------------------------- Figure 6


def read_human(path, points):
    """Human scores beside the judge's → [(judge's points, human share)], number that the judge did not score.

    points: {candidate key: points of the judge}.
    """
    pairs = []
    missing = 0
    for number, row in data.read_jsonl(path):
        share = row.get("score")
        known = {"id", "candidate"} <= row.keys() and isinstance(share, int | float)
        if not known or not 0 <= share <= 1:
            raise common.InputError(f'{path}:{number}: expected {{"id": …, "candidate": 0, "score": 0 to 1}}')
        name = (str(row["id"]), row["candidate"])
        if name in points:
            pairs.append((points[name], share))
        else:
            missing += 1
    if not pairs:
        raise common.InputError(
            f"{path}: none of its {missing} candidates was scored by the judge: id and candidate as in --cot"
        )
    return pairs, missing


def agreement(path, points, png):
    """How the judge's points agree with human scores → figures, printed and drawn too."""
    import matplotlib.figure

    pairs, missing = read_human(path, points)
    most = sum(common.POINTS)
    gaps = [judged / most - human for judged, human in pairs]
    # Kappa (quadratic weights) wants both on one scale: points.
    rated = [(judged, math.floor(human * most + 0.5)) for judged, human in pairs]
    seen = sum((a - b) ** 2 for a, b in rated)
    chance = sum((a - b) ** 2 for a, _ in rated for _, b in rated) / len(rated)
    bins = Counter(math.floor(gap * 10 + 0.5) for gap in gaps)
    error = sum(map(abs, gaps)) / len(gaps)
    result = {
        "compared": len(pairs),
        "not_judged": missing,
        "mean_absolute_error": error,
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
    axes.set(xlabel="judge − people", ylabel="candidates", title=f"MAE {error:.3f}, n = {len(pairs)}")
    figure.savefig(png)
    return {**result, "histogram": {f"{gap / 10:+.1f}": bins[gap] for gap in spread}}


# -------------------------------------------------------------------------------- main


@common.exit_codes
def main(args):
    out = Path(args.out)
    paid = not (args.no_reprediction and args.no_score)
    if paid and not args.dry_run:
        api.ChatClient.require_key()

    # 1. Candidates, and who answers. Every fault is found before the first paid call.
    data.existing("--cot", args.cot, "01_distill.py writes it")
    loaded = load_candidates(args, paid)
    client = judge = None
    if paid:
        models = sorted({candidate.row.get("model") or "" for candidate in loaded} - {""})
        client, judge = make_clients(args, models)
    funnel = Funnel(loaded)
    statuses = [candidate.row["status"] for candidate in funnel.alive]
    funnel.keep("well formed", [None if status == "ok" else status for status in statuses])
    leaks = [common.leaked(candidate.row["cot"], candidate.text) for candidate in funnel.alive]
    funnel.keep("no leaked label", [leak and f"leaked label: {leak}" for leak in leaks])
    failed = 0
    prompts = {}  # of the filters that ran
    answers_files = []

    # 2. Re-Prediction Filter
    if not args.no_reprediction:
        prompts["re-prediction"] = common.REPREDICT_PROMPT
        answers_files.append(ask.side_file(out, ".reprediction.jsonl"))
        filled = []
        for candidate in funnel.alive:
            cot = candidate.row["cot"]
            if args.hide_answer:
                cot = common.hide_answer(cot, candidate.quintuples)
            filled.append(common.REPREDICT_PROMPT.format(text=candidate.text, cot=cot))
        answers, failed = ask_each(client, funnel.alive, filled, answers_files[-1], "re-prediction", args)
        if args.batch == "submit" and len(answers) < len(funnel.alive):
            return 0  # --batch collect goes on from here
        reasons = []
        for candidate in funnel.alive:
            answer = answers.get(candidate_key(candidate))
            pred, reason = judge_prediction(answer, candidate.quintuples)
            funnel.new_fields[candidate_key(candidate)]["repredicted"] = pred
            reasons.append(reason)
        if not args.dry_run:
            funnel.keep("re-prediction equals gold", reasons)

    # 3. Rule-Based Score Filter
    if not args.no_score:
        prompts["score"] = common.SCORE_PROMPT
        answers_files.append(ask.side_file(out, ".score.jsonl"))
        judge.spent = client.spent  # one budget for both
        filled = [common.SCORE_PROMPT.format(text=c.text, cot=c.row["cot"]) for c in funnel.alive]
        answers, more = ask_each(judge, funnel.alive, filled, answers_files[-1], "score, at most", args)
        if args.batch == "submit" and len(answers) < len(funnel.alive):
            return 0
        failed += more
        reasons = []
        for candidate in funnel.alive:
            scores, reason = judge_scores(answers.get(candidate_key(candidate)), args.threshold)
            share = scores and sum(scores) / sum(common.POINTS)
            funnel.new_fields[candidate_key(candidate)] |= {"scores": scores, "score": share}
            reasons.append(reason)
        if not args.dry_run:
            funnel.keep(f"score at least {float(args.threshold):g}", reasons)
    if args.dry_run:
        return 0

    # 4. The best chain of each example, ties at random.
    best_of_each(funnel, args.seed)

    # 5. Write.
    rejected = []
    for candidate in funnel.loaded:
        reason = funnel.rejected.get(candidate_key(candidate))
        if reason:
            rejected.append({**funnel.line(candidate, out), "reason": reason})
    data.write_atomic(ask.side_file(out, ".rejected.jsonl"), "".join(map(data.jsonl_line, rejected)))
    kept = [funnel.line(candidate, out) for candidate in funnel.alive]
    data.write_atomic(out, "".join(map(data.jsonl_line, kept)))
    stats = {
        "leaks": Counter(leak for leak in leaks if leak),
        "dollars": max(client.spent, judge.spent) if paid and args.price else None,
        "model": client.model if paid else None,
        "judge_model": judge.model if paid else None,
        "params": api.request_params(args),
        "threshold": float(args.threshold),
        "seed": args.seed,
    }
    if args.human:
        points = {}
        for key, fields in funnel.new_fields.items():
            if fields.get("scores"):
                points[key] = sum(fields["scores"])
        stats["human"] = agreement(args.human, points, ask.side_file(out, ".human.png"))
    ask.write_data_card(out, funnel.stages, funnel.reasons(), stats, prompts, answers_files)
    if not funnel.alive:
        raise common.Stopped(
            f"no example is left, see {ask.side_file(out, '.rejected.jsonl')} for the reasons"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    main(parse_args())
