"""Whose the rows of a step are where slots have several new tokens: some of them guessed, of the last responses."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

TILE = 64  # rows that a program of attention works on, at most: a query head of one token each


class Rows(NamedTuple):
    """Whose the rows of a step are, where a slot may have several: its new tokens one after the other, slot by slot. An
    idle slot has none."""

    slot: jax.Array  # [rows] int32
    nth: jax.Array  # [rows] int32, of its slot's
    there: jax.Array  # [rows] bool: the last ones may be nobody's
    tile: jax.Array  # [tiles, 2] int32: the first row, and how many, of each program of attention


def shares(live, room, count: int):
    """How many of a step's `count` rows each slot has, [slots] int32: live ones as many, give or take one, but no more
    than they have room for."""
    number = jnp.maximum(live.sum(dtype=jnp.int32), 1)
    more = jnp.cumsum(live, dtype=jnp.int32) <= count % number
    return jnp.where(live, jnp.minimum(count // number + more, room), 0)


def share_out(share, rows: int, group: int) -> Rows:
    """`rows` of a step for slots of which each has its share, [slots] int32, where no live one's is greater than if all
    live ones had as many, rounded up. group: query heads of a key head."""
    slots, tile = share.size, tile_rows(rows, share.size, group)
    tiles = max(live * _up(_up(rows, live), tile) for live in range(1, slots + 1))

    def places(each, count: int):
        """(whose, the how many-th of these, whether it is anyone's) of `count` things, of which each slot has some."""
        ends, at = jnp.cumsum(each), jnp.arange(count, dtype=jnp.int32)
        slot = jnp.minimum((at[:, None] >= ends).sum(axis=1, dtype=jnp.int32), slots - 1)
        there = at < ends[-1]
        return slot, jnp.where(there, at - (ends - each)[slot], 0), there

    slot, nth, there = places(share, rows)
    of, part, used = places(_up(share, tile), tiles)
    first = (jnp.cumsum(share) - share)[of] + part * tile
    return Rows(slot, nth, there, jnp.stack([first, jnp.where(used, jnp.minimum(share[of] - part * tile, tile), 0)], 1))


def tile_rows(rows: int, slots: int, group: int) -> int:
    """How many rows of a slot share a program: as many as the registers have room for, since what programs share they
    read again, and no more than slots have, give or take."""
    return min(2 ** ((TILE // group).bit_length() - 1), max(2, 2 * rows // slots))


def _up(a, b):
    """a / b, rounded up."""
    return -(-a // b)
