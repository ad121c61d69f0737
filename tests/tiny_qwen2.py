"""Tiny Qwen2.5 models that the tests of the model, its weights and the sampler share."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rlvd_jax.qwen2 import Qwen2, Qwen2Config

CONFIGS = {
    "tied": Qwen2Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rope_theta=1e4,
        tie_word_embeddings=True,
        max_position_embeddings=128,
    ),
    "untied": Qwen2Config(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        rms_norm_eps=1e-5,
        max_position_embeddings=64,
    ),
}


def random_model(config: Qwen2Config, seed: int = 0, scale: float = 0.3, **dtypes) -> Qwen2:
    """A model whose every weight is random, biases and norms too, so that its logits spread over several units."""
    draw = np.random.RandomState(seed)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Qwen2(config, **dtypes)), nnx.Param)

    def value(path, w):
        one = "norm" in jax.tree_util.keystr(path)
        return jnp.asarray(one + scale * draw.standard_normal(w.shape), w.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(value, params))


def params_of(model: Qwen2) -> nnx.State:
    return nnx.state(model, nnx.Param)


def logits(model: Qwen2, tokens, positions=None, segments=None) -> np.ndarray:
    """float32 logits [batch, time, vocab]; one segment a row unless said otherwise."""
    tokens = np.asarray(tokens, np.int32)
    positions = np.arange(tokens.shape[1]) if positions is None else positions
    segments = 1 if segments is None else segments
    where = [np.broadcast_to(np.asarray(a, np.int32), tokens.shape) for a in (positions, segments)]
    return np.asarray(_logits(*nnx.split(model, nnx.Param), tokens, *where))


@partial(jax.jit, static_argnums=0)
def _logits(graphdef, params, tokens, positions, segments):
    model = nnx.merge(graphdef, params)
    out = model.logits(model(tokens, positions, segments))
    assert out.dtype == jnp.float32
    return out
