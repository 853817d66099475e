"""An OpenAI-compatible server on loopback answering by rule and misbehaves on order. Standard library only.

with FakeOpenAI(answer, faults=["429", "reset"]) as server: … server.url, server.requests
    answer(body, prompt) → a list of answer texts or choice dicts, one a choice; or (status, headers, body).
    faults: names of FAULTS, one a request, then none; or a function of the request's number → name or None.
"""

import asyncio
import json
import threading

RATE_LIMIT = {"error": {"message": "Rate limit reached", "type": "requests", "code": "rate_limit_exceeded"}}
QUOTA = {"error": {"message": "You exceeded it", "type": "insufficient_quota", "code": "insufficient_quota"}}
FILTER = {"error": {"message": "filtered by policy", "type": None, "code": "content_filter"}}
CREDIT = {"error": {"message": "Your credit balance is too low to access the API"}}
GEMINI = [{"error": {"code": 429, "message": "You exceeded your current quota, please check your plan and "
                     "billing details. Please retry in 0.05s.", "status": "RESOURCE_EXHAUSTED"}}]  # fmt: skip
FAULTS = {  # name: (status, headers, body); the others are written out in _handle
    "429": (429, {}, RATE_LIMIT),
    "429-ms": (429, {"retry-after-ms": "300", "retry-after": "9"}, RATE_LIMIT),
    "429-s": (429, {"retry-after": "0.2"}, RATE_LIMIT),
    "429-day": (429, {"retry-after": "86400"}, RATE_LIMIT),
    "429-quota": (429, {}, QUOTA),
    "429-gemini": (429, {}, GEMINI),
    "400-credit": (400, {}, CREDIT),
    "400-filter": (400, {}, FILTER),
    "400-key": (400, {}, {"error": {"message": "API key not valid. Please pass a valid API key."}}),
    "404-model": (404, {}, {"error": {"message": "The model `m` does not exist"}}),
    "200-error": (200, {}, {"error": {"message": "busy", "code": 502}}),
    "200-auth": (200, {}, {"error": {"message": "no such key", "code": 401}}),
    "200-limit": (200, {}, {"error": {"message": "slow down", "type": "rate_limit_error"}}),
    "301": (301, {"location": "https://elsewhere.example/v1"}, b""),
    "html": (200, {"content-type": "text/html"}, b"<html>Bad gateway</html>"),
    "empty": (200, {}, b""),
    "no-choices": (200, {}, {"choices": [], "model": "fake"}),
    "list": (200, {}, []),
    "null-message": (200, {}, {"choices": [{"message": None}]}),
    "finish-error": (200, {}, {"choices": [{"message": {"content": "half"}, "finish_reason": "error"}]}),
    "odd-error": (500, {}, {"error": {"message": {"a": ["b"]}, "code": ["c"], "type": 7}}),
}
for code in (400, 401, 402, 403, 404, 408, 409, 413, 422):
    FAULTS[str(code)] = (code, {}, {"error": {"message": f"refused with {code}"}})
for code in (500, 502, 503):
    FAULTS[str(code)] = (code, {}, b"upstream broke")


class FakeOpenAI:
    def __init__(self, answer, faults=(), latency=0.0, headers=None):
        self.answer = answer
        self.latency = latency
        self.headers = headers or {}
        self.fault = faults if callable(faults) else dict(enumerate(faults)).get
        self.files = {}
        self.batches = {}
        self.batch_lines = 0
        self.batch_fault = lambda number: None
        self.lose_next_batch_reply = False
        self.requests = []
        self.others = []  # paths of requests that are no chat completion
        self.in_flight = 0
        self.most_in_flight = 0
        self.port = 0

    def __enter__(self):
        started = threading.Event()
        self.thread = threading.Thread(target=asyncio.run, args=(self._serve(started),), daemon=True)
        self.thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *error):
        self.loop.call_soon_threadsafe(self.end.set)
        self.thread.join(10)

    async def _serve(self, started):
        self.loop, self.end = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", self.port, limit=2**20)
        self.port = server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        started.set()
        await self.end.wait()
        server.close()

    async def _connection(self, reader, writer):
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                headers = dict(line.split(": ", 1) for line in head[1:] if ": " in line)
                headers = {name.lower(): value for name, value in headers.items()}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
                try:
                    method, path = head[0].split()[:2]
                    if not await self._handle(method, path, body, headers, writer):
                        break
                finally:
                    self.in_flight -= 1
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client hung up, or the server ends
        finally:
            writer.close()

    async def _handle(self, method, path, raw, headers, writer):
        """Answer one request → whether the connection stays."""
        if "/files" in path or "/batches" in path:
            return await self._batch_api(method, path.partition("/v1")[2].partition("?")[0], raw, writer)
        if not path.partition("?")[0].endswith("/chat/completions"):
            self.others.append((path, headers))
            return await self._send(writer, 404, {}, {"error": {"message": "not here"}})
        body = json.loads(raw)
        prompt = next(part["text"] for part in body["messages"][0]["content"] if part["type"] == "text")
        at = len(self.requests)
        fault = self.fault(at)
        self.requests.append(
            {
                "time": self.loop.time(),
                "path": path,
                "prompt": prompt,
                "body": body,
                "headers": headers,
                "fault": fault,
                "answered": False,
            }
        )
        await asyncio.sleep(self.latency)
        if fault == "reset":
            writer.transport.abort()
            return False
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault in FAULTS:
            return await self._send(writer, *FAULTS[fault])
        reply = self.answer(body, prompt)
        if isinstance(reply, tuple):
            return await self._send(writer, *reply)
        choices = [
            {"index": i, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            if isinstance(text, str)
            else text
            for i, text in enumerate(reply)
        ]
        usage = {"prompt_tokens": 100, "completion_tokens": 10 * len(choices)}
        usage["total_tokens"] = sum(usage.values())
        reply = {"id": f"r{at}", "object": "chat.completion", "model": "fake-1"}
        reply |= {"choices": choices, "usage": usage}
        if fault == "drip":  # bytes keep coming, no read ever times out
            data = json.dumps(reply).encode()
            head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
            writer.write(head % len(data))
            for i in range(len(data)):
                writer.write(data[i : i + 1])
                await writer.drain()
                await asyncio.sleep(0.1)
            return True
        if fault == "truncated":
            return await self._send(writer, 200, {}, json.dumps(reply).encode()[:-40])
        extra = {}
        if fault == "nothing-left":
            extra = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "300ms"}
        await self._send(writer, 200, self.headers | extra, reply)
        self.requests[at]["answered"] = True
        return True

    async def _batch_api(self, method, path, raw, writer):
        """/v1/files and /v1/batches.

        `batch_fault(number of the request line)` → None, "missing", "expired", "cut" (half a line), or one of
        FAULTS.
        """
        kind, _, name = path.strip("/").partition("/")
        if kind == "files" and not name:
            body = raw.partition(b'filename="')[2].partition(b"\r\n\r\n")[2].partition(b"\r\n--")[0]
            name = f"file-{len(self.files)}"
            self.files[name] = body
            return await self._send(writer, 200, {}, {"id": name, "object": "file", "purpose": "batch"})
        if kind == "files":
            name, _, what = name.partition("/")
            if self.files.get(name) is None:
                return await self._send(writer, 404, {}, {"error": {"message": f"No such File: {name}"}})
            body = self.files[name] if what else {"id": name, "object": "file"}
            return await self._send(writer, 200, {}, body)
        if name:
            name, _, action = name.partition("/")
            if name not in self.batches:
                return await self._send(writer, 404, {}, {"error": {"message": f"No batch {name}"}})
            batch = self.batches[name]
            if action == "cancel":
                self._run_batch(batch)
                batch["status"] = "cancelled"
                return await self._send(writer, 200, {}, {**batch, "status": "cancelling"})
            batch["looks"] = batch.get("looks", 0) + 1
            if batch["looks"] > 1 and batch["status"] == "in_progress":  # the first look sees it running
                self._run_batch(batch)
            return await self._send(writer, 200, {}, batch)
        if method == "GET":
            listed = {"object": "list", "data": list(self.batches.values())[::-1], "has_more": False}
            return await self._send(writer, 200, {}, listed)
        name = f"batch-{len(self.batches)}"
        self.batches[name] = {"id": name, "object": "batch", "status": "in_progress", **json.loads(raw)}
        if self.lose_next_batch_reply:
            self.lose_next_batch_reply = False
            writer.transport.abort()
            return False
        return await self._send(writer, 200, {}, self.batches[name])

    def _run_batch(self, batch):
        output, errors, status = [], [], "completed"
        for line in map(json.loads, self.files[batch["input_file_id"]].splitlines()):
            assert line["method"] == "POST" and line["url"] == "/v1/chat/completions"
            prompt = next(
                part["text"] for part in line["body"]["messages"][0]["content"] if part["type"] == "text"
            )
            fault, self.batch_lines = self.batch_fault(self.batch_lines), self.batch_lines + 1
            result = {"id": "b", "custom_id": line["custom_id"], "response": None, "error": None}
            if fault == "expired":
                status = "expired"
                error = {"code": "batch_expired", "message": "not done in time"}
                errors.append(json.dumps({**result, "error": error}))
                continue
            if fault == "missing":
                continue
            if fault in FAULTS:
                code, _, body = FAULTS[fault]
                response = {"status_code": code, "body": body if isinstance(body, dict) else None}
                errors.append(json.dumps({**result, "response": response}))
                continue
            reply = self.answer(line["body"], prompt)
            if isinstance(reply, tuple):
                response = {"status_code": reply[0], "body": reply[2]}
                errors.append(json.dumps({**result, "response": response}))
                continue
            choices = []
            for i, text in enumerate(reply):
                choices.append({"index": i, "finish_reason": "stop", "message": {"content": text}})
            usage = {"prompt_tokens": 100, "completion_tokens": 10 * len(choices)}
            body = {"model": "fake-1", "choices": choices, "usage": usage}
            text = json.dumps({**result, "response": {"status_code": 200, "body": body}})
            output.insert(0, text[: len(text) // 2] if fault == "cut" else text)  # in no order
        batch["status"] = status
        for field, lines in (("output_file_id", output), ("error_file_id", errors)):
            if lines:
                batch[field] = f"file-{len(self.files)}"
                self.files[batch[field]] = "".join(f"{line}\n\n" for line in lines).encode()

    async def _send(self, writer, status, headers, body):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = {"content-type": "application/json", "content-length": len(data), **headers}
        head = f"HTTP/1.1 {status} X\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        writer.write(head.encode() + b"\r\n" + data)
        await writer.drain()
        return True
