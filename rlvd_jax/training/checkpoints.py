"""Checkpoints that a stopped run goes on from: asynchronous, and there whole or not at all (orbax)."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import absl.logging
import jax
import orbax.checkpoint as ocp
from flax import nnx
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from rlvd_jax.errors import UserError
from rlvd_jax.training.step import TrainState

NEWEST = 2


class _NewestAndBest(PreservationPolicy):
    best: int | None = None

    def should_preserve(self, checkpoints, *, context):
        newest = {c.step for c in sorted(checkpoints, key=lambda c: c.step)[-NEWEST:]}
        return [c.step in newest or c.step == self.best for c in checkpoints]


class Checkpoints:
    """The checkpoints of one training run: the newest two, and the best.

    A checkpoint is a step's weights, optimiser state and `meta`, JSON-able data with at least {"step": int} that holds
    whatever else the loop goes on from, its data position above all. settings: JSON-able settings of the run; a
    checkpoint of other settings is refused, never gone on from.
    """

    def __init__(self, directory: str | Path, settings: Mapping):
        self.directory, self.settings = Path(directory).absolute(), json.loads(json.dumps(settings))
        # Orbax logs the traceback of each background thread; all of it is raised too, and told in one sentence.
        absl.logging.set_verbosity(absl.logging.FATAL)
        self._policy = _NewestAndBest()
        with self._disk_errors():
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self._policy,
                    cleanup_tmp_directories=True,  # what a killed run was writing
                    enable_async_checkpointing=True,
                ),
                item_handlers={
                    "params": ocp.StandardCheckpointHandler(),
                    "optimizer": ocp.StandardCheckpointHandler(),
                    "meta": ocp.JsonCheckpointHandler(),
                },
            )

    def save(self, state: TrainState, meta: dict, best: int | None = None) -> None:
        """Save in the background; on return the state may be donated. best: the step to keep besides the newest.

        A step that is already saved is left as it is. Raises UserError if the disk is too full for it, or was for the
        save before.
        """
        step = meta["step"]
        if step in self._manager.all_steps():
            return
        self.wait()
        needed, free = sum(x.nbytes for x in jax.tree.leaves(state)), shutil.disk_usage(self.directory).free
        if free < needed:
            raise UserError(f"{self._full()} (it takes {needed / 2**20:,.1f} MiB, {free / 2**20:,.1f} MiB are free)")
        self._policy.best = best
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave({"optimizer": state.optimizer, "step": state.step}),
            meta=ocp.args.JsonSave(meta | {"settings": self.settings}),
        )
        with self._disk_errors():
            self._manager.save(step, args=items, force=True)

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint, if there is one."""
        return self._manager.latest_step()

    def restore(self, like: TrainState) -> tuple[TrainState, dict]:
        """The newest checkpoint's state, in the shapes, dtypes and shardings of `like` (abstract), and its meta.

        Raises UserError if it was made with other settings.
        """
        step = self.latest
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        self._check(meta.pop("settings"))
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(like.params),
            optimizer=ocp.args.StandardRestore({"optimizer": like.optimizer, "step": like.step}),
        )
        restored = self._manager.restore(step, args=items)
        return TrainState(restored["params"], **restored["optimizer"]), meta

    def params(self, step: int, like: nnx.State) -> nnx.State:
        """The weights of one step's checkpoint."""
        self.wait()
        args = ocp.args.Composite(params=ocp.args.StandardRestore(like))
        return self._manager.restore(step, args=args)["params"]

    def wait(self) -> None:
        """Return when everything saved is on disk; UserError if it is full."""
        with self._disk_errors():
            self._manager.wait_until_finished()

    def _check(self, saved: Mapping) -> None:
        for key in sorted(saved.keys() | self.settings.keys()):
            old, new = saved.get(key), self.settings.get(key)
            if old != new:
                raise UserError(
                    f"{self.directory}: these checkpoints were made with {key} = {old!r:.80}, now it is {new!r:.80}: "
                    "set it back, or remove the directory to train anew"
                )

    @contextmanager
    def _disk_errors(self):
        try:
            yield
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                full = True
            else:  # tensorstore's errors carry the system's words, but no number
                full = any(w in str(error) for w in ("No space left on device", "Disk quota exceeded"))
            if not full:
                raise
            raise UserError(self._full()) from None

    def _full(self) -> str:
        return (
            f"{self.directory}: the disk is too full for another checkpoint; make room, and the same command goes on "
            "from the last one"
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, *_) -> None:
        with suppress(Exception) if kind else self._disk_errors():
            self._manager.close()
