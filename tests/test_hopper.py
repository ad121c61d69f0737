"""The products of many rows: on a Hopper GPU as they run there, elsewhere step by step."""

import functools
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import xla_bridge
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # public from jax 0.11 on

from rlvd_jax.qwen2.layers import swiglu
from rlvd_jax.sampling import gpu, hopper
from rlvd_jax.sampling.hopper import Tiling

# Where warpgroups are simulated, those that wait hold threads of XLA's, of which there are else as many as cores. Where
# JAX was started before with too few, the logits of a cluster would wait for ever.
STARVED = xla_bridge.backends_are_initialized() and int(os.environ.get("NPROC", os.cpu_count())) < 8
os.environ.setdefault("NPROC", "8")
NATIVE = hopper.here()
OLD = jax.__version_info__ < (0, 11) and not NATIVE
INTERPRET = False if NATIVE else InterpretGPUParams()
NEWER = pytest.mark.skipif(
    OLD,
    reason="this jax simulates neither clusters nor what is out of bounds",
)
THREADS = pytest.mark.skipif(STARVED and not NATIVE, reason="needs 8 threads of XLA's: run this file by itself")
CORES = 132 if NATIVE else 3  # fewer than tiles, so that each has several


if OLD:

    @pytest.fixture(autouse=True)
    def transposed(monkeypatch):
        """What this jax simulates of `wgmma` knows no transposed blocks: all that multiply here are."""
        to_range = gpu_callbacks.interpret_utils.to_range

        def without_transposition(transforms):
            return to_range(tuple(t for t in transforms if not hasattr(t, "permutation")))

        numpy = types.SimpleNamespace(**vars(np) | {"matmul": lambda a, b, dtype: np.matmul(a, b.T, dtype=dtype)})
        monkeypatch.setattr(gpu_callbacks.interpret_utils, "to_range", without_transposition)
        monkeypatch.setattr(gpu_callbacks, "np", numpy)


def normal(i, *shape):
    return jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)


def multiplied(h, w, tiling, **how):
    return hopper.multiply(h, w, tiling=Tiling(*tiling), cores=CORES, interpret=INTERPRET, **how)


@pytest.mark.parametrize(
    "rows, k, n, tiling",
    [
        (256, 192, 256, (128,)),
        (256, 128, 192, (192,)),
        (256, 640, 128, (64, 1, 3)),  # parts of k that differ
        pytest.param(160, 128, 192, (128,), marks=NEWER),  # tiles that end beyond both
        pytest.param(384, 128, 256, (128, 2), marks=NEWER),
    ],
)
def test_products(rows, k, n, tiling):
    h, w = normal(0, rows, k), normal(1, n, k)
    out = multiplied(h, w, tiling)
    splits = Tiling(*tiling).splits
    assert out.shape == (splits, rows, n) and out.dtype == (jnp.bfloat16 if splits == 1 else jnp.float32)
    expected = np.float32(h) @ np.float32(w).T
    np.testing.assert_allclose(np.float32(out).sum(axis=0), expected, rtol=0.01, atol=0.05 if splits == 1 else 1e-3)


@pytest.mark.parametrize(
    "rows, k, f, tiling",
    [
        (128, 128, 144, (144,)),
        pytest.param(192, 128, 200, (144,), marks=NEWER),
        pytest.param(256, 128, 200, (208, 2), marks=NEWER),
    ],
)
def test_the_activation_in_the_product(rows, k, f, tiling):
    h, w = normal(0, rows, k), normal(1, 2 * f, k)
    expected = np.float32(h) @ np.float32(w).T
    expected = np.float32(swiglu(*jnp.split(jnp.asarray(expected, jnp.bfloat16), 2, axis=1)))
    out = multiplied(h, w, tiling, gated=True)
    assert out.shape == (1, rows, f) and out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(out[0]), expected, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("used", [0, 1])
def test_rows_that_nobody_needs_take_no_tiles(used):
    h, w = normal(0, 256, 128), normal(1, 128, 128)
    out = np.float32(multiplied(h, w, (128,), used=jnp.int32(used))[0])
    right = np.isclose(out, np.float32(h) @ np.float32(w).T, rtol=0.01, atol=0.05)
    tiles = -(-used // hopper.ROWS) * hopper.ROWS
    assert right[:tiles].all()
    assert NATIVE or not right[tiles:].all(axis=1).any(), "what is left there on a GPU may be right by chance"


def scored(h, table, tiling):
    return hopper.scores(h, table, temperature=0.9, tiling=Tiling(*tiling), cores=CORES, interpret=INTERPRET)


def check_statistics(logits, stats):
    """The maxima to the last bit: the draw looks for logits that are as large."""
    most, total = gpu._statistics(logits, 0.9, interpret=not NATIVE)
    np.testing.assert_array_equal(stats[0], most)
    np.testing.assert_allclose(stats[1], total, rtol=1e-4)


@pytest.mark.parametrize(
    "rows, k, vocab, tiling",
    [
        (128, 128, 192, (192,)),
        pytest.param(200, 128, 320, (128,), marks=NEWER),  # tiles that end beyond both
        pytest.param(392, 128, 320, (256, 2), marks=(NEWER, THREADS)),
    ],
)
def test_logits_and_their_statistics(rows, k, vocab, tiling):
    h, table = normal(0, rows, k), normal(1, vocab, k)
    logits, *stats = scored(h, table, tiling)
    assert logits.shape == (rows, vocab) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, np.float32(h) @ np.float32(table).T, rtol=1e-4, atol=1e-3)
    check_statistics(logits, stats)


@pytest.mark.parametrize("rows", [128, 256, 384, 1024, 2048])
@pytest.mark.parametrize("hidden, mlp, qkv", [(896, 4864, 1152), (1536, 8960, 2048), (2048, 11008, 2560)])
def test_tilings(rows, hidden, mlp, qkv, monkeypatch):
    """No part of k is empty, clusters have whole tiles, and few rows still occupy much of the chip."""
    monkeypatch.setattr(hopper, "cores", lambda: 132)
    for k, n, gated in ((hidden, qkv, False), (hidden, hidden, False), (hidden, 2 * mlp, True), (mlp, hidden, False)):
        t = hopper.tiling(rows, k, n, gated=gated)
        high, wide = -(-rows // hopper.ROWS), -(-n // t.columns)
        assert high % t.cluster == 0 and 1 <= t.splits <= k // hopper.BLOCK
        assert not gated or t.splits == 1
        assert high * wide * t.splits >= 33
        assert hopper.tiling(rows, k, n, gated=gated, most_splits=1).splits == 1


@pytest.fixture
def as_on_hopper(monkeypatch):
    monkeypatch.setattr(hopper, "cores", lambda: CORES)
    for name in ("multiply", "scores"):
        monkeypatch.setattr(hopper, name, functools.partial(getattr(hopper, name), interpret=INTERPRET))
    monkeypatch.setattr(gpu, "draw", functools.partial(gpu.draw, interpret=not NATIVE))
    # Tiles that end where the matrices below do: what jax 0.10 simulates hangs where they don't.
    monkeypatch.setattr(hopper, "PACE", {128: 1e-6})
    monkeypatch.setattr(hopper, "GATED_PACE", {144: 1e-6})


def test_what_a_step_of_the_sampler_takes(as_on_hopper):
    h, w, gate_up = normal(0, 128, 128), normal(1, 256, 128), normal(2, 2 * 144, 128)
    for find in (lambda **how: gpu.product(h, w, **how).sum(axis=0), lambda **how: gpu.gated(h, gate_up, **how)):
        ours, theirs = (np.float32(find(by=by)) for by in ("many", "library"))
        np.testing.assert_allclose(ours, theirs, rtol=0.02, atol=0.1)
    assert jax.eval_shape(functools.partial(gpu.product, by="many", tensor=2), h, w).shape == (1, 128, 256)


def test_the_draw_from_hidden_states(as_on_hopper, monkeypatch):
    """Is that from the same logits without their statistics; rows that are not used may hold anything."""
    used = 100
    hidden, table = normal(0, 128, 64), 0.3 * normal(1, 256, 64)
    keys = jax.random.bits(jax.random.key(2), (128, 2), jnp.uint32)
    found, scores = [], hopper.scores
    monkeypatch.setattr(hopper, "scores", lambda *args, **how: found.extend(scores(*args, **how)) or found)
    hidden_of_others = jnp.where((jnp.arange(128) < used)[:, None], hidden, jnp.nan)
    token, logprob = (x[:used] for x in gpu.draw_hidden(hidden_of_others, table, keys, 0.9, 4, jnp.int32(used)))
    logits, *stats = (x[:used] for x in found)
    np.testing.assert_allclose(logits, np.float32(hidden[:used]) @ np.float32(table).T, rtol=1e-4, atol=1e-3)
    check_statistics(logits, stats)
    expected, expected_logprob = gpu.draw(logits, keys[:used], 0.9, 4)
    np.testing.assert_array_equal(token, expected)
    np.testing.assert_allclose(logprob, expected_logprob, atol=1e-5)


native = pytest.mark.skipif(not NATIVE, reason="needs a Hopper GPU")


@native
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("rows", [128, 192, 1000, 1024])
def test_logits_of_real_sizes(rows, cluster):
    hidden, table = normal(0, rows, 1536), 0.05 * normal(1, 151936, 1536)
    expected = jnp.dot(hidden, table.T, preferred_element_type=jnp.float32)
    logits, *stats = scored(hidden, table, (256, cluster))
    assert jnp.abs(logits - expected).max() < 1e-3
    check_statistics(logits, stats)
    keys = jax.random.bits(jax.random.key(2), (rows, 2), jnp.uint32)
    token, logprob = gpu.draw_hidden(hidden, table, keys, 0.9, 50)
    same, its_logprob = gpu.draw(logits, keys, 0.9, 50)  # of tiles that may be others
    assert (token != same).mean() < 0.01
    np.testing.assert_allclose(logprob[token == same], its_logprob[token == same], atol=1e-3)


@native
@pytest.mark.parametrize("columns, gated_columns", [(256, 272), (192, 208), (128, 144)])
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("rows", [288, 2080])
def test_real_sizes(rows, cluster, columns, gated_columns):
    for k, n in ((1536, 2048), (8960, 1536)):
        h, w = normal(0, rows, k), normal(1, n, k)
        expected = np.float32(jnp.dot(h, w.T, preferred_element_type=jnp.float32))
        for splits in (1, 3):
            out = multiplied(h, w, (columns, cluster, splits))
            assert np.linalg.norm(np.float32(out).sum(axis=0) - expected) < 0.01 * np.linalg.norm(expected)
    h, w = normal(0, rows, 1536), normal(1, 17920, 1536)
    expected = np.float32(swiglu(*jnp.split(h @ w.T, 2, axis=1)))
    out = multiplied(h, w, (gated_columns, cluster), gated=True)
    assert np.linalg.norm(np.float32(out[0]) - expected) < 0.01 * np.linalg.norm(expected)


def test_what_it_does_not_take():
    for rows, k, n, how in ((64, 64, 64, {}), (128, 96, 64, {}), (128, 64, 128, {"gated": True, "splits": 2})):
        tiling = (64, 1, how.pop("splits", 1))
        with pytest.raises(ValueError, match=r"tiles of|whole sums"):
            multiplied(normal(0, rows, k), normal(1, n, k), tiling, **how)
    for n, columns in ((96, 64), (128, 96)):
        with pytest.raises(ValueError, match="groups of"):
            scored(normal(0, 128, 64), normal(1, n, 64), (columns,))
