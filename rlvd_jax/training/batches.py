"""Packed batches: prompts and responses laid end to end in rows, with a weight for every token of the loss.

One layout serves GRPO and SFT. A batch is a dict of arrays [micro, rows, T], T tokens in a row:

    tokens     int32    the tokens of several examples (prompt, then response), end to end; 0 in padding
    positions  int32    position inside the example
    segments   int32    1, 2, … for the examples of a row; 0 is padding
    weight     float32  weight in the loss of the token at this index, as predicted from the index before; 0 for
                        prompts and padding
    advantage  float32  the response's advantage (GRPO only)
    logp       float32  the sampler's log-probability of the token (GRPO only)
    drawn      float32  1 where the policy drew the token, 0 where another model did (GRPO with solved examples only)
    used       int32 [] how many of the micro-batches hold anything

The loss is the sum over tokens of weight × term, and weights come from the whole batch, so neither micro-batches nor
devices change the normalisation. Compiled shapes are few: the micro axis is 1, or has room for 512 rows, 2,048, … (the
step's loop ends at `used`, so empty micro-batches cost nothing), and T is the row length asked for, or, where a batch
fits one micro-batch of shorter rows, 2^k or 1.5 × 2^k tokens; and where it fits one of fewer rows, their number on each
device is 2^k. Of several micro-batches no row holds more than 16 examples, or 64, 256, … where that would take
too many more rows: attention on GPUs is compiled for a number of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import grain
import numpy as np

from rlvd_jax.errors import UserError

ROWS = 512  # that there is room for where there are several micro-batches
EXAMPLES = 16  # of a row at most, then: more sequences make attention slow on GPUs
LEAST_ROW = 128  # the shortest row worth a compilation of its own, and what attention kernels like to divide by


@dataclass(frozen=True)
class Example:
    """A prompt and a response to it, in tokens."""

    prompt: Sequence[int]  # at least one token
    response: Sequence[int]  # with its end token, if it ended
    logp: Sequence[float] | None = None  # the sampler's, one for each token of the response
    advantage: float | None = None
    drawn: float | None = None  # 1 if the policy drew it, 0 if it is another model's

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


def token_weights(lengths, normalise: str, max_tokens: int | None = None) -> np.ndarray:
    """Weight of each token of each response of a batch; lengths: tokens of each response [N] → float32 [N].

    batch: 1 / Σ lengths, every token alike (TRL 0.16 does so in each micro-batch, DAPO in the batch);
    sequence: 1 / (N · length), every response alike (GRPO as first published, Shao et al., 2024);
    constant: 1 / (N · max_tokens) (Dr. GRPO, Liu et al., 2025).
    """
    lengths = np.asarray(lengths, np.float64)
    if normalise == "batch":
        weights = np.full(len(lengths), 1 / max(1.0, lengths.sum()))
    elif normalise == "sequence":
        weights = 1 / (len(lengths) * np.maximum(lengths, 1))
    elif normalise == "constant":
        weights = np.full(len(lengths), 1 / (len(lengths) * max_tokens))
    else:
        raise ValueError(f"no such normaliser: {normalise}")
    return weights.astype(np.float32)


def first_fit_decreasing(lengths: Sequence[int], row_tokens: int, most: int | None = None) -> list[list[int]]:
    """Examples of each row: the longest first, each into the first row with room (at most 11/9 of the fewest
    rows possible, and one). Equal lengths keep their order, so the result is a function of `lengths` alone.

    most: examples of a row; None: as many as fit."""
    rows: list[list[int]] = []
    room = np.zeros(len(lengths), np.int64)  # none where a row has `most`
    for i in np.argsort(-np.asarray(lengths, np.int64), kind="stable"):
        fits = np.flatnonzero(room[: len(rows)] >= lengths[i])
        row = int(fits[0]) if len(fits) else len(rows)
        if row == len(rows):
            rows.append([])
            room[row] = row_tokens
        rows[row].append(int(i))
        room[row] = 0 if len(rows[row]) == most else room[row] - lengths[i]
    return rows


def _row_sizes(least: int, most: int):
    """Row lengths from `least` up: LEAST_ROW times 1, 1.5, 2, 3, 4, 6, … below `most`, then `most`."""
    size = LEAST_ROW
    while size < most:
        for candidate in (size, size * 3 // 2):
            if least <= candidate < most:
                yield candidate
        size *= 2
    yield most


def arrange(lengths: Sequence[int], row_tokens: int, rows: int) -> tuple[int, list[list[int]]]:
    """(T, the examples of each row): the shortest rows of which one micro-batch of `rows` holds everything, or else,
    and where `rows` is 0, as many rows of `row_tokens` as it takes, or up to an eighth more with at most EXAMPLES · 4^k
    in each, for the least such k."""
    if max(lengths, default=0) > row_tokens:
        raise UserError(
            f"a prompt with its response has {max(lengths)} tokens, more than a training row holds ({row_tokens}): "
            "raise the row's tokens or shorten the responses"
        )
    least = max(max(lengths, default=1), -(-sum(lengths) // rows)) if rows else row_tokens
    for size in _row_sizes(min(least, row_tokens), row_tokens):
        packed = first_fit_decreasing(lengths, size)
        if len(packed) <= rows:
            return size, packed
    room, most = -(-len(packed) * 9 // 8), EXAMPLES
    while max(map(len, packed), default=0) > most:
        few = first_fit_decreasing(lengths, size, most)
        packed, most = (few, most) if len(few) <= room else (packed, 4 * most)
    return size, packed


def pack(
    examples: Sequence[Example], weights, *, row_tokens: int, micro_rows: int, shards: int = 1, several: bool = False
) -> dict[str, np.ndarray]:
    """A batch (see the module) of `examples`; weights: [N], of each token of each response.

    micro_rows: the most rows of a micro-batch on each of the `shards` devices that rows are split over. several: have
    the shape of a batch of several micro-batches also where one is enough. Examples are alike in which of `logp`,
    `advantage` and `drawn` they have. Raises UserError if an example is longer than `row_tokens`.
    """
    lengths, rows = [len(e) for e in examples], micro_rows * shards
    size, packed = arrange(lengths, row_tokens, 0 if several else rows)
    fewer = shards
    while fewer < len(packed):
        fewer *= 2
    rows = rows if several else min(rows, fewer)
    used = -(-len(packed) // rows)
    micro = 1
    while micro < max(used, 1 + several):
        micro = 4 * micro if micro > 1 else max(2, ROWS // rows)
    shape = micro * rows, size
    keys = [k for k in ("advantage", "logp", "drawn") if examples and getattr(examples[0], k) is not None]
    batch = {k: np.zeros(shape, np.int32) for k in ("tokens", "positions", "segments")}
    batch |= {k: np.zeros(shape, np.float32) for k in ("weight", *keys)}
    for row, members in enumerate(packed):
        start = 0
        for segment, i in enumerate(members, 1):
            e = examples[i]
            assert len(e.prompt) > 0, "nothing predicts a response's first token where the prompt is empty"
            first, end = start + len(e.prompt), start + len(e)
            batch["tokens"][row, start:first] = e.prompt
            batch["tokens"][row, first:end] = e.response
            batch["positions"][row, start:end] = np.arange(len(e))
            batch["segments"][row, start:end] = segment
            batch["weight"][row, first:end] = weights[i]
            for key in keys:
                batch[key][row, first:end] = getattr(e, key)
            start = end
    batch = {k: v.reshape(micro, rows, size) for k, v in batch.items()}
    return batch | {"used": np.array(used, np.int32)}


def supervised(
    examples: Sequence[Example],
    *,
    batch: int,
    epochs: int,
    seed: int,
    row_tokens: int,
    micro_rows: int,
    shards: int = 1,
) -> grain.IterDataset:
    """The packed batches of `epochs` passes over the examples, `batch` examples each, every token of a batch alike.

    Each epoch has its own order, a function of `seed` alone. The last batch of an epoch is smaller where the examples
    don't divide evenly; it is kept, as TRL keeps it, in the shape that the others have on average. The iterator's
    `get_state()` is its position, JSON-able; `set_state` goes on from there with the very same batches. The next ones
    are packed in the background.
    """

    usual = batch * sum(map(len, examples)) / max(1, len(examples))  # tokens of a whole batch

    def packed(chosen):
        weights = token_weights([len(e.response) for e in chosen], "batch")
        several = len(chosen) < batch and usual > micro_rows * shards * row_tokens
        return pack(chosen, weights, row_tokens=row_tokens, micro_rows=micro_rows, shards=shards, several=several)

    data = grain.MapDataset.source(examples).seed(seed % 2**32).shuffle()
    data = data.batch(batch, drop_remainder=False, batch_fn=list).repeat(epochs).map(packed)
    return data.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
