import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny_study
from test_grpo import scalars

from rlvd_jax import config, prompts, tokenizer
from rlvd_jax.errors import UserError
from rlvd_jax.grading import Grader
from rlvd_jax.qwen2 import Qwen2Config
from rlvd_jax.responses import Response
from rlvd_jax.study import Step, Study
from rlvd_jax.training.grpo import Questions
from rlvd_jax.work import Work, choose, drawn_correct


@pytest.fixture(scope="module")
def whole():
    """A study that ran undisturbed."""
    return tiny_study.whole()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A study that has not run, in the working directory."""
    tiny_study.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def grader():
    with Grader(1) as grader:
        yield grader


def study(*overrides) -> Study:
    return Study(config.load("tiny.yaml", overrides))


def rows(study: Study, model: str, problems: str) -> list[dict]:
    return study.responses(model, problems).table().to_pylist()


def close(found: list[dict], wanted: list[dict]) -> bool:
    """The same responses in the same order; log-probabilities up to the rounding of matrix products of other shapes."""
    logprobs = [[r["logprob"] for r in some] for some in (found, wanted)]
    others = [[{k: v for k, v in r.items() if k != "logprob"} for r in some] for some in (found, wanted)]
    return others[0] == others[1] and np.allclose(*logprobs, rtol=1e-4, atol=1e-5)


# ---- responses ---------------------------------------------------------------------------------------------------


def test_a_response_set_grows_to_what_it_would_be_undisturbed(here, whole, grader, monkeypatch):
    from rlvd_jax.sampling import Sampler

    asked = []
    sample = Sampler.sample

    def watched(self, requests, seed):
        asked.append({(r.question, k) for r in requests for k in r.samples})
        return sample(self, requests, seed)

    monkeypatch.setattr(Sampler, "sample", watched)
    ids = [f"test/{i}" for i in range(6)]
    keys = {id: prompts.question_key(id) for id in ids}

    few = study("sampling.samples=4", "sampling.slots=16")
    work = Work(few, grader, progress=False)
    work.run(Step("respond", "base", "test", 4))
    assert asked == [{(keys[id], k) for id in ids for k in range(4)}]
    # A hole, as a lost shard leaves it, and two samples more: those are sampled, and nothing else.
    there = few.responses("base", "test")
    kept = [r for r in there.responses() if (r.problem_id, r.sample) not in {("test/0", 1), ("test/5", 3)}]
    for shard in there.directory.glob("*.parquet"):
        shard.unlink()
    few.responses("base", "test").add(kept)
    asked.clear()
    work = Work(study("sampling.slots=16"), grader, progress=False)
    work.run(Step("respond", "base", "test", 6))
    assert asked == [{(keys[id], k) for id in ids for k in (4, 5)} | {(keys["test/0"], 1), (keys["test/5"], 3)}]
    work.run(Step("respond", "base", "test", 6))
    assert len(asked) == 1, "a step that is done does nothing"

    grown = rows(few, "base", "test")
    monkeypatch.chdir(whole.directory)
    undisturbed = [row for row in rows(whole.study(), "base", "test") if row["sample"] < 6]
    assert len(grown) == 36 and close(grown, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_at_the_very_end_is_not_lost(here, grader, monkeypatch, number):
    from rlvd_jax.sampling import Sampler

    sample = Sampler.sample

    def until_told(self, requests, seed):
        yield from sample(self, requests, seed)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(Sampler, "sample", until_told)
    s = study("sampling.samples=4", "sampling.slots=16")
    step = Step("respond", "base", "test", 4)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
        Work(s, grader, progress=False).run(step)
    assert s.done(step), "all that was sampled is kept"


def test_responses_are_what_was_drawn_and_what_the_grader_says(whole, monkeypatch):
    monkeypatch.chdir(whole.directory)
    s = whole.study()
    golds = {p.id: p.answer for name in s.config.problems for p in s.problems(name)}
    words = tokenizer.load("base")
    counted = Counter()
    for model, problems in (("base", "train"), ("base", "test"), ("wise", "test")):
        found = rows(s, model, problems)
        assert [(r["problem_id"], r["sample"]) for r in found] == [
            (p.id, k) for p in s.problems(problems) for k in range(s.needed[model, problems])
        ]
        after = tiny_study.follows(tiny_study.BASE if model == "base" else tiny_study.WISE)
        for r in found:
            boxes = re.findall(r"\\boxed\{(\d\d)\}", r["text"])
            assert r["answer"] == (boxes[-1] if boxes else None)
            assert r["correct"] == (r["answer"] == golds[r["problem_id"]])
            ids = words(r["text"])["input_ids"]
            ended = r["stop"] == "end"
            assert r["tokens"] == len(ids) + ended <= 8 and (ended or r["tokens"] == 8)
            # Nothing but what the model can say, with the probability that it has there at temperature 0.9.
            (prompt,) = [p.problem for p in s.problems(problems) if p.id == r["problem_id"]]
            said = [prompt[-1], *(tiny_study.WORDS[i] for i in ids), *([tiny_study.END] if ended else [])]
            logprob = 0.0
            for word, then in itertools.pairwise(said):
                weights = {w: p ** (1 / 0.9) for w, p in after[word].items()}
                rest = (len(tiny_study.WORDS) - len(weights)) * np.exp(-12 / 0.9)
                logprob += np.log(weights[then] / (sum(weights.values()) + rest))
            assert r["logprob"] == pytest.approx(logprob, abs=1e-4)
            counted[model, r["answer"]] += 1
    # 14 questions × 24 of the base model, 6 × 16 of the other; three standard deviations.
    for model, answers in (("base", tiny_study.BASE), ("wise", tiny_study.WISE)):
        tempered = {a: p ** (1 / 0.9) for a, p in answers.items()}
        n = sum(c for (m, a), c in counted.items() if m == model and a)
        for answer, weight in tempered.items():
            p = weight / sum(tempered.values())
            assert abs(counted[model, answer] - n * p) < 3 * np.sqrt(n * p * (1 - p)), (model, answer)


# ---- training ----------------------------------------------------------------------------------------------------


def test_what_a_training_leaves(whole, monkeypatch):
    monkeypatch.chdir(whole.directory)
    s = whole.study()
    for name in ("rl", "base-from-base", "reasoning-only"):
        folder = s.training(name)
        assert sorted(p.name for p in folder.iterdir()) == ["events", "model", "result.json"]  # no checkpoints
        assert Qwen2Config.from_directory(s.checkpoint(name)) == Qwen2Config.from_directory("base")
        assert (s.checkpoint(name) / "tokenizer.json").read_bytes() == Path("base/tokenizer.json").read_bytes()
        assert len(tokenizer.load(s.checkpoint(name))) == len(tiny_study.WORDS)
    happened = s.result("rl")
    assert happened["step"] == happened["kept"] == 4 and happened["position"] == 4 * 4
    assert [e["step"] for e in happened["evaluations"]] == [0, 2, 4]
    assert all(len(e["correct"]) == 6 and e["samples"] == 4 for e in happened["evaluations"])

    chosen, counts = choose(s, "reasoning-only")
    happened = s.result("reasoning-only")
    assert counts.items() <= happened.items() and happened["examples"] == len(chosen) and happened["too_long"] == 0
    assert happened["step"] == 2 * -(-len(chosen) // 4)
    files = [(s.checkpoint(m) / "model.safetensors").read_bytes() for m in s.config.models]
    assert len(set(files)) == len(files) == 7


def test_the_context_of_a_trained_model(here, grader):
    s = study("models.base-from-base.context=32", "sampling.samples=4", "models.base-from-base.sft.epochs=1")
    work = Work(s, grader, progress=False)
    work.run(Step("respond", "base", "train", 4))
    work.run(Step("train", "base-from-base"))
    assert s.done(Step("train", "base-from-base"))
    assert Qwen2Config.from_directory(s.checkpoint("base-from-base")).max_position_embeddings == 32
    assert work.load("base-from-base").model.config.max_position_embeddings == 32
    assert work.load("base").model.config.max_position_embeddings == 64


def test_solved_examples_come_from_a_models_responses(here, grader):
    changes = ("solved_by=wise", "solved_samples=6", "steps=1", "evaluate_every=")
    s = study(*(f"models.rl.grpo.{change}" for change in changes))
    work = Work(s, grader, progress=False)
    work.run(Step("respond", "wise", "train", 6))
    correct = drawn_correct(s, "wise", "train", 6, 8)
    assert correct and "train/7" not in correct, "no model ever answers 49"
    loaded = work.load("base")
    problems = s.problems("train")
    solved = work._solved("rl", loaded, Questions(problems, work.prompts(loaded, problems)), 8)
    for problem, tokens in zip(problems, solved.tokens, strict=True):
        assert [loaded.decode(t) for t in tokens] == [r.text for r in correct.get(problem.id, [])]
        assert all(len(t) <= 8 and t[-1] == loaded.end_token for t in tokens)
    short = work._solved("rl", loaded, Questions(problems, work.prompts(loaded, problems)), 4)
    assert {len(t) for tokens in short.tokens for t in tokens} == {4}, "those that the model itself could have drawn"
    message = "models.rl.grpo.solved_by: 'wise' has no correct response of at most 1 tokens to any of 'train'"
    with pytest.raises(UserError, match=re.escape(message)):
        work._solved("rl", loaded, Questions(problems, work.prompts(loaded, problems)), 1)

    work.run(Step("train", "rl"))
    assert s.result("rl")["step"] == 1
    lent = scalars(s.training("rl"))[0]["rollout/solved_examples"]
    assert len(lent) == 1 and lent[0][1] > 0


# ---- what is learnt from -----------------------------------------------------------------------------------------


def answered(study: Study, model: str, correct: dict[int, set[int]], samples: int = 8) -> None:
    """Graded responses of a model to the training problems: question → the samples that are right."""
    study.responses(model, "train").add(
        [
            Response(f"train/{q}", k, f"{model} {q} {k}", 3, -1.0, "end", "1", k in correct.get(q, ()))
            for q in range(8)
            for k in range(samples)
        ]
    )


def chosen(study: Study, name: str) -> list[tuple[str, int]]:
    return [(r.problem_id, r.sample) for r in choose(study, name)[0]]


def test_up_to_so_many_correct_responses_of_each_question(here):
    s = study("sampling.samples=8", "models.base-from-base.sft.keep=3")
    correct = {0: {1}, 1: {0, 2, 4, 6, 7}, 3: {5, 6, 7}, 6: set(range(8))}
    answered(s, "base", correct)
    found, counts = choose(s, "base-from-base")
    assert counts == {"questions": 8, "allowed": 8, "answered": 4}
    assert Counter(r.problem_id for r in found) == {"train/0": 1, "train/1": 3, "train/3": 3, "train/6": 3}
    assert all(r.sample in correct[int(r.problem_id[-1])] and r.correct for r in found)
    assert [(r.problem_id, r.sample) for r in found] == sorted((r.problem_id, r.sample) for r in found)
    assert all(r.text == f"base {r.problem_id[-1]} {r.sample}" for r in found)


def test_the_choice_is_random_but_the_seeds(here):
    drawn = []
    for seed in range(80):
        s = study(f"seed={seed}", "sampling.samples=8", "models.base-from-base.sft.keep=2")
        answered(s, "base", {0: set(range(8)), 1: set(range(8))})
        drawn.append(tuple(chosen(s, "base-from-base")))
        if seed == 0:
            assert tuple(chosen(s, "base-from-base")) == drawn[0]
    pairs = Counter(sample for draw in drawn for _, sample in draw)
    assert set(pairs) == set(range(8)) and all(abs(n - 40) < 20 for n in pairs.values())  # 3.5 standard deviations
    alike = sum({k for q, k in draw if q == "train/0"} == {k for q, k in draw if q == "train/1"} for draw in drawn)
    assert alike < 12, "questions draw independently: 1 in 28"


def test_only_questions_that_a_model_solves(here):
    s = study("sampling.samples=4")
    answered(s, "base", {0: {3}, 1: {4, 5}, 2: {0}})  # the second beyond the study's four samples
    answered(s, "wise", {q: {0, 1, 2, 3, 5} for q in (0, 1, 2, 5)})
    found, counts = choose(s, "reasoning-only")
    assert counts == {"questions": 8, "allowed": 2, "answered": 2}
    assert Counter(r.problem_id for r in found) == {"train/0": 2, "train/2": 2}
    assert {r.sample for r in found} <= {0, 1, 2, 3}  # of 4 samples, the recipe's number


def test_more_samples_than_the_recipe_asks_for_change_nothing(here):
    """Another recipe may need more responses of the same teacher."""
    s = study("models.reasoning-only.sft.only_solved_by=")
    answered(s, "wise", {q: {1, 2, 3} for q in range(8)}, samples=4)
    before = chosen(s, "reasoning-only")
    s.responses("wise", "train").add(
        [Response(f"train/{q}", k, "", 3, -1.0, "end", "1", True) for q in range(8) for k in range(4, 24)]
    )
    assert chosen(s, "reasoning-only") == before and len(before) == 16


def test_nothing_to_learn(here):
    s = study("sampling.samples=4")
    answered(s, "base", {})
    answered(s, "wise", {0: {1}})
    message = "models.reasoning-only.sft: 'wise' solved none of the questions that are left of 'train'"
    with pytest.raises(UserError, match=re.escape(message)):
        choose(s, "reasoning-only")


# ---- stopped and gone on -----------------------------------------------------------------------------------------

DISTURBED = (
    "models={base: {from: ./base}, rl: %s, base-from-rl: %s}",
    "responses=[{models: [rl, base-from-rl], problems: [test]}]",
    "comparisons=[]",
    "sampling.slots=2",  # slow enough to be caught in the middle, and no part of the results
)
"""The part of the study that a chain of models makes: GRPO, the RL model's responses, SFT on them."""

RUNNER = """
import sys
from rlvd_jax import run, work
work.SHARD = 16
sys.exit(run.main(sys.argv[1:]))
"""


def run_until(directory: Path, cache: Path, arguments, what: str, number) -> tuple[int, str]:
    """Run the study and send it a signal as soon as `what` matches its output; → exit status, all output."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUNNER, "tiny.yaml", *arguments],
        cwd=directory,
        env=tiny_study.environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output, sent = "", False
    try:
        while part := os.read(process.stdout.fileno(), 1 << 16):
            output += part.decode(errors="replace")
            if not sent and number and re.search(what, output):
                process.send_signal(number)
                sent = True
        return process.wait(), output
    finally:
        process.kill()
        process.stdout.close()


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_a_study_that_is_stopped_again_and_again_ends_as_if_it_had_not_been(tmp_path, whole, monkeypatch):
    tiny_study.write(tmp_path)
    models = config.load(tmp_path / "tiny.yaml").written()["models"]
    arguments = [DISTURBED[0] % (json.dumps(models["rl"]), json.dumps(models["base-from-rl"])), *DISTURBED[1:]]
    monkeypatch.chdir(tmp_path)
    s = study(*arguments)
    assert [step.name for step in s.steps] == [
        "train rl",
        "sample rl on test",
        "sample rl on train",
        "train base-from-rl",
        "sample base-from-rl on test",
    ]

    def steps_saved(model):
        folder = s.training(model) / "checkpoints"
        return [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.exists() else []

    def there():
        return len(s.responses("rl", "train"))

    def disturb(what, number):
        status, output = run_until(tmp_path, whole.cache, arguments, what, number)
        assert "Traceback" not in output, output
        return status, output

    status, output = disturb(r"GRPO: .* 1/4 ", signal.SIGKILL)
    assert status == -signal.SIGKILL, output
    assert not s.result("rl") and max(steps_saved("rl"), default=0) < 4
    status, output = disturb(r"GRPO: .* [23]/4 ", signal.SIGTERM)
    assert status == 128 + signal.SIGTERM and "saving a checkpoint" in output, output
    assert not s.result("rl") and max(steps_saved("rl")) in (2, 3, 4)

    status, output = disturb(r"sample rl on train: .*\d\d/192 ", signal.SIGKILL)
    assert status == -signal.SIGKILL and "[1/5] train rl" in output, output
    killed = there()
    assert s.result("rl")["step"] == 4 and 0 <= killed < 192 and killed % 16 == 0
    status, output = disturb(rf"sample rl on train: .*\d\d/{192 - killed} ", signal.SIGINT)
    assert status == 130 and "the same command goes on from here" in output and "train rl" not in output, output
    assert killed < there() < 192, "what had ended was graded and written"

    status, output = disturb(r"SFT: .* [1-9]\d?/\d+ ", signal.SIGKILL)
    assert status == -signal.SIGKILL and "[2/3] train base-from-rl" in output, output
    assert not s.result("base-from-rl") and there() == 192
    status, output = disturb("", None)
    assert status == 0 and "[1/2] train base-from-rl" in output and "page: runs/tiny/report/index.html" in output

    found = {name: rows(s, *name) for name in s.needed}
    trained = {name: {p.name: p.read_bytes() for p in s.checkpoint(name).iterdir()} for name in ("rl", "base-from-rl")}
    results = {name: s.result(name) for name in trained}
    monkeypatch.chdir(whole.directory)
    undisturbed = whole.study()
    assert [s.identity(name) for name in trained] == [undisturbed.identity(name) for name in trained]
    for name, files in trained.items():
        assert files == {p.name: p.read_bytes() for p in undisturbed.checkpoint(name).iterdir()}
        assert results[name] == undisturbed.result(name)
    for name, responses in found.items():
        assert close(responses, rows(undisturbed, *name))
