"""What a run's own figures say is going wrong, from its rows of metrics.jsonl. Knows names of metrics, no
model."""

from statistics import mean

WINDOW = 20  # updates

LOOK = "look at samples.jsonl and curves.png in OUT"


def alarms(rows):
    """{name: sentence} of what is wrong after the newest of `rows`; metrics that are not in the rows are no
    reason."""
    found = {}
    recent = rows[-WINDOW:]
    early = rows[:WINDOW]
    if len(rows) >= WINDOW:
        if _every(recent, "constant_groups", 1):
            found["constant"] = (
                f"no group of the last {WINDOW} updates had two different rewards, so nothing was learnt: "
                f"{LOOK}; "
                "if all are wrong, warm up longer (03), if all are right, the task is done, "
                "else raise --temperature"
            )
        if _every(recent, "format", 0):
            found["format"] = (
                f"no response of the last {WINDOW} updates was well formed, so nothing is rewarded: {LOOK}; "
                "was the adapter trained with this prompt, and is --max-new-tokens long enough?"
            )
    if len(rows) >= 2 * WINDOW:
        before, now = _means(early, recent, "entropy")
        if now < 0.1 * before:
            found["entropy"] = (
                f"entropy fell from {before:.3g} to {now:.3g}: the policy answers without a choice; {LOOK}"
            )
        before, now = _means(early, recent, "cut_off")
        if now > before + 0.3:
            found["cut_off"] = (
                f"{now:.0%} of the responses are cut off, at first {before:.0%}: they grow; {LOOK}"
            )
        before, now = _means(early, recent, "kl")
        if now > 1:
            found["kl"] = (
                f"KL to the reference is {now:.2f} nats a token: the policy drifts; "
                "raise --kl-coef or lower --lr"
            )
    if _reward_up_f1_down(rows):
        found["reward"] = (
            f"the reward rises while validation F1 falls: the policy learns the reward, not the task; {LOOK}"
        )
    return found


def _every(rows, name, value):
    return all(row.get(name) == value for row in rows)


def _means(early, recent, name):
    """Mean of a metric in both windows; (0, 0) where it is not logged."""
    if name not in recent[-1] or name not in early[0]:
        return 0.0, 0.0
    return mean(row[name] for row in early), mean(row[name] for row in recent)


def _reward_up_f1_down(rows):
    """Whether over the last three validations F1 fell each time, and the mean reward between them rose."""
    validated = [i for i, row in enumerate(rows) if "val_jmere_f1" in row and "reward" in row]
    if len(validated) < 3 or validated[-1] != len(rows) - 1:
        return False
    first, second, third = validated[-3:]
    f1 = [rows[i]["val_jmere_f1"] for i in (first, second, third)]
    before = mean(row["reward"] for row in rows[first + 1 : second + 1])
    after = mean(row["reward"] for row in rows[second + 1 : third + 1])
    return f1[0] > f1[1] > f1[2] and after > before
