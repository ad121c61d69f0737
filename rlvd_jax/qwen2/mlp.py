"""The MLP of a layer, for training: on Hopper GPUs both wide products and their activation are one kernel."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from rlvd_jax.qwen2 import hopper
from rlvd_jax.qwen2.attention import alone, platform_of
from rlvd_jax.qwen2.layers import swiglu

WIDE = "wide"  # the two wide products, which the backward pass need not compute again (`model.keeping`)


def mlp(h, gate, up, down, mesh: Mesh | None = None):
    """swiglu(h @ gate, h @ up) @ down. h: [batch, time, hidden]; gate, up: [hidden, f]; down: [f, hidden], all of one
    dtype; mesh: as for `attention.attend` → [batch, time, hidden]."""
    shards = (1, 1) if alone(mesh) else (mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"])
    rows, f = h.shape[0] * h.shape[1] // shards[0], gate.shape[1] // shards[1]
    # The mesh may be of devices that are not here.
    kernel = platform_of(mesh) == "gpu" and hopper.here() and h.dtype == jnp.bfloat16
    if kernel and f * shards[1] == gate.shape[1] and hopper.takes(rows, h.shape[2], f):
        return _in_one(h, gate, up, down, mesh)
    wide = (checkpoint_name(h @ w, WIDE) for w in (gate, up))
    return swiglu(*wide) @ down


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _in_one(h, gate, up, down, mesh):
    return _forward(h, gate, up, down, mesh)[0]


def _forward(h, gate, up, down, mesh):
    def kernel(h, gate, up):
        wide = hopper.gate_and_up(h.reshape(-1, h.shape[-1]), gate, up)
        return tuple(x.reshape(*h.shape[:-1], -1) for x in wide)

    if not alone(mesh):
        rows = PartitionSpec(("data", "fsdp"))  # as mesh.py splits them
        columns, out = PartitionSpec(None, "tensor"), PartitionSpec(*rows, None, "tensor")
        specs = {"in_specs": (rows, columns, columns), "out_specs": (out,) * 3}
        kernel = jax.shard_map(kernel, mesh=mesh, check_vma=False, **specs)
    *wide, active = kernel(h, gate, up)
    wide = [checkpoint_name(x, WIDE) for x in wide]
    return active @ down, (h, gate, up, down, *wide)


def _backward(mesh, kept, cotangent):
    """What JAX would make of it, with the activation computed again from the products."""
    h, gate, up, down, *wide = kept
    *to_wide, to_down = jax.vjp(lambda *x: swiglu(*x[:2]) @ x[2], *wide, down)[1](cotangent)
    return *jax.vjp(lambda h, gate, up: (h @ gate, h @ up), h, gate, up)[1](tuple(to_wide)), to_down


_in_one.defvjp(_forward, _backward)
