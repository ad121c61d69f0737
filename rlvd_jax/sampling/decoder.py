"""Qwen2.5 one token at a time: the weights laid out for decoding, prefill, and one decode step.

Layers are separate here, not stacked: a loop over a stack would copy each layer's weights and cache at every
token. Query, key and value matrices are one matrix, gate and up another, since decoding is bound by how fast
weights are read and by the number of kernels.

A model too large for one device is split over several (`tensor` of them): each has its heads, its columns of the MLP
and its part of the vocabulary, and sums what it adds to the residual stream with the others (`AXIS`).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from rlvd_jax.errors import UserError
from rlvd_jax.qwen2 import attention
from rlvd_jax.qwen2.config import Qwen2Config
from rlvd_jax.qwen2.layers import rms_norm, rope_table, rotate, swiglu
from rlvd_jax.qwen2.weights import by_path
from rlvd_jax.sampling import cache, gpu

AXIS = "tensor"  # of the mesh


def check_split(c: Qwen2Config, tensor: int) -> None:
    """UserError if the model cannot be split over so many devices."""
    kv = c.num_key_value_heads
    for what, size in {"query heads": c.num_attention_heads, "MLP columns": c.intermediate_size}.items():
        if size % tensor:
            raise UserError(f"sampling.tensor: {size} {what} cannot be split over {tensor} devices")
    if kv % tensor and tensor % kv:
        raise UserError(f"sampling.tensor: {kv} key-value heads cannot be split over {tensor} devices")


def kv_heads(c: Qwen2Config, tensor: int) -> int:
    """Key-value heads of all devices together: where there are fewer than devices, several hold the same one."""
    return max(c.num_key_value_heads, tensor)


def decode_weights(params, c: Qwen2Config, dtype, tensor: int = 1) -> dict:
    """The decoder's weights in `dtype` from a model's state (traceable: jit it with the shardings of `specs`)."""
    by_name = by_path(params)
    stack = {name.removeprefix("layers/"): value for name, value in by_name.items() if name.startswith("layers/")}

    def split(w, name):  # [..., columns] → [..., tensor, columns of a device]
        x = w[name]
        if name in ("k", "v", "k_bias", "v_bias") and tensor > c.num_key_value_heads:
            x = x.reshape(*x.shape[:-1], c.num_key_value_heads, c.head_dim)
            x = jnp.repeat(x, tensor // c.num_key_value_heads, axis=-2)
        return x.reshape(*w[name].shape[:-1], tensor, -1)

    def join(w, *names):  # a device's columns of each, side by side
        x = jnp.concatenate([split(w, name) for name in names], axis=-1)
        return x.reshape(*x.shape[:-2], -1)

    layers = []
    for i in range(c.num_hidden_layers):
        w = {name: value[i].astype(dtype) for name, value in stack.items()}
        layers.append(
            {
                "input_norm": w["input_norm"],
                "qkv": join(w, "q", "k", "v"),
                "qkv_bias": join(w, "q_bias", "k_bias", "v_bias"),
                "o": w["o"],
                "post_norm": w["post_norm"],
                "gate_up": join(w, "gate", "up"),
                "down": w["down"],
            }
        )
    embedding = by_name["embedding"].astype(dtype)
    weights = {"layers": layers, "embedding": embedding, "final_norm": by_name["final_norm"].astype(dtype)}
    if not c.tie_word_embeddings:
        weights["lm_head"] = by_name["lm_head"].astype(dtype)
    return weights


def specs(c: Qwen2Config, tensor: int) -> dict:
    """How `decode_weights` are split over the mesh: columns of what reads the residual stream, rows of what adds."""
    columns, rows = P(None, AXIS), P(AXIS)
    layer = {"input_norm": P(), "qkv": columns, "qkv_bias": P(AXIS), "o": rows}
    layer |= {"post_norm": P(), "gate_up": columns, "down": rows}
    weights = {"layers": [layer] * c.num_hidden_layers, "embedding": P(), "final_norm": P()}
    return weights if c.tie_word_embeddings else weights | {"lm_head": rows if _vocab_is_split(c, tensor) else P()}


def _vocab_is_split(c: Qwen2Config, tensor: int) -> bool:
    return tensor > 1 and c.vocab_size % tensor == 0


def _summed(x, tensor: int):
    return jax.lax.psum(x, AXIS) if tensor > 1 else x


def _after_attention(c: Qwen2Config, w, x, out, tensor: int):
    """out: [..., heads * head_dim]."""
    x = x + _summed(out @ w["o"], tensor)
    gate, up = jnp.split(rms_norm(x, w["post_norm"], c.rms_norm_eps) @ w["gate_up"], 2, axis=-1)
    return x + _summed(swiglu(gate, up) @ w["down"], tensor)


def logits(c: Qwen2Config, tensor: int, weights, hidden):
    """float32 logits [rows, vocab] of hidden states [rows, hidden]; each device makes those of its tokens."""
    split = _vocab_is_split(c, tensor)
    table = weights["embedding"] if c.tie_word_embeddings else weights["lm_head"]
    if split and c.tie_word_embeddings:  # whole on each device, since tokens are looked up in it
        size = c.vocab_size // tensor
        table = jax.lax.dynamic_slice_in_dim(table, jax.lax.axis_index(AXIS) * size, size)
    out = jnp.einsum("bd,vd->bv", hidden, table, preferred_element_type=jnp.float32)
    return jax.lax.all_gather(out, AXIS, axis=1, tiled=True) if split else out


def prefill(c: Qwen2Config, tensor: int, layout: cache.Layout, weights, tokens, lengths):
    """Run prompts. tokens: [prompts, time] int32, padded at the right; lengths: [prompts] int32.

    → keys and values of each layer, [prompts, time, kv_heads, head_dim]
    """
    at = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    segments = (at < lengths[:, None]).astype(jnp.int32)
    rope = rope_table(at, c.head_dim, c.rope_theta)
    heads = c.num_attention_heads // tensor
    # The plain form, which `attention.attend` would take on one device of a TPU, holds the scores of all pairs.
    kernel = layout == "tpu" and tokens.shape[1] >= attention.LANES
    attend = attention.splash if kernel else attention.attend
    x = weights["embedding"][tokens]
    layers = []
    for w in weights["layers"]:
        qkv = rms_norm(x, w["input_norm"], c.rms_norm_eps) @ w["qkv"] + w["qkv_bias"]
        qkv = qkv.reshape(*tokens.shape, -1, c.head_dim)
        q, k, v = jnp.split(qkv, [heads, (heads + qkv.shape[-2]) // 2], axis=-2)
        q, k = rotate(q, rope), rotate(k, rope)
        layers.append((k, v))
        if len(layers) < len(weights["layers"]):  # what comes after the last keys and values is not needed
            x = _after_attention(c, w, x, attend(q, k, v, segments).reshape(*tokens.shape, -1), tensor)
    return layers


def step(c: Qwen2Config, tensor: int, layout: cache.Layout, weights, layers, tokens, place: cache.Place):
    """One token for every slot: write its key and value into the cache, attend to what is there.

    layers: the cache (cache.py); tokens: [slots] int32. → (cache, hidden states [slots, hidden]).
    """
    rope = rope_table(place.position, c.head_dim, c.rope_theta)
    heads = c.num_attention_heads // tensor
    x = weights["embedding"][tokens]
    new = []
    if layout in ("gpu", "interpret"):
        parts = gpu.parts_of(tokens.shape[0]) if tensor == 1 else 1
        add_norm = partial(gpu.add_norm, eps=c.rms_norm_eps, interpret=layout == "interpret")
        y = jnp.zeros_like(x)[None]  # what the last block adds to the residual stream
        for w, layer in zip(weights["layers"], layers, strict=True):
            x, h = add_norm(x, y, w["input_norm"], parts=parts)
            layer, out = cache.attend(layer, layout, gpu.product(h, w["qkv"]), w["qkv_bias"], rope, heads, place)
            new.append(layer)
            x, h = add_norm(x, _summed(gpu.product(out, w["o"]), tensor), w["post_norm"])
            gate, up = jnp.split(h[0] @ w["gate_up"], 2, axis=-1)
            y = _summed(gpu.product(gpu.split(swiglu(gate, up), parts), w["down"]), tensor)
        return new, add_norm(x, y, weights["final_norm"])[1][0]
    for w, layer in zip(weights["layers"], layers, strict=True):
        h = rms_norm(x, w["input_norm"], c.rms_norm_eps)
        layer, out = cache.attend(layer, layout, h @ w["qkv"], w["qkv_bias"], rope, heads, place)
        new.append(layer)
        x = _after_attention(c, w, x, out, tensor)
    return new, rms_norm(x, weights["final_norm"], c.rms_norm_eps)
