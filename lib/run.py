"""OUT of a training run: lock, identity, resume, save, log, best (SPEC §7). Knows neither model nor loss."""

import errno
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from common import InputError
from lib import data, lora, state, training
from lib.alarms import alarms

LOGS = ("metrics.jsonl", "samples.jsonl")
OURS = (
    "best",
    "last",
    "validation",
    "monitor",
    "served",
    "config.json",
    "progress.json",
    "curves.png",
    "samples.html",
    *LOGS,
)
# Arguments that two pieces of one run need not share: place, memory, speed, logging. What is read counts by
# content.
MAY_DIFFER = (
    *(
        "data",
        "val",
        "image_dir",
        "out",
        "model",
        "adapter",
        "ds_config",
        "limit",
        "eval_limit",
        "merge_repeats",
    ),
    *(
        "skip_bad",
        "batch_size",
        "grad_accum",
        "eval_rows",
        "rollout_rows",
        "rollout_url",
        "gradient_checkpointing",
        "pack_tokens",
    ),
    *(
        "shared_prefix",
        "static_cache",
        "save_every",
        "log_samples_every",
        "stop_after",
        "fresh",
        "timeout",
        "local_rank",
    ),
    "dtype",
)


class Run:
    """OUT of a training run: config.json, metrics.jsonl, last/ (everything needed to go on), best/ (the
    adapter to use).

    The same command on the same OUT goes on from its newest whole state; what would change the result is
    refused unless --fresh. A state is written beside the old one and marked as whole last, so a kill at any
    moment leaves the old one or the new one; last/ is a link to it, where the file system has links. With
    several nodes OUT must be on storage that all of them see.

    Signals: `kill -TERM $(cat OUT/.lock)` finishes the step, saves and ends all ranks with code 0, under the
    launcher too; so do SIGINT and SIGUSR1. The launcher itself, stopped by Ctrl-C or SIGTERM, passes SIGTERM
    on, but kills what still runs after 30 seconds and ends with code 1: a longer step is then lost, never
    last/.

    args: of 03 or 04, with `prompt` and `model` resolved; content: {what: digest} of what is read; rows: of
    one update, over all ranks. Raises InputError, on all ranks, where OUT cannot be used.
    """

    def __init__(self, args, ranks, content, rows):
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
        self.rows = []  # of metrics.jsonl
        self.alarmed = set()
        chosen = {name: value for name, value in vars(args).items() if name not in MAY_DIFFER}
        self.identity = {"script": Path(sys.argv[0]).name, "rows_an_update": rows, **chosen, **content}
        with ranks.together():
            if ranks.main:
                self._lock()
                self._refuse_own_adapter()
                if not args.fresh:
                    self._refuse_other_run()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    # ---------------------------------------------------------------- start

    def _lock(self):
        """One process trains into OUT. .lock holds its number: kill -TERM $(cat OUT/.lock) stops all
        ranks."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.out / ".lock", "a+")  # noqa: SIM115, held as long as the run
            self._take_lock()
            self.lock.truncate(0)
            self.lock.write(f"{os.getpid()}\n")
            self.lock.flush()
        except OSError as error:
            raise InputError(f"--out {self.out}: cannot write there ({error.strerror})") from None

    def _take_lock(self):
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.seek(0)
            holder = self.lock.read().strip()
            raise InputError(
                f"--out {self.out}: process {holder} trains into it: wait, stop it (kill {holder}), "
                "or choose another folder"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                raise
            warn(f"{self.out}: this file system has no locks: see to it that no second run writes there")

    def _refuse_own_adapter(self):
        """A run whose best/ would take the place of the adapter that it starts from."""
        adapter = getattr(self.args, "adapter", None)
        if adapter and Path(adapter).resolve().is_relative_to(self.out.resolve()):
            raise InputError(
                f"--out {self.out}: holds --adapter {adapter}, which this run would replace: choose another"
            )

    def _refuse_other_run(self):
        """Where OUT holds a run, it must be this one."""
        if not any((self.out / name).exists() for name in ("last", "best", "metrics.jsonl", "progress.json")):
            return  # a start that failed before its first step protects nothing
        known = self.out / "config.json"
        if not known.exists():
            raise InputError(
                f"--out {self.out}: holds a run without config.json: choose another folder, or --fresh"
            )
        try:
            old = json.loads(known.read_text())["identity"]
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{known}: not a configuration of this version: "
                "choose another --out, or start anew with --fresh"
            ) from None
        changed = []
        for name, value in json.loads(json.dumps(self.identity)).items():
            if old.get(name) != value:
                changed.append(f"{name} {old.get(name)!r} → {value!r}")
        if changed:
            raise InputError(
                f"--out {self.out}: holds a run with other arguments ({'; '.join(changed)}): "
                "choose another folder, or --fresh"
            )

    def resume(self, engine, total):
        """Load the newest whole state where there is one → the steps still to do. Log files lose what came
        after it.

        To be called when everything else is loaded: --fresh deletes the old run only here.
        """
        self.monitor = engine.monitor
        name = None
        with self.ranks.together():
            if self.ranks.main:
                self._check_space(engine.module)
                if self.args.fresh:
                    self._delete_old_run()
                name = self._find_state()
                self._sweep()
                config = {"script": self.identity["script"], "world": self.ranks.world, **vars(self.args)}
                config |= {"identity": self.identity, "versions": versions()}
                data.write_atomic(self.out / "config.json", json.dumps(config, indent=1) + "\n")
        # KEEP: on shared storage another rank may not see the folder yet, so all ranks use rank 0's answer
        name = self.ranks.gather(name)[0]
        if name:
            saved = state.load(engine, self.out / name, self.ranks)
            # DeepSpeed adds keys of its own, which it then refuses to save
            self.state = {name: saved[name] for name in self.state}
            if self.ranks.main:
                print(f"going on from step {self.state['step']} of {self.out / name}", flush=True)
        with self.ranks.together():
            if self.ranks.main:
                if name:
                    self._note_progress(self.state["step"])
                for log in LOGS:
                    self._cut(self.out / log)
                if (self.out / "metrics.jsonl").exists():
                    self.rows = [row for _, row in data.read_jsonl(self.out / "metrics.jsonl")]
        if self.ranks.main:
            print(
                f"{self.out}/: metrics.jsonl (a row an update), curves.png and best/ (each validation)",
                flush=True,
            )
        self.ranks.barrier()
        return range(total if self.state["ended"] else self.state["step"], total)

    def _check_space(self, model):
        """Two states (the old one goes when the new one is whole) and two adapters must fit."""
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        size = 4 * trainable * 4  # weights, fp32 master weights, two moments
        need = 2 * size + 2 * trainable * 4 + 2**24
        free = shutil.disk_usage(self.out).free
        if free < need:
            raise InputError(
                f"--out {self.out}: {free / 2**20:.0f} MiB free, this run needs {need / 2**20:.0f}: make room"
            )

    def _delete_old_run(self):
        for path in self.out.iterdir():
            if path.name not in OURS and not path.name.startswith("state-"):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _find_state(self):
        """The name of the newest whole state in OUT, or None where nothing was ever saved. Raises InputError
        where what was saved is gone."""
        name = state.newest(self.out)
        progress = self.out / "progress.json"
        if name is None and progress.exists():
            step = json.loads(progress.read_text())["saved"]
            raise InputError(
                f"--out {self.out}: step {step} was saved there, but no whole state is left "
                "(a copy without its state-* folders?): bring them back, or start anew with --fresh"
            )
        return name

    def _sweep(self):
        """What a kill left behind: half-written states, adapters and files."""
        if not (self.out / "best").exists() and (self.out / ".best.old").exists():
            (self.out / ".best.old").rename(self.out / "best")
        state.sweep(self.out)
        for name in (".best.new", ".best.old"):
            shutil.rmtree(self.out / name, ignore_errors=True)
        for path in (*self.out.glob(".*.tmp*"), *self.out.glob("*/.*.tmp*")):
            path.unlink(missing_ok=True)

    def _cut(self, path):
        """Drop rows of steps that are not in the state, a torn last line among them: they will be done
        again."""
        if not path.exists():
            return
        kept = []
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
            try:
                step = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{path}:{number}: not a row of this log: delete that line") from None
            if step <= self.state["step"]:
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
        ds_zero2.json), and what they say is going wrong is said, once."""
        if not self.ranks.main:
            return
        with open(self.out / name, "a", encoding="utf-8") as handle:
            handle.write("".join(data.jsonl_line(row) for row in rows))
        if name != "metrics.jsonl":
            return
        for row in rows:
            self.rows.append(row)
            for cause, text in alarms(self.rows).items():
                if cause not in self.alarmed:
                    self.alarmed.add(cause)
                    warn(f"step {row['step']}: {text}")
            if self.monitor.enabled:
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
        args = self.args
        recipe = lora.Recipe(args.prompt, args.min_pixels, args.max_pixels)
        with self.ranks.together():
            if self.ranks.main:
                lora.save_adapter(model, processor, self.out / "best", recipe, self._card(step, f1))

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
        folder = self.out / f"state-{step}"
        state.save(engine, folder, self.state, self.ranks)
        with self.ranks.together():
            if self.ranks.main:
                for log in LOGS:
                    if (self.out / log).exists():
                        state.flush(self.out / log)  # KEEP: on the disk before the state counts as whole
                state.finish(folder)
                self._note_progress(step)
                self._sweep()
        self.ranks.barrier()

    def _note_progress(self, step):
        """So that a lost state is not taken for a run that never saved one."""
        data.write_atomic(self.out / "progress.json", json.dumps({"saved": step}) + "\n")

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
        lines = (
            "---",
            f"base_model: {args.model}",
            "library_name: peft",
            "---",
            f"# LoRA adapter by {self.identity['script']}",
            "",
            "Reads a tweet with its image and answers with quintuples when asked with the",
            f"`{args.prompt}` prompt of JMERE-R1's common.py. After update {step}: {score}.",
            "",
            "## What determined it (files by content)",
            "",
            "```json",
            json.dumps(self.identity, indent=1),
            "```",
            "",
            "## Versions",
            "",
            ", ".join(f"{name} {version}" for name, version in versions().items()),
            "",
        )
        return "\n".join(lines)


def warn(text):
    """One loud line, on the screen between the bars."""
    print(f"\n!! {text}", file=sys.stderr, flush=True)


def versions():
    """{package: version}, and the commit of this repository, or None where git does not tell."""
    names = ("torch", "transformers", "peft", "deepspeed")
    commit = None
    if shutil.which("git"):
        command = ["git", "rev-parse", "HEAD"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = done.stdout.strip()
    return {name: metadata.version(name) for name in names} | {"commit": commit or None}
