"""The keys and values of responses in flight: how they lie in memory, are written and are attended to.

Two layouts, chosen once for a sampler. `fused` is what cuDNN's attention reads, [slots, positions, kv_heads,
head_dim], and only the filled part of it is read. `plain` is for everything else: keys as [slots, kv_heads,
head_dim, positions] and values as [slots, kv_heads, positions, head_dim], so that both matrix products run on the
cache as it lies; transposing copies of the cache would cost more than the attention.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from rlvd_jax.qwen2.config import Qwen2Config

Layout = Literal["fused", "plain"]


def choose_layout(c: Qwen2Config, dtype, platform: str) -> Layout:
    """The layout for a model on a platform: cuDNN's kernel takes bfloat16 heads of 64 or 128."""
    return "fused" if platform == "gpu" and dtype == jnp.bfloat16 and c.head_dim in (64, 128) else "plain"


def empty(c: Qwen2Config, layout: Layout, slots: int, length: int, dtype) -> list:
    """Room for `slots` responses of `length` positions: keys and values of each layer."""
    heads, dim = c.num_key_value_heads, c.head_dim
    if layout == "fused":
        shapes = ((slots, length, heads, dim),) * 2
    else:
        shapes = (slots, heads, dim, length), (slots, heads, length, dim)
    return [tuple(jnp.zeros(shape, dtype) for shape in shapes) for _ in range(c.num_hidden_layers)]


def insert(layer, prompt_layer, layout: Layout, slot, prompt):
    """Copy prompts into slots. prompt_layer: keys and values [prompts, time, kv_heads, head_dim]; slot, prompt:
    [inserts]; a slot out of range is left out."""
    k, v = (new[prompt].astype(old.dtype) for new, old in zip(prompt_layer, layer, strict=True))
    time = k.shape[1]
    keys, values = layer
    if layout == "fused":
        return keys.at[slot, :time].set(k, mode="drop"), values.at[slot, :time].set(v, mode="drop")
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    return keys.at[slot, :, :, :time].set(k, mode="drop"), values.at[slot, :, :time].set(v, mode="drop")


def append(layer, layout: Layout, positions, k, v):
    """Write one position of every slot. positions: [slots]; k, v: [slots, kv_heads, head_dim]."""
    keys, values = layer
    slot = jnp.arange(positions.shape[0])
    k, v = k.astype(keys.dtype), v.astype(values.dtype)
    how = {"unique_indices": True, "mode": "promise_in_bounds"}
    if layout == "fused":
        return keys.at[slot, positions].set(k, **how), values.at[slot, positions].set(v, **how)
    return keys.at[slot, :, :, positions].set(k, **how), values.at[slot, :, positions].set(v, **how)


def attend(q, layer, layout: Layout, lengths, span: int):
    """One query a slot against its cache. q: [slots, heads, head_dim]; lengths: [slots] filled positions; span: none
    is filled at or beyond it (static; only `plain` reads by it). → [slots, heads, head_dim]."""
    keys, values = layer
    slots, heads, dim = q.shape
    if layout == "fused":
        out = jax.nn.dot_product_attention(
            q[:, None],
            keys,
            values,
            query_seq_lengths=jnp.ones_like(lengths),
            key_value_seq_lengths=lengths,
            implementation="cudnn",
        )
        return out[:, 0]
    keys, values = keys[..., :span], values[:, :, :span]
    q = q.reshape(slots, keys.shape[1], -1, dim)
    scores = jnp.einsum("bkgd,bkds->bkgs", q, keys, preferred_element_type=jnp.float32) * dim**-0.5
    filled = jnp.arange(span) < lengths[:, None]  # [slots, span]
    weights = jax.nn.softmax(jnp.where(filled[:, None, None], scores, -1e30), axis=-1)
    return jnp.einsum("bkgs,bksd->bkgd", weights.astype(values.dtype), values).reshape(slots, heads, dim)
