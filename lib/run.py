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

LOGS = ("metrics.jsonl", "samples.jsonl")
OURS = ("best", "last", "validation", "monitor", "config.json", "curves.png", *LOGS)  # what --fresh deletes
# arguments that two pieces of one run need not share
MAY_DIFFER = ("fresh", "local_rank", "stop_after", "timeout")


class Run:
    """OUT of a training run: config.json, metrics.jsonl, last/ (everything needed to go on), best/ (the
    adapter to use).

    The same command on the same OUT goes on from last/; other arguments are refused unless --fresh. last/ is
    a link to a complete state, exchanged atomically, so a kill at any moment leaves the old state or the new
    one. With several nodes OUT must be on storage that all of them see.

    Signals: `kill -TERM $(cat OUT/.lock)` finishes the step, saves and ends all ranks with code 0, under the
    launcher too. The launcher itself, stopped by Ctrl-C or SIGTERM, passes SIGTERM on, but kills what still
    runs after 30 seconds and ends with code 1: a longer step is then lost, never last/.

    args: of 03 or 04, with `prompt` and `model` resolved. Raises InputError, on all ranks, where OUT cannot
    be used.
    """

    def __init__(self, args, ranks):
        self.out = Path(args.out)
        self.args = args
        self.ranks = ranks
        self.stopping = False  # told by a signal to stop after this step
        self.changed = False  # the first update was seen to change weights
        self.state = {
            "step": 0,
            "best": -1.0,
            "best_step": None,
            "validations_without_gain": 0,
            "ended": False,
        }
        with ranks.together():
            if ranks.main:
                self._lock()
                if args.fresh:
                    self._delete_old_run()
                self.config = self._identity()
                self._refuse_other_run()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    # ---------------------------------------------------------------- start

    def _lock(self):
        """One process trains into OUT. .lock holds its number: kill -TERM $(cat OUT/.lock) stops all
        ranks."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.out / ".lock", "a+")  # noqa: SIM115, held as long as the run
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.seek(0)
            holder = self.lock.read().strip()
            raise InputError(
                f"--out {self.out}: process {holder} trains into it: wait, stop it (kill {holder}), "
                "or choose another folder"
            ) from None
        except OSError as error:
            raise InputError(f"--out {self.out}: cannot write there ({error.strerror})") from None
        self.lock.truncate(0)
        self.lock.write(f"{os.getpid()}\n")
        self.lock.flush()

    def _delete_old_run(self):
        for path in self.out.iterdir():
            if path.name not in OURS and not path.name.startswith(".step-"):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _identity(self):
        """What must be the same in all pieces of a run: script, ranks, arguments, and files by content."""
        config = {"script": Path(sys.argv[0]).name, "world": self.ranks.world}
        config |= {name: value for name, value in vars(self.args).items() if name not in MAY_DIFFER}
        return config | hashes(self.args)

    def _refuse_other_run(self):
        known = self.out / "config.json"
        if not known.exists() or not any(
            (self.out / name).exists() for name in ("last", "best", "metrics.jsonl")
        ):
            return  # a start that failed before its first step protects nothing
        try:
            old = json.loads(known.read_text())
        except ValueError:
            raise InputError(f"{known}: not JSON: mend it, or start anew with --fresh") from None
        changed = []
        for name, value in self.config.items():
            if old.get(name) != value:
                changed.append(f"{name} {old.get(name)!r} → {value!r}")
        if changed:
            raise InputError(
                f"--out {self.out}: holds a run with other arguments ({'; '.join(changed)}): "
                "choose another folder, or --fresh"
            )

    def resume(self, engine, total):
        """Load OUT/last where there is one → the steps still to do. Log files lose what came after it."""
        self.monitor = engine.monitor
        last = self.out / "last"
        with self.ranks.together():
            if self.ranks.main:
                self._check_space(engine.module)
                self._sweep()
                config = json.dumps({**self.config, "versions": versions()}, indent=1)
                data.write_atomic(self.out / "config.json", config + "\n")
        # KEEP: on shared storage another rank may not see the new link yet, so all ranks use rank 0's answer
        folder = self.ranks.gather(last.resolve().name if last.exists() else None)[0]
        if folder:
            _, saved = engine.load_checkpoint(str(self.out), tag=folder, load_module_strict=False)
            # DeepSpeed adds keys of its own, which it then refuses to save
            self.state = {name: saved[name] for name in self.state}
            if self.ranks.main:
                print(f"going on from step {self.state['step']} of {last}", flush=True)
        if self.ranks.main:
            for name in LOGS:
                self._cut(self.out / name)
        self.ranks.barrier()
        return range(total if self.state["ended"] else self.state["step"], total)

    def _check_space(self, model):
        """Two states (the old one goes when the new one is whole) and two adapters must fit."""
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        state = 4 * trainable * 4  # weights, fp32 master weights, two moments
        need = 2 * state + 2 * trainable * 4 + 2**24
        free = shutil.disk_usage(self.out).free
        if free < need:
            raise InputError(
                f"--out {self.out}: {free / 2**20:.0f} MiB free, this run needs {need / 2**20:.0f}: make room"
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
        # DeepSpeed's converters to one file: useless without the frozen weights
        converters = [*self.out.glob("zero_to_*.py"), *self.out.glob(".step-*/zero_to_*.py")]
        halves = [*self.out.glob(".*.tmp*"), *self.out.glob("*/.*.tmp*"), self.out / ".last.new"]
        for path in converters + halves:
            path.unlink(missing_ok=True)

    def _cut(self, path):
        """Drop rows of steps that are not in last/, a torn last line among them: they will be done again."""
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
            if json.loads(line)["step"] <= self.state["step"]:
                kept.append(line + "\n")
        data.write_atomic(path, "".join(kept))

    # ---------------------------------------------------------------- a step

    def _on_signal(self, number, frame):
        self.stopping = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends at once
        if self.ranks.main:
            print("stopping: this step is finished and saved first", file=sys.stderr, flush=True)

    def should_stop(self):
        """Whether any rank was told to stop; every rank gets the same answer, so none waits for another."""
        return self.ranks.sum(self.stopping)[0] > 0

    def check_step(self, model, step, row, before, responses):
        """Fail at once, not at hour ten: a metric that is no number, or a first update that changed nothing.

        row: the metrics, the same on every rank; before: fingerprint before the update, or None; responses:
        this rank's ids and responses, kept in a file where they are to blame. Raises InputError on all ranks.
        """
        bad = {name: value for name, value in row.items() if not math.isfinite(value)}
        if bad:
            rows = [row for part in self.ranks.gather(responses) for row in part]
            path = self.out / f"failed-step-{step + 1}.jsonl"
            if self.ranks.main:
                data.write_atomic(path, "".join(map(data.jsonl_line, rows)))
            ids = list(dict.fromkeys(row["id"] for row in rows))
            shown = ", ".join(ids[:8]) + (" …" if len(ids) > 8 else "")
            found = ", ".join(f"{name} {value}" for name, value in bad.items())
            self.fail(
                f"step {step + 1}: {found}; examples {shown}; kept in {path}; last/ is the state before: "
                "look at them, or lower --lr"
            )
        if before is not None and row["grad_norm"] > 0:
            if training.fingerprint(model) == before:
                self.fail(
                    f"the first update changed no weight (gradient norm {row['grad_norm']:.3g}): "
                    "--lr is too small"
                )
            self.changed = True

    def fail(self, text):
        """End all ranks: rank 0 prints the message. To be called by every rank."""
        if not self.ranks.main:
            sys.exit(InputError.exit_code)
        raise InputError(text)

    def log(self, rows, name="metrics.jsonl"):
        """Append rows; those of metrics.jsonl go to DeepSpeed's monitors too (TensorBoard, W&B:
        ds_zero2.json)."""
        if not self.ranks.main:
            return
        with open(self.out / name, "a", encoding="utf-8") as handle:
            handle.write("".join(data.jsonl_line(row) for row in rows))
        if name == "metrics.jsonl" and self.monitor.enabled:
            for row in rows:
                events = [(f"train/{key}", value, row["step"]) for key, value in row.items() if key != "step"]
                self.monitor.write_events(events)

    def keep_best(self, model, processor, step, f1):
        """best/ holds the adapter of the best validation F1, never of the best reward; the newest, while
        nothing is right."""
        better = f1 > self.state["best"]
        self.state["validations_without_gain"] = 0 if better else self.state["validations_without_gain"] + 1
        if not better and (f1 or self.state["best"]):
            return
        self.state |= {"best": f1, "best_step": step}
        with self.ranks.together():
            if self.ranks.main:
                vlm.save_adapter(model, processor, self.out / "best", self.args.prompt, self._card(step, f1))

    def finish_step(self, engine, step, total, validated):
        """After step `step` (from 1): curves where validated, save where due → whether the run is over."""
        patience = self.args.patience
        end = step == total or bool(patience and self.state["validations_without_gain"] >= patience)
        if validated and self.ranks.main:
            training.draw_curves(self.out)
        halt = self.should_stop() or step == self.args.stop_after
        self.state["ended"] = end
        if end or halt or step % self.args.save_every == 0:
            self.save(engine, step)
        if halt and not end and self.ranks.main:
            print(
                f"stopped after step {step} of {total}, saved in {self.out / 'last'}: "
                "the same command goes on",
                flush=True,
            )
        return end or halt

    def save(self, engine, step):
        """Everything needed to go on after `step` updates, frozen weights left out. Raises Stopped where it
        cannot be written."""
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
                f"{self.out}: cannot save step {step} ({common.first_line(error)}): make room; "
                "the same command goes on"
            ) from None
        if self.ranks.main:
            logs = [self.out / log for log in LOGS if (self.out / log).exists()]
            for path in [*(self.out / name).iterdir(), *logs]:
                with open(path, "rb") as handle:
                    os.fsync(handle.fileno())  # KEEP: on the disk before the link points to it
            link = self.out / ".last.new"
            link.unlink(missing_ok=True)
            link.symlink_to(name)
            os.replace(link, self.out / "last")
            self._sweep()
        self.ranks.barrier()

    # ---------------------------------------------------------------- what is said

    def best_text(self):
        """For the progress bar."""
        return f" f1 {self.state['best']:.3f}" if not self.args.no_val and self.state["best_step"] else ""

    def say_done(self, total):
        if not self.ranks.main or not self.state["ended"]:
            return
        early = ""
        if self.state["step"] < total:
            count = self.state["validations_without_gain"]
            early = f" after step {self.state['step']} of {total}: {count} validations without a better F1"
        score = "the last step"
        if not self.args.no_val:
            score = f"validation JMERE F1 {self.state['best']:.4f} at step {self.state['best_step']}"
        print(f"done{early}: adapter in {self.out / 'best'}, {score}", flush=True)

    def _card(self, step, f1):
        """best/README.md: what this adapter is and how it came about. The licence is left to whoever
        publishes it."""
        args = self.args
        score = "not validated" if args.no_val else f"validation JMERE F1 {f1:.4f}"
        arguments = {name: value for name, value in self.config.items() if name != "out"}
        files = [f"- `{name}`: {value}" for name, value in self.config.items() if name.endswith("_sha256")]
        return "\n".join(
            (
                "---",
                f"base_model: {args.model}",
                "library_name: peft",
                "---",
                f"# LoRA adapter by {self.config['script']}",
                "",
                "Reads a tweet with its image and answers with quintuples when asked with the",
                f"`{args.prompt}` prompt of JMERE-R1's common.py. After update {step}: {score}.",
                "",
                "## Data, by content",
                "",
                *files,
                "",
                "## Arguments",
                "",
                "```json",
                json.dumps(arguments, indent=1),
                "```",
                "",
                "## Versions",
                "",
                ", ".join(f"{name} {version}" for name, version in versions().items()),
                "",
            )
        )


def hashes(args):
    """Content of what the run reads: a file changed between two pieces of a run is another argument."""
    paths = {"data": args.data, "ds_config": args.ds_config}
    if not args.no_val:
        paths["val"] = args.val
    if getattr(args, "adapter", None):
        paths["adapter"] = f"{args.adapter}/adapter_model.safetensors"
    found = {}
    for name, path in paths.items():
        found[f"{name}_sha256"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    return found


def versions():
    """{package: version}, and the commit of this repository, or None where git does not tell."""
    names = ("torch", "transformers", "peft", "deepspeed")
    commit = None
    if shutil.which("git"):
        command = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True
        ).stdout.strip()
    return {name: metadata.version(name) for name in names} | {"commit": commit or None}
