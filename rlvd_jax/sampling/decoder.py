"""Qwen2.5 one token at a time: the weights laid out for decoding, prefill, and one decode step.

Layers are separate here, not stacked: a loop over a stack would copy each layer's weights and cache at every
token. Query, key and value matrices are one matrix, gate and up another, since decoding is bound by how fast
weights are read and by the number of kernels.

A model too large for one device is split over several (`tensor` of them): each has its heads, its columns of the MLP
and its part of the vocabulary, and sums what it adds to the residual stream with the others (`AXIS`).
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from rlvd_jax.errors import UserError
from rlvd_jax.qwen2 import attention
from rlvd_jax.qwen2.config import Qwen2Config
from rlvd_jax.qwen2.layers import rms_norm, rope_table, rotate, swiglu
from rlvd_jax.qwen2.model import layer_weights, top_weights
from rlvd_jax.sampling import cache, gpu

AXIS = "tensor"  # of the mesh
AT_ONCE = 1 << 28  # bytes of weights, of all devices together, that are laid out anew at a time


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


PARTS = {
    "gate_up": ("gate", "up"),
    "qkv": ("q", "k", "v"),
    "down": ("down",),
    "o": ("o",),
    "qkv_bias": ("q_bias", "k_bias", "v_bias"),
    "input_norm": ("input_norm",),
    "post_norm": ("post_norm",),
}
"""A layer's weights here, and which of the model's they are made of."""


def parts(c: Qwen2Config) -> dict[str, tuple[str, ...]]:
    """The decoder's weights, those of all layers as one, and the paths in the model's state that each is made of."""
    top = {name: (name,) for name in ("lm_head", "embedding", "final_norm")}
    if c.tie_word_embeddings:
        del top["lm_head"]
    return {f"layers/{name}": tuple(f"layers/{s}" for s in sources) for name, sources in PARTS.items()} | top


def turned(layout: cache.Layout) -> bool:
    """Whether layers' matrices lie as [outputs, inputs]: they do for the GPU's kernels, whose tiles may have any number
    of outputs. CPUs multiply few rows up to twice as fast the other way."""
    return layout in ("gpu", "interpret")


def decode_part(sources: dict, start, part: str, count: int, c: Qwen2Config, dtype, tensor: int, layout: cache.Layout):
    """One of `parts` in `dtype`, or a list of it of `count` layers from `start` on, from the weights of a model's state
    that it is made of, by path (traceable)."""

    def split(path, x):  # [..., columns] → [..., tensor, columns of a device]
        lead = x.shape[:-1]
        if path.removesuffix("_bias") in ("layers/k", "layers/v") and tensor > c.num_key_value_heads:
            x = x.reshape(*lead, c.num_key_value_heads, c.head_dim)
            x = jnp.repeat(x, tensor // c.num_key_value_heads, axis=-2)
        return x.reshape(*lead, tensor, -1)

    def join(values):  # a device's columns of each, side by side
        if len(values) == 1:
            return values[0]
        x = jnp.concatenate([split(path, x) for path, x in zip(paths, values, strict=True)], axis=-1)
        return x.reshape(*x.shape[:-2], -1)

    paths = parts(c)[part]
    if not part.startswith("layers/"):
        return sources[part].astype(dtype)
    stacks = [jax.lax.dynamic_slice_in_dim(sources[path], start, count) for path in paths]
    made = [join([stack[i].astype(dtype) for stack in stacks]) for i in range(count)]
    return [x.T for x in made] if turned(layout) else made


def layers_at_once(c: Qwen2Config, itemsize: int, part: str) -> int:
    """How many layers of a part are made together: to split weights anew takes their size in memory, and more."""
    if not part.startswith("layers/"):
        return 1
    each = itemsize * sum(_size(c, path) for path in parts(c)[part])
    layers = c.num_hidden_layers
    return max(n for n in range(1, layers + 1) if layers % n == 0 and (n == 1 or n * each <= AT_ONCE))


def _size(c: Qwen2Config, path: str) -> int:
    """Numbers in a weight of the model; of one layer, where it is of layers."""
    weights = {f"layers/{name}": w for name, w in layer_weights(c).items()} | top_weights(c)
    return math.prod(weights[path].shape)


def loading_bytes(c: Qwen2Config, itemsize: int, tensor: int, here: int) -> float:
    """The most that a device holds while the decoder's weights are made of a model's that is split over `here` devices
    and given up on the way: what is left of it, what is made, and what is being made once more while it is brought
    together on each device, or twice more where it is split anew (as compiled for TPUs)."""
    left, made, most = itemsize * c.parameters / here, 0.0, 0.0
    for part, paths in parts(c).items():
        layers = c.num_hidden_layers if part.startswith("layers/") else 1
        taken = itemsize * layers * sum(_size(c, path) for path in paths)
        whole = spec(c, tensor, part, "plain") == P()
        new = taken / (1 if whole else tensor)
        made += new
        beside = (1 if whole else 2) * new * layers_at_once(c, itemsize, part) / layers if here > 1 else 0
        most = max(most, left + made + beside)
        left -= taken / here
    return most


def spec(c: Qwen2Config, tensor: int, part: str, layout: cache.Layout) -> P:
    """How one of `parts` is split over the mesh: outputs of what reads the residual stream, inputs of what adds."""
    first, second = P(AXIS), P(None, AXIS)
    outputs, inputs = (first, second) if turned(layout) else (second, first)
    split = {"layers/qkv": outputs, "layers/qkv_bias": first, "layers/o": inputs}
    split |= {"layers/gate_up": outputs, "layers/down": inputs}
    return split.get(part, first if part == "lm_head" and _vocab_is_split(c, tensor) else P())


def assemble(c: Qwen2Config, made: dict) -> dict:
    """The decoder's weights from its parts, or what holds of each layer's from what holds of each part."""
    layers = {name: made[f"layers/{name}"] for name in PARTS}
    whole = {name: value for name, value in made.items() if not name.startswith("layers/")}
    each = [
        {name: x[i] if isinstance(x, list) else x for name, x in layers.items()} for i in range(c.num_hidden_layers)
    ]
    return {"layers": each} | whole


def specs(c: Qwen2Config, tensor: int, layout: cache.Layout) -> dict:
    """How the decoder's weights are split over the mesh."""
    return assemble(c, {part: spec(c, tensor, part, layout) for part in parts(c)})


def _vocab_is_split(c: Qwen2Config, tensor: int) -> bool:
    return tensor > 1 and c.vocab_size % tensor == 0


def _summed(x, tensor: int):
    return jax.lax.psum(x, AXIS) if tensor > 1 else x


def _after_attention(c: Qwen2Config, w, x, out, tensor: int):
    """out: [..., heads * head_dim]."""
    x = x + _summed(out @ w["o"], tensor)
    gate, up = jnp.split(rms_norm(x, w["post_norm"], c.rms_norm_eps) @ w["gate_up"], 2, axis=-1)
    return x + _summed(swiglu(gate, up) @ w["down"], tensor)


def unembedding(c: Qwen2Config, weights):
    return weights["embedding"] if c.tie_word_embeddings else weights["lm_head"]


def logits(c: Qwen2Config, tensor: int, weights, hidden):
    """float32 logits [rows, vocab] of hidden states [rows, hidden]; each device makes those of its tokens."""
    split = _vocab_is_split(c, tensor)
    table = unembedding(c, weights)
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
        w = jax.tree.map(jnp.transpose, w) if turned(layout) else w
        qkv = rms_norm(x, w["input_norm"], c.rms_norm_eps) @ w["qkv"] + w["qkv_bias"]
        qkv = qkv.reshape(*tokens.shape, -1, c.head_dim)
        q, k, v = jnp.split(qkv, [heads, (heads + qkv.shape[-2]) // 2], axis=-2)
        q, k = rotate(q, rope), rotate(k, rope)
        layers.append((k, v))
        if len(layers) < len(weights["layers"]):  # what comes after the last keys and values is not needed
            x = _after_attention(c, w, x, attend(q, k, v, segments).reshape(*tokens.shape, -1), tensor)
    return layers


def step(c: Qwen2Config, tensor: int, layout: cache.Layout, weights, layers, tokens, place: cache.Place):
    """One token for every slot, or what `place.rows` has: write keys and values to the cache, attend to what is there.

    layers: the cache (cache.py); tokens: [rows] int32. → (cache, hidden states [rows, hidden]).
    """
    position, rows = place.position, place.rows
    if rows is not None:
        position = position[rows.slot] + rows.nth
    rope = rope_table(position, c.head_dim, c.rope_theta)
    heads = c.num_attention_heads // tensor
    x = weights["embedding"][tokens]
    place = cache.planned(place, layout, layers)
    new = []
    if layout in ("gpu", "interpret"):
        interpret, used = layout == "interpret", place.used
        by = gpu.products_by(tokens.shape[0], c.hidden_size, c.intermediate_size // tensor, tensor)
        product = partial(gpu.product, by=by, tensor=tensor, interpret=interpret)
        add_norm = partial(gpu.add_norm, used=used, eps=c.rms_norm_eps, interpret=interpret)
        y = jnp.zeros_like(x)[None]  # what the last block adds to the residual stream, in parts
        for w, layer in zip(weights["layers"], layers, strict=True):
            x, h = add_norm(x, y, w["input_norm"])
            layer, out = cache.attend(layer, layout, product(h, w["qkv"], used), w["qkv_bias"], rope, heads, place)
            new.append(layer)
            x, h = add_norm(x, _summed(product(out, w["o"], used), tensor), w["post_norm"])
            h = gpu.gated(h, w["gate_up"], used, by=by, interpret=interpret)
            y = _summed(product(h, w["down"], used), tensor)
        return new, add_norm(x, y, weights["final_norm"])[1]
    for w, layer in zip(weights["layers"], layers, strict=True):
        h = rms_norm(x, w["input_norm"], c.rms_norm_eps)
        layer, out = cache.attend(layer, layout, h @ w["qkv"], w["qkv_bias"], rope, heads, place)
        new.append(layer)
        x = _after_attention(c, w, x, out, tensor)
    return new, rms_norm(x, weights["final_norm"], c.rms_norm_eps)
