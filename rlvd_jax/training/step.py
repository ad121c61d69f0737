"""The train step: one jitted update over a mesh of devices, with gradient accumulation, for GRPO and SFT."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlvd_jax import chips, hosts
from rlvd_jax.config import OptimizerConfig
from rlvd_jax.errors import UserError
from rlvd_jax.qwen2 import Qwen2, Qwen2Config
from rlvd_jax.qwen2 import mesh as mesh_rules
from rlvd_jax.qwen2.attention import BATCH
from rlvd_jax.qwen2.model import HEADS, WIDE, kept_bytes, layer_weights, restack, unstack
from rlvd_jax.training.batches import EXAMPLES
from rlvd_jax.training.loss import LOGITS_AT_ONCE, Objective, loss_of_hidden, token_logprobs
from rlvd_jax.training.optimizer import learning_rate, make_optimizer

TPU_SHARE = 0.9  # of a TPU's memory that an update may be reckoned to take
TOKENS_AT_ONCE = 2**15  # of a micro-batch on each device, at most: 17,000 for 9,000 made an H200's updates 4% faster


@jax.tree_util.register_dataclass
@dataclass
class TrainState:
    """All that an update changes."""

    params: nnx.State  # float32 master weights
    optimizer: optax.OptState
    step: jax.Array  # int32 [], updates done


def discard(params: nnx.State) -> None:
    """Free the arrays, whoever still refers to them."""
    for x in jax.tree.leaves(params):
        x.delete()


def check_finite(metrics: Mapping[str, float], step: int) -> None:
    """UserError if an update was not a number: what comes after it is worth nothing."""
    if not np.isfinite([metrics["loss"], metrics["grad_norm"]]).all():
        raise UserError(
            f"training broke down at step {step}: loss {metrics['loss']:g}, gradient norm {metrics['grad_norm']:g}; "
            "lower optimizer.learning_rate or optimizer.clip_norm"
        )


def earns_unrolling(asked: bool | None, mesh: Mesh, updates: int, enough: int) -> bool:
    """Whether to compile each layer by itself: as asked, or else on GPUs, if there are `enough` updates to make."""
    return asked if asked is not None else mesh.devices.flat[0].platform == "gpu" and updates >= enough


def segment_lengths(segments: np.ndarray, least: int = 1) -> np.ndarray:
    """Tokens of each segment of each row, 0 where there is none: [..., T] → [..., most], a power of 4 that is at least
    `least`, another one, and enough for the row of the most segments, so that few shapes are compiled."""
    most = least
    while most < segments.max():
        most *= 4
    return np.stack([(segments == i).sum(axis=-1, dtype=np.int32) for i in range(1, most + 1)], axis=-1)


def layers_kept(
    c: Qwen2Config, itemsize: int, mesh: Mapping[str, int], tokens: float, several: bool, unrolled: bool, limit: float
) -> tuple[int | None, int]:
    """Of how many layers an update of at most `limit` bytes a device can keep the wide products (`model.keeping`), and
    of how many it has to borrow the matrices (`model.unstack`), which costs half the time that the memory they leave
    free saves.

    itemsize: of the dtype of the arithmetic. mesh: sizes of its axes. tokens: of a micro-batch on each device. several:
    whether gradients of micro-batches are added up. unrolled: the layers are; else it is all or none, and None if there
    is no room for what attention returns either.
    """
    split, layers = mesh["fsdp"] * mesh["tensor"], c.num_hidden_layers
    stream = c.hidden_size * itemsize
    if not unrolled:
        # Weights, moments, gradient and its sum in float32; the weights and their gradient in the dtype.
        state = c.parameters * (20 + 2 * itemsize) / split
        room = (limit - state - 4 * 4 * LOGITS_AT_ONCE) / (tokens * layers) - stream
        fits = [kept_bytes(c, itemsize, *names) / mesh["tensor"] < room for names in ((WIDE,), ())]
        return (layers, 0) if fits[0] else (0, 0) if fits[1] else (None, 0)
    # At its largest, when the last chunk of logits is there: weights and moments in float32, weights in the dtype, the
    # sums of the gradients, and the gradient of the unembedding; logits in float32 and their cotangent in the dtype;
    # the hidden states that these come from, in chunks, and their cotangents.
    state = c.parameters * (12 + itemsize + 4 * several) + 4 * c.vocab_size * c.hidden_size
    logits = (4 + itemsize) * LOGITS_AT_ONCE
    least = kept_bytes(c, itemsize, HEADS) / mesh["tensor"] + stream
    wide = tokens * 2 * c.intermediate_size * itemsize / mesh["tensor"]
    room = limit - state / split - logits - tokens * (layers * least + 3 * stream)
    copy = itemsize * sum(math.prod(w.shape) for w in layer_weights(c).values()) / split
    borrowed = int(np.clip(np.ceil((layers * wide - room) / copy), 0, layers))
    return int(np.clip((room + borrowed * copy) // wide, 0, layers)), borrowed


class Trainer:
    """The compiled functions of one training recipe; `get_trainer` finds the one made before, or makes one.

    config, dtype: the architecture, and the dtype of the arithmetic. objective: GRPO's, or None for supervised
    training. unroll: compile each layer by itself, except on TPUs. memory: bytes of a GPU that an update may use; None:
    what it has. Weights lie on the mesh as qwen2/mesh.py says; a batch's rows are split over the axes data and fsdp.
    """

    def __init__(
        self,
        config: Qwen2Config,
        dtype,
        mesh: Mesh,
        optimizer: OptimizerConfig,
        objective: Objective | None = None,
        temperature: float = 1.0,
        unroll: bool = False,
        memory: float | None = None,
    ):
        abstract = nnx.eval_shape(lambda: Qwen2(config, nnx.Rngs(0), dtype, jnp.float32))
        self.graphdef, params = nnx.split(abstract, nnx.Param)
        self.config, self.dtype = config, jnp.dtype(dtype)
        self.mesh, self.objective, self.temperature = mesh, objective, temperature
        self.unroll = unroll and mesh.devices.flat[0].platform != "tpu"
        self.memory = memory
        self.rate, self.optimizer = learning_rate(optimizer), make_optimizer(optimizer)
        self.batch_shards = mesh.shape["data"] * mesh.shape["fsdp"]
        self.whole = NamedSharding(mesh, PartitionSpec())
        self.split = NamedSharding(mesh, PartitionSpec(None, *BATCH))
        self.shardings = self._state_shardings(config, params)
        self.abstract_state = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            jax.eval_shape(self._init, params),
            self.shardings,
        )
        self._sequences: dict[tuple, int] = {}  # shape of a batch → the most segments of a row so far
        self._jit_init = jax.jit(self._init, donate_argnums=0, out_shardings=self.shardings)
        self.update = jax.jit(self._update, donate_argnums=0, out_shardings=(self.shardings, self.whole))
        self.logprobs = jax.jit(self._logprobs, out_shardings=self.split)

    def init(self, params: nnx.State) -> TrainState:
        """The state that training starts from. It takes the arrays of `params` over: don't use them again."""
        state = self._jit_init(jax.device_put(params, self.shardings.params))
        discard(params)
        return state

    def rows_at_once(self, row_tokens: int) -> int:
        """Rows of so many tokens in a micro-batch on each device: a power of two, as many as leave nothing to be
        computed again; 1 if there are none, and on CPUs."""
        rows, limit = 1, self._limit()
        all_kept = self.config.num_hidden_layers, 0
        while limit is not None and (tokens := 2 * rows * row_tokens) <= TOKENS_AT_ONCE:
            if self._layers_kept(tokens, True, limit) != all_kept:
                break
            rows *= 2
        return rows

    def place(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Put a packed batch on the mesh; every process passes the same batch."""

        def put(x):
            return jax.make_array_from_callback(x.shape, self.split if x.ndim else self.whole, lambda index: x[index])

        if self.mesh.devices.flat[0].platform == "gpu":
            # A batch of fewer sequences, as the last one of an epoch, runs the program of the ones before.
            shape = batch["segments"].shape
            lengths = segment_lengths(batch["segments"], self._sequences.get(shape, 1))
            self._sequences[shape] = min(EXAMPLES, lengths.shape[-1])  # more of them are slow
            batch = batch | {"lengths": lengths}
        with jax.transfer_guard("allow"):
            return {name: put(x) for name, x in batch.items()}

    # `update(state, batch) -> (state, metrics)`, donates the state; metrics: float32 scalars, means over the tokens of
    # the loss. `logprobs(params, batch) -> [micro, rows, T]` float32, of each token given those before it.

    def _init(self, params):
        params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        return TrainState(params, self.optimizer.init(params), jnp.int32(0))

    def _state_shardings(self, config, params):
        of_params = mesh_rules.state_shardings(config, self.mesh, params)
        state = jax.eval_shape(self.optimizer.init, params)
        of_optimizer = optax.tree_utils.tree_map_params(
            self.optimizer, lambda _, s: s, state, of_params, transform_non_params=lambda _: self.whole
        )
        return TrainState(of_params, of_optimizer, self.whole)

    def _in_dtype(self, params):
        """Matrices in the dtype of the arithmetic, once for all that is done with them; the tables stay as they are,
        since their gradients are sums of many parts."""
        return jax.tree.map(lambda x: x.astype(self.dtype) if x.ndim == 3 else x, params)

    def _keep(self, batch_shape) -> tuple[int | None, int]:
        """Of how many layers a device has room to keep the wide products for the backward pass, and of how many it
        borrows the matrices (`layers_kept`)."""
        platform, limit = self.mesh.devices.flat[0].platform, self._limit()
        if limit is None:
            return self.config.num_hidden_layers, 0
        tokens = math.prod(batch_shape[1:]) / self.batch_shards
        kept, borrowed = self._layers_kept(tokens, batch_shape[0] > 1, limit)
        # GPUs keep what attention returns with the wide products, or neither, where layers are in a loop.
        return None if platform == "gpu" and not self.unroll and not kept else kept, borrowed

    def _layers_kept(self, tokens: float, several: bool, limit: float) -> tuple[int | None, int]:
        return layers_kept(self.config, self.dtype.itemsize, self.mesh.shape, tokens, several, self.unroll, limit)

    def _limit(self) -> float | None:
        """Bytes of each device that an update may be reckoned to take; None on CPUs, which are not asked. On TPUs the
        chip's memory decides, not what is free of it, so that `--plan --target` compiles the same program."""
        device = self.mesh.devices.flat[0]
        if device.platform == "tpu":
            return TPU_SHARE * chips.tpu_memory(device.device_kind)
        if device.platform != "gpu" or self.memory is not None:
            return self.memory
        # All processes trace together, and must come to the same program.
        return 0.9 * hosts.from_first(lambda: jax.local_devices()[0].memory_stats()["bytes_limit"])

    def _hidden(self, params, micro, keep: int | None = None, lenders=None):
        """(hidden states, the table that they are multiplied with)."""
        model = nnx.merge(self.graphdef, params)
        rows = micro["tokens"], micro["positions"], micro["segments"]
        return model(*rows, self.mesh, micro.get("lengths"), keep, lenders), model.unembedding()

    def _loss(self, params, micro, keep: int | None, lenders):
        hidden, table = self._hidden(params, micro, keep, lenders)
        options = {"temperature": self.temperature, "mesh": self.mesh}
        return loss_of_hidden(hidden, table, micro, self.objective, **options)

    def _update(self, state: TrainState, batch):
        used, batch = batch["used"], {name: x for name, x in batch.items() if name != "used"}
        keep, borrowed = self._keep(batch["tokens"].shape)
        cast = unstack(state.params, self.dtype, borrowed) if self.unroll else self._in_dtype(state.params)
        weights = cast, state.params["layers"] if borrowed else None

        def gradient(weights, micro, of_all=lambda grads: grads):
            params, stacks = weights
            grads, sums = jax.grad(self._loss, has_aux=True)(params, micro, keep, (borrowed, stacks))
            return restack(of_all(grads)), sums

        def add_up(weights, batch, used, shardings=None):
            def accumulate(i, total):
                new = gradient(weights, jax.tree.map(lambda x: x[i], batch))
                grads, sums = jax.tree.map(jnp.add, total, new)
                most = {k: jnp.maximum(total[1][k], new[1][k]) for k in sums if k.endswith("_max")}
                if shardings is not None:
                    grads = jax.lax.with_sharding_constraint(grads, shardings)
                return grads, sums | most

            shapes = jax.eval_shape(gradient, weights, jax.tree.map(lambda x: x[0], batch))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
            return jax.lax.fori_loop(0, used, accumulate, zeros)

        one = batch["tokens"].shape[0] == 1  # micro-batch: no accumulator to hold

        def add_up_by_device(weights, batch, used):
            of_all = functools.partial(jax.lax.psum, axis_name="data")
            if one:  # layer by layer, while others' are still computed
                grads, sums = gradient(weights, jax.tree.map(lambda x: x[0], batch), of_all)
            else:
                grads, sums = add_up(weights, batch, used)
                grads = of_all(grads)
            most = {k: jax.lax.pmax(x, "data") for k, x in sums.items() if k.endswith("_max")}
            return grads, of_all(sums) | most

        if 1 < self.mesh.shape["data"] == self.mesh.size and (self.unroll or not one):
            # Weights are whole on each device, which can add its own gradients up: they are reduced once, and not for
            # every micro-batch, or a tied table's once for tokens and once for logits, as the compiler would have it.
            whole, rows = PartitionSpec(), PartitionSpec(None, "data")
            by_device = jax.shard_map(
                add_up_by_device, mesh=self.mesh, in_specs=(whole, rows, whole), out_specs=whole, check_vma=False
            )
            grads, sums = by_device(weights, batch, used)
        elif one:
            grads, sums = gradient(weights, jax.tree.map(lambda x: x[0], batch))
        else:
            grads, sums = add_up(weights, batch, used, self.shardings.params)
        grads = jax.tree.map(lambda x: x.astype(jnp.float32), grads)
        with jax.named_scope("optimizer"):
            changes, optimizer = self.optimizer.update(grads, state.optimizer, state.params)
            params = optax.apply_updates(state.params, changes)
        tokens = sums["tokens"]
        metrics = {k: v / jnp.maximum(tokens, 1) for k, v in sums.items()}
        metrics |= {k: v for k, v in sums.items() if k in ("loss", "tokens") or k.endswith("_max")}
        if "drawn" in sums:
            metrics["delta_logp"] = sums["delta_logp"] / jnp.maximum(sums["drawn"], 1)
        metrics |= {"grad_norm": optax.tree.norm(grads), "learning_rate": self.rate(state.step)}
        return TrainState(params, optimizer, state.step + 1), metrics

    def _logprobs(self, params, batch):
        def fill(i, out):
            micro = jax.tree.map(lambda x: x[i], batch)
            options = {"temperature": self.temperature, "mesh": self.mesh}
            logp, _ = token_logprobs(*self._hidden(params, micro), micro["tokens"], **options)
            return jax.lax.dynamic_update_index_in_dim(out, logp, i, 0)

        wanted = {"tokens", "positions", "segments", "lengths"}
        used, batch = batch["used"], {k: x for k, x in batch.items() if k in wanted}
        return jax.lax.fori_loop(0, used, fill, jnp.zeros(batch["tokens"].shape, jnp.float32))


get_trainer = functools.lru_cache(maxsize=4)(Trainer)
"""A `Trainer`: the same arguments give the same one, so that several models trained alike are compiled for once."""
