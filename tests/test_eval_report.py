"""05's pages: what the run holds, in a real browser at desktop and phone width, whatever the tweets say."""

import html
import importlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from eval_cases import GOLD, run, stored_row, write
from PIL import Image

import common
from lib import figures, page

ev = importlib.import_module("05_eval")
EVIL = (
    "<script>document.title='x'</script></script><img src=x onerror=document.title='x'> {{DATA}} {{FIGURES}} "
    "<!-- \u2028 \u202e &amp; \U0001f600 \"'`"
)
COT = (
    "Image Description: a man {0}\nVisual-Text Alignment: he is Josh Gordon\n"
    "Quintuple Reasoning: so per, and a member"
)
TURNED = common.Quintuple("Browns", "org", "Josh Gordon", "per", "member of")
ANSWERS = {  # id: (answers of the responses, gold, class of the error)
    "right": ([[GOLD], [GOLD], []], [GOLD], "correct"),
    "turned": ([[TURNED]] * 3, [GOLD], "direction"),
    "cut": ([[GOLD._replace(head="Josh")]] * 3, [GOLD], "span"),
    "typed": ([[GOLD._replace(head_type="org")]] * 3, [GOLD], "type"),
    "related": ([[GOLD._replace(relation="peer")]] * 3, [GOLD], "relation"),
    "silent": ([[]] * 3, [GOLD], "missing"),
    "made-up": ([[GOLD._replace(head=EVIL, relation=EVIL)]] * 3, [], "spurious"),
    "broken": ([None] * 3, [GOLD], "unparsed"),
}


def store(folder, answers):
    """predictions.jsonl in `folder`; answers: as ANSWERS."""
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (1600, 900), "teal").save(folder / "x.png")
    rows = []
    for name, (responses, gold, _) in answers.items():
        texts = []
        for answer in responses:
            texts.append(EVIL if answer is None else common.format_response(COT.format(EVIL), answer))
        row = stored_row(name, texts, gold)
        row["text"] = f"{EVIL} Josh Gordon of the Browns {'x' * 200}"
        row["image"] = "gone.png" if name == "cut" else "x.png"
        rows.append(row)
    return write(folder / "predictions.jsonl", rows)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """report.html of a run with every error class, hostile texts and one image that is gone."""
    folder = tmp_path_factory.mktemp("a run")
    done = run("--predictions", store(folder, ANSWERS), "--out", folder)
    assert done.returncode == 0, done.stderr
    assert "8 tweets, 7 with their image" in done.stdout
    return folder / "report.html"


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """compare.html of two runs: "right" became wrong, "turned" right, "silent" stays wrong."""
    folder = tmp_path_factory.mktemp("two runs")
    first = {name: ANSWERS[name] for name in ("right", "turned", "silent")}
    second = {**first, "right": ([[]] * 3, [GOLD], None), "turned": ([[GOLD]] * 3, [GOLD], None)}
    names = [f"A={store(folder / 'a', first)}", f"<b>={store(folder / 'b', second)}"]
    done = run("--compare", *names, "--out", folder)
    assert done.returncode == 0, done.stderr
    assert "compare.html (3 tweets)" in done.stdout
    return folder / "compare.html"


def block(path):
    """The JSON block of a page."""
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)[1])


def static(path):
    """The text of a page as one without JavaScript sees it."""
    body = path.read_text(encoding="utf-8").split("<main>")[1].split("</main>")[0]
    return html.unescape(re.sub(r"<[^>]+>", " ", body))


# -------------------------------------------------------------------------------- what it holds


def test_the_page_holds_the_run(report):
    shown = {row["id"]: row for row in block(report)["shown"]}
    answers = {name: row["answers"][0] for name, row in shown.items()}
    kinds = {name: answer["items"][0][0] for name, answer in answers.items()}
    assert kinds == {name: kind for name, (_, _, kind) in ANSWERS.items()}
    assert answers["turned"]["items"] == [["direction", list(TURNED), list(GOLD)]]
    assert answers["right"]["reason"][1] == ["Visual-Text Alignment", "he is Josh Gordon"]
    assert len(answers["right"]["reason"]) == 3
    assert answers["right"]["votes"] == [2, 3, 2]  # given by 2 of 3 responses, 2 distinct answers
    assert answers["right"]["top"] == [[2, [list(GOLD)]], [1, []]]
    assert answers["broken"]["raw"] == EVIL and answers["broken"]["top"] == [[3, None]]
    assert shown["cut"]["image"] is None
    assert len(shown["right"]["image"]) < 20_000  # scaled down
    assert shown["right"]["tags"] == ["all right", "correct"]
    assert shown["cut"]["tags"] == ["any error", "span"]


def test_the_figures_need_no_script(report):
    metrics = json.loads((report.parent / "metrics.json").read_text(encoding="utf-8"))
    text = static(report)
    for name in ("jmere", "jmere_undirected", "mner"):
        assert figures.percent(metrics["scores"][name]["f1"], 2) in text
    assert "JMERE-R1" in text and "56.84" in text  # the paper beside it
    assert "outside the label set" in text and "head type" in text
    assert metrics["provenance"]["predictions"]["sha256"] in text  # all settings
    assert "All 3 are one subset" in text


def test_the_page_loads_nothing_and_data_stays_data(report, comparison):
    template = (ROOT / "lib" / "report.html").read_text(encoding="utf-8")
    for path in (report, comparison):
        text = path.read_text(encoding="utf-8")
        assert text.count("<script") == template.count("<script") == 2
        assert text.count("<img") == template.count("<img") == 0
    assert not re.findall(r"\w+://[^\s\"']+", template)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", template)
    assert "default-src 'none'" in template


def test_a_template_is_filled_in_one_pass():
    text = page.fill("report.html", {"name": "</script>{{TITLE}}"}, "{{DATA}} <", figures.escaped("{{DATA}}"))
    assert "<title>{{DATA}} &lt;</title>" in text and r'{"name": "\u003c/script>{{TITLE}}"}' in text
    assert text.count('{"name"') == 1


def test_without_gold_there_are_examples_and_no_scores(tmp_path):
    row = {"id": "1", "text": "Josh Gordon of the Browns", "image": "gone.png", "prompt": "direct"}
    row["responses"] = [{"text": common.format_answer([GOLD]), "finished": True}]
    path = write(tmp_path / "p.jsonl", [row])
    ev.main(ev.parse_args(["--predictions", str(path), "--out", str(tmp_path)]))
    [tweet] = block(tmp_path / "report.html")["shown"]
    assert tweet["answers"][0]["items"] == [["predicted", list(GOLD), None]]
    assert "Scores" not in static(tmp_path / "report.html")


def test_two_runs_side_by_side(comparison):
    shown = block(comparison)["shown"]
    assert [(row["id"], row["tags"]) for row in shown] == [
        ("turned", ["better"]),
        ("right", ["worse"]),
        ("silent", ["both wrong"]),
    ]
    assert [answer["name"] for answer in shown[0]["answers"]] == ["A", "<b>"]
    assert [answer["items"][0][0] for answer in shown[0]["answers"]] == ["direction", "correct"]
    text = static(comparison)
    assert "A → <b>" in text and "paired bootstrap" in text


# -------------------------------------------------------------------------------- in a browser

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium here (apt-get install chromium)")
FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-background-networking --no-first-run
    --hide-scrollbars --disable-component-update --disable-sync --disable-dev-shm-usage
    --enable-logging=stderr --allow-file-access-from-files --virtual-time-budget=5000"""
PROBE = """<body style="margin:0">
<iframe id="frame" style="width:{width}px;height:{height}px;border:0" src="{url}"></iframe>
<script>
frame.onload = () => setTimeout(() => {{
  const page = frame.contentDocument;
  const seen = {{}};
  const all = selector => [...page.querySelectorAll(selector)];
  const cards = () => all("article").length;
  const press = name => page.querySelector(`[data-tag="${{name}}"]`).click();
  const search = page.querySelector("input");
  const type = text => {{ search.value = text; search.dispatchEvent(new Event("input")); }};
  const choose = (name, value) => {{
    const select = page.querySelector(`select[aria-label=${{name}}]`);
    select.value = value;
    select.dispatchEvent(new Event("change"));
  }};
  const ids = () => all("article .link").map(link => link.textContent);
  seen.ready = page.documentElement.dataset.ready;
  seen.title = page.title;
  seen.all = cards();
  seen.ids = ids();
  seen.overflow = page.documentElement.scrollWidth - page.documentElement.clientWidth;
  seen.loaded = all("img:not([src^='data:'])").length;
  seen.tweet = page.querySelector(".tweet").textContent;
  seen.pictures = [...page.images].filter(image => image.naturalWidth).length;
  seen.relations = all("select[aria-label=relation] option").map(option => option.value);
  seen.marks = all(".tweet mark").length;
  seen.folds = all("summary").map(summary => summary.textContent);
  if ({act}) {{
    press("direction"); seen.direction = cards();
    seen.count = page.querySelector("[role=status]").textContent;
    seen.hash = frame.contentWindow.location.hash;
    press("span"); seen.two = cards(); press("direction"); press("span");
    press("any error"); seen.wrong = cards(); press("any error");
    type("and PER, so"); seen.search = cards(); type("so nowhere"); seen.none = cards(); type("");
    choose("relation", "peer"); seen.peer = cards(); choose("relation", "");
    choose("order", "place"); seen.placed = ids();
  }}
  document.body.dataset.seen = JSON.stringify(seen);
}}, 300);
</script>"""


def browse(folder, url, width, height, *more, act=False, picture=None):
    """Open the page in a frame of that width (a window cannot be as narrow as a phone) → (what the probe
    saw, console messages)."""
    probe = folder / "probe.html"
    probe.write_text(PROBE.format(url=url, width=width, height=height, act=str(act).lower()))
    command = [BROWSER, *FLAGS.split(), *more]
    command.append(f"--user-data-dir={folder / 'profile'}")
    command.append(f"--window-size={max(width, 500)},{height}")
    command += [f"--screenshot={picture}" if picture else "--dump-dom", probe.as_uri()]
    options = {"capture_output": True, "encoding": "utf-8", "errors": "replace", "timeout": 120}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    seen = re.search(r'data-seen="(.*?)"', done.stdout)
    return seen and json.loads(html.unescape(seen[1])), re.findall(r".*CONSOLE.*", done.stderr)


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(report, tmp_path, width):
    seen, console = browse(tmp_path, report.as_uri(), width, 2000, act=True)
    assert console == [] and seen["ready"] == "yes"
    assert seen["title"] == f"{report.parent.name}: evaluation"
    assert seen["tweet"].startswith(EVIL)  # <script> in a tweet stays text
    assert (seen["all"], seen["loaded"], seen["overflow"]) == (8, 0, 0) and seen["pictures"] > 0
    assert seen["marks"] == 15  # two entities a tweet, but one where Josh is all that is found of one
    assert seen["ids"][-1] == "right" and seen["ids"][0] == "turned"  # errors first
    assert seen["placed"] == list(ANSWERS)
    assert (seen["direction"], seen["two"], seen["wrong"]) == (1, 2, 7)
    assert seen["count"] == "1 of 8 tweets" and seen["hash"] == "#show=direction"
    assert (seen["search"], seen["none"], seen["peer"]) == (7, 0, 1)
    assert set(seen["relations"]) == {"", "member of", "peer", common.normalise_label(EVIL)}
    assert seen["folds"].count("raw response") == seen["folds"].count("most frequent answers") == 8


@needs_browser
def test_an_address_opens_a_tweet_and_a_filter(report, tmp_path):
    seen, _ = browse(tmp_path, f"{report.as_uri()}#show=span,type", 1280, 2000)
    assert sorted(seen["ids"]) == ["cut", "typed"]
    seen, _ = browse(tmp_path, f"{report.as_uri()}#show=span&tweet=silent", 1280, 2000)
    assert sorted(seen["ids"]) == ["cut", "silent"]


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_two_runs_in_a_browser(comparison, tmp_path, width):
    seen, console = browse(tmp_path, comparison.as_uri(), width, 2000)
    assert console == [] and seen["ready"] == "yes"
    assert seen["ids"] == ["turned", "right", "silent"] and seen["overflow"] == 0


@needs_browser
@pytest.mark.parametrize("which", ["report", "comparison"])
@pytest.mark.parametrize("width, scheme", [(1280, "light"), (1280, "dark"), (390, "light")])
def test_screenshots(request, which, tmp_path, width, scheme):
    """Kept in $SHOTS where that is set, for a person to look at."""
    path = request.getfixturevalue(which)
    folder = Path(os.environ.get("SHOTS", tmp_path)).absolute()
    picture = folder / f"{which}-{width}-{scheme}.png"
    setting = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    _, console = browse(tmp_path, path.as_uri(), width, 3000, setting, picture=picture)
    assert console == []
    histogram = Image.open(picture).convert("L").crop((0, 0, width, 3000)).histogram()
    assert sum(n > 0 for n in histogram) > 100  # drawn, not blank
    assert (histogram.index(max(histogram)) > 128) == (scheme == "light")
