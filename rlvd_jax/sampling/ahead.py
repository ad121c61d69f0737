"""Programs compiled before they are needed, several at a time.

JAX compiles a program when it is first called, and so one after the other, while devices wait: of the sampler one for
each number of slots that the last responses move to. A program that was compiled by `lower` and `compile`, in whatever
thread, is what a later call of arrays of the same shapes and shardings runs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax

WORKERS = 8  # at most; a compiler has threads of its own, too


class Ahead:
    """Compiles programs in threads, those that are needed first first. `programs`: of each name what lowers it, to one
    or several `jax.stages.Lowered`. That is Python's work, so one thread does it and the first is not kept waiting."""

    def __init__(self, programs: dict[Hashable, Callable[[], Sequence]] | None = None):
        self._asked: set[Hashable] = set()  # whatever has begun, and what was left to who needs it
        self._lowering: dict[Hashable, Future] = {}
        self._compiling: dict[Hashable, Future] = {}
        self.begin(programs or {})

    def begin(self, programs: dict[Hashable, Callable[[], Sequence]]) -> None:
        """Those of them that were not asked for before."""
        new = {name: lower for name, lower in programs.items() if name not in self._asked}
        self._asked.update(new)
        self._lowering.update({name: Future() for name in new})
        if new:
            workers = max(1, min(WORKERS, (os.cpu_count() or 1) // 2))
            pool = ThreadPoolExecutor(workers, thread_name_prefix="compiler")
            todo = [(name, lower, self._lowering[name]) for name, lower in new.items()]
            threading.Thread(target=self._lower, args=(todo, pool), name="lowering", daemon=True).start()

    def _lower(self, todo, pool) -> None:
        for name, lower, done in todo:
            if not done.set_running_or_notify_cancel():
                continue
            try:
                self._compiling[name] = pool.submit(lambda some: [x.compile() for x in some], lower())
                done.set_result(None)
            except BaseException as error:  # for whoever waits
                done.set_exception(error)
        pool.shutdown(wait=False)  # its threads end with what they have to do

    def wait(self, name: Hashable) -> None:
        """Until it is compiled, or at once if that has not begun, so that the caller does it. Raises what lowering or
        compiling raised."""
        lowering = self._lowering.pop(name, None)
        if lowering is not None and not lowering.cancel():
            lowering.result()
            compiling = self._compiling.pop(name)
            if not compiling.cancel():
                compiling.result()

    def ready(self, name: Hashable) -> bool:
        """Whether `wait` returns at once, or raises, with nothing left to compile."""
        lowering = self._lowering.get(name)
        if lowering is None:
            return True
        ended = lambda future: future.done() and not future.cancelled()  # noqa: E731
        return ended(lowering) and (lowering.exception() is not None or ended(self._compiling[name]))

    def finish(self, names: Iterable[Hashable]) -> None:
        """Until all of these are compiled, or have failed to be, which matters to those that are needed."""
        for name in names:
            if name in self._lowering and self._lowering[name].exception() is None:
                self._compiling[name].exception()

    def close(self) -> None:
        """Begin no more, whoever waits. What was not begun may be asked for again."""
        for pending in (self._lowering, self._compiling):
            self._asked -= {name for name, future in list(pending.items()) if future.cancel()}


def like(arrays):
    """The shapes, dtypes and shardings of arrays, to compile for."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays)
