"""The sampler compiled for TPUs that are not here: memory is as reckoned, attention is the kernel that reads pages, and
tokens are written into the pool where it lies. What the kernel computes is tested step by step on a CPU."""

import dataclasses
import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreted
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from test_sampler import TIED, forced, run, some_requests
from tiny_qwen2 import params_of, random_model

from rlvd_jax import targets
from rlvd_jax.config import MeshConfig, SamplingConfig
from rlvd_jax.qwen2 import Qwen2, Qwen2Config
from rlvd_jax.qwen2.layers import rope_table
from rlvd_jax.qwen2.mesh import make_mesh, param_shardings
from rlvd_jax.qwen2.weights import by_path
from rlvd_jax.sampling import Sampler, cache, decoder, tpu
from rlvd_jax.sampling import sampler as sampler_module
from rlvd_jax.sampling import slots as device
from rlvd_jax.sampling.memory import PREFILL, SHARE, Demand, bucket, weight_bytes
from rlvd_jax.sampling.rows import share_out

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'jax[tpu]'"
)
QWEN = {  # vocabulary, hidden, MLP, layers, query heads, key-value heads, head's size
    "0.5B": Qwen2Config(151936, 896, 4864, 24, 14, 2, 64, tie_word_embeddings=True),
    "1.5B": Qwen2Config(151936, 1536, 8960, 28, 12, 2, 128, tie_word_embeddings=True),
    "3B": Qwen2Config(151936, 2048, 11008, 36, 16, 2, 128, tie_word_embeddings=True),
    "7B": Qwen2Config(152064, 3584, 18944, 28, 28, 4, 128),
    "32B": Qwen2Config(152064, 5120, 27648, 64, 40, 8, 128),
}
PROMPT = 256
SPLIT, WHOLE = P("data"), P()


class Programs:
    """The sampler's programs on the first `tensor` devices of a slice, with as many slots and pages as they hold."""

    def __init__(self, size, name, tensor, layers, **settings):
        self.target = targets.find(name)
        c = QWEN[size]
        self.c = c = dataclasses.replace(c, num_hidden_layers=layers or c.num_hidden_layers)
        settings = SamplingConfig(**settings)
        self.devices = self.target.devices[:tensor]
        self.mesh = Mesh(
            np.array(self.devices).reshape(1, tensor), ("data", decoder.AXIS), axis_types=(AxisType.Auto,) * 2
        )
        layout = cache.choose_layout(c, jnp.bfloat16, self.devices[0].platform)
        self.p = p = device.Program(
            self.mesh, c, layout, settings.temperature, settings.top_k, settings.top_p, jnp.dtype(jnp.bfloat16)
        )
        self.demand = Demand(c, settings, layout, 2, tensor, PROMPT)
        free = SHARE * self.target.memory - weight_bytes(c, 2, tensor)
        self.plan = self.demand.plan(100_000, free)

        model = nnx.eval_shape(lambda: Qwen2(c, param_dtype=jnp.bfloat16))
        weights = jax.eval_shape(lambda params: device.decode_weights(p, params), nnx.state(model, nnx.Param))
        specs = jax.tree.leaves(decoder.specs(c, tensor, layout), is_leaf=lambda x: isinstance(x, P))
        leaves, tree = jax.tree.flatten(weights)
        self.weights = tree.unflatten([self.like(x, spec) for x, spec in zip(leaves, specs, strict=True)])
        pool, slots = jax.eval_shape(device.empty, p, self.plan.slots, self.plan.pages)
        self.pool = jax.tree.map(lambda x: self.like(x, p.cache_spec), pool)
        self.slots = jax.tree.map(lambda x: self.like(x, SPLIT), slots)

    def like(self, x, spec):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(self.mesh, spec))

    def int32(self, *shape, spec=SPLIT):
        return self.like(jax.ShapeDtypeStruct(shape, jnp.int32), spec)

    def bytes(self, tree):
        """On each device."""
        return sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    def decode(self):
        table = self.int32(self.plan.slots, cache.pages_of(self.plan.length, self.p.layout))
        rest = table, self.int32(2, spec=WHOLE), self.int32(1), self.int32(spec=WHOLE)
        return device.decode.trace(self.p, self.plan.length, self.weights, self.pool, self.slots, *rest)

    def decode_drafts(self, slots, drafts=63):
        of_slots = jax.tree.map(
            lambda x: self.like(jax.ShapeDtypeStruct((slots, *x.shape[1:]), x.dtype), SPLIT), self.slots
        )
        table = self.int32(slots, cache.pages_of(self.plan.length, self.p.layout))
        number, ends = self.int32(spec=WHOLE), self.int32(2, spec=WHOLE)
        rest = self.int32(slots, self.plan.length), table, ends, self.int32(1), number, number
        return device.decode_drafts.trace(self.p, drafts, self.weights, self.pool, of_slots, *rest)

    def prefill(self, time=PROMPT):
        return device.prefill.trace(self.p, self.weights, self.int32(PREFILL, time), self.int32(PREFILL))

    def insert_pages(self):
        prompts = jax.tree.map(lambda x: self.like(x, P("data", None, decoder.AXIS)), self.prefill().out_info)
        return device.insert.trace(self.p, self.pool, prompts, self.int32(bucket(self.plan.slots, 64), 2))


def compiled(traced, quick=True):
    return traced.lower().compile({"optimization_level": 9} if quick else None)  # as in targets.py


def kernels(text, name):
    return len(re.findall(rf'%{name}\S* = .*custom_call_target="tpu_custom_call"', text))


def assert_in_place(programs, text, memory):
    """The pool that comes in is the one that goes out, and no part of it is copied on the way."""
    pool = programs.bytes(programs.pool)
    assert memory.alias_size_in_bytes >= pool
    shape = programs.pool[0][0].sharding.shard_shape(programs.pool[0][0].shape)
    assert f"bf16[{','.join(map(str, shape))}]" in text
    for view in (shape, (np.prod(shape[:3]), shape[3]), (np.prod(shape[:3]), *shape[3:])):
        assert not re.search(rf"= bf16\[{','.join(map(str, view))}\]\S* (copy|transpose|copy-start)\(", text)


def assert_decodes(programs, quick=True):
    traced = programs.decode()
    chip = programs.devices[0]
    grids = re.findall(r"grid=\((\d+), \d+\)(?:(?!grid=).)*?name=paged_attention", str(traced.jaxpr), re.DOTALL)
    assert grids and set(map(int, grids)) == {chip.num_cores}, "each core of a chip attends"
    program = compiled(traced, quick)
    text, memory = program.as_text(), program.memory_analysis()
    width = cache.pages_of(programs.plan.length, programs.p.layout)
    calls = -(-programs.plan.slots // (tpu.TABLE // width))
    assert kernels(text, "paged_attention") == calls * programs.c.num_hidden_layers
    assert_in_place(programs, text, memory)
    # What comes out beside the pool, and what the compiler puts aside, is reckoned as slots' work.
    weights, peak = programs.bytes(programs.weights), memory.peak_memory_in_bytes
    assert weights == pytest.approx(weight_bytes(programs.c, 2, programs.p.tensor), rel=0.01)
    assert weights + programs.bytes(programs.pool) < peak <= weights + programs.demand.bytes(programs.plan)
    assert peak <= 0.93 * programs.target.memory
    assert programs.plan.slots >= 64
    return peak


CASES = [("1.5B", "v5p-8", 1), ("1.5B", "v6e-1", 1), ("0.5B", "v5e-1", 1), ("7B", "v5e-4", 4), ("32B", "v6e-8", 8)]
FULL = [(*case, 4000) for case in [*CASES, ("3B", "v5p-8", 1), ("32B", "v5e-8", 8)]]
FULL += [("1.5B", "v5e-1", 1, 32512), ("3B", "v5p-8", 1, 32512), ("7B", "v6e-4", 4, 32512)]


@needs_libtpu
@pytest.mark.parametrize("size, name, tensor", CASES)
def test_decoding(size, name, tensor):
    """Few layers, each with more pages; without top-k, which takes the compiler most of its time."""
    assert_decodes(Programs(size, name, tensor, layers=2, top_k=0))


@needs_libtpu
@pytest.mark.parametrize("size, name, slots", [("1.5B", "v5e-1", 64), ("1.5B", "v5p-8", 16), ("0.5B", "v6e-1", 16)])
def test_guessing(size, name, slots):
    """Few layers, each with more pages: a kernel for several new tokens, which are written where the pool lies."""
    programs = Programs(size, name, 1, layers=2, top_k=0)
    program = compiled(programs.decode_drafts(slots))
    text, memory = program.as_text(), program.memory_analysis()
    assert kernels(text, "paged_attention_several") == 2
    assert_in_place(programs, text, memory)
    assert memory.peak_memory_in_bytes <= 0.93 * programs.target.memory


@pytest.fixture(scope="module")
def whole():
    return Programs("1.5B", "v5e-1", 1, layers=None)


@needs_libtpu
def test_decoding_with_all_layers_and_top_k(whole):
    assert assert_decodes(whole) > 0.75 * whole.target.memory
    assert whole.plan.slots == 1024


@needs_libtpu
def test_prompts(whole):
    program = compiled(whole.prefill())
    assert kernels(program.as_text(), "splash") == whole.c.num_hidden_layers - 1
    program = compiled(whole.insert_pages())
    memory = program.memory_analysis()
    assert_in_place(whole, program.as_text(), memory)
    assert memory.temp_size_in_bytes < whole.bytes(whole.pool) / whole.c.num_hidden_layers


@needs_libtpu
def test_taking_weights_as_they_are_given_up():
    """A host's devices read a model split over them and share it in another way to sample: they hold as much as is
    reckoned, which fits, and both models whole would not."""
    target = targets.find("v5e-8")
    c, tensor = QWEN["32B"], len(target.devices)
    read = make_mesh(MeshConfig(fsdp=tensor), target.devices)
    mesh = Mesh(np.array(target.devices).reshape(1, tensor), ("data", decoder.AXIS), axis_types=(AxisType.Auto,) * 2)
    params = nnx.state(nnx.eval_shape(lambda: Qwen2(c, param_dtype=jnp.bfloat16)), nnx.Param)
    of_model, shardings = by_path(params), param_shardings(c, read)
    for path, x in of_model.items():
        of_model[path] = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[path])

    def size(x):
        return np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize

    left, made, most = sum(map(size, of_model.values())), 0, 0
    for part, paths in decoder.parts(c).items():
        count = decoder.layers_at_once(c, 2, part)
        taken = {path: of_model[path] for path in paths}
        make = device._decode_part(mesh, c, jnp.dtype(jnp.bfloat16), "tpu", part, count)
        memory = compiled(make.trace(taken, 0)).memory_analysis()
        pieces = c.num_hidden_layers // count if part.startswith("layers/") else 1
        made += pieces * memory.output_size_in_bytes
        most = max(most, left + made + memory.temp_size_in_bytes)
        left -= sum(map(size, taken.values()))
    assert most == pytest.approx(decoder.loading_bytes(c, 2, tensor, tensor), rel=0.03)
    assert most < SHARE * target.memory < target.memory < 2 * c.parameters / tensor + made


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("size, name, tensor, tokens", FULL)
def test_decoding_in_full(size, name, tensor, tokens):
    """All layers, as the compiler does it for real. Long responses have tables that the kernel takes in parts."""
    programs = Programs(size, name, tensor, layers=None, max_tokens=tokens)
    assert_decodes(programs, quick=False)
    program = compiled(programs.prefill(2048), quick=False)
    assert program.memory_analysis().peak_memory_in_bytes + programs.bytes(programs.pool) <= programs.target.memory


# ---- what the kernel computes, on a CPU --------------------------------------------------------------------------


@pytest.mark.parametrize("heads, kv_heads, head_dim, cores", [(6, 2, 128, 1), (7, 1, 64, 2)])
def test_attention_to_pages_is_that_of_the_plain_form(heads, kv_heads, head_dim, cores, monkeypatch):
    """Responses that end a page, begin one, and take several items of pages; idle slots; more items than there is room
    for at once, chunks that are not full, a table that is taken in two parts."""
    size, room, chunk = cache.page_size("tpu"), 768, 4
    monkeypatch.setattr(tpu, "CHUNK", chunk)
    monkeypatch.setattr(tpu, "TABLE", 9 * room // size)
    monkeypatch.setattr(tpu, "ROUND", 4 * tpu.PAGES * math.prod(tpu.page_shape(kv_heads, size, head_dim)))  # two items
    position = np.array([63, 5, 64, 300, 255, 256, 767, 0, 511, 512, 90], np.int32)
    live = np.ones(position.size, bool)
    live[[1, 9]] = False  # the latter is all that one of two cores has of the second part
    slots, pages = len(position), int((position // size + 1)[live].sum()) + 5
    draw = np.random.RandomState(0)
    random = lambda *shape: jnp.asarray(draw.standard_normal(shape), jnp.bfloat16)  # noqa: E731
    plain = random(slots, kv_heads, head_dim, room), random(slots, kv_heads, room, head_dim)
    paged = [np.array(random(pages, kv_heads, size, head_dim)) for _ in plain]
    table, free = np.full((slots, room // size), pages - 1, np.int32), draw.permutation(pages).tolist()
    for slot in np.flatnonzero(live):
        for i in range(position[slot] // size + 1):
            table[slot, i] = page = free.pop()
            part = slice(i * size, (i + 1) * size)
            paged[0][page] = plain[0][slot, :, :, part].swapaxes(1, 2)
            paged[1][page] = plain[1][slot, :, part]
    rope = rope_table(jnp.asarray(position), head_dim, 1e6)
    columns = (heads + 2 * kv_heads) * head_dim
    rest = random(slots, columns), random(columns), rope, heads
    place = cache.Place(jnp.asarray(position), jnp.asarray(live), jnp.asarray(table), room)
    (keys, values), expected = cache.attend(plain, "plain", *rest, place)

    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(num_cores_or_threads=cores, detect_races=True)):
        layer = (tpu.pages(*map(jnp.asarray, paged)),)
        place = cache.planned(place._replace(cores=cores), "tpu", [layer])
        (new,), out = jax.block_until_ready(cache.attend(layer, "tpu", *rest, place))
    assert len(place.items) == 2 and not interpreted.races.races_found
    difference = np.abs(np.float32(out) - np.float32(expected))[live]
    assert difference.max() < 0.02 * np.abs(np.float32(expected)).max() and difference.mean() < 2e-3
    # The newest of each response is written, and nothing else; they were rounded once, and in the plain form twice.
    for slot in np.flatnonzero(live):
        page, offset = table[slot, position[slot] // size], position[slot] % size
        paged[0][page, :, offset] = keys[slot, :, :, position[slot]]
        paged[1][page, :, offset] = values[slot, :, position[slot]]
    theirs = np.float32(tpu.pages(*map(jnp.asarray, paged)))
    np.testing.assert_allclose(np.float32(new), theirs, rtol=2**-6, atol=2**-6)
    assert (np.float32(new) != theirs).sum() < 0.5 * live.sum() * columns


@pytest.mark.parametrize("heads, kv_heads, head_dim, cores", [(6, 2, 128, 1), (14, 1, 64, 2)])
def test_attention_of_several_new_tokens_is_that_of_one_after_the_other(heads, kv_heads, head_dim, cores, monkeypatch):
    """Tokens that begin a page and an item of pages, an idle slot, rows that are nobody's, a table taken in parts."""
    size, room = 16, 128
    monkeypatch.setattr(cache, "page_size", {"tpu": size}.get)
    monkeypatch.setattr(tpu, "CHUNK", 2)
    monkeypatch.setattr(tpu, "TABLE", 3 * room // size)
    monkeypatch.setattr(tpu, "ROUND", 4 * tpu.PAGES * math.prod(tpu.page_shape(kv_heads, size, head_dim)))  # two items
    position, share = np.array([13, 61, -1, 15, 0]), np.array([5, 5, 0, 1, 4])
    slots, pages, live = len(position), 5 * room // size + 3, share > 0
    draw = np.random.RandomState(0)
    random = lambda *shape: jnp.asarray(draw.standard_normal(shape), jnp.bfloat16)  # noqa: E731
    table = jnp.asarray(draw.permutation(pages)[: slots * room // size].reshape(slots, -1), jnp.int32)
    layer = plain = random(slots, kv_heads, head_dim, room), random(slots, kv_heads, room, head_dim)
    paged = [np.zeros((pages, kv_heads, size, head_dim), np.float32) for _ in plain]

    def copy(keys, values):
        for slot, i in np.ndindex(*table.shape):
            part = slice(i * size, (i + 1) * size)
            paged[0][table[slot, i]] = np.float32(keys)[slot, :, :, part].swapaxes(1, 2)
            paged[1][table[slot, i]] = np.float32(values)[slot, :, part]
        return tpu.pages(*(jnp.asarray(x, jnp.bfloat16) for x in paged))

    pool = copy(*plain)
    columns, count = (heads + 2 * kv_heads) * head_dim, 20
    qkv, bias = random(count, columns), random(columns)
    first, expected, at = np.cumsum(share) - share, {}, jnp.asarray(np.maximum(position, 0))

    @jax.jit
    def one(layer, qkv, position, more):
        rope, place = rope_table(position, head_dim, 1e6), cache.Place(position, more, table, room)
        new, out = cache.attend(layer, "plain", qkv, bias, rope, heads, place)
        return tuple(jnp.where(more[:, None, None, None], a, b) for a, b in zip(new, layer, strict=True)), out

    for nth in range(share.max()):
        row, more = first + nth, share > nth
        layer, out = one(layer, qkv[np.minimum(row, count - 1)], at + nth, more)
        expected |= {row[slot]: np.float32(out)[slot] for slot in np.flatnonzero(more)}

    parts = []

    @jax.jit
    def several(pool, qkv, share):
        rows = share_out(share, count, heads // kv_heads)
        rope = rope_table(at[rows.slot] + rows.nth, head_dim, 1e6)
        place = cache.Place(at, jnp.asarray(live), table, 0, cores, rows=rows)
        place = cache.planned(place, "tpu", [(pool,)])
        parts.extend(place.items)
        return cache.attend((pool,), "tpu", qkv, bias, rope, heads, place)

    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(num_cores_or_threads=cores, detect_races=True)):
        (new,), out = jax.block_until_ready(several(pool, qkv, jnp.asarray(share, jnp.int32)))
    assert len(parts) > 1 and not interpreted.races.races_found and sorted(expected) == list(range(share.sum()))
    out = np.float32(out)
    difference = np.abs(out[: share.sum()] - np.array([expected[row] for row in sorted(expected)]))
    assert difference.max() < 0.02 * np.abs(out).max() and difference.mean() < 2e-3 and not out[share.sum() :].any()
    theirs = np.float32(copy(*layer))
    np.testing.assert_allclose(np.float32(new), theirs, rtol=2**-6, atol=2**-6)
    assert (np.float32(new) != theirs).sum() < 0.5 * share.sum() * columns


def test_sampling_from_pages(monkeypatch):
    """The whole sampler with the kernels, its slots refilled: log-probabilities are those of the model."""
    monkeypatch.setattr(cache, "page_size", {"tpu": 16}.get)  # of which prompts take up to two
    config = dataclasses.replace(TIED, num_hidden_layers=1)
    model = random_model(config, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    monkeypatch.setattr(sampler_module, "TRIED", 50)  # then with no guesses
    settings = SamplingConfig(temperature=0.9, top_k=20, max_tokens=5, slots=4, drafts=2)
    sampler = Sampler(config, settings, (), dtype=jnp.bfloat16, layout="tpu")
    sampler.load(params_of(model))
    requests = some_requests(samples=1, count=6)
    pltpu.set_tpu_interpret_mode()  # for all threads
    try:
        completions = run(sampler, requests)
    finally:
        pltpu.set_tpu_interpret_mode(None)
    error = [completions[key].logprobs - row for key, row in forced(model, requests, completions, 0.9).items()]
    assert 1e-4 < np.abs(np.concatenate(error)).mean() < 0.02
