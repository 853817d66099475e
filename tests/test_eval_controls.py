"""05's controls and --check-data: tweets without a relation, pairs that images decide, what files hold."""

import json
import shutil
from types import SimpleNamespace

import pytest
from conftest import DATA, needs_data
from eval_cases import A, run, write
from PIL import Image

import common
from lib import check_data, controls, data


def line(text, head, tail, image, relation):
    ends = {"h": {"name": head, "pos": [0, 1]}, "t": {"name": tail, "pos": [1, 2]}}
    return repr({"token": text.split(), **ends, "img_id": image, "relation": relation})


@pytest.fixture
def mnre(tmp_path):
    """Two pairs of the same text, of one the image decides; a tweet without and one with a relation."""
    typed = "/per/org/member_of"
    lines = [
        line("a b", "a", "b", "1.jpg", typed),
        line("a b", "a", "b", "2.jpg", "None"),
        line("c d", "c", "d", "3.jpg", typed),
        line("c d", "c", "d", "4.jpg", "/per/org/peer"),
        line("e f g", "e", "f", "5.jpg", "None"),
        line("e f g", "f", "g", "5.jpg", "None"),
        line("h i j", "h", "i", "6.jpg", "None"),
        line("h i j", "i", "j", "6.jpg", typed),
    ]
    (tmp_path / "mnre.txt").write_text("\n".join(lines))
    return tmp_path / "mnre.txt"


def subset(path, name):
    args = SimpleNamespace(data=path, image_dir=None, subset=name)
    return {x.id: [tuple(q)[::4] for q in x.quintuples] for x in controls.load_tweets(args).values()}


def test_subsets_by_hand(mnre):
    assert subset(mnre, "no-relation") == {"2": [], "5": []}
    assert subset(mnre, "image-decides") == {"1": [("a", "member of")], "2": []}


def test_a_subset_needs_mnre(tmp_path):
    rows = [{"id": "a", "text": "t", "image": "a.png", "quintuples": []}]
    with pytest.raises(
        common.InputError, match="rows.jsonl:1: not an MNRE line .*--subset reads MNRE's text"
    ):
        subset(write(tmp_path / "rows.jsonl", rows), "no-relation")


@needs_data
def test_subsets_of_the_real_text(tmp_path):
    """914 test tweets, of which 460 have a relation; 29 pairs over all splits, and in the test split alone
    none."""
    assert len(subset(DATA / "mnre" / "mnre_test.txt", "no-relation")) == 454
    files = [DATA / "mnre" / f"mnre_{split}.txt" for split in ("train", "val", "test")]
    (tmp_path / "all.txt").write_text("".join(path.read_text().rstrip("\n") + "\n" for path in files))
    pairs = subset(tmp_path / "all.txt", "image-decides")
    assert len(pairs) == 2 * 29 and sum(bool(gold) for gold in pairs.values()) == 29
    with pytest.raises(common.InputError, match="holds none of the --subset image-decides"):
        subset(files[2], "image-decides")


def test_what_is_counted(mnre):
    args = SimpleNamespace(data=mnre, image_dir=None, subset="image-decides")
    pair = list(controls.load_tweets(args).values())
    for preds, told_apart, invented in (
        ([[A], []], 1, 0),
        ([[A], [A]], 0, 1),  # what a reader of the text alone does
        ([[], []], 0, 0),
        ([[], [A]], 0, 1),
    ):
        assert controls.controls(pair, preds) == {
            "invented": {"tweets": 1, "with_prediction": invented},
            "pairs": {"pairs": 1, "told_apart": told_apart},
        }
    other = [data.Example("a", "x", "1.png", (A,)), data.Example("b", "y", "2.png", (A,))]
    assert controls.controls(other, [[], []]) == {}


def test_controls_are_printed(mnre, tmp_path):
    rows = [{"id": "1", "quintuples": [list(A)]}, {"id": "2", "quintuples": [list(A)]}]
    predicted = write(tmp_path / "p.jsonl", rows)
    done = run("--predictions", predicted, "--data", mnre, "--subset", "image-decides")
    assert done.returncode == 0, done.stderr
    assert "invented: something is predicted on 1 of 1 tweets without gold (100.0 %)" in done.stdout
    assert "decided by the image: 0 of 1 pairs of the same text told apart" in done.stdout


# -------------------------------------------------------------------------------- --check-data


@pytest.fixture
def splits(tmp_path):
    """Two files with every fault that --check-data names."""
    (tmp_path / "img").mkdir()
    for name, colour in (("1.png", "red"), ("2.png", "red"), ("3.png", "blue")):
        Image.new("RGB", (30, 20), colour).save(tmp_path / "img" / name)
    (tmp_path / "img" / "torn.png").write_bytes(b"\x89PNG")

    def row(name, text, image, quintuple=A):
        return {"id": name, "text": text, "image": image, "quintuples": [list(quintuple)]}

    train = [
        row("a", "one tweet", "1.png"),
        row("b", "one tweet", "1.png", A._replace(relation="peer")),  # cut
        row("c", "RT @x : another https://t.co/1", "2.png"),  # its image is 1.png under another name
        row("d", "a third", "3.png"),
        row("e", "a fourth", "3.png"),  # of two texts
        row("f", "a fifth", "torn.png"),
        {**row("g", "x", "1.png"), "text": 5},
    ]
    test = [row("x", "RT @y : another", "3.png"), row("y", "one tweet", "2.png")]
    return write(tmp_path / "train.jsonl", train), write(tmp_path / "test.jsonl", test), tmp_path / "img"


def test_check_data_by_hand(splits):
    train, test, img = splits
    done = run("--check-data", train, test, "--image-dir", img)
    assert done.returncode == 1
    for part in (
        "6 tweets, 0 without gold; 6 quintuples, 1 to 1 a tweet",
        "relations: member of 5, peer 1",
        "cut: 1 tweets stand in 2 rows with other gold; ceiling F1 85.71; joined (--merge-repeats) 5 tweets",
        "rows that are wrong: 1\n",
        "train.jsonl:7: 'text' is of type int",
        "images: 4; of several texts: 1 (3.png); of the same content under several names: 1 (1.png = 2.png)",
        "images that cannot be used: 1\n    f:",
        "longest prompts, in characters: ",
        "share 1 texts (y), 2 without links and mentions (x, y), 2 images (x, y)",
    ):
        assert part in done.stdout, (part, done.stdout)


def test_check_data_of_good_files_and_of_absent_images(splits, tmp_path):
    _, test, img = splits
    assert run("--check-data", test, "--image-dir", img).returncode == 0
    shutil.rmtree(img)
    done = run("--check-data", test, "--image-dir", img)
    assert done.returncode == 1 and f"no image can be used: where are they? --image-dir {img}" in done.stdout


def test_check_data_counts_tokens_of_a_model(splits, tiny):
    from lib import vlm

    _, test, img = splits
    done = run("--check-data", test, "--image-dir", img, "--model", tiny("llava"))
    assert done.returncode == 0, done.stderr
    examples = {x.id: x for x in data.load_examples(test, img)}
    processor = vlm.load_processor(str(tiny("llava")))
    for example in examples.values():
        inputs = vlm.processor_inputs(
            processor, common.REASON_PROMPT.format(text=example.text), example.image
        )
        assert f"{inputs['input_ids'].shape[1]} ({example.id})" in done.stdout


@needs_data
def test_known_releases_are_known():
    for split in ("train", "val", "test"):
        path = DATA / "jmere" / f"{split}.json"
        lines = check_data.describe(path, data.load_examples(path))
        assert f"JMERE V1, {split} (EEGA)" in lines[0]
        path = DATA / "mnre" / f"mnre_{split}.txt"
        assert f"MNRE text, {split}" in check_data.describe(path, data.load_examples(path))[0]


@needs_data
def test_check_data_of_the_release():
    done = run("--check-data", *(DATA / "jmere" / f"{split}.json" for split in ("val", "test")))
    assert "475 tweets, 0 without gold; 640 quintuples, 1 to 21 a tweet" in done.stdout
    assert (
        "cut: 15 tweets stand in 30 rows with other gold; ceiling F1 97.12; joined (--merge-repeats) 460"
        in done.stdout
    )
    assert json.dumps(done.stdout).count("share 0 texts") == 1
