"""What the tests of 05 share: quintuples, stored rows, the command line."""

import os
import subprocess
import sys

from conftest import ROOT

import common
from lib import data


def q(line):
    return common.quintuple(*line.split(", "))


GOLD = q("Josh Gordon, per, Browns, org, member of")
A, B, C = (common.quintuple(name, "per", "Browns", "org", "member of") for name in "ABC")


def respond(answer, think="x"):
    return f"<think>{think}</think><answer>{answer}</answer>"


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(map(data.jsonl_line, rows)), encoding="utf-8")
    return path


def stored_row(name, texts, gold=(), prompt="reason", finished=True):
    """A row of predictions.jsonl as 05 writes it."""
    return {
        "id": name,
        "text": f"tweet {name}",
        "image": "x.jpg",
        "quintuples": [list(q) for q in gold],
        "responses": [{"text": text, "finished": finished} for text in texts],
        "prompt": prompt,
    }


def stored(path, answers, golds):
    """predictions.jsonl of tweets t0, t1, …; answers: a list of quintuple lists a tweet, None where the
    response is no answer."""
    rows = []
    for number, (gold, responses) in enumerate(zip(golds, answers, strict=True)):
        texts = []
        for place, answer in enumerate(responses):
            text = "?" if answer is None else common.format_answer(answer)
            texts.append(respond(text, think=f"x{place % 3}"))
        rows.append(stored_row(f"t{number}", texts, gold))
    return write(path, rows)


def run(*args, cwd=None, **env):
    """05 as a user starts it, without a key → the finished process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI")}
    done = subprocess.run(
        [sys.executable, ROOT / "05_eval.py", *map(str, args)],
        env={**environment, **env},
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=cwd,
        timeout=300,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done
