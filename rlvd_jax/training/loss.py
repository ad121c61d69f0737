"""The loss of GRPO and its variants, and of SFT: one function of the tokens' log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from rlvd_jax.qwen2.attention import BATCH, alone, platform_of
from rlvd_jax.training import gpu

ROWS, WHOLE = PartitionSpec(None, *BATCH), PartitionSpec()  # arrays [chunks, rows, ...], and the table

LOGITS_AT_ONCE = 2**28  # elements of the one block of logits that exists at a time on a device: 1 GiB in float32


@dataclass(frozen=True)
class Objective:
    """What the policy's update maximises; the fields are those of `GRPOConfig`."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio: Literal["token", "sequence"] = "token"
    kl: float = 0.0
    entropy: float = 0.0


def _scores(hidden, cast):
    """Logits before the temperature, float32 [..., V], of hidden [..., D] and cast [V, D], both in one dtype, summed in
    float32."""
    return jnp.einsum("...d,vd->...v", hidden, cast, preferred_element_type=jnp.float32)


def _read(hidden, cast, target, temperature: float, mesh: Mesh | None):
    """What one chunk of logits z says: (z [..., V], its normaliser, log-probability of `target`, entropy), float32.

    hidden, cast: as in `_scores`; target: [...].
    """
    scores = _scores(hidden, cast)
    norm, chosen, entropy = _statistics(scores, target, temperature, mesh)
    return scores / temperature, norm, chosen - norm, entropy


def _statistics(scores, target, temperature: float, mesh: Mesh | None):
    """(normaliser, the target's logit, entropy) of scores / temperature, [rows, size, V] → float32 [rows, size]: the
    one place where an implementation is chosen. No gradient is taken through it."""
    if platform_of(mesh) == "gpu" and (mesh is None or mesh.shape["tensor"] == 1):  # else a vocabulary may be split
        return _by_kernel(scores, target, temperature, mesh)
    return _plain(scores, target, temperature)


def _by_kernel(scores, target, temperature: float, mesh: Mesh | None, interpret=False):
    """`_statistics` in one pass, on each device of its own rows: the compiler cannot split a kernel by itself."""
    kernel = partial(gpu.softmax_statistics, temperature=temperature, interpret=interpret)
    if not alone(mesh):
        kernel = jax.shard_map(kernel, mesh=mesh, in_specs=(BATCH, BATCH), out_specs=BATCH, check_vma=False)
    return kernel(scores, target)


def _plain(scores, target, temperature: float):
    z = scores / temperature
    most = z.max(axis=-1, keepdims=True)
    p = jnp.exp(z - most)
    total = p.sum(axis=-1)
    # A masked sum, not a gather: a vocabulary that is split over devices then needs only a reduction.
    chosen = jnp.sum(jnp.where(_is_target(z, target), z, 0), axis=-1)
    entropy = jnp.log(total) - jnp.sum(p * (z - most), axis=-1) / total
    return most[..., 0] + jnp.log(total), chosen, entropy


def _is_target(z, target):
    return jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1) == target[..., None]


def _pull(z, norm, entropy, target, of_logp, of_entropy, hidden, cast, temperature: float):
    """Cotangents of hidden and, in float32, of the table, from those of log-probability and entropy; of_entropy: None
    where no gradient flows through the entropy. The logits become their own cotangent in one pass."""
    to_z = (_is_target(z, target) - jnp.exp(z - norm[..., None])) * (of_logp / temperature)[..., None]
    if of_entropy is not None:  # d entropy / d z = -p (log p + entropy)
        logp = z - norm[..., None]
        to_z -= jnp.exp(logp) * (logp + entropy[..., None]) * (of_entropy / temperature)[..., None]
    to_z = to_z.astype(hidden.dtype)
    to_hidden = jnp.einsum("...v,vd->...d", to_z, cast)
    return to_hidden, jnp.einsum("...v,...d->vd", to_z, hidden, preferred_element_type=jnp.float32)


def _by_device(mesh: Mesh | None) -> bool:
    """Whether several devices each go over the chunks of their own rows. Where the vocabulary is split, it is left to
    the compiler."""
    return _shards(mesh) > 1 and mesh.shape["tensor"] == 1


def _over_chunks(chunk, cast, arrays, mesh: Mesh | None):
    """(the sum of what `chunk(cast, arrays of a chunk)` returns first, float32 [V, D], all that it returns second).

    cast: the table; arrays: a tree of [chunks, rows, ...]. Each device sums over its own rows' chunks, and the devices'
    sums are added up once: the compiler would do it for each chunk, and bring the table together for each.
    """

    def run(cast, arrays):
        def add(total, x):
            more, out = chunk(cast, x)
            return total + more, out

        return jax.lax.scan(add, jnp.zeros(cast.shape, jnp.float32), arrays)

    if not _by_device(mesh):
        return run(cast, arrays)
    split = cast.shape[1] % mesh.shape["fsdp"] == 0  # as the table is, see qwen2/mesh.py

    def on_each(cast, arrays):
        total, out = run(cast, arrays)
        if split:
            total = jax.lax.psum_scatter(total, "fsdp", scatter_dimension=1, tiled=True)
        return jax.lax.psum(total, "data" if split else ("data", "fsdp")), out

    out_specs = PartitionSpec(None, "fsdp") if split else WHOLE, ROWS
    return jax.shard_map(on_each, mesh=mesh, in_specs=(WHOLE, ROWS), out_specs=out_specs, check_vma=False)(cast, arrays)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _logprobs(hidden, table, target, temperature: float, mesh: Mesh | None, of_entropy: bool):
    """(log-probability of `target`, entropy), both [chunks, rows, size], from hidden [chunks, rows, size, D] and table
    [V, D], with the logits of one chunk at a time.

    Its backward pass makes the logits again and turns them into their cotangent in one pass, with the normaliser
    that the forward pass kept. Left to itself JAX would keep or redo several such passes, would multiply float32
    cotangents with bfloat16 matrices, slowly, and would cast the table anew for each chunk and keep as arrays what is
    the same for all of them. A gradient flows through the entropy if `of_entropy`.
    """
    return _logprobs_forward(hidden, table, target, temperature, mesh, of_entropy)[0]


def _logprobs_forward(hidden, table, target, temperature, mesh, of_entropy):
    def run(cast, arrays):
        return jax.lax.map(lambda x: _read(x[0], cast, x[1], temperature, mesh)[1:], arrays)

    if _by_device(mesh):
        run = jax.shard_map(run, mesh=mesh, in_specs=(WHOLE, ROWS), out_specs=ROWS, check_vma=False)
    norm, logp, entropy = run(table.astype(hidden.dtype), (hidden, target))
    return (logp, entropy), (hidden, table, target, norm, entropy)


def _logprobs_backward(temperature, mesh, of_entropy, kept, cotangents):
    hidden, table, target, norm, entropy = kept

    def chunk(cast, x):
        h, target, norm, entropy, of_logp, of_its_entropy = x
        z = _scores(h, cast) / temperature
        of_its_entropy = of_its_entropy if of_entropy else None
        to_hidden, more = _pull(z, norm, entropy, target, of_logp, of_its_entropy, h, cast, temperature)
        return more, to_hidden

    cast = table.astype(hidden.dtype)
    to_table, to_hidden = _over_chunks(chunk, cast, (hidden, target, norm, entropy, *cotangents), mesh)
    return to_hidden, to_table.astype(table.dtype), None


_logprobs.defvjp(_logprobs_forward, _logprobs_backward)


def _split(x, chunks: int):
    """[rows, positions, …] → [chunks, rows, size, …], padded with zeros."""
    rows, positions = x.shape[:2]
    size = -(-positions // chunks)
    x = jnp.pad(x, [(0, 0), (0, chunks * size - positions)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(rows, chunks, size, *x.shape[2:]), 1, 0)


def _shards(mesh: Mesh | None) -> int:
    """Devices that rows are split over."""
    return 1 if alone(mesh) else mesh.shape["data"] * mesh.shape["fsdp"]


def _chunks(rows: int, positions: int, vocab: int, logits: int) -> int:
    return min(positions, max(1, -(-rows * positions * vocab // logits)))


def token_logprobs(
    hidden,
    table,
    tokens,
    *,
    temperature: float = 1.0,
    mesh: Mesh | None = None,
    logits: int = LOGITS_AT_ONCE,
    of_entropy: bool = False,
):
    """Log-probability of each token given those before it, at `temperature` over the full vocabulary.

    hidden: [rows, T, D]; table: [V, D]; tokens: [rows, T] int32; mesh: the devices that this is compiled for,
    over which rows are split as qwen2/mesh.py says; None: one device, JAX's default.
    → (logp, entropy), float32 [rows, T]: at index t of token t and of the distribution it was drawn from, in nats; 0 at
    index 0. A gradient flows through the entropy if `of_entropy`. Logits are made in chunks of at most `logits`
    elements a device and made again in the backward pass, so [rows, T, V] never exists.
    """
    rows, positions = tokens.shape[0], tokens.shape[1] - 1  # the last hidden state predicts nothing here
    chunks = _chunks(rows, positions, table.shape[0], _shards(mesh) * logits)
    with jax.named_scope("logprobs"):
        hidden, target = _split(hidden[:, :-1], chunks), _split(tokens[:, 1:], chunks)
        out = _logprobs(hidden, table, target, temperature, mesh, of_entropy)
        out = (jnp.moveaxis(x, 0, 1).reshape(rows, -1)[:, :positions] for x in out)
        return tuple(jnp.pad(x, ((0, 0), (1, 0))) for x in out)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _token_loss(hidden, table, batch, objective: Objective | None, temperature: float, mesh: Mesh | None):
    """`loss` of hidden [chunks, rows, size, D], table [V, D] and arrays [chunks, rows, size], one chunk at a time.

    Each token's share of it depends on that token alone, so its gradient is found in the forward pass, while the logits
    are there, and they need not be made again.
    """
    return loss(*_logprobs(hidden, table, batch["tokens"], temperature, mesh, False), batch, objective)


def _token_loss_forward(hidden, table, batch, objective, temperature, mesh):
    def chunk(cast, x):
        h, batch = x
        z, norm, logp, entropy = _read(h, cast, batch["tokens"], temperature, mesh)
        slopes = jax.grad(lambda *of: loss(*of, batch, objective)[0], argnums=(0, 1))(logp, entropy)
        of_entropy = slopes[1] if objective and objective.entropy else None
        to_hidden, more = _pull(z, norm, entropy, batch["tokens"], slopes[0], of_entropy, h, cast, temperature)
        return more, (logp, entropy, to_hidden)

    cast = table.astype(hidden.dtype)
    to_table, (logp, entropy, to_hidden) = _over_chunks(chunk, cast, (hidden, batch), mesh)
    return loss(logp, entropy, batch, objective), (to_hidden, to_table.astype(table.dtype))


def _token_loss_backward(objective, temperature, mesh, kept, cotangents):
    by = cotangents[0]  # the sums have no gradient
    return *((by * x).astype(x.dtype) for x in kept), None


_token_loss.defvjp(_token_loss_forward, _token_loss_backward)


def loss_of_hidden(
    hidden,
    table,
    batch,
    objective: Objective | None,
    *,
    temperature: float = 1.0,
    mesh: Mesh | None = None,
    logits: int = LOGITS_AT_ONCE,
):
    """`loss` from hidden states [rows, T, D] and the table [V, D]; mesh, logits: as in `token_logprobs`.

    Differentiable in both. The logits are made once, but for the ratio of whole sequences, whose gradient is known only
    when all of them have been seen.
    """
    options = {"temperature": temperature, "mesh": mesh, "logits": logits}
    if objective and objective.ratio == "sequence":
        of_entropy = bool(objective.entropy)
        return loss(*token_logprobs(hidden, table, batch["tokens"], of_entropy=of_entropy, **options), batch, objective)
    rows, time = batch["tokens"].shape
    chunks = _chunks(rows, time - 1, table.shape[0], _shards(mesh) * logits)
    with jax.named_scope("logprobs"):
        batch = {name: _split(x[:, 1:], chunks) for name, x in batch.items() if x.shape == (rows, time)}
        return _token_loss(_split(hidden[:, :-1], chunks), table, batch, objective, temperature, mesh)


def segment_mean(x, mask, segments):
    """Mean of x over the masked tokens of each token's segment; all [rows, T] → float32 [rows, T]."""

    def of_row(x, mask, segments):
        sums = jnp.zeros((len(x) + 1, 2)).at[segments].add(jnp.stack([jnp.where(mask, x, 0), mask], axis=-1))
        return (sums[:, 0] / jnp.maximum(sums[:, 1], 1))[segments]

    return jax.vmap(of_row)(x, mask, segments)


def loss(logp, entropy, batch, objective: Objective | None):
    """Sum over tokens of weight × term, and the sums behind the metrics.

    logp, entropy: [rows, T] of the model in training; batch: arrays [rows, T] (see batches.py) and, where there are
    several updates a batch or a KL term, `old` and `reference`, log-probabilities under the policy before the first
    update and under the start model. Without `old` the batch is on policy and old is logp itself, without gradient: the
    ratio is 1 and clipping does nothing.

    objective None, supervised: term = -logp. Otherwise (section 4; Shao et al., 2024)
        term = -min(ρ A, clip(ρ, 1 - clip_low, 1 + clip_high) A) + kl · (exp(d) - d - 1) - bonus · entropy,
    where ρ = exp(logp - old), or for ratio = sequence the exponential of its mean over the response (GSPO), and
    d = reference - logp. The mismatch between sampler and trainer, delta_logp, is measured where the batch has the
    sampler's `logp`, and of that on the tokens that `drawn` says the policy drew itself, if the batch has it.
    """
    mask = batch["weight"] > 0
    sums = {"tokens": jnp.sum(mask, dtype=jnp.float32), "entropy": jnp.sum(jnp.where(mask, entropy, 0))}
    if objective is None:
        term = -logp
    else:
        old = batch["old"] if "old" in batch else jax.lax.stop_gradient(logp)
        log_ratio = jnp.where(mask, logp - old, 0)  # outside the mask exp could overflow
        if objective.ratio == "sequence":
            log_ratio = segment_mean(log_ratio, mask, batch["segments"])
        ratio, a = jnp.exp(log_ratio), batch["advantage"]
        clipped = jnp.where(a > 0, ratio > 1 + objective.clip_high, ratio < 1 - objective.clip_low) & (a != 0)
        bound = jnp.where(a > 0, 1 + objective.clip_high, 1 - objective.clip_low)
        term = -a * jnp.where(clipped, bound, ratio)
        sums["clipped"] = jnp.sum(mask & clipped, dtype=jnp.float32)
        if objective.kl:
            d = jnp.where(mask, batch["reference"] - logp, 0)
            k3 = jnp.exp(d) - d - 1
            term += objective.kl * k3
            sums["kl"] = jnp.sum(k3)
        if objective.entropy:
            term -= objective.entropy * entropy
    if "logp" in batch:
        drawn = mask
        if "drawn" in batch:
            drawn &= batch["drawn"] > 0
            sums["drawn"] = jnp.sum(drawn, dtype=jnp.float32)
        delta = jnp.where(drawn, jnp.abs(logp - batch["logp"]), 0)
        sums |= {"delta_logp": jnp.sum(delta), "delta_logp_max": jnp.max(delta)}
    sums["loss"] = jnp.sum(jnp.where(mask, batch["weight"] * term, 0))
    return sums["loss"], jax.lax.stop_gradient(sums)
