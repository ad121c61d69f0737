"""Sampled responses on disk: append-only Parquet shards, each written whole or not at all.

A response set is a directory with `set.json`, the settings that identify it, and `shard-00000.parquet`, ... One
process writes a set at a time, or several that have agreed on it (`share_writing`); any may read it. A file under
another name is a leftover of an interrupted write.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rlvd_jax.errors import UserError


@dataclass
class Response:
    """One response to one problem. Fields are the columns of the shards."""

    problem_id: str
    sample: int
    """Its number among the responses to the problem, from 0."""
    text: str
    """Without special tokens. A lone surrogate, which UTF-8 cannot hold, is kept as U+FFFD; NUL is kept."""
    tokens: int
    """Its length with the end token, if it has one."""
    logprob: float
    """Sum over its tokens, under the untruncated distribution at the sampling temperature, in nats."""
    stop: str
    """Why it ended: "end" for an end token, "length" for the limit."""
    answer: str | None = None
    """The extracted answer; None if there is none, or it is not graded yet."""
    correct: bool | None = None
    """None: not graded yet."""


SCHEMA = pa.schema(
    [
        pa.field("problem_id", pa.string(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        # large_string: the text of a whole set passes the 2 GiB that one array of `string` holds.
        pa.field("text", pa.large_string(), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("logprob", pa.float64(), nullable=False),
        pa.field("stop", pa.string(), nullable=False),
        pa.field("answer", pa.large_string()),
        pa.field("correct", pa.bool_()),
    ]
)

_SHARD = re.compile(r"shard-(\d{5,})\.parquet")


class ResponseSet:
    """The responses of one model to one set of problems under one group of settings.

    `settings` is JSON-able and identifies the set: model, problems, template, sampling, seed; not the number of
    samples, so that a set can grow. Nothing is written before the first `add`, and a set that does not exist yet is
    an empty one. What another process adds later is not seen.

    Raises UserError if the directory holds a set made with other settings, or is damaged.
    """

    def __init__(self, directory: str | Path, settings: dict):
        self.directory = Path(directory)
        self.settings = json.loads(json.dumps(settings))  # As they come back from set.json: lists for tuples.
        self._writing = False
        self._writer, self._writers = 0, 1
        self._have: dict[str, set[int]] = {}
        try:
            names = sorted(os.listdir(self.directory))
        except FileNotFoundError:
            names = []
        except OSError as error:
            raise UserError(f"{self.directory}: cannot be read: {error.strerror}") from None
        self._shards = [self.directory / name for name in names if _SHARD.fullmatch(name)]
        self._known = "set.json" in names
        if self._known:
            self._check_settings()
        elif self._shards:
            raise UserError(f"{self.directory}: holds responses but no set.json that says how they were made: move it")
        for shard in self._shards:
            keys = _read(shard, ["problem_id", "sample"])
            if double := _enter(self._have, keys["problem_id"].to_pylist(), keys["sample"].to_pylist()):
                raise UserError(f"{shard}: {double} is in an earlier shard too: if this file is a copy, remove it")

    def _check_settings(self) -> None:
        path = self.directory / "set.json"
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}): restore it, or move the directory away") from None
        if difference := _difference(there, self.settings):
            raise UserError(
                f"{self.directory}: its responses were made with other settings: {difference}; "
                "move the directory away, or change the setting back"
            )

    def add(self, responses: Sequence[Response]) -> None:
        """Add responses as one new shard, whole or not at all.

        Raises UserError if one of them is there already, or the disk is full or refuses.
        """
        if not responses:
            return
        new: dict[str, set[int]] = {}
        double = _enter(new, [r.problem_id for r in responses], [r.sample for r in responses])
        for id in new.keys() & self._have.keys():
            if both := new[id] & self._have[id]:
                double = double or _name(id, min(both))
        if double:
            raise UserError(f"{self.directory}: {double} is there already, so none of the new responses was added")
        table = _table(responses)
        try:
            self.start_writing()
            number = max((int(_SHARD.fullmatch(s.name)[1]) for s in self._shards), default=-1) + 1
            number += (self._writer - number) % self._writers
            shard = self.directory / f"shard-{number:05d}.parquet"
            if shard.exists():
                raise UserError(f"{self.directory}: another process writes to this set: let one of them finish")
            _write_whole(shard, lambda f: pq.write_table(table, f, compression="zstd", write_page_checksum=True))
        except OSError as error:
            reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or error
            raise UserError(
                f"{self.directory}: responses cannot be written: {reason}; what was added before is kept, so put "
                "that right and run the same command again"
            ) from None
        self._shards.append(shard)
        for id, samples in new.items():
            self._have.setdefault(id, set()).update(samples)

    def start_writing(self) -> None:
        """Make the directory and set.json, and clear away what an interrupted write left; the first `add` does it."""
        if self._writing:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob(".*.tmp"):
            leftover.unlink()
        if not self._known:
            text = json.dumps(self.settings, indent=2, ensure_ascii=True) + "\n"
            _write_whole(self.directory / "set.json", lambda f: f.write(text.encode()))
            self._known = True
        self._writing = True

    def share_writing(self, writer: int, writers: int) -> None:
        """This process adds to the set as number `writer` of `writers`, after one of them has called `start_writing`:
        each has shard numbers of its own. They add different responses; what the others add is not seen."""
        self._writer, self._writers, self._writing = writer, writers, True

    def missing(self, problem_ids: Iterable[str], samples: int) -> dict[str, list[int]]:
        """Problem → the sample numbers below `samples` that are not there yet; complete problems are left out."""
        wanted = range(samples)
        gaps = {id: [s for s in wanted if s not in self._have.get(id, ())] for id in problem_ids}
        return {id: gap for id, gap in gaps.items() if gap}

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All responses, or the named columns of them, ordered by problem id and sample whatever the shards.

        Raises UserError for a damaged shard.
        """
        columns = SCHEMA.names if columns is None else list(columns)
        read = list(dict.fromkeys([*columns, "problem_id", "sample"]))
        schema = pa.schema([SCHEMA.field(name) for name in read])
        table = pa.concat_tables([_read(shard, read) for shard in self._shards] or [schema.empty_table()])
        order = pc.sort_indices(table, sort_keys=[("problem_id", "ascending"), ("sample", "ascending")])
        return table.select(columns).take(order)

    def responses(self) -> Iterator[Response]:
        """Every response, in the order of `table`."""
        for batch in self.table().to_batches(max_chunksize=8192):
            yield from (Response(**row) for row in batch.to_pylist())

    def __len__(self) -> int:
        return sum(map(len, self._have.values()))


def _name(id: str, sample: int) -> str:
    return f"response {sample} to problem '{id}'"


def _enter(have: dict[str, set[int]], ids: list[str], samples: list[int]) -> str | None:
    """Enter responses in `have`; names the first one that is there already and stops, else None."""
    for id, sample in zip(ids, samples, strict=True):
        there = have.setdefault(id, set())
        if sample in there:
            return _name(id, sample)
        there.add(sample)
    return None


def _table(responses: Sequence[Response]) -> pa.Table:
    columns = {field.name: [getattr(r, field.name) for r in responses] for field in SCHEMA}
    try:
        return pa.table(columns, schema=SCHEMA)
    except UnicodeEncodeError:
        for name in ("text", "answer"):
            columns[name] = [None if t is None else _unicode(t) for t in columns[name]]
        return pa.table(columns, schema=SCHEMA)


def _unicode(text: str) -> str:
    """The text with surrogate pairs joined and each lone surrogate as U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read(shard: Path, columns: list[str]) -> pa.Table:
    try:
        with pq.ParquetFile(shard, page_checksum_verification=True) as file:
            if missing := [name for name in SCHEMA.names if name not in file.schema_arrow.names]:
                raise UserError(f"{shard}: is not a shard of responses: it has no column '{missing[0]}'")
            return file.read(columns).cast(pa.schema([SCHEMA.field(name) for name in columns]))
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{shard}: damaged or cut short ({str(error).splitlines()[0]:.100}): delete this file and run the same "
            "command again, which samples anew what it held and nothing else"
        ) from None


def _write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that it is there whole or not at all, even if the machine stops."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # The new name itself.
    finally:
        os.close(folder)


def _difference(there, here, name: str = "") -> str | None:
    """The first setting that differs between two JSON values, `sampling.top_k is 50 there and 20 here`; else None."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in dict.fromkeys([*here, *there]):
            if found := _difference(there.get(key), here.get(key), f"{name}.{key}" if name else key):
                return found
        return None
    if there == here and isinstance(there, bool) == isinstance(here, bool):  # True == 1 in Python.
        return None
    return f"{name or 'settings'} is {json.dumps(there):.80} there and {json.dumps(here):.80} here"
