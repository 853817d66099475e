"""OUT of a training run: lock, identity, resume, save, log, best (SPEC §7). Knows neither model nor loss."""

import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import common
from common import InputError, Stopped
from lib import data, training, vlm


class Run:
    """OUT of a training run: config.json, metrics.jsonl, last/ (everything needed to go on) and best/ (the adapter to use).

    The same command on the same OUT goes on from last/; other arguments are refused unless --fresh. last/ is a link to a
    complete state, exchanged atomically, so a kill at any moment leaves the old state or the new one. With several nodes OUT
    must be on storage that all of them see.

    Signals: `kill -TERM $(cat OUT/.lock)` finishes the step, saves and ends all ranks with code 0, under the launcher too. The
    launcher itself, stopped by Ctrl-C or SIGTERM, passes SIGTERM on, but kills what still runs after 30 seconds and ends with
    code 1: a longer step is then lost, never last/.
    """

    FREE = ("fresh", "local_rank", "stop_after")  # arguments that may differ between the pieces of one run
    LOGS = ("metrics.jsonl", "samples.jsonl")

    def __init__(self, args, ranks):
        self.out, self.args, self.ranks, self.stopping, self.changed = (
            Path(args.out),
            args,
            ranks,
            False,
            False,
        )
        self.state = {
            "step": 0,
            "best": -1.0,
            "best_step": None,
            "worse": 0,
            "ended": False,
        }  # worse: validations since the best
        with ranks.together():
            if ranks.main:
                self._open()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _open(self):
        """Lock OUT and compare its arguments with ours. Raises InputError."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.out / ".lock", "a+")  # noqa: SIM115, held as long as the run
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.seek(0)
            holder = self.lock.read().strip()
            raise InputError(
                f"--out {self.out}: process {holder} trains into it: wait, stop it (kill {holder}), or choose another folder"
            ) from None
        except OSError as error:
            raise InputError(f"--out {self.out}: cannot write there ({error.strerror})") from None
        self.lock.truncate(0)
        self.lock.write(
            f"{os.getpid()}\n"
        )  # kill -TERM $(cat OUT/.lock) stops all ranks after the step they are in
        self.lock.flush()
        if self.args.fresh:
            for path in self.out.iterdir():
                if path.name.startswith(".step-") or path.name in (
                    "best",
                    "last",
                    "validation",
                    "monitor",
                    "config.json",
                    *self.LOGS,
                ):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self.config = {"script": Path(sys.argv[0]).name, "world": self.ranks.world}
        self.config |= {name: value for name, value in vars(self.args).items() if name not in self.FREE}
        self.config |= _hashes(self.args)
        known = self.out / "config.json"
        if not known.exists() or not any(
            (self.out / name).exists() for name in ("last", "best", "metrics.jsonl")
        ):
            return  # a start that failed before its first step protects nothing
        try:
            old = json.loads(known.read_text())
        except ValueError:
            raise InputError(f"{known}: not JSON: mend it, or start anew with --fresh") from None
        changed = [
            f"{name} {old.get(name)!r} → {value!r}"
            for name, value in self.config.items()
            if old.get(name) != value
        ]
        if changed:
            raise InputError(
                f"--out {self.out}: holds a run with other arguments ({'; '.join(changed)}): choose another folder, or --fresh"
            )

    def _on_signal(self, number, frame):
        self.stopping = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends at once
        if self.ranks.main:
            print("stopping: this step is finished and saved first", file=sys.stderr, flush=True)

    def should_stop(self):
        """Whether any rank was told to stop; every rank gets the same answer, so none waits for another."""
        return self.ranks.sum(self.stopping)[0] > 0

    def resume(self, engine, total):
        """Load OUT/last where there is one → the steps still to do. Log files lose what came after it."""
        self.monitor, last = engine.monitor, self.out / "last"
        with self.ranks.together():
            if self.ranks.main:
                self._check_space(engine.module)
                self._sweep()
                data.write_atomic(
                    self.out / "config.json",
                    json.dumps({**self.config, "versions": versions()}, indent=1) + "\n",
                )
        folder = self.ranks.gather(last.resolve().name if last.exists() else None)[
            0
        ]  # KEEP: rank 0 decides, file systems lag
        if folder:
            _, saved = engine.load_checkpoint(str(self.out), tag=folder, load_module_strict=False)
            self.state = {
                name: saved[name] for name in self.state
            }  # DeepSpeed adds keys of its own, which it then refuses to save
            if self.ranks.main:
                print(f"going on from step {self.state['step']} of {last}", flush=True)
        if self.ranks.main:
            for name in self.LOGS:
                self._cut(self.out / name)
            self._cut_csv(engine)
        self.ranks.barrier()
        return range(total if self.state["ended"] else self.state["step"], total)

    def _check_space(self, model):
        """Two states (the old one goes when the new one is whole) and two adapters must fit: weights, fp32 master, two moments."""
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        need, free = (
            2 * trainable * (4 + 4 + 4 + 4) + 2 * trainable * 4 + 2**24,
            shutil.disk_usage(self.out).free,
        )
        if free < need:
            raise InputError(
                f"--out {self.out}: {free / 2**20:.0f} MiB free, the states of this run take {need / 2**20:.0f}: make room"
            )

    def _sweep(self):
        """What a kill left behind: half-written states, adapters and files."""
        current = (self.out / "last").resolve().name
        if not (self.out / "best").exists() and (self.out / ".best.old").exists():
            (self.out / ".best.old").rename(self.out / "best")
        for path in self.out.glob(".step-*"):
            if path.name != current:
                shutil.rmtree(path)
        for name in (".best.new", ".best.old"):
            shutil.rmtree(self.out / name, ignore_errors=True)
        converters = [
            *self.out.glob("zero_to_*.py"),
            *self.out.glob(".step-*/zero_to_*.py"),
        ]  # DeepSpeed's: useless without frozen weights
        for path in [
            *converters,
            *self.out.glob(".*.tmp*"),
            *self.out.glob("*/.*.tmp*"),
            self.out / ".last.new",
        ]:
            path.unlink(missing_ok=True)

    def _cut(self, path):
        """Drop rows of steps that are not in last/, a torn last line among them: they will be done again."""
        if path.exists():
            lines = [
                line
                for line in path.read_text(encoding="utf-8").split("\n")[:-1]
                if json.loads(line)["step"] <= self.state["step"]
            ]
            data.write_atomic(path, "".join(line + "\n" for line in lines))

    def _cut_csv(self, engine):
        """The same for DeepSpeed's CSV monitor, which would also write each header again."""
        monitor = getattr(engine.monitor, "csv_monitor", None)
        for path in Path(monitor.log_dir).glob("*.csv") if monitor else []:
            bound = (
                engine.global_samples if path.stem.startswith("Train_Samples") else self.state["step"]
            )  # DeepSpeed's own count samples
            header, *lines = path.read_text().splitlines()[
                : -1 if not path.read_text().endswith("\n") else None
            ] or [""]
            data.write_atomic(
                path,
                "".join(
                    f"{line}\n" for line in [header, *(x for x in lines if int(x.split(",")[0]) <= bound)]
                ),
            )
            monitor.filenames.append(path.stem)

    def save(self, engine, step):
        """Everything needed to go on after `step` updates, frozen weights left out. Raises Stopped where it cannot be written."""
        self.state["step"] = step
        name = f".step-{step}"
        try:
            engine.save_checkpoint(
                str(self.out),
                tag=name,
                client_state=self.state,
                save_latest=False,
                exclude_frozen_parameters=True,
            )
        except (OSError, RuntimeError) as error:  # RuntimeError is how torch tells of a full disk
            raise Stopped(
                f"{self.out}: cannot save step {step} ({common.first_line(error)}): make room; the same command goes on"
            ) from None
        if self.ranks.main:
            for path in [
                *(self.out / name).iterdir(),
                *(self.out / log for log in self.LOGS if (self.out / log).exists()),
            ]:
                with open(path, "rb") as handle:
                    os.fsync(handle.fileno())  # KEEP: on the disk before the link points to it
            link = self.out / ".last.new"
            link.unlink(missing_ok=True)
            link.symlink_to(name)
            os.replace(link, self.out / "last")
            self._sweep()
        self.ranks.barrier()

    def log(self, rows, name="metrics.jsonl"):
        """Append rows; those of metrics.jsonl go to DeepSpeed's monitors too (TensorBoard, W&B, CSV: ds_zero2.json)."""
        if not self.ranks.main:
            return
        with open(self.out / name, "a", encoding="utf-8") as handle:
            handle.write("".join(data.jsonl_line(row) for row in rows))
        if name == "metrics.jsonl" and self.monitor.enabled:
            self.monitor.write_events(
                [
                    (f"train/{key}", value, row["step"])
                    for row in rows
                    for key, value in row.items()
                    if key != "step"
                ]
            )

    def keep_best(self, model, processor, prompt, step, f1):
        """best/ holds the state of the best validation JMERE F1, never of the best reward; the newest, while nothing is right yet."""
        better = f1 > self.state["best"]
        self.state["worse"] = 0 if better else self.state["worse"] + 1
        if not better and (f1 or self.state["best"]):
            return
        self.state |= {"best": f1, "best_step": step}
        with self.ranks.together():
            if self.ranks.main:
                vlm.save_adapter(model, processor, self.out / "best", prompt)

    def out_of_patience(self):
        return bool(self.args.patience) and self.state["worse"] >= self.args.patience

    def check_step(self, model, step, numbers, before, rows):
        """Fail at once, not at hour ten: a number that is none, or a first update that changed nothing.

        numbers: {name: value}, the same on every rank; rows: this rank's ids and responses, kept where they are to blame.
        """
        bad = {name: value for name, value in numbers.items() if not math.isfinite(value)}
        if bad:
            rows = [row for part in self.ranks.gather(rows) for row in part]
            path = self.out / f"failed-step-{step + 1}.jsonl"
            if self.ranks.main:
                data.write_atomic(path, "".join(map(data.jsonl_line, rows)))
            ids = list(dict.fromkeys(row["id"] for row in rows))
            shown = ", ".join(ids[:8]) + (" …" if len(ids) > 8 else "")
            found = ", ".join(f"{name} {value}" for name, value in bad.items())
            self.fail(
                f"step {step + 1}: {found}; examples {shown}; kept in {path}; last/ is the state before: look at them, or lower --lr"
            )
        if not self.changed and before is not None and numbers["gradient norm"] > 0:
            if training.fingerprint(model) == before:
                self.fail(
                    f"the first update changed no weight (gradient norm {numbers['gradient norm']:.3g}): --lr is too small"
                )
            self.changed = True

    def fail(self, text):
        """Every rank knows of it: rank 0 says it."""
        if not self.ranks.main:
            sys.exit(InputError.exit_code)
        raise InputError(text)

    def finish_step(self, engine, step, total, drawn):
        """After step `step` (from 1): curves where validated, save where due → whether the run is over, at its end or before."""
        end = step == total or self.out_of_patience()
        if drawn and self.ranks.main:
            training.draw_curves(self.out)
        halt = self.should_stop() or step == self.args.stop_after
        self.state["ended"] = end
        if end or halt or step % self.args.save_every == 0:
            self.save(engine, step)
        if halt and not end and self.ranks.main:
            print(
                f"stopped after step {step} of {total}, saved in {self.out / 'last'}: the same command goes on",
                flush=True,
            )
        return end or halt

    def best_text(self):
        """For the progress bar."""
        return f" f1 {self.state['best']:.3f}" if self.args.val and self.state["best_step"] else ""

    def say_done(self, total):
        if self.ranks.main and self.state["ended"]:
            early = f" after step {self.state['step']} of {total}: {self.state['worse']} validations without a better F1"
            score = (
                f"validation JMERE F1 {self.state['best']:.4f} at step {self.state['best_step']}"
                if self.args.val
                else "the last step"
            )
            print(
                f"done{early if self.state['step'] < total else ''}: adapter in {self.out / 'best'}, {score}",
                flush=True,
            )


def _hashes(args):
    """Content of what the run reads: a file changed between two pieces of a run is another argument."""
    adapter = getattr(args, "adapter", None)
    paths = {
        "data": args.data,
        "val": args.val,
        "ds_config": args.ds_config,
        "adapter": adapter and f"{adapter}/adapter_model.safetensors",
    }
    return {
        f"{name}_sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
        for name, path in paths.items()
        if path
    }


def versions():
    names = ("torch", "transformers", "peft", "deepspeed")
    commit = None
    if shutil.which("git"):
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
        ).stdout.strip()
    return {name: metadata.version(name) for name in names} | {"commit": commit or None}
