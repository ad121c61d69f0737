import hashlib
import io
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import local_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlvd_jax import problems
from rlvd_jax.config import ProblemsConfig
from rlvd_jax.errors import UserError
from rlvd_jax.grading import extract
from rlvd_jax.problems import HUB_SETS, Problem

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"


def from_file(tmp_path, *lines, **settings):
    """Load a file of these lines: records, or text or bytes as they are."""
    path = tmp_path / "set.jsonl"
    raw = [
        line if isinstance(line, bytes) else line.encode() if isinstance(line, str) else json.dumps(line).encode()
        for line in lines
    ]
    path.write_bytes(b"\n".join(raw))
    return problems.load(ProblemsConfig(file=str(path), **settings))


def test_a_file(tmp_path):
    loaded = from_file(
        tmp_path,
        b'\xef\xbb\xbf{"id": "a", "problem": "What is $1+1$?\\n", "answer": "2", "level": "Level 5", '
        b'"subject": "Sums"}',
        "",
        {"problem": "é\u2028", "solution": "First \\boxed{1}, then \\boxed{\\frac{1}{2}}.", "level": "Level ?"},
        {"problem": "x", "answer": 70.0, "level": 3, "id": 17},
        {"problem": "y", "answer": "so \\boxed{ \\{1\\} }", "solution": "no box"},
        {"problem": "z", "answer": None, "solution": "\\boxed 2$", "extra": [1]},
        {"problem": "w", "solution": "$\\boxed {17}.$"},
    )
    assert loaded == [
        Problem("a", "What is $1+1$?\n", "2", None, 5, "Sums"),
        Problem("set/1", "é\u2028", "\\frac{1}{2}", "First \\boxed{1}, then \\boxed{\\frac{1}{2}}.", None, None),
        Problem("17", "x", "70", None, 3, None),
        Problem("set/3", "y", "\\{1\\}", "no box", None, None),
        Problem("set/4", "z", "2", "\\boxed 2$", None, None),
        Problem("set/5", "w", "17", "$\\boxed {17}.$", None, None),
    ]


GOOD = {"id": "a", "problem": "p", "answer": "1"}
BAD = {
    "broken JSON": ('{"problem": "p", ', r"line 2: not JSON: .* at column 18"),
    "not an object": ("[1]", r"line 2: a problem is a JSON object, this is list"),
    "not UTF-8": (b'{"problem": "\xff", "answer": "1"}', r"line 2: not UTF-8 text"),
    "missing problem": ({"question": "p", "answer": "1"}, r"line 2: no 'problem' \(fields there: question, answer\)"),
    "empty problem": ({"problem": " ", "answer": "1"}, r"line 2: 'problem' is empty or not text"),
    "problem of another type": ({"problem": 5, "answer": "1"}, r"line 2: 'problem' is empty or not text"),
    "missing answer": ({"problem": "p"}, r"line 2: neither an answer nor a solution \(fields there: problem\)"),
    "empty answer": ({"problem": "p", "answer": " "}, r"line 2: 'answer' is an empty answer"),
    "answer of another type": ({"problem": "p", "answer": {"a": 1}}, r"line 2: 'answer' is neither text nor a number"),
    "answer true": ({"problem": "p", "answer": True}, r"line 2: 'answer' is neither text nor a number"),
    "answer NaN": ('{"problem": "p", "answer": NaN}', r"line 2: 'answer' is neither text nor a number"),
    "empty box": ({"problem": "p", "solution": "so \\boxed{}"}, r"line 2: the box of 'solution' is an empty answer"),
    "no box": ({"problem": "p", "solution": "so 5"}, r"line 2: 'solution' is all there is .* no \\boxed\{\}"),
    "open box": ({"problem": "p", "solution": "\\boxed{5"}, r"line 2: 'solution' is all there is"),
    "solution of another type": ({"problem": "p", "answer": "1", "solution": 5}, r"line 2: 'solution' is not text"),
    "duplicate id": ({**GOOD, "problem": "q"}, r"line 2: the id 'a' is that of line 1 too"),
    "empty id": ({**GOOD, "id": ""}, r"line 2: 'id' is empty"),
    "lone surrogate": ('{"problem": "\\ud800", "answer": "1"}', r"line 2: the problem is not valid Unicode"),
    "lone surrogate in a list": ('{"problem": "p", "answer": ["\\ud800"]}', r"line 2: the answer is not valid Unicode"),
    "huge number": ('{"problem": "p", "answer": ' + "9" * 5000 + "}", r"line 2: JSON that cannot be read"),
    "deep": ("[" * 200_000, r"line 2: JSON that cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_named(tmp_path, case):
    line, message = BAD[case]
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "set.jsonl")) + ", " + message) as caught:
        from_file(tmp_path, GOOD, line)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_empty(tmp_path):
    with pytest.raises(UserError, match="there is no such problems file"):
        problems.load(ProblemsConfig(file=str(tmp_path / "none.jsonl")))
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        problems.load(ProblemsConfig(file=str(tmp_path)))
    with pytest.raises(UserError, match="holds no problems"):
        from_file(tmp_path, "", " ")
    with pytest.raises(UserError, match="split is a setting of hub data sets only"):
        from_file(tmp_path, GOOD, split="train")


def test_levels(tmp_path):
    lines = [{"problem": str(i), "answer": "1", "level": i % 5 or None} for i in range(20)]
    assert [p.problem for p in from_file(tmp_path, *lines, levels=(4, 2))] == [
        "2",
        "4",
        "7",
        "9",
        "12",
        "14",
        "17",
        "19",
    ]
    with pytest.raises(UserError, match=r"no problem is of level 5, 6 \(levels there: 1, 2, 3, 4, none\)"):
        from_file(tmp_path, *lines, levels=(5, 6))


def test_limit_covers_the_file_evenly_in_its_order(tmp_path):
    lines = [{"problem": str(i), "answer": "1"} for i in range(100)]
    drawn = {}
    for seed in range(200):
        numbers = [int(p.problem) for p in from_file(tmp_path, *lines, limit=20, seed=seed)]
        assert [n // 5 for n in numbers] == list(range(20))
        drawn[seed] = numbers
    assert len({n for numbers in drawn.values() for n in numbers}) == 100  # Each is drawn by some seed.
    assert drawn[0] == [int(p.problem) for p in from_file(tmp_path, *lines, limit=20)]
    assert len(from_file(tmp_path, *lines, limit=1000)) == 100
    levels = [{**line, "level": i % 2} for i, line in enumerate(lines)]
    assert {p.level for p in from_file(tmp_path, *levels, limit=30, levels=(1,))} == {1}


def test_digest_is_over_ids_texts_and_answers():
    one = [Problem("a", "bc", "d")]
    assert problems.digest(one) == hashlib.sha256(b'[["a", "bc", "d"]]').hexdigest()
    same = [Problem("a", "bc", "d", "solution", 5, "subject")]
    assert problems.digest(same) == problems.digest(one)
    others = [[Problem("ab", "c", "d")], [Problem("a", "bc", "e")], one * 2, []]
    assert len({problems.digest(p) for p in [one, *others]}) == 5


def test_the_demos_problems():
    train, test = (problems.load(ProblemsConfig(demo=split)) for split in ("train", "test"))
    assert (len(train), len(test)) == (4096, 512)
    assert not {p.problem for p in train} & {p.problem for p in test}
    few = problems.load(ProblemsConfig(demo="test", limit=64, levels=(3, 4)))
    assert len(few) == 64 and {p.level for p in few} == {3, 4}


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize(
    ("name", "count"), [("math_train", 7500), ("math500", 500), ("aime25", 30), ("gsm8k_train", 7473)]
)
def test_real_sets(name, count):
    path = DATA / f"{name}.jsonl"
    loaded = problems.load(ProblemsConfig(file=str(path)))
    assert len(loaded) == len({p.id for p in loaded}) == count
    records = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert loaded == [Problem(**record) for record in records]
    if name.startswith("math"):
        # Two boxes of MATH train are empty; every other gold answer is the last box.
        differ = [p.id for p in loaded if extract(p.solution) != p.answer]
        assert differ == ["train/number_theory/7115.json", "train/number_theory/7117.json"] * (name == "math_train")
    if name == "math_train":
        assert Counter(p.level for p in loaded) == {1: 564, 2: 1348, 3: 1592, 4: 1690, 5: 2304, None: 2}
        assert len(problems.load(ProblemsConfig(file=str(path), levels=(3, 4, 5)))) == 5586


# --- a hub on this machine ---------------------------------------------------------------------------------------


def parquet(rows):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def card(**subsets):
    """README.md with the header that declares each subset's splits and their files."""
    lines = ["---", "license: mit", "configs:"]
    for subset, splits in subsets.items():
        lines += [f"- config_name: {subset}", "  data_files:"]
        for split, path in splits.items():
            lines += [f"  - split: {split}", f"    path: {path}"]
    return "\n".join([*lines, "---", "# A data set", ""]).encode()


def math_rows(split, count):
    rows = [
        {
            "problem": f"{split} problem {i}",
            "level": f"Level {i % 5 + 1}",
            "type": "Algebra",
            "solution": f"It is $\\boxed{{{i}}}$.",
        }
        for i in range(count)
    ]
    # As published.
    rows[1] |= {
        "problem": "For any integer $n>1$, the number of prime numbers greater than $n!+1$ and less than $n!+n$ is",
        "solution": "There are $\\boxed{}$ primes.",
    }
    rows[2]["level"] = "Level ?"
    return rows


GSM = [
    {"question": "How many?", "answer": "She has 1,000 <<1000+1=1001>>1001.\n#### 1,001"},
    {"question": "And now?", "answer": "None.\n#### -3"},
]

HUB = {
    "DigitalLearningGmbH/MATH-lighteval": {
        "README.md": card(
            algebra={"train": "algebra/train-*", "test": "algebra/test-*"},
            default={"train": "data/train-*", "test": "data/test-*"},
        ),
        "algebra/train-00000-of-00001.parquet": parquet(math_rows("algebra", 3)),
        "data/train-00000-of-00002.parquet": parquet(math_rows("train", 5)),
        "data/train-00001-of-00002.parquet": parquet([{**math_rows("late", 4)[3]}]),
        "data/test-00000-of-00001.parquet": parquet(math_rows("test", 3)),
    },
    "HuggingFaceH4/MATH-500": {
        "README.md": b"# No header",
        "test.jsonl": jsonl(
            [
                {
                    "problem": "p",
                    "solution": "\\boxed{5}",
                    "answer": "5",
                    "subject": "Geometry",
                    "level": 2,
                    "unique_id": "test/geometry/1.json",
                }
            ]
        ),
    },
    "yentinglin/aime_2025": {
        "README.md": card(default={"train": "data/train-*"}, part1={"train": "part1/train-*"}),
        "data/train-00000-of-00001-243207c6c994e1bd.parquet": parquet(
            [
                {"id": i % 2, "problem": f"a{i}", "answer": str(i), "solution": "", "url": "u", "year": 2025}
                for i in range(4)
            ]
        ),
        "part1/train-00000-of-00001-aa.parquet": parquet([{"problem": "part", "answer": "1"}]),
    },
    "openai/gsm8k": {
        "README.md": card(
            main={"train": "main/train-*", "test": "main/test-*"}, socratic={"train": "socratic/train-*"}
        ),
        "main/train-00000-of-00001.parquet": parquet(GSM),
        "main/test-00000-of-00001.parquet": parquet(GSM[:1]),
        "socratic/train-00000-of-00001.parquet": parquet(GSM * 3),
    },
    "some/json": {
        "data/train.json": json.dumps([{"Question": "q", "Final Answer": 7, "ID": "x1"}]).encode(),
        "data/dev.json": jsonl([{"Question": "v", "Final Answer": [8]}]),
        "dataset_infos.json": b"{}",
    },
    "some/columns": {"train.jsonl": jsonl([{"text": "t", "tokens": 3}])},
    "some/unanswered": {"train.jsonl": jsonl([{"problem": "t", "tokens": 3}])},
    "some/broken": {"train.parquet": b"PAR1 and no more"},
    "some/badline": {"a/train.jsonl": jsonl(GSM[:1]) + b'{"question": "open'},
    "some/csv": {"train.csv": b"a,b"},
    "some/part": {"train-00001-of-00002.parquet": parquet(GSM)},
    "some/empty": {"train.jsonl": b""},
}

CLIENT = """
import dataclasses, json, sys
from rlvd_jax import problems
from rlvd_jax.config import ProblemsConfig
from rlvd_jax.errors import UserError

for settings in json.load(sys.stdin):
    try:
        found = [dataclasses.astuple(p) for p in problems.load(ProblemsConfig(**settings))]
    except UserError as error:
        found = str(error)
    print(json.dumps(found))
"""


def client(home, endpoint, requests, **environment):
    """Load each of `requests` in a fresh process, since huggingface_hub reads its environment when imported."""
    done = subprocess.run(
        [sys.executable, "-c", CLIENT],
        input=json.dumps(requests),
        env=local_hub.environment(home, endpoint, **environment),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def hub():
    with local_hub.serve(datasets=HUB, gated=["some/gated"]) as server:
        yield server.url


def test_hub_sets(hub, tmp_path):
    names = ["math-train", "math-500", "aime25", "gsm8k-train", "gsm8k-test"]
    requests = [
        *({"hub": name} for name in names),
        {"hub": "math-train", "levels": [5]},
        {"hub": "openai/gsm8k", "split": "socratic/train", "limit": 2},
        {"hub": "some/json", "split": "train"},
        {"hub": "some/json", "split": "validation"},
    ]
    math, math500, aime, gsm, gsm_test, level5, socratic, train, dev = client(tmp_path, hub, requests)
    assert [(p[0], p[1], p[2], p[4], p[5]) for p in math] == [
        ("math-train/0", "train problem 0", "0", 1, "Algebra"),
        ("math-train/1", math_rows("", 3)[1]["problem"], "0", 2, "Algebra"),
        ("math-train/2", "train problem 2", "2", None, "Algebra"),
        ("math-train/3", "train problem 3", "3", 4, "Algebra"),
        ("math-train/4", "train problem 4", "4", 5, "Algebra"),
        ("math-train/5", "late problem 3", "3", 4, "Algebra"),
    ]
    assert math500 == [["test/geometry/1.json", "p", "5", "\\boxed{5}", 2, "Geometry"]]
    assert [p[:3] for p in aime] == [[f"aime25/{i}", f"a{i}", str(i)] for i in range(4)]
    assert gsm == [
        ["gsm8k-train/0", "How many?", "1001", GSM[0]["answer"], None, None],
        ["gsm8k-train/1", "And now?", "-3", GSM[1]["answer"], None, None],
    ]
    assert gsm_test == [["gsm8k-test/0", *gsm[0][1:]]]
    assert [p[0] for p in level5] == ["math-train/4"]
    assert len(socratic) == 2 and socratic[0][0].startswith("openai/gsm8k/socratic/train/")
    assert train == [["x1", "q", "7", None, None, None]]
    assert dev == [["some/json/validation/0", "v", "8", None, None, None]]

    # What is here already will do when the hub is out of reach, and nothing else will.
    for endpoint, environment in ((hub, {"HF_HUB_OFFLINE": "1"}), ("http://127.0.0.1:9", {})):
        other = {"hub": HUB_SETS["math-train"].repo, "split": "default/test"}
        requests = [{"hub": "math-train"}, {"hub": "gsm8k-train"}, other, {"hub": "some/columns"}]
        again, gsm_again, other_split, never = client(tmp_path, endpoint, requests, **environment)
        assert again == math and gsm_again == gsm
        assert other_split.endswith("as downloaded before (the hub cannot be reached): no split 'test' (known: train)")
        assert never.startswith("some/columns: the hub cannot be reached and no earlier download is kept here (")


def test_what_the_hub_does_not_have(hub, tmp_path):
    cases = {
        ("math500", None): "'math500' is neither a known set nor a hub data set owner/name (did you mean 'math-500'?)",
        ("math-500", "test"): "math-500 is one split already: remove split, or give the data set as owner/name",
        ("no/such", None): "no/such: the hub has no such data set, or it is private and needs HF_TOKEN",
        ("some/gated", None): "some/gated: accept the data set's terms on the hub and set HF_TOKEN to read it",
        ("openai/gsm8k", None): "openai/gsm8k has the subsets main, socratic: set split to subset/split",
        ("openai/gsm8k", "main/dev"): "openai/gsm8k: no split 'dev' (known: test, train)",
        ("openai/gsm8k", "mein/train"): "openai/gsm8k: no subset 'mein' (did you mean 'main'?)",
        ("some/json", None): "some/json has the splits validation, train: set split to one of them",
        ("some/columns", None): "some/columns: no column looks like a problem (columns there: text, tokens)",
        ("some/unanswered", None): "some/unanswered: no column looks like an answer or a solution (columns there: "
        "problem, tokens)",
        ("some/csv", None): "some/csv: no Parquet, JSON Lines or JSON files (files there: train.csv)",
        ("some/part", None): "some/part: 1 of the 2 files of split 'train' are there (an unfinished download?): run "
        "again with the hub in reach",
        ("some/empty", None): "some/empty: holds no problems",
    }
    requests = [{"hub": name, "split": split} for name, split in cases]
    assert client(tmp_path, hub, requests) == list(cases.values())
    broken, badline = client(tmp_path, hub, [{"hub": "some/broken"}, {"hub": "some/badline"}])
    assert broken.startswith("some/broken, train.parquet: not a whole Parquet file (")
    assert badline.startswith("some/badline, a/train.jsonl, line 2: not JSON: ")
