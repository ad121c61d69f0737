"""Programs compiled before they are needed, several at a time.

JAX compiles a program when it is first called, and so one after the other, while devices wait: of the sampler one for
each number of slots that the last responses move to. A program that was compiled by `lower` and `compile`, in whatever
thread, is what a later call of arrays of the same shapes and shardings runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor

import jax

WORKERS = 8  # at most; a compiler has threads of its own, too


class Ahead:
    """Compiles in threads. `programs`: of each name what compiles it, those that are needed first first."""

    def __init__(self, programs: dict[Hashable, Callable[[], object]]):
        self._futures: dict[Hashable, Future] = {}
        if programs:
            workers = max(1, min(WORKERS, (os.cpu_count() or 1) // 2))
            self._pool = ThreadPoolExecutor(workers, thread_name_prefix="compiler")
            self._futures = {name: self._pool.submit(compile) for name, compile in programs.items()}
            self._pool.shutdown(wait=False)  # its threads end with what they have to do

    def wait(self, name: Hashable) -> None:
        """Until it is compiled, or at once if that has not begun, so that the caller does it. Raises what compiling
        raised."""
        future = self._futures.pop(name, None)
        if future is not None and not future.cancel():
            future.result()

    def close(self) -> set[Hashable]:
        """Begin no more. → the names of what was not begun."""
        return {name for name, future in self._futures.items() if future.cancel()}


def like(arrays):
    """The shapes, dtypes and shardings of arrays, to compile for."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays)
