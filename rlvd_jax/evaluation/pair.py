"""Two models on the same questions with the same number of samples: what a comparison rests on."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from rlvd_jax.evaluation import difficulty
from rlvd_jax.evaluation.intervals import Bootstrap, Resampled
from rlvd_jax.evaluation.measures import STYLE, Measures


class Pair:
    """`other` against `base`, question by question, binned by the base model's successes (section 4.2)."""

    def __init__(self, base_name: str, base: Measures, other_name: str, other: Measures, bootstrap: Bootstrap):
        if base.questions != other.questions:
            raise ValueError(f"{base_name} and {other_name} are measured on different questions")
        self.base_name, self.base = base_name, base
        self.other_name, self.other = other_name, other
        self.bootstrap = bootstrap
        self.samples = int(max(base.samples.max(), other.samples.max()))
        self.k = min(base.pass_at_k.shape[1], other.pass_at_k.shape[1])
        self.labels = difficulty.labels(self.samples)
        self.bins = difficulty.assign(base.successes, base.samples)  # [Q]
        self.other_bins = difficulty.assign(other.successes, other.samples)  # [Q]

    def _summary(self, m: Measures) -> Resampled:
        return self.bootstrap.mean(np.column_stack([m.rate, m.majority, m.pass_at_k[:, self.k - 1], m.entropy]))

    @cached_property
    def summary(self) -> dict[str, tuple[Resampled, Resampled]]:
        """Base and other model's accuracy, majority vote, pass@k at the largest k, and entropy."""
        base, other = self._summary(self.base), self._summary(self.other)
        return {name: (base[i], other[i]) for i, name in enumerate(("accuracy", "maj", "pass", "entropy"))}

    def difference(self, name: str) -> Resampled:
        """Other minus base of a `summary` entry, paired."""
        base, other = self.summary[name]
        return other - base

    def within(self, bins) -> np.ndarray:
        """Which questions are in one of these bins: [Q] bool."""
        return np.isin(self.bins, bins)

    def mean_within(self, values, bins) -> Resampled:
        """Mean of values [Q] or [Q, M] over the questions in these bins."""
        inside = self.within(bins)
        return self.bootstrap.ratio((np.asarray(values).T * inside).T, inside)

    def gain(self, bins) -> Resampled:
        """Mean gain in success rate over the questions in these bins (Figure 1)."""
        return self.mean_within(self.other.rate - self.base.rate, bins)

    @cached_property
    def unchanged(self) -> np.ndarray:
        """Where sampling noise alone would put each question: probabilities [Q, bins]."""
        return difficulty.unchanged(self.base.successes, self.base.samples, self.other.samples)

    @cached_property
    def overtaken(self) -> int | None:
        """Smallest k from which on the other model's pass@k is not above the base model's; None if it ends above."""
        above = np.flatnonzero(
            self.other.pass_at_k[:, : self.k].mean(axis=0) > self.base.pass_at_k[:, : self.k].mean(axis=0) + 1e-12
        )
        first = int(above[-1]) + 2 if len(above) else 1
        return first if first <= self.k else None

    @cached_property
    def style(self) -> tuple[dict[str, Resampled], dict[str, Resampled]]:
        """Base and other model's `style_means` over all questions."""
        return style_means(self.bootstrap, self.base), style_means(self.bootstrap, self.other)


def style_means(bootstrap: Bootstrap, m: Measures, mask=None) -> dict[str, Resampled]:
    """Of each of STYLE: means over all, the correct and the incorrect responses to the questions of mask [Q]."""
    mask = np.ones(len(m.samples)) if mask is None else mask
    responses = np.column_stack([m.responses.sum(axis=1), m.responses[:, 1], m.responses[:, 0]]) * mask[:, None]
    sums = [np.column_stack([m.style[s].sum(axis=1), m.style[s][:, 1], m.style[s][:, 0]]) for s in STYLE]
    means = bootstrap.ratio(np.hstack(sums) * mask[:, None], np.hstack([responses] * len(STYLE)))
    return {name: means[3 * i : 3 * i + 3] for i, name in enumerate(STYLE)}
