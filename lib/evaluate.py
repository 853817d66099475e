"""All figures of one stored run: what metrics.json holds. Knows no page."""

import platform
import shutil
import subprocess
import time
from collections import Counter
from importlib import metadata
from pathlib import Path

import common
from common import InputError
from lib import controls, limits, predictions, scoring

TAUS = [step / 20 for step in range(1, 21)]  # that best_tau tries


def evaluate(args, run):
    """StoredRun → (what metrics.json holds, {id: the answer after the vote}).

    A tweet without a prediction counts as an empty one. args: data, vote, tau, resamples, subsets, seed.
    """
    finals = {}
    for name, given in run.predictions.items():
        finals[name] = scoring.vote(given.answers, given.parsed, args.vote, args.tau)
    responses = Counter()
    for example in run.examples:
        if example.id in run.predictions:
            responses.update(run.predictions[example.id].counts)
    scored = [example for example in run.examples if example.quintuples is not None]
    metrics = {
        "examples": len(run.examples),
        "without_prediction": sum(example.id not in run.predictions for example in run.examples),
        "without_gold": len(run.examples) - len(scored),
        "other_gold": len(run.other_gold),
        "responses": dict(responses),
        "vote": args.vote,
        "tau": args.tau if args.vote == "tuple" else None,
        "seed": args.seed,
        "resamples": args.resamples,
    }
    if scored:
        metrics |= score(args, scored, run.predictions, finals)
    metrics["provenance"] = provenance(args, run)
    return metrics, finals


def score(args, examples, given, finals):
    """The part of `evaluate` that needs gold. given: {id: Prediction}."""
    preds = [finals.get(example.id, []) for example in examples]
    golds = [example.quintuples for example in examples]
    parsed = [example.id not in given or any(given[example.id].parsed) for example in examples]
    tweets = scoring.tweet_numbers(examples)
    metrics = {
        "scores": scoring.headline(preds, golds, tweets, args.resamples, args.seed),
        "matching": {name: rule for name, (_, rule) in scoring.RULES.items()},
        "limits": limits.limits(examples, preds, golds, tweets),
        "controls": controls.controls(examples, preds),
        "per_relation": scoring.per_label(preds, golds),
        "per_component": scoring.per_component(preds, golds),
        "per_size": scoring.per_size(preds, golds),
    }
    metrics["errors"], metrics["confusion"] = scoring.count_errors(preds, golds, parsed)
    sizes = [len(given[example.id].answers) for example in examples if example.id in given]
    n = min(sizes, default=1)
    if n > 1:
        full = [given.get(example.id, predictions.unanswered(n)) for example in examples]
        metrics["samples"] = scoring.diversity(full, golds, args)
    return metrics


def best_tau(path):
    """The --tau with the best F1 on stored validation predictions, of equals the middle one. Raises
    InputError."""
    run = predictions.stored_run(path)
    golds = [example.quintuples for example in run.examples]
    if None in golds:
        raise InputError(f"--tau-from {path}: has tweets without gold, so no F1")
    given = [run.predictions[example.id] for example in run.examples]
    f1 = []
    for tau in TAUS:
        preds = [scoring.vote(p.answers, p.parsed, "tuple", tau) for p in given]
        counts = scoring.match_counts(preds, golds, common.MATCHING[common.HEADLINE])
        f1.append(common.micro(*counts.sum(0).tolist())["f1"])
    equals = [tau for tau, score in zip(TAUS, f1, strict=True) if score == max(f1)]
    best = equals[len(equals) // 2]
    print(f"--tau {best:g}, the best on {path} (F1 {100 * max(f1):.2f} %)")
    return best


def provenance(args, run):
    """Of what, by what and when."""
    result = {
        "predictions": {"file": str(run.path), "sha256": predictions.file_hash(run.path)},
        "data": None,  # the gold in the predictions
        "made_by": run.source,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"python": platform.python_version(), "numpy": metadata.version("numpy")},
    }
    if args.data:
        result["data"] = {"file": str(args.data), "sha256": predictions.file_hash(args.data)}
    result["versions"]["commit"] = commit()
    return result


def commit():
    """The commit of this repository, or None where git does not tell."""
    if not shutil.which("git"):
        return None
    command = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or None
