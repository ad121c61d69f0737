"""Problems with verifiable answers: from a JSON Lines file, a hub data set, or the demo's world."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import yaml

from rlvd_jax.errors import UserError, nearest
from rlvd_jax.grading.answers import extract

if TYPE_CHECKING:  # The settings need pydantic, a problem does not.
    from rlvd_jax.config import ProblemsConfig


@dataclass(frozen=True)
class Problem:
    """A question with a gold answer that can be verified."""

    id: str
    """Unique in its set; it keys the question's random draws."""
    problem: str
    answer: str
    """The gold answer, without `\\boxed{}`."""
    solution: str | None = None
    level: int | None = None
    subject: str | None = None


class HubSet(NamedTuple):
    """Where on the hub a set is; an empty subset or split is to be found out."""

    repo: str
    subset: str
    split: str
    answers: dict[str, str]
    """Gold answers that the published set lacks, by the beginning of the problem."""


HUB_SETS = {
    "math-train": HubSet(
        "DigitalLearningGmbH/MATH-lighteval",
        "default",
        "train",
        # The box of these two solutions is empty; the solutions' own argument gives 0.
        {
            "For any integer $n>1$, the number of prime numbers greater than $n!+1$": "0",
            "You are given a sequence of $58$ terms; each term has the form $P+n$": "0",
        },
    ),
    "math-500": HubSet("HuggingFaceH4/MATH-500", "default", "test", {}),
    "aime25": HubSet("yentinglin/aime_2025", "default", "train", {}),
    "gsm8k-train": HubSet("openai/gsm8k", "main", "train", {}),
    "gsm8k-test": HubSet("openai/gsm8k", "main", "test", {}),
}

DEMO_SIZES = {"train": 4096, "test": 512}
"""Problems in the demo's two sets; `limit` draws from them as from any other set."""

COLUMNS = {
    "problem": ("problem", "question", "prompt", "query", "input", "instruction"),
    "answer": (
        "answer",
        "gold",
        "gold_answer",
        "ground_truth",
        "final_answer",
        "expected_answer",
        "reference_answer",
        "short_answer",
        "target",
        "label",
    ),
    "solution": ("solution", "reference_solution", "rationale", "reasoning", "response", "output"),
    "id": ("id", "unique_id", "problem_id", "question_id", "idx", "index"),
    "level": ("level", "difficulty"),
    "subject": ("subject", "type", "category", "topic"),
}
"""What hub data sets call the fields of a problem, best first; capitals and spaces don't matter."""


def load(config: ProblemsConfig) -> list[Problem]:
    """The problems that `config` names, filtered by level, then at most `limit` of them.

    Raises UserError for a source that is missing, malformed or empty, naming file and line or record.
    """
    if config.split and not config.hub:
        raise UserError("split is a setting of hub data sets only: remove it")
    if config.file:
        source, problems = config.file, read_file(Path(config.file))
    elif config.hub:
        source, problems = config.hub, _load_hub(config.hub, config.split)
    else:
        from rlvd_jax.demo import world  # The demo's world is made of problems: it imports this module.

        source, problems = f"the demo's {config.demo} set", world.problems(config.demo, DEMO_SIZES[config.demo], seed=0)
    if not problems:
        raise UserError(f"{source}: holds no problems")
    if config.levels:
        there = Counter(p.level for p in problems)
        problems = [p for p in problems if p.level in config.levels]
        if not problems:
            known = ", ".join("none" if level is None else str(level) for level in sorted(there, key=str))
            wanted = ", ".join(map(str, config.levels))
            raise UserError(f"{source}: no problem is of level {wanted} (levels there: {known})")
    return _draw(problems, config.limit, config.seed)


def digest(problems: Iterable[Problem]) -> str:
    """SHA-256, in hexadecimal, over ids, texts and answers: what sampling and grading depend on."""
    whole = json.dumps([(p.id, p.problem, p.answer) for p in problems])
    return hashlib.sha256(whole.encode()).hexdigest()


def _draw(problems: list[Problem], limit: int | None, seed: int) -> list[Problem]:
    """One problem from each of `limit` equal stretches of the list, so that a sorted file is covered evenly."""
    if limit is None or limit >= len(problems):
        return problems
    edges = np.arange(limit + 1) * len(problems) // limit
    # RandomState: its stream is frozen, so the same problems are drawn under every version of NumPy.
    return [problems[i] for i in np.random.RandomState(seed).randint(edges[:-1], edges[1:])]


# --- records -----------------------------------------------------------------------------------------------------


def _problem(record: dict, columns: dict[str, str], where: str, id: str, answers: dict[str, str]) -> Problem:
    """A Problem from a record.

    `columns` maps the fields of Problem to the record's keys, `where` names the record in errors, `id` is for a
    record without one, and `answers` are those of `HubSet`.
    """

    def field(name):
        return record.get(columns.get(name))

    def fail(name, what):
        raise UserError(f"{where}: '{columns[name]}' is {what}")

    problem, answer, solution, given = field("problem"), field("answer"), field("solution"), field("id")
    if problem is None:
        raise UserError(f"{where}: no '{columns['problem']}' (fields there: {_listed(record)})")
    if not isinstance(problem, str) or not problem.strip():
        fail("problem", "empty or not text")
    if solution is not None and not isinstance(solution, str):
        fail("solution", "not text")
    if given is not None and (isinstance(given, (bool, dict, list)) or not str(given).strip()):
        fail("id", "empty, or neither text nor a number")
    if answer is not None:
        gold = _gold(answer, f"{where}: '{columns['answer']}'")
        if solution is None and isinstance(answer, str) and "####" in answer:
            solution = answer  # GSM8K's answers are worked solutions.
    elif solution is not None:
        fixed = [a for start, a in answers.items() if problem.startswith(start)]
        if not fixed and extract(solution) is None and "####" not in solution:
            fail("solution", "all there is to take the answer from, but holds no \\boxed{}")
        gold = fixed[0] if fixed else _gold(solution, f"{where}: the box of '{columns['solution']}'")
    else:
        raise UserError(f"{where}: neither an answer nor a solution (fields there: {_listed(record)})")
    made = Problem(
        id=id if given is None else str(given),
        problem=problem,
        answer=gold,
        solution=solution,
        level=_level(field("level")),
        subject=None if field("subject") is None else str(field("subject")),
    )
    for name, value in vars(made).items():
        try:
            str(value).encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: the {name} is not valid Unicode (it holds a lone surrogate)") from None
    return made


def _listed(names: Iterable) -> str:
    return ", ".join(map(str, names)) or "none"


def _gold(value, where: str) -> str:
    """The gold answer in an answer field: the inside of its last box, or what follows `####`, or the whole."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, float):
        value = int(value) if value.is_integer() else value if math.isfinite(value) else None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UserError(f"{where} is neither text nor a number")
    text = str(value)
    if (inside := extract(text)) is not None:
        text = inside
    elif "####" in text:
        text = re.sub(r"(?<=\d),(?=\d{3})", "", text.rpartition("####")[2])
    if not text.strip():
        raise UserError(f"{where} is an empty answer")
    return text.strip()


def _level(value) -> int | None:
    """5 for 5, "5" and "Level 5"; None for what names no number, such as MATH's "Level ?"."""
    if isinstance(value, bool) or value is None:
        return None
    number = re.fullmatch(r"(?:level\s*)?(\d+)(?:\.0)?", str(value).strip(), re.IGNORECASE)
    return int(number[1]) if number else None


# --- files -------------------------------------------------------------------------------------------------------


def _json_lines(data: bytes, name: str) -> Iterator[tuple[str, dict]]:
    """(where, record) of each line that is not blank; `where` is file and line, for errors."""
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError:
            raise UserError(f"{where}: not UTF-8 text") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: JSON that cannot be read: {error}") from None
        if not isinstance(record, dict):
            raise UserError(f"{where}: a problem is a JSON object, this is {type(record).__name__}")
        yield where, record


def read_file(path: Path) -> list[Problem]:
    """The problems of a JSON Lines file, in its order; UserError names the line that is wrong."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such problems file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    columns = {name: name for name in COLUMNS}
    problems, seen = [], {}
    for where, record in _json_lines(data, str(path)):
        problem = _problem(record, columns, where, f"{path.stem}/{len(problems)}", {})
        if problem.id in seen:
            raise UserError(f"{where}: the id '{problem.id}' is that of {seen[problem.id].rpartition(', ')[2]} too")
        seen[problem.id] = where
        problems.append(problem)
    return problems


# --- the hub -----------------------------------------------------------------------------------------------------


def _load_hub(name: str, split: str | None) -> list[Problem]:
    if name in HUB_SETS:
        if split:
            raise UserError(f"{name} is one split already: remove split, or give the data set as owner/name")
        wanted = HUB_SETS[name]
        prefix = name
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII):
        # `split`, or `subset/split` where a data set has several subsets.
        subset, _, split = (split or "").rpartition("/")
        wanted = HubSet(name, subset, split, {})
        prefix = "/".join(filter(None, (name, subset, split)))
    else:
        raise UserError(f"'{name}' is neither a known set nor a hub data set owner/name{nearest(name, HUB_SETS)}")

    label, files, fetch = _listing(wanted.repo)
    rows = [
        row for file in _choose(label, wanted, files, fetch) for row in _rows(fetch(file), f"{wanted.repo}, {file}")
    ]
    names = list(dict.fromkeys(key for _, row in rows for key in row))
    known = {key.lower().replace(" ", "_"): key for key in reversed(names)}
    columns = {field: known[c] for field, candidates in COLUMNS.items() for c in reversed(candidates) if c in known}
    if rows and "problem" not in columns:
        raise UserError(f"{wanted.repo}: no column looks like a problem (columns there: {_listed(names)})")
    if rows and not columns.keys() & {"answer", "solution"}:
        raise UserError(
            f"{wanted.repo}: no column looks like an answer or a solution (columns there: {_listed(names)})"
        )
    ids = [row.get(columns.get("id")) for _, row in rows]
    if not all(isinstance(i, str) and i for i in ids) or len(set(ids)) < len(ids):
        columns.pop("id", None)  # A column of that name that does not tell them apart, or only within its split.
    return [
        _problem(row, columns, where, f"{prefix}/{number}", wanted.answers) for number, (where, row) in enumerate(rows)
    ]


def _listing(repo: str) -> tuple[str, list[str], Callable[[str], Path]]:
    """What to call a hub data set in errors, its files, and a function that brings one here.

    What an earlier run brought will do when the hub cannot be reached. huggingface_hub's environment variables
    (HF_HOME, HF_ENDPOINT, HF_TOKEN ...) are honoured.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        info = huggingface_hub.HfApi().dataset_info(repo, timeout=30)
    except errors.GatedRepoError:
        raise UserError(f"{repo}: accept the data set's terms on the hub and set HF_TOKEN to read it") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{repo}: the hub has no such data set, or it is private and needs HF_TOKEN") from None
    except Exception as error:  # The client passes on what its HTTP library raises, and that library has changed.
        try:
            cached = [
                r for r in huggingface_hub.scan_cache_dir().repos if (r.repo_type, r.repo_id) == ("dataset", repo)
            ]
        except errors.CacheNotFound:
            cached = []
        if not cached:
            raise UserError(
                f"{repo}: the hub cannot be reached and no earlier download is kept here "
                f"({_first_line(error)}): check the network, or export the problems to a JSON Lines file"
            ) from error
        folder = max(cached[0].revisions, key=lambda revision: revision.last_modified).snapshot_path
        files = [file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.is_file()]
        return f"{repo} as downloaded before (the hub cannot be reached)", files, folder.joinpath

    def fetch(file: str) -> Path:
        try:
            return Path(huggingface_hub.hf_hub_download(repo, file, repo_type="dataset", revision=info.sha))
        except Exception as error:
            raise UserError(f"{repo}: {file} cannot be downloaded from the hub ({_first_line(error)})") from error

    return repo, [sibling.rfilename for sibling in info.siblings or ()], fetch


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _choose(label: str, wanted: HubSet, files: list[str], fetch: Callable[[str], Path]) -> list[str]:
    """The files of the wanted split, all of them, in order."""
    subsets = _splits(files, fetch)
    if not subsets:
        raise UserError(f"{label}: no Parquet, JSON Lines or JSON files (files there: {_listed(files)})")
    subset = wanted.subset or (next(iter(subsets)) if len(subsets) == 1 else "default")
    if subset not in subsets:
        if wanted.subset or len(subsets) == 1:
            raise UserError(f"{label}: no subset '{subset}'{nearest(subset, subsets)}")
        raise UserError(f"{label} has the subsets {_listed(subsets)}: set split to subset/split")
    splits = subsets[subset]
    split = wanted.split or (next(iter(splits)) if len(splits) == 1 else None)
    if split is None:
        raise UserError(f"{label} has the splits {_listed(splits)}: set split to one of them")
    if split not in splits:
        raise UserError(f"{label}: no split '{split}'{nearest(split, splits)}")
    chosen = splits[split]
    for file in chosen:
        if (part := re.search(r"-of-(\d+)", file)) and len(chosen) < int(part[1]):
            raise UserError(
                f"{label}: {len(chosen)} of the {int(part[1])} files of split '{split}' are there "
                "(an unfinished download?): run again with the hub in reach"
            )
    return chosen


def _splits(files: list[str], fetch: Callable[[str], Path]) -> dict[str, dict[str, list[str]]]:
    """subset → split → files: as the data set's card declares them, else by their names."""
    data = [f for f in sorted(files) if f.endswith((".parquet", ".jsonl", ".json")) and f != "dataset_infos.json"]
    found = {}
    for config in _card(fetch("README.md")).get("configs") or () if "README.md" in files else ():
        groups = config.get("data_files")
        if isinstance(groups, dict):
            groups = [{"split": split, "path": path} for split, path in groups.items()]
        elif isinstance(groups, str):
            groups = [groups]
        splits = found.setdefault(str(config.get("config_name", "default")), {})
        for group in groups or ():
            group = group if isinstance(group, dict) else {"path": group}
            paths = group.get("path") or []
            for path in [paths] if isinstance(paths, str) else paths:
                matching = fnmatch.filter(data, f"{config.get('data_dir') or ''}/{path}".strip("/").removeprefix("./"))
                splits.setdefault(str(group.get("split", "train")), []).extend(matching)
    found = {name: kept for name, splits in found.items() if (kept := {s: f for s, f in splits.items() if f})}
    if found or not data:
        return found
    kind = next(e for e in (".parquet", ".jsonl", ".json") if any(f.endswith(e) for f in data))
    splits = {}
    for file in data:
        if file.endswith(kind):
            splits.setdefault(_split_of(file), []).append(file)
    return {"default": splits}


def _card(path: Path) -> dict:
    """The YAML header of a data set's README.md; empty where there is none."""
    header = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        card = yaml.safe_load(header[1]) if header else None
    except yaml.YAMLError:
        card = None
    return card if isinstance(card, dict) else {}


def _split_of(file: str) -> str:
    """The split that a file's name tells: `data/aime25-00000-of-00001.parquet` is aime25, `dev.jsonl` is validation."""
    if numbered := re.search(r"([^/]+)-\d+-of-\d+", file):
        return numbered[1]
    words = re.findall(r"[a-z]+", file.lower())
    for split, names in (
        ("test", ("test", "testing", "eval", "evaluation")),
        ("validation", ("validation", "valid", "val", "dev")),
    ):
        if set(words) & set(names):
            return split
    return "train"


def _rows(path: Path, name: str) -> list[tuple[str, dict]]:
    """(where, record) for every record of a Parquet, JSON Lines or JSON file."""
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet as pq

        try:
            records = pq.ParquetFile(path).read().to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{name}: not a whole Parquet file ({_first_line(error)})") from None
        return [(f"{name}, row {i}", record) for i, record in enumerate(records)]
    data = path.read_bytes()
    if name.endswith(".json"):
        try:
            whole = json.loads(data)
        except (ValueError, RecursionError):
            whole = None  # JSON Lines under another name, or broken: the lines tell where.
        if isinstance(whole, list) and all(isinstance(record, dict) for record in whole):
            return [(f"{name}, record {i}", record) for i, record in enumerate(whole)]
    return list(_json_lines(data, name))
