import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_qwen2 import CONFIGS, logits, params_of, random_model

from rlvd_jax.config import MeshConfig
from rlvd_jax.errors import UserError
from rlvd_jax.qwen2 import Qwen2, Qwen2Config, weights
from rlvd_jax.qwen2.mesh import make_mesh

DATA = Path(__file__).parent / "data"
STORED = ["qwen2-tied", "qwen2-untied"]  # written by torch transformers, tools/make_expected_logits.py


def tool():
    """tools/make_expected_logits.py; skips where torch is not installed."""
    pytest.importorskip("torch")
    path = Path(__file__).parents[1] / "tools" / "make_expected_logits.py"
    spec = importlib.util.spec_from_file_location("make_expected_logits", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- parity with transformers -----------------------------------------------------------------------


@pytest.mark.parametrize("name", STORED)
def test_logits_are_those_of_transformers(name):
    model = weights.load(DATA / name)
    with np.load(DATA / name / "expected.npz") as expected:
        tokens, theirs = expected["tokens"], expected["logits"]
    assert len(list((DATA / name).glob("*.safetensors"))) > 1
    assert model.config.tie_word_embeddings == (name == "qwen2-tied")
    assert theirs.std() > 1
    np.testing.assert_allclose(logits(model, tokens), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", STORED)
def test_logits_are_those_of_transformers_live(name, tmp_path):
    made = tool()
    model = made.random_model(made.MODELS[name], np.random.RandomState(5))
    model.save_pretrained(tmp_path)
    tokens = np.random.RandomState(6).randint(0, model.config.vocab_size, (3, 40)).astype(np.int32)
    np.testing.assert_allclose(logits(weights.load(tmp_path), tokens), made.logits(model, tokens), atol=1e-4, rtol=0)


def test_the_stored_logits_are_what_the_tool_makes(tmp_path):
    tool().make(tmp_path)
    for name in STORED:
        with np.load(tmp_path / name / "expected.npz") as made, np.load(DATA / name / "expected.npz") as stored:
            np.testing.assert_array_equal(made["tokens"], stored["tokens"])
            np.testing.assert_allclose(made["logits"], stored["logits"], atol=1e-4, rtol=0)


def test_bfloat16_arithmetic(tiny_model):
    """Close to float32 for the 8 bits it has, and really bfloat16."""
    tokens = np.random.RandomState(1).randint(0, 60, (3, 40))
    whole = logits(tiny_model, tokens)
    for param_dtype in (jnp.float32, jnp.bfloat16):
        model = random_model(tiny_model.config, dtype=jnp.bfloat16, param_dtype=param_dtype)
        assert jax.eval_shape(model, tokens, tokens, tokens).dtype == jnp.bfloat16
        error = np.abs(logits(model, tokens) - whole)
        assert 1e-3 < error.mean() / whole.std() < 0.03
        assert error.max() / whole.std() < 0.3


# ---- packing and padding ----------------------------------------------------------------------------


def packed(lengths, time, draw, vocab=60):
    """A row of sequences one after another, with padding at the tail and between; → arrays [1, time], places."""
    tokens, positions, segments = draw.randint(0, vocab, time), draw.randint(0, 9, time), np.zeros(time, np.int32)
    places, at = [], 0
    for i, n in enumerate(lengths):
        place = slice(at, at + n)
        segments[place], positions[place] = i + 1, np.arange(n)
        places.append(place)
        at += n + (i == 1)  # padding in the middle too
    assert at < time
    return tokens[None], positions[None], segments[None], places


def test_packed_sequences_do_not_see_each_other(tiny_model):
    tokens, positions, segments, places = packed((7, 12, 1), 40, np.random.RandomState(2))
    alone = np.zeros((3, 40), np.int32)
    for row, place in zip(alone, places, strict=True):
        row[: place.stop - place.start] = tokens[0, place]
    alone = logits(tiny_model, alone)
    together = logits(tiny_model, *(np.repeat(a, 3, axis=0) for a in (tokens, positions, segments)))[0]
    for row, place in zip(alone, places, strict=True):
        np.testing.assert_allclose(together[place], row[: place.stop - place.start], atol=2e-5, rtol=0)


def test_padding_changes_nothing(tiny_model):
    draw = np.random.RandomState(3)
    tokens, positions, segments = (np.repeat(a, 3, axis=0) for a in packed((20,), 40, draw)[:3])
    real = segments > 0
    other = np.where(real, tokens, draw.randint(0, 60, tokens.shape))
    assert (other != tokens).any()
    one, two = (logits(tiny_model, t, positions, segments) for t in (tokens, other))
    np.testing.assert_array_equal(one[real], two[real])
    left = [np.roll(a, 20, axis=1) for a in (tokens, positions, segments)]
    np.testing.assert_allclose(logits(tiny_model, *left)[:, 20:], one[:, :20], atol=2e-5, rtol=0)


def test_positions_are_relative(tiny_model):
    tokens = np.random.RandomState(4).randint(0, 60, (3, 40))
    np.testing.assert_allclose(
        logits(tiny_model, tokens, np.arange(40) + 24), logits(tiny_model, tokens), atol=1e-4, rtol=0
    )


# ---- gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, dtype", [("tied", "float32"), ("untied", "bfloat16")])
def test_gradients_through_scan_and_rematerialisation(name, dtype):
    """Finite beside rows of nothing but padding, where padding adds none, and right along a random direction."""
    model = random_model(CONFIGS[name], dtype=dtype)
    graphdef, params = nnx.split(model, nnx.Param)
    draw = np.random.RandomState(5)
    rows = [packed((9, 8), 24, draw)[:3], packed((15,), 24, draw)[:3]]
    tokens, positions, segments = (np.concatenate([row[i] for row in rows] + [rows[0][i] * 0]) for i in range(3))
    assert not segments[2].any()
    real = segments > 0

    def loss(params, tokens):
        model = nnx.merge(graphdef, params)
        logp = jax.nn.log_softmax(model.logits(model(tokens, positions, segments)))
        return -jnp.where(real, logp[..., 7], 0).sum() / real.sum()

    way = jax.tree.map(lambda w: draw.standard_normal(w.shape).astype(w.dtype), params)

    @jax.jit
    def gradient(params, tokens, step):
        """At a step along the way."""
        return jax.value_and_grad(loss)(jax.tree.map(lambda w, d: w + step * d, params, way), tokens)

    slope = jax.device_get(jax.tree.leaves(gradient(params, tokens, 0.0)[1]))
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in slope)
    for a, b in zip(slope, jax.tree.leaves(gradient(params, np.where(real, tokens, 3), 0.0)[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    if dtype == "float32":
        ahead, behind = (float(gradient(params, tokens, step)[0]) for step in (1e-3, -1e-3))
        along = sum((g * d).sum() for g, d in zip(slope, jax.tree.leaves(way), strict=True))
        assert abs(along) > 0.1
        np.testing.assert_allclose(along, (ahead - behind) / 2e-3, rtol=0.02)


# ---- configuration ----------------------------------------------------------------------------------


def test_config_round_trip_and_size(tiny_config):
    assert Qwen2Config.from_dict(tiny_config.to_dict()) == tiny_config
    assert tiny_config.parameters == sum(
        w.size for w in jax.tree.leaves(params_of(nnx.eval_shape(lambda: Qwen2(tiny_config))))
    )


def test_published_configs_are_read():
    """As Qwen2.5-1.5B's file says it (tied, theta in the old place), and as transformers 5 rewrites it."""
    published = {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 12,
        "num_hidden_layers": 28,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    config = Qwen2Config.from_dict(published)
    assert config.head_dim == 128
    assert config.parameters == 1_543_714_304
    assert config.cache_bytes(2) == 28_672
    del published["rope_theta"]
    assert Qwen2Config.from_dict(published).rope_theta == 1e4
    again = published | {"rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "dtype": "bfloat16"}
    assert Qwen2Config.from_dict(again) == config


BAD = {
    "another architecture": ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM is not supported"),
    "no architecture": ({"architectures": None, "model_type": None}, "architecture None is not supported"),
    "rope scaling": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, r"rope scaling \(yarn\) is not supported"),
    "sliding window": ({"use_sliding_window": True}, "sliding window attention"),
    "another activation": ({"hidden_act": "gelu"}, r"hidden_act \(gelu\)"),
    "missing size": ({"hidden_size": ...}, "hidden_size is missing"),
    "size in words": ({"vocab_size": "many"}, "a size is not a number"),
    "size of a list": ({"vocab_size": [1]}, "a size is not a number"),
    "no heads": ({"num_attention_heads": 0, "num_key_value_heads": 0, "head_dim": None}, "num_attention_heads is 0"),
    "negative size": ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
    "heads that don't divide": ({"num_key_value_heads": 3}, "4 query heads cannot share 3"),
    "odd heads": ({"head_dim": 7}, "head_dim is 7"),
}


@pytest.mark.parametrize("what", BAD)
def test_configs_that_cannot_be_read(what, tmp_path):
    changes, message = BAD[what]
    data = {name: value for name, value in (CONFIGS["tied"].to_dict() | changes).items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=message) as error:
        Qwen2Config.from_directory(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", b"\xff\xfe"])
def test_config_files_that_cannot_be_read(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"config.json: (cannot be read as JSON|holds no JSON object)"):
        Qwen2Config.from_directory(tmp_path)


def test_a_mesh_that_does_not_fit():
    with pytest.raises(UserError, match=r"mesh: data × fsdp × tensor is 1 × 3 × 1, but there are 1 devices"):
        make_mesh(MeshConfig(fsdp=3), jax.devices()[:1])


def test_config_is_hashable():
    """It is a static argument of compiled programs."""
    assert hash(CONFIGS["tied"]) == hash(dataclasses.replace(CONFIGS["tied"]))
