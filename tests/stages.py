"""01 and 02 as a user runs them, and a teacher that answers by rule."""

import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

import common
from lib import data as files

ROOT = Path(__file__).parent.parent
KEY = "sk-secret-1234567890"
GOLD = [["Josh Gordon", "per", "Browns", "org", "member of"]]
CHAIN = (
    "Image Description: {0} a man\nVisual-Text Alignment: he is Josh Gordon\n"
    "Quintuple Reasoning: so per, and a member"
)
FULL = "Scores: R1=2 R2=2 R3=2 R4=1 R5=1 R6=2"


def make_tweets(folder, count=4):
    """Annotated tweets with images, in train.jsonl."""
    rows = []
    for i in range(count):
        Image.new("RGB", (30 + i, 20), "red").save(folder / f"{i}.jpg")
        text = f"tweet {i} Josh Gordon of the Browns"
        rows.append({"id": f"t{i}", "text": text, "image": f"{i}.jpg", "quintuples": GOLD})
    (folder / "train.jsonl").write_text("".join(map(files.jsonl_line, rows)))


def run(script, *args, key=KEY, cwd=None, **env):
    """Run a script → CompletedProcess; never a traceback, never the key on the screen."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENAI")} | env
    if key:
        environment["OPENAI_API_KEY"] = key
    command = [sys.executable, ROOT / script, *map(str, args)]
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=120,
        cwd=cwd,
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert key is None or len(key) < 8 or key.strip() not in done.stdout + done.stderr
    return done


def distil(folder, server, *args, out="cot.jsonl", cot=None, **env):
    """01 on the tweets of `folder`; cot: another name of out."""
    out = cot or out
    paths = ("--data", folder / "train.jsonl", "--out", folder / out)
    return run("01_distill.py", *paths, "--base-url", getattr(server, "url", server), *args, **env)


def select(folder, server, *args, cot="cot.jsonl", out="sft.jsonl", **env):
    """02 on the candidates in `folder`."""
    paths = ("--cot", folder / cot, "--out", folder / out)
    return run("02_filter.py", *paths, "--base-url", getattr(server, "url", server), *args, **env)


def rows_of(path):
    return [row for _, row in files.read_jsonl(path)] if path.exists() and path.stat().st_size else []


def teacher(chains=None, scores=None, prediction=None):
    """chains: {k: text} of candidates that are not good; scores, prediction: functions of the prompt."""
    gold = common.format_answer([common.quintuple(*q) for q in GOLD])

    def answer(body, prompt):
        if prompt.startswith("Score"):
            return [scores(prompt) if scores else FULL]
        if "Which quintuples does this reasoning lead to?" in prompt:
            return [prediction(prompt) if prediction else gold]
        return [(chains or {}).get(i, CHAIN.format(i)) for i in range(body.get("n", 1))]

    return answer
