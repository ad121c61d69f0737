"""How spread out a model's final answers are (Figure 10, A.4)."""

from __future__ import annotations

import numpy as np


def entropy(group, valid) -> np.ndarray:
    """Entropy in nats of each question's final answers: [Q].

    group [Q, n] numbers equal answers within a question; all responses without an answer (-1) form one group of
    their own kind. valid [Q, n] says which places hold a response.
    """
    questions = len(group)
    width = int(group.max(initial=-1)) + 2
    cell = (np.arange(questions)[:, None] * width + group + 1)[valid]
    size = np.bincount(cell, minlength=questions * width).reshape(questions, width)
    share = size / size.sum(axis=1, keepdims=True)
    return -(share * np.log(share, out=np.zeros(share.shape), where=size > 0)).sum(axis=1) + 0.0  # no -0.0
