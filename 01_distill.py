"""Stage 1 — distil chains of thought from a teacher model (§3.2 and App. D of JMERE-R1).

The teacher sees image, text and gold quintuples and writes a Multimodal-Paradigm chain of thought (MP-CoT) of
three parts: Image Description, Visual-Text Alignment, Quintuple Reasoning. `--n` candidates per example are
asked for in one request.

Deviations and decisions
1. The prompt holds what the paper prints in Figure 10; its wording is ours (common.DISTILL_PROMPT).
2. Sampling parameters are the server's unless given.
3. A chain without exactly the three parts is `malformed` and never used.

    export OPENAI_API_KEY=…
    python 01_distill.py --price 2.5 10 --dry-run       # what it will cost
    python 01_distill.py --price 2.5 10 --budget 60     # data/train.json, data/img → runs/cot.jsonl
    python 01_distill.py --batch submit                 # half the price; later --batch status, collect
    python 01_distill.py --retry malformed,length       # ask again what these left
    python 01_distill.py --base-url http://127.0.0.1:8000/v1 --model tiny

Killed or stopped, the same command goes on and pays for nothing twice but the calls then in flight.

Reads:  --data, one of the formats of data.load_examples, with gold quintuples
        {"id": "a", "text": "…", "image": "a.jpg", "quintuples": [["A", "per", "B", "org", "member of"]]}
Writes: --out, append-only, one row a candidate; beside it *.errors.jsonl (failed calls), *.stats.json (the
        funnel), *.card.md (the data card), *.batches.json and *.unclaimed.jsonl (of the Batch API)
        {"key": "…", "id": "a", …, "candidate": 0, "status": "ok|malformed|refusal|length|…",
         "cot": "Image Description: …", "response": "…", "model": "asked", "model_answered": "…",
         "server": "…", "params": {}, "prompt_hash": "…", "image_hash": "…", "usage": {…},
         "finish_reason": "stop"}
"""

import json
from collections import Counter

import common
from common import at_least
from lib import api, ask, data, reply

MADE_BY = "01_distill.py"


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    group = parser.add_argument_group("io")
    group.add_argument(
        "--data", default="data/train.json", help="annotated examples, any format [paper §4.1]"
    )
    group.add_argument(
        "--image-dir", default="data/img", help="folder of the images, or beside --data [ours]"
    )
    group.add_argument("--out", default="runs/cot.jsonl", help="candidates, JSONL, append-only [ours]")
    group.add_argument(
        "--skip-bad", action="store_true", help="drop bad rows and images, with a count [ours: stop]"
    )
    group.add_argument(
        "--merge-repeats", action="store_true", help="join rows of the same text and image [ours: as in V2]"
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="gpt-4o-2024-11-20", help="the teacher [paper App. D]")
    group = parser.add_argument_group("sampling")
    group.add_argument("--n", type=at_least(1), default=5, help="candidates per example [paper §3.2]")
    api.add_api_arguments(model, parser.add_argument_group("runtime"))
    return parser.parse_args(argv)


def finish(row):
    """The row of one answer: the chain in canonical form, or "" and why there is none."""
    cot = None
    if row["status"] == "ok":
        cot = common.parse_cot(reply.spoken(row["response"]))
        if cot is None:
            row["status"] = "malformed"
    return {**row, "cot": cot or ""}


def check_same_run(path, jobs):
    """Refuse an output whose rows come from another prompt, model or image: two runs are no data set."""
    keys = {job.row["id"]: job.key for job in jobs}
    for number, row in data.read_jsonl(path):
        if keys.get(row["id"], row["key"]) != row["key"]:
            settings = f"{row['model']} with {json.dumps(row['params'])}"
            hashes = f"prompt {row['prompt_hash']}, image {row['image_hash']}"
            raise common.InputError(
                f"{path}:{number}: {row['id']} was asked of {settings}, {hashes}; this command differs: "
                "choose another --out"
            )


def funnel(path, jobs):
    """What became of the candidates of this run → (stages, reasons)."""
    keys = {job.key for job in jobs}
    rows = [row for _, row in data.read_jsonl(path) if row["key"] in keys]
    status = Counter(row["status"] for row in rows)
    answered = {row["key"] for row in rows}
    good = {row["key"] for row in rows if row["status"] == "ok"}
    chains = {(row["key"], row["cot"]) for row in rows if row["status"] == "ok"}
    texts = {(row["key"], row["response"]) for row in rows}
    asked = sum(job.n for job in jobs)
    stages = [
        ("asked", asked, None, len(jobs)),
        ("answered", len(rows), len(texts), len(answered)),
        ("a chain of three parts", status["ok"], len(chains), len(good)),
    ]
    reasons = {name: count for name, count in status.items() if name != "ok"}
    if asked > len(rows):
        reasons["no answer yet (call failed or not made)"] = asked - len(rows)
    return stages, reasons


@common.exit_codes
def main(args):
    client = api.client_of(args, args.model)
    again = ask.asked_again(args.retry)
    data.existing("--data", args.data, data.RELEASE)
    ask.check_outputs({**ask.beside_answers(args.out), **ask.beside(args.out)}, inputs=[args.data])
    if not args.dry_run:
        client.check()

    # 1. Examples. Every fault is found before the first paid call.
    options = {"skip_bad": args.skip_bad, "merge_repeats": args.merge_repeats}
    examples = data.load_examples(args.data, args.image_dir, ("quintuples",), **options)
    examples = data.check_images(examples[: args.limit], args.skip_bad)

    # 2. One job an example.
    jobs = []
    for example in examples:
        gold = common.format_answer(example.quintuples)
        prompt = common.DISTILL_PROMPT.format(text=example.text, gold=gold)
        jobs.append(client.job(data.to_row(example, args.out), prompt, example.image, args.n))
    if args.dry_run:
        ask.print_estimate(client, jobs, 300, "distil", args.out, again)
        return 0

    # 3. Ask.
    with ask.AppendFile(args.out, MADE_BY, again) as out:
        check_same_run(args.out, jobs)
        try:
            failed = ask.ask_all(
                client, jobs, out, finish, args.batch, title="distil", must_differ=args.n > 1
            )
        finally:
            stages, reasons = funnel(args.out, jobs)
            stats = {
                "model": args.model,
                "server": client.server.shown,
                "params": client.params,
                "dollars": client.spent if args.price else None,
            }
            prompts = {"distil": common.DISTILL_PROMPT}
            ask.write_data_card(args.out, stages, reasons, stats, prompts, [args.out])
    return 1 if failed else 0


if __name__ == "__main__":
    main(parse_args())
