"""The chat client against a server that misbehaves: each row of the table of SPEC §8."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from fake_openai import FakeOpenAI
from PIL import Image

import common
from lib import api, ask, data

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-1234")
    monkeypatch.setattr(api.ChatClient, "backoff", 0.01)


def echo(body, prompt):
    return [f"{prompt}/{i}" for i in range(body.get("n", 1))]


def client_of(server, **options):
    return api.ChatClient("m", server.url, **{"concurrency": 4, "timeout": 5.0, **options})


def ask_jobs(server, path, count=1, n=1, finish=lambda row: row, client=None, **options):
    """Ask `count` jobs → (number failed, rows)."""
    client = client or client_of(server, **options)
    jobs = [client.job({"id": f"j{i}"}, f"p{i}", None, n) for i in range(count)]
    with ask.AppendFile(path) as out:
        failed = ask.ask_all(client, jobs, out, finish)
    return failed, [row for _, row in data.read_jsonl(path)] if path.stat().st_size else []


RETRIED = [
    "408",
    "409",
    "500",
    "502",
    "503",
    "reset",
    "truncated",
    "html",
    "empty",
    "no-choices",
    "list",
    "null-message",
    "200-error",
]


@pytest.mark.parametrize("fault", [*RETRIED, "429", "429-ms", "429-s"])
def test_passing_faults_are_retried(tmp_path, fault):
    with FakeOpenAI(echo, [fault]) as server:
        failed, rows = ask_jobs(server, tmp_path / "o.jsonl")
    assert failed == 0 and [row["response"] for row in rows] == ["p0/0"]
    assert [request["fault"] for request in server.requests] == [fault, None]


@pytest.mark.parametrize("fault", ["hang", "drip"])
def test_timeout_is_wall_clock(tmp_path, fault):
    with FakeOpenAI(echo, [fault]) as server:
        failed, rows = ask_jobs(server, tmp_path / "o.jsonl", timeout=0.5)
    assert failed == 0 and len(rows) == 1 and len(server.requests) == 2


@pytest.mark.parametrize("fault", ["500", "reset", "html"])
def test_gives_up_after_six_tries_and_stores_no_answer(tmp_path, fault):
    with FakeOpenAI(echo, [fault] * 6) as server:
        failed, rows = ask_jobs(server, tmp_path / "o.jsonl")
    assert failed == 1 and rows == [] and len(server.requests) == 6
    (_, error), *_ = data.read_jsonl(tmp_path / "o.errors.jsonl")
    assert error["id"] == "j0" and error["status"] == "error" and "6 times" in error["error"]
    with FakeOpenAI(echo) as server:  # asked again by the next run
        assert ask_jobs(server, tmp_path / "o.jsonl")[0] == 0
    assert not (tmp_path / "o.errors.jsonl").exists()


@pytest.mark.parametrize("fault", ["401", "402", "403", "404", "429-quota", "200-auth"])
def test_fatal_errors_stop_at_once(tmp_path, fault):
    with FakeOpenAI(echo, lambda number: fault) as server, pytest.raises(common.Stopped) as stop:
        ask_jobs(server, tmp_path / "o.jsonl", count=100)
    assert len(server.requests) <= 4  # one a worker
    assert "\n" not in str(stop.value) and "sk-secret" not in str(stop.value)


@pytest.mark.parametrize("fault", ["400", "413", "422"])
def test_bad_row_is_recorded_and_the_run_goes_on(tmp_path, fault):
    with FakeOpenAI(echo, [None, fault]) as server:
        failed, rows = ask_jobs(server, tmp_path / "o.jsonl", count=5, concurrency=1)
    assert failed == 1 and len(rows) == 4 and len(server.requests) == 5


def test_ten_failures_in_succession_stop(tmp_path):
    with (
        FakeOpenAI(echo, lambda number: "400" if number != 5 else None) as server,
        pytest.raises(common.Stopped, match="10 rows failed"),
    ):
        ask_jobs(server, tmp_path / "o.jsonl", count=50, concurrency=1)
    assert len(server.requests) == 16


def test_gate_holds_all_workers(tmp_path):
    """After one 429 with 0.3 s nobody asks for 0.3 s; retry-after-ms wins over retry-after."""
    with FakeOpenAI(echo, ["429-ms"], latency=0.02) as server:
        assert ask_jobs(server, tmp_path / "o.jsonl", count=12)[0] == 0
    times = [request["time"] for request in server.requests]
    gaps = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    long = [i for i, gap in enumerate(gaps) if gap > 0.2]
    assert len(times) == 13 and len(long) == 1 and long[0] <= 7


def test_gate_closes_before_the_limit_is_hit(tmp_path):
    with FakeOpenAI(echo, ["nothing-left"]) as server:
        assert ask_jobs(server, tmp_path / "o.jsonl", count=3, concurrency=1)[0] == 0
    times = [request["time"] for request in server.requests]
    assert times[1] - times[0] > 0.25 and times[2] - times[1] < 0.2


def test_rate_limit_does_not_use_up_tries_but_has_an_end(tmp_path):
    with FakeOpenAI(echo, ["429"] * 9) as server:
        assert ask_jobs(server, tmp_path / "o.jsonl")[0] == 0
    with FakeOpenAI(echo, ["429-day"]) as server, pytest.raises(common.Stopped, match="rate limit"):
        ask_jobs(server, tmp_path / "p.jsonl")


def test_rest_of_n_is_asked_for(tmp_path):
    with FakeOpenAI(lambda body, prompt: echo(body, prompt)[:2]) as server:
        _, rows = ask_jobs(server, tmp_path / "o.jsonl", n=5)
    assert [request["body"].get("n") for request in server.requests] == [5, 3, None]
    assert [row["candidate"] for row in rows] == [0, 1, 2, 3, 4]
    with FakeOpenAI(lambda body, prompt: ["a"] * 9) as server:  # more than asked for
        assert len(ask_jobs(server, tmp_path / "p.jsonl", n=5)[1]) == 5


def test_statuses(tmp_path):
    def choice(finish="stop", **message):
        return {"finish_reason": finish, "message": {"role": "assistant", "content": None, **message}}

    def odd(body, prompt):
        return [
            choice(refusal="I will not"), choice("content_filter"), choice("length", content="half a"),
            "I'm sorry, but I can't help with that.",
            choice(content=[{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]),
        ]  # fmt: skip

    with FakeOpenAI(odd) as server:
        _, rows = ask_jobs(server, tmp_path / "o.jsonl", n=5)
    assert [row["status"] for row in rows] == ["refusal", "content_filter", "length", "refusal", "ok"]
    assert [row["response"] for row in rows][::2] == ["I will not", "half a", "in parts"]
    with FakeOpenAI(echo, ["400-filter"]) as server:
        failed, rows = ask_jobs(server, tmp_path / "p.jsonl", n=5)
    assert failed == 0 and [row["status"] for row in rows] == ["content_filter"] * 5


def test_row_tells_where_it_comes_from(tmp_path):
    with FakeOpenAI(echo) as server:
        _, (row,) = ask_jobs(server, tmp_path / "o.jsonl", params={"temperature": 0.5})
    assert server.requests[0]["body"].keys() == {"model", "messages", "temperature"}
    assert row["model"] == "m" and row["model_answered"] == "fake-1" and row["params"] == {"temperature": 0.5}
    assert (
        row["usage"] == {"prompt_tokens": 100, "completion_tokens": 10, "choices": 1}
        and row["finish_reason"] == "stop"
    )
    assert row["prompt_hash"] and row["image_hash"] is None


def test_budget(tmp_path):
    """A call costs (100 + 10) · 1000 millionths = $0.11: nine fit into $1, in two runs together."""
    with FakeOpenAI(echo, latency=0.02) as server:
        for _ in range(2):
            with pytest.raises(common.Stopped, match="budget"):
                ask_jobs(server, tmp_path / "o.jsonl", count=50, price=(1000, 1000), budget=1.0)
    assert len(server.requests) == 9
    with pytest.raises(common.InputError, match="--price"):
        api.ChatClient("m", budget=1.0)


def test_images_travel_as_they_are_unless_turned(tmp_path):
    plain, turned, broken, bmp = (tmp_path / name for name in ("a.jpg", "b.jpg", "c.jpg", "d.bmp"))
    Image.new("RGB", (40, 20), "red").save(plain)
    exif = Image.Exif()
    exif[274] = 6  # orientation: a quarter turn
    Image.new("RGB", (40, 20), "red").save(turned, exif=exif)
    Image.new("RGB", (4, 2)).save(bmp)
    broken.write_bytes(b"no image")
    import base64
    import io

    def sent(path):
        head, _, data = api.data_url(path).decode().partition(",")
        return head, base64.b64decode(data)

    assert sent(plain) == ("data:image/jpeg;base64", plain.read_bytes())
    assert sent(turned)[0] == sent(bmp)[0] == "data:image/png;base64" and Image.open(
        io.BytesIO(sent(turned)[1])
    ).size == (20, 40)
    with pytest.raises(api.CallFailed, match="c.jpg"):
        api.data_url(broken)
    with FakeOpenAI(echo) as server:
        client = client_of(server)
        with ask.AppendFile(tmp_path / "o.jsonl") as out:
            assert ask.ask_all(client, [client.job({"id": "x"}, "p", str(plain))], out) == 0
    kinds = [part["type"] for part in server.requests[0]["body"]["messages"][0]["content"]]
    assert kinds == ["image_url", "text"]  # image first


def test_torn_line_is_cut_and_only_that(tmp_path, capsys):
    path = tmp_path / "o.jsonl"
    with FakeOpenAI(echo) as server:
        ask_jobs(server, path, count=3)
        whole = path.read_bytes()
        path.write_bytes(whole[:-7])
        _, rows = ask_jobs(server, path, count=3)
    assert "torn" in capsys.readouterr().err
    assert sorted(row["id"] for row in rows) == ["j0", "j1", "j2"] and len(server.requests) == 4
    path.write_bytes(b'{"key": "' + "é".encode() * 100_000)  # nothing but one long torn line
    with ask.AppendFile(path) as out:
        assert not out.done and path.stat().st_size == 0


def test_second_writer_is_refused(tmp_path):
    with ask.AppendFile(tmp_path / "o.jsonl"), pytest.raises(common.InputError, match="another process"):
        ask.AppendFile(tmp_path / "o.jsonl")
    ask.AppendFile(tmp_path / "o.jsonl").handle.close()


def test_key_follows_content(tmp_path):
    client, other = api.ChatClient("m"), api.ChatClient("m", params={"temperature": 1})
    jobs = [
        client.job({"id": "a"}, "p"),
        client.job({"id": "b"}, "p"),
        client.job({"id": "a"}, "q"),
        other.job({"id": "a"}, "p"),
    ]
    assert len({job.key for job in jobs}) == 4
    assert client.job({"id": "a"}, "p") == jobs[0]


def test_no_key_is_one_line(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(common.Stopped, match="OPENAI_API_KEY"):
        api.ChatClient.require_key()


def test_chat_alone():
    async def one(server):
        async with client_of(server) as client:
            return await client.chat("hello", n=2)

    with FakeOpenAI(echo) as server:
        reply = asyncio.run(one(server))
    assert [choice.text for choice in reply.choices] == ["hello/0", "hello/1"] and reply.model == "fake-1"


SCRIPT = """
import sys, common
from lib import api, ask
client = api.ChatClient("m", sys.argv[1], concurrency=8, timeout=2, price=(1, 1))
client.backoff = 0.02
jobs = [client.job({"id": f"j{i}"}, f"p{i}", None, 1) for i in range(int(sys.argv[3]))]
@common.exit_codes
def main(args):
    with ask.AppendFile(sys.argv[2]) as out:
        return 1 if ask.ask_all(client, jobs, out) else 0
main(None)
"""


def start(server, path, count):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, server.url, str(path), str(count)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "gave up waiting"
        time.sleep(0.01)


def test_first_interrupt_drains(tmp_path):
    with FakeOpenAI(echo, latency=0.3) as server:
        process = start(server, tmp_path / "o.jsonl", 500)
        wait_for(lambda: server.in_flight == 8)
        process.send_signal(signal.SIGINT)
        message = process.communicate(timeout=30)[1]
    rows = [row for _, row in data.read_jsonl(tmp_path / "o.jsonl")]
    assert process.returncode == 3 and "interrupted" in message and "Traceback" not in message
    assert len(rows) == len(server.requests) and all(request["answered"] for request in server.requests)


def test_second_interrupt_ends(tmp_path):
    with FakeOpenAI(echo, lambda number: "hang") as server:
        process = start(server, tmp_path / "o.jsonl", 500)
        wait_for(lambda: server.in_flight == 8)
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        message = process.communicate(timeout=30)[1]
    assert process.returncode == 3 and "Traceback" not in message, message


def test_kills_and_faults_lose_nothing(tmp_path):
    """500 calls, every fifth at fault, three SIGKILLs: each key once, paid twice ≤ in flight at the kills."""
    names = [*RETRIED, "429", "429-ms"]
    with FakeOpenAI(
        echo, lambda i: names[i // 5 % len(names)] if i % 5 == 0 else None, latency=0.02
    ) as server:
        for goal in (100, 200, 300):
            process = start(server, tmp_path / "o.jsonl", 500)
            wait_for(lambda goal=goal: sum(request["answered"] for request in server.requests) >= goal)
            os.kill(process.pid, signal.SIGKILL)
            process.communicate(timeout=30)
        process = start(server, tmp_path / "o.jsonl", 500)  # to the end
        message = process.communicate(timeout=120)[1]
    assert process.returncode == 0, message
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert Counter(row["id"] for row in rows) == {f"j{i}": 1 for i in range(500)}
    assert all(row["response"] == f"p{row['id'][1:]}/0" and row["status"] == "ok" for row in rows)
    paid = Counter(request["prompt"] for request in server.requests if request["answered"])
    assert sum(paid.values()) - 500 <= 3 * 8
