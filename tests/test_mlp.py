import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # public from jax 0.11 on

from rlvd_jax.qwen2 import hopper, mlp
from rlvd_jax.qwen2.layers import swiglu


@pytest.fixture
def as_on_hopper(monkeypatch):
    """As a Hopper GPU would do it; elsewhere step by step."""
    if not hopper.here():
        monkeypatch.setattr(hopper, "multiply", functools.partial(hopper.multiply, interpret=InterpretGPUParams()))
        monkeypatch.setattr(hopper, "cores", lambda: 3)
        monkeypatch.setattr(hopper, "here", lambda: True)
        monkeypatch.setattr(mlp, "platform_of", lambda mesh: "gpu")


def plain(h, gate, up, down):
    return swiglu(h @ gate, h @ up) @ down


def test_value_and_gradient_of_the_kernel(as_on_hopper):
    """What it says of itself is what JAX finds for the plain form."""
    shapes = (2, 64, 128), (128, 192), (128, 192), (192, 128)
    x = [jax.random.normal(jax.random.key(i), s, jnp.bfloat16) * (0.1 if i else 1) for i, s in enumerate(shapes)]
    cotangent = jax.random.normal(jax.random.key(9), shapes[0], jnp.bfloat16)
    taken = []
    inner = mlp.hopper.gate_and_up
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlp.hopper, "gate_and_up", lambda *x: taken.append(1) or inner(*x))
        ours, pull = jax.vjp(mlp.mlp, *x)
    assert taken == [1]
    theirs, pull_plain = jax.vjp(plain, *x)
    for a, b in zip((ours, *pull(cotangent)), (theirs, *pull_plain(cotangent)), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = np.float32(a), np.float32(b)
        assert np.linalg.norm(a - b) < 0.01 * np.linalg.norm(b)


def test_what_it_leaves_to_the_library(monkeypatch):
    """Few rows, other dtypes, sizes that are not whole blocks, and what is not a GPU."""
    monkeypatch.setattr(hopper, "here", lambda: True)
    monkeypatch.setattr(hopper, "gate_and_up", lambda *_: pytest.fail("by the kernel"))

    def run(platform, rows, hidden, f, dtype):
        monkeypatch.setattr(mlp, "platform_of", lambda mesh: platform)
        x = [jnp.ones(s, dtype) for s in ((1, rows, hidden), (hidden, f), (hidden, f), (f, hidden))]
        np.testing.assert_allclose(np.float32(mlp.mlp(*x)), np.float32(plain(*x)))

    run("cpu", 128, 64, 64, jnp.bfloat16)
    run("gpu", 128, 64, 64, jnp.float32)
    run("gpu", 64, 64, 64, jnp.bfloat16)
    run("gpu", 128, 64, 96, jnp.bfloat16)
    run("gpu", 128, 96, 64, jnp.bfloat16)
