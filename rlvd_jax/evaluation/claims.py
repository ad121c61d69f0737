"""The paper's claims, and whether a run shows them.

Every claim has a rule, its test's docstring, that turns 95% intervals over questions into a verdict: "shown", "not
shown" (the interval speaks against it) or "unclear". A claim that something does not happen is shown only when the
interval excludes more than a stated margin, never because a difference failed to be significant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rlvd_jax.evaluation.intervals import Resampled, share
from rlvd_jax.evaluation.pair import Pair

SHOWN, NOT_SHOWN, UNCLEAR = "shown", "not shown", "unclear"
CAPABILITY_MARGIN = 0.01  # pass@n: a rise of up to 1 point is none
HARD_MARGIN = 0.05  # success rate: a gain of up to 5 points is little
LENGTH_MARGIN = 0.05  # responses up to 5% longer are as long
ACCURACY_MARGIN = 0.03  # up to 3 points below is about the same
FEWEST = 5  # questions that a verdict on a bin needs
HARDEST, LOW, MIDDLE = (0, 1), (1, 2), (3, 4)  # bins [0] [1–4]; [1–4] [5–16]; [17–64] [65–128]

Verdict = tuple[str, str]


@dataclass(frozen=True)
class Claim:
    id: str
    claim: str
    source: str
    paper: str  # its own figures
    test: Callable[..., Verdict]

    def judge(self, *subject) -> dict:
        """{"id", "claim", "source", "paper", "rule", "verdict", "evidence"}."""
        verdict, evidence = self.test(*subject)
        rule = " ".join(self.test.__doc__.split())
        return {
            "id": self.id,
            "claim": self.claim,
            "source": self.source,
            "paper": self.paper,
            "rule": rule,
            "verdict": verdict,
            "evidence": evidence,
        }


def above(e: dict, bound: float = 0.0) -> str:
    """Shown if the interval lies above the bound, not shown if nothing of it does."""
    if e["value"] is None or e["low"] is None:
        return UNCLEAR
    return SHOWN if e["low"] > bound else NOT_SHOWN if e["high"] <= bound else UNCLEAR


def below(e: dict, bound: float = 0.0) -> str:
    """Shown if the interval lies below the bound, not shown if nothing of it does."""
    return above(negated(e), -bound)


def negated(e: dict) -> dict:
    return {
        end: None if e[other] is None else -e[other]
        for end, other in (("value", "value"), ("low", "high"), ("high", "low"))
    }


def no_rise(e: dict, margin: float) -> str:
    """Shown if the interval excludes a rise of more than the margin; else not shown if it excludes no rise."""
    if e["value"] is None or e["low"] is None:
        return UNCLEAR
    return SHOWN if e["high"] <= margin else NOT_SHOWN if e["low"] > 0 else UNCLEAR


def every(verdicts) -> str:
    """All of them: shown if each is, not shown if any isn't."""
    verdicts = list(verdicts)
    return NOT_SHOWN if NOT_SHOWN in verdicts else SHOWN if verdicts and set(verdicts) == {SHOWN} else UNCLEAR


def percent(x: float | None) -> str:
    return "undefined" if x is None else f"{x:.1%}"


def number(e: dict, scale: float = 1.0, digits: int = 1, unit: str = "", sign: str = "") -> str:
    """`+9.6 points [+5.1, +14.0]`."""
    if e["value"] is None:
        return "undefined"
    value, *ends = (None if e[k] is None else f"{scale * e[k]:{sign}.{digits}f}" for k in ("value", "low", "high"))
    return f"{value}{unit}" + ("" if ends[0] is None else f" [{ends[0]}, {ends[1]}]")


def points(e: dict) -> str:
    return number(e, 100, 1, " points", "+")


def from_to(pair: Pair, name: str) -> str:
    """`19.6% → 29.2%: +9.6 points [+5.1, +14.0]`."""
    base, other = pair.summary[name]
    return f"{percent(base.value[0])} → {percent(other.value[0])}: {points(pair.difference(name).estimate())}"


def names(pair: Pair, bins) -> str:
    """`[1–4] and [5–16]`."""
    return " and ".join(pair.labels[b] for b in bins)


def accuracy_rises(pair: Pair) -> Verdict:
    """Shown if the interval of the paired difference in accuracy lies above 0; not shown if it lies at or below 0."""
    return above(pair.difference("accuracy").estimate()), f"Accuracy {from_to(pair, 'accuracy')}."


def majority_rises(pair: Pair) -> Verdict:
    """Shown if the interval of the paired difference in majority vote lies above 0; not shown if it lies at or below
    0."""
    return above(pair.difference("maj").estimate()), f"maj@{pair.samples} {from_to(pair, 'maj')}."


def _curves(pair: Pair) -> str:
    if pair.overtaken is None:
        return f"at k = {pair.k} {pair.other_name} is still above {pair.base_name}"
    return f"from k = {pair.overtaken} on {pair.other_name} is not above {pair.base_name}"


def capability_does_not_rise(pair: Pair) -> Verdict:
    """Shown if the interval of the paired difference in pass@n excludes a rise of more than 1 point; not shown if it
    does not and lies above 0. If every question has the same pass@n in both models, the bootstrap has nothing to vary:
    then the rise counts as excluded above 1 - 0.05^(1/questions)."""
    e = pair.difference("pass").estimate()
    evidence = f"pass@{pair.k} {from_to(pair, 'pass')}; {_curves(pair)}."
    if not (pair.other.pass_at_k[:, pair.k - 1] - pair.base.pass_at_k[:, pair.k - 1]).any():
        bound = 1 - 0.05 ** (1 / len(pair.bins))
        evidence += f" No question changed; with 95% confidence fewer than {bound:.1%} of all questions would."
        e = e | {"low": 0.0, "high": bound}
    return no_rise(e, CAPABILITY_MARGIN), evidence


def capability_rises(pair: Pair) -> Verdict:
    """Shown if the interval of the paired difference in pass@n lies above 0; not shown if it lies at or below 0."""
    return above(pair.difference("pass").estimate()), f"pass@{pair.k} {from_to(pair, 'pass')}; {_curves(pair)}."


def _enough(pair: Pair, bins) -> str | None:
    """Why there is no verdict on these bins, or None."""
    there = int(pair.within(bins).sum())
    return None if there >= FEWEST else f"{there} questions in {names(pair, bins)}; a verdict needs {FEWEST}."


def gain_in_the_middle(pair: Pair) -> Verdict:
    """The mean gain in success rate over questions in [17–64] and [65–128], that over [0] and [1–4], and their
    difference. Shown if the first and the difference lie above 0 and the second excludes more than 5 points; not shown
    if the first or the difference lies at or below 0, or the second above 5 points."""
    few = _enough(pair, MIDDLE) or _enough(pair, HARDEST)
    if few:
        return UNCLEAR, few
    middle, hard = pair.gain(MIDDLE), pair.gain(HARDEST)
    verdict = every(
        [
            above(middle.estimate()),
            above((middle - hard).estimate()),
            below(hard.estimate(), HARD_MARGIN),
        ]
    )
    gains = ", ".join(
        f"{label} {points(pair.gain([b]).estimate())}" for b, label in enumerate(pair.labels) if pair.within([b]).any()
    )
    return verdict, (
        f"Gain in {names(pair, MIDDLE)} {points(middle.estimate())}, in {names(pair, HARDEST)} "
        f"{points(hard.estimate())}, difference {points((middle - hard).estimate())}. By bin: {gains}."
    )


def gain_on_the_hardest(pair: Pair) -> Verdict:
    """The mean gain in success rate over questions in [0] and [1–4]. Shown if its interval lies above 5 points; not
    shown if it lies at or below 5 points."""
    few = _enough(pair, HARDEST)
    if few:
        return UNCLEAR, few
    hard = pair.gain(HARDEST).estimate()
    each = ", ".join(f"{pair.labels[b]} {points(pair.gain([b]).estimate())}" for b in HARDEST if pair.within([b]).any())
    return above(hard, HARD_MARGIN), f"Gain in {names(pair, HARDEST)} {points(hard)} ({each})."


def _fall(pair: Pair, bins) -> Verdict:
    """More questions of these bins in a lower bin afterwards than sampling noise alone would put there."""
    few = _enough(pair, bins)
    if few:
        return UNCLEAR, few
    fell = pair.other_bins < pair.bins
    lower = np.arange(pair.unchanged.shape[1]) < pair.bins[:, None]
    noise = (pair.unchanged * lower).sum(axis=1)
    inside = pair.within(bins)
    excess = pair.mean_within(fell - noise, bins).estimate()
    each = ", ".join(
        f"{int(fell[pair.bins == b].sum())} of {int((pair.bins == b).sum())} questions in {pair.labels[b]}"
        for b in bins
        if (pair.bins == b).any()
    )
    return above(excess), (
        f"{each} fell to a lower bin; sampling noise alone would move {noise[inside].sum():.1f} of {inside.sum()}: "
        f"excess {points(excess)}."
    )


def rare_becomes_never(pair: Pair) -> Verdict:
    """Of the questions in [1–4], the share that drops to [0], less the share that sampling noise alone would drop
    (a second draw from the base model: `difficulty.unchanged`). Shown if the interval of the excess lies above 0; not
    shown if it lies at or below 0."""
    return _fall(pair, (1,))


def hard_questions_fall(pair: Pair) -> Verdict:
    """Of the questions in [1–4] and [5–16], the share that moves to a lower bin, less the share that sampling noise
    alone would move (a second draw from the base model: `difficulty.unchanged`). Shown if the interval of the excess
    lies above 0; not shown if it lies at or below 0."""
    return _fall(pair, LOW)


def _moved(pair: Pair, bins, moved, words: str) -> Verdict:
    few = _enough(pair, bins)
    if few:
        return UNCLEAR, few
    inside = pair.within(bins)
    e = share(int(moved[inside].sum()), int(inside.sum()))
    each = ", ".join(
        f"{int(moved[pair.bins == b].sum())} of {int((pair.bins == b).sum())} questions in {pair.labels[b]}"
        for b in bins
        if (pair.bins == b).any()
    )
    return above(e, 0.5), f"{each} {words}: together {number(e, 100, 1, '%')}."


def hard_questions_stay_or_fall(pair: Pair) -> Verdict:
    """Of the questions in [1–4] and [5–16], the share that stays in its bin or moves to a lower one. Shown if its
    interval (Wilson) lies above one half; not shown if it lies at or below."""
    return _moved(pair, LOW, pair.other_bins <= pair.bins, "stay or fall")


def hard_questions_rise(pair: Pair) -> Verdict:
    """Of the questions in [1–4] and [5–16], the share that moves to a higher bin. Shown if its interval (Wilson) lies
    above one half; not shown if it lies at or below."""
    return _moved(pair, LOW, pair.other_bins > pair.bins, "rise")


def middle_questions_rise(pair: Pair) -> Verdict:
    """Of the questions in [17–64] and [65–128], the share that moves to a higher bin. Shown if its interval (Wilson)
    lies above one half; not shown if it lies at or below."""
    return _moved(pair, MIDDLE, pair.other_bins > pair.bins, "rise")


def entropy_falls(pair: Pair) -> Verdict:
    """The paired difference in the entropy of answers, over all questions and in each bin of at least 5. Shown if
    every interval lies below 0; not shown if any lies at or above 0."""
    change = pair.other.entropy - pair.base.entropy
    bins = [b for b in range(len(pair.labels)) if pair.within([b]).sum() >= FEWEST]
    overall = pair.difference("entropy").estimate()
    each = {pair.labels[b]: pair.mean_within(change, [b]).estimate() for b in bins}
    base, other = pair.summary["entropy"]
    listed = ", ".join(f"{label} {number(e, 1, 2, '', '+')}" for label, e in each.items())
    return every(below(e) for e in [overall, *each.values()]), (
        f"Entropy {base.value[0]:.2f} → {other.value[0]:.2f} nats: {number(overall, 1, 2, '', '+')}. By bin: {listed}."
    )


def correct_is_shorter(pair: Pair) -> Verdict:
    """Mean length of incorrect responses less that of correct ones, for each of the two models. Shown if both
    intervals lie above 0; not shown if either lies at or below 0."""
    verdicts, evidence = [], []
    for name, style in zip((pair.base_name, pair.other_name), pair.style, strict=True):
        correct, incorrect = style["length"][1], style["length"][2]
        gap = (incorrect - correct).estimate()
        verdicts.append(above(gap))
        evidence.append(
            f"{name}: correct {number(correct.estimate())}, incorrect {number(incorrect.estimate())}, "
            f"difference {number(gap, sign='+')}"
        )
    return every(verdicts), "Mean length, " + "; ".join(evidence) + "."


def not_longer(pair: Pair) -> Verdict:
    """The relative change of the mean length of all responses. Shown if the interval excludes more than 5% longer;
    not shown if it does not and lies above 0."""
    base, other = (style["length"][0] for style in pair.style)
    change = (other / base - 1).estimate()
    return no_rise(change, LENGTH_MARGIN), (
        f"Mean length {base.value[0]:.1f} → {other.value[0]:.1f}: {number(change, 100, 1, '%', '+')}."
    )


def fewer_keywords(pair: Pair) -> Verdict:
    """The difference in reflection phrases a response, counted as whole words. Shown if the interval lies below 0;
    not shown if it lies at or above 0; unclear if neither model uses any."""
    base, other = (style["keywords"][0] for style in pair.style)
    if not base.value[0] and not other.value[0]:
        return UNCLEAR, "No response of either model has a reflection phrase."
    change = (other - base).estimate()
    return below(change), (
        f"Reflection phrases a response {base.value[0]:.3f} → {other.value[0]:.3f}: {number(change, 1, 3, '', '+')}."
    )


def knowledge_beats_pattern(new_knowledge: Pair, reasoning_only: Pair, difference: Resampled) -> Verdict:
    """The paired difference in pass@n, distilled with new knowledge less distilled with reasoning patterns alone.
    Shown if its interval lies above 0; not shown if it lies at or below 0."""
    e = difference.estimate()
    return above(e), (
        f"pass@{new_knowledge.k}: {new_knowledge.base_name} {percent(new_knowledge.summary['pass'][0].value[0])}, "
        f"{reasoning_only.other_name} {percent(reasoning_only.summary['pass'][1].value[0])}, "
        f"{new_knowledge.other_name} {percent(new_knowledge.summary['pass'][1].value[0])}; the last less the one "
        f"before: {points(e)}."
    )


COMPARISON_CLAIMS = {
    "rl": (
        Claim(
            "rl-accuracy", "RL raises accuracy.", "section 4.1, Table 3", "+13.9 and +8.7 points (test)", accuracy_rises
        ),
        Claim(
            "rl-majority", "RL raises the majority vote.", "A.2, Table 3", "+8.8 and +3.0 points (test)", majority_rises
        ),
        Claim(
            "rl-capability",
            "RL does not raise capability.",
            "section 4.1, Table 3, Figure 7",
            "-0.2 and 0.0 points (test)",
            capability_does_not_rise,
        ),
        Claim(
            "rl-middle-bins",
            "RL's gain sits in the middle bins, and not in the two hardest.",
            "section 4.2, Figures 1 and 8",
            "[65–128] +36.6, [17–64] +24.7, [1–4] +0.6, [0] +0.5 points (1.5B, train)",
            gain_in_the_middle,
        ),
        Claim(
            "rl-middle-rise",
            "Most questions of the middle bins rise to a higher one.",
            "section 4.2, Figures 2 and 9",
            "83.3% of [65–128] rise (1.5B, test)",
            middle_questions_rise,
        ),
        Claim(
            "rl-hard-stay",
            "Most questions that the base model rarely solves stay in their bin or fall.",
            "section 4.2, Figures 2 and 9",
            "[1–4] 77.8%, [5–16] 67.4% (1.5B, test)",
            hard_questions_stay_or_fall,
        ),
        Claim(
            "rl-hard-drop",
            "Some questions that the base model rarely solves are never solved after RL, more than by chance.",
            "section 4.2, Figures 2 and 9",
            "3 of 18 questions of [1–4] drop to [0], not compared with chance (1.5B, test)",
            rare_becomes_never,
        ),
        Claim(
            "rl-entropy",
            "The entropy of answers falls after RL, in every bin.",
            "section 4.2, A.4, Figure 10",
            "lower in every bin",
            entropy_falls,
        ),
        Claim(
            "rl-correct-shorter",
            "Correct responses are shorter than incorrect ones.",
            "section 5.2, A.6.1, Figures 3 and 11",
            "shorter in both models",
            correct_is_shorter,
        ),
        Claim(
            "rl-length",
            "RL does not make responses longer.",
            "section 5.2, A.6.1, Figures 3 and 11",
            "no substantial difference",
            not_longer,
        ),
        Claim(
            "rl-keywords",
            "Responses have fewer reflection phrases after RL.",
            "section 5.2, A.6.2, Figures 3 and 12",
            "substantially fewer",
            fewer_keywords,
        ),
    ),
    "new_knowledge": (
        Claim(
            "new-accuracy",
            "Distillation with new knowledge raises accuracy.",
            "section 6.1, Figure 4",
            "higher at k = 1",
            accuracy_rises,
        ),
        Claim(
            "new-capability",
            "Distillation with new knowledge raises capability.",
            "section 6.1, Figure 4",
            "pass@256 on AIME25 70.0% against 56.7%",
            capability_rises,
        ),
        Claim(
            "new-hardest",
            "With new knowledge the gain reaches the two hardest bins.",
            "section 6.2, Figure 5",
            "substantial in all bins",
            gain_on_the_hardest,
        ),
        Claim(
            "new-hard-rise",
            "With new knowledge most questions that the base model rarely solves rise to a higher bin.",
            "section 6.2, Figure 6",
            "[1–4] 2 of 18 drop to [0], [5–16] none falls (1.5B, test)",
            hard_questions_rise,
        ),
    ),
    "reasoning_only": (
        Claim(
            "reasoning-accuracy",
            "Distillation of reasoning patterns alone raises accuracy.",
            "section 6.1",
            "60% → 68% on MATH-500",
            accuracy_rises,
        ),
        Claim(
            "reasoning-capability",
            "Distillation of reasoning patterns alone does not raise capability.",
            "section 6.1, Figure 4",
            "the curves of pass@k meet and cross",
            capability_does_not_rise,
        ),
        Claim(
            "reasoning-middle-bins",
            "The gain from reasoning patterns alone sits in the middle bins, and not in the two hardest.",
            "section 6.2, Figure 5",
            "little gain in the zero or near-zero bins",
            gain_in_the_middle,
        ),
        Claim(
            "reasoning-hard-drop",
            "Some questions that the base model rarely solves are never solved after it, more than by chance.",
            "section 6.2, Figure 6",
            "7 of 18 questions of [1–4] drop to [0], not compared with chance (1.5B, test)",
            rare_becomes_never,
        ),
        Claim(
            "reasoning-hard-fall",
            "Questions that the base model rarely solves fall to a lower bin, more than by chance.",
            "section 6.2, Figure 6",
            "[1–4] 7 of 18, [5–16] 10 of 34, not compared with chance (1.5B, test)",
            hard_questions_fall,
        ),
    ),
}
KNOWLEDGE_CLAIM = Claim(
    "new-beats-reasoning",
    "New knowledge, and not the reasoning pattern, is what raises capability.",
    "section 6.1, Figure 4",
    "only the model with new knowledge is above the base model",
    knowledge_beats_pattern,
)


@dataclass(frozen=True)
class Distilled:
    """A row of Table 1: `model` is `student` trained on correct responses of `teacher`; gains over the student."""

    student: str
    teacher: str
    model: str
    train_gain: Resampled
    test_gain: Resampled


def gain_does_not_carry_over(row: Distilled) -> Verdict:
    """Gain in accuracy over the student on the training questions, on the test questions, and the first less the
    second. Shown if the intervals of the first and of the last lie above 0; not shown if either lies at or below 0."""
    excess = (row.train_gain - row.test_gain).estimate()
    train, test = row.train_gain.estimate(), row.test_gain.estimate()
    return every([above(train), above(excess)]), (
        f"{row.model} against {row.student}: train {points(train)}, test {points(test)}, the first less the second "
        f"{points(excess)}."
    )


def reaches_its_teacher(row: Distilled, against_teacher: Resampled) -> Verdict:
    """Test accuracy of the distilled model less its teacher's. Shown if the interval excludes more than 3 points
    below; not shown if it does not and lies below 0."""
    e = against_teacher.estimate()
    return no_rise(negated(e), ACCURACY_MARGIN), (
        f"Test accuracy of {row.model} less that of {row.teacher}: {points(e)}; less that of {row.student}: "
        f"{points(row.test_gain.estimate())}."
    )


def teaches_more(row: Distilled, own: str, difference: Resampled) -> Verdict:
    """Test accuracy of the model distilled from the RL model less that of the model distilled from the base model's
    own responses. Shown if the interval lies above 0; not shown if it lies at or below 0."""
    e = difference.estimate()
    return above(e), f"Test accuracy of {row.model} less that of {own}: {points(e)}."


OVERFITS_BASE = Claim(
    "self-base-overfits",
    "Self-distillation of the base model lifts train more than test accuracy.",
    "section 5.1, Tables 1 and 4",
    "train +10.7, test +0.8 points (1.5B); +14.3, +3.8 (3B)",
    gain_does_not_carry_over,
)
OVERFITS_RL = Claim(
    "self-rl-overfits",
    "Self-distillation of the RL model lifts train more than test accuracy.",
    "section 5.1, Tables 1 and 4",
    "train +3.5, test -0.4 points (1.5B); +4.2, +0.8 (3B)",
    gain_does_not_carry_over,
)
REACHES = Claim(
    "self-rl-to-base",
    "Distilled from the RL model, the base model reaches about the RL model's test accuracy.",
    "section 5.1, Tables 1 and 4",
    "74.2% against 74.8% (1.5B); 64.5% against 63.6% (3B)",
    reaches_its_teacher,
)
TEACHES = Claim(
    "self-quality",
    "The RL model's correct responses teach the base model more than its own do.",
    "section 5.1, Tables 1 and 4",
    "test 74.2% against 63.4% (1.5B); 64.5% against 58.7% (3B)",
    teaches_more,
)
