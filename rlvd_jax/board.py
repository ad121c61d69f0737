"""TensorBoard event files, written with the `tensorboard` package alone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
from tensorboard.plugins.text import metadata as text_plugin
from tensorboard.summary.writer.record_writer import RecordWriter

from rlvd_jax import hosts
from rlvd_jax.errors import UserError


class Board:
    """Writes scalars and texts by step; tags are grouped by what stands before the slash (`train/loss`).

    first_step: the first step that will be written. Whatever earlier runs wrote at this step or a later one
    is taken back, so a run that goes on from a checkpoint leaves one point for each step. What is written is on
    disk at once: a killed process loses nothing. Of several processes the first one writes, the others do nothing.
    """

    def __init__(self, directory: str | Path, first_step: int = 0):
        self._file = None
        if not hosts.first():
            return
        Path(directory).mkdir(parents=True, exist_ok=True)
        # Readers take files in order of their names, so a later file's name must sort after every earlier one's.
        earlier = [int(p.name.split(".")[3]) for p in Path(directory).glob("events.out.tfevents.*.rlvd")]
        now = max(int(time.time()), max(earlier, default=0) + 1)
        self._file = (Path(directory) / f"events.out.tfevents.{now:010d}.rlvd").open("xb")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=first_step, session_log=start)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point for each tag."""
        points = [summary_pb2.Summary.Value(tag=tag, simple_value=float(v)) for tag, v in values.items()]
        self._write(step=step, summary=summary_pb2.Summary(value=points))

    def text(self, step: int, tag: str, text: str) -> None:
        """A text, shown as it is: no Markdown, no HTML."""
        block = "\n".join("    " + line for line in text.splitlines())
        tensor = tensor_pb2.TensorProto(
            dtype=types_pb2.DT_STRING,
            tensor_shape=tensor_shape_pb2.TensorShapeProto(),
            string_val=[block.encode("utf-8", "replace")],
        )
        metadata = text_plugin.create_summary_metadata(display_name="", description="")
        value = summary_pb2.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
        self._write(step=step, summary=summary_pb2.Summary(value=[value]))

    def _write(self, **fields) -> None:
        if self._file is None:
            return
        try:
            self._records.write(event_pb2.Event(wall_time=time.time(), **fields).SerializeToString())
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self._file.name}: cannot be written: {error.strerror}") from None

    def close(self) -> None:
        if self._file:
            self._file.close()

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_) -> None:
        self.close()
