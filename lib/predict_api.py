"""Predictions of a model behind an OpenAI-compatible server: ask, and store every choice. Knows no score."""

import contextlib
from collections import defaultdict
from pathlib import Path

import common
from common import InputError
from lib import api, ask, data, predictions

ANSWER_TOKENS = 300  # of an answer, for --dry-run


def predict_api(args):
    """--samples choices of the server for each tweet of --data, kept in OUT/answers.jsonl → ({id: Example},
    number of calls that failed).

    (None, 0) where there is nothing to score yet: --dry-run, --batch submit. Raises InputError, Stopped.
    """
    out = Path(args.out)
    path = out / "answers.jsonl"
    prompt = args.prompt or "direct"
    template = common.PROMPTS[prompt]
    params = api.request_params(args)
    known = data.load_tweets(args)
    known = {example.id: example for example in data.check_images(list(known.values()), args.skip_bad)}
    client = api.ChatClient(
        args.model, args.base_url, args.concurrency, args.timeout, args.price, args.budget, params
    )
    jobs = {}
    for example in known.values():
        text = template.format(text=example.text)
        jobs[example.id] = client.job(data.to_row(example, path), text, example.image, args.samples)
    wanted = list(jobs.values())[: args.limit]
    if args.dry_run:
        ask.print_estimate(client, wanted, ANSWER_TOKENS, "predict")
        return None, 0
    client.require_key()
    settings = {"model": args.model, "params": params, "prompt": predictions.text_hash(template)}
    with contextlib.ExitStack() as stack:
        fault = predictions.lock_output(out, args.fresh, stack)
        if fault:
            raise fault
        predictions.stored_offsets(out, known, settings)
        file = stack.enter_context(ask.AppendFile(path))
        refuse_other_answers(path, jobs)
        failed = ask.ask_all(client, wanted, file, batch=args.batch)
        if args.batch == "submit":
            return None, 0  # --batch collect goes on from here
        store(out, path, known, prompt, settings)
    return known, failed


def refuse_other_answers(path, jobs):
    """Raise InputError where OUT/answers.jsonl answers another question about one of these tweets."""
    for number, row in data.read_jsonl(path):
        if row["id"] in jobs and row["key"] != jobs[row["id"]].key:
            raise InputError(
                f"{path}:{number}: answers another prompt, image or model than this command: "
                "use another --out, or --fresh"
            )


def store(out, path, known, prompt, settings):
    """OUT/predictions.jsonl from all answers; a refusal or a filtered answer is stored, and read as no
    answer."""
    answers = defaultdict(list)
    for _, row in data.read_jsonl(path):
        answer = {"text": row["response"], "finished": row["status"] != "length", "status": row["status"]}
        answers[row["id"]].append({**answer, "model": row["model_answered"]})
    target = out / "predictions.jsonl"
    lines = []
    for example in known.values():
        if answers[example.id]:
            row = data.to_row(example, target) | {"prompt": prompt, "responses": answers[example.id]}
            lines.append(data.jsonl_line(row | {"settings": settings}))
    data.write_atomic(target, "".join(lines))
