"""Qwen2.5 as one Flax NNX module: every weight declared once, layers stacked and scanned.

Matrices are stored [in, out], so that `x @ w` needs no transpose; `weights.py` turns the checkpoints' [out, in].
The padding id of `segments` is 0; positions are given, so packed rows restart them at each segment.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from rlvd_jax.qwen2.attention import attend
from rlvd_jax.qwen2.config import Qwen2Config
from rlvd_jax.qwen2.layers import rms_norm, rope_table, rotate, swiglu


class Weight(NamedTuple):
    """Declaration of one weight."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]  # logical names, mapped to mesh axes in mesh.py
    init: str  # normal, zeros or ones
    name: str  # in the checkpoint; {} is the layer
    matrix: bool = False  # stored transposed in the checkpoint


def layer_weights(c: Qwen2Config) -> dict[str, Weight]:
    """The weights of one layer by our names."""
    d, f = c.hidden_size, c.intermediate_size
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim

    def matrix(rows, cols, axes, name):
        return Weight((rows, cols), axes, "normal", f"model.layers.{{}}.{name}.weight", True)

    def vector(size, axis, init, name):
        return Weight((size,), (axis,), init, f"model.layers.{{}}.{name}")

    return {
        "input_norm": vector(d, "embed", "ones", "input_layernorm.weight"),
        "q": matrix(d, q, ("embed", "heads"), "self_attn.q_proj"),
        "q_bias": vector(q, "heads", "zeros", "self_attn.q_proj.bias"),
        "k": matrix(d, kv, ("embed", "kv_heads"), "self_attn.k_proj"),
        "k_bias": vector(kv, "kv_heads", "zeros", "self_attn.k_proj.bias"),
        "v": matrix(d, kv, ("embed", "kv_heads"), "self_attn.v_proj"),
        "v_bias": vector(kv, "kv_heads", "zeros", "self_attn.v_proj.bias"),
        "o": matrix(q, d, ("heads", "embed"), "self_attn.o_proj"),
        "post_norm": vector(d, "embed", "ones", "post_attention_layernorm.weight"),
        "gate": matrix(d, f, ("embed", "mlp"), "mlp.gate_proj"),
        "up": matrix(d, f, ("embed", "mlp"), "mlp.up_proj"),
        "down": matrix(f, d, ("mlp", "embed"), "mlp.down_proj"),
    }


def top_weights(c: Qwen2Config) -> dict[str, Weight]:
    """The weights outside the layers; both tables are [vocab, hidden] here and in the checkpoint."""
    table = (c.vocab_size, c.hidden_size), ("vocab", "embed"), "normal"
    weights = {
        "embedding": Weight(*table, "model.embed_tokens.weight"),
        "final_norm": Weight((c.hidden_size,), ("embed",), "ones", "model.norm.weight"),
    }
    if not c.tie_word_embeddings:
        weights["lm_head"] = Weight(*table, "lm_head.weight")
    return weights


def _make(w: Weight, rngs: nnx.Rngs, dtype, lead=()):
    shape = (*lead, *w.shape)
    if w.init == "normal":
        return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, dtype))
    return nnx.Param((jnp.ones if w.init == "ones" else jnp.zeros)(shape, dtype))


KEPT = "kept"


def keep_products(primitive, *_, **params) -> bool:
    """What the backward pass need not compute again: the MLP's two wide products, nearly half of a layer's work, and
    what attention's fused kernel returns."""
    named = primitive.name == "name" and params["name"] == KEPT
    return named or "dot_product_attention_fwd" in primitive.name


def kept_bytes(c: Qwen2Config, itemsize: int) -> int:
    """Bytes of each token and layer that `keep_products` holds."""
    return (2 * c.intermediate_size + c.num_attention_heads * c.head_dim) * itemsize


class Layers(nnx.Module):
    """All layers' weights, each with a leading layer axis."""

    def __init__(self, config: Qwen2Config, rngs: nnx.Rngs, dtype):
        for name, w in layer_weights(config).items():
            setattr(self, name, _make(w, rngs, dtype, (config.num_hidden_layers,)))

    def stack(self) -> dict[str, jax.Array]:
        return {name: value[...] for name, value in vars(self).items() if isinstance(value, nnx.Param)}


def layer(c: Qwen2Config, x, w, rope, segments, mesh=None, lengths=None):
    """One transformer layer; x: [batch, time, hidden]; w: this layer's weights; mesh, lengths: see `attend`."""
    w = {name: value.astype(x.dtype) if value.ndim == 2 else value for name, value in w.items()}
    batch, time, _ = x.shape

    def heads(h, name):  # → [batch, time, heads, head_dim]
        projected = h @ w[name] + w[f"{name}_bias"].astype(h.dtype)
        return projected.reshape(batch, time, -1, c.head_dim)

    with jax.named_scope("attention"):
        h = rms_norm(x, w["input_norm"], c.rms_norm_eps)
        q, k = rotate(heads(h, "q"), rope), rotate(heads(h, "k"), rope)
        out = attend(q, k, heads(h, "v"), segments, mesh, lengths)
        x = x + out.reshape(batch, time, -1) @ w["o"]
    with jax.named_scope("mlp"):
        h = rms_norm(x, w["post_norm"], c.rms_norm_eps)
        gate, up = (checkpoint_name(h @ w[name], KEPT) for name in ("gate", "up"))
        return x + swiglu(gate, up) @ w["down"]


class Qwen2(nnx.Module):
    """A Qwen2.5 model; `dtype` is that of the arithmetic, `param_dtype` that of the stored weights."""

    def __init__(self, config: Qwen2Config, rngs: nnx.Rngs = None, dtype=jnp.float32, param_dtype=jnp.float32):
        rngs = rngs or nnx.Rngs(0)
        self.config, self.dtype = config, dtype
        for name, w in top_weights(config).items():
            setattr(self, name, _make(w, rngs, param_dtype))
        self.layers = Layers(config, rngs, param_dtype)

    def __call__(self, tokens, positions, segments, mesh=None, lengths=None, keep: bool = False):
        """Hidden states after the final norm.

        tokens, positions, segments: [batch, time] int32; segments 0 is padding. mesh, lengths: see
        `attend`. keep: for the backward pass, `kept_bytes` of each token and layer besides the residual stream; else
        all of a layer is computed again there. → [batch, time, hidden], `dtype`.
        """
        c = self.config
        x = self.embedding[...][tokens].astype(self.dtype)
        rope = rope_table(positions, c.head_dim, c.rope_theta)

        def body(x, w):
            return layer(c, x, w, rope, segments, mesh, lengths), None

        policy = keep_products if keep else None
        x, _ = jax.lax.scan(jax.checkpoint(body, prevent_cse=False, policy=policy), x, self.layers.stack())
        return rms_norm(x, self.final_norm[...], c.rms_norm_eps)

    def unembedding(self):
        """[vocab, hidden]: logits are hidden @ unembedding().T, accumulated in float32."""
        return (self.embedding if self.config.tie_word_embeddings else self.lm_head)[...]

    def logits(self, hidden):
        """float32 logits of hidden states; [..., hidden] → [..., vocab]."""
        table = self.unembedding().astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
