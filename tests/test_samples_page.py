"""samples.html of 04: what it says, how large it grows, what it survives."""

import html
import json
import random
import re
from pathlib import Path

import pytest
from PIL import Image

import common
from lib import data, samples_page

GOLD = (common.quintuple("Ann", "per", "Acme", "org", "member of"),)
RIGHT = "<think>\nshe <b>works</b> there\n</think>\n<answer>\n[Ann, per, Acme, org, member of]\n</answer>"


def row(step, name, response, advantage, **parts):
    scores = {"reward": 1.5, "accuracy": 1.0, "partial": 2.0, "format": 1.0} | parts
    start = {"step": step, "id": name, "response": response, "finished": True}
    return start | scores | {"advantage": advantage}


def tweet(folder, name, text="Ann of Acme"):
    path = folder / f"{name}.png"
    Image.radial_gradient("L").convert("RGB").save(path)
    return data.Example(name, text, str(path), GOLD, {})


def written(folder, rows, examples, prompt="reason"):
    (folder / "samples.jsonl").write_text("".join(map(data.jsonl_line, rows)), encoding="utf-8")
    samples_page.write(folder, examples, prompt)
    return (folder / "samples.html").read_text(encoding="utf-8")


def words(page):
    """What is read on a page, tags left out."""
    body = re.search("<main>(.*)</main>", page, re.S)[1]
    return html.unescape(" ".join(re.sub("<[^>]*>", " ", body).split()))


def test_a_group_beside_its_image(tmp_path):
    wrong = RIGHT.replace("member of", "peer")
    rows = [
        row(3, "old", RIGHT, 0.0),
        row(7, "a", wrong, -0.7, reward=0.3, novel=0.25),
        row(7, "a", "no tags", -0.9, reward=0) | {"finished": False},
        row(7, "a", RIGHT * 3, 1.25),
        row(7, "b", "<think>\nx\n</think>\n<answer>\n[]\n</answer>", 0.0),
    ]
    examples = [tweet(tmp_path, name, f"tweet {name} <script>") for name in ("a", "b", "old", "other")]
    page = written(tmp_path, rows, examples)
    text = words(page)
    assert page.count("data:image/webp;base64,") == 3 and "://" not in page
    assert "<script>" not in re.search("<main>(.*)</main>", page, re.S)[1] and "tweet a <script>" in text
    assert text.index("Step 7") < text.index("tweet a") < text.index("tweet b") < text.index("Step 3")
    best, second, last = (text.index(f"advantage {value}") for value in ("+1.25", "-0.70", "-0.90"))
    assert best < second < last < text.index("tweet b")
    assert "reward 0.3 accuracy 1 partial 2 format 1 novel 0.25" in text  # by whatever names 04 gave them
    assert "cut off" in text[last:] and "cut off" not in text[:last]
    assert "gold Ann per — member of → Acme org" in text and "correct Ann per" in text[best:second]
    assert "relation Ann per — peer → Acme org" in text[second:last]
    assert "nothing predicted · 1 of 1 missing" in text[text.index("tweet b") :]
    assert page.count("<details>") == 1 and "she <b>works</b> there" in text  # the long one is folded


def test_answers_without_thoughts(tmp_path):
    page = written(tmp_path, [row(1, "a", "[Ann, per, Acme, org, member of]", 0.5)], [tweet(tmp_path, "a")])
    assert "correct Ann" not in words(page)  # the reason prompt asks for tags
    rows = [row(1, "a", "[Ann, per, Acme, org, member of]", 0.5)]
    assert "correct Ann" in words(written(tmp_path, rows, [tweet(tmp_path, "a")], "direct"))


def test_the_latest_whole_groups_below_a_size(tmp_path):
    examples = [tweet(tmp_path, f"t{number}") for number in range(60)]
    noise = random.Random(0)
    for example in examples:
        Image.frombytes("RGB", (640, 640), noise.randbytes(640 * 640 * 3)).save(example.image)
    rows = []
    for step in range(1, 31):
        for number in (2 * step - 2, 2 * step - 1):
            rows += [row(step, f"t{number}", RIGHT, 0.0) for _ in range(7)]
    page = written(tmp_path, rows, examples)
    shown = re.findall(r'<article.*?mono"><bdi>(\w+)', page, re.S)
    assert len(shown) == 28 and shown[:2] == ["t58", "t59"]  # 196 of 200 responses: the next group is cut
    assert len(page) < 5_000_000
    long = [changed | {"response": "é" * 100_000} for changed in rows]
    page = written(tmp_path, long, examples)
    assert 1_000_000 < len(page.encode()) < 5_000_000 and "Step 30" in page and "Step 20" not in page


def test_a_vanished_image_is_one_line(tmp_path, capsys):
    examples = [tweet(tmp_path, "a"), tweet(tmp_path, "b")]
    Path(examples[1].image).unlink()
    page = written(tmp_path, [row(1, "a", RIGHT, 0.0), row(1, "b", RIGHT, 0.0)], examples)
    assert page.count("data:image") == 1 and "no image here" in page
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line == f"!! samples.html lacks 1 of 2 images: {examples[1].image} cannot be read"


@pytest.mark.parametrize("fault", ["junk", "no log", "a folder in the way"])
def test_a_page_that_cannot_be_written_is_one_line(tmp_path, capsys, fault):
    log = tmp_path / "samples.jsonl"
    log.write_text("<<<<<<< HEAD\n" if fault == "junk" else json.dumps(row(1, "a", RIGHT, 0.0)) + "\n")
    if fault == "no log":
        log.unlink()
    if fault == "a folder in the way":
        (tmp_path / "samples.html").mkdir()
    samples_page.write(tmp_path, [tweet(tmp_path, "a")], "reason")
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("!! samples.html is not written, training goes on: ")
