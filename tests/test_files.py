"""Nothing of the user's is destroyed or shown: files, keys, servers as they are found."""

import os
import resource
import shutil
import subprocess
import sys

import pytest
from conftest import DATA, needs_data
from fake_openai import FakeOpenAI
from stages import KEY, ROOT, distil, rows_of, run, teacher

import common
from lib import answers, api, ask, server
from lib import data as files


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -------------------------------------------------------------------------------- files


def spellings(path):
    """Other names of the same file: through the folder, a symlink, a hard link."""
    link, hard = path.with_name("link.jsonl"), path.with_name("hard.jsonl")
    link.symlink_to(path)
    os.link(path, hard)
    return [path, path.parent / ".." / path.parent.name / path.name, link, hard]


def test_an_output_that_is_an_input_is_refused(folder):
    with FakeOpenAI(teacher()) as fake:
        url = ("--base-url", fake.url)
        distil(folder, fake)
        asked = len(fake.requests)
        for script, option, path in (
            ("01_distill.py", "--data", folder / "train.jsonl"),
            ("02_filter.py", "--cot", folder / "cot.jsonl"),
        ):
            before = contents(folder)
            for out in spellings(path):
                done = run(script, option, path, "--out", out, *url)
                assert done.returncode == 2 and "it is an input" in done.stderr, done.stderr
                assert len(done.stderr.splitlines()) == 1
            (folder / "link.jsonl").unlink()
            (folder / "hard.jsonl").unlink()
            assert contents(folder) == before
        # a side file that is an input: 02 would write its rejected rows over its own input
        shutil.copy(folder / "cot.jsonl", folder / "x.rejected.jsonl")
        before = contents(folder)
        done = run("02_filter.py", "--cot", folder / "x.rejected.jsonl", "--out", folder / "x.jsonl", *url)
        assert done.returncode == 2 and "it is an input" in done.stderr
    assert contents(folder) == before and len(fake.requests) == asked


@needs_data
def test_the_real_release_is_not_emptied(tmp_path):
    """One line of JSON without a line break at its end, which looks like a torn line."""
    release = tmp_path / "test.json"
    shutil.copy(DATA / "jmere" / "test.json", release)
    before = release.read_bytes()
    assert not before.endswith(b"\n")
    for options in ([], ["--out", release]):
        out = tmp_path / "other.json"
        shutil.copy(release, out)
        done = run(
            "01_distill.py", "--data", release, "--out", out, *options, "--base-url", "http://127.0.0.1:9/v1"
        )
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        assert release.read_bytes() == out.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        b"id,text\n1,hello\n",
        b'{"id": "a", "text": "a row of mine"}\n',
        b'{"id": "a", "text": "a row of mine, without an end"}',
        b'{"id": "a", "text": "cut o',
        b"[1, 2]\n",
        b"\xff\xfe binary \x00",
        b'{"key": "ours", "usage": null}\n{"id": "not ours"}\n',
    ],
)
def test_a_file_that_is_not_ours_is_refused(folder, content):
    out = folder / "mine.jsonl"
    out.write_bytes(content)
    for command in (
        ("01_distill.py", "--data", folder / "train.jsonl"),
        ("02_filter.py", "--cot", folder / "train.jsonl"),
    ):
        done = run(*command, "--out", out, "--base-url", "http://127.0.0.1:9/v1")
        assert done.returncode == 2 and "mine.jsonl" in done.stderr and len(done.stderr.splitlines()) == 1
        assert out.read_bytes() == content


def test_files_of_the_other_stages_are_refused(folder):
    with FakeOpenAI(teacher()) as fake:
        url = ("--base-url", fake.url)
        distil(folder, fake)
        run("02_filter.py", "--cot", folder / "cot.jsonl", "--out", folder / "sft.jsonl", *url)
        shutil.copy(folder / "cot.jsonl", folder / "paid.jsonl")
        before, asked = contents(folder), len(fake.requests)
        for command in (
            (
                "02_filter.py",
                "--cot",
                folder / "cot.jsonl",
                "--out",
                folder / "paid.jsonl",
            ),  # 20 paid chains → 4 rows
            ("01_distill.py", "--data", folder / "train.jsonl", "--out", folder / "sft.jsonl"),
            ("01_distill.py", "--data", folder / "train.jsonl", "--out", folder / "sft.score.jsonl"),
        ):
            done = run(*command, *url)
            assert done.returncode == 2 and "choose another --out" in done.stderr, done.stderr
        assert contents(folder) == before and len(fake.requests) == asked
        again = run("02_filter.py", "--cot", folder / "cot.jsonl", "--out", folder / "sft.jsonl", *url)
        assert again.returncode == 0 and len(fake.requests) == asked  # its own output it may write again


@pytest.mark.parametrize(
    "side, script",
    [(".errors.jsonl", "01"), (".stats.json", "01"), (".card.md", "01"), (".batches.json", "01"),
     (".unclaimed.jsonl", "01"), (".rejected.jsonl", "02"), (".stats.json", "02"), (".card.md", "02"),
     (".score.errors.jsonl", "02"), (".report.html", "02")],
)  # fmt: skip
def test_side_files_that_are_not_ours_are_refused(folder, side, script):
    with FakeOpenAI(teacher()) as fake:
        url = ("--base-url", fake.url)
        distil(folder, fake)
        asked = len(fake.requests)
        mine = folder / f"new{side}"
        mine.write_text("my own notes\n")
        command = ["01_distill.py", "--data", folder / "train.jsonl"]
        if script == "02":
            command = ["02_filter.py", "--cot", folder / "cot.jsonl", "--report"]
        done = run(*command, "--out", folder / "new.jsonl", *url)
    assert done.returncode == 2 and mine.name in done.stderr and len(done.stderr.splitlines()) == 1
    assert mine.read_text() == "my own notes\n" and len(fake.requests) == asked
    assert not (folder / "new.jsonl").exists()


def test_side_files_follow_the_whole_name(folder):
    with FakeOpenAI(teacher()) as fake:
        url = ("--base-url", fake.url)
        distil(folder, fake)
        for name in ("sft-0.7", "sft-0.9"):
            done = run("02_filter.py", "--cot", folder / "cot.jsonl", "--out", folder / name, *url)
            assert done.returncode == 0, done.stderr
            sides = {path.name for path in folder.glob(f"{name}*")}
            assert sides == {
                name + ending
                for ending in (
                    "",
                    ".reprediction.jsonl",
                    ".score.jsonl",
                    ".rejected.jsonl",
                    ".stats.json",
                    ".card.md",
                )
            }
        done = run("02_filter.py", "--cot", folder / "cot.jsonl", "--out", folder / "sft-0.7.jsonl", *url)
        assert (
            done.returncode == 2 and "sft-0.7.stats.json" in done.stderr
        )  # it would share them with sft-0.7


@pytest.mark.parametrize("out", ["/dev/null", "/dev/full", ".", "train.jsonl/x.jsonl", "pipe"])
def test_what_cannot_be_an_output_is_refused_before_any_call(folder, out):
    os.mkfifo(folder / "pipe")
    done = run(
        "01_distill.py",
        "--data",
        folder / "train.jsonl",
        "--out",
        folder / out,
        "--base-url",
        "http://127.0.0.1:9",
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr


def test_only_our_own_torn_line_is_cut(tmp_path, capsys):
    path = tmp_path / "o.jsonl"
    with ask.AppendFile(path) as out:
        out.append([{"key": f"k{i}", "usage": None, "text": "é\u2028"} for i in range(3)])
    whole = path.read_bytes()
    first_two = b"".join(whole.splitlines(keepends=True)[:2])
    for keep in (len(whole) - 2, len(whole) - 7, len(first_two) + 1):
        path.write_bytes(whole[:keep])
        with ask.AppendFile(path) as out:
            assert out.done == {"k0": 1, "k1": 1}
        assert path.read_bytes() == first_two
        assert "cut a torn last line" in capsys.readouterr().err
    path.write_bytes(whole[:-1])  # a whole row that lacks its line break alone is a row
    with ask.AppendFile(path) as out:
        assert out.done == {"k0": 1, "k1": 1, "k2": 1}
    assert path.read_bytes() == whole
    path.write_bytes(b'{"key": "' + "é".encode() * 100_000)  # nothing but one long torn line
    with ask.AppendFile(path) as out:
        assert not out.done and path.stat().st_size == 0
    for foreign in (b'{"id": "a"', b'{"key": 3, "x": 1}', b"text", b'{"id": "a", "key": 1}'):
        path.write_bytes(foreign)
        with pytest.raises(common.InputError, match="did not write"):
            ask.AppendFile(path)
        assert path.read_bytes() == foreign


def test_second_writer_is_refused(tmp_path):
    with ask.AppendFile(tmp_path / "o.jsonl"), pytest.raises(common.InputError, match="another process"):
        ask.AppendFile(tmp_path / "o.jsonl")
    ask.AppendFile(tmp_path / "o.jsonl").handle.close()


def test_a_file_system_without_locks_works(tmp_path, monkeypatch, capsys):
    def no_locks(*args):
        raise OSError(answers.errno.ENOLCK, "no locks")

    monkeypatch.setattr(answers.fcntl, "flock", no_locks)
    with ask.AppendFile(tmp_path / "o.jsonl") as out:
        out.append([{"key": "k"}])
    assert "no file locks" in capsys.readouterr().err


# -------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("key", [f"{KEY}\n", f" {KEY}\r\n", f"{KEY}\t"])
def test_a_key_with_a_line_break_at_its_end_is_stripped(folder, key):
    with FakeOpenAI(teacher()) as fake:
        done = run("01_distill.py", "--data", folder / "train.jsonl", "--out", folder / "c.jsonl",
                   "--base-url", fake.url, key=key)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {request["headers"]["authorization"] for request in fake.requests} == {f"Bearer {KEY}"}
    assert not any(KEY.encode() in content for content in contents(folder).values())
    assert KEY not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "key", [f"{KEY}\nsecond", "“sk-secret-1234567890”", "…", "sk-…", f"'{KEY}'", "sk secret", "кл"]
)
def test_what_is_no_key_is_refused_before_the_first_call(folder, key):
    with FakeOpenAI(teacher()) as fake:
        done = run("01_distill.py", "--data", folder / "train.jsonl", "--out", folder / "c.jsonl",
                   "--base-url", fake.url, key=key)  # fmt: skip
    assert done.returncode == 3 and len(done.stderr.splitlines()) == 1
    assert "OPENAI_API_KEY" in done.stderr and "secret" not in done.stderr
    assert not fake.requests and not fake.others and not (folder / "c.jsonl").exists()


def test_the_key_stands_in_no_message_file_or_answer(folder):
    """A server that repeats the request's headers in errors, answers and everywhere else."""

    def tell(body, prompt):
        seen = str(fake.requests[-1]["headers"])
        if "tweet 0" in prompt:
            return 400, {}, {"error": {"message": f"bad header {seen}", "code": seen}}
        if "tweet 1" in prompt:
            return 500, {}, seen.encode()
        choice = {"message": {"content": seen}, "finish_reason": seen}
        return 200, {}, {"choices": [choice], "model": seen}

    with FakeOpenAI(tell) as fake:
        done = run("01_distill.py", "--data", folder / "train.jsonl", "--out", folder / "c.jsonl", "--n", 1,
                   "--base-url", fake.url, "--header", f"x-api-key=header-{KEY}", "--header", "x-title=Jo",
                   key=KEY)  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert len(rows_of(folder / "c.jsonl")) == 2 and len(rows_of(folder / "c.errors.jsonl")) == 2
    assert KEY not in done.stdout + done.stderr
    assert not any(KEY.encode() in content for content in contents(folder).values())


def test_key_of_another_variable(folder):
    with FakeOpenAI(teacher()) as fake:
        command = (
            "01_distill.py",
            "--data",
            folder / "train.jsonl",
            "--out",
            folder / "c.jsonl",
            "--base-url",
            fake.url,
        )
        done = run(*command, "--key-env", "OTHER_KEY", key=KEY)
        assert done.returncode == 3 and "OTHER_KEY is not set" in done.stderr
        done = run(*command, "--key-env", KEY, key=KEY)  # the key itself by mistake
        assert done.returncode == 2 and KEY not in done.stderr
        done = run(*command, "--key-env", "OTHER_KEY", key=KEY, OTHER_KEY="other-key")
    assert done.returncode == 0
    assert {request["headers"]["authorization"] for request in fake.requests} == {"Bearer other-key"}


def test_no_key_goes_to_another_server(folder):
    with FakeOpenAI(teacher()) as fake, FakeOpenAI(teacher()) as judge:
        url = ("--base-url", fake.url, "--header", "x-token=of-the-first")
        run("01_distill.py", "--data", folder / "train.jsonl", "--out", folder / "cot.jsonl", *url, key=KEY)
        command = ("02_filter.py", "--cot", folder / "cot.jsonl", "--out", folder / "sft.jsonl", *url)
        command += ("--judge-base-url", judge.url, "--judge-model", "j")
        done = run(*command, key=KEY)
        assert done.returncode == 2 and "--judge-key-env" in done.stderr and not judge.requests
        options = ("--judge-param", "temperature=0", "--judge-param", "seed=3")
        done = run(*command, "--judge-key-env", "JUDGE_KEY", *options, key=KEY, JUDGE_KEY="key-of-the-judge")
        assert done.returncode == 0, done.stderr
        redirecting = FakeOpenAI(
            lambda body, prompt: (307, {"location": f"{judge.url}/chat/completions"}, b"")
        )
        asked = len(judge.requests)
        with redirecting as third:
            done = run("01_distill.py", "--data", folder / "train.jsonl", "--out", folder / "r.jsonl",
                       "--base-url", third.url, key=KEY)  # fmt: skip
        assert done.returncode == 3 and "sends on to" in done.stderr and len(judge.requests) == asked
    everything = str([request["headers"] for request in judge.requests]) + str(judge.others)
    assert judge.requests and "key-of-the-judge" in everything
    assert KEY not in everything and "of-the-first" not in everything
    assert "key-of-the-judge" not in str([request["headers"] for request in fake.requests])
    body = judge.requests[0]["body"]
    assert (body["model"], body["temperature"], body["seed"]) == ("j", 0, 3)
    stats = (folder / "sft.stats.json").read_text()
    assert f'"server": "{fake.url}"' in stats and f'"judge_server": "{judge.url}"' in stats
    assert {row["server"] for row in rows_of(folder / "sft.score.jsonl")} == {judge.url}


# -------------------------------------------------------------------------------- servers


def test_a_url_with_a_query_and_a_header_that_brings_the_key(folder):
    with FakeOpenAI(teacher()) as fake:
        url = f"{fake.url}/openai/deployments/gpt-4o?api-version=2024-10-21"
        done = run("01_distill.py", "--data", folder / "train.jsonl", "--out", folder / "c.jsonl",
                   "--base-url", url, "--header", f"api-key={KEY}", key=None)  # fmt: skip
    assert done.returncode == 0, done.stderr
    request = fake.requests[0]
    assert request["path"] == "/v1/openai/deployments/gpt-4o/chat/completions?api-version=2024-10-21"
    assert request["headers"]["api-key"] == KEY and "authorization" not in request["headers"]
    shown = f"{fake.url}/openai/deployments/gpt-4o"
    assert {row["server"] for row in rows_of(folder / "c.jsonl")} == {shown}
    assert shown in (folder / "c.card.md").read_text() and shown in (folder / "c.stats.json").read_text()
    assert not any(KEY.encode() in content for content in contents(folder).values())


def test_what_of_an_address_is_shown():
    place = server.Server("http://user:pass-word@host:81/v1/?key=secret-in-query&api-version=2")
    assert place.shown == "http://host:81/v1"
    assert place.url("models") == "http://user:pass-word@host:81/v1/models?key=secret-in-query&api-version=2"
    assert place.one_line("a  pass-word\nsecret-in-query") == "a … …"
    assert (
        server.Server("https://host/v1/chat/completions").url("chat/completions")
        == "https://host/v1/chat/completions"
    )


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000/v1",
        "ftp://host/v1",
        "http://",
        "http://host:99999/v1",
        "http://[::1/v1",
        "http://a b/v1",
        "…",
    ],
)
def test_bad_addresses_are_one_line(folder, url):
    done = run(
        "01_distill.py", "--data", folder / "train.jsonl", "--out", folder / "c.jsonl", "--base-url", url
    )
    assert done.returncode == 2 and "--base-url" in done.stderr and len(done.stderr.splitlines()) == 1


def test_proxies(folder):
    """A proxy does not swallow this machine's own servers; a SOCKS proxy without its package is one line."""
    args = ("01_distill.py", "--data", folder / "train.jsonl", "--out", folder / "c.jsonl")
    dead = {
        "HTTP_PROXY": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
        "NO_PROXY": "",
        "no_proxy": "",
    }
    with FakeOpenAI(teacher()) as fake:
        done = run(*args, "--base-url", fake.url, **dead)
        assert done.returncode == 0 and "asked directly" in done.stderr, done.stderr
    for proxy, message in (
        ("socks5://127.0.0.1:9", "SOCKS"),
        ("socks://x", "no address"),
    ):
        done = run(
            *args[:-1],
            folder / "d.jsonl",
            "--base-url",
            "http://192.0.2.1/v1",
            ALL_PROXY=proxy,
            all_proxy=proxy,
        )
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, (
            done.stderr
        )


def test_too_few_open_files(folder):
    def few():
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))

    command = [
        sys.executable,
        ROOT / "01_distill.py",
        "--data",
        folder / "train.jsonl",
        "--out",
        folder / "c.jsonl",
    ]
    command += ["--base-url", "http://127.0.0.1:9/v1", "--concurrency", "400"]
    environment = {**os.environ, "OPENAI_API_KEY": "sk-x"}
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, preexec_fn=few, timeout=60
    )
    assert (
        done.returncode == 2 and "lower --concurrency" in done.stderr and len(done.stderr.splitlines()) == 1
    )


def test_a_latin_1_terminal(folder):
    for script in ("01_distill.py", "02_filter.py"):
        assert run(script, "--help", PYTHONIOENCODING="latin-1").returncode == 0
    with FakeOpenAI(teacher()) as fake:
        done = run("01_distill.py", "--data", folder / "train.jsonl", "--out", folder / "c.jsonl",
                   "--base-url", fake.url, PYTHONIOENCODING="latin-1")  # fmt: skip
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "args, message",
    [
        (["--limit", "-1"], "--limit"), (["--limit", "0"], "--limit"), (["--price", "-1", "2"], "--price"),
        (["--price", "nan", "2"], "--price"), (["--timeout", "0"], "--timeout"),
        (["--budget", "inf"], "--budget"),
        (["--concurrency", "0"], "--concurrency"), (["--n", "0"], "--n"),
        (["--temperature", "-1"], "--temperature"),
        (["--param", "model=x"], "--param model"), (["--param", "messages=[]"], "--param messages"),
        (["--param", "n=3"], "--param n"), (["--param", "stream=true"], "--param stream"),
        (["--param", "temperature=1"], "--temperature"), (["--param", "x"], "--param"),
        (["--retry", "refusals"], "--retry refusals"), (["--retry", ","], "--retry"),
        (["--header", "secret-value"], "--header"), (["--header", "a=b\nc"], "--header"),
        (["--budget", "3"], "--price"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_line(folder, args, message):
    done = run("01_distill.py", "--data", folder / "train.jsonl", "--out", folder / "c.jsonl", *args)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert "secret-value" not in done.stderr and not (folder / "c.jsonl").exists()


def test_params_are_sent_as_given():
    class Args:
        param = ["a=1", "b=word", 'c={"d": [null]}', "e="]
        temperature, max_tokens = 0.0, 5

    assert api.request_params(Args) == {
        "a": 1, "b": "word", "c": {"d": [None]}, "e": "", "temperature": 0.0, "max_tokens": 5
    }  # fmt: skip


def test_jsonl_line_breaks_of_tweets_survive(tmp_path):
    with ask.AppendFile(tmp_path / "o.jsonl") as out:
        out.append([{"key": "k", "text": "a\u2028b\x85c\nd", "half": "\ud83d"}])
    ((_, row),) = files.read_jsonl(tmp_path / "o.jsonl")
    assert row["text"] == "a\u2028b\x85c\nd"
