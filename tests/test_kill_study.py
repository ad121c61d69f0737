import importlib.util
import json
import os
import shutil

import pytest
import tiny_study

from rlvd_jax import config
from rlvd_jax.board import Board
from rlvd_jax.responses import Response

TOOL = tiny_study.ROOT / "tools" / "kill_study.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("kill_study", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def here(tmp_path, monkeypatch):
    tiny_study.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_two_kills(here, tool, monkeypatch, capsys):
    """Of a study with a GRPO run."""
    for name, value in tiny_study.environment(tiny_study.whole().cache).items():
        monkeypatch.setenv(name, value)
    models = config.load("tiny.yaml").written()["models"]
    some = json.dumps({name: models[name] for name in ("base", "rl")})
    overrides = [f"models={some}", "responses=[{models: [rl], problems: [test]}]", "comparisons=[]"]
    status = tool.main(["tiny.yaml", *overrides, "--kills", "2", "--keep", "kept"])
    out, err = capsys.readouterr()
    assert status == 0, err
    lines = out.splitlines()
    assert [line.split()[0] for line in lines if "SIG" in line] == ["1", "2"]
    assert lines[-1].startswith("2 kills, ")


def test_what_it_would_find(here, tool):
    study = tool.Study(config.load("tiny.yaml"))
    sampled = study.responses("base", "test")
    sampled.add([Response("test/0", 0, "t", 1, -1.0, "end", "1", True)])
    folder = study.training("rl")
    (folder / "checkpoints" / "3").mkdir(parents=True)
    before = tool.look(study)
    assert before.describe() == "1 shards, 0 trainings, to step: rl 3"
    with Board(folder / "events", 4):
        tool.check_kept(before, tool.look(study))
    with Board(folder / "events", 3), pytest.raises(tool.Wrong, match="had a checkpoint of step 3, and went on with"):
        tool.check_kept(before, tool.look(study))

    shutil.rmtree(folder / "events")
    (folder / "result.json").write_text("{}")
    finished = tool.look(study)
    tool.check_kept(before, finished)
    os.utime(folder / "result.json", (0, 0))
    with pytest.raises(tool.Wrong, match="the training of rl was finished, and was made again"):
        tool.check_kept(finished, tool.look(study))
    (shard,) = sampled.directory.glob("shard-*")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(tool.Wrong, match=r"shard-00000\.parquet was sampled and kept, and is not there any more as it"):
        tool.check_kept(before, tool.look(study))
    shard.unlink()
    with pytest.raises(tool.Wrong, match="ended with sample base on test not done"):
        tool.end(study)
