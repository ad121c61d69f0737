import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_helpers as tiny
from flax import nnx

from rlvd_jax import targets
from rlvd_jax.config import MeshConfig, OptimizerConfig
from rlvd_jax.qwen2 import Qwen2
from rlvd_jax.qwen2.mesh import make_mesh
from rlvd_jax.qwen2.model import HEADS, WIDE, unstack
from rlvd_jax.training.batches import pack, token_weights
from rlvd_jax.training.loss import Objective
from rlvd_jax.training.optimizer import decayed, learning_rate, make_optimizer
from rlvd_jax.training.step import Trainer, TrainState, earns_unrolling, layers_kept, segment_lengths

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import workloads

PLAIN = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, clip_norm=None, weight_decay=0.0)


@pytest.fixture(autouse=True, scope="module")
def quickly():
    with tiny.quick_compilation():
        yield


def batch_of(examples, row_tokens=20, micro_rows=1, normalise="batch", shards=1):
    weights = token_weights([len(e.response) for e in examples], normalise, 12)
    return pack(examples, weights, row_tokens=row_tokens, micro_rows=micro_rows, shards=shards)


def first_update(trainer, batch):
    """(state, metrics) after one update of the tiny model."""
    state, metrics = trainer.update(trainer.init(tiny.params()), trainer.place(batch))
    return state, jax.device_get(metrics)


def gradient(state):
    """Of the first update: AdamW's first moment is (1 - b1) times it."""
    (adam,) = [s for s in jax.tree.leaves(state.optimizer, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")]
    return jax.tree.map(lambda m: np.asarray(m) / (1 - PLAIN.b1), adam.mu)


def assert_close(a, b, atol):
    for x, y in zip(tiny.leaves(a), tiny.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol)


@pytest.fixture(scope="module")
def supervised():
    return Trainer(tiny.CONFIG, jnp.float32, tiny.mesh(), PLAIN)


@pytest.fixture(scope="module")
def policy():
    return Trainer(tiny.CONFIG, jnp.float32, tiny.mesh(), PLAIN, Objective(), temperature=0.9)


def test_rate_warms_up_from_zero_and_stays():
    rate = learning_rate(OptimizerConfig(learning_rate=2e-3, warmup_steps=4))
    np.testing.assert_allclose([float(rate(s)) for s in range(7)], np.array([0, 1, 2, 3, 4, 4, 4]) * 5e-4, rtol=1e-6)
    assert float(learning_rate(PLAIN)(0)) == pytest.approx(1e-2)


def test_matrices_decay_and_biases_and_norms_do_not():
    names = {
        "/".join(str(p.key) for p in path if isinstance(p, jax.tree_util.DictKey)): value
        for path, value in jax.tree_util.tree_leaves_with_path(decayed(tiny.params()))
    }
    assert {n for n, v in names.items() if v} == {
        "embedding",
        *(f"layers/{w}" for w in ("q", "k", "v", "o", "gate", "up", "down")),
    }
    assert {n for n, v in names.items() if not v} == {
        "final_norm",
        *(f"layers/{w}" for w in ("input_norm", "post_norm", "q_bias", "k_bias", "v_bias")),
    }


def test_adamw_by_hand():
    config = OptimizerConfig(
        learning_rate=0.1, warmup_steps=2, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.5, clip_norm=1.0
    )
    optimizer = make_optimizer(config)
    params = {"w": jnp.float32([[1.0, -2.0]]), "q_bias": jnp.float32([3.0])}
    gradients = [([3.0, 0.0], 4.0), ([0.3, 0.4], 0.0), ([-6.0, 0.0], 8.0)]  # norms 5, 0.5, 10
    state = optimizer.init(params)
    w, m, v = np.array([1.0, -2.0, 3.0]), np.zeros(3), np.zeros(3)
    for step, (g_w, g_b) in enumerate(gradients):
        g = {"w": jnp.float32([g_w]), "q_bias": jnp.float32([g_b])}
        changes, state = optimizer.update(g, state, params)
        params = jax.tree.map(jnp.add, params, changes)
        g = np.array([*g_w, g_b])
        g = g / max(1.0, np.linalg.norm(g))
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        m_hat, v_hat = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.99 ** (step + 1))
        rate = 0.1 * min(1, step / 2)
        w = w - rate * (m_hat / (np.sqrt(v_hat) + 1e-8) + 0.5 * w * np.array([1, 1, 0]))
        np.testing.assert_allclose(np.concatenate([params["w"][0], params["q_bias"]]), w, rtol=1e-5)


def test_packed_loss_and_gradient_equal_unpacked(supervised):
    """Against every example in a row of its own, with plain log-probabilities of all its tokens."""
    examples = tiny.examples(9)
    state, metrics = first_update(supervised, batch_of(examples))
    length = max(map(len, examples))
    tokens, segments, answer = np.zeros((3, len(examples), length), np.int32)
    for i, e in enumerate(examples):
        tokens[i, : len(e)] = [*e.prompt, *e.response]
        segments[i, : len(e)] = 1
        answer[i, len(e.prompt) : len(e)] = 1

    def loss(params):
        model = nnx.merge(supervised.graphdef, params)
        hidden = model(tokens, np.broadcast_to(np.arange(length), tokens.shape), segments)
        logp = jax.nn.log_softmax(model.logits(hidden))[:, :-1]
        logp = jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]
        return -(logp * answer[:, 1:]).sum() / answer.sum()

    value, unpacked = jax.jit(jax.value_and_grad(loss))(tiny.params())
    assert metrics["loss"] == pytest.approx(float(value), rel=1e-5)
    assert_close(gradient(state), unpacked, 3e-6)
    assert metrics["grad_norm"] == pytest.approx(np.sqrt(sum((g**2).sum() for g in tiny.leaves(unpacked))), rel=1e-4)


@pytest.mark.parametrize("row_tokens, micro_rows", [(20, 1), (20, 3)])
def test_rows_and_micro_batches_change_nothing(policy, row_tokens, micro_rows):
    examples = tiny.examples(9, policy=True)
    state, metrics = first_update(policy, batch_of(examples, 400, 1, "sequence"))
    other, others = first_update(policy, batch_of(examples, row_tokens, micro_rows, "sequence"))
    for name, value in metrics.items():
        assert others[name] == pytest.approx(value, rel=2e-5, abs=1e-6), name
    assert_close(gradient(other), gradient(state), 2e-6)


@pytest.mark.parametrize("micro_rows, keep", [(4, (2, 0)), (4, (1, 2)), (1, (0, 1))])
def test_unrolled_layers_change_nothing(policy, monkeypatch, micro_rows, keep):
    """However many layers keep their wide products or borrow their matrices; in one micro-batch and with their
    gradients added up."""
    unrolled = Trainer(tiny.CONFIG, jnp.float32, tiny.mesh(), PLAIN, Objective(), temperature=0.9, unroll=True)
    monkeypatch.setattr(unrolled, "_keep", lambda shape: keep)
    batch = batch_of(tiny.examples(9, policy=True), 400 if micro_rows > 1 else 20, micro_rows)
    assert (batch["tokens"].shape[0] == 1) == (micro_rows > 1)
    (state, metrics), (other, others) = first_update(policy, batch), first_update(unrolled, batch)
    for name, value in metrics.items():
        assert others[name] == pytest.approx(value, rel=2e-5, abs=1e-6), name
    assert jax.tree.structure(state) == jax.tree.structure(other)
    assert_close(gradient(other), gradient(state), 2e-6)


def test_what_unrolled_layers_keep(capsys):
    """Of each layer queries, keys and values, and of the last one the wide products too."""
    graphdef, params = nnx.split(Qwen2(tiny.CONFIG), nnx.Param)
    rows = np.zeros((3, 2, 7), np.int32)
    for keep in (0, 1, 2):
        model = partial(lambda keep, p: nnx.merge(graphdef, p)(*rows, keep=keep), keep)
        jax.ad_checkpoint.print_saved_residuals(model, unstack(params, jnp.float32))
        kept = capsys.readouterr().out
        assert (kept.count(f"named '{HEADS}'"), kept.count(f"named '{WIDE}'")) == (2 * 3, keep * 2)


def test_borrowed_matrices_are_not_kept(capsys):
    graphdef, params = nnx.split(Qwen2(tiny.CONFIG), nnx.Param)
    rows = np.zeros((3, 2, 7), np.int32)

    for borrowed in (0, 1, 2):

        def hidden(params, borrowed=borrowed):
            places = unstack(params, jnp.bfloat16, borrowed)
            return nnx.merge(graphdef, places)(*rows, lenders=(borrowed, params["layers"]))

        jax.ad_checkpoint.print_saved_residuals(hidden, params)
        kept = capsys.readouterr().out
        assert kept.count("output of convert_element_type") == 7 * (tiny.CONFIG.num_hidden_layers - borrowed)


def test_as_many_layers_are_kept_as_there_is_room_for():
    """The 1.5B, 8 rows of 2,048 tokens: compiled for an H100, all layers make it 42.3 GiB, and 39.9 if their matrices
    are borrowed; in a loop all are kept, 42.2 GiB, or none."""
    c = workloads.shape("1.5B")

    def kept(gib, unrolled=True, several=False, **mesh):
        axes = {"data": 1, "fsdp": 1, "tensor": 1} | mesh
        return layers_kept(c, 2, axes, 8 * 2048, several, unrolled, gib * 2**30)

    assert [kept(gib) for gib in (20, 37, 39.9, 42, 73)] == [(0, 28), (22, 28), (28, 28), (28, 4), (28, 0)]
    assert kept(37, several=True) < (22, 28) < kept(37, fsdp=2)
    assert [kept(gib, unrolled=False) for gib in (40, 45, 73)] == [(None, 0), (0, 0), (28, 0)]


def test_rows_at_once_leave_nothing_to_be_computed_again(monkeypatch):
    trainer = Trainer(workloads.shape("1.5B"), jnp.bfloat16, tiny.mesh(), PLAIN, unroll=True)

    def rows(gib, tokens):
        monkeypatch.setattr(trainer, "_limit", lambda: gib and gib * 2**30)
        return trainer.rows_at_once(tokens)

    assert [rows(gib, 4352) for gib in (None, 24, 36, 48, 65, 130)] == [1, 1, 1, 2, 4, 4]
    assert rows(65, 2048) == 8 and rows(130, 2048) == 16 and rows(130, 32768) == 1
    kept = [layers_kept(trainer.config, 2, trainer.mesh.shape, n * 4352, True, True, 48 * 2**30) for n in (2, 4)]
    assert kept[0] == (28, 0) != kept[1]


def test_unrolling_is_for_gpus_with_enough_to_do():
    def earns(asked, platform, updates):
        devices = np.array([SimpleNamespace(platform=platform)])
        return earns_unrolling(asked, SimpleNamespace(devices=devices), updates, 100)

    assert [earns(None, "gpu", n) for n in (99, 100)] == [False, True]
    assert not earns(None, "tpu", 1000) and not earns(None, "cpu", 1000)
    assert earns(True, "cpu", 1) and not earns(False, "gpu", 1000)


def test_logprobs_are_those_of_the_loss(policy):
    examples = tiny.examples(9, policy=True)
    batch = batch_of(examples)
    logp = np.asarray(policy.logprobs(tiny.params(), policy.place(batch)))
    assert logp.shape == batch["tokens"].shape
    metrics = first_update(policy, batch)[1]
    delta = np.abs(logp - batch["logp"])[batch["weight"] > 0]
    assert metrics["delta_logp"] == pytest.approx(delta.mean(), rel=1e-5)
    assert metrics["delta_logp_max"] == pytest.approx(delta.max(), rel=1e-5)
    assert metrics["tokens"] == sum(len(e.response) for e in examples)


def test_shapes_are_compiled_once_and_nothing_is_transferred_implicitly(policy):
    state = policy.init(tiny.params())
    before = policy.update._cache_size()
    with jax.transfer_guard("disallow"):
        for seed in range(6):  # 5 to 13 rows of 20 tokens
            examples = tiny.examples(9 + 2 * seed, seed, policy=True)
            state, metrics = policy.update(state, policy.place(batch_of(examples)))
        metrics = jax.device_get(metrics)
    assert policy.update._cache_size() - before <= 1, "always 128 micro-batches"
    assert int(state.step) == 6


def test_the_state_is_donated(supervised):
    state = supervised.init(tiny.params())
    new, _ = supervised.update(state, supervised.place(batch_of(tiny.examples(9))))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
    assert isinstance(new, TrainState)


def test_updates_lower_the_loss(supervised):
    state, batch = supervised.init(tiny.params()), supervised.place(batch_of(tiny.examples(9)))
    losses = []
    for _ in range(100):
        state, metrics = supervised.update(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 2.5 and losses[-1] < 0.5


def test_bfloat16_arithmetic_on_float32_weights(supervised):
    examples = tiny.examples(9)
    trainer = Trainer(tiny.CONFIG, jnp.bfloat16, tiny.mesh(), PLAIN)
    state, metrics = first_update(trainer, batch_of(examples))
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    exact, exactly = first_update(supervised, batch_of(examples))
    assert metrics["loss"] == pytest.approx(exactly["loss"], rel=0.02) and metrics["loss"] != exactly["loss"]
    a, b = (np.concatenate([g.ravel() for g in tiny.leaves(gradient(s))]) for s in (state, exact))
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.99


POLICY = Objective(ratio="sequence", kl=0.1)
BONUS = Objective(entropy=0.1)  # whose layers are unrolled on meshes, and its batch one micro-batch
MESHES = {
    2: [({"tensor": 2}, None)],
    4: [({}, POLICY), ({"data": 2, "fsdp": 2}, None)],
    8: [({}, None), ({}, BONUS), ({"fsdp": 2, "tensor": 2}, POLICY)],
}
"""Number of devices → axes of some meshes of them, and what is trained there."""


def three_updates(axes, objective, devices=1):
    """The metrics of three updates on a mesh, then the size of the weights."""
    mesh = make_mesh(MeshConfig(**axes), jax.devices()[:devices])
    whole = objective is BONUS and devices > 1
    trainer = Trainer(tiny.CONFIG, jnp.float32, mesh, PLAIN, objective, unroll=whole)
    if whole:
        trainer._keep = lambda shape: (1, 1)  # the first layer's matrices are borrowed
    rows = {"micro_rows": 16 if whole else 1, "shards": trainer.batch_shards}
    batch = batch_of(tiny.examples(21, policy=objective is not None), **rows)
    assert (len(batch["tokens"]) == 1) == whole
    if objective:  # any numbers near the policy's
        batch |= {"old": batch["logp"], "reference": batch["logp"] - 0.1}
    state, batch = trainer.init(tiny.params()), trainer.place(batch)
    for _ in range(3):
        state, metrics = trainer.update(state, batch)
        yield from (float(metrics[name]) for name in sorted(metrics))
    yield float(sum(jnp.abs(x).sum() for x in jax.tree.leaves(state.params)))


def on_eight(what) -> list[str]:
    """What this file prints as a script, where there are eight simulated devices."""
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    out = subprocess.run(
        [sys.executable, str(Path(__file__)), what], env=environment, capture_output=True, text=True, timeout=600
    )
    assert out.returncode == 0, out.stderr
    return out.stdout.splitlines()


def test_one_device_equals_two_four_and_eight():
    """SFT and GRPO on one device here, and on meshes of simulated ones in another process."""
    lines = iter(on_eight("updates"))
    one = {objective: list(three_updates({}, objective)) for objective in (None, POLICY, BONUS)}
    for meshes in MESHES.values():
        for _, objective in meshes:
            np.testing.assert_allclose([float(x) for x in next(lines).split()], one[objective], rtol=2e-4)


def reduced(unroll, micro_rows):
    """`tiny.all_reduced` of an update on four devices, each of which has all weights."""
    trainer = Trainer(tiny.CONFIG, jnp.float32, make_mesh(MeshConfig(), jax.devices()[:4]), PLAIN, unroll=unroll)
    trainer._keep = lambda shape: (2, int(unroll))  # some matrices are borrowed
    batch = batch_of(tiny.examples(21), shards=4, micro_rows=micro_rows)
    assert len(batch["tokens"]) == (128 if micro_rows == 1 else 1), "micro-batches"
    return tiny.all_reduced(targets.compile_update(trainer, batch).as_text(), loops=micro_rows == 1)


def test_whole_gradients_are_reduced_once_and_not_in_every_micro_batch():
    """Nor that of the table, which is tied, once for what embeds and once for what makes logits."""
    weights = sum(x.size for x in jax.tree.leaves(tiny.params()))
    for line in on_eight("reduced"):
        inside, outside = map(int, line.split())
        assert inside == 0 and weights < outside < weights + 10  # the sums of the metrics with them


if __name__ == "__main__":
    assert jax.device_count() == 8
    if sys.argv[1] == "reduced":
        for unroll, micro_rows in ((False, 1), (True, 1), (True, 16)):
            print(*reduced(unroll, micro_rows))
    else:
        for devices, meshes in MESHES.items():
            for axes, objective in meshes:
                print(*three_updates(axes, objective, devices))


def test_lengths_of_segments():
    """As cuDNN's attention wants them: padded to a power of 4, whole batches of micro-batches."""
    segments = np.array([[[1, 1, 2, 3, 3, 3, 0], [1] * 7], [[0] * 7, [1, 2, 3, 4, 5, 0, 0]]])
    expected = np.zeros((2, 2, 16), np.int32)
    expected[0, 0, :3], expected[0, 1, 0], expected[1, 1, :5] = (2, 1, 3), 7, 1
    np.testing.assert_array_equal(segment_lengths(segments), expected)
    assert segment_lengths(segments[:1]).shape == (1, 2, 4)
    assert segment_lengths(segments[:1, 1:]).tolist() == [[[7]]]
    assert segment_lengths(segments[:1, 1:], 4).tolist() == [[[7, 0, 0, 0]]]
