"""Attention of new tokens to the pages of their responses, on TPUs: of one a slot, bias, rotation, append and attention
in one Pallas kernel; of several, attention alone, once they have been appended.

A page holds the keys and values of all heads side by side, so it is one copy of 64 KiB (1.5B). A core works on items,
each `PAGES` pages of a slot, one slot after the other, with many items' copies on their way whatever slots they are of;
what several items of a slot find is put together as in flash attention. The steps of a few items stand in one stretch
of code, so that the compiler can do them at once: the matrix products of one item wait for nothing of another.

The newest keys and values are put into the copied page, and its 16 rows around them are copied back.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rlvd_jax.qwen2.attention import LANES
from rlvd_jax.qwen2.layers import rotate
from rlvd_jax.sampling.rows import Rows, tile_rows

PAGES = 4  # of an item
ROUND = 2**20  # bytes of the items that are worked on together; twice as many are on their way to a core
CHUNK = 64  # slots whose queries and results a core holds at a time
TILE = 16  # rows of a page that are copied back together
FEW = -1e30
TABLE = 3 * 2**15  # entries of the table that a call takes: with the lists, two thirds of the memory for scalars


class Shape(NamedTuple):
    """What a kernel is made for."""

    heads: int
    kv_heads: int
    dim: int
    size: int  # positions of a page
    chunk: int
    chunks: int  # of a core
    tokens: int = 1  # of a slot; of several, queries come rotated and keys and values lie in their pages

    @property
    def packed(self) -> bool:
        return packed(self.dim)

    @property
    def found(self) -> int:
        """Rows of a token's queries, some of them empty."""
        return -(-self.heads // TILE) * TILE

    @property
    def item(self) -> int:
        """Positions."""
        return PAGES * self.size

    @property
    def together(self) -> int:
        """Items that are worked on together, a power of two: more than eight would only be long to compile."""
        size = 2 * PAGES * math.prod(page_shape(self.kv_heads, self.size, self.dim))
        return 2 ** (min(8, max(1, ROUND // size)).bit_length() - 1)

    @property
    def ahead(self) -> int:
        """Items on their way to a core."""
        return 2 * self.together

    @property
    def ring(self) -> int:
        """Items that there is room for: what is copied back has two rounds' time for it."""
        return 4 * self.together


def packed(dim: int) -> bool:
    """Whether a head's keys and values lie side by side in the lanes, so that none of them is empty."""
    return dim <= LANES // 2


def page_shape(kv_heads: int, size: int, dim: int) -> tuple[int, ...]:
    """(keys and values, heads, positions, lanes), or 1 where keys and values share the lanes."""
    return (1, kv_heads, size, LANES) if packed(dim) else (2, kv_heads, size, -(-dim // LANES) * LANES)


def pages(keys, values):
    """Pages of keys and values [pages, kv_heads, size, dim]. → [pages, *page_shape]."""
    dim = keys.shape[-1]
    if packed(dim):
        pad = [(0, 0)] * 3 + [(0, LANES // 2 - dim)]
        return jnp.concatenate([jnp.pad(keys, pad), jnp.pad(values, pad)], axis=-1)[:, None]
    pad = [(0, 0)] * 3 + [(0, -dim % LANES)]
    return jnp.stack([jnp.pad(keys, pad), jnp.pad(values, pad)], axis=1)


def _kernel(s: Shape, count, item, at, first, page, *refs):
    """One chunk of a core's slots. For `count` to `page` see `Plan`."""
    appends = s.tokens == 1
    if appends:  # the pool that comes in also goes out
        qkv, bias, cos, sin, _, out, pool, query, new, ring, sums, total, arrived, written, writing = refs
    else:
        query, pool, out, ring, sums, total, arrived = refs
    core, chunk = pl.program_id(0), pl.program_id(1)
    offset = core * (item.shape[0] // pl.num_programs(0))  # of its part of the lists
    everything = offset + count[core * s.chunks + s.chunks - 1]
    begun = offset + jnp.where(chunk == 0, 0, count[core * s.chunks + jnp.maximum(chunk - 1, 0)])
    items = offset + count[core * s.chunks + chunk] - begun
    last = jnp.maximum(everything - 1, offset)  # what is beyond the lists' end is not looked up

    def copies(n, place):
        """(copy, whether there is such a page) of each page of an item."""
        of = [page[first[jnp.minimum(n, last)] + i] for i in range(PAGES)]
        each = [pltpu.make_async_copy(pool.at[x], ring.at[place, i], arrived.at[place]) for i, x in enumerate(of)]
        return zip(each, [x >= 0 for x in of], strict=True)

    def back(place, i, to, tile):
        """The copy of some rows of an item's page back to the pool."""
        rows = pl.ds(pl.multiple_of(tile, TILE), TILE)
        of, to = ring.at[place, i, :, :, rows], pool.at[to, :, :, rows]
        return pltpu.make_async_copy(of, to, written.at[place])

    def fetch(n, there):
        there &= n < everything
        place = jnp.bitwise_and(n, s.ring - 1)

        if appends:

            @pl.when(there & (writing[place] > 0))
            def _():
                back(place, 0, 0, 0).wait()
                writing[place] = 0

        for copy, is_page in copies(n, place):
            pl.when(there & is_page)(copy.start)

    @pl.when(chunk == 0)
    def _():
        for place in range(s.ring if appends else 0):
            writing[place] = 0
        ring[...] = jnp.zeros_like(ring)  # what is not copied there must not be NaN
        pl.loop(0, s.ahead)(lambda n: fetch(offset + n, True))

    rows, lanes = query.shape[1:]
    if appends:  # queries and the newest keys, rotated; the newest values
        half = s.dim // 2
        x = qkv[...].astype(jnp.float32) + bias[...].astype(jnp.float32)  # [chunk, rows, lanes]
        lane, row = (jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (2, 1))
        right, left = (pltpu.roll(x.reshape(-1, lanes), by, 1).reshape(x.shape) for by in (half, lanes - half))
        turned = x * cos[...][:, None] + jnp.where(lane < half, left, right) * sin[...][:, None]
        x = jnp.where(row >= s.heads + s.kv_heads, x, turned)
        query[...] = x[:, :rows].astype(query.dtype)
        new[...] = x
    sums[...], total[...] = jnp.zeros_like(sums), jnp.ones_like(total)  # of slots that are idle

    row = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    head = jax.lax.div(jax.lax.rem(row, s.found), s.heads // s.kv_heads)
    column = jax.lax.broadcasted_iota(jnp.int32, (rows, s.item), 1)
    if not appends:
        column -= jax.lax.div(row, s.found)  # a later token has as many positions more
    tile_row, tile_lane = (jax.lax.broadcasted_iota(jnp.int32, (TILE, lanes), axis) for axis in (0, 1))

    def by_head(each):  # of each row what is of its own head
        chosen = each[0]
        for h in range(1, s.kv_heads):
            chosen = jnp.where(head == h, each[h], chosen)
        return chosen

    def append(n, slot, newest, place):
        """Put the newest keys and values into the item and copy the rows around them back to their page."""
        i, within = jax.lax.div(newest, s.size), jax.lax.rem(newest, s.size)
        tile = within - jax.lax.rem(within, TILE)
        rows = pl.ds(pl.multiple_of(tile, TILE), TILE)
        for h in range(s.kv_heads):
            key, value = (new[slot, pl.ds(s.heads + kind * s.kv_heads + h, 1)] for kind in (0, 1))
            both = [key, value]
            if s.packed:
                both = [jnp.where(tile_lane[:1] < LANES // 2, key, pltpu.roll(value, LANES // 2, 1))]
            for plane, row in enumerate(both):
                old = ring[place, i, plane, h, rows]
                ring[place, i, plane, h, rows] = jnp.where(tile_row == within - tile, row.astype(old.dtype), old)
        back(place, i, page[first[n] + i], tile).start()
        writing[place] = 1

    def found(slot, newest, place):
        """Of an item: largest scores, sums of exponentials, and weighted sums of values; scores in powers of two."""
        key = [ring[place, :, 0, h].reshape(s.item, lanes) for h in range(s.kv_heads)]
        value = key if s.packed else [ring[place, :, 1, h].reshape(s.item, lanes) for h in range(s.kv_heads)]
        side = (((1,), (1,)), ((), ()))
        of = query[slot]
        score = by_head([jax.lax.dot_general(of, k, side, preferred_element_type=jnp.float32) for k in key])
        score = jnp.where(column <= newest, score * (s.dim**-0.5 * math.log2(math.e)), FEW)
        most = score.max(axis=1, keepdims=True)
        weight = jnp.exp2(score - most)
        there = by_head([jnp.dot(weight.astype(ring.dtype), v, preferred_element_type=jnp.float32) for v in value])
        return most, weight.sum(axis=1, keepdims=True), there

    def work(i, carry):
        slot, most, before, so_far = carry
        here = []
        for j in range(s.together):
            n = begun + i * s.together + j
            there = i * s.together + j < items
            fetch(n + s.ahead, there)
            # After the chunk's last item come some of which nothing is seen.
            place = jnp.bitwise_and(n, s.ring - 1)
            listed = jnp.minimum(n, last)
            of, newest = item[listed], jnp.where(there, at[listed], -s.tokens)
            slot = jnp.where(there, jax.lax.shift_right_logical(of, 1), slot)
            here.append((n, there, there & (jnp.bitwise_and(of, 1) > 0), slot, newest, place))
        for n, there, *_, place in here:
            for copy, is_page in copies(n, place):
                pl.when(there & is_page)(copy.wait)

        if appends:
            for n, _, _, slot, newest, place in here:
                pl.when((newest >= 0) & (newest < s.item))(partial(append, n, slot, newest, place))
        each = [found(slot, newest, place) for _, _, _, slot, newest, place in here]
        for (_, _, begins, slot, _, _), (most_here, total_here, sums_here) in zip(here, each, strict=True):
            most = jnp.where(begins, -jnp.inf, most)
            old, most = most, jnp.maximum(most, most_here)
            kept, share = jnp.exp2(old - most), jnp.exp2(most_here - most)
            before, so_far = before * kept + total_here * share, so_far * kept + sums_here * share
            sums[slot], total[slot] = so_far, before
        return slot, most, before, so_far

    zero = jnp.zeros((rows, 1), jnp.float32)
    start = jnp.int32(0), zero, zero, jnp.zeros((rows, lanes), jnp.float32)
    jax.lax.fori_loop(0, pl.cdiv(items, s.together), work, start)
    out[...] = (sums[...] / total[...]).astype(out.dtype)

    @pl.when(chunk == s.chunks - 1)
    def _():
        for place in range(s.ring if appends else 0):
            pl.when(writing[place] > 0)(back(place, 0, 0, 0).wait)


class Plan(NamedTuple):
    """The items of a step, the same for all layers. Each core has its part of every list."""

    count: jax.Array  # [cores * chunks] items of a core's chunks up to this one
    item: jax.Array  # [cores * most] twice the slot within its chunk, and 1 for a slot's first item
    at: jax.Array  # [cores * most] where the slot's first new position lies within the item, or before or beyond it
    first: jax.Array  # [cores * most] the item's first entry in `page`
    page: jax.Array  # [cores * slots * width] the table, with -1 where nothing is filled


def plan(position, table, shape: tuple[int, ...], cores: int = 1, first=None) -> list[tuple[int, Plan]]:
    """The items of each call that a step takes, and how many slots it is for. position: [slots] int32 of the newest, -1
    for a slot that is idle; table: [slots, pages of a slot] int32, a multiple of PAGES; shape: the pool's; first:
    [slots] int32 of the first of several new tokens."""
    some, first = TABLE // table.shape[1], position if first is None else first
    parts = [slice(i, min(i + some, position.size)) for i in range(0, position.size, some)]
    return [
        (part.stop - part.start, _plan(position[part], first[part], table[part], shape[3], cores)) for part in parts
    ]


def plan_several(position, table, rows: Rows, shape: tuple[int, ...], cores: int = 1) -> list[tuple[int, Plan]]:
    """As `plan`, of the tiles of `rows`, each of which works as a slot. position: [slots] int32, of a slot's first new
    token."""
    first, number = rows.tile.T
    first = jnp.minimum(first, rows.slot.size - 1)  # of nobody's tile
    slot = rows.slot[first]
    begin = position[slot] + rows.nth[first]
    return plan(jnp.where(number > 0, begin + number - 1, -1), table[slot], shape, cores, begin)


def _chunks(slots: int, cores: int) -> tuple[int, int]:
    """(slots of a chunk, chunks of a core)."""
    chunk = min(CHUNK, -(-slots // cores))
    return chunk, -(-slots // (cores * chunk))


def _plan(position, begin, table, size: int, cores: int) -> Plan:
    slots, width = table.shape
    chunk, chunks = _chunks(slots, cores)
    each = chunk * chunks
    more = cores * each - slots
    filled = jnp.arange(width) <= jnp.where(position < 0, -1, position // size)[:, None]
    page = jnp.pad(jnp.where(filled, table, -1), ((0, more), (0, 0)))
    most = each * width // PAGES

    def kernel(position, begin, count, item, at, first):
        def of_core(core, _):
            item[core * most], at[core * most], first[core * most] = 0, -1, 0  # where there are no items

            def of_slot(i, n):
                newest = position[core * each + i]

                def of_item(block, n):
                    item[core * most + n] = 2 * jax.lax.rem(i, chunk) + jnp.where(block == 0, 1, 0)
                    at[core * most + n] = begin[core * each + i] - block * PAGES * size
                    first[core * most + n] = (core * each + i) * width + block * PAGES
                    return n + 1

                blocks = jax.lax.div(newest + PAGES * size, PAGES * size)  # none if idle
                n = jax.lax.fori_loop(0, blocks, of_item, n)
                count[core * chunks + jax.lax.div(i, chunk)] = n
                return n

            return jax.lax.fori_loop(0, each, of_slot, 0) * 0

        jax.lax.fori_loop(0, cores, of_core, 0)

    scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
    lists = [jax.ShapeDtypeStruct((cores * n,), jnp.int32) for n in (chunks, most, most, most)]
    places = [jnp.pad(x, (0, more), constant_values=-1) for x in (position, begin)]
    listed = pl.pallas_call(kernel, out_shape=lists, in_specs=[scalars] * 2, out_specs=[scalars] * 4, name="items")
    return Plan(*listed(*places), page.reshape(-1))


def attend(qkv, bias, rope, plans: list[tuple[int, Plan]], pool, heads: int, cores: int = 1):
    """Write the newest keys and values of each slot into its pages, and attend to all up to each.

    qkv: [slots, (heads + 2 kv_heads) * dim] bfloat16, without bias and rotation; bias: of its columns; rope: cosines
    and sines [slots, dim / 2]; plans: of the step; pool: [pages, *page_shape]; cores: of the chip, which work as one
    device.
    → ([slots, heads * dim], pool); what comes out of an idle slot means nothing.
    """
    found, start = [], 0
    for slots, items in plans:
        here = slice(start, start + slots)
        out, pool = _attend(qkv[here], bias, tuple(x[here] for x in rope), items, pool, heads, cores)
        found.append(out)
        start += slots
    return jnp.concatenate(found), pool


# Jitted, so that the kernel is traced once and not for every layer.
@partial(jax.jit, static_argnames=("heads", "cores"))
def _attend(qkv, bias, rope, items: Plan, pool, heads: int, cores: int):
    slots, dim = qkv.shape[0], 2 * rope[0].shape[-1]
    _, _, kv_heads, size, lanes = pool.shape
    columns = heads + 2 * kv_heads
    chunk, chunks = _chunks(slots, cores)
    s = Shape(heads, kv_heads, dim, size, chunk, chunks)
    more = cores * chunks * chunk - slots

    def pad(x, *last):
        return jnp.pad(x, [(0, more), *((0, 0),) * (x.ndim - 1 - len(last)), *((0, n) for n in last)])

    found = s.found
    rows = max(-(-columns // 8) * 8, found)
    qkv = pad(qkv.reshape(slots, columns, dim), rows - columns, lanes - dim)
    bias = jnp.pad(bias.reshape(columns, dim), [(0, rows - columns), (0, lanes - dim)])
    cos, sin = (x.astype(jnp.float32) for x in rope)
    cos, sin = (pad(jnp.concatenate(x, axis=1), lanes - dim) for x in ((cos, cos), (-sin, sin)))

    by_chunk = lambda core, chunk, *_: (core * chunks + chunk, 0, 0)  # noqa: E731
    table = pl.BlockSpec((chunk, lanes), lambda *at: by_chunk(*at)[:2])
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    out, pool = pl.pallas_call(
        partial(_kernel, s),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(items),
            grid=(cores, chunks),
            in_specs=[
                pl.BlockSpec((chunk, rows, lanes), by_chunk),
                pl.BlockSpec((rows, lanes), lambda *_: (0, 0)),
                table,
                table,
                anywhere,
            ],
            out_specs=[pl.BlockSpec((chunk, found, lanes), by_chunk), anywhere],
            scratch_shapes=[
                pltpu.VMEM((chunk, found, lanes), pool.dtype),
                pltpu.VMEM((chunk, rows, lanes), jnp.float32),
                pltpu.VMEM((s.ring, PAGES, *pool.shape[1:]), pool.dtype),
                pltpu.VMEM((chunk, found, lanes), jnp.float32),
                pltpu.VMEM((chunk, found, 1), jnp.float32),
                pltpu.SemaphoreType.DMA((s.ring,)),
                pltpu.SemaphoreType.DMA((s.ring,)),
                pltpu.SMEM((s.ring,), jnp.int32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct((cores * chunks * chunk, found, lanes), pool.dtype), jax.typeof(pool)],
        input_output_aliases={len(items) + 4: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), disable_bounds_checks=True),
        name="paged_attention",
    )(*items, qkv, bias, cos, sin, pool)
    side = LANES // 2 if s.packed else 0
    return out[:slots, :heads, side : side + dim].reshape(slots, heads * dim), pool


def attend_several(
    qkv, bias, rope, rows: Rows, position, table, plans: list[tuple[int, Plan]], pool, heads: int, cores: int = 1
):
    """As `attend`, of several tokens of a slot. qkv: [rows, (heads + 2 kv_heads) * dim]; rope: of the rows; position:
    [slots] int32, of a slot's first new token; table: [slots, pages of a slot]; plans: `plan_several`. → ([rows, heads
    * dim], zero where a row is nobody's, and the pool)."""
    count, dim = qkv.shape[0], 2 * rope[0].shape[-1]
    _, planes, kv_heads, size, lanes = pool.shape
    x = (qkv.astype(jnp.float32) + bias.astype(jnp.float32)).reshape(count, -1, dim)
    q, k, v = jnp.split(x, [heads, heads + kv_heads], axis=1)
    q, k, v = (x.astype(pool.dtype) for x in (rotate(q, rope), rotate(k, rope), v))

    to = position[rows.slot] + rows.nth
    page = jnp.where(rows.there, table[rows.slot, jnp.minimum(to // size, table.shape[1] - 1)], len(pool))  # outside
    new = pages(k[:, :, None], v[:, :, None]).reshape(-1, lanes)
    plane = (page[:, None] * planes * kv_heads + jnp.arange(planes * kv_heads)).reshape(-1)
    flat = pool.reshape(-1, size, lanes).at[plane, jnp.repeat(to % size, planes * kv_heads)].set(new, mode="drop")
    pool = flat.reshape(pool.shape)

    first, number = rows.tile.T
    tokens = tile_rows(count, len(table), heads // kv_heads)
    nth = jnp.arange(tokens)
    of_tile = jnp.minimum(first[:, None] + nth, count - 1)  # [tiles, tokens]
    found, start = [], 0
    for tiles, items in plans:
        found.append(_attend_several(q[of_tile[start : start + tiles]], items, pool, cores))
        start += tiles
    out = jnp.concatenate(found).reshape(-1, heads * dim)
    to = jnp.where(nth < number[:, None], of_tile, count).reshape(-1)
    return jnp.zeros((count, heads * dim), out.dtype).at[to].set(out, mode="drop"), pool


@partial(jax.jit, static_argnames="cores")
def _attend_several(q, items: Plan, pool, cores: int):
    """q: [tiles, tokens, heads, dim], rotated. → the same, of what they attend to."""
    tiles, tokens, heads, dim = q.shape
    _, _, kv_heads, size, lanes = pool.shape
    chunk, chunks = _chunks(tiles, cores)
    s = Shape(heads, kv_heads, dim, size, chunk, chunks, tokens)
    more, rows = cores * chunks * chunk - tiles, tokens * s.found
    q = jnp.pad(q, [(0, more), (0, 0), (0, s.found - heads), (0, lanes - dim)]).reshape(-1, rows, lanes)
    by_chunk = pl.BlockSpec((chunk, rows, lanes), lambda core, chunk, *_: (core * chunks + chunk, 0, 0))
    out = pl.pallas_call(
        partial(_kernel, s),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(items),
            grid=(cores, chunks),
            in_specs=[by_chunk, pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=by_chunk,
            scratch_shapes=[
                pltpu.VMEM((s.ring, PAGES, *pool.shape[1:]), pool.dtype),
                pltpu.VMEM((chunk, rows, lanes), jnp.float32),
                pltpu.VMEM((chunk, rows, 1), jnp.float32),
                pltpu.SemaphoreType.DMA((s.ring,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, pool.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), disable_bounds_checks=True),
        name="paged_attention_several",
    )(*items, q, pool)
    side = LANES // 2 if s.packed else 0
    return out.reshape(-1, tokens, s.found, lanes)[:tiles, :, :heads, side : side + dim]
