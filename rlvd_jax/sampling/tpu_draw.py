"""What a draw asks of all logits, on TPUs: their sum of exponentials, and the few blocks that hold the largest k.

`lax.top_k` goes over its rows k times there, which for 50 of 151,936 takes longer than all layers of a small model.
Here one kernel reads them once, for the largest of each block of 128 and the sum; `lax.top_k` finds the k blocks with
the largest of these, which hold the k largest logits; and a second kernel reads the logits again and takes those
blocks.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

BLOCK = 128
BLOCKS = 128  # that the first kernel reads at once
ROWS = 32  # that the first kernel reads at once
TAKEN = 8  # rows that the second kernel reads at once, each whole


def takes(columns: int, k: int) -> bool:
    """Whether k is small enough for rows of so many columns that the blocks are few."""
    return 0 < 4 * k * BLOCK < columns


def _statistics(columns, x, largest, most, total):
    """Of some rows' blocks: the largest of each; of these and those before, the largest and the sum of exponentials."""
    at = pl.program_id(1)
    lane, place = (jax.lax.broadcasted_iota(jnp.int32, (ROWS, n), 1) for n in (BLOCK, BLOCKS))

    def block(j):
        there = lane < columns - (at * BLOCKS + j) * BLOCK
        return jnp.where(there, x[:, j * BLOCK : (j + 1) * BLOCK], -jnp.inf)

    found = jnp.full((ROWS, BLOCKS), -jnp.inf)
    for j in range(BLOCKS):
        found = jnp.where(place == j, block(j).max(axis=1, keepdims=True), found)
    largest[...] = found

    @pl.when(at == 0)
    def _():
        most[...] = jnp.full_like(most, jnp.finfo(jnp.float32).min)  # finite, where logits may not be
        total[...] = jnp.zeros_like(total)

    before = most[...]
    now = jnp.maximum(before, found.max(axis=1, keepdims=True))
    sums = jnp.zeros((ROWS, BLOCK))
    for j in range(BLOCKS):
        sums += jnp.exp(block(j) - now)
    total[...] = total[...] * jnp.exp(before - now) + sums.sum(axis=1, keepdims=True)
    most[...] = now


def statistics(x):
    """(largest of each block [rows, blocks], log of the sum of exponentials [rows]) of x [rows, columns] float32."""
    rows, columns = x.shape
    blocks = pl.cdiv(columns, BLOCK)
    one = pl.BlockSpec((ROWS, 1), lambda i, j: (i, 0))
    largest, most, total = pl.pallas_call(
        partial(_statistics, columns),
        grid=(pl.cdiv(rows, ROWS), pl.cdiv(blocks, BLOCKS)),
        in_specs=[pl.BlockSpec((ROWS, BLOCKS * BLOCK), lambda i, j: (i, j))],
        out_specs=[pl.BlockSpec((ROWS, BLOCKS), lambda i, j: (i, j)), one, one],
        out_shape=[jax.ShapeDtypeStruct((rows, n), jnp.float32) for n in (blocks, 1, 1)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="logits_statistics",
    )(x)
    return largest, (most + jnp.log(total))[:, 0]


def _take(count, block, x, out):
    for row in range(TAKEN):
        for j in range(count):
            start = pl.multiple_of(block[0, row * count + j] * BLOCK, BLOCK)
            out[pl.ds(row, 1), j * BLOCK : (j + 1) * BLOCK] = x[pl.ds(row, 1), pl.ds(start, BLOCK)]


def take(x, block):
    """Some blocks of 128 columns of each row; x: [rows, columns]; block: [rows, count] int32. → [rows, count * 128], of
    which what lies beyond the columns means nothing."""
    rows, columns = x.shape
    count = block.shape[1]
    steps = pl.cdiv(rows, TAKEN)
    block = jnp.pad(block, ((0, steps * TAKEN - rows), (0, 0))).reshape(steps, 1, TAKEN * count)
    return pl.pallas_call(
        partial(_take, count),
        grid=(steps,),
        in_specs=[
            pl.BlockSpec((None, 1, TAKEN * count), lambda i: (i, 0, 0), memory_space=pltpu.SMEM),
            pl.BlockSpec((TAKEN, pl.cdiv(columns, BLOCK) * BLOCK), lambda i: (i, 0)),
        ],
        out_specs=pl.BlockSpec((TAKEN, count * BLOCK), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((rows, count * BLOCK), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), disable_bounds_checks=True),
        name="logits_blocks",
    )(block, x)


def candidates(x, k: int):
    """The blocks that hold the k largest of each row: (values, columns, both [rows, 128 k] by rising column, log of the
    sum of exponentials of all [rows]). x: [rows, columns] float32, of more than k blocks."""
    largest, log_sum = statistics(x)
    block = jnp.sort(jax.lax.top_k(largest, k)[1], axis=1)
    column = (block[:, :, None] * BLOCK + jnp.arange(BLOCK)).reshape(x.shape[0], -1)
    return jnp.where(column < x.shape[1], take(x, block), -jnp.inf), column, log_sum
