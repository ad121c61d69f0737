"""From logits to a token: temperature, then top-k, then top-p on the renormalised rest, then the draw.

Order and meaning as in the paper (A.12). Exactly k tokens survive top-k: of equal logits at the boundary the
lower token id stays. Top-p keeps the smallest set whose probability reaches p, the token that crosses included.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.extend.random import threefry_2x32

BLOCK = 128
SMALL = 2048  # a vocabulary up to this size is filtered whole


def top_k(x, k: int):
    """The k largest of each row and their columns, largest first, ties by lower column. x: [rows, columns] float32.

    A sort of whole rows is what `lax.top_k` costs on GPUs and CPUs for a vocabulary of 151,936, so there the k
    blocks with the largest maxima are found first: they hold the k largest values.
    """
    rows, columns = x.shape
    blocks = -(-columns // BLOCK)
    if jax.default_backend() == "tpu" or blocks <= 4 * k:
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

    def halve(_, bounds):
        low, high = bounds  # at least k are >= low, fewer than k are > high
        middle = (low & high) + ((low ^ high) >> 1)  # floor of the mean, without overflow
        middle = jnp.where(low < high, middle + ((low ^ high) & 1), low)  # ceil, so that the bounds close
        enough = (order >= middle[:, None]).sum(axis=1) >= k
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    low, _ = jax.lax.fori_loop(0, 32, halve, (order.min(axis=1), order.max(axis=1)))
    above, tied = order > low[:, None], order == low[:, None]
    room = k - above.sum(axis=1, keepdims=True)
    return jnp.where(above | (tied & (jnp.cumsum(tied, axis=1) <= room)), x, -jnp.inf)


def draw(logits, keys, temperature: float, k: int, p: float):
    """One token for each row, and its log-probability under the unfiltered distribution at this temperature.

    logits: [rows, vocab] float32; keys: [rows, 2] uint32, one for each draw. At temperature 0 the largest logit
    wins and the log-probability is that at temperature 1. → tokens [rows] int32, log-probabilities [rows] float32.
    """
    if temperature == 0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return token, _log_probability(logits, token)
    scaled = logits / temperature
    vocab = logits.shape[-1]
    every = jnp.broadcast_to(jnp.arange(vocab, dtype=jnp.int32), scaled.shape)
    if p < 1:
        values, column = top_k(scaled, min(k, vocab) if k else vocab)
        share = jax.nn.softmax(values, axis=-1)
        before = jnp.cumsum(share, axis=-1) - share
        values = jnp.where(before < p, values, -jnp.inf)
    elif k == 0 or k >= vocab:
        values, column = scaled, every
    elif vocab <= SMALL:
        values, column = keep_top_k(scaled, k), every
    else:
        values, column = top_k(scaled, k)
    choice = jnp.argmax(values + _gumbel(keys, column), axis=-1)[:, None]
    token = jnp.take_along_axis(column, choice, axis=1)[:, 0].astype(jnp.int32)
    return token, _log_probability(scaled, token)


def _gumbel(keys, column):
    """Gumbel noise for candidate tokens: the largest of logits plus it is a draw from their softmax.

    keys: [rows, 2]; column: [rows, n] token ids. The noise belongs to (key, token id), so it doesn't matter how
    or in which order the candidates were found.
    """

    def row(key, column):
        counts = jnp.concatenate([column.astype(jnp.uint32), jnp.zeros_like(column, jnp.uint32)])
        return threefry_2x32(key, counts)[: column.size]

    bits = jax.vmap(row)(keys, column)
    # 24 bits in the middle of their intervals: never 0 or 1.
    uniform = ((bits >> 8).astype(jnp.float32) + 0.5) * 2**-24
    return -jnp.log(-jnp.log(uniform))


def _log_probability(scaled, token):
    chosen = jnp.take_along_axis(scaled, token[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(scaled, axis=-1)
