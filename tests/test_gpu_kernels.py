"""The sampler's kernels for GPUs against plain arithmetic: on a GPU as they run there, elsewhere step by step."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from test_filters import exact, p_value

from rlvd_jax.qwen2.layers import rms_norm, rope_table, rotate
from rlvd_jax.sampling import filters, gpu, slots
from rlvd_jax.sampling.rows import share_out

INTERPRET = jax.default_backend() != "gpu"
PAGE = 16


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.RandomState(seed).standard_normal(shape), dtype)


def attended(qkv, bias, rope, position, table, keys, values, heads):
    """(output, keys, values) as `gpu.attend` should have them, one slot after the other, in float64."""
    kv_heads, _, _, dim = keys.shape
    keys, values = np.array(keys), np.array(values)
    x = (qkv.sum(axis=0).astype(bias.dtype) + bias).reshape(qkv.shape[1], -1, dim)
    q, k = rotate(x[:, :heads], rope), rotate(x[:, heads : heads + kv_heads], rope)
    out = np.zeros((len(position), heads * dim))
    live = [s for s, p in enumerate(position) if p >= 0]
    for s in live:
        page, offset = table[s, position[s] // PAGE], position[s] % PAGE
        keys[:, page, offset], values[:, page, offset] = k[s], x[s, heads + kv_heads :]
    for s in live:
        index = np.arange(position[s] + 1)
        rows = np.array(table)[s, index // PAGE], index % PAGE
        past_k, past_v = (np.float64(c[:, *rows]) for c in (keys, values))  # [kv_heads, time, dim]
        scores = np.einsum("kgd,ktd->kgt", np.float64(q[s]).reshape(kv_heads, -1, dim), past_k) * dim**-0.5
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out[s] = np.einsum("kgt,ktd->kgd", weights, past_v).ravel()
    return out, keys, values


@pytest.mark.parametrize(
    "heads, kv_heads, dim, parts, splits, how",
    [
        (12, 2, 128, 1, 1, {}),
        (14, 2, 64, 2, 1, {}),
        (12, 2, 128, 4, 3, {}),
        (14, 2, 64, 2, 2, {"block": 16, "num_warps": 4, "num_stages": 4}),
        (16, 2, 128, 1, None, {}),
    ],
)
def test_attention(heads, kv_heads, dim, parts, splits, how):
    """Responses of several lengths that share a page, at a page's edge, at their first token, and an idle slot."""
    slots, pages = 6, 60
    dtype = jnp.bfloat16
    keys, values = (normal(kv_heads, pages, PAGE, dim, seed=i, dtype=dtype) for i in (1, 2))
    table = jnp.asarray(np.random.RandomState(3).permutation(pages)[: slots * 10].reshape(slots, 10), jnp.int32)
    table = table.at[1, 0].set(table[0, 0])
    position = jnp.array([40, 17, -1, 159, 64, 0], jnp.int32)
    rope = rope_table(position, dim, 1e4)
    qkv = normal(parts, slots, (heads + 2 * kv_heads) * dim, seed=4, dtype=dtype if parts == 1 else jnp.float32)
    bias = normal((heads + 2 * kv_heads) * dim, seed=5, dtype=dtype)
    arguments = qkv, bias, rope, position, table
    expected, new_keys, new_values = attended(*arguments, keys, values, heads)
    how = {"heads": heads, "splits": splits, "interpret": INTERPRET, **how}
    out, *new = gpu.attend(*arguments, keys, values, **how)
    assert out.shape == (slots, heads * dim)
    out = np.float64(out)
    live = np.array(position) >= 0
    np.testing.assert_allclose(out[live], expected[live], atol=0.02, rtol=0.02)
    assert np.isfinite(out).all()
    written = {(int(table[s, p // PAGE]), int(p % PAGE)) for s, p in enumerate(position) if p >= 0}
    for ours, theirs, before in zip(new, (new_keys, new_values), (keys, values), strict=True):
        ours = np.float32(ours)
        np.testing.assert_allclose(ours, np.float32(theirs), atol=0.01, rtol=0.01)  # XLA may round once for our twice
        changed = np.nonzero((ours != np.float32(before)).any(axis=(0, 3)))
        assert set(zip(*(x.tolist() for x in changed), strict=True)) == written


@pytest.mark.parametrize(
    "heads, kv_heads, dim, parts, splits, fresh",
    [(12, 2, 128, 1, 1, 4), (14, 2, 64, 4, 3, 4), (16, 2, 64, 2, 4, 11), (12, 2, 128, 4, None, 18)],
)
def test_attention_of_several_new_tokens(heads, kv_heads, dim, parts, splits, fresh):
    """As if each were a slot of its own that is written before any reads; of rows that are nobody's none is written."""
    slots, pages = 5, 50
    dtype = jnp.bfloat16
    keys, values = (normal(kv_heads, pages, PAGE, dim, seed=i, dtype=dtype) for i in (1, 2))
    table = jnp.asarray(np.random.RandomState(3).permutation(pages).reshape(slots, 10), jnp.int32)
    position, share = np.array([40, 30, -1, 159, 0]), np.array([fresh, fresh, 0, 1, 3])
    count = 4 * fresh + 2
    rows = share_out(jnp.asarray(share, jnp.int32), count, heads // kv_heads)
    slot, nth, there = (np.array(x) for x in rows[:3])
    whose = [(s, i) for s, n in enumerate(share) for i in range(n)]
    assert list(zip(slot[there].tolist(), nth[there].tolist(), strict=True)) == whose and there.sum() == len(whose)
    at = position[slot] + nth
    rope = rope_table(jnp.asarray(at), dim, 1e4)
    columns = (heads + 2 * kv_heads) * dim
    qkv = parts**-0.5 * normal(parts, count, columns, seed=4)
    qkv = qkv.astype(dtype if parts == 1 else jnp.float32)
    bias = normal(columns, seed=5, dtype=dtype)
    alone = np.where(there, at, -1), table[slot]
    expected, *after = attended(qkv, bias, rope, *alone, keys, values, heads)
    position = jnp.asarray(position, jnp.int32)
    how = {"heads": heads, "splits": splits, "interpret": INTERPRET}
    out, *new = gpu.attend(qkv, bias, rope, position, table, keys, values, rows, **how)
    np.testing.assert_allclose(np.float64(out)[there], expected[there], atol=0.03, rtol=0.02)
    for ours, theirs, before in zip(new, after, (keys, values), strict=True):
        ours, theirs = np.float32(ours), np.float32(theirs)
        np.testing.assert_allclose(ours, theirs, atol=0.03, rtol=0.01)  # XLA rounds sums, biases and angles less often
        changed = [(x != np.float32(before)).any(axis=(0, 3)) for x in (ours, theirs)]
        np.testing.assert_array_equal(*changed)


def test_adding_and_norm():
    x, weight = normal(5, 96, dtype=jnp.bfloat16), normal(96, seed=1, dtype=jnp.bfloat16)
    for y in (normal(1, 5, 96, seed=2, dtype=jnp.bfloat16), normal(4, 5, 96, seed=2)):
        total, norm = gpu.add_norm(x, y, weight, eps=1e-6, interpret=INTERPRET)
        expected = x + y.astype(jnp.float32).sum(axis=0).astype(x.dtype)
        np.testing.assert_array_equal(np.float32(total), np.float32(expected))
        np.testing.assert_allclose(np.float32(norm), np.float32(rms_norm(expected, weight, 1e-6)), rtol=0.01)


@pytest.mark.parametrize("rows", [1, 5, 16, 33, 64])
@pytest.mark.parametrize(
    "k, n, how",
    [
        (200, 328, {"splits": 1}),  # neither whole blocks nor whole tiles, one part
        (200, 328, {"splits": 3}),  # 4 blocks in parts of 2, one of them empty
        (320, 64, {"splits": 2}),  # parts of unlike size
        (256, 136, {"tile": 32, "block": 32, "splits": 4, "num_warps": 2, "num_stages": 2}),
        (1536, 192, {}),
    ],
)
def test_products_of_few_rows(rows, k, n, how):
    """Sums in float32 of what lies in bfloat16; no row or column that isn't there gets in or out."""
    h, w = normal(rows, k, dtype=jnp.bfloat16), normal(n, k, seed=1, dtype=jnp.bfloat16)
    expected = np.float64(h) @ np.float64(w).T
    out = gpu.few_rows(h, w, **how, interpret=INTERPRET)
    splits = how.get("splits", 4)
    assert out.shape == (splits, rows, n)
    assert out.dtype == (jnp.bfloat16 if splits == 1 else jnp.float32)
    rtol = 2**-8 if splits == 1 else 1e-5
    np.testing.assert_allclose(np.float64(out).sum(axis=0), expected, rtol=rtol, atol=1e-5 * k)
    if splits > 1:  # in order, each from its own positions of k
        block = how.get("block", 64)
        each = pl.cdiv(pl.cdiv(k, block), splits) * block
        first = np.float64(h[:, :each]) @ np.float64(w[:, :each]).T
        np.testing.assert_allclose(np.float64(out[0]), first, rtol=1e-5, atol=1e-5 * k)


@pytest.mark.parametrize("rows", [3, 64])
@pytest.mark.parametrize("k, n, how", [(200, 136, {}), (256, 64, {"tile": 32, "block": 128, "num_stages": 3})])
def test_the_activation_in_the_product(rows, k, n, how):
    h, w = normal(rows, k, dtype=jnp.bfloat16), 0.1 * normal(2 * n, k, seed=1)
    w = w.astype(jnp.bfloat16)
    gate, up = np.split(np.float64(h) @ np.float64(w).T, 2, axis=1)
    out = gpu.few_rows(h, w, gated=True, **how, interpret=INTERPRET)
    assert out.shape == (1, rows, n) and out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(out[0]), gate / (1 + np.exp(-gate)) * up, rtol=0.03, atol=0.02)
    ours, theirs = (gpu.gated(h, w, by=by, interpret=INTERPRET) for by in ("few", "library"))
    np.testing.assert_allclose(np.float64(ours), np.float64(theirs), rtol=0.03, atol=0.02)


def test_what_few_rows_does_not_take():
    for rows, how in ((65, {}), (2, {"gated": True, "splits": 2})):
        with pytest.raises(ValueError, match="takes 64" if rows > 64 else "whole sums"):
            gpu.few_rows(normal(rows, 64), normal(64, 64), **how, interpret=INTERPRET)


@pytest.mark.parametrize("hidden, mlp, qkv", [(896, 4864, 1152), (1536, 8960, 2048), (2048, 11008, 2560), (32, 48, 64)])
def test_how_few_rows_are_shared_out(hidden, mlp, qkv):
    """No part is empty, all programs run at once, two to a multiprocessor, and the result goes the same way."""
    for rows in (1, 16, 17, 64):
        for k, n, is_gated in (
            (hidden, qkv, False),
            (hidden, hidden, False),
            (mlp, hidden, False),
            (hidden, mlp, True),
        ):
            how = gpu.tiling(rows, k, n, is_gated)
            blocks = pl.cdiv(k, how["block"])
            each = pl.cdiv(blocks, how["splits"])
            assert (how["splits"] - 1) * each < blocks <= how["splits"] * each
            assert how["splits"] * pl.cdiv(n, how["tile"]) <= 2 * 132
            staged = 2 * how["block"] * (max(16, rows) + how["tile"] * (2 if is_gated else 1))
            assert how["num_stages"] >= 2 and how["num_stages"] * staged <= 113 * 1024
            assert not is_gated or how["splits"] == 1


def test_who_multiplies(monkeypatch):
    """Few rows in parts, but for sums over devices; many by Hopper's kernels where they run; the others by the
    library."""
    h, w = normal(3, 1536, dtype=jnp.bfloat16), normal(24, 1536, seed=1, dtype=jnp.bfloat16)
    assert gpu.product(h, w).shape == (1, 3, 24)
    assert gpu.product(h, w, by="few", interpret=INTERPRET).shape == (4, 3, 24)
    for hopper, expected in ((False, ["few", "library", "library"]), (True, ["few", "library", "many"])):
        monkeypatch.setattr(gpu.hopper, "here", lambda hopper=hopper: hopper)
        assert [gpu.products_by(n, 1536, 8960, 1) for n in (64, 96, 256)] == expected
        assert gpu.products_by(64, 1536, 8960, 2) == "library"
        assert gpu.products_by(256, 1536, 8960 + 32, 1) == "library"


@pytest.mark.parametrize("tied", [True, False])
def test_who_draws(tied, monkeypatch):
    """Logits' statistics are found where the logits are made, where Hopper's kernels run and take all that is asked
    for; otherwise the library makes the logits and `filters.draw` does the rest."""
    monkeypatch.setattr(gpu, "draw_hidden", lambda hidden, table, *_: table)
    monkeypatch.setattr(slots, "draw", lambda *_: "filters")
    monkeypatch.setattr(slots.decoder, "logits", lambda *_: None)
    weights = {"embedding": jnp.zeros((192, 64))} | ({} if tied else {"lm_head": jnp.ones((192, 64))})

    def drawn(rows=192, hidden=64, vocab=192, here=True, **how):
        monkeypatch.setattr(gpu.hopper, "here", lambda: here)
        p = {"layout": "gpu", "tensor": 1, "temperature": 0.9, "top_k": 50, "top_p": 1.0} | how
        p["config"] = types.SimpleNamespace(tie_word_embeddings=tied)
        table = {name: x[:vocab, :hidden] for name, x in weights.items()}
        return slots._draw(types.SimpleNamespace(**p), table, jnp.zeros((rows, hidden)), None, "gpu")

    for rows in (128, 136, 1000):
        np.testing.assert_array_equal(drawn(rows), 0 if tied else 1)
    for other in (
        {"rows": 127},
        {"hidden": 48},
        {"vocab": 160},
        {"here": False},
        {"layout": "plain"},
        {"tensor": 2},
        {"temperature": 0},
        {"top_k": 0},
        {"top_k": 65},
        {"top_p": 0.9},
    ):
        assert drawn(**other) == "filters"


@pytest.mark.parametrize("k", [1, 7, 39, 50, 64])
def test_the_draw_is_that_of_the_filters(k):
    """The very tokens, also where logits are equal at the boundary or everywhere."""
    logits = 3 * normal(6, 5003)
    logits = logits.at[1].set(jnp.round(logits[1])).at[2].set(0.0).at[3, ::2].set(-1e9)
    keys = jnp.asarray(np.random.RandomState(1).randint(0, 2**32, (6, 2), dtype=np.uint32))
    tokens, logprobs = filters.draw(logits, keys, 0.9, k, 1.0)
    ours, our_logprobs = gpu.draw(logits, keys, 0.9, k, interpret=INTERPRET)
    np.testing.assert_array_equal(ours, tokens)
    np.testing.assert_allclose(our_logprobs, logprobs, atol=1e-5)


def test_the_draw_follows_the_filtered_softmax():
    number, vocab = (100_000, 4096) if not INTERPRET else (1500, 4096)
    row = np.float32(3 * np.random.RandomState(2).standard_normal(vocab))
    keys = jnp.asarray(np.random.RandomState(3).randint(0, 2**32, (number, 2), dtype=np.uint32))
    tokens, _ = jax.jit(
        lambda keys: gpu.draw(jnp.broadcast_to(row, (number, vocab)), keys, 0.9, 12, interpret=INTERPRET)
    )(keys)
    counts = np.bincount(tokens, minlength=vocab)
    assert p_value(counts, exact(row, 0.9, 12, 1.0)) > 1e-4
    assert p_value(counts, exact(row, 1.3, 12, 1.0)) < 1e-4
