"""Rewards and advantages of groups of responses (section 4, appendix A.9)."""

from __future__ import annotations

from math import comb

import numpy as np


def rewards(correct) -> np.ndarray:
    """+1 for a correct response, -1 for any other; bool of any shape → float32 of the same shape."""
    return np.where(correct, 1.0, -1.0).astype(np.float32)


def advantages(rewards, kind: str = "grpo", k: int = 4) -> np.ndarray:
    """How much better each response is than its group; [groups, samples] → float32 [groups, samples].

    grpo: (r - mean) / (std + 1e-4), std with ddof = 1 as TRL 0.16 has it (Shao et al., 2024; Table 6).
    dr_grpo: r - mean (Liu et al., 2025). A group whose rewards are all equal has advantage exactly 0.
    pass_at_k: see `pass_at_k`, where r > 0 is a correct response.
    """
    r = np.asarray(rewards, np.float64)
    if kind == "pass_at_k":
        return pass_at_k(r > 0, k)
    centred = np.where(all_equal(r)[:, None], 0.0, r - r.mean(axis=1, keepdims=True))
    if kind == "grpo":
        centred /= r.std(axis=1, ddof=1, keepdims=True) + 1e-4
    elif kind != "dr_grpo":
        raise ValueError(f"no such advantage: {kind}")
    return centred.astype(np.float32)


def pass_at_k(correct: np.ndarray, k: int) -> np.ndarray:
    """The analytic advantage of pass@k training (Chen et al., 2025, arXiv 2508.10751).

    bool [groups, samples] → float32 [groups, samples], k below samples. Every set of k responses is rewarded with 1 if
    it holds a correct one, else 0. A response's advantage is the mean reward of the sets that it is in, less the mean
    of all sets, over the standard deviation (ddof = 0) of all sets; exactly 0 where all sets are rewarded alike, which
    is where no response or more than samples - k of them are correct.
    """
    number = correct.shape[1]
    out = np.zeros(correct.shape)
    for row, right in zip(out, correct, strict=True):
        wrong = number - int(right.sum())
        mean = 1 - comb(wrong, k) / comb(number, k)
        if 0 < mean < 1:
            with_a_wrong_one = 1 - comb(wrong - 1, k - 1) / comb(number - 1, k - 1)
            row[:] = (np.where(right, 1, with_a_wrong_one) - mean) / np.sqrt(mean * (1 - mean))
    return out.astype(np.float32)


def all_equal(rewards) -> np.ndarray:
    """Groups without influence; [groups, samples] → bool [groups]."""
    rewards = np.asarray(rewards)
    return (rewards == rewards[:, :1]).all(axis=1)
