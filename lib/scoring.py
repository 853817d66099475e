"""Scores of stored predictions: votes, intervals, error classes, F1@k, comparison of runs. Knows no model and no page."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

import common
from common import InputError
from lib.predictions import stored_run

RULES = {  # metric: (title, matching rule), in the order they are shown
    "jmere": ("JMERE", "all five parts equal, direction and case count"),
    "jmere_undirected": ("JMERE undirected", "head and tail may swap (EEGA's published scorer)"),
    "jmere_folded": ("JMERE case-folded", "as JMERE, upper and lower case alike"),
    "mner": ("MNER", "text and type of the quintuples' entities, distinct per tweet"),
}
ERRORS = {  # class: what is wrong, the first that applies; every false positive and false negative is in exactly one
    "span": "text of an entity differs, the two texts overlap",
    "type": "entities right, a type is wrong",
    "relation": "entities and types right, relation wrong",
    "direction": "all right but head and tail are exchanged",
    "missing": "gold with no predicted counterpart",
    "spurious": "predicted with no gold counterpart",
    "unparsed": "gold of a tweet whose responses hold no readable answer",
}
TABLES = {  # section: {row: the paper's JMERE P, R, F1 and MNER F1 on the test set, %; None: not known here}
    "Zero-shot (Table 3)": {
        "zero-shot GPT-4o": (None, None, 12.68, None),
        "zero-shot Qwen2.5-VL-7B": (None, None, 9.60, None),
        "zero-shot LLaVA-1.5-7B": (None, None, 9.52, None),
    },
    "Trained (Table 1)": {
        "EEGA": (58.26, 52.61, 55.29, 78.59),
        "SFT": (56.88, 47.81, 51.95, 78.67),
        "CoT-SFT": (50.54, 43.59, 46.77, 74.75),
        "Only-RL": (40.11, 34.53, 37.11, 71.89),
        "JMERE-R1": (58.99, 54.84, 56.84, 79.20),
    },
    "Ablations (Table 2)": dict.fromkeys(
        ("no partial reward", "no score filter", "no re-prediction filter", "no filter"), (None,) * 4
    ),
    "Other runs": {},
}


# ------------------------------------------------------------------------------------------------ votes


def vote(answers, parsed, how="set", tau=0.5):
    """Several answers → one, a list without repeats; unparsed answers do not vote.

    >>> vote([("a",), ("b", "a"), ("a", "b"), ()], [1, 1, 1, 0]), vote([("a",), ("b",), ("a", "c")], [1, 1, 1], "tuple", 0.5)
    (['b', 'a'], ['a'])
    """
    voters = [tuple(dict.fromkeys(answer)) for answer, ok in zip(answers, parsed) if ok]
    if not voters:
        return []
    if how == "tuple":
        return [
            q
            for q, n in Counter(q for answer in voters for q in answer).items()
            if n >= tau * len(voters) - 1e-9
        ]
    winner = max(
        counts := Counter(map(frozenset, voters)), key=counts.get
    )  # a Counter keeps order: the earliest on a tie
    return list(next(answer for answer in voters if frozenset(answer) == winner))


# ------------------------------------------------------------------------------------------------ metrics


def match_counts(preds, golds, keys):
    """True positives, predicted and gold of each example, as sets of `keys` → int array [N, 3]."""
    sets = [(keys(pred), keys(gold)) for pred, gold in zip(preds, golds, strict=True)]
    return np.array([(len(pred & gold), len(pred), len(gold)) for pred, gold in sets]).reshape(-1, 3)


def bootstrap(counts, tweets, resamples, seed):
    """Micro precision, recall, F1 of resampled tweets → [3, resamples]. Same seed, same tweets: the same resamples, so paired.

    counts: [N, 3] of match_counts; tweets: [N], number of the tweet each example belongs to.
    """
    clusters = np.zeros((tweets.max() + 1, 3), int)
    np.add.at(clusters, tweets, counts)
    rng, n = np.random.default_rng(seed), len(clusters)
    tp, pred, gold = (rng.multinomial(n, np.full(n, 1 / n), size=resamples) @ clusters).T  # each [resamples]
    return np.stack([tp / np.maximum(pred, 1), tp / np.maximum(gold, 1), 2 * tp / np.maximum(pred + gold, 1)])


def headline(preds, golds, tweets, resamples, seed):
    """{metric: micro scores with 95 % intervals} for each matching rule."""
    result = {}
    for metric in RULES:
        counts = match_counts(preds, golds, common.MATCHING[metric])
        low, high = np.percentile(bootstrap(counts, tweets, resamples, seed), (2.5, 97.5), axis=1)
        result[metric] = common.micro(*counts.sum(0).tolist())
        result[metric] |= {
            f"{name}_95": [low[i], high[i]] for i, name in enumerate(("precision", "recall", "f1"))
        }
    return result


def per_relation(preds, golds):
    """{relation: micro scores}, most frequent in gold first."""
    counts = defaultdict(lambda: [0, 0, 0])
    for pred, gold in zip(preds, golds, strict=True):
        pred, gold = set(pred), set(gold)
        for i, group in enumerate((pred & gold, pred, gold)):
            for q in group:
                counts[q.relation][i] += 1
    return {
        name: common.micro(*counts[name])
        for name in sorted(counts, key=lambda name: (-counts[name][2], -counts[name][1], name))
    }


def per_size(preds, golds):
    """{number of gold quintuples: micro scores, examples}."""
    counts, sizes = match_counts(preds, golds, set), np.array([min(len(set(gold)), 4) for gold in golds])
    groups = {name: sizes == size for size, name in enumerate(("0", "1", "2", "3", "4 or more"))}
    return {
        name: {"examples": int(m.sum())} | common.micro(*counts[m].sum(0).tolist())
        for name, m in groups.items()
        if m.any()
    }


def overlap(a, b):
    """Whether two entity texts share a word, or one lies within the other; case does not count."""
    a, b = a.casefold(), b.casefold()
    return a in b or b in a or not set(a.split()).isdisjoint(b.split())


def compare_quintuples(pred, gold):
    """(equal components, error class) of two unequal quintuples about the same two entities, else None.

    They are aligned head to head, or crosswise where only that fits or more components are equal then.
    """
    fits = []
    for crossed in (False, True):
        p = (
            common.Quintuple(pred.tail, pred.tail_type, pred.head, pred.head_type, pred.relation)
            if crossed
            else pred
        )
        if overlap(p.head, gold.head) and overlap(p.tail, gold.tail):
            same = [a == b for a, b in zip(p, gold)]
            kind = (
                "span"
                if not (same[0] and same[2])
                else "type"
                if not (same[1] and same[3])
                else "direction"
                if same[4]
                else "relation"
            )
            fits.append((sum(same), not crossed, kind))
    return max(fits)[::2] if fits else None


def classify(pred, gold, parsed=True):
    """The errors of one example → [(class, false positive or None, false negative or None)].

    False positives and negatives about the same entities are paired one to one, most equal components first; the rest is
    spurious, and missing (unparsed where no response could be read).
    """
    wrong, missed = (
        [q for q in dict.fromkeys(pred) if q not in gold],
        [q for q in dict.fromkeys(gold) if q not in pred],
    )
    links = [
        (-fit[0], i, j, fit[1])
        for i, p in enumerate(wrong)
        for j, g in enumerate(missed)
        if (fit := compare_quintuples(p, g))
    ]
    errors, used_wrong, used_missed = [], set(), set()
    for _, i, j, kind in sorted(links):
        if i not in used_wrong and j not in used_missed:
            errors.append((kind, wrong[i], missed[j]))
            used_wrong.add(i)
            used_missed.add(j)
    errors += [("spurious", q, None) for i, q in enumerate(wrong) if i not in used_wrong]
    return errors + [
        ("missing" if parsed else "unparsed", None, q) for j, q in enumerate(missed) if j not in used_missed
    ]


def tweet_numbers(examples):
    """[N] the tweet each example belongs to: rows with the same text and image are one."""
    return np.unique([f"{e.text}\0{e.image}" for e in examples], return_inverse=True)[1]


# ------------------------------------------------------------------------------------------------ many responses (Figure 5)


def f1_at_k(preds, golds, how="set", tau=0.5, subsets=20, seed=0):
    """Micro F1 of `vote` over k of the N responses of each example, for k = 1 … N → [subsets S, N].

    preds: one Prediction an example. Each subset shuffles the responses of each example; its first k are a random subset of size k.
    """
    n, rng = min(len(p.answers) for p in preds), np.random.default_rng(seed)
    tp, pred = np.zeros((2, subsets, n), int)
    for p, gold in zip(preds, golds, strict=True):
        order = rng.permuted(np.tile(np.arange(n), (subsets, 1)), axis=1)  # [S, N]
        sets = [frozenset(answer) if ok else None for answer, ok in zip(p.answers[:n], p.parsed)]
        units = sets if how == "set" else [q for answer in sets if answer for q in answer]
        index = {
            unit: i for i, unit in enumerate(dict.fromkeys(unit for unit in units if unit is not None))
        }  # what is voted on: U units
        if not index:
            continue
        ballots = np.zeros((n, len(index)), np.int32)  # [N, U]
        for i, answer in enumerate(sets):
            if answer is not None:
                ballots[i, [index[answer]] if how == "set" else [index[q] for q in answer]] = 1
        votes = ballots[order].cumsum(1, dtype=np.int32)  # [S, N, U]
        if how == "set":
            first = np.minimum.accumulate(
                np.where(ballots[order], order[..., None].astype(np.int32), n), 1
            )  # ties: the earliest
            winner, cast = (votes * (n + 1) - first).argmax(2), votes.any(2)  # [S, N]
            tp += np.array([len(unit & set(gold)) for unit in index])[winner] * cast
            pred += np.array([len(unit) for unit in index])[winner] * cast
        else:
            voters = np.array([answer is not None for answer in sets])[order].cumsum(1)  # [S, N]
            chosen = (votes >= tau * voters[..., None] - 1e-9) & (votes > 0)
            tp += (chosen & np.array([unit in gold for unit in index])).sum(2)
            pred += chosen.sum(2)
    return 2 * tp / np.maximum(pred + sum(len(set(gold)) for gold in golds), 1)


def diversity(preds, golds, args):
    """What many responses are worth: F1@k, single responses, the best of N by an oracle, distinct answers and reasoning paths."""
    curve = f1_at_k(preds, golds, args.vote, args.tau, args.subsets, args.seed)
    n = curve.shape[1]
    counts = np.stack(
        [match_counts([p.answers[i] for p in preds], golds, set) for i in range(n)]
    )  # [N, examples, 3]
    tp, pred, gold = np.moveaxis(counts, 2, 0)
    best = np.where(pred + gold > 0, 2 * tp / np.maximum(pred + gold, 1), 1).argmax(0)  # [examples]
    single = [common.micro(*total)["f1"] for total in counts.sum(1).tolist()]
    answers = [len({frozenset(answer) for answer, ok in zip(p.answers, p.parsed) if ok}) for p in preds]
    return {
        "n": n,
        "subsets": args.subsets,
        "f1_at_k": [
            [k, m, d] for k, (m, d) in enumerate(zip(curve.mean(0).tolist(), curve.std(0).tolist()), 1)
        ],
        "single_mean": float(np.mean(single)),
        "single_std": float(np.std(single)),
        "best_of_n": common.micro(*counts[best, np.arange(len(preds))].sum(0).tolist())["f1"],
        "distinct_paths": float(np.mean([p.paths for p in preds])),
        "distinct_answers": float(np.mean(answers)),
    }


# ------------------------------------------------------------------------------------------------ tables and comparison


def table(header, rows):
    """Aligned columns: text to the left, numbers to the right."""
    lines = [[str(x) for x in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    right = [
        i > 0 and all(not isinstance(row[i], str) or row[i][:1] in "0123456789+-–" for row in rows)
        for i in range(len(header))
    ]
    return (
        "\n".join(
            "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right)).rstrip()
            for row in lines
        )
        + "\n"
    )


def cells(scores):
    return [f"{100 * scores[name]:.2f}" for name in ("precision", "recall", "f1")] + [
        scores[name] for name in ("tp", "pred", "gold")
    ]


def plain(name):
    return "".join(c for c in name.casefold() if c.isalnum())


def compare(args, known):
    """The runs of --compare in the layout of the paper's tables, each against the first by a paired bootstrap. → rows, as dicts."""
    rows, first, gold = {}, None, known
    for spec in args.compare:
        name, _, path = ("", "", spec) if Path(spec).exists() else spec.rpartition("=")
        name = name or (
            Path(path).stem if Path(path).stem != "predictions" else Path(path).absolute().parent.name
        )
        if plain(name) in rows:
            raise InputError(f"--compare: two runs are named {name}: name them, as in SFT={path}")
        examples, predictions = stored_run(path, gold, args.limit)
        gold = gold or {e.id: e for e in examples}
        if any(e.quintuples is None for e in examples):
            raise InputError(f"{path}: has tweets without gold: give the gold with --data")
        preds = [
            vote(p.answers, p.parsed, args.vote, args.tau) if (p := predictions.get(e.id)) else []
            for e in examples
        ]
        golds, tweets = [e.quintuples for e in examples], tweet_numbers(examples)
        samples = bootstrap(match_counts(preds, golds, set), tweets, args.resamples, args.seed)[
            2
        ]  # same seed: paired
        scores = headline(preds, golds, tweets, args.resamples, args.seed)
        row = {
            "name": name,
            "run": path,
            "tweets": len(examples),
            "without_prediction": sum(e.id not in predictions for e in examples),
        }
        row["scores"] = {metric: scores[metric] for metric in ("jmere", "mner")}
        if first is None:
            first = (scores["jmere"]["f1"], samples)
        else:
            difference = samples - first[1]
            tail = (
                1 + min((difference <= 0).sum(), (difference >= 0).sum()).item()
            )  # + 1: no finite number of resamples shows p = 0
            row |= {
                "f1_difference": scores["jmere"]["f1"] - first[0],
                "p": min(1.0, 2 * tail / (args.resamples + 1)),
            }
            row["difference_95"] = np.percentile(difference, (2.5, 97.5)).tolist()
        rows[plain(name)] = row
    papers = {
        plain(name): (section, name, row) for section, group in TABLES.items() for name, row in group.items()
    }
    result = [
        {"section": section, "name": name, "paper": paper, **rows.pop(key, {})}
        for key, (section, name, paper) in papers.items()
    ]
    starts = {
        "zero-shot": "Zero-shot (Table 3)",
        **dict.fromkeys(("no ", "without ", "w/o "), "Ablations (Table 2)"),
    }
    for row in rows.values():  # runs that are no row of the paper
        section = next((starts[s] for s in starts if row["name"].casefold().startswith(s)), "Other runs")
        result.append({"section": section, "paper": None, **row})
    return sorted(result, key=lambda row: list(TABLES).index(row["section"]))


COMPARED = (
    "P %",
    "R %",
    "F1 %",
    "95 % of F1",
    "MNER F1",
    "ΔF1",
    "95 % of Δ",
    "p",
    "paper P",
    "R",
    "F1",
    "MNER F1",
)


def compared_cells(row):
    def number(x, sign=""):
        return "–" if x is None else f"{x:{sign}.2f}"

    scores, difference = row.get("scores"), row.get("difference_95")
    ours = ["–"] * 5
    if scores:
        s = scores["jmere"]
        ours = [
            *cells(s)[:3],
            "–".join(number(100 * x) for x in s["f1_95"]),
            number(100 * scores["mner"]["f1"]),
        ]
    delta = ["–"] * 3
    if difference:
        delta = [
            number(100 * row["f1_difference"], "+"),
            " … ".join(number(100 * x, "+") for x in difference),
            f"{row['p']:.3f}",
        ]
    return [*ours, *delta, *map(number, row["paper"] or [None] * 4)]


def show_comparison(rows, markdown=False):
    """Tables 1 to 3 as text or Markdown; a section without a run of ours and without a figure of the paper is left out."""
    for section in TABLES:
        body = [
            (r["name"], *compared_cells(r))
            for r in rows
            if r["section"] == section and (r.get("scores") or any(r["paper"]))
        ]
        if body and markdown:
            lines = [(section, *COMPARED), ("---", *["---:"] * len(COMPARED)), *body]
            yield "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
        elif body:
            yield table((section, *COMPARED), body)
