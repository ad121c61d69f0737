"""TPUs by name: what a program may use of a device's memory."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Generation:
    """Of TPUs: what a program may use of a device's memory, and how slices are named."""

    kind: str  # as JAX names its devices
    memory: float  # GiB
    sides: int  # of a slice: 2 or 3
    cores: int = 1  # a chip counts as so many in names like v5p-8
    options: tuple = ()  # for get_topology_desc


# Memory as the compiler states it when a program needs more.
GENERATIONS = {
    "v4": Generation("TPU v4", 30.75, 3, 2, (("chip_config_name", "megacore"),)),
    "v5e": Generation("TPU v5 lite", 15.75, 2),
    "v5p": Generation("TPU v5", 95.74, 3, 2),
    "v6e": Generation("TPU v6 lite", 31.25, 2),
    "tpu7x": Generation("TPU7x", 94.75, 3, 2),
}


def tpu_memory(kind: str) -> float:
    """Bytes that a program may use of a TPU device, by JAX's name of it; 0 if it is not known here."""
    return next((GIB * g.memory for g in GENERATIONS.values() if g.kind == kind), 0.0)
