"""Scores of stored predictions: votes, intervals, error classes, F1@k. Knows no model, no file and no page.

What belongs to the task, and would change with its items, stands here and in common.py: RULES, ERRORS,
LABEL and compare_items. N examples, S subsets, K responses of an example.
"""

from collections import Counter, defaultdict

import numpy as np

import common

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
VOTES = {  # how several answers become one
    "set": "most frequent set of quintuples",
    "staged": "most frequent set of typed entities, then the most frequent set of quintuples with these",
    "tuple": "every quintuple in a share --tau of the responses",
}
OUTSIDE = "outside the label set"
LABELS = common.RELATIONS
SHARES = ("precision", "recall", "f1")
CHUNK = 1000  # resamples drawn at once, for memory
SIZES = ("0", "1", "2", "3", "4 or more")  # gold quintuples of a tweet


# -------------------------------------------------------------------------------- votes


def vote(answers, parsed, how="set", tau=0.5):
    """Several answers → one, a list without repeats; unparsed answers do not vote.

    answers: tuples of quintuples; parsed: whether each could be read. how: one of VOTES.

    >>> vote([("a",), ("b", "a"), ("a", "b"), ()], [1, 1, 1, 0])
    ['b', 'a']
    >>> vote([("a",), ("b",), ("a", "c")], [1, 1, 1], "tuple", 0.5)
    ['a']
    """
    read = readable_sets(answers, parsed)
    winner = frozenset()
    for chosen in running_votes(read, range(len(read)), how, tau):
        winner = chosen
    if how != "tuple":  # in the order of the first answer that says so
        place = read.index(winner) if winner in read else None
        return [] if place is None else distinct(answers[place])
    voted = []
    for answer, readable in zip(answers, read, strict=True):
        if readable is not None:
            voted += answer
    return [q for q in distinct(voted) if q in winner]


def readable_sets(answers, parsed):
    """Answers as frozensets, None for those that could not be read."""
    sets = []
    for answer, readable in zip(answers, parsed, strict=True):
        sets.append(frozenset(answer) if readable else None)
    return sets


def running_votes(answers, order, how="set", tau=0.5):
    """Yield the vote of the first 1, 2, … of `answers`, taken in `order`: a frozenset of quintuples.

    answers: frozensets, None for an unparsed one, which does not vote; order: their places, shuffled.
    """
    if how == "tuple":
        yield from running_tuples(answers, order, tau)
        return
    first_stage = Plurality()  # of typed entities, or without a first stage of one thing that is always equal
    second_stage = defaultdict(Plurality)
    for place in order:
        answer = answers[place]
        if answer is not None:
            group = frozenset(common.entities(answer)) if how == "staged" else None
            first_stage.add(group, place)
            second_stage[group].add(answer, place)
        yield second_stage[first_stage.leader].leader or frozenset()


def running_tuples(answers, order, tau):
    """running_votes by quintuple."""
    votes = Counter()
    voters = 0
    for place in order:
        answer = answers[place]
        if answer is not None:
            voters += 1
            votes.update(answer)
        yield frozenset(q for q in votes if enough(votes[q], voters, tau))


class Plurality:
    """The most frequent of what was added, as `leader`; on a tie the one with the lowest place."""

    def __init__(self):
        self.votes = Counter()
        self.lowest = {}
        self.leader = None
        self.lead = (0, 0)

    def add(self, unit, place):
        self.votes[unit] += 1
        self.lowest[unit] = min(place, self.lowest.get(unit, place))
        standing = (self.votes[unit], -self.lowest[unit])
        if standing > self.lead:
            self.leader = unit
            self.lead = standing


def enough(votes, voters, tau):
    """Whether so many votes are at least a share tau of the voters; 0.3 of 10 is 3, whatever floats say."""
    return votes >= tau * voters - 1e-9


def distinct(quintuples):
    return list(dict.fromkeys(quintuples))


# -------------------------------------------------------------------------------- metrics


def match_counts(preds, golds, keys):
    """True positives, predicted and gold of each example, as sets of `keys` → int array [N, 3]."""
    counts = []
    for pred, gold in zip(preds, golds, strict=True):
        pred = keys(pred)
        gold = keys(gold)
        counts.append((len(pred & gold), len(pred), len(gold)))
    return np.array(counts).reshape(-1, 3)


def micro_shares(counts):
    """[…, 3] true positives, predicted, gold → [3, …] micro precision, recall, F1; 0 where a denominator is
    0."""
    tp, pred, gold = np.moveaxis(counts, -1, 0)
    precision = tp / np.maximum(pred, 1)
    recall = tp / np.maximum(gold, 1)
    f1 = 2 * tp / np.maximum(pred + gold, 1)
    return np.stack([precision, recall, f1])


def per_tweet(counts, tweets):
    """[N, C] counts of examples → [T, C] of tweets; tweets: [N], number of the tweet each example belongs
    to."""
    sums = np.zeros((tweets.max() + 1, counts.shape[1]), int)
    np.add.at(sums, tweets, counts)
    return sums


def resample(counts, tweets, resamples, seed):
    """Sums of counts [N, C] over resampled tweets → [resamples, C].

    The same seed and tweets give the same resamples, so two systems are compared in pairs.
    """
    clusters = per_tweet(counts, tweets)
    rng = np.random.default_rng(seed)
    n = len(clusters)
    sums = []
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        drawn = rng.multinomial(n, np.full(n, 1 / n), size=size)  # [size, T]: how often each tweet is drawn
        sums.append(drawn @ clusters)
    return np.concatenate(sums)


def headline(preds, golds, tweets, resamples, seed):
    """{metric: micro scores with 95 % intervals} for each matching rule."""
    counts = [match_counts(preds, golds, common.MATCHING[metric]) for metric in RULES]
    sums = resample(np.hstack(counts), tweets, resamples, seed)  # [resamples, 3 · metrics]
    result = {}
    for place, metric in enumerate(RULES):
        scores = common.micro(*counts[place].sum(0).tolist())
        samples = micro_shares(sums[:, 3 * place : 3 * place + 3])
        for name, values in zip(SHARES, samples, strict=True):
            scores[f"{name}_95"] = np.percentile(values, (2.5, 97.5)).tolist()
        result[metric] = scores
    return result


def label_of(q):
    """The label that tables count a quintuple under; labels that do not exist are one."""
    label = getattr(q, LABEL)
    return label if label in LABELS else OUTSIDE


def per_label(preds, golds):
    """{label: micro scores}, most frequent in gold first."""
    counts = defaultdict(Counter)
    for pred, gold in zip(preds, golds, strict=True):
        pred = set(pred)
        gold = set(gold)
        for what, group in (("tp", pred & gold), ("pred", pred), ("gold", gold)):
            for q in group:
                counts[label_of(q)][what] += 1

    def place(name):
        count = counts[name]
        return name == OUTSIDE, -count["gold"], -count["pred"], name

    result = {}
    for name in sorted(counts, key=place):
        count = counts[name]
        result[name] = common.micro(count["tp"], count["pred"], count["gold"])
    return result


def per_component(preds, golds):
    """{field of a quintuple: micro scores}: how often each is right, whatever the others are.

    Predicted and gold quintuples of a tweet are paired one to one so that most fields are equal.
    """
    right = Counter()
    predicted = 0
    wanted = 0
    for pred, gold in zip(preds, golds, strict=True):
        pred = distinct(pred)
        gold = distinct(gold)
        predicted += len(pred)
        wanted += len(gold)
        for i, j in common.best_pairs(pred, gold):
            for name in common.Quintuple._fields:
                right[name] += getattr(pred[i], name) == getattr(gold[j], name)
    return {name: common.micro(right[name], predicted, wanted) for name in common.Quintuple._fields}


def per_size(preds, golds):
    """{number of gold quintuples: examples, micro scores}."""
    counts = match_counts(preds, golds, set)
    largest = len(SIZES) - 1
    sizes = np.minimum(counts[:, 2], largest)
    result = {}
    for size, name in enumerate(SIZES):
        here = sizes == size
        if here.any():
            totals = counts[here].sum(0).tolist()
            result[name] = {"examples": int(here.sum())} | common.micro(*totals)
    return result


def tweet_numbers(examples):
    """[N] the tweet each example belongs to: rows with the same text and image are one."""
    return np.unique([f"{e.text}\0{e.image}" for e in examples], return_inverse=True)[1]


# -------------------------------------------------------------------------------- error classes


def overlap(a, b):
    """Whether two entity texts share a word, or one lies within the other; case does not count."""
    a = a.casefold()
    b = b.casefold()
    if a in b or b in a:
        return True
    return bool(set(a.split()) & set(b.split()))


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
    lone_wrong = dict(enumerate(wrong))
    lone_missed = dict(enumerate(missed))
    for _, i, j, kind in sorted(links):
        if i in lone_wrong and j in lone_missed:
            errors.append((kind, lone_wrong.pop(i), lone_missed.pop(j)))
    for q in lone_wrong.values():
        errors.append(("spurious", q, None))
    for q in lone_missed.values():
        errors.append(("missing" if parsed else "unparsed", None, q))
    return errors


def count_errors(preds, golds, parsed):
    """→ ({class: [false positives, false negatives]}, [(gold label, predicted label, times)])."""
    counts = {name: [0, 0] for name in ERRORS}
    confusion = Counter()
    for pred, gold, ok in zip(preds, golds, parsed, strict=True):
        for kind, p, g in classify(pred, gold, ok):
            counts[kind][0] += p is not None
            counts[kind][1] += g is not None
            if kind == CONFUSED:
                confusion[label_of(g), label_of(p)] += 1
    return counts, [(*pair, times) for pair, times in confusion.most_common()]


# -------------------------------------------------------------------------------- many responses


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
        answers = readable_sets(p.answers[:n], p.parsed[:n])
        gold = set(gold)
        places = np.tile(np.arange(n), (subsets, 1))
        orders = rng.permuted(places, axis=1)  # [S, K]
        for s, order in enumerate(orders.tolist()):
            for k, chosen in enumerate(running_votes(answers, order, how, tau)):
                tp[s, k] += len(chosen & gold)
                predicted[s, k] += len(chosen)
    wanted = sum(len(set(gold)) for gold in golds)
    return 2 * tp / np.maximum(predicted + wanted, 1)


def diversity(preds, golds, args):
    """What many responses are worth: F1@k, single responses, the best of K by an oracle, distinct answers and
    reasoning paths. args: vote, tau, subsets, seed."""
    curve = f1_at_k(preds, golds, args.vote, args.tau, args.subsets, args.seed)  # [S, K]
    n = curve.shape[1]
    counts = []
    for i in range(n):
        single = [p.answers[i] for p in preds]
        counts.append(match_counts(single, golds, set))
    counts = np.stack(counts)  # [K, N, 3]
    tp, pred, gold = np.moveaxis(counts, 2, 0)  # each [K, N]
    size = pred + gold
    f1 = np.where(size > 0, 2 * tp / np.maximum(size, 1), 1)
    best = counts[f1.argmax(0), np.arange(len(preds))]  # [N, 3]
    single_f1 = micro_shares(counts.sum(1))[2]  # [K]
    distinct_answers = []
    for p in preds:
        answers = set(readable_sets(p.answers, p.parsed))
        distinct_answers.append(len(answers - {None}))
    deviations = [*curve.std(0).tolist()[:-1], None]  # all K responses are one subset: nothing to deviate
    ks = range(1, n + 1)
    points = zip(ks, curve.mean(0).tolist(), deviations, strict=True)
    return {
        "n": n,
        "subsets": args.subsets,
        "f1_at_k": [list(point) for point in points],
        "single_mean": float(np.mean(single_f1)),
        "single_std": float(np.std(single_f1)),
        "best_of_n": common.micro(*best.sum(0).tolist())["f1"],
        "distinct_paths": float(np.mean([p.paths for p in preds])),
        "distinct_answers": float(np.mean(distinct_answers)),
    }
