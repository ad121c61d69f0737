"""What goes into a layer's two blocks, in training on NVIDIA GPUs: as in layers.py, with a backward pass by hand around
one kernel, in Pallas (Triton).

Left to itself XLA reads the residual stream and its cotangent twice for a norm's gradients, makes the norm again in a
pass of its own, and writes a cotangent of the norm for each product.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import Mesh, PartitionSpec

from rlvd_jax.qwen2 import layers
from rlvd_jax.qwen2.attention import BATCH, alone

ROWS = 32  # of a program, one after the other
WARPS = 8  # of a program; four of them run on a multiprocessor at once


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def heads(x, norm, weights, biases, rope, eps: float, mesh: Mesh | None):
    """x, and the queries, keys and values of `layers.heads`. x goes through, so that what flows back past the norm is
    added where the norm's own gradient is."""
    return x, *layers.heads(x, norm, weights, biases, rope, eps)


def _heads_forward(x, norm, weights, biases, rope, eps, mesh):
    return heads(x, norm, weights, biases, rope, eps, mesh), (x, norm, weights, biases, rope)


def _heads_backward(eps, mesh, kept, cotangents):
    x, norm, weights, biases, rope = kept
    to_x, to_q, to_k, to_v = cotangents
    # Of the three products side by side, in one pass: [..., heads + 2 · kv_heads, head_dim].
    to_each = jnp.concatenate([_rotate_back(to_q, rope), _rotate_back(to_k, rope), to_v], axis=-2)
    to_each = to_each.reshape(*x.shape[:-1], -1)
    to_h = to_each @ jnp.concatenate(weights, axis=1).T
    h, to_x, to_norm = _through_norm(x, norm, to_h, to_x, eps, mesh)
    ends = [weights[0].shape[1], weights[0].shape[1] + weights[1].shape[1]]
    to_weights = jnp.split(_product(h, to_each), ends, axis=1)
    to_biases = jnp.split(jnp.sum(to_each.reshape(-1, to_each.shape[-1]), axis=0, dtype=jnp.float32), ends)
    to_biases = (to.astype(b.dtype) for to, b in zip(to_biases, biases, strict=True))
    return to_x, to_norm, tuple(to_weights), tuple(to_biases), None


heads.defvjp(_heads_forward, _heads_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def wide(x, norm, gate, up, eps: float, mesh: Mesh | None):
    """x, which goes through as in `heads`, and the two products of `layers.wide`."""
    return x, *layers.wide(x, norm, gate, up, eps)


def _wide_forward(x, norm, gate, up, eps, mesh):
    return wide(x, norm, gate, up, eps, mesh), (x, norm, gate, up)


def _wide_backward(eps, mesh, kept, cotangents):
    x, norm, gate, up = kept
    to_x, to_gate, to_up = cotangents
    to_h = to_gate @ gate.T + to_up @ up.T
    h, to_x, to_norm = _through_norm(x, norm, to_h, to_x, eps, mesh)
    return to_x, to_norm, _product(h, to_gate), _product(h, to_up)


wide.defvjp(_wide_forward, _wide_backward)


def _rotate_back(x, rope):
    """The transpose of `layers.rotate`, without a concatenation, which would not become part of its reader."""
    cos, sin = (t[..., None, None, :] for t in rope)
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    sign = jnp.array([[1.0], [-1.0]])
    return (halves * cos + halves[..., ::-1, :] * sin * sign).reshape(x.shape).astype(x.dtype)


def _product(h, to):
    """The gradient of w in h @ w. h: [..., k]; to: [..., n] → [k, n]."""
    return h.reshape(-1, h.shape[-1]).T @ to.reshape(-1, to.shape[-1])


def _through_norm(x, norm, to_h, to_x, eps: float, mesh: Mesh | None):
    """`norm_backward` on each device of its own rows, its parts added: the compiler cannot split a kernel by itself."""
    kernel = partial(norm_backward, eps=eps)
    if not alone(mesh):
        specs = BATCH, PartitionSpec(), BATCH, BATCH
        kernel = jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=BATCH, check_vma=False)
    h, to_x, to_norm = kernel(x, norm, to_h, to_x)
    return h, to_x, to_norm.sum(axis=0).astype(norm.dtype)


def norm_backward(x, weight, to_h, to_x, *, eps: float, interpret: bool = False):
    """All that flows back through h = rms_norm(x, weight), and h itself, in one pass; float32 within.

    x, to_h, to_x: [..., hidden], the latter two the cotangents of h and, where it is used besides, of x; weight:
    [hidden]. → (h and the cotangent of x, like x; parts of weight's cotangent, float32 [programs, hidden], to be added)
    """
    *lead, hidden = x.shape
    rows = math.prod(lead)
    programs = pl.cdiv(rows, ROWS)
    flat = jax.ShapeDtypeStruct((rows, hidden), x.dtype)
    h, to_x, to_weight = pl.pallas_call(
        partial(_norm_backward_kernel, rows=rows, hidden=hidden, eps=eps),
        grid=(programs,),
        out_shape=[flat, flat, jax.ShapeDtypeStruct((programs, hidden), jnp.float32)],
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name="norm_backward",
    )(x.reshape(flat.shape), weight, to_h.reshape(flat.shape), to_x.reshape(flat.shape))
    return h.reshape(x.shape), to_x.reshape(x.shape), to_weight


def _norm_backward_kernel(x_ref, weight_ref, to_h_ref, pass_ref, h_ref, to_x_ref, to_weight_ref, *, rows, hidden, eps):
    column = jnp.arange(pl.next_power_of_2(hidden))
    inside = column < hidden
    first = pl.program_id(0) * ROWS
    weight = plgpu.load(weight_ref.at[column], mask=inside, other=0.0).astype(jnp.float32)

    def body(i, to_weight):
        row = first + i
        there = inside & (row < rows)
        x, to_h, to_x = (
            plgpu.load(ref.at[row, column], mask=there, other=0.0).astype(jnp.float32)
            for ref in (x_ref, to_h_ref, pass_ref)
        )
        to_normed = to_h * weight
        squares, both = jnp.sum(x * x), jnp.sum(x * to_normed)
        scale = jax.lax.rsqrt(squares / hidden + eps)
        normed = x * scale
        to_x += scale * (to_normed - normed * (scale * both / hidden))
        plgpu.store(h_ref.at[row, column], (normed * weight).astype(h_ref.dtype), mask=there)
        plgpu.store(to_x_ref.at[row, column], to_x.astype(to_x_ref.dtype), mask=there)
        return to_weight + to_h * normed

    to_weight = jax.lax.fori_loop(0, ROWS, body, jnp.zeros(column.shape, jnp.float32))
    plgpu.store(to_weight_ref.at[pl.program_id(0), column], to_weight, mask=inside)
