import contextlib
import json
import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import several_hosts
import tiny_study
import training_helpers as tiny
from flax import nnx
from test_grpo import scalars
from test_step import MESHES, PLAIN, three_updates
from test_work import close, rows

from rlvd_jax import config, hosts
from rlvd_jax.errors import UserError
from rlvd_jax.qwen2 import weights
from rlvd_jax.qwen2.mesh import make_mesh
from rlvd_jax.study import Study
from rlvd_jax.training.checkpoints import Checkpoints
from rlvd_jax.training.interruption import Interruption, Stopped
from rlvd_jax.training.step import Trainer


def as_process(monkeypatch, index, count):
    monkeypatch.setattr(hosts, "index", lambda: index)
    monkeypatch.setattr(hosts, "count", lambda: count)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_are_equal_and_together_are_all(monkeypatch, count):
    samples = [range(4), range(0), range(2, 9), (7,), range(30)]
    parts = []
    for index in range(count):
        as_process(monkeypatch, index, count)
        parts.append(hosts.share(samples))
    for i, of_question in enumerate(samples):
        assert sorted(s for part in parts for s in part[i]) == list(of_question)
        sizes = [len(part[i]) for part in parts]
        assert max(sizes) - min(sizes) <= 1, "questions differ in how long their responses are"
    sizes = [sum(map(len, part)) for part in parts]
    assert sum(sizes) == 42 and max(sizes) - min(sizes) <= 1


def test_one_process_is_left_alone(monkeypatch, tmp_path):
    params, value = {"w": np.ones(2, np.float32)}, object()
    assert hosts.gather(value) == [value] and hosts.from_first(lambda: value) is value and hosts.largest(3) == 3
    assert hosts.on_local_devices(params, jnp.bfloat16) is params
    with hosts.session(tmp_path / "not there", "identity"):
        assert not hosts.stop_told()
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "nowhere:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    hosts.start("cpu")
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    "said", [("host:1", "", ""), ("host:1", "2", "2"), ("host", "2", "0"), ("", "2", ""), ("host:1", "2", "-1")]
)
def test_half_a_job(monkeypatch, said):
    for name, value in zip(hosts.VARIABLES, said, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="where one is set all have to be: host:port of the first process"):
        hosts.start("cpu")
    assert not jax.distributed.is_initialized()


# ---- two processes of four devices -------------------------------------------------------------------------------


def distil(directory: Path) -> None:
    """Four steps of SFT."""
    config = tiny.sft_config(epochs=1, checkpoint_every=100)
    tiny.run_sft(directory, config=config, examples=tiny.examples(16))


def trainer_on(**axes) -> Trainer:
    return Trainer(tiny.CONFIG, jnp.float32, tiny.mesh(**axes), PLAIN)


def wait_for_a_signal(sent: bool) -> None:
    """Which one process gets, and the other one hears of, by looking and by agreeing."""
    with Interruption() as interruption:
        interruption.check()
        interruption.agree()
        hosts.barrier("nobody was told to stop")
        if sent:
            tiny.at(1, "SIGTERM")(1)
        with contextlib.suppress(Stopped):
            while True:
                interruption.check()
                time.sleep(0.01)
        with contextlib.suppress(Stopped):
            interruption.agree()
        interruption.leave()


def one_of_two(directory: Path) -> None:
    """What each process does in the test below."""
    hosts.start("cpu")
    index = hosts.index()
    assert (hosts.count(), jax.local_device_count(), jax.device_count()) == (2, 4, 8)

    # Values of any size, and errors, get to all.
    assert hosts.gather(["a", "b" * 1000][index]) == ["a", "b" * 1000]
    assert hosts.from_first(lambda: ("from", index)) == ("from", 0)
    assert hosts.largest([7, 15][index]) == 15

    def refuse():
        assert index == 0
        raise UserError("told")

    with pytest.raises(UserError, match=r"^told$"):
        hosts.from_first(refuse)
    with pytest.raises(RuntimeError if index else ZeroDivisionError, match="division by zero"):
        hosts.from_first(lambda: 1 / 0)

    # All see one folder and do the same.
    with (
        pytest.raises(UserError, match="process 1 of 2 was started with another config"),
        hosts.session(directory, f"{index}"),
    ):
        pass
    own = directory / f"own-{index}"
    own.mkdir()
    hosts.SEEN, hosts.LOOK = 0, 0
    with pytest.raises(UserError, match="process 1 of 2 doesn't see what the first one writes"), hosts.session(own, ""):
        pass
    # A signal to one stops all.
    with hosts.session(directory, ""), pytest.raises(SystemExit, match="143"):
        wait_for_a_signal(index == 1)
    assert not list(directory.glob(".session-*"))

    # Weights that no process has whole are gone on from, sampled from and saved.
    trainer = trainer_on(fsdp=2, tensor=2)
    with Checkpoints(directory / "one device", {}) as checkpoints:
        state, _ = checkpoints.restore(trainer.abstract_state)
    assert not jax.tree.leaves(state.params)[0].is_fully_addressable
    with Checkpoints(directory / "eight devices", {}) as checkpoints:
        checkpoints.save(state, {"step": 3})
    weights.save(state.params, tiny.CONFIG, directory / "model")
    local = hosts.on_local_devices(state.params, jnp.float32)
    assert all(x.sharding.device_set == set(jax.local_devices()) for x in jax.tree.leaves(local))
    hosts.barrier("the first has written")
    saved = weights.load(directory / "model", mesh=make_mesh(devices=jax.local_devices()))
    assert tiny.same(local, nnx.state(saved, nnx.Param))

    distil(directory / "sft")
    losses = list(three_updates(*MESHES[8][1], devices=8))
    if hosts.first():
        (directory / "losses.json").write_text(json.dumps(losses))


def test_two_processes(tmp_path):
    trainer = trainer_on()
    state = trainer.init(tiny.params())
    with Checkpoints(tmp_path / "one device", {}) as checkpoints:
        checkpoints.save(state, {"step": 3})
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    of_each = several_hosts.environments(2, devices=4)
    for status, output in several_hosts.finish(several_hosts.start([__file__, tmp_path], of_each, environment)):
        assert status == 0, output
    with Checkpoints(tmp_path / "eight devices", {}) as checkpoints:
        assert tiny.same(checkpoints.restore(trainer.abstract_state)[0], state)
    assert tiny.same(nnx.state(weights.load(tmp_path / "model"), nnx.Param), state.params)
    with tiny.quick_compilation():
        distil(tmp_path / "sft alone")
        one_device = list(three_updates({}, MESHES[8][1][1]))
    np.testing.assert_allclose(json.loads((tmp_path / "losses.json").read_text()), one_device, rtol=2e-4)
    learnt = [scalars(tmp_path / name)[0] for name in ("sft", "sft alone")]
    for tag in ("train/loss", "train/grad_norm", "train/learning_rate"):
        np.testing.assert_allclose(learnt[0][tag], learnt[1][tag], rtol=1e-3)
        assert len(learnt[0][tag]) == 1, "the mean of the steps, from one of the processes"


# ---- a study -----------------------------------------------------------------------------------------------------


def test_a_study_of_two_processes_is_that_of_one(tmp_path, monkeypatch):
    """What its training did, its responses and verdicts, and what the page shows of them."""
    whole = tiny_study.whole()
    tiny_study.write(tmp_path)
    models = config.load(tmp_path / "tiny.yaml").written()["models"]
    only = {name: models[name] for name in ("base", "rl")}
    arguments = [f"models={json.dumps(only)}", "responses=[{models: [rl], problems: [test]}]", "comparisons=[]"]
    command = ["-m", "rlvd_jax.run", "tiny.yaml", "--quiet", *arguments]
    of_each = several_hosts.environments(2, devices=1)
    processes = several_hosts.start(command, of_each, tiny_study.environment(whole.cache), cwd=tmp_path)
    (status, told), (other_status, other) = several_hosts.finish(processes)
    assert status == other_status == 0, told + other
    assert "tiny: 2 steps" in told and "page: runs/tiny/report/index.html" in told
    assert not [line for line in other.splitlines() if not line.startswith("[Gloo]")]

    def results(study):
        found = json.loads((study.report / "results.json").read_text())
        of_model = found["problems"]["test"]["models"]["rl"] | {"pass_hardest": None}  # from comparisons
        return study.result("rl"), of_model, found["progress"]

    monkeypatch.chdir(tmp_path)
    study = Study(config.load("tiny.yaml", arguments))
    responses, found = rows(study, "rl", "test"), results(study)
    shards = sorted(p.name for p in study.responses("rl", "test").directory.glob("*.parquet"))
    assert shards == ["shard-00000.parquet", "shard-00001.parquet"], "each process wrote its own"
    assert len(list((study.training("rl") / "events").iterdir())) == 1
    assert not [p for p in study.root.rglob(".*") if p.name != ".lock"]
    monkeypatch.chdir(whole.directory)
    assert close(responses, rows(whole.study(), "rl", "test"))
    assert found == results(whole.study())


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]))
