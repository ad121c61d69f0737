"""What a trace of `jax.profiler` says of the device's time."""

from __future__ import annotations

import collections
from pathlib import Path

import jax


def kernels(folder: str | Path) -> list[tuple[str, float, int]]:
    """(name, milliseconds, runs) of each kernel of the one trace in `folder`, the longest first; none on CPUs."""
    spent, count = collections.Counter(), collections.Counter()
    (file,) = Path(folder).rglob("*.xplane.pb")
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines if "GPU" in plane.name or "TPU" in plane.name else ():
            for event in line.events if "Stream" in line.name or "XLA Ops" in line.name else ():
                spent[event.name] += event.duration_ns
                count[event.name] += 1
    return [(name, ns / 1e6, count[name]) for name, ns in spent.most_common()]
