"""The kernel for TPUs against the plain form, in interpret mode on the CPU; tests/test_tpu.py compiles it for TPUs."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlvd_jax.config import MeshConfig
from rlvd_jax.qwen2 import attention
from rlvd_jax.qwen2.mesh import make_mesh

interpreted = partial(attention.splash, interpret=True)


def inputs(time, heads, kv_heads, head_dim, rows=1, dtype="float32"):
    """q, k, v, the gradient of the output, and segments: several in each row, then padding."""
    draw = np.random.RandomState(0)
    shapes = [(heads, head_dim), (kv_heads, head_dim), (kv_heads, head_dim), (heads, head_dim)]
    arrays = [jnp.asarray(draw.standard_normal((rows, time, *shape)), dtype) for shape in shapes]
    segments = np.zeros((rows, time), np.int32)
    for row in segments:
        ends = np.sort(draw.choice(np.arange(1, time - 20), 3, replace=False))
        for segment, (start, end) in enumerate(zip([0, *ends], [*ends, time - 20], strict=True), 1):
            row[start:end] = segment
    return *arrays, segments


def value_and_gradients(function, q, k, v, g, segments):
    """Of the tokens that are not padding, in float32."""
    real = (segments > 0)[..., None, None]

    @jax.jit
    def both(q, k, v):
        out, backward = jax.vjp(lambda *qkv: jnp.where(real, function(*qkv, segments), 0), q, k, v)
        return out, backward(g)

    return [np.asarray(x, np.float32) for x in jax.tree.leaves(both(q, k, v))]


def plain(q, k, v, segments):
    return attention.plain(q, k, v, attention._mask(segments))


def assert_alike(function, arguments, atol=2e-5):
    for ours, theirs in zip(
        value_and_gradients(function, *arguments), value_and_gradients(plain, *arguments), strict=True
    ):
        assert np.abs(theirs).max() > 0.5
        np.testing.assert_allclose(ours, theirs, atol=atol)


@pytest.mark.parametrize(
    "time, heads, kv_heads, head_dim",
    [
        (256, 4, 2, 128),  # one block
        (600, 2, 1, 64),  # five blocks of 128, and Qwen2.5-0.5B's heads
    ],
)
def test_values_and_gradients(time, heads, kv_heads, head_dim):
    assert_alike(interpreted, inputs(time, heads, kv_heads, head_dim, rows=2))


def test_bfloat16():
    arguments = inputs(128, 2, 1, 128, dtype="bfloat16")
    assert interpreted(*arguments[:3], arguments[4]).dtype == jnp.bfloat16
    assert_alike(interpreted, arguments, atol=0.05)


def test_blocks():
    lengths = {128: 128, 256: 256, 384: 384, 512: 512, 640: 128, 768: 384, 2048: 512, 4000: 512, 4352: 512, 32768: 512}
    assert {time: attention.splash_block(time) for time in lengths} == lengths
    for time in range(128, 5000, 31):
        block = attention.splash_block(time)
        assert block % 128 == 0 and (-time % block <= time // 8 or block == 128)


MESHES = [
    {"data": 1, "fsdp": 2, "tensor": 2},  # two key-value heads, one on each device
    {"tensor": 4},  # ... repeated, since they are fewer than devices
    {"data": 2, "tensor": 3},  # four heads that three devices cannot share
]


def on_meshes():
    """Each mesh's devices do their own part: the same as on one device."""
    arguments = inputs(128, 4, 2, 32, rows=2)
    for axes in MESHES:
        devices = jax.devices()[: np.prod(list(axes.values()))]
        on_mesh = partial(attention.on_each_device, interpreted, mesh=make_mesh(MeshConfig(**axes), devices))
        assert_alike(on_mesh, arguments)


def test_rows_and_heads_are_split_over_the_mesh():
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "6", "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run(
        [sys.executable, str(Path(__file__))], env=environment, capture_output=True, text=True, timeout=300
    )
    assert out.returncode == 0, out.stderr


if __name__ == "__main__":
    assert jax.device_count() == 6
    on_meshes()
