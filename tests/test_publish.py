import importlib.metadata
import json
import math
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import tiny_study

from rlvd_jax import publish
from rlvd_jax.evaluation import Graded
from rlvd_jax.grading import Grader

QUESTIONS = {"train": 8, "test": 6}


class NoGrader:
    """For what must not need one."""


@pytest.fixture(scope="module")
def results():
    """Every number of a study that ran undisturbed, as it is on disk."""
    whole = tiny_study.whole()
    return json.loads((whole.directory / "runs/tiny/report/results.json").read_text())


@pytest.fixture
def study(monkeypatch):
    """The same study, only to be read."""
    whole = tiny_study.whole()
    monkeypatch.chdir(whole.directory)
    return whole.study()


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the same study."""
    whole = tiny_study.whole()
    shutil.copytree(whole.directory, tmp_path / "study", ignore=lambda *_: {"compiled", "figures"})
    monkeypatch.chdir(tmp_path / "study")
    return whole.study()


def by_question(study, model, problems, samples=None) -> list[list[dict]]:
    """The responses to each question, by sample number."""
    samples = samples or study.analysed[model, problems]
    rows = study.responses(model, problems).table().to_pylist()
    ids = [p.id for p in study.problems(problems)]
    return [[r for r in rows if r["problem_id"] == id and r["sample"] < samples] for id in ids]


def mean(values) -> float:
    return sum(values) / len(values)


def value_of(response):
    """What its answer is equal to: 01 is 1."""
    answer = response["answer"]
    return int(answer) if answer and answer.isdigit() else answer


def majority(responses) -> float:
    """The share of the most frequent answers that are right."""
    count = Counter(value_of(r) for r in responses if r["answer"] is not None)
    if not count:
        return 0.0
    first = [answer for answer, n in count.items() if n == max(count.values())]
    right = {value_of(r) for r in responses if r["correct"]}
    return mean([answer in right for answer in first])


def entropy(responses) -> float:
    count = Counter(value_of(r) for r in responses)
    return -sum(n / len(responses) * math.log(n / len(responses)) for n in count.values())


def test_every_analysed_set_is_there(study, results):
    there = {(m, p) for p, entry in results["problems"].items() for m in entry["models"]}
    assert (
        there
        == study.analysed.keys()
        == {(m, "test") for m in study.config.models}
        | {(m, "train") for m in study.config.models if m not in ("wise", "reasoning-only")}
    )
    assert {p: entry["questions"] for p, entry in results["problems"].items()} == QUESTIONS
    for (model, problems), samples in study.analysed.items():
        entry = results["problems"][problems]["models"][model]
        assert (entry["samples"], entry["responses"]) == (samples, samples * QUESTIONS[problems])
        assert samples == (16 if model in ("wise", "reasoning-only") else 24)


def test_numbers_are_what_the_responses_say(study, results):
    for model, problems in study.analysed:
        entry = results["problems"][problems]["models"][model]
        questions = by_question(study, model, problems)
        every = [r for responses in questions for r in responses]
        n = len(questions[0])
        right = [sum(r["correct"] for r in responses) for responses in questions]

        def value(name, entry=entry):
            assert entry[name]["low"] <= entry[name]["value"] <= entry[name]["high"]
            return entry[name]["value"]

        assert value("accuracy") == pytest.approx(mean(right) / n)
        assert value("maj") == pytest.approx(mean([majority(responses) for responses in questions]))
        assert value("entropy") == pytest.approx(mean([entropy(responses) for responses in questions]))
        curve = entry["pass"]
        assert curve["k"] == list(range(1, n + 1))
        for k in (1, 2, 5, n):
            wanted = mean([1 - math.comb(n - c, k) / math.comb(n, k) for c in right])
            assert curve["value"][k - 1] == pytest.approx(wanted)
        assert entry["truncated"] == pytest.approx(mean([r["stop"] == "length" for r in every]))
        assert entry["no_answer"] == pytest.approx(mean([r["answer"] is None for r in every]))
        assert sum(entry["bins"]) == len(questions) and entry["bins"][0] == right.count(0)
        assert entry["length"]["all"]["value"] == pytest.approx(mean([r["tokens"] for r in every]))
        words = [len(re.findall(r"\bwait\b", r["text"])) for r in every]
        assert entry["keywords"]["all"]["value"] == pytest.approx(mean(words))
    assert any(results["problems"]["test"]["models"][m]["no_answer"] > 0 for m in study.config.models)
    assert results["problems"]["train"]["models"]["base"]["keywords"]["all"]["value"] > 0.02


def test_the_hardest_questions_of_the_base_model(study, results):
    base = [mean([r["correct"] for r in q]) for q in by_question(study, "base", "train")]
    hardest = np.argsort(base, kind="stable")[:3]
    questions = by_question(study, "rl", "train")
    wanted = mean([mean([r["correct"] for r in questions[i]]) for i in hardest])
    found = results["problems"]["train"]["models"]["rl"]["pass_hardest"]
    assert (found["questions"], found["by"]) == (3, "base")
    assert found["value"][0] == pytest.approx(wanted)


def test_comparisons(study, results):
    arrows = {p: list(entry["comparisons"]) for p, entry in results["problems"].items()}
    assert arrows == {"test": ["base→rl", "base→reasoning-only"], "train": ["base→rl"]}
    for other, samples in (("rl", 24), ("reasoning-only", 16)):
        comparison = results["problems"]["test"]["comparisons"][f"base→{other}"]
        assert comparison["samples"] == samples  # as many as both have
        rates = [
            [mean([r["correct"] for r in q]) for q in by_question(study, m, "test", samples)] for m in ("base", other)
        ]
        gains = [o - b for b, o in zip(*rates, strict=True)]
        assert comparison["difference"]["accuracy"]["value"] == pytest.approx(mean(gains))
        assert sum(b["questions"] for b in comparison["bins"]) == 6
        zero = comparison["bins"][0]
        unsolved = [gain for gain, b in zip(gains, rates[0], strict=True) if b == 0]
        assert zero["questions"] == len(unsolved) > 0
        assert zero["gain"]["value"] == pytest.approx(mean(unsolved))
    assert results["problems"]["test"]["comparisons"]["base→rl"]["claim"] == "rl"
    assert {(c["problems"], c["comparison"]) for c in results["claims"] if c["comparison"]} <= {
        (p, c) for p, some in arrows.items() for c in some
    }
    assert results["claims"]


def test_self_distillation_is_table_1(study, results):
    rows = publish.self_distillation(study)
    assert [(r["student"], r["teacher"], r["model"]) for r in rows] == [
        (None, None, "base"),
        ("base", "base", "base-from-base"),
        (None, None, "rl"),
        ("rl", "rl", "rl-from-rl"),
        ("base", "rl", "base-from-rl"),
    ]
    assert {(r["train"], r["test"]) for r in rows} == {("train", "test")}
    assert [r["model"] for r in results["self_distillation"]] == [r["model"] for r in rows]
    for row in results["self_distillation"]:
        for split in ("train", "test"):
            accuracy = {m: e["accuracy"]["value"] for m, e in results["problems"][split]["models"].items()}
            assert row[split]["value"] == accuracy[row["model"]]
            if row["student"]:
                gain = accuracy[row["model"]] - accuracy[row["student"]]
                assert row[f"{split}_gain"]["value"] == pytest.approx(gain)


def test_progress_of_the_training(study, results):
    happened, progress = study.result("rl"), results["progress"]["rl"]
    assert set(results["progress"]) == {"rl"}
    assert progress["step"] == [0, 2, 4] and progress["kept"] == 4
    assert progress["accuracy"] == pytest.approx([sum(e["correct"]) / 24 for e in happened["evaluations"]])
    assert progress["length"] == [e["length"] for e in happened["evaluations"]]
    for low, value, high in zip(progress["low"], progress["accuracy"], progress["high"], strict=True):
        assert 0 <= low <= value <= high <= 1


def test_what_is_said_of_the_models(study, results):
    models = results["models"]
    assert {m: (about["kind"], about["from"]) for m, about in models.items()} == {
        "base": ("given", "./base"),
        "wise": ("given", "./wise"),
        "rl": ("grpo", "base"),
        "base-from-base": ("sft", "base"),
        "rl-from-rl": ("sft", "rl"),
        "base-from-rl": ("sft", "base"),
        "reasoning-only": ("sft", "base"),
    }
    for name, about in models.items():
        assert about["identity"] == study.identity(name) and about["template"] == "question"
        assert about["sampling"] == {"temperature": 0.9, "top_k": 50, "top_p": 1.0, "max_tokens": 8}
    assert models["rl"]["recipe"]["optimizer"]["learning_rate"] == 2e-3
    assert models["rl"]["happened"] == {"step": 4, "kept": 4, "position": 16, "best": study.result("rl")["best"]}
    assert models["reasoning-only"]["happened"] == study.result("reasoning-only")


def test_settings_and_versions_to_repeat_it(study, results):
    assert results["study"] == "tiny" and results["settings"] == study.config.written()
    versions = results["versions"]
    assert {"rlvd_jax", "python", "machine", "devices", *publish.PACKAGES} == versions.keys()
    assert versions["devices"] == "1 × cpu"
    for package in publish.PACKAGES:
        assert versions[package] == importlib.metadata.version(package)


def test_sample_responses(study):
    graded = {}
    for model, problems in study.analysed:
        questions = by_question(study, model, problems)
        correct = np.array([[r["correct"] for r in q] for q in questions])
        zeros = np.zeros(correct.shape, int)
        ids = [p.id for p in study.problems(problems)]
        one = Graded(ids, correct, zeros, zeros, zeros, zeros, zeros > 0, zeros == 0)
        graded.setdefault(problems, {})[model] = one
    shown = publish.shown(study, graded)
    assert shown.keys() == study.config.models.keys()
    golds = {p.problem: (p.answer, p.id) for p in study.problems("test")}
    base = [sum(r["correct"] for r in q) for q in by_question(study, "base", "test")]
    difficulty = dict(zip((p.id for p in study.problems("test")), base, strict=True))
    for model, some in shown.items():
        first = {q[0]["problem_id"]: q[0] for q in by_question(study, model, "test")}
        assert len(some) == 6
        for sample in some:
            gold, id = golds[sample["problem"]]
            assert sample["gold"] == gold
            assert {k: sample[k] for k in ("text", "correct", "answer", "tokens", "stop")} == {
                k: first[id][k] for k in ("text", "correct", "answer", "tokens", "stop")
            }
            assert (sample["bin"] == "[0]") == (difficulty[id] == 0)
        order = [difficulty[golds[sample["problem"]][1]] for sample in some]
        assert order == sorted(base)  # from the base model's hardest question to its easiest


def test_sample_responses_where_nothing_is_compared(study, monkeypatch):
    """A model's own successes order them then."""
    whole = study.config.model_copy(update={"comparisons": ()})
    monkeypatch.setattr(study, "config", whole)
    correct = np.arange(6)[:, None] < np.arange(6)  # question i has 5 - i successes of 6
    zeros = np.zeros(correct.shape, int)
    ids = [p.id for p in study.problems("test")]
    one = Graded(ids, correct, zeros, zeros, zeros, zeros, zeros > 0, zeros == 0)
    shown = publish.shown(study, {"test": {"wise": one}})
    assert list(shown) == ["wise"]
    assert [s["problem"] for s in shown["wise"]] == [p.problem for p in study.problems("test")[::-1]]


def test_samples_are_spread_over_the_difficulty(study, monkeypatch):
    monkeypatch.setattr(publish, "SHOWN", 3)
    correct = np.arange(6)[:, None] > np.arange(6)  # question i has i successes of 6
    zeros = np.zeros(correct.shape, int)
    ids = [p.id for p in study.problems("test")]
    one = Graded(ids, correct, zeros, zeros, zeros, zeros, zeros > 0, zeros == 0)
    shown = publish.shown(study, {"test": {"base": one}})
    assert [s["problem"] for s in shown["base"]] == [study.problems("test")[i].problem for i in (0, 2, 5)]


def test_equal_answers_are_grouped_once(copy, monkeypatch):
    folder = copy.root / "analysis"
    cached = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert len(cached) == len(copy.analysed) and not any(name.startswith(".") for name in cached)
    graded = publish.collect(copy, "rl", "test", 24, NoGrader())
    for row, responses in zip(graded.group, by_question(copy, "rl", "test"), strict=True):
        answers = [value_of(r) for r in responses]
        first = {a: i for i, a in enumerate(dict.fromkeys(a for a in answers if a is not None))}
        assert row.tolist() == [-1 if a is None else first[a] for a in answers]

    with Grader(1) as grader:
        for damage in (b"", b"\x93NUMPY", cached[min(cached)][:-8]):
            (path,) = folder.glob(f"groups-{copy.responses('rl', 'test').directory.name}-*.npy")
            path.write_bytes(damage)
            assert np.array_equal(publish.collect(copy, "rl", "test", 24, grader).group, graded.group)
            assert path.read_bytes() == cached[path.name]
        fewer = publish.collect(copy, "rl", "test", 10, grader)
    assert fewer.valid.shape == (6, 10) and np.array_equal(fewer.correct, graded.correct[:, :10])
    assert len(list(folder.iterdir())) == len(cached) + 1


def test_publishing_again_gives_the_same(copy, results):
    said = []
    again, page = publish.publish(copy, NoGrader(), said.append)
    assert page == copy.report / "index.html" and page.is_file() and len(said) == len(copy.analysed) + 2
    there = json.loads((copy.report / "results.json").read_text())
    assert there == json.loads(json.dumps(again, default=lambda x: x.tolist()))
    for key in results.keys() - {"created", "versions"}:
        assert there[key] == results[key], key
