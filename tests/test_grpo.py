import dataclasses
import gzip
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import training_helpers as tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlvd_jax.errors import UserError
from rlvd_jax.problems import Problem
from rlvd_jax.sampling import Completion
from rlvd_jax.training import grpo
from rlvd_jax.training.interruption import Interruption


@pytest.fixture(scope="module")
def samplers():
    """One of each kind for all tests: they are compiled once."""
    return tiny.sampler(), tiny.sampler(temperature=0.7)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, samplers):
    """(weights, what happened, directory) of a run that nothing disturbed."""
    directory = tmp_path_factory.mktemp("whole")
    return *tiny.run_grpo(directory, samplers=samplers), directory


def scalars(directory):
    events = EventAccumulator(str(directory / "events"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}, events


class Script:
    """A sampler whose responses are written in advance: of each question in turn, `right` samples are correct."""

    def __init__(self, right, max_tokens=8):
        self.right, self.asked, self.seeds, self.loaded = right, [], [], 0
        self.settings = tiny.SamplingConfig(max_tokens=max_tokens, temperature=1.0)

    def load(self, params):
        self.loaded += 1

    def release(self):
        self.loaded -= 1

    def sample(self, requests, seed):
        self.seeds.append(seed)
        for i in reversed(range(len(requests))):  # completions come in no particular order
            r, right = requests[i], self.right[(len(self.asked) + i) % len(self.right)]
            for n, sample in reversed(list(enumerate(r.samples))):
                answer = r.prompt[0] if n < right else 23
                tokens = np.array([answer, *[20] * (sample % 3), tiny.END], np.int32)
                yield Completion(i, sample, tokens, np.full(len(tokens), -2.0, np.float32), "end")
        self.asked += [(r.question, r.samples) for r in requests]


def practise(right, number=5, **changes):
    config, sampler = tiny.grpo_config(**changes), Script(right)
    rollouts = grpo.Rollouts(tiny.Grader(), tiny.decode, Interruption())
    useful, drawn = grpo.practise(config, rollouts, sampler, tiny.questions(number), 0, 0, 7)
    return useful, drawn, sampler, rollouts


def test_every_epoch_is_a_permutation_of_its_own():
    order = [grpo.question_at(p, 6, 3) for p in range(18)]
    epochs = [order[i : i + 6] for i in (0, 6, 12)]
    assert all(sorted(e) == list(range(6)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order != [grpo.question_at(p, 6, 4) for p in range(18)]


def test_seeds_differ_by_seed_purpose_and_step():
    seeds = {grpo.draw_seed(s, p, t) for s in (0, 1, -1) for p in ("practice", "evaluation") for t in range(50)}
    assert len(seeds) == 300 and all(0 <= s < 2**64 for s in seeds)


def test_groups_are_graded_and_in_order():
    useful, drawn, _, rollouts = practise([2, 0, 4])
    assert useful == drawn and [len(g.completions) for g in drawn] == [4, 4, 4]
    assert [g.question for g in drawn] == [grpo.question_at(p, 5, 7) for p in range(3)]
    assert [[c.sample for c in g.completions] for g in drawn] == [[0, 1, 2, 3]] * 3
    assert [g.correct.tolist() for g in drawn] == [[True, True, False, False], [False] * 4, [True] * 4]
    assert rollouts.grader.submissions == 12 and {"sample", "grade"} <= set(rollouts.seconds)
    for g in drawn:
        assert g.texts == [tiny.decode(c.tokens) for c in g.completions]


def test_a_response_is_graded_while_others_are_sampled():
    grader, submitted = tiny.Grader(), []

    class Watched(Script):
        def sample(self, requests, seed):
            for completion in super().sample(requests, seed):
                submitted.append(grader.submissions)
                yield completion

    rollouts = grpo.Rollouts(grader, tiny.decode, Interruption())
    rollouts.draw(Watched([2, 0, 4]), tiny.questions(), [(q, range(4)) for q in range(3)], 0)
    assert submitted == list(range(12)) and grader.submissions == 12


@pytest.mark.parametrize("count", [2, 3, 6])
def test_a_step_of_several_processes_is_that_of_one(monkeypatch, count):
    """Groups of 4 responses; of 6 processes some have none of a group."""
    alone = practise([2, 0, 4])[0]

    class Given:  # the same responses, whoever asks
        def sample(self, requests, seed):
            for i, r in enumerate(requests):
                assert r.samples
                group = next(g for g in alone if tiny.questions().prompts[g.question] == r.prompt)
                yield from (dataclasses.replace(group.completions[k], request=i) for k in reversed(r.samples))

    def drawn(index):
        monkeypatch.setattr(grpo.hosts, "index", lambda: index)
        rollouts = grpo.Rollouts(tiny.Grader(), tiny.decode, SimpleNamespace(check=lambda: None, agree=lambda: None))
        return rollouts.draw(Given(), tiny.questions(), wanted, 0), rollouts

    wanted = [(g.question, range(4)) for g in alone]
    monkeypatch.setattr(grpo.hosts, "count", lambda: count)
    parts = [drawn(index) for index in range(count)]
    monkeypatch.setattr(grpo.hosts, "gather", lambda own: [groups for groups, _ in parts])
    whole = parts[0][1].exchange(parts[0][0])
    for group, other in zip(whole, alone, strict=True):
        assert [c.sample for c in group.completions] == [0, 1, 2, 3] and group.texts == other.texts
        assert group.question == other.question and group.correct.tolist() == other.correct.tolist()


def test_a_question_that_comes_twice_in_a_step_gets_new_samples():
    _, _, sampler, _ = practise([2], number=2, questions=5)
    by_question = {}
    for question, samples in sampler.asked:
        by_question.setdefault(question, []).extend(samples)
    assert sorted(map(len, by_question.values())) == [8, 12]
    assert all(len(set(s)) == len(s) for s in by_question.values())


def test_dynamic_sampling_draws_until_every_group_is_useful():
    # Of the first three groups one is useful, so a share of 1/3 asks for 3 more (at most `questions`), and so on.
    useful, drawn, sampler, _ = practise([0, 2, 4], dynamic_sampling=True)
    assert [g.correct.sum() for g in useful] == [2, 2, 2]
    assert len(drawn) == 9 and len(set(sampler.seeds)) == 1
    assert [g.question for g in drawn] == [grpo.question_at(p, 5, 7) for p in range(9)]


def test_dynamic_sampling_gives_up():
    useful, drawn, sampler, _ = practise([0, 4], dynamic_sampling=True)
    assert len(sampler.seeds) == grpo.ROUNDS and len(drawn) == 3 * grpo.ROUNDS
    assert useful == drawn[:3], "a batch without influence"


def test_dynamic_sampling_asks_for_no_more_than_it_needs():
    useful, drawn, _, _ = practise([2, 2, 0, 1], dynamic_sampling=True)
    assert len(useful) == 3 and len(drawn) == 5, "2 of 3 are useful, so the one that is missing takes 2 more"


def test_batch_leaves_out_what_has_no_influence_but_counts_it():
    _, drawn, _, _ = practise([2, 0, 4])
    config = tiny.grpo_config(row_tokens=40)
    batch = grpo.to_batch(config, drawn, tiny.questions(), 8, 40, 1, 1)
    tokens = [len(c.tokens) for g in drawn for c in g.completions]
    trained = batch["weight"] > 0
    assert trained.sum() == sum(tokens[:4])
    np.testing.assert_allclose(batch["weight"][trained], 1 / sum(tokens), rtol=1e-6)
    # r = 1, 1, -1, -1: mean 0, std sqrt(4 / 3)
    a = 1 / (np.sqrt(4 / 3) + 1e-4)
    signs = [
        a if right else -a for right, c in zip(drawn[0].correct, drawn[0].completions, strict=True) for _ in c.tokens
    ]
    assert sorted(batch["advantage"][trained]) == pytest.approx(sorted(signs))
    whole = grpo.to_batch(tiny.grpo_config(kl=0.1), drawn, tiny.questions(), 8, 40, 1, 1)
    assert (whole["weight"] > 0).sum() == sum(tokens), "with a KL term every response has influence"


class Fixed:
    """A sampler of responses that follow from question and sample number: of question q (position) those in right[q]
    are correct."""

    def __init__(self, right):
        self.right, self.asked = right, []

    def sample(self, requests, seed):
        for i, r in enumerate(requests):
            question = r.prompt[0] - 2
            self.asked.append((question, tuple(r.samples)))
            for sample in reversed(r.samples):
                answer = r.prompt[0] if sample in self.right.get(question, ()) else 23
                tokens = np.array([answer, *[20] * (sample % 3), tiny.END], np.int32)
                yield Completion(i, sample, tokens, np.full(len(tokens), -2.0, np.float32), "end")


def fixed(right, solved=None, step=0, **changes):
    """(groups to learn from, groups drawn, what was asked for) of a step from the first question on."""
    sampler = Fixed(right)
    rollouts = grpo.Rollouts(tiny.Grader(), tiny.decode, SimpleNamespace(check=lambda: None, agree=lambda: None))
    config = tiny.grpo_config(**changes)
    learnt, drawn = grpo.practise(config, rollouts, sampler, tiny.questions(), 0, step, 7, solved)
    assert FIRST[: config.questions] == [g.question for g in drawn[: config.questions]]
    return learnt, drawn, sampler.asked


FIRST = [grpo.question_at(p, 5, 7) for p in range(3)]
HARD, EASY, NEVER = FIRST
RIGHT = {HARD: {9, 11}, EASY: {1, 2}}
"""One question is solved at its tenth and twelfth sample, one at its second, one never."""


def samples_of(group):
    return [c.sample for c in group.completions]


def test_a_question_without_a_correct_response_is_drawn_again():
    learnt, drawn, asked = fixed(RIGHT, hard_samples=14)
    assert asked[:3] == [(q, (0, 1, 2, 3)) for q in FIRST]
    again = [(HARD, range(4, 8)), (NEVER, range(4, 8)), (HARD, range(8, 12)), (NEVER, range(8, 12))]
    assert asked[3:] == [(q, tuple(samples)) for q, samples in [*again, (NEVER, range(12, 14))]]
    assert [len(g.correct) for g in drawn] == [12, 4, 14]
    # At most half of the group is correct; the first wrong ones fill it.
    assert [samples_of(g) for g in learnt] == [[0, 1, 9, 11], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert [g.correct.tolist() for g in learnt] == [[False, False, True, True], [False, True, True, False], [False] * 4]
    assert all(g.texts == [tiny.decode(c.tokens) for c in g.completions] for g in learnt)
    assert learnt[1] is drawn[1], "what needs no help is left alone"
    one, _, _ = fixed({HARD: {9}}, hard_samples=12)
    assert samples_of(one[0]) == [0, 1, 2, 9]
    many, _, _ = fixed({HARD: {4, 5, 6, 7}}, hard_samples=12)
    assert samples_of(many[0]) == [0, 1, 4, 5]


def test_the_metrics_are_of_the_first_draw():
    config = tiny.grpo_config(hard_samples=14)
    learnt, drawn, _ = fixed(RIGHT, hard_samples=14)
    plain, _, _ = fixed(RIGHT)
    metrics = grpo.rollout_metrics(config, drawn, learnt)
    assert (metrics.pop("redrawn"), metrics.pop("rescued")) == (8 + 10, 1)
    assert metrics == grpo.rollout_metrics(tiny.grpo_config(), plain, plain)
    assert metrics["all_wrong"] == pytest.approx(2 / 3) and metrics["reward"] == pytest.approx((2 - 10) / 12)


def test_questions_that_come_twice_in_a_step_are_drawn_again_with_new_samples():
    sampler = Fixed({})
    rollouts = grpo.Rollouts(tiny.Grader(), tiny.decode, Interruption())
    config = tiny.grpo_config(questions=4, hard_samples=7)
    grpo.practise(config, rollouts, sampler, tiny.questions(2), 0, 0, 7)
    for question in (0, 1):
        assert sorted(s for q, samples in sampler.asked if q == question for s in samples) == list(range(14))


def test_dynamic_sampling_counts_what_was_drawn_again():
    others = set(range(5)) - set(FIRST)
    learnt, drawn, _ = fixed(RIGHT | dict.fromkeys(others, range(999)), hard_samples=12, dynamic_sampling=True)
    assert [g.question for g in learnt] == [HARD, EASY] and len(drawn) > 3, "and nothing else ever was useful"
    assert [g.correct.tolist() for g in learnt] == [[False, False, True, True], [False, True, True, False]]


def test_dynamic_sampling_by_the_advantage_that_is_used():
    """Of 4 responses 3 are right: with k = 2 every two of them hold a correct one."""
    right = {q: {0, 1, 2} for q in range(5)} | {HARD: {3}}
    learnt, drawn, _ = fixed(right, dynamic_sampling=True, advantage="pass_at_k", k=2)
    assert learnt == drawn[:1] and learnt[0].question == HARD
    learnt, drawn, _ = fixed(right, dynamic_sampling=True)
    assert learnt == drawn and len(drawn) == 3


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_draw_again_as_one_does(monkeypatch, count):
    """The processes are threads here, each with a sampler of its own."""
    alone = fixed(RIGHT, hard_samples=14, dynamic_sampling=True)
    own, there, barrier = threading.local(), [None] * count, threading.Barrier(count, timeout=60)

    def gather(value):
        there[own.index] = value
        barrier.wait()
        values = list(there)
        barrier.wait()
        return values

    def work(index):
        own.index = index
        return fixed(RIGHT, hard_samples=14, dynamic_sampling=True)

    monkeypatch.setattr(grpo.hosts, "count", lambda: count)
    monkeypatch.setattr(grpo.hosts, "index", lambda: own.index)
    monkeypatch.setattr(grpo.hosts, "gather", gather)
    with ThreadPoolExecutor(count) as threads:
        parts = list(threads.map(work, range(count)))
    for learnt, drawn, _ in parts:
        for groups, wanted in ((learnt, alone[0]), (drawn, alone[1])):
            assert [(g.question, samples_of(g), g.texts) for g in groups] == [
                (g.question, samples_of(g), g.texts) for g in wanted
            ]
    asked = Counter((q, s) for part in parts for q, samples in part[2] for s in samples)
    assert asked == Counter((q, s) for q, samples in alone[2] for s in samples), "each is drawn once"


def solved(*questions, number=4):
    """Responses of `number` lengths to some of five questions, all correct."""
    tokens = [[np.array([q + 2, *[21] * n, tiny.END]) for n in range(number)] * (q in questions) for q in range(5)]
    return grpo.Solved(tokens, tiny.decode, (tiny.END,))


def test_a_group_without_a_correct_response_gets_a_solved_example():
    learnt, drawn, _ = fixed(RIGHT, solved(HARD, EASY))
    assert [g.lent for g in learnt] == [True, False, False] and learnt[1:] == drawn[1:]
    assert learnt[0].correct.tolist() == [False, False, False, True] and not drawn[0].correct.any()
    assert learnt[0].completions[:3] == drawn[0].completions[:3] and learnt[0].texts[:3] == drawn[0].texts[:3]
    example = learnt[0].completions[3]
    assert example.tokens[0] == HARD + 2 and example.stop == "end" and learnt[0].texts[3] == tiny.decode(example.tokens)
    config = tiny.grpo_config(solved_by="base")
    metrics = grpo.rollout_metrics(config, drawn, learnt)
    assert metrics.pop("solved_examples") == 1
    assert metrics == grpo.rollout_metrics(tiny.grpo_config(), drawn, drawn), "of what the policy drew"

    batch = grpo.to_batch(config, learnt, tiny.questions(), 8, 40, 1, 1)
    lent = (batch["weight"] > 0) & (batch["drawn"] == 0)
    assert batch["tokens"][lent].tolist() == example.tokens.tolist()
    assert (batch["advantage"][lent] > 0).all() and not batch["logp"][lent].any()
    tokens = sum(len(c.tokens) for g in learnt for c in g.completions)
    np.testing.assert_allclose(batch["weight"][batch["weight"] > 0], 1 / tokens, rtol=1e-6)
    assert "drawn" not in grpo.to_batch(tiny.grpo_config(), drawn, tiny.questions(), 8, 40, 1, 1)


def test_solved_examples_are_drawn_anew_in_every_step():
    def lengths():
        return [len(fixed({}, solved(HARD), step=step)[0][0].completions[-1].tokens) for step in range(60)]

    drawn = lengths()
    assert drawn == lengths() and set(drawn) == {2, 3, 4, 5}


def test_what_is_drawn_again_comes_before_what_is_lent():
    learnt, _, _ = fixed(RIGHT, solved(HARD, EASY, NEVER), hard_samples=12)
    assert [g.lent for g in learnt] == [False, False, True]
    learnt, drawn, _ = fixed({}, solved(HARD, EASY, NEVER), dynamic_sampling=True)
    assert [g.lent for g in learnt] == [True] * 3 and len(drawn) == 3, "a group with a solved example is useful"


def test_with_an_entropy_bonus_every_response_counts():
    _, drawn, _ = fixed(RIGHT)
    tokens = [sum(len(c.tokens) for c in g.completions) for g in drawn]
    trained = [
        (grpo.to_batch(tiny.grpo_config(entropy=e), drawn, tiny.questions(), 8, 40, 1, 1)["weight"] > 0).sum()
        for e in (0, 0.1)
    ]
    assert trained == [tokens[1], sum(tokens)]


def test_remedies_together(tmp_path, samplers):
    """They are trained with, measured, and gone on with to the same weights."""
    changes = {"hard_samples": 6, "solved_by": "base", "advantage": "pass_at_k", "k": 2, "entropy": 0.02}
    config = tiny.grpo_config(steps=3, evaluate_every=None, **changes)
    arguments = {"samplers": samplers, "evaluate": False, "solved": solved(0, 1, 2, 3)}
    weights, _ = tiny.run_grpo(tmp_path / "whole", config=config, **arguments)
    values, _ = scalars(tmp_path / "whole")
    assert sum(v for _, v in values["rollout/solved_examples"]) > 0
    assert sum(v for _, v in values["rollout/redrawn"]) >= sum(v for _, v in values["rollout/rescued"])
    lent = [v > 0 for _, v in values["rollout/solved_examples"]]
    assert lent == [0 < v < 1 for _, v in values["train/drawn"]], "share of the tokens"
    # Another model's responses are not what the sampler drew: their log-probabilities are not compared.
    assert all(0 < v < 2e-5 for _, v in values["train/delta_logp_max"])

    tiny.run_grpo(tmp_path / "part", config=config.model_copy(update={"steps": 2}), **arguments)
    again, _ = tiny.run_grpo(tmp_path / "part", config=config, **arguments)
    assert tiny.same(again, weights)
    with pytest.raises(UserError, match="were made with solved = "):
        tiny.run_grpo(tmp_path / "part", config=config, **arguments | {"solved": solved(0, 1)})


def test_a_batch_of_equal_groups_changes_nothing(tmp_path):
    config = tiny.grpo_config(steps=4, evaluate_every=None)
    weights, done = tiny.run_grpo(tmp_path, config=config, samplers=(Script([0, 4]), None), evaluate=False)
    assert tiny.same(weights, tiny.params()) and done["step"] == 4
    values = scalars(tmp_path)[0]
    assert [v for _, v in values["train/grad_norm"]] == [0] * 4
    assert values["rollout/all_wrong"] == [(1, pytest.approx(2 / 3)), (2, pytest.approx(1 / 3))] * 1 + [
        (3, pytest.approx(2 / 3)),
        (4, pytest.approx(1 / 3)),
    ]


def test_a_profile_names_the_parts_of_a_step(tmp_path, samplers, capsys):
    config = tiny.grpo_config(steps=4, evaluate_every=None)
    tiny.run_grpo(tmp_path, config=config, samplers=samplers, evaluate=False, profile=range(2, 4))
    said = capsys.readouterr().out.strip()
    assert said == f"profile of steps 2 to 3: {tmp_path}/events/plugins/profile"
    (folder,) = (tmp_path / "events/plugins/profile").iterdir()  # where TensorBoard looks for it
    (programs,), (calls,) = folder.glob("*.xplane.pb"), folder.glob("*.trace.json.gz")
    for scope in (b"attention", b"mlp", b"logprobs", b"optimizer"):
        assert re.search(rb"[/(]" + scope + rb"[/)]", programs.read_bytes()), scope
    events = Counter(event.get("name") for event in json.loads(gzip.decompress(calls.read_bytes()))["traceEvents"])
    assert {name: events[name] for name in ("load", "sample", "grade")} == {"load": 2, "sample": 2, "grade": 2}
    assert "train" in events and not any(name and name.startswith("$") for name in events), (
        "no calls of Python functions"
    )


def test_what_happened(whole):
    _, done, _ = whole
    assert json.loads(json.dumps(done)) == done
    assert done["step"] == 5 and done["position"] == 15
    evaluations = done["evaluations"]
    assert [e["step"] for e in evaluations] == [0, 2, 4, 5]
    for e in evaluations:
        assert len(e["correct"]) == 3 and e["samples"] == 2 and all(0 <= c <= 2 for c in e["correct"])
        assert e["accuracy"] == sum(e["correct"]) / 6 and 1 <= e["length"] <= 8 and 0 <= e["truncated"] <= 1
    best = max(e["accuracy"] for e in evaluations)
    assert done["kept"] == done["best"] == next(e["step"] for e in evaluations if e["accuracy"] == best)


def test_tensorboard_shows_every_part(whole):
    values, events = scalars(whole[2])
    steps = list(range(1, 6))
    train = ("loss", "grad_norm", "entropy", "learning_rate", "delta_logp", "delta_logp_max", "clipped", "tokens")
    rollout = ("reward", "all_right", "all_wrong", "length", "truncated", "questions")
    seconds = ("load", "sample", "grade", "train", "tokens_per_second", "sampled_per_second")
    groups = {"train": train, "rollout": rollout, "time": seconds}
    for tag in (f"{group}/{name}" for group, names in groups.items() for name in names):
        assert [step for step, _ in values[tag]] == steps, tag
    assert [step for step, _ in values["eval/accuracy"]] == [0, 2, 4, 5]
    assert [e.step for e in events.Tensors("responses/incorrect")] == steps
    text = events.Tensors("responses/incorrect")[0].tensor_proto.string_val[0].decode()
    assert "say " in text and "stop: " in text
    for _, value in values["train/learning_rate"][:1]:
        assert value == 0, "warm-up begins at rate 0"


def test_sampler_and_trainer_agree_on_every_batch(whole):
    values, _ = scalars(whole[2])
    assert all(0 <= v < 2e-5 for _, v in values["train/delta_logp_max"])
    assert any(v > 0 for _, v in values["train/tokens"])
    assert all(v == 0 for _, v in values["train/clipped"])


def test_the_weights_of_the_best_step_are_returned(tmp_path, samplers):
    """Every evaluation after the first is worse, by a grader that says so."""

    class Worse(tiny.Grader):
        def submit(self, pairs):
            future = super().submit(pairs)
            if samplers[1].weights is not None:  # an evaluation's
                for v in future.result():
                    v.correct = self.submissions <= 6
            return future

    weights, done = tiny.run_grpo(tmp_path, samplers=samplers, grader=Worse())
    assert done["kept"] == 0 and [e["accuracy"] for e in done["evaluations"]] == [1, 0, 0, 0]
    assert tiny.same(weights, tiny.params())
    saved = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert saved == [0, 4, 5], "the best and the newest two"


def test_the_last_step_is_kept_if_asked_for(tmp_path, whole, samplers):
    weights, done = tiny.run_grpo(tmp_path, config=tiny.grpo_config(keep="last"), samplers=samplers)
    assert done["kept"] == 5 and done["evaluations"] == whole[1]["evaluations"]
    if whole[1]["kept"] == 5:
        assert tiny.same(weights, whole[0])


def test_going_on_from_the_end_changes_nothing(whole, samplers):
    grader = tiny.Grader()
    weights, done = tiny.run_grpo(whole[2], samplers=samplers, grader=grader)
    assert tiny.same(weights, whole[0]) and done == whole[1] and grader.submissions == 0


# The grader's 84 submissions: 6 for the evaluation at 0, 12 for each of steps 1 and 2, 6 for the evaluation at 2, 12
# for each of steps 3 and 4, … The 40th is in the middle of sampling step 3, after the checkpoint of step 2.


def assert_same_run(directory, whole, samplers, submissions=None):
    grader = tiny.Grader()
    weights, done = tiny.run_grpo(directory, samplers=samplers, grader=grader)
    assert tiny.same(weights, whole[0]) and done == whole[1]
    assert submissions is None or grader.submissions == submissions
    again, undisturbed = scalars(directory)[0], scalars(whole[2])[0]
    assert again.keys() == undisturbed.keys()
    for tag in undisturbed:
        if not tag.startswith("time/"):
            assert again[tag] == undisturbed[tag], tag


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, whole, samplers):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, tiny.__file__, "grpo", tmp_path, "40"]
    out = subprocess.run(command, env=environment, capture_output=True)
    assert out.returncode == -9, out.stderr.decode()
    assert_same_run(tmp_path, whole, samplers)


@pytest.mark.parametrize("name, raised", [("SIGTERM", SystemExit), ("SIGINT", KeyboardInterrupt)])
@pytest.mark.parametrize("at", [4, 22, 40])
def test_a_run_that_is_told_to_stop_goes_on(tmp_path, whole, samplers, name, raised, at):
    with pytest.raises(raised) as error:
        tiny.run_grpo(tmp_path, samplers=samplers, grader=tiny.Grader(tiny.at(at, name)))
    assert raised is KeyboardInterrupt or error.value.code == 128 + 15
    finished = {4: 0, 22: 18, 40: 36}[at]  # the submissions before the step's own are not made again
    assert_same_run(tmp_path, whole, samplers, 84 - finished)


def test_more_steps_go_on_and_other_settings_do_not(tmp_path, samplers):
    short = tiny.grpo_config(steps=2, keep="last", evaluate_every=None)
    tiny.run_grpo(tmp_path, config=short, samplers=samplers)
    _, done = tiny.run_grpo(tmp_path, config=short.model_copy(update={"steps": 3}), samplers=samplers)
    assert done["step"] == 3
    with pytest.raises(UserError, match="were made with seed = 7, now it is 8"):
        tiny.run_grpo(tmp_path, config=short, samplers=samplers, seed=8)


def test_variants_together(tmp_path, samplers):
    config = tiny.grpo_config(steps=3, evaluate_every=None, updates=3, clip_high=0.02, kl=0.2, ratio="sequence")
    _, done = tiny.run_grpo(tmp_path, config=config, samplers=samplers)
    values, _ = scalars(tmp_path)
    assert done["step"] == 3 and all(v < 2e-5 for _, v in values["train/delta_logp_max"]), "of the first update"
    # The last of 3 updates on each batch: s = 2, 5, 8 with 2 steps of warm-up.
    assert [v for _, v in values["train/learning_rate"]] == pytest.approx([3e-2] * 3)
    assert max(v for _, v in values["train/clipped"]) > 0
    assert all(v > 1e-5 for _, v in values["train/kl"])


def test_it_learns(tmp_path, samplers):
    """To name the first word of the prompt."""
    config = tiny.grpo_config(steps=40, questions=4, samples=8, evaluate_every=None, checkpoint_every=100)
    tiny.run_grpo(tmp_path, config=config, samplers=samplers)
    reward = [v for _, v in scalars(tmp_path)[0]["rollout/reward"]]
    assert np.mean(reward[:3]) < -0.2 and np.mean(reward[-3:]) > 0.4


def test_training_that_breaks_down_stops_and_saves_nothing_of_it(tmp_path, samplers):
    optimizer = tiny.OPTIMIZER.model_copy(update={"learning_rate": 1e30, "warmup_steps": 0})
    config = tiny.grpo_config(steps=8, evaluate_every=None, checkpoint_every=1, optimizer=optimizer)
    with pytest.raises(UserError, match=r"training broke down at step 2: .*; lower optimizer.learning_rate"):
        tiny.run_grpo(tmp_path, config=config, samplers=samplers)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_settings_that_cannot_work(tmp_path):
    with pytest.raises(UserError, match=r"grpo.sampling.temperature is 0"):
        tiny.run_grpo(tmp_path, samplers=(tiny.sampler(temperature=0), None), evaluate=False)
    with pytest.raises(UserError, match=r"grpo.row_tokens is 10, but a prompt and its response may have 11 tokens"):
        tiny.run_grpo(tmp_path, config=tiny.grpo_config(row_tokens=10), samplers=(Script([1]), None), evaluate=False)
    assert not any(tmp_path.iterdir())


def test_digest_tells_problems_and_prompts_apart():
    questions = tiny.questions()
    other_prompt = grpo.Questions(questions.problems, [(9,), *questions.prompts[1:]])
    other_answer = grpo.Questions([Problem("q0", "say 2", "3"), *questions.problems[1:]], questions.prompts)
    assert len({questions.digest(), other_prompt.digest(), other_answer.digest(), tiny.questions().digest()}) == 3


@pytest.mark.parametrize("asked, rows", [(None, 2), (3, 3)])
def test_rows_at_once(tmp_path, monkeypatch, asked, rows):
    config, samplers = tiny.grpo_config(questions=6, micro_rows=asked), (Script([2]), None)
    run = lambda: tiny.run_grpo(tmp_path, config=config, samplers=samplers, evaluate=False)  # noqa: E731
    assert tiny.rows_of_a_micro_batch(run, monkeypatch) == rows
