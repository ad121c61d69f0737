"""The tutorial's files and commands, taken out of the document and run in small: what it shows is what there is."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import training_helpers

from rlvd_jax import evaluate, run

TEXT = (Path(__file__).parents[1] / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCKS = [(info.split(), body) for info, body in re.findall(r"^```([^\n]*)\n(.*?)^```$", TEXT, re.M | re.S)]
FILES = {info[1]: body for info, body in BLOCKS if len(info) == 2}
COMMANDS = {
    line: (
        BLOCKS[i + 1][1] if i + 1 < len(BLOCKS) and not BLOCKS[i + 1][0] else None
    )  # what it prints, if that's shown
    for i, (info, body) in enumerate(BLOCKS)
    if info == ["bash"]
    for line in body.replace("\\\n", " ").splitlines()
}
SMALL = [
    *("problems.short.limit=4", "problems.long.limit=4", "sampling.samples=4", "sampling.max_tokens=12"),
    *("models.rl.grpo.steps=1", "models.rl.grpo.questions=2", "models.rl.grpo.samples=4"),
    *("models.rl.grpo.evaluate_every=", "models.self.sft.samples=4", "models.self.sft.epochs=1", "bootstrap=100"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tutorial's files, its problems made."""
    path = tmp_path_factory.mktemp("tutorial")
    for name, body in FILES.items():
        (path / name).write_text(body)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        runpy.run_path("make_problems.py")
    return path


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def commands(module: str) -> dict[str, str | None]:
    """The arguments of the commands that run a module, and what the tutorial says they print."""
    start = f"python -m rlvd_jax.{module} "
    return {line.removeprefix(start): shown for line, shown in COMMANDS.items() if line.startswith(start)}


def test_the_problems(here):
    shown = COMMANDS["head -n 2 short.jsonl long.jsonl"]
    for name in ("short.jsonl", "long.jsonl"):
        assert "".join((here / name).read_text().splitlines(keepends=True)[:2]) in shown


def test_the_plan_and_the_mistake(here, capsys):
    assert run.main(["mine.yaml", "--plan"]) == 0
    assert capsys.readouterr().out == commands("run")["mine.yaml --plan"]
    (wrong,) = [line for line in commands("run") if "stpes" in line]
    assert run.main(shlex.split(wrong)) == 2
    assert capsys.readouterr().err == commands("run")[wrong]
    assert not (here / "runs").exists()


def test_the_study_and_its_changes(here, capsys):
    """All of it is done once; then the plan says what each change redoes."""
    changes = [shlex.split(line)[1:] for line in commands("run") if "=" in line and "stpes" not in line]
    assert len(changes) == 2
    for change in ([], *([override.replace("128", "8") for override in change] for change in changes)):
        assert run.main(["mine.yaml", "--plan", *SMALL, *change]) == 0
        states = dict(
            re.findall(r"^((?:sample|train) \S+(?: on \S+)?) +(done|next|to do)", capsys.readouterr().out, re.M)
        )
        left = [step for step, state in states.items() if state != "done"]
        if not change:
            assert len(left) == 6
            with training_helpers.quick_compilation():
                assert run.main(["mine.yaml", "--quiet", *SMALL]) == 0
            printed = capsys.readouterr().out
            steps = re.findall(r"^\[\d/6\] (.*)", printed, re.M)
            assert steps == left and "\npage: runs/mine/report/index.html (" in printed
            assert (here / "runs/mine/report/index.html").exists()
        elif len(change) == 1:
            assert left == ["sample base on long", "sample rl on long", "sample self on long"]
        else:
            assert {"train rl", "sample rl on long"} < set(left) and "train self" not in left


def test_responses_of_another_engine(here, capsys):
    """The message and the numbers, intervals aside, that the tutorial shows."""
    wrong, right = commands("evaluate")
    assert evaluate.main(shlex.split(wrong)) == 2
    assert capsys.readouterr().err == commands("evaluate")[wrong]
    assert evaluate.main([*shlex.split(right), "--workers", "1"]) == 0
    printed, shown = (
        re.sub(r" +|\[.*?\]", " ", x).split() for x in (capsys.readouterr().out, commands("evaluate")[right])
    )
    assert printed == shown and (here / "quiz" / "index.html").exists()
