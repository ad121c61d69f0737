"""Kernels of the sampler for NVIDIA GPUs, in Pallas (Triton): products of few rows, attention over a paged cache,
norms, and the draw.

`few_rows` is for the tail of a batch, whose products are bound by reading weights; hopper.py multiplies many rows.
`attend` does in one pass what is six small ones otherwise: it adds the bias, rotates the new query and key, writes key
and value to the response's page, and reads every filled position once. Pages that responses share, those of their
prompt, come from the chip's cache after the first read. `draw` reads the logits once, and of each row once more only
the blocks of 64 tokens that can hold one of the k largest; `draw_hidden` needs only these, once the logits are made.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from rlvd_jax.qwen2.layers import swiglu
from rlvd_jax.sampling import hopper
from rlvd_jax.sampling.rows import Rows, tile_rows

LEAST = -1e30  # below every score, and finite: no difference of two is undefined
QUERIES = 16  # rows of the smallest matrix product that the tensor cores take
PARALLEL = 512  # programs that keep a whole chip busy
MOST_K = 64  # the largest k that `draw` takes: a row's candidates are held in registers
BLOCK = hopper.GROUP  # tokens of the vocabulary that share a maximum
PROGRAMS = 128  # of a product of few rows, at most
LEAST_K = 384  # numbers that each of such a product's parts adds up, at least
STAGED = 96 * 1024  # bytes of shared memory of a program, at most: a multiprocessor has 228 KiB
FEW = 64  # up to so many rows, products are bound by reading the weights, and have a kernel of their own


# ---- matrix products ---------------------------------------------------------------------------------


By = Literal["few", "many", "library"]


def products_by(rows: int, hidden: int, mlp: int, tensor: int) -> By:
    """Which kernels multiply so many rows: `few_rows`, `hopper.dot`, or what XLA takes. Results of `few_rows` come in
    parts, which are not sent to `tensor` devices that sum them."""
    if rows <= FEW:
        return "few" if tensor == 1 else "library"
    return "many" if hopper.here() and hopper.takes(rows, hidden, mlp) else "library"


def product(h, w, used=None, *, by: By = "library", tensor: int = 1, interpret=False):
    """h @ w.T. h: [rows, k]; w: [n, k] → [parts, rows, n], to be added; float32 if there are several. used: [] int32,
    how many rows are needed, by default all: the others may hold anything. by: `products_by`; tensor: devices that add
    up results, which then have one part."""
    if by == "few":
        return few_rows(h, w, interpret=interpret)
    if by == "many":
        return hopper.dot(h, w, used, most_splits=1 if tensor > 1 else hopper.SPLITS)
    return (h @ w.T)[None]


def gated(h, w, used=None, *, by: By = "library", interpret=False):
    """swiglu of h @ w.T, w's rows being first the gate's and then up's. h: [rows, k]; w: [2 f, k] → [rows, f]. used,
    by: as for `product`; the kernels for few and for many rows have the activation in them."""
    if by == "few":
        return few_rows(h, w, gated=True, interpret=interpret)[0]
    if by == "many":
        return hopper.gated_dot(h, w, used)
    return swiglu(*jnp.split(h @ w.T, 2, axis=-1))


def tiling(rows: int, k: int, n: int, gated=False, *, tile=None, block=None, splits=None, num_stages=None) -> dict:
    """How `few_rows` shares out h [rows, k] @ w.T, w [n, k] or [2 n, k], where it is left open: columns of a program,
    how much of k it takes at a time, parts of k, blocks on their way. All programs run at once."""
    tile, block = tile or 64, block or 64
    blocks = pl.cdiv(k, block)
    most = 1 if gated else max(1, min(PROGRAMS // pl.cdiv(n, tile), k // LEAST_K))
    splits = splits or pl.cdiv(blocks, pl.cdiv(blocks, most))  # none is empty
    staged = 2 * block * (_padded(rows) + (2 if gated else 1) * tile)  # bytes, in bfloat16
    num_stages = num_stages or max(2, min(8, STAGED // staged))
    return {"tile": tile, "block": block, "splits": splits, "num_stages": num_stages}


def _padded(rows: int) -> int:
    return max(QUERIES, pl.next_power_of_2(rows))


@partial(jax.jit, static_argnames=("gated", "tile", "block", "splits", "num_warps", "num_stages", "interpret"))
def few_rows(
    h, w, *, gated=False, tile=None, block=None, splits=None, num_warps: int = 4, num_stages=None, interpret=False
):
    """h @ w.T for up to FEW rows: each program reads its part of w once, several blocks ahead of the tensor cores.
    h: [rows, k]; w: [n, k] → [splits, rows, n], to be added; float32 if there are several, else of h's dtype.

    gated: w is [2 n, k], the gate's rows and then up's, and the result their swiglu, [1, rows, n]. tile, block, splits,
    num_stages: by default as `tiling` has them.
    """
    (rows, k), n = h.shape, w.shape[0] // (2 if gated else 1)
    if rows > FEW:
        raise ValueError(f"{rows} rows; the kernel takes {FEW}")
    how = tiling(rows, k, n, gated, tile=tile, block=block, splits=splits, num_stages=num_stages)
    tile, block, splits, num_stages = how.values()
    if gated and splits > 1:
        raise ValueError("swiglu needs whole sums")
    return pl.pallas_call(
        partial(_few_rows_kernel, tile=tile, block=block, each=pl.cdiv(pl.cdiv(k, block), splits), gated=gated),
        grid=(pl.cdiv(n, tile), splits),
        out_shape=jax.ShapeDtypeStruct((splits, rows, n), h.dtype if splits == 1 else jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        interpret=interpret,
        name="gated_dot_few_rows" if gated else "dot_few_rows",
    )(h, w)


def _few_rows_kernel(h_ref, w_ref, out_ref, *, tile, block, each, gated):
    (rows, k), n = h_ref.shape, out_ref.shape[2]
    part = pl.program_id(1)
    row = jnp.arange(_padded(rows))
    column = pl.program_id(0) * tile + jnp.arange(tile)
    starts = (0, n) if gated else (0,)  # of gate and up

    def body(i, sums):
        at = (part * each + i) * block + jnp.arange(block)
        mask = (row < rows)[:, None] & (at < k)[None, :]
        h = plgpu.load(h_ref.at[row[:, None], at[None, :]], mask=mask, other=0.0)
        mask = (column < n)[:, None] & (at < k)[None, :]
        w = (plgpu.load(w_ref.at[x + column[:, None], at[None, :]], mask=mask, other=0.0) for x in starts)
        return tuple(total + plgpu.dot(h, x, trans_b=True) for total, x in zip(sums, w, strict=True))

    blocks = pl.cdiv(k, block)
    count = each if blocks % each == 0 else jnp.minimum(each, blocks - part * each)
    zero = jnp.zeros((row.size, tile), jnp.float32)
    sums = jax.lax.fori_loop(0, count, body, (zero,) * len(starts))
    if gated:
        sums = [swiglu(*(x.astype(h_ref.dtype) for x in sums))]  # rounded before and after, as elsewhere
    to = out_ref.at[part, row[:, None], column[None, :]]
    plgpu.store(to, sums[0].astype(out_ref.dtype), mask=(row < rows)[:, None] & (column < n)[None, :])


def _added(ref, row, column, there, dtype):
    """The sum of a product's parts at some columns of a row."""
    x = plgpu.load(ref.at[0, row, column], mask=there, other=0.0)
    for part in range(1, ref.shape[0]):
        x = x + plgpu.load(ref.at[part, row, column], mask=there, other=0.0)
    return x.astype(dtype)


# ---- attention -------------------------------------------------------------------------------------

# In kernels, `lax.div` and `lax.rem` are not // and %, whose care for signs hides from the compiler what is contiguous.


# Jitted, so that a kernel is traced once and not for every layer.
@partial(jax.jit, static_argnames=("heads", "splits", "block", "num_warps", "num_stages", "interpret"))
def attend(
    qkv,
    bias,
    rope,
    position,
    table,
    keys,
    values,
    rows: Rows | None = None,
    *,
    heads: int,
    splits=None,
    block: int = 32,
    num_warps=None,
    num_stages: int = 3,
    interpret=False,
):
    """New tokens of every slot: rotate their queries and keys, append keys and values, attend each to all up to itself.

    qkv: [parts, rows, (heads + 2 kv_heads) * head_dim], to be added up, before bias and rotation; bias: of its columns;
    rope: cos and sin, [rows, head_dim / 2] float32; position: [slots] int32, the first new token's, or -1 for an idle
    slot, which writes nothing; table: [slots, pages of a slot] int32; keys, values: [kv_heads, pages, page_size,
    head_dim], updated in place; rows: by default one of each slot. → ([rows, heads * head_dim], keys, values), of rows
    that are nobody's anything. A slot's positions are shared out over `splits` programs, by default as many as keep a
    whole chip busy; each reads `block` positions at a time.
    """
    kv_heads, pages, page_size, head_dim = keys.shape
    count, group = qkv.shape[1], heads // kv_heads
    if group > QUERIES:
        raise ValueError(f"{group} query heads a key head; the kernel takes {QUERIES}")
    programs = position.size if rows is None else len(rows.tile)
    most = 32 if rows is None else 8  # what several tokens' programs find is more to put together
    splits = splits or max(1, min(most, PARALLEL // (kv_heads * programs)))
    num_warps = num_warps or (1 if rows is None else 4)  # one warp has no registers for the rows of several tokens
    shape, flat = keys.shape, (kv_heads, pages * page_size, head_dim)
    keys, values = keys.reshape(flat), values.reshape(flat)
    if splits == 1:
        out_shape = [jax.ShapeDtypeStruct((count, heads * head_dim), bias.dtype)]
    else:
        out_shape = [
            jax.ShapeDtypeStruct((splits, count, heads * head_dim), jnp.float32),
            jax.ShapeDtypeStruct((splits, count, heads), jnp.float32),
            jax.ShapeDtypeStruct((splits, count, heads), jnp.float32),
        ]
    sizes = {"page_size": page_size, "block": block, "splits": splits}
    how = {
        "grid": (kv_heads, programs, splits),
        "compiler_params": plgpu.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        "interpret": interpret,
    }
    if rows is None:
        n = len(out_shape)
        *out, keys, values = pl.pallas_call(
            partial(_attend_kernel, **sizes),
            out_shape=[*out_shape, *(jax.ShapeDtypeStruct(flat, x.dtype) for x in (keys, values))],
            input_output_aliases={6: n, 7: n + 1},
            name="attend_pages",
            **how,
        )(position, table, *rope, qkv, bias, keys, values)
    else:
        position = jnp.where(rows.there, position[rows.slot] + rows.nth, -1)
        appending = partial(_append, page_size=page_size, interpret=interpret)
        q, keys, values = appending(qkv, bias, rope, position, rows.slot, table, keys, values)
        out = pl.pallas_call(
            partial(_attend_several_kernel, tile=tile_rows(count, len(table), group), **sizes),
            out_shape=out_shape,
            name="attend_pages_several",
            **how,
        )(position, rows.slot, rows.tile, table, q, keys, values)
    if splits > 1:
        part, most, total = out
        share = jnp.exp2(most - most.max(axis=0))
        total = (share * total).sum(axis=0)  # [rows, heads]
        part = part.reshape(splits, count, heads, head_dim)
        out = ((share[..., None] * part).sum(axis=0) / total[..., None]).reshape(count, -1)
        out = [out.astype(bias.dtype)]
    return out[0], keys.reshape(shape), values.reshape(shape)


def _attend_kernel(
    position_ref,
    table_ref,
    cos_ref,
    sin_ref,
    qkv_ref,
    bias_ref,
    _,
    __,
    *out_refs,
    page_size,
    block,
    splits,
):
    *out_refs, keys_ref, values_ref = out_refs
    head, slot, part = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    heads, kv_heads, head_dim = _sizes(bias_ref, keys_ref)
    group, half = heads // kv_heads, head_dim // 2
    position = position_ref[slot]
    row, column = jnp.arange(QUERIES), jnp.arange(head_dim)
    turned = jax.lax.rem(column + half, head_dim)  # the other coordinate of each pair
    angle = jax.lax.rem(column, half)
    sign = jnp.where(column < half, -1.0, 1.0)
    cos, sin = plgpu.load(cos_ref.at[slot, angle]), plgpu.load(sin_ref.at[slot, angle]) * sign
    mine, everywhere = (row < group)[:, None] & (column >= 0)[None, :], column >= 0

    def biased(at, mask):
        return _added(qkv_ref, slot, at, mask, bias_ref.dtype) + plgpu.load(bias_ref.at[at], mask=mask, other=0.0)

    def rotated(at, turned_at, cos, sin, mask):
        a, b = (biased(x, mask).astype(jnp.float32) for x in (at, turned_at))
        return (a * cos + b * sin).astype(bias_ref.dtype)

    start = ((head * group + row) * head_dim)[:, None]
    first = (heads + head) * head_dim
    q = rotated(start + column[None, :], start + turned[None, :], cos[None, :], sin[None, :], mine)
    new_k = rotated(first + column, first + turned, cos, sin, everywhere)
    new_v = biased(first + kv_heads * head_dim + column, everywhere)

    # The first part appends the new token, and has it in its sums from the start.
    here = part == 0
    to = jnp.maximum(position, 0)
    page = table_ref[slot, jax.lax.div(to, page_size)]
    at = page * page_size + jax.lax.rem(to, page_size)
    for ref, x in ((keys_ref, new_k), (values_ref, new_v)):
        plgpu.store(ref.at[head, at, column], x.astype(ref.dtype), mask=everywhere & here & (position >= 0))
    most = jnp.sum(q.astype(jnp.float32) * new_k.astype(jnp.float32)[None, :], axis=1) * _scale(head_dim)
    most = jnp.where(here, most, LEAST)
    total = jnp.where(most > LEAST, 1.0, 0.0)
    out = total[:, None] * new_v.astype(jnp.float32)[None, :]

    sums = _over_positions(
        q, (most, total, out), keys_ref, values_ref, table_ref, slot, jnp.maximum(position, 0), page_size, block, splits
    )
    _put_sums(out_refs, sums, slot, head * group + row, row < group, head_dim, splits)


def _append(qkv, bias, rope, position, slot, table, keys, values, *, page_size: int, interpret):
    """Of several new tokens: (queries, rotated [rows, heads * head_dim], keys, values), these [kv_heads, positions of
    all pages, head_dim] and updated in place: once for all programs of attention, which have more rows than one could
    make ready beside its keys. position, slot: [rows] int32, where a token goes, if it is not -1; the others as for
    `attend`."""
    heads, kv_heads, head_dim = _sizes(bias, keys)
    rows = qkv.shape[1]
    return pl.pallas_call(
        partial(_append_kernel, page_size=page_size),
        grid=(kv_heads, rows),
        out_shape=[
            jax.ShapeDtypeStruct((rows, heads * head_dim), bias.dtype),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (keys, values)),
        ],
        input_output_aliases={7: 1, 8: 2},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="append_several",
    )(position, slot, table, *rope, qkv, bias, keys, values)


def _append_kernel(
    position_ref,
    slot_ref,
    table_ref,
    cos_ref,
    sin_ref,
    qkv_ref,
    bias_ref,
    _,
    __,
    q_ref,
    keys_ref,
    values_ref,
    *,
    page_size,
):
    heads, kv_heads, head_dim = _sizes(bias_ref, keys_ref)
    head, token = pl.program_id(0), pl.program_id(1)
    group, half = heads // kv_heads, head_dim // 2
    row, column = jnp.arange(pl.next_power_of_2(group + 2))[:, None], jnp.arange(head_dim)[None, :]
    is_q, is_k, is_v = row < group, row == group, row == group + 1
    there = (row < group + 2) & (column >= 0)
    start = head_dim * jnp.where(is_q, head * group + row, jnp.where(is_k, heads, heads + kv_heads) + head)

    def biased(column):
        at = start + column
        return _added(qkv_ref, token, at, there, bias_ref.dtype) + plgpu.load(bias_ref.at[at], mask=there, other=0.0)

    angle = jax.lax.rem(column, half)
    cos = plgpu.load(cos_ref.at[token, angle])
    sin = plgpu.load(sin_ref.at[token, angle]) * jnp.where(column < half, -1.0, 1.0)
    x, across = biased(column), biased(jax.lax.rem(column + half, head_dim))  # the other coordinate of each pair
    turned = (x.astype(jnp.float32) * cos + across.astype(jnp.float32) * sin).astype(x.dtype)
    plgpu.store(q_ref.at[token, start + column], turned, mask=there & is_q)

    position = position_ref[token]
    to = jnp.maximum(position, 0)
    page = table_ref[slot_ref[token], jax.lax.div(to, page_size)]
    at = page * page_size + jax.lax.rem(to, page_size)
    for ref, new, mask in ((keys_ref, turned, is_k), (values_ref, x, is_v)):
        mask &= position >= 0
        # What isn't written lies outside: step by step a masked store writes what was there.
        to = ref.at[head, jnp.where(mask, at, ref.shape[1]), column]
        plgpu.store(to, new.astype(ref.dtype), mask=there & mask)


def _attend_several_kernel(
    position_ref, slot_ref, tile_ref, table_ref, q_ref, keys_ref, values_ref, *out_refs, tile, page_size, block, splits
):
    kv_heads, _, head_dim = keys_ref.shape
    group = q_ref.shape[1] // (head_dim * kv_heads)
    head, part_of_slot = pl.program_id(0), pl.program_id(1)
    first, count = tile_ref[part_of_slot, 0], tile_ref[part_of_slot, 1]
    row, column = jnp.arange(max(QUERIES, pl.next_power_of_2(tile * group))), jnp.arange(head_dim)
    token, query = first + jax.lax.div(row, group), head * group + jax.lax.rem(row, group)
    mine = row < count * group
    at = q_ref.at[token[:, None], (query * head_dim)[:, None] + column[None, :]]
    q = plgpu.load(at, mask=mine[:, None] & (column >= 0)[None, :], other=0.0)  # [rows, head_dim]

    last = plgpu.load(position_ref.at[token], mask=mine, other=-1)  # of each row
    begin = jnp.minimum(first, position_ref.size - 1)  # of nobody's tile too
    end = jnp.where(count > 0, position_ref[begin] + count, 0)
    # Where a part holds nothing that a row attends to, its sums are of no weight beside the others.
    most, total = jnp.full(row.shape, LEAST, jnp.float32), jnp.zeros(row.shape, jnp.float32)
    sums = most, total, jnp.zeros((row.size, head_dim), jnp.float32)
    slot = slot_ref[begin]
    sums = _over_positions(q, sums, keys_ref, values_ref, table_ref, slot, end, page_size, block, splits, last)
    _put_sums(out_refs, sums, token, query, mine, head_dim, splits)


def _sizes(bias, keys) -> tuple[int, int, int]:
    """(query heads, key heads, head_dim) by the shapes of qkv's bias and of keys [kv_heads, positions, head_dim]."""
    kv_heads, _, head_dim = keys.shape
    return bias.size // head_dim - 2 * kv_heads, kv_heads, head_dim


def _scale(head_dim: int) -> float:
    """Of scores, which are kept as powers of 2."""
    return head_dim**-0.5 * math.log2(math.e)


def _over_positions(q, sums, keys_ref, values_ref, table_ref, slot, end, page_size, block, splits, last=None):
    """`sums`, (largest score, sum of weights, weighted sum of values) of each row of q, with those of this program's
    share of a slot's positions before `end`; last: [rows], where each row has fewer, the last of them."""
    head, part = pl.program_id(0), pl.program_id(2)
    column, scale = jnp.arange(q.shape[1]), _scale(q.shape[1])
    blocks = pl.cdiv(end, block)
    each = pl.cdiv(blocks, splits)
    first_block = part * each
    count = jnp.clip(blocks - first_block, 0, each)

    def positions(i):
        # Every other head goes backwards: all programs start at once, and were they all to read the shared pages of
        # prompts first, which come from the chip's cache, the memory would wait.
        i = jnp.where(head % 2 == 1, count - 1 - i, i)
        return (first_block + i) * block + jnp.arange(block)

    def pages(i):
        index = positions(i)
        there = (index >= 0) & (index < end)
        return plgpu.load(table_ref.at[slot, jax.lax.div(index, page_size)], mask=there, other=0)

    def body(i, carry):
        most, total, out, page = carry  # the page was asked for a block ago, so that keys and values can be at once
        index = positions(i)
        filled = index < end
        at = (page * page_size + jax.lax.rem(index, page_size))[:, None]
        k = plgpu.load(keys_ref.at[head, at, column[None, :]], mask=filled[:, None], other=0.0)
        v = plgpu.load(values_ref.at[head, at, column[None, :]], mask=filled[:, None], other=0.0)
        seen = filled[None, :] if last is None else filled[None, :] & (index[None, :] <= last[:, None])
        score = jnp.where(seen, plgpu.dot(q, k, trans_b=True) * scale, LEAST)  # [rows, block]
        new_most = jnp.maximum(most, score.max(axis=1))
        shrink, weight = jnp.exp2(most - new_most), jnp.exp2(score - new_most[:, None])
        total = total * shrink + weight.sum(axis=1)
        out = out * shrink[:, None] + plgpu.dot(weight.astype(v.dtype), v)
        return new_most, total, out, pages(i + 1)

    return jax.lax.fori_loop(0, count, body, (*sums, pages(0)))[:3]


def _put_sums(out_refs, sums, token, head, mine, head_dim, splits):
    """A program's part of attention: of each row, `mine` or none, what the token's query head has found."""
    most, total, out = sums
    to = (head * head_dim)[:, None] + jnp.arange(head_dim)[None, :]
    wide = mine[:, None] & (to >= 0)
    token_of = token if jnp.ndim(token) == 0 else token[:, None]
    if splits == 1:
        plgpu.store(out_refs[0].at[token_of, to], (out / total[:, None]).astype(out_refs[0].dtype), mask=wide)
        return
    part = pl.program_id(2)
    plgpu.store(out_refs[0].at[part, token_of, to], out, mask=wide)
    for ref, x in zip(out_refs[1:], (most, total), strict=True):
        plgpu.store(ref.at[part, token, head], x, mask=mine)


# ---- residual stream -------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("eps", "num_warps", "interpret"))
def add_norm(x, y, weight, used=None, *, eps: float, num_warps=None, interpret=False):
    """(x + y, its RMS norm times weight), as `layers.rms_norm`. x: [rows, hidden]; y: [parts, rows, hidden], to be
    added up; weight: [hidden]; used: as for `product`. → [rows, hidden] each"""
    rows, hidden = x.shape
    num_warps = num_warps or (16 if rows <= FEW else 8)  # few rows have many parts: all should be on their way at once
    return pl.pallas_call(
        partial(_add_norm_kernel, hidden=hidden, eps=eps),
        grid=(rows,),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype)] * 2,
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=interpret,
        name="add_norm",
    )(jnp.full(1, rows if used is None else used, jnp.int32), x, y, weight)


def _add_norm_kernel(used_ref, x_ref, y_ref, weight_ref, sum_ref, norm_ref, *, hidden, eps):
    row = pl.program_id(0)

    @pl.when(row < used_ref[0])
    def _():
        column = jnp.arange(pl.next_power_of_2(hidden))
        there = column < hidden
        x = plgpu.load(x_ref.at[row, column], mask=there, other=0.0) + _added(y_ref, row, column, there, x_ref.dtype)
        weight = plgpu.load(weight_ref.at[column], mask=there, other=0.0).astype(jnp.float32)
        plgpu.store(sum_ref.at[row, column], x, mask=there)
        x = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.sum(x * x) / hidden + eps)
        plgpu.store(norm_ref.at[row, column], (x * scale * weight).astype(norm_ref.dtype), mask=there)


# ---- the draw --------------------------------------------------------------------------------------


def draws(k: int, p: float) -> bool:
    """Whether `draw` takes these settings."""
    return 0 < k <= MOST_K and p == 1


def draws_hidden(hidden, table, temperature: float, k: int, p: float, tensor: int) -> bool:
    """Whether `draw_hidden` takes these, on as many devices."""
    whole = tensor == 1 and hopper.here() and hopper.takes(*hidden.shape, len(table))
    return whole and temperature > 0 and draws(k, p)


def draw_hidden(hidden, table, keys, temperature: float, k: int, used=None):
    """`draw` from the logits hidden @ table.T, with their statistics found where they are made. hidden: [rows, hidden];
    table: [vocab, hidden]."""
    how = hopper.tiling(*hidden.shape, len(table), most_splits=1)
    logits, *stats = hopper.scores(hidden, table, used, temperature=temperature, tiling=how, cores=hopper.cores())
    return draw(logits, keys, temperature, k, used, stats=stats)


def draw(logits, keys, temperature: float, k: int, used=None, *, stats=None, num_warps: int = 8, interpret=False):
    """As `filters.draw` at a temperature above 0, for what `draws` says. used: [] int32, how many rows are drawn for,
    by default all; stats: those of `_statistics`, if known."""
    rows, vocab = logits.shape
    blocks = -(-vocab // BLOCK)
    most, total = stats or _statistics(logits, temperature, interpret)
    used = jnp.full(1, rows if used is None else used, jnp.int32)
    token, logprob, _ = pl.pallas_call(
        partial(_select_kernel, temperature=temperature, k=k, vocab=vocab, blocks=blocks, barrier=not interpret),
        grid=(rows,),
        out_shape=[
            jax.ShapeDtypeStruct((rows,), jnp.int32),
            jax.ShapeDtypeStruct((rows,), jnp.float32),
            jax.ShapeDtypeStruct((rows, k + pl.next_power_of_2(blocks)), jnp.int32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=interpret,
        name="draw_top_k",
    )(used, logits, most, total, keys)
    return token, logprob


def _statistics(logits, temperature: float, interpret: bool):
    """Of each block of a row's logits the largest, and the sum of exponentials of what lies between it and each, over
    the temperature; float32 [rows, blocks] each."""
    rows, vocab = logits.shape
    blocks = -(-vocab // BLOCK)
    at_once = 4096 // BLOCK
    return pl.pallas_call(
        partial(_stats_kernel, temperature=temperature, vocab=vocab, blocks=blocks, at_once=at_once),
        grid=(rows, pl.cdiv(blocks, at_once)),
        out_shape=[jax.ShapeDtypeStruct((rows, blocks), jnp.float32)] * 2,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="block_stats",
    )(logits)


def _stats_kernel(logits_ref, most_ref, total_ref, *, temperature, vocab, blocks, at_once):
    row, first = pl.program_id(0), pl.program_id(1) * at_once
    block = first + jnp.arange(at_once)
    column = block[:, None] * BLOCK + jnp.arange(BLOCK)[None, :]
    x = plgpu.load(logits_ref.at[row, column], mask=column < vocab, other=LEAST)
    most = x.max(axis=1)
    total = jnp.sum(jnp.where(column < vocab, jnp.exp((x - most[:, None]) / temperature), 0.0), axis=1)
    for ref, value in ((most_ref, most), (total_ref, total)):
        plgpu.store(ref.at[row, block], value, mask=block < blocks)


def _select_kernel(used_ref, *refs, **how):
    # What the other rows hold may be anything, and what is found in it an address outside.
    row = pl.program_id(0)
    pl.when(row < used_ref[0])(lambda: _select(row, *refs, **how))


def _select(
    row,
    logits_ref,
    most_ref,
    total_ref,
    key_ref,
    token_ref,
    logprob_ref,
    kept_ref,
    *,
    temperature,
    k,
    vocab,
    blocks,
    barrier,
):
    block = jnp.arange(pl.next_power_of_2(blocks))
    there = block < blocks
    # Divided here, as the logits are below: another kernel may round otherwise, and they are compared.
    most = plgpu.load(most_ref.at[row, block], mask=there, other=LEAST) / temperature
    total = plgpu.load(total_ref.at[row, block], mask=there, other=0.0)
    largest = most.max()
    norm = largest + jnp.log(jnp.sum(total * jnp.exp(most - largest)))

    # The k blocks with the largest maxima hold the k largest logits; in the order of their tokens.
    kept = _largest(most, there, min(k, blocks), jnp.where(there, most, largest).min())
    before = jnp.cumsum(kept.astype(jnp.int32)) - kept
    plgpu.store(kept_ref.at[row, jnp.where(kept, before, k + block - before)], block, mask=kept)
    least = jnp.where(kept, most, largest).min()  # each block kept holds a logit as large
    if barrier:
        plgpu.debug_barrier()  # the other threads of this program read it

    index = jnp.arange(pl.next_power_of_2(k) * BLOCK)
    held = index // BLOCK < min(k, blocks)
    column = plgpu.load(kept_ref.at[row, index // BLOCK], mask=held, other=blocks) * BLOCK + index % BLOCK
    there = held & (column < vocab)
    x = plgpu.load(logits_ref.at[row, column], mask=there, other=LEAST) / temperature
    kept = _largest(x, there, k, least if k <= blocks else x.min())
    uniform = (_threefry(key_ref[row, 0], key_ref[row, 1], column).astype(jnp.float32) + 0.5) * 2**-32
    noise = -jnp.log1p(-jnp.minimum(uniform, 1 - 2**-24))  # as filters.py has it
    race = jnp.where(kept, jnp.exp(x - largest) / noise, -1.0)
    token = jnp.where(race == race.max(), column, vocab).min()
    token_ref[row] = token
    logprob_ref[row] = jnp.sum(jnp.where(column == token, x, 0.0)) - norm


def _largest(x, there, k: int, least):
    """Which of x [n] are its k largest, ties to the first, of which at least k are `least` or more; there: [n], what
    counts. By bisection on the bits, which ends as soon as a bound leaves exactly k."""

    def order(x):  # integers in the order of the floats
        bits = jax.lax.bitcast_convert_type(x, jnp.int32)
        return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)

    def reached(bound):
        return there & (values >= bound)

    def going(bounds):
        low, high, count = bounds  # `count` >= k are >= low, fewer than k are > high
        return (low < high) & (count != k)

    def halve(bounds):
        low, high, count = bounds
        middle = (low & high) + ((low ^ high) >> 1) + ((low ^ high) & 1)  # mean, rounded up, without overflow
        above = jnp.sum(reached(middle).astype(jnp.int32))
        enough = above >= k
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1), jnp.where(enough, above, count)

    def break_ties():
        above, tied = there & (values > low), there & (values == low)
        room = k - jnp.sum(above.astype(jnp.int32))
        return above | (tied & (jnp.cumsum(tied.astype(jnp.int32)) <= room))

    values = order(x)
    low = order(least)
    low, _, count = jax.lax.while_loop(going, halve, (low, values.max(), jnp.sum(reached(low).astype(jnp.int32))))
    return jax.lax.cond(count == k, lambda: reached(low), break_ties)


def _threefry(key0, key1, column):
    """The first word of threefry-2x32 of (column, 0) under a key: the bits that filters.py takes for a token."""
    parity = key0 ^ key1 ^ jnp.uint32(0x1BD11BDA)
    schedule = key0, key1, parity
    x = column.astype(jnp.uint32) + key0
    y = jnp.zeros_like(x) + key1
    for i in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            x = x + y
            y = ((y << jnp.uint32(turn)) | (y >> jnp.uint32(32 - turn))) ^ x
        x = x + schedule[(i + 1) % 3]
        y = y + schedule[(i + 2) % 3] + jnp.uint32(i + 1)
    return x
