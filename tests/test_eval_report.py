"""05 --report: the page holds what the run holds, in a real browser at desktop and phone width, whatever
the tweets say."""

import html
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

import common
from lib import data as files

ev = importlib.import_module("05_eval")
GOLD = common.quintuple("Josh Gordon", "per", "Browns", "org", "member of")
EVIL = "<script>document.title='x'</script></script><img src=x onerror=document.title='x'> {{DATA}} <!-- \u2028 &amp; \U0001f600 \"'`"
COT = "Image Description: a man {0}\nVisual-Text Alignment: he is Josh Gordon\nQuintuple Reasoning: so per, and a member"
ANSWERS = {  # id: (answers of the responses, gold, class of the error)
    "right": ([[GOLD], [GOLD]], [GOLD], "correct"),
    "turned": (
        [[GOLD._replace(head="Browns", head_type="org", tail="Josh Gordon", tail_type="per")]] * 2,
        [GOLD],
        "direction",
    ),
    "cut": ([[GOLD._replace(head="Josh")]] * 2, [GOLD], "span"),
    "typed": ([[GOLD._replace(head_type="org")]] * 2, [GOLD], "type"),
    "related": ([[GOLD._replace(relation="peer")]] * 2, [GOLD], "relation"),
    "silent": ([[], []], [GOLD], "missing"),
    "made-up": ([[GOLD._replace(head=EVIL, relation=EVIL)]] * 2, [], "spurious"),
    "broken": ([None, None], [GOLD], "unparsed"),
}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """report.html of a run with every error class, hostile texts and one image that is gone."""
    folder = tmp_path_factory.mktemp("a run")
    Image.new("RGB", (1600, 900), "teal").save(folder / "x.png")
    rows = []
    for name, (answers, gold, _) in ANSWERS.items():
        texts = [EVIL if a is None else common.format_response(COT.format(EVIL), a) for a in answers]
        row = {
            "id": name,
            "text": f"{EVIL} Josh Gordon of the Browns {'x' * 200}",
            "image": "x.png" if name != "cut" else "gone.png",
        }
        responses = [{"text": text, "finished": True} for text in texts]
        rows.append(
            {**row, "quintuples": [list(q) for q in gold], "prompt": "reason", "responses": responses}
        )
    (folder / "predictions.jsonl").write_text("".join(map(files.jsonl_line, rows)), encoding="utf-8")
    command = [
        sys.executable,
        ROOT / "05_eval.py",
        "--predictions",
        folder / "predictions.jsonl",
        "--out",
        folder,
        "--report",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "8 of 8 tweets, 7 with their image" in done.stdout
    return folder / "report.html"


def block(report):
    return json.loads(
        re.search(
            r'<script id="data" type="application/json">(.*?)</script>',
            report.read_text(encoding="utf-8"),
            re.S,
        )[1]
    )


def test_the_page_holds_the_run(report):
    data = block(report)
    shown = {row["id"]: row for row in data["shown"]}
    assert {name: row["items"][0][0] for name, row in shown.items()} == {
        name: kind for name, (_, _, kind) in ANSWERS.items()
    }
    assert shown["turned"]["items"] == [["direction", list(ANSWERS["turned"][0][0][0]), list(GOLD)]]
    assert (
        shown["right"]["reason"][1] == ["Visual-Text Alignment", "he is Josh Gordon"]
        and len(shown["right"]["reason"]) == 3
    )
    assert (
        shown["right"]["votes"] == [2, 2, 1]
        and shown["broken"]["raw"] == EVIL
        and shown["right"]["raw"] is None
    )
    assert shown["cut"]["image"] is None and len(shown["right"]["image"]) < 20_000  # scaled down
    assert data["metrics"] == json.loads((report.parent / "metrics.json").read_text(encoding="utf-8"))
    assert ["JMERE-R1", 56.84] in data["paper"]


def test_the_page_loads_nothing_and_data_stays_data(report):
    page, template = (
        report.read_text(encoding="utf-8"),
        (ROOT / "lib" / "report.html").read_text(encoding="utf-8"),
    )
    assert (
        page.count("<script") == template.count("<script") == 2
        and page.count("<img") == template.count("<img") == 0
    )
    assert set(re.findall(r"\w+://[^\s\"']+", template)) == {
        "http://www.w3.org/2000/svg"
    }  # a name, never fetched
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", template)
    assert "default-src 'none'" in page


def test_without_gold_there_are_examples_and_no_scores(tmp_path):
    row = {"id": "1", "text": "Josh Gordon of the Browns", "image": "gone.png", "prompt": "direct"}
    row["responses"] = [{"text": common.format_answer([GOLD]), "finished": True}]
    (tmp_path / "p.jsonl").write_text(files.jsonl_line(row))
    ev.main(ev.parse_args(["--predictions", str(tmp_path / "p.jsonl"), "--out", str(tmp_path), "--report"]))
    data = block(tmp_path / "report.html")
    assert data["shown"][0]["items"] == [["predicted", list(GOLD), None]] and "scores" not in data["metrics"]


# -------------------------------------------------------------------------------- in a browser

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium here (apt-get install chromium)")
PROBE = """<body style="margin:0"><iframe id="frame" style="width:{width}px;height:{height}px;border:0" src="{url}"></iframe><script>
frame.onload = () => setTimeout(() => {{
  const page = frame.contentDocument, cards = () => page.querySelectorAll("article").length, seen = {{}};
  const press = name => [...page.querySelectorAll(".chip")].find(chip => chip.textContent.startsWith(name)).click();
  const search = page.querySelector("input"), type = text => {{ search.value = text; search.dispatchEvent(new Event("input")); }};
  seen.ready = page.documentElement.dataset.ready; seen.title = page.title; seen.all = cards();
  seen.overflow = page.documentElement.scrollWidth - page.documentElement.clientWidth;
  seen.scripts = page.querySelectorAll("script").length; seen.loaded = page.querySelectorAll("img:not([src^='data:'])").length;
  seen.tweet = page.querySelector(".tweet").textContent; seen.pictures = [...page.images].filter(i => i.naturalWidth).length;
  seen.relations = [...page.querySelectorAll("option")].map(o => o.value); seen.marks = page.querySelectorAll(".tweet mark").length;
  if ({act}) {{
    press("direction"); seen.direction = cards(); press("span"); seen.two = cards(); press("direction"); press("span");
    type("so PER, and"); seen.search = cards(); type("nowhere"); seen.none = cards(); type("");
    const relation = page.querySelector("select"); relation.value = "peer";
    relation.dispatchEvent(new Event("change")); seen.peer = cards();
  }}
  document.body.dataset.seen = JSON.stringify(seen);
}}, 300);
</script>"""


def browse(folder, url, width, height, *more, act=False, picture=None):
    """Open the page in a frame of that width (a window cannot be as narrow as a phone) → (what the probe
    saw, console messages)."""
    probe = folder / "probe.html"
    probe.write_text(PROBE.format(url=url, width=width, height=height, act=str(act).lower()))
    profile = folder / f"profile {width} {bool(picture)} {act} {len(more)}"
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
        "--hide-scrollbars",
    ]
    command += [
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        "--enable-logging=stderr",
        f"--user-data-dir={profile}",
    ]
    command += [
        "--allow-file-access-from-files",
        "--virtual-time-budget=5000",
        f"--window-size={max(width, 500)},{height}",
        *more,
    ]
    command += [f"--screenshot={picture}" if picture else "--dump-dom", probe.as_uri()]
    done = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=120
    )
    assert done.returncode == 0, done.stderr
    seen = re.search(r'data-seen="(.*?)"', done.stdout)
    return seen and json.loads(html.unescape(seen[1])), re.findall(r".*CONSOLE.*", done.stderr)


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(report, tmp_path, width):
    seen, console = browse(tmp_path, report.as_uri(), width, 2000, act=True)
    assert console == [] and seen["ready"] == "yes"
    assert seen["title"] == f"{report.parent.name}: JMERE evaluation" and (
        seen["scripts"],
        seen["loaded"],
    ) == (2, 0)
    assert (
        seen["tweet"].startswith(EVIL) and seen["marks"] == 15
    )  # <script> in a tweet stays text, entities are marked
    assert seen["overflow"] == 0 and seen["all"] == 8 and seen["pictures"] > 0
    assert (seen["direction"], seen["two"], seen["search"], seen["none"], seen["peer"]) == (1, 2, 7, 0, 1)
    assert set(seen["relations"]) == {"", "member of", "peer", common.normalise_label(EVIL)}


@needs_browser
@pytest.mark.parametrize("width, scheme", [(1280, 1), (1280, 0), (390, 1)])
def test_screenshots(report, tmp_path, width, scheme):
    """Kept in $SHOTS where that is set, for a person to look at. scheme: 0 dark, 1 light."""
    picture = (
        Path(os.environ.get("SHOTS", tmp_path)).absolute()
        / f"report-{width}-{'light' if scheme else 'dark'}.png"
    )
    _, console = browse(
        tmp_path,
        report.as_uri(),
        width,
        3000,
        f"--blink-settings=preferredColorScheme={scheme}",
        picture=picture,
    )
    assert console == []
    image = Image.open(picture).convert("L")
    histogram = image.crop((0, 0, width, 3000)).histogram()
    assert sum(n > 0 for n in histogram) > 100  # drawn, not blank
    assert (histogram.index(max(histogram)) > 128) == bool(scheme)
