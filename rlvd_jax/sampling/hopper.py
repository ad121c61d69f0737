"""Matrix products of many rows on Hopper GPUs, in Pallas (Mosaic): with the MLP's activation in the product before it,
split over k where there are too few tiles for the chip, and the logits' with what the draw asks of them first. Weights
lie as [outputs, inputs]: tiles may then have any number of columns that is a multiple of 8, also one that shares the
work out evenly.

One warpgroup of a multiprocessor copies blocks of both matrices ahead into a ring in shared memory, two multiply them
on the tensor cores, each its rows of the tile. Two multiprocessors of a cluster, which work on different rows, share
what they read of the weights. Programs stay for as many tiles as fall to them, so that the next tile's blocks are on
their way while a tile's results are written. Rows that nobody needs, the last ones, take no tiles (`used`).
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from rlvd_jax.qwen2.layers import swiglu

try:
    from jax.experimental.pallas import mosaic_gpu as mgpu
except ImportError:  # where JAX comes without it, there is no such GPU
    mgpu = None

ROWS = 128  # of a tile, half of them for each of two warpgroups
BLOCK = 64  # of k at a time: 128 bytes, the widest row that shared memory swizzles
COPIER = 2  # the warpgroup that copies; those before it multiply
SHARED = 226 * 1024  # bytes of shared memory that a program may take, with some left for barriers
CHUNK = 128  # bytes of each row of a tile that are written at a time, at most
GROUP = 64  # tokens of the vocabulary whose logits share a maximum
GATED_CHUNK = 72  # columns, where the tile is gated: an odd number of 16 bytes, so that 8 rows lie in different banks
SPLITS = 8  # parts of k, at most

# Measured on an H100, for `tiling`.
PACE = {256: 0.66e-6, 192: 0.52e-6, 128: 0.36e-6}  # seconds that a tile of so many columns takes for a block
GATED_PACE = {272: 0.69e-6, 208: 0.5e-6, 144: 0.33e-6}
START = 3.2e-6  # seconds of a tile in which no block is multiplied
EDGE = 20e-9  # seconds for each column of a gated tile: of a program's first and last, which no other covers
PARTS_PACE = 6e12  # bytes a second of sums in parts


class Tiling(NamedTuple):
    columns: int  # of weights that a tile reads
    cluster: int = 1  # multiprocessors that work on tiles of the same columns
    splits: int = 1  # of k


def here() -> bool:
    """Whether the devices here are GPUs that these kernels run on."""
    return mgpu is not None and jax.default_backend() == "gpu" and jax.devices()[0].compute_capability == "9.0"


def cores() -> int:
    """Multiprocessors of a GPU here."""
    return jax.devices()[0].core_count


def takes(rows: int, *sizes: int) -> bool:
    """Whether so many rows of these sizes are multiplied here."""
    return rows >= ROWS and all(k % BLOCK == 0 for k in sizes)


def tiling(rows: int, k: int, n: int, *, gated: bool = False, most_splits: int = SPLITS) -> Tiling:
    """The tiling that should take the least time for h [rows, k] @ w.T, w [n, k]. All programs together make as many
    tiles at once as there are multiprocessors; a tile takes its blocks' time and what passes before and after."""
    paces = GATED_PACE if gated else PACE

    def seconds(columns: int, splits: int) -> float:
        tiles = pl.cdiv(rows, ROWS) * pl.cdiv(n, columns) * splits
        blocks = pl.cdiv(pl.cdiv(k, BLOCK), splits)
        parts = 8 * rows * n * splits / PARTS_PACE if splits > 1 else 0  # written and read in float32
        edge = columns * EDGE if gated else 0
        return pl.cdiv(tiles, cores()) * (blocks * paces[columns] + START) + edge + parts

    splits = range(1, 2 if gated else 1 + min(most_splits, k // BLOCK))
    columns, splits = min(((c, s) for c in paces for s in splits), key=lambda x: seconds(*x))
    # Sharing costs narrow tiles more than it brings them.
    return Tiling(columns, 2 if columns > 128 and pl.cdiv(rows, ROWS) % 2 == 0 else 1, splits)


def dot(h, w, used=None, *, most_splits: int = SPLITS):
    """h @ w.T. h: [rows, k] bfloat16; w: [n, k] → [splits, rows, n], to be added; float32 if there are several, else
    bfloat16. used: [] int32, how many rows are needed, by default all: what the others hold in the end is undefined."""
    return multiply(h, w, used, tiling=tiling(*h.shape, len(w), most_splits=most_splits), cores=cores())


def gated_dot(h, w, used=None):
    """swiglu of h @ w.T, w's rows being first the gate's and then up's. h: [rows, k] bfloat16; w: [2 f, k] → [rows, f]
    bfloat16. used: as in `dot`."""
    return multiply(h, w, used, gated=True, tiling=tiling(*h.shape, len(w), gated=True), cores=cores())[0]


@partial(jax.jit, static_argnames=("gated", "tiling", "cores", "interpret"))
def multiply(h, w, used=None, *, gated: bool = False, tiling: Tiling, cores: int, interpret=False):
    """What `dot` returns, in one way of several; gated: [1, rows, f], as `gated_dot`. cores: of the chip."""
    w = w.reshape(2 if gated else 1, -1, w.shape[1])
    dtype = h.dtype if tiling.splits == 1 else jnp.float32
    out = jax.ShapeDtypeStruct((tiling.splits, len(h), w.shape[1]), dtype)
    return _run(h, w, used, [out], tiling, cores, interpret)[0]


@partial(jax.jit, static_argnames=("temperature", "tiling", "cores", "interpret"))
def scores(h, table, used=None, *, temperature: float, tiling: Tiling, cores: int, interpret=False):
    """Logits h @ table.T; of each GROUP of a row's the largest; and the sum of exponentials of how far each lies from
    it, over the temperature. h: [rows, k] bfloat16; table: [vocab, k] → float32 [rows, vocab], and twice [rows, vocab /
    GROUP]. used: as in `dot`."""
    (rows, _), vocab, columns = h.shape, len(table), tiling.columns
    if vocab % GROUP or columns % GROUP:
        raise ValueError(f"{vocab} tokens in tiles of {columns}: not for groups of {GROUP}")
    high = ROWS * tiling.cluster  # statistics are written of whole tiles, also where these end beyond the logits
    stats = jax.ShapeDtypeStruct((pl.cdiv(vocab, columns) * columns // GROUP, pl.cdiv(rows, high) * high), jnp.float32)
    out = [jax.ShapeDtypeStruct((1, rows, vocab), jnp.float32), stats, stats]
    logits, *stats = _run(h, table[None], used, out, tiling, cores, interpret, temperature)
    return logits[0], *(x[: vocab // GROUP, :rows].T for x in stats)


def _run(h, w, used, out, t: Tiling, cores: int, interpret, temperature=None):
    """The kernel's results, which are like `out`. w: [pieces, n, k]: gate and up, if there are two; temperature: where
    statistics are asked for."""
    gated = len(w) > 1
    used = jnp.full(1, len(h) if used is None else used, jnp.int32)
    return mgpu.kernel(
        partial(_kernel, gated=gated, temperature=temperature, t=t),
        out_type=out,
        scratch_types=_plan(h, w, out[0].dtype, t),
        grid=(cores // t.cluster,),
        grid_names=("group",),
        cluster=(t.cluster,),
        cluster_names=("cluster",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=mgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=interpret,
        kernel_name="gated_dot" if gated else "dot_of_many_rows" if temperature is None else "scores",
    )(h, w, used)


def _plan(h, w, dtype, t: Tiling):
    """What warpgroups share. dtype: of the product."""
    (rows, k), (pieces, n, _), gated = h.shape, w.shape, len(w) > 1
    if rows < ROWS or k % BLOCK:
        raise ValueError(f"[{rows}, {k}] @ [{k}, {n}]: not for tiles of {ROWS} rows and blocks of {BLOCK}")
    if gated and t.splits > 1:
        raise ValueError("swiglu needs whole sums")
    width = t.columns // pieces
    chunk = GATED_CHUNK if gated else math.gcd(width, CHUNK // dtype.itemsize)
    held = 1 if gated else 2  # chunks of a warpgroup that are on their way
    taken = held * ROWS * chunk * dtype.itemsize
    stages = min(8, (SHARED - taken) // (2 * BLOCK * (ROWS + t.columns)))
    barrier = partial(mgpu.ClusterBarrier, collective_axes=("cluster",)) if t.cluster > 1 else mgpu.Barrier
    results = (2, held, ROWS // 2, chunk)
    return {
        "h_blocks": _shared((stages, ROWS, BLOCK), h.dtype),
        "w_blocks": _shared((stages, pieces, width, BLOCK), h.dtype),
        "results": mgpu.SMEM(results, dtype) if gated else _shared(results, dtype),
        "full": mgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "free": barrier(num_arrivals=2, num_barriers=stages),
    }


def _shared(shape, dtype):
    """Shared memory, its rows swizzled."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = mgpu.find_swizzle(8 * itemsize * shape[-1])
    transforms = mgpu.TilingTransform((8, swizzle // itemsize)), mgpu.SwizzleTransform(swizzle)
    return mgpu.SMEM(shape, dtype, transforms=transforms)


def _kernel(h, w, used, out, *stats, h_blocks, w_blocks, results, full, free, gated: bool, temperature, t: Tiling):
    k, (splits, _, n) = h.shape[1], out.shape
    (stages, pieces, width, _), (_, held, high, chunk) = w_blocks.shape, results.shape
    starts = [min(i, width - chunk) for i in range(0, width, chunk)]  # of what is written of a row, at a time
    tall, wide = lax.div(used[0] + (ROWS * t.cluster - 1), ROWS * t.cluster), pl.cdiv(n, width)
    blocks, left = divmod(k // BLOCK, splits)  # of a tile: the first `left` parts of k take one more
    # All indices are found here: what simulates kernels in jax 0.10 fails where they are asked for in branches.
    warpgroup, member = lax.axis_index("warpgroup"), lax.axis_index("cluster")
    group, groups = lax.axis_index("group"), lax.axis_size("group")
    mine = lax.div(tall * wide * splits - group + groups - 1, groups)

    def place(i):
        """(first row, first column, part of k, its first block, its number of blocks) of this program's i-th tile. Rows
        change first, so that what is read of the weights is still at hand."""
        tile = group + i * groups
        column, part = lax.rem(lax.div(tile, tall), wide), lax.div(tile, tall * wide)
        row = (lax.rem(tile, tall) * t.cluster + member) * ROWS
        count = blocks + (part < left).astype(jnp.int32) if left else blocks
        first = part * blocks + (jnp.minimum(part, left) if left else 0)
        return row, column * width, part, first, count

    @pl.when(warpgroup == COPIER)
    def copy():
        mgpu.set_max_registers(40, action="decrease")

        def tile(i, at):
            row, column, _, first, count = place(i)

            def block(j, at):
                slot = lax.rem(at, stages)

                @pl.when(at >= stages)
                def _():
                    mgpu.barrier_wait(free.at[slot])

                ks = pl.ds((first + j) * BLOCK, BLOCK)
                mgpu.copy_gmem_to_smem(h.at[pl.ds(row, ROWS), ks], h_blocks.at[slot], full.at[slot])
                mgpu.copy_gmem_to_smem(
                    w.at[:, pl.ds(column, width), ks],
                    w_blocks.at[slot],
                    full.at[slot],
                    collective_axes="cluster" if t.cluster > 1 else None,
                )
                return at + 1

            return lax.fori_loop(0, count, block, at)

        at = lax.fori_loop(0, mine, tile, jnp.int32(0))

        # Another multiprocessor must not write into this one's memory, or arrive here, once it has ended.
        def wait(i, _):
            mgpu.barrier_wait(free.at[lax.rem(i, stages)])

        lax.fori_loop(jnp.maximum(at - stages, 0), at, wait, None)

    @pl.when(warpgroup != COPIER)
    def multiply():
        mgpu.set_max_registers(232, action="increase")
        above = warpgroup * high

        def release(at):
            mgpu.barrier_arrive(free.at[lax.rem(at + stages - 1, stages)])

        def tile(i, at):
            row, column, part, _, count = place(i)

            def sums(*totals):
                def block(j, at):
                    slot = lax.rem(at, stages)
                    mgpu.barrier_wait(full.at[slot])
                    for piece, total in enumerate(totals):
                        columns = mgpu.transpose_ref(w_blocks.at[slot, piece], (1, 0))
                        mgpu.wgmma(total, h_blocks.at[slot, pl.ds(above, high)], columns)
                    mgpu.wgmma_wait(pieces)  # all but those of this block have ended

                    @pl.when(j > 0)
                    def _():
                        release(at)

                    return at + 1

                lax.fori_loop(0, count, block, at)
                return [total[...] for total in totals]

            found = pl.run_scoped(sums, *[mgpu.ACC((high, width), jnp.float32)] * pieces)
            at = at + count
            release(at)
            found = [x.astype(out.dtype) for x in found]
            found = swiglu(*found) if gated else found[0]
            for i, start in enumerate(starts):
                if stats and start % GROUP == 0:  # found while the chunks before are written
                    group = _statistics(found[:, start : start + GROUP], temperature)
                    for ref, value in zip(stats, group, strict=True):
                        ref[lax.div(column + start, GROUP), pl.ds(row + above, high)] = value
                mgpu.wait_smem_to_gmem(held - 1, wait_read_only=True)
                results[warpgroup, i % held] = found[:, start : start + chunk]
                mgpu.commit_smem()
                to = out.at[part, pl.ds(row + above, high), pl.ds(column + start, chunk)]
                mgpu.copy_smem_to_gmem(results.at[warpgroup, i % held], to)
            return at

        lax.fori_loop(0, mine, tile, jnp.int32(0))
        mgpu.wait_smem_to_gmem(0)


def _statistics(x, temperature: float):
    """The largest of each row, and the sum of exponentials relative to it. x: [rows, columns]"""
    most = jnp.max(x, axis=1)
    scale = math.log2(math.e) / temperature
    relative = x * scale - lax.broadcast_in_dim(most * scale, x.shape, [0])
    return most, jnp.sum(jnp.exp2(relative), axis=1)
