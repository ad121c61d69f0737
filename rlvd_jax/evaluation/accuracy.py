"""Accuracy, capability (pass@k) and majority vote (sections 3.1 and 3.2, Table 3)."""

from __future__ import annotations

import numpy as np


def capability(p, k: int) -> float:
    """pass@k of a model whose success probabilities p [Q] are known: mean of 1 - (1 - p)^k (section 3.1)."""
    return float(np.mean(-np.expm1(k * np.log1p(-np.asarray(p, float)))))


def pass_at_k(successes, samples) -> np.ndarray:
    """Unbiased pass@k of every question for all k from 1 to the smallest number of samples: [Q, K].

    successes and samples are [Q] integers, c of n. Among the ways to choose k of the n responses, the share with
    a correct one is 1 - C(n - c, k) / C(n, k), which is 1 if n - c < k. The quotient is a product of k factors
    between 0 and 1, so nothing overflows; at k = n it is 1[c > 0] (section 3.2).
    """
    successes, samples = np.asarray(successes, int), np.asarray(samples, int)
    k = int(samples.min())
    result = np.empty((len(samples), k))
    drawn = np.arange(k)
    for n in np.unique(samples):
        rows = samples == n
        failures = n - np.arange(n + 1)[:, None]  # by number of successes
        table = 1 - np.cumprod(np.maximum(failures - drawn, 0) / (n - drawn), axis=1)  # [n + 1, K]
        result[rows] = table[successes[rows]]
    return result


def majority(group, correct, valid) -> tuple[np.ndarray, np.ndarray]:
    """maj@n of every question: its chance of a correct majority answer [Q], and the same by the first-seen rule [Q].

    group [Q, n] numbers equal answers within a question (-1: no answer), correct [Q, n] holds the verdicts and valid
    [Q, n] says which places hold a response. The largest group wins; no answer never does. Several largest groups:
    the expected value over a fair draw among them, or, by the rule of public code, the group that was seen first. A
    group counts as correct by the share of its verdicts that are (all or none, when equal answers are judged alike).
    """
    answered = valid & (group >= 0)
    questions = len(group)
    width = int(group.max(initial=-1)) + 1
    if not width:
        return np.zeros(questions), np.zeros(questions)
    cell = (np.arange(questions)[:, None] * width + group)[answered]
    size = np.bincount(cell, minlength=questions * width).reshape(questions, width)
    right = np.bincount(cell[correct[answered]], minlength=questions * width).reshape(questions, width)
    winner = (size == size.max(axis=1, keepdims=True)) & (size > 0)
    share = np.divide(right, size, out=np.zeros(size.shape), where=size > 0)
    expected = (share * winner).sum(axis=1) / np.maximum(winner.sum(axis=1), 1)
    wins = answered & np.take_along_axis(winner, np.maximum(group, 0), axis=1)
    first = np.take_along_axis(group, wins.argmax(axis=1)[:, None], axis=1)[:, 0]
    return expected, np.where(wins.any(axis=1), share[np.arange(questions), np.maximum(first, 0)], 0.0)


def out_of_distribution_bound(samples: int, confidence: float = 0.95) -> float:
    """With this confidence, a question none of whose `samples` responses is correct has a success probability below
    the bound: 1 - (1 - confidence)^(1 / samples) (section 3.2)."""
    return 1 - (1 - confidence) ** (1 / samples)
