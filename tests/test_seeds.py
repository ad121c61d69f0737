"""The table of several seeds, against sums by hand."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from rlvd_jax.evaluation import Graded, analyse

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import seeds

SAMPLES = 64  # [1–4] of 256 is one success


def graded(successes):
    correct = np.arange(SAMPLES) < np.array(successes)[:, None]
    ids = [f"q{i}" for i in range(len(correct)) for _ in range(SAMPLES)]
    groups = (~correct).ravel().astype(int)
    return Graded.from_columns(ids, correct.ravel(), np.full(correct.size, 3), groups, texts=[""] * correct.size)


def write(path: Path, seed: int, rl, other, **settings) -> Path:
    """The results of a study of two models trained from a base model that solves the questions 0, 0, 1, 1, 1, 32 times
    of 64."""
    models = {"base": graded([0, 0, 1, 1, 1, 32]), "rl": graded(rl), "other": graded(other)}
    comparisons = [{"base": "base", "other": m, "problems": "test"} for m in ("rl", "other")]
    results = analyse({"test": models}, comparisons, bootstrap=50)
    path.mkdir(parents=True)
    about = {"settings": {"study": "s", "seed": seed, "output": str(path)} | settings}
    (path / "results.json").write_text(json.dumps(results | about))
    return path / "results.json"


@pytest.fixture
def three(tmp_path):
    return [
        write(tmp_path / "2", 2, [0, 8, 0, 0, 2, 64], [4, 4, 4, 4, 4, 44]),
        write(tmp_path / "0", 0, [0, 0, 0, 1, 2, 64], [4, 4, 4, 4, 4, 60]),
        write(tmp_path / "1", 1, [0, 4, 0, 0, 0, 64], [4, 4, 4, 4, 4, 64]),
    ]


def cells(text: str) -> dict[str, dict[str, list[str]]]:
    """Title → model → its cells, of tables in Markdown."""
    found = {}
    for part in text.split("\n\n"):
        lines = part.strip().splitlines()
        if not lines[0].startswith("|"):
            title = lines[0]
            continue
        split = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
        found[title] = {line[0]: line[1:] for line in split if line[0] != "---"}
    return found


def test_the_table(three, tmp_path, capsys):
    assert seeds.main([*map(str, three), "--against", "rl", "--markdown", str(tmp_path / "t.md")]) == 0
    tables = cells((tmp_path / "t.md").read_text())
    assert list(tables) == ["test, 6 questions, seeds 0, 1, 2", "test, less rl"]
    first, paired = tables.values()
    bins = ["[0]", "[1]", "[2–4]", "[5–16]", "[17–32]", "[33–64]"]
    fate = ["[0] left", "by noise", "[1] → [0]", "by noise"]
    assert first["model"] == ["accuracy", "pass@64", *fate, *(f"gain {b}" for b in bins)]
    assert first["base"] == ["9.1 ±0.0", "66.7 ±0.0", *["–"] * 10]

    def shown(values, sign=False):  # t of 2 degrees of freedom: 4.303
        half = 4.3027 * np.std(values, ddof=1) / np.sqrt(3)
        return f"{np.mean(values):{'+' if sign else ''}.1f} ±{half:.1f}".replace("-", "−")

    accuracy = [100 * n / 6 / 64 for n in (67, 68, 74)]
    assert first["rl"][:2] == [shown(accuracy), shown([50, 100 / 3, 50])]
    assert first["rl"][2] == shown([0, 50, 50]) and first["rl"][4] == shown([100 / 3, 100, 200 / 3])
    gain = dict(zip(bins, first["rl"][6:], strict=True))
    assert gain["[0]"] == shown([0, 3.125, 6.25], True)
    assert gain["[17–32]"] == "+50.0 ±0.0" and gain["[2–4]"] == "–"
    assert gain["[1]"] == shown([0, -1.5625, -100 / 192], True)
    # What sampling noise alone would do is the analysis's, and the same for all seeds.
    noise = json.loads(three[0].read_text())["problems"]["test"]["comparisons"]["base→rl"]["transitions"]["expected"]
    assert first["rl"][3] == f"{100 * (1 - noise[0][0] / 2):.1f} ±0.0" and 0 < noise[0][0] < 2
    assert first["rl"][5] == f"{100 * noise[1][0] / 3:.1f} ±0.0"

    assert list(paired) == ["model", "other"] and len(paired["model"]) == 2 + 2 + 6
    others = [100 * n / 6 / 64 for n in (80, 84, 64)]
    assert paired["other"][0] == shown([b - a for a, b in zip(accuracy, others, strict=True)], True)
    assert paired["other"][3] == shown([-100 / 3, -100, -200 / 3], True)
    printed = capsys.readouterr().out
    assert "test, less rl\n" in printed and all(c in printed for c in first["rl"])


def test_the_figure(three, tmp_path, capsys):
    assert seeds.main([*map(str, three), "--figure", str(tmp_path / "trade.png")]) == 0
    assert (tmp_path / "trade.png").read_bytes().startswith(b"\x89PNG")
    with seeds.figures.style():
        (panel,) = seeds.figure(seeds.load(three), "three seeds").axes
    points = {c.get_label(): c for c in panel.containers}
    assert list(points) == ["base", "rl", "other"]
    line, _, (across, up) = points["rl"]
    accuracy, capability = [100 * n / 6 / 64 for n in (67, 68, 74)], [50, 100 / 3, 50]
    assert np.ravel(line.get_data()) == pytest.approx([np.mean(accuracy), np.mean(capability)])
    for bar, values, axis in ((across, accuracy, 0), (up, capability, 1)):
        (ends,) = (segment[:, axis] for segment in bar.get_segments())
        assert np.ptp(ends) / 2 == pytest.approx(4.3027 * np.std(values, ddof=1) / np.sqrt(3), rel=1e-4)
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("accuracy, %", "pass@64, %")


def test_one_seed_has_no_interval(three, tmp_path, capsys):
    assert seeds.main([str(three[0])]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("rl"))
    assert "±" not in line and line.split()[1:4] == ["19.3", "50.0", "50.0"]


def refused(capsys, *arguments):
    assert seeds.main(list(map(str, arguments))) == 2
    return capsys.readouterr().err


def test_what_cannot_be_put_together(three, tmp_path, capsys):
    twice = write(tmp_path / "again", 1, [0] * 6, [0] * 6)
    assert f"{twice}: has seed 1, as {three[2]} has: give each seed once" in refused(capsys, *three, twice)
    changed = write(tmp_path / "changed", 3, [0] * 6, [0] * 6, models={"rl": {"grpo": {"steps": 3}}})
    assert f"{changed}: its setting 'models' is not that of {three[0]}" in refused(capsys, *three, changed)
    (tmp_path / "no.json").write_text("[]")
    assert "no.json: is not the results.json of a study" in refused(capsys, tmp_path / "no.json")
    assert "'lr' is not a model (did you mean 'rl'?)" in refused(capsys, *three, "--against", "lr")
