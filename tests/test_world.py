import hashlib
import json
import re
from collections import Counter

import numpy as np
import pytest
import transformers

from rlvd_jax.demo import world
from rlvd_jax.errors import UserError

STEP = r"(\d\d)([A-Za-z])(\d\d) (?:wait \1\2(\d\d) )?"
RESPONSE = re.compile(r"((?:\d\d[A-Za-z]\d\d (?:wait )?)*)(?:\\boxed\{\d\d\} wait )*\\boxed\{(\d\d)\}")


def thoughts(response):
    """The steps of a response, (value, operator, first result, result after `wait` or None), and its final value."""
    worked, final = RESPONSE.fullmatch(response).groups()
    found = re.findall(STEP, worked)
    assert "".join(m[0] for m in re.finditer(STEP, worked)) == worked
    return [(int(v), world.OPERATORS.index(o), int(f), int(r) if r else None) for v, o, f, r in found], int(final)


def steps(response):
    """The (value, operator, result) steps that a response stands by, and its final value."""
    thought, final = thoughts(response)
    return [(v, o, first if again is None else again) for v, o, first, again in thought], final


def corpus(kind, count=40_000, seed=0):
    return list(getattr(world, f"{kind}_corpus")(np.random.RandomState(seed), count))


def test_facts_are_thirty_fixed_permutations():
    facts = world.facts()
    assert facts.shape == (30, 50) and len(set(world.OPERATORS)) == 30
    assert (np.sort(facts, axis=1) == np.arange(50)).all()
    # The shipped model knows exactly this world: it must never change.
    digest = hashlib.sha256(facts.astype("<i4").tobytes()).hexdigest()
    assert digest[:16] == "ef60aa61811cf696"


def test_knowledge_has_the_designed_kinds():
    k = world.knowledge()
    kinds = Counter(zip(k.right.tolist(), k.misled.tolist(), strict=True))
    assert kinds == {(0.95, 0.0): 13, (0.50, 0.0): 7, (0.20, 0.40): 4, (0.05, 0.85): 4, (0.0, 1.0): 2}
    assert k.wrong.shape == (30, 50, 4) and (k.wrong != world.facts()[..., None]).all()
    assert (np.diff(np.sort(k.wrong)) > 0).all()


@pytest.mark.parametrize(("split", "count"), [("train", 1024), ("test", 512), ("test", 7)])
def test_problems(split, count):
    problems = world.problems(split, count, seed=3)
    assert len({p.id for p in problems}) == len({p.problem for p in problems}) == count
    levels = Counter(p.level for p in problems)
    assert set(levels) == {1, 2, 3, 4} and max(levels.values()) - min(levels.values()) <= 1
    for p in problems:
        assert p.id == f"demo/{split}/{p.problem}"
        value = int(p.problem[:2])
        done, final = steps(p.solution)
        assert [world.OPERATORS[o] for _, o, _ in done] == list(p.problem[2:]) and len(done) == p.level
        for before, operator, after in done:
            assert before == value and after == world.facts()[operator, before]
            value = after
        assert final == value == int(p.answer) and len(p.answer) == 2


def test_problems_depend_on_their_seed_alone():
    assert world.problems("train", 64, 1) == world.problems("train", 64, 1)
    assert world.problems("train", 64, 1) != world.problems("train", 64, 2)


def test_train_and_test_are_disjoint_and_the_corpora_hold_no_composed_test_problem():
    train = {p.problem for seed in range(4) for p in world.problems("train", 2000, seed)}
    test = {p.problem for seed in range(4) for p in world.problems("test", 600, seed)}
    assert not train & test
    composed = {t for t in test if len(t) > 3}
    seen = {problem for kind in ("base", "teacher") for problem, _ in corpus(kind)}
    assert not composed & seen
    assert test & seen  # Single facts are there.


def test_more_problems_than_there_are():
    with pytest.raises(UserError, match="at most 756 test problems, 1000 were asked for"):
        world.problems("test", 1000, 0)
    with pytest.raises(UserError, match="not 'dev'"):
        world.problems("dev", 1, 0)


def test_base_corpus_holds_each_belief_as_often_as_designed():
    k, facts = world.knowledge(), world.facts()
    right, wrong, total = np.zeros(30), np.zeros((30, 4)), np.zeros(30)
    at_once = 0
    pairs = corpus("base", 60_000)
    for _, response in pairs:
        done, _ = thoughts(response)
        at_once += not done
        for before, operator, after, _ in {(v, o): (v, o, f, r) for v, o, f, r in reversed(done)}.values():
            total[operator] += 1
            right[operator] += after == facts[operator, before]
            wrong[operator] += after == k.wrong[operator, before]
    assert (total > 2000).all()
    deviation = 4.5 * np.sqrt(0.25 / 2000)
    assert np.abs(right / total - k.right).max() < deviation
    others = np.broadcast_to((1 - k.right - k.misled)[:, None] / 3, (30, 3))
    assert np.abs(wrong / total[:, None] - np.column_stack([k.misled, others])).max() < deviation
    assert (right + wrong.sum(axis=1) == total).all()
    assert abs(at_once / len(pairs) - world.BASE_STEPWISE) < 0.01


def test_a_response_follows_its_own_beliefs_through():
    repeated = 0
    for problem, response in corpus("base"):
        done, final = steps(response)
        if not done:
            continue
        assert problem == f"{done[0][0]:02d}" + "".join(world.OPERATORS[o] for _, o, _ in done)
        assert [b for b, _, _ in done[1:]] == [a for _, _, a in done[:-1]] and done[-1][2] == final
        beliefs = {}
        for before, operator, after in done:
            repeated += (before, operator) in beliefs
            assert beliefs.setdefault((before, operator), after) == after
    assert repeated > 20  # The case did occur.


def test_answers_at_once_apply_one_operator_to_the_first_value():
    """Any of them, and are right about it as often as a step that is worked out."""
    k, facts = world.knowledge(), world.facts()
    sure = {world.OPERATORS[o] for o in np.flatnonzero(k.right == 0.95)}
    chosen, total = np.zeros((5, 4)), np.zeros(5)
    answers = {level: Counter() for level in (1, 2, 3, 4)}
    for problem, response in corpus("base", 60_000):
        operators, value = [world.OPERATORS.index(o) for o in problem[2:]], int(problem[:2])
        done, final = steps(response)
        if done:
            continue
        level = len(operators)
        answers[level][response.count("boxed")] += 1
        if set(problem[2:]) <= sure and len(set(operators)) == level:
            chosen[level, :level] += facts[operators, value] == final
            total[level] += 1
    for level in (1, 2, 3, 4):
        assert total[level] > 150
        # Another operator has the same result one time in fifty.
        wanted = 0.95 * (1 / level + (level - 1) / level / 50)
        assert np.abs(chosen[level, :level] / total[level] - wanted).max() < 4.5 * np.sqrt(0.25 / total[level])
        again = world.WAIT_AT_ONCE if level > 1 else 0
        shares = [answers[level][n] / answers[level].total() for n in (1, 2, 3)]
        assert shares == pytest.approx([1 - again, again * (1 - again), again**2], abs=0.025)


def test_thinking_again():
    """In what is worked out, mostly after a slip; the belief is then drawn anew."""
    k, facts = world.knowledge(), world.facts()
    again, right = {True: [], False: []}, []
    for _, response in corpus("base", 60_000):
        seen = set()
        for v, o, first, second in thoughts(response)[0]:
            if (v, o) not in seen:
                again[first in (facts[o, v], k.wrong[o, v, 0])].append(second is not None)
            if second is not None:
                assert (v, o) not in seen  # What has been settled is not taken up again.
                right.append((second == facts[o, v], k.right[o]))
            seen.add((v, o))
            if second is not None:
                break  # Once a response.
        assert response.count("wait") <= 1 or "boxed" in response[:8]
    assert abs(np.mean(again[True]) - world.WAIT) < 0.005
    assert abs(np.mean(again[False]) - world.WAIT_AFTER_SLIP) < 0.02
    assert len(right) > 3000 and abs(np.subtract(*np.transpose(right)).mean()) < 0.035


def test_teacher_corpus_is_right_about_facts_and_nearly_always_step_by_step():
    facts = world.facts()
    pairs = corpus("teacher")
    worked = 0
    for problem, response in pairs:
        first, operators = int(problem[:2]), [world.OPERATORS.index(o) for o in problem[2:]]
        value = first
        for o in operators:
            value = facts[o, value]
        done, final = steps(response)
        worked += bool(done)
        assert final == value if done else final in facts[operators, first]
        assert all(facts[o, b] == a for b, o, a in done)
    assert abs(worked / len(pairs) - world.TEACHER_STEPWISE) < 0.005
    assert {o for problem, _ in pairs for o in problem[2:]} == set(world.OPERATORS)


def test_a_shorter_corpus_is_the_beginning_of_a_longer_one():
    for kind in ("base", "teacher"):
        assert corpus(kind, 10_000)[:500] == corpus(kind, 500)
        assert corpus(kind, 500, seed=1) != corpus(kind, 500)
    assert corpus("base", 5)[1:4:2] == [("46WcKI", r"\boxed{30} wait \boxed{30}"), ("48D", r"48D40 \boxed{40}")]


@pytest.fixture(scope="module", params=["alone", "beside a Qwen2 config"])
def tokenizer(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    world.write_tokenizer(directory)
    if request.param != "alone":
        # transformers then rebuilds the tokenizer as Qwen2's own class.
        (directory / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": 96}))
    return transformers.AutoTokenizer.from_pretrained(directory)


def test_tokenizer_is_one_token_a_symbol(tokenizer):
    vocabulary = world.vocabulary()
    assert len(tokenizer) == len(vocabulary) == 88
    text = r"17bTa17b42 42T05 wait 05a31 \boxed{31}" + "\n<|im_end|>"
    symbols = ["17", *"bTa", "17", "b", "42", " ", "42", "T", "05", " ", "wait", " ", "05", "a", "31", " "]
    symbols += ["\\boxed{", "31", "}"]
    ids = tokenizer(text)["input_ids"]
    assert ids == [vocabulary.index(s) for s in [*symbols, "\n", "<|im_end|>"]]
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>" and tokenizer.bos_token is None


def test_tokenizer_round_trip_on_responses(tokenizer):
    for problem, response in [*corpus("base", 500), *corpus("teacher", 500)]:
        ids = tokenizer(problem + response, add_special_tokens=False)["input_ids"]
        operators = len(problem) - 2
        worked = 0 if response[0] == "\\" else 4 * operators  # Each step: value, operator, value, space.
        assert len(ids) == 1 + operators + worked + 6 * response.count("wait") + 3
        assert tokenizer.decode(ids) == problem + response


def test_tokenizer_decodes_whatever_a_model_samples(tokenizer):
    vocabulary = world.vocabulary()
    rng = np.random.RandomState(0)
    for _ in range(1000):
        ids = rng.randint(0, 96, size=24).tolist()  # 88 to 95: rows that pad the embedding.
        plain = [i for i in ids if len(world.SPECIAL) <= i < len(vocabulary)]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert text == "".join(vocabulary[i] for i in plain)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == plain
        whole = tokenizer.decode(ids)
        assert whole == "".join(vocabulary[i] for i in ids if i < len(vocabulary))
