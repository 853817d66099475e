"""Predictions of a model behind an OpenAI-compatible server: ask, and store every choice. Knows no score."""

import contextlib
import tempfile
from collections import defaultdict
from pathlib import Path

import common
from common import InputError
from lib import api, ask, controls, data, predictions

ANSWER_TOKENS = 300  # of an answer, for --dry-run


def predict_api(args):
    """--samples choices of the server for each tweet of --data, kept in OUT/answers.jsonl → ({id: Example},
    number of calls that failed).

    (None, 0) where there is nothing to score yet: --dry-run, --batch submit. Raises InputError, Stopped.
    """
    out = Path(args.out)
    path = out / "answers.jsonl"
    args.prompt = args.prompt or "direct"
    params = api.request_params(args)
    known = controls.load_tweets(args)
    client = api.ChatClient(
        args.model, args.base_url, args.concurrency, args.timeout, args.price, args.budget, params
    )
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        shown = controls.with_images(known.values(), args.image, args.seed, folder)
        shown = data.check_images(shown, args.skip_bad)
        jobs = make_jobs(client, args, shown, known, path)
        wanted = [jobs[name] for name in list(known)[: args.limit] if name in jobs]
        if args.dry_run:
            ask.print_estimate(client, wanted, ANSWER_TOKENS, "predict")
            return None, 0
        client.require_key()
        settings = {"model": args.model, "params": params, "image": args.image}
        settings["prompt"] = predictions.text_hash(common.PROMPTS[args.prompt])
        fault = predictions.lock_output(out, args.fresh, stack)
        if fault:
            raise fault
        predictions.stored_offsets(out, known, settings)
        file = stack.enter_context(ask.AppendFile(path))
        refuse_other_answers(path, jobs)
        failed = ask.ask_all(client, wanted, file, batch=args.batch)
        if args.batch == "submit":
            return None, 0  # --batch collect goes on from here
        store(args, path, known, settings)
    return known, failed


def make_jobs(client, args, shown, known, path):
    """{id: Job}; shown: with the images to be sent, known: with their own, which are stored."""
    template = common.PROMPTS[args.prompt]
    jobs = {}
    for example in shown:
        row = data.to_row(known[example.id], path)
        prompt = template.format(text=example.text)
        jobs[example.id] = client.job(row, prompt, example.image, args.samples)
    return jobs


def refuse_other_answers(path, jobs):
    """Raise InputError where OUT/answers.jsonl answers another question about one of these tweets."""
    for number, row in data.read_jsonl(path):
        if row["id"] in jobs and row["key"] != jobs[row["id"]].key:
            raise InputError(
                f"{path}:{number}: answers another prompt, image or model than this command: "
                "use another --out, or --fresh"
            )


def store(args, path, known, settings):
    """OUT/predictions.jsonl from all answers; a refusal or a filtered answer is stored, and read as no
    answer."""
    answers = defaultdict(list)
    for _, row in data.read_jsonl(path):
        answer = {"text": row["response"], "finished": row["status"] != "length", "status": row["status"]}
        answers[row["id"]].append({**answer, "model": row["model_answered"]})
    target = Path(args.out) / "predictions.jsonl"
    source = {"model": args.model, "server": args.base_url}
    lines = []
    for example in known.values():
        if answers[example.id]:
            row = data.to_row(example, target) | {"prompt": args.prompt, "responses": answers[example.id]}
            lines.append(data.jsonl_line(row | {"settings": settings, "source": source}))
    data.write_atomic(target, "".join(lines))
