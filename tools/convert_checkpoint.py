"""Writes a Qwen2.5 checkpoint as an ordinary Hugging Face directory, in a dtype and shard size of your choice.

    python tools/convert_checkpoint.py SOURCE DESTINATION [--dtype bfloat16] [--shard-size 4GB] [--overwrite]

SOURCE is anything that a study's `from` takes: a directory (a study's own models are directories too) or a hub name.
Tokenizer and generation settings come along. DESTINATION appears whole or not at all.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rlvd_jax.errors import UserError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size(text: str) -> int:
    """Bytes of `500MB`, `4GiB` or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in UNITS or not (number := int(float(match[1]) * UNITS[match[2].upper()])):
        raise UserError(f"--shard-size: '{text}' is no size; write it like 500MB or 4GiB")
    return number


def check(destination: Path, overwrite: bool) -> None:
    """Refuse to replace anything but a checkpoint, and that only when asked to."""
    if not destination.is_dir() or not any(destination.iterdir()):
        return
    if not (destination / "config.json").exists():
        raise UserError(f"{destination}: is not empty and holds no checkpoint; choose another destination")
    if not overwrite:
        raise UserError(f"{destination}: a checkpoint is there already; --overwrite replaces it")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a checkpoint directory or a hub name (owner/name)")
    parser.add_argument("destination", type=Path)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--shard-size", default="4GB", help="largest file of weights (default: 4GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint at DESTINATION")
    args = parser.parse_args(arguments)
    shard_bytes = size(args.shard_size)
    check(args.destination, args.overwrite)

    import jax

    jax.config.update("jax_platforms", "cpu")
    from flax import nnx
    from tqdm import tqdm

    from rlvd_jax import hub
    from rlvd_jax.qwen2 import weights

    source = hub.resolve(args.source)
    with tqdm(unit="weight", desc="read", leave=False, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        model = weights.load(source, param_dtype=args.dtype, dtype=args.dtype, progress=progress)
    params = nnx.state(model, nnx.Param)
    weights.save(params, model.config, args.destination, source=source, dtype=args.dtype, shard_bytes=shard_bytes)
    files = sorted(args.destination.glob("*.safetensors"))
    print(
        f"{args.destination}: {model.config.parameters / 1e6:,.1f} M parameters in {args.dtype}, {len(files)} "
        f"file{'s' if len(files) > 1 else ''}, {sum(f.stat().st_size for f in files) / 1e6:,.1f} MB"
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
