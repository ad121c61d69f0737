"""What the devices hold of the responses in flight, and the compiled programs that change it.

Everything is mapped over the mesh's axis `data`: each device group has its own slots and its own cache, and steps by
itself, with no word to the others. Over the axis `tensor` of a group only the weights, the heads and so the cache are
split; the rest is the same on all of it.
"""

from __future__ import annotations

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlvd_jax.qwen2.config import Qwen2Config
from rlvd_jax.qwen2.weights import by_path
from rlvd_jax.sampling import cache as kv
from rlvd_jax.sampling import decoder, gpu
from rlvd_jax.sampling.filters import draw
from rlvd_jax.sampling.rows import share_out, shares

LOG = 128  # tokens of each slot that the devices write down before the host fetches them, where a step takes one
TURNS = 64  # steps before the host fetches what they wrote down, where a step takes several
PACKED = 512  # slots from which on a GPU's steps take the live ones first, so that products leave out the others
CONTEXT = 12  # tokens by which a place in a response is found that is like its end
STRETCH = 4  # of these the last, which count twice where all from them on are alike
TOGETHER = 2048  # rows of all the steps that a GPU takes before the host reads whether to go on


def rows_of_step(slots: int, drafts: int) -> int:
    """Rows that slots share where up to so many tokens of each are guessed."""
    return min(gpu.FEW, slots * (1 + drafts))


def logged(slots: int, drafts: int) -> int:
    """Tokens of each slot that the devices write down, at most, where some are guessed: of few slots more."""
    return min(TURNS * (1 + drafts), 4 * TURNS * gpu.FEW // slots)


def together(p: Program, rows: int) -> int:
    """Steps of so many rows that are taken without a look at whether enough slots are done. On a GPU it is the host
    that looks, and the device waits, which matters where steps are short; where they are long, slots that are done cost
    more. A divisor of LOG, TURNS and a page's positions, so of the steps of one token that pages are there for
    (`books.Group.grow`)."""
    return 2 ** min(3, max(1, TOGETHER // rows).bit_length() - 1) if p.layout in ("gpu", "interpret") else 1


class Program(NamedTuple):
    """What the compiled programs of a sampler are for."""

    mesh: Mesh  # axes data, tensor
    config: Qwen2Config
    layout: kv.Layout
    temperature: float
    top_k: int
    top_p: float
    dtype: jnp.dtype

    @property
    def tensor(self) -> int:
        return self.mesh.shape[decoder.AXIS]

    @property
    def cache_spec(self) -> P:
        """Slots, or pages, over `data`; heads over `tensor`."""
        by_layout = {"plain": P("data", decoder.AXIS), "tpu": P("data", None, decoder.AXIS)}
        return by_layout.get(self.layout, P(decoder.AXIS, "data"))


class Slots(NamedTuple):
    """What is in flight, but for the cache; the leading axis is split over `data`."""

    token: jax.Array  # [slots] int32, the newest token, not in the cache yet
    position: jax.Array  # [slots] int32, its position
    produced: jax.Array  # [slots] int32, tokens drawn so far
    limit: jax.Array  # [slots] int32, the most to draw
    done: jax.Array  # [slots] bool, ended or never used
    key: jax.Array  # [slots, 2] uint32, of this response


@cache
def _decode_part(mesh: Mesh, c: Qwen2Config, dtype, layout: kv.Layout, part: str, count: int):
    """The jitted `decoder.decode_part`; of less than a program, which other settings of sampling share."""
    tensor = mesh.shape[decoder.AXIS]
    how = {"part": part, "count": count, "c": c, "dtype": dtype, "tensor": tensor, "layout": layout}
    sharding = NamedSharding(mesh, decoder.spec(c, tensor, part, layout))
    return jax.jit(partial(decoder.decode_part, **how), out_shardings=sharding)


def decode_weights(p: Program, params, give_up: bool = False) -> dict:
    """The decoder's weights on the mesh from a model's state, a part at a time, some layers at once. give_up: the state
    is of no further use, and the memory of each of its weights is given back before the next is taken."""
    of_model, made = by_path(params), {}
    for part, sources in decoder.parts(p.config).items():
        taken = {path: of_model[path] for path in sources}
        count = decoder.layers_at_once(p.config, p.dtype.itemsize, part)
        make = _decode_part(p.mesh, p.config, p.dtype, p.layout, part, count)
        if part.startswith("layers/"):
            starts = range(0, p.config.num_hidden_layers, count)
            made[part] = [layer for start in starts for layer in make(taken, start)]
        else:
            made[part] = make(taken, 0)
        if give_up:
            jax.block_until_ready(made[part])
            for x in taken.values():
                x.delete()
    return decoder.assemble(p.config, made)


@partial(jax.jit, static_argnums=range(3))
def empty(p: Program, slots: int, room: int):
    """(cache, slots): `slots` unused ones on each device group, with `room` positions each, or pages for all."""
    groups = p.mesh.shape["data"]
    n = slots * groups
    state = Slots(*(jnp.zeros(n, jnp.int32) for _ in range(4)), jnp.ones(n, bool), jnp.zeros((n, 2), jnp.uint32))
    heads = decoder.kv_heads(p.config, p.tensor)
    wide = room if p.layout == "plain" else room * groups
    shapes = kv.shapes(p.config, p.layout, heads, n, wide)
    layers = [tuple(jnp.zeros(shape, p.dtype) for shape in shapes) for _ in range(p.config.num_hidden_layers)]
    constrain = jax.lax.with_sharding_constraint
    return (
        constrain(layers, NamedSharding(p.mesh, p.cache_spec)),
        constrain(state, NamedSharding(p.mesh, P("data"))),
    )


def _mapped(p: Program, run, in_specs, out_specs):
    return jax.shard_map(run, mesh=p.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


@partial(jax.jit, static_argnums=0)
def prefill(p: Program, weights, tokens, lengths):
    """Keys and values of prompts; tokens: [prompts, time], lengths: [prompts], split over `data`."""
    run = partial(decoder.prefill, p.config, p.tensor, p.layout)
    specs = decoder.specs(p.config, p.tensor, p.layout), P("data"), P("data")
    return _mapped(p, run, specs, P("data", None, decoder.AXIS))(weights, tokens, lengths)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def insert(p: Program, layers, prompts, copies):
    """Copy prompts, or pages of them, into the cache. copies: [groups * n, 2], see `cache.insert`."""

    def run(layers, prompts, copies):
        source, to = copies.T
        return [kv.insert(layer, p.layout, new, source, to) for layer, new in zip(layers, prompts, strict=True)]

    specs = p.cache_spec, P("data", None, decoder.AXIS), P("data")
    return _mapped(p, run, specs, p.cache_spec)(layers, prompts, copies)


def _fold(key, data):
    """fold_in for rows of raw threefry keys [rows, 2] and numbers [rows]."""

    def one(key, data):
        return jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), data))

    return jax.vmap(one)(key, data)


START = ("slot", "token", "position", "limit", "question", "sample")  # columns of `start`'s rows


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def start(p: Program, slots: Slots, rows, seed):
    """Put responses into slots. rows: [groups * n, 6] int32, see START; a slot out of range is none. seed: [2]."""

    def run(slots: Slots, rows, seed):
        slot, token, position, limit, question, sample = rows.T
        key = _fold(jnp.broadcast_to(seed, (slot.size, 2)), question.astype(jnp.uint32))
        key = _fold(key, sample.astype(jnp.uint32))
        new = Slots(token, position, jnp.zeros_like(slot), limit, jnp.zeros(slot.shape, bool), key)
        return Slots(*(old.at[slot].set(x, mode="drop") for old, x in zip(slots, new, strict=True)))

    return _mapped(p, run, (P("data"), P("data"), P()), P("data"))(slots, rows, seed)


@partial(jax.jit, static_argnums=0)
def stop(p: Program, slots: Slots, which):
    """Give up the responses in some slots; which: [slots] bool."""
    return slots._replace(done=slots.done | which)


@partial(jax.jit, static_argnums=0)
def take(p: Program, slots: Slots, rows, idle):
    """Fewer slots: `rows` of each group's, [groups * fewer]; idle: of these, which are not used."""
    taken = _mapped(p, lambda slots, rows: jax.tree.map(lambda x: x[rows], slots), (P("data"), P("data")), P("data"))(
        slots, rows
    )
    return taken._replace(done=taken.done | idle)


@partial(jax.jit, static_argnums=0)
def take_layer(p: Program, layer, rows):
    """`plain`: a layer's cache of `rows` of the slots."""
    run = lambda layer, rows: jax.tree.map(lambda x: x[rows], layer)  # noqa: E731
    return _mapped(p, run, (p.cache_spec, P("data")), p.cache_spec)(layer, rows)


def _repeated(body, times: int):
    """`body` so many times; the loop's end is known, so nothing waits for it."""
    return body if times == 1 else lambda carry: jax.lax.fori_loop(0, times, lambda _, carry: body(carry), carry)


def _live_first(live):
    """(slots, the live ones first; the place of each slot among them), [slots] int32 each."""
    slot = jnp.arange(live.size, dtype=jnp.int32)
    before = jnp.sum(live & (slot < slot[:, None]), axis=1, dtype=jnp.int32)
    place = jnp.where(live, before, live.sum(dtype=jnp.int32) + slot - before)
    return jnp.zeros_like(slot).at[place].set(slot, unique_indices=True), place


def _draw(p: Program, weights, hidden, keys, platform: str, used=None):
    """(token, log-probability) of each row of hidden states, or of so many as are used."""
    table = decoder.unembedding(p.config, weights)
    if p.layout == "gpu" and gpu.draws_hidden(hidden, table, p.temperature, p.top_k, p.top_p, p.tensor):
        return gpu.draw_hidden(hidden, table, keys, p.temperature, p.top_k, used)
    if used is not None:  # the others' may be no numbers, which kernels of the draw are not made for
        hidden = jnp.where((jnp.arange(len(hidden)) < used)[:, None], hidden, 0)
    logits = decoder.logits(p.config, p.tensor, weights, hidden)
    return draw(logits, keys, p.temperature, p.top_k, p.top_p, platform)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 4))
def decode(p: Program, span: int, weights, layers, slots: Slots, table, ends, wake, steps):
    """Decode on each group by itself until `wake` [groups] of its slots are done, `steps` tokens at most.

    table: [slots, pages of a slot]; ends: end tokens; steps: [] int32, at most LOG, a multiple of `together`; span: see
    `cache.Place`.
    → (cache, slots, tokens and log-probabilities [LOG, slots] of the steps taken).
    """
    chip = p.mesh.devices.flat[0]

    def run(weights, layers, slots: Slots, table, ends, wake, steps):
        packed = p.layout in ("gpu", "interpret") and slots.token.size >= PACKED

        def going(carry):
            taken, _, slots, _, _ = carry
            return (taken < steps) & (slots.done.sum() < wake[0])

        def body(carry):
            taken, layers, s, tokens, logprobs = carry
            live = ~s.done
            now, pages, used = s, table, None
            if packed:
                order, back = _live_first(live)
                now, pages = jax.tree.map(lambda x: x[order], (s, table))
                used = live.sum(dtype=jnp.int32)
            # Two cores on v4 and v5p, which count as one device.
            place = kv.Place(now.position, ~now.done, pages, span, getattr(chip, "num_cores", 1), used)
            layers, hidden = decoder.step(p.config, p.tensor, p.layout, weights, layers, now.token, place)
            with jax.named_scope("draw"):
                token, logprob = _draw(p, weights, hidden, _fold(now.key, now.produced), chip.platform, used)
            if packed:
                token, logprob = token[back], logprob[back]
            # A slot that is done draws something too, since all slots step together; nobody reads it.
            produced = s.produced + live
            ended = (token[:, None] == ends).any(axis=1) if ends.size else jnp.zeros(token.shape, bool)
            new = Slots(
                token=jnp.where(live, token, s.token),
                position=s.position + live,
                produced=produced,
                limit=s.limit,
                done=s.done | ended | (produced >= s.limit),
                key=s.key,
            )
            return taken + 1, layers, new, tokens.at[taken].set(token), logprobs.at[taken].set(logprob)

        n = slots.token.size
        log = jnp.zeros((LOG, n), jnp.int32), jnp.zeros((LOG, n), jnp.float32)
        start = jnp.int32(0), layers, slots, *log
        return jax.lax.while_loop(going, _repeated(body, together(p, n)), start)[1:]

    by_slot, log = P("data"), P(None, "data")
    in_specs = decoder.specs(p.config, p.tensor, p.layout), p.cache_spec, by_slot, by_slot, P(), by_slot, P()
    return _mapped(p, run, in_specs, (p.cache_spec, by_slot, log, log))(
        weights, layers, slots, table, ends, wake, steps
    )


def _look_up(seen, position, slot, nth):
    """What may follow the newest tokens: what followed where a slot's stood before and most of the CONTEXT tokens that
    end there were those that end here (see STRETCH), and of such places the last. They need not be all alike: text that
    repeats itself often does so but for a number.

    seen: [slots, positions] int32, tokens by position, -1 where not known; position: [slots], of the newest; slot, nth:
    [rows] int32, how many tokens later, from 0. → [rows] int32. A stretch that ends at the newest token is taken to
    begin again.
    """
    of, at = jnp.arange(position.size), jnp.arange(seen.shape[1])
    newest = stretch = (at < position[:, None]) & (seen == seen[of, position][:, None])
    alike = jnp.zeros(seen.shape, jnp.int32)
    for back in range(CONTEXT):
        before = seen[of, jnp.maximum(position - back, 0)]
        same = jnp.pad(seen, ((0, 0), (back, 0)), constant_values=-2)[:, : at.size] == before[:, None]
        stretch &= same
        alike += same.astype(jnp.int32) + (stretch if back < STRETCH else 0)
    best = jnp.where(newest, alike * at.size + at, -1).max(axis=1)
    first = jnp.where(best < 0, 0, jax.lax.rem(best, at.size) + 1)  # 0: never
    period = jnp.maximum(position + 1 - first, 1)
    return jnp.maximum(seen[slot, first[slot] + nth % period[slot]], 0)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 4, 5))
def decode_drafts(p: Program, drafts: int, weights, layers, slots: Slots, seen, table, ends, wake, steps, most):
    """As `decode`, with up to `drafts` tokens guessed of each slot and checked in the same step, as many as its rows
    have room for (`SamplingConfig.drafts`): the live slots share them.

    Each draw's key is that of its position, so what is drawn after a right guess is what would have been drawn anyway;
    what is drawn after a wrong one is dropped. seen: see `_look_up`, whatever it holds of others changes no result;
    steps: at most TURNS; most: [] int32, the tokens of a slot that pages are there for, after which it waits, at most
    `logged`. → (cache, slots, seen, tokens and log-probabilities [logged, slots], each slot's from 0 on, [groups, 3]
    int32: steps; of all slots together, steps for which some was guessed; tokens drawn by right guesses).
    """
    chip, group = p.mesh.devices.flat[0], p.config.num_attention_heads // p.config.num_key_value_heads

    def run(weights, layers, slots: Slots, seen, table, ends, wake, steps, most):
        n = slots.token.size
        count_of_rows, kept, slot = rows_of_step(n, drafts), logged(n, drafts), jnp.arange(n)

        def going(carry):
            _, slots, _, count, *_, gain = carry
            waits = (~slots.done & (count >= most)).any()
            return (gain[0] < steps) & (slots.done.sum() < wake[0]) & ~waits

        def body(carry):
            layers, s, seen, count, tokens, logprobs, gain = carry
            goes_on = gain[0] < steps
            seen = seen.at[slot, s.position].set(s.token)
            room = jnp.minimum(jnp.minimum(s.limit - s.produced, most - count), 1 + drafts)
            share = shares(~s.done & goes_on & (room > 0), room, count_of_rows)
            live = share > 0
            of, nth, there, _ = held = share_out(share, count_of_rows, group)
            text = jnp.where(nth == 0, s.token[of], _look_up(seen, s.position, of, jnp.maximum(nth - 1, 0)))
            used = share.sum(dtype=jnp.int32)
            place = kv.Place(s.position, live, table, 0, getattr(chip, "num_cores", 1), used, held)
            layers, hidden = decoder.step(p.config, p.tensor, p.layout, weights, layers, text, place)
            with jax.named_scope("draw"):
                key = _fold(s.key[of], s.produced[of] + nth)
                token, logprob = _draw(p, weights, hidden, key, chip.platform, used)
            ended = (token[:, None] == ends).any(axis=1) if ends.size else jnp.zeros(token.shape, bool)
            # A token counts after right guesses alone, and with none that ended the response.
            holds = (nth == 0) | ((text == jnp.roll(token, 1)) & ~jnp.roll(ended, 1))
            wrong, first = jnp.cumsum(~holds, dtype=jnp.int32), jnp.cumsum(share) - share
            counts = there & (wrong == wrong[first[of]])
            mine = (of == slot[:, None]) & counts  # [slots, rows]
            more = mine.sum(axis=1, dtype=jnp.int32)
            produced = s.produced + more
            new = Slots(
                token=jnp.where(live, token[first + more - 1], s.token),
                position=s.position + more,
                produced=produced,
                limit=s.limit,
                done=s.done | (mine & ended).any(axis=1) | (produced >= s.limit),
                key=s.key,
            )
            seen = seen.at[of, jnp.where(counts, s.position[of] + 1 + nth, seen.shape[1])].set(token, mode="drop")
            to = jnp.where(counts, count[of] + nth, kept)
            tokens, logprobs = (log.at[to, of].set(x, mode="drop") for log, x in ((tokens, token), (logprobs, logprob)))
            guessed = (share > 1).sum(dtype=jnp.int32)
            gain += jnp.stack([goes_on.astype(jnp.int32), guessed, (more - live).sum(dtype=jnp.int32)])
            return layers, new, seen, count + more, tokens, logprobs, gain

        log = jnp.zeros((kept, n), jnp.int32), jnp.zeros((kept, n), jnp.float32)
        start = layers, slots, seen, jnp.zeros(n, jnp.int32), *log, jnp.zeros(3, jnp.int32)
        layers, slots, seen, _, *log, gain = jax.lax.while_loop(
            going, _repeated(body, together(p, count_of_rows)), start
        )
        return layers, slots, seen, *log, gain[None]

    by_slot, log = P("data"), P(None, "data")
    specs = decoder.specs(p.config, p.tensor, p.layout)
    in_specs = specs, p.cache_spec, by_slot, by_slot, by_slot, P(), by_slot, P(), P()
    return _mapped(p, run, in_specs, (p.cache_spec, by_slot, by_slot, log, log, by_slot))(
        weights, layers, slots, seen, table, ends, wake, steps, most
    )
