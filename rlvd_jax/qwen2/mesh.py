"""How weights and batches lie on a mesh of devices.

Three axes: `data` (the batch is split, weights are whole), `fsdp` (the batch and the weights are split) and
`tensor` (heads, MLP columns and vocabulary are split). One table maps the logical names of model.py to them.
"""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlvd_jax.config import MeshConfig
from rlvd_jax.errors import UserError
from rlvd_jax.qwen2.config import Qwen2Config
from rlvd_jax.qwen2.model import layer_weights, top_weights

AXES = ("data", "fsdp", "tensor")
RULES = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor"}


def make_mesh(config: MeshConfig | None = None, devices=None) -> Mesh:
    """A mesh of all devices; UserError if the axes don't multiply to their number."""
    config = config or MeshConfig()
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    fixed = config.fsdp * config.tensor
    if config.data == -1:
        sizes[0] = max(1, len(devices) // fixed)
    if int(np.prod(sizes)) != len(devices):
        raise UserError(
            f"mesh: data × fsdp × tensor is {' × '.join(map(str, sizes))}, but there are {len(devices)} devices"
        )
    return Mesh(np.array(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def param_shardings(config: Qwen2Config, mesh: Mesh) -> dict[str, NamedSharding]:
    """The sharding of each weight by its path, `layers/q` or `embedding`; an axis that a dimension can't be
    divided by is left whole."""

    def sharding(shape, axes, lead):
        spec = [None] * lead
        for size, axis in zip(shape, axes, strict=True):
            mesh_axis = RULES[axis]
            spec.append(mesh_axis if size % mesh.shape[mesh_axis] == 0 else None)
        return NamedSharding(mesh, PartitionSpec(*spec))

    shardings = {name: sharding(w.shape, w.axes, 0) for name, w in top_weights(config).items()}
    for name, w in layer_weights(config).items():
        shardings[f"layers/{name}"] = sharding(w.shape, w.axes, 1)
    return shardings


def state_shardings(config: Qwen2Config, mesh: Mesh, params: nnx.State) -> nnx.State:
    """`params`' tree with a NamedSharding in place of each array."""
    by_name = param_shardings(config, mesh)
    return jax.tree_util.tree_map_with_path(lambda path, _: by_name[path_name(path)], params)


def path_name(path) -> str:
    """`layers/q` from a tree path of the model's state."""
    return "/".join(str(p.key) for p in path if isinstance(p, jax.tree_util.DictKey))


def shard_params(params: nnx.State, config: Qwen2Config, mesh: Mesh) -> nnx.State:
    """Put weights on the mesh."""
    return jax.device_put(params, state_shardings(config, mesh, params))
