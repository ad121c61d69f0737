"""What goes into a layer's blocks on GPUs against the plain form: on a GPU as it runs there, elsewhere step by step."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from training_helpers import CONFIG, params, run_on_four_devices

from rlvd_jax.config import MeshConfig, OptimizerConfig
from rlvd_jax.qwen2 import Qwen2, gpu, layers, model
from rlvd_jax.qwen2.mesh import make_mesh
from rlvd_jax.training.step import Trainer

INTERPRET = jax.default_backend() != "gpu"
EPS = 1e-3  # large enough to be seen
norm_backward = partial(gpu.norm_backward, interpret=INTERPRET)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(gpu, "norm_backward", norm_backward)


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.RandomState(seed).standard_normal(shape), dtype)


def by_hand(x, weight, to_h, to_x, eps):
    """What `gpu.norm_backward` should return, weight's cotangent added up, in float64."""
    x, weight, to_h, to_x = (np.float64(a) for a in (x, weight, to_h, to_x))
    rms = np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    normed, to_normed = x / rms, to_h * weight
    to_x = to_x + (to_normed - normed * (normed * to_normed).mean(axis=-1, keepdims=True)) / rms
    return normed * weight, to_x, (to_h * normed).sum(axis=0)


@pytest.mark.parametrize("dtype, within", [(jnp.float32, 2e-6), (jnp.bfloat16, 2**-8)])
@pytest.mark.parametrize("rows, hidden", [(1, 7), (gpu.ROWS, 64), (2 * gpu.ROWS + 5, 96), (40, 1536)])
def test_norm_backward(rows, hidden, dtype, within):
    """Rows and columns that are whole blocks and not, one row of nothing, one of large numbers; float32 within."""
    x, to_h, to_x = (normal(rows, hidden, seed=i, dtype=dtype) for i in range(3))
    if rows > 1:
        x = x.at[0].set(0).at[1].multiply(1e4)
    weight = 1 + normal(hidden, seed=3)
    *ours, parts = gpu.norm_backward(x, weight, to_h, to_x, eps=EPS)
    *theirs, to_weight = by_hand(x, weight, to_h, to_x, EPS)
    for mine, exact in zip(ours, theirs, strict=True):
        assert mine.shape == x.shape and mine.dtype == dtype
        np.testing.assert_allclose(np.float64(mine), exact, rtol=within, atol=within)
    assert parts.shape == (-(-rows // gpu.ROWS), hidden) and parts.dtype == jnp.float32
    np.testing.assert_allclose(parts.sum(axis=0), to_weight, rtol=1e-5, atol=1e-4)


def test_what_is_not_a_number_shows():
    """So that training that broke down stops (`step.check_finite`), and in its own row only, but for the weight's."""
    x, to_h, to_x = (normal(3, 40, seed=i) for i in range(3))
    h, to_x, to_weight = gpu.norm_backward(x, jnp.ones(40), to_h.at[1, 7].set(np.nan), to_x, eps=EPS)
    assert np.isfinite(h).all() and np.isnan(to_weight).any()
    assert np.isfinite(to_x).all(axis=1).tolist() == [True, False, True]


def blocks(dtype, rows=(3, 17), hidden=48, head_dim=16, heads=3, mlp=80):
    """(plain form, form with a backward pass by hand, arguments before eps) of both blocks' beginnings."""
    x = normal(*rows, hidden, dtype=dtype)
    sizes = heads * head_dim, 2 * head_dim, 2 * head_dim
    weights = tuple(0.2 * normal(hidden, n, seed=i, dtype=dtype) for i, n in enumerate(sizes))
    biases = tuple(normal(n, seed=i + 3) for i, n in enumerate(sizes))
    position = jnp.broadcast_to(jnp.arange(rows[-1]), rows)
    norm = 1 + normal(hidden, seed=6)
    yield layers.heads, gpu.heads, (x, norm, weights, biases, layers.rope_table(position, head_dim, 1e4))
    gate, up = (0.2 * normal(hidden, mlp, seed=i, dtype=dtype) for i in (7, 8))
    yield layers.wide, gpu.wide, (x, norm, gate, up)


@pytest.mark.parametrize("rows", [(3, 17), (51,)])
@pytest.mark.parametrize("block", ["heads", "wide"])
def test_gradients_are_those_of_the_plain_form(block, rows):
    """Of everything that has one, with x used once more besides; in float32, where both agree."""
    plain, ours, arguments = next(x for x in blocks(jnp.float32, rows) if x[0].__name__ == block)

    def gradients(form):
        def value(arguments):
            out = form(arguments)
            return sum(jnp.sum(jnp.sin((i + 1) * y)) for i, y in enumerate(out))

        with jax.default_matmul_precision("highest"):
            return jax.jit(jax.value_and_grad(value))(arguments)

    expected = gradients(lambda a: (a[0], *plain(*a, EPS)))
    found = gradients(lambda a: ours(*a, EPS, None))
    if block == "heads":  # the angles have no gradient here
        expected, found = ((x[0], x[1][:4]) for x in (expected, found))
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        np.testing.assert_allclose(mine, theirs, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("block", ["heads", "wide"])
def test_in_bfloat16_gradients_are_no_less_exact(block):
    """Than the plain form's, both against float32's."""
    cotangents = None

    def pulled(form, dtype):
        arguments = next(x for x in blocks(dtype) if x[0].__name__ == block)[2]
        out, pull = jax.vjp(form, jax.tree.map(lambda x, like: jnp.asarray(like, x.dtype), arguments, exact_arguments))
        return jax.tree.leaves(pull(tuple(c.astype(y.dtype) for c, y in zip(cotangents, out, strict=True)))[0][:4])

    plain, ours, rounded = next(x for x in blocks(jnp.bfloat16) if x[0].__name__ == block)
    exact_arguments = jax.tree.map(lambda x: x.astype(jnp.float32), rounded)
    shapes = jax.eval_shape(lambda a: ours(*a, EPS, None), rounded)
    cotangents = [normal(*y.shape, seed=i, dtype=jnp.bfloat16) for i, y in enumerate(shapes)]
    exact = pulled(lambda a: (a[0], *plain(*a, EPS)), jnp.float32)
    theirs = pulled(lambda a: (a[0], *plain(*a, EPS)), jnp.bfloat16)
    mine = pulled(lambda a: ours(*a, EPS, None), jnp.bfloat16)
    for ours, plain, right in zip(mine, theirs, exact, strict=True):
        wrong = [float(jnp.linalg.norm(x.astype(jnp.float32) - right) / jnp.linalg.norm(right)) for x in (ours, plain)]
        assert wrong[0] < max(1.1 * wrong[1], 1e-3) < 0.02


def test_where_the_kernel_runs(monkeypatch):
    """On GPUs, unless heads may be split."""

    def chosen(platform, **axes):
        monkeypatch.setattr(model, "platform_of", lambda _: platform)
        return model._by_kernel(SimpleNamespace(shape={"data": 1, "fsdp": 1, "tensor": 1} | axes) if axes else None)

    assert chosen("gpu") and chosen("gpu", data=2, fsdp=2)
    assert not any([chosen("gpu", tensor=2), chosen("cpu"), chosen("cpu", data=2), chosen("tpu", data=2)])


def updated(mesh, unroll: bool, micro: int):
    """Metrics and weights after an update of the tiny model, from the first moments of which the gradients can be
    read."""
    rng = np.random.default_rng(2)
    rows, time = 8 // micro, 12
    lengths = rng.integers(5, time + 1, 8)
    segments = np.int32(np.arange(time) < lengths[:, None]).reshape(micro, rows, time)
    batch = {
        "tokens": np.int32(rng.integers(2, 24, segments.shape)),
        "positions": np.broadcast_to(np.arange(time, dtype=np.int32), segments.shape),
        "segments": segments,
        "weight": np.float32(segments) / segments.sum(),
        "used": np.int32(micro),
    }
    trainer = Trainer(CONFIG, jnp.float32, mesh, OptimizerConfig(learning_rate=1e-2), unroll=unroll)
    with jax.default_matmul_precision("highest"):
        state, metrics = trainer.update(trainer.init(params()), trainer.place(batch))
    moments = next(
        x.mu for x in jax.tree.leaves(state.optimizer, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu")
    )
    return jax.tree.map(np.asarray, (metrics, moments))


def assert_close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def on_gpu(monkeypatch=None):
    (monkeypatch.setattr if monkeypatch else setattr)(model, "platform_of", lambda _: "gpu")


@pytest.mark.parametrize("unroll, micro", [(False, 1), (True, 2)])
def test_an_update_is_the_plain_one(unroll, micro, monkeypatch):
    calls = []
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    monkeypatch.setattr(model, "platform_of", lambda _: "cpu")
    expected = updated(mesh, unroll, micro)
    monkeypatch.setattr(gpu, "norm_backward", lambda *a, **k: calls.append(1) or norm_backward(*a, **k))
    on_gpu(monkeypatch)
    assert_close(updated(mesh, unroll, micro), expected)
    assert calls


def test_the_program_for_gpus(monkeypatch):
    """Made without one, but not compiled: a model's gradient in bfloat16."""
    monkeypatch.setattr(gpu, "norm_backward", norm_backward.func)
    on_gpu(monkeypatch)
    graph, weights = nnx.split(nnx.eval_shape(lambda: Qwen2(CONFIG, nnx.Rngs(0), jnp.bfloat16)), nnx.Param)
    rows = jax.ShapeDtypeStruct((2, 64), jnp.int32)

    def value(weights, *rows):
        return nnx.merge(graph, weights)(*rows).astype(jnp.float32).sum()

    h100 = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=h100)):
        program = jax.jit(jax.grad(value)).trace(weights, rows, rows, rows).lower(lowering_platforms=("cuda",))
    assert "norm_backward" in program.as_text()


MESHES = ({"data": 4}, 2), ({"data": 2, "fsdp": 2}, 1), ({"data": 2, "tensor": 2}, 1)  # micro-batches


def test_several_devices():
    """Simulated ones, in another process: each has its own rows, and weights are whole or split."""
    run_on_four_devices(__file__)


if __name__ == "__main__":
    assert jax.device_count() == 4
    single = make_mesh(MeshConfig(), jax.devices()[:1])
    plain = {micro: updated(single, True, micro) for micro in (1, 2)}
    shapes = set()

    def read(x, *arguments, **options):
        shapes.add(x.shape)
        return norm_backward(x, *arguments, **options)

    gpu.norm_backward = read
    on_gpu()
    for axes, micro in MESHES:
        assert_close(updated(make_mesh(MeshConfig(**axes)), True, micro), plain[micro])
    assert {int(np.prod(x[:-1])) for x in shapes} == {12, 24}, "two rows of eight and one of four, on each device"
