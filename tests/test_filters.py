import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rlvd_jax.sampling import filters

DRAWS = 100_000


def logits_with_ties(rows, vocab, seed=0):
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


@pytest.mark.parametrize(("vocab", "k"), [(1, 1), (61, 50), (61, 61), (2048, 3), (5000, 7), (5003, 9), (1290, 1), (40_000, 50)])
def test_top_k_is_that_of_lax(vocab, k):
    """(5003, 9), (1290, 1) and others leave the last block part empty."""
    x = logits_with_ties(10, vocab) if vocab > 9 else np.zeros((10, vocab), np.float32)
    values, column = filters.top_k(jnp.array(x), k)
    expected_values, expected_column = jax.lax.top_k(jnp.array(x), k)
    np.testing.assert_array_equal(values, expected_values)
    np.testing.assert_array_equal(column, expected_column)


@pytest.mark.parametrize(("vocab", "k"), [(9, 1), (61, 1), (61, 50), (61, 61), (2048, 50)])
def test_keep_top_k_keeps_what_lax_would(vocab, k):
    x = logits_with_ties(12, vocab)
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
    return jax.random.bits(jax.random.key(seed), (n, 2), jnp.uint32)


def draws(row, temperature, k, p, n=DRAWS, seed=0):
    """n draws from one row of logits, → tokens, log-probabilities."""
    size = min(n, max(1, 25_000_000 // len(row)))
    run = jax.jit(lambda row, keys: filters.draw(jnp.broadcast_to(row, (len(keys), row.size)), keys, temperature, k, p))
    parts = [run(row, part) for part in jnp.split(keys(n, seed), n // size)]
    return tuple(np.concatenate(a) for a in zip(*parts, strict=True))


@pytest.mark.parametrize(
    ("temperature", "k", "p"),
    [(1, 0, 1), (0.7, 0, 1), (2, 0, 1), (1, 5, 1), (0.9, 50, 1), (0.9, 500, 1), (1, 0, 0.8), (0.6, 0, 0.9), (0.8, 12, 0.9), (1.3, 3, 0.3)],
)  # fmt: skip
@pytest.mark.parametrize("vocab", [112, 5000])
def test_draws_follow_the_filtered_softmax(vocab, temperature, k, p):
    """100,000 draws, a small vocabulary (filtered whole) and a large one (through the best blocks)."""
    n = DRAWS if vocab == 112 else 20_000
    row = 2 * np.random.RandomState(7).randn(vocab).astype(np.float32)
    row[10:14] = row[10]  # ties
    token, logprob = draws(row, temperature, k, p, n)
    counts = np.bincount(token, minlength=vocab)
    expected = exact(row, temperature, k, p)
    assert p_value(counts, expected) > 1e-4
    # The test can tell: a temperature 5% off, or one token more or less, would not pass.
    if k != 3:
        assert p_value(counts, exact(row, temperature * 1.05, k, p)) < 1e-4 or n < DRAWS
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
    assert set(draws(row, 1, 0, 0.39, 2000)[0]) == {0}


def test_no_filtered_token_is_ever_drawn():
    """20 million candidates: noise that is infinite once in 2**24 would let one through."""
    row = jnp.where(jnp.arange(112) < 2, 0.0, -30.0)

    @jax.jit
    def drawn(seed):
        bits = jax.random.bits(jax.random.key(seed), (200_000, 2), jnp.uint32)
        token, _ = filters.draw(jnp.broadcast_to(row, (200_000, 112)), bits, 1.0, 2, 1.0)
        return jnp.bincount(token, length=113)

    counts = np.asarray(drawn(1))
    assert counts[:2].sum() == 200_000
    assert p_value(counts[:2], np.array([0.5, 0.5])) > 1e-4


@pytest.mark.parametrize("bits", [0, 1, 2**31, 2**32 - 129, 2**32 - 128, 2**32 - 1])
def test_noise_is_positive_and_finite(monkeypatch, bits):
    """Whatever the generator gives; and small times keep the resolution of all 32 bits."""
    monkeypatch.setattr(filters, "threefry_2x32", lambda key, counts: jnp.full(counts.shape, bits, jnp.uint32))
    noise = float(filters._exponential(jnp.zeros((1, 2), jnp.uint32), jnp.zeros((1, 1), jnp.int32))[0, 0])
    assert noise == pytest.approx(-np.log1p(-min((bits + 0.5) / 2**32, 1 - 2**-24)), rel=1e-6)
    assert 1e-10 < noise < 17


def test_rare_tokens_keep_their_share():
    """1,000 tokens of one in 10 million each: together one draw in 10,000."""
    row = np.append(np.float32(0), np.full(1000, np.log(1e-7), np.float32))
    token, _ = draws(row, 1, 0, 1, 400_000)
    assert stats.binomtest(int((token > 0).sum()), len(token), 1000e-7 / (1 + 1000e-7)).pvalue > 1e-4


def test_the_same_draw_through_every_path():
    """Noise belongs to the token: a filter that removes nothing of note changes nothing."""
    row = np.random.RandomState(3).randn(112).astype(np.float32)
    whole, _ = draws(row, 1, 0, 1, 1000)
    np.testing.assert_array_equal(whole, draws(row, 1, 112, 1, 1000)[0])
    np.testing.assert_array_equal(whole, draws(row, 1, 0, 0.9999999, 1000)[0])
    np.testing.assert_array_equal(whole, draws(row, 1, 111, 1, 1000)[0])
    assert (whole != draws(row, 1, 0, 1, 1000, seed=1)[0]).mean() > 0.5


def test_greedy():
    x = logits_with_ties(10, 61)
    token, logprob = filters.draw(jnp.array(x), keys(10), 0, 50, 0.9)
    np.testing.assert_array_equal(token, x.argmax(1))
    assert token.dtype == jnp.int32
    probability = jax.nn.log_softmax(jnp.array(x), axis=-1)
    np.testing.assert_allclose(logprob, probability[jnp.arange(10), token], atol=1e-6)
    sharp, _ = filters.draw(jnp.array(x[:2]), keys(2), 0.9, 1, 1.0)  # k = 1 is greedy too
    np.testing.assert_array_equal(sharp, x[:2].argmax(1))
