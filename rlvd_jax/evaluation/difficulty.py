"""Bins of questions by their number of successes, and how questions move between them (section 4.2, A.3, A.6).

The paper's bounds are counts out of 256. For n samples they are read as success rates: a bin holds the counts c with
lower bound < 256 c / n <= upper bound, which is exactly the paper's at n = 256 and puts every count from 0 to n in one
bin for any n. The lowest bins are empty when n is too small to tell them apart: one success in 16 is as rare as
16 in 256, so [1–4] needs 64 samples.
"""

from __future__ import annotations

import numpy as np

BOUNDS = (0, 4, 16, 64, 128, 256)
"""Largest count of each difficulty bin, of 256 samples (Figures 1, 2, 5, 6, 8 and 9)."""
STYLE_BOUNDS = (64, 128, 192, 256)
"""Of the four bins of Figures 11 and 12: the paper doesn't give them, these are the quarters of the success rate."""


def assign(successes, samples, bounds=BOUNDS) -> np.ndarray:
    """The bin of every question [Q], from 0 (hardest), by its successes [Q] of samples [Q]."""
    scaled = 256 * np.asarray(successes, int)
    return (scaled[..., None] > np.asarray(bounds) * np.asarray(samples, int)[..., None]).sum(axis=-1)


def ranges(samples: int, bounds=BOUNDS) -> list[tuple[int, int]]:
    """Smallest and largest count of each bin for this number of samples; an empty bin has low > high."""
    highs = [bound * samples // 256 for bound in bounds]
    return [(low, high) for low, high in zip([0] + [high + 1 for high in highs[:-1]], highs, strict=True)]


def labels(samples: int, bounds=BOUNDS) -> list[str]:
    """Names of the bins, `[17–64]`; a bin that is empty for so few samples is named by its largest rate, `≤1.56%`."""
    names = []
    for (low, high), bound in zip(ranges(samples, bounds), bounds, strict=True):
        names.append(f"≤{100 * bound / 256:.3g}%" if low > high else f"[{low}]" if low == high else f"[{low}–{high}]")
    return names


def transitions(before, after, bins: int = len(BOUNDS)) -> np.ndarray:
    """How many questions went from each bin (row) to each bin (column): [bins, bins] (Figure 2)."""
    return np.bincount(np.asarray(before) * bins + np.asarray(after), minlength=bins * bins).reshape(bins, bins)


def _binomial(samples: int, p: np.ndarray) -> np.ndarray:
    """Probabilities [samples + 1, len(p)] of each number of successes."""
    steps = np.log(np.arange(1, samples + 1))
    ways = np.concatenate([[0.0], np.cumsum(steps[::-1] - steps)])  # log C(samples, c)
    c = np.arange(samples + 1)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 * log(0) counts as 0
        hits = np.where(c > 0, c * np.log(p), 0.0)
        misses = np.where(samples - c > 0, (samples - c) * np.log1p(-p), 0.0)
    return np.exp(ways[:, None] + hits + misses)


def unchanged(successes, samples, new_samples, bounds=BOUNDS, iterations: int = 200) -> np.ndarray:
    """Where sampling noise alone would put each question: probabilities [Q, bins] of its bin in a second draw of
    new_samples [Q] responses from the same model, given its successes [Q] of samples [Q].

    A question seen once in 256 samples is often seen not at all in the next 256, so questions leave the low bins
    (they were picked for a chance count) even if no success probability changes. The distribution of probabilities
    over questions is estimated from all counts: maximum likelihood on a grid by expectation maximisation, from the
    arcsine prior. Each question's posterior then predicts its next count. (Ours; the paper has no such control.)
    """
    successes, samples, new_samples = (np.asarray(x, int) for x in (successes, samples, new_samples))
    p = np.sin(np.linspace(0, np.pi / 2, 201)) ** 2
    p[-1] = 1.0
    # Questions with equal counts are of one kind.
    _, first, kind, times = np.unique(
        samples * (successes.max() + 1) + successes, return_index=True, return_inverse=True, return_counts=True
    )
    pmf = {n: _binomial(n, p) for n in np.unique(samples)}
    kinds = np.stack([pmf[samples[i]][successes[i]] for i in first])  # likelihoods [kinds, grid]
    weight = np.full(len(p), 1 / len(p))
    for _ in range(iterations):
        weight = weight * (kinds.T @ (times / (kinds @ weight))) / len(successes)
    posterior = kinds * weight
    posterior = (posterior / posterior.sum(axis=1, keepdims=True))[kind]  # [Q, grid]
    result = np.empty((len(successes), len(bounds)))
    for n in np.unique(new_samples):
        rows = new_samples == n
        pmf, counts = _binomial(n, p), np.arange(n + 1)
        by_bin = np.zeros((len(bounds), len(p)))
        np.add.at(by_bin, assign(counts, np.full(n + 1, n), bounds), pmf)
        result[rows] = posterior[rows] @ by_bin.T
    return result
