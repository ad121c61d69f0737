"""Causal attention for training and prefill: the one place where an implementation is chosen.

On NVIDIA GPUs cuDNN's fused kernel takes bfloat16 heads whose size it knows; on TPUs JAX's splash attention kernel
takes rows of a block and more; everything else, CPUs included, takes the plain form, whose scores are held whole
([batch, heads, time, time], float32).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

BATCH = PartitionSpec(("data", "fsdp"))  # how rows are split over the mesh, see mesh.py


def attend(q, k, v, segments, mesh: Mesh | None = None, lengths=None):
    """Causal grouped-query attention inside segments.

    q: [batch, time, heads, head_dim]; k, v: [batch, time, kv_heads, head_dim]; segments: [batch, time] int32,
    where 0 is padding and attends to nothing that matters. mesh: the devices that this is compiled for, over which
    rows and heads are split as mesh.py says; None: JAX's default backend. lengths: [batch, most segments of a row]
    int32, tokens of each segment, 0 where there is none, which only `cudnn` reads; None: each row is one segment.
    Returns [batch, time, heads, head_dim].
    """
    platform = platform_of(mesh)
    if platform == "gpu" and q.dtype == jnp.bfloat16 and q.shape[-1] in (64, 128):
        if lengths is None:
            lengths = jnp.sum(segments > 0, axis=1, dtype=jnp.int32)[:, None]
        return cudnn(q, k, v, lengths) if alone(mesh) else on_each_device(cudnn, q, k, v, lengths, mesh)
    if platform == "tpu" and mesh is not None and q.shape[1] >= LANES:
        return splash(q, k, v, segments) if alone(mesh) else on_each_device(splash, q, k, v, segments, mesh)
    return plain(q, k, v, _mask(segments))


def platform_of(mesh: Mesh | None) -> str:
    """Of the devices that a program is compiled for: the mesh's, which need not be here (targets.py), or without one
    JAX's default backend."""
    return mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()


def alone(mesh: Mesh | None) -> bool:
    """Whether arrays are one device's own: there is no mesh, or a `jax.shard_map` over all of it is around the caller
    (training/step.py)."""
    return mesh is None or bool(jax.sharding.get_abstract_mesh().manual_axes)


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


# ---- GPUs ----------------------------------------------------------------------------------------------


def cudnn(q, k, v, lengths):
    """`attend` by cuDNN's fused kernel, forward and backward, on one device: each segment is a sequence of its own, so
    that nothing is computed between segments, and no mask exists.

    lengths: [batch, most segments of a row]; segments lie end to end from the left. The kernel's time and memory grow
    with `most`, used or not.
    """
    # Behind `jax.nn.dot_product_attention`, which takes one sequence a row; it has no public name.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    scale = q.shape[-1] ** -0.5
    if lengths.shape[1] == 1:  # padding comes last: no token that matters sees it, and what it gets is finite
        return dot_product_attention(q, k, v, scale=scale, mask_type=MaskType.CAUSAL)
    # The kernel leaves padding as it finds it, gradients too, and nothing times what lies there need not be nothing.
    there = (jnp.arange(q.shape[1]) < lengths.sum(axis=1)[:, None])[:, :, None, None]
    q, k, v = (jnp.where(there, x, 0) for x in (q, k, v))
    used = lengths > 0
    offsets = jnp.where(used, jnp.cumsum(lengths, axis=1) - lengths, -1)
    offsets = jnp.pad(offsets, ((0, 0), (0, 1)), constant_values=-1)
    lengths = jnp.where(used, lengths, -1)
    sequences = {"q_seqlen": lengths, "kv_seqlen": lengths, "q_offsets": offsets, "kv_offsets": offsets}
    out = dot_product_attention(q, k, v, scale=scale, mask_type=MaskType.PADDING_CAUSAL, **sequences)
    return jnp.where(there, out, 0)


# ---- TPUs ----------------------------------------------------------------------------------------------

KEPT = "attention"  # what the kernel's backward pass needs of its forward pass, for `model.keeping`
LANES = 128  # a TPU's vector registers are so wide; the kernel's blocks are multiples of it


def on_each_device(kernel, q, k, v, segments, mesh: Mesh):
    """kernel(q, k, v, segments) on each device's own rows and heads: the compiler cannot split a kernel by itself.

    Heads that `tensor` does not divide stay whole on each device; key-value heads are repeated where there are too
    few to split.
    """
    tensor = mesh.shape["tensor"]
    heads, kv_heads = q.shape[2], k.shape[2]
    split = heads % tensor == 0
    if split and kv_heads % tensor:
        k, v = (jnp.repeat(x, math.lcm(kv_heads, tensor) // kv_heads, axis=2) for x in (k, v))
    each = PartitionSpec(*BATCH, None, "tensor" if split else None)
    return jax.shard_map(kernel, mesh=mesh, in_specs=(each, each, each, BATCH), out_specs=each, check_vma=False)(
        q, k, v, segments
    )


def splash_block(time: int) -> int:
    """Tokens of the kernel's blocks: large ones are fast, but padding the row to a multiple may add an eighth only."""
    return next((block for block in (4 * LANES, 3 * LANES, 2 * LANES) if -time % block <= time // 8), LANES)


def splash(q, k, v, segments, interpret: bool = False):
    """`attend` by JAX's splash attention kernel, forward and backward, on one device; memory is linear in time.

    interpret: run the kernel's steps one by one on any device, for tests.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    time, heads, head_dim = q.shape[1:]
    block = splash_block(time)
    padded = time + -time % block

    def lay_out(x):  # [batch, time, heads, head_dim] → [batch, heads, padded, head_dim]
        return jnp.pad(x, ((0, 0), (0, padded - time), (0, 0), (0, 0))).swapaxes(1, 2)

    sizes = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    kernel = library.make_splash_mha_single_device(
        library.MultiHeadMask([library.CausalMask((padded, padded))] * heads),
        block_sizes=library.BlockSizes(**dict.fromkeys(sizes, block)),
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )
    segments = jnp.pad(segments, ((0, 0), (0, padded - time)))
    q = (q.astype(jnp.float32) * head_dim**-0.5).astype(q.dtype)
    out = jax.vmap(kernel)(lay_out(q), lay_out(k), lay_out(v), library.SegmentIds(segments, segments))
    return out.swapaxes(1, 2)[:, :time]
