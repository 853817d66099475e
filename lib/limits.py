"""What a score on a file can tell: its ceiling, and the tweet that moves it most. Knows no model and no
file."""

from collections import Counter

import numpy as np

import common
from common import HEADLINE
from lib import scoring


def limits(examples, preds, golds, tweets):
    """{"ceiling": …, "influence": …} of examples with gold. preds, golds: [N] lists of quintuples; tweets:
    [N]."""
    counts = scoring.match_counts(preds, golds, common.MATCHING[HEADLINE])
    return {"ceiling": ceiling(golds, tweets), "influence": influence(examples, counts, tweets)}


def ceiling(golds, tweets):
    """The best micro F1 of a system that gives all rows of a tweet one answer, and how many tweets stand in
    several rows with other gold.

    A quintuple in k of a tweet's n rows is worth predicting where 2k/n is above the F1 that it is to raise:
    the rule is applied until F1 no longer rises (Dinkelbach's method for the best quotient).
    """
    rows = Counter(tweets.tolist())
    held = Counter()  # (tweet, quintuple): rows that hold it
    for tweet, gold in zip(tweets.tolist(), golds, strict=True):
        for q in set(gold):
            held[tweet, q] += 1
    gold = held.total()
    best = 0.0
    f1 = -1.0
    while best > f1:
        f1 = best
        tp = 0
        pred = 0
        for (tweet, _), k in held.items():
            if 2 * k > f1 * rows[tweet]:
                tp += k
                pred += rows[tweet]
        best = common.micro(tp, pred, gold)["f1"]
    repeated = set()
    for (tweet, _), k in held.items():
        if k < rows[tweet]:
            repeated.add(tweet)
    return {
        "f1": best,
        "tweets": len(repeated),
        "rows": sum(rows[tweet] for tweet in repeated),
    }


def influence(examples, counts, tweets):
    """The tweet that moves F1 most: F1 with all its gold found, with none, and without the tweet.

    counts: [N, 3] true positives, predicted, gold. → None where there is no gold.
    """
    clusters = scoring.per_tweet(counts, tweets)  # [T, 3]
    if not clusters[:, 2].any():
        return None
    rest = clusters.sum(0) - clusters
    gold = clusters[:, 2:]
    nothing = np.zeros_like(gold)
    without = f1_of(rest)  # each [T]
    right = f1_of(rest + np.hstack([gold, gold, gold]))
    missed = f1_of(rest + np.hstack([nothing, nothing, gold]))
    outcomes = np.stack([without, right, missed])
    tweet = int(np.ptp(outcomes, axis=0).argmax())
    ids = [examples[place].id for place in np.flatnonzero(tweets == tweet)]
    return {
        "ids": ids,
        "gold": int(gold[tweet, 0]),
        "f1_without": float(without[tweet]),
        "f1_right": float(right[tweet]),
        "f1_missed": float(missed[tweet]),
    }


def f1_of(counts):
    return scoring.micro_shares(counts)[2]
