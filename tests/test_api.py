"""The chat client against a real HTTP server on loopback that misbehaves: each row of the table of SPEC §8.

python -m pytest tests/test_api.py -k "fault" -s     # prints the fault table as it was seen
"""

import asyncio
import base64
import io
import json
import os
import signal
import socket
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
from lib.reply import CallFailed

ROOT = Path(__file__).parent.parent
KEY = "sk-secret-1234567890"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(api.ChatClient, "backoff", 0.002)
    monkeypatch.setattr(api.ChatClient, "longest_backoff", 0.01)
    monkeypatch.setattr(api.ChatClient, "clamp", 0.05)


def echo(body, prompt):
    return [f"{prompt}/{i}" for i in range(body.get("n", 1))]


def client_of(server, **options):
    return api.ChatClient("m", server.url, **{"concurrency": 4, "timeout": 5.0, **options})


def ask_jobs(server, path, count=1, n=1, client=None, batch=None, must_differ=False, **options):
    """Ask `count` jobs → (number failed, rows)."""
    client = client or client_of(server, **options)
    jobs = [client.job({"id": f"j{i}"}, f"p{i}", None, n) for i in range(count)]
    with ask.AppendFile(path) as out:
        failed = ask.ask_all(client, jobs, out, batch=batch, must_differ=must_differ)
    return failed, rows_of(path)


def rows_of(path):
    return [row for _, row in data.read_jsonl(path)] if path.exists() and path.stat().st_size else []


# -------------------------------------------------------------------------------- the fault table

ONCE, LATER, OUTAGE, ALWAYS, FROM_4TH = "once", "later", "30 times", "always", "from the 4th on"
WHEN = {
    ONCE: lambda i: i == 0,
    LATER: lambda i: i == 3,
    OUTAGE: lambda i: 3 <= i < 33,
    ALWAYS: lambda i: True,
    FROM_4TH: lambda i: i >= 3,
}
DONE = ""
# Ten rows are asked, one at a time: (fault, when, requests, rows stored, rows failed, how it ends).
FAULTS = [
    *((fault, ONCE, 11, 10, 0, DONE) for fault in (
        "408", "409", "500", "502", "503", "reset", "truncated", "html", "empty", "no-choices", "list",
        "null-message", "finish-error", "odd-error", "200-error", "200-limit", "hang", "drip", "429",
        "429-ms", "429-s", "429-day", "429-gemini")),
    ("nothing-left", ONCE, 10, 10, 0, DONE),
    ("503", OUTAGE, 40, 10, 0, DONE),
    ("502", OUTAGE, 40, 10, 0, DONE),
    ("429", OUTAGE, 40, 10, 0, DONE),
    ("500", OUTAGE, 38, 8, 2, DONE),
    ("503", FROM_4TH, None, 3, 0, "outage"),
    ("429", ALWAYS, None, 0, 0, "rate limit"),
    ("429-day", FROM_4TH, 5, 3, 0, "rate limit"),
    ("500", ALWAYS, 60, 0, 10, "10 rows failed in succession"),
    ("reset", ALWAYS, 60, 0, 10, "10 rows failed in succession"),
    ("html", ALWAYS, 60, 0, 10, "10 rows failed in succession"),
    *((fault, LATER, 10, 9, 1, DONE) for fault in ("400", "413", "422", "403", "404")),
    ("400-filter", LATER, 10, 10, 0, DONE),
    ("400", ALWAYS, 10, 0, 10, "10 rows failed in succession"),
    *((fault, ONCE, 1, 0, 0, "check OPENAI_API_KEY") for fault in ("401", "200-auth", "400-key")),
    *((fault, ONCE, 1, 0, 0, "quota or credit") for fault in ("402", "429-quota", "400-credit")),
    ("403", ONCE, 1, 0, 0, "this key may not"),
    ("404", ONCE, 1, 0, 0, "check --model"),
    ("401", LATER, 4, 3, 0, "check OPENAI_API_KEY"),
    ("404-model", LATER, 4, 3, 0, "does not exist"),
    ("301", ONCE, 1, 0, 0, "elsewhere.example"),
]  # fmt: skip
SEEN = []


@pytest.mark.parametrize("fault, when, requests, stored, failed, end", FAULTS)
def test_fault(tmp_path, fault, when, requests, stored, failed, end):
    path = tmp_path / "o.jsonl"
    ended = DONE
    with FakeOpenAI(echo, lambda i: fault if WHEN[when](i) else None) as server:
        client = client_of(
            server, concurrency=1, timeout=0.5 if fault in ("hang", "drip") else 60, patience=1.0
        )
        try:
            ask_jobs(server, path, count=10, client=client)
        except common.Stopped as stop:
            ended = str(stop)
    rows = rows_of(path)
    errors = rows_of(tmp_path / "o.errors.jsonl")
    SEEN.append(
        (fault, when, len(server.requests), len(rows), len(errors), ended.partition(";")[0][:60] or "done")
    )
    assert (len(rows), len(errors)) == (stored, failed)
    assert requests is None or len(server.requests) == requests
    assert end in ended and (end or not ended)
    assert len(ended.splitlines()) <= 1 and KEY not in ended
    assert {row["id"]: row["response"] for row in rows if row["status"] == "ok"} == {
        row["id"]: f"p{row['id'][1:]}/0" for row in rows if row["status"] == "ok"
    }
    with FakeOpenAI(echo) as server:  # what is missing is asked again by the same command
        assert ask_jobs(server, path, count=10)[0] == 0
        assert len(server.requests) == 10 - stored
    assert not (tmp_path / "o.errors.jsonl").exists()


def test_print_the_fault_table():
    """Ten rows asked one at a time, as seen above."""
    print(f"\n{'fault':<14}{'when':<17}{'requests':>8}{'rows':>6}{'failed':>8}  end")
    for fault, when, requests, rows, failed, end in SEEN:
        print(f"{fault:<14}{when:<17}{requests:>8}{rows:>6}{failed:>8}  {end}")


def test_timeout_is_wall_clock_and_gives_up(tmp_path):
    with FakeOpenAI(echo, lambda i: "drip") as server:
        failed, rows = ask_jobs(server, tmp_path / "o.jsonl", timeout=0.1)
    (error,) = rows_of(tmp_path / "o.errors.jsonl")
    assert (failed, rows, len(server.requests)) == (1, [], 6)
    assert error["error"] == "no answer within 0.1 s, 6 times"


def test_nobody_there(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    client = api.ChatClient("m", url, concurrency=4)
    with pytest.raises(common.Stopped, match=f"nobody answers at {url}.*check --base-url"):
        ask_jobs(None, tmp_path / "o.jsonl", count=3, client=client)


def test_a_bad_row_in_good_company_is_no_outage(tmp_path):
    """A row that always gives 503 fails after six tries, while the others get their answers."""

    def answer(body, prompt):
        return (503, {}, b"upstream broke") if prompt == "p3" else echo(body, prompt)

    with FakeOpenAI(answer, latency=0.01) as server:
        failed, rows = ask_jobs(server, tmp_path / "o.jsonl", count=200, concurrency=8)
    tried = sum(request["prompt"] == "p3" for request in server.requests)
    assert failed == 1 and len(rows) == 199 and tried >= 6


def test_a_server_that_restarts_is_waited_for(tmp_path):
    path = tmp_path / "o.jsonl"
    with FakeOpenAI(echo, latency=0.05) as first:
        process = start(first, path, 40)
        wait_for(lambda: len(rows_of(path)) >= 8)
        port = first.port
    wait_for(lambda: refused(port))
    second = FakeOpenAI(echo)
    second.port = port
    with second:
        message = process.communicate(timeout=60)[1]
    assert process.returncode == 0, message
    assert len(rows_of(path)) == 40


def refused(port):
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except ConnectionRefusedError:
        return True
    return False


# -------------------------------------------------------------------------------- waiting


def test_gate_holds_all_workers(tmp_path, monkeypatch):
    """After one 429 with 0.3 s nobody asks for 0.3 s; retry-after-ms wins over retry-after."""
    monkeypatch.setattr(api.ChatClient, "clamp", 60)
    with FakeOpenAI(echo, ["429-ms"], latency=0.02) as server:
        assert ask_jobs(server, tmp_path / "o.jsonl", count=12)[0] == 0
    times = [request["time"] for request in server.requests]
    after = [moment for moment in times if moment > times[0] + 0.25]
    assert (
        len(times) == 13 and len(after) >= 13 - 2 * 4
    )  # the four workers may have sent twice before they knew


def test_gate_closes_before_the_limit_is_hit(tmp_path, monkeypatch):
    monkeypatch.setattr(api.ChatClient, "clamp", 60)
    with FakeOpenAI(echo, ["nothing-left"]) as server:
        assert ask_jobs(server, tmp_path / "o.jsonl", count=3, concurrency=1)[0] == 0
    times = [request["time"] for request in server.requests]
    assert times[1] - times[0] > 0.29


def test_a_long_wait_is_believed_when_it_is_told_twice(tmp_path):
    """retry-after of a day: the first is cut to the clamp; the second passes --patience."""
    with FakeOpenAI(echo, ["429-day"]) as server:
        assert ask_jobs(server, tmp_path / "o.jsonl")[0] == 0
    with FakeOpenAI(echo, ["429-day"] * 2) as server:
        with pytest.raises(common.Stopped, match="86400 s more are asked for, --patience is 1800 s"):
            ask_jobs(server, tmp_path / "p.jsonl")
        assert len(server.requests) == 2


def test_the_screen_says_what_it_waits_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(api.ChatClient, "clamp", 1.0)
    with FakeOpenAI(echo, ["429-day"]) as server:
        ask_jobs(server, tmp_path / "o.jsonl")
    assert "waits 1 s, rate limit: 429 Rate limit reached" in capsys.readouterr().err


# -------------------------------------------------------------------------------- several candidates


def test_rest_of_n_is_asked_for(tmp_path):
    with FakeOpenAI(lambda body, prompt: echo(body, prompt)[:2]) as server:
        _, rows = ask_jobs(server, tmp_path / "o.jsonl", n=5)
    assert [request["body"].get("n") for request in server.requests] == [5, 3, None]
    assert [row["candidate"] for row in rows] == [0, 1, 2, 3, 4]
    with FakeOpenAI(lambda body, prompt: ["a"] * 9) as server:  # more than asked for
        assert len(ask_jobs(server, tmp_path / "p.jsonl", n=5)[1]) == 5


@pytest.mark.parametrize("status", [400, 422])
def test_a_server_that_refuses_n_is_asked_one_by_one(tmp_path, capsys, status):
    def answer(body, prompt):
        if "n" in body:
            return status, {}, {"error": {"message": "n must be 1"}}
        return [f"{prompt} {len(server.requests)}"]

    with FakeOpenAI(answer) as server:
        failed, rows = ask_jobs(server, tmp_path / "o.jsonl", count=4, n=3, concurrency=1)
    assert failed == 0 and len(rows) == 12 and len(server.requests) == 13
    assert Counter((row["id"], row["candidate"]) for row in rows) == Counter(
        {(f"j{i}", k): 1 for i in range(4) for k in range(3)}
    )
    assert capsys.readouterr().err.count("refuses n") == 1


def test_a_bad_row_is_no_refusal_of_n(tmp_path, capsys):
    def answer(body, prompt):
        return (400, {}, {"error": {"message": "bad image"}}) if prompt == "p1" else echo(body, prompt)

    with FakeOpenAI(answer) as server:
        failed, rows = ask_jobs(server, tmp_path / "o.jsonl", count=3, n=2, concurrency=1)
    assert failed == 1 and len(rows) == 4 and len(server.requests) == 3
    assert "refuses n" not in capsys.readouterr().err
    with FakeOpenAI(answer) as server:  # the bad row comes first: it is asked once more, without n
        client = client_of(server, concurrency=1)
        jobs = [client.job({"id": f"k{i}"}, f"p{i}", None, 2) for i in (1, 0, 2)]
        with ask.AppendFile(tmp_path / "p.jsonl") as out:
            assert ask.ask_all(client, jobs, out) == 1
    assert [request["body"].get("n") for request in server.requests] == [2, None, 2, 2]


def test_a_given_seed_varies(tmp_path, capsys):
    def by_seed(body, prompt):
        return [f"{prompt} {body.get('seed')}"]

    with FakeOpenAI(by_seed) as server:
        _, rows = ask_jobs(server, tmp_path / "o.jsonl", n=3, params={"seed": 7})
    assert [row["response"] for row in rows] == ["p0 7", "p0 8", "p0 9"]
    assert [row["params"] for row in rows] == [{"seed": 7}, {"seed": 8}, {"seed": 9}]
    assert "equal" not in capsys.readouterr().err


def test_equal_candidates_are_counted_and_said(tmp_path, capsys):
    with FakeOpenAI(lambda body, prompt: [prompt] * body.get("n", 1)) as server:
        ask_jobs(server, tmp_path / "o.jsonl", count=3, n=5, must_differ=True)
        assert "3 of 3 examples: all candidates are equal" in capsys.readouterr().err
        with pytest.raises(
            common.Stopped, match="each of the first examples has equal candidates, such as: 'p0'"
        ):
            ask_jobs(server, tmp_path / "p.jsonl", count=30, n=5, must_differ=True, concurrency=1)
    assert len(server.requests) == 3 + 4  # twenty answers


def test_statuses(tmp_path):
    def choice(finish="stop", **message):
        return {"finish_reason": finish, "message": {"role": "assistant", "content": None, **message}}

    def odd(body, prompt):
        return [
            choice(refusal="I will not"),
            choice("content_filter"),
            choice("length", content="half a"),
            "I'm sorry, but I can't help with that.",
            choice(content=[{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]),
            choice(reasoning_content="I think and think"),
        ]

    with FakeOpenAI(odd) as server:
        _, rows = ask_jobs(server, tmp_path / "o.jsonl", n=6)
    expected = ["refusal", "content_filter", "length", "refusal", "ok", "empty"]
    assert [row["status"] for row in rows] == expected
    assert [row["response"] for row in rows][:5:2] == ["I will not", "half a", "in parts"]
    with FakeOpenAI(echo, ["400-filter"]) as server:
        failed, rows = ask_jobs(server, tmp_path / "p.jsonl", n=5)
    assert failed == 0 and [row["status"] for row in rows] == ["content_filter"] * 5


# -------------------------------------------------------------------------------- what is stored


def test_row_tells_where_it_comes_from(tmp_path):
    with FakeOpenAI(echo) as server:
        _, (row,) = ask_jobs(server, tmp_path / "o.jsonl", params={"temperature": 0.5})
    assert server.requests[0]["body"].keys() == {"model", "messages", "temperature"}
    assert row["model"] == "m" and row["model_answered"] == "fake-1" and row["params"] == {"temperature": 0.5}
    assert row["usage"] == {"prompt_tokens": 100, "completion_tokens": 10, "choices": 1}
    assert row["finish_reason"] == "stop" and row["server"] == server.url
    assert row["prompt_hash"] and row["image_hash"] is None


def test_an_answer_without_usage_is_kept_and_paid_for_by_estimate(tmp_path):
    """A null inside usage: the answer counts, once; 40 characters are ten tokens."""

    def answer(body, prompt):
        reply = {"choices": [{"message": {"content": "x" * 40}}], "usage": {"prompt_tokens": None}}
        return 200, {}, reply

    with FakeOpenAI(answer) as server:
        client = client_of(server, price=(0, 1e6), budget=1000)
        _, (row,) = ask_jobs(server, tmp_path / "o.jsonl", client=client)
        assert len(server.requests) == 1 and row["status"] == "ok"
        assert row["usage"] == {"prompt_tokens": 0, "completion_tokens": 10, "estimated": True, "choices": 1}
        assert client.spent == pytest.approx(10)
        again = client_of(server, price=(0, 1e6), budget=1000)
        ask_jobs(server, tmp_path / "o.jsonl", client=again)
    assert again.spent == pytest.approx(10)  # known from the file


def test_budget(tmp_path):
    """A call costs (100 + 10) · 1000 millionths = $0.11: nine fit into $1, in two runs together."""
    with FakeOpenAI(echo, latency=0.02) as server:
        for _ in range(2):
            with pytest.raises(common.Stopped, match="budget"):
                ask_jobs(server, tmp_path / "o.jsonl", count=50, price=(1000, 1000), budget=1.0)
    assert len(server.requests) == 9
    with pytest.raises(common.InputError, match="--price"):
        api.ChatClient("m", budget=1.0)


def test_useless_answers_count_against_the_budget(tmp_path):
    """Broken replies are answered, and perhaps charged: $0.30 each until a price is known."""
    with FakeOpenAI(echo, lambda i: "truncated") as server:
        client = client_of(server, price=(0, 1000), budget=1.0, concurrency=1)
        with pytest.raises(common.Stopped, match="budget"):
            ask_jobs(server, tmp_path / "o.jsonl", count=50, client=client)
    assert (
        client.calls == len(server.requests) == 6
    )  # $0.30 each, and the budget is looked at before each row


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


def test_chat_alone():
    async def one(server):
        async with client_of(server) as client:
            return await client.chat("hello", n=2)

    with FakeOpenAI(echo) as server:
        reply = asyncio.run(one(server))
    assert [choice.text for choice in reply.choices] == ["hello/0", "hello/1"] and reply.model == "fake-1"


# -------------------------------------------------------------------------------- early alarm


@pytest.mark.parametrize(
    "answer, message",
    [
        (lambda body, prompt: ["the same"], "the first 20 answers are all equal: 'the same'"),
        (
            lambda body, prompt: [f"I'm sorry, I can't do {prompt}."],
            "none of the first 20 answers can be used, such as .refusal.: \"I'm sorry, I can",
        ),
    ],
)
def test_twenty_useless_answers_stop(tmp_path, answer, message):
    path = tmp_path / "o.jsonl"
    with FakeOpenAI(answer) as server:
        with pytest.raises(common.Stopped, match=message):
            ask_jobs(server, path, count=60, concurrency=1)
        assert len(server.requests) == 20
        assert ask_jobs(server, path, count=20)[0] == 0 and len(server.requests) == 20
        assert ask_jobs(server, path, count=60)[0] == 0 and len(server.requests) == 60  # all the same
        assert ask_jobs(server, tmp_path / "p.jsonl", count=20)[0] == 0  # nothing left to save: no stop


# -------------------------------------------------------------------------------- the unexpected


def test_an_unexpected_exception_drains_what_is_in_flight(tmp_path):
    """One row whose row function fails: the others are stored, its answer is set aside, and claimed later."""
    path = tmp_path / "o.jsonl"

    def finish(row):
        if row["id"] == "j3":
            raise KeyError("odd")
        return row

    with FakeOpenAI(echo, latency=0.1) as server:
        client = client_of(server, concurrency=16)
        jobs = [client.job({"id": f"j{i}"}, f"p{i}", None, 1) for i in range(100)]
        with ask.AppendFile(path) as out, pytest.raises(common.Stopped, match="unexpected KeyError: 'odd'"):
            ask.ask_all(client, jobs, out, finish)
        paid = sum(request["answered"] for request in server.requests)
        assert len(rows_of(path)) == paid - 1 >= 15
        (error,) = rows_of(tmp_path / "o.errors.jsonl")
        assert error["id"] == "j3" and "raise KeyError" in error["traceback"]
        assert [row["key"] for row in rows_of(tmp_path / "o.unclaimed.jsonl")] == [jobs[3].key]
        assert ask_jobs(server, path, count=100)[0] == 0  # with a row function that works
    assert sum(request["answered"] for request in server.requests) == 100
    assert Counter(row["id"] for row in rows_of(path)) == {f"j{i}": 1 for i in range(100)}
    assert not rows_of(tmp_path / "o.unclaimed.jsonl")


def test_causes_of_failures_are_on_the_screen(tmp_path, capsys):
    def answer(body, prompt):
        return (400, {}, {"error": "image too odd"}) if prompt[1:] in "0369" else echo(body, prompt)

    with FakeOpenAI(answer) as server:
        assert ask_jobs(server, tmp_path / "o.jsonl", count=10, concurrency=1)[0] == 4
    shown = capsys.readouterr().err
    assert "failed, 4 ×: 400 image too odd" in shown and "4 of 10 calls failed" in shown


def test_disk_full_loses_nothing(tmp_path):
    """A file size limit stands for a full disk: what does not fit is kept elsewhere, and that is said."""
    with FakeOpenAI(lambda body, prompt: [f"{prompt} " + "x" * 500], latency=0.05) as server:
        script = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n" + SCRIPT
        process = start(server, tmp_path / "o.jsonl", 60, script, TMPDIR=str(tmp_path))
        message = process.communicate(timeout=60)[1]
    assert process.returncode == 3 and "Traceback" not in message, message
    assert "cannot write" in message.splitlines()[-1]
    (saved,) = tmp_path.glob("jmere-answers-*.jsonl")
    assert str(saved) in message
    paid = sum(request["answered"] for request in server.requests)
    rows = rows_of(tmp_path / "o.jsonl") + rows_of(saved)
    assert len({row["id"] for row in rows}) == len(rows) == paid > len(rows_of(saved)) > 0


SCRIPT = """
import sys, common
from lib import api, ask
api.ChatClient.backoff = 0.02
client = api.ChatClient("m", sys.argv[1], concurrency=8, timeout=20, price=(1, 1))
jobs = [client.job({"id": f"j{i}"}, f"p{i}", None, 1) for i in range(int(sys.argv[3]))]
@common.exit_codes
def main(args):
    with ask.AppendFile(sys.argv[2]) as out:
        return 1 if ask.ask_all(client, jobs, out) else 0
main(None)
"""


def start(server, path, count, script=SCRIPT, **env):
    return subprocess.Popen(
        [sys.executable, "-c", script, server.url, str(path), str(count)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
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
    rows = rows_of(tmp_path / "o.jsonl")
    assert process.returncode == 3 and "Traceback" not in message
    assert "interrupted: finishing 8 calls in flight, at most 20 s" in message
    assert len(rows) == len(server.requests) and all(request["answered"] for request in server.requests)


def test_second_interrupt_ends(tmp_path):
    with FakeOpenAI(echo, lambda number: "hang") as server:
        process = start(server, tmp_path / "o.jsonl", 500)
        wait_for(lambda: server.in_flight == 8)
        process.send_signal(signal.SIGINT)
        said = ""
        while "finishing" not in said:  # the first one is taken
            said += process.stderr.read(1)
        process.send_signal(signal.SIGINT)
        message = process.communicate(timeout=30)[1]
    assert process.returncode == 3 and "Traceback" not in message, message


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
    "200-error",
]


def test_kills_and_faults_lose_nothing(tmp_path):
    """500 calls, every fifth at fault, three SIGKILLs: each key once, paid twice ≤ in flight then."""
    names = [*RETRIED, "429", "429-ms"]
    path = tmp_path / "o.jsonl"
    with FakeOpenAI(
        echo, lambda i: names[i // 5 % len(names)] if i % 5 == 0 else None, latency=0.02
    ) as server:
        for goal in (100, 200, 300):
            process = start(server, path, 500)
            wait_for(lambda goal=goal: sum(request["answered"] for request in server.requests) >= goal)
            os.kill(process.pid, signal.SIGKILL)
            process.communicate(timeout=30)
        process = start(server, path, 500)  # to the end
        message = process.communicate(timeout=120)[1]
    assert process.returncode == 0, message
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert Counter(row["id"] for row in rows) == {f"j{i}": 1 for i in range(500)}
    assert all(row["response"] == f"p{row['id'][1:]}/0" and row["status"] == "ok" for row in rows)
    paid = Counter(request["prompt"] for request in server.requests if request["answered"])
    assert sum(paid.values()) - 500 <= 3 * 8


# -------------------------------------------------------------------------------- images


def sent(path):
    head, _, content = api.data_url(str(path)).decode().partition(",")
    return head, base64.b64decode(content)


def photograph(width, height):
    return Image.merge("RGB", [Image.effect_noise((width, height), 80) for _ in range(3)])


def test_images_travel_as_they_are_where_servers_read_them(tmp_path):
    for name in ("a.jpg", "a.png", "a.webp", "a.gif"):
        Image.new("RGB", (40, 20), "red").save(tmp_path / name)
        kind, content = sent(tmp_path / name)
        assert kind == f"data:image/{name[2:].replace('jpg', 'jpeg')};base64"
        assert content == (tmp_path / name).read_bytes()


def test_photographs_that_must_be_scaled_or_turned_travel_as_jpeg(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # orientation: a quarter turn
    photograph(3000, 2000).save(tmp_path / "large.png")
    photograph(300, 200).save(tmp_path / "turned.jpg", exif=exif)
    photograph(300, 200).save(tmp_path / "camera.tiff")
    for name, size in (("large.png", (2048, 1365)), ("turned.jpg", (200, 300)), ("camera.tiff", (300, 200))):
        kind, content = sent(tmp_path / name)
        with Image.open(io.BytesIO(content)) as image:
            assert (kind, image.format, image.size) == ("data:image/jpeg;base64", "JPEG", size), name
            assert image.getexif().get(274, 1) == 1


def test_drawings_stay_png(tmp_path):
    Image.new("RGB", (4000, 10), "red").save(tmp_path / "wide.png")
    Image.new("RGB", (4, 2)).save(tmp_path / "d.bmp")
    assert [sent(tmp_path / name)[0] for name in ("wide.png", "d.bmp")] == ["data:image/png;base64"] * 2


@pytest.mark.parametrize("name, options", [
    ("a.gif", {}), ("a.webp", {"lossless": True}), ("a.png", {}), ("a.mpo", {"format": "MPO", "quality": 95}),
])  # fmt: skip
def test_of_moving_pictures_the_first_travels(tmp_path, name, options):
    red, blue = Image.new("RGB", (30, 20), "red"), Image.new("RGB", (30, 20), "blue")
    red.save(tmp_path / name, save_all=True, append_images=[blue], **options)
    with Image.open(io.BytesIO(sent(tmp_path / name)[1])) as image:
        red_part, _, blue_part = image.convert("RGB").getpixel((15, 10))
        assert getattr(image, "n_frames", 1) == 1 and red_part > 200 and blue_part < 60


def test_an_unreadable_image_fails_its_row_alone(tmp_path):
    good, broken = tmp_path / "a.jpg", tmp_path / "c.jpg"
    Image.new("RGB", (4, 2)).save(good)
    broken.write_bytes(b"no image")
    with pytest.raises(CallFailed, match="c.jpg"):
        api.data_url(str(broken))
    with FakeOpenAI(echo) as server:
        client = client_of(server)
        jobs = [client.job({"id": path.stem}, "p", str(path)) for path in (good, broken)]
        with ask.AppendFile(tmp_path / "o.jsonl") as out:
            assert ask.ask_all(client, jobs, out) == 1
    kinds = [part["type"] for part in server.requests[0]["body"]["messages"][0]["content"]]
    assert kinds == ["image_url", "text"]  # image first


def test_images_are_encoded_outside_the_event_loop(tmp_path, monkeypatch):
    """While one image is being encoded, the other calls go on."""
    import threading

    Image.new("RGB", (4, 2)).save(tmp_path / "a.bmp")
    release = threading.Event()
    original = api.data_url

    def slow(path):
        assert release.wait(30)
        return original(path)

    monkeypatch.setattr(api, "data_url", slow)
    answered = []

    def answer(body, prompt):
        answered.append(prompt)
        if len(answered) == 5:
            release.set()
        return echo(body, prompt)

    with FakeOpenAI(answer) as server:
        client = client_of(server, concurrency=2)
        jobs = [client.job({"id": "i"}, "with image", str(tmp_path / "a.bmp"))]
        jobs += [client.job({"id": f"j{i}"}, f"p{i}") for i in range(5)]
        with ask.AppendFile(tmp_path / "o.jsonl") as out:
            assert ask.ask_all(client, jobs, out) == 0
    assert answered[-1] == "with image"
