"""A grading worker: `python -m rlvd_jax.grading.worker DEADLINE MEMORY`, tasks in on stdin, messages out on stdout.

A process of its own because only killing it stops math-verify inside a huge power or a regular expression. It does so
itself: the kernel's profiling timer ends it once a step has used DEADLINE seconds of processor time, however busy the
machine is, and also when the parent is gone. MEMORY bounds its address space in bytes.
"""

import contextlib
import logging
import os
import resource
import signal
import sys
import warnings
from multiprocessing.connection import Connection


def main(deadline: float, memory: int) -> None:
    # The pipes to the parent get numbers of their own, so that nothing printed here mixes into them.
    tasks = Connection(os.dup(0), writable=False)
    messages = Connection(os.dup(1), readable=False)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # inherited from the parent, like what it ignores
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")

    from rlvd_jax.grading import judge

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # not every system has this limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    messages.send("ready")
    os.dup2(null, 2)  # until here stderr tells the parent why a worker doesn't start
    work = {"judge": judge.judge, "group": judge.group}
    while True:
        batch = tasks.recv()
        for kind, *arguments in batch:
            signal.setitimer(signal.ITIMER_PROF, deadline)
            for message in work[kind](*arguments):
                signal.setitimer(signal.ITIMER_PROF, 0)
                messages.send(message)
                signal.setitimer(signal.ITIMER_PROF, deadline)
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    try:
        main(float(sys.argv[1]), int(sys.argv[2]))
    except (EOFError, BrokenPipeError):
        os._exit(0)  # the parent is done, or gone
