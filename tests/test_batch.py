"""The Batch API against tests/fake_openai.py: the same rows as live calls, whatever gets lost on the way."""

import json

import pytest
from fake_openai import FakeOpenAI
from stages import KEY, distil, rows_of, select, teacher

import common
from lib import api, ask, batches


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(api.ChatClient, "poll", 0.01)
    monkeypatch.setattr(api.ChatClient, "backoff", 0.01)


def echo(body, prompt):
    return [f"{prompt}/{i}" for i in range(body.get("n", 1))]


def ask_jobs(server, path, batch, count=7, n=2, model="m", prompt="p", **options):
    client = api.ChatClient(model, server.url, **options)
    jobs = [client.job({"id": f"j{i}"}, f"{prompt}{i}", None, n) for i in range(count)]
    with ask.AppendFile(path) as out:
        return ask.ask_all(client, jobs, out, batch=batch)


def state_of(path):
    return json.loads(path.with_suffix(".batches.json").read_text())


def sent(server):
    """Requests in each batch."""
    return [len(server.files[batch["input_file_id"]].splitlines()) for batch in server.batches.values()]


def unordered(path):
    """Rows without what tells how many choices came together: a top-up changes that."""
    rows = [{**row, "usage": None} for row in rows_of(path)]
    return sorted(rows, key=lambda row: (row["id"], row["candidate"]))


def test_same_rows_as_live(tmp_path):
    live, batched = tmp_path / "live.jsonl", tmp_path / "batched.jsonl"
    with FakeOpenAI(echo) as server:
        assert ask_jobs(server, live, None) == 0
        assert ask_jobs(server, batched, "submit") == 0 and not rows_of(batched)
        assert ask_jobs(server, batched, "submit") == 0 and len(server.batches) == 1  # not sent twice
        assert ask_jobs(server, batched, "collect") == 0
        assert sorted(map(str, rows_of(live))) == sorted(map(str, rows_of(batched)))
        assert ask_jobs(server, batched, "collect") == 0 and len(server.batches) == 1  # nothing left to do
    (entry,) = state_of(batched)["batches"]
    assert (entry["status"], entry["requests"]) == ("completed", 7)


def test_the_state_explains_itself(tmp_path, capsys):
    with FakeOpenAI(echo) as server:
        ask_jobs(server, tmp_path / "o.jsonl", "submit", count=2, params={"temperature": 0.5})
        state = state_of(tmp_path / "o.jsonl")
        assert "JMERE-R1" in state["about"] and KEY not in json.dumps(state)
        assert (state["model"], state["params"], state["server"]) == ("m", {"temperature": 0.5}, server.url)
        (entry,) = state["batches"]
        assert entry["batch"] == "batch-0" and entry["file"] == "file-0" and entry["submitted"]
        assert [request["id"] for request in entry["requests"].values()] == ["j0", "j1"]
        assert all(request["prompt_hash"] and request["key"] for request in entry["requests"].values())
        ask_jobs(server, tmp_path / "o.jsonl", "status", count=2, params={"temperature": 0.5})
    assert "batch-0: in_progress, 0 done, submitted" in capsys.readouterr().err


def test_lost_expired_and_failed_lines_are_sent_again(tmp_path):
    """Missing, expired, 500 and 429 come in the second batch; 400 and 401 are final; a filter answers."""
    faults = ["missing", "expired", "500", "429", "400", "400-filter", None, "401"]
    with FakeOpenAI(echo) as server:
        server.batch_fault = lambda number: faults[number] if number < len(faults) else None
        assert ask_jobs(server, tmp_path / "o.jsonl", "collect", count=8) == 2
        assert sent(server) == [8, 4]
    rows = unordered(tmp_path / "o.jsonl")
    assert [row["id"] for row in rows] == [f"j{i}" for i in (0, 0, 1, 1, 2, 2, 3, 3, 5, 5, 6, 6)]
    assert {row["status"] for row in rows if row["id"] == "j5"} == {"content_filter"}
    assert [row["id"] for row in rows_of(tmp_path / "o.errors.jsonl")] == ["j4", "j7"]


def test_blank_and_cut_off_lines_count_as_missing(tmp_path, capsys):
    """The server's files hold a blank line after each; one line is cut off."""
    with FakeOpenAI(echo) as server:
        server.batch_fault = lambda number: "cut" if number == 2 else None
        assert ask_jobs(server, tmp_path / "o.jsonl", "collect") == 0
        assert sent(server) == [7, 1]
    assert len(rows_of(tmp_path / "o.jsonl")) == 14
    assert "1 lines of file-1 cannot be read, their requests count as missing" in capsys.readouterr().err


def test_a_line_that_never_comes_has_an_end(tmp_path):
    with FakeOpenAI(echo) as server:
        server.batch_fault = lambda number: "missing"
        assert ask_jobs(server, tmp_path / "o.jsonl", "collect", count=1) == 1
        assert len(server.batches) == 6


def test_fewer_choices_are_topped_up(tmp_path):
    with FakeOpenAI(lambda body, prompt: ["a"]) as server:
        assert ask_jobs(server, tmp_path / "o.jsonl", "collect", count=3, n=2) == 0
    names = [(row["id"], row["candidate"]) for row in unordered(tmp_path / "o.jsonl")]
    assert names == [(f"j{i}", k) for i in range(3) for k in (0, 1)]


def test_a_server_that_refuses_n_is_asked_one_by_one(tmp_path):
    def single(body, prompt):
        refusal = 400, {}, {"error": {"message": "n must be 1"}}
        return refusal if "n" in body else [f"{prompt} {body['seed']}"]

    with FakeOpenAI(single) as server:
        assert ask_jobs(server, tmp_path / "o.jsonl", "collect", count=2, n=3, params={"seed": 5}) == 0
        assert sent(server) == [2, 6]
    rows = unordered(tmp_path / "o.jsonl")
    assert {row["response"] for row in rows} == {f"p{i} {seed}" for i in (0, 1) for seed in (5, 6, 7)}


@pytest.mark.parametrize("limits, sizes", [((3, 10**6), [3, 3, 1]), ((99, 450), [2, 2, 2, 1])])
def test_chunks_keep_within_the_limits(tmp_path, monkeypatch, limits, sizes):
    monkeypatch.setattr(batches, "BATCH_LIMITS", limits)
    with FakeOpenAI(echo) as server:
        assert ask_jobs(server, tmp_path / "o.jsonl", "submit") == 0
        assert sent(server) == sizes
        files = [server.files[batch["input_file_id"]] for batch in server.batches.values()]
        assert all(len(file) <= limits[1] for file in files)
        assert ask_jobs(server, tmp_path / "o.jsonl", "collect") == 0
    assert len(rows_of(tmp_path / "o.jsonl")) == 14


def test_batch_created_but_never_heard_of_is_found(tmp_path):
    with FakeOpenAI(echo) as server:
        server.lose_next_batch_reply = True
        with pytest.raises(common.Stopped, match="goes on"):
            ask_jobs(server, tmp_path / "o.jsonl", "submit")
        (entry,) = state_of(tmp_path / "o.jsonl")["batches"]
        assert entry["batch"] is None and len(server.batches) == 1
        assert ask_jobs(server, tmp_path / "o.jsonl", "collect") == 0
        assert len(server.batches) == 1 and len(rows_of(tmp_path / "o.jsonl")) == 14


def test_killed_between_reading_and_saving(tmp_path, monkeypatch):
    """The answers are stored, the batch still counts as open: reading it again adds nothing."""
    path = tmp_path / "o.jsonl"
    with FakeOpenAI(echo) as server:
        ask_jobs(server, path, "submit")
        before = path.with_suffix(".batches.json").read_text()
        ask_jobs(server, path, "collect")
        path.with_suffix(".batches.json").write_text(before)
        assert ask_jobs(server, path, "collect") == 0
        assert len(server.batches) == 1
    assert len(rows_of(path)) == 14 and not (tmp_path / "o.unclaimed.jsonl").exists()


def test_batch_budget(tmp_path):
    with FakeOpenAI(echo) as server, pytest.raises(common.Stopped, match="budget"):
        ask_jobs(server, tmp_path / "o.jsonl", "submit", price=(1, 1000), budget=1.0)
    assert not server.batches


def test_refused_batch_stops_and_is_sent_again(tmp_path):
    with FakeOpenAI(echo) as server:
        assert ask_jobs(server, tmp_path / "o.jsonl", "submit") == 0
        errors = {"data": [{"code": "token_limit_exceeded", "message": "too many"}]}
        server.batches["batch-0"] |= {"status": "failed", "errors": errors}
        with pytest.raises(common.Stopped, match="too many"):
            ask_jobs(server, tmp_path / "o.jsonl", "collect")
        assert ask_jobs(server, tmp_path / "o.jsonl", "collect") == 0
    assert len(rows_of(tmp_path / "o.jsonl")) == 14


# ----------------------------------------------------------- other commands on the same output


def test_with_a_lower_limit_nothing_paid_for_is_lost_or_bought_again(tmp_path, capsys):
    path = tmp_path / "o.jsonl"
    with FakeOpenAI(echo) as server:
        ask_jobs(server, path, "submit", count=7)
        assert ask_jobs(server, path, "collect", count=3) == 0
        assert sent(server) == [7] and len(rows_of(path)) == 6
        assert len(rows_of(tmp_path / "o.unclaimed.jsonl")) == 4
        for batch in (None, "collect"):  # a later command takes them, live or not
            assert ask_jobs(server, path, batch, count=5 if batch is None else 7) == 0
        assert sent(server) == [7] and not server.requests
    names = [(row["id"], row["candidate"]) for row in unordered(path)]
    assert names == [(f"j{i}", k) for i in range(7) for k in (0, 1)]
    assert len(rows_of(path)) == 14 and not rows_of(tmp_path / "o.unclaimed.jsonl")
    assert "answers taken from" in capsys.readouterr().err


@pytest.mark.parametrize(
    "other, message",
    [
        ({"model": "x"}, "model m .now x."),
        ({"params": {"seed": 1}}, "params {} .now {'seed': 1}."),
        ({"prompt": "q"}, "prompt_hash .* of j0"),
        ({"base_url": "http://127.0.0.1:9/v1"}, "server http"),
    ],
)
def test_collect_with_other_settings_is_refused(tmp_path, other, message):
    path = tmp_path / "o.jsonl"
    with FakeOpenAI(echo) as server:
        ask_jobs(server, path, "submit")
        state = state_of(path)
        if "base_url" in other:
            state["server"] = other.pop("base_url")
            path.with_suffix(".batches.json").write_text(json.dumps(state))
        for batch in ("collect", "submit"):
            with pytest.raises(common.InputError, match=message):
                ask_jobs(server, path, batch, **other)
        assert len(server.batches) == 1 and not rows_of(path)


def test_a_live_run_beside_an_open_batch_is_refused(tmp_path):
    path = tmp_path / "o.jsonl"
    with FakeOpenAI(echo) as server:
        ask_jobs(server, path, "submit")
        with pytest.raises(
            common.InputError, match="7 requests are in open batches .batch-0.: --batch collect"
        ):
            ask_jobs(server, path, None)
        assert not server.requests
        ask_jobs(server, path, "collect")
        assert ask_jobs(server, path, None) == 0 and not server.requests


def test_a_cancelled_batch_is_read_and_stays_cancelled(tmp_path, capsys):
    """Two of seven were answered before the cancel: they are kept, and nothing is sent again unasked."""
    path = tmp_path / "o.jsonl"
    with FakeOpenAI(echo) as server:
        server.batch_fault = lambda number: "missing" if number >= 2 else None
        ask_jobs(server, path, "submit")
        ask_jobs(server, path, "cancel")
        assert "batch-0: cancelling; --batch collect reads what it answered" in capsys.readouterr().err
        with pytest.raises(common.InputError, match="open batches"):
            ask_jobs(server, path, None)
        assert ask_jobs(server, path, "collect") == 5
        assert len(rows_of(path)) == 4 and len(server.batches) == 1
        assert state_of(path)["batches"][0]["status"] == "cancelled"
        assert ask_jobs(server, path, None) == 0 and len(server.requests) == 5
    assert len(rows_of(path)) == 14


@pytest.mark.parametrize("lost", ["the batch", "its answers"])
def test_what_the_server_has_no_more(tmp_path, lost):
    """A purged file or an unknown batch stops with how to go on; cancel forgets it, submit asks again."""
    path = tmp_path / "o.jsonl"
    with FakeOpenAI(echo) as server:
        ask_jobs(server, path, "submit")
        if lost == "the batch":
            del server.batches["batch-0"]
        else:
            server._run_batch(server.batches["batch-0"])
            server.files[server.batches["batch-0"]["output_file_id"]] = None
        for _ in range(2):
            with pytest.raises(common.Stopped, match="--batch cancel forgets it.*asks its 7 requests again"):
                ask_jobs(server, path, "collect")
        ask_jobs(server, path, "cancel")
        assert state_of(path)["batches"][0]["status"] == "lost at the server"
        assert ask_jobs(server, path, "collect") == 0
    assert len(rows_of(path)) == 14


def test_a_state_that_is_not_ours_is_refused(tmp_path):
    mine = tmp_path / "o.batches.json"
    with FakeOpenAI(echo) as server:
        for text in ("my notes", "[]", '{"batches": []}'):
            mine.write_text(text)
            with pytest.raises(common.InputError, match="o.batches.json"):
                ask_jobs(server, tmp_path / "o.jsonl", "submit")
            assert mine.read_text() == text and not server.batches


# -------------------------------------------------------------------------------- the scripts


def test_both_scripts(folder):
    """01 and both passes of 02 by batches give the files that live calls give."""

    def scores(prompt):
        return f"Scores: R1=2 R2=2 R3=2 R4=1 R5=1 R6={'2' if 'Description: 3' in prompt else '0'}"

    with FakeOpenAI(teacher(scores=scores)) as server:
        for stage in (distil, select):
            assert stage(folder, server, cot="distil.live.jsonl", out="select.live.jsonl").returncode == 0
        live_calls = len(server.requests)
        for stage in (distil, select):
            for action in ("submit", "status", "collect"):
                done = stage(
                    folder,
                    server,
                    *("--batch", action),
                    cot="distil.batched.jsonl",
                    out="select.batched.jsonl",
                    JMERE_POLL="0.05",
                )
                assert done.returncode == 0, done.stderr
                if stage is select and action != "collect":
                    assert not (folder / "select.batched.jsonl").exists()
        assert len(server.requests) == live_calls and len(server.batches) == 3
    assert rows_of(folder / "select.live.jsonl") == rows_of(folder / "select.batched.jsonl")
    assert unordered(folder / "distil.live.jsonl") == unordered(folder / "distil.batched.jsonl")
