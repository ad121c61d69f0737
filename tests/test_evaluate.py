import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rlvd_jax.evaluate import PROBLEMS, main, parser, pick_samples
from rlvd_jax.foreign import Questions, Responses

ROOT = Path(__file__).parents[1]
NOTE = "The files' own verdicts on 480 of 480 responses are kept; --regrade judges them anew."


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def graded_rows(rate, questions=30, n=8, seed=0, **fields):
    """Graded responses: question q is right with probability rate(q)."""
    rng = np.random.default_rng(seed)
    rows = []
    for q in range(questions):
        for _ in range(n):
            right = bool(rng.random() < rate(q / questions))
            answer = str(q) if right else f"wrong {rng.integers(3)}"
            row = {"problem": f"problem {q}", "answer": str(q), "response": f"Wait. \\boxed{{{answer}}}"}
            rows.append(row | {"correct": right, "tokens": 10 if right else 20, "finish_reason": "stop"} | fields)
    return rows


@pytest.fixture
def two_models(tmp_path):
    base = write(tmp_path / "base.jsonl", graded_rows(lambda x: x))
    return base, write(tmp_path / "rl.jsonl", graded_rows(lambda x: min(1, 1.5 * x), seed=1))


def test_two_models_end_to_end(two_models, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*two_models, "--claim", "rl", "--group", "text", "--output", str(out), "--bootstrap", "500"]) == 0
    printed = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert (out / "index.html").stat().st_size > 10_000
    assert f"The page: {out / 'index.html'}" in printed
    models = results["problems"][PROBLEMS]["models"]
    for name, path in zip(("base", "rl"), two_models, strict=True):
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        right = np.array([row["correct"] for row in rows]).reshape(30, 8)
        m = models[name]
        assert m["accuracy"]["value"] == pytest.approx(right.mean())
        assert m["pass"]["value"][-1] == pytest.approx(right.any(axis=1).mean())
        assert f"{100 * right.mean():.1f} [" in printed
        assert (m["length"]["correct"]["value"], m["length"]["incorrect"]["value"]) == (10, 20)
        assert m["keywords"]["all"]["value"] == 1 and m["truncated"] == 0
    comparison = results["problems"][PROBLEMS]["comparisons"]["base→rl"]
    assert comparison["difference"]["accuracy"]["low"] > 0 and comparison["claim"] == "rl"
    assert "shown: RL raises accuracy." in printed
    assert results["length_unit"] == "tokens" and results["notes"] == [NOTE]
    assert results["settings"]["columns"][two_models[0]]["correct"] == "correct"


def test_the_real_grader_judges_what_is_not_graded(tmp_path, capsys):
    responses = [r"\boxed{\frac12}", "so $0.5$", r"\boxed{2}", "no idea", r"\boxed{1/2}", r"\boxed{2.0}"]
    rows = [{"problem": "half?", "gold": "0.5", "response": text} for text in responses]
    rows[2]["correct"] = True  # believed, unless --regrade
    file = write(tmp_path / "m.jsonl", rows)
    for option, right in ((["--workers", "1"], 4), (["--workers", "1", "--regrade"], 3)):
        out = tmp_path / str(right)
        assert main([file, "--output", str(out), *option]) == 0
        m = json.loads((out / "results.json").read_text())["problems"][PROBLEMS]["models"]["m"]
        assert m["accuracy"]["value"] == pytest.approx(right / 6)
        assert m["no_answer"] == pytest.approx(1 / 6)
        # Answers: one half three times, two twice, and none.
        assert m["entropy"]["value"] == pytest.approx(-(np.log(1 / 2) / 2 + np.log(1 / 3) / 3 + np.log(1 / 6) / 6))
        assert m["maj"]["value"] == 1
        assert m["length"]["all"]["value"] == pytest.approx(8 / 6)
        assert m["truncated"] is None
        printed = capsys.readouterr().out
        assert ("Note: The files' own verdicts on 1 of 6 responses are kept" in printed) == (right == 4)
        page = (out / "index.html").read_text()
        assert "Length, words" in page and "Lengths are in words: not every" in page and "Length, tokens" not in page
        assert "Note: Lengths are in words" in printed and "Note: m: no response says whether it was cut off" in printed


def test_right_answers_from_a_file_of_problems(tmp_path, capsys):
    """As where vLLM wrote objects and no right answers; questions are found by their text or by their id."""
    outputs = [{"text": rf"\boxed{{{n}}}", "finish_reason": "stop"} for n in (2, 3)]
    file = write(tmp_path / "m.jsonl", [{"prompt": "1 + 1", "outputs": outputs}, {"prompt": "b", "outputs": outputs}])
    problems = write(
        tmp_path / "p.jsonl",
        [{"problem": "1 + 1", "answer": "2"}, {"id": "b", "problem": "5 + 5", "answer": "10"}],
    )
    options = [file, "--response-column", "outputs.text", "--stop-column", "outputs.finish_reason", "--workers", "1"]
    assert main(options) == 2
    assert "name the column with --gold-column, or a file of problems with --problems" in capsys.readouterr().err
    assert main([*options, "--problems", problems, "--output", str(tmp_path / "out")]) == 0
    m = json.loads((tmp_path / "out" / "results.json").read_text())["problems"][PROBLEMS]["models"]["m"]
    assert (m["questions"], m["samples"], m["accuracy"]["value"], m["truncated"]) == (2, 2, 0.25, 0)
    assert "5 + 5" in (tmp_path / "out" / "index.html").read_text()
    other = write(tmp_path / "other.jsonl", [{"problem": "elsewhere", "answer": "2"}])
    assert main([*options, "--problems", other]) == 2
    assert "other.jsonl, by its text or its id: the first is '1 + 1'" in capsys.readouterr().err


def test_models_in_one_file_with_other_questions_and_samples(tmp_path, capsys):
    rows = graded_rows(lambda x: x, model="a") + graded_rows(lambda x: x, questions=20, n=4, seed=2, model="b")
    file = write(tmp_path / "all.jsonl", rows + graded_rows(lambda x: 1, questions=1, n=1, model="b"))
    assert main([file, "--group", "text", "--base", "b", "--bootstrap", "200"]) == 0
    printed = capsys.readouterr().out
    assert "Note: b has 20 questions and a 30: they are compared on the 20 that both have." in printed
    assert "Note: b has 4 to 5 responses a question: its pass@k ends at k = 4." in printed
    assert "a against b (20 questions)" in printed


def test_our_own_response_set(tmp_path, capsys):
    from rlvd_jax.responses import Response, ResponseSet

    responses = ResponseSet(tmp_path / "set", {"model": "m"})
    rows = [Response(f"q{i}", s, "wait", 5 + s, -1.0, "end", str(s), s == 0) for i in range(12) for s in range(4)]
    responses.add(rows)
    assert main([str(tmp_path / "set"), "--group", "text", "--bootstrap", "200"]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("set "))
    shares = "25.0 [25.0, 25.0]  25.0 [25.0, 25.0]  100.0 [100.0, 100.0]"
    assert line.split() == f"set 12 4 {shares} 4 1.39 [1.39, 1.39] 6.5 [6.5, 6.5] 0.0".split()


@pytest.mark.parametrize(
    "change, options, message",
    [
        (None, ["no-such-file.jsonl"], "no-such-file.jsonl: there is no such file"),
        (None, ["--base", "bas"], r"--base: 'bas' is not among the models (did you mean 'base'?)"),
        (None, ["--claim", "r1"], "--claim r1: 'r1' is not a kind of claim (did you mean 'rl'?)"),
        (None, ["--claim", "x=rl"], "--claim x=rl: 'x' is not among the models (known: base, rl)"),
        (None, ["--output", __file__], "test_evaluate.py is a file, not a directory"),
        (None, ["--bootstrap", "1"], "--bootstrap: is 100 at least, not 1"),
        (None, ["--gold-column", "truth"], "has no column 'truth'"),
        ({"correct": None, "answer": None}, [], "there is no right answer to question 'problem 0' to judge"),
        ({"problem": "elsewhere", "answer": "1"}, [], "'base' and 'rl' have no question in common"),
        ({"answer": "100"}, [], "the right answer to question 'problem 0' is '100', but it is '0' in"),
    ],
)
def test_bad_input_is_one_sentence(two_models, tmp_path, capsys, change, options, message):
    base, rl = two_models
    if change is not None:
        write(Path(rl), [row | change for row in graded_rows(lambda x: x, questions=1)])
    if change == {"correct": None, "answer": None}:
        write(Path(base), [row | change for row in graded_rows(lambda x: x, questions=1)])
    out = tmp_path / "out"
    assert main([base, rl, "--group", "text", "--output", str(out), *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not out.exists()


def test_every_column_can_be_named():
    args = parser().parse_args(["f", "--problem-column", "a", "--stop-column", "-"])
    assert (args.problem_column, args.stop_column, args.gold_column) == ("a", "-", None)


def test_ten_responses_are_shown_of_different_questions():
    from rlvd_jax.evaluation import Graded

    question = [f"q{i % 15}" for i in range(60)]
    r = Responses("f", question, ["text"] * 60, [None] * 60, [i % 15 > 7 for i in range(60)], ["1"] * 60)
    r.tokens, r.stop = [3] * 60, [None, True, False] * 20
    graded = {"m": Graded.from_columns(question, r.correct, r.tokens, [0] * 60, texts=r.text)}
    shown = pick_samples({"m": r}, Questions(gold={"q0": "7"}), graded, "m", 0)["m"]
    assert len(shown) == 10 == len({s["problem"] for s in shown})
    order = ["[0]", "[3–4]"]
    assert [order.index(s["bin"]) for s in shown] == sorted(order.index(s["bin"]) for s in shown)
    assert all(s["correct"] == (s["bin"] == "[3–4]") for s in shown)
    few = Responses("f", ["q"] * 3, list("abc"), [None] * 3, [True] * 3, ["1"] * 3, [1] * 3, [False] * 3)
    graded = {"m": Graded.from_columns(few.question, few.correct, few.tokens, [0] * 3, texts=few.text)}
    assert {s["text"] for s in pick_samples({"m": few}, Questions(), graded, "m", 0)["m"]} == set("abc")


def test_the_command_runs_without_jax(tmp_path):
    file = write(tmp_path / "m.jsonl", graded_rows(lambda x: x, questions=6, n=4))
    code = (
        "import sys; sys.modules['jax'] = None\n"
        "from rlvd_jax.evaluate import main\n"
        f"sys.exit(main([{file!r}, '--group', 'text', '--bootstrap', '200', '--output', {str(tmp_path / 'out')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "results.json").exists()
    done = subprocess.run(
        [sys.executable, "-m", "rlvd_jax.evaluate", "no.jsonl"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stderr == "error: no.jsonl: there is no such file\n" and done.stdout == ""
