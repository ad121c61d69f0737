import json
import os
import subprocess
import sys

import numpy as np
import pytest
import training_helpers as tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlvd_jax.errors import UserError
from rlvd_jax.training import sft
from rlvd_jax.training.batches import Example

STEPS = 2 * 5  # 18 examples, 4 at a time, the last 2 by themselves


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(weights, what happened, directory) of a run that nothing disturbed."""
    directory = tmp_path_factory.mktemp("whole")
    return *tiny.run_sft(directory), directory


def encode(text):
    return [ord(c) - 90 for c in text]


def test_examples_end_with_the_end_token_unless_cut_off():
    made, left_out = sft.make_examples(
        [
            ((2, 3), "ab", "end"),
            ((4,), "cde", "length"),
            ((5,), "f" * 9, "end"),
            ((6,), "f" * 8, "end"),
            ((7,), "", "length"),
        ],
        encode,
        tiny.END,
        10,
    )
    assert [(e.prompt, e.response.tolist()) for e in made] == [
        ((2, 3), [7, 8, 1]),
        ((4,), [9, 10, 11]),
        ((6,), [12] * 8 + [1]),
    ]
    assert left_out == 2, "one has 11 tokens, one nothing to learn"


def test_steps_and_what_happened(whole):
    _, done, directory = whole
    assert done["step"] == STEPS and json.loads(json.dumps(done)) == done
    events = EventAccumulator(str(directory / "events"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [3, 6, 9, 10], "every 10 steps, and at checkpoints"
    assert events.Scalars("train/epoch")[-1].value == 2
    assert {"train/loss", "train/grad_norm", "train/entropy", "train/learning_rate", "time/tokens_per_second"} <= set(
        events.Tags()["scalars"]
    )


def test_a_profile_that_the_training_ends_before(tmp_path, capsys):
    config = tiny.sft_config(epochs=1, checkpoint_every=100)
    tiny.run_sft(tmp_path, config=config, profile=range(4, 40))
    assert capsys.readouterr().out.strip() == f"profile of steps 4 to 5: {tmp_path}/events/plugins/profile"
    assert len(list((tmp_path / "events/plugins/profile").glob("*/*.xplane.pb"))) == 1


@pytest.mark.parametrize("asked, rows", [(None, 2), (3, 3)])
def test_rows_at_once(tmp_path, monkeypatch, asked, rows):
    config = tiny.sft_config(batch=18, micro_rows=asked)
    assert tiny.rows_of_a_micro_batch(lambda: tiny.run_sft(tmp_path, config=config), monkeypatch) == rows


def test_the_loss_falls(tmp_path):
    examples = tiny.examples(6)
    tiny.run_sft(tmp_path, examples=examples, config=tiny.sft_config(epochs=30, batch=3, checkpoint_every=100))
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    losses = [e.value for e in events.Scalars("train/loss")]
    assert len(losses) == 6 and losses[0] > 2 and losses[-1] < 1


def test_going_on_from_the_end_changes_nothing(whole):
    weights, done, directory = whole
    again, same_done = tiny.run_sft(directory)
    assert tiny.same(again, weights) and same_done == done


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, whole):
    """By kill -9 in the first epoch, after the checkpoint of step 3."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, tiny.__file__, "sft", tmp_path, "5"]
    out = subprocess.run(command, env=environment, capture_output=True)
    assert out.returncode == -9, out.stderr.decode()
    saved = [p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert saved in ([], ["3"]), "it may have been writing step 3"
    weights, done = tiny.run_sft(tmp_path)
    assert done == whole[1] and tiny.same(weights, whole[0])


@pytest.mark.parametrize("name, raised", [("SIGTERM", SystemExit), ("SIGINT", KeyboardInterrupt)])
def test_a_run_that_is_told_to_stop_saves_its_step_and_goes_on(tmp_path, whole, monkeypatch, name, raised):
    with monkeypatch.context() as patch:
        tiny.count_batches(tiny.at(8, name), patch.setattr)
        with pytest.raises(raised):
            tiny.run_sft(tmp_path)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [6, 8]
    count = []
    tiny.count_batches(count.append, monkeypatch.setattr)
    weights, done = tiny.run_sft(tmp_path)
    assert count == [1, 2] and done == whole[1] and tiny.same(weights, whole[0])


def test_other_examples_are_another_training(whole):
    with pytest.raises(UserError, match="were made with examples = "):
        tiny.run_sft(whole[2], examples=tiny.examples(18, seed=1))


def test_training_that_breaks_down_stops_and_saves_nothing_of_it(tmp_path):
    optimizer = tiny.OPTIMIZER.model_dump() | {"learning_rate": 1e30, "warmup_steps": 1}
    with pytest.raises(UserError, match=r"training broke down at step 3: .*; lower optimizer.learning_rate"):
        tiny.run_sft(tmp_path, config=tiny.sft_config(optimizer=optimizer))
    assert not any((tmp_path / "checkpoints").iterdir())


def test_no_examples(tmp_path):
    with pytest.raises(UserError, match="there is no example to learn from"):
        tiny.run_sft(tmp_path, examples=[])
    assert not any(tmp_path.iterdir())


def test_digest_tells_where_an_example_is_split():
    one, other = (Example(tuple(range(n)), np.arange(n, 5)) for n in (2, 3))
    assert sft.digest([one]) != sft.digest([other]) and sft.digest([one]) == sft.digest([one])
