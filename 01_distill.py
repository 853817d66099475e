"""Distil chains of thought from a teacher model: §3.2 and App. D of JMERE-R1.

The teacher sees image, text and gold quintuples and writes a Multimodal-Paradigm chain of thought (MP-CoT) of three parts: Image
Description, Visual-Text Alignment, Quintuple Reasoning. `--n` candidates per example are asked for in one request.

Deviations [ours]: the wording of the prompt (common.DISTILL_PROMPT; the paper prints none); sampling parameters are the server's
unless given; a chain without exactly the three parts is `malformed` and never used.

    export OPENAI_API_KEY=…
    python 01_distill.py --data train.json --image-dir img --out cot.jsonl --price 2.5 10 --dry-run
    python 01_distill.py --data train.json --image-dir img --out cot.jsonl --price 2.5 10 --budget 60
    python 01_distill.py --data train.json --image-dir img --out cot.jsonl --batch submit   # a day later: --batch collect
    python 01_distill.py --data train.jsonl --out cot.jsonl --base-url http://127.0.0.1:8000/v1 --model tiny

Killed or stopped, the same command goes on and pays for nothing twice but the calls then in flight.

Reads:  --data, one of the formats of data.load_examples, with gold quintuples
        {"id": "tw1", "text": "Browns Placing WR Josh Gordon", "image": "tw1.jpg", "quintuples": [["Josh Gordon", "per", "Browns", "org", "member of"]]}
Writes: --out, append-only, one row a candidate; failed calls in *.errors.jsonl, counts in *.stats.json, data card *.card.md
        {"id": "tw1", …, "candidate": 0, "cot": "Image Description: …", "status": "ok|malformed|refusal|content_filter|length", "response": "…",
         "model": "asked", "model_answered": "…", "params": {}, "prompt_hash": "…", "image_hash": "…", "usage": {…}, "finish_reason": "stop", "key": "…"}
"""  # noqa: E501

import argparse
import json
from collections import Counter

import common
from lib import api, ask, data


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    io = parser.add_argument_group("files")
    io.add_argument(
        "--data", required=True, help="annotated examples: our JSONL, JMERE JSON or MNRE text [paper §4.1]"
    )
    io.add_argument("--image-dir", help="folder of the images [ours: default beside --data]")
    io.add_argument(
        "--out", required=True, help="candidates, JSONL [ours: append-only, so that a run can go on]"
    )
    io.add_argument(
        "--skip-bad",
        action="store_true",
        help="drop bad rows and images, and say how many [ours: default stops]",
    )
    io.add_argument(
        "--merge-repeats",
        action="store_true",
        help="join examples of the same text and image [ours: as the V2 release]",
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="gpt-4o-2024-11-20", help="the teacher [paper App. D]")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--n", type=int, default=5, help="candidates per example [paper §3.2]")
    api.add_api_arguments(model, parser.add_argument_group("runtime"))
    args = parser.parse_args(argv)
    if args.n < 1:
        parser.error(f"--n {args.n}, expected at least 1")
    return args


def finish(row):
    """The row of one answer: the chain in canonical form, or "" and why there is none."""
    cot = common.parse_cot(row["response"]) if row["status"] == "ok" else None
    status = "malformed" if row["status"] == "ok" and cot is None else row["status"]
    return {**row, "status": status, "cot": cot or ""}


def check_same_run(path, jobs):
    """Refuse an output whose rows come from another prompt, model or image: two runs in one file are no data set."""
    keys = {job.row["id"]: job.key for job in jobs}
    for number, row in data.read_jsonl(path):
        if keys.get(row["id"], row["key"]) != row["key"]:
            was = f"{row['model']} with {json.dumps(row['params'])}, prompt {row['prompt_hash']}, image {row['image_hash']}"
            raise common.InputError(
                f"{path}:{number}: {row['id']} was asked of {was}; this command differs: choose another --out"
            )


def funnel(path, jobs):
    """What became of the candidates of this run → (stages, reasons)."""
    keys, status, answered, good = {job.key for job in jobs}, Counter(), set(), set()
    for _, row in data.read_jsonl(path):
        if row["key"] in keys:
            status[row["status"]] += 1
            answered.add(row["key"])
            good |= {row["key"]} if row["status"] == "ok" else set()
    asked = sum(job.n for job in jobs)
    stages = [
        ("asked", asked, len(jobs)),
        ("answered", status.total(), len(answered)),
        ("a chain of three parts", status["ok"], len(good)),
    ]
    reasons = {name: count for name, count in status.items() if name != "ok"}
    if asked > status.total():
        reasons["no answer yet (call failed or not made)"] = asked - status.total()
    return stages, reasons


@common.exit_codes
def main(args):
    params = api.request_params(args)
    client = api.ChatClient(
        args.model, args.base_url, args.concurrency, args.timeout, args.price, args.budget, params
    )
    if not args.dry_run:
        client.require_key()

    # 1. examples, every fault found before the first paid call
    need = ("quintuples",)
    examples = data.load_examples(
        args.data, args.image_dir, need, skip_bad=args.skip_bad, merge_repeats=args.merge_repeats
    )
    examples = data.check_images(examples[: args.limit], args.skip_bad)

    # 2. one job an example
    jobs = []
    for example in examples:
        prompt = common.DISTILL_PROMPT.format(
            text=example.text, gold=common.format_answer(example.quintuples)
        )
        jobs.append(client.job(data.to_row(example, args.out), prompt, example.image, args.n))
    if args.dry_run:
        ask.print_estimate(client, jobs, 300, "distil")
        return 0

    # 3. ask
    with ask.AppendFile(args.out) as out:
        check_same_run(args.out, jobs)
        try:
            failed = ask.ask_all(client, jobs, out, finish, args.batch)
        finally:
            stages, reasons = funnel(args.out, jobs)
            stats = {"model": args.model, "params": params, "dollars": client.spent if args.price else None}
            ask.write_data_card(
                args.out, stages, reasons, stats, {"distil": common.DISTILL_PROMPT}, [args.out]
            )
    return 1 if failed else 0


if __name__ == "__main__":
    main(parse_args())
