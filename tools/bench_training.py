"""How fast an update is: python tools/bench_training.py --shape 1.5B --rows 8 --tokens 2048 [--packed] [--json FILE]

Times `Trainer.update`, the code that GRPO and SFT run, on random weights: float32 master weights and AdamW, bfloat16
arithmetic on accelerators. As in SFT's loop, each update is handed to the devices without waiting for the one before;
seconds are those of `--repeat` updates, from the first one handed over to the end of the last, after one that warms up.
Rows are full, each one example, or with `--packed` hold responses of lognormal lengths. On several devices rows are
split over them, and with `--fsdp` the weights too.
Prints tokens a second, model FLOP utilisation (6 FLOPs a parameter and token and the causal half of attention,
recomputation not counted, over the chip's rate for a bfloat16 product, measured here first), memory and compilation.
`--profile` adds where the time goes, by kernel, on an accelerator.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax
import jax.numpy as jnp
import numpy as np
import traces
import workloads
from flax import nnx

from rlvd_jax.config import MeshConfig, OptimizerConfig
from rlvd_jax.qwen2 import Qwen2
from rlvd_jax.qwen2.mesh import make_mesh
from rlvd_jax.training.batches import Example, pack, token_weights
from rlvd_jax.training.loss import Objective
from rlvd_jax.training.step import Trainer


def examples(rows: int, tokens: int, packed: bool, grpo: bool) -> list[Example]:
    draw = np.random.RandomState(0)
    if packed:  # until the rows are nearly full
        lengths = []
        while sum(lengths) < 0.95 * rows * tokens:
            lengths.append(int(np.clip(np.exp(np.log(500.0) - 0.18 + 0.6 * draw.standard_normal()), 64, tokens)))
        lengths.pop()
    else:
        lengths = [tokens] * rows
    out = []
    for i, n in enumerate(lengths):
        prompt, response = draw.randint(0, workloads.TEXT_TOKENS, 32), draw.randint(0, workloads.TEXT_TOKENS, n - 32)
        drawn = {"logp": np.full(n - 32, -12.0, np.float32), "advantage": (-1.0) ** i} if grpo else {}
        out.append(Example(prompt, response, **drawn))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.5B", choices=("0.5B", "1.5B", "3B"))
    parser.add_argument("--objective", default="sft", choices=("sft", "grpo"))
    parser.add_argument("--rows", type=int, default=8, help="of the batch, on each device")
    parser.add_argument("--tokens", type=int, default=2048, help="of a row")
    parser.add_argument("--micro-rows", type=int, nargs="+", default=[4], help="on each device at a time")
    parser.add_argument("--unroll", action="store_true", help="each layer compiled by itself")
    parser.add_argument("--memory", type=float, metavar="GIB", help="that an update may use; else what the GPU has")
    parser.add_argument("--packed", action="store_true", help="several examples a row")
    parser.add_argument("--devices", type=int, metavar="N", help="use the first N; else all")
    parser.add_argument("--fsdp", type=int, default=1, help="devices that the weights are split over")
    parser.add_argument("--repeat", type=int, default=8)
    parser.add_argument(
        "--profile", action="store_true", help="of `--repeat` more updates in a row, by update and device"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    _, flops_per_s = workloads.chip()
    devices = jax.devices()[: args.devices]
    device = devices[0]
    product = f"bfloat16 product {flops_per_s / 1e12:.0f} TFLOP/s"
    print(f"{device.device_kind} × {len(devices)}, jax {jax.__version__}: {product}")
    c = workloads.shape(args.shape, max(4096, args.tokens))
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    mesh = make_mesh(MeshConfig(fsdp=args.fsdp), devices)
    results = []
    for micro_rows in args.micro_rows:
        objective = Objective() if args.objective == "grpo" else None
        memory = args.memory and args.memory * 2**30
        trainer = Trainer(c, dtype, mesh, OptimizerConfig(), objective, unroll=args.unroll, memory=memory)
        shardings = trainer.shardings.params
        make = jax.jit(lambda: nnx.split(Qwen2(c, nnx.Rngs(0), dtype=dtype), nnx.Param)[1], out_shardings=shardings)
        state = trainer.init(make())
        shards = trainer.batch_shards
        batch = examples(args.rows * shards, args.tokens, args.packed, args.objective == "grpo")
        lengths = [len(e.response) for e in batch]
        weights = token_weights(lengths, "batch")
        batch = pack(batch, weights, row_tokens=args.tokens, micro_rows=micro_rows, shards=shards)
        tokens = int((batch["segments"] > 0).sum())
        placed = trainer.place(batch)
        start = time.perf_counter()
        compiled = trainer.update.lower(state, placed).compile()
        compile_seconds = time.perf_counter() - start
        state, metrics = compiled(state, trainer.place(batch))
        losses = [float(metrics["loss"])]
        start = time.perf_counter()
        for _ in range(args.repeat):
            state, metrics = compiled(state, trainer.place(batch))
            losses.append(metrics["loss"])
        jax.block_until_ready((state, metrics))
        seconds = (time.perf_counter() - start) / args.repeat
        losses = [float(x) for x in losses]
        flops = tokens * workloads.train_flops(c, int(np.mean(lengths)) + 32)
        memory = compiled.memory_analysis()
        result = {
            "shape": args.shape,
            "objective": args.objective,
            "device": device.device_kind,
            "devices": len(devices),
            "fsdp": args.fsdp,
            "rows": args.rows,
            "row_tokens": args.tokens,
            "micro_rows": micro_rows,
            "unroll": args.unroll,
            "memory": args.memory,
            "packed": args.packed,
            "tokens": tokens,
            "repeat": args.repeat,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "mfu": flops / seconds / flops_per_s / len(devices),
            "compiler_peak": getattr(memory, "peak_memory_in_bytes", None),
            "allocator_peak": (device.memory_stats() or {}).get("peak_bytes_in_use"),
            "compile_seconds": compile_seconds,
            "losses": losses,
        }
        results.append(result)
        how = f" on each of {len(devices)}, fsdp {args.fsdp}," * (len(devices) > 1)
        how += " unrolled" * args.unroll + (f" within {args.memory:g} GiB" if args.memory else "")
        print(
            f"{args.shape} {args.objective} {args.rows} × {args.tokens}{' packed' if args.packed else ''}, "
            f"{micro_rows} at a time{how}: {tokens / seconds:,.0f} tokens/s, {seconds:.3f} s, {result['mfu']:.1%} of "
            f"the chip; peak {(result['compiler_peak'] or 0) / 2**30:.1f} GiB; compiled in {compile_seconds:.0f} s; "
            f"loss {losses[0]:.4f}, then {losses[-1]:.4f}",
            flush=True,
        )
        if args.profile:
            folder = tempfile.mkdtemp()
            with jax.profiler.trace(folder):
                start = time.perf_counter()
                for _ in range(args.repeat):
                    state, metrics = compiled(state, placed)
                jax.block_until_ready((state, metrics))
                seconds = (time.perf_counter() - start) / args.repeat
            updates = args.repeat * len(devices)
            result["kernels"] = [(name, ms / updates, n / updates) for name, ms, n in traces.kernels(folder)]
            for name, ms, number in result["kernels"][:40]:
                print(f"    {ms:8.2f} ms {number:6g}×  {name[:100]}")
            kernels = sum(ms for _, ms, _ in result["kernels"])
            print(f"    {kernels:8.2f} ms in all, of {1e3 * seconds:.2f} ms an update", flush=True)
        del state, compiled
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
