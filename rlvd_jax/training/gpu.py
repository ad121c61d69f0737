"""The kernel of the loss for NVIDIA GPUs, in Pallas (Triton): what it needs of each row of logits, read once.

Left to itself XLA reads them three times: for the maximum, for the sums relative to it, and for the target's logit.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

LEAST = -1e30  # below every score, and finite: no difference of two is undefined
WARPS = 8  # of a program, which reads one row
LANES = 1024  # columns of a load: 4 of a thread, which are 16 bytes
AT_ONCE = 4  # loads that a thread asks for before it uses the first


def softmax_statistics(scores, target, temperature: float, *, interpret=False):
    """Of the logits z = scores / temperature: their normaliser log Σ exp z, the target's logit, and the entropy of
    softmax z in nats.

    scores: [rows, size, V] float32, none below -1e30; target: [rows, size] int32, below V. → three times [rows, size]
    float32. It has no derivative.
    """
    *shape, vocab = scores.shape
    rows = math.prod(shape)
    out = pl.pallas_call(
        partial(_softmax_statistics_kernel, temperature=temperature, vocab=vocab),
        grid=(rows,),
        out_shape=[jax.ShapeDtypeStruct((rows,), jnp.float32)] * 3,
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name="softmax_statistics",
    )(scores.reshape(rows, vocab), target.reshape(rows))
    return tuple(x.reshape(shape) for x in out)


def _softmax_statistics_kernel(scores_ref, target_ref, norm_ref, chosen_ref, entropy_ref, *, temperature, vocab):
    """Each lane has the maximum of the scores that it has seen, and Σ p and Σ p · (score - maximum) relative to it, so
    that threads wait for one another only at the end, when the lanes are put together."""
    row, lane = pl.program_id(0), jnp.arange(LANES)
    power = math.log2(math.e) / temperature  # exp((a - b) / temperature) is 2 to the power · (a - b)

    def add(score, most, total, spread):
        difference = score - most
        rise, fall = jnp.maximum(difference, 0.0), jnp.minimum(difference, 0.0)  # both 0 for NaN, on a GPU
        smaller = jnp.exp2(-jnp.abs(difference) * power)  # either the old sums shrink or p is below 1
        shrink, p = jnp.where(difference > 0, smaller, 1.0), jnp.where(difference > 0, 1.0, smaller)
        return jnp.maximum(most, score), total * shrink + p, (spread - rise * total) * shrink + p * fall

    def read(i, sums):
        columns = [(i * AT_ONCE + part) * LANES + lane for part in range(AT_ONCE)]
        # What is outside lies so far below LEAST that it adds nothing even to a lane that has seen nothing else.
        scores = [plgpu.load(scores_ref.at[row, x], mask=x < vocab, other=2 * LEAST) for x in columns]
        for score in scores:
            sums = add(score, *sums)
        return sums

    zeros = jnp.zeros(LANES, jnp.float32)
    sums = jnp.full(LANES, LEAST, jnp.float32), zeros, zeros
    most, total, spread = jax.lax.fori_loop(0, pl.cdiv(vocab, AT_ONCE * LANES), read, sums)
    largest = most.max()
    below = most - largest
    shrink = jnp.exp2(below * power)
    spread = jnp.sum((spread + below * total) * shrink)
    total = jnp.sum(total * shrink)
    norm_ref[row] = largest / temperature + jnp.log(total)
    chosen_ref[row] = scores_ref[row, target_ref[row]] / temperature
    entropy_ref[row] = jnp.log(total) - spread / total / temperature
