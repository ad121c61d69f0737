"""The keys and values of responses in flight: how they lie in memory, are written and are attended to.

Two ways to lay them out, chosen once for a sampler.

`plain`, for CPUs and whatever the kernels don't take: each slot has room for a longest response; keys as [slots,
kv_heads, head_dim, positions] and values as [slots, kv_heads, positions, head_dim], so that both matrix products run on
the cache as it lies.

`paged`: a table says which page holds which positions of a slot. A response takes pages as it grows, the whole pages of
a prompt are shared by its samples, and only what is filled is read. For GPUs (gpu.py) keys, and values, are [kv_heads,
pages, page_size, head_dim]; for TPUs (tpu.py) a page holds all that belongs to its positions: [pages, ...].
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from rlvd_jax.qwen2.config import Qwen2Config
from rlvd_jax.qwen2.layers import rotate
from rlvd_jax.sampling import gpu, tpu
from rlvd_jax.sampling.rows import Rows

Layout = Literal["plain", "gpu", "tpu", "interpret"]
"""`plain`, or whose kernel attends to pages; `interpret` is the GPU's, step by step on any device, for tests."""


class Place(NamedTuple):
    """Where the newest token of each slot goes, or the first of several."""

    position: jax.Array  # [slots] int32
    live: jax.Array  # [slots] bool: what the others write is lost
    table: jax.Array  # [slots, pages of a slot] int32; `plain`: not used
    span: int  # `plain`: no position at or beyond it is filled
    cores: int = 1  # of a TPU's chip, which work as one device
    used: jax.Array | None = None  # [] int32: so many rows come first, and nothing need be found for the others
    rows: Rows | None = None  # of several new tokens of a slot, for kernels only; else one of each
    items: list[tuple[int, tpu.Plan]] | None = None  # of a TPU's kernel, see `planned`


def planned(place: Place, layout: Layout, layers) -> Place:
    """With what the kernel needs to know of all slots, which is the same in each layer of the cache."""
    if layout != "tpu":
        return place
    position, shape = jnp.where(place.live, place.position, -1), layers[0][0].shape
    if place.rows is None:
        return place._replace(items=tpu.plan(position, place.table, shape, place.cores))
    return place._replace(items=tpu.plan_several(position, place.table, place.rows, shape, place.cores))


def choose_layout(c: Qwen2Config, dtype, platform: str) -> Layout:
    """The layout for a model on a platform: the kernels take bfloat16, the GPU's heads of 64 or 128."""
    if dtype == jnp.bfloat16 and platform == "tpu":
        return "tpu"
    few = c.num_attention_heads <= gpu.QUERIES * c.num_key_value_heads
    return "gpu" if dtype == jnp.bfloat16 and platform == "gpu" and c.head_dim in (64, 128) and few else "plain"


def page_size(layout: Layout) -> int:
    """Positions of a page. Small ones share more of a prompt and waste less at a response's end; kernels like large."""
    return {"gpu": 32, "tpu": 64, "interpret": 8}[layout]


def pages_of(positions: int, layout: Layout) -> int:
    """Pages that a slot's row of the table has for so many positions: the TPU's kernel takes several at once."""
    pages = -(-positions // page_size(layout))
    return -(-pages // tpu.PAGES) * tpu.PAGES if layout == "tpu" else pages


def position_bytes(c: Qwen2Config, layout: Layout, itemsize: int) -> int:
    """Bytes that one position of one response takes in all layers."""
    if layout == "tpu":
        return itemsize * c.num_hidden_layers * math.prod(tpu.page_shape(c.num_key_value_heads, 1, c.head_dim))
    return c.cache_bytes(itemsize)


def shapes(c: Qwen2Config, layout: Layout, kv_heads: int, slots: int, room: int):
    """Shapes of a layer's arrays: keys and values, or a TPU's pages. room: positions of a slot (`plain`), or pages."""
    if layout == "tpu":
        return ((room, *tpu.page_shape(kv_heads, page_size(layout), c.head_dim)),)
    if layout != "plain":
        return ((kv_heads, room, page_size(layout), c.head_dim),) * 2
    return (slots, kv_heads, c.head_dim, room), (slots, kv_heads, room, c.head_dim)


def insert(layer, layout: Layout, prompt_layer, source, to):
    """Copy prompts into the cache. prompt_layer: keys and values [prompts, time, kv_heads, head_dim]; source, to:
    [copies]. `plain`: the prompt, and the slot; `paged`: the page among those of all prompts end to end, and in the
    pool. One out of range there is left out."""
    if layout == "plain":
        k, v = (new[source].astype(old.dtype) for new, old in zip(prompt_layer, layer, strict=True))
        time = k.shape[1]
        keys, values = layer
        k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
        return keys.at[to, :, :, :time].set(k, mode="drop"), values.at[to, :, :time].set(v, mode="drop")

    def pages(new):  # [prompts, time, kv_heads, head_dim] → [copies, page_size, kv_heads, head_dim]
        return new.reshape(-1, page_size(layout), *new.shape[2:])[source]

    if layout == "tpu":
        (pool,) = layer
        new = tpu.pages(*(pages(x).swapaxes(1, 2).astype(pool.dtype) for x in prompt_layer))
        return (pool.at[to].set(new, mode="drop"),)

    def put(old, new):
        return old.at[:, to].set(pages(new).transpose(2, 0, 1, 3).astype(old.dtype), mode="drop")

    return tuple(put(old, new) for old, new in zip(layer, prompt_layer, strict=True))


def attend(layer, layout: Layout, qkv, bias, rope, heads: int, place: Place):
    """Write the newest keys and values of each slot, and attend to all there is up to each.

    qkv: [rows, (heads + 2 kv_heads) * head_dim], without bias and rotation; bias: of its columns; rope: of the rows'
    positions. → (the layer's cache, [rows, heads * head_dim]). For the GPU's kernel qkv has a leading axis of parts,
    see `gpu.product`.
    """
    position = jnp.where(place.live, place.position, -1)
    if layout == "tpu":
        if place.rows is None:
            out, pool = tpu.attend(qkv, bias, rope, place.items, *layer, heads, place.cores)
        else:
            where = place.rows, position, place.table, place.items
            out, pool = tpu.attend_several(qkv, bias, rope, *where, *layer, heads, place.cores)
        return (pool,), out
    keys, values = layer
    if layout in ("gpu", "interpret"):
        how = {"heads": heads, "interpret": layout == "interpret"}
        out, *layer = gpu.attend(qkv, bias, rope, position, place.table, keys, values, place.rows, **how)
        return tuple(layer), out
    slots = qkv.shape[0]
    qkv = (qkv + bias).reshape(slots, -1, 2 * rope[0].shape[-1])
    q, k, v = jnp.split(qkv, [heads, (heads + qkv.shape[1]) // 2], axis=1)
    q, k, v = rotate(q, rope), rotate(k, rope).astype(keys.dtype), v.astype(values.dtype)
    slot = jnp.arange(slots)
    how = {"unique_indices": True, "mode": "promise_in_bounds"}
    keys = keys.at[slot, :, :, place.position].set(k, **how)
    values = values.at[slot, :, place.position].set(v, **how)
    return (keys, values), _attend_plain(q, keys[..., : place.span], values[:, :, : place.span], place.position + 1)


def _attend_plain(q, keys, values, lengths):
    slots, heads, dim = q.shape
    q = q.reshape(slots, keys.shape[1], -1, dim)
    scores = jnp.einsum("bkgd,bkds->bkgs", q, keys, preferred_element_type=jnp.float32) * dim**-0.5
    filled = jnp.arange(keys.shape[-1]) < lengths[:, None]  # [slots, span]
    weights = jax.nn.softmax(jnp.where(filled[:, None, None], scores, -1e30), axis=-1)
    return jnp.einsum("bkgs,bksd->bkgd", weights.astype(values.dtype), values).reshape(slots, heads * dim)
