"""One saved state of a training run: a folder that DeepSpeed writes, marked as whole when all of it is on the
disk. Knows DeepSpeed's files; knows neither model nor run."""

import json
import os
import shutil

import torch

import common
from common import InputError, Stopped
from lib import data

WHOLE = "whole.json"  # {"step": …, "files": {name: bytes}}, written last


def save(engine, folder, client_state, ranks):
    """Weights, fp32 master weights and moments of the trainable parameters, and client_state; to be called by
    all ranks.

    Not whole before finish(). Raises Stopped where it cannot be written.
    """
    options = {"client_state": client_state, "save_latest": False, "exclude_frozen_parameters": True}
    try:
        engine.save_checkpoint(str(folder.parent), tag=folder.name, **options)
    except (OSError, RuntimeError) as error:  # RuntimeError is how torch tells of a full disk
        fault = common.first_line(error)
        raise Stopped(f"{folder}: cannot save ({fault}): make room; the same command goes on") from None
    ranks.barrier()


def finish(folder):
    """Mark a saved folder as whole, and let OUT/last point to it where the file system has links. Rank 0
    alone."""
    # DeepSpeed's converter to one file: useless without the frozen weights
    for path in folder.glob("zero_to_*.py"):
        path.unlink()
    files = {}
    for path in sorted(folder.iterdir()):
        flush(path)
        files[path.name] = path.stat().st_size
    step = int(folder.name.rpartition("-")[2])
    data.write_atomic(folder / WHOLE, json.dumps({"step": step, "files": files}) + "\n")
    last = folder.parent / "last"
    if last.is_dir() and not last.is_symlink():  # a copy made with links followed
        shutil.rmtree(last)
    fresh = folder.parent / ".last.tmp"
    fresh.unlink(missing_ok=True)
    try:
        fresh.symlink_to(folder.name)
        os.replace(fresh, last)
    except OSError:
        print(f"{folder.parent}: no links on this file system; the newest state is {folder.name}", flush=True)


def flush(path):
    """Wait until a file is on the disk."""
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


def newest(out):
    """The name of the newest whole state in OUT, or None. `last` itself only where it is a folder of its
    own."""
    found = {}
    for folder in [*out.glob("state-*"), out / "last"]:
        step = _whole_step(folder)
        if step is not None and step not in found and not folder.is_symlink():
            found[step] = folder.name
    return found[max(found)] if found else None


def _whole_step(folder):
    """The step of a whole state, None of any other folder."""
    try:
        mark = json.loads((folder / WHOLE).read_text())
        whole = all((folder / name).stat().st_size == size for name, size in mark["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return mark["step"] if whole else None


def sweep(out):
    """Delete half-written states, and all but the newest where there is a whole one."""
    keep = newest(out)
    for folder in out.glob("state-*"):
        if folder.name != keep and (keep or _whole_step(folder) is None):
            shutil.rmtree(folder)
    for path in out.glob("zero_to_*.py"):
        path.unlink()


def load(engine, folder, ranks):
    """Put a state into the engine → its client_state; to be called by all ranks. Raises InputError where it
    is broken.

    Where it was saved by another number of ranks, its parts are put together and shared out anew: the same
    numbers, but what follows is not bitwise what it would have been.
    """
    parts = sorted(folder.glob("*optim_states.pt"), key=_rank_of)
    same = len(parts) == ranks.world
    try:
        path, client_state = engine.load_checkpoint(
            str(folder.parent), tag=folder.name, load_module_strict=False, load_module_only=not same
        )
        if path is None:
            raise InputError(f"{folder}: no state in it that DeepSpeed can read")
        if not same:
            _share_out(engine, parts, ranks)
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, AssertionError) as error:
        fault = common.first_line(f"{type(error).__name__}: {error}")
        raise InputError(
            f"{folder}: broken state ({fault}): delete it, an older one is taken, or --fresh"
        ) from None
    if not same and ranks.main:
        print(
            f"{folder}: saved by {len(parts)} ranks, shared out to {ranks.world}: the run goes on, "
            "but not bitwise as it would have",
            flush=True,
        )
    return client_state


def _rank_of(path):
    """ "zero_pp_rank_3_mp_rank_00_optim_states.pt" → 3."""
    return int(path.name.split("pp_rank_")[1].split("_")[0])


def _share_out(engine, parts, ranks):
    """Master weights and moments of all parts, one flat vector each in the order of the parameters → this
    rank's slice."""
    optimizer = engine.optimizer
    saved = [torch.load(path, weights_only=False)["optimizer_state_dict"] for path in parts]
    for group, master in enumerate(optimizer.single_partition_of_fp32_groups):
        moments = [part["base_optimizer_state"]["state"][group] for part in saved]
        flat = {name: torch.cat([moment[name] for moment in moments]) for name in ("exp_avg", "exp_avg_sq")}
        weights = torch.cat([part["single_partition_of_fp32_groups"][group] for part in saved])
        start = ranks.rank * master.numel()
        master.data.copy_(_slice(weights, start, master))
        optimizer.optimizer.state[master] = {"step": moments[0]["step"]}
        for name, values in flat.items():
            optimizer.optimizer.state[master][name] = _slice(values, start, master)


def _slice(flat, start, like):
    """`like.numel()` numbers of `flat` from `start`; 0 beyond its end, which is padding."""
    values = torch.zeros_like(like)
    piece = flat[start : start + like.numel()]
    values[: len(piece)] = piece.to(like.device)
    return values
