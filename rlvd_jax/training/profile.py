"""Traces of some steps of a training for TensorBoard's profile tab (the setting `profile`)."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import jax
from tqdm import tqdm

from rlvd_jax import hosts


class Profile:
    """While the context is open, those of `steps` that are made in `step(number)` are traced, into one trace under
    `directory`; None: none is. Of several processes the first traces its own devices."""

    def __init__(self, steps: range | None, directory: str | Path):
        self.steps, self.directory = steps, directory
        self._since: int | None = None
        self._last = 0

    def __enter__(self) -> Profile:
        return self

    @contextmanager
    def step(self, number: int):
        """What is done in the context is step `number`; → whether it is traced."""
        if self.steps and number in self.steps and self._since is None and hosts.first():
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every Python call would drown what is looked for
            jax.profiler.start_trace(self.directory, profiler_options=options)
            self._since = number
        self._last = number
        with jax.profiler.StepTraceAnnotation("step", step_num=number):
            yield self._since is not None
        if self._since is not None and number + 1 not in self.steps:
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        tqdm.write(f"      profile of steps {self._since} to {self._last}: {self.directory}/plugins/profile")
        self._since = None

    def __exit__(self, *_) -> None:
        if self._since is not None:
            self._stop()
