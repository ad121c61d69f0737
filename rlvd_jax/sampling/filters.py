"""From logits to a token: temperature, then top-k, then top-p on the renormalised rest, then the draw.

Order and meaning as in the paper (A.12). Exactly k tokens survive top-k: of equal logits at the boundary the
lower token id stays. Top-p keeps the smallest set whose probability reaches p, the token that crosses included.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.extend.random import threefry_2x32

from rlvd_jax.sampling import gpu, tpu_draw

BLOCK = gpu.BLOCK
SMALL = 2048  # a vocabulary up to this size is filtered whole


def top_k(x, k: int, platform: str = "cpu"):
    """The k largest of each row and their columns, largest first, ties by lower column. x: [rows, columns] float32.

    `lax.top_k` sorts whole rows on GPUs and CPUs, and goes over them k times on TPUs, so with a vocabulary of 151,936
    the k blocks with the largest maxima are found first: they hold the k largest values.
    """
    rows, columns = x.shape
    blocks = -(-columns // BLOCK)
    if platform == "tpu" and tpu_draw.takes(columns, k):
        values, column, _ = tpu_draw.candidates(x, k)
        values, index = jax.lax.top_k(values, k)
        return values, jnp.take_along_axis(column, index, axis=1)
    if platform == "tpu" or blocks <= 4 * k:
        return jax.lax.top_k(x, k)
    padded = jnp.pad(x, ((0, 0), (0, blocks * BLOCK - columns)), constant_values=-jnp.inf)
    padded = padded.reshape(rows, blocks, BLOCK)
    _, block = jax.lax.top_k(padded.max(axis=-1), k)
    block = jnp.sort(block, axis=-1)  # columns stay in order, so that ties still go to the lower one
    values = jnp.take_along_axis(padded, block[:, :, None], axis=1).reshape(rows, k * BLOCK)
    values, index = jax.lax.top_k(values, k)
    column = jnp.take_along_axis(block, index // BLOCK, axis=1) * BLOCK + index % BLOCK
    return values, column


def keep_top_k(x, k: int):
    """x with all but the k largest of each row at -inf, ties by lower column. x: [rows, columns] float32.

    The k-th largest is found by bisection on the bits, which for a small vocabulary costs far less than a sort.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    order = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # integers in the order of the floats
    by_column = order.T  # on CPUs, sums along the leading axis take a third of the time

    def halve(_, bounds):
        low, high = bounds  # at least k are >= low, fewer than k are > high
        middle = (low & high) + ((low ^ high) >> 1)  # floor of the mean, without overflow
        middle = jnp.where(low < high, middle + ((low ^ high) & 1), low)  # ceil, so that the bounds close
        enough = (by_column >= middle).sum(axis=0) >= k
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    low, _ = jax.lax.fori_loop(0, 32, halve, (by_column.min(axis=0), by_column.max(axis=0)))
    above, tied = order > low[:, None], order == low[:, None]
    room = k - above.sum(axis=1, keepdims=True)
    kept = jax.lax.cond(  # more equal logits at the boundary than places are rare, and sorting them out is slow
        (tied.sum(axis=1, keepdims=True) > room).any(),
        lambda: above | (tied & (jnp.cumsum(tied, axis=1) <= room)),
        lambda: above | tied,
    )
    return jnp.where(kept, x, -jnp.inf)


def draw(logits, keys, temperature: float, k: int, p: float, platform: str = "cpu"):
    """One token for each row, and its log-probability under the unfiltered distribution at this temperature.

    logits: [rows, vocab] float32; keys: [rows, 2] uint32, one for each draw; platform: what this is compiled for. At
    temperature 0 the largest logit wins and the log-probability is that at temperature 1.
    → tokens [rows] int32, log-probabilities [rows] float32.
    """
    if temperature == 0:
        token = _argmax(logits)
        return token, _log_probability(logits, token)
    vocab = logits.shape[-1]
    if platform == "gpu" and gpu.draws(k, p) and vocab > SMALL:
        return gpu.draw(logits, keys, temperature, k)
    scaled, log_sum = logits / temperature, None
    every = jnp.broadcast_to(jnp.arange(vocab, dtype=jnp.int32), scaled.shape)
    if p < 1:
        values, column = top_k(scaled, min(k, vocab) if k else vocab, platform)
        share = jax.nn.softmax(values, axis=-1)
        before = jnp.cumsum(share, axis=-1) - share
        values = jnp.where(before < p, values, -jnp.inf)
    elif k == 0 or k >= vocab:
        values, column = scaled, every
    elif vocab <= SMALL:
        values, column = keep_top_k(scaled, k), every
    elif platform == "tpu" and tpu_draw.takes(vocab, k):
        values, column, log_sum = tpu_draw.candidates(scaled, k)
        values = keep_top_k(values, k)
    else:
        values, column = top_k(scaled, k, platform)
    # Of exponential times with these rates, the first is a draw from the rates' distribution.
    rate = jnp.exp(values - values.max(axis=-1, keepdims=True))
    choice = _argmax(rate / _exponential(keys, column))[:, None]
    token = jnp.take_along_axis(column, choice, axis=1)[:, 0]
    if log_sum is None:
        return token, _log_probability(scaled, token)
    return token, jnp.take_along_axis(values, choice, axis=1)[:, 0] - log_sum


def _exponential(keys, column):
    """Exponential noise of mean 1 for candidate tokens, always positive and finite.

    keys: [rows, 2]; column: [rows, n] token ids. The noise belongs to (key, token id), so it doesn't matter how
    or in which order the candidates were found.
    """

    def row(key, column):
        counts = jnp.concatenate([column.astype(jnp.uint32), jnp.zeros_like(column, jnp.uint32)])
        return threefry_2x32(key, counts)[: column.size]

    bits = jax.vmap(row)(keys, column)
    # Small times decide who wins: all 32 bits count there, where float32 is finest. Near 1 it rounds to 1 itself.
    uniform = (bits.astype(jnp.float32) + 0.5) * 2**-32
    return -jnp.log1p(-jnp.minimum(uniform, 1 - 2**-24))


def _argmax(x):
    """The column of each row's largest value, the lower of equal ones; [rows, columns] → [rows] int32.

    Two plain reductions: `jnp.argmax` is one over pairs, which takes five times as long on CPUs.
    """
    column = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    last = x.shape[1] - 1
    return jnp.where(x >= x.max(axis=1, keepdims=True), column, last).min(axis=1)


def _log_probability(scaled, token):
    chosen = jnp.take_along_axis(scaled, token[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(scaled, axis=-1)
