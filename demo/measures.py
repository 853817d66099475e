"""What the folders that run.sh and ablations.sh leave hold: the figures of one run, of two runs compared, and
which runs there are.

Reads: WORK/*/metrics.json and predictions.jsonl of 05.
"""

import argparse
import json
from functools import cache
from pathlib import Path
from statistics import mean

import common
from lib import compare, data

VOTES = {"CoT-SFT": "vote-sft", "JMERE-R1": "vote"}
SWEEP = ("F1", "MNER F1", "reward (≤ 1.5)", "tokens")


# ---------------------------------------------------------------------------------------------------- one run


def read(folder, *parts):
    """metrics.json of a run → {part: what it holds}. Raises InputError where a part is not there."""
    path = Path(folder) / "metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        return {part: metrics[part] for part in parts}
    except (OSError, ValueError, KeyError) as error:
        maker = "05_eval.py --samples" if "samples" in parts else "05_eval.py"
        fault = f"no scores to read ({type(error).__name__}: {error})"
        raise common.InputError(f"{path}: {fault}: made by {maker} on data with gold") from None


def f1(folder):
    """JMERE F1 of a run, in percent."""
    return 100 * read(folder, "scores")["scores"][common.HEADLINE]["f1"]


def reward(folder):
    """Mean reward of a run's responses as 04 gives it by default (Eq. 5): 0 … 1.5.

    None where they were asked for the answer alone.
    """
    rewards = []
    for _, row in data.read_jsonl(Path(folder) / "predictions.jsonl"):
        if row["prompt"] == "direct":
            return None
        gold = [common.quintuple(*q) for q in row["quintuples"]]
        rewards += [reward_of(response["text"], gold) for response in row["responses"]]
    return mean(rewards)


def tokens(folder):
    """Mean length of a run's responses in tokens; None where they were not counted."""
    rows = [row for _, row in data.read_jsonl(folder / "predictions.jsonl")]
    lengths = [response.get("tokens") for row in rows for response in row["responses"]]
    return None if None in lengths else mean(lengths)


def reward_of(text, gold):
    """Eq. 5 with the paper's weights."""
    response = common.parse_response(text)
    accuracy = common.accuracy_reward(response, gold)
    partial = common.partial_reward(response, gold)
    return accuracy + 0.2 * partial + 0.1 * common.format_reward(response)


def scores(folder):
    """{column: figure} of one run; the interval as (low, high)."""
    metrics = read(folder, "scores", "responses")
    jmere = metrics["scores"][common.HEADLINE]
    low, high = jmere["f1_95"]
    responses = metrics["responses"]
    return {
        "JMERE P": 100 * jmere["precision"],
        "R": 100 * jmere["recall"],
        "F1": 100 * jmere["f1"],
        "95 % of F1": (100 * low, 100 * high),
        "MNER F1": 100 * metrics["scores"]["mner"]["f1"],
        "parsed": 100 - 100 * responses["unparsed"] / responses["responses"],
        "reward (≤ 1.5)": reward(folder),
        "tokens": tokens(folder),
    }


def sweep(folder):
    """{column: figure} of one run among many that differ in one thing."""
    return {name: value for name, value in scores(folder).items() if name in SWEEP}


def votes(folder):
    """{column: figure} of one run with many responses: F1@1, F1@2, F1@4, …, and how much they differ."""
    many = read(folder, "samples")["samples"]
    curve = {k: 100 * f1 for k, f1, _ in many["f1_at_k"]}
    shown = [k for k in curve if k & (k - 1) == 0 or k == many["n"]]  # powers of 2, and the last
    cells = {f"F1@{k}": curve[k] for k in shown}
    cells["best of N"] = 100 * many["best_of_n"]
    cells["distinct answers"] = many["distinct_answers"]
    cells["paths"] = many["distinct_paths"]
    return cells


# --------------------------------------------------------------------------------------------------- two runs


def paired_gain(folder):
    """GRPO's gain over CoT-SFT: paired() of the two."""
    return paired(folder / "test-sft", folder / "test-grpo")


@cache
def paired(base, run):
    """A run's gain over another on the same tweets, as 05_eval.py --compare has it → ([low, high], p).

    low, high: 95 %, in points.
    """
    runs = [f"base={base}", f"run={run}"]
    settings = argparse.Namespace(compare=runs, limit=None, vote="set", tau=0.5, resamples=1000, seed=0)
    rows = compare.compare(settings).rows
    scores = next(row["scores"][common.HEADLINE] for row in rows if row["name"] == "run")
    return [100 * end for end in scores["difference_95"]], scores["p"]


def gains(runs):
    """GRPO's gain over CoT-SFT in points, of each training."""
    return [f1(run / "test-grpo") - f1(run / "test-sft") for run in runs]


# --------------------------------------------------------------------------------------- which runs there are


def scored(run):
    return (run / "metrics.json").exists()


def lacking(folder, runs):
    """The first of a seed's runs that has no scores, or None."""
    return next((folder / run for run in runs.values() if not scored(folder / run)), None)


def found(folders, prefix):
    """{what follows the prefix: its run} of the runs that every seed has scores of."""
    names = [{path.parent.name for path in folder.glob(f"{prefix}*/metrics.json")} for folder in folders]
    shared = sorted(set.intersection(*names), key=lambda run: (len(run), run))  # 4 before 16
    return {run.removeprefix(prefix): run for run in shared}


def group_sizes(folders):
    """{size of a group: its run} of those that every seed has; 8 is the main one."""
    runs = {8: "test-grpo"}
    for size, run in found(folders, "test-group-").items():
        runs[int(size)] = run
    return dict(sorted(runs.items()))


def trainings(folders):
    """The finished trainings of the part `gain`: SEED/gain/CLASS-TRAINING_SEED."""
    runs = [run for folder in folders for run in sorted(folder.glob("gain/*-*"))]
    return [run for run in runs if scored(run / "test-sft") and scored(run / "test-grpo")]


def arch(run):
    """The class of a training of the part `gain`."""
    return run.name.rpartition("-")[0]
