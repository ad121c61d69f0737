"""The arithmetic that the training forward pass and the sampler share, as plain functions on arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rms_norm(x, weight, eps):
    """x / rms(x) * weight over the last axis, in float32; the result has x's dtype."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * scale * weight.astype(jnp.float32)).astype(x.dtype)


def rope_table(positions, head_dim, theta):
    """cos and sin of the rotary angles, each positions.shape + [head_dim / 2], float32."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x, table):
    """Rotary position embedding; x: [..., heads, head_dim], table: cos, sin of [..., head_dim / 2].

    The two halves of the head are the pairs' two coordinates, as in the published checkpoints.
    """
    cos, sin = (t[..., None, :] for t in table)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def heads(x, norm, weights, biases, rope, eps):
    """Queries, keys and values of rms_norm(x, norm), the first two rotated.

    x: [..., hidden]; weights: three matrices [hidden, heads · head_dim]; biases: their vectors; rope: see `rotate`. →
    three times [..., heads, head_dim]
    """
    h = rms_norm(x, norm, eps)

    def project(w, bias):
        projected = h @ w + bias.astype(h.dtype)
        return projected.reshape(*h.shape[:-1], -1, 2 * rope[0].shape[-1])

    q, k, v = map(project, weights, biases)
    return rotate(q, rope), rotate(k, rope), v


def wide(x, norm, gate, up, eps):
    """The MLP's two wide products of rms_norm(x, norm). x: [..., hidden]; gate, up: [hidden, mlp]"""
    h = rms_norm(x, norm, eps)
    return h @ gate, h @ up


def swiglu(gate, up):
    """silu(gate) * up; the sigmoid in float32."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)
