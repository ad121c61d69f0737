"""Qwen2.5 one token at a time: the weights laid out for decoding, prefill, and one decode step.

Layers are separate here, not stacked: a loop over a stack would copy each layer's weights and cache at every
token. Query, key and value matrices are one matrix, gate and up another, since decoding is bound by how fast
weights are read and by the number of kernels.
"""

from __future__ import annotations

import jax.numpy as jnp

from rlvd_jax.qwen2.attention import attend
from rlvd_jax.qwen2.config import Qwen2Config
from rlvd_jax.qwen2.layers import rms_norm, rope_table, rotate, swiglu
from rlvd_jax.qwen2.weights import by_path
from rlvd_jax.sampling import cache


def decode_weights(params, c: Qwen2Config, dtype) -> dict:
    """The decoder's weights in `dtype` from a model's state (traceable: jit it with the shardings you want)."""
    by_name = by_path(params)
    stack = {name.removeprefix("layers/"): value for name, value in by_name.items() if name.startswith("layers/")}
    layers = []
    for i in range(c.num_hidden_layers):
        w = {name: value[i].astype(dtype) for name, value in stack.items()}
        layers.append(
            {
                "input_norm": w["input_norm"],
                "qkv": jnp.concatenate([w["q"], w["k"], w["v"]], axis=1),
                "qkv_bias": jnp.concatenate([w["q_bias"], w["k_bias"], w["v_bias"]]),
                "o": w["o"],
                "post_norm": w["post_norm"],
                "gate_up": jnp.concatenate([w["gate"], w["up"]], axis=1),
                "down": w["down"],
            }
        )
    embedding = by_name["embedding"].astype(dtype)
    weights = {"layers": layers, "embedding": embedding, "final_norm": by_name["final_norm"].astype(dtype)}
    if not c.tie_word_embeddings:
        weights["lm_head"] = by_name["lm_head"].astype(dtype)
    return weights


def _qkv(c: Qwen2Config, w, x, rope):
    """→ q [..., heads, head_dim], k and v [..., kv_heads, head_dim], rotated."""
    h = rms_norm(x, w["input_norm"], c.rms_norm_eps)
    qkv = (h @ w["qkv"] + w["qkv_bias"]).reshape(*x.shape[:-1], -1, c.head_dim)
    q, k, v = jnp.split(qkv, [c.num_attention_heads, c.num_attention_heads + c.num_key_value_heads], axis=-2)
    return rotate(q, rope), rotate(k, rope), v


def _after_attention(c: Qwen2Config, w, x, out):
    x = x + out.reshape(*x.shape[:-1], -1) @ w["o"]
    gate, up = jnp.split(rms_norm(x, w["post_norm"], c.rms_norm_eps) @ w["gate_up"], 2, axis=-1)
    return x + swiglu(gate, up) @ w["down"]


def logits(weights, hidden):
    """float32 logits [rows, vocab] of hidden states [rows, hidden]."""
    table = weights.get("lm_head", weights["embedding"])
    return jnp.einsum("bd,vd->bv", hidden, table, preferred_element_type=jnp.float32)


def prefill(c: Qwen2Config, weights, tokens, lengths):
    """Run prompts. tokens: [prompts, time] int32, padded at the right; lengths: [prompts] int32.

    → (keys and values of each layer, [prompts, time, kv_heads, head_dim]; hidden states [prompts, hidden] of
    each prompt's last token).
    """
    at = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    segments = (at < lengths[:, None]).astype(jnp.int32)
    rope = rope_table(at, c.head_dim, c.rope_theta)
    x = weights["embedding"][tokens]
    layers = []
    for w in weights["layers"]:
        q, k, v = _qkv(c, w, x, rope)
        x = _after_attention(c, w, x, attend(q, k, v, segments))
        layers.append((k, v))
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return layers, rms_norm(last, weights["final_norm"], c.rms_norm_eps)


def step(c: Qwen2Config, layout: cache.Layout, weights, layers, tokens, positions, span: int):
    """One token for every slot: write its key and value into the cache, attend to what is there.

    layers: the cache (cache.py); tokens, positions: [slots] int32; span: no position at or beyond it is filled
    (static). → (cache, hidden states [slots, hidden]).
    """
    rope = rope_table(positions, c.head_dim, c.rope_theta)
    x = weights["embedding"][tokens]
    new = []
    for w, layer in zip(weights["layers"], layers, strict=True):
        q, k, v = _qkv(c, w, x, rope)
        layer = cache.append(layer, layout, positions, k, v)
        x = _after_attention(c, w, x, cache.attend(q, layer, layout, positions + 1, span))
        new.append(layer)
    return new, rms_norm(x, weights["final_norm"], c.rms_norm_eps)
