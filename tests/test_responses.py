import errno
import json
import math
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlvd_jax import responses
from rlvd_jax.errors import UserError
from rlvd_jax.responses import Response, ResponseSet

SETTINGS = {"model": "base", "sampling": {"temperature": 0.9, "top_k": 50, "end": (1, 2)}, "seed": 0}


def response(id="p/0", sample=0, **changes):
    fields = {"text": f"{id} {sample} \\boxed{{1}}", "tokens": 7, "logprob": -1.5, "stop": "end"}
    return Response(id, sample, **{**fields, **changes})


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_what_is_added_comes_back(tmp_path):
    directory = tmp_path / "deep" / "set"
    made = ResponseSet(directory, SETTINGS)
    assert not directory.exists() and len(made) == 0 and list(made.responses()) == []
    first = [response("b", 1, answer="\\frac12", correct=True), response("b", 0, correct=False, stop="length")]
    second = [response("a", 2, text="é\x00\n\u2028" * 3, logprob=-math.pi), response("b", 10, answer="")]
    made.add(first)
    made.add(second)
    made.add([])
    assert names(directory) == ["set.json", "shard-00000.parquet", "shard-00001.parquet"]
    expected = [second[0], first[1], first[0], second[1]]  # By problem, then sample as a number.
    for opened in (made, ResponseSet(directory, SETTINGS)):
        assert list(opened.responses()) == expected and len(opened) == 4
        assert opened.table().schema.equals(responses.SCHEMA)
        assert opened.table(["correct", "tokens"]).to_pydict() == {
            "correct": [None, False, True, None],
            "tokens": [7] * 4,
        }
    assert json.loads((directory / "set.json").read_text()) == json.loads(json.dumps(SETTINGS))
    assert pq.ParquetFile(directory / "shard-00000.parquet").metadata.row_group(0).column(2).compression == "ZSTD"


def test_missing_is_what_is_not_there_yet(tmp_path):
    made = ResponseSet(tmp_path, SETTINGS)
    assert made.missing(["a", "b"], 2) == {"a": [0, 1], "b": [0, 1]}
    made.add([response("a", 0), response("a", 1), response("b", 1), response("b", 5)])
    for opened in (made, ResponseSet(tmp_path, SETTINGS)):
        assert opened.missing(["c", "b", "a"], 2) == {"c": [0, 1], "b": [0]}
        assert opened.missing(["a", "b"], 4) == {"a": [2, 3], "b": [0, 2, 3]}
    made.add([response("b", 0)])
    assert made.missing(["a", "b"], 2) == {}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        (
            {"sampling": {"temperature": 0.9, "top_k": 20, "end": [1, 2]}, "seed": 1},
            "sampling.top_k is 50 there and 20",
        ),
        ({"sampling": {"temperature": 0.9, "top_k": 50, "end": [1]}}, r"sampling.end is \[1, 2\] there and \[1\] here"),
        ({"seed": False}, "seed is 0 there and false here"),
        ({"template": "r1"}, 'template is null there and "r1" here'),
    ],
)
def test_other_settings_are_refused(tmp_path, changes, sentence):
    ResponseSet(tmp_path, SETTINGS).add([response()])
    before = names(tmp_path)
    with pytest.raises(UserError, match=sentence):
        ResponseSet(tmp_path, {**SETTINGS, **changes})
    assert names(tmp_path) == before
    same = dict(reversed(list({**SETTINGS, "seed": 0.0}.items())))  # Order and 0 for 0.0 make no difference.
    assert len(ResponseSet(tmp_path, same)) == 1


def test_a_setting_left_out_is_named(tmp_path):
    ResponseSet(tmp_path, SETTINGS).add([response()])
    with pytest.raises(UserError, match='model is "base" there and null here'):
        ResponseSet(tmp_path, {k: v for k, v in SETTINGS.items() if k != "model"})


def test_shards_without_settings_or_with_damaged_ones(tmp_path):
    ResponseSet(tmp_path, SETTINGS).add([response()])
    (tmp_path / "set.json").write_text("{")
    with pytest.raises(UserError, match=r"set\.json: cannot be read"):
        ResponseSet(tmp_path, SETTINGS)
    (tmp_path / "set.json").unlink()
    with pytest.raises(UserError, match=r"no set\.json"):
        ResponseSet(tmp_path, SETTINGS)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be read: Not a directory"):
        ResponseSet(tmp_path / "file", SETTINGS)


def test_duplicates_are_refused(tmp_path):
    made = ResponseSet(tmp_path, SETTINGS)
    made.add([response("a", 0)])
    for twice in ([response("b", 3), response("a", 0)], [response("b", 3), response("b", 3)]):
        with pytest.raises(UserError, match=r"response \d to problem '\w' is there already, so none of the new"):
            made.add(twice)
    assert len(made) == 1 and made.missing(["b"], 4) == {"b": [0, 1, 2, 3]}
    made.add([response("b", 3)])
    (tmp_path / "shard-00007.parquet").write_bytes((tmp_path / "shard-00001.parquet").read_bytes())
    with pytest.raises(UserError, match=r"shard-00007\.parquet: response 3 to problem 'b' is in an earlier shard too"):
        ResponseSet(tmp_path, SETTINGS)


def test_a_second_writer_overwrites_nothing(tmp_path):
    one, two = ResponseSet(tmp_path, SETTINGS), ResponseSet(tmp_path, SETTINGS)
    one.add([response("a", 0)])
    with pytest.raises(UserError, match="another process writes to this set"):
        two.add([response("a", 0)])
    assert len(ResponseSet(tmp_path, SETTINGS)) == 1


@pytest.mark.parametrize("damage", ["cut", "empty", "bytes", "other columns"])
def test_a_damaged_shard_is_named_with_what_to_do(tmp_path, damage):
    made = ResponseSet(tmp_path, SETTINGS)
    made.add([response("a", 0)])
    made.add([response("b", i, text=random.Random(i).randbytes(4000).hex()) for i in range(20)])
    shard = tmp_path / "shard-00001.parquet"
    whole = shard.read_bytes()
    if damage == "cut":
        shard.write_bytes(whole[: len(whole) // 2])
    elif damage == "empty":
        shard.write_bytes(b"")
    elif damage == "bytes":  # In the middle of the text: only the checksums tell.
        at = len(whole) // 2
        shard.write_bytes(whole[:at] + bytes(255 - b for b in whole[at : at + 8]) + whole[at + 8 :])
    else:
        pq.write_table(pa.table({"problem_id": ["b"], "sample": [0]}), shard)
    with pytest.raises(UserError, match=r"shard-00001\.parquet: ") as caught:
        ResponseSet(tmp_path, SETTINGS).table()
    expected = (
        "is not a shard of responses: it has no column 'text'" if damage == "other columns" else "delete this file"
    )
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    shard.unlink()
    again = ResponseSet(tmp_path, SETTINGS)
    assert again.missing(["a", "b"], 1) == {"b": [0]}


def test_leftovers_of_an_interrupted_write_are_ignored_and_cleared(tmp_path):
    ResponseSet(tmp_path, SETTINGS).add([response("a", 0)])
    (tmp_path / ".shard-00001.parquet.tmp").write_bytes(b"PAR1 half")
    (tmp_path / ".set.json.tmp").write_bytes(b"{")
    (tmp_path / "notes.txt").write_text("mine")
    again = ResponseSet(tmp_path, SETTINGS)
    assert len(again) == 1 and ".shard-00001.parquet.tmp" in names(tmp_path)  # A reader clears nothing away.
    again.add([response("a", 1)])
    assert names(tmp_path) == ["notes.txt", "set.json", "shard-00000.parquet", "shard-00001.parquet"]


@pytest.mark.parametrize("first", [True, False])
def test_a_full_disk_leaves_no_partial_shard(tmp_path, monkeypatch, first):
    made = ResponseSet(tmp_path / "set", SETTINGS)
    if not first:
        made.add([response("a", 0)])
    write = pq.write_table

    def full(table, file, **options):
        file.write(b"PAR1 half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(responses.pq, "write_table", full)
    with pytest.raises(UserError, match="the disk is full; what was added before is kept") as caught:
        made.add([response("a", 1)])
    assert "\n" not in str(caught.value)
    assert names(tmp_path / "set") == ["set.json", "shard-00000.parquet"][: 2 - first]
    monkeypatch.setattr(responses.pq, "write_table", write)
    assert made.missing(["a"], 2) == {"a": [0, 1][1 - first :]}
    made.add([response("a", 1)])
    assert len(ResponseSet(tmp_path / "set", SETTINGS)) == 2 - first


def test_an_interrupt_in_a_write_leaves_no_partial_shard(tmp_path, monkeypatch):
    made = ResponseSet(tmp_path, SETTINGS)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(responses.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made.add([response("a", 0)])
    assert names(tmp_path) == []
    monkeypatch.undo()
    made.add([response("a", 0)])
    assert len(ResponseSet(tmp_path, SETTINGS)) == 1


def test_other_refusals_of_the_disk_are_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    made = ResponseSet(tmp_path / "file2", SETTINGS)
    (tmp_path / "file2").touch()
    with pytest.raises(UserError, match="responses cannot be written: File exists"):
        made.add([response()])


def test_text_that_utf8_cannot_hold(tmp_path):
    made = ResponseSet(tmp_path, SETTINGS)
    made.add(
        [
            response(sample=0, text="a\ud800b\x00", answer="\udfff"),
            response(sample=1, text="\ud83d\ude00", answer=None),
            response(sample=2, text="plain é"),
        ]
    )
    kept = list(made.responses())
    assert [r.text for r in kept] == ["a\ufffdb\x00", "\U0001f600", "plain é"]
    assert [r.answer for r in kept] == ["\ufffd", None, None]


def test_a_quarter_of_a_million_responses(tmp_path):
    many = [
        response(f"p/{i // 256}", i % 256, text=f"{i} " * 20, tokens=i % 97, correct=i % 3 == 0) for i in range(250_000)
    ]
    random.Random(0).shuffle(many)
    made = ResponseSet(tmp_path, SETTINGS)
    for start in range(0, len(many), 125_000):
        made.add(many[start : start + 125_000])
    again = ResponseSet(tmp_path, SETTINGS)
    ids = [f"p/{i}" for i in range(977)]
    assert again.missing(ids, 256) == {"p/976": list(range(144, 256))}
    table = again.table(["tokens", "correct"])
    assert table.num_rows == 250_000
    assert sum(table["correct"].to_pylist()) == 83_334 and table["tokens"].to_pylist()[:3] == [0, 1, 2]


def test_several_writers_have_names_of_their_own(tmp_path):
    ResponseSet(tmp_path / "set", SETTINGS).add([response("p", 100)])
    writers = [ResponseSet(tmp_path / "set", SETTINGS) for _ in range(3)]
    writers[0].start_writing()
    for i, writer in enumerate(writers):
        writer.share_writing(i, len(writers))
    (tmp_path / "set" / ".shard-00009.parquet.tmp").touch()  # what another one is writing
    for k in range(2):
        for i in (2, 0, 1):
            writers[i].add([response("p", 10 * k + i)])
    assert names(tmp_path / "set") == [".shard-00009.parquet.tmp", "set.json"] + [
        f"shard-{n:05d}.parquet" for n in (0, 1, 2, 3, 4, 5, 6)
    ]
    assert [r.sample for r in ResponseSet(tmp_path / "set", SETTINGS).responses()] == [0, 1, 2, 10, 11, 12, 100]
