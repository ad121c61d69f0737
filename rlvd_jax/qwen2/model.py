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

from rlvd_jax.qwen2 import gpu
from rlvd_jax.qwen2.attention import KEPT, attend, platform_of
from rlvd_jax.qwen2.config import Qwen2Config
from rlvd_jax.qwen2.layers import heads, rms_norm, rope_table, swiglu, wide


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


HEADS, WIDE = "heads", "wide"  # what a layer can keep: queries, keys and values; the MLP's two wide products


def keeping(*names):
    """What the backward pass need not compute again: the arrays of these names, and what attention's fused kernel
    returns."""

    def policy(primitive, *_, **params) -> bool:
        named = primitive.name == "name" and params["name"] in (KEPT, *names)
        return named or "dot_product_attention_fwd" in primitive.name

    return policy


def kept_bytes(c: Qwen2Config, itemsize: int, *names) -> int:
    """Bytes of each token and layer that `keeping(*names)` holds."""
    result = c.num_attention_heads * c.head_dim
    each = {HEADS: result + 2 * c.num_key_value_heads * c.head_dim, WIDE: 2 * c.intermediate_size}
    return (result + sum(each[name] for name in names)) * itemsize


class Layers(nnx.Module):
    """All layers' weights, each with a leading layer axis, or as `unstack` leaves them."""

    def __init__(self, config: Qwen2Config, rngs: nnx.Rngs, dtype):
        for name, w in layer_weights(config).items():
            setattr(self, name, _make(w, rngs, dtype, (config.num_hidden_layers,)))

    def stack(self) -> dict[str, jax.Array]:
        return {name: value.get_value() for name, value in vars(self).items() if isinstance(value, nnx.Param)}


def unstack(params: nnx.State, dtype, borrowed: int = 0) -> nnx.State:
    """`params` with a tuple of the layers' arrays in place of each stack, matrices in `dtype`. A model of them does
    without the loop over the layers.

    borrowed: so many of the first layers' matrices are nothing but places for their gradients; the model cuts and casts
    those from the stacks itself, whenever they are used, so that no copy of them lies in memory meanwhile.
    """

    def each(stack):
        # At places that the compiler does not know: it puts a cast before a cut otherwise, and writes both.
        at = jax.lax.optimization_barrier(jnp.arange(len(stack)))
        layers = tuple(jax.lax.dynamic_index_in_dim(stack, i, keepdims=False) for i in at)
        if stack.ndim == 2:
            return layers
        places = (jnp.zeros(x.shape, dtype) for x in layers[:borrowed])
        return *places, *(x.astype(dtype) for x in layers[borrowed:])

    params = jax.tree.map(lambda x: x, params)  # a copy, to be changed
    params["layers"] = jax.tree.map(each, params["layers"])
    return params


@jax.custom_vjp
def borrow(place, stack, at):
    """stack[at] in the dtype of `place`, which its gradient goes to."""
    return jax.lax.dynamic_index_in_dim(stack, at, keepdims=False).astype(place.dtype)


borrow.defvjp(lambda place, stack, at: (borrow(place, stack, at), None), lambda _, to: (to, None, None))


def restack(params: nnx.State) -> nnx.State:
    """The inverse of `unstack`, but for the dtypes."""

    def is_tuple(x):
        return isinstance(x, tuple)

    return jax.tree.map(lambda x: jnp.stack(x) if is_tuple(x) else x, params, is_leaf=is_tuple)


def layer(c: Qwen2Config, x, w, rope, segments, mesh=None, lengths=None):
    """One transformer layer; x: [batch, time, hidden]; w: this layer's weights; mesh, lengths: see `attend`."""
    w = {name: value.astype(x.dtype) if value.ndim == 2 else value for name, value in w.items()}
    batch, time, _ = x.shape
    eps, by_kernel = c.rms_norm_eps, _by_kernel(mesh)
    if by_kernel:
        # All rows in one axis, as XLA has them for products: otherwise it copies x before a product is added to it, not
        # seeing through the change of shape that x is still needed and the sum had better be written elsewhere.
        x, rope = x.reshape(batch * time, -1), tuple(t.reshape(batch * time, -1) for t in rope)
    with jax.named_scope("attention"):
        weights, biases = (tuple(w[name + kind] for name in "qkv") for kind in ("", "_bias"))
        block = x, w["input_norm"], weights, biases, rope, eps
        x, q, k, v = gpu.heads(*block, mesh) if by_kernel else (x, *heads(*block))
        q, k, v = (checkpoint_name(y.reshape(batch, time, -1, c.head_dim), HEADS) for y in (q, k, v))
        out = attend(q, k, v, segments, mesh, lengths)
        x = x + out.reshape(*x.shape[:-1], -1) @ w["o"]
    with jax.named_scope("mlp"):
        block = x, w["post_norm"], w["gate"], w["up"], eps
        x, gate, up = gpu.wide(*block, mesh) if by_kernel else (x, *wide(*block))
        gate, up = (checkpoint_name(x, WIDE) for x in (gate, up))
        return (x + swiglu(gate, up) @ w["down"]).reshape(batch, time, -1)


def _by_kernel(mesh) -> bool:
    """Whether `gpu` has what goes into a layer's blocks: on GPUs, unless heads and the MLP's columns are split."""
    return platform_of(mesh) == "gpu" and (mesh is None or mesh.shape["tensor"] == 1)


class Qwen2(nnx.Module):
    """A Qwen2.5 model; `dtype` is that of the arithmetic, `param_dtype` that of the stored weights."""

    def __init__(self, config: Qwen2Config, rngs: nnx.Rngs = None, dtype=jnp.float32, param_dtype=jnp.float32):
        rngs = rngs or nnx.Rngs(0)
        self.config, self.dtype = config, dtype
        for name, w in top_weights(config).items():
            setattr(self, name, _make(w, rngs, param_dtype))
        self.layers = Layers(config, rngs, param_dtype)

    def __call__(self, tokens, positions, segments, mesh=None, lengths=None, keep: int | None = None, lenders=None):
        """Hidden states after the final norm.

        tokens, positions, segments: [batch, time] int32; segments 0 is padding. mesh, lengths: see `attend`. keep: of
        how many layers the backward pass need not compute again the wide products, without `unstack` of all or none,
        beside what attention's kernel returns; None: nothing but what goes into each layer is kept, without `unstack`.
        lenders: (layers whose matrices `unstack` left to be borrowed, the stacks that they are in).
        → [batch, time, hidden], `dtype`.
        """
        c = self.config
        x = self.embedding[...][tokens].astype(self.dtype)
        rope = rope_table(positions, c.head_dim, c.rope_theta)

        def body(x, w):
            return layer(c, x, w, rope, segments, mesh, lengths), None

        weights = self.layers.stack()
        if isinstance(weights["q"], tuple):
            borrowed, stacks = lenders or (0, None)
            places = jax.lax.optimization_barrier(jnp.arange(c.num_hidden_layers))  # see `unstack`

            def borrower(x, w, at):
                def matrix(name, value):
                    return borrow(value, stacks[name][...], at) if value.ndim == 2 else value

                return body(x, {name: matrix(name, value) for name, value in w.items()})

            # Without a loop XLA would find what is computed twice and keep it, if prevent_cse were not left on.
            for i in range(c.num_hidden_layers):
                # The last layers keep more: their memory is the first to be free again.
                names = (HEADS, WIDE) if i >= c.num_hidden_layers - (keep or 0) else (HEADS,)
                w = {name: layers[i] for name, layers in weights.items()}
                each, at = (borrower, (places[i],)) if i < borrowed else (body, ())
                x, _ = jax.checkpoint(each, policy=keeping(*names))(x, w, *at)
        else:
            policy = None if keep is None else keeping(WIDE) if keep else keeping()
            x, _ = jax.lax.scan(jax.checkpoint(body, prevent_cse=False, policy=policy), x, weights)
        return rms_norm(x, self.final_norm[...], c.rms_norm_eps)

    def unembedding(self):
        """[vocab, hidden]: logits are hidden @ unembedding().T, accumulated in float32."""
        return (self.embedding if self.config.tie_word_embeddings else self.lm_head)[...]

    def logits(self, hidden):
        """float32 logits of hidden states; [..., hidden] → [..., vocab]."""
        table = self.unembedding().astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
