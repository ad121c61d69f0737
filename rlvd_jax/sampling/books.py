"""The host's books of a device group: who is in which slot, with which pages of the cache, and who waits."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

RESERVE = 16  # one page in so many is left at first to the responses in flight


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a device group holds at a time."""

    slots: int
    length: int
    """Positions that the longest response takes, its prompt included."""
    pages: int
    """In the pool; 0: each slot has its own room (`cache.py`)."""


class Pool:
    """Pages that are free, the last given back first."""

    def __init__(self, count: int):
        self._free, self.left = np.arange(count, dtype=np.int32)[::-1].copy(), count

    def take(self, count: int) -> np.ndarray:
        """int32 [count]; there must be as many."""
        assert count <= self.left, "more pages taken than there are"
        self.left -= count
        return self._free[self.left : self.left + count].copy()

    def give(self, pages: np.ndarray) -> None:
        self._free[self.left : self.left + len(pages)] = pages
        self.left += len(pages)

    @property
    def free(self) -> np.ndarray:
        return self._free[: self.left]


@dataclasses.dataclass
class Shared:
    """The whole pages of a prompt, which all its samples on the group read."""

    pages: np.ndarray
    running: int = 0  # samples in flight


class Group:
    """Books of one group; `size`: positions of a page, `width`: pages that the longest response takes."""

    def __init__(self, plan: Plan, size: int, width: int):
        n = plan.slots
        self.size, self.paged, self.pages = size, plan.pages > 0, plan.pages
        self.occupant = np.full((n, 2), -1, np.int64)  # request, index of the sample
        self.cached = np.zeros(n, np.int64)  # tokens of the prompt that were prefilled
        self.limit = np.zeros(n, np.int64)
        self.produced = np.zeros(n, np.int64)
        self.held = np.zeros(n, np.int64)  # pages in the slot's row of the table
        self.table = np.zeros((n, width), np.int32)
        self.pool = Pool(plan.pages)
        self.reserve = self.least = plan.pages // RESERVE  # pages that new responses leave to those in flight
        self.waiting: collections.deque[tuple[int, Sequence[int]]] = collections.deque()  # request, samples
        self.row_of: dict[int, int] = {}  # of a request's prompt among those prefilled last
        self.shared: dict[int, Shared] = {}

    @property
    def live(self) -> np.ndarray:
        return self.occupant[:, 0] >= 0

    def keep(self, rows: np.ndarray, n: int) -> None:
        """Only these slots, and as many unused ones as make n."""
        rows = np.concatenate([rows, np.flatnonzero(~self.live)[: n - len(rows)]])
        for name in ("occupant", "cached", "limit", "produced", "held", "table"):
            setattr(self, name, getattr(self, name)[rows])

    def share(self, request: int, cached: int, alone: bool) -> np.ndarray | None:
        """The prompt's whole pages if they are new, to be filled; None where there is no room for them. alone: nothing
        is in flight, so nothing needs a reserve."""
        if request in self.shared:
            return np.zeros(0, np.int32)
        count = cached // self.size
        if self.pool.left - count < (0 if alone else self.reserve):
            return None
        self.shared[request] = Shared(self.pool.take(count))
        return self.shared[request].pages

    def has_room(self, cached: int, ahead: int) -> bool:
        """Whether there are pages for one more response and its next `ahead` tokens."""
        need = -(-(cached + ahead) // self.size) - cached // self.size
        return self.pool.left - need >= self.reserve

    def begin(self, slot: int, request: int, index: int, cached: int, limit: int) -> int | None:
        """A response takes a slot; → the page, if any, that the rest of its prompt is to be copied to."""
        self.occupant[slot] = request, index
        self.cached[slot], self.limit[slot], self.produced[slot] = cached, limit, 0
        if not self.paged:
            return None
        shared = self.shared[request]
        shared.running += 1
        count = len(shared.pages)
        self.table[slot, :count] = shared.pages
        self.held[slot] = count
        if cached % self.size == 0:
            return None
        self.table[slot, count] = page = self.pool.take(1)[0]
        self.held[slot] += 1
        return int(page)

    def end(self, slot: int) -> None:
        """The slot is free, and its pages are; its prompt's with the last sample in flight, even where others wait:
        what waits must not keep pages from what goes on."""
        request = int(self.occupant[slot, 0])
        self.occupant[slot] = -1
        if not self.paged:
            return
        shared = self.shared[request]
        self.pool.give(self.table[slot, len(shared.pages) : self.held[slot]])
        self.held[slot] = 0
        shared.running -= 1
        if not shared.running:
            self.pool.give(self.shared.pop(request).pages)

    def grow(self, steps: int) -> tuple[int, list[int]]:
        """Give every response in flight pages for `steps` more tokens, or for fewer; → steps, and the slots of the
        youngest responses that had to be given up. They wait again."""
        given_up = []
        while True:
            live = np.flatnonzero(self.live)
            ends = self.cached[live] + np.minimum(self.produced[live] + steps, self.limit[live])
            need = (-(-ends // self.size) - self.held[live]).clip(0)
            if need.sum() <= self.pool.left:
                break
            if steps > self.size:
                steps //= 2
                continue
            youngest = int(live[np.argmin(self.produced[live])])
            request, index = (int(x) for x in self.occupant[youngest])
            self.waiting.append((request, range(index, index + 1)))
            self.end(youngest)
            given_up.append(youngest)
        if given_up:
            self.reserve = min(2 * self.reserve + 1, self.pages // 2)
        else:  # what was needed when all grew at once is not needed for ever
            self.reserve = max(self.least, self.reserve - self.reserve // 8 - 1)
        slot = np.repeat(live, need)
        nth = np.arange(len(slot)) - np.repeat(np.cumsum(need) - need, need)
        self.table[slot, self.held[slot] + nth] = self.pool.take(len(slot))
        self.held[live] += need
        return steps, given_up
