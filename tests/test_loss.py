"""The loss and its gradient against a NumPy computation that shares nothing with it: responses in padded rows, each by
itself, in float64, differentiated numerically. The model is a bigram: the hidden state is the last token's row of E."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_helpers as tiny

from rlvd_jax.training.batches import Example, pack, token_weights
from rlvd_jax.training.loss import Objective, loss_of_hidden, segment_mean, token_logprobs
from rlvd_jax.training.rewards import advantages

V, D, END, LIMIT, TEMPERATURE = 7, 3, 0, 6, 0.8
PROMPTS = [(3, 5), (4,), (2, 6, 1)]
# Three groups of three. The third response of the first is cut off at LIMIT; the second group's rewards are equal.
RESPONSES = [
    [(1, 2, END), (5, END), (4, 4, 3, 2, 1, 6)],
    [(END,), (2, 3, END), (6, 6, 5, END)],
    [(1, 1, 2, 2, END), (3, END), (5, 1, END)],
]
REWARDS = np.array([[1, -1, -1], [-1, -1, -1], [1, 1, -1]])
NORMALISERS = ["batch", "sequence", "constant"]


@pytest.fixture(autouse=True, scope="module")
def quickly():
    with tiny.quick_compilation():
        yield


def tables(seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, V, D))


def np_logp(e_u, prompt, response):
    """[length] of one response, as the definition says."""
    e, u = e_u
    out = []
    for before, token in zip((prompt[-1], *response[:-1]), response, strict=True):
        z = u @ e[before] / TEMPERATURE
        out.append(z[token] - np.log(np.exp(z).sum()))
    return np.array(out)


def np_entropy(e_u, prompt, response):
    """[length]: of the distribution of each token of one response."""
    e, u = e_u
    z = np.array([u @ e[before] / TEMPERATURE for before in (prompt[-1], *response[:-1])])
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    return -(p * np.log(p)).sum(axis=1)


def np_loss(e_u, *, advantage, normalise, low, high, ratio, kl, entropy, old, reference):
    """Equation by equation, on padded rows with a mask up to the first end token."""
    total_tokens = sum(len(r) for g in RESPONSES for r in g)
    number, value = sum(map(len, RESPONSES)), 0.0
    for prompt, group, r in zip(PROMPTS, RESPONSES, REWARDS.astype(float), strict=True):
        a = r - r.sum() / len(r)
        if advantage == "grpo":
            a = a / (np.sqrt(((r - r.mean()) ** 2).sum() / (len(r) - 1)) + 1e-4)
        for response, a_i in zip(group, a, strict=True):
            padded = np.array(response + (END,) * (LIMIT - len(response)))
            ends = np.flatnonzero(padded == END)
            mask = np.arange(LIMIT) <= (ends[0] if len(ends) else LIMIT)
            logp = np_logp(e_u, prompt, response)
            log_rho = logp - np_logp(old, prompt, response)
            assert mask.sum() == len(response)
            if ratio == "sequence":
                log_rho = np.full(len(response), log_rho.mean())
            rho = np.exp(log_rho)
            term = -np.minimum(rho * a_i, np.clip(rho, 1 - low, 1 + high) * a_i)
            if kl:
                d = np_logp(reference, prompt, response) - logp
                term = term + kl * (np.exp(d) - d - 1)
            term = term - entropy * np_entropy(e_u, prompt, response)
            value += {
                "batch": term.sum() / total_tokens,
                "sequence": term.mean() / number,
                "constant": term.sum() / (LIMIT * number),
            }[normalise]
    return value


def np_gradient(f, x, step=1e-5):
    g = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        plus, minus = x.copy(), x.copy()
        plus[i] += step
        minus[i] -= step
        g[i] = (f(plus) - f(minus)) / (2 * step)
    return g


def batch_of(advantage, normalise, row_tokens=16):
    a = advantages(REWARDS, advantage)
    examples = [
        Example(prompt, response, np.zeros(len(response)), a[g, i])
        for g, (prompt, group) in enumerate(zip(PROMPTS, RESPONSES, strict=True))
        for i, response in enumerate(group)
    ]
    weights = token_weights([len(e.response) for e in examples], normalise, LIMIT)
    batch = pack(examples, weights, row_tokens=row_tokens, micro_rows=4)
    assert batch["tokens"].shape[0] == 1
    return {k: jnp.asarray(v[0]) for k, v in batch.items() if k != "used"}


def forward(e_u, batch, **options):
    return token_logprobs(e_u[0][batch["tokens"]], e_u[1], batch["tokens"], temperature=TEMPERATURE, **options)


def logp_of(e_u, batch):
    return forward(e_u, batch)[0]


def ours(e_u, batch, objective, **options):
    hidden = e_u[0][batch["tokens"]]
    return loss_of_hidden(hidden, e_u[1], batch, objective, temperature=TEMPERATURE, **options)


def compare(
    *, advantage="grpo", normalise="batch", low=0.2, high=0.2, ratio="token", kl=0.0, entropy=0.0, off_policy=False
):
    now = tables(0)
    old = now + 0.4 * tables(5) if off_policy else now
    reference = now + 0.5 * tables(2)

    def expected(x):
        return np_loss(
            x,
            advantage=advantage,
            normalise=normalise,
            low=low,
            high=high,
            ratio=ratio,
            kl=kl,
            entropy=entropy,
            old=old,
            reference=reference,
        )

    batch = batch_of(advantage, normalise)
    if off_policy:
        batch["old"] = logp_of(jnp.float32(old), batch)
    if kl:
        batch["reference"] = logp_of(jnp.float32(reference), batch)
    objective = Objective(low, high, ratio, kl, entropy)
    differentiate = jax.jit(jax.value_and_grad(ours, has_aux=True), static_argnums=2)
    (value, sums), gradient = differentiate(jnp.float32(now), batch, objective)
    assert float(value) == pytest.approx(expected(now), abs=2e-6)
    want = np_gradient(expected, now)
    assert np.abs(want).max() > 0.01
    np.testing.assert_allclose(gradient, want, atol=3e-6)
    return sums


@pytest.mark.parametrize("normalise", NORMALISERS)
@pytest.mark.parametrize("advantage", ["grpo", "dr_grpo"])
def test_on_policy_loss_and_gradient(advantage, normalise):
    sums = compare(advantage=advantage, normalise=normalise)
    assert sums["clipped"] == 0 and sums["tokens"] == sum(len(r) for g in RESPONSES for r in g)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("normalise", NORMALISERS)
def test_off_policy_loss_and_gradient(normalise, ratio):
    sums = compare(normalise=normalise, ratio=ratio, off_policy=True)
    assert sums["clipped"] > 0


def test_clip_higher_frees_some_tokens_and_no_others():
    symmetric = compare(low=0.1, high=0.1, off_policy=True)
    higher = compare(low=0.1, high=0.6, off_policy=True)
    assert 0 < higher["clipped"] < symmetric["clipped"]


def test_on_policy_clipping_is_inert_however_narrow():
    now, batch = jnp.float32(tables(0)), batch_of("grpo", "batch")
    narrow, wide = (jax.grad(lambda x, c=c: ours(x, batch, Objective(c, c))[0])(now) for c in (0.0, 0.2))
    assert np.array_equal(narrow, wide) and np.abs(wide).max() > 0.01


@pytest.mark.parametrize("normalise", NORMALISERS)
@pytest.mark.parametrize("off_policy", [False, True])
def test_kl_term(normalise, off_policy):
    sums = compare(kl=0.3, normalise=normalise, off_policy=off_policy)
    assert sums["kl"] > 0


@pytest.mark.parametrize("normalise", NORMALISERS)
@pytest.mark.parametrize("off_policy", [False, True])
def test_entropy_bonus(normalise, off_policy):
    sums = compare(entropy=0.3, normalise=normalise, off_policy=off_policy)
    entropies = [np_entropy(tables(0), p, r) for p, g in zip(PROMPTS, RESPONSES, strict=True) for r in g]
    assert float(sums["entropy"]) == pytest.approx(np.concatenate(entropies).sum(), rel=1e-5)


def test_kl_is_zero_at_the_reference():
    batch = batch_of("grpo", "batch")
    now = jnp.float32(tables(0))
    batch["reference"] = logp_of(now, batch)
    with_kl, gradient_with = jax.value_and_grad(lambda x: ours(x, batch, Objective(kl=1.0))[0])(now)
    without, gradient = jax.value_and_grad(lambda x: ours(x, batch, Objective())[0])(now)
    assert float(with_kl) == pytest.approx(float(without), abs=1e-6)
    np.testing.assert_allclose(gradient_with, gradient, atol=1e-6)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("off_policy", [False, True])
def test_a_batch_of_equal_rewards_has_exactly_no_gradient(ratio, off_policy):
    batch = batch_of("grpo", "batch")
    batch["advantage"] = jnp.zeros_like(batch["advantage"])
    if off_policy:
        batch["old"] = logp_of(jnp.float32(tables(1)), batch)
    gradient = jax.grad(lambda x: ours(x, batch, Objective(ratio=ratio))[0])(jnp.float32(tables(0)))
    assert (np.asarray(gradient) == 0).all()


def test_an_equal_group_counts_in_the_normaliser_only():
    """Without the middle group the gradient is the same but for the number of tokens that it is divided by."""
    now = jnp.float32(tables(0))
    gradient = jax.grad(lambda x, b: ours(x, b, Objective())[0])
    whole, part = batch_of("grpo", "batch"), batch_of("grpo", "batch")
    part["weight"] = jnp.where(part["advantage"] == 0, 0, part["weight"])
    np.testing.assert_allclose(gradient(now, part), gradient(now, whole), atol=1e-7)
    tokens, left = 29, 29 - 8
    assert int((whole["weight"] > 0).sum()) == tokens and int((part["weight"] > 0).sum()) == left


def test_supervised_loss_and_gradient():
    now = tables(0)

    def expected(x):
        pairs = [(p, r) for p, g in zip(PROMPTS, RESPONSES, strict=True) for r in g]
        return -np.concatenate([np_logp(x, p, r) for p, r in pairs]).mean()

    value, gradient = jax.value_and_grad(lambda x: ours(x, batch_of("grpo", "batch"), None)[0])(jnp.float32(now))
    assert float(value) == pytest.approx(expected(now), abs=2e-6)
    np.testing.assert_allclose(gradient, np_gradient(expected, now), atol=3e-6)


def test_the_mismatch_between_sampler_and_trainer_is_measured_on_response_tokens():
    batch = batch_of("grpo", "batch")
    now = jnp.float32(tables(0))
    shift = np.where(batch["weight"] > 0, 0.01, 5.0)
    shift[np.asarray(batch["weight"] > 0).nonzero()[0][0], np.asarray(batch["weight"] > 0).nonzero()[1][0]] = -0.3
    batch["logp"] = logp_of(now, batch) + shift
    sums = ours(now, batch, Objective())[1]
    assert float(sums["delta_logp"] / sums["tokens"]) == pytest.approx((28 * 0.01 + 0.3) / 29, rel=1e-3)
    assert float(sums["delta_logp_max"]) == pytest.approx(0.3, rel=1e-3)


def test_the_mismatch_is_measured_on_what_the_policy_drew():
    batch, now = batch_of("grpo", "batch"), jnp.float32(tables(0))
    first = jnp.asarray(batch["segments"] == 1)  # as if the first example of each row were another model's
    batch["drawn"] = jnp.float32(~first)
    batch["logp"] = logp_of(now, batch) + jnp.where(first, 9.0, 0.25)
    sums = ours(now, batch, Objective())[1]
    tokens = int(((batch["weight"] > 0) & ~first).sum())
    assert sums["drawn"] == tokens < sums["tokens"] == 29
    assert float(sums["delta_logp"]) == pytest.approx(0.25 * tokens, rel=1e-4)
    assert float(sums["delta_logp_max"]) == pytest.approx(0.25, rel=1e-4)


def test_no_overflow_outside_the_response():
    batch = batch_of("grpo", "batch")
    now = jnp.float32(tables(0))
    for key in ("old", "reference"):
        batch[key] = jnp.where(batch["weight"] > 0, logp_of(now, batch), 1e4 if key == "reference" else -1e4)
    value, gradient = jax.value_and_grad(lambda x: ours(x, batch, Objective(kl=0.1))[0])(now)
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("objective", [None, Objective(kl=0.1, entropy=0.2), Objective(ratio="sequence", entropy=0.2)])
@pytest.mark.parametrize("logits", [1, 300])
def test_chunks_of_logits_do_not_change_the_loss(objective, logits):
    """Nor its sums and gradients, whatever the loss is multiplied with."""
    batch, now = batch_of("grpo", "batch"), jnp.float32(tables(0))
    batch |= {"old": logp_of(now * 0.9, batch), "reference": logp_of(now * 0.8, batch)}

    def of(x, factor, **options):
        value, sums = ours(x, batch, objective, **options)
        return factor * value, sums

    (value, sums), gradient = jax.value_and_grad(of, has_aux=True)(now, 1.0)
    (tripled, same), chunked = jax.value_and_grad(partial(of, factor=3.0, logits=logits), has_aux=True)(now)
    assert float(tripled) == pytest.approx(3 * float(value), rel=1e-5)
    assert {k: float(v) for k, v in same.items()} == pytest.approx({k: float(v) for k, v in sums.items()}, rel=1e-5)
    np.testing.assert_allclose(chunked, 3 * gradient, atol=2e-6)


def test_segment_mean_by_hand():
    x = jnp.float32([[9, 1, 3, 9, 5, 7, 9]])
    mask = jnp.array([[False, True, True, False, True, True, False]])
    segments = jnp.int32([[1, 1, 1, 2, 2, 2, 0]])
    assert segment_mean(x, mask, segments).tolist() == [[2, 2, 2, 6, 6, 6, 0]]


def hidden_and_table(rows=2, time=11, width=5, vocab=13, dtype=jnp.float32):
    rng = np.random.default_rng(3)
    hidden, table = rng.normal(size=(rows, time, width)), rng.normal(size=(vocab, width))
    return jnp.asarray(hidden, dtype), jnp.float32(table), jnp.int32(rng.integers(0, vocab, (rows, time)))


@pytest.mark.parametrize("logits", [1, 26, 80, 100, 2**20])
def test_chunked_logprobs_equal_plain_ones(logits):
    hidden, table, tokens = hidden_and_table()

    def plain(hidden, table):
        p = jax.nn.log_softmax(hidden @ table.T / 0.7, axis=-1)
        logp = jnp.take_along_axis(p[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.pad(logp, ((0, 0), (1, 0))), jnp.pad(-(jnp.exp(p) * p).sum(-1)[:, :-1], ((0, 0), (1, 0)))

    def chunked(hidden, table, of_entropy=False):
        return token_logprobs(hidden, table, tokens, temperature=0.7, logits=logits, of_entropy=of_entropy)

    for ours_, theirs in zip(chunked(hidden, table), plain(hidden, table), strict=True):
        np.testing.assert_allclose(ours_, theirs, atol=2e-6)
    weight = jnp.float32(np.random.default_rng(0).normal(size=tokens.shape))
    ours_, theirs = (
        jax.grad(lambda h, t, f=f: (weight * f(h, t)[0]).sum(), argnums=(0, 1))(hidden, table) for f in (chunked, plain)
    )
    np.testing.assert_allclose(ours_[0], theirs[0], atol=5e-6)
    np.testing.assert_allclose(ours_[1], theirs[1], atol=2e-5)

    def both(outputs):  # log-probabilities and entropies
        return (weight * outputs[0]).sum() + (weight[::-1] * outputs[1]).sum()

    ours_ = jax.grad(lambda h, t: both(chunked(h, t, of_entropy=True)), argnums=(0, 1))(hidden, table)
    theirs = jax.grad(lambda h, t: both(plain(h, t)), argnums=(0, 1))(hidden, table)
    np.testing.assert_allclose(ours_[0], theirs[0], atol=5e-6)
    np.testing.assert_allclose(ours_[1], theirs[1], atol=2e-5)
    without = jax.grad(lambda h: chunked(h, table)[1].sum())(hidden)
    assert not np.asarray(without).any(), "unless asked for, no gradient flows through the entropy"


def test_bfloat16_logits_are_accumulated_in_float32():
    hidden, table, tokens = hidden_and_table(width=256, dtype=jnp.bfloat16)
    table = table / 16
    exact = token_logprobs(hidden.astype(jnp.float32), table.astype(jnp.bfloat16).astype(jnp.float32), tokens)[0]
    np.testing.assert_allclose(token_logprobs(hidden, table, tokens)[0], exact, atol=1e-5)
    gradients = jax.grad(lambda h, t: token_logprobs(h, t, tokens, logits=40)[0].sum(), argnums=(0, 1))(hidden, table)
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32]


def test_no_array_of_tokens_by_vocabulary_exists():
    """Compiled for 1,024 tokens × 8,192 words (32 MiB of float32 logits), with chunks of 2 MiB."""
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 1025, 8), (8192, 8))]
    tokens = jax.ShapeDtypeStruct((1, 1025), jnp.int32)

    def total(hidden, table, tokens, logits):
        return sum(x.sum() for x in token_logprobs(hidden, table, tokens, logits=logits, of_entropy=True))

    def temporary(logits):
        gradient = jax.jit(jax.grad(lambda *a: total(*a, logits), argnums=(0, 1)))
        return gradient.lower(*shapes, tokens).compile().memory_analysis().temp_size_in_bytes / 2**20

    assert temporary(2**19) < 12
    assert temporary(2**30) > 32
