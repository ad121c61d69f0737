"""Qwen2.5 checkpoints in and out: Hugging Face directories of safetensors.

Reading is lazy: each tensor (of a sharded array, each device's slice of it) goes from the memory-mapped file to
its device and into its place in the stacked layers, so the host holds about 256 MiB or one tensor at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rlvd_jax import hosts
from rlvd_jax.errors import UserError
from rlvd_jax.qwen2.config import Qwen2Config
from rlvd_jax.qwen2.mesh import make_mesh, param_shardings, path_name
from rlvd_jax.qwen2.model import Qwen2, Weight, layer_weights, top_weights

READ_AT_ONCE = 1 << 28  # bytes of a weight's layers that are read together
FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes of safetensors that are weights without further ado

# What a checkpoint directory holds besides weights and config.json.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def _files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those of its index, else `model.safetensors`, else all there are."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [directory / name for name in names]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{index}: not a safetensors index ({error!r}); download it again") from None
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise UserError(f"{directory}: {missing[0]} is named in the index but missing; download it again")
        return files
    one = directory / "model.safetensors"
    files = [one] if one.exists() else sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError(f"{directory}: holds no safetensors file; other weight formats are not read")
    return files


@contextlib.contextmanager
def _open(directory: Path):
    """{tensor name: slice} over all files, nothing read yet."""
    with contextlib.ExitStack() as stack:
        tensors = {}
        for path in _files(directory):
            try:
                file = stack.enter_context(safe_open(path, "np"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: not a whole safetensors file ({error}); download it again") from None
            tensors |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        yield tensors


def _declared(config: Qwen2Config) -> dict[str, tuple[str, int | None, Weight]]:
    """Checkpoint name → (path in the model, layer or None, declaration)."""
    out = {w.name: (name, None, w) for name, w in top_weights(config).items()}
    for name, w in layer_weights(config).items():
        for i in range(config.num_hidden_layers):
            out[w.name.format(i)] = (f"layers/{name}", i, w)
    return out


def _check(directory: Path, config: Qwen2Config, tensors: dict) -> None:
    declared = _declared(config)
    ignored = {"lm_head.weight"} if config.tie_word_embeddings else set()
    ignored |= {n for n in tensors if n.endswith("rotary_emb.inv_freq")}
    missing, extra = sorted(declared.keys() - tensors.keys()), sorted(tensors.keys() - declared.keys() - ignored)
    for what, names in (("misses", missing), ("holds unknown", extra)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(
                f"{directory}: the checkpoint {what} {', '.join(names[:3])}{more}; config.json describes another model"
            )
    for name, (_, _, w) in declared.items():
        shape = tuple(tensors[name].get_shape())
        wanted = w.shape[::-1] if w.matrix else w.shape
        if shape != wanted:
            raise UserError(f"{directory}: {name} has shape {list(shape)}, config.json says {list(wanted)}")
        if tensors[name].get_dtype() not in FLOATS:
            raise UserError(
                f"{directory}: {name} is stored as {tensors[name].get_dtype()}; only {', '.join(FLOATS)} are read"
            )


def _read(tensor, index: tuple[slice, ...]) -> np.ndarray:
    """A part of a tensor of the file."""
    return tensor[index]


def _place_parts(shape, sharding: NamedSharding, read) -> jax.Array:
    """An array of what `read(index)` gives for each device's part; a part of several devices is read once."""
    parts: dict[str, np.ndarray] = {}

    def part(index):
        if (key := str(index)) not in parts:
            parts[key] = read(index)
        return parts[key]

    return jax.make_array_from_callback(shape, sharding, part)


def _as_stored(sharding: NamedSharding) -> NamedSharding:
    """How a stack of matrices is split that lies as in the file, [layers, out, in]."""
    layers, rows, columns = (*sharding.spec, None, None, None)[:3]
    return NamedSharding(sharding.mesh, PartitionSpec(layers, columns, rows))


@partial(jax.jit, static_argnums=1)
def _turn(x, sharding: NamedSharding):
    """A stack of a file's matrices in our layout, [layers, in, out]: devices transpose faster than hosts."""
    return jax.lax.with_sharding_constraint(x.swapaxes(1, 2), sharding)


@partial(jax.jit, donate_argnums=0)
def _place(stack, value, i):
    return jax.lax.dynamic_update_slice_in_dim(stack, value, i, 0)


def _load_one(tensors: dict, w: Weight, layers: int | None, sharding: NamedSharding, dtype) -> jax.Array:
    """One weight of the model; of all layers together where it has a layer axis."""
    if layers is None:
        return _place_parts(w.shape, sharding, lambda index: _read(tensors[w.name], index).astype(dtype, copy=False))
    bytes_of_layer = int(np.prod(w.shape)) * jnp.dtype(dtype).itemsize
    piece = min(layers, max(1, READ_AT_ONCE // bytes_of_layer))
    stored = w.shape[::-1] if w.matrix else w.shape
    split = _as_stored(sharding) if w.matrix else sharding
    stack = None
    for start in range(0, layers, piece):
        count = min(piece, layers - start)

        def read(index, start=start, count=count):
            chosen = range(start, start + count)[index[0]]
            parts = [_read(tensors[w.name.format(i)], index[1:]) for i in chosen]
            return np.stack(parts, dtype=dtype, casting="unsafe")

        value = _place_parts((count, *stored), split, read)
        value = _turn(value, sharding) if w.matrix else value
        if count == layers:
            return value
        if stack is None:
            stack = jax.jit(partial(jnp.zeros, (layers, *w.shape), dtype), out_shardings=sharding)()
        stack = _place(stack, value, start)
    return stack


def load(
    directory: str | Path, *, param_dtype=jnp.float32, dtype=jnp.float32, mesh: Mesh | None = None, progress=None
) -> Qwen2:
    """A model with the weights of a checkpoint directory, placed on `mesh` (none: the first device).

    Raises UserError that names what is missing, extra, misshapen or truncated. `progress` is called with
    (weights done, weights in all).
    """
    directory = Path(directory)
    config = Qwen2Config.from_directory(directory)
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    shardings = param_shardings(config, mesh)
    arrays: dict[str, jax.Array] = {}
    with _open(directory) as tensors:
        _check(directory, config, tensors)
        weights = {name: (None, w) for name, w in top_weights(config).items()}
        weights |= {f"layers/{name}": (config.num_hidden_layers, w) for name, w in layer_weights(config).items()}
        for done, (path, (layers, w)) in enumerate(weights.items()):
            arrays[path] = _load_one(tensors, w, layers, shardings[path], param_dtype)
            if progress:
                progress(done + 1, len(weights))
    model = nnx.eval_shape(lambda: Qwen2(config, nnx.Rngs(0), dtype=dtype, param_dtype=param_dtype))
    graphdef, params = nnx.split(model, nnx.Param)
    return nnx.merge(graphdef, _fill(params, arrays))


def _fill(params: nnx.State, arrays: dict[str, jax.Array]) -> nnx.State:
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[path_name(path)], params)


def by_path(params: nnx.State) -> dict[str, jax.Array]:
    """Weights by their path, `layers/q` or `embedding`."""
    return {path_name(path): value for path, value in jax.tree_util.tree_flatten_with_path(params)[0]}


def save(
    params: nnx.State,
    config: Qwen2Config,
    directory: str | Path,
    *,
    source: str | Path | None = None,
    dtype=jnp.float32,
    shard_bytes: int = 4 << 30,
) -> None:
    """Write an ordinary Hugging Face directory, whole or not at all, in place of what stands there.

    `source` gives the tokenizer and generation files, and what its config.json says besides the architecture;
    `shard_bytes` is the largest safetensors file (one file needs no index). What stood there is moved aside
    (`.NAME.old`) before the new directory takes its name, and put back by the next save if this one was killed
    between the two. UserError if it cannot be written.

    All processes call it together where there are several: the first writes, the others bring their parts of the
    weights.
    """
    if not hosts.first():
        for _ in _tensors(params, _declared(config), jnp.dtype(dtype)):
            pass
        return
    directory = Path(os.path.realpath(directory))
    new, old = (directory.with_name(f".{directory.name}.{kind}") for kind in ("new", "old"))
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory}: is a file, so no checkpoint directory can be written there")
    if source is not None:
        Qwen2Config.from_directory(source)  # a clear error before anything is written
    try:
        if old.exists() and not directory.exists():
            os.replace(old, directory)
        for rest in (new, old):
            if rest.exists():
                shutil.rmtree(rest)
        new.mkdir(parents=True)
        _write(params, config, new, Path(source) if source is not None else None, jnp.dtype(dtype), shard_bytes)
        for path in new.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if directory.exists():
            os.replace(directory, old)
        os.replace(new, directory)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{directory}: the checkpoint could not be written: {reason}") from None
    finally:
        if old.exists() and not directory.exists():
            os.replace(old, directory)
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _tensors(params, declared: dict, dtype) -> Iterator[np.ndarray]:
    """The tensors of a checkpoint in the order of their declarations, one at a time on the host."""
    arrays = by_path(params)
    for path, i, w in declared.values():
        value = arrays[path] if i is None else arrays[path][i]
        if value.is_fully_addressable:
            value = np.asarray(value.astype(dtype))
        else:
            value = np.asarray(hosts.replicated(value, dtype).addressable_data(0))
        yield np.ascontiguousarray(value.T if w.matrix else value)


def _write(params, config: Qwen2Config, directory: Path, source: Path | None, dtype, shard_bytes: int) -> None:
    declared = _declared(config)
    shards: list[list[str]] = [[]]
    size = 0
    for name, (_, _, w) in declared.items():
        nbytes = int(np.prod(w.shape)) * dtype.itemsize
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    weight_map = {}
    values = _tensors(params, declared, dtype)
    for k, names in enumerate(shards):
        file = f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {}
        for name in names:
            tensors[name] = next(values)
            weight_map[name] = file
        save_file(tensors, directory / file, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(int(np.prod(w.shape)) * dtype.itemsize for _, _, w in declared.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    data = config.to_dict()
    if source:
        data |= json.loads((source / "config.json").read_text(encoding="utf-8")) | dataclasses.asdict(config)
        for name in ("rope_parameters", "rope_scaling", "dtype"):  # said by rope_theta and torch_dtype
            data.pop(name, None)
        for name in COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, directory / name)
    data["torch_dtype"] = dtype.name
    (directory / "config.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    for path in directory.glob("*.safetensors"):  # safetensors gives only the owner the right to read
        path.chmod((directory / "config.json").stat().st_mode)
