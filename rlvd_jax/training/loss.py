"""The loss of GRPO and its variants, and of SFT: one function of the tokens' log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

LOGITS_AT_ONCE = 2**28  # elements of the one block of logits that exists at a time on a device: 1 GiB in float32


@dataclass(frozen=True)
class Objective:
    """What the policy's update maximises; the fields are those of `GRPOConfig`."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio: Literal["token", "sequence"] = "token"
    kl: float = 0.0
    entropy: float = 0.0


def _scores(hidden, table, temperature: float):
    """hidden [..., D] times table [V, D], both in hidden's dtype, accumulated in float32 → [..., V] float32."""
    z = jnp.einsum("...d,vd->...v", hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return z / temperature


def _is_target(z, target):
    return jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1) == target[..., None]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _logprobs(hidden, table, target, temperature: float, of_entropy: bool):
    """(log-probability of `target`, entropy), both [chunks, rows, size], from hidden [chunks, rows, size, D] and table
    [V, D], with the logits of one chunk at a time.

    Its backward pass makes the logits again and turns them into their cotangent in one pass, with the normaliser
    that the forward pass kept. Left to itself JAX would keep or redo several such passes, would multiply float32
    cotangents with bfloat16 matrices, slowly, and would cast the table anew for each chunk and keep as arrays what is
    the same for all of them. A gradient flows through the entropy if `of_entropy`.
    """
    return _logprobs_forward(hidden, table, target, temperature, of_entropy)[0]


def _logprobs_forward(hidden, table, target, temperature, of_entropy):
    cast = table.astype(hidden.dtype)

    def chunk(x):
        h, target = x  # [rows, size, D], [rows, size]
        z = _scores(h, cast, temperature)
        most = z.max(axis=-1, keepdims=True)
        p = jnp.exp(z - most)
        total = p.sum(axis=-1)
        norm = most[..., 0] + jnp.log(total)
        # A masked sum, not a gather: a vocabulary that is split over devices then needs only a reduction.
        chosen = jnp.sum(jnp.where(_is_target(z, target), z, 0), axis=-1)
        entropy = jnp.log(total) - jnp.sum(p * (z - most), axis=-1) / total
        return chosen - norm, entropy, norm

    logp, entropy, norm = jax.lax.map(chunk, (hidden, target))
    return (logp, entropy), (hidden, table, target, norm, entropy)


def _logprobs_backward(temperature, of_entropy, kept, cotangents):
    hidden, table, target, norm, entropy = kept
    cast = table.astype(hidden.dtype)

    def chunk(to_table, x):
        h, target, norm, entropy, of_logp, of_its_entropy = x
        z = _scores(h, cast, temperature)
        to_z = (_is_target(z, target) - jnp.exp(z - norm[..., None])) * (of_logp / temperature)[..., None]
        if of_entropy:  # d entropy / d z = -p (log p + entropy)
            logp = z - norm[..., None]
            to_z -= jnp.exp(logp) * (logp + entropy[..., None]) * (of_its_entropy / temperature)[..., None]
        to_z = to_z.astype(h.dtype)
        to_hidden = jnp.einsum("...v,vd->...d", to_z, cast)
        # Summed over the chunks: in float32.
        return to_table + jnp.einsum("...v,...d->vd", to_z, h, preferred_element_type=jnp.float32), to_hidden

    zeros = jnp.zeros(table.shape, jnp.float32)
    to_table, to_hidden = jax.lax.scan(chunk, zeros, (hidden, target, norm, entropy, *cotangents))
    return to_hidden, to_table.astype(table.dtype), None


_logprobs.defvjp(_logprobs_forward, _logprobs_backward)


def token_logprobs(
    hidden,
    table,
    tokens,
    *,
    temperature: float = 1.0,
    shards: int = 1,
    logits: int = LOGITS_AT_ONCE,
    of_entropy: bool = False,
):
    """Log-probability of each token given those before it, at `temperature` over the full vocabulary.

    hidden: [rows, T, D]; table: [V, D]; tokens: [rows, T] int32; shards: devices that the rows are split over.
    → (logp, entropy), float32 [rows, T]: at index t of token t and of the distribution it was drawn from, in nats; 0 at
    index 0. A gradient flows through the entropy if `of_entropy`. Logits are made in chunks of at most `logits`
    elements a device and made again in the backward pass, so [rows, T, V] never exists.
    """
    rows, time = tokens.shape
    positions = time - 1  # the last hidden state predicts nothing here
    chunks = min(positions, max(1, -(-rows * positions * table.shape[0] // (shards * logits))))
    size = -(-positions // chunks)

    def split(x):  # [rows, positions, …] → [chunks, rows, size, …]
        x = jnp.pad(x, [(0, 0), (0, chunks * size - positions)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, chunks, size, *x.shape[2:]), 1, 0)

    with jax.named_scope("logprobs"):
        out = _logprobs(split(hidden[:, :-1]), table, split(tokens[:, 1:]), temperature, of_entropy)
        out = (jnp.moveaxis(x, 0, 1).reshape(rows, chunks * size)[:, :positions] for x in out)
        return tuple(jnp.pad(x, ((0, 0), (1, 0))) for x in out)


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
