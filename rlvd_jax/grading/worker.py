"""A grading worker: `python -m rlvd_jax.grading.worker DEADLINE MEMORY RETIRE`, tasks on stdin, messages on stdout.

A process of its own because only killing it stops math-verify inside a huge power or a regular expression. The kernel
does so: a profiling timer ends it once a step has used DEADLINE seconds of processor time, however busy the machine is,
also when the parent is gone. MEMORY bounds its address space in bytes.

It is two processes: one that imports and warms everything and then only forks, and its child, which does the work. A
child that passed its deadline is followed by a new one in milliseconds, and the parent is told (`TIMED_OUT`); so is one
that has grown by RETIRE bytes, because math-verify's caches only grow. If the child dies of anything else, who knows
what is left in the pipes: then all of the worker ends.
"""

import contextlib
import logging
import os
import resource
import signal
import sys
import warnings
from multiprocessing.connection import Connection
from pathlib import Path

from rlvd_jax.grading.pool import TIMED_OUT

_RETIRED = 3  # exit status


def main(deadline: float, memory: int, retire: int) -> None:
    # The pipes to the parent get numbers of their own, so that nothing printed here mixes into them.
    tasks = Connection(os.dup(0), writable=False)
    messages = Connection(os.dup(1), readable=False)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # inherited from the parent, like what it ignores
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")

    from rlvd_jax.grading import judge

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # not every system has this limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    # Loads what sympy loads late and acquaints ANTLR with the grammar, which no response's deadline should pay for.
    for _ in judge.group([r"\frac{1}{2}x+\sqrt{3}", "x^2 = 3.5", "(1,2)", r"\{1, 2\}"], [], set(), set(), 60.0):
        pass
    messages.send("ready")
    os.dup2(null, 2)  # until here stderr tells the parent why a worker doesn't start
    while True:
        child = os.fork()
        if child == 0:
            serve({"judge": judge.judge, "group": judge.group}, tasks, messages, deadline, retire)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
            messages.send(TIMED_OUT)
        elif not (os.WIFEXITED(status) and os.WEXITSTATUS(status) == _RETIRED):
            return


def serve(work: dict, tasks: Connection, messages: Connection, deadline: float, retire: int) -> None:
    """Do batches of tasks until the parent is done, or gone. Never returns."""
    try:
        limit = size() + retire
        while size() < limit:
            for kind, *arguments in tasks.recv():
                signal.setitimer(signal.ITIMER_PROF, deadline)
                for message in work[kind](*arguments):
                    signal.setitimer(signal.ITIMER_PROF, 0)  # a message is sent whole
                    messages.send(message)
                    signal.setitimer(signal.ITIMER_PROF, deadline)
            signal.setitimer(signal.ITIMER_PROF, 0)
        os._exit(_RETIRED)
    finally:
        os._exit(0)


def size() -> int:
    """Bytes of this process's address space."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0  # not Linux


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
