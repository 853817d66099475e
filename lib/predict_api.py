"""Predictions of a model behind an OpenAI-compatible server: ask, and store every choice. Knows no score."""

import contextlib
import tempfile
from collections import defaultdict
from functools import partial
from pathlib import Path

import common
from common import InputError
from lib import api, ask, controls, data, predictions

TITLE = "predict"  # of this pass
ANSWER_TOKENS = 300  # of an answer, for the estimate


def predict_api(args):
    """--samples choices of the server for each tweet of --data, kept in OUT/answers.jsonl → ({id: Example},
    number of calls that failed).

    (None, 0) where there is nothing to score yet: --dry-run, --batch submit, status, cancel. Raises
    InputError, Stopped.
    """
    out = Path(args.out)
    path = out / "answers.jsonl"
    args.prompt = args.prompt or "direct"
    client = api.client_of(args, args.model)
    readable = partial(is_readable, direct=args.prompt == "direct")
    again = ask.asked_again(args.retry, readable)
    known = controls.load_tweets(args)
    predictions.check_out(args)
    ask.check_outputs(ask.beside_answers(path), inputs=[args.data])
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        shown = controls.with_images(known.values(), args.image, args.seed, folder)
        shown = data.check_images(shown, args.skip_bad)
        jobs = make_jobs(client, args, shown, known, path)
        wanted = [jobs[name] for name in list(known)[: args.limit] if name in jobs]
        if args.dry_run:
            ask.print_estimate(client, wanted, ANSWER_TOKENS, TITLE, path, again)
            return None, 0
        client.check()
        settings = {"model": args.model, "params": client.params, "image": args.image}
        settings["prompt"] = predictions.text_hash(common.PROMPTS[args.prompt])
        fault = predictions.lock_output(out, args.fresh, stack)
        if fault:
            raise fault
        predictions.stored_offsets(out, known, settings)
        file = stack.enter_context(ask.AppendFile(path, predictions.MADE_BY, again))
        refuse_other_answers(path, jobs)
        failed = ask.ask_all(
            client, wanted, file, batch=args.batch, readable=readable, title=TITLE, tokens=ANSWER_TOKENS
        )
        if args.batch in ask.NO_ANSWERS:
            return None, 0  # --batch collect goes on from here
        source = {"model": args.model, "server": client.server.shown}
        store(args, path, known, {"settings": settings, "source": source}, readable)
    return known, failed


def is_readable(row, direct):
    """Whether an answer of the server says something, be it that there is nothing."""
    return predictions.from_responses(row["id"], [stored_answer(row)], direct).parsed[0]


def stored_answer(row):
    """A row of OUT/answers.jsonl as predictions.jsonl holds it."""
    return {
        "text": row["response"],
        "finished": row["status"] != "length",
        "status": row["status"],
        "model": row["model_answered"],
    }


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


def store(args, path, known, made_by, readable):
    """OUT/predictions.jsonl from all answers; a refusal or a filtered answer is stored, and read as no
    answer. made_by: settings and source of every row."""
    answers = defaultdict(list)
    for _, row in data.read_jsonl(path):
        answers[row["id"]].append(row)
    target = Path(args.out) / "predictions.jsonl"
    lines = []
    for example in known.values():
        rows = counted(answers[example.id], args.samples, readable)
        if rows:
            row = data.to_row(example, target) | {"prompt": args.prompt}
            row["responses"] = [stored_answer(answer) for answer in rows]
            lines.append(data.jsonl_line(row | made_by))
    data.write_atomic(target, "".join(lines))


def counted(rows, samples, readable):
    """The answers to one tweet that count: of more than --samples those are left out that --retry asked
    again, which are the first that cannot be read."""
    useless = [row for row in rows if not readable(row)]
    if len(rows) - len(useless) > samples:  # more were asked for once, and all are paid for
        return rows
    replaced = useless[: max(0, len(rows) - samples)]
    return [row for row in rows if row not in replaced]
