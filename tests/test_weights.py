import contextlib
import errno
import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tiny_qwen2 import CONFIGS, logits, params_of, random_model

from rlvd_jax.errors import UserError
from rlvd_jax.qwen2 import Qwen2, Qwen2Config, weights

ROOT = Path(__file__).parents[1]


def assert_same(ours, theirs):
    """Equal to the bit."""
    ours, theirs = (weights.by_path(params_of(model)) for model in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        assert value.dtype == theirs[path].dtype
        assert np.asarray(value).tobytes() == np.asarray(theirs[path]).tobytes(), path


def save(model, directory, **how):
    weights.save(params_of(model), model.config, directory, **how)
    return directory


@pytest.fixture
def broken(tmp_path):
    """A checkpoint to be damaged."""
    return save(random_model(CONFIGS["tied"]), tmp_path / "broken", shard_bytes=40_000)


def rewrite(directory, change):
    """Apply `change` to {name: array} of each file of weights."""
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)


# ---- what comes back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, shard_bytes", [("float32", 1), ("float32", 40_000), ("bfloat16", 1 << 30)])
def test_round_trip_is_equal_to_the_bit(tiny_config, tmp_path, dtype, shard_bytes):
    """Whatever the bits: denormals, both zeros, infinities, NaN."""
    draw = np.random.RandomState(1)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Qwen2(tiny_config, param_dtype=dtype)), nnx.Param)

    def bits(w):
        return jnp.asarray(np.frombuffer(draw.bytes(w.size * w.dtype.itemsize), w.dtype).reshape(w.shape))

    model = nnx.merge(graphdef, jax.tree.map(bits, params))
    directory = save(model, tmp_path / "model", dtype=dtype, shard_bytes=shard_bytes)
    files = list(directory.glob("*.safetensors"))
    sizes = [[tensor.nbytes for tensor in load_file(f).values()] for f in files]
    assert all(len(s) == 1 or sum(s) <= shard_bytes for s in sizes)
    assert (directory / "model.safetensors.index.json").exists() == (len(files) > 1) == (shard_bytes < 1 << 30)
    assert_same(weights.load(directory, param_dtype=dtype), model)
    assert Qwen2Config.from_directory(directory) == tiny_config


def test_dtypes(tiny_model, tiny_checkpoint, tmp_path):
    """Stored float32 read as bfloat16 and the other way round: rounded to nearest, once."""
    half = weights.load(tiny_checkpoint, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    graphdef, params = nnx.split(random_model(tiny_model.config, param_dtype=jnp.bfloat16), nnx.Param)
    assert_same(half, nnx.merge(graphdef, params))
    assert half.dtype == jnp.bfloat16
    save(tiny_model, tmp_path / "half", dtype=jnp.bfloat16)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert_same(weights.load(tmp_path / "half", param_dtype=jnp.bfloat16), half)
    widened = nnx.merge(graphdef, jax.tree.map(lambda w: w.astype(jnp.float32), params))
    assert_same(weights.load(tmp_path / "half"), widened)


def test_layers_read_a_few_at_a_time(tiny_model, tiny_checkpoint, monkeypatch):
    """As large models are: pieces of several layers, the last one smaller, find their places."""
    layer = 4 * 32 * tiny_model.config.intermediate_size
    for at_once in (1, 2 * layer):
        monkeypatch.setattr(weights, "READ_AT_ONCE", at_once)
        assert_same(weights.load(tiny_checkpoint), tiny_model)


def test_progress(tiny_model, tiny_checkpoint):
    calls = []
    weights.load(tiny_checkpoint, progress=lambda *call: calls.append(call))
    count = len(jax.tree.leaves(params_of(tiny_model)))
    assert calls == [(i + 1, count) for i in range(count)]


def test_little_host_memory_is_held_at_once(tmp_path, monkeypatch):
    """Python's and NumPy's own, beyond the weights themselves, stays near a tensor however large the model is."""
    config = Qwen2Config(256, 96, 256, 24, 4, 2, 24)
    save(random_model(config, param_dtype=jnp.bfloat16), tmp_path / "model", dtype=jnp.bfloat16)
    largest = 4 * 96 * 256
    monkeypatch.setattr(weights, "READ_AT_ONCE", largest)
    weights.load(tmp_path / "model")  # what compiling takes is not meant
    tracemalloc.start()
    try:
        loaded = weights.load(tmp_path / "model")
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "model" / "model.safetensors").stat().st_size > 40 * largest
    assert loaded.config == config  # alive until here: on a CPU, its arrays may be NumPy's own memory
    assert peak - held < 10 * largest


def test_files_beside_the_weights_come_along(tiny_model, tiny_checkpoint, tmp_path):
    source = shutil.copytree(tiny_checkpoint, tmp_path / "source")
    said = json.loads((source / "config.json").read_text()) | {
        "eos_token_id": [3, 5],
        "rope_parameters": {"rope_theta": tiny_model.config.rope_theta, "rope_type": "default"},
        "dtype": "bfloat16",
        "vocab_size": 9,
    }
    (source / "config.json").write_text(json.dumps(said))
    (source / "tokenizer.json").write_text("{}")
    (source / "notes.txt").write_text("not part of a checkpoint")
    save(tiny_model, tmp_path / "out", source=source)
    data = json.loads((tmp_path / "out" / "config.json").read_text())
    assert data["eos_token_id"] == [3, 5]
    assert data["torch_dtype"] == "float32" and "dtype" not in data
    assert data["vocab_size"] == tiny_model.config.vocab_size, "the weights' own"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}
    assert Qwen2Config.from_directory(tmp_path / "out") == tiny_model.config
    modes = {p.stat().st_mode for p in (tmp_path / "out").iterdir() if p.name != "tokenizer.json"}
    assert len(modes) == 1, "whoever can read one can read all"


@pytest.mark.parametrize("dtype, shard_size", [("float32", "40KB"), ("bfloat16", "5GB")])
def test_transformers_reads_what_we_write(tiny_model, tiny_checkpoint, tmp_path, dtype, shard_size):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    convert(tiny_checkpoint, tmp_path / "out", "--dtype", dtype, "--shard-size", shard_size)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight) == (
        tiny_model.config.tie_word_embeddings
    )
    assert {p.dtype for p in transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").parameters()} == {
        getattr(torch, dtype)
    }
    tokens = np.random.RandomState(2).randint(0, 60, (3, 40))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits(weights.load(tmp_path / "out"), tokens), expected, atol=1e-4, rtol=0)


# ---- what cannot be read -----------------------------------------------------------------------------


def damage(what, directory):
    """Damage a checkpoint; → what the error says."""
    shards = sorted(directory.glob("*.safetensors"))
    index = directory / "model.safetensors.index.json"
    up = "model.layers.1.mlp.up_proj.weight"
    if what == "no config":
        (directory / "config.json").unlink()
        return r"no config.json, so this is not a Hugging Face checkpoint"
    if what == "truncated":
        shards[1].write_bytes(shards[1].read_bytes()[:-1000])
        return rf"{shards[1].name}: not a whole safetensors file .*; download it again"
    if what == "truncated in the header":
        shards[1].write_bytes(shards[1].read_bytes()[:100])
        return rf"{shards[1].name}: not a whole safetensors file .*; download it again"
    if what == "empty":
        shards[1].write_bytes(b"")
        return rf"{shards[1].name}: not a whole safetensors file .*; download it again"
    if what == "a shard missing":
        shards[1].unlink()
        return rf"{shards[1].name} is named in the index but missing; download it again"
    if what == "no weights":
        for file in (*shards, index):
            file.unlink()
        return r"holds no safetensors file; other weight formats are not read"
    if what == "index of text":
        index.write_text("model-00001")
        return r"index.json: not a safetensors index"
    if what == "index of numbers":
        index.write_text('{"weight_map": {"model.norm.weight": 3}}')
        return r"index.json: not a safetensors index"
    if what == "index without map":
        index.write_text("{}")
        return r"index.json: not a safetensors index \(KeyError\('weight_map'\)\)"
    if what == "missing":
        rewrite(directory, lambda tensors: tensors.pop(up, None))
        return rf"the checkpoint misses {up}; config.json describes another model"
    if what == "many missing":
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
        return r"misses model.layers.2.input_layernorm.weight, (\S+), (\S+) and 21 more; config.json"
    if what == "extra":
        rewrite(directory, lambda tensors: tensors.update(surprise=np.zeros(3, np.float32)))
        return r"the checkpoint holds unknown surprise; config.json describes another model"
    if what == "misshapen":
        rewrite(directory, lambda tensors: tensors.update({up: tensors[up][:5].copy()} if up in tensors else {}))
        return rf"{up} has shape \[5, 32\], config.json says \[48, 32\]"
    if what == "transposed":
        rewrite(directory, lambda tensors: tensors.update({up: tensors[up].T.copy()} if up in tensors else {}))
        return rf"{up} has shape \[32, 48\], config.json says \[48, 32\]"
    assert what == "integers"
    rewrite(directory, lambda tensors: tensors.update({up: tensors[up].astype(np.int8)} if up in tensors else {}))
    return rf"{up} is stored as I8; only F64, F32, F16, BF16 are read"


DAMAGE = (
    "no config",
    "truncated",
    "truncated in the header",
    "empty",
    "a shard missing",
    "no weights",
    "index of text",
    "index of numbers",
    "index without map",
    "missing",
    "many missing",
    "extra",
    "misshapen",
    "transposed",
    "integers",
)


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_one_sentence(what, broken):
    message = damage(what, broken)
    with pytest.raises(UserError, match=message) as error:
        weights.load(broken)
    assert str(broken) in str(error.value) and "\n" not in str(error.value)


def test_what_does_not_matter(tiny_model, tiny_checkpoint, tmp_path):
    """Old files hold the rotary frequencies; tied ones at times the embedding twice; some have no index."""
    directory = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (directory / "model.safetensors.index.json").unlink()
    first, *_ = sorted(directory.glob("*.safetensors"))
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}
    if tiny_model.config.tie_word_embeddings:
        extra["lm_head.weight"] = np.zeros((61, 32), np.float32)
    save_file(load_file(first) | extra, first)
    assert_same(weights.load(directory), tiny_model)


# ---- what cannot be written --------------------------------------------------------------------------


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def files_of_at_most(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("where", ["first file", "second file", "config", "tokenizer", "flush", "by the system"])
@pytest.mark.parametrize("before", [True, False])
def test_a_full_disk_leaves_what_was_there(where, before, broken, tmp_path, monkeypatch):
    """`where` the disk is full; `before`: a checkpoint is there already."""
    target = tmp_path / "models" / "target"
    if before:
        shutil.copytree(broken, target)
    old = {p.name: p.read_bytes() for p in target.iterdir()} if before else None
    (broken / "tokenizer.json").write_text("{}")
    written = []

    def second_fails(tensors, path, **how):
        written.append(path)
        save_file(tensors, path, **how) if len(written) < 2 else full()

    model = random_model(CONFIGS["tied"], seed=1)
    limit = contextlib.nullcontext()
    if where == "by the system":  # safetensors writes by itself, and its error is no OSError
        limit = files_of_at_most(20_000)
    else:
        at = {"config": (json, "dumps"), "tokenizer": (shutil, "copyfile"), "flush": (os, "fsync")}
        module, name = at.get(where, (weights, "save_file"))
        monkeypatch.setattr(module, name, second_fails if where == "second file" else full)
    with limit, pytest.raises(UserError, match=r"could not be written: .*(No space left|File too large)") as error:
        save(model, target, source=broken, shard_bytes=40_000)
    assert str(target) in str(error.value) and "\n" not in str(error.value)
    assert [p.name for p in target.parent.iterdir()] == (["target"] if before else [])
    if before:
        assert {p.name: p.read_bytes() for p in target.iterdir()} == old
    monkeypatch.undo()
    save(model, target, shard_bytes=40_000)
    assert_same(weights.load(target), model)
    assert [p.name for p in target.parent.iterdir()] == ["target"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("renames", [0, 1])
def test_a_save_that_is_killed_loses_nothing(renames, tmp_path, monkeypatch):
    """Between moving the old directory aside and renaming the new one, too."""
    old, new, later = (random_model(CONFIGS["tied"], seed=i) for i in range(3))
    target = save(old, tmp_path / "target")
    replace, done = os.replace, []

    def killed(*paths):
        if len(done) == renames:
            raise Killed
        done.append(replace(*paths))

    def killed_before_cleaning(path, ignore_errors=False):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(shutil, "rmtree", killed_before_cleaning)
        with pytest.raises(Killed):
            save(new, target)
    left = tmp_path / (".target.old" if renames else "target")
    assert_same(weights.load(left), old)
    # The next save, even one that fails, puts it back; one that works leaves nothing behind.
    with monkeypatch.context() as patch:
        patch.setattr(weights, "save_file", full)
        with pytest.raises(UserError, match="No space left"):
            save(new, target)
    assert_same(weights.load(target), old)
    save(later, target)
    assert_same(weights.load(target), later)
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_places_that_cannot_be_written(broken, tmp_path):
    model = random_model(CONFIGS["tied"])
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file: is a file, so no checkpoint directory can be written there"):
        save(model, tmp_path / "file")
    with pytest.raises(UserError, match="could not be written: Not a directory"):
        save(model, tmp_path / "file" / "model")
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(UserError, match=r"nowhere: no config\.json"):
        save(model, tmp_path / "model", source=tmp_path / "nowhere")
    assert not (tmp_path / "model").exists()
    (tmp_path / "link").symlink_to(broken)
    later = random_model(CONFIGS["tied"], seed=1)
    save(later, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_same(weights.load(broken), later)


# ---- the command --------------------------------------------------------------------------------------


def convert(*arguments):
    spec = importlib.util.spec_from_file_location("convert_checkpoint", ROOT / "tools" / "convert_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(a) for a in arguments])


def test_convert(tiny_model, tiny_checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    convert(tiny_checkpoint, out, "--dtype", "float32", "--shard-size", "0.00003GB")
    assert len(list(out.glob("*.safetensors"))) > 1
    assert_same(weights.load(out), tiny_model)
    assert (
        f"{out}: 0.0 M parameters in float32, {len(list(out.glob('*.safetensors')))} files, " in capsys.readouterr().out
    )
    with pytest.raises(UserError, match="a checkpoint is there already; --overwrite replaces it"):
        convert(tiny_checkpoint, out)
    convert(out, out, "--overwrite", "--shard-size", "1GiB")  # in place
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]
    assert weights.by_path(params_of(weights.load(out, param_dtype="bfloat16")))["embedding"].dtype == jnp.bfloat16


def test_convert_touches_nothing_else(tiny_checkpoint, tmp_path):
    (tmp_path / "letters").write_text("dear all")
    for overwrite in ([], ["--overwrite"]):
        with pytest.raises(UserError, match="is not empty and holds no checkpoint; choose another destination"):
            convert(tiny_checkpoint, tmp_path, *overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["letters"]
    for size in ("4 turtles", "-1GB", "0", "", "GB"):
        with pytest.raises(UserError, match="is no size; write it like 500MB or 4GiB"):
            convert(tiny_checkpoint, tmp_path / "out", f"--shard-size={size}")


def test_convert_as_a_command(broken, tmp_path):
    for source, message in (
        ("nowhere", "nowhere: there is no such checkpoint directory, and it is not a hub name (owner/name)"),
        (tmp_path, f"{tmp_path}: no config.json, so this is not a Hugging Face checkpoint"),
    ):
        command = [sys.executable, ROOT / "tools" / "convert_checkpoint.py", source, tmp_path / "out"]
        result = subprocess.run(command, capture_output=True, text=True)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == f"error: {message}\n"
    assert not (tmp_path / "out").exists()


# ---- several devices ----------------------------------------------------------------------------------

ON_EIGHT = """
    import sys
    import jax, numpy as np
    from rlvd_jax.config import MeshConfig
    from rlvd_jax.qwen2 import weights
    from rlvd_jax.qwen2.mesh import make_mesh, param_shardings
    from tiny_qwen2 import logits, params_of

    read, values = weights._read, 0

    def counted(*how, **more):
        global values
        part = read(*how, **more)
        values += part.size
        return part

    weights._read = counted
    assert len(jax.devices()) == 8
    meshes = [dict(data=8), dict(fsdp=8), dict(tensor=4, data=2), dict(tensor=2, fsdp=2, data=2)]
    for source, saved, meshes in (sys.argv[1], sys.argv[2], meshes), (sys.argv[3], sys.argv[4], meshes[-1:]):
        alone = weights.load(source)
        assert {d for w in jax.tree.leaves(params_of(alone)) for d in w.devices()} == {jax.devices()[0]}
        tokens = np.random.RandomState(0).randint(0, 60, (2, 8))
        expected = logits(alone, tokens)
        for sizes in meshes:
            weights.READ_AT_ONCE = 1 if "fsdp" in sizes else 1 << 28  # by the layer, or all at once
            values = 0
            mesh = make_mesh(MeshConfig(**sizes))
            model = weights.load(source, mesh=mesh)
            assert values == model.config.parameters, (sizes, values)  # each read once, however many devices hold it
            shardings, shards = param_shardings(model.config, mesh), 0
            for path, array in weights.by_path(params_of(model)).items():
                assert array.sharding.is_equivalent_to(shardings[path], array.ndim), (sizes, path, array.sharding)
                assert (np.asarray(array) == np.asarray(weights.by_path(params_of(alone))[path])).all(), (sizes, path)
                shards += array.addressable_shards[0].data.size < array.size
            assert shards == 0 if sizes == dict(data=8) else shards > 6, (sizes, shards)
        assert abs(logits(model, tokens) - expected).max() < 1e-5
        weights.save(params_of(model), model.config, saved)
    print("fine")
"""


def test_eight_devices(tmp_path):
    """Sharded loads equal the one-device load, lie as the table says, and are saved whole."""
    models = {name: random_model(config) for name, config in CONFIGS.items()}
    paths = [
        path
        for name, model in models.items()
        for path in (save(model, tmp_path / name, shard_bytes=40_000), tmp_path / f"{name}-saved")
    ]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", textwrap.dedent(ON_EIGHT), *paths]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "fine\n"
    for name, model in models.items():
        assert_same(weights.load(tmp_path / f"{name}-saved"), model)
