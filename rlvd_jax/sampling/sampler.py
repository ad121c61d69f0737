"""Many responses to many prompts, with slots that are refilled from a queue as responses end.

Each device (or group of devices that share a model too large for one) holds `slots` responses in flight. A prompt is
prefilled once on a device, all but its last token, and its keys and values go to each of its samples; the last token
is what a sample's first step begins with. Then the device decodes by itself, in one `while_loop`, until enough
responses have ended to be worth refilling; the host fetches what was drawn, and hands out slots and pages. Several
devices all take the same number of steps, after which as many should have ended, so that none waits for another.

Every draw's key is a function of (seed, question, sample, position) alone, so the responses don't depend on the
number of slots or devices, the order of the queue, or a restart (up to the rounding of matrix products of other
shapes, which moves log-probabilities by up to 1e-5 in float32 and can tip a near-tie between two tokens in bfloat16).

Where few responses are left a step takes several tokens of each, the later ones guessed from the response's own text
(`drafts`). A draw's key is that of its position, so a guess that holds changes nothing, and one that does not is
forgotten.

Pages are handed out as responses grow. Where the pool runs dry, the youngest responses are given up and begun again
later, to the same result; the oldest always has room to end.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlvd_jax.config import SamplingConfig
from rlvd_jax.errors import UserError
from rlvd_jax.qwen2.config import Qwen2Config
from rlvd_jax.sampling import cache as kv
from rlvd_jax.sampling import decoder, gpu
from rlvd_jax.sampling import slots as device
from rlvd_jax.sampling.ahead import Ahead, like
from rlvd_jax.sampling.books import Group, Plan
from rlvd_jax.sampling.memory import PREFILL, SHARE, Demand, bucket, devices_of_model, prefill_length
from rlvd_jax.sampling.slots import LOG

ROWS = 256  # responses that are started, or pages that are copied, at once
COMMON_PROMPT = 2048  # calls whose prompts have no more tokens share their programs
TAIL = 256  # tokens that the last responses must still be able to take before moving them to fewer slots pays
PATIENCE = 8  # rounds in which pages are short before slots that stay idle are given up
LEAST_GAIN = 0.1  # tokens more a step of each slot with guesses, below which these are given up for a call's rest,
TRIED = 256  # judged by so many such steps or more
KEPT = 64  # rounds whose tokens are kept to guess from
AHEAD = "gpu", "tpu"  # layouts whose programs are compiled before they are needed


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


def sizes(slots: int, layout: kv.Layout, drafts: int = 0) -> list[int]:
    """Numbers of slots that the last responses move to one after the other, largest first. Each costs a compilation,
    and where rows of the cache have to move, a copy. On GPUs slots that are done cost little (`slots.PACKED`), and
    nothing where `drafts` are guessed of the others; on TPUs as much as others."""
    if layout == "plain":
        return [slots, *(n for n in (4**i for i in range(10, 1, -1)) if 4 * n <= slots)]
    fewer = {2**i for i in range(4, 12)} - ({32} if drafts else set())
    if layout == "tpu":
        fewer |= {384, 768, *range(1536, slots, 512)}
    return [slots, *sorted((n for n in fewer if 8 * n <= 7 * slots), reverse=True)]


class Sampler:
    """Draws responses from one model with one set of sampling settings.

    `load(params)` takes the weights of a model (an `nnx.State`), also new ones later; `sample(requests, seed)`
    yields completions as they end, in no particular order. `end_tokens` stop a response. Slots and pages (per device)
    come from the settings and the devices' memory, and so does the number of devices that share a model.
    """

    def __init__(
        self,
        config: Qwen2Config,
        settings: SamplingConfig,
        end_tokens: Sequence[int],
        *,
        devices=None,
        dtype=jnp.float32,
        layout: kv.Layout | None = None,
    ):
        self.config, self.settings, self.dtype = config, settings, jnp.dtype(dtype)
        self.devices = list(devices or jax.local_devices())
        self.layout = layout or kv.choose_layout(config, self.dtype, self.devices[0].platform)
        limit = (self.devices[0].memory_stats() or {}).get("bytes_limit")
        tensor = devices_of_model(config, settings, self.dtype.itemsize, limit, len(self.devices))
        shape = len(self.devices) // tensor, tensor
        axes = "data", decoder.AXIS
        self.mesh = Mesh(np.array(self.devices).reshape(shape), axes, axis_types=(AxisType.Auto,) * 2)
        self.program = device.Program(
            self.mesh, config, self.layout, settings.temperature, settings.top_k, settings.top_p, self.dtype
        )
        self.end_tokens = np.array(sorted(end_tokens), np.int32)
        self.weights = None
        self.ahead: dict[Plan, Ahead] = {}
        self.counts: dict[str, int] = {}
        """Of the last `sample`: slots at the start, steps and rounds of the devices, responses given up."""

    def load(self, params, give_up: bool = False) -> None:
        """Take weights: cast to the sampler's dtype and laid out for decoding, on each device group. give_up: `params`
        are of no further use and are deleted, each weight as soon as it is taken, so that both never fill memory."""
        if jax.tree.leaves(params)[0].sharding.device_set != set(self.devices):
            params, give_up = jax.device_put(params, NamedSharding(self.mesh, P())), False
        self.weights = device.decode_weights(self.program, params, give_up)

    def release(self) -> None:
        """Give the weights' memory back until the next `load`."""
        self.weights = None

    def plan(self, longest_prompt: int, responses: int) -> Plan:
        """Slots and pages of each device group, for `responses` in all; UserError where memory holds none."""
        stats = self.devices[0].memory_stats() or {}
        free = np.inf
        if "bytes_limit" in stats:
            free = SHARE * stats["bytes_limit"] - stats["bytes_in_use"]
            # In coarse steps: programs are compiled for a number of pages, and what is in use differs between calls.
            free -= free % (stats["bytes_limit"] / 64)
        demand = self._demand(longest_prompt)
        if self.layout != "plain":  # a longer table costs next to nothing there, other programs do
            common = self._demand(self.common(longest_prompt))
            demand = common if common.least <= free else demand
        return demand.plan(-(-responses // self.mesh.shape["data"]), free)

    def common(self, longest_prompt: int) -> int:
        """Tokens of the longest prompt of calls that share their programs with one whose longest is this."""
        return max(longest_prompt, min(COMMON_PROMPT, self.config.max_position_embeddings // 4))

    def _demand(self, longest_prompt: int) -> Demand:
        itemsize, tensor = self.dtype.itemsize, self.program.tensor
        return Demand(self.config, self.settings, self.layout, itemsize, tensor, longest_prompt)

    def sample(self, requests: Sequence[Request], seed: int) -> Iterator[Completion]:
        """Yield a completion for each sample of each request; `seed` is any integer of up to 64 bits.

        The devices are driven by a thread of their own, so that they go on while the caller works on what it got.
        """
        if self.weights is None:
            raise ValueError("load(params) comes before sample(requests, seed)")
        total = sum(len(r.samples) for r in requests)
        if not total:
            return
        for i, r in enumerate(requests):
            if not r.prompt or len(r.prompt) >= self.config.max_position_embeddings:
                raise UserError(
                    f"prompt {i} has {len(r.prompt)} tokens; the model's context takes 1 to "
                    f"{self.config.max_position_embeddings - 1}"
                )
        run = _Run(self, requests, seed, self.plan(max(len(r.prompt) for r in requests), total))
        with contextlib.closing(_in_thread(run.rounds())) as rounds:
            try:
                yield from run.completions(rounds)
            finally:  # before the devices' thread is waited for, which may wait for what has not begun
                run.ahead.close()


def _in_thread(items: Iterator) -> Iterator:
    """The same items, made by a thread that stays at most a few ahead."""
    ready: queue.Queue = queue.Queue(maxsize=8)
    left = threading.Event()

    def work():
        try:
            for item in items:
                ready.put((item, None))
                if left.is_set():
                    return
            ready.put((None, None))
        except BaseException as error:  # the caller's to handle
            ready.put((None, error))

    thread = threading.Thread(target=work, name="sampler", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        left.set()
        while thread.is_alive():  # it may wait for room
            with contextlib.suppress(queue.Empty):
                ready.get(timeout=0.05)
        thread.join()


@dataclasses.dataclass
class _Round:
    """What a device group drew between two visits of the host."""

    moved: np.ndarray | None  # [slots], which slot each was in the round before, if they are fewer since
    occupant: np.ndarray  # [slots, 2], of the responses in flight, else -1
    before: np.ndarray  # [slots], tokens that were drawn of each before
    count: np.ndarray  # [slots], tokens of each
    done: np.ndarray  # [slots]


class _Run:
    """One call of `Sampler.sample`."""

    def __init__(self, sampler: Sampler, requests: Sequence[Request], seed: int, plan: Plan):
        self.s, self.p, self.requests, self.slots = sampler, sampler.program, requests, plan.slots
        self.paged = sampler.layout != "plain"
        self.size = kv.page_size(sampler.layout) if self.paged else plan.length
        width = kv.pages_of(plan.length, sampler.layout) if self.paged else 1
        self.length = plan.length
        count = sampler.mesh.shape["data"]
        self.groups = [Group(plan, self.size, width) for _ in range(count)]
        self.by_slot, self.whole = NamedSharding(sampler.mesh, P("data")), NamedSharding(sampler.mesh, P())
        self.seed = jax.device_put(np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32), self.whole)
        self.ends = jax.device_put(sampler.end_tokens, self.whole)
        self.queue = collections.deque(self._pieces())
        self.prompts = None  # keys and values of those prefilled last
        self.counts = sampler.counts = {"slots": plan.slots, "steps": 0, "rounds": 0, "given_up": 0}
        self.drafts = sampler.settings.drafts if self.paged and self.p.tensor == 1 else 0
        self.sizes = sizes(plan.slots, sampler.layout, self.drafts)
        self.gain = np.zeros(2, int)  # steps of slots with guesses, and tokens that these gained
        self.seen = None  # tokens by position, to guess from
        self.kept_out: list[int] = []  # responses in flight in the last rounds in which pages were all that lacked
        self.pace = 0.0  # responses of a group that end in a step, as of late
        self.past: collections.deque = collections.deque(maxlen=KEPT)  # rounds, each with its tokens on the devices
        self.layers, self.state = device.empty(self.p, plan.slots, plan.pages if self.paged else plan.length)
        programs = self._programs(width)
        self.ahead = sampler.ahead.setdefault(plan, Ahead())
        self.ahead.begin(programs)
        self.before = [name for name in programs if self._tuned(*name)]

    def _programs(self, width: int) -> dict[tuple[str, int], Callable]:
        """What lowers the programs that take long and that this call will need, those needed first first, and then
        those of a call with the same plan and longer prompts. width: pages of a slot."""
        if self.s.layout not in AHEAD:
            return {}
        p, weights, layers, groups = self.p, like(self.s.weights), like(self.layers), len(self.groups)
        ends, steps = like(self.ends), jax.ShapeDtypeStruct((), np.int32, sharding=self.whole)

        def by_slot(*shape, dtype=np.int32):  # of a group
            return jax.ShapeDtypeStruct((groups * shape[0], *shape[1:]), dtype, sharding=self.by_slot)

        def prefill(time: int):
            spec = P("data", None, decoder.AXIS)
            shape = groups * PREFILL, time, decoder.kv_heads(p.config, p.tensor), p.config.head_dim
            keys = jax.ShapeDtypeStruct(shape, p.dtype, sharding=NamedSharding(p.mesh, spec))
            return (
                device.prefill.lower(p, weights, by_slot(PREFILL, time), by_slot(PREFILL)),
                device.insert.lower(p, layers, [(keys, keys)] * len(layers), by_slot(ROWS, 2)),
            )

        def decode(n: int):
            state = device.Slots(*(by_slot(n, *x.shape[1:], dtype=x.dtype) for x in self.state))
            rest = by_slot(n, width), ends, by_slot(1), steps
            if drafts := self._guessed(n):
                seen = by_slot(n, self.length)
                return [device.decode_drafts.lower(p, drafts, weights, layers, state, seen, *rest, steps)]
            return [device.decode.lower(p, self.length, weights, layers, state, *rest)]

        longest = max(len(r.prompt) for r in self.requests)
        times = [prefill_length(1, p.layout)]
        while times[-1] < self.s.common(longest):
            times.append(prefill_length(times[-1] + 1, p.layout))
        now = [t for t in times if t <= prefill_length(longest, p.layout)]
        names = [("prefill", t) for t in now[::-1]] + [("decode", n) for n in self.sizes]
        names += [("prefill", t) for t in times if t not in now]
        names.sort(key=lambda name: not self._tuned(*name))
        return {(what, n): partial({"prefill": prefill, "decode": decode}[what], n) for what, n in names}

    def _tuned(self, what: str, n: int) -> bool:
        """Whether the compiler tries out on the devices which of a library's products to take, which it measures
        rightly while nothing else runs there. It does so once for steps of as many rows."""
        if self.p.layout != "gpu" or what == "prefill":
            return self.p.layout == "gpu"
        c, tensor, rows = self.p.config, self.p.tensor, {n: self._rows(n) for n in self.sizes}
        by = gpu.products_by(rows[n], c.hidden_size, c.intermediate_size // tensor, tensor)
        return by != "many" and not any(rows[larger] == rows[n] for larger in self.sizes if larger > n)

    def _pieces(self):
        """(request, some of its samples) small enough to spread over the device groups."""
        total, groups = sum(len(r.samples) for r in self.requests), len(self.groups)
        size = max(1, -(-total // (4 * groups))) if groups > 1 else total
        for i, r in enumerate(self.requests):
            for start in range(0, len(r.samples), size):
                yield i, range(start, min(start + size, len(r.samples)))

    def _put(self, per_group) -> jax.Array:
        """Arrays of each group, end to end, on their devices."""
        return jax.device_put(np.concatenate(per_group), self.by_slot)

    def rounds(self) -> Iterator[tuple[list[_Round], tuple[jax.Array, jax.Array]]]:
        """Drive the devices; yield what each group drew, and tokens and log-probabilities [tokens, groups * slots],
        still on the devices."""
        self.ahead.finish(self.before)
        while True:
            self._refill()
            if not any(g.live.any() for g in self.groups):
                return
            yield self._decode(self._shrink())

    def completions(self, rounds) -> Iterator[Completion]:
        """Put together what was drawn in `rounds`. It touches none of the books, so it may run beside `rounds`, to
        which it leaves Python most of the time: there is no loop over slots but for those that are done."""
        shape = self.sizes[0], min(self.s.settings.max_tokens, self.length)
        drawn = [[np.zeros(shape, dtype) for dtype in (np.int32, np.float32)] for _ in self.groups]
        for groups, log in rounds:
            for d, (g, log_of) in enumerate(zip(groups, zip(*map(self._by_group, log), strict=True), strict=True)):
                if g.moved is not None:
                    drawn[d] = [np.take(x, g.moved, axis=0) for x in drawn[d]]
                slot, nth = np.nonzero(np.arange(log_of[0].shape[-1]) < g.count[:, None])
                for x, new in zip(drawn[d], log_of, strict=True):
                    x[slot, g.before[slot] + nth] = new[slot, nth]
                for slot in np.flatnonzero(g.done & (g.count > 0)):
                    request, index = g.occupant[slot].tolist()
                    end = g.before[slot] + g.count[slot]
                    ids, logp = (x[slot, :end].copy() for x in drawn[d])
                    yield Completion(
                        request=request,
                        sample=self.requests[request].samples[index],
                        tokens=ids,
                        logprobs=logp,
                        stop="end" if ids[-1] in self.s.end_tokens else "length",
                    )

    def _by_group(self, log: jax.Array) -> np.ndarray:
        """[tokens, groups * slots] → [groups, slots, tokens], on the host."""
        log = np.asarray(log)
        return log.T.reshape(len(self.groups), -1, len(log))

    # ---- start responses -----------------------------------------------------------------------

    def _refill(self) -> None:
        """Start waiting responses in free slots, prefilling prompts as they come up."""
        while True:
            starts = [self._admit(g) for g in self.groups]
            self._insert(starts)
            if not self._prefill_next():
                return

    def _admit(self, g: Group) -> tuple[list, list]:
        """(rows for `slots.start`, copies of prompts) of responses that start: as many as slots and pages allow of
        those whose prompt is prefilled."""
        rows, copies = [], []
        free = collections.deque(np.flatnonzero(~g.live).tolist())
        in_flight = len(g.occupant) - len(free)
        while free and g.waiting and g.waiting[0][0] in g.row_of:
            request, samples = g.waiting[0]
            r, row = self.requests[request], g.row_of[request]
            cached = len(r.prompt) - 1
            first = row * self.prompt_time // self.size  # of the prompt's pages among those prefilled
            most = min(self.s.settings.max_tokens, self.s.config.max_position_embeddings - len(r.prompt))
            if self.paged:
                pages = g.share(request, cached, alone=not in_flight + len(rows))
                if pages is None:
                    break
                copies += [(first + i, page) for i, page in enumerate(pages)]
            begun = 0
            for index in samples:
                if not free or (self.paged and in_flight + len(rows) and not g.has_room(cached, LOG)):
                    break
                slot = free.popleft()
                limit = min(r.limits[index], most) if r.limits else most
                page = g.begin(slot, request, index, cached, limit)
                if page is not None:
                    copies.append((first + cached // self.size, page))
                if not self.paged:
                    copies.append((row, slot))
                keys = (np.uint32(x).astype(np.int32) for x in (r.question, r.samples[index]))
                rows.append((slot, r.prompt[-1], cached, limit, *keys))
                begun += 1
            g.waiting.popleft()
            if begun < len(samples):
                g.waiting.appendleft((request, samples[begun:]))
                break
        return rows, copies

    def _prefill_next(self) -> bool:
        """Prefill the prompts of the next samples for groups with free slots; False if there are none."""
        held = [int(g.live.sum()) + sum(len(s) for _, s in g.waiting) for g in self.groups]
        # Of what has not ended a group takes its share, so that the last responses are spread evenly.
        share = -(-(sum(held) + sum(len(s) for _, s in self.queue)) // len(self.groups))
        needed = False
        for g, n in zip(self.groups, held, strict=True):
            while self.queue and n < min(len(g.live), share) and len(g.waiting) < PREFILL:
                g.waiting.append(self.queue.popleft())
                n += len(g.waiting[-1][1])
            needed |= bool(not g.live.all() and g.waiting and g.waiting[0][0] not in g.row_of)
        if not needed:
            return False
        # All groups prefill at a time, so each takes what it will need next.
        batches = [list(dict.fromkeys(r for r, _ in g.waiting))[:PREFILL] for g in self.groups]
        longest = max(len(self.requests[r].prompt) for batch in batches for r in batch)
        time = prefill_length(longest, self.s.layout)
        tokens = np.zeros((len(self.groups), PREFILL, time), np.int32)
        lengths = np.ones((len(self.groups), PREFILL), np.int32)
        for g, batch, token_rows, length in zip(self.groups, batches, tokens, lengths, strict=True):
            g.row_of = {request: row for row, request in enumerate(batch)}
            for row, request in enumerate(batch):
                prompt = self.requests[request].prompt
                token_rows[row, : len(prompt)] = prompt
                length[row] = len(prompt)
        self.ahead.wait(("prefill", time))
        self.prompts = None  # the last ones are freed first
        self.prompts = device.prefill(self.p, self.s.weights, self._put(tokens), self._put(lengths))
        self.prompt_time = time
        return True

    def _insert(self, starts: list[tuple[list, list]]) -> None:
        def pieces(lists, unused):
            """[groups * n, columns] each, on the devices; of the same n where compiling takes long."""
            longest = max(len(x) for x in lists)
            n = ROWS if self.paged else bucket(longest, 64)
            for first in range(0, longest, n):
                out = np.full((len(lists), n, len(unused)), unused, np.int32)
                for to, x in zip(out, lists, strict=True):
                    part = x[first : first + n]
                    to[: len(part)] = np.array(part, np.int32).reshape(-1, len(unused))
                yield self._put(out)

        nowhere = np.iinfo(np.int32).max
        rows, copies = zip(*starts, strict=True)
        for some in pieces(copies, np.array([0, nowhere])):
            self.layers = device.insert(self.p, self.layers, self.prompts, some)
        for some in pieces(rows, np.array([nowhere, 0, 0, 0, 0, 0])):
            self.state = device.start(self.p, self.state, some, self.seed)

    # ---- fewer slots -------------------------------------------------------------------------------

    def _shrink(self) -> np.ndarray | None:
        """Go on with fewer slots where they are enough: a step costs what its slots cost, idle or not. That is once
        nothing waits, as the longest responses go on alone for long, and where what waits has found slots, but no
        pages, for some time. Pages stay where they are; rows of `plain` have to move. → which slot each was before,
        [groups, slots], if they are fewer now."""
        live = max(int(g.live.sum()) for g in self.groups)
        if self.queue or any(g.waiting for g in self.groups):
            self.kept_out = [*self.kept_out, live][-PATIENCE:] if live < self.slots else []
            if len(self.kept_out) < PATIENCE:
                return None
            live = min(self.slots, max(self.kept_out) * 9 // 8)
        elif max(int((g.limit - g.produced)[g.live].max(initial=0)) for g in self.groups) < TAIL:
            return None
        # What is still being compiled is not waited for: the responses go on in more slots meanwhile.
        ready = [n for n in self.sizes if n < self.slots and self.ahead.ready(("decode", n))]
        fewer = min((n for n in ready if n >= live), default=self.slots)
        if fewer == self.slots:
            return None
        self.kept_out = []
        before = np.zeros((len(self.groups), fewer), np.int32)
        idle = np.ones((len(self.groups), fewer), bool)
        for d, g in enumerate(self.groups):
            kept = np.flatnonzero(g.live)
            before[d, : len(kept)], idle[d, : len(kept)] = kept, False
            g.keep(kept, fewer)
        rows = self._put(before)
        if not self.paged:
            for i, layer in enumerate(self.layers):  # one by one, each old one freed before the next is moved
                self.layers[i] = device.take_layer(self.p, layer, rows)
                del layer
        self.state = device.take(self.p, self.state, rows, self._put(idle))
        self.slots, self.seen = fewer, None
        return before

    # ---- decode and collect --------------------------------------------------------------------

    def _decode(self, moved: np.ndarray | None) -> tuple[list[_Round], tuple[jax.Array, jax.Array]]:
        """Run the devices until some responses have ended, whose slots are free then. moved: by `_shrink`."""
        drafts, steps, span = self._guessed(self.slots), LOG, self.length
        if self.paged:
            grown = [g.grow(device.logged(self.slots, drafts) if drafts else LOG) for g in self.groups]
            steps = most = min(n for n, _ in grown)  # tokens, where some are guessed
            if any(given_up for _, given_up in grown):
                which = np.zeros((len(self.groups), self.slots), bool)
                for d, (_, given_up) in enumerate(grown):
                    which[d, given_up] = True
                    self.counts["given_up"] += len(given_up)
                self.state = device.stop(self.p, self.state, self._put(which))
            steps = device.TURNS if drafts else most
        else:
            furthest = max(int((g.cached + g.produced)[g.live].max(initial=0)) for g in self.groups)
            span = min(self.length, bucket(furthest + 32, 64))
            steps = max(1, min(LOG, span - furthest)) if span < self.length else LOG
        wake = [self._wake(g) for g in self.groups]
        if len(self.groups) > 1:
            steps, wake = self._in_step(steps, wake), [self.slots] * len(self.groups)
        rest = (
            self._put([g.table for g in self.groups]),
            self.ends,
            jax.device_put(np.array(wake, np.int32), self.by_slot),
            jax.device_put(np.int32(steps), self.whole),
        )
        weights, gain = self.s.weights, None
        self.ahead.wait(("decode", self.slots))
        if drafts:
            if self.seen is None:
                self.seen = self._put(self._text())
            most = jax.device_put(np.int32(most), self.whole)
            self.layers, self.state, self.seen, *log, gain = device.decode_drafts(
                self.p, drafts, weights, self.layers, self.state, self.seen, *rest, most
            )
        else:
            self.layers, self.state, *log = device.decode(self.p, span, weights, self.layers, self.state, *rest)
        shape = len(self.groups), self.slots
        # Copies: on a CPU these may be views of what the next step overwrites, and another thread reads them.
        done, produced = (np.array(x).reshape(shape) for x in (self.state.done, self.state.produced))
        rounds, ended = [], 0
        for d, (g, g_done, g_produced) in enumerate(zip(self.groups, done, produced, strict=True)):
            live = g.live
            new = np.where(live, g_produced - g.produced, 0)
            rounds.append(_Round(None if moved is None else moved[d], g.occupant.copy(), g.produced, new, g_done))
            g.produced = np.where(live, g_produced, g.produced)
            for slot in np.flatnonzero(live & g_done):
                g.end(slot)
                ended += 1
        taken = int(max(r.count.max() for r in rounds))
        if gain is not None:
            gain = np.asarray(gain)
            taken = int(gain[:, 0].max())
            self.gain += gain[:, 1:].sum(axis=0)
            tried, gained = self.gain
            if tried >= TRIED and gained < LEAST_GAIN * tried:
                self.drafts = 0
                self.sizes = sizes(self.sizes[0], self.s.layout)
        self.pace = (self.pace + ended / max(1, taken) / len(self.groups)) / 2
        if self.drafts:
            self.past.append((rounds, log[0]))
        self.counts["steps"] += taken
        self.counts["rounds"] += 1
        return rounds, tuple(log)

    def _guessed(self, slots: int) -> int:
        """Tokens that are guessed of each in a step of so many slots, at most."""
        return self.drafts if slots <= gpu.FEW else 0

    def _rows(self, slots: int) -> int:
        """Of a step of so many slots."""
        drafts = self._guessed(slots)
        return device.rows_of_step(slots, drafts) if drafts else slots

    def _in_step(self, steps: int, wake: list[int]) -> int:
        """Steps, at most so many, after which as many slots should be done as `wake` has it, on average over groups.
        All take as many: did each come back when its own are done, a round would last as long as the slowest's."""
        if not self.pace:
            return steps
        wanted = np.mean([w - (~g.live).sum() for w, g in zip(wake, self.groups, strict=True)])
        each = min(steps, device.together(self.p, self._rows(self.slots)))
        return max(each, int(min(steps, wanted / self.pace)) // each * each)

    def _text(self) -> np.ndarray:
        """int32 [groups, slots, length]: prompts and responses in flight, token by position as far as they are kept;
        else -1."""
        text = np.full((len(self.groups), self.slots, self.length), -1, np.int32)
        for d, g in enumerate(self.groups):
            drawn = {tuple(who): [] for who in g.occupant[g.live].tolist()}
            for rounds, tokens in self.past:
                tokens = self._by_group(tokens)[d]
                for who, count, row in zip(rounds[d].occupant.tolist(), rounds[d].count, tokens, strict=True):
                    if tuple(who) in drawn:
                        drawn[tuple(who)].append(row[:count])
            for slot in np.flatnonzero(g.live):
                request, index = g.occupant[slot].tolist()
                prompt, produced = self.requests[request].prompt, int(g.produced[slot])
                # Not of an attempt before that was given up.
                last = np.concatenate([np.zeros(0, np.int32), *drawn[request, index]])[-produced:] if produced else []
                end = len(prompt) + produced
                text[d, slot, : len(prompt)], text[d, slot, end - len(last) : end] = prompt, last
        return text

    def _wake(self, g: Group) -> int:
        """Done slots at which the device comes back: few where others wait, half where slots can become fewer."""
        free = int((~g.live).sum())
        if self.queue or g.waiting:  # where the host's cores are the device, its visits cost more
            return min(self.slots, free + max(1, self.slots // (32 if self.paged else 8)))
        next_size = next((n for n in self.sizes if n < self.slots), 0)
        return min(self.slots, max(self.slots - next_size, free + 1 + self.slots // 32))
