import os
import shutil
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_helpers as tiny

from rlvd_jax.config import OptimizerConfig
from rlvd_jax.errors import UserError
from rlvd_jax.training.checkpoints import Checkpoints
from rlvd_jax.training.step import get_trainer

SETTINGS = {"seed": 1, "grpo": {"betas": (0.9, 0.99)}}


@pytest.fixture(scope="module")
def trainer():
    return get_trainer(tiny.CONFIG, jnp.float32, tiny.mesh(), OptimizerConfig())


def state_at(trainer, step):
    """A state that is unlike any other step's, and its copy on the host."""
    state = trainer.init(tiny.params())
    rng = np.random.default_rng(step)
    state = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) if x.dtype == jnp.float32 else np.full(x.shape, step), x.dtype),
        state,
    )
    return jax.device_put(state, trainer.shardings)


def meta(step):
    return {"step": step, "data": {"next_index": 10 * step}, "evaluations": [{"accuracy": 0.1 + step}]}


def steps(directory):
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


def test_nothing_to_restore(tmp_path):
    with Checkpoints(tmp_path / "c", SETTINGS) as checkpoints:
        assert checkpoints.latest is None


def test_everything_is_restored_bit_for_bit(tmp_path, trainer):
    state = state_at(trainer, 3)
    with Checkpoints(tmp_path / "c", SETTINGS) as checkpoints:
        checkpoints.save(state, meta(3))
    with Checkpoints(tmp_path / "c", SETTINGS) as checkpoints:
        restored, restored_meta = checkpoints.restore(trainer.abstract_state)
    assert tiny.same(restored, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert [x.sharding for x in jax.tree.leaves(restored)] == [x.sharding for x in jax.tree.leaves(state)]
    assert restored_meta == meta(3)


def test_the_state_may_be_overwritten_while_it_is_being_saved(tmp_path, trainer):
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    with Checkpoints(tmp_path / "c", SETTINGS) as checkpoints:
        for step in range(1, 6):
            state = state_at(trainer, step)
            copy = jax.tree.map(np.array, state)
            checkpoints.save(state, meta(step))
            jax.block_until_ready(overwrite(state))
            checkpoints.wait()
            assert tiny.same(checkpoints.restore(trainer.abstract_state)[0], copy)


def test_the_newest_two_and_the_best_are_kept(tmp_path, trainer):
    with Checkpoints(tmp_path / "c", SETTINGS) as checkpoints:
        for step, best in ((0, 0), (5, 0), (10, 10), (15, 10), (20, 10), (25, 10)):
            checkpoints.save(state_at(trainer, step), meta(step), best)
        checkpoints.wait()
        assert steps(tmp_path / "c") == [10, 20, 25]
        best = checkpoints.params(10, trainer.abstract_state.params)
        assert tiny.same(best, state_at(trainer, 10).params)
        assert checkpoints.restore(trainer.abstract_state)[1]["step"] == 25


def test_a_step_is_saved_once(tmp_path, trainer):
    with Checkpoints(tmp_path / "c", SETTINGS) as checkpoints:
        checkpoints.save(state_at(trainer, 1), meta(1))
        checkpoints.save(state_at(trainer, 2), meta(1))
        checkpoints.wait()
        assert tiny.same(checkpoints.restore(trainer.abstract_state)[0], state_at(trainer, 1))


def test_a_half_written_checkpoint_is_ignored_and_removed(tmp_path, trainer):
    directory = tmp_path / "c"
    with Checkpoints(directory, SETTINGS) as checkpoints:
        checkpoints.save(state_at(trainer, 1), meta(1))
        checkpoints.save(state_at(trainer, 2), meta(2))
    # What orbax leaves when it is killed in the middle: a directory under a temporary name.
    os.rename(directory / "2", directory / "2.orbax-checkpoint-tmp")
    shutil.rmtree(directory / "2.orbax-checkpoint-tmp" / "optimizer")
    with Checkpoints(directory, SETTINGS) as checkpoints:
        state, found = checkpoints.restore(trainer.abstract_state)
        assert found["step"] == 1 and tiny.same(state, state_at(trainer, 1))
        checkpoints.save(state_at(trainer, 2), meta(2))
        checkpoints.wait()
        assert tiny.same(checkpoints.restore(trainer.abstract_state)[0], state_at(trainer, 2))
    assert sorted(p.name for p in directory.iterdir()) == ["1", "2"]


def test_other_settings_are_refused(tmp_path, trainer):
    with Checkpoints(tmp_path / "c", SETTINGS) as checkpoints:
        checkpoints.save(state_at(trainer, 1), meta(1))
    changed = pytest.raises(UserError, match=r"were made with seed = 1, now it is 2: set it back, or remove")
    with Checkpoints(tmp_path / "c", SETTINGS | {"seed": 2}) as checkpoints, changed:
        checkpoints.restore(trainer.abstract_state)


DISK = namedtuple("usage", "total used free")


def test_a_full_disk_is_told_in_one_sentence_and_costs_no_checkpoint(tmp_path, trainer, monkeypatch):
    with Checkpoints(tmp_path / "c", SETTINGS) as checkpoints:
        checkpoints.save(state_at(trainer, 1), meta(1))
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda _: DISK(10**9, 10**9, 1000))
            with pytest.raises(UserError, match="the disk is too full for another checkpoint; make room"):
                checkpoints.save(state_at(trainer, 2), meta(2))
        assert checkpoints.restore(trainer.abstract_state)[1] == meta(1)
        checkpoints.save(state_at(trainer, 2), meta(2))  # there is room again


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), ValueError("RESOURCE_EXHAUSTED: Failed writing: No space left on device")],
)
def test_a_disk_that_fills_up_meanwhile_is_told_too(tmp_path, trainer, monkeypatch, error):
    def fails(*_, **__):
        raise error

    with Checkpoints(tmp_path / "c", SETTINGS) as checkpoints, monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, "wait_until_finished", fails)
        with pytest.raises(UserError, match="too full for another checkpoint"):
            checkpoints.wait()
        patch.setattr(checkpoints._manager, "wait_until_finished", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            checkpoints.wait()
