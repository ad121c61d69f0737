import json
import subprocess
import sys
from pathlib import Path

import local_hub
import pytest

from rlvd_jax import hub
from rlvd_jax.errors import UserError

INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
MODELS = {
    "some/model": {
        "config.json": b'{"model_type": "qwen2"}',
        "model.safetensors": b"weights",
        "tokenizer.json": b"{}",
        "generation_config.json": b"{}",
        "chat_template.jinja": b"{{ x }}",
        "pytorch_model.bin": b"not wanted",
        "README.md": b"not wanted",
        "original/consolidated.pth": b"not wanted",
    },
    "some/shards": {
        "config.json": b"{}",
        "model.safetensors.index.json": INDEX,
        "model-1.safetensors": b"1",
        "model-2.safetensors": b"2",
        "vocab.json": b"{}",
        "merges.txt": b"",
    },
    "some/torch": {"config.json": b"{}", "pytorch_model.bin": b"weights"},
    "some/empty": {"README.md": b"# Nothing"},
}

CLIENT = """
import json, sys
from rlvd_jax import hub
from rlvd_jax.errors import UserError

for what, name in json.load(sys.stdin):
    try:
        print(json.dumps(str(getattr(hub, what)(name))))
    except UserError as error:
        print(json.dumps(["UserError", str(error)]))
"""


def client(home, endpoint, *requests, **environment):
    done = subprocess.run(
        [sys.executable, "-c", CLIENT],
        input=json.dumps(requests),
        env=local_hub.environment(home, endpoint, **environment),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_directory_here(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "owner" / "name"
    directory.mkdir(parents=True)
    for name in (directory, str(directory), "owner/name", "./owner/name", "~/owner/name"):
        assert hub.resolve(name) == hub.config_directory(name) == hub.local(name)
        assert hub.local(name).samefile(directory)
    assert hub.local("owner/other") is None
    (tmp_path / "file").touch()
    for name in (tmp_path / "none", "none", "./owner/other", "~/none", "a/b/c", "file", tmp_path / "file"):
        with pytest.raises(UserError, match="there is no such checkpoint directory, and it is not a hub name"):
            hub.resolve(name)


def test_the_hub(tmp_path):
    with local_hub.serve(models=MODELS, gated=["some/gated"]) as server:
        # Planning asks for the configuration alone, and the folder is called by its commit.
        planned, *_ = client(
            tmp_path, server.url, ["config_directory", "some/model"], ["config_directory", "some/shards"]
        )
        assert server.asked == ["some/model/config.json", "some/shards/config.json"]
        assert planned.endswith(f"/{local_hub.SHA}")

        answers = client(
            tmp_path,
            server.url,
            ["resolve", "some/model"],
            ["resolve", "some/torch"],
            ["resolve", "some/empty"],
            ["resolve", "some/other"],
            ["resolve", "some/gated"],
            ["resolve", "so me/model"],
        )
        assert answers[0] == planned
        there = sorted(
            name for name in MODELS["some/model"] if name.partition(".")[2] in ("json", "safetensors", "jinja")
        )
        assert sorted(p.name for p in Path(planned).iterdir()) == there
        assert all((Path(planned) / name).read_bytes() == MODELS["some/model"][name] for name in there)
        assert not any("pytorch" in name or "README" in name or "pth" in name for name in server.asked)
        nothing = "no such directory here, and no checkpoint from the hub: "
        assert [message for _, message in answers[1:5]] == [
            "some/torch: no safetensors file is here, and either the hub has none of it or it cannot be reached",
            f"some/empty: {nothing}what the hub has of that name has no config.json",
            f"some/other: {nothing}the hub has no such model, or it is private and needs HF_TOKEN",
            f"some/gated: {nothing}the hub asks to accept its terms there, and to set HF_TOKEN",
        ]
        assert answers[5][1].startswith(f"so me/model: {nothing}Repo id must use alphanumeric chars")

        # What is here is not asked for again.
        server.asked.clear()
        assert client(tmp_path, server.url, ["resolve", "some/model"]) == [planned] and server.asked == []

    # The hub is out of reach now. What is here whole will do, by itself and at once; what is not is told apart.
    assert client(tmp_path, server.url, ["resolve", "some/model"]) == [planned]
    whole, part, never = client(
        tmp_path,
        server.url,
        ["resolve", "some/model"],
        ["resolve", "some/shards"],
        ["config_directory", "some/other"],
        HF_HUB_OFFLINE="1",
    )
    assert whole == planned
    assert part[1].startswith(
        "some/shards: no safetensors file is here, and either the hub has none of it or it cannot"
    )
    assert never[1] == f"some/other: {nothing}the hub cannot be reached and no earlier download is kept"


def test_a_download_that_was_interrupted_goes_on(tmp_path):
    with local_hub.serve(models=MODELS) as server:
        (first,) = client(tmp_path, server.url, ["resolve", "some/shards"])
        shard = Path(first) / "model-2.safetensors"
        shard.resolve().unlink()
        shard.unlink()
        server.asked.clear()
        assert client(tmp_path, server.url, ["resolve", "some/shards"]) == [first]
        assert server.asked == ["some/shards/model-2.safetensors"] and shard.read_bytes() == b"2"
