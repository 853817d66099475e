"""Stage 5 — evaluate (§4, Tables 1–3, Figure 5): predict quintuples for tweets, store every response, score
the stored file.

Headline: micro F1 of exact, directed quintuples over per-example sets; an unparsable response is an empty
prediction, never dropped.

Deviations and decisions
1. [ours] `set` vote: the most frequent set of quintuples, the earliest on a tie; unparsed responses do not
   vote.
2. [ours] `tuple` vote: every quintuple in at least a share --tau of the parsed responses.
3. [ours] 95 % intervals: percentile bootstrap over tweets (rows with the same text and image together).
4. [ours] Zero-shot asks for the answer alone (`direct`); an adapter is asked with the prompt it was trained
   with.
5. [ours] F1@k: random subsets of k of the N stored responses, drawn for each tweet by itself; ± is the
   standard deviation over subsets.

    deepspeed 05_eval.py                                      # runs/grpo/best on data/test.json → runs/test
    python    05_eval.py --zero-shot --out runs/zero-shot     # the base model, one process
    deepspeed 05_eval.py --out runs/test100 --samples 100     # a vote of 100, F1@k
    python    05_eval.py --api --out runs/gpt4o --price 2.5 10 --dry-run             # a server's model
    python    05_eval.py --api --out runs/gpt4o --retry refusal,length               # ask these again
    python    05_eval.py --predictions runs/test/predictions.jsonl                   # score again, no model
    python    05_eval.py --predictions eega.jsonl --data data/test.json --out runs/eega     # another system
    python    05_eval.py --compare SFT=runs/sft-test JMERE-R1=runs/test --out runs/table1   # Tables 1–3
    python    05_eval.py --merge merged/                      # base + adapter as one model, for servers

Reads:  --data, any of the three formats; without gold it is prediction only
        --predictions, ours, or {"id": "a", "quintuples": [["A", "per", "B", "org", "member of"]]}
Writes: OUT/predictions.jsonl {"id", "text", "image", "quintuples": gold, "prompt": "reason",
                               "responses": [{"text", "finished"}], "settings": {…}}
        OUT/quintuples.jsonl  {"id", "quintuples": predicted, after the vote, "made_by"}
        OUT/metrics.json, OUT/report.html (one page that opens from disk)
        OUT/answers.jsonl     every choice an API model gave, append-only
        OUT/compare.md, OUT/compare.json
"""

import argparse
import json
from pathlib import Path

import common
from common import at_least
from lib import api, compare, controls, data, evaluate, predictions, report, scoring, tables
from lib.check_data import check_data
from lib.predict_api import predict_api

PREDICT = "a model that runs here"  # the modes, as messages call them
API = "--api"
STORED = "--predictions"
COMPARE = "--compare"
MERGE = "--merge"
CHECK = "--check-data"
PREDICTING = (PREDICT, API)
SCORING = (*PREDICTING, STORED)


class Group:
    """An argument group whose arguments mean something in some modes only."""

    def __init__(self, group, modes, applies):
        self.group = group
        self.modes = modes
        self.applies = applies  # {option: (its name in args, modes)}, of all groups

    def add_argument(self, *options, **details):
        action = self.group.add_argument(*options, **details)
        self.applies[options[0]] = (action.dest, self.modes)


def share(text):
    """An argparse type: a number above 0 and at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a share, above 0 and at most 1")
    return value


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    applies = {}
    group = parser.add_argument_group("mode: one of these, or predict with --adapter and score")
    mode = group.add_mutually_exclusive_group()
    mode.add_argument(
        "--predictions", metavar="FILE", help="score a stored file or --out folder, without a model"
    )
    mode.add_argument(
        "--compare",
        nargs="+",
        metavar="[NAME=]RUN",
        help="stored runs, each against the first [paper Table 1]",
    )
    mode.add_argument(
        "--api", action="store_true", help="ask the --model of an OpenAI-compatible server [paper §4: GPT-4o]"
    )
    mode.add_argument(
        "--merge", metavar="FOLDER", help="write base + adapter as one model, prove it equal, and end [ours]"
    )
    mode.add_argument(
        "--check-data", nargs="+", metavar="FILE", help="say what these splits hold and what is wrong [ours]"
    )
    group = Group(parser.add_argument_group("io"), (*SCORING, COMPARE), applies)
    group.add_argument(
        "--data", help="tweets, in any format [ours: data/test.json; of stored predictions, the gold in them]"
    )
    group.add_argument(
        "--image-dir", default="data/img", help="folder of the images, or beside the file [ours]"
    )
    applies["--image-dir"] = ("image_dir", (*SCORING, COMPARE, CHECK))
    group.add_argument("--out", help="folder [ours: runs/test; of stored predictions none, tables only]")
    group.add_argument(
        "--merge-repeats", action="store_true", help="join rows of the same text and image [ours: as in V2]"
    )
    group.add_argument(
        "--skip-bad", action="store_true", help="drop bad rows and images, with a count [ours: stop]"
    )
    group = Group(parser.add_argument_group("controls"), SCORING, applies)
    group.add_argument(
        "--subset",
        choices=tuple(controls.SUBSETS),
        help="of MNRE text as --data: tweets without any relation; or pairs of the same text, of which one "
        "image has a relation and the other none [ours]",
    )
    group = Group(group.group, PREDICTING, applies)
    group.add_argument(
        "--image", choices=controls.IMAGES, default="own", help="grey, or another tweet's, to compare [ours]"
    )
    group = Group(parser.add_argument_group("store"), PREDICTING, applies)
    group.add_argument("--fresh", action="store_true", help="delete what OUT stores first [ours: go on]")
    group = Group(parser.add_argument_group("page"), (*SCORING, COMPARE), applies)
    group.add_argument(
        "--report",
        action=argparse.BooleanOptionalAction,
        help="OUT/report.html, of --compare A B OUT/compare.html: a page that opens from disk [ours: on]",
    )
    group.add_argument(
        "--report-examples", type=at_least(1), default=500, help="tweets on the page, 15 kB each [ours]"
    )
    model = parser.add_argument_group("model")
    group = Group(model, (*PREDICTING, MERGE, CHECK), applies)
    group.add_argument(
        "--model",
        help="name or folder [ours: the adapter's; paper §4: with --zero-shot Qwen/Qwen2.5-VL-7B-Instruct, "
        "with --api gpt-4o-2024-11-20]",
    )
    group = Group(model.add_mutually_exclusive_group(), (PREDICT, MERGE), applies)
    group.add_argument("--adapter", default="runs/grpo/best", help="best/ of 04_grpo.py or 03_sft.py [ours]")
    group.add_argument("--zero-shot", action="store_true", help="the base model, no adapter [paper Table 3]")
    group = Group(parser.add_argument_group("sampling"), PREDICTING, applies)
    group.add_argument(
        "--prompt",
        choices=tuple(common.PROMPTS),
        help="[ours: the adapter's own; without one, direct]; with --predictions what a 'response' answers",
    )
    applies["--prompt"] = ("prompt", (*SCORING, MERGE))
    group.add_argument(
        "--samples", type=at_least(1), default=1, help="responses a tweet [ours; paper §4, Figure 5: 100]"
    )
    group = Group(parser.add_argument_group("sampling of a model that runs here"), (PREDICT,), applies)
    group.add_argument("--top-p", type=share, default=1.0, help="mass of the tokens drawn from [ours: all]")
    group.add_argument("--max-new-tokens", type=at_least(1), default=2048, help="longest response [paper §4]")
    group.add_argument(
        "--max-pixels", type=at_least(1), help="of an image [ours: as the adapter was trained]"
    )
    group.add_argument(
        "--min-pixels", type=at_least(1), help="of an image [ours: as the adapter was trained]"
    )
    group.add_argument(
        "--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 on a GPU [ours]"
    )
    group.add_argument(
        "--batch-rows",
        type=at_least(1),
        default=64,
        help="responses decoded together, or asked for at once of --rollout-url [ours: fits 80 GB]",
    )
    group.add_argument(
        "--rollout-url",
        metavar="URL",
        help="of a vLLM that serves --model as base: it draws the responses [ours: drawn here]",
    )
    group.add_argument(
        "--static-cache", action="store_true", help="CUDA graphs on a GPU; never run on one [ours: off]"
    )
    group = Group(parser.add_argument_group("scoring"), (*SCORING, COMPARE), applies)
    group.add_argument(
        "--vote",
        choices=tuple(scoring.VOTES),
        default="set",
        help="of several responses [paper §4; rule ours]",
    )
    group.add_argument("--tau", type=share, help="share that --vote tuple asks for [ours: 0.5]")
    group.add_argument(
        "--tau-from",
        metavar="RUN",
        help="stored validation predictions: the --tau that is best there [ours: never on test]",
    )
    group.add_argument("--resamples", type=at_least(10), default=10_000, help="of the bootstrap [ours]")
    group.add_argument("--seed", type=at_least(0), default=0, help="of sampling and bootstrap [ours]")
    group = Group(parser.add_argument_group("scoring of many responses"), SCORING, applies)
    group.add_argument("--subsets", type=at_least(1), default=20, help="random subsets for F1@k [ours]")
    server = parser.add_argument_group(
        "server", "--temperature also serves a model that runs here: 0.8 there [paper §4], 0 is greedy"
    )
    calls = parser.add_argument_group("calls")
    api.add_api_arguments(Group(server, (API,), applies), Group(calls, (API,), applies))
    applies["--temperature"] = ("temperature", PREDICTING)
    applies["--limit"] = ("limit", (*SCORING, COMPARE))
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, default=-1, help="set by the deepspeed launcher"
    )
    args = parser.parse_args(argv)
    modes = (STORED, COMPARE, API, MERGE, CHECK)
    chosen = (mode for mode in modes if getattr(args, mode[2:].replace("-", "_")))
    args.mode = next(chosen, PREDICT)
    for option, (name, modes) in applies.items():
        if args.mode not in modes and getattr(args, name) != parser.get_default(name):
            parser.error(f"{option} belongs to {' and '.join(modes)}; this is {args.mode}")
    settle(parser, args)
    return args


def settle(parser, args):
    """Defaults that depend on the mode or on each other, and what the parser cannot refuse by itself."""
    if args.mode in PREDICTING:
        args.data = args.data or "data/test.json"
        args.out = args.out or "runs/test"
    if args.mode == API:
        args.model = args.model or "gpt-4o-2024-11-20"
    if args.mode == PREDICT and args.temperature is None:
        args.temperature = 0.8
    if args.samples > 1 and args.temperature == 0:
        parser.error(
            f"--samples {args.samples} with --temperature 0 stores one answer so often: drop one of them"
        )
    for option, value in (("--tau", args.tau), ("--tau-from", args.tau_from)):
        if value and args.vote != "tuple":
            parser.error(f"{option} belongs to --vote tuple")
    if args.tau and args.tau_from:
        parser.error("--tau-from finds the --tau: leave one of them out")
    args.tau = args.tau or 0.5
    if args.out and Path(args.out).exists() and not Path(args.out).is_dir():
        parser.error(f"--out {args.out}: is a file, expected a folder")
    if args.report and not args.out:
        parser.error("--report needs --out")
    if args.report and args.mode == COMPARE and len(args.compare) != 2:
        parser.error(f"--report shows two runs side by side, --compare has {len(args.compare)}")
    if args.report is None:
        args.report = bool(args.out) and (args.mode != COMPARE or len(args.compare) == 2)
    if args.subset and (args.merge_repeats or args.skip_bad):
        parser.error("--merge-repeats and --skip-bad do not belong to --subset: its tweets are whole")
    if args.subset and not args.data:
        parser.error("--subset needs --data, MNRE's text")


# -------------------------------------------------------------------------------- main


def write_json(path, value):
    data.write_atomic(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def compare_runs(args, known):
    """--compare: the paper's tables on screen and, with --out, in files."""
    found = compare.compare(args, known)
    written = []
    if args.out:
        out = Path(args.out)
        data.write_atomic(out / "compare.md", "\n".join(compare.show(found, markdown=True)))
        write_json(out / "compare.json", {"rows": found.rows, "notes": found.notes})
        written = [f"{out}/compare.md", f"{out}/compare.json"]
    if args.report:
        shown = report.write_comparison(args, found)
        written.append(f"{out}/compare.html ({shown} tweets)")
    print(*compare.show(found), sep="\n")
    print(
        f"Δ, its interval and p (two-sided): against {found.first}, paired bootstrap of {args.resamples} "
        "resamples over tweets; ±: standard deviation over seeds."
    )
    for note in found.notes:
        print(f"note: {common.visible(note)}")
    if written:
        print(f"written: {', '.join(written)}")


def score_run(args, run):
    """The tables of a StoredRun on screen and, with --out, its metrics and its page."""
    metrics, finals = evaluate.evaluate(args, run)
    written = []
    if args.out:
        out = Path(args.out)
        write_json(out / "metrics.json", metrics)
        rows = []
        for example in run.examples:
            items = [list(q) for q in finals.get(example.id, [])]
            rows.append({"id": example.id, "quintuples": items, "made_by": predictions.MADE_BY})
        data.write_atomic(out / "quintuples.jsonl", "".join(map(data.jsonl_line, rows)))
        written = [f"{out}/metrics.json", f"{out}/quintuples.jsonl"]
    if args.report:
        pictures = report.write_report(args, run, finals, metrics)
        shown = min(len(run.examples), args.report_examples)
        written.append(f"{out}/report.html ({shown} tweets, {pictures} with their image)")
    absent = f"{metrics['without_prediction']} without a prediction (counted as empty)"
    ungold = f"{metrics['without_gold']} without gold (not scored)"
    print(f"{run.path}: {len(run.examples)} tweets, {absent}, {ungold}")
    if run.other_gold:
        shown = ", ".join(run.other_gold[:3])
        print(
            f"note: {len(run.other_gold)} tweets have other gold there than --data, which counts: {shown}, …"
        )
    counts = [f"{n} {name.replace('_', ' ')}" for name, n in metrics["responses"].items()]
    print(f"responses: {', '.join(counts)}\n")
    if "scores" in metrics:
        print(*tables.show(metrics), sep="\n")
    else:
        print(f"{sum(map(len, finals.values()))} quintuples predicted; no gold, so no score")
    if written:
        print(f"written: {', '.join(written)}")


@common.exit_codes
def main(args):
    if args.mode == CHECK:
        return check_data(args)
    if args.mode == MERGE:
        # torch lives there and in predict: scoring a stored file needs none of it
        from lib.merge import merge

        return merge(args)
    failed = 0
    known = None
    if args.mode == PREDICT:
        from lib.predict import predict

        known = predict(args)
        if known is None:  # a rank that only predicted
            return None
    elif args.mode == API:
        known, failed = predict_api(args)
        if known is None:  # nothing to score yet
            return None
    else:
        predictions.check_out(args)
        known = controls.load_tweets(args) if args.data else None
    if args.tau_from:
        args.tau = evaluate.best_tau(args.tau_from)
    if args.mode == COMPARE:
        return compare_runs(args, known)
    prompt = args.prompt if args.mode == STORED else None
    run = predictions.stored_run(args.predictions or args.out, known, args.limit, prompt)
    score_run(args, run)
    return 1 if failed else 0


if __name__ == "__main__":
    main(parse_args())
