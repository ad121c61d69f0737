import itertools
import json

import numpy as np
import pytest

from rlvd_jax.errors import UserError
from rlvd_jax.training.batches import Example, arrange, first_fit_decreasing, pack, supervised, token_weights
from rlvd_jax.training.rewards import advantages, all_equal, rewards
from rlvd_jax.training.step import segment_lengths


def example(prompt, response, start=100, **fields):
    return Example(tuple(range(1, prompt + 1)), np.arange(start, start + response), **fields)


def test_rewards_are_plus_and_minus_one():
    r = rewards([[True, False], [False, False]])
    assert r.dtype == np.float32 and r.tolist() == [[1, -1], [-1, -1]]


def test_grpo_advantage_is_standardised_with_ddof_1():
    # r = 1, -1, -1, -1: mean -0.5, deviations 1.5, -0.5, -0.5, -0.5, sum of squares 3, std sqrt(3 / 3) = 1.
    a = advantages([[1, -1, -1, -1]])
    np.testing.assert_allclose(a, [[1.5 / 1.0001, -0.5 / 1.0001, -0.5 / 1.0001, -0.5 / 1.0001]], rtol=1e-6)


def test_dr_grpo_advantage_is_only_centred():
    np.testing.assert_allclose(advantages([[1, -1, -1, -1]], "dr_grpo"), [[1.5, -0.5, -0.5, -0.5]])


@pytest.mark.parametrize("number, k", [(5, 2), (6, 4), (10, 4), (8, 7)])
def test_pass_at_k_advantage_against_every_set_of_k(number, k):
    """Groups of every number of correct responses: the mean over a response's sets, standardised over all sets."""
    for right in range(number + 1):
        r = np.random.default_rng(right).permutation(np.where(np.arange(number) < right, 1.0, -1.0))
        sets = np.array(list(itertools.combinations(range(number), k)))
        reward = (r[sets] > 0).any(axis=1).astype(float)
        expected = np.zeros(number)
        if reward.std() > 0:
            expected = [(reward[(sets == i).any(axis=1)].mean() - reward.mean()) / reward.std() for i in range(number)]
        (a,) = advantages([r], "pass_at_k", k)
        np.testing.assert_allclose(a, expected, rtol=1e-5, atol=1e-6)
        assert a.dtype == np.float32 and a.any() == (0 < right <= number - k)


def test_pass_at_1_advantage_is_the_standardised_reward():
    r = np.array([[1, -1, -1, -1, 1.0]])
    np.testing.assert_allclose(advantages(r, "pass_at_k", 1), (r - r.mean()) / r.std(), rtol=1e-6)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "pass_at_k"])
def test_equal_rewards_have_no_advantage_at_all(kind):
    r = np.array([[1, 1, 1], [-1, -1, -1], [0.1, 0.1, 0.1], [1, -1, -1]])
    assert all_equal(r).tolist() == [True, True, True, False]
    a = advantages(r, kind, 2)
    assert (a[:3] == 0).all() and (a[3] != 0).all()


def test_weights_of_the_three_normalisers():
    lengths = [2, 3, 5]
    np.testing.assert_allclose(token_weights(lengths, "batch"), [0.1] * 3)
    np.testing.assert_allclose(token_weights(lengths, "sequence"), [1 / 6, 1 / 9, 1 / 15], rtol=1e-6)
    np.testing.assert_allclose(token_weights(lengths, "constant", 50), [1 / 150] * 3, rtol=1e-6)
    for kind in ("batch", "sequence"):  # the whole batch's tokens weigh 1
        assert np.dot(token_weights(lengths, kind), lengths) == pytest.approx(1)


def test_first_fit_decreasing_by_hand():
    # 6 → row 0; 5 → row 1; 4 → row 0 (full); 3 → row 1; 2 → row 1 (full); 1 → row 2.
    assert first_fit_decreasing([1, 2, 3, 4, 5, 6], 10) == [[5, 3], [4, 2, 1], [0]]


def test_first_fit_decreasing_fills_rows_well():
    lengths = np.random.default_rng(0).integers(20, 400, 500)
    rows = first_fit_decreasing(lengths, 1024)
    assert sorted(i for row in rows for i in row) == list(range(500))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 1024
    assert len(rows) <= lengths.sum() / 1024 * 1.02 + 1


def test_rows_hold_few_examples_unless_that_takes_too_many_rows():
    lengths = [400] * 8 + [50] * 80
    fewest = first_fit_decreasing(lengths, 2000)
    assert [len(row) for row in fewest] == [5, 19, 40, 24]
    assert [len(row) for row in first_fit_decreasing(lengths, 2000, 16)] == [5, 16, 16, 16, 16, 16, 3]
    assert arrange(lengths, 2000, 0) == (2000, fewest), "seven rows for four"
    lengths = [400] * 40 + [50] * 40
    assert [len(row) for row in first_fit_decreasing(lengths, 2000)] == [5] * 8 + [40]
    assert [len(row) for row in arrange(lengths, 2000, 0)[1]] == [5] * 8 + [16, 16, 8], "eleven for nine"
    assert [len(row) for row in arrange(lengths, 2000, 9)[1]] == [5] * 8 + [40], "where one micro-batch is enough"


def test_rows_are_short_where_one_micro_batch_is_enough_and_full_otherwise():
    assert arrange([100, 90], 4096, 1)[0] == 192
    assert arrange([100, 90], 4096, 2)[0] == 128
    assert arrange([1000] * 3, 4096, 1)[0] == 3072
    size, rows = arrange([1000] * 9, 4096, 2)
    assert size == 4096 and [len(r) for r in rows] == [4, 4, 1]
    assert arrange([30], 32, 1)[0] == 32
    assert arrange([], 1024, 4) == (128, [])


def test_number_of_shapes_is_bounded():
    rng = np.random.default_rng(0)
    shapes = set()
    for _ in range(300):
        lengths = rng.integers(1, 1000, rng.integers(1, 60))
        shapes.add(pack([example(1, n) for n in lengths], np.ones(60), row_tokens=2048, micro_rows=2)["tokens"].shape)
    # one micro-batch of 128, 192, … 1536, 2048, of one row or two; then 256 (at most 30 rows of 2048) of 2048
    assert len(shapes) <= 19 and {s[0] for s in shapes} == {1, 256}
    assert {s[1:] for s in shapes if s[0] > 1} == {(2, 2048)}


@pytest.mark.parametrize("questions", [28, 112])
def test_the_steps_of_a_grpo_run_share_one_program(questions):
    """Questions with 10 responses of at most 4,000 tokens, of which those of a third to five sixths teach: the shape of
    a batch and the number of sequences that attention is compiled for. Rows stay about as full as they can be."""
    programs, rng, rows, fewest = set(), np.random.default_rng(0), 0, 0
    for _ in range(60):
        lengths = np.exp(
            np.log(540) + 0.6 * rng.standard_normal(10 * rng.integers(questions // 3, questions * 5 // 6 + 1))
        )
        lengths[rng.random(len(lengths)) < 0.02] = 4000
        lengths = lengths.clip(30, 4000).astype(int)
        batch = pack([example(100, n) for n in lengths], np.ones(len(lengths)), row_tokens=5760, micro_rows=2)
        programs.add((batch["tokens"].shape, segment_lengths(batch["segments"]).shape))
        rows += (batch["segments"][..., 0] > 0).sum()
        fewest += len(first_fit_decreasing(lengths + 100, 5760))
    assert programs == {((256, 2, 5760), (256, 2, 16))}
    assert rows < 1.03 * fewest


@pytest.mark.parametrize("shards, expected", [(1, 4), (2, 4), (3, 3), (4, 4), (8, 8)])
def test_one_micro_batch_has_no_more_rows_than_it_needs(shards, expected):
    """Three rows of 128 where 64 on each device are allowed."""
    batch = pack([example(10, 90)] * 3, np.ones(3), row_tokens=128, micro_rows=64, shards=shards)
    assert batch["tokens"].shape == (1, expected, 128)


def test_layout_of_a_packed_row():
    made = [
        example(2, 3, 100, logp=[-1.0, -2.0, -3.0], advantage=0.5),
        example(1, 2, 200, logp=[-4.0, -5.0], advantage=-1.5),
    ]
    batch = pack(made, np.array([0.1, 0.2], np.float32), row_tokens=8, micro_rows=2, shards=2)
    assert {k: v.dtype.name for k, v in batch.items()} == {
        "tokens": "int32",
        "positions": "int32",
        "segments": "int32",
        "weight": "float32",
        "advantage": "float32",
        "logp": "float32",
        "used": "int32",
    }
    assert batch["tokens"].shape == (1, 2, 8) and batch["used"] == 1
    row = {k: v[0, 0].tolist() for k, v in batch.items() if k != "used"}
    assert row["tokens"] == [1, 2, 100, 101, 102, 1, 200, 201]
    assert row["positions"] == [0, 1, 2, 3, 4, 0, 1, 2]
    assert row["segments"] == [1, 1, 1, 1, 1, 2, 2, 2]
    np.testing.assert_allclose(row["weight"], [0, 0, 0.1, 0.1, 0.1, 0, 0.2, 0.2])
    assert row["advantage"] == [0, 0, 0.5, 0.5, 0.5, 0, -1.5, -1.5]
    assert row["logp"] == [0, 0, -1, -2, -3, 0, -4, -5]
    assert not any(batch[k][0, 1].any() for k in row), "the second row is padding"


@pytest.mark.parametrize(("examples", "micro"), [(1, 1), (2, 1), (3, 256), (512, 256), (513, 1024)])
def test_micro_batches_are_padded_to_few_numbers(examples, micro):
    batch = pack([example(2, 6)] * examples, np.ones(examples), row_tokens=8, micro_rows=2)
    used = -(-examples // 2)
    assert batch["tokens"].shape == (micro, 2 if examples > 1 else 1, 8) and batch["used"] == used
    assert (batch["segments"] > 0).sum() == 8 * examples and not batch["segments"][used:].any()


@pytest.mark.parametrize("shards", [1, 2])
def test_a_small_batch_in_the_shape_of_larger_ones(shards):
    small, large = ([example(2, 100)] * n for n in (1, 30))
    options = {"row_tokens": 512, "micro_rows": 2, "shards": shards}
    batch = pack(small, np.ones(1), **options, several=True)
    shape = 256 // shards, 2 * shards, 512
    assert batch["tokens"].shape == pack(large, np.ones(30), **options)["tokens"].shape == shape
    assert batch["used"] == 1 and batch["segments"].sum() == 102


def test_too_long_an_example_is_refused():
    with pytest.raises(UserError, match="has 11 tokens, more than a training row holds"):
        pack([example(5, 6)], [1.0], row_tokens=10, micro_rows=1)


def numbered(count):
    return [Example((1,), np.array([10 + i])) for i in range(count)]


def answers(batch):
    return sorted(int(t) - 10 for t in batch["tokens"][batch["weight"] > 0])


def data(**changes):
    settings = {"batch": 4, "epochs": 3, "seed": 5, "row_tokens": 64, "micro_rows": 1}
    return supervised(numbered(10), **settings | changes)


def test_every_epoch_has_every_example_once_and_an_order_of_its_own():
    batches = [answers(b) for b in data()]
    assert [len(b) for b in batches] == [4, 4, 2] * 3, "the last batch of an epoch is smaller, and kept"
    epochs = [batches[i : i + 3] for i in (0, 3, 6)]
    assert all(sorted(itertools.chain(*e)) == list(range(10)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_last_batch_of_an_epoch_has_the_shape_of_the_others():
    examples = [example(2, n) for n in np.random.default_rng(0).integers(20, 60, 37)]
    made = list(supervised(examples, batch=8, epochs=3, seed=0, row_tokens=64, micro_rows=2))
    assert {b["tokens"].shape for b in made} == {(256, 2, 64)}
    assert [int((b["weight"] > 0).sum()) for b in made[4::5]] != [int((b["weight"] > 0).sum()) for b in made[3::5]]
    rows = supervised(examples, batch=8, epochs=1, seed=0, row_tokens=1024, micro_rows=2)
    assert all(b["tokens"].shape[0] == 1 for b in rows), "where one micro-batch is usual it stays one"


def test_every_token_of_a_batch_weighs_the_same_whatever_the_batch():
    weights = [b["weight"][b["weight"] > 0] for b in data(epochs=1)]
    np.testing.assert_allclose(np.concatenate(weights), [0.25] * 8 + [0.5] * 2)


def test_the_order_is_the_seeds():
    assert [answers(b) for b in data()] == [answers(b) for b in data()]
    assert [answers(b) for b in data()] != [answers(b) for b in data(seed=6)]


@pytest.mark.parametrize("stop", [0, 2, 3, 8])
def test_the_iterator_goes_on_from_its_state(stop):
    whole = [answers(b) for b in data()]
    first = iter(data())
    for _ in range(stop):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    second = iter(data())
    second.set_state(state)
    assert [answers(b) for b in second] == whole[stop:]
