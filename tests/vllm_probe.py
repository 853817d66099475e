"""Our sampler beside a real vLLM, for tests/vllm.sh: the server is a URL, nothing of it is imported.

python -m tests.vllm_probe make FOLDER ARCH      # FOLDER/ARCH to serve, FOLDER/ARCH-adapter
python -m tests.vllm_probe compare FOLDER ARCH URL
python -m tests.vllm_probe same OUT OUT           # two runs of 05, greedy: the same answers and scores
python -m tests.vllm_probe table OUT OUT          # two runs of 04, the second one's responses by the server
"""

import json
import shutil
import statistics
import sys
from pathlib import Path

import torch

import common
from lib import data, lora, merge, rollout, served, training, vlm

ALONE = training.Ranks(0, 1, torch.device("cpu"))
LIMIT = 1e-3  # nats: fp32 on both sides
PIXELS = {"qwen2_5_vl": (6272, 12544), "llava": (None, None)}  # as vllm.sh tells them to the server


def shake(model, seed, scale):
    """Another policy: each adapter weight moved at random."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)


def base_of(arch):
    return f"demo/base/{arch}"


def make(folder, arch):
    """A copy of the shipped base in the published layout, and an adapter that changes what it says."""
    shutil.copytree(base_of(arch), folder / arch, dirs_exist_ok=True)
    merge.published_layout(folder / arch)
    model, processor = vlm.load(base_of(arch))
    torch.manual_seed(0)  # of LoRA's A: not every adapter changes a greedy answer
    model = lora.add_lora(model, 8, 16)
    shake(model, 0, 0.05)
    recipe = lora.Recipe("reason", *PIXELS[arch])
    lora.save_adapter(model, processor, folder / f"{arch}-adapter", recipe, "")


def compare(folder, arch, url):
    """Raises AssertionError where the server is not what our sampler is."""
    processor = vlm.load_processor(base_of(arch), *PIXELS[arch])
    model, _ = vlm.load(base_of(arch), processor=processor)
    model = lora.load_adapter(model, str(folder / f"{arch}-adapter"), trainable=True).eval()
    examples = data.load_examples(folder / "world" / "train.jsonl")
    items = []
    for example in examples:
        prompt = common.REASON_PROMPT.format(text=example.text)
        items.append((prompt, example.image))
    server = served.Server(url, base_of(arch), processor, folder / f"{arch}-served", ALONE)
    server.prove(*items[0])
    few = items[:4]

    with model.disable_adapter():
        base = rollout.generate(model, processor, items, 1, 48, 0.0)
    same_ids(f"{arch}, base", server.sample(items, 1, 48, 0.0), base)
    ours = rollout.generate(model, processor, items, 1, 48, 0.0)
    assert ours != base, "the adapter changes nothing: this test could not fail"
    server.publish(model)
    same_ids(f"{arch}, adapter", server.sample(items, 1, 48, 0.0), ours)
    for temperature in (1.0, 0.4):
        off = gap(model, processor, few, server, temperature)
        print(f"{arch}: log-probs at temperature {temperature} differ by at most {off:.1e}")
        assert off < LIMIT

    for step in range(3):
        shake(model, step, 0.02)
        server.publish(model)
        off = gap(model, processor, few, server, 1.0)
        print(f"{arch}: adapter {step + 2}, new name and new folder: {off:.1e}")
        assert off < LIMIT
    off = reused(model, processor, few, server)
    print(f"{arch}: name and folder used again: {off:.2g}, the stale prefix cache")
    assert off > 10 * LIMIT, "a name and folder used again do no harm here: what the test is for is gone"
    server.close()
    assert not server.folder.exists()


def same_ids(who, theirs, ours):
    equal = 0
    for [one], [other] in zip(theirs, ours, strict=True):
        equal += one.completion_ids == other.completion_ids
    print(f"{who}: greedy ids equal in {equal} of {len(ours)}")
    assert equal == len(ours)


@torch.no_grad()
def gap(model, processor, items, server, temperature):
    """Largest |log-prob by the model's own forward − as the server drew it|, of four responses to each item.

    Image ids are left out here as they are there: a shaken model gives them up to 1e-3 of the probability.
    """
    largest = 0.0
    groups = server.sample(items, 4, 32, temperature)
    for item, group in zip(items, groups, strict=True):
        for sample in group:
            logits = vlm.own_logits(model, processor, *item, sample.completion_ids)[:-1]  # [C, V]
            logits[:, server.banned] = -torch.inf
            ids = torch.tensor(sample.completion_ids)[:, None]  # [C, 1]
            logps = (logits / temperature).log_softmax(-1)
            drawn = torch.tensor(sample.logps)  # [C]
            off = logps.gather(1, ids)[:, 0] - drawn
            largest = max(largest, off.abs().max().item())
    return largest


def reused(model, processor, items, server):
    """The gap where the next adapter takes the last one's name and folder."""
    name = server.adapter
    server.close()
    shake(model, 9, 0.1)
    served.write(model, server.folder / name)
    server._load(name)
    return gap(model, processor, items, server, 1.0)


def same(one, other):
    """Raises AssertionError where two runs of 05 stored other answers, or score otherwise."""
    other = Path(other)
    answers = []
    scores = []
    for out in (one, other):
        rows = [row for _, row in data.read_jsonl(out / "predictions.jsonl")]
        found = []
        for row in rows:
            for part in row["responses"]:
                # LLaVA's tokenizer begins a word with a space, which the server's text keeps
                found.append((row["id"], part["text"].strip(), part["finished"]))
        answers.append(sorted(found))
        scores.append(json.loads((out / "metrics.json").read_text())["scores"])
    equal = sum(map(tuple.__eq__, *answers))
    shown = f"F1 {scores[1]['jmere']['f1']:.4f}, {scores[0]['jmere']['f1']:.4f}"
    print(f"  {other.name}: {equal} of {len(answers[0])} answers equal {one.name}'s, {shown}")
    assert answers[0] == answers[1]
    assert scores[0] == scores[1]


def table(here, there):
    """Metrics of two runs of 04 side by side, as a table in Markdown."""
    runs = []
    for out in (here, Path(there)):
        runs.append([row for _, row in data.read_jsonl(out / "metrics.jsonl")])
    columns = {"reward": ".3f", "kl": ".1e", "sampling_gap": ".1e", "sampling_seconds": ".1f"}
    names = [f"{name} {where}" for name in columns for where in ("here", "there")]
    print("| step |", " | ".join([*names, "weight"]), "|")
    print("|---" * (len(names) + 2) + "|")
    steps = len(runs[0])
    parts = {f"{step}": slice(step - 1, step) for step in (1, 5, 10, 15, 20) if step <= steps}
    for label, part in (parts | {"mean": slice(None)}).items():
        cells = []
        for name, form in columns.items():
            for rows in runs:
                cells.append(format(statistics.mean(row[name] for row in rows[part]), form))
        weight = statistics.mean(row["rollout_weight"] for row in runs[1][part])
        print("|", " | ".join([label, *cells, f"{weight:.6f}"]), "|")


if __name__ == "__main__":
    command, work, *words = sys.argv[1:]
    commands = {"make": make, "compare": compare, "same": same, "table": table}
    commands[command](Path(work), *words)
