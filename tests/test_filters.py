from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from scipy import special, stats

from rlvd_jax.sampling import filters, tpu_draw

DRAWS = 100_000


def logits_of_all_kinds(rows, vocab, seed=0):
    """Rows of every kind: all different, many equal, all equal, -inf, both zeros, huge and tiny."""
    x = np.random.RandomState(seed).randn(rows, vocab).astype(np.float32)
    x[1] = np.round(x[1], 1)
    x[2] = 0
    x[3] = -np.inf
    x[4, ::2] = -np.inf
    x[5, 3:] = -np.inf
    x[6] *= 1e30
    x[7] *= 1e-38  # subnormal
    x[8] = -np.round(np.abs(x[8]))
    return x + np.float32(0)  # no negative zero: the order of the two zeros is nobody's business


@pytest.mark.parametrize(("vocab", "k"), [(9, 9), (61, 50), (2048, 3), (5003, 9), (1281, 1), (30_000, 50)])
def test_top_k_is_that_of_lax(vocab, k):
    """Where a vocabulary isn't whole blocks, too."""
    x = logits_of_all_kinds(10, vocab)
    values, column = filters.top_k(jnp.array(x), k)
    expected_values, expected_column = jax.lax.top_k(jnp.array(x), k)
    np.testing.assert_array_equal(values, expected_values)
    np.testing.assert_array_equal(column, expected_column)


def test_kernels_for_tpus_change_no_draw(monkeypatch):
    """Rows and blocks that don't fill what the kernels read at once, a last block that is not whole; with top-p too."""
    rows, vocab, k = 11, 5003, 9
    monkeypatch.setattr(tpu_draw, "ROWS", 8)
    monkeypatch.setattr(tpu_draw, "BLOCKS", 12)
    x = logits_of_all_kinds(rows, vocab)
    x[6] = np.clip(x[6], -1e3, 1e3)
    with pltpu.force_tpu_interpret_mode():
        values, column = filters.top_k(jnp.array(x), k, "tpu")
    expected_values, expected_column = jax.lax.top_k(jnp.array(x), k)
    np.testing.assert_array_equal(values, expected_values)
    np.testing.assert_array_equal(column, expected_column)

    x, draw = np.delete(x, 3, 0), jax.jit(filters.draw, static_argnums=range(2, 6))
    for p in (1.0, 0.8):
        expected = draw(x, keys(rows - 1), 0.9, k, p)
        with pltpu.force_tpu_interpret_mode():
            token, logprob = draw(x, keys(rows - 1), 0.9, k, p, "tpu")
        np.testing.assert_array_equal(token, expected[0])
        np.testing.assert_allclose(logprob, expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("vocab", "k"), [(9, 1), (61, 1), (61, 50), (61, 61), (2048, 50)])
def test_keep_top_k_keeps_what_lax_would(vocab, k):
    x = logits_of_all_kinds(12, vocab)
    kept = np.asarray(filters.keep_top_k(jnp.array(x), k))
    expected = np.full_like(x, -np.inf)
    columns = np.asarray(jax.lax.top_k(jnp.array(x), k)[1])
    np.put_along_axis(expected, columns, np.take_along_axis(x, columns, 1), 1)
    np.testing.assert_array_equal(kept, expected)


def exact(logits, temperature, k, p):
    """The filtered distribution in float64, one plain step after another."""
    probability = np.exp(np.float64(logits) / temperature)
    probability /= probability.sum()
    order = sorted(range(len(logits)), key=lambda i: (-probability[i], i))
    order = order[: k or None]
    rest = probability[order] / probability[order].sum()
    reached = next((i for i, total in enumerate(np.cumsum(rest)) if total >= p), len(rest) - 1)
    order = order[: reached + 1]
    out = np.zeros(len(logits))
    out[order] = probability[order] / probability[order].sum()
    return out


def p_value(counts, expected):
    """Chi-square of counts against a distribution, rare outcomes together; 0 if something impossible was drawn."""
    if counts[expected == 0].any():
        return 0.0
    counts, expected = counts[expected > 0], expected[expected > 0] * counts.sum()
    rare = expected < 10
    if rare.any():
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    return stats.chisquare(counts, expected).pvalue if len(counts) > 1 else 1.0


def keys(n, seed=0):
    return np.random.RandomState(seed).randint(0, 2**32, (n, 2), np.uint32)


@partial(jax.jit, static_argnames=("temperature", "k", "p"))
def draw_parts(row, keys, temperature, k, p):
    """keys: [parts, draws, 2]; one part after another, for memory's sake."""
    rows = jnp.broadcast_to(row, (keys.shape[1], row.size))
    return jax.lax.map(lambda part: filters.draw(rows, part, temperature, k, p), keys)


def draws(row, temperature, k, p, n=DRAWS, seed=0):
    """n draws from one row of logits, → tokens, log-probabilities."""
    return tuple(
        np.asarray(a).reshape(-1) for a in draw_parts(row, keys(n, seed).reshape(20, -1, 2), temperature, k, p)
    )


SMALL, LARGE = 112, 2304  # filtered whole, and through the blocks that hold the largest


@pytest.mark.parametrize(
    ("vocab", "temperature", "k", "p"),
    [
        (SMALL, 1, 0, 1),
        (SMALL, 0.7, 5, 1),
        (SMALL, 0.9, 50, 1),
        (SMALL, 0.9, 500, 1),
        (SMALL, 0.6, 0, 0.9),
        (SMALL, 0.8, 12, 0.9),
        (SMALL, 1.3, 4, 0.3),
        (LARGE, 0.9, 4, 1),
        (LARGE, 1.5, 4, 0.8),
    ],
)
def test_draws_follow_the_filtered_softmax(vocab, temperature, k, p):
    row = 2 * np.random.RandomState(7).randn(vocab).astype(np.float32)
    row[10:14] = row.max() - 0.5  # ties, also at the boundary of the 4 largest
    token, logprob = draws(row, temperature, k, p)
    counts = np.bincount(token, minlength=vocab)
    assert p_value(counts, exact(row, temperature, k, p)) > 1e-4
    if p > 0.3:  # where more than one token is left, the test can tell
        assert p_value(counts, exact(row, temperature * 1.2, k, p)) < 1e-4
    # Log-probabilities are those of the untruncated distribution at the temperature.
    scaled = np.float64(row) / temperature
    np.testing.assert_allclose(logprob, scaled[token] - np.log(np.exp(scaled).sum()), atol=2e-5)


def test_order_of_the_filters():
    """Temperature before top-p, and top-p on what top-k leaves, renormalised."""
    row = np.log(np.float32([0.4, 0.3, 0.1, 0.08, 0.07, 0.05]))
    assert set(draws(row, 1, 0, 0.65, 2000)[0]) == {0, 1}
    assert set(draws(row, 3, 0, 0.65, 2000)[0]) == {0, 1, 2, 3}  # shares .26 .24 .17 .15 .15 .13, rounded
    # 0.5 and 0.3 of all tokens, but 4/7 and 3/7 of the first two.
    assert set(draws(row, 1, 2, 0.57, 2000)[0]) == {0}
    assert set(draws(row, 1, 2, 0.58, 2000)[0]) == {0, 1}


BITS = [0, 1, 2**31, 2**32 - 129, 2**32 - 128, 2**32 - 1]


@pytest.mark.parametrize("bits", BITS)
def test_noise_is_positive_and_finite(monkeypatch, bits):
    """Whatever the generator gives; and small times have the resolution of all 32 bits, so that a token of one in a
    hundred million is drawn as often as it should be."""
    monkeypatch.setattr(filters, "threefry_2x32", lambda key, counts: jnp.full(counts.shape, bits, jnp.uint32))
    noise = float(filters._exponential(jnp.zeros((1, 2), jnp.uint32), jnp.zeros((1, 1), jnp.int32))[0, 0])
    assert noise == pytest.approx(-np.log1p(-min((bits + 0.5) / 2**32, 1 - 2**-24)), rel=1e-6)
    assert 1e-10 < noise < 17


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("k", "p"), [(2, 1), (3, 0.5)])
def test_a_filtered_token_is_not_drawn_whatever_the_noise(monkeypatch, bits, k, p):
    """Not even where its own noise is extreme and the kept tokens' is the opposite."""
    row = np.float32([-1, 2, 2, -1, -9])

    def noise(key, counts):
        column = counts[: counts.size // 2]
        return jnp.where(jnp.tile((column == 1) | (column == 2), 2), jnp.uint32(2**32 - 1 - bits), jnp.uint32(bits))

    monkeypatch.setattr(filters, "threefry_2x32", noise)
    token, logprob = filters.draw(jnp.array(row[None]), jnp.zeros((1, 2), jnp.uint32), 1.0, k, p)
    assert int(token[0]) == 1
    assert np.isfinite(logprob[0])


def test_the_same_draw_through_every_path():
    """Noise belongs to the token: a filter that removes nothing of note changes nothing."""
    row = np.random.RandomState(3).randn(112).astype(np.float32)
    whole, _ = draws(row, 1, 0, 1)
    np.testing.assert_array_equal(whole, draws(row, 1, 0, 0.99999999)[0])
    np.testing.assert_array_equal(whole, draws(np.append(row, np.float32(-99)), 1, 112, 1)[0])
    assert (whole != draws(row, 1, 0, 1, seed=1)[0]).mean() > 0.5


def test_greedy():
    x = np.delete(logits_of_all_kinds(10, 61), 3, 0)  # without the row that is all -inf
    token, logprob = jax.jit(filters.draw, static_argnums=(2, 3, 4))(x, keys(9), 0, 50, 0.9)
    np.testing.assert_array_equal(token, x.argmax(1))
    assert token.dtype == jnp.int32
    expected = special.log_softmax(np.float64(x), axis=-1)[np.arange(9), np.asarray(token)]
    np.testing.assert_allclose(logprob, expected, atol=1e-6)
    sharp, _ = jax.jit(filters.draw, static_argnums=(2, 3, 4))(x[:2], keys(2), 0.9, 1, 1.0)  # k = 1 is greedy too
    np.testing.assert_array_equal(sharp, x[:2].argmax(1))
