"""TPU slices that are not here: train steps are compiled for them by libtpu on any machine, to learn what they need.

No weights are made and no device is used: `jax.experimental.topologies` describes the slice, and the compiler says how
much memory a device needs.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from dataclasses import dataclass

import jax
import numpy as np

from rlvd_jax.chips import GENERATIONS, GIB
from rlvd_jax.errors import UserError
from rlvd_jax.training.step import Trainer

ALIASES = {"v5litepod": "v5e"}

# libtpu, on a machine without a TPU: several processes may use it at once, nothing is asked of a metadata server, and
# nothing is logged.
QUIET = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
}


@dataclass(frozen=True)
class Target:
    """A slice to compile for. `devices` can be put into a mesh and compiled for, nothing else."""

    name: str  # v5e:4x4
    devices: tuple
    memory: float  # bytes of each device

    @property
    def hosts(self) -> int:
        return len({d.process_index for d in self.devices})


def slice_shape(chips: int, sides: int) -> tuple[int, ...]:
    """The shape of the standard slice of so many chips: 2x2 (2x2x1), and for each doubling the shortest side doubled.

    Raises ValueError if no standard slice has as many.
    """
    if chips == 1 and sides == 2:
        return 1, 1
    shape = [2, 2, 1][:sides]
    while math.prod(shape) < chips:
        shape[shape.index(min(shape))] *= 2
        shape.sort()
    if math.prod(shape) != chips:
        raise ValueError(chips)
    return tuple(shape)


def parse(name: str) -> tuple[str, tuple[int, ...]]:
    """(generation, shape in chips) of a slice's name, `v5e:4x4` or `v5e-16`; UserError if it is none.

    As in the cloud's names, the number in v4-8, v5p-8 and tpu7x-8 counts cores, two a chip, and elsewhere chips.
    """
    match = re.fullmatch(r"([a-z0-9]+)(?::(\d+(?:x\d+)+)|-(\d+))", name.strip().lower())
    kind = ALIASES.get(match[1], match[1]) if match else None
    example = "name a slice like v5e:4x4, v5e-16, v5p-8 or v6e-8"
    if kind not in GENERATIONS:
        raise UserError(f"--target {name}: not a TPU slice that is known here ({', '.join(GENERATIONS)}); {example}")
    generation = GENERATIONS[kind]
    if match[2]:
        shape = tuple(map(int, match[2].split("x")))
        if len(shape) != generation.sides or 0 in shape:
            raise UserError(f"--target {name}: a {kind} slice has {generation.sides} sides; {example}")
        return kind, shape
    try:
        chips, rest = divmod(int(match[3]), generation.cores)
        if rest or not chips:
            raise ValueError(name)
        return kind, slice_shape(chips, generation.sides)
    except ValueError:
        raise UserError(f"--target {name}: there is no {kind} slice of that size; {example}") from None


def find(name: str) -> Target:
    """The slice of that name; UserError if there is none or libtpu is missing."""
    kind, shape = parse(name)
    if importlib.util.find_spec("libtpu") is None and not os.environ.get("TPU_LIBRARY_PATH"):
        raise UserError("--target compiles with libtpu, which is not installed: pip install 'jax[tpu]'")
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    title = f"{kind}:{'x'.join(map(str, shape))}"
    options = dict(GENERATIONS[kind].options)
    if math.prod(shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=title, **options)
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        raise UserError(f"--target {name}: there is no such slice ({str(error).splitlines()[0]})") from None
    return Target(title, tuple(topology.devices), GENERATIONS[kind].memory * GIB)


def compile_update(trainer: Trainer, batch: dict[str, np.ndarray], quick: bool = False) -> jax.stages.Compiled:
    """`trainer.update` compiled for the devices of the trainer's mesh and batches like this one (batches.py).

    quick: optimise less, in a third of the time; memory is then a little less (6% in what was measured).
    Raises JaxRuntimeError if memory is short; `peak_memory` understands it.
    """

    def abstract(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=trainer.split if x.ndim else trainer.whole)

    lowered = trainer.update.lower(trainer.abstract_state, {name: abstract(x) for name, x in batch.items()})
    return lowered.compile({"optimization_level": 9} if quick else None)  # XLA's number for its lowest level, O0


def peak_memory(trainer: Trainer, batch: dict[str, np.ndarray]) -> tuple[float, bool]:
    """(bytes an update needs on a device at least, whether they are there), the optimiser's state included."""
    try:
        return compile_update(trainer, batch).memory_analysis().peak_memory_in_bytes, True
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"RESOURCE_EXHAUSTED.*?([\d.]+)([KMG])\b", str(error), re.DOTALL)
        if not needed:
            raise
        return float(needed[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[needed[2]], False
