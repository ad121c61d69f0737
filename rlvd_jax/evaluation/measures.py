"""What is measured of each question; everything else is a mean or a ratio of these over questions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlvd_jax.evaluation import accuracy, diversity
from rlvd_jax.evaluation.graded import Graded

STYLE = ("length", "keywords", "keywords_substring")


@dataclass(frozen=True)
class Measures:
    """One model on Q questions; every array has a row for each question."""

    questions: list[str]
    samples: np.ndarray  # [Q]
    successes: np.ndarray  # [Q]
    pass_at_k: np.ndarray  # [Q, K], K = the smallest number of samples
    majority: np.ndarray  # [Q]
    majority_first_seen: np.ndarray  # [Q]
    entropy: np.ndarray  # [Q] nats
    truncated: np.ndarray  # [Q] responses
    no_answer: np.ndarray  # [Q] responses
    responses: np.ndarray  # [Q, 2] incorrect and correct responses
    style: dict[str, np.ndarray]  # of each of STYLE: sums [Q, 2] over the incorrect and the correct responses

    @property
    def rate(self) -> np.ndarray:
        """Success rates [Q]."""
        return self.successes / self.samples

    @classmethod
    def of(cls, graded: Graded) -> Measures:
        samples = graded.valid.sum(axis=1)
        successes = graded.correct.sum(axis=1)
        majority, first_seen = accuracy.majority(graded.group, graded.correct, graded.valid)

        def by_verdict(values):
            right = (values * graded.correct).sum(axis=1)
            return np.stack([(values * graded.valid).sum(axis=1) - right, right], axis=1).astype(float)

        return cls(
            questions=graded.questions,
            samples=samples,
            successes=successes,
            pass_at_k=accuracy.pass_at_k(successes, samples),
            majority=majority,
            majority_first_seen=first_seen,
            entropy=diversity.entropy(graded.group, graded.valid),
            truncated=graded.truncated.sum(axis=1),
            no_answer=((graded.group < 0) & graded.valid).sum(axis=1),
            responses=np.stack([samples - successes, successes], axis=1).astype(float),
            style={
                name: by_verdict(getattr(graded, "tokens" if name == "length" else name).astype(np.int64))
                for name in STYLE
            },
        )
