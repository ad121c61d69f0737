"""Bootstrap intervals over questions.

All means and ratios of one set of questions are resampled with the same weights, so that the difference of any two is
a paired one, and an interval costs a matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
CHUNK = 250  # resamples worked on at once: 15 MB of weights at 7,500 questions


@dataclass(frozen=True)
class Resampled:
    """M estimates with their values in every resample. Sums, differences, ratios and multiples of two of them stay
    paired if they come from the same questions, and are as good as independent draws if they don't."""

    value: np.ndarray  # [M]
    draws: np.ndarray  # [resamples, M]
    questions: np.ndarray  # [M]: how many questions bear on each

    def _with(self, other, operation) -> Resampled:
        if not isinstance(other, Resampled):
            other = Resampled(other, other, self.questions)
        with np.errstate(divide="ignore", invalid="ignore"):
            return Resampled(
                operation(self.value, other.value),
                operation(self.draws, other.draws),
                np.minimum(self.questions, other.questions),
            )

    def __add__(self, other):
        return self._with(other, np.add)

    def __sub__(self, other):
        return self._with(other, np.subtract)

    def __mul__(self, other):
        return self._with(other, np.multiply)

    def __truediv__(self, other):
        return self._with(other, np.divide)

    def __getitem__(self, index) -> Resampled:
        index = slice(index, index + 1) if isinstance(index, int) else index
        return Resampled(self.value[index], self.draws[:, index], self.questions[index])

    def bounds(self) -> np.ndarray:
        """Percentile intervals [2, M]; NaN with fewer than two questions, where nothing varies.

        Resamples in which an estimate is undefined (a ratio that drew none of its questions) are left out.
        """
        tails = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
        defined = np.isfinite(self.draws).all(axis=0)
        result = np.full((2, len(self.value)), np.nan)
        result[:, defined] = np.quantile(self.draws[:, defined], tails, axis=0)
        for i in np.flatnonzero(~defined):
            draws = self.draws[np.isfinite(self.draws[:, i]), i]
            if len(draws):
                result[:, i] = np.quantile(draws, tails)
        result[:, (self.questions < 2) | ~np.isfinite(self.value)] = np.nan
        return result

    def estimates(self) -> list[dict]:
        """[{"value", "low", "high"}]: None where undefined."""
        low, high = self.bounds()
        return [
            {"value": _number(v), "low": _number(lo), "high": _number(hi)}
            for v, lo, hi in zip(self.value, low, high, strict=True)
        ]

    def estimate(self) -> dict:
        """The only estimate."""
        (only,) = self.estimates()
        return only


def _number(x) -> float | None:
    return float(x) if np.isfinite(x) else None


class Bootstrap:
    """Resamples of `questions` questions with replacement. `seed` is an integer or a sequence of them."""

    def __init__(self, questions: int, resamples: int = 2000, seed=0):
        rng = np.random.default_rng(seed)
        self.weights = np.empty((resamples, questions), np.uint8)  # how often each question was drawn
        for start in range(0, resamples, CHUNK):
            rows = self.weights[start : start + CHUNK]
            drawn = rng.integers(questions, size=rows.shape) + np.arange(len(rows))[:, None] * questions
            rows[:] = np.bincount(drawn.ravel(), minlength=rows.size).reshape(rows.shape)

    def mean(self, values) -> Resampled:
        """Means over questions of values [Q] or [Q, M]."""
        return self.ratio(values, np.ones(len(values)))

    def ratio(self, numerator, denominator) -> Resampled:
        """Sums over questions divided by sums over questions: mean(x | bin) is ratio(x * in_bin, in_bin).

        numerator [Q] or [Q, M]; denominator [Q], for all of them, or [Q, M].
        """
        numerator = _columns(numerator)
        denominator = _columns(denominator)
        m = numerator.shape[1]
        columns = np.concatenate([numerator, denominator], axis=1)
        used = denominator.any(axis=1) | numerator.any(axis=1)
        columns = columns[used]
        total = columns.sum(axis=0)
        columns = columns.astype(np.float32)  # the draws only: twice as fast, and an interval needs no 7th digit
        draws = np.empty((len(self.weights), columns.shape[1]))
        for start in range(0, len(draws), CHUNK):
            weights = self.weights[start : start + CHUNK]
            draws[start : start + CHUNK] = (weights if used.all() else weights[:, used]).astype(np.float32) @ columns
        bearing = np.broadcast_to(np.count_nonzero(denominator, axis=0), (m,))
        with np.errstate(divide="ignore", invalid="ignore"):
            return Resampled(total[:m] / total[m:], draws[:, :m] / draws[:, m:], bearing)


def _columns(values) -> np.ndarray:
    values = np.asarray(values, float)
    return values if values.ndim == 2 else values[:, None]


def share(hits: int, questions: int) -> dict:
    """A share of questions with its 95% Wilson interval, which, unlike the bootstrap's, has a width at 0 and at 1."""
    if not questions:
        return {"value": None, "low": None, "high": None}
    z2 = 1.959964**2
    p = hits / questions
    centre = (p + z2 / (2 * questions)) / (1 + z2 / questions)
    half = np.sqrt(z2 * p * (1 - p) / questions + z2**2 / (4 * questions**2)) / (1 + z2 / questions)
    return {"value": p, "low": max(0.0, float(centre - half)), "high": min(1.0, float(centre + half))}
