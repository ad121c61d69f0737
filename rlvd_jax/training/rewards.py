"""Rewards and advantages of groups of responses (section 4, appendix A.9)."""

from __future__ import annotations

import numpy as np


def rewards(correct) -> np.ndarray:
    """+1 for a correct response, -1 for any other; bool of any shape → float32 of the same shape."""
    return np.where(correct, 1.0, -1.0).astype(np.float32)


def advantages(rewards, kind: str = "grpo") -> np.ndarray:
    """How much better each response is than its group; [groups, samples] → float32 [groups, samples].

    grpo: (r - mean) / (std + 1e-4), std with ddof = 1 as TRL 0.16 has it (Shao et al., 2024; Table 6).
    dr_grpo: r - mean (Liu et al., 2025). A group whose rewards are all equal has advantage exactly 0.
    """
    r = np.asarray(rewards, np.float64)
    centred = np.where(all_equal(r)[:, None], 0.0, r - r.mean(axis=1, keepdims=True))
    if kind == "grpo":
        centred /= r.std(axis=1, ddof=1, keepdims=True) + 1e-4
    elif kind != "dr_grpo":
        raise ValueError(f"no such advantage: {kind}")
    return centred.astype(np.float32)


def all_equal(rewards) -> np.ndarray:
    """Groups without influence; [groups, samples] → bool [groups]."""
    rewards = np.asarray(rewards)
    return (rewards == rewards[:, :1]).all(axis=1)
