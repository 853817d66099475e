"""Throughput and memory of the chat client against a local server of fixed latency (SPEC §8).

    python -m bench.bench_api                                 # share of the ideal N/L: L 0.2 s, N 32, 60 kB
    python -m bench.bench_api --rows 20000 --latency 0.05     # memory: must not grow with the rows done

The server runs in a process of its own and only waits, so what is lost is the client's. Prints one JSON line:
share of N/L, CPU milliseconds a call, and the peak memory after the first tenth of the rows and at the end.
"""

import argparse
import asyncio
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

import common
from common import above, at_least
from lib import api, ask

TEXT = "Image Description: … " * 40
USAGE = {"prompt_tokens": 900, "completion_tokens": 200, "total_tokens": 1100}


def parse_args(argv=None):
    parser = common.Parser(__doc__)
    parser.add_argument("--rows", type=at_least(10), default=3200, help="calls [ours: 20 seconds]")
    parser.add_argument("--concurrency", type=at_least(1), default=32, help="N [ours]")
    parser.add_argument("--latency", type=above(0), default=0.2, help="L, seconds the server waits [ours]")
    parser.add_argument("--image-kb", type=at_least(1), default=60, help="size of an image [ours]")
    parser.add_argument(
        "--images",
        type=at_least(1),
        default=200,
        help="image files [ours: more than the client's cache holds]",
    )
    parser.add_argument("--server", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


async def serve(latency):
    choice = {"message": {"role": "assistant", "content": f"@ {TEXT}"}, "finish_reason": "stop"}
    body = json.dumps({"model": "fixed", "choices": [choice], "usage": USAGE}).encode()
    size = len(body) + 7
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % size
    numbers = itertools.count()  # no two answers are equal: that would alarm the client

    async def connection(reader, writer):
        try:
            while True:
                request = (await reader.readuntil(b"\r\n\r\n")).lower()
                size = request.partition(b"content-length: ")[2].partition(b"\r\n")[0]
                await reader.readexactly(int(size or 0))
                await asyncio.sleep(latency)
                writer.write(head + body.replace(b"@", b"%08d" % next(numbers), 1))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", 0, limit=2**20)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def make_images(args, folder):
    """Files of noise, which takes 0.64 bytes a pixel as JPEG → their paths."""
    side = round((args.image_kb * 1024 / 0.64) ** 0.5)
    paths = []
    for i in range(args.images):
        path = folder / f"{i}.jpg"
        Image.frombytes("RGB", (side, side), os.urandom(side * side * 3)).save(path)
        paths.append(path)
    return paths


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def bench(args, url, folder):
    """Ask every row once → the figures."""
    images = make_images(args, folder)
    client = api.ChatClient("fixed", url, args.concurrency)
    jobs = []
    for i in range(args.rows):
        prompt = f"tweet {i} " + "x" * 1500
        jobs.append(client.job({"id": f"r{i}"}, prompt, str(images[i % len(images)])))
    early = []  # peak memory after the first tenth
    seen = iter(range(1, args.rows + 1))

    def finish(row):
        if next(seen) == args.rows // 10:
            early.append(peak_mib())
        return row

    with ask.AppendFile(folder / "out.jsonl") as out:
        start = time.perf_counter()
        cpu = time.process_time()
        failed = ask.ask_all(client, jobs, out, finish)
        seconds = time.perf_counter() - start
        cpu = time.process_time() - cpu
    assert not failed and out.done.total() == args.rows
    ideal = args.rows * args.latency / args.concurrency
    return {
        "rows": args.rows,
        "concurrency": args.concurrency,
        "latency_s": args.latency,
        "image_bytes": images[0].stat().st_size,
        "seconds": round(seconds, 2),
        "ideal_seconds": round(ideal, 2),
        "share_of_ideal": round(ideal / seconds, 3),
        "cpu_ms_a_call": round(cpu / args.rows * 1000, 2),
        "peak_mib_at_a_tenth": round(early[0], 1),
        "peak_mib": round(peak_mib(), 1),
    }


def main(args):
    if args.server:
        return asyncio.run(serve(args.latency))
    os.environ.setdefault("OPENAI_API_KEY", "bench")
    command = [sys.executable, "-m", "bench.bench_api", "--server", "--latency", str(args.latency)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        port = server.stdout.readline().strip()
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(bench(args, f"http://127.0.0.1:{port}/v1", Path(folder))))
    finally:
        server.kill()
    return 0


if __name__ == "__main__":
    main(parse_args())
