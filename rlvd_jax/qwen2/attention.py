"""Causal attention for training and prefill: the one place where an implementation is chosen.

On NVIDIA GPUs cuDNN's fused kernel takes bfloat16 heads whose size it knows; everything else, CPUs and
TPUs included, takes the plain form, whose scores are held whole ([batch, heads, time, time], float32).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attend(q, k, v, segments):
    """Causal grouped-query attention inside segments.

    q: [batch, time, heads, head_dim]; k, v: [batch, time, kv_heads, head_dim]; segments: [batch, time] int32,
    where 0 is padding and attends to nothing that matters. Returns [batch, time, heads, head_dim].
    """
    if jax.default_backend() == "gpu" and q.dtype == jnp.bfloat16 and q.shape[-1] in (64, 128):
        return jax.nn.dot_product_attention(q, k, v, mask=_mask(segments)[:, None], implementation="cudnn")
    return plain(q, k, v, _mask(segments))


def _mask(segments):
    """[batch, query, key]: the key is no later than the query and in its segment."""
    time = segments.shape[1]
    causal = jnp.tril(jnp.ones((time, time), bool))
    return causal & (segments[:, :, None] == segments[:, None, :])


def plain(q, k, v, mask):
    """Attention with scores and softmax in float32; mask: [batch, query, key] bool, no row all False."""
    batch, time, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(batch, time, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32) * head_dim**-0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e30), axis=-1)
    out = jnp.einsum("bkgts,bskd->btkgd", weights.astype(v.dtype), v)
    return out.reshape(batch, time, heads, head_dim)
