"""Every analysis of the paper (Figures 1 to 14, Tables 1, 3 and 4) as one JSON-able dict."""

from __future__ import annotations

import zlib

import numpy as np

from rlvd_jax.errors import UserError
from rlvd_jax.evaluation import claims, difficulty, published
from rlvd_jax.evaluation.accuracy import out_of_distribution_bound
from rlvd_jax.evaluation.graded import Graded
from rlvd_jax.evaluation.intervals import Bootstrap, Resampled
from rlvd_jax.evaluation.measures import STYLE, Measures
from rlvd_jax.evaluation.pair import Pair, style_means


class Analysis:
    """Measures, resamples and pairs of one study, each computed once."""

    def __init__(self, graded: dict[str, dict[str, Graded]], resamples: int, seed: int):
        self.graded, self.resamples, self.seed = graded, resamples, seed
        self._measures, self._bootstraps, self._pairs = {}, {}, {}

    def of(self, problems: str, model: str) -> Graded:
        try:
            return self.graded[problems][model]
        except KeyError:
            raise UserError(f"there are no graded responses of '{model}' to '{problems}'") from None

    def measures(self, problems: str, model: str) -> Measures:
        if (problems, model) not in self._measures:
            graded = self.of(problems, model)
            empty = np.flatnonzero(~graded.valid.any(axis=1))
            if len(empty) or not graded.questions:
                what = f"question '{graded.questions[empty[0]]}' of " if len(empty) else ""
                raise UserError(f"'{model}' has no response to {what}'{problems}'")
            self._measures[problems, model] = Measures.of(graded)
        return self._measures[problems, model]

    def bootstrap(self, problems: str, questions: int) -> Bootstrap:
        """The same resamples for all models on the same questions, independent ones for other problems."""
        if (problems, questions) not in self._bootstraps:
            seed = (self.seed, zlib.crc32(problems.encode()))
            self._bootstraps[problems, questions] = Bootstrap(questions, self.resamples, seed)
        return self._bootstraps[problems, questions]

    def pair(self, problems: str, base: str, other: str) -> Pair:
        """Two models on the questions and the number of samples that they share."""
        if (problems, base, other) not in self._pairs:
            first, second = self.of(problems, base), self.of(problems, other)
            where = {question: i for i, question in enumerate(second.questions)}
            rows = [i for i, question in enumerate(first.questions) if question in where]
            if not rows:
                raise UserError(f"'{base}' and '{other}' have no question of '{problems}' in common")
            samples = min(first.valid.shape[1], second.valid.shape[1])
            measures = []
            for name, graded, take in (
                (base, first, rows),
                (other, second, [where[first.questions[i]] for i in rows]),
            ):
                whole = take == list(range(len(graded.questions))) and samples == graded.valid.shape[1]
                measures.append(self.measures(problems, name) if whole else Measures.of(graded.take(take, samples)))
            self._pairs[problems, base, other] = Pair(
                base, measures[0], other, measures[1], self.bootstrap(problems, len(rows))
            )
        return self._pairs[problems, base, other]

    def accuracy(self, problems: str, model: str) -> Resampled:
        measures = self.measures(problems, model)
        return self.bootstrap(problems, len(measures.questions)).mean(measures.rate)

    def gain(self, problems: str, base: str, other: str) -> Resampled:
        """Paired difference in accuracy."""
        return self.pair(problems, base, other).difference("accuracy")


def _curve(curve: Resampled) -> dict:
    low, high = curve.bounds()
    k = list(range(1, len(curve.value) + 1))
    return {"k": k, "value": curve.value.tolist(), "low": low.tolist(), "high": high.tolist()}


def _model(study: Analysis, problems: str, model: str, base: str | None, hardest: int) -> dict:
    """One model on one set of problems; pass_hardest is on the questions that `base` solves least (Figure 4)."""
    m = study.measures(problems, model)
    bootstrap = study.bootstrap(problems, len(m.questions))
    columns = np.column_stack([m.rate, m.majority, m.majority_first_seen, m.entropy, m.pass_at_k])
    summary = bootstrap.mean(columns)
    accuracy, maj, maj_first_seen, entropy = summary[slice(0, 4)].estimates()
    pass_hardest = None
    if base is not None:
        reference = study.measures(problems, base)
        if len(reference.questions) > hardest:
            chosen = {reference.questions[i] for i in np.argsort(reference.rate, kind="stable")[:hardest]}
            mask = np.array([question in chosen for question in m.questions])
            if mask.any():
                curve = bootstrap.ratio(m.pass_at_k * mask[:, None], mask)
                pass_hardest = _curve(curve) | {"questions": int(mask.sum()), "by": base}
    style = style_means(bootstrap, m)
    samples, responses = int(m.samples.max()), int(m.samples.sum())
    return {
        "questions": len(m.questions),
        "samples": samples,
        "fewest_samples": int(m.samples.min()),
        "responses": responses,
        "accuracy": accuracy,
        "maj": maj,
        "maj_first_seen": maj_first_seen,
        "pass": _curve(summary[slice(4, None)]),
        "pass_hardest": pass_hardest,
        "entropy": entropy,
        "truncated": m.truncated.sum() / responses,
        "no_answer": m.no_answer.sum() / responses,
        "unsolved": {"questions": int((m.successes == 0).sum()), "bound": out_of_distribution_bound(samples)},
        "bins": np.bincount(difficulty.assign(m.successes, m.samples), minlength=len(difficulty.BOUNDS)),
        **{s: dict(zip(("all", "correct", "incorrect"), style[s].estimates(), strict=True)) for s in STYLE},
    }


def _bins(pair: Pair) -> list[dict]:
    """By the base model's bins: success rates, gain, and entropies (Figures 1, 5, 8 and 10)."""
    quantities = {
        "base": pair.base.rate,
        "other": pair.other.rate,
        "gain": pair.other.rate - pair.base.rate,
        "entropy_base": pair.base.entropy,
        "entropy_other": pair.other.entropy,
        "entropy_change": pair.other.entropy - pair.base.entropy,
    }
    columns = np.column_stack(list(quantities.values()))
    rows = []
    for b, (label, (low, high)) in enumerate(zip(pair.labels, difficulty.ranges(pair.samples), strict=True)):
        estimates = pair.mean_within(columns, [b]).estimates()
        head = {"label": label, "low": low, "high": high, "questions": int(pair.within([b]).sum())}
        rows.append(head | dict(zip(quantities, estimates, strict=True)))
    return rows


def _transitions(pair: Pair) -> dict:
    """Counts and row percentages; `expected` is what sampling noise alone would give (Figures 2, 6 and 9)."""
    counts = difficulty.transitions(pair.bins, pair.other_bins)
    with np.errstate(invalid="ignore"):
        percent = 100 * counts / counts.sum(axis=1, keepdims=True)
    expected = np.zeros(counts.shape)
    np.add.at(expected, pair.bins, pair.unchanged)
    return {"labels": pair.labels, "counts": counts, "percent": percent, "expected": expected}


def _style(pair: Pair) -> dict:
    """Length and phrases by four bins of the base model's successes and by correctness (Figures 11 and 12)."""
    bounds = difficulty.STYLE_BOUNDS
    bins = difficulty.assign(pair.base.successes, pair.base.samples, bounds)
    result = {
        "labels": difficulty.labels(pair.samples, bounds),
        "questions": np.bincount(bins, minlength=len(bounds)),
    } | {s: {"base": {"correct": [], "incorrect": []}, "other": {"correct": [], "incorrect": []}} for s in STYLE}
    for role, measures in (("base", pair.base), ("other", pair.other)):
        for b in range(len(bounds)):
            means = style_means(pair.bootstrap, measures, bins == b)
            for s in STYLE:
                _, correct, incorrect = means[s].estimates()
                result[s][role]["correct"].append(correct)
                result[s][role]["incorrect"].append(incorrect)
    return result


def _comparison(pair: Pair, claim: str | None) -> dict:
    return {
        "base": pair.base_name,
        "other": pair.other_name,
        "claim": claim,
        "questions": len(pair.bins),
        "samples": pair.samples,
        "k": pair.k,
        # On the questions and the number of samples that both have: not what the models have by themselves.
        "values": {
            role: {name: both[i].estimate() for name, both in pair.summary.items()}
            for i, role in enumerate(("base", "other"))
        },
        "difference": {name: pair.difference(name).estimate() for name in pair.summary},
        "overtaken": pair.overtaken,
        "bins": _bins(pair),
        "transitions": _transitions(pair),
        "style": _style(pair),
    }


def _comparison_claims(study: Analysis, comparisons: list[dict]) -> list[dict]:
    judged = []
    for kind, tests in claims.COMPARISON_CLAIMS.items():
        for c in comparisons:
            if c.get("claim") == kind:
                pair = study.pair(c["problems"], c["base"], c["other"])
                where = {"problems": c["problems"], "comparison": f"{c['base']}→{c['other']}"}
                judged += [test.judge(pair) | where for test in tests]
    for new in comparisons:
        for pattern in comparisons:
            kinds = new.get("claim"), pattern.get("claim")
            same = all(new[key] == pattern[key] for key in ("base", "problems"))
            if kinds == ("new_knowledge", "reasoning_only") and same:
                problems = new["problems"]
                judged.append(
                    claims.KNOWLEDGE_CLAIM.judge(
                        study.pair(problems, new["base"], new["other"]),
                        study.pair(problems, pattern["base"], pattern["other"]),
                        study.pair(problems, pattern["other"], new["other"]).difference("pass"),
                    )
                    | {"problems": problems, "comparison": f"{new['base']}→{new['other']}"}
                )
    return judged


def _self_distillation(study: Analysis, rows: list[dict], rl: set[str]) -> tuple[list[dict], list[dict]]:
    """Table 1: its rows, and the verdicts on its claims. `rl` holds the models known to come from RL."""
    table, judged = [], []
    crossed = [row for row in rows if row["student"] != row["teacher"]]
    rl = rl | {row["teacher"] for row in crossed}
    for row in rows:
        student, model, train, test = (row[key] for key in ("student", "model", "train", "test"))
        gains = None if student is None else [study.gain(p, student, model) for p in (train, test)]
        table.append(
            row
            | {
                "train_problems": train,
                "test_problems": test,
                "train": study.accuracy(train, model).estimate(),
                "test": study.accuracy(test, model).estimate(),
                "train_gain": gains and gains[0].estimate(),
                "test_gain": gains and gains[1].estimate(),
            }
        )
        if student is None:
            continue
        where = {"problems": test, "comparison": None}
        distilled = claims.Distilled(student, row["teacher"], model, *gains)
        if student == row["teacher"]:
            claim = claims.OVERFITS_RL if student in rl else claims.OVERFITS_BASE
            judged.append(claim.judge(distilled) | where)
            continue
        judged.append(claims.REACHES.judge(distilled, study.gain(test, row["teacher"], model)) | where)
        for own in rows:
            if own["student"] == own["teacher"] == student and own["test"] == test:
                judged.append(
                    claims.TEACHES.judge(distilled, own["model"], study.gain(test, own["model"], model)) | where
                )
    return table, judged


def plain(value):
    """NumPy values and NaN as what JSON holds: numbers, lists, None."""
    if isinstance(value, dict):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def analyse(
    graded: dict[str, dict[str, Graded]],
    comparisons: list[dict],
    *,
    progress: dict | None = None,
    models: dict | None = None,
    hardest: int = 50,
    bootstrap: int = 2000,
    seed: int = 0,
    self_distillation: list[dict] | None = None,
) -> dict:
    """Analyse the graded responses of {problems: {model: Graded}}.

    comparisons: dicts of base, other, problems (one name) and claim ("rl", "new_knowledge", "reasoning_only" or
    None), each on the questions that both models answered and the number of samples that both have. models and
    progress are passed on to the result; a model's `paper` entry brings in the published figures.
    self_distillation: the rows of Table 1 in order, dicts of student, teacher (None for a model of its own), model,
    and train and test (names of problems). Every estimate is {"value", "low", "high"} with a 95% bootstrap interval
    over questions, None where undefined. Raises UserError if responses are missing.
    """
    models = models or {}
    notes = published.beside(models, comparisons)
    study = Analysis(graded, bootstrap, seed)
    for c in comparisons:
        for model in (c["base"], c["other"]):
            study.of(c["problems"], model)  # missing responses are found before anything is computed
    problems = {}
    for name, by_model in graded.items():
        own = [c for c in comparisons if c["problems"] == name]
        base_of = dict.fromkeys(by_model, own[0]["base"] if own else None)
        base_of |= {model: c["base"] for c in reversed(own) for model in (c["base"], c["other"])}
        problems[name] = {
            "questions": len({question for g in by_model.values() for question in g.questions}),
            "models": {model: _model(study, name, model, base_of[model], hardest) for model in by_model},
            "comparisons": {
                f"{c['base']}→{c['other']}": _comparison(study.pair(name, c["base"], c["other"]), c.get("claim"))
                for c in own
            },
        }
    rl = {c["other"] for c in comparisons if c.get("claim") == "rl"}
    table, distilled = _self_distillation(study, self_distillation or [], rl)
    return plain(
        {
            "models": models,
            "problems": problems,
            "self_distillation": table,
            "progress": progress or {},
            "claims": _comparison_claims(study, comparisons) + distilled,
            "published": notes,
        }
    )
