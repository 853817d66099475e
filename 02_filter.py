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
    python 02_filter.py --report                                  # and a page of candidates, filters, reasons
    python 02_filter.py --out runs/no-score.jsonl --no-score      # Table 2
    python 02_filter.py --human human.jsonl                       # Figure 6
    python 02_filter.py --batch submit                            # a day later: --batch collect (both passes)
    python 02_filter.py --judge-model other --judge-base-url http://127.0.0.1:8000/v1 --judge-key-env LOCAL

Both filters keep their answers in append-only files: another threshold or seed costs nothing, and a killed
run goes on.

Reads:  --cot, made by 01_distill.py
        {"id": "a", "text": "…", "image": "a.jpg", "quintuples": [[…]], "candidate": 0, "cot": "…", …}
Writes: --out, one row an example: the row of its best candidate and
        {…, "repredicted": [["A", "per", "B", "org", "peer"]], "scores": [2, 2, 2, 1, 1, 2], "score": 1.0}
        beside it *.reprediction.jsonl and *.score.jsonl (the answers), *.rejected.jsonl (the others, why),
        *.stats.json (the funnel), *.card.md (the data card), *.human.png, *.report.html
"""

import importlib.util
import random
from collections import Counter
from fractions import Fraction
from pathlib import Path

import common
from common import at_least
from lib import agreement, api, ask, data, funnel_page, reply

MADE_BY = "02_filter.py"


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
    group.add_argument("--report", action="store_true", help="write *.report.html, one page [ours: off]")
    group.add_argument(
        "--report-examples", type=at_least(1), default=200, help="examples on that page [ours: some 20 MB]"
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="predicts again [paper App. B: the model that wrote the chains]")
    model.add_argument("--judge-model", help="scores [paper App. B: the same model, the default]")
    model.add_argument("--judge-base-url", help="its server [ours: default --base-url]")
    model.add_argument("--judge-key-env", help="variable that holds its server's key [ours: --key-env]")
    model.add_argument(
        "--judge-header", action="append", default=[], metavar="NAME=VALUE", help="its headers [ours: none]"
    )
    model.add_argument(
        "--judge-param",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="its request fields, temperature among them [ours: default as the model's]",
    )
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
        "--human",
        help='human scores, JSONL {"id", "candidate", "score"} or CSV, to compare with [paper Figure 6]; '
        "only chains that the judge scored count: those that re-prediction left, or all with "
        "--no-reprediction [ours]",
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


def prediction_in(row):
    """The Response of a re-prediction's answer row."""
    return common.parse_response(reply.spoken(row["response"]), direct=True)


def has_prediction(row):
    response = prediction_in(row)
    return bool(response.quintuples) or not response.malformed


def judge_prediction(row, gold):
    """→ (the quintuples predicted again, None or the reason to reject)."""
    if row is None:
        return None, "re-prediction: no answer"
    response = prediction_in(row)
    pred = [list(q) for q in response.quintuples]
    if row["status"] != "ok":
        return pred, f"re-prediction: {row['status']}"
    if not has_prediction(row):
        return pred, "re-prediction: unparsed"
    if set(response.quintuples) != set(gold):
        return pred, "re-prediction: differs from gold"
    return pred, None


def scores_in(row):
    """The integers of a judgement's answer row, or None."""
    return common.parse_scores(reply.spoken(row["response"]))


def has_scores(row):
    return scores_in(row) is not None


def judge_scores(row, threshold):
    """→ (integers, None or the reason to reject)."""
    if row is None:
        return None, "score: no answer"
    if row["status"] != "ok":
        return None, f"score: {row['status']}"
    scores = scores_in(row)
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
        self.stages = []  # (stage, candidates, distinct candidates, examples): a line of the funnel each
        self._count("distilled")

    def _count(self, stage):
        distinct = {(c.id, c.row["cot"] or c.row.get("response")) for c in self.alive}
        examples = {c.id for c in self.alive}
        self.stages.append((stage, len(self.alive), len(distinct), len(examples)))

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

    def keep_well_formed(self):
        """Drop what is no chain, and chains that betray the labels."""
        statuses = [candidate.row["status"] for candidate in self.alive]
        self.keep("well formed", [None if status == "ok" else status for status in statuses])
        leaks = [common.leaked(candidate.row["cot"], candidate.text) for candidate in self.alive]
        self.keep("no leaked label", [leak and f"leaked label: {leak}" for leak in leaks])

    def reasons(self):
        """{why candidates left: how many}, leaks counted together, and {phrase of a leak: how many}."""
        reasons = Counter()
        leaks = Counter()
        for reason in self.rejected.values():
            name, _, phrase = reason.partition(": ")
            if name == "leaked label":
                leaks[phrase] += 1
            reasons[name if name == "leaked label" else reason] += 1
        return reasons, leaks

    def keep_best(self, seed):
        """Of each example the candidate with most points; ties are drawn at random."""
        ranked = {}
        for candidate in self.alive:
            points = sum(self.new_fields[candidate_key(candidate)].get("scores") or ())
            ranked.setdefault(candidate.id, []).append((points, candidate.row["candidate"]))
        best = set()
        for id, pairs in ranked.items():
            most = max(points for points, _ in pairs)
            ties = sorted(k for points, k in pairs if points == most)
            best.add((id, random.Random(f"{seed}:{id}").choice(ties)))
        keys = [candidate_key(candidate) for candidate in self.alive]
        self.keep("best of its example", [None if key in best else "not the best" for key in keys])

    def points(self):
        """{candidate key: points} of what the judge has scored."""
        scored = {key: fields["scores"] for key, fields in self.new_fields.items() if fields.get("scores")}
        return {key: sum(scores) for key, scores in scored.items()}

    def row(self, candidate, out):
        """The row of `candidate` in `out`."""
        key = candidate_key(candidate)
        row = candidate.row | data.to_row(candidate, out) | self.new_fields[key] | {"filtered_by": MADE_BY}
        if key in self.rejected:
            row["reason"] = self.rejected[key]
        return row


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


# -------------------------------------------------------------------------------- the two filters


def make_clients(args, candidates):
    """→ (the client that predicts again, the judge). Raises InputError: which model, which key."""
    models = sorted({candidate.row.get("model") or "" for candidate in candidates} - {""})
    if args.model is None and len(models) != 1:
        raise common.InputError(
            f"{args.cot}: chains by {len(models)} models ({', '.join(models)}): "
            "say with --model which predicts again"
        )
    client = api.client_of(args, args.model or models[0])
    judge = api.client_of(args, args.judge_model or client.model)
    if args.judge_param:
        fields = {name: api.OUR_FIELDS[name] for name in ("model", "messages", "n", "stream")}
        judge.params = api.extra_params("--judge-param", args.judge_param, fields)
    judge.price = args.judge_price or args.price
    if args.judge_base_url or args.judge_key_env or args.judge_header:
        key_env = args.judge_key_env or args.key_env
        judge.server = api.Server(args.judge_base_url or args.base_url, key_env, args.judge_header)
    elsewhere = judge.server.parts.netloc != client.server.parts.netloc
    if elsewhere and not args.judge_key_env and not judge.server.brings_key():
        raise common.InputError(
            f"--judge-base-url is another server, which {args.key_env} is not sent to: name the variable "
            "that holds its key with --judge-key-env (a local server takes any value)"
        )
    return client, judge


def ask_each(client, candidates, prompts, path, args, title, readable):
    """One call a candidate, unless `path` has it → ({candidate key: its answer row}, how many failed)."""
    again = ask.asked_again(args.retry, readable)
    jobs = {}
    for candidate, prompt in zip(candidates, prompts, strict=True):
        id, k = candidate_key(candidate)
        jobs[id, k] = client.job({"id": f"{id}#{k}"}, prompt, candidate.image)
    wanted = list(jobs.values())
    failed = 0
    if args.dry_run:
        most = title if path.name.endswith(".reprediction.jsonl") else f"{title}, at most"
        ask.print_estimate(client, wanted, 60, most, path, again)
    else:
        with ask.AppendFile(path, f"{MADE_BY} {title}", again) as out:
            failed = ask.ask_all(
                client, wanted, out, batch=args.batch, readable=readable, title=title, tokens=60
            )
    rows = {}
    if path.exists():
        rows = {row["key"]: row for _, row in data.read_jsonl(path)}
    return {key: rows[job.key] for key, job in jobs.items() if job.key in rows}, failed


def predict_again(funnel, client, args, path):
    """The Re-Prediction Filter → (how many calls failed, whether all that can be answered is)."""
    prompts = []
    for candidate in funnel.alive:
        cot = candidate.row["cot"]
        if args.hide_answer:
            cot = common.hide_answer(cot, candidate.quintuples)
        prompts.append(common.REPREDICT_PROMPT.format(text=candidate.text, cot=cot))
    answers, failed = ask_each(client, funnel.alive, prompts, path, args, "re-prediction", has_prediction)
    if args.batch in ask.NO_ANSWERS and len(answers) < len(funnel.alive):
        return failed, False
    reasons = []
    for candidate in funnel.alive:
        answer = answers.get(candidate_key(candidate))
        pred, reason = judge_prediction(answer, candidate.quintuples)
        funnel.new_fields[candidate_key(candidate)]["repredicted"] = pred
        reasons.append(None if args.dry_run and not answer else reason)
    funnel.keep("re-prediction equals gold", reasons)
    return failed, True


def score(funnel, judge, args, path):
    """The Rule-Based Score Filter → (how many calls failed, whether all that can be answered is)."""
    prompts = [common.SCORE_PROMPT.format(text=c.text, cot=c.row["cot"]) for c in funnel.alive]
    answers, failed = ask_each(judge, funnel.alive, prompts, path, args, "score", has_scores)
    if args.batch in ask.NO_ANSWERS and len(answers) < len(funnel.alive):
        return failed, False
    reasons = []
    for candidate in funnel.alive:
        scores, reason = judge_scores(answers.get(candidate_key(candidate)), args.threshold)
        share = scores and sum(scores) / sum(common.POINTS)
        funnel.new_fields[candidate_key(candidate)] |= {"scores": scores, "score": share}
        reasons.append(reason)
    funnel.keep(f"score at least {float(args.threshold):g}", reasons)
    return failed, True


# -------------------------------------------------------------------------------- main


def outputs(args, answers):
    """{path: mark} of all that this command may write, for check_outputs; answers: {title: answers file}."""
    ours = f'"filtered_by": "{MADE_BY}"'
    paths = {args.out: ours, ask.side_file(args.out, ".rejected.jsonl"): ours, **ask.beside(args.out)}
    for path in answers.values():
        paths |= ask.beside_answers(path)
    if args.human:
        paths[ask.side_file(args.out, ".human.png")] = MADE_BY
    if args.report:
        paths[ask.side_file(args.out, ".report.html")] = MADE_BY
    return paths


def write_rows(funnel, out):
    kept = [funnel.row(candidate, out) for candidate in funnel.alive]
    rejected = [funnel.row(c, out) for c in funnel.loaded if candidate_key(c) in funnel.rejected]
    rejected_path = ask.side_file(out, ".rejected.jsonl")
    data.write_atomic(rejected_path, "".join(map(data.jsonl_line, rejected)))
    data.write_atomic(out, "".join(map(data.jsonl_line, kept)))
    if not kept:
        raise common.Stopped(f"no example is left, see {rejected_path} for the reasons")


@common.exit_codes
def main(args):
    out = Path(args.out)
    files = {}  # of the filters that run: title → answers file
    prompts = {}
    if not args.no_reprediction:
        files["re-prediction"] = ask.side_file(out, ".reprediction.jsonl")
        prompts["re-prediction"] = common.REPREDICT_PROMPT
    if not args.no_score:
        files["score"] = ask.side_file(out, ".score.jsonl")
        prompts["score"] = common.SCORE_PROMPT

    # 1. Candidates, and who answers. Every fault is found before the first paid call.
    data.existing("--cot", args.cot, "made by 01_distill.py")
    ask.check_outputs(outputs(args, files), inputs=[args.cot, args.human])
    human = agreement.read_human(args.human) if args.human else {}
    funnel = Funnel(load_candidates(args, paid=bool(files)))
    stats = {"threshold": float(args.threshold), "seed": args.seed, "finished": False}
    client = judge = None
    if files:
        client, judge = make_clients(args, funnel.loaded)
        stats |= {"model": client.model, "server": client.server.shown, "params": client.params}
        stats |= {
            "judge_model": judge.model,
            "judge_server": judge.server.shown,
            "judge_params": judge.params,
        }
    if files and not args.dry_run:
        client.check()
        judge.check()
    funnel.keep_well_formed()
    failed = 0
    complete = True
    try:
        # 2. Re-Prediction Filter
        if not args.no_reprediction:
            failed, complete = predict_again(funnel, client, args, files["re-prediction"])

        # 3. Rule-Based Score Filter
        if complete and not args.no_score:
            judge.spent = client.spent  # one budget for both
            more, complete = score(funnel, judge, args, files["score"])
            failed += more

        # 4. The best chain of each example
        if complete and not args.dry_run:
            funnel.keep_best(args.seed)
            stats["finished"] = True
            if human:
                points = funnel.points()
                stats["human"] = agreement.agreement(human, points, ask.side_file(out, ".human.png"))
            write_rows(funnel, out)
    finally:
        # 5. Figure 7 and the data card, however it ends
        if not args.dry_run:
            if files and args.price:
                stats["dollars"] = max(client.spent, judge.spent)
            reasons, stats["leaks"] = funnel.reasons()
            ask.write_data_card(out, funnel.stages, reasons, stats, prompts, files.values())
            if args.report:
                rows = [funnel.row(candidate, out) for candidate in funnel.loaded]
                funnel_page.write(out, rows, funnel.stages, args.report_examples, MADE_BY)
    return 1 if failed else 0


if __name__ == "__main__":
    main(parse_args())
