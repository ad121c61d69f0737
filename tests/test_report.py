"""The report: its files, numbers, sentences and figures, and the page in a real browser."""

import base64
import contextlib
import errno
import itertools
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from matplotlib.text import Text

from rlvd_jax import report
from rlvd_jax.errors import UserError
from rlvd_jax.evaluation import Graded, analyse
from rlvd_jax.report import figures, page, prose, text

HOSTILE = (
    "</pre></details><script>document.title = 'broken'</script><img src='https://example.com/x.png'>",
    "nul \x00, bell \x07, lone \ud800 surrogate, \u202eoverride, {{ 7 * 7 }} {% endraw %} &amp; \\boxed{3}",
    "x" * 50_000 + " the end",
)


def graded(skill, n, seed):
    """Questions of given success probabilities; wrong answers fall into two groups."""
    rng = np.random.default_rng(seed)
    correct = rng.random((len(skill), n)) < np.asarray(skill)[:, None]
    group = np.where(correct, 0, rng.integers(-1, 2, correct.shape) if n > 2 else -1)
    correct &= group == 0
    tokens = 20 + 5 * ~correct + rng.integers(0, 9, correct.shape)
    phrases = rng.integers(0, 3, correct.shape)
    no = np.zeros_like(correct)
    questions = [f"q{i}" for i in range(len(skill))]
    return Graded(questions, correct, tokens, group, phrases, phrases + 1, no, ~no)


def study(models=("base", "rl", "taught"), n=32, questions=24, paper=True, problems=("math-500",), **more):
    """Results of a small study: each model compared with the first."""
    ease = np.linspace(0, 1, questions) ** 2
    powers = dict(zip(models, np.linspace(1, 0.2, len(models)), strict=True))
    sets = {
        name: {m: graded(ease**p * (ease > 0.02), n, seed=(i, j)) for j, (m, p) in enumerate(powers.items())}
        for i, name in enumerate(problems)
    }
    base, *others = models
    comparisons = [
        {"base": base, "other": other, "problems": name, "claim": "rl" if other == "rl" else None}
        for name in sets
        for other in others
    ]
    described = {m: {"kind": "given", "template": "question", "from": m, "paper": None} for m in models}
    if paper:
        described[base]["paper"] = "Qwen2.5-Math-1.5B/base"
        if "rl" in models:
            described["rl"]["paper"] = "Qwen2.5-Math-1.5B/rl"
    return {
        "study": "small",
        "created": "2026-11-21T22:40:03+00:00",
        "settings": {
            "study": "small",
            "models": {
                "rl": {
                    "grpo": {
                        "start": "base",
                        "problems": "math-train",
                        "steps": 7,
                        "kl": 0.1,
                        "updates": 1,
                        "advantage": "pass_at_k",
                        "k": 2,
                    }
                }
            },
        },
        "versions": {"python": "3.11.9", "numpy": "2.4.6"},
    } | analyse(sets, comparisons, models=described, hardest=8, bootstrap=200, **more)


def sample(response="\\boxed{3}", **changes):
    return {
        "problem": "What is 1 + 2?", "gold": "3", "text": response, "correct": True, "answer": "3", "tokens": 1234,
        "stop": "end", "bin": "[1–4]",
    } | changes  # fmt: skip


PROGRESS = {
    "rl": {"step": [0, 25, 50], "accuracy": [0.2, 0.3, 0.29], "low": [0.1, 0.2, 0.2], "high": [0.3, 0.4, 0.4],
           "length": [21.0, 20.5, 20.0], "kept": 25},
}  # fmt: skip
TABLE_1 = [
    {"student": None, "teacher": None, "model": "base", "train": "math-train", "test": "math-500"},
    {"student": "base", "teacher": "rl", "model": "taught", "train": "math-train", "test": "math-500"},
]


@pytest.fixture(scope="module")
def results():
    return study(problems=("math-train", "math-500"), progress=PROGRESS, self_distillation=TABLE_1)


@pytest.fixture(scope="module")
def written(results, tmp_path_factory):
    samples = {m: [sample(), *map(sample, HOSTILE)] for m in results["models"]}
    samples["rl"].append(sample("no", correct=False, answer=None, stop="length", bin=None))
    return report.write(results, tmp_path_factory.mktemp("report"), samples)


class Outline(HTMLParser):
    """What is on a page: tags with their attributes, text without markup, the rows of its tables, ids."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.rows, self.in_cell = [], [], [], False
        self.feed(html)
        self.text = "".join(self.text)
        self.ids = [a["id"] for _, a in self.tags if "id" in a]

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data):
        if self.tags[-1:] and self.tags[-1][0] in ("style", "script"):
            return
        self.text.append(data)
        if self.in_cell:
            self.rows[-1][-1] += data

    def with_tag(self, tag):
        return [a for t, a in self.tags if t == tag]


@pytest.fixture(scope="module")
def outline(written):
    return Outline(written.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_every_figure_as_png_and_pdf(written):
    files = {f.name for f in (written.parent / "figures").iterdir()}
    names = {
        f"{p}-{figure}"
        for p in ("math-train", "math-500")
        for figure in (
            "overview", "pass-at-k", "pass-at-k-hardest", "success-counts",
            *(f"base-to-{other}-{f}" for other in ("rl", "taught")
              for f in ("bins", "transitions", "entropy", "length", "keywords")),
        )
    } | {"rl-progress"}  # fmt: skip
    assert files == {f"{n}.{ending}" for n in names for ending in ("png", "pdf")}
    for file in (written.parent / "figures").iterdir():
        head = file.read_bytes()[:8]
        assert head == b"\x89PNG\r\n\x1a\n" if file.suffix == ".png" else head[:5] == b"%PDF-"


def test_json_is_strict_and_complete(results, written):
    def refuse(constant):
        raise ValueError(constant)

    text_ = (written.parent / "results.json").read_text(encoding="utf-8")
    assert json.loads(text_, parse_constant=refuse) == results


def test_nothing_temporary_stays(written):
    assert sorted(f.name for f in written.parent.iterdir()) == ["figures", "index.html", "results.json"]


def test_figures_of_an_earlier_report_go(tmp_path):
    (tmp_path / "figures").mkdir()
    for name in ("old.png", "old.pdf", "notes.txt"):
        (tmp_path / "figures" / name).write_text("mine")
    report.write(study(("base",), questions=8), tmp_path)
    kinds = ("overview", "pass-at-k", "success-counts")  # no comparison, so no hardest questions either
    figures_ = {f"math-500-{kind}.{ending}" for kind in kinds for ending in ("png", "pdf")}
    assert {f.name for f in (tmp_path / "figures").iterdir()} == figures_ | {"notes.txt"}


def test_a_full_disk_leaves_the_old_page(tmp_path, monkeypatch):
    one = study(("base",), questions=8)
    path = report.write(one, tmp_path)
    before = path.read_bytes()
    replace = os.replace

    def full(source, target):
        if str(target).endswith("index.html"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="report cannot be written: No space left on device"):
        report.write(one | {"study": "other"}, tmp_path)
    assert path.read_bytes() == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["figures", "index.html", "results.json"]


def test_needs_no_jax():
    code = "import sys, rlvd_jax.report; sys.exit(any(m in sys.modules for m in ('jax', 'flax', 'matplotlib.pyplot')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_matplotlib_settings_are_left_alone(tmp_path):
    matplotlib.rcParams["font.size"] = 13
    try:
        report.write(study(("base",), questions=8), tmp_path)
        assert matplotlib.rcParams["font.size"] == 13
    finally:
        matplotlib.rcdefaults()


# ---------------------------------------------------------------------------------------------------------------------
# What the page says


def test_numbers_stand_in_the_tables(results, outline):
    models = results["problems"]["math-500"]["models"]
    e = models["rl"]["accuracy"]
    cell = f"{100 * e['value']:.1f}[{100 * e['low']:.1f}, {100 * e['high']:.1f}]"
    rows = [r for r in outline.rows if r[0] == "rl" and len(r) == 8]
    assert cell == rows[1][1].replace("\n  ", "")
    assert rows[1][4:] == ["32", "74.2", "80.8", "97.0"]  # n; Table 3, test
    assert rows[0][5:] == ["80.9", "82.1", "97.1"]  # Table 3, train
    taught = next(r for r in outline.rows if r[0] == "taught" and len(r) == 8)
    assert taught[5:] == ["–", "–", "–"]


EASE = np.linspace(0.02, 0.6, 12)
UNEVEN = (("base", 1.5, 16), ("rl", 1, 16), ("few", 0.9, 8), ("ragged", 0.5, 8))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Two models with 16 responses to each question and two with at most 8, one of them not to every question: the
    results and their page."""
    sets = {m: graded(EASE**p, n, i) for i, (m, p, n) in enumerate(UNEVEN)}
    sets["ragged"].valid[0, 6:] = sets["ragged"].correct[0, 6:] = False
    comparisons = [{"base": "base", "other": m, "problems": "quiz", "claim": None} for m in ("rl", "few")]
    results = analyse({"quiz": sets}, comparisons, bootstrap=50)
    path = report.write(results, tmp_path_factory.mktemp("uneven"))
    return results, Outline(path.read_text(encoding="utf-8"))


def test_tables_show_pass_at_a_k_that_all_have(uneven):
    results, outline = uneven
    models = results["problems"]["quiz"]["models"]
    at_6, at_16 = ({m: figures.pass_estimate(r, k) for m, r in models.items()} for k in (6, 16))
    assert at_6["rl"]["value"] < at_16["rl"]["value"] and at_16["few"] is at_16["ragged"] is None
    rows = {r[0]: r[1:] for r in outline.rows if len(r) == 6}
    assert rows["Model"] == ["Accuracy", "maj@n", "pass@6", "pass@16", "n"]
    lines = report.summary_table(results).splitlines()
    assert lines[1].split() == ["n", "accuracy", "maj@n", "pass@6", "pass@16"] and max(map(len, lines)) <= 120
    for (m, *_), n, line in zip(UNEVEN, ("16", "16", "8", "6–8"), lines[2:], strict=True):
        value = f"{100 * at_6[m]['value']:.1f}"
        assert rows[m][2].startswith(value) and rows[m][4] == n
        assert line.split()[:2] == [m, n] and f" {value} [" in line
        assert rows[m][3].startswith("–") == line.endswith(" –") == (m in ("few", "ragged"))
    assert ["quiz", "12", "16 (base and rl), 8 (few), 6–8 (ragged)", "574"] in outline.rows


def test_models_with_fewer_responses_are_marked(uneven):
    results, outline = uneven
    models = results["problems"]["quiz"]["models"]
    named = [r[0] for r in outline.rows if len(r) == 11 and r[0] != "Model"]
    assert named == ["base", "rl", "few8 responses", "ragged6–8 responses"]
    look = figures.looks(models)
    for figure in (figures.overview(models, look, ""), figures.success_counts(models, list("abcdef"), look, "")):
        labels = [t.get_text() for t in figure.axes[0].get_yticklabels()]
        assert labels == ["base", "rl", "few (8 responses)", "ragged (6–8 responses)"]
    said = prose.overview(models)
    assert re.search(r"widest for (base|rl) \(.* and narrowest for (base|rl) \(", said)
    assert said.endswith(", of the models with 16 responses to each question.")
    never = [models[m]["bins"][0] for m in ("base", "rl")]
    assert f"Never solved: base {never[0]} and rl {never[1]}. With fewer responses (few and ragged)" in outline.text


def test_a_pair_is_compared_on_as_many_responses_of_both(uneven):
    results, outline = uneven
    base = graded(EASE ** UNEVEN[0][1], 16, 0).take(range(len(EASE)), 8)
    first = analyse({"quiz": {"base": base}}, [], bootstrap=50)["problems"]["quiz"]["models"]["base"]
    c = results["problems"]["quiz"]["comparisons"]["base→few"]
    expected = {key: first[key] for key in ("accuracy", "maj", "entropy")} | {"pass": figures.pass_estimate(first)}
    values = c["values"]
    assert values["base"] == expected
    for key, difference in c["difference"].items():
        assert values["other"][key]["value"] - values["base"][key]["value"] == pytest.approx(difference["value"])
    (row,) = [r for r in outline.rows if r[0] == "maj@8"]
    assert row[1].startswith(f"{100 * first['maj']['value']:.1f}")
    assert outline.text.count("Of each model the first 8 responses to each question are compared.") == 1


@pytest.mark.parametrize(("start", "slope"), [(0.1, 0.02), (0.85, 0.015), (0.33, 0.2)])  # room above, above, below
def test_names_of_curves_that_end_early_stand_clear(start, slope):
    k = np.arange(1, 65)
    rising = np.minimum(start + slope * np.log2(k), 0.95)
    curves = {}
    for i, (m, n) in enumerate((("base", 64), ("rl", 64), ("taught-by-base", 8), ("taught-by-rl", 4))):
        value = rising[:n] + 0.01 * i
        curves[m] = {"k": list(k[:n]), "value": list(value), "low": list(value - 0.01), "high": list(value + 0.01)}
    with figures.style():
        figure = figures.pass_curves(curves, figures.looks(curves), "pass@k", "x")
        figure.canvas.draw()
    axes = figure.axes[0]
    boxes = [Text.get_window_extent(t) for t in axes.texts if t.get_text().startswith("taught")]
    points = np.concatenate([axes.transData.transform(line.get_xydata()) for line in axes.lines])
    for box in boxes:
        assert axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1 and axes.bbox.x0 <= box.x0
        assert not ((points > box.min) & (points < box.max)).all(axis=1).any()
    assert len(boxes) == 2 and not boxes[0].overlaps(boxes[1])


def test_published_numbers_by_the_hubs_name(tmp_path):
    results = study(("base",), questions=6, problems=("quiz",))
    beside = [r for r in Outline(report.write(results, tmp_path).read_text()).rows if r[0] == "base" and len(r) == 8]
    assert beside == []
    results["settings"]["problems"] = {"quiz": {"hub": "math-500"}}
    (row,) = [r for r in Outline(report.write(results, tmp_path).read_text()).rows if r[0] == "base" and len(r) == 8]
    assert row[5:] == ["60.6", "72.0", "97.2"]


def test_self_distillation_with_its_gains(results, outline):
    row = next(r for r in outline.rows if r[0] == "base ← rl")
    gain = results["self_distillation"][1]["test_gain"]
    assert row[1] == "taught" and row[5].startswith(f"{100 * gain['value']:+.1f}".replace("-", "−"))


def test_every_claim_with_its_verdict(results, outline):
    badges = [a["class"] for a in outline.with_tag("span") if a.get("class", "").startswith("badge ")]
    for verdict in ("shown", "not shown", "unclear"):
        told = sum(c["verdict"] == verdict for c in results["claims"])
        assert badges.count(f"badge {verdict.replace(' ', '-')}") == told + 1  # and the tally
    assert len(results["claims"]) == 23
    for c in results["claims"]:
        assert c["claim"] in outline.text and c["source"] in outline.text
        assert c["evidence"].replace("-", "−") in outline.text.replace("-", "−")


def test_summary_sentences(results):
    said = " ".join(prose.summary(results))
    n = {v: sum(c["verdict"] == v for c in results["claims"]) for v in prose.VERDICTS}
    best = results["problems"]["math-500"]["models"]["taught"]["accuracy"]
    assert said.startswith(
        "4,608 responses of 3 models to 24 questions of math-train and 24 questions of math-500 were"
    )
    assert f"On math-500, taught, the most accurate, gets {100 * best['value']:.1f}% [" in said
    assert said.endswith(f"Of 23 tests of the paper's claims, {prose.listed(f'{k} {v}' for v, k in n.items() if k)}.")


def test_what_was_run(outline):
    assert "Reinforcement learning (GRPO) from base on math-train, 7 steps; advantage pass_at_k with k 2, kl 0.1" in (
        outline.text
    )
    assert "21 November 2026" in outline.text and "22:40 UTC" in outline.text
    assert ["python", "3.11.9"] in outline.rows
    assert "problems: math-train\n" in outline.text  # the settings


def test_every_part_is_in_the_contents(outline):
    targets = [a["href"][1:] for a in outline.with_tag("a") if a["href"].startswith("#")]
    assert len(set(outline.ids)) == len(outline.ids)
    assert set(targets) == set(outline.ids) and len(targets) == len(set(targets))


def test_links_lead_to_files_that_exist(written, outline):
    links = [a["href"] for a in outline.with_tag("a") if not a["href"].startswith("#")]
    assert len(links) == 2 * 29 + 1
    assert all((written.parent / link).is_file() for link in links)


def test_models_text_cannot_break_out(written, outline):
    assert len(outline.with_tag("script")) == 1
    assert all(a["src"].startswith("data:image/svg+xml;base64,") for a in outline.with_tag("img"))
    assert HOSTILE[0] in outline.text
    assert (
        "nul ␀, bell ␇, lone \ufffd surrogate, ⟨U+202E⟩override, {{ 7 * 7 }} {% endraw %} &amp; \\boxed{3}"
        in outline.text
    )
    assert "[… 30,008 characters left out …]" in outline.text and "xxx the end" in outline.text
    assert b"\x00" not in written.read_bytes()


def test_sample_shows_what_happened(outline):
    assert "1,234 tokens · bin [1–4]" in outline.text
    assert "1,234 tokens · cut off" in outline.text and "cut off · bin" not in outline.text
    assert "5 responses, 4 correct" in outline.text


def test_hostile_names_and_settings(tmp_path):
    results = study(("ba$e$<img>", "r\x00l"), questions=8, paper=False)
    results |= {"study": "</title><script>1</script>", "settings": {"a": "\ud83d </pre> \x1b"}, "created": "someday"}
    results["versions"]["x"] = float("nan")
    outline = Outline(report.write(results, tmp_path).read_text(encoding="utf-8"))
    assert len(outline.with_tag("script")) == 1 and all("src" in image for image in outline.with_tag("img"))
    assert "ba$e$<img>" in outline.text and "r␀l" in outline.text and "someday" in outline.text
    assert json.loads((tmp_path / "results.json").read_text())["versions"]["x"] is None
    svg = base64.b64decode(outline.with_tag("img")[0]["src"].partition(",")[2]).decode()
    assert "ba$e$&lt;img&gt;" in svg  # not taken for a formula


# ---------------------------------------------------------------------------------------------------------------------
# Whatever part of a study there is


def sections(results, tmp_path, samples=None):
    return [i for i in Outline(report.write(results, tmp_path, samples).read_text()).ids if not i.startswith("comp")]


def test_one_model_one_response_each(tmp_path):
    results = study(("base",), n=1, questions=6, paper=False)
    assert sections(results, tmp_path) == [
        "summary", "run", "table", "problems-math-500", "repeat", "glossary",
    ]  # fmt: skip
    assert [f.name for f in (tmp_path / "figures").glob("*.pdf")] == ["math-500-overview.pdf"]  # a curve needs k > 1


def test_one_question_has_no_interval(tmp_path):
    results = study(("base", "rl"), n=4, questions=1, paper=False)
    assert results["problems"]["math-500"]["models"]["base"]["accuracy"]["low"] is None
    assert "comparison-math-500-base-to-rl" in Outline(report.write(results, tmp_path).read_text()).ids


def test_nothing_at_all(tmp_path):
    results = {"models": {}, "problems": {}}
    assert sections(results, tmp_path) == ["summary", "run", "repeat", "glossary"]
    assert report.summary_table(results) == ""


def test_responses_only_where_there_are_any(tmp_path):
    results = study(("base",), questions=6)
    assert "responses" not in sections(results, tmp_path, {"base": []})
    shown = sections(results, tmp_path, {"base": [sample(correct=None, tokens=None, stop=None)]})
    assert "responses" in shown


# ---------------------------------------------------------------------------------------------------------------------
# Terminal


@pytest.mark.parametrize(
    ("claims", "said"),
    [
        ([], "train"),
        (["test", "train"], "test"),  # of equals the one that is compared first
        (["train", "test"], "train"),
        (["test", "train", "train"], "train"),
        (["gone", "gone", "test"], "test"),
    ],
)
def test_the_summary_speaks_of_what_most_claims_are_about(claims, said):
    results = {"problems": {"test": {}, "train": {}}, "claims": [{"problems": name} for name in claims]}
    assert prose.headline(results) == said


def test_every_comparison_has_a_tile_those_with_a_claim_first(results):
    comparisons = next(iter(results["problems"].values()))["comparisons"]
    pairs = [(c["base"], c["other"]) for c in comparisons.values()]
    claimed = {name: c | {"claim": "rl" if i else None} for i, (name, c) in enumerate(comparisons.items())}
    tiles = [(t["base"], t["other"]) for t in page._tiles({"comparisons": claimed})]
    assert len(pairs) > 1 and tiles == [*pairs[1:], pairs[0]]


def test_summary_table(results):
    lines = report.summary_table(results).splitlines()
    e = results["problems"]["math-train"]["models"]["base"]["accuracy"]
    assert lines[0] == "math-train: 24 questions, % [95% interval]"
    assert lines[1].split() == ["accuracy", "maj@32", "pass@32"]
    assert lines[2].startswith("  base ")
    assert f" {100 * e['value']:.1f} [{100 * e['low']:.1f}, {100 * e['high']:.1f}] " in lines[2]
    assert len(lines) == 2 * 5 + 1


def test_summary_table_fits_with_long_names():
    names = tuple(f"{'a-very-long-name-of-a-model' * 3}-{i}" for i in range(2))
    lines = report.summary_table(study(names, n=4, questions=6, paper=False)).splitlines()
    assert max(map(len, lines)) <= 120
    assert all(
        len({line[:44] for line in lines if line.strip().endswith(f"-{i}") or f"-{i} " in line}) == 1 for i in (0, 1)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Words and numbers


@pytest.mark.parametrize(
    ("value", "digits", "sign", "expected"),
    [
        (1234.56, 1, False, "1,234.6"),
        (-0.04, 1, True, "0.0"),
        (-1.25, 2, True, "−1.25"),
        (3, 1, True, "+3.0"),
        (None, 1, True, "–"),
    ],
)
def test_number(value, digits, sign, expected):
    assert text.number(value, digits, sign) == expected


def test_shorten_keeps_both_ends():
    assert text.shorten("Qwen2.5-Math-1.5B-Oat-Zero", 13) == "Qwen2.…t-Zero"
    assert text.shorten("base", 4) == "base"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.01, 0.2, "up"),
        (-0.2, -0.01, "down"),
        (-0.1, 0.1, "flat"),
        (0.0, 0.1, "flat"),
        (None, None, "flat"),
    ],
)
def test_moved(low, high, expected):
    assert prose.moved({"value": 0.1, "low": low, "high": high}) == expected


def test_caption_of_curves():
    curves = {
        "base": {"k": [1, 2, 4], "value": [0.1, 0.5, 0.9]},
        "rl": {"k": [1, 2, 4], "value": [0.3, 0.4, 0.8]},
        "teacher": {"k": [1, 2], "value": [0.7, 0.95]},
    }
    said = prose.pass_curves(curves, [("base", "rl"), ("base", "teacher")])
    assert said == (
        "Highest at k = 1: teacher, 70.0%; at k = 2: teacher, 95.0%; at k = 4, which teacher lacks: base, 90.0%. "
        "rl (from k = 2) falls below base."
    )


@pytest.mark.parametrize(
    ("base", "other", "expected"),
    [
        ([0.1, 0.5, 0.9], [0.3, 0.6, 0.8], 4),
        ([0.1, 0.5, 0.9], [0.3, 0.4, 0.8], 2),
        ([0.1, 0.5, 0.9], [0.3, 0.6, 0.9], None),  # meets, never below
        ([0.1, 0.5, 0.9], [0.0, 0.4, 0.8], None),  # never above
        ([0.1, 0.5, 0.9], [0.3, 0.5, 0.8], 4),  # equal between
    ],
)
def test_crossing(base, other, expected):
    assert prose.crossing({"k": [1, 2, 4], "value": base}, {"k": [1, 2, 4], "value": other}) == expected


def test_caption_of_transitions_counts_moves():
    labels = ["[0]", "[1–4]", "[5–16]"]
    table = {
        "labels": labels,
        "counts": [[5, 1, 0], [3, 4, 2], [0, 1, 6]],
        "expected": [[5, 1, 0], [2.5, 5, 1.5], [0, 2, 5]],
    }
    said = prose.transitions(
        {"base": "a", "other": "b", "transitions": table}, {"[1–4]": {"questions": 18, "fall": 0.167}}
    )
    assert "Of 22 questions 3 move up, 15 stay and 4 move down (sampling noise alone would move 4.5 down)" in said
    assert "of the 9 in [1–4] 3 fall to [0] (noise: 2.5)" in said
    assert said.endswith("In the paper: [1–4] 16.7% fall.")


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def test_models_keep_their_looks():
    names = [f"m{i}" for i in range(14)]
    looks = figures.looks(names)
    assert len({(v.color, v.dash) for v in looks.values()}) == 14
    assert len({v.color for v in list(looks.values())[:10]}) == len({v.marker for v in list(looks.values())[:10]}) == 10
    assert looks["m3"] == figures.looks(names[:5])["m3"]


def test_labels_are_moved_apart_and_stay_inside():
    wanted = [0.95, 0.2, 0.951, 0.949, 0.21]
    placed = figures._spread(wanted, 0.05, 0, 1)
    assert np.diff(np.sort(placed)).min() >= 0.05 - 1e-9
    assert placed.min() >= 0 and placed.max() <= 1
    assert list(np.argsort(placed)) == list(np.argsort(wanted))
    np.testing.assert_allclose(np.sort(placed), [0.18, 0.23, 0.90, 0.95, 1.0], atol=1e-9)
    np.testing.assert_allclose(figures._spread([0.5] * 5, 0.5, 0, 1), [0, 0.25, 0.5, 0.75, 1], atol=1e-9)


def test_svg_follows_the_readers_scheme(results):
    look = figures.looks(results["models"])
    curves = {m: r["pass"] for m, r in results["problems"]["math-500"]["models"].items()}
    with figures.style():
        svg = figures.svg(figures.pass_curves(curves, look, "pass@k", "A & B")).decode()
    style, _, drawing = svg.partition("</style>")
    assert "prefers-color-scheme:dark" in style
    assert not any(color in drawing for color in figures.DARK)  # every colour of ours goes by its name
    used = set(re.findall(r"var\((--c\d+)\)", drawing))
    assert used and all(style.count(f"{name}:#") == 2 for name in used)
    assert ">A &amp; B</text>" in drawing and ">taught</text>" in drawing


def test_a_curve_is_drawn_where_its_numbers_are(results):
    look = figures.looks(results["models"])
    curve = results["problems"]["math-500"]["models"]["rl"]["pass"]
    with figures.style():
        axes = figures.pass_curves({"rl": curve}, look, "", "").axes[0]
    line = axes.lines[0]
    np.testing.assert_array_equal(line.get_xdata(), curve["k"])
    np.testing.assert_allclose(line.get_ydata(), 100 * np.array(curve["value"]))
    marked = axes.lines[1].get_xdata()
    assert list(marked) == [1, 2, 4, 8, 16, 32]
    (band,) = axes.collections
    assert band.get_paths()[0].get_extents().y0 == pytest.approx(100 * min(curve["low"]))


def test_bars_of_bins_have_the_gains(results):
    c = results["problems"]["math-500"]["comparisons"]["base→rl"]
    with figures.style():
        figure = figures.bins(c, figures.looks(results["models"]), "", {c["bins"][0]["label"]: 0.25})
    upper, lower = figure.axes
    gains = [100 * b["gain"]["value"] for b in c["bins"] if b["questions"]]
    np.testing.assert_allclose([p.get_height() for p in lower.patches], gains)
    assert len(upper.patches) == 2 * len(gains)
    assert any(25 in line.get_ydata() for line in lower.lines)  # the paper's


def test_names_in_figures_do_not_overlap():
    models = tuple(f"model-number-{i}" for i in range(9))
    results = study(models, n=8, questions=12, paper=False)["problems"]["math-500"]
    look = figures.looks(models)
    with figures.style():
        figure = figures.pass_curves({m: r["pass"] for m, r in results["models"].items()}, look, "pass@k", "x")
        figure.canvas.draw()
        boxes = [Text.get_window_extent(t) for t in figure.axes[0].texts]  # without the line to the curve
        right = figure.get_size_inches()[0] * figure.dpi
        assert len(boxes) == 9 and max(b.x1 for b in boxes) <= right
        boxes.sort(key=lambda b: b.y0)
        assert all(a.y1 <= b.y0 for a, b in itertools.pairwise(boxes))
        labels = figures.success_counts(results["models"], list("abcdef"), look, "x")
        labels.canvas.draw()
        assert min(t.get_window_extent().x0 for t in labels.axes[0].get_yticklabels()) >= 0


def test_file_names_are_safe_and_unique():
    draw = page.Drawer()
    with figures.style():
        empty = figures._figure("t", "s")
        names = [draw(empty, "", *parts).name for parts in (("a/b", "../c"), ("a b", "c"), ("→",))]
    assert names == ["a-b-c", "a-b-c-2", "x"]


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


class Browser:
    """Headless Chromium, spoken to in its DevTools protocol over a pipe."""

    def __init__(self, program, profile):
        command, self.commands = os.pipe()
        self.answers, answer = os.pipe()
        flags = (
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        )  # fmt: skip
        # It reads descriptor 3 and writes 4; both ends step aside first, since either may have such a number now.
        wire = (
            "import fcntl, os, sys; a, b = (fcntl.fcntl(int(x), fcntl.F_DUPFD, 10) for x in sys.argv[1:3]);"
            "os.dup2(a, 3); os.dup2(b, 4); os.execvp(sys.argv[3], sys.argv[3:])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", wire, str(command), str(answer), program, *flags],
            pass_fds=(command, answer), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(command), os.close(answer)
        self.buffer, self.number, self.events, self.session = b"", 0, [], {}
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters} | self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != self.number:
            pass
        return answer["result"]

    def read(self):
        end = time.monotonic() + 60
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.answers], [], [], max(0, end - time.monotonic()))
            chunk = os.read(self.answers, 1 << 20) if ready else b""
            if not chunk:
                raise RuntimeError("the browser does not answer")
            self.buffer += chunk
        message, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(message)
        if "method" in message:
            self.events.append((message["method"], message["params"]))
        return message

    def open(self, path):
        self("Page.navigate", url=path.as_uri())
        while "Page.loadEventFired" not in (name for name, _ in self.events):
            self.read()

    def __getitem__(self, expression):
        return self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)["result"].get(
            "value"
        )

    def close(self):
        with contextlib.suppress(OSError, RuntimeError):
            self("Browser.close")
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.commands), os.close(self.answers)


@pytest.fixture
def browser(tmp_path):
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("no Chromium on PATH to look at the page with")
        pytest.skip("no Chromium on PATH")
    browser = Browser(program, tmp_path / "profile")
    yield browser
    browser.close()


def test_the_page_in_a_browser(browser, written):
    browser.open(written)
    sizes = browser[
        "Promise.all([...document.images].map(i => i.decode().then(() => [i.naturalWidth, i.naturalHeight])))"
    ]
    assert len(sizes) == 29 and all(w > 0 and h > 0 for w, h in sizes)
    assert browser["document.title"].startswith("small")
    assert browser["document.querySelector('nav a.here').hash"] == "#summary"  # its script runs
    for width in (390, 820, 1400):
        browser("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        assert browser["document.scrollingElement.scrollWidth"] <= width
    ground = {}
    for scheme in ("light", "dark"):
        browser("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        ground[scheme] = browser["getComputedStyle(document.body).backgroundColor"]
    assert ground == {"light": "rgb(247, 247, 245)", "dark": "rgb(15, 18, 23)"}
    browser["document.querySelectorAll('details').forEach(d => d.open = true)"]
    browser["scrollTo({top: document.body.scrollHeight, behavior: 'instant'})"]
    browser["new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))"]
    assert browser["document.querySelector('nav a.here').hash"] in ("#glossary", "#repeat")
    complaints = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    assert [e for e in browser.events if e[0] in complaints] == []
    asked = [e["request"]["url"] for name, e in browser.events if name == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [written.as_uri()]


def test_the_pages_policy_stops_a_foreign_script(browser, written, tmp_path):
    html = written.read_text().replace("</main>", "<script>document.title = 'taken'</script></main>")
    broken = tmp_path / "broken.html"
    broken.write_text(html)
    browser.open(broken)
    assert browser["document.title"].startswith("small")
    assert any(
        name == "Log.entryAdded" and "Content Security Policy" in e["entry"]["text"] for name, e in browser.events
    )
