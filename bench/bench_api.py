"""Throughput and memory of the chat client against a local server of fixed latency: issue 3, SPEC §8.

    python bench/bench_api.py                                     # share of the ideal N/L at L = 0.2 s, N = 32, 60 kB images
    python bench/bench_api.py --rows 20000 --latency 0.05         # memory: must not grow with the number of rows done

The server runs in a process of its own and only waits, so what is lost is the client's. Each row has an image of its own.
Prints one JSON line: share of N/L, CPU milliseconds a call, and the peak memory after the first tenth of the rows and at the end.
"""

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

REPLY = {"message": {"role": "assistant", "content": "Image Description: … " * 40}, "finish_reason": "stop"}
USAGE = {"prompt_tokens": 900, "completion_tokens": 200, "total_tokens": 1100}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rows", type=int, default=3200, help="calls [ours: 20 seconds]")
    parser.add_argument("--concurrency", type=int, default=32, help="N [ours: issue 3]")
    parser.add_argument(
        "--latency", type=float, default=0.2, help="L, seconds the server waits [ours: issue 3]"
    )
    parser.add_argument("--image-kb", type=int, default=60, help="size of an image [ours: issue 3]")
    parser.add_argument(
        "--images",
        type=int,
        default=200,
        help="distinct image files [ours: more than the client's cache holds]",
    )
    parser.add_argument("--server", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


async def serve(latency):
    body = json.dumps({"model": "fixed", "choices": [REPLY], "usage": USAGE}).encode()
    answer = (
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    )

    async def connection(reader, writer):
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                size = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
                await reader.readexactly(int(size or 0))
                await asyncio.sleep(latency)
                writer.write(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", 0, limit=2**20)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def bench(args, url, folder):
    import openai  # noqa: F401, its import is no part of the throughput
    from PIL import Image

    from lib import api, ask

    side = round((args.image_kb * 1024 / 0.64) ** 0.5)  # noise takes 0.64 bytes a pixel as JPEG
    images = [folder / f"{i}.jpg" for i in range(args.images)]
    for path in images:
        Image.frombytes("RGB", (side, side), os.urandom(side * side * 3)).save(path)
    client = api.ChatClient("fixed", url, args.concurrency)
    jobs = [
        client.job({"id": f"r{i}"}, f"tweet {i} " + "x" * 1500, str(images[i % len(images)]))
        for i in range(args.rows)
    ]
    early, seen = {}, iter(range(1, args.rows + 1))

    def finish(row):
        if next(seen) == args.rows // 10:
            early["mib"] = peak_mib()
        return row

    with ask.AppendFile(folder / "out.jsonl") as out:
        start, cpu = time.perf_counter(), time.process_time()
        failed = ask.ask_all(client, jobs, out, finish)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    assert not failed and out.done.total() == args.rows
    ideal = args.rows * args.latency / args.concurrency
    size = images[0].stat().st_size
    return {
        "rows": args.rows, "concurrency": args.concurrency, "latency_s": args.latency, "image_bytes": size,
        "seconds": round(seconds, 2), "ideal_seconds": round(ideal, 2), "share_of_ideal": round(ideal / seconds, 3),
        "cpu_ms_a_call": round(cpu / args.rows * 1000, 2), "peak_mib_at_a_tenth": round(early["mib"], 1), "peak_mib": round(peak_mib(), 1),
    }  # fmt: skip


def main(args):
    if args.server:
        return asyncio.run(serve(args.latency))
    os.environ.setdefault("OPENAI_API_KEY", "bench")
    server = subprocess.Popen(
        [sys.executable, __file__, "--server", "--latency", str(args.latency)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            print(
                json.dumps(
                    bench(args, f"http://127.0.0.1:{server.stdout.readline().strip()}/v1", Path(folder))
                )
            )
    finally:
        server.kill()
    return 0


if __name__ == "__main__":
    main(parse_args())
