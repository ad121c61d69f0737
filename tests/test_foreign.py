import json

import pyarrow
import pyarrow.parquet
import pytest

from rlvd_jax.errors import UserError
from rlvd_jax.foreign import read_all


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ROW = {"problem": "1 + 1", "answer": "2", "response": r"It is \boxed{2}."}


def test_one_row_a_response(tmp_path):
    file = write(
        tmp_path / "a.jsonl",
        [
            ROW | {"tokens": 7, "finish_reason": "stop", "correct": True, "extracted_answer": "2", "sample": 1},
            ROW | {"tokens": 9, "finish_reason": "length", "correct": 0, "extracted_answer": "", "sample": 0},
        ],
    )
    models, questions, columns = read_all([file], {})
    r = models["a"]
    assert r.question == ["1 + 1"] * 2 and r.text == [ROW["response"]] * 2
    assert (r.tokens, r.stop, r.correct, r.answer) == ([7, 9], [False, True], [True, False], ["2", None])
    assert r.sample == [1, 0] and questions.gold == {"1 + 1": "2"}
    assert columns[file]["gold"] == "answer" and columns[file]["stop"] == "finish_reason"


def test_lists_of_responses_in_parquet(tmp_path):
    path = tmp_path / "b.parquet"
    table = {
        "question": ["p", "q"],
        "ground_truth": [1, 2],
        "completions": [["x", "y"], ["z"]],
        "num_tokens": [[3, 4], [5]],
        "is_correct": [[True, False], None],
        "truncated": [[True, False], [False]],
    }
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    models, questions, _ = read_all([str(path)], {})
    r = models["b"]
    assert (r.question, r.text, r.tokens) == (["p", "p", "q"], ["x", "y", "z"], [3, 4, 5])
    assert r.correct == [True, False, None] and r.stop == [True, False, False]
    assert questions.gold == {"p": "1", "q": "2"}


def test_a_json_array_with_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\r\n\n")
    assert read_all([str(path)], {})[0]["a"].text == [ROW["response"]]
    path = tmp_path / "b.json"
    path.write_text(json.dumps([ROW, ROW]))
    assert len(read_all([str(path)], {})[0]["b"].text) == 2


@pytest.mark.parametrize(
    "gold, expected",
    [
        ("2", "2"),
        (2, "2"),
        (["2"], "2"),
        (r"So it is \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("1 + 1 = <<1+1=2>>2\n#### 2", "2"),
    ],
)
def test_the_right_answer_in_its_many_shapes(tmp_path, gold, expected):
    file = write(tmp_path / "a.jsonl", [ROW | {"answer": gold}])
    assert read_all([file], {})[1].gold == {"1 + 1": expected}


def test_columns_by_other_names(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"p": "x", "g": "1", "r": "one", "tokens": "many", "who": "m"}])
    named = {"problem": "p", "gold": "g", "response": "r", "tokens": "-", "model": "who"}
    models, questions, _ = read_all([file], named)
    assert models["m"].text == ["one"] and models["m"].tokens == [None] and questions.gold == {"x": "1"}


OUTPUTS = [{"text": "x", "n": 3}, {"text": "y", "n": 4}]
CHOICES = [{"message": {"content": "x"}}, {"message": {"content": "y"}}]


@pytest.mark.parametrize(
    "row, named",
    [
        ({"prompt": "p", "gt": "1", "outputs": OUTPUTS}, {"response": "outputs.text", "tokens": "outputs.n"}),
        (
            {"doc_id": 0, "doc": {"question": "p"}, "target": "1", "resps": [["x", "y"]], "tokens": [[3, 4]]},
            {"problem": "doc.question"},
        ),
        ({"idx": 0, "question": "p", "gt_cot": "so", "gt": "1", "code": ["x", "y"], "num_tokens": [3, 4]}, {}),
        (
            {"id": "1", "custom_id": "p", "gold": 1, "body": {"choices": CHOICES}, "tokens": [3, 4]},
            {"response": "body.choices.message.content"},
        ),
    ],
    ids=["vllm", "lm-eval", "qwen2.5-math", "openai"],
)
def test_what_other_engines_write(tmp_path, row, named):
    models, questions, _ = read_all([write(tmp_path / "a.jsonl", [row])], named)
    r = models["a"]
    assert (r.question, r.text, r.tokens) == (["p", "p"], ["x", "y"], [3, 4]) and questions.gold == {"p": "1"}


def test_objects_in_parquet(tmp_path):
    path = tmp_path / "b.parquet"
    outputs = [[{"text": "x"}, {"text": "y"}]]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["p"], "outputs": outputs}), path)
    assert read_all([str(path)], {"response": "outputs.text"})[0]["b"].text == ["x", "y"]


def test_questions_by_id(tmp_path):
    rows = [ROW | {"id": "a", "problem": "same"}, ROW | {"id": "b", "problem": "same", "answer": "3"}]
    file = write(tmp_path / "a.jsonl", rows)
    assert read_all([file], {"id": "id"})[0]["a"].question == ["a", "b"]
    with pytest.raises(UserError, match=r"the right answer to question 'same' is '3', but it is '2' in .*line 1"):
        read_all([file], {})


def test_models_of_files(tmp_path):
    one = write(tmp_path / "one.jsonl", [ROW | {"model": "m"}, ROW | {"model": "k"}])
    two = write(tmp_path / "two.jsonl", [ROW])
    assert list(read_all([one, two], {})[0]) == ["m", "k", "two"]
    assert list(read_all([f"n={one}", f"base={two}"], {})[0]) == ["n", "base"]
    (tmp_path / "x").mkdir()
    other = write(tmp_path / "x" / "two.jsonl", [ROW])
    assert list(read_all([two, other], {})[0]) == [two, other]


def test_our_own_response_sets(tmp_path):
    from rlvd_jax.responses import Response, ResponseSet

    responses = ResponseSet(tmp_path / "set", {"model": "m"})
    for sample in (0, 1):
        responses.add([Response("q", sample, "text", 5, -1.0, ("end", "length")[sample], "4", bool(sample))])
    shard = next((tmp_path / "set").glob("*.parquet"))
    models, questions, _ = read_all([str(tmp_path / "set")], {})
    r = models["set"]
    assert (r.question, r.sample, r.correct, r.stop) == (["q", "q"], [0, 1], [False, True], [False, True])
    assert r.answer == ["4", "4"] and questions.gold == {}
    assert read_all([f"m={shard}"], {})[0]["m"].answer == ["4"]


@pytest.mark.parametrize(
    "rows, named, message",
    [
        ([], {}, r"a\.jsonl: is empty"),
        (
            [{"problem": "x", "reply": "y"}],
            {},
            r"no column holds the responses \(it has problem, reply\): name it with",
        ),
        ([{"response": "x"}], {}, "no column tells the questions apart"),
        ([ROW], {"gold": "anwser"}, r"has no column 'anwser' \(did you mean 'answer'\?\)"),
        ([ROW, {"problem": "x"}], {}, "line 2: a response is text, this is None"),
        ([ROW | {"response": []}], {}, "line 1: lists no responses"),
        ([ROW | {"response": [[]]}], {}, "line 1: lists no responses"),
        (
            [ROW | {"response": [{"n": 0, "is": {"content": "x"}}]}],
            {},
            r"line 1: .* holds objects \(response.n, response.is.content\): .* --response-column response.is.content",
        ),
        ([ROW], {"response": "doc.text"}, "has no column 'doc.text'"),
        ([ROW | {"doc": {"text": "x"}}], {"response": "doc.txt"}, "line 1: a response is text, this is None"),
        ([{"doc": {"q": "x"}, "reply": ["y"]}], {}, r"no column holds the responses \(it has doc.q, reply\)"),
        ([ROW | {"doc": {"q": "x"}}], {"problem": "doc.p"}, r"line 1: the problem is missing \(column 'doc.p'\)"),
        ([ROW, ROW | {"problem": None}], {}, "line 2: the problem is missing"),
        ([ROW | {"answer": " "}], {}, "line 1: the right answer is empty"),
        ([ROW | {"answer": ["1", "2"]}], {}, "line 1: column 'answer' does not hold one right answer"),
        ([ROW, ROW | {"answer": "3"}], {}, "line 2: the right answer to question '1 [+] 1' is '3', but it is '2' in"),
        ([ROW | {"correct": "yes"}], {}, "line 1: column 'correct' holds 'yes', not true or false"),
        ([ROW | {"tokens": 1.5}], {}, "line 1: column 'tokens' holds 1.5, not a whole number"),
        ([ROW | {"tokens": float("nan")}], {}, "line 1: column 'tokens' holds nan, not a whole number"),
        ([ROW | {"model": 3}], {}, "line 1: the model's name is 3, not text"),
        ([ROW | {"response": ["a", "b"], "tokens": 3}], {}, "lists 2 responses, but column 'tokens' does not list"),
        ([ROW | {"sample": 1}, ROW | {"sample": 1}], {}, "'a' has response number 1 to question '1 [+] 1' twice"),
        (["text"], {}, "line 1: a row is a JSON object, this is str"),
    ],
)
def test_bad_rows(tmp_path, rows, named, message):
    file = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=message) as error:
        read_all([file], named)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"problem": 1}\n\n{"problem": \n', "a.jsonl, line 3: not JSON"),
        ("a.json", b'[{"problem": 1},\n {"problem"]', "a.json, line 2: not JSON"),
        ("a.jsonl", b'{"problem": "\xff"}', "a.jsonl: is not UTF-8 text"),
        ("a.jsonl", b"[" * 100_000, "nested too deeply|not JSON"),
        ("a.jsonl", b'{"x": ' + b"[" * 100_000, "line 1: (is nested too deeply|not JSON)"),
        ("a.jsonl", b'{"x": ' + b"1" * 5000 + b"}", "line 1: not readable JSON"),
        ("a.parquet", b"PAR1 cut short", "a.parquet: is not a whole Parquet file"),
        ("a.csv", b"x", "a.csv: is not a .jsonl, .json or .parquet file"),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_all([str(tmp_path / name)], {})


def test_files_that_are_not_there_or_twice(tmp_path):
    with pytest.raises(UserError, match=r"no\.jsonl: there is no such file"):
        read_all([str(tmp_path / "no.jsonl")], {})
    with pytest.raises(UserError, match=r"holds no set\.json"):
        read_all([str(tmp_path)], {})
    file = write(tmp_path / "a.jsonl", [ROW])
    with pytest.raises(UserError, match=r"a\.jsonl: is named twice"):
        read_all([file, f"b={file}"], {})
