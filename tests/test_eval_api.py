"""05 --api: asked once, scored like any other predictions; by batches; failures counted; other pictures."""

import json
import re

import pytest
from eval_cases import A, run, write
from fake_openai import FakeOpenAI
from PIL import Image

import common
from lib import predict_api

KEY = {"OPENAI_API_KEY": "sk-x"}


@pytest.fixture
def tweets(tmp_path):
    rows = []
    for number, colour in enumerate(("red", "red", "blue", "blue")):
        Image.new("RGB", (30, 20), colour).save(tmp_path / f"{colour}.png")
        row = {"id": f"t{number}", "text": f"tweet {number}", "image": f"{colour}.png"}
        rows.append({**row, "quintuples": [list(A)]})
    return write(tmp_path / "data.jsonl", rows)


def model(body, prompt):
    if "tweet 1" in prompt:
        return ["I'm sorry, I can't help with that."] * body.get("n", 1)
    return [common.format_answer([A])] * body.get("n", 1)


def ask(server, tweets, out):
    return ["--api", "--model", "fake", "--base-url", server.url, "--data", tweets, "--out", out]


def scores(out):
    """What two ways of asking must have in common."""
    metrics = json.loads((out / "metrics.json").read_text())
    del metrics["provenance"]
    return metrics


def test_api_model_is_asked_once_and_scored(tweets, tmp_path):
    out = tmp_path / "run"
    with FakeOpenAI(model) as server:
        command = ask(server, tweets, out)
        dry = run(*command, "--dry-run")
        assert dry.returncode == 0 and "4 calls" in dry.stdout and not server.requests
        assert run(*command).returncode == 3 and not server.requests  # no key
        done = run(*command, "--samples", "3", **KEY)
        assert done.returncode == 0, done.stderr
        first = server.requests[0]
        assert len(server.requests) == 4 and "temperature" not in first["body"] and first["body"]["n"] == 3
        assert "Output only the final answer" in first["prompt"]
        assert "12 responses, 12 well formed, 0 cut off, 3 unparsed" in done.stdout
        metrics = json.loads((out / "metrics.json").read_text())
        assert [metrics["scores"]["jmere"][name] for name in ("tp", "pred", "gold")] == [3, 3, 4]
        assert metrics["errors"]["unparsed"] == [0, 1]
        made_by = metrics["provenance"]["made_by"]
        assert (made_by["model"], made_by["server"], made_by["prompt"]) == ("fake", server.url, "direct")
        more = run(*command, "--samples", "5", **KEY)  # only the two that are missing are paid for
        assert more.returncode == 0 and [r["body"].get("n") for r in server.requests[4:]] == [2] * 4
        assert run(*command, "--samples", "5", **KEY).returncode == 0 and len(server.requests) == 8
        other = run(*command, "--temperature", "0.1", **KEY)
        assert other.returncode == 2 and "--fresh" in other.stderr and len(server.requests) == 8
        again = run(*command, "--fresh", "--temperature", "0.1", "--limit", "1", **KEY)
        assert again.returncode == 0 and len(server.requests) == 9
        assert server.requests[8]["body"]["temperature"] == 0.1
        assert len((out / "answers.jsonl").read_text().splitlines()) == 1


def test_api_model_is_asked_by_batches(tweets, tmp_path):
    key = {**KEY, "JMERE_POLL": "0.05"}
    with FakeOpenAI(model) as server:
        command = ask(server, tweets, tmp_path / "batched")
        submitted = run(*command, "--batch", "submit", **key)
        assert submitted.returncode == 0 and len(server.batches) == 1
        assert not (tmp_path / "batched" / "metrics.json").exists()
        assert run(*command, "--batch", "collect", **key).returncode == 0
        assert run(*ask(server, tweets, tmp_path / "live"), **key).returncode == 0
    assert scores(tmp_path / "batched") == scores(tmp_path / "live")


def test_failed_calls_are_counted(tweets, tmp_path):
    with FakeOpenAI(model, faults=["400"]) as server:
        command = [*ask(server, tweets, tmp_path / "run"), "--concurrency", "1"]
        done = run(*command, **KEY)
        assert done.returncode == 1 and "1 of 4 calls failed" in done.stderr
        assert "1 without a prediction (counted as empty)" in done.stdout
        assert run(*command, **KEY).returncode == 0 and len(server.requests) == 5


def pictures(requests):
    """{tweet: the data URL that was sent}."""
    sent = {}
    for request in requests:
        parts = request["body"]["messages"][-1]["content"]
        [url] = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        sent[re.search(r"tweet (\d)", request["prompt"])[1]] = url
    return sent


def test_other_pictures_are_sent(tweets, tmp_path):
    with FakeOpenAI(model) as server:
        sent = {}
        for mode in ("own", "shuffled", "blank"):
            done = run(*ask(server, tweets, tmp_path / mode), "--image", mode, **KEY)
            assert done.returncode == 0, done.stderr
            sent[mode] = pictures(server.requests[-4:])
        swapped = run(*ask(server, tweets, tmp_path / "own"), "--image", "blank", **KEY)
    assert sent["own"]["0"] == sent["own"]["1"] != sent["own"]["2"]
    assert (sent["shuffled"]["0"], sent["shuffled"]["2"]) == (sent["own"]["2"], sent["own"]["0"])
    assert len(set(sent["blank"].values())) == 1 and sent["blank"]["0"] not in sent["own"].values()
    assert swapped.returncode == 2 and "image 'own' (now 'blank')" in swapped.stderr


def test_an_unusable_picture_is_found_before_any_call(tweets, tmp_path):
    (tmp_path / "blue.png").write_bytes(b"no image")
    with FakeOpenAI(model) as server:
        done = run(*ask(server, tweets, tmp_path / "run"), **KEY)
        assert (
            done.returncode == 2 and "2 of 4 images cannot be used: t2" in done.stderr and not server.requests
        )
        done = run(*ask(server, tweets, tmp_path / "run"), "--skip-bad", **KEY)
        assert done.returncode == 0 and len(server.requests) == 2
    assert "2 without a prediction (counted as empty)" in done.stdout


def test_what_was_refused_is_asked_again(tweets, tmp_path):
    """--retry: the refusal gives way to the new answer, and stays paid for in answers.jsonl."""
    out = tmp_path / "run"
    with FakeOpenAI(model) as server:
        assert run(*ask(server, tweets, out), "--samples", "2", **KEY).returncode == 0
    with FakeOpenAI(lambda body, prompt: [common.format_answer([A])] * body.get("n", 1)) as server:
        command = [*ask(server, tweets, out), "--samples", "2", "--retry", "refusal,unparsed"]
        dry = run(*command, "--dry-run")
        assert "1 calls (3 answered already)" in dry.stdout and not server.requests
        assert run(*command, **KEY).returncode == 0
        assert [request["body"]["n"] for request in server.requests] == [2]
        assert run(*ask(server, tweets, out), "--samples", "2", **KEY).returncode == 0
        assert len(server.requests) == 1
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["responses"]["responses"] == 8 and metrics["responses"]["unparsed"] == 0
    assert metrics["scores"]["jmere"]["f1"] == 1.0
    assert len((out / "answers.jsonl").read_text().splitlines()) == 10


@pytest.mark.parametrize(
    "given, samples, expected",
    [("xy", 2, "xy"), ("-x", 1, "x"), ("-xy", 1, "-xy"), ("--x", 2, "-x"), ("-", 1, "-"), ("x-y", 2, "xy")],
)
def test_answers_that_count(given, samples, expected):
    rows = [{"candidate": place, "text": text} for place, text in enumerate(given)]
    counted = predict_api.counted(rows, samples, lambda row: row["text"] != "-")
    assert "".join(row["text"] for row in counted) == expected


def test_headers_and_the_name_of_the_key(tweets, tmp_path):
    with FakeOpenAI(model) as server:
        command = [*ask(server, tweets, tmp_path / "run"), "--key-env", "MINE", "--header", "x-team=a"]
        assert run(*command, MINE="sk-mine").returncode == 0
        headers = server.requests[0]["headers"]
    assert headers["authorization"] == "Bearer sk-mine" and headers["x-team"] == "a"
    assert "sk-mine" not in (tmp_path / "run" / "predictions.jsonl").read_text()


def test_a_file_of_the_users_is_not_written_over(tweets, tmp_path):
    with FakeOpenAI(model) as server:
        for name in ("metrics.json", "report.html", "quintuples.jsonl", "answers.jsonl"):
            out = tmp_path / name
            path = write(out / name, [{"id": "t0", "quintuples": []}])
            done = run(*ask(server, tweets, out), **KEY)
            assert done.returncode == 2 and name in done.stderr, done.stderr
            assert path.read_text() == '{"id": "t0", "quintuples": []}\n'
        assert not server.requests
