"""What a TPU's compiler says of the time of a decode step, on a machine with no TPU.

    python tools/tpu_cycles.py --target v6e-1 --size 1.5B --slots 1024 --positions 440

libtpu schedules every instruction when it compiles, so a kernel's cycles are the length of its code times the rounds of
its loops. What is not in them: waiting for memory, so beside the cycles stands what a step must read at the chip's
bandwidth; and what `lax.cond` chooses from, as the draw does where logits are tied. The flags that make libtpu write
its schedule down are its own, for debugging, and may go. Matrix products come out up to 5% faster than
the makers' FLOP/s allow, so no figure is more exact than that.

One and two layers are compiled, and the difference is taken for each of the others.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Of each device: GHz, reckoned from the makers' FLOP/s, and their TB/s (a v4's or v5p's device is a chip of two cores).
CHIPS = {"v4": (1.05, 1.2), "v5e": (1.5, 0.819), "v5p": (1.75, 2.765), "v6e": (1.75, 1.64)}
LINE = re.compile(r"\s*(?:0x)?[0-9a-f]+\s*(LB|LH|LE|PB|PF|CT)?:\s*(>*)")
TRIPS = re.compile(r"= scmp\.\w+\.s32\.totalorder [^/]*, (\d+) /\* loop exit test")
INSTRUCTION = re.compile(r"^ *(?:ROOT )?%([\w.-]+) = ", re.MULTILINE)


def kernel_cycles(schedule: str, rounds: float) -> float:
    """Cycles of one kernel's schedule; rounds: of loops whose number is not in the code."""
    depth, begins, trips, stages = [], [], {}, defaultdict(int)
    for line in schedule.splitlines():
        if not (found := LINE.match(line)):
            continue
        delay = depth and re.search(r":\s*\{\s*\}", line)  # a branch's delay slots are printed without their depth
        depth.append(depth[-1] if delay else len(found[2]))
        if found[1] == "LB":
            begins.append(len(depth) - 1)
        # A pipelined loop has a round more for each stage after the first, in which most of the code is skipped.
        for stage in re.findall(r"iteration index, stage = (\d)", line):
            stages[begins[-1]] = max(stages[begins[-1]], int(stage))
        if test := TRIPS.search(line):
            trips[len(depth) - 1] = int(test[1])
    times, heads = [1.0] * len(depth), {(i, depth[i]) for i in begins}
    for begin in begins:
        level, end = depth[begin], begin
        while end + 1 < len(depth) and depth[end + 1] >= level and (end + 1, level) not in heads:
            end += 1
        of_loop = [trips[i] for i in range(begin, end + 1) if i in trips and depth[i] == level]
        for i in range(begin, end + 1):
            times[i] *= of_loop[-1] - stages[begin] if of_loop else rounds
    return sum(times)


def executions(text: str) -> dict[str, float]:
    """How often each instruction in a program's loops runs; a loop whose rounds are not known counts as one."""
    computations = dict(re.findall(r"^(?:ENTRY )?%([\w.-]+) [^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    callers = defaultdict(list)
    for name, lines in computations.items():
        for condition, body in re.findall(r" while\(.*condition=%([\w.-]+), body=%([\w.-]+)", lines):
            test = computations[condition]
            last = re.findall(r"= [su]32\[\]\S* constant\((\d+)\)", test)
            counted = re.search(r"ROOT .* compare\(%get-tuple-element\S*, %constant\S*\), direction=LT", test)
            callers[body].append((name, float(last[0]) if counted and len(last) == 1 else 1.0))

    def times(computation) -> float:
        return sum(n * times(caller) for caller, n in callers[computation]) if computation in callers else 1.0

    return {found: times(body) for body in list(callers) for found in INSTRUCTION.findall(computations[body])}


def account(compile, folder: Path, rounds) -> dict[tuple[str, str], float]:
    """Cycles by (name without its number, scope) of all kernels of what `compile()` compiles; rounds(name): see
    `kernel_cycles`. Kernels that run once, outside of all loops, prepare and are left out."""
    for file in folder.iterdir():
        file.unlink()
    text = compile().as_text()
    times, cycles = executions(text), defaultdict(float)
    scopes = dict(re.findall(r'%([\w.\-]+) = .*?op_name="([^"]*)"', text))
    for file in folder.glob("*-final_bundles.txt"):
        name = re.match(r"\d+-(.*)-\d+-final_bundles", file.name)
        if name and name[1] in times:
            scope = "/".join(scopes.get(name[1], "").split("/")[-3:])
            key = re.sub(r"[.\d]+$", "", name[1]), scope
            cycles[key] += times[name[1]] * kernel_cycles(file.read_text(), rounds(name[1]))
    return cycles


def decode_program(c, device, slots: int, length: int, drafts: int = 0):
    """The traced decode program of one device of a slice, with pages for all; drafts: see `SamplingConfig.drafts`."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx
    from jax.sharding import AxisType, Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from rlvd_jax.qwen2 import Qwen2
    from rlvd_jax.sampling import cache, decoder
    from rlvd_jax.sampling import slots as of_device

    mesh = Mesh(np.array([[device]]), ("data", decoder.AXIS), axis_types=(AxisType.Auto,) * 2)
    layout = cache.choose_layout(c, jnp.bfloat16, device.platform)
    p = of_device.Program(mesh, c, layout, 0.9, 50, 1.0, jnp.dtype(jnp.bfloat16))
    model = nnx.eval_shape(lambda: Qwen2(c, param_dtype=jnp.bfloat16))
    weights = jax.eval_shape(lambda x: of_device.decode_weights(p, x), nnx.state(model, nnx.Param))
    width = cache.pages_of(length, layout)
    pool, state = jax.eval_shape(of_device.empty, p, slots, slots * width // 2)
    int32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    rest = int32(slots, width), int32(2), int32(1), int32()
    rest = [weights, pool, state, *([int32(slots, length), *rest, int32()] if drafts else rest)]
    whole = NamedSharding(mesh, P())
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), rest)
    return of_device.decode_drafts.trace(p, drafts, *placed) if drafts else of_device.decode.trace(p, length, *placed)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="v6e-1", help="a slice, as of --plan --target")
    parser.add_argument("--size", choices=("0.5B", "1.5B", "3B"), default="1.5B")
    parser.add_argument("--slots", type=int, default=1024)
    parser.add_argument("--positions", type=int, default=440, help="that each response has, on average")
    parser.add_argument("--drafts", type=int, default=0, help="tokens guessed of each of up to 64, at most")
    parser.add_argument("--most", type=int, default=20, help="kernels that are named")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_hlo_deduplication_all_unique=true"
        os.environ["LIBTPU_INIT_ARGS"] = f"{flags} --xla_jf_dump_llo_pass_label_regex=final_bundles"
        import jax
        from workloads import shape

        from rlvd_jax import targets

        jax.config.update("jax_compilation_cache_dir", None)  # what is not compiled is not written down either
        target, c = targets.find(options.target), shape(options.size)
        hertz, bandwidth = CHIPS[targets.parse(options.target)[0]]
        cycles = decode(c, target.devices[0], options, Path(folder))
    total = sum(cycles.values())
    for (name, scope), n in sorted(cycles.items(), key=lambda item: -item[1])[: options.most]:
        print(f"{n:>14,.0f} {n / hertz / 1e6:>9.3f} ms {n / total:>6.1%}  {name}  {scope}")
    print(f"{total:>14,.0f} {total / hertz / 1e6:>9.3f} ms  all")
    read = 2 * c.parameters + options.slots * options.positions * c.cache_bytes(2)
    print(f"{'':>14} {read / bandwidth / 1e9:>9.3f} ms  to read weights, keys and values once")


def decode(c, device, options, folder: Path) -> dict:
    from rlvd_jax.sampling import rows, tpu
    from rlvd_jax.sampling import slots as of_device

    length, programs = -(-2 * options.positions // 64) * 64, options.slots
    if options.drafts:  # each works on some rows of a slot
        count = of_device.rows_of_step(options.slots, options.drafts)
        each = rows.tile_rows(count, options.slots, c.num_attention_heads // c.num_key_value_heads)
        programs *= -(-count // (options.slots * each))
    items = programs * (options.positions / (tpu.PAGES * 64) + 0.5)

    def rounds(name: str) -> float:  # of the kernel's rounds for a chunk of slots, and of one slot's items
        shape = tpu.Shape(c.num_attention_heads, c.num_key_value_heads, c.head_dim, 64, tpu.CHUNK, 1)
        of_chunk = items / max(1, programs / tpu.CHUNK) / shape.together
        each = {"paged_attention": of_chunk, "paged_attention_several": of_chunk, "items": items / programs}
        return each.get(name.split(".")[0], 1.0)

    def layers(n: int) -> dict:
        some = dataclasses.replace(c, num_hidden_layers=n)
        program = decode_program(some, device, options.slots, length, options.drafts)
        return account(lambda: program.lower().compile(), folder, rounds)

    one, two = layers(1), layers(2)
    more = c.num_hidden_layers - 2
    cycles = {key: two.get(key, 0) + more * (two.get(key, 0) - one.get(key, 0)) for key in one | two}
    return {key: n for key, n in cycles.items() if n > 0}


if __name__ == "__main__":
    main()
