"""Train steps compiled for TPU slices that are not here: they fit, attention is the kernel, logits are never whole."""

import dataclasses
import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import pytest
from training_helpers import all_reduced

from rlvd_jax import targets
from rlvd_jax.config import GRPOConfig, MeshConfig, SFTConfig
from rlvd_jax.errors import UserError
from rlvd_jax.qwen2 import Qwen2Config
from rlvd_jax.qwen2.attention import BATCH, attend
from rlvd_jax.qwen2.mesh import make_mesh
from rlvd_jax.target_plan import largest_batch
from rlvd_jax.training.loss import Objective, loss_of_hidden
from rlvd_jax.training.step import Trainer

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'jax[tpu]'"
)
common = {"vocab_size": 151936, "num_key_value_heads": 2, "head_dim": 128, "tie_word_embeddings": True}
QWEN = {
    "1.5B": Qwen2Config(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, **common
    ),
    "3B": Qwen2Config(
        hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, **common
    ),
}
RECIPES = {  # the paper's settings, which are the defaults, with the longest prompt and response
    "grpo": (GRPOConfig(start="base", problems="train"), 4256),
    "sft": (SFTConfig(student="base", teacher="base", problems="train"), 4256),
    "sft of long responses": (SFTConfig(student="base", teacher="base", problems="train"), 32768),
}
KERNELS = {f"splash_mha_{part}" for part in ("fwd_segmented_residuals", "dq_segmented", "dkv_segmented")}


def test_names_of_slices():
    names = {
        "v5e:4x4": ("v5e", (4, 4)),
        "v5e-1": ("v5e", (1, 1)),
        "v5litepod-8": ("v5e", (2, 4)),
        "v5e-16": ("v5e", (4, 4)),
        "V6e-256": ("v6e", (16, 16)),
        "v5p-8": ("v5p", (2, 2, 1)),  # eight cores
        "v5p-32": ("v5p", (2, 2, 4)),
        "v5p:2x2x1": ("v5p", (2, 2, 1)),
        "v4-64": ("v4", (2, 4, 4)),
        "tpu7x-8": ("tpu7x", (2, 2, 1)),
    }
    assert {name: targets.parse(name) for name in names} == names


@pytest.mark.parametrize(
    "name, message",
    [
        ("v9:2x2", r"^--target v9:2x2: not a TPU slice that is known here \(v4, v5e, v5p, v6e, tpu7x\); name a slice"),
        ("h100", "not a TPU slice"),
        ("v5e", "not a TPU slice"),
        ("v5e:2x2x1", "a v5e slice has 2 sides"),
        ("v5p:4x4", "a v5p slice has 3 sides"),
        ("v5e:0x4", "a v5e slice has 2 sides"),
        ("v5e-12", "there is no v5e slice of that size"),
        ("v5p-7", "there is no v5p slice of that size"),
        ("v5p-0", "there is no v5p slice of that size"),
        pytest.param("v5e:3x3", r"there is no such slice \(.*not divisible", marks=needs_libtpu),
    ],
)
def test_names_that_are_no_slice(name, message):
    with pytest.raises(UserError, match=message) as error:
        targets.find(name)
    assert "\n" not in str(error.value)


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(UserError, match=r"libtpu, which is not installed: pip install 'jax\[tpu\]'"):
        targets.find("v5e-16")


@needs_libtpu
@pytest.mark.parametrize(
    "name, devices, hosts", [("v5e-16", 16, 4), ("v5p-8", 4, 1), ("v6e-8", 8, 2), ("v4-8", 4, 1), ("v6e-1", 1, 1)]
)
def test_slices(name, devices, hosts):
    found = targets.find(name)
    assert (len(found.devices), found.hosts) == (devices, hosts)
    assert {d.platform for d in found.devices} == {"tpu"}


def trainer_and_batch(size, kind, target):
    recipe, longest = RECIPES[kind]
    mesh = make_mesh(MeshConfig(fsdp=len(target.devices)), target.devices)
    objective = Objective() if kind == "grpo" else None
    trainer = Trainer(QWEN[size], jnp.dtype(jnp.bfloat16), mesh, recipe.optimizer, objective, 0.9)
    return trainer, largest_batch(recipe, longest, trainer)


QUICK = [("1.5B", "grpo", "v5e-16")]
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in ((size, kind, name) for size in QWEN for kind in RECIPES for name in ("v5e-16", "v5p-8", "v6e-8"))
]


@needs_libtpu
@pytest.mark.parametrize("size, kind, name", CASES)
def test_updates_fit(size, kind, name):
    target = targets.find(name)
    trainer, batch = trainer_and_batch(size, kind, target)
    compiled = targets.compile_update(trainer, batch, quick=True)
    peak = compiled.memory_analysis().peak_memory_in_bytes
    state = 12 * QWEN[size].parameters / len(target.devices)
    assert state < peak < 0.9 * target.memory  # quick compilation may be 6% off
    text = compiled.as_text()
    assert all(kernel in text for kernel in KERNELS)
    time = batch["tokens"].shape[-1]
    assert not re.search(rf"\[(\d+,)*{time},{time}\]", text), "scores are held whole"
    arrays = {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)}
    assert max(map(math.prod, arrays)) < time // 2 * QWEN[size].vocab_size


@needs_libtpu
def test_weights_whole_on_each_device():
    """Attention is the kernel, and each device adds its own gradients up. More layers would only take longer."""
    config = dataclasses.replace(QWEN["1.5B"], num_hidden_layers=1)
    mesh = make_mesh(MeshConfig(data=4), targets.find("v5p-8").devices)
    recipe, longest = RECIPES["grpo"]
    trainer = Trainer(config, jnp.dtype(jnp.bfloat16), mesh, recipe.optimizer, Objective(), 0.9)
    text = targets.compile_update(trainer, largest_batch(recipe, longest, trainer), quick=True).as_text()
    assert all(kernel in text for kernel in KERNELS)
    inside, outside = all_reduced(text)
    assert inside == 0 and config.parameters < outside < config.parameters + 10


@needs_libtpu
@pytest.mark.parametrize("objective", [Objective(), Objective(ratio="sequence")])
def test_the_table_is_brought_together_and_its_gradient_summed_once(objective):
    """However many chunks of logits there are. In the second case its logits are made twice."""
    mesh = make_mesh(MeshConfig(fsdp=8), targets.find("v5e-8").devices)
    vocab, hidden, time = 1024, 256, 65

    def array(*shape, dtype=jnp.float32, spec=BATCH):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

    def loss(x, table, batch):
        return loss_of_hidden(x, table, batch, objective, mesh=mesh, logits=16 * vocab)[0]

    table = array(vocab, hidden, spec=jax.sharding.PartitionSpec(None, "fsdp"))
    batch = {name: array(8, time) for name in ("weight", "advantage", "logp")}
    batch |= {name: array(8, time, dtype=jnp.int32) for name in ("tokens", "segments")}
    x = array(8, time, hidden, dtype=jnp.bfloat16)
    text = jax.jit(jax.grad(loss, (0, 1))).lower(x, table, batch).compile().as_text()
    for collective in ("all-reduce", "all-gather", "reduce-scatter"):
        assert all_reduced(text, collective)[0] == 0
    assert all_reduced(text, "all-gather")[1] == vocab * hidden
    summed = all_reduced(text)[1] + all_reduced(text, "reduce-scatter")[1]
    assert vocab * hidden / 8 <= summed < 1.1 * vocab * hidden


@needs_libtpu
def test_what_does_not_fit_says_how_much_it_needs():
    target = targets.find("v5e-1")
    needed, fits = targets.peak_memory(*trainer_and_batch("1.5B", "sft", target))
    assert not fits and 16 * QWEN["1.5B"].parameters < needed < 64 * targets.GIB


def lowered(time, heads, kv_heads, head_dim, **axes):
    """Attention with its gradients, for a v5e of 8 chips."""
    mesh = make_mesh(MeshConfig(**axes), targets.find("v5e-8").devices)
    rows = jax.sharding.NamedSharding(mesh, BATCH)

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((8, time, *shape), dtype, sharding=rows)

    def loss(q, k, v, segments):
        return attend(q, k, v, segments, mesh).astype(jnp.float32).sum()

    inputs = array(heads, head_dim), array(kv_heads, head_dim), array(kv_heads, head_dim), array(dtype=jnp.int32)
    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(*inputs)


@needs_libtpu
def test_heads_of_64_and_split_heads_take_the_kernel():
    text = lowered(640, 14, 2, 64, fsdp=4, tensor=2).compile().as_text()
    assert all(kernel in text for kernel in KERNELS)
    assert not re.search(r"\[(\d+,)*640,640\]", text)


@needs_libtpu
def test_rows_shorter_than_a_block_take_the_plain_form():
    assert "tpu_custom_call" not in lowered(64, 4, 2, 128).as_text()
    assert "tpu_custom_call" in lowered(128, 4, 2, 128).as_text()
