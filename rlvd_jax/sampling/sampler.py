"""Many responses to many prompts, with slots that are refilled from a queue as responses end.

Each device holds `slots` responses in flight. A prompt is prefilled once on a device and its keys and values are
copied into the slot of each of its samples. Then the device decodes by itself, in one `while_loop`, until enough
responses have ended to be worth refilling; the host only fetches those and hands out new slots.

Every draw's key is a function of (seed, question, sample, position) alone, so the responses don't depend on the
number of slots or devices, the order of the queue, or a restart (up to the rounding of matrix products of other
shapes, which moves log-probabilities by up to 1e-5 in float32 and can tip a near-tie between two tokens in bfloat16).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlvd_jax.config import SamplingConfig
from rlvd_jax.errors import UserError
from rlvd_jax.qwen2.config import Qwen2Config
from rlvd_jax.sampling import cache as kv
from rlvd_jax.sampling import decoder
from rlvd_jax.sampling.filters import draw

PREFILL = 8  # prompts that a device prefills at once
MAX_SLOTS = 1024
TAIL = 256  # tokens that the last responses must still be able to take before moving them to fewer slots pays


@dataclasses.dataclass(frozen=True)
class Request:
    """Samples wanted of one prompt."""

    prompt: tuple[int, ...]
    question: int
    """What keys the question's draws: a uint32 (`prompts.question_key`)."""
    samples: tuple[int, ...]
    """Which sample numbers to draw."""
    limits: tuple[int, ...] | None = None
    """The most tokens of each sample, at least 1, where not `max_tokens`."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """One response."""

    request: int
    """Position of its request in the list given."""
    sample: int
    tokens: np.ndarray
    """int32 [length], with the end token if there is one."""
    logprobs: np.ndarray
    """float32 [length]: of each token, under the unfiltered distribution at the sampling temperature."""
    stop: Literal["end", "length"]


class Filter(NamedTuple):
    temperature: float
    top_k: int
    top_p: float


class Slots(NamedTuple):
    """What is in flight; on a mesh the leading axis is split over the devices."""

    cache: list  # of each layer: keys, values (cache.py)
    token: jax.Array  # [slots] the newest token, not in the cache yet
    position: jax.Array  # [slots] its position
    produced: jax.Array  # [slots] tokens drawn so far
    limit: jax.Array  # [slots] the most to draw
    done: jax.Array  # [slots] ended or never used
    key: jax.Array  # [slots, 2] of this response
    tokens: jax.Array  # [slots, max_tokens]
    logprobs: jax.Array  # [slots, max_tokens]


@cache
def _decode_weights(c: Qwen2Config, dtype, sharding: NamedSharding):
    return jax.jit(partial(decoder.decode_weights, c=c, dtype=dtype), out_shardings=sharding)


@partial(jax.jit, static_argnums=range(7))
def _empty(mesh, c: Qwen2Config, layout: kv.Layout, slots: int, length: int, most: int, dtype) -> Slots:
    """Unused slots: `slots` of `length` positions on each device, for at most `most` tokens each."""
    n = slots * mesh.size

    def zeros(*shape, dtype=jnp.int32):
        return jnp.zeros(shape, dtype)

    empty = Slots(
        cache=kv.empty(c, layout, n, length, dtype),
        token=zeros(n),
        position=zeros(n),
        produced=zeros(n),
        limit=zeros(n),
        done=jnp.ones((n,), bool),
        key=zeros(n, 2, dtype=jnp.uint32),
        tokens=zeros(n, most),
        logprobs=zeros(n, most, dtype=jnp.float32),
    )
    return jax.lax.with_sharding_constraint(empty, NamedSharding(mesh, P("data")))


def _fold(key, data):
    """fold_in for rows of raw threefry keys [rows, 2] and numbers [rows]."""

    def one(key, data):
        return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), data))

    return jax.vmap(one)(key, data)


def _emit(slots: Slots, rows, token, logprob, index, ends: jax.Array) -> tuple:
    """Write drawn tokens at `index` of the rows' outputs (out of range: nowhere); → outputs, whether a row ended."""
    tokens = slots.tokens.at[rows, index].set(token, mode="drop")
    logprobs = slots.logprobs.at[rows, index].set(logprob, mode="drop")
    ended = (token[:, None] == ends).any(axis=1) if ends.size else jnp.zeros(token.shape, bool)
    return tokens, logprobs, ended


@partial(jax.jit, static_argnames=("mesh", "c"))
def _prefill(mesh, c: Qwen2Config, weights, tokens, lengths):
    run = partial(decoder.prefill, c)
    return jax.shard_map(run, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P("data"), check_vma=False)(
        weights, tokens, lengths
    )


@partial(jax.jit, static_argnames=("mesh", "layout", "f"), donate_argnames=("slots",))
def _insert(mesh, layout: kv.Layout, f: Filter, weights, slots: Slots, prompts, ends, seed, where):
    """Start responses. where: per device arrays [inserts]: slot (out of range: none), prompt (row of `prompts`),
    length (of the prompt), question, sample, limit."""

    def run(weights, slots: Slots, prompts, ends, seed, where):
        cache, hidden = prompts
        slot, prompt = where["slot"], where["prompt"]
        filled = [
            kv.insert(layer, prompt_layer, layout, slot, prompt)
            for layer, prompt_layer in zip(slots.cache, cache, strict=True)
        ]
        key = _fold(jnp.broadcast_to(seed, (slot.size, 2)), where["question"])
        key = _fold(key, where["sample"])
        first = jnp.zeros_like(slot)
        token, logprob = draw(decoder.logits(weights, hidden)[prompt], _fold(key, first), *f)
        tokens, logprobs, ended = _emit(slots, slot, token, logprob, first, ends)

        def put(old, new):
            return old.at[slot].set(new, mode="drop")

        return Slots(
            cache=filled,
            token=put(slots.token, token),
            position=put(slots.position, where["length"]),
            produced=put(slots.produced, 1),
            limit=put(slots.limit, where["limit"]),
            done=put(slots.done, ended | (where["limit"] <= 1)),
            key=put(slots.key, key),
            tokens=tokens,
            logprobs=logprobs,
        )

    specs = (P(), P("data"), P("data"), P(), P(), P("data"))
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=False)(
        weights, slots, prompts, ends, seed, where
    )


@partial(jax.jit, static_argnames=("mesh", "c", "layout", "f", "span"), donate_argnames=("slots",))
def _decode(mesh, c: Qwen2Config, layout: kv.Layout, f: Filter, span: int, weights, slots: Slots, ends, wake, steps):
    """Decode on each device until `wake` [devices] of its slots are done, at most `steps` tokens."""

    def run(weights, slots: Slots, ends, wake, steps):
        rows = jnp.arange(slots.token.shape[0])

        def going(carry):
            taken, slots = carry
            return (taken < steps) & (slots.done.sum() < wake[0])

        def body(carry):
            taken, s = carry
            cache, hidden = decoder.step(c, layout, weights, s.cache, s.token, s.position, span)
            with jax.named_scope("draw"):
                token, logprob = draw(decoder.logits(weights, hidden), _fold(s.key, s.produced), *f)
            live = ~s.done
            # A slot that is done keeps drawing, since all slots step together; what it draws goes nowhere.
            index = jnp.where(live, s.produced, s.tokens.shape[1])
            tokens, logprobs, ended = _emit(s, rows, token, logprob, index, ends)
            produced = s.produced + live
            return taken + 1, Slots(
                cache=cache,
                token=jnp.where(live, token, s.token),
                position=s.position + live,
                produced=produced,
                limit=s.limit,
                done=s.done | ended | (produced >= s.limit),
                key=s.key,
                tokens=tokens,
                logprobs=logprobs,
            )

        return jax.lax.while_loop(going, body, (jnp.int32(0), slots))[1]

    specs = (P(), P("data"), P(), P("data"), P())
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=False)(
        weights, slots, ends, wake, steps
    )


@partial(jax.jit, static_argnums=0)
def _take(mesh, x, rows):
    """Rows of each device's part of x."""
    return jax.shard_map(lambda x, rows: x[rows], mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P("data"))(
        x, rows
    )


@partial(jax.jit, static_argnames=("mesh", "width"))
def _harvest(mesh, width: int, tokens, logprobs, rows):
    def run(tokens, logprobs, rows):
        return tokens[rows, :width], logprobs[rows, :width]

    specs = (P("data"), P("data"), P("data"))
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=False)(tokens, logprobs, rows)


def bucket(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least n and `least`: bounds how many shapes are compiled."""
    return max(least, 1 << (n - 1).bit_length())


class Sampler:
    """Draws responses from one model with one set of sampling settings.

    `load(params)` takes the weights of a model (an `nnx.State`), also new ones later; `sample(requests, seed)`
    yields completions as they end, in no particular order. `end_tokens` stop a response; `slots` (per device)
    comes from the settings or from the devices' memory.
    """

    def __init__(
        self,
        config: Qwen2Config,
        settings: SamplingConfig,
        end_tokens: Sequence[int],
        *,
        devices=None,
        dtype=jnp.float32,
    ):
        self.config, self.settings, self.dtype = config, settings, jnp.dtype(dtype)
        self.devices = list(devices or jax.local_devices())
        self.mesh = Mesh(np.array(self.devices), ("data",), axis_types=(AxisType.Auto,))
        self._split, self._whole = NamedSharding(self.mesh, P("data")), NamedSharding(self.mesh, P())
        self._filter = Filter(settings.temperature, settings.top_k, settings.top_p)
        self._end_tokens = np.array(sorted(end_tokens), np.int32)
        self.layout = kv.choose_layout(config, self.dtype, self.devices[0].platform)
        self.weights = None

    def load(self, params) -> None:
        """Take weights: cast to the sampler's dtype, laid out for decoding, whole on each device."""
        if jax.tree.leaves(params)[0].sharding.device_set != set(self.devices):
            params = jax.device_put(params, self._whole)
        self.weights = _decode_weights(self.config, self.dtype, self._whole)(params)

    def plan(self, length: int, responses: int) -> int:
        """Slots on each device for caches of `length` positions and `responses` in all."""
        wanted = self.settings.slots or MAX_SLOTS
        wanted = min(wanted, -(-responses // len(self.devices)))
        wanted = min(-(-wanted // 16) * 16, self.settings.slots or MAX_SLOTS)
        stats = self.devices[0].memory_stats() or {}
        if "bytes_limit" in stats:
            free = 0.92 * stats["bytes_limit"] - stats["bytes_in_use"]
            # Logits, their scaled copy and the filters' work, in float32.
            each = length * self.config.cache_bytes(self.dtype.itemsize) + 6 * 4 * self.config.vocab_size
            held = int(free // each)
            if held < 1:
                raise UserError(
                    f"sampling.max_tokens: one response of {length} positions needs {each / 2**30:.1f} GiB, "
                    f"but only {free / 2**30:.1f} GiB of device memory are free; lower max_tokens"
                )
            if held < wanted:
                wanted = held if held < 16 else held // 16 * 16
        return wanted

    def sample(self, requests: Sequence[Request], seed: int) -> Iterator[Completion]:
        """Yield a completion for each sample of each request; `seed` is any integer of up to 64 bits."""
        if self.weights is None:
            raise ValueError("load(params) comes before sample(requests, seed)")
        total = sum(len(r.samples) for r in requests)
        if not total:
            return
        longest = max(len(r.prompt) for r in requests)
        for i, r in enumerate(requests):
            if not r.prompt or len(r.prompt) >= self.config.max_position_embeddings:
                raise UserError(
                    f"prompt {i} has {len(r.prompt)} tokens; the model's context takes 1 to "
                    f"{self.config.max_position_embeddings - 1}"
                )
        most = self.settings.max_tokens
        length = -(-(bucket(longest) + most) // 64) * 64 if most > 64 else bucket(longest) + most
        slots = self.plan(length, total)
        yield from _Run(self, requests, seed, slots, length).completions()


class _Run:
    """One call of `Sampler.sample`: the queue, who is in which slot, and the slots themselves."""

    def __init__(self, sampler: Sampler, requests: Sequence[Request], seed: int, slots: int, length: int):
        self.s, self.requests, self.length, self.per_device = sampler, requests, length, slots
        self.devices = len(sampler.devices)
        self.seed = self._put(np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32), sampler._whole)
        self.ends = self._put(sampler._end_tokens, sampler._whole)
        self.queue = collections.deque(self._pieces())
        # Of each device: the piece it is working through, and the prompts it has prefilled last.
        self.pending = [collections.deque() for _ in range(self.devices)]
        self.prompts = None
        self.row_of: list[dict[int, int]] = [{} for _ in range(self.devices)]
        self.occupant = np.full((self.devices, slots, 2), -1, np.int64)  # request, sample index
        settings = (sampler.settings.max_tokens, sampler.dtype)
        self.state = _empty(sampler.mesh, sampler.config, sampler.layout, slots, length, *settings)

    def _pieces(self):
        """(request, range of its samples) small enough to spread over the devices."""
        total = sum(len(r.samples) for r in self.requests)
        size = max(1, -(-total // (4 * self.devices))) if self.devices > 1 else total
        for i, r in enumerate(self.requests):
            for start in range(0, len(r.samples), size):
                yield i, range(start, min(start + size, len(r.samples)))

    @staticmethod
    def _put(x, sharding):
        return jax.device_put(x, sharding)

    def completions(self) -> Iterator[Completion]:
        while True:
            self._refill()
            occupied = self.occupant[:, :, 0] >= 0
            if not occupied.any():
                return
            occupied = self._shrink(occupied)
            produced = self._decode(occupied)
            yield from self._harvest(occupied, produced)

    # ---- start responses -----------------------------------------------------------------------

    def _refill(self) -> None:
        while True:
            free = [list(np.flatnonzero(self.occupant[d, :, 0] < 0)) for d in range(self.devices)]
            inserts = [self._known(d, free[d]) for d in range(self.devices)]
            if any(inserts):
                self._insert(inserts)
            if not self._prefill_next([f[len(i) :] for f, i in zip(free, inserts, strict=True)]):
                return

    def _known(self, d: int, free: list[int]) -> list[tuple[int, int, int]]:
        """(slot, request, sample index) for free slots and waiting samples whose prompt is prefilled."""
        out = []
        while len(out) < len(free) and self.pending[d] and self.pending[d][0][0] in self.row_of[d]:
            request, samples = self.pending[d].popleft()
            take = min(len(samples), len(free) - len(out))
            out += [(free[len(out) + j], request, samples[j]) for j in range(take)]
            if take < len(samples):
                self.pending[d].appendleft((request, samples[take:]))
        return out

    def _prefill_next(self, free: list[list[int]]) -> bool:
        """Prefill the prompts of the next samples for devices with free slots; False if there are none."""
        batches = []
        for d in range(self.devices):
            room, batch = len(free[d]), []
            waiting = sum(len(s) for _, s in self.pending[d])
            while self.queue and waiting < room and len(self.pending[d]) < PREFILL:
                self.pending[d].append(self.queue.popleft())
                waiting += len(self.pending[d][-1][1])
            if room:
                batch = list(dict.fromkeys(request for request, _ in self.pending[d]))[:PREFILL]
            batches.append(batch)
        if not any(batches):
            return False
        # A device with nothing to prefill keeps what it knows of no prompt: its rows are overwritten.
        time = bucket(max(len(self.requests[r].prompt) for batch in batches for r in batch))
        tokens = np.zeros((self.devices, PREFILL, time), np.int32)
        lengths = np.ones((self.devices, PREFILL), np.int32)
        for d, batch in enumerate(batches):
            self.row_of[d] = {request: row for row, request in enumerate(batch)}
            for row, request in enumerate(batch):
                prompt = self.requests[request].prompt
                tokens[d, row, : len(prompt)] = prompt
                lengths[d, row] = len(prompt)
        split = self.s._split
        self.prompts = None  # the last prompts' keys and values are freed first
        self.prompts = _prefill(
            self.s.mesh,
            self.s.config,
            self.s.weights,
            self._put(tokens.reshape(-1, time), split),
            self._put(lengths.reshape(-1), split),
        )
        return True

    def _insert(self, inserts: list[list[tuple[int, int, int]]]) -> None:
        width = bucket(max(len(i) for i in inserts))
        where = {
            name: np.zeros((self.devices, width), kind)
            for name, kind in (
                ("slot", np.int32),
                ("prompt", np.int32),
                ("length", np.int32),
                ("limit", np.int32),
                ("question", np.uint32),
                ("sample", np.uint32),
            )
        }
        where["slot"][:] = self.per_device  # out of range: nothing is inserted
        most, context = self.s.settings.max_tokens, self.s.config.max_position_embeddings
        for d, rows in enumerate(inserts):
            for j, (slot, request, index) in enumerate(rows):
                r = self.requests[request]
                self.occupant[d, slot] = request, index
                where["slot"][d, j], where["prompt"][d, j] = slot, self.row_of[d][request]
                where["length"][d, j] = len(r.prompt)
                wanted = r.limits[index] if r.limits else most
                where["limit"][d, j] = min(wanted, most, context - len(r.prompt))
                where["question"][d, j], where["sample"][d, j] = r.question, r.samples[index]
        where = {name: self._put(value.reshape(-1), self.s._split) for name, value in where.items()}
        self.state = _insert(
            self.s.mesh,
            self.s.layout,
            self.s._filter,
            self.s.weights,
            self.state,
            self.prompts,
            self.ends,
            self.seed,
            where,
        )

    # ---- the last responses ----------------------------------------------------------------------

    def _shrink(self, occupied: np.ndarray) -> np.ndarray:
        """Go on with a quarter of the slots or fewer once nothing waits and that is enough: a step costs what its slots
        cost, idle or not, and the longest responses go on alone for long. → `occupied` of the slots that are left."""
        live = occupied.sum(axis=1)
        slots = bucket(int(live.max()))
        if self.queue or any(self.pending) or 4 * slots > self.per_device:
            return occupied
        limit, produced = (np.asarray(x).reshape(occupied.shape) for x in (self.state.limit, self.state.produced))
        if (limit - produced)[occupied].max() < TAIL:
            return occupied
        rows, idle = np.zeros((self.devices, slots), np.int32), np.ones((self.devices, slots), bool)
        occupant = np.full((self.devices, slots, 2), -1, np.int64)
        for d, n in enumerate(live):
            rows[d, :n], idle[d, :n] = np.flatnonzero(occupied[d]), False
            occupant[d, :n] = self.occupant[d, rows[d, :n]]
        rows, idle = (self._put(x.reshape(-1), self.s._split) for x in (rows, idle))
        take = partial(_take, self.s.mesh, rows=rows)
        layers = self.state.cache
        for i, layer in enumerate(layers):  # one by one, each old one freed before the next is moved
            layers[i] = tuple(take(x) for x in layer)
            del layer
        rest = {name: take(x) for name, x in self.state._asdict().items() if name != "cache"}
        self.state = Slots(cache=layers, **rest | {"done": rest["done"] | idle})
        self.occupant, self.per_device = occupant, slots
        return occupant[:, :, 0] >= 0

    # ---- decode and collect --------------------------------------------------------------------

    def _decode(self, occupied: np.ndarray) -> np.ndarray:
        """Run the devices; → tokens produced in each slot, negative where the response has not ended."""
        waiting = bool(self.queue) or any(self.pending)
        free = (~occupied).sum(axis=1)
        wake = free + max(1, self.per_device // 32) if waiting else np.full(self.devices, self.per_device)
        wake = np.minimum(wake, self.per_device).astype(np.int32)
        span, steps = self._span(occupied)
        self.state = _decode(
            self.s.mesh,
            self.s.config,
            self.s.layout,
            self.s._filter,
            span,
            self.s.weights,
            self.state,
            self.ends,
            self._put(wake, self.s._split),
            self._put(np.int32(steps), self.s._whole),
        )
        done, produced = jax.device_get((self.state.done, self.state.produced))
        return np.where(done, produced, -1).reshape(self.devices, -1)

    def _span(self, occupied: np.ndarray) -> tuple[int, int]:
        """How much of the cache attention reads, and for how many steps that is enough."""
        if self.s.layout == "fused":
            return self.length, 256
        position = np.asarray(self.state.position).reshape(self.devices, -1)
        furthest = int(position[occupied].max())
        span = min(self.length, bucket(furthest + 32, 64))
        return span, max(1, min(256, span - furthest)) if span < self.length else 256

    def _harvest(self, occupied: np.ndarray, produced: np.ndarray) -> Iterator[Completion]:
        ended = [np.flatnonzero(occupied[d] & (produced[d] >= 0)) for d in range(self.devices)]
        count = max(len(e) for e in ended)
        if not count:
            return
        rows = np.zeros((self.devices, bucket(count)), np.int32)
        for d, e in enumerate(ended):
            rows[d, : len(e)] = e
        width = min(
            self.s.settings.max_tokens, bucket(max(int(produced[d][e].max()) for d, e in enumerate(ended) if len(e)))
        )
        tokens, logprobs = jax.device_get(
            _harvest(
                self.s.mesh,
                width,
                self.state.tokens,
                self.state.logprobs,
                self._put(rows.reshape(-1), self.s._split),
            )
        )
        tokens, logprobs = (a.reshape(self.devices, -1, width) for a in (tokens, logprobs))
        for d, e in enumerate(ended):
            for j, slot in enumerate(e):
                request, index = (int(x) for x in self.occupant[d, slot])
                n = int(produced[d, slot])
                self.occupant[d, slot] = -1
                ids = tokens[d, j, :n].copy()
                yield Completion(
                    request=request,
                    sample=self.requests[request].samples[index],
                    tokens=ids,
                    logprobs=logprobs[d, j, :n].copy(),
                    stop="end" if ids[-1] in self.s._end_tokens else "length",
                )
