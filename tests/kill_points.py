"""Kill 03 and 04 at random moments, start the same command again, and compare everything OUT holds with an
uninterrupted run, bit by bit.

Half of the kill points count file operations in OUT, so that they fall inside saves, between the renames of
best/ and while logs are cut; half are moments in time. Every second trial is killed twice.

    python -m tests.kill_points --points 20 --out runs/kills            # about ten minutes on two cores

Reads: nothing; makes its own tiny model and world.  Writes: OUT/.
"""

import argparse
import hashlib
import json
import random
import shutil
import sys
from pathlib import Path

import torch

from demo import world
from demo.base import build
from tests.zygote import Zygote

CLOCK = (
    "seconds",
    "sampling_seconds",
    "tokens_per_second",
    "peak_memory_mib",
)  # the fields that tell of the machine, not of the run


def make_inputs(folder, arch="qwen2_5_vl"):
    """Tiny model and world → {name: path}."""
    folder = Path(folder)
    if not (folder / "world" / "sft.jsonl").exists():
        size = {
            "hidden": 64,
            "layers": 2,
            "heads": 4,
            "kv_heads": 2,
            "ffn": 128,
            "vision_hidden": 32,
            "vision_layers": 1,
            "vision_heads": 2,
        }
        build.build(arch, folder / "tiny", build.corpus(), size=size)
        sizes = ["--train", "12", "--val", "4", "--test", "1"]
        world.main(world.parse_args(["--out", str(folder / "world"), *sizes]))
        rows = [json.loads(line) for line in (folder / "world" / "train.jsonl").read_text().splitlines()]
        cot = "Image Description: a\nVisual-Text Alignment: b\nQuintuple Reasoning: c"
        (folder / "world" / "sft.jsonl").write_text(
            "".join(json.dumps(row | {"cot": cot}) + "\n" for row in rows)
        )
    names = {name: folder / "world" / f"{name}.jsonl" for name in ("train", "val", "sft")}
    return names | {"model": folder / "tiny"}


def command(script, inputs, out, adapter=None):
    """The arguments of a run of six short steps, a validation every second or third, a save every second."""
    shared = [
        "--model",
        inputs["model"],
        "--val",
        inputs["val"],
        "--out",
        out,
        "--eval-limit",
        3,
        "--max-new-tokens",
        6,
        "--lr",
        1e-3,
    ]
    shared += ["--save-every", 2, "--batch-size", 1]
    if script == "03_sft":
        more = [
            "--data",
            inputs["sft"],
            "--lora-rank",
            4,
            "--lora-alpha",
            8,
            "--lora-dropout",
            0.1,
            "--grad-accum",
            2,
            "--limit",
            6,
        ]
        return [*shared, *more, "--epochs", 2, "--eval-every", 0.7]
    more = [
        "--data",
        inputs["train"],
        "--adapter",
        adapter,
        "--group-size",
        3,
        "--limit",
        3,
        "--log-samples-every",
        2,
    ]
    return [*shared, *more, "--epochs", 2, "--eval-every", 1]


def digest(value):
    """Of everything a saved state holds; the bytes of a pickle also tell which strings were one object."""
    if isinstance(value, torch.Tensor):
        content = hashlib.sha256(value.detach().contiguous().numpy().tobytes()).hexdigest()
        return f"{value.dtype}{list(value.shape)}{content}"
    if isinstance(value, dict):
        return {str(key): digest(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [digest(item) for item in value]
    return repr(getattr(value, "__dict__", value))


def contents(out):
    """{file: what must not depend on a kill}: adapters and states by hash, logs as rows without the clock's
    fields."""
    found, out = {}, Path(out)
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name = str(path.relative_to(out))
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]
        elif path.name not in (
            "config.json",
            "whole.json",  # sizes, which the names of temporary folders change
            ".lock",
            "curves.png",
        ):  # the pid, OUT itself, and the clock again
            found[name] = (
                digest(torch.load(path, weights_only=False))
                if path.suffix == ".pt"
                else hashlib.sha256(path.read_bytes()).hexdigest()
            )
    return found | {"last": (out / "last").resolve().name}


def trial(zygote, script, inputs, out, adapter, points):
    """Kill at each of `points`, then go on to the end → (contents, kills that hit)."""
    shutil.rmtree(out, ignore_errors=True)
    argv, hits = command(script, inputs, out, adapter), []
    for point in points:
        answer = zygote.run(script, argv, f"{out}.log", **point)
        assert answer["code"] in (-9, 0), answer["text"]
        hits.append(answer["code"] == -9)
    answer = zygote.run(script, argv, f"{out}.log")
    assert answer["code"] == 0, answer["text"]
    return contents(out), hits


def run(folder, points, seed=0, scripts=("03_sft", "04_grpo"), say=print):
    """→ number of trials that differ from the uninterrupted run."""
    folder, rng, wrong = Path(folder), random.Random(seed), 0
    folder.mkdir(parents=True, exist_ok=True)
    inputs, adapter, zygote = make_inputs(folder), None, Zygote()
    for script in scripts:
        whole = folder / f"{script}-whole"
        shutil.rmtree(whole, ignore_errors=True)
        answer = zygote.run(script, command(script, inputs, whole, adapter), f"{whole}.log")
        assert answer["code"] == 0, answer["text"]
        expected, kills, before = contents(whole), 0, wrong
        say(f"{script}: uninterrupted {answer['seconds']} s, {answer['events']} file operations", flush=True)
        for number in range(points):
            hits = []
            while not any(hits):  # a moment after the end kills nothing: draw again
                at = []
                for _ in range(1 + number % 2):
                    in_time = {"kill_after": round(rng.uniform(0.2, 0.95) * answer["seconds"], 2)}
                    at.append(in_time if (number // 2) % 2 else {"kill_at": rng.randint(1, answer["events"])})
                got, hits = trial(zygote, script, inputs, folder / f"{script}-killed", adapter, at)
            differ = [name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name)]
            kills, wrong = kills + sum(hits), wrong + bool(differ)
            verdict = f"DIFFERS in {differ}" if differ else "bitwise equal"
            say(f"{script} {number + 1:2}: {at} killed {hits} → {verdict}", flush=True)
        counts = f"{points} trials, {kills} kills, {wrong - before} differ; {len(expected)} things compared"
        say(f"{script}: {counts}", flush=True)
        adapter = adapter or whole / "best"
    zygote.close()
    return wrong


def main(args):
    return 1 if run(args.out, args.points, args.seed) else None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--points", type=int, default=20, help="kill points a script [ours]")
    parser.add_argument("--seed", type=int, default=0, help="of the kill points [ours]")
    parser.add_argument("--out", default="runs/kills", help="working folder [ours]")
    sys.exit(main(parser.parse_args()))
