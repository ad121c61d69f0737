import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
import tiny_study
from test_plan import BIG, lines, paper

from rlvd_jax import run, targets
from rlvd_jax.config import GRPOConfig, MeshConfig, SamplingConfig, SFTConfig
from rlvd_jax.errors import UserError
from rlvd_jax.plan import size
from rlvd_jax.qwen2 import Qwen2Config
from rlvd_jax.sampling import decoder
from rlvd_jax.target_plan import choose_mesh, largest_batch, plan_on, sampling_part

GIB = 2**30
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'jax[tpu]'"
)


def test_the_mesh_is_the_configs_where_it_fits():
    for config, devices in (
        (MeshConfig(fsdp=16), 16),
        (MeshConfig(data=-1, fsdp=4), 16),
        (MeshConfig(tensor=2, fsdp=2, data=4), 16),
    ):
        mesh, said = choose_mesh(config, devices)
        assert mesh.data * mesh.fsdp * mesh.tensor == devices and said == ""
        assert (mesh.fsdp, mesh.tensor) == (config.fsdp, config.tensor)


@pytest.mark.parametrize(
    "config, devices, axes, said",
    [
        (MeshConfig(), 16, (1, 16, 1), "mesh is not set: this is for mesh.data=1 mesh.fsdp=16 mesh.tensor=1,"),
        (MeshConfig(fsdp=32), 16, (1, 16, 1), "The config's mesh does not multiply to 16 devices: this is for"),
        (MeshConfig(data=2, tensor=2), 16, (1, 8, 2), "does not multiply to 16 devices"),
        (MeshConfig(tensor=3), 16, (1, 16, 1), "does not multiply to 16 devices"),
    ],
)  # fmt: skip
def test_else_the_weights_are_split_over_all_devices(config, devices, axes, said):
    mesh, note = choose_mesh(config, devices)
    assert (mesh.data, mesh.fsdp, mesh.tensor) == axes and said in note


def test_the_largest_batch_of_an_update():
    def on(shards, rows=1):
        return SimpleNamespace(batch_shards=shards, rows_at_once={4352: rows, 8192: 1, 32768: 1}.get)

    grpo = GRPOConfig(start="m", problems="p")
    batch = largest_batch(grpo, 4256, on(16))
    assert batch["tokens"].shape == (32, 16, 4352)  # 280 rows of one response, in 18 micro-batches: 32 is their bound
    assert set(batch) == {"tokens", "positions", "segments", "weight", "advantage", "logp", "used"}
    assert (batch["segments"] > 0).sum() == 280 * 4256
    several = largest_batch(grpo.model_copy(update={"updates": 2, "kl": 0.1}), 4256, on(16, 4))
    assert several["old"].shape == several["reference"].shape == several["tokens"].shape == (8, 64, 4352)
    lent = largest_batch(grpo.model_copy(update={"solved_by": "m"}), 4256, on(16))
    assert lent["drawn"].shape == batch["tokens"].shape and set(lent) == {*batch, "drawn"}
    assert largest_batch(grpo.model_copy(update={"row_tokens": 8192}), 4000, on(16))["tokens"].shape == (32, 16, 8192)
    sft = SFTConfig(student="m", teacher="t", problems="p")
    assert largest_batch(sft, 4256, on(16))["tokens"].shape == (1, 16, 6144)  # four of the rows hold a response each
    assert largest_batch(sft, 4256, on(1))["tokens"].shape == (1, 1, 24576)  # ... one row all four
    assert largest_batch(sft, 40000, on(8))["tokens"].shape == (1, 8, 32768)  # longer ones are left out


def sampling_on(c, dtype=jnp.bfloat16, responses=8000, chips=1, hosts=1, memory=15.75 * GIB, taken=None, **settings):
    target = targets.Target("v5e", (None,) * chips, memory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets.Target, "hosts", hosts)
        return sampling_part(c, jnp.dtype(dtype), SamplingConfig(**settings), responses, target, **(taken or {}))


def test_sampling():
    memory, weights, position = 15.75 * GIB, 2 * BIG.parameters, 36 * 2 * 2 * 128 * 2
    logits = 2 * 4 * BIG.vocab_size  # of a slot
    length = 4288  # a prompt of 256 and 4,000 tokens, in pages of 64
    part = sampling_on(BIG)
    assert part.fits and 0.92 * memory - 64 * position < part.memory <= 0.92 * memory  # all that there is, in pages
    slots, longest = map(int, re.fullmatch(r"(\d+) slots, room for (\d+) of the longest responses", part.said).groups())
    prompts = 8 * 512 * position
    assert longest == (0.92 * memory - weights - prompts - slots * logits) // (64 * position) * 64 // length
    assert slots % 16 == 0 and 16 < longest < slots
    few = sampling_on(BIG, responses=20)
    assert few.said == "32 slots"
    pages = 32 * 67 + 8 * 4
    assert few.memory == weights + prompts + pages * 64 * position + 32 * logits
    assert sampling_on(BIG, slots=30).said == "30 slots"
    plain = sampling_on(BIG, dtype=jnp.float32, memory=31.25 * GIB)
    room = 0.92 * 31.25 * GIB - 2 * weights
    assert plain.said == f"{int(room // (length * 2 * position + 3 * logits)) // 16 * 16} slots"

    # What does not fit: weights, or a response.
    full = sampling_on(BIG, taken={"held": 0.92 * memory - weights + 1})
    assert not full.fits and "its weights leave no room in the 14.5 GiB" in full.said
    assert full.memory > 0.92 * memory
    # While it takes weights, more may be there than while it draws.
    assert sampling_on(BIG, taken={"loads": True}) == part
    loading = decoder.loading_bytes(BIG, 2, 8, 8)
    small = {"chips": 8, "tensor": 8, "responses": 16, "max_tokens": 64, "memory": 1.01 * loading / 0.92}
    drawing, loads = sampling_on(BIG, **small), sampling_on(BIG, taken={"loads": True}, **small)
    assert loads == dataclasses.replace(drawing, memory=loading) and drawing.memory < loading
    small["memory"] = 0.99 * loading / 0.92
    loads = sampling_on(BIG, taken={"loads": True}, **small)
    assert not loads.fits and loads.memory == loading and "take chips with more memory" in loads.said
    short = sampling_on(BIG, taken={"held": 0.92 * memory - weights - 2 * length * position}, responses=20)
    assert not short.fits
    assert "one response of 4,288 tokens is too long for the 14.5 GiB that the sampler may fill: lower" in short.said
    whole = sampling_on(BIG, max_tokens=10**6)  # a response ends with the model's context
    assert re.fullmatch(r"\d+ slots, room for 7 of the longest responses", whole.said)


def test_sampling_by_several_devices_together():
    """As few of a host's as hold the weights, or as many as the config says; the responses are shared out."""
    huge = Qwen2Config(152064, 5120, 27648, 64, 40, 8, 128)  # 32B
    part = sampling_on(huge, chips=16, hosts=2, memory=31.25 * GIB, responses=320)
    embedding = 152064 * 5120
    weights = 2 * (embedding + (huge.parameters - embedding) / 4)
    pages = (0.92 * 31.25 * GIB - weights - 96 * 2 * 4 * 152064) / (64 * 2 * 2 * 128 * 2) - 8 * 512
    longest = int(pages // 4288)
    assert part.fits
    assert part.said == f"96 slots, room for {longest} of the longest responses, weights split over 4 devices"
    alone = sampling_on(huge, chips=16, hosts=16, memory=31.25 * GIB)
    assert not alone.fits and "take chips with more memory" in alone.said
    assert sampling_on(BIG, chips=4, tensor=2, responses=96).said.startswith("64 slots")
    with pytest.raises(UserError, match=r"sampling\.tensor is 4, which does not divide the 2 devices"):
        sampling_on(BIG, chips=4, hosts=2, tensor=4)


@pytest.fixture
def peaks(monkeypatch):
    """Stands for the compiler: `peaks["is"]` is what it finds; the batches that it is asked about are kept."""
    found = {"is": (4 * GIB, True), "batches": []}

    def peak_memory(trainer, batch):
        found["batches"].append(batch["tokens"].shape)
        return found["is"]

    monkeypatch.setattr(targets, "peak_memory", peak_memory)
    return found


def shown(tmp_path, name, *overrides):
    """The table's rows, the sentences below it, and what was compiled."""
    said = []
    text = plan_on(paper(tmp_path, "device=auto", *overrides), targets.find(name), said.append)
    return lines(text), text, said


@needs_libtpu
def test_every_part_of_a_study_on_a_slice(tmp_path, peaks):
    again = """{student: rl, teacher: rl, problems: train, optimizer: {learning_rate: 1e-5}}"""
    rows, text, said = shown(tmp_path, "v5p-8", f"models.other.sft={again}", "mesh.fsdp=4")
    assert text.startswith(f"paper in {tmp_path}/paper, on v5p:2x2x1: 4 devices of 95.74 GiB, mesh.data=1 mesh.fsdp=4")
    assert "mesh is" not in text and "Does not fit" not in text
    assert rows["step"][-2:] == ["memory/device", "fits"]
    # A GRPO step has two parts. Beside the practice are the weights and their moments.
    assert rows["train rl: update"][-2:] == ["4.0 GiB", "yes, 4 rows of 4,352 tokens at a time"]
    taken = {"held": 12 * BIG.parameters / 4}
    alone = sampling_on(BIG, taken=taken, responses=5000, chips=4, memory=95.74 * GIB)
    assert rows["train rl: sampling"][-2:] == [size(alone.memory), f"yes, {alone.said}"]
    alone = sampling_on(BIG, responses=500 * 256, chips=4, memory=95.74 * GIB)
    assert rows["sample base on test"][-2:] == [size(alone.memory), f"yes, {alone.said}"]
    assert rows["train pupil"][-2:] == rows["train other"][-2:] == ["4.0 GiB", "yes, rows of 6,144 tokens"]
    assert len(said) == len(peaks["batches"]) == 2, "two SFT steps are one program"
    assert peaks["batches"] == [(32, 16, 4352), (1, 4, 6144)]


@needs_libtpu
@pytest.mark.parametrize(
    "name, overrides, peak, sentence",
    [
        ("v5e-16", ["mesh.fsdp=4"], 60, "pupil: split the weights over all devices, mesh.data=1 mesh.fsdp=16."),
        ("v5e-16", ["models.rl.grpo.micro_rows=2"], 20, "rl: update: set models.rl.grpo.micro_rows=1."),
        ("v5e-4", [], 20, "pupil: set models.pupil.sft.max_length to about 3,072, and longer responses are left out."),
        ("v5e-1", [], 60, "pupil: weights, gradient and moments take 46.0 GiB, so take chips with more"),
        ("v6e-8", [], 35, "rl: update: set models.rl.grpo.micro_rows=1."),
        ("v6e-8", ["models.rl.grpo.micro_rows=1"], 35,
         "rl: update: rows of about 3,712 tokens fit in place of 4,352, so lower models.rl.grpo.sampling.max_tokens."),
        ("v6e-8", ["models.rl.grpo.row_tokens=6144", "models.rl.grpo.micro_rows=1"], 35,
         "rl: update: rows of about 5,248 tokens fit in place of 6,144, so lower models.rl.grpo.row_tokens and "
         "models.rl.grpo.sampling.max_tokens."),
        ("v5e-4", ["models.rl.grpo.kl=0.1"], 40,
         "weights, gradient and moments take 11.5 GiB and the start model's weights 1.4 GiB, so take"),
    ],
)  # fmt: skip
def test_what_to_change(tmp_path, peaks, name, overrides, peak, sentence):
    peaks["is"] = (peak * GIB, False)
    rows, text, _ = shown(tmp_path, name, *overrides)
    assert sentence in text
    assert rows["train pupil"][-1] == "no"


def test_target_goes_with_plan(capsys):
    assert run.main(["--target", "v5e-16"]) == 2
    assert capsys.readouterr().err == (
        "rlvd_jax: --target goes with --plan: it tells what fits on a slice, without using one\n"
    )


@needs_libtpu
def test_from_the_command_line(tmp_path):
    """With the compiler, and with nothing of its noise."""
    tiny_study.write(tmp_path)
    environment = {k: v for k, v in os.environ.items() if k not in (*targets.QUIET, "JAX_PLATFORMS")}
    done = subprocess.run(
        [sys.executable, "-m", "rlvd_jax.run", "--plan", "--target", "v5e-1", "tiny.yaml"],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    heading = "tiny in runs/tiny, on v5e:1x1: 1 device of 15.75 GiB, mesh.data=1 mesh.fsdp=1 mesh.tensor=1\n"
    assert done.stdout.startswith(heading) and "mesh is" not in done.stdout
    rows = lines(done.stdout)
    training = [rows[name] for name in rows if name.startswith("train") and not name.endswith("sampling")]
    assert len(training) == 5 and all(re.match(r"yes, (\d+ )?rows of", row[-1]) for row in training)
    assert rows["sample base on test"][-1] == "yes, 32 slots"
    told = done.stderr.splitlines()
    assert told and all(
        re.fullmatch("compiling the update of .* for v5e:1x1, which may take a minute", t) for t in told
    )
    assert len(told) < len(training)
    assert not (tmp_path / "runs").exists()
