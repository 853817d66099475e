"""A process that has loaded torch, DeepSpeed and the scripts once and forks a child for each run: what costs
15 s alone costs one or two.

The child is the script: same main(args), own process group, own memory; it can be killed at any moment
without harm to the next. One JSON request a line on stdin, one JSON answer a line on stdout.

Request: {"script": "03_sft", "argv": [...], "log": FILE, and if wanted "kill_at": n-th file operation in OUT,
"kill_after": seconds,
          "signal": 9, "patch": Python text that the child runs first}
Answer:  {"code": exit code, or -signal, "seconds": …, "events": file operations seen in OUT}
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WATCHED = (
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.symlink",
    "os.truncate",
)  # Python's audit events on files


class Zygote:
    """The other end: start one, ask it for runs."""

    def __init__(self):
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        command = [sys.executable, "-m", "tests.zygote"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env
        )
        assert self.process.stdout.readline() == "ready\n"

    def run(self, script, argv, log, **request):
        """→ answer with "text", what the run printed."""
        self.process.stdin.write(
            json.dumps({"script": script, "argv": list(map(str, argv)), "log": str(log), **request}) + "\n"
        )
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer | {"text": Path(log).read_text()}

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


def child(request):
    """Be the script. Never returns."""
    sys.argv = [f"{request['script']}.py", *request["argv"]]
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    counter = os.open(f"{request['log']}.events", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    out, seen, number = (
        str(Path(request["argv"][request["argv"].index("--out") + 1])),
        0,
        request.get("signal", signal.SIGKILL),
    )

    def watch(event, args):
        nonlocal seen
        if event in WATCHED and isinstance(args[0], str | Path) and str(args[0]).startswith(out):
            seen += 1
            if seen == request.get("kill_at"):
                os.kill(os.getpid(), number)
            os.pwrite(counter, str(seen).encode(), 0)

    sys.addaudithook(watch)
    if request.get("kill_after"):
        timer = threading.Timer(request["kill_after"], os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()
    code = 1
    try:
        exec(request.get("patch") or "", {"sys": sys})  # a test's fault, put into the child alone
        module = importlib.import_module(request["script"])
        code = module.main(module.parse_args(request["argv"])) or 0
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve():
    answers = os.fdopen(os.dup(1), "w")  # libraries print to stdout too
    os.dup2(2, 1)
    qwen = "transformers.models.qwen2_5_vl"
    heavy = (
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
    )  # Muon: all of Inductor
    for name in (
        "deepspeed",
        "lib.run",
        "03_sft",
        "04_grpo",
        f"{qwen}.modeling_qwen2_5_vl",
        f"{qwen}.processing_qwen2_5_vl",
        *heavy,
    ):
        importlib.import_module(name)
    from deepspeed.comm.torch import build_shm_op

    build_shm_op()  # compiled once, loaded once
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        request, began = json.loads(line), time.monotonic()
        pid = os.fork()
        if pid == 0:
            child(request)
        _, status, usage = os.wait4(pid, 0)
        events = Path(f"{request['log']}.events")
        answer = {"code": os.waitstatus_to_exitcode(status), "seconds": round(time.monotonic() - began, 2)}
        answer["cpu"] = round(usage.ru_utime + usage.ru_stime, 2)
        print(json.dumps(answer | {"events": int(events.read_text() or 0)}), file=answers, flush=True)


if __name__ == "__main__":
    serve()
