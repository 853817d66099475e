"""05 predicts: store, resume, share the work, refuse other settings, with a stand-in for the model; then
with real tiny models."""

import contextlib
import importlib
import json
import shutil
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, run_script
from eval_cases import GOLD, respond, run, write
from PIL import Image
from safetensors import safe_open

import common
from lib import ask, controls, data, predict

ev = importlib.import_module("05_eval")

FILES = [".lock", "metrics.json", "predictions.jsonl", "quintuples.jsonl", "report.html"]

# -------------------------------------------------------------------------------- with a stand-in for vlm


class FakeRanks:
    """training.Ranks for threads of one process."""

    device = torch.device("cpu")

    def __init__(self, rank, values, meeting):
        self.rank = rank
        self.world = len(values)
        self.main = rank == 0
        self.values = values
        self.meeting = meeting

    def barrier(self):
        self.meeting.wait()

    def gather(self, value):
        self.values[self.rank] = value
        self.meeting.wait()
        return list(self.values)

    def together(self):
        return contextlib.nullcontext()


class FakeVlm(types.SimpleNamespace):
    """What lib.predict uses of vlm, lora, rollout, training and checks.

    Answers depend on the tweet's key alone; dies before tweet number `dies_at`.
    """

    DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
    DEFAULT_MODEL = "paper's"

    def __init__(self, ranks=(0,), dies_at=None, own="reason", room=1000):
        meeting = threading.Barrier(len(ranks), timeout=60)
        values = [None] * len(ranks)
        super().__init__(dies_at=dies_at, own=own, room=room, items=[], loaded=[], calls=[], proved=[])
        self.ranks = iter([FakeRanks(rank, values, meeting) for rank in ranks])

    def setup(self):
        return next(self.ranks)

    def load_processor(self, name, min_pixels, max_pixels):
        return f"processor {max_pixels}"

    def load(self, name, dtype, device, processor):
        assert dtype is torch.float32 and device.type == "cpu" and processor.startswith("processor")
        self.loaded.append(name)
        return name, processor

    def load_adapter(self, model, folder):
        self.loaded.append(str(folder))
        return model

    def read_config(self, name):
        if name == "gone":
            raise common.InputError("--model gone: not a model folder")

    def read_recipe(self, folder, prompt):
        return types.SimpleNamespace(prompt=self.own, min_pixels=None, max_pixels=784)

    def base_name(self, folder):
        return "base"

    def weights_digest(self, name):
        return {"base": "1", "tiny": "1"}.get(name, "2")

    def usable(self, examples, processor, args, ranks, server):
        return data.check_images(examples, args.skip_bad), ""

    def prove(self, model, processor, example, args, ranks):
        self.proved.append(example.id)

    def encode(self, model, processor, items):
        return items

    def sample_in_parts(
        self, model, processor, items, n, max_new_tokens, temperature, rows, keys, top_p, static
    ):
        settings = {"n": n, "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        self.calls.append({**settings, "rows": len(items) * n})
        if self.dies_at is not None and len(self.items) + len(items) > self.dies_at:
            raise KeyboardInterrupt
        self.items += items
        groups = []
        for key in keys:
            text = respond(common.format_answer([GOLD]), think=f"key {key}")
            groups.append([types.SimpleNamespace(text=text, completion_ids=[1, 2], finished=True)] * n)
        return groups, min(rows, self.room)


@pytest.fixture
def tweets(tmp_path):
    for size in (28, 280):
        Image.new("RGB", (size, size)).save(tmp_path / f"{size}.png")
    rows = [
        {
            "id": f"t{i}",
            "text": "word " * i + "{text}",
            "image": "280.png" if i == 3 else "28.png",
            "quintuples": [list(GOLD)],
        }
        for i in range(6)
    ]
    return write(tmp_path / "data.jsonl", rows)


def stand_in(monkeypatch, fake):
    for name in ("vlm", "rollout", "training", "lora", "checks"):
        monkeypatch.setattr(predict, name, fake)


def evaluate(monkeypatch, vlm, data, out, *more):
    stand_in(monkeypatch, vlm)
    start = [] if "--adapter" in more else ["--zero-shot"]
    command = ["--model", "tiny", "--data", str(data), "--out", str(out), "--batch-rows", "2", *start]
    ev.main(ev.parse_args([*command, *more]))
    return vlm


def test_predict_stores_then_scores(monkeypatch, tweets, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    out = tmp_path / "run"
    vlm = evaluate(
        monkeypatch, FakeVlm(), tweets, out, "--adapter", str(adapter), "--samples", "3", "--batch-rows", "7"
    )
    assert vlm.loaded == ["tiny", str(adapter)]
    assert vlm.calls[0] == {
        "n": 3,
        "max_new_tokens": 2048,
        "temperature": 0.8,
        "top_p": 1.0,
        "rows": 6,
    }  # the paper's
    order = [prompt.split("Tweet: ")[1].split("{text}")[0].count("word") for prompt, _ in vlm.items]
    assert order == [3, 5, 4, 2, 1, 0]  # longest first, the image included; a brace in a tweet is text
    assert "<think>" in vlm.items[0][0] and Path(vlm.items[0][1]).name == "280.png"
    rows = [row for _, row in data.read_jsonl(out / "predictions.jsonl")]
    assert [row["id"] for row in rows] == [f"t{i}" for i in range(6)] and len(
        rows[0]["responses"]
    ) == 3  # in the order of the data
    assert (
        rows[0]["image"] == "../28.png"
        and rows[0]["prompt"] == "reason"
        and rows[0]["quintuples"] == [list(GOLD)]
    )
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert json.loads((out / "metrics.json").read_text())["scores"]["jmere"]["f1"] == 1.0
    assert vlm.proved == ["t0"]  # the packed pass, once, on a real tweet
    capsys.readouterr()
    # same folder, other weights: not the old predictions
    (adapter / "adapter_model.safetensors").write_bytes(b"trained on")
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, FakeVlm(), tweets, out, "--adapter", str(adapter), "--samples", "3")
    assert "adapter" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, own, expected",
    [
        ([], "reason", "direct"),  # zero-shot
        (["--prompt", "reason"], "direct", "reason"),
        (["--adapter", "."], "direct", "direct"),
        (["--adapter", "."], "reason", "reason"),
        (["--adapter", ".", "--prompt", "direct"], "reason", "direct"),
    ],
)
def test_prompt_follows_the_adapter(monkeypatch, tweets, tmp_path, more, own, expected):
    vlm = evaluate(monkeypatch, FakeVlm(own=own), tweets, tmp_path / "run", *more)
    assert {"<think>" in prompt for prompt, _ in vlm.items} == {expected == "reason"}
    assert next(data.read_jsonl(tmp_path / "run" / "predictions.jsonl"))[1]["prompt"] == expected


def test_a_killed_run_goes_on_and_ends_the_same(monkeypatch, tweets, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    evaluate(monkeypatch, FakeVlm(), tweets, whole)
    with pytest.raises(KeyboardInterrupt):
        evaluate(monkeypatch, FakeVlm(dies_at=4), tweets, broken)
    part = broken / "predictions.rank0.jsonl"
    torn = part.read_bytes()
    assert torn.count(b"\n") == 4
    part.write_bytes(torn[:-20])  # the last line was being written
    vlm = evaluate(monkeypatch, FakeVlm(), tweets, broken)
    assert len(vlm.items) == 3  # two never asked and the torn one
    assert (broken / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()
    vlm = evaluate(monkeypatch, FakeVlm(), tweets, broken)
    assert vlm.items == vlm.loaded == []  # all stored: no model is loaded
    assert len(evaluate(monkeypatch, FakeVlm(), tweets, broken, "--fresh").items) == 6


def test_ranks_share_the_work_and_rank_0_merges(monkeypatch, tweets, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    evaluate(monkeypatch, FakeVlm(), tweets, one)
    vlm = FakeVlm(ranks=(1, 0))
    with ThreadPoolExecutor(2) as pool:  # one thread a rank, with a real barrier
        stand_in(monkeypatch, vlm)
        args = [
            "--zero-shot",
            "--model",
            "tiny",
            "--data",
            str(tweets),
            "--out",
            str(two),
            "--batch-rows",
            "2",
        ]
        assert [done.result() for done in [pool.submit(ev.main, ev.parse_args(args)) for _ in (0, 1)]] == [
            None,
            None,
        ]
    assert len(vlm.items) == len(set(vlm.items)) == 6 and sorted(c["rows"] for c in vlm.calls) == [1, 1, 2, 2]
    assert sorted(path.name for path in two.iterdir()) == FILES
    assert (two / "predictions.jsonl").read_bytes() == (one / "predictions.jsonl").read_bytes()


def test_limit_keeps_what_is_stored(monkeypatch, tweets, tmp_path, capsys):
    out = tmp_path / "run"
    assert len(evaluate(monkeypatch, FakeVlm(), tweets, out, "--limit", "2").items) == 2
    assert len(evaluate(monkeypatch, FakeVlm(), tweets, out).items) == 4
    before = (out / "predictions.jsonl").read_bytes()
    evaluate(monkeypatch, FakeVlm(), tweets, out, "--limit", "2")
    assert (
        out / "predictions.jsonl"
    ).read_bytes() == before and "2 tweets, 2 stored already" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        (["--samples", "2"], "samples 1 (now 2)"),
        (["--temperature", "0"], "temperature 0.8 (now 0.0)"),
        (["--prompt", "reason"], "prompt"),
    ],
)
def test_other_settings_on_the_same_out_are_refused(monkeypatch, tweets, tmp_path, capsys, change, message):
    evaluate(monkeypatch, FakeVlm(), tweets, tmp_path / "run")
    with pytest.raises(SystemExit) as stopped:
        evaluate(monkeypatch, FakeVlm(), tweets, tmp_path / "run", *change)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and "--fresh" in error


def test_other_data_on_the_same_out_is_refused(monkeypatch, tweets, tmp_path, capsys):
    evaluate(monkeypatch, FakeVlm(), tweets, tmp_path / "run")
    rows = [{**row, "text": row["text"] + "!"} for _, row in data.read_jsonl(tweets)]
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, FakeVlm(), write(tmp_path / "other.jsonl", rows), tmp_path / "run")
    assert "is not this tweet of --data" in capsys.readouterr().err


def test_tweets_without_gold_are_predicted_and_not_scored(monkeypatch, tweets, tmp_path, capsys):
    rows = [{name: row[name] for name in ("id", "text", "image")} for _, row in data.read_jsonl(tweets)]
    evaluate(monkeypatch, FakeVlm(), write(tmp_path / "plain.jsonl", rows), tmp_path / "run")
    assert "6 quintuples predicted; no gold, so no score" in capsys.readouterr().out
    answer = next(data.read_jsonl(tmp_path / "run" / "quintuples.jsonl"))[1]
    assert answer == {"id": "t0", "quintuples": [list(GOLD)], "made_by": "05_eval.py"}
    assert "scores" not in json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (
        ev.main(
            ev.parse_args(
                ["--predictions", str(tmp_path / "run" / "predictions.jsonl"), "--data", str(tweets)]
            )
        )
        is None
    )  # gold later
    assert "100.00" in capsys.readouterr().out


def test_a_bad_image_is_found_before_the_model_is_loaded(monkeypatch, tweets, tmp_path, capsys):
    (tmp_path / "280.png").write_bytes(b"no image")
    vlm = FakeVlm()
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, vlm, tweets, tmp_path / "run")
    assert "t3" in capsys.readouterr().err and vlm.loaded == []
    vlm = evaluate(monkeypatch, FakeVlm(), tweets, tmp_path / "run", "--skip-bad")
    assert len(vlm.items) == 5
    assert "1 without a prediction (counted as empty)" in capsys.readouterr().out  # not left out of the score


def test_a_run_without_its_bad_images_is_done(monkeypatch, tweets, tmp_path, capsys):
    """Once more, it has nothing to do: the tweet that no model can take is no fault of --skip-bad."""
    (tmp_path / "280.png").write_bytes(b"no image")
    evaluate(monkeypatch, FakeVlm(), tweets, tmp_path / "run", "--skip-bad")
    vlm = evaluate(monkeypatch, FakeVlm(), tweets, tmp_path / "run", "--skip-bad")
    assert vlm.items == [] and "6 tweets, 5 stored already" in capsys.readouterr().out


def test_rows_that_did_not_fit_are_not_tried_again(monkeypatch, tweets, tmp_path):
    """rollout.sample_in_parts tells how many responses had room: later batches are so small at once."""
    vlm = evaluate(monkeypatch, FakeVlm(room=1), tweets, tmp_path / "run", "--batch-rows", "4")
    assert [call["rows"] for call in vlm.calls] == [4, 1, 1]


def test_a_second_run_on_the_same_out_is_refused(monkeypatch, tweets, tmp_path, capsys):
    with ask.AppendFile(tmp_path / "run" / ".lock"), pytest.raises(SystemExit) as stopped:
        evaluate(monkeypatch, FakeVlm(), tweets, tmp_path / "run", "--fresh")
    assert stopped.value.code == 2 and "another process writes to it" in capsys.readouterr().err


def test_a_model_that_the_adapter_was_not_trained_on_is_refused(monkeypatch, tweets, tmp_path, capsys):
    stand_in(monkeypatch, FakeVlm())
    command = ["--data", str(tweets), "--out", str(tmp_path / "run"), "--adapter", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        ev.main(ev.parse_args([*command, "--model", "another"]))
    assert stopped.value.code == 2 and "other weights than base" in capsys.readouterr().err
    vlm = FakeVlm()
    stand_in(monkeypatch, vlm)
    ev.main(ev.parse_args(command))
    assert vlm.loaded == ["base", str(tmp_path)]  # from adapter_config.json


# -------------------------------------------------------------------------------- other images


@pytest.fixture
def pictures(tmp_path):
    """Six tweets of three images of other sizes and colours."""
    rows = []
    for number in range(6):
        name = f"{number // 2}.png"
        Image.new("RGB", (28 + number // 2, 28), (100 * (number // 2), 0, 0)).save(tmp_path / name)
        rows.append({"id": f"t{number}", "text": f"word {number}", "image": name, "quintuples": [list(GOLD)]})
    return write(tmp_path / "data.jsonl", rows)


def test_shuffled_images_are_never_ones_own(pictures):
    examples = data.load_examples(pictures)
    for seed in range(20):
        shown = controls.with_images(examples, "shuffled", seed, None)
        assert all(a.image != b.image for a, b in zip(examples, shown, strict=True))
        assert {e.image for e in shown} == {e.image for e in examples}  # each image once more
        assert [shown[i].image == shown[i + 1].image for i in (0, 2, 4)] == [
            True
        ] * 3  # rows of one image stay so
        again = controls.with_images(examples, "shuffled", seed, None)
        assert again == shown and controls.with_images(examples, "own", seed, None) == examples
    with pytest.raises(common.InputError, match="all tweets have the same image"):
        controls.with_images(examples[:2], "shuffled", 0, None)


def test_blank_images_are_grey_and_as_large(pictures, tmp_path):
    examples = data.load_examples(pictures)
    folder = tmp_path / "grey"
    folder.mkdir()
    for example, shown in zip(examples, controls.with_images(examples, "blank", 0, folder), strict=True):
        image = data.load_image(shown.image)
        assert image.size == data.load_image(example.image).size and image.getcolors() == [
            (28 * image.width, controls.GREY)
        ]


@pytest.mark.parametrize("mode", ["blank", "shuffled"])
def test_another_picture_is_shown_and_ones_own_is_stored(monkeypatch, pictures, tmp_path, capsys, mode):
    own = evaluate(monkeypatch, FakeVlm(), pictures, tmp_path / "own")
    other = evaluate(monkeypatch, FakeVlm(), pictures, tmp_path / mode, "--image", mode)
    assert {Path(image).name for _, image in own.items} == {"0.png", "1.png", "2.png"}
    assert not {(text, Path(image).name) for text, image in own.items} & {
        (text, Path(image).name) for text, image in other.items
    }
    rows = [row for _, row in data.read_jsonl(tmp_path / mode / "predictions.jsonl")]
    assert [row["image"] for row in rows] == [f"../{i // 2}.png" for i in range(6)]
    assert {row["settings"]["image"] for row in rows} == {mode}
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, FakeVlm(), pictures, tmp_path / mode)
    assert f"image '{mode}' (now 'own')" in capsys.readouterr().err
    ev.main(ev.parse_args(["--compare", f"own={tmp_path / 'own'}", f"other={tmp_path / mode}"]))
    shown = capsys.readouterr().out
    assert f"note: other images: the runs saw {mode} and own images" in shown or f"own and {mode}" in shown
    assert "member of" in shown  # by relation


def test_no_relation_is_predicted_on_like_any_other_data(monkeypatch, tmp_path, capsys):
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    end = {"name": "a", "pos": [0, 1]}
    lines = []
    for text, relation in (("a b", "None"), ("a b", "None"), ("c d", "/per/org/member_of"), ("c d", "None")):
        lines.append(
            repr({"token": text.split(), "h": end, "t": end, "img_id": "a.png", "relation": relation})
        )
    (tmp_path / "mnre.txt").write_text("\n".join(lines))
    vlm = evaluate(monkeypatch, FakeVlm(), tmp_path / "mnre.txt", tmp_path / "run", "--subset", "no-relation")
    assert len(vlm.items) == 1 and "a b" in vlm.items[0][0]
    assert (
        "invented: something is predicted on 1 of 1 tweets without gold (100.0 %)" in capsys.readouterr().out
    )
    ev.main(ev.parse_args(["--predictions", str(tmp_path / "run")]))  # the empty gold is stored
    assert "on 1 of 1 tweets without gold" in capsys.readouterr().out


# -------------------------------------------------------------------------------- real tiny models


def texts(out):
    rows = [row for _, row in data.read_jsonl(out / "predictions.jsonl")]
    return {row["id"]: [response["text"] for response in row["responses"]] for row in rows}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_real_model_predicts_the_same_on_any_number_of_ranks(tiny, world, tmp_path, architecture):
    from lib import lora, vlm

    base = tiny(architecture)
    model, processor = vlm.load(base)
    torch.manual_seed(1)
    model = lora.add_lora(model, 4, 8)
    lora.save_adapter(model, processor, tmp_path / "adapter", lora.Recipe("direct"), "")
    # --model is the adapter's own: its folder's adapter_config.json names it
    command = ["05_eval.py", "--adapter", tmp_path / "adapter", "--data", world / "test.jsonl"]
    command += ["--samples", 3, "--max-new-tokens", 12]
    _, one, _ = run_script(*command, "--out", tmp_path / "one", "--batch-rows", 3)
    assert (
        "4 tweets, 0 stored already, 3 responses each, direct prompt, fp32" in one and "12 responses" in one
    )
    run_script(*command, "--out", tmp_path / "two", "--batch-rows", 6, ranks=2)
    assert texts(tmp_path / "one") == texts(tmp_path / "two")
    distinct = {text for answers in texts(tmp_path / "one").values() for text in answers}
    assert len(distinct) > 8  # sampled, not one text for all
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == FILES
    _, again, _ = run_script(*command, "--out", tmp_path / "two")
    assert "4 tweets, 4 stored already" in again
    made_by = json.loads((tmp_path / "two" / "metrics.json").read_text())["provenance"]["made_by"]
    assert made_by["model"] == str(base) and made_by["settings"]["weights"] == vlm.weights_digest(base)
    copied = shutil.copytree(base, tmp_path / "copy")  # the same weights elsewhere are the same model
    _, other, _ = run_script(*command, "--out", tmp_path / "two", "--model", copied)
    assert "4 tweets, 4 stored already" in other
    another = tiny(next(name for name in ARCHITECTURES if name != architecture))
    code, _, error = run_script(*command, "--out", tmp_path / "three", "--model", another, fails=True)
    assert code == 2 and "other weights than" in error


def test_merged_llava_has_the_names_of_the_hub(tiny, tmp_path):
    """In shards with their index, too; and it still is the same model."""
    from lib import merge, vlm

    model, _ = vlm.load(tiny("llava"))
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    merge.published_layout(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    held = {}
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, "pt") as stored:
            held |= dict.fromkeys(stored.keys(), path.name)
    assert held == index
    vision = [key for key in held if "vision_tower" in key]
    assert vision and all("vision_tower.vision_model." in key for key in vision)
    again = type(model).from_pretrained(tmp_path, dtype=model.dtype).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_a_bare_command_runs(tiny, world, tmp_path):
    """The conventional layout (SPEC §10): the adapter of 04, the release, the pictures."""
    from lib import lora, vlm

    model, processor = vlm.load(tiny("llava"))
    model = lora.add_lora(model, 4, 8)
    (tmp_path / "runs" / "grpo").mkdir(parents=True)
    lora.save_adapter(model, processor, tmp_path / "runs/grpo/best", lora.Recipe("reason"), "")
    rows = [row for _, row in data.read_jsonl(world / "test.jsonl")]
    (tmp_path / "data").mkdir()
    write(tmp_path / "data/test.json", [{**row, "image": Path(row["image"]).name} for row in rows])
    shutil.copytree(world / "img", tmp_path / "data/img")
    done = run("--max-new-tokens", 4, cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and "4 tweets, 0 stored already, 1 responses each, reason" in done.stdout, (
        done.stderr
    )
    assert sorted(path.name for path in (tmp_path / "runs/test").iterdir()) == FILES
