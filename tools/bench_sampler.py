"""How fast the sampler is: python tools/bench_sampler.py --shape 1.5B --lists W_MAIN W_ONE [--profile] [--json FILE]

Times `Sampler.sample`, the code that a study runs, on the frozen lists of workloads.py with random weights, each
response ending at its listed length. Each list runs once to compile and `--repeat` times to be measured. Prints
tokens a second, the time of a decode step, the share of the physical floor (of this chip, as measured here first),
memory, and compilation. `--profile` adds where the time of a step goes, by kernel, on an accelerator.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax
import jax.numpy as jnp
import traces
import workloads
from flax import nnx

from rlvd_jax.config import SamplingConfig
from rlvd_jax.qwen2 import Qwen2
from rlvd_jax.sampling import Request, Sampler
from rlvd_jax.sampling import sampler as sampler_module

PARTS = {  # of a step, by words in the names of kernels
    "attention": ("attend", "fmha", "sdpa", "paged"),
    "draw": ("block_stats", "draw_top_k", "select_kernel", "stats_kernel", "sort", "topk"),
    "matrix products": ("nvjet", "gemm", "cutlass", "cublas", "dot", "scores", "splitK"),
    "copies": ("memcpy", "Memcpy", "memset"),
}


def part(kernel: str) -> str:
    return next((name for name, words in PARTS.items() if any(w in kernel for w in words)), "elementwise")


def requests(name: str, times: int = 1) -> list[Request]:
    return [
        Request(prompt, i, tuple(range(len(lengths))), tuple(lengths))
        for i, (prompt, lengths) in enumerate(times * workloads.lists(name))
    ]


def run(sampler: Sampler, wanted: list[Request], seed: int) -> tuple[float, int]:
    """(seconds, tokens)"""
    start, tokens = time.perf_counter(), 0
    for completion in sampler.sample(wanted, seed):
        tokens += len(completion.tokens)
    return time.perf_counter() - start, tokens


def profile(sampler: Sampler, wanted: list[Request], share: float) -> dict:
    """Time on the device by kernel, in the first round that begins after a share of the tokens is drawn."""
    folder = tempfile.mkdtemp()
    plan = sampler.plan(max(len(r.prompt) for r in wanted), sum(len(r.samples) for r in wanted))
    left = share * sum(sum(r.limits) for r in wanted)
    began, drawn = None, 0
    run = sampler_module._Run(sampler, wanted, 2, plan)
    for groups, _ in run.rounds():  # the devices are idle here
        if began is not None:
            break
        drawn += sum(int(g.count.sum()) for g in groups)
        if drawn > left:
            jax.profiler.start_trace(folder)
            began = time.perf_counter()
    if began is None:
        return {"steps": 0, "kernels": []}
    seconds = time.perf_counter() - began
    jax.profiler.stop_trace()
    found = traces.kernels(folder)
    steps = max((count for name, _, count in found if "attend" in name), default=0) / sampler.config.num_hidden_layers
    return {"steps": steps, "slots": run.slots, "seconds": seconds, "kernels": found}


def show(found: dict, rows: int = 24) -> None:
    if not found["steps"]:
        print("    nothing was traced")
        return
    steps = found["steps"]
    by_part = collections.Counter()
    for name, ms, _ in found["kernels"]:
        by_part[part(name)] += ms
    total = sum(by_part.values())
    print(f"    {steps:.0f} steps of {found['slots']} slots, {1e3 * found['seconds'] / steps:.2f} ms each,", end=" ")
    print(f"of it {total / steps:.2f} ms of kernels:", end=" ")
    print(", ".join(f"{name} {ms / steps:.2f} ({ms / total:.0%})" for name, ms in by_part.most_common()))
    for name, ms, count in found["kernels"][:rows]:
        print(f"    {ms / steps * 1e3:9.1f} µs {count / steps:7.1f}×  {name[:100]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.5B", choices=("0.5B", "1.5B", "3B"))
    parser.add_argument(
        "--lists", nargs="+", default=["W_FIX256", "W_FIX1K", "W_ONE", "W_MAIN"], choices=workloads.NAMES
    )
    parser.add_argument("--max-tokens", type=int, default=2048, help="what the sampler must have room for")
    parser.add_argument("--slots", type=int)
    parser.add_argument("--times", type=int, default=1, help="how often each list is drawn, as one, for several GPUs")
    parser.add_argument("--devices", type=int, help="use the first so many; else all")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument(
        "--profile", type=float, nargs="?", const=0.4, metavar="SHARE", help="after this share of the tokens (0.4)"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    compiling = collections.Counter()
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiling.update({"s": seconds, "n": 1}) if "backend_compile" in event else None
    )
    bytes_per_s, flops_per_s = workloads.chip()
    devices = jax.devices()[: args.devices]
    device = devices[0]
    print(f"{device.device_kind} × {len(devices)}, jax {jax.__version__}: ", end="")
    print(f"copy {bytes_per_s / 1e12:.2f} TB/s, bfloat16 product {flops_per_s / 1e12:.0f} TFLOP/s", flush=True)
    c = workloads.shape(args.shape, max(4096, args.max_tokens + 128))
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    params = jax.jit(lambda: nnx.split(Qwen2(c, nnx.Rngs(0), dtype=dtype, param_dtype=dtype), nnx.Param)[1])()
    settings = SamplingConfig(temperature=0.9, top_k=50, top_p=1.0, max_tokens=args.max_tokens, slots=args.slots)
    sampler = Sampler(c, settings, (), devices=devices, dtype=dtype)
    sampler.load(params)
    del params
    results = []
    for name in args.lists:
        wanted = requests(name, args.times)
        compiling.clear()
        first, _ = run(sampler, wanted, 0)
        compiled = dict(compiling)
        timed = []
        while len(timed) < args.repeat:  # those in which nothing was compiled
            compiling.clear()
            result = *run(sampler, wanted, 1 + len(timed)), dict(sampler.counts)
            timed += [] if compiling else [result]
        seconds, tokens, counts = min(timed, key=lambda result: result[0])
        slots = counts["slots"]
        lists = -(-args.times // len(devices)) * workloads.lists(name)  # of each device
        floor = len(devices) * workloads.list_floor(c, lists, slots, bytes_per_s, flops_per_s)
        stats = device.memory_stats() or {}
        result = {
            "shape": args.shape,
            "list": name,
            "times": args.times,
            "device": device.device_kind,
            "devices": len(devices),
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "share_of_floor": tokens / seconds / floor,
            "milliseconds_per_step": 1e3 * seconds / counts["steps"],
            **counts,
            "peak_memory": stats.get("peak_bytes_in_use"),
            "first_run_seconds": first,
            "compile_seconds": compiled.get("s", 0.0),
            "programs_compiled": compiled.get("n", 0),
        }
        print(
            f"{args.shape} {name}{f' × {args.times}' if args.times > 1 else ''}: {result['tokens_per_second']:,.0f} "
            f"tokens/s, {result['share_of_floor']:.0%} of the floor ({floor:,.0f}); {seconds:.2f} s, "
            f"{counts['steps']} steps of {result['milliseconds_per_step']:.2f} ms, {counts['rounds']} rounds, "
            f"{slots} slots, {counts['given_up']} given up, peak "
            f"{(result['peak_memory'] or 0) / 2**30:.1f} GiB; first {first:.1f} s, "
            f"{result['programs_compiled']:.0f} programs, which took compilers {result['compile_seconds']:.1f} s",
            flush=True,
        )
        if args.profile:
            result["profile"] = profile(sampler, wanted, args.profile)
            show(result["profile"])
        results.append(result)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
