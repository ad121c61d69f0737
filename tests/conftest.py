"""Tiny Qwen2.5 models that the tests of the model, its weights and the sampler share."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from rlvd_jax.qwen2 import Qwen2, Qwen2Config, weights

TIED = Qwen2Config(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rope_theta=1e4,
    tie_word_embeddings=True,
    max_position_embeddings=128,
)
UNTIED = Qwen2Config(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
)


def random_model(config: Qwen2Config, seed: int = 0, scale: float = 0.3, **dtypes) -> Qwen2:
    """A model whose every weight is random, biases and norms too, and whose logits spread over several units."""
    rng = np.random.RandomState(seed)
    model = Qwen2(config, **dtypes)
    graphdef, params = nnx.split(model, nnx.Param)
    draw = lambda w: (scale * rng.randn(*w.shape) + (1 if w.ndim == 1 and w.std() == 0 else 0)).astype(w.dtype)  # noqa: E731
    return nnx.merge(graphdef, jax.tree.map(draw, params))


@pytest.fixture(scope="session", params=["tied", "untied"])
def config(request) -> Qwen2Config:
    return TIED if request.param == "tied" else UNTIED


@pytest.fixture(scope="session")
def checkpoint(config, tmp_path_factory):
    """A checkpoint directory of a random model in float32, in several shards."""
    directory = tmp_path_factory.mktemp("checkpoint") / "model"
    model = random_model(config)
    weights.save(nnx.state(model, nnx.Param), config, directory, shard_bytes=40_000)
    return directory
