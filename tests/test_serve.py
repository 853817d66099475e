"""01 end to end against `transformers serve`, a real OpenAI-compatible server, with the demo's tiny LLaVA."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image
from stages import make_tweets, rows_of, run

ROOT = Path(__file__).parent.parent
MISSING = [
    name
    for name in ("torch", "transformers", "uvicorn", "fastapi", "accelerate")
    if importlib.util.find_spec(name) is None
]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"transformers[serving] is not installed: {', '.join(MISSING)} missing"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(base URL, model folder) of a server that answers."""
    model, log = tmp_path_factory.mktemp("llava"), tmp_path_factory.mktemp("log") / "serve.log"
    subprocess.run(
        [sys.executable, "-m", "demo.base.build", "--arch", "llava", "--out", model],
        check=True,
        cwd=ROOT,
        capture_output=True,
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", start, "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with open(log, "wb") as handle:
        process = subprocess.Popen(command, stdout=handle, stderr=handle, env=env)
    try:
        end = time.monotonic() + 300
        while True:
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-2000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", model
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def tweets(tmp_path):
    make_tweets(tmp_path, count=5)
    for i in range(5):
        Image.new("RGB", (56, 56), (40 * i, 9, 9)).save(tmp_path / f"{i}.jpg")
    return tmp_path


def distil(tweets, url, model, *args):
    paths = ("--data", tweets / "train.jsonl", "--out", tweets / "cot.jsonl")
    return run("01_distill.py", *paths, "--base-url", url, "--model", model, *args, key="local")


def test_candidates_are_topped_up_and_equal_ones_noticed(server, tweets):
    """The server gives one choice, the same each time; a random model writes no chain."""
    done = distil(tweets, *server, "--n", 5, "--max-tokens", 12, "--limit", 2)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tweets / "cot.jsonl")
    assert sorted((row["id"], row["candidate"]) for row in rows) == [
        (f"t{i}", k) for i in (0, 1) for k in range(5)
    ]
    for row in rows:
        assert row["status"] in ("malformed", "length", "empty") and row["cot"] == "" and row["image_hash"]
        assert row["usage"]["completion_tokens"] > 0 and row["server"] == server[0]
    assert "2 of 2 examples: all candidates are equal; is sampling on?" in done.stderr


def test_twenty_answers_of_no_use_stop(server, tweets):
    done = distil(tweets, *server, "--max-tokens", 12, "--concurrency", 1)
    assert done.returncode == 3 and "none of the first 20 answers can be used, such as" in done.stderr
    assert len(rows_of(tweets / "cot.jsonl")) == 20


def test_a_wrong_model_name_is_one_line(server, tweets):
    done = distil(tweets, server[0], "no-such-model")
    assert done.returncode == 3 and "no-such-model" in done.stderr and "check --model" in done.stderr


def test_an_unknown_field_is_told(server, tweets):
    done = distil(tweets, *server, "--param", "nonsense=3", "--n", 1)
    assert done.returncode == 1 and "failed, 5 ×: 422" in done.stderr and "nonsense" in done.stderr
