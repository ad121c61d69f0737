import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rlvd_jax.errors import UserError
from rlvd_jax.evaluation import Graded, accuracy, analyse, claims, difficulty, diversity, published, style
from rlvd_jax.evaluation.intervals import Bootstrap, share
from rlvd_jax.evaluation.measures import Measures
from rlvd_jax.evaluation.pair import Pair

ROOT = Path(__file__).parents[1]


def simulate(p, n, rng, *, wrong=4, words=0.5, longer=100, no_answer=0.05, tokens=300):
    """Responses of a model whose success probabilities are p [Q]: group 0 is right, wrong answers are spread."""
    correct = rng.random((len(p), n)) < np.asarray(p)[:, None]
    group = np.where(correct, 0, rng.integers(1, 1 + min(wrong, n - 1), correct.shape))
    group[~correct & (rng.random(correct.shape) < no_answer)] = -1
    keywords = rng.poisson(words, correct.shape)
    return Graded(
        questions=[f"q{i}" for i in range(len(p))],
        correct=correct,
        tokens=rng.integers(tokens - 50, tokens + 50, correct.shape) + longer * ~correct,
        group=group,
        keywords=keywords,
        keywords_substring=2 * keywords,
        truncated=rng.random(correct.shape) < 0.01,
        valid=np.ones(correct.shape, bool),
    )


def from_groups(groups, right=0):
    """One question a row; the group `right` is the right answer."""
    group = np.array(groups)
    zeros = np.zeros_like(group)
    names = [f"q{i}" for i in range(len(group))]
    return Graded(names, group == right, zeros, group, zeros, zeros, zeros > 0, zeros == 0)


# Accuracy and capability


def test_table_2_of_the_paper():
    first, second = [0.9, 0.9, 0.003], [0.5, 0.5, 0.5]
    assert np.mean(first) == pytest.approx(0.601) and np.mean(second) == 0.5
    assert accuracy.capability(first, 256) == pytest.approx(0.8455, abs=1e-4)
    assert accuracy.capability([0.003], 256) == pytest.approx(0.5366, abs=1e-4)
    assert accuracy.capability(second, 256) == pytest.approx(1.0, abs=1e-12)


def test_pass_at_k_equals_enumeration_of_all_choices():
    n = 7
    table = accuracy.pass_at_k(np.arange(n + 1), np.full(n + 1, n))
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        chosen = list(itertools.combinations([i < c for i in range(n)], k))
        assert table[c, k - 1] == pytest.approx(sum(map(any, chosen)) / len(chosen), abs=1e-12)


def test_pass_at_k_is_exact_for_many_samples():
    n = 1000
    counts = np.array([0, 1, 3, 500, 999, 1000])
    table = accuracy.pass_at_k(counts, np.full(6, n))
    for row, c in zip(table, counts.tolist(), strict=True):
        for k in (1, 2, 37, 256, 501, 1000):
            assert row[k - 1] == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k), abs=1e-12)


def test_pass_at_k_identities():
    rng = np.random.default_rng(1)
    samples = rng.integers(20, 40, 300)
    successes = rng.binomial(samples, rng.beta(0.3, 1, 300))
    table = accuracy.pass_at_k(successes, samples)
    assert table.shape == (300, samples.min())
    np.testing.assert_allclose(table[:, 0], successes / samples, atol=1e-12)
    assert (np.diff(table, axis=1) >= 0).all() and table.min() >= 0 and table.max() <= 1
    full = accuracy.pass_at_k(successes, np.maximum(samples, 40))[:, -1]
    np.testing.assert_array_equal(full, successes > 0)
    beyond = samples[:, None] - successes[:, None] < np.arange(1, table.shape[1] + 1)
    assert (table[beyond] == 1).all()


def test_pass_at_k_is_unbiased():
    rng = np.random.default_rng(2)
    p, n, k = 0.05, 16, 8
    successes = rng.binomial(n, p, 40_000)
    estimate = accuracy.pass_at_k(successes, np.full(len(successes), n))[:, k - 1]
    assert estimate.mean() == pytest.approx(1 - (1 - p) ** k, abs=4 * estimate.std() / 200)


def test_out_of_distribution_bound():
    assert accuracy.out_of_distribution_bound(256) == pytest.approx(0.01163, abs=1e-5)
    assert (1 - accuracy.out_of_distribution_bound(256)) ** 256 == pytest.approx(0.05)


@pytest.mark.parametrize(
    "groups, expected, first_seen",
    [
        ([0, 0, 1, 2], 1, 1),
        ([1, 1, 0, 2], 0, 0),
        ([1, 0, 0, 1], 0.5, 0),  # a tie: half a chance; the wrong group was seen first
        ([0, 1, 1, 0], 0.5, 1),
        ([2, 1, 0, 3], 0.25, 0),
        ([-1, -1, -1, 0], 1, 1),  # no answer is never the majority's
        ([-1, 1, 0, -1], 0.5, 0),
        ([-1, -1, -1, -1], 0, 0),
    ],
)
def test_majority(groups, expected, first_seen):
    graded = from_groups([groups])
    got = accuracy.majority(graded.group, graded.correct, graded.valid)
    assert (got[0][0], got[1][0]) == (expected, first_seen)
    shuffled = from_groups([groups, [0, 0, 0, 0], groups])
    got = accuracy.majority(shuffled.group, shuffled.correct, shuffled.valid)
    assert got[0].tolist() == [expected, 1, expected] and got[1].tolist() == [first_seen, 1, first_seen]


def test_places_without_a_response_have_no_vote_and_no_entropy():
    graded = from_groups([[1, 0, 0, 0, 0], [1, 1, 0, -1, -1]])
    graded.valid[0, 1:] = False
    expected, first_seen = accuracy.majority(graded.group, graded.correct, graded.valid)
    assert expected.tolist() == [0, 0] == first_seen.tolist()
    spread = diversity.entropy(graded.group, graded.valid)
    assert spread[0] == 0 and spread[1] == pytest.approx(-(0.8 * math.log(0.4) + 0.2 * math.log(0.2)))


def test_entropy_of_known_cases():
    graded = from_groups([[0, 0, 0, 0], [0, 1, 2, 3], [0, 0, 1, 1], [-1, -1, 0, 0], [-1, -1, -1, -1]])
    spread = diversity.entropy(graded.group, graded.valid)
    np.testing.assert_allclose(spread, [0, math.log(4), math.log(2), math.log(2), 0], atol=1e-15)


# Difficulty


def test_bins_of_256_are_the_papers():
    assert difficulty.labels(256) == ["[0]", "[1–4]", "[5–16]", "[17–64]", "[65–128]", "[129–256]"]
    assert difficulty.ranges(256) == [(0, 0), (1, 4), (5, 16), (17, 64), (65, 128), (129, 256)]
    edges = [0, 1, 4, 5, 16, 17, 64, 65, 128, 129, 256]
    assert difficulty.assign(edges, [256] * 11).tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


@pytest.mark.parametrize("bounds", [difficulty.BOUNDS, difficulty.STYLE_BOUNDS])
def test_every_count_is_in_exactly_one_bin(bounds):
    for n in range(1, 600):
        counts = np.arange(n + 1)
        bins = difficulty.assign(counts, np.full(n + 1, n), bounds)
        for b, (low, high) in enumerate(difficulty.ranges(n, bounds)):
            assert counts[bins == b].tolist() == list(range(low, high + 1))
        assert len(set(difficulty.labels(n, bounds))) == len(bounds)


def test_bins_scale_with_the_success_rate():
    assert difficulty.ranges(512) == [(0, 0), (1, 8), (9, 32), (33, 128), (129, 256), (257, 512)]
    assert difficulty.labels(64) == ["[0]", "[1]", "[2–4]", "[5–16]", "[17–32]", "[33–64]"]
    assert difficulty.labels(10) == ["[0]", "≤1.56%", "≤6.25%", "[1–2]", "[3–5]", "[6–10]"]


def test_transitions_count_every_question_once():
    matrix = difficulty.transitions([0, 0, 1, 5, 5], [0, 1, 0, 5, 5])
    assert matrix[0, 0] == matrix[0, 1] == matrix[1, 0] == 1 and matrix[5, 5] == 2 and matrix.sum() == 5


def test_noise_alone_moves_questions_as_predicted():
    rng = np.random.default_rng(3)
    p = rng.beta(0.3, 0.6, 4000)
    n = np.full(4000, 256)
    first, second = rng.binomial(256, p), rng.binomial(256, p)
    predicted = difficulty.unchanged(first, n, n)
    np.testing.assert_allclose(predicted.sum(axis=1), 1, atol=1e-9)
    bins, after = difficulty.assign(first, n), difficulty.assign(second, n)
    observed = difficulty.transitions(bins, after)
    for b in range(6):
        rows = predicted[bins == b]
        noise = 4.5 * np.sqrt((rows * (1 - rows)).sum(axis=0) + 1)
        assert (np.abs(observed[b] - rows.sum(axis=0)) < noise).all()
    # What leaves a bin is made up for by what enters it: nothing changes overall.
    np.testing.assert_allclose(predicted.sum(axis=0), np.bincount(bins, minlength=6), atol=25)
    assert predicted[first == 1][0, 0] == pytest.approx(0.4, abs=0.06)  # seen once, then never


# Style


@pytest.mark.parametrize(
    "text, words, substrings",
    [
        ("Wait, let me think. WAIT!", 3, 3),
        ("look, a waiter verifying", 0, 3),  # ok, wait, verify
        ("Let’s check: let's check; Let‘s Reconsider", 3, 3),
        ("Correction: it is 5. correction, no", 1, 1),
        ("correction:5", 1, 1),
        ("double-check, double-checking", 1, 2),
        ("I MADE A MISTAKE and i realize it", 2, 2),
        ("hmm_ hmm2 hmm", 1, 3),
        ("éok ok", 1, 2),
        ("to be sure, make sure to confirm", 3, 3),
        ("", 0, 0),
    ],
)
def test_keywords(text, words, substrings):
    counts = style.count_keywords([text])
    assert (counts[0][0], counts[1][0]) == (words, substrings)


def test_every_phrase_of_table_5_is_counted_once():
    assert len(set(style.REFLECTION_PHRASES)) == 27
    words, substrings = style.count_keywords([f"So {phrase} 12" for phrase in style.REFLECTION_PHRASES])
    assert (words == 1).all() and substrings.tolist() == [1] * 17 + [2] + [1] * 9  # "ok" is in "looking back" too
    words, _ = style.count_keywords([" . ".join(style.REFLECTION_PHRASES).upper(), "nothing here"])
    assert words.tolist() == [27, 0]


# Intervals


def test_intervals_cover_the_truth_19_times_in_20():
    rng = np.random.default_rng(4)
    questions, trials = 100, 1500
    boot = Bootstrap(questions, 1000, seed=5)
    p = rng.beta(0.5, 0.7, (questions, trials))
    base, other = rng.binomial(16, p) / 16, rng.binomial(16, p**0.8) / 16
    weight = rng.integers(1, 5, (questions, trials)).astype(float)
    mean = 0.5 / 1.2
    moment = math.gamma(1.3) * math.gamma(1.2) / (math.gamma(2.0) * math.gamma(0.5))  # E[p^0.8] of Beta(0.5, 0.7)
    gain = moment - mean
    for estimate, truth in (
        (boot.mean(base), mean),
        (boot.mean(other) - boot.mean(base), gain),
        (boot.ratio(base * weight, weight), mean),
    ):
        low, high = estimate.bounds()
        assert 0.925 < ((low <= truth) & (truth <= high)).mean() < 0.965


def test_a_paired_difference_is_narrower_than_two_intervals():
    rng = np.random.default_rng(7)
    p = rng.random(200)
    boot = Bootstrap(200, 500)
    a, b = boot.mean(p), boot.mean(p + 0.1 + 0.01 * rng.standard_normal(200))
    low, high = (b - a).bounds()[:, 0]
    assert 0.09 < low < high < 0.11
    assert np.diff(a.bounds(), axis=0)[0, 0] > 0.06


def test_resamples_depend_on_the_seed_alone():
    x = np.random.default_rng(8).random(50)
    first, again, other = (Bootstrap(50, 600, seed).mean(x).estimate() for seed in (1, 1, 2))
    assert first == again != other
    assert first["value"] == pytest.approx(x.mean())
    assert (Bootstrap(50, 600).weights.sum(axis=1) == 50).all()


def test_what_is_undefined_is_none():
    boot = Bootstrap(4, 200)
    x = np.array([0.1, 0.2, 0.3, 0.4])
    none, one, two = boot.ratio(x[:, None] * np.eye(4)[:, :3] * [0, 1, 1], np.eye(4)[:, :3] * [0, 1, 1]).estimates()
    assert none == {"value": None, "low": None, "high": None}
    assert one == {"value": 0.2, "low": None, "high": None} and two["value"] == pytest.approx(0.3)
    half = boot.ratio(x * [1, 1, 0, 0], [1, 1, 0, 0]).estimate()
    assert half["value"] == pytest.approx(0.15) and 0.1 <= half["low"] < half["high"] <= 0.2000001


def test_wilson_interval():
    assert share(0, 10)["high"] == pytest.approx(0.2775, abs=1e-4)
    middle = share(50, 100)
    assert (middle["low"], middle["high"]) == (pytest.approx(0.4038, abs=1e-4), pytest.approx(0.5962, abs=1e-4))


# Matrices from columns


def test_columns_in_any_order_become_matrices():
    graded = Graded.from_columns(
        question=["b", "a", "b", "a", "b"],
        sample=[2, 1, 0, 0, 1],
        correct=[True, False, False, True, True],
        tokens=[12, 21, 10, 20, 11],
        group=[0, 1, 1, 0, 0],
        texts=["wait", "ok look", "", "hmm", "x"],
        truncated=[False, True, False, False, False],
        questions=["a", "b"],
    )
    assert graded.questions == ["a", "b"]
    assert graded.valid.tolist() == [[True, True, False], [True, True, True]]
    assert graded.tokens.tolist() == [[20, 21, 0], [10, 11, 12]]
    assert graded.correct.tolist() == [[True, False, False], [False, True, True]]
    assert graded.group.tolist() == [[0, 1, -1], [1, 0, 0]]
    assert graded.keywords.tolist() == [[1, 1, 0], [0, 0, 1]]
    assert graded.keywords_substring.tolist() == [[1, 2, 0], [0, 0, 1]]
    assert graded.truncated.tolist() == [[False, True, False], [False, False, False]]


@pytest.mark.parametrize(
    "question, sample, questions, message",
    [
        (["a", "a"], [0, 0], None, "question 'a' has two responses number 0"),
        (["a", "c"], None, ["a", "b"], "answers question 'c', which is not in the set"),
        (["a", "a"], None, ["a", "b"], "question 'b' has no response"),
    ],
)
def test_columns_that_do_not_fit(question, sample, questions, message):
    with pytest.raises(UserError, match=message):
        Graded.from_columns(question, [1, 1], [1, 1], [0, 0], texts=["", ""], sample=sample, questions=questions)


def test_first_samples_keep_their_groups():
    graded = from_groups([[3, 1, 2, 0], [-1, 3, 3, 1]])
    cut = graded.take([1, 0], 3)
    assert cut.questions == ["q1", "q0"] and cut.group.tolist() == [[-1, 0, 0], [2, 0, 1]]
    assert cut.correct.tolist() == [[False] * 3, [False] * 3]


# The whole analysis


def learnt(p):
    """What RL does to success probabilities in the paper: the middle rises, the hard fall."""
    return np.where(p < 0.04, 0.1 * p, p + 0.6 * (1 - p) * (p > 0.06))


@pytest.fixture(scope="module")
def study():
    """Every model of the paper on train and test, with effects that are known."""
    rng = np.random.default_rng(9)
    graded = {}
    for name, questions in (("math-train", 400), ("math-500", 300)):
        p = rng.beta(0.35, 0.7, questions)
        lift = 0.3 if name == "math-train" else 0.03
        make = {
            "base": simulate(p, 256, rng),
            "rl": simulate(learnt(p), 256, rng, wrong=1, no_answer=0, words=0.2),
            "base_from_base": simulate(p + lift * (1 - p), 256, rng),
            "rl_from_rl": simulate(np.clip(learnt(p) * (1 + lift / 4), 0, 1), 256, rng),
            "base_from_rl": simulate(learnt(p), 256, rng),
            "new_knowledge": simulate(p**0.3, 256, rng),
            "reasoning_only": simulate(learnt(p), 256, rng),
        }
        graded[name] = make
    pairs = (("rl", "rl"), ("new_knowledge", "new_knowledge"), ("reasoning_only", "reasoning_only"))
    comparisons = [{"base": "base", "other": o, "problems": p, "claim": c} for p in graded for o, c in pairs]
    rows = [
        {"student": s, "teacher": t, "model": m, "train": "math-train", "test": "math-500"}
        for s, t, m in (
            (None, None, "base"),
            ("base", "base", "base_from_base"),
            (None, None, "rl"),
            ("rl", "rl", "rl_from_rl"),
            ("base", "rl", "base_from_rl"),
        )
    ]
    models = {m: {"kind": "given", "paper": None} for m in graded["math-500"]}
    models["base"]["paper"], models["rl"]["paper"] = "Qwen2.5-Math-1.5B/base", "Qwen2.5-Math-1.5B/rl"
    results = analyse(graded, comparisons, models=models, self_distillation=rows, bootstrap=1000)
    return graded, results


def test_results_are_strict_json(study):
    text = json.dumps(study[1], allow_nan=False)
    assert json.loads(text) == study[1]


def test_identities_hold_in_the_results(study):
    graded, results = study
    for name, by_model in graded.items():
        for model, g in by_model.items():
            m = results["problems"][name]["models"][model]
            successes = g.correct.sum(axis=1)
            assert m["pass"]["value"][0] == pytest.approx(m["accuracy"]["value"])
            assert m["pass"]["low"][0] == pytest.approx(m["accuracy"]["low"], abs=1e-6)
            assert m["pass"]["value"][-1] == pytest.approx((successes > 0).mean())
            assert m["unsolved"]["questions"] == (successes == 0).sum() == m["bins"][0]
            assert (np.diff(m["pass"]["value"]) >= -1e-12).all() and m["pass"]["k"] == list(range(1, 257))
            assert sum(m["bins"]) == m["questions"] == len(g.questions)
            assert m["responses"] == g.correct.size and m["samples"] == m["fewest_samples"] == 256
            assert m["length"]["correct"]["value"] == pytest.approx(g.tokens[g.correct].mean())
            assert m["length"]["incorrect"]["value"] == pytest.approx(g.tokens[~g.correct].mean())
            assert m["keywords"]["all"]["value"] == pytest.approx(g.keywords.mean())
            assert m["keywords_substring"]["all"]["value"] == pytest.approx(2 * m["keywords"]["all"]["value"])
            assert m["truncated"] == pytest.approx(g.truncated.mean())
            assert m["no_answer"] == pytest.approx((g.group < 0).mean())
            hard = np.argsort(by_model["base"].correct.sum(axis=1), kind="stable")[:50]
            assert m["pass_hardest"]["value"][-1] == pytest.approx((successes[hard] > 0).mean())
            assert (m["pass_hardest"]["questions"], m["pass_hardest"]["by"]) == (50, "base")
            for e in (m["accuracy"], m["maj"], m["entropy"], m["length"]["all"]):
                assert e["low"] < e["value"] < e["high"]


def test_comparisons_add_up(study):
    graded, results = study
    for name, problems in results["problems"].items():
        for key, c in problems["comparisons"].items():
            assert key == f"{c['base']}→{c['other']}"
            base, other = problems["models"][c["base"]], problems["models"][c["other"]]
            for metric in ("accuracy", "maj", "entropy"):
                expected = other[metric]["value"] - base[metric]["value"]
                assert c["difference"][metric]["value"] == pytest.approx(expected)
            assert c["difference"]["pass"]["value"] == pytest.approx(
                other["pass"]["value"][-1] - base["pass"]["value"][-1]
            )
            counts = np.array(c["transitions"]["counts"])
            assert counts.sum(axis=1).tolist() == base["bins"] == [b["questions"] for b in c["bins"]]
            assert counts.sum(axis=0).tolist() == other["bins"]
            np.testing.assert_allclose(np.sum(c["transitions"]["percent"], axis=1), 100)
            np.testing.assert_allclose(np.sum(c["transitions"]["expected"], axis=1), base["bins"])
            total = sum(b["questions"] * b["gain"]["value"] for b in c["bins"])
            assert total / c["questions"] == pytest.approx(c["difference"]["accuracy"]["value"])
            for b in c["bins"]:
                assert b["gain"]["value"] == pytest.approx(b["other"]["value"] - b["base"]["value"])
            assert c["style"]["labels"] == ["[0–64]", "[65–128]", "[129–192]", "[193–256]"]
            g = graded[name][c["other"]]
            easy = graded[name][c["base"]].correct.sum(axis=1) > 192
            wrong = (~g.correct) & easy[:, None]
            assert c["style"]["length"]["other"]["incorrect"][3]["value"] == pytest.approx(g.tokens[wrong].mean())


def test_known_effects_are_found(study):
    _, results = study
    verdicts = {(c["id"], c["problems"]): (c["verdict"], c["evidence"]) for c in results["claims"]}
    assert len(verdicts) == len(results["claims"]) == 2 * (11 + 4 + 5 + 1) + 4
    for (id, name), (verdict, evidence) in verdicts.items():
        assert verdict == "shown", (id, name, evidence)
        assert any(ch.isdigit() for ch in evidence)
    assert all(c["rule"].endswith(".") and c["paper"] and c["source"] for c in results["claims"])


def test_self_distillation_table(study):
    graded, results = study
    rows = results["self_distillation"]
    assert [r["model"] for r in rows] == ["base", "base_from_base", "rl", "rl_from_rl", "base_from_rl"]
    rate = {m: g.correct.mean() for m, g in graded["math-500"].items()}
    for r in rows:
        assert r["test"]["value"] == pytest.approx(rate[r["model"]])
        if r["student"]:
            assert r["test_gain"]["value"] == pytest.approx(rate[r["model"]] - rate[r["student"]])
        else:
            assert r["train_gain"] is None


def test_published_figures_are_beside(study):
    notes = study[1]["published"]
    assert notes["models"]["rl"]["problems"]["math-500"] == {"accuracy": 0.742, "maj": 0.808, "pass": 0.97}
    assert notes["comparisons"]["base→rl"]["math-train"]["gain"]["[65–128]"] == 0.366
    assert set(notes["models"]) == {"base", "rl"}
    with pytest.raises(UserError, match=r"did you mean 'Qwen2\.5-3B/base'"):
        published.row("Qwen2.5-3B/bas")


def test_published_table_3_has_its_differences():
    for model, expected in (
        ("Qwen2.5-Math-1.5B", {"math-train": (16.9, 5.3, -0.1), "math-500": (13.6, 8.8, -0.2)}),
        ("Qwen2.5-3B", {"math-train": (8.6, 1.3, -0.6), "math-500": (8.7, 3.0, 0.0)}),
    ):
        base, rl = published.row(f"{model}/base"), published.row(f"{model}/rl")
        for name, difference in expected.items():
            got = [100 * (rl[name][metric] - base[name][metric]) for metric in ("accuracy", "maj", "pass")]
            np.testing.assert_allclose(got, difference, atol=1e-9)


def test_no_effect_shows_no_effect():
    """The same model twice: what noise alone does to the bins is not taken for an effect."""
    found = []
    for seed in range(8):
        rng = np.random.default_rng(100 + seed)
        p = rng.beta(0.3, 0.7, 400)
        measures = [Measures.of(simulate(p, 256, rng)) for _ in range(2)]
        pair = Pair("a", measures[0], "b", measures[1], Bootstrap(400, 1000, seed))
        dropped = ((pair.bins == 1) & (pair.other_bins == 0)).sum()
        assert dropped >= 3  # as in the paper, questions of [1–4] drop to [0]
        tests = (
            claims.rare_becomes_never,
            claims.hard_questions_fall,
            claims.accuracy_rises,
            claims.majority_rises,
            claims.capability_rises,
            claims.gain_on_the_hardest,
            claims.gain_in_the_middle,
            claims.entropy_falls,
            claims.fewer_keywords,
        )
        found += [test(pair)[0] for test in tests]
        assert claims.not_longer(pair)[0] == "shown"
    assert found.count("shown") <= 6  # of 72, at 2.5% each; the middle, and entropy need several at once


def test_verdicts_against_a_claim():
    rng = np.random.default_rng(11)
    p = rng.beta(0.4, 0.8, 300)
    base, worse = Measures.of(simulate(p, 256, rng)), Measures.of(simulate(0.5 * p, 256, rng, wrong=8, tokens=400))
    better = Measures.of(simulate(p**0.3, 256, rng, words=1.0, longer=-50))
    boot = Bootstrap(300, 500)
    down, up = Pair("base", base, "worse", worse, boot), Pair("base", base, "better", better, boot)
    for test, pair in (
        (claims.accuracy_rises, down),
        (claims.majority_rises, down),
        (claims.capability_rises, down),
        (claims.capability_does_not_rise, up),
        (claims.gain_in_the_middle, down),
        (claims.gain_on_the_hardest, down),
        (claims.rare_becomes_never, up),
        (claims.hard_questions_stay_or_fall, up),
        (claims.hard_questions_rise, down),
        (claims.middle_questions_rise, down),
        (claims.correct_is_shorter, up),
        (claims.not_longer, down),
        (claims.fewer_keywords, up),
        (claims.entropy_falls, down),
    ):
        assert test(pair)[0] == "not shown", test.__name__


def test_capability_needs_evidence_of_no_rise():
    """Two models that solve the same questions: enough for 500 questions, not for 30."""
    for questions, verdict in ((30, "unclear"), (500, "shown")):
        solved = np.repeat([[0], [1]], [questions // 10, questions - questions // 10], axis=0)
        m = Measures.of(from_groups(np.where(solved == 1, [[0, 1, 1, 0]], 1)))
        pair = Pair("a", m, "b", m, Bootstrap(questions, 500))
        got, evidence = claims.capability_does_not_rise(pair)
        assert got == verdict and "No question changed" in evidence


def test_too_few_questions_give_no_verdict():
    rng = np.random.default_rng(12)
    base, other = (Measures.of(simulate(np.array([0.5, 0.6, 0.7]), 16, rng)) for _ in range(2))
    pair = Pair("a", base, "b", other, Bootstrap(3, 200))
    assert claims.rare_becomes_never(pair) == ("unclear", "0 questions in ≤1.56%; a verdict needs 5.")


def test_models_with_different_samples_and_questions_are_compared_on_what_they_share():
    rng = np.random.default_rng(13)
    p = rng.random(40)
    base, other = simulate(p, 64, rng), simulate(p, 32, rng)
    part = other.take(range(39, 9, -1), 32)  # 30 questions, in another order
    results = analyse({"x": {"base": base, "other": part}}, [{"base": "base", "other": "other", "problems": "x"}])
    c = results["problems"]["x"]["comparisons"]["base→other"]
    assert (c["questions"], c["samples"], c["k"]) == (30, 32, 32)
    expected = other.correct[10:].mean() - base.correct[10:, :32].mean()
    assert c["difference"]["accuracy"]["value"] == pytest.approx(expected)
    assert results["problems"]["x"]["models"]["base"]["accuracy"]["value"] == pytest.approx(base.correct.mean())
    assert results["problems"]["x"]["models"]["base"]["pass_hardest"] is None  # 40 questions, not above 50
    assert results["problems"]["x"]["questions"] == 40 and results["claims"] == []


def test_one_question_and_one_sample():
    results = analyse({"x": {"m": from_groups([[0]])}}, [])
    m = results["problems"]["x"]["models"]["m"]
    assert m["accuracy"] == {"value": 1.0, "low": None, "high": None}
    assert m["pass"] == {"k": [1], "value": [1.0], "low": [None], "high": [None]}
    assert m["length"]["incorrect"] == {"value": None, "low": None, "high": None}


def test_missing_responses_are_an_error():
    graded = from_groups([[0, 1], [0, 0]])
    with pytest.raises(UserError, match="no graded responses of 'rl' to 'x'"):
        analyse({"x": {"m": graded}}, [{"base": "m", "other": "rl", "problems": "x"}])
    graded.valid[1] = False
    with pytest.raises(UserError, match="'m' has no response to question 'q1' of 'x'"):
        analyse({"x": {"m": graded}}, [])
    other = from_groups([[0, 1]])
    other.questions = ["elsewhere"]
    with pytest.raises(UserError, match="no question of 'x' in common"):
        analyse({"x": {"m": from_groups([[0]]), "n": other}}, [{"base": "m", "other": "n", "problems": "x"}])


def test_needs_nothing_but_numpy():
    code = """
import sys
for name in ("jax", "scipy", "pandas", "pyarrow"):
    sys.modules[name] = None
before = set(sys.modules)
import rlvd_jax.evaluation
from rlvd_jax.evaluation import accuracy, claims, published
after = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(after - set(sys.stdlib_module_names)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['numpy', 'rlvd_jax']"
