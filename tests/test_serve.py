"""01 end to end against `transformers serve`, a real OpenAI-compatible server, with the tiny LLaVA of demo/base/build.py."""

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

from lib import data

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
    command = [
        sys.executable,
        "-c",
        "from transformers.cli.transformers import main; main()",
        "serve",
        str(model),
    ]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with open(log, "wb") as handle:
        process = subprocess.Popen(
            command,
            stdout=handle,
            stderr=handle,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
    try:
        end = time.monotonic() + 120
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


def test_distil_against_transformers_serve(server, tmp_path):
    """The server gives one choice where two are asked for, so each row is topped up; a random model writes no chain, and 01 says so."""
    url, model = server
    gold = [["a", "per", "b", "org", "member of"]]
    rows = [{"id": f"t{i}", "text": f"tweet {i}", "image": f"{i}.png", "quintuples": gold} for i in (0, 1)]
    for i in (0, 1):
        Image.new("RGB", (56, 56), (200 * i, 9, 9)).save(tmp_path / f"{i}.png")
    (tmp_path / "data.jsonl").write_text("".join(map(data.jsonl_line, rows)))
    command = [
        sys.executable,
        ROOT / "01_distill.py",
        "--data",
        tmp_path / "data.jsonl",
        "--out",
        tmp_path / "cot.jsonl",
        "--n",
        "2",
    ]
    command += ["--base-url", url, "--model", str(model), "--max-tokens", "12", "--concurrency", "2"]
    env = os.environ | {"OPENAI_API_KEY": "local"}
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    answers = [row for _, row in data.read_jsonl(tmp_path / "cot.jsonl")]
    assert sorted((row["id"], row["candidate"]) for row in answers) == [
        ("t0", 0),
        ("t0", 1),
        ("t1", 0),
        ("t1", 1),
    ]
    assert all(
        row["status"] in ("malformed", "length") and row["cot"] == "" and row["image_hash"] for row in answers
    )
    assert all(row["response"] and row["usage"]["completion_tokens"] > 0 for row in answers)
