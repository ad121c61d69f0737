"""Graded responses of one model to one set of problems, as matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlvd_jax.errors import UserError
from rlvd_jax.evaluation.style import count_keywords


@dataclass
class Graded:
    """n responses to each of Q questions; where a question has fewer, its last places are not `valid`."""

    questions: list[str]
    correct: np.ndarray  # [Q, n] bool
    tokens: np.ndarray  # [Q, n] length of each response
    group: np.ndarray  # [Q, n] equal answers of a question share a number from 0 to n - 1; -1: no answer
    keywords: np.ndarray  # [Q, n] reflection phrases, whole words
    keywords_substring: np.ndarray  # [Q, n] the same as plain substrings
    truncated: np.ndarray  # [Q, n] bool, cut off by the token limit
    valid: np.ndarray  # [Q, n] bool

    def __post_init__(self):
        shape = (len(self.questions), self.correct.shape[1])
        for name in ("correct", "tokens", "group", "keywords", "keywords_substring", "truncated", "valid"):
            array = getattr(self, name)
            if array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape}, not {shape}")
        if self.group.size and not -1 <= self.group.min() <= self.group.max() < shape[1]:
            raise ValueError(
                f"answer groups go from {self.group.min()} to {self.group.max()}, not -1 to {shape[1] - 1}"
            )
        for name in ("correct", "truncated"):
            setattr(self, name, getattr(self, name) & self.valid)

    def take(self, rows, samples: int) -> Graded:
        """The questions at positions `rows`, and at most the first `samples` responses to each."""
        rows = np.asarray(rows, int)
        fields = ("tokens", "keywords", "keywords_substring", "truncated", "valid", "correct")
        cut = {name: getattr(self, name)[rows, :samples] for name in fields}
        group = self.group[rows, :samples]
        if group.max(initial=-1) >= group.shape[1]:  # number the groups that are left again
            group = np.stack([np.unique(np.append(row, -1), return_inverse=True)[1][:-1] - 1 for row in group])
        return Graded([self.questions[i] for i in rows], group=group, **cut)

    @classmethod
    def from_columns(
        cls,
        question: Sequence[str],
        correct: Sequence[bool],
        tokens: Sequence[int],
        group: Sequence[int],
        *,
        texts: Sequence[str] | None = None,
        keywords: Sequence[int] | None = None,
        keywords_substring: Sequence[int] | None = None,
        truncated: Sequence[bool] | None = None,
        sample: Sequence[int] | None = None,
        questions: Sequence[str] | None = None,
    ) -> Graded:
        """From one entry a response, in any order, all sequences of one length.

        question: the id that each response answers; sample: its number, which orders a question's responses (none:
        the order given). The phrase counts are given, or counted in `texts`. questions: the ids in their order (none:
        by first appearance). Raises UserError for two responses of the same question and sample number, a
        question that is not among `questions`, or one with no response.
        """
        names = list(dict.fromkeys(question)) if questions is None else list(questions)
        position = {name: i for i, name in enumerate(names)}
        try:
            row = np.fromiter(map(position.__getitem__, question), np.int64, len(question))
        except KeyError as error:
            raise UserError(f"a response answers question {error}, which is not in the set of problems") from None
        count = np.bincount(row, minlength=len(names))
        if not count.all():
            raise UserError(f"question '{names[int(count.argmin())]}' has no response")
        if sample is None:
            order = np.argsort(row, kind="stable")
            row = row[order]
        else:
            sample = np.asarray(sample)
            order = np.lexsort((sample, row))
            row, sample = row[order], sample[order]
            again = np.flatnonzero((row[1:] == row[:-1]) & (sample[1:] == sample[:-1]))
            if len(again):
                raise UserError(f"question '{names[row[again[0]]]}' has two responses number {sample[again[0]]}")
        column = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        shape = (len(names), int(count.max(initial=0)))

        def matrix(values, dtype, fill=0):
            result = np.full(shape, fill, dtype)
            result[row, column] = np.asarray(values)[order]
            return result

        if keywords is None or keywords_substring is None:
            keywords, keywords_substring = count_keywords(texts)
        return cls(
            questions=names,
            correct=matrix(correct, bool),
            tokens=matrix(tokens, np.int32),
            group=matrix(group, np.int32, -1),
            keywords=matrix(keywords, np.int32),
            keywords_substring=matrix(keywords_substring, np.int32),
            truncated=matrix(np.zeros(len(row), bool) if truncated is None else truncated, bool),
            valid=np.arange(shape[1]) < count[:, None],
        )
