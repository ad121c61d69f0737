"""The sampler's kernels one by one: python tools/bench_kernels.py --what products attend --rows 16 64 [--json FILE]

  products  a layer's four matrix products and the logits', by cuBLAS, with the activation in a kernel of its own, and
            in several ways by `gpu.few_rows`, or above FEW rows by `hopper.multiply`, first as it is chosen
  attend    `gpu.attend` at some (slots, positions, and new tokens of each where it is not one), in several ways
  norm      `gpu.add_norm`, by the number of parts that it adds up
  draw      `gpu.draw` of the top 50 of random logits; and from hidden states, with logits by the library, or in several
            ways by `hopper.scores`, first as `gpu.draw_hidden` has it
  step      `decoder.step` at `--rows` slots and 420 positions, without `gpu.few_rows` and with it

Each is run for as many layers as don't fit the chip's cache, in a loop on the device, and compared to its floor: the
bytes that it must read once over the bandwidth of a copy here (workloads.chip), for a product of many rows also its
FLOPs. Where a way doesn't compile, its error is shown and the next one run. The ways of all shapes take turns, those
that matter most first, until `--seconds` are over. Without a GPU: tiny sizes, step by step, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import workloads

from rlvd_jax.qwen2.layers import rope_table
from rlvd_jax.sampling import cache, decoder, gpu, hopper
from rlvd_jax.sampling.rows import share_out

INTERPRET = jax.default_backend() != "gpu"
CACHED = 2**16 if INTERPRET else 2**28  # bytes that no cache of the chip holds
LOOPS = 1 if INTERPRET else 50
SHARED = 96  # positions of the prompt, which all slots share
PRODUCTS = ("qkv", "o", "gate_up", "down", "logits")
AT = (
    [(4, 40), (4, 40, 3)]
    if INTERPRET
    else [(1024, 420), (256, 484), (64, 1000), (16, 3500), (16, 2500, 4), (8, 2500, 8), (1, 4000, 64)]
)

ONE_PART = [{"tile": 32}, {"tile": 128}, {"block": 128}, {"block": 32}, {"num_warps": 8}, {"num_stages": 3}]
IN_PARTS = [{"more": 2}, {"more": 0.5}, {"tile": 128, "more": 2}, {"block": 128}, {"num_warps": 2}, {"num_stages": 4}]
TILES = [(columns, cluster) for columns in (256, 192, 128) for cluster in (1, 2)]
GATED = [(columns, cluster) for columns in (272, 208, 144) for cluster in (1, 2)]
ATTEND = [  # the first is how it is
    {},
    {"num_stages": 2},
    {"num_stages": 4},
    {"num_warps": 2},
    {"block": 64},
    {"block": 64, "num_warps": 2},
    {"block": 64, "num_warps": 2, "num_stages": 2},
]
ATTEND_DRAFTS = [{}, *({"splits": n} for n in (4, 8, 16, 32)), {"block": 64}, {"num_warps": 2}, {"num_warps": 8}]


def shape(name: str):
    c = workloads.shape("1.5B" if name == "tiny" else name)
    if name == "tiny":
        small = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
        c = type(c)(**(vars(c) | small | {"num_attention_heads": 4, "head_dim": 32}))
    return c


def normal(i: int, *shape):
    return _normal(i, shape)


@partial(jax.jit, static_argnums=1)
def _normal(i, shape):
    return 0.02 * jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)


def copies(size: float, least: int, most: int) -> int:
    """Of how many layers' data to run, if that of one is so many bytes."""
    return max(least, min(most, math.ceil(CACHED / size)))


def looped(calls, fixed, h, layers=()) -> float:
    """Seconds of calls(fixed, h, layers) → (layers, results), the best of three times LOOPS in one program."""

    @partial(jax.jit, donate_argnums=2)
    def run(fixed, h, layers):
        def body(_, carry):
            h, layers, seen = carry
            layers, results = calls(fixed, h, layers)
            h, results = jax.lax.optimization_barrier((h, results))  # all of them are made, and anew each time
            return h, layers, seen + sum(x.ravel()[0].astype(jnp.float32) for x in results)

        return jax.lax.fori_loop(0, LOOPS, body, (h, layers, jnp.float32(0)))[1:]

    layers, _ = jax.block_until_ready(run(fixed, h, layers))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        layers, _ = jax.block_until_ready(run(fixed, h, layers))
        times.append((time.perf_counter() - start) / LOOPS)
    return min(times)


def matrices(c) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of a layer's; for kernels they lie the other way."""
    heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    return {
        "qkv": (c.hidden_size, heads + 2 * kv),
        "o": (heads, c.hidden_size),
        "gate_up": (c.hidden_size, 2 * c.intermediate_size),
        "down": (c.intermediate_size, c.hidden_size),
    }


class Case:
    """What is run in several `ways()`: its name, the bytes and FLOPs that it can't do without. `run(way)` gives the
    seconds of a call."""

    def __init__(self, name: str, bytes_: float, flops: float = 0.0):
        self.name, self.bytes, self.flops = name, bytes_, flops


def scores_ways(rows: int, k: int, vocab: int) -> list[dict]:
    """Of `hopper.scores`, first as it is chosen."""
    if not hopper.here() or not hopper.takes(rows, k, vocab):
        return []
    ours = hopper.tiling(rows, k, vocab, most_splits=1)
    return [{"tiling": t} for t in dict.fromkeys([ours, *(hopper.Tiling(*t) for t in TILES)])]


class Product(Case):
    def __init__(self, c, name: str, rows: int):
        self.k, self.n = (matrices(c) | {"logits": (c.hidden_size, c.vocab_size)})[name]
        super().__init__(f"{name} × {rows} rows", 2 * self.k * self.n, 2 * rows * self.k * self.n)
        self.rows, self.gated, self.logits, self.weights = rows, name == "gate_up", name == "logits", None

    def ways(self) -> list[dict]:
        if self.rows > gpu.FEW:
            if self.logits:
                return [{"few": False}, *scores_ways(self.rows, self.k, self.n)]
            if not hopper.here():
                return [{"few": False}]
            tiles = [hopper.Tiling(*t) for t in (GATED if self.gated else TILES)]
            if not self.gated:
                tiles = [t._replace(splits=max(1, round(x * self.splits(t)))) for x in (1, 0.5, 2) for t in tiles]
            ours = hopper.tiling(self.rows, self.k, self.n, gated=self.gated)
            return [{"tiling": ours}, {"few": False}, *({"tiling": t} for t in dict.fromkeys(tiles) if t != ours)]
        if self.logits:
            return [{"few": False}]
        return [{"few": False}, {}, *(ONE_PART if self.gated else IN_PARTS)]

    def splits(self, t: hopper.Tiling) -> int:
        """So many that most multiprocessors have a tile."""
        return max(1, hopper.cores() // (math.ceil(self.rows / hopper.ROWS) * math.ceil(self.n / t.columns)))

    def how(self, way: dict) -> dict:
        """The arguments of `few_rows`; "more": times the parts of as many columns as usual."""
        way = dict(way)
        more = way.pop("more", None)
        if more:
            way["splits"] = max(1, round(more * gpu.tiling(self.rows, self.k, self.n)["splits"]))
        return way

    def run(self, way: dict) -> float:
        if self.weights is None:
            number = 1 if self.logits else copies(self.bytes, 8, 28)
            self.weights = [normal(i, self.n, self.k) for i in range(number)]

        def call(h, w):
            if self.logits and "tiling" in way:
                return hopper.scores(h, w, temperature=0.9, cores=hopper.cores(), **way)[0]
            if "tiling" in way:
                return hopper.multiply(h, w, gated=self.gated, tiling=way["tiling"], cores=hopper.cores())
            if self.logits:
                return jnp.dot(h, w.T, preferred_element_type=jnp.float32)
            if way.get("few", True):
                return gpu.few_rows(h, w, gated=self.gated, interpret=INTERPRET, **self.how(way))
            return gpu.gated(h, w) if self.gated else gpu.product(h, w)

        def calls(weights, h, _):
            return (), [call(h, w) for w in weights]

        return looped(calls, self.weights, normal(99, self.rows, self.k)) / len(self.weights)


class Attend(Case):
    def __init__(self, c, slots: int, positions: int, fresh: int = 1):
        self.c, self.slots, self.positions, self.fresh = c, slots, positions, fresh
        shared = min(SHARED, positions)
        super().__init__(
            f"attend {slots} × {positions}{f' × {fresh}' if fresh > 1 else ''}",
            c.cache_bytes(2) / c.num_hidden_layers * (slots * (positions - shared) + shared),
        )

    def ways(self) -> list[dict]:
        return ATTEND if self.fresh == 1 else ATTEND_DRAFTS

    def run(self, way: dict) -> float:
        c, size, fresh = self.c, cache.page_size("gpu"), self.fresh
        pages, shared = -(-(self.positions + fresh) // size), min(SHARED, self.positions) // size
        own = shared + np.arange(self.slots * (pages - shared)).reshape(self.slots, -1)
        table = np.concatenate([np.tile(np.arange(shared), (self.slots, 1)), own], axis=1)
        room = c.num_key_value_heads, shared + own.size, size, c.head_dim
        position = jnp.full(self.slots, self.positions, jnp.int32)
        rows, columns = self.slots * fresh, matrices(c)["qkv"][1]
        parts = gpu.tiling(rows, c.hidden_size, columns)["splits"] if rows <= gpu.FEW else 1
        qkv = normal(98, parts, rows, columns).astype(jnp.bfloat16 if parts == 1 else jnp.float32)
        share = jnp.full(self.slots, fresh, jnp.int32)
        of = share_out(share, rows, c.num_attention_heads // c.num_key_value_heads) if fresh > 1 else None
        rope = rope_table((position[:, None] + jnp.arange(fresh)).reshape(-1), c.head_dim, c.rope_theta)
        number = copies(self.bytes, 2, 8)
        biases = [normal(97 - i, columns) for i in range(number)]  # or the library adds one up for all
        fixed = biases, (rope, position, jnp.asarray(table, jnp.int32))
        how = {"heads": c.num_attention_heads, "interpret": INTERPRET, **way}

        def calls(fixed, qkv, layers):
            results, new = [], []
            for bias, layer in zip(fixed[0], layers, strict=True):
                out, *layer = gpu.attend(qkv, bias, *fixed[1], *layer, of, **how)
                results.append(out)
                new.append(layer)
            return new, results

        layers = [[normal(2 * i, *room), normal(2 * i + 1, *room)] for i in range(number)]
        return looped(calls, fixed, qkv, layers) / number


class Draw(Case):
    def __init__(self, c, rows: int):
        self.c, self.rows = c, rows
        super().__init__(f"draw × {rows} rows", 4 * rows * c.vocab_size)

    def ways(self) -> list[dict]:
        return [{"num_warps": n} for n in (8, 16, 4)]

    def run(self, way: dict) -> float:
        logits = 100 * normal(5, self.rows, self.c.vocab_size).astype(jnp.float32)
        keys = jax.random.bits(jax.random.key(1), (self.rows, 2), jnp.uint32)

        def calls(logits, keys, _):
            return (), gpu.draw(logits, keys, 0.9, 50, interpret=INTERPRET, **way)

        return looped(calls, logits, keys)


class DrawHidden(Case):
    def __init__(self, c, rows: int):
        self.rows, self.k, self.vocab = rows, c.hidden_size, c.vocab_size
        bytes_ = 2 * self.k * self.vocab + 4 * rows * self.vocab
        super().__init__(f"draw_hidden × {rows} rows", bytes_, 2 * rows * self.k * self.vocab)

    def ways(self) -> list[dict]:
        return [{"library": True}, *scores_ways(self.rows, self.k, self.vocab)]

    def run(self, way: dict) -> float:
        def calls(fixed, hidden, _):
            table, keys = fixed
            if "tiling" in way:
                logits, *stats = hopper.scores(hidden, table, temperature=0.9, cores=hopper.cores(), **way)
            else:
                logits, stats = jnp.dot(hidden, table.T, preferred_element_type=jnp.float32), None
            return (), gpu.draw(logits, keys, 0.9, 50, stats=stats, interpret=INTERPRET)

        keys = jax.random.bits(jax.random.key(1), (self.rows, 2), jnp.uint32)
        hidden = 128 * normal(0, self.rows, self.k)  # logits of a deviation of 2
        return looped(calls, (normal(1, self.vocab, self.k), keys), hidden)


class Norm(Case):
    def __init__(self, c, rows: int):
        self.c, self.rows = c, rows
        super().__init__(f"add_norm × {rows} rows", 6 * rows * c.hidden_size)

    def ways(self) -> list[dict]:
        return [{"parts": parts, "num_warps": warps} for parts in (1, 5) for warps in (4, 8, 16)]

    def run(self, way: dict) -> float:
        hidden, dtype = self.c.hidden_size, jnp.bfloat16 if way["parts"] == 1 else jnp.float32

        def calls(fixed, x, _):  # one after the other, as in a step
            for _ in range(8):
                x, _ = gpu.add_norm(x, *fixed, eps=1e-6, num_warps=way["num_warps"], interpret=INTERPRET)
            return (), [x]

        fixed = normal(1, way["parts"], self.rows, hidden).astype(dtype), normal(2, hidden)
        return looped(calls, fixed, normal(0, self.rows, hidden)) / 8


class Step(Case):
    def __init__(self, c, slots: int, positions: int):
        self.c, self.slots, self.positions = c, slots, positions
        embedding = 2 * c.vocab_size * c.hidden_size  # read for the logits, which are not made here
        super().__init__(
            f"step {slots} × {positions}", 2 * c.parameters - embedding + slots * positions * c.cache_bytes(2)
        )

    def ways(self) -> list[dict]:
        return [{"few": False}, {"few": True}]

    def run(self, way: dict) -> float:
        c, layout = self.c, "interpret" if INTERPRET else "gpu"
        size = cache.page_size(layout)
        pages = -(-(self.positions + 1) // size)
        table = jnp.arange(self.slots * pages, dtype=jnp.int32).reshape(self.slots, pages)
        (room, _) = cache.shapes(c, layout, c.num_key_value_heads, self.slots, self.slots * pages)
        position = jnp.full(self.slots, self.positions, jnp.int32)
        place = cache.Place(position, jnp.ones(self.slots, bool), table, self.positions + 1)
        shapes = {name: (n, k) for name, (k, n) in matrices(c).items()}
        shapes |= {"qkv_bias": shapes["qkv"][:1], "input_norm": (c.hidden_size,), "post_norm": (c.hidden_size,)}

        each = [{name: normal(i, *s) for name, s in shapes.items()} for i in range(c.num_hidden_layers)]
        weights = {"layers": each, "embedding": normal(1, 64, c.hidden_size), "final_norm": normal(2, c.hidden_size)}
        layers = [(normal(3, *room), normal(4, *room)) for _ in each]

        def calls(weights, tokens, layers):
            layers, hidden = decoder.step(c, 1, layout, weights, layers, tokens, place)
            return layers, [hidden]

        jax.clear_caches()  # kernels that were traced with another FEW
        with mock.patch.object(gpu, "FEW", gpu.FEW if way["few"] else 0):
            return looped(calls, weights, jnp.arange(self.slots, dtype=jnp.int32) % 64, layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ("products", "attend", "norm", "step", "draw")
    parser.add_argument("--what", nargs="+", default=kinds[:3], choices=kinds)
    parser.add_argument("--shape", default="tiny" if INTERPRET else "1.5B", choices=("tiny", "0.5B", "1.5B", "3B"))
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--products", nargs="+", default=PRODUCTS, choices=PRODUCTS)
    parser.add_argument("--at", nargs="+", help="of attend, such as 1024x420")
    parser.add_argument("--seconds", type=float, default=90, help="after which no way is begun any more")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    bytes_per_s, flops_per_s = workloads.chip()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: ", end="")
    print(f"copy {bytes_per_s / 1e12:.2f} TB/s, bfloat16 product {flops_per_s / 1e12:.0f} TFLOP/s", flush=True)
    c = shape(args.shape)
    at = [tuple(map(int, x.split("x"))) for x in args.at] if args.at else AT
    cases: list[Case] = []
    if "step" in args.what:
        cases += [Step(c, rows, 40 if INTERPRET else 420) for rows in args.rows]
    if "products" in args.what:
        cases += [Product(c, name, rows) for rows in args.rows for name in args.products]
    if "attend" in args.what:
        cases += [Attend(c, *x) for x in at]
    if "draw" in args.what:
        cases += [DrawHidden(c, rows) for rows in args.rows] + [Draw(c, rows) for rows in args.rows]
    if "norm" in args.what:
        cases += [Norm(c, rows) for rows in args.rows]
    results, begun, left_out = [], time.perf_counter(), 0
    turns = [(i, case, way) for case in cases for i, way in enumerate(case.ways())]
    for _, case, way in sorted(turns, key=lambda turn: turn[0]):
        if time.perf_counter() - begun > args.seconds:
            left_out += 1
            continue
        start = time.perf_counter()
        try:
            seconds = case.run(way)
        except Exception as error:  # too much shared memory, or what the compiler can't do
            print(f"{case.name:22} {way}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            results.append({"case": case.name, "way": way, "error": str(error)})
            continue
        floor = max(case.bytes / bytes_per_s, case.flops / flops_per_s)
        result = {"case": case.name, "way": way, "us": 1e6 * seconds, "share": floor / seconds}
        result |= {"tb_per_s": case.bytes / seconds / 1e12, "took": time.perf_counter() - start}
        results.append(result)
        print(
            f"{case.name:22} {result['us']:8.2f} µs {result['tb_per_s']:6.2f} TB/s {result['share']:4.0%} of the floor"
            f"  {way}  ({result['took']:.1f} s)",
            flush=True,
        )
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))
    print(f"\n{left_out} ways not begun in {args.seconds:.0f} s. The first way, and the best:")
    for case in cases:
        found = [r for r in results if r["case"] == case.name and "us" in r]
        if found:
            first, best = found[0], min(found, key=lambda r: r["us"])
            print(f"{case.name:22} {first['us']:8.2f} {first['way']} → {best['us']:8.2f} µs {best['way']}")


if __name__ == "__main__":
    main()
