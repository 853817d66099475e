"""The Batch API against tests/fake_openai.py: the same rows as live calls, whatever gets lost on the way."""

import json

import pytest
from fake_openai import FakeOpenAI
from test_distill_filter import data, rows_of, run, teacher  # noqa: F401

import common
from lib import api, ask, batches


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-1234")
    monkeypatch.setattr(api.ChatClient, "poll", 0.01)
    monkeypatch.setattr(api.ChatClient, "backoff", 0.01)


def echo(body, prompt):
    return [f"{prompt}/{i}" for i in range(body.get("n", 1))]


def ask_jobs(server, path, batch, count=7, n=2, **options):
    client = api.ChatClient("m", server.url, **options)
    jobs = [client.job({"id": f"j{i}"}, f"p{i}", None, n) for i in range(count)]
    with ask.AppendFile(path) as out:
        return ask.ask_all(client, jobs, out, batch=batch)


def unordered(path):
    """Rows without what tells how many choices came together: a top-up changes that."""
    return sorted(
        ({**row, "usage": None} for row in rows_of(path)), key=lambda row: (row["id"], row["candidate"])
    )


def test_same_rows_as_live(tmp_path):
    live, batched = tmp_path / "live.jsonl", tmp_path / "batched.jsonl"
    with FakeOpenAI(echo) as server:
        assert ask_jobs(server, live, None) == 0
        assert ask_jobs(server, batched, "submit") == 0 and not rows_of(batched)
        assert (
            len(server.batches) == 1 and ask_jobs(server, batched, "submit") == 0 and len(server.batches) == 1
        )  # not sent twice
        assert ask_jobs(server, batched, "collect") == 0
        assert sorted(map(str, rows_of(live))) == sorted(map(str, rows_of(batched)))
        assert ask_jobs(server, batched, "collect") == 0 and len(server.batches) == 1  # nothing left to do
    state = json.loads((tmp_path / "batched.batches.json").read_text())
    assert [(entry["status"], entry["requests"]) for entry in state["batches"]] == [("completed", 7)]


def test_lost_expired_and_failed_lines_are_sent_again(tmp_path):
    """Missing, expired, 500 and 429 come in the second batch; 400 and 401 are final; a filter answers."""
    faults = ["missing", "expired", "500", "429", "400", "400-filter", None, "401"]
    with FakeOpenAI(echo) as server:
        server.batch_fault = lambda number: faults[number] if number < len(faults) else None
        assert ask_jobs(server, tmp_path / "o.jsonl", "collect", count=8) == 2
        assert [
            len(server.files[batch["input_file_id"]].splitlines()) for batch in server.batches.values()
        ] == [8, 4]
    rows = unordered(tmp_path / "o.jsonl")
    assert [row["id"] for row in rows] == [f"j{i}" for i in (0, 0, 1, 1, 2, 2, 3, 3, 5, 5, 6, 6)]
    assert {row["status"] for row in rows if row["id"] == "j5"} == {"content_filter"}
    assert [row["id"] for row in rows_of(tmp_path / "o.errors.jsonl")] == ["j4", "j7"]


def test_a_line_that_never_comes_has_an_end(tmp_path):
    with FakeOpenAI(echo) as server:
        server.batch_fault = lambda number: "missing"
        assert ask_jobs(server, tmp_path / "o.jsonl", "collect", count=1) == 1
        assert len(server.batches) == 6


def test_fewer_choices_are_topped_up(tmp_path):
    with FakeOpenAI(lambda body, prompt: ["a"]) as server:
        assert ask_jobs(server, tmp_path / "o.jsonl", "collect", count=3, n=2) == 0
    assert [(row["id"], row["candidate"]) for row in unordered(tmp_path / "o.jsonl")] == [
        (f"j{i}", k) for i in range(3) for k in (0, 1)
    ]


@pytest.mark.parametrize("limits, sizes", [((3, 10**6), [3, 3, 1]), ((99, 450), [2, 2, 2, 1])])
def test_chunks_keep_within_the_limits(tmp_path, monkeypatch, limits, sizes):
    monkeypatch.setattr(batches, "BATCH_LIMITS", limits)
    with FakeOpenAI(echo) as server:
        assert ask_jobs(server, tmp_path / "o.jsonl", "submit") == 0
        files = [server.files[batch["input_file_id"]] for batch in server.batches.values()]
        assert [len(file.splitlines()) for file in files] == sizes
        assert all(len(file) <= limits[1] for file in files)
        assert ask_jobs(server, tmp_path / "o.jsonl", "collect") == 0
    assert len(rows_of(tmp_path / "o.jsonl")) == 14


def test_batch_created_but_never_heard_of_is_found(tmp_path):
    with FakeOpenAI(echo) as server:
        server.lose_next_batch_reply = True
        with pytest.raises(common.Stopped, match="goes on"):
            ask_jobs(server, tmp_path / "o.jsonl", "submit")
        (batch,) = json.loads((tmp_path / "o.batches.json").read_text())["batches"]
        assert batch["batch"] is None and len(server.batches) == 1
        assert ask_jobs(server, tmp_path / "o.jsonl", "collect") == 0
        assert len(server.batches) == 1 and len(rows_of(tmp_path / "o.jsonl")) == 14


def test_batch_budget(tmp_path):
    with FakeOpenAI(echo) as server, pytest.raises(common.Stopped, match="budget"):
        ask_jobs(server, tmp_path / "o.jsonl", "submit", price=(1, 1000), budget=1.0)
    assert not server.batches


def test_refused_batch_stops_and_is_sent_again(tmp_path):
    with FakeOpenAI(echo) as server:
        assert ask_jobs(server, tmp_path / "o.jsonl", "submit") == 0
        server.batches["batch-0"] |= {
            "status": "failed",
            "errors": {"data": [{"code": "token_limit_exceeded", "message": "too many"}]},
        }
        with pytest.raises(common.Stopped, match="too many"):
            ask_jobs(server, tmp_path / "o.jsonl", "collect")
        assert ask_jobs(server, tmp_path / "o.jsonl", "collect") == 0
    assert len(rows_of(tmp_path / "o.jsonl")) == 14


def test_both_scripts(folder):
    """01 and both passes of 02 by batches give the files that live calls give."""

    def scores(prompt):
        return f"Scores: R1=2 R2=2 R3=2 R4=1 R5=1 R6={'2' if 'Description: 3' in prompt else '0'}"

    with FakeOpenAI(teacher(scores=scores)) as server:
        url, live_calls = ("--base-url", server.url), 0

        def stage(*args):
            done = run(*args, *url, JMERE_POLL="0.05")
            assert done.returncode == 0, done.stderr

        for name, flags in (("live", [[]]), ("batched", [["--batch", "submit"], ["--batch", "collect"]])):
            for flag in flags:
                stage(
                    "01_distill.py",
                    "--data",
                    folder / "train.jsonl",
                    "--out",
                    folder / f"{name}.cot.jsonl",
                    *flag,
                )
            for flag in flags:
                stage(
                    "02_filter.py",
                    "--cot",
                    folder / f"{name}.cot.jsonl",
                    "--out",
                    folder / f"{name}.sft.jsonl",
                    *flag,
                )
                assert "submit" not in flag or not (folder / "batched.sft.jsonl").exists()
            live_calls = live_calls or len(server.requests)
        assert len(server.requests) == live_calls and len(server.batches) == 3
    assert rows_of(folder / "live.sft.jsonl") == rows_of(folder / "batched.sft.jsonl")
    assert unordered(folder / "live.cot.jsonl") == unordered(folder / "batched.cot.jsonl")
