"""The user's five commands, bare, on the conventional layout (SPEC §10); and each of them in an empty folder:
one line."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, run_script

SMALL = "--eval-limit 2 --max-new-tokens 8 --lora-rank 4 --lora-alpha 8"


@pytest.fixture(scope="module")
def layout(world, tmp_path_factory):
    """A folder with data/{train,val,test}.json and data/img/, as the README lays them out."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "data").mkdir()
    for split in ("train", "val", "test"):
        rows = [json.loads(line) for line in (world / f"{split}.jsonl").read_text().splitlines()]
        for row in rows:
            row["image"] = row["image"].removeprefix("img/")
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "data" / f"{split}.json").write_text(lines)
    shutil.copytree(world / "img", folder / "data" / "img")
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Environment that points at the demo's teacher in place of OpenAI."""
    ready = tmp_path_factory.mktemp("teacher") / "url"
    command = [sys.executable, "-m", "demo.teacher", "--ready-file", str(ready)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()  # its first line stands once it listens
    yield {"OPENAI_API_KEY": "any", "OPENAI_BASE_URL": ready.read_text().strip()}
    process.terminate()
    process.wait()


def test_five_bare_commands(layout, teacher, tiny):
    def run(*command, **more):
        return run_script(f"{ROOT}/{command[0]}", *command[1:], cwd=layout, env=teacher, **more)

    run("01_distill.py")
    run("02_filter.py")
    run(f"03_sft.py --model {tiny('llava')} --epochs 1 {SMALL}", ranks=2)
    run("04_grpo.py --group-size 8 --limit 4 --epochs 1 --eval-limit 2 --max-new-tokens 8", ranks=2)
    run("05_eval.py --limit 2 --max-new-tokens 8", ranks=2)
    made = ("cot.jsonl", "sft.jsonl", "sft/best/README.md", "grpo/best/adapter_model.safetensors")
    made += ("test/predictions.jsonl", "test/metrics.json", "test/report.html")
    assert [name for name in made if not (layout / "runs" / name).exists()] == []

    # what takes the place of an absent adapter
    run(
        "04_grpo.py --only-rl --model",
        tiny("llava"),
        "--limit 2 --epochs 1 --no-val --max-new-tokens 8 --out runs/rl",
    )
    run("05_eval.py --zero-shot --model", tiny("llava"), "--limit 2 --max-new-tokens 8 --out runs/zero")
    assert (layout / "runs" / "rl" / "best").is_dir() and (layout / "runs" / "zero" / "metrics.json").exists()


RELEASE = "the EEGA release goes there (README, Data), or name another"


@pytest.mark.parametrize(
    "script, ranks, message",
    [
        ("01_distill.py", None, f"--data data/train.json: no such file: {RELEASE}"),
        ("02_filter.py", None, "--cot runs/cot.jsonl: no such file: made by 01_distill.py, or name another"),
        ("03_sft.py", 2, "--data runs/sft.jsonl: no such file: made by 02_filter.py, or name another"),
        (
            "04_grpo.py",
            2,
            "--adapter runs/sft/best: no such file: made by 03_sft.py; --only-rl starts without it",
        ),
        ("05_eval.py", 2, "--adapter runs/grpo/best: no such file: made by 04_grpo.py; --zero-shot"),
    ],
)
def test_in_an_empty_folder_one_line_says_what_is_missing(script, ranks, message, tmp_path):
    env = {"OPENAI_API_KEY": "any"}
    code, stdout, stderr = run_script(f"{ROOT}/{script}", cwd=tmp_path, ranks=ranks, fails=True, env=env)
    errors = [line for line in (stdout + stderr).splitlines() if "error: " in line]
    assert len(errors) == 1 and errors[0].startswith(f"error: {message}"), stdout + stderr
    assert ranks or code == 2
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "a failed start leaves nothing"


@pytest.mark.parametrize("script", ["01_distill.py", "02_filter.py", "03_sft.py", "04_grpo.py", "05_eval.py"])
def test_help_tells_every_default(script):
    _, stdout, _ = run_script(script, "--help")
    assert "(default: " in stdout and "[paper" in stdout and "[ours" in stdout
