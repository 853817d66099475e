"""lib/data.py and lib/formats.py: the three formats and their near forms, ids by content, repeats, bad
rows, images."""

import json
import random

import pytest
from conftest import DATA, needs_data
from PIL import Image

from common import InputError
from lib import data

SPLITS = [("train", 3618, 4503), ("val", 496, 624), ("test", 475, 640)]


def by_id(examples):
    return {example.id: (example.text, example.image, example.quintuples) for example in examples}


def shuffled(path, rows, seed=1):
    """The rows of a JMERE file in another order, as a file."""
    rows = list(rows)
    random.Random(seed).shuffle(rows)
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


# -------------------------------------------------------------------------------- the real annotations


@needs_data
@pytest.mark.parametrize(("split", "examples", "quintuples"), SPLITS)
def test_both_releases_give_the_papers_split(split, examples, quintuples):
    jmere = data.load_examples(DATA / "jmere" / f"{split}.json", image_dir="img")
    mnre = data.load_examples(DATA / "mnre" / f"mnre_{split}.txt", image_dir="img")
    assert len(jmere) == examples and sum(len(x.quintuples) for x in jmere) == quintuples
    assert [x.id for x in jmere] == [x.id for x in mnre] and by_id(jmere) == by_id(mnre)
    assert len({x.id for x in jmere}) == examples
    rows = json.loads((DATA / "jmere" / f"{split}.json").read_text())
    assert [x.text for x in jmere] == [" ".join(row["token"]) for row in rows]


@needs_data
@pytest.mark.parametrize(("split", "joined"), [("train", 3468), ("val", 473), ("test", 460)])
def test_ids_and_repeats_do_not_depend_on_the_order(tmp_path, split, joined):
    path = DATA / "jmere" / f"{split}.json"
    other = shuffled(tmp_path / "shuffled.json", json.loads(path.read_text()))
    rows = data.load_examples(path, image_dir="img")
    assert by_id(rows) == by_id(data.load_examples(other, image_dir="img"))
    merged = data.load_examples(path, image_dir="img", merge_repeats=True)
    again = data.load_examples(other, image_dir="img", merge_repeats=True)
    assert by_id(merged) == by_id(again) and len(merged) == joined == len({(x.text, x.image) for x in rows})
    gold = {(x.text, x.image, q) for x in rows for q in x.quintuples}
    assert {(x.text, x.image, q) for x in merged for q in x.quintuples} == gold
    assert sum(len(x.quintuples) for x in merged) == len(gold)


# -------------------------------------------------------------------------------- MNRE


def mnre(text, relation):
    end = {"name": text.split()[0], "pos": [0, 1]}
    return repr({"token": text.split(), "h": end, "t": end, "img_id": "i.jpg", "relation": relation})


def test_mnre_rule_by_hand(tmp_path):
    typed, untyped = "/per/org/member_of", "None"
    lines = [mnre("a b", relation) for relation in (untyped, typed, typed, untyped, typed)]
    lines += [mnre("c d", typed), mnre("c d", untyped), mnre("e f", untyped)]
    (tmp_path / "m.txt").write_text("\n".join(lines) + "\n")
    examples = data.load_examples(tmp_path / "m.txt")
    # one image serves all three: numbered by their content, the single quintuple before the two
    found = [(x.id, x.text, len(x.quintuples)) for x in examples]
    assert found == [("i-2", "a b", 2), ("i", "a b", 1), ("i-3", "c d", 1)]
    merged = data.load_examples(tmp_path / "m.txt", merge_repeats=True)
    assert [(x.id, len(x.quintuples)) for x in merged] == [("i", 1), ("i-2", 1)]  # repeats of one quintuple


def test_a_number_never_meets_the_name_of_another_image(tmp_path):
    rows = [
        jmere(token=[word], img_id=image)
        for word, image in (("a", "x.jpg"), ("b", "x.jpg"), ("c", "x-2.jpg"))
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert [x.id for x in data.load_examples(tmp_path / "rows.json")] == ["x", "x-3", "x-2"]


# -------------------------------------------------------------------------------- forms near to the formats

ROW = {"id": "a", "text": "t", "image": "a.png", "quintuples": [["A", "per", "B", "org", "member_of"]]}
LABEL = {
    "beg_ent": {"name": "A", "pos": [0, 1], "tags": "per"},
    "sec_ent": {"name": "B", "pos": [1, 2], "tags": "org"},
    "relation": "member_of",
}


def jmere(**changes):
    return {"token": ["A", "B"], "img_id": "a.png", "label_list": [[LABEL]], **changes}


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([jmere()]),
        json.dumps([jmere()], indent=2),
        json.dumps(jmere()) + "\n",  # JMERE as JSON lines
        "\ufeff" + json.dumps([jmere()]),
        json.dumps([jmere(label_list=[LABEL])]),  # not in groups
        json.dumps([{**ROW, "text": "A B"}]),  # our rows in one list
        json.dumps({**ROW, "text": "A B"}) + "\n",
        repr(jmere()) + "\n",  # a Python literal
    ],
)
def test_near_forms_are_read(tmp_path, content):
    (tmp_path / "rows").write_text(content, encoding="utf-8")
    [example] = data.load_examples(tmp_path / "rows")
    assert (example.id, example.text, len(example.quintuples)) == ("a", "A B", 1)
    assert example.quintuples[0].relation == "member of"


def test_without_labels_there_is_no_gold(tmp_path):
    row = jmere()
    del row["label_list"]
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    assert data.load_examples(tmp_path / "rows.json")[0].quintuples is None
    with pytest.raises(InputError, match="item 1: missing 'quintuples'"):
        data.load_examples(tmp_path / "rows.json", need=("quintuples",))


# -------------------------------------------------------------------------------- rows that are wrong


@pytest.mark.parametrize(
    ("content", "need", "message"),
    [
        (f"{json.dumps(ROW)}\n{{broken", (), "rows:2: not JSON"),
        (f"{json.dumps(ROW)}\n{json.dumps(ROW)}", (), "rows:2: id a stands already at"),
        (json.dumps(ROW), ("cot",), "rows:1: missing 'cot' (made by 01_distill.py)"),
        (json.dumps({**ROW, "quintuples": None}), ("quintuples",), "rows:1: missing 'quintuples'"),
        (json.dumps({**ROW, "image": ""}), (), "rows:1: missing 'image'"),
        (json.dumps({**ROW, "text": 3}), (), "rows:1: 'text' is of type int, expected a string"),
        (json.dumps({**ROW, "id": 3}), (), "rows:1: 'id' is of type int, expected a string"),
        (json.dumps({**ROW, "image": ["a"]}), (), "rows:1: 'image' is of type list, expected a string"),
        (json.dumps({**ROW, "quintuples": [["A", "per", "B"]]}), (), "expected 5 non-empty strings"),
        (json.dumps({**ROW, "quintuples": "A"}), (), "'quintuples' is of type str"),
        (json.dumps({**ROW, "quintuples": [["A", "x", "B", "org", "peer"]]}), (), "unknown label 'x'"),
        ("1", (), "rows:1: found a JSON int"),
        (json.dumps({**ROW, "text": "\ud83d"}), (), "rows:1: holds half a character"),
        ("{'token': ['a'], 'relation': 'None'", (), "rows:1: not an MNRE line"),
        ("{'token': ['a'], 'relation': 'None'}", (), "rows:1: not an MNRE line with token, h, t, img_id"),
        (json.dumps([jmere(token="A B")]), (), "item 1: 'token' is of type str, expected list"),
        (json.dumps([jmere(token=["A", 3])]), (), "item 1: 'token' holds what is no string"),
        (json.dumps([jmere(img_id=7)]), (), "item 1: 'img_id' is of type int, expected str"),
        (json.dumps([jmere(), {"token": ["a"]}]), (), "item 2: 'img_id' is of type NoneType"),
        (json.dumps([jmere(label_list=[[{"relation": "peer"}]])]), (), "item 1: not a JMERE row"),
        (mnre("a b", "/per/org/peer").replace("'i.jpg'", "5"), (), "rows:1: 'img_id' is of type int"),
        (mnre("a b", "/per/org/peer").replace("['a', 'b']", "'a b'"), (), "rows:1: 'token' is of type str"),
        ("[broken", (), "begins like a JSON list but is not JSON"),
        (json.dumps({"sentence": "t", "picture": "a.png"}), (), "keys sentence, picture, expected id, text"),
        ("\n", (), "empty file"),
        ("[]", (), "empty file"),
    ],
)
def test_wrong_row_is_named(tmp_path, content, need, message):
    (tmp_path / "rows").write_text(content)
    with pytest.raises(InputError) as error:
        data.load_examples(tmp_path / "rows", need=need)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_skip_bad_counts(tmp_path, capsys):
    rows = [json.dumps(ROW), "{broken", json.dumps({**ROW, "id": "b", "text": None})]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    assert [x.id for x in data.load_examples(tmp_path / "rows.jsonl", skip_bad=True)] == ["a"]
    error = capsys.readouterr().err
    assert "2 bad rows skipped, 1 kept" in error and "rows.jsonl:2" in error and "rows.jsonl:3" in error


def test_lines_end_at_newline_alone(tmp_path):
    row = {**ROW, "text": "a\u2028b\x85c"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert data.load_examples(tmp_path / "rows.jsonl")[0].text == "a\u2028b\x85c"


def test_chains_are_not_joined(tmp_path):
    """A chain explains the quintuples of its own row: a joined row would have gold that it does not reach."""
    rows = [{**ROW, "id": name, "cot": "…"} for name in "ab"]
    (tmp_path / "rows.jsonl").write_text("".join(map(data.jsonl_line, rows)))
    assert len(data.load_examples(tmp_path / "rows.jsonl")) == 2
    with pytest.raises(InputError, match="would join a, b, whose chains"):
        data.load_examples(tmp_path / "rows.jsonl", merge_repeats=True)


def test_candidates_of_one_tweet_keep_its_id(tmp_path):
    rows = [{**ROW, "candidate": number} for number in range(3)]
    (tmp_path / "cot.jsonl").write_text("".join(map(data.jsonl_line, rows)))
    examples = data.load_examples(tmp_path / "cot.jsonl", key=("id", "candidate"))
    assert [x.id for x in examples] == ["a"] * 3


# -------------------------------------------------------------------------------- images


def test_images_are_found_checked_and_named(tmp_path):
    (tmp_path / "img").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "img" / "good.png")
    whole = (tmp_path / "img" / "good.png").read_bytes()
    (tmp_path / "img" / "torn.png").write_bytes(whole[:40])
    rows = [{**ROW, "id": name, "image": name} for name in ("good.png", "torn.png", "gone.png")]
    (tmp_path / "rows.jsonl").write_text("".join(map(data.jsonl_line, rows)))
    examples = data.load_examples(tmp_path / "rows.jsonl", tmp_path / "img")
    with pytest.raises(InputError, match=r"2 of 3 images .*: torn.png: .*gone.png: .*no such file"):
        data.check_images(examples)
    assert [x.id for x in data.check_images(examples, skip_bad=True)] == ["good.png"]
    assert data.to_row(examples[0], tmp_path / "runs" / "cot.jsonl")["image"] == "../img/good.png"


@pytest.mark.parametrize(
    ("mode", "darkest", "brightest", "expected"),
    [
        ("I;16", 0, 65535, (0, 255)),
        ("I;16", 0, 32768, (0, 128)),  # half as bright as white, not white
        ("I", 0, 65535, (0, 255)),
        ("I", 0, 255, (0, 255)),
        ("I", 0, 1_000_000, (0, 255)),
        ("F", 0.0, 1.0, (0, 255)),
        ("F", 0.0, 0.5, (0, 128)),
        ("F", 0.0, 255.0, (0, 255)),
        ("F", -1.0, 1.0, (0, 255)),
    ],
)
def test_deep_images_are_scaled_not_clipped(tmp_path, mode, darkest, brightest, expected):
    image = Image.new(mode, (16, 1))
    for x in range(16):
        value = darkest + (brightest - darkest) * x / 15
        image.putpixel((x, 0), value if mode == "F" else int(value))
    image.save(tmp_path / "deep.tif")
    shown = data.load_image(tmp_path / "deep.tif")
    values = [shown.getpixel((x, 0)) for x in range(16)]
    assert shown.mode == "RGB" and (values[0][0], values[-1][0]) == expected
    assert len({red for red, _, _ in values}) == 16 and values == sorted(values)
    assert all(red == green == blue for red, green, blue in values)
