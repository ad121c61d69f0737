import io
import sys

import pytest
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlvd_jax.board import Board
from rlvd_jax.errors import UserError


def read(directory):
    events = EventAccumulator(str(directory), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    return events


def points(directory, tag):
    return [(e.step, round(e.value, 4)) for e in read(directory).Scalars(tag)]


def test_scalars_are_read_back_by_tensorboard(tmp_path):
    with Board(tmp_path) as board:
        for step in range(3):
            board.scalars(step, {"train/loss": 1 / (step + 1), "eval/accuracy": 0.25 * step})
    assert points(tmp_path, "train/loss") == [(0, 1.0), (1, 0.5), (2, 0.3333)]
    assert points(tmp_path, "eval/accuracy") == [(0, 0.0), (1, 0.25), (2, 0.5)]


def test_texts_are_read_back_whole_and_not_as_markdown(tmp_path):
    text = "# not a heading\n17b42 \\boxed{31}\n<script>alert(1)</script> \ud800 é"
    with Board(tmp_path) as board:
        board.text(4, "responses/correct", text)
    events = read(tmp_path)
    (event,) = events.Tensors("responses/correct")
    shown = event.tensor_proto.string_val[0].decode()
    assert event.step == 4
    assert [line.removeprefix("    ") for line in shown.split("\n")] == text.replace("\ud800", "?").split("\n")
    assert all(line.startswith("    ") for line in shown.split("\n"))
    assert events.SummaryMetadata("responses/correct").plugin_data.plugin_name == "text"


def test_everything_is_on_disk_before_the_writer_is_closed(tmp_path):
    board = Board(tmp_path)
    board.scalars(1, {"train/loss": 2.0})
    assert points(tmp_path, "train/loss") == [(1, 2.0)]
    board.close()


def test_a_run_that_goes_on_leaves_one_point_for_each_step(tmp_path):
    with Board(tmp_path) as board:
        for step in range(6):  # the last checkpoint was at step 3
            board.scalars(step, {"train/loss": step})
            board.text(step, "responses/correct", "first")
    for again in range(3):  # killed and started again three times within a second
        with Board(tmp_path, first_step=4) as board:
            for step in range(4, 8):
                board.scalars(step, {"train/loss": 100 * (again + 1) + step})
    expected = [(s, s) for s in range(4)] + [(s, 300 + s) for s in range(4, 8)]
    assert points(tmp_path, "train/loss") == expected
    # The accumulator behind TensorBoard's own server; the plain one never takes texts back.
    served = plugin_event_accumulator.EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    served.Reload()
    assert [e.step for e in served.Tensors("responses/correct")] == [0, 1, 2, 3]
    assert [e.step for e in served.Tensors("train/loss")] == list(range(8))


def test_a_torn_last_record_costs_only_itself(tmp_path):
    with Board(tmp_path) as board:
        board.scalars(0, {"train/loss": 1.0})
        board.scalars(1, {"train/loss": 2.0})
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-7])
    with Board(tmp_path, first_step=1) as board:
        board.scalars(1, {"train/loss": 3.0})
    assert points(tmp_path, "train/loss") == [(0, 1.0), (1, 3.0)]


def test_a_full_disk_is_told_in_a_sentence(tmp_path):
    class Full(io.BytesIO):
        name = "events"

        def write(self, _):
            raise OSError(28, "No space left on device")

    board = Board(tmp_path)
    board._file.close()
    board._file = Full()
    board._records._writer = board._file
    with pytest.raises(UserError, match=r"^events: cannot be written: No space left on device$"):
        board.scalars(0, {"train/loss": 1.0})


def test_needs_no_tensorflow():
    assert "tensorflow" not in sys.modules
