"""Graded or ungraded responses that any engine wrote: JSON Lines, JSON and Parquet, and our own response sets.

A file has a row for each response, or for each question with lists of responses. What its columns hold is known by
their common names (`COLUMNS`) or by what the user says, who can reach into objects and lists of them: `outputs.text`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlvd_jax.errors import UserError, nearest
from rlvd_jax.problems import Problem

COLUMNS = {
    "problem": ("problem", "question", "prompt", "input", "query"),
    "id": ("problem_id", "question_id", "unique_id", "custom_id", "id", "idx", "doc_id"),
    "gold": (
        "gold",
        "gold_answer",
        "ground_truth",
        "reference_answer",
        "expected_answer",
        "reference",
        "target",
        "gt",
        "answer",
        "solution",
    ),
    "response": (
        "response",
        "responses",
        "completion",
        "completions",
        "output",
        "outputs",
        "generation",
        "generations",
        "generated_text",
        "model_output",
        "text",
        "samples",
        "resps",
        "code",
    ),
    "model": ("model", "model_name"),
    "sample": ("sample", "sample_id", "sample_index", "sample_idx"),
    "correct": ("correct", "is_correct"),
    "answer": ("extracted_answer", "extracted", "predicted_answer", "prediction", "pred", "parsed_answer"),
    "tokens": (
        "tokens",
        "num_tokens",
        "n_tokens",
        "token_count",
        "completion_tokens",
        "output_tokens",
        "response_tokens",
        "num_output_tokens",
    ),
    "stop": ("finish_reason", "stop", "stop_reason", "truncated", "finished"),
}
"""Names looked for, in this order; `--<what>-column NAME` names one, `-` in its place ignores what would be found."""
MEANING = {
    "problem": "the problem's text, which tells the questions apart",
    "id": "what tells the questions apart, where there is no problem text",
    "gold": "the right answer",
    "response": "the response, or a list of them",
    "model": "the model's name",
    "sample": "the response's number",
    "correct": "whether the response is correct",
    "answer": "the answer extracted from the response",
    "tokens": "the response's length in tokens",
    "stop": "why it ended (`length`: cut off), or whether it was truncated, or finished",
}


@dataclass
class Source:
    """A file as columns; a row's place is named in errors."""

    path: Path
    names: list[str]
    read: Callable[[str], list]
    unit: str = "row"
    lines: list[int] | None = None
    known: dict[str, str] | None = None  # which column is what, where that is no guess

    def where(self, row: int) -> str:
        return f"{self.path}, {self.unit} {self.lines[row] if self.lines else row + 1}"

    def has(self, name: str) -> bool:
        return name in self.names or ("." in name and name.partition(".")[0] in self.names)

    def column(self, name: str) -> list:
        """The values of a column, or of a field of the objects in it: `outputs.text`."""
        if name in self.names:
            return self.read(name)
        first, *fields = name.split(".")
        return [_reach(value, fields) for value in self.read(first)]

    def fields(self) -> list[str]:
        """The names of its columns; in place of a column of objects, those of their fields, as in the first row."""
        return [field for name in self.names for field in _fields(name, next(iter(self.read(name)), None))]


def _reach(value, fields: list[str]):
    """What an object holds under these names, one inside the other; of a list, what each of its entries holds."""
    if isinstance(value, list):
        return [_reach(v, fields) for v in value]
    if not fields:
        return value
    return _reach(value.get(fields[0]), fields[1:]) if isinstance(value, dict) else None


def _fields(name: str, value) -> list[str]:
    if isinstance(value, list):
        value = next(iter(value), None)
        return _fields(name, value) if isinstance(value, (dict, list)) else [name]
    if isinstance(value, dict) and value:
        return [field for key, v in value.items() for field in _fields(f"{name}.{key}", v)]
    return [name]


def _flat(values: list) -> list:
    """The entries of lists in lists, in order."""
    return [x for v in values for x in (_flat(v) if isinstance(v, list) else [v])]


OURS = {
    "id": "problem_id",
    "response": "text",
    "sample": "sample",
    "correct": "correct",
    "answer": "answer",
    "tokens": "tokens",
    "stop": "stop",
}
"""The columns of a response set's shards (`rlvd_jax.responses`); `answer` there is the extracted one."""


@dataclass
class Responses:
    """The responses of one model, one entry each; what a file doesn't say is None."""

    source: str
    question: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    sample: list[int | None] = field(default_factory=list)
    correct: list[bool | None] = field(default_factory=list)
    answer: list[str | None] = field(default_factory=list)
    tokens: list[int | None] = field(default_factory=list)
    stop: list[bool | None] = field(default_factory=list)  # True: cut off


@dataclass
class Questions:
    """What is known of the questions over all files, and the place that said so first."""

    problem: dict[str, str] = field(default_factory=dict)
    gold: dict[str, str] = field(default_factory=dict)
    place: dict[tuple[str, str], str] = field(default_factory=dict)

    def learn(self, question: str, what: str, value: str | None, place: str) -> None:
        if value is None:
            return
        known = getattr(self, what).setdefault(question, value)
        if known != value:
            meaning = "right answer to" if what == "gold" else "text of"
            raise UserError(
                f"{place}: the {meaning} question {short(question)} is {short(value)}, but it is {short(known)} in "
                f"{self.place[question, what]}: correct one of them"
            )
        self.place.setdefault((question, what), place)


def short(text: str) -> str:
    """A question or an answer, fit to be named in an error."""
    text = " ".join(text.split())
    return repr(text if len(text) <= 60 else text[:57] + "...")


def open_source(path: Path) -> Source:
    """A JSON Lines, JSON or Parquet file, or a response set."""
    if not path.exists():
        raise UserError(f"{path}: there is no such file")
    if path.is_dir():
        return _response_set(path)
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix in (".jsonl", ".json", ".ndjson"):
        return _json(path)
    raise UserError(f"{path}: is not a .jsonl, .json or .parquet file, nor a directory of responses")


def _json(path: Path) -> Source:
    rows, lines, number, array = [], [], 1, False
    try:
        with open(path, encoding="utf-8-sig") as file:
            array = file.read(1) == "["  # one JSON array; else a JSON object a line
            file.seek(0)
            if array:
                rows = json.load(file)
                lines = list(range(1, len(rows) + 1))
            else:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        rows.append(json.loads(line))
                        lines.append(number)
    except json.JSONDecodeError as error:
        line = error.lineno if array else number
        raise UserError(f"{path}, line {line}: not JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text: {error.reason}") from None
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{path}, line {number}: not readable JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{path}, line {number}: is nested too deeply to be read") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    unit = "entry" if array else "line"
    for row, line in zip(rows, lines, strict=True):
        if not isinstance(row, dict):
            raise UserError(f"{path}, {unit} {line}: a row is a JSON object, this is {type(row).__name__}")
    if not rows:
        raise UserError(f"{path}: is empty")
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Source(path, names, lambda name: [row.get(name) for row in rows], unit, lines)


def _parquet(path: Path) -> Source:
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: is not a whole Parquet file: {str(error).splitlines()[0]:.100}") from None

    def read(name: str) -> list:
        try:
            return pyarrow.parquet.read_table(path, columns=[name], partitioning=None).column(0).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: column '{name}' cannot be read: {str(error).splitlines()[0]:.100}") from None

    return Source(path, names, read, known=OURS if {*OURS.values(), "logprob"} <= {*names} else None)


def _response_set(path: Path) -> Source:
    from rlvd_jax.responses import ResponseSet

    try:
        settings = json.loads((path / "set.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{path}: holds no set.json, so it is no response set: name the files in it instead") from None
    responses = ResponseSet(path, settings)
    return Source(path, list(OURS.values()), lambda name: responses.table([name]).column(0).to_pylist(), known=OURS)


def choose_columns(source: Source, named: dict[str, str]) -> dict[str, str]:
    """Which column holds what: as the user says, else by its common names."""
    chosen = {}
    for what, candidates in COLUMNS.items():
        if what in named:
            if named[what] == "-":
                continue
            if not source.has(named[what]):
                raise UserError(f"{source.path}: has no column '{named[what]}'{nearest(named[what], source.fields())}")
            chosen[what] = named[what]
        elif source.known is not None:
            chosen |= {what: source.known[what]} if what in source.known else {}
        else:
            found = [c for c in candidates if c in source.names and c not in named.values()]
            chosen |= {what: found[0]} if found else {}
    if "response" in chosen and ("problem" in chosen or "id" in chosen):
        return chosen
    names = source.fields()
    there = f"it has {', '.join(names[:20])}" + (" and more" if len(names) > 20 else "")
    if "response" not in chosen:
        raise UserError(f"{source.path}: no column holds the responses ({there}): name it with --response-column")
    raise UserError(f"{source.path}: no column tells the questions apart ({there}): name it with --problem-column")


def read(
    source: Source, name: str, renamed: bool, named: dict[str, str], models: dict[str, Responses], questions: Questions
) -> dict[str, str]:
    """Add a file's responses to `models` (called `name`, or what a model column says unless `renamed`). Returns the
    columns used."""
    chosen = choose_columns(source, named)
    column = {what: source.column(c) for what, c in chosen.items()}
    if not column["response"]:
        raise UserError(f"{source.path}: holds no responses")
    for row, response in enumerate(column["response"]):
        place = source.where(row)
        value = {what: values[row] for what, values in column.items()}
        question = _question(value, chosen, named, questions, place)
        model = name if renamed or "model" not in chosen else value["model"]
        if not isinstance(model, str) or not model:
            raise UserError(f"{place}: the model's name is {model!r:.40}, not text")
        into = models.setdefault(model, Responses(str(source.path)))
        texts = _flat([response])
        if not texts:
            raise UserError(f"{place}: lists no responses")
        for text in texts:
            if not isinstance(text, str):
                raise UserError(f"{place}: {_no_response(text, chosen['response'])}")
        into.question += [question] * len(texts)
        into.text += texts
        for what, convert in CONVERT.items():
            found = value.get(what)
            if not isinstance(response, list):
                found = [found]
            elif found is None:
                found = [None] * len(texts)
            elif not isinstance(found, list) or len(found := _flat(found)) != len(texts):
                raise UserError(
                    f"{place}: lists {len(texts)} responses, but column '{chosen[what]}' does not list as many values: "
                    f"--{what}-column - leaves it out"
                )
            try:
                getattr(into, what).extend(None if v is None else convert(v, chosen[what]) for v in found)
            except ValueError as error:
                raise UserError(f"{place}: column '{chosen[what]}' holds {error}") from None
    return chosen


def _no_response(found, column: str) -> str:
    """What is wrong with a response that is no text."""
    if not isinstance(found, dict) or not found:
        return f"a response is text, this is {found!r:.60}"
    fields = _fields(column, found)
    best = next((f for f in fields if f.rpartition(".")[2] in ("text", "content")), fields[0])
    return (
        f"a response is text, but column '{column}' holds objects ({', '.join(fields[:12])}): name the field with the "
        f"text, as in --response-column {best}"
    )


def _question(value: dict, chosen: dict, named: dict, questions: Questions, place: str) -> str:
    """What tells the row's question apart; its problem and right answer go to `questions`."""
    problem = value.get("problem")
    if problem is not None and not isinstance(problem, str):
        problem = json.dumps(problem, ensure_ascii=False, sort_keys=True, default=str)  # chat messages
    by_text = "problem" in chosen and "id" not in named
    question = problem if by_text else value.get("id")
    if question is None or question == "":
        what = "problem" if by_text else "id"
        raise UserError(f"{place}: the {what} is missing (column '{chosen[what]}')")
    question = str(question)
    questions.learn(question, "problem", problem, place)
    if value.get("gold") is not None:
        questions.learn(question, "gold", _gold(value["gold"], chosen["gold"], place), place)
    return question


def _gold(value, column: str, place: str) -> str:
    r"""A right answer as text: of a list of one, its entry; of a solution, what its last \boxed{} or #### holds."""
    from rlvd_jax.grading import extract

    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, (list, dict, bool)):
        raise UserError(f"{place}: column '{column}' does not hold one right answer but {value!r:.60}")
    text = str(value).strip()
    inside = extract(text)
    if inside is None and "####" in text:  # as in GSM8K
        inside = text.rpartition("####")[2].strip()
    if inside is None and column == "solution":
        raise UserError(f"{place}: the solution has no \\boxed{{}}, so its right answer is not known")
    text = text if inside is None else inside
    if not text:
        raise UserError(f"{place}: the right answer is empty")
    return text


def _whole(value, column: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0 or value % 1 != 0:
        raise ValueError(f"{value!r:.40}, not a whole number")
    return int(value)


def _correct(value, column: str) -> bool:
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
        raise ValueError(f"{value!r:.40}, not true or false")
    return bool(value)


def _answer(value, column: str) -> str | None:
    return str(value) or None


def _truncated(value, column: str) -> bool | None:
    if isinstance(value, bool) and column in ("truncated", "finished"):
        return value if column == "truncated" else not value
    return value in ("length", "max_tokens", "max_length") if isinstance(value, str) else None


CONVERT = {"sample": _whole, "correct": _correct, "answer": _answer, "tokens": _whole, "stop": _truncated}
"""What is read of each response beside its text, into the field of `Responses` of that name."""


def _named_path(argument: str) -> tuple[str | None, Path]:
    """`FILE`, or `NAME=FILE`."""
    name, equals, path = argument.partition("=")
    if equals and name and not Path(argument).exists():
        return name, Path(path)
    return None, Path(argument)


def know(problems: Sequence[Problem], questions: Questions, models: dict[str, Responses]) -> int:
    """Take the right answers and the texts of the questions that are among these problems, by id or by text; what the
    files of responses say is overruled. Returns how many questions that are."""
    by_name = {name: p for p in problems for name in (p.problem.strip(), p.id)}
    asked = dict.fromkeys(question for r in models.values() for question in r.question)
    found = {question: p for question in asked if (p := by_name.get(question.strip()))}
    for question, p in found.items():
        questions.gold[question], questions.problem[question] = p.answer, p.problem
    return len(found)


def read_all(
    arguments: Sequence[str], named: dict[str, str]
) -> tuple[dict[str, Responses], Questions, dict[str, dict[str, str]]]:
    """The models of all files (`FILE` or `NAME=FILE`), what is known of the questions, and each file's columns.

    named: the columns that the user names, by what they hold. Raises UserError for whatever can't be read, a
    question with two right answers, or two responses of a model with the same number.
    """
    models, questions, columns = {}, Questions(), {}
    files = [_named_path(a) for a in arguments]
    stems = [path.stem for _, path in files]
    for name, path in files:
        if str(path) in columns:
            raise UserError(f"{path}: is named twice")
        default = path.stem if stems.count(path.stem) == 1 else str(path)
        columns[str(path)] = read(open_source(path), name or default, name is not None, named, models, questions)
    for model, r in models.items():
        if None in r.sample:
            continue
        seen = set()
        for key in zip(r.question, r.sample, strict=True):
            if key in seen:
                raise UserError(
                    f"{r.source}: '{model}' has response number {key[1]} to question {short(key[0])} twice: remove one"
                )
            seen.add(key)
    return models, questions, columns
