"""Worker processes for tasks that may hang, crash or eat all memory, each at its own cost only.

One thread for each worker hands it a batch of tasks and reads its messages. A worker that dies costs the task it was
at; the rest of its batch goes back to the queue and a new worker takes over. Workers are plain subprocesses: no fork
of a process with running threads, nothing of the caller's main module run again.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

from rlvd_jax.errors import UserError

TIMED_OUT = "timed out"  # a worker's message in place of a task's: the task it was at passed its deadline
MEMORY = 2 << 30  # bytes of address space for one worker; it needs 60 MB
_RETIRE = 512 << 20  # bytes of growth after which its working process is replaced between batches
_BATCH = 64  # tasks handed over at once, if together they have no more than _BATCH_CHARACTERS
_BATCH_CHARACTERS = 1 << 20
_START = 120  # seconds for a worker's imports, which take 0.4 s on an idle machine
_WALL = 20  # deadlines of wall clock after which a silent worker, which got too little processor time, is given up


class Task(Protocol):
    request: tuple  # kind and arguments for the worker
    characters: int
    alone: bool  # in a batch of its own

    def settled(self) -> bool:
        """Whether the task needs no worker any more."""

    def receive(self, message: tuple, last: bool) -> None:
        """A message from the worker, the last one or not."""

    def lost(self, timeout: bool) -> bool:
        """The deadline passed at this task, or else the worker died; True: try it again with another worker."""

    def fail(self, error: BaseException) -> None:
        """The task will never be done."""


class Worker:
    """One worker (see `worker.py`) and the pipes to it."""

    def __init__(self, deadline: float):
        root = str(Path(__file__).parents[2])
        path = [root, *(p for p in sys.path if p and p != root)]  # what is found here is found there
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "rlvd_jax.grading.worker", str(deadline), str(MEMORY), str(_RETIRE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # The order of sets, and with it what sympy tries first, must not differ from worker to worker.
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "PYTHONHASHSEED": "0"},
            start_new_session=True,  # Ctrl-C in the terminal is the parent's to handle
        )
        self._tasks = Connection(os.dup(self._process.stdin.fileno()), readable=False)
        self._messages = Connection(os.dup(self._process.stdout.fileno()), writable=False)
        self._process.stdin.close()
        self._process.stdout.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def start_error(self) -> str | None:
        """Wait until the worker is ready; None, or the last line it wrote before it died."""
        try:
            self.receive(_START)
            return None
        except TimeoutError:
            return f"not ready within {_START} s"
        except (EOFError, OSError):
            lines = self._process.stderr.read().decode(errors="replace").strip().splitlines()
            return lines[-1] if lines else f"exit status {self._process.wait()}"

    def alive(self) -> bool:
        return self._process.poll() is None

    def send(self, requests: list[tuple]) -> None:
        self._tasks.send(requests)

    def receive(self, seconds: float):
        """The next message. Raises EOFError or OSError if the worker is dead, or silent for so long."""
        if not self._messages.poll(seconds):
            raise TimeoutError
        return self._messages.recv()

    def kill(self) -> None:
        """End both its processes; safe from any thread."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it ended just now
            if self.alive():
                os.killpg(self.pid, signal.SIGKILL)

    def stop(self) -> None:
        """End it and close the pipes, which also ends what `kill` may have missed."""
        self.kill()
        self._process.wait()
        for pipe in (self._tasks, self._messages, self._process.stderr):
            pipe.close()


class Pool:
    """Runs tasks in up to `workers` processes, started as they are needed; `deadline` is that of `worker.main`."""

    def __init__(self, workers: int, deadline: float):
        self._deadline = deadline
        self._queue: deque[Task] = deque()
        self._wake = threading.Condition()
        self._workers: set[Worker] = set()
        self._error: BaseException | None = None
        self._threads = [threading.Thread(target=self._serve, name="grading", daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, tasks: Iterable[Task]) -> None:
        with self._wake:
            if self._error:
                raise self._error
            self._queue.extend(tasks)
            # A few tasks are done sooner by a few workers than by many that must be started first.
            self._wake.notify(-(-len(self._queue) // 4))

    def close(self, error: BaseException | None = None) -> None:
        """End all workers; tasks not done yet fail with `error`."""
        with self._wake:
            self._error = self._error or error or RuntimeError("the grader is closed")
            left = list(self._queue)
            self._queue.clear()
            for worker in self._workers:
                worker.kill()
            self._wake.notify_all()
        for task in left:
            task.fail(self._error)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _take(self) -> deque[Task]:
        """The next batch; empty when the pool is closed."""
        with self._wake:
            self._wake.wait_for(lambda: self._queue or self._error)
            batch, characters = deque(), 0
            size = min(_BATCH, max(1, len(self._queue) // (2 * len(self._threads))))
            while self._queue and len(batch) < size and not self._error:
                task = self._queue[0]
                if batch and (task.alone or characters + task.characters > _BATCH_CHARACTERS):
                    break
                batch.append(self._queue.popleft())
                characters += task.characters
                if task.alone:
                    break
            return batch

    def _start(self) -> Worker:
        error = None
        for attempt in range(3):  # a machine short of memory or processes may have them in a moment
            time.sleep(attempt)
            try:
                with self._wake:
                    if self._error:
                        raise self._error
                    worker = Worker(self._deadline)
                    self._workers.add(worker)
            except OSError as problem:
                error = problem
                continue
            error = worker.start_error()
            if error is None:
                return worker
            self._stop(worker)
        raise UserError(f"no grading worker can be started: {error}")

    def _stop(self, worker: Worker) -> None:
        with self._wake:
            self._workers.discard(worker)
        worker.stop()

    def _serve(self) -> None:
        worker, batch = None, deque()
        try:
            while not self._error:
                batch = deque(task for task in self._take() if not task.settled())
                if not batch:
                    continue
                if worker and not worker.alive():
                    self._stop(worker)
                    worker = None
                worker = worker or self._start()
                timeout = False
                try:
                    worker.send([task.request for task in batch])
                    while batch and not timeout:
                        message = worker.receive(_WALL * self._deadline)
                        timeout = message == TIMED_OUT
                        if not timeout:
                            last, values = message
                            batch[0].receive(values, last)
                            if last:
                                batch.popleft()
                except (EOFError, OSError):
                    self._stop(worker)
                    worker = None
                if batch and not batch[0].lost(timeout):
                    batch.popleft()
                with self._wake:
                    if not self._error:
                        self._queue.extendleft(reversed(batch))
                        self._wake.notify(len(batch))
                        batch.clear()
        except BaseException as error:  # whoever waits for a task must hear of it
            self.close(error)
        finally:
            for task in batch:
                task.fail(self._error)
            if worker:
                self._stop(worker)
