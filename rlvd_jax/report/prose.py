"""Sentences made from the numbers: the summary at the top, and what each figure shows."""

from __future__ import annotations

from rlvd_jax.report.figures import fewer, pass_estimate, spell
from rlvd_jax.report.text import interval, number, percent, value_of

VERDICTS = ("shown", "not shown", "unclear")


def listed(items) -> str:
    """a, b and c."""
    items = [str(i) for i in items]
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""


def counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def share(estimate) -> str:
    """`29.2% [24.1, 34.5]`."""
    around = interval(estimate, 100)
    return f"{percent(value_of(estimate))}%{' ' + around if around else ''}"


def moved(estimate) -> str:
    """up, down or flat: whether the interval of a difference lies on one side of zero."""
    low, high = (estimate or {}).get("low"), (estimate or {}).get("high")
    return "up" if low is not None and low > 0 else "down" if high is not None and high < 0 else "flat"


def points(estimate) -> str:
    """`+9.6 points [6.2, 13.1]`."""
    around = interval(estimate, 100, sign=True)
    return f"{percent(value_of(estimate), sign=True)} points{' ' + around if around else ''}"


def headline(results: dict) -> str | None:
    """The set of problems that the summary speaks of: the one that most claims are about, of equals the one that is
    compared first; without claims the last."""
    about = [c["problems"] for c in results.get("claims") or () if c.get("problems") in results["problems"]]
    return max(about or reversed(results["problems"]), key=about.count, default=None)


def summary(results: dict) -> list[str]:
    """A few sentences: how much was judged, which model is best, how the claims came out."""
    problems = results["problems"]
    responses = sum(m["responses"] for p in problems.values() for m in p["models"].values())
    names = {m for p in problems.values() for m in p["models"]}
    sets = listed(f"{counted(p['questions'], 'question')} of {name}" for name, p in problems.items())
    were = "was" if responses == 1 else "were"
    sentences = [f"{counted(responses, 'response')} of {counted(len(names), 'model')} to {sets} {were} judged."]
    name = headline(results)
    known = {m: r for m, r in problems[name]["models"].items() if value_of(r["accuracy"]) is not None} if name else {}
    if known:
        best = max(known, key=lambda m: known[m]["accuracy"]["value"])
        rank = ", the most accurate," if len(known) > 1 else ""
        sentences.append(f"On {name}, {best}{rank} gets {share(known[best]['accuracy'])} of single responses right.")
    verdicts = [c["verdict"] for c in results.get("claims") or ()]
    if verdicts:
        parts = listed(f"{verdicts.count(v)} {v}" for v in VERDICTS if v in verdicts)
        sentences.append(f"Of {counted(len(verdicts), 'test')} of the paper's claims, {parts}.")
    return sentences


def comparison(c: dict) -> str:
    """What the step from base to other does to accuracy and to capability, as far as the intervals tell."""
    d = c["difference"]
    joint = "and" if moved(d["accuracy"]) == moved(d["pass"]) else "while"
    return f"Accuracy {_change(d['accuracy'])} {joint} pass@{c['k']:,} {_change(d['pass'])}."


def overtaken(c: dict) -> str:
    """Which of the two curves of pass@k is above, and from which k on."""
    base, other, k = c["base"], c["other"], c["overtaken"]
    if k is None:
        return f"With k = {c['k']:,} responses {other} still solves more questions than {base}."
    if k == 1:
        return f"With no number of responses does {other} solve more questions than {base}."
    return f"With fewer than {k:,} responses {other} solves more questions than {base}, from k = {k:,} on it does not."


def taken(c: dict, models: dict) -> str:
    """Which responses are compared where one of the two models has more than the other."""
    if not fewer({m: models[m] for m in (c["base"], c["other"])}):
        return ""
    return f"Of each model the first {counted(c['samples'], 'response')} to each question are compared."


def _change(difference) -> str:
    direction = moved(difference)
    if direction == "flat":
        return "does not clearly change"
    return f"{'rises' if direction == 'up' else 'falls'} by {percent(abs(difference['value']))} points"


# ---------------------------------------------------------------------------------------------------------------------
# Captions


def overview(models: dict) -> str:
    """Whose pass@n is farthest above its accuracy, and whose is nearest, of the models with the most responses."""
    text = "Accuracy (one response), majority vote and pass@n (any of n), with 95% intervals over questions."
    few = fewer(models)
    equal = {m: r for m, r in models.items() if m not in few}
    known = {m: (value_of(pass_estimate(r)), value_of(r["accuracy"])) for m, r in equal.items()}
    gaps = {m: most - once for m, (most, once) in known.items() if None not in (most, once)}
    if not any(gaps.values()):
        return text
    widest, closest = max(gaps, key=gaps.get), min(gaps, key=gaps.get)
    if widest == closest:
        whose = f" for {listed(gaps)}" if few else ""
        return f"{text} pass@n is {percent(gaps[widest])} points above accuracy{whose}."
    among = f", of the models with {spell(models[widest])} responses to each question" if few else ""
    return (
        f"{text} What a model can do but seldom does, the distance from accuracy to pass@n, is widest for {widest} "
        f"({percent(gaps[widest])} points) and narrowest for {closest} ({percent(gaps[closest])}){among}."
    )


def pass_curves(curves: dict, pairs: list[tuple[str, str]]) -> str:
    """Who leads at the smallest, the largest shared and the largest k, and which models fall below their base."""
    k = max(c["k"][-1] for c in curves.values())
    first = {m: c["value"][0] for m, c in curves.items() if c["value"][0] is not None}
    last = {m: c["value"][-1] for m, c in curves.items() if c["k"][-1] == k and c["value"][-1] is not None}
    if not first or not last:
        return ""
    if len(curves) == 1:
        (low,), (high,) = first.values(), last.values()
        return f"From {percent(low)}% at k = 1 to {percent(high)}% at k = {k:,}."
    text = f"Highest at k = 1: {_leaders(first)}"
    shared = min(c["k"][-1] for c in curves.values())
    at = {m: c["value"][shared - 1] for m, c in curves.items() if c["value"][shared - 1] is not None}
    if 1 < shared < k and at:
        text += f"; at k = {shared:,}: {_leaders(at)}"
    lacking = [m for m, c in curves.items() if c["k"][-1] < k]
    which = f", which {listed(lacking)} {'lacks' if len(lacking) == 1 else 'lack'}" if lacking else ""
    text += f"; at k = {k:,}{which}: {_leaders(last)}"
    behind: dict[str, list[str]] = {}
    for base, other in pairs:
        if {base, other} <= curves.keys() and (at := crossing(curves[base], curves[other])):
            behind.setdefault(base, []).append(f"{other} (from k = {at:,})")
    for base, others in behind.items():
        text += f". {listed(others)} {'falls' if len(others) == 1 else 'fall'} below {base}"
    return text + "."


def _leaders(values: dict[str, float]) -> str:
    best = max(values.values())
    return f"{listed(m for m, v in values.items() if v > best - 5e-4)}, {percent(best)}%"


def crossing(base: dict, other: dict) -> int | None:
    """The k from which on `other`, above `base` at some smaller one, is below it; None if it ends above or never is."""
    at = {k: v for k, v in zip(base["k"], base["value"], strict=True) if v is not None}
    steps = [(k, v - at[k]) for k, v in zip(other["k"], other["value"], strict=True) if v is not None and k in at]
    above = [i for i, (_, d) in enumerate(steps) if d > 1e-9]
    if not above or steps[-1][1] >= -1e-9:
        return None
    return next(k for k, d in steps[above[-1] + 1 :] if d < -1e-9)


def success_counts(models: dict) -> str:
    few = fewer(models)
    never = listed(f"{m} {r['bins'][0]:,}" for m, r in models.items() if m not in few)
    text = f"Questions by how many of the responses to them are correct. Never solved: {never}."
    if few:
        text += (
            f" With fewer responses ({listed(few)}) questions are grouped by the share of correct ones, and more of "
        )
        text += "them are never solved."
    return text


def bins(c: dict, published: dict | None = None) -> str:
    rows = [b for b in c["bins"] if value_of(b["gain"]) is not None]
    if not rows:
        return ""
    best = max(rows, key=lambda b: b["gain"]["value"])
    text = (
        f"Questions grouped by the correct responses of {c['base']} out of {c['samples']:,}. The largest gain of "
        f"{c['other']} is in {best['label']}: {points(best['gain'])}"
    )
    lowest = [b for b in rows if b["low"] <= 1 and b is not best][:2]
    if lowest:
        text += "; in " + listed(f"{b['label']} {points(b['gain'])}" for b in lowest)
    if published:
        gains = listed(f"{label} {percent(gain, sign=True)}" for label, gain in published.items())
        text += f". The paper's gains, drawn as diamonds: {gains}"
    return text + "."


def transitions(c: dict, published: dict | None = None) -> str:
    counts, labels = c["transitions"]["counts"], c["transitions"]["labels"]
    expected = c["transitions"].get("expected")
    n = sum(map(sum, counts))
    up = sum(sum(row[i + 1 :]) for i, row in enumerate(counts))
    down = sum(sum(row[:i]) for i, row in enumerate(counts))
    text = (
        f"Rows: the bin of {c['base']}; columns: the bin of the same questions for {c['other']}, as share of the row "
        f"and count. Of {counted(n, 'question')} {up:,} move up, {n - up - down:,} stay and {down:,} move down"
    )
    if expected:
        noise = sum(sum(row[:i]) for i, row in enumerate(expected))
        text += f" (sampling noise alone would move {number(noise)} down)"
    if sum(counts[1]):
        text += f"; of the {sum(counts[1]):,} in {labels[1]} {counts[1][0]:,} fall to {labels[0]}"
        if expected:
            text += f" (noise: {number(expected[1][0])})"
    if published:
        rows = (
            f"{label} {', '.join(f'{percent(v)}% {move}' for move, v in moves.items() if move != 'questions')}"
            for label, moves in published.items()
        )
        text += f". In the paper: {'; '.join(rows)}"
    return text + "."


def entropy(c: dict) -> str:
    pairs = [(value_of(b["entropy_base"]), value_of(b["entropy_other"])) for b in c["bins"]]
    pairs = [(a, b) for a, b in pairs if a is not None and b is not None]
    a, b = (value_of(c["values"][key]["entropy"]) for key in ("base", "other"))
    text = "Entropy of the distribution of final answers to a question; 0 is always the same answer."
    if a is not None and b is not None:
        text += f" Overall {number(a, 2)} nats for {c['base']}, {number(b, 2)} for {c['other']};"
        text += f" lower for {c['other']} in {sum(y < x for x, y in pairs)} of {counted(len(pairs), 'bin')}."
    return text


def style_by_correctness(c: dict, models: dict, what: str, unit: str) -> str:
    digits = 1 if what == "length" else 2
    parts = []
    for key in ("base", "other"):
        right, wrong = (value_of(models[c[key]][what][kind]) for kind in ("correct", "incorrect"))
        if right is not None or wrong is not None:
            parts.append(f"{number(right, digits)} and {number(wrong, digits)} {unit} for {c[key]}")
    text = f"Mean of correct and of incorrect responses: {listed(parts)}." if parts else ""
    if what == "keywords":
        both = [(c[key], value_of(models[c[key]]["keywords_substring"]["all"])) for key in ("base", "other")]
        text += " Whole words, without regard to case; as plain substrings the mean over all responses is "
        text += listed(f"{number(mean, 2)} for {m}" for m, mean in both) + "."
    return text


def progress(run: dict) -> str:
    known = [(s, a) for s, a in zip(run["step"], run["accuracy"], strict=True) if a is not None]
    if not known:
        return ""
    text = f"Accuracy {percent(known[0][1])}% at step {known[0][0]:,}"
    best = max(known, key=lambda x: x[1])
    if best != known[0]:
        text += f", highest at step {best[0]:,} with {percent(best[1])}%"
    if run.get("kept") is not None:
        text += f"; the checkpoint of step {run['kept']:,} is kept (ringed)"
    lengths = [v for v in run["length"] if v is not None]
    if lengths:
        text += f". Responses: {number(lengths[0])} tokens at first, {number(lengths[-1])} at the end"
    return text + "."
