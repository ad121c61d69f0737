"""AdamW with clipping by the global norm and a constant rate after a linear warm-up."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from rlvd_jax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig):
    """Rate of update s = 0, 1, …: learning_rate · min(1, s / warmup_steps), as transformers' constant_with_warmup; so
    the first update of a warm-up has rate 0."""

    def rate(step):
        return config.learning_rate * jnp.minimum(1.0, step / max(1, config.warmup_steps))

    return rate if config.warmup_steps else lambda step: jnp.float32(config.learning_rate)


def decayed(params):
    """True for weights that decay: matrices and embeddings, but no biases and no norms, as transformers' Trainer."""

    def is_matrix(path, _):
        return not str(getattr(path[-1], "key", "")).endswith(("bias", "norm"))

    # nnx.State wraps arrays in variables, whose last path entry is the variable's value: look at dict keys only.
    def keys(path):
        return [p for p in path if isinstance(p, jax.tree_util.DictKey)] or path

    return jax.tree_util.tree_map_with_path(lambda path, x: is_matrix(keys(path), x), params)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clip by the global norm, then AdamW with decoupled decay, p ← p - rate · (m̂ / (√v̂ + eps) + decay · p)."""
    adamw = optax.adamw(
        learning_rate(config), config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decayed
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw
