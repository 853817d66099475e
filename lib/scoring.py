"""Scores of stored predictions: votes, intervals, error classes, F1@k. Knows no model, no file and no page.

What belongs to the task, and would change with its items, stands here and in common.py: RULES, ERRORS,
LABEL and compare_items. N examples, S subsets, K responses of an example.
"""

from collections import Counter, defaultdict

import numpy as np

import common
from lib.predictions import unanswered

LABEL = "relation"  # the field that tables go by
RULES = {  # metric: (title, matching rule), in the order they are shown
    "jmere": ("JMERE", "all five parts equal, direction and case count"),
    "jmere_undirected": ("JMERE undirected", "head and tail may swap (EEGA's published scorer)"),
    "jmere_folded": ("JMERE case-folded", "as JMERE, upper and lower case alike"),
    "mner": ("MNER", "text and type of the quintuples' entities, distinct per tweet"),
}
ERRORS = {  # class: what is wrong; every false positive and negative is in one, the first that applies
    "span": "text of an entity differs, the two texts overlap",
    "type": "entities right, a type is wrong",
    "relation": "entities and types right, relation wrong",
    "direction": "all right but head and tail are exchanged",
    "missing": "gold with no predicted counterpart",
    "spurious": "predicted with no gold counterpart",
    "unparsed": "gold of a tweet whose responses hold no readable answer",
}
CONFUSED = "relation"  # the class whose pairs of labels are counted
SIZES = ("0", "1", "2", "3", "4 or more")  # gold quintuples of a tweet


# -------------------------------------------------------------------------------- votes


def vote(answers, parsed, how="set", tau=0.5):
    """Several answers → one, a list without repeats; unparsed answers do not vote.

    answers: tuples of quintuples; parsed: whether each could be read. how: `set`, the most frequent set, the
    earliest on a tie; `tuple`, every quintuple in at least a share tau of the answers.

    >>> vote([("a",), ("b", "a"), ("a", "b"), ()], [1, 1, 1, 0])
    ['b', 'a']
    >>> vote([("a",), ("b",), ("a", "c")], [1, 1, 1], "tuple", 0.5)
    ['a']
    """
    voters = [tuple(dict.fromkeys(answer)) for answer, ok in zip(answers, parsed, strict=True) if ok]
    if not voters:
        return []
    if how == "tuple":
        votes = Counter(q for answer in voters for q in answer)
        return [q for q in votes if enough(votes[q], len(voters), tau)]
    votes = Counter(map(frozenset, voters))
    winner = max(votes, key=votes.get)  # a Counter keeps order: the earliest on a tie
    return list(next(answer for answer in voters if frozenset(answer) == winner))


def enough(votes, voters, tau):
    """Whether so many votes are at least a share tau of the voters; 0.3 of 10 is 3, whatever floats say."""
    return votes >= tau * voters - 1e-9


# -------------------------------------------------------------------------------- metrics


def match_counts(preds, golds, keys):
    """True positives, predicted and gold of each example, as sets of `keys` → int array [N, 3]."""
    counts = []
    for pred, gold in zip(preds, golds, strict=True):
        pred = keys(pred)
        gold = keys(gold)
        counts.append((len(pred & gold), len(pred), len(gold)))
    return np.array(counts).reshape(-1, 3)


def bootstrap(counts, tweets, resamples, seed):
    """Micro precision, recall, F1 of resampled tweets → [3, resamples].

    counts: [N, 3] of match_counts; tweets: [N], number of the tweet each example belongs to. The same seed
    and tweets give the same resamples, so two systems are compared in pairs.
    """
    clusters = np.zeros((tweets.max() + 1, 3), int)
    np.add.at(clusters, tweets, counts)
    rng = np.random.default_rng(seed)
    n = len(clusters)
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=resamples)  # [resamples, tweets]
    tp, pred, gold = (drawn @ clusters).T  # each [resamples]
    return np.stack([tp / np.maximum(pred, 1), tp / np.maximum(gold, 1), 2 * tp / np.maximum(pred + gold, 1)])


def headline(preds, golds, tweets, resamples, seed):
    """{metric: micro scores with 95 % intervals} for each matching rule."""
    result = {}
    for metric in RULES:
        counts = match_counts(preds, golds, common.MATCHING[metric])
        samples = bootstrap(counts, tweets, resamples, seed)
        scores = common.micro(*counts.sum(0).tolist())
        for name, values in zip(("precision", "recall", "f1"), samples, strict=True):
            scores[f"{name}_95"] = np.percentile(values, (2.5, 97.5)).tolist()
        result[metric] = scores
    return result


def per_label(preds, golds):
    """{label: micro scores}, most frequent in gold first."""
    counts = defaultdict(Counter)
    for pred, gold in zip(preds, golds, strict=True):
        pred = set(pred)
        gold = set(gold)
        for what, group in (("tp", pred & gold), ("pred", pred), ("gold", gold)):
            for q in group:
                counts[getattr(q, LABEL)][what] += 1
    order = sorted(counts, key=lambda name: (-counts[name]["gold"], -counts[name]["pred"], name))
    return {name: common.micro(*(counts[name][what] for what in ("tp", "pred", "gold"))) for name in order}


def per_size(preds, golds):
    """{number of gold quintuples: examples, micro scores}."""
    counts = match_counts(preds, golds, set)
    sizes = np.array([min(len(set(gold)), len(SIZES) - 1) for gold in golds])
    result = {}
    for size, name in enumerate(SIZES):
        here = sizes == size
        if here.any():
            result[name] = {"examples": int(here.sum())} | common.micro(*counts[here].sum(0).tolist())
    return result


def tweet_numbers(examples):
    """[N] the tweet each example belongs to: rows with the same text and image are one."""
    return np.unique([f"{e.text}\0{e.image}" for e in examples], return_inverse=True)[1]


# -------------------------------------------------------------------------------- error classes


def overlap(a, b):
    """Whether two entity texts share a word, or one lies within the other; case does not count."""
    a = a.casefold()
    b = b.casefold()
    return a in b or b in a or not set(a.split()).isdisjoint(b.split())


def compare_items(pred, gold):
    """(equal components, error class) of two unequal quintuples about the same two entities, else None.

    They are aligned head to head, or crosswise where only that fits or more components are equal then.
    """
    crossed = common.Quintuple(pred.tail, pred.tail_type, pred.head, pred.head_type, pred.relation)
    fits = []
    for straight, candidate in ((True, pred), (False, crossed)):
        if overlap(candidate.head, gold.head) and overlap(candidate.tail, gold.tail):
            equal = sum(a == b for a, b in zip(candidate, gold, strict=True))
            fits.append((equal, straight, error_class(candidate, gold)))
    if not fits:
        return None
    equal, _, kind = max(fits)
    return equal, kind


def error_class(pred, gold):
    """The first class that applies to two quintuples aligned head to head."""
    if (pred.head, pred.tail) != (gold.head, gold.tail):
        return "span"
    if (pred.head_type, pred.tail_type) != (gold.head_type, gold.tail_type):
        return "type"
    return "relation" if pred.relation != gold.relation else "direction"


def classify(pred, gold, parsed=True):
    """The errors of one example → [(class, false positive or None, false negative or None)].

    False positives and negatives about the same entities are paired one to one, most equal components
    first; the rest is spurious, and missing (unparsed where no response could be read).
    """
    wrong = [q for q in dict.fromkeys(pred) if q not in gold]
    missed = [q for q in dict.fromkeys(gold) if q not in pred]
    links = []
    for i, p in enumerate(wrong):
        for j, g in enumerate(missed):
            if fit := compare_items(p, g):
                equal, kind = fit
                links.append((-equal, i, j, kind))
    errors = []
    paired_wrong = set()
    paired_missed = set()
    for _, i, j, kind in sorted(links):
        if i not in paired_wrong and j not in paired_missed:
            errors.append((kind, wrong[i], missed[j]))
            paired_wrong.add(i)
            paired_missed.add(j)
    errors += [("spurious", q, None) for i, q in enumerate(wrong) if i not in paired_wrong]
    absent = "missing" if parsed else "unparsed"
    return errors + [(absent, None, q) for j, q in enumerate(missed) if j not in paired_missed]


def count_errors(preds, golds, parsed):
    """→ ({class: [false positives, false negatives]}, [(gold label, predicted label, times)])."""
    counts = {name: [0, 0] for name in ERRORS}
    confusion = Counter()
    for pred, gold, ok in zip(preds, golds, parsed, strict=True):
        for kind, p, g in classify(pred, gold, ok):
            counts[kind][0] += p is not None
            counts[kind][1] += g is not None
            if kind == CONFUSED:
                confusion[getattr(g, LABEL), getattr(p, LABEL)] += 1
    return counts, [(*pair, times) for pair, times in confusion.most_common()]


# -------------------------------------------------------------------------------- many responses


def running_votes(answers, order, how="set", tau=0.5):
    """Yield the vote of the first 1, 2, … of `answers`, taken in `order`: a set of quintuples.

    answers: frozensets, None for an unparsed one, which does not vote; order: their places, shuffled. On a
    tie of sets the lowest place wins, as in `vote`.
    """
    votes = Counter()
    voters = 0
    lowest = {}  # set: the lowest place it was seen at
    leader = frozenset()
    lead = (0, 0)  # votes and place of the leader
    for place in order:
        answer = answers[place]
        if answer is not None:
            voters += 1
            votes.update([answer] if how == "set" else answer)
        if how == "tuple":
            yield {q for q in votes if enough(votes[q], voters, tau)}
            continue
        if answer is not None:
            lowest[answer] = min(place, lowest.get(answer, place))
            if (votes[answer], -lowest[answer]) > lead:
                leader = answer
                lead = (votes[answer], -lowest[answer])
        yield leader


def f1_at_k(preds, golds, how="set", tau=0.5, subsets=20, seed=0):
    """Micro F1 of `vote` over k of the K responses of each example, for k = 1 … K → [S, K].

    preds: one Prediction an example. Each subset shuffles the responses of each example by itself; its
    first k are a random subset of size k.
    """
    n = min(len(p.answers) for p in preds)
    rng = np.random.default_rng(seed)
    tp = np.zeros((subsets, n), int)
    predicted = np.zeros((subsets, n), int)
    for p, gold in zip(preds, golds, strict=True):
        pairs = zip(p.answers[:n], p.parsed[:n], strict=True)
        answers = [frozenset(answer) if ok else None for answer, ok in pairs]
        gold = set(gold)
        orders = rng.permuted(np.tile(np.arange(n), (subsets, 1)), axis=1)  # [S, K]
        for s, order in enumerate(orders.tolist()):
            for k, chosen in enumerate(running_votes(answers, order, how, tau)):
                tp[s, k] += len(chosen & gold)
                predicted[s, k] += len(chosen)
    return 2 * tp / np.maximum(predicted + sum(len(set(gold)) for gold in golds), 1)


def diversity(preds, golds, args):
    """What many responses are worth: F1@k, single responses, the best of K by an oracle, distinct answers and
    reasoning paths. args: vote, tau, subsets, seed."""
    curve = f1_at_k(preds, golds, args.vote, args.tau, args.subsets, args.seed)  # [S, K]
    n = curve.shape[1]
    counts = np.stack(
        [match_counts([p.answers[i] for p in preds], golds, set) for i in range(n)]
    )  # [K, N, 3]
    tp, pred, gold = np.moveaxis(counts, 2, 0)  # each [K, N]
    f1 = np.where(pred + gold > 0, 2 * tp / np.maximum(pred + gold, 1), 1)
    best = counts[f1.argmax(0), np.arange(len(preds))]  # [N, 3]
    single = [common.micro(*total)["f1"] for total in counts.sum(1).tolist()]
    distinct = [len({frozenset(a) for a, ok in zip(p.answers, p.parsed, strict=True) if ok}) for p in preds]
    points = zip(curve.mean(0).tolist(), curve.std(0).tolist(), strict=True)
    return {
        "n": n,
        "subsets": args.subsets,
        "f1_at_k": [[k, mean, std] for k, (mean, std) in enumerate(points, 1)],
        "single_mean": float(np.mean(single)),
        "single_std": float(np.std(single)),
        "best_of_n": common.micro(*best.sum(0).tolist())["f1"],
        "distinct_paths": float(np.mean([p.paths for p in preds])),
        "distinct_answers": float(np.mean(distinct)),
    }


# -------------------------------------------------------------------------------- all of it


def evaluate(args, examples, predictions):
    """All figures of one stored file → (what metrics.json holds, {id: the answer after the vote}).

    examples: of the data, in order; predictions: {id: Prediction}. A tweet without a prediction counts as
    an empty one. args: vote, tau, resamples, subsets, seed.
    """
    finals = {name: vote(p.answers, p.parsed, args.vote, args.tau) for name, p in predictions.items()}
    responses = Counter()
    for example in examples:
        if example.id in predictions:
            responses.update(predictions[example.id].counts)
    scored = [example for example in examples if example.quintuples is not None]
    metrics = {
        "examples": len(examples),
        "without_prediction": sum(example.id not in predictions for example in examples),
        "responses": dict(responses),
        "vote": args.vote,
        "tau": args.tau if args.vote == "tuple" else None,
        "seed": args.seed,
        "resamples": args.resamples,
        "without_gold": len(examples) - len(scored),
    }
    if scored:
        metrics |= score(args, scored, predictions, finals)
    return metrics, finals


def score(args, examples, predictions, finals):
    """The part of `evaluate` that needs gold."""
    preds = [finals.get(example.id, []) for example in examples]
    golds = [example.quintuples for example in examples]
    parsed = [example.id not in predictions or any(predictions[example.id].parsed) for example in examples]
    metrics = {
        "scores": headline(preds, golds, tweet_numbers(examples), args.resamples, args.seed),
        "matching": {name: rule for name, (_, rule) in RULES.items()},
        "per_relation": per_label(preds, golds),
        "per_size": per_size(preds, golds),
    }
    metrics["errors"], metrics["confusion"] = count_errors(preds, golds, parsed)
    given = [predictions[example.id] for example in examples if example.id in predictions]
    n = min((len(p.answers) for p in given), default=1)
    if n > 1:
        given = [predictions.get(example.id, unanswered(n)) for example in examples]
        metrics["samples"] = diversity(given, golds, args)
    return metrics
