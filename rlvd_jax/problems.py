"""Problems with verifiable answers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """A question with a gold answer that can be verified."""

    id: str
    problem: str
    answer: str
    """The gold answer, without `\\boxed{}`."""
    solution: str | None = None
    level: int | None = None
    subject: str | None = None
