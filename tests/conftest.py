"""What several test files share: paths, the tiny models, the small world. Each is built once a worker."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"  # real annotations, not part of the repository
os.environ.setdefault("OMP_NUM_THREADS", "1")
ARCHITECTURES = ("qwen2_5_vl", "llava")

needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"the real annotations are not here: {DATA} (JMERE and MNRE text)"
)


def stage(name):
    """A numbered script as a module."""
    return importlib.import_module(name)


def run_script(*command, ranks=None, fails=False, env=None, cwd=ROOT):
    """Run a script as the README says, alone or through the deepspeed launcher → (exit code, stdout, stderr).

    command: words, or several in one string; cwd: where it is run, the repository's root as a rule.
    """
    command = " ".join(map(str, command)).split()
    if ranks:
        port = 29500 + os.getpid() % 1000
        command = ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(port), *command]
    else:
        command = [sys.executable, *command]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **(env or {})},
        timeout=900,
    )
    assert (done.returncode != 0) == fails, (
        f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    )
    assert fails is False or "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def folder(tmp_path):
    """Folder with four annotated tweets and their images: train.jsonl, 0.jpg …"""
    from stages import make_tweets

    make_tweets(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(arch) → folder of a tiny model of the real classes with random weights."""
    built = {}

    def get(arch):
        if arch not in built:
            from demo.base import build

            built[arch] = tmp_path_factory.mktemp(arch)
            build.build(arch, built[arch], build.corpus())
        return built[arch]

    return get


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folder with train/val/test.jsonl and sft.jsonl: 16, 4 and 4 pictured tweets."""

    from lib import data

    folder = tmp_path_factory.mktemp("world")
    run_script("-m", "demo.world", "--out", folder, "--train", 16, "--val", 4, "--test", 4)
    cot = "Image Description: a man\nVisual-Text Alignment: he is named\nQuintuple Reasoning: so it follows"
    rows = [{**row, "cot": cot} for _, row in data.read_jsonl(folder / "train.jsonl")]
    data.write_atomic(folder / "sft.jsonl", "".join(map(data.jsonl_line, rows)))
    return folder


# -------------------------------------------------------------------------------- runs of 03 and 04


@pytest.fixture(scope="module")
def zygote():
    """Starts 03 and 04 without importing torch each time."""
    from tests.zygote import Zygote

    zygote = Zygote()
    yield zygote
    zygote.close()


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def inputs(work):
    """What kill_points trains on."""
    from tests import kill_points

    return kill_points.make_inputs(work)


@pytest.fixture(scope="module")
def sft(work, inputs, zygote):
    """An uninterrupted run of 03 → OUT."""
    from tests import kill_points

    out = work / "sft"
    answer = zygote.run("03_sft", kill_points.command("03_sft", inputs, out), f"{out}.log")
    assert answer["code"] == 0, answer["text"]
    return out


@pytest.fixture
def start(inputs, zygote, sft, tmp_path):
    """start(script, *more arguments, **what the child meets) → answer; OUT is tmp_path/out."""
    from tests import kill_points

    def start(script, *more, out=tmp_path / "out", **request):
        argv = kill_points.command(script, inputs, out, sft / "best") + list(more)
        return zygote.run(script, argv, tmp_path / "log", **request) | {"out": out}

    return start
