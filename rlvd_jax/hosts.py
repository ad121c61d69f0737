"""Several processes, one on each host, that do one study together.

Each samples and grades its share of the responses; all train as one program over the mesh of all their devices; the
first alone prints, and writes what is written once. `start` makes processes one job, `session` makes sure that they see
one folder. Whatever has to be called by all of them together says so. With one process nothing here does anything.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import os
import pickle
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from rlvd_jax.errors import UserError

T = TypeVar("T")
VARIABLES = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
SHUTDOWN = 60  # seconds that a process that ends waits for the others; then it is taken for broken, and ends them too
LOOK = 2.0  # seconds between looks at whether another process was told to stop
SEEN = 60  # seconds that a file of one host may take to be seen by another

_session: Path | None = None  # a file of the study's folder that is there until a process is told to stop
_looked = 0.0


def start(device: str) -> None:
    """Make this process part of a job of several, where it is; before anything else of JAX.

    On a TPU slice the hosts find each other. Elsewhere the environment says it: JAX_COORDINATOR_ADDRESS, host:port of
    the first process, JAX_NUM_PROCESSES and JAX_PROCESS_ID, from 0. With JAX_NUM_PROCESSES=1 there is no job.
    UserError if only a part of that is said.
    """
    import jax

    said = address, number, index = [os.environ.get(name, "") for name in VARIABLES]
    if jax.distributed.is_initialized() or number == "1":
        return
    if any(said):
        if not (number.isdecimal() and index.isdecimal() and int(index) < int(number) and ":" in address):
            raise UserError(
                f"{', '.join(VARIABLES)}: where one is set all have to be: host:port of the first process, the number "
                f"of processes, and this one's number, from 0; they are '{address}', '{number}', '{index}'"
            )
        # All of a host's devices belong to its process, whatever launched it.
        options = {"cluster_detection_method": "deactivate", "shutdown_timeout_seconds": SHUTDOWN}
        jax.distributed.initialize(address, int(number), int(index), **options)
    elif device in ("auto", "tpu") and _has_tpu():
        with contextlib.suppress(ValueError):  # a TPU that belongs to no slice
            jax.distributed.initialize(shutdown_timeout_seconds=SHUTDOWN)


def _has_tpu() -> bool:
    chips = itertools.chain(Path("/dev").glob("accel[0-9]*"), Path("/dev/vfio").glob("[0-9]*"))
    return any(chips) and importlib.util.find_spec("libtpu") is not None


def count() -> int:
    """Processes of the job."""
    import jax

    return jax.process_count()


def index() -> int:
    """This process among them, from 0."""
    import jax

    return jax.process_index()


def first() -> bool:
    """Whether this is the process that prints, and writes what is written once."""
    return index() == 0


# ---- shared out and put together ---------------------------------------------------------------------------------


def share(samples: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """This process's part of each question's samples: all are dealt round, so that the parts of all processes are as
    large as each other, and as hard."""
    turns = itertools.cycle(range(count()))
    return [tuple(s for s in some if next(turns) == index()) for some in samples]


def gather(value: T) -> list[T]:
    """The values of all processes, in their order; called by all together. Values are picklable, below 2 GiB."""
    if count() == 1:
        return [value]
    from jax.experimental.multihost_utils import process_allgather

    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = process_allgather(np.int32(len(data)))
    padded = np.zeros(1 << int(sizes.max() - 1).bit_length(), np.uint8)  # few sizes, so that few are compiled for
    padded[: len(data)] = data
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(process_allgather(padded), sizes, strict=True)]


def from_first(make: Callable[[], T]) -> T:
    """What `make()` gives in the first process, which alone calls it; called by all together. What it raises there is
    raised in all."""
    if count() == 1:
        return make()
    from jax.experimental.multihost_utils import broadcast_one_to_all

    data, error = b"", None
    if first():
        try:
            data = pickle.dumps((make(), None))
        except Exception as raised:
            error = raised
            told = (
                error if isinstance(error, (UserError, OSError)) else RuntimeError(f"in the first process: {error!r}")
            )
            data = pickle.dumps((None, told))
    size = int(broadcast_one_to_all(np.int32(len(data))))
    padded = np.zeros(1 << (size - 1).bit_length(), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    value, told = pickle.loads(np.asarray(broadcast_one_to_all(padded))[:size].tobytes())
    if error or told:
        raise error or told
    return value


def largest(number: int) -> int:
    """The largest of the processes' numbers; called by all together."""
    if count() == 1:
        return number
    from jax.experimental.multihost_utils import process_allgather

    return int(process_allgather(np.int32(number)).max())


def barrier(name: str) -> None:
    """Return when all processes are here."""
    if count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices(name)


# ---- arrays ------------------------------------------------------------------------------------------------------


@functools.cache
def _replicate(sharding, dtype):
    import jax

    return jax.jit(lambda x: x.astype(dtype), out_shardings=sharding)


def replicated(x, dtype):
    """An array on a mesh of all devices as a whole copy in `dtype` on each of them; called by all together."""
    from jax.sharding import NamedSharding, PartitionSpec

    return _replicate(NamedSharding(x.sharding.mesh, PartitionSpec()), np.dtype(dtype))(x)


def on_local_devices(params, dtype):
    """Weights on a mesh of all devices as weights in `dtype` that are whole on each device of this process, moved from
    device to device; called by all together. With one process they are left as they are."""
    if count() == 1:
        return params
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = jax.local_devices()
    here = NamedSharding(Mesh(np.array(devices), ("data",)), PartitionSpec())

    def move(x):
        copies = {shard.device: shard.data for shard in replicated(x, dtype).addressable_shards}
        return jax.make_array_from_single_device_arrays(x.shape, here, [copies[d] for d in devices])

    return jax.tree.map(move, params)


# ---- the study's folder ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def session(folder: Path, identity: str) -> Iterator[None]:
    """A run of one study by all processes, which enter together.

    UserError if they don't see one folder, or `identity`, which says what each of them was told to do, is not the same.
    """
    global _session
    if count() == 1:
        yield
        return
    of_all = gather(identity)
    if strange := [i for i, other in enumerate(of_all) if other != of_all[0]]:
        raise UserError(
            f"process {strange[0]} of {count()} was started with another config, problems or checkpoints than the "
            "first: start the same command on every host, with the same files"
        )

    def begin() -> str:
        for old in folder.glob(".session-*"):  # of runs that were killed
            old.unlink()
        path = folder / f".session-{secrets.token_hex(8)}"
        path.touch()
        return path.name

    path = folder / from_first(begin)
    until = time.monotonic() + SEEN
    while not (there := path.exists()) and time.monotonic() < until:
        time.sleep(1)
    if blind := [i for i, sees in enumerate(gather(there)) if not sees]:
        raise UserError(
            f"{folder}: process {blind[0]} of {count()} doesn't see what the first one writes there: set output to a "
            "folder on a file system that all hosts share"
        )
    _session = path
    try:
        yield
        barrier("end of the session")
    finally:
        _session = None
        if first():
            path.unlink(missing_ok=True)


def tell_stop() -> None:
    """Have the other processes know that this one was told to stop."""
    if _session:
        with contextlib.suppress(OSError):
            _session.unlink()


def stop_told() -> bool:
    """Whether another process said so; looked up every few seconds."""
    global _looked
    if not _session or time.monotonic() - _looked < LOOK:
        return False
    _looked = time.monotonic()
    try:
        open(_session).close()  # opened, since whether it is there may be remembered from before
    except OSError:
        return True
    return False
