"""The loss's kernel for GPUs against plain arithmetic: on a GPU as it runs there, elsewhere step by step."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec, use_abstract_mesh
from training_helpers import run_on_four_devices

from rlvd_jax.config import MeshConfig
from rlvd_jax.qwen2.mesh import make_mesh
from rlvd_jax.training import gpu, loss
from rlvd_jax.training.loss import Objective, loss_of_hidden, token_logprobs

INTERPRET = jax.default_backend() != "gpu"
BLOCK = gpu.LANES * gpu.AT_ONCE
OBJECTIVES = [None, Objective(kl=0.1, entropy=0.2), Objective(ratio="sequence", entropy=0.2)]


def normal(*shape, seed=0):
    return np.float32(np.random.RandomState(seed).standard_normal(shape))


def exactly(scores, target, temperature):
    """What `gpu.softmax_statistics` should return, in float64."""
    z = np.float64(scores) / temperature
    most = z.max(axis=-1, keepdims=True)
    total = np.exp(z - most).sum(axis=-1, keepdims=True)
    logp = z - most - np.log(total)
    chosen = np.take_along_axis(z, target[..., None], axis=-1)[..., 0]
    return (most + np.log(total))[..., 0], chosen, -(np.exp(logp) * logp).sum(axis=-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("vocab", [7, 2 * BLOCK, 2 * BLOCK + 901])
def test_statistics(vocab, temperature):
    """Vocabularies below a load, of whole blocks and not; targets in the first place, the last, and between."""
    scores = 3 * normal(2, 3, vocab)
    scores[0, 1] = np.sort(scores[0, 1])  # the maximum moves with every block
    scores[0, 2] = np.sort(scores[0, 2])[::-1]
    scores[1, 0] = -2.5  # all equal
    scores[1, 1, ::2] = -1e30  # as padding
    scores[1, 2] += 1e4
    target = np.int32([[0, vocab - 1, vocab // 2], [vocab - 1, 3, vocab - 2]])
    read = jax.jit(partial(gpu.softmax_statistics, temperature=temperature, interpret=INTERPRET))
    for ours, theirs in zip(read(scores, target), exactly(scores, target, temperature), strict=True):
        assert ours.shape == target.shape and ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, rtol=3e-6, atol=1e-5)


def test_large_scores():
    """A row that is nearly one-hot, at both ends; scores of 1e4 either way; nothing but padding."""
    vocab = BLOCK + 901
    scores = 1e4 * normal(1, 5, vocab)
    scores[0, 1:3] = 1e-3 * scores[0, 1:3]
    scores[0, 1, 0] = scores[0, 2, -1] = 1e4
    scores[0, 3] -= 1e6
    scores[0, 4] = -1e30
    target = np.full((1, 5), vocab - 1, np.int32)
    ours = gpu.softmax_statistics(scores, target, 1.0, interpret=INTERPRET)
    for mine, theirs in zip(ours, exactly(scores, target, 1.0), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=3e-6, atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_a_number_shows(value):
    """So that training that broke down stops (`step.check_finite`)."""
    scores = normal(1, 2, 2 * BLOCK)
    scores[0, 1, BLOCK + 5] = value
    ours = gpu.softmax_statistics(scores, np.zeros((1, 2), np.int32), 1.0, interpret=INTERPRET)
    for x in (ours[0], ours[2]):
        assert np.isfinite(x).tolist() == [[True, False]]


def batch_of(rows=4, time=11, width=5, vocab=13):
    rng = np.random.default_rng(3)
    hidden, table = np.float32(rng.normal(size=(rows, time, width))), np.float32(rng.normal(size=(vocab, width)))
    near = np.float32(rng.normal(-2.5, 0.5, (3, rows, time)))
    batch = {
        "tokens": np.int32(rng.integers(0, vocab, (rows, time))),
        "segments": np.ones((rows, time), np.int32),
        "weight": np.float32(rng.random((rows, time)) < 0.8) / 10,
        "advantage": np.float32(rng.normal(size=(rows, time))),
    }
    return hidden, table, batch | dict(zip(("old", "reference", "logp"), near, strict=True))


def everything(objective, mesh=None, logits=80):
    """Loss, sums and gradients, then the loss, log-probabilities and entropies without a gradient, in a few chunks."""
    hidden, table, batch = batch_of()
    options = {"temperature": 0.7, "mesh": mesh, "logits": logits}

    def both(hidden, table):
        of = jax.value_and_grad(partial(loss_of_hidden, **options), argnums=(0, 1), has_aux=True)
        alone = loss_of_hidden(hidden, table, batch, objective, **options)
        return of(hidden, table, batch, objective), alone, token_logprobs(hidden, table, batch["tokens"], **options)

    with jax.default_matmul_precision("highest"):  # GPUs round float32 factors otherwise, each shape its own way
        return jax.tree.map(np.asarray, jax.jit(both)(hidden, table))


def assert_close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("on_mesh", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_the_plain_one(objective, on_mesh, monkeypatch):
    """With its sums and gradients; on a mesh, of one device here, as training has it."""
    calls = []

    def by_kernel(*arguments):
        calls.append(arguments)
        return loss._by_kernel(*arguments, interpret=INTERPRET)

    monkeypatch.setattr(loss, "_statistics", lambda *arguments: loss._plain(*arguments[:3]))
    expected = everything(objective)
    monkeypatch.setattr(loss, "_statistics", by_kernel)
    assert_close(everything(objective, make_mesh(MeshConfig(), jax.devices()[:1]) if on_mesh else None), expected)
    assert len(calls) == 3


def test_where_the_kernel_runs(monkeypatch):
    """On GPUs, unless the vocabulary may be split."""
    monkeypatch.setattr(loss, "_by_kernel", lambda *_: "kernel")
    monkeypatch.setattr(loss, "_plain", lambda *_: "plain")

    def chosen(platform, **axes):
        monkeypatch.setattr(loss, "platform_of", lambda _: platform)
        mesh = SimpleNamespace(shape={"data": 1, "fsdp": 1, "tensor": 1} | axes) if axes else None
        return loss._statistics(None, None, 1.0, mesh)

    assert chosen("gpu") == chosen("gpu", data=2, fsdp=2) == "kernel"
    assert chosen("gpu", tensor=2) == chosen("cpu") == chosen("cpu", data=2) == chosen("tpu", data=2) == "plain"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_program_for_gpus(objective, monkeypatch):
    """Made without one, but not compiled: the loss over Qwen2.5's vocabulary with its gradient."""
    monkeypatch.setattr(loss, "platform_of", lambda _: "gpu")
    h100 = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    hidden, table = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((8, 217, 64), (151936, 64)))
    batch = {name: jax.ShapeDtypeStruct((8, 217), x.dtype) for name, x in batch_of()[2].items()}

    def value(hidden, table, batch):
        return loss_of_hidden(hidden, table, batch, objective)[0]

    with use_abstract_mesh(AbstractMesh((), (), abstract_device=h100)):
        traced = jax.jit(jax.grad(value, argnums=(0, 1))).trace(hidden, table, batch)
        program = traced.lower(lowering_platforms=("cuda",))
    assert "softmax_statistics" in program.as_text()


def on_meshes(devices: int):
    """(objective, everything) by the kernel on meshes of so many devices, and on one where the vocabulary may be split,
    in the plain form."""
    meshes = {"data": devices}, {"data": devices // 2, "fsdp": 2}, {"data": devices // 2, "tensor": 2}
    for axes, objective in zip(meshes, OBJECTIVES, strict=True):
        yield objective, everything(objective, make_mesh(MeshConfig(**axes), jax.devices()[:devices]))


def by_rows(objective, devices: int):
    """Loss and gradient of the table, each device with its own rows, as training has it where weights are whole."""
    hidden, table, batch = batch_of()
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    of = partial(loss_of_hidden, objective=objective, temperature=0.7, mesh=mesh, logits=80)

    def on_each(hidden, table, batch):
        return jax.lax.psum(jax.value_and_grad(lambda t: of(hidden, t, batch)[0])(table), "data")

    rows, whole = PartitionSpec("data"), PartitionSpec()
    with jax.default_matmul_precision("highest"):
        on_all = jax.shard_map(on_each, mesh=mesh, in_specs=(rows, whole, rows), out_specs=whole, check_vma=False)
        return jax.jit(on_all)(hidden, table, batch)


@pytest.mark.skipif(INTERPRET or jax.device_count() < 2, reason="there are not several GPUs")
def test_several_gpus():
    for objective, ours in on_meshes(2):
        assert_close(ours, everything(objective))
        (value, _), (_, to_table) = everything(objective)[0]
        assert_close(by_rows(objective, 2), (value, to_table))


def test_several_devices():
    """Simulated ones, in another process: each reads its own rows."""
    run_on_four_devices(__file__)


if __name__ == "__main__":
    assert jax.device_count() == 4
    plain = {objective: everything(objective) for objective in OBJECTIVES}
    shapes, kernel = set(), gpu.softmax_statistics

    def read(scores, *arguments, **options):
        shapes.add(scores.shape)
        return kernel(scores, *arguments, **options | {"interpret": True})

    gpu.softmax_statistics, loss.platform_of = read, lambda _: "gpu"
    for objective, ours in on_meshes(4):
        assert_close(ours, plain[objective])
        (value, _), (_, to_table) = plain[objective][0]
        assert_close(by_rows(objective, 4), (value, to_table))
    assert shapes == {(1, 5, 13)}, "one row of four, in two chunks"
