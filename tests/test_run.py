import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_study
from safetensors.numpy import load_file, save_file

from rlvd_jax import config, responses, run
from rlvd_jax.errors import UserError
from rlvd_jax.responses import Response
from rlvd_jax.study import Study


@pytest.fixture(autouse=True)
def terminate_as_before():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A study that has not run, in the working directory."""
    tiny_study.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(here, capsys):
    """Runs the command, which must be refused; → the sentence it gives."""

    def refused(*arguments, trace=()) -> str:
        given = any(argument.endswith(".yaml") or "=" not in argument for argument in arguments[:1])
        status = run.main([*([] if given else ["tiny.yaml"]), *arguments, "--quiet"])
        output = capsys.readouterr()
        assert status == 2
        assert output.err.startswith("rlvd_jax: ") and output.err.count("\n") == 1 and "Traceback" not in output.err
        left = {p.relative_to(here / "runs/tiny").as_posix() for p in (here / "runs/tiny").rglob("*") if p.is_file()}
        assert left == set(trace)
        return output.err.removeprefix("rlvd_jax: ").strip()

    return refused


STARTED = (".lock", "arithmetic", "config.yaml")
"""All there is of a study that was refused in its first step."""


# ---- bad input ---------------------------------------------------------------------------------------------------


def test_configs(here, refused):
    assert refused("none.yaml") == "none.yaml: there is no such config file"
    assert refused("folder/none") == "folder/none: there is no such config file"
    assert refused("qwen2.5-3") == "qwen2.5-3: neither a file nor a config of the package (did you mean 'qwen2.5-3b'?)"
    Path("bad.yaml").write_text("study: tiny\nmodels: [\n")
    assert refused("bad.yaml").startswith("bad.yaml, line 3: not valid YAML: ")
    assert refused("sampling.sampels=3") == "tiny.yaml: 'sampling.sampels' is not a setting (did you mean 'samples'?)"
    assert refused("tiny.yaml", "--plan", "samples") == (
        "'samples' is not an override: write key=value, for example sampling.samples=16"
    )


PROBLEMS = {
    '{"problem": "10b"}': "neither an answer nor a solution",
    '{"question": "10b", "answer": "1"}': "no 'problem' (fields there: question, answer)",
    '{"problem": "10b", "answer": ""}': "'answer' is an empty answer",
    '{"problem": "10b", "answer": "1"': "not JSON: Expecting ',' delimiter at column 33",
    '{"id": "test/0", "problem": "10b", "answer": "1"}': "the id 'test/0' is that of line 1 too",
}


@pytest.mark.parametrize("line", PROBLEMS)
@pytest.mark.parametrize("where", ["sampled", "trained on", "evaluated on"])
def test_problems(here, refused, line, where):
    """Wherever the study uses them, before anything is made."""
    Path("bad.jsonl").write_text(json.dumps(tiny_study.problem("test", 0)) + "\n" + line + "\n")
    if where == "sampled":
        arguments = ["problems.test.file=bad.jsonl"]
    else:
        field = "problems" if where == "trained on" else "evaluate_on"
        arguments = ["problems={train: {file: train.jsonl}, test: {file: test.jsonl}, bad: {file: bad.jsonl}}"]
        arguments += [f"models.rl.grpo.{field}=bad"]
    assert refused(*arguments).startswith(f"bad.jsonl, line 2: {PROBLEMS[line]}")


def test_problems_that_are_not_there(here, refused):
    assert refused("problems.test.file=none.jsonl") == "none.jsonl: there is no such problems file"


def change_config(**changes):
    path = Path("base/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(change):
    tensors = load_file("base/model.safetensors")
    change(tensors)
    save_file(tensors, "base/model.safetensors", metadata={"format": "pt"})


def cut(path, size):
    Path(path).write_bytes(Path(path).read_bytes()[:size])


EMBEDDING = "model.embed_tokens.weight"
CHECKPOINTS = {
    "not there": (lambda: shutil.rmtree("base"), r"\./base: there is no such checkpoint directory", ()),
    "no config": (
        lambda: os.unlink("base/config.json"),
        r"base: no config.json, so this is not a Hugging Face",
        [".lock"],
    ),
    "config cut off": (lambda: cut("base/config.json", 40), r"base/config.json: cannot be read as JSON", [".lock"]),
    "another architecture": (
        lambda: change_config(architectures=["LlamaForCausalLM"]),
        r"base/config.json: architecture LlamaForCausalLM is not supported, only Qwen2ForCausalLM is",
        [".lock"],
    ),
    "no weights": (lambda: os.unlink("base/model.safetensors"), r"base: holds no safetensors file", STARTED),
    "weights cut off": (
        lambda: cut("base/model.safetensors", 50_000),
        r"base/model.safetensors: not a whole safetensors file",
        STARTED,
    ),
    "weights cut off in the header": (
        lambda: cut("base/model.safetensors", 100),
        r"base/model.safetensors: not a whole safetensors file",
        STARTED,
    ),
    "a tensor missing": (
        lambda: change_tensors(lambda tensors: tensors.pop("model.norm.weight")),
        r"base: the checkpoint misses model.norm.weight",
        STARTED,
    ),
    "another shape": (
        lambda: change_config(intermediate_size=40),
        r"base: model.layers.0.mlp.gate_proj.weight has shape \[32, 88\], config.json says \[40, 88\]",
        STARTED,
    ),
    "no tokenizer": (lambda: os.unlink("base/tokenizer.json"), r"base: no tokenizer: neither tokenizer.json", STARTED),
    "tokenizer cut off": (
        lambda: cut("base/tokenizer.json", 400),
        r"base: its tokenizer cannot be loaded: ",
        STARTED,
    ),
    "a tokenizer of another model": (
        lambda: (
            change_tensors(lambda tensors: tensors.update({n: tensors[n][:80] for n in (EMBEDDING, "lm_head.weight")})),
            change_config(vocab_size=80),
        ),
        r"base: the tokenizer does not match the model: .* has id 87, and the model has embeddings for 80 ids",
        STARTED,
    ),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints(here, refused, case):
    spoil, message, trace = CHECKPOINTS[case]
    spoil()
    assert re.match(message, refused(trace=trace))


def test_a_checkpoint_of_another_kind_is_told_before_the_work_of_the_others(here, refused):
    path = Path("wise/config.json")
    path.write_text(path.read_text().replace("Qwen2ForCausalLM", "GemmaForCausalLM"))
    assert refused(trace=[".lock"]).startswith("wise/config.json: architecture GemmaForCausalLM is not supported")


def test_a_prompt_longer_than_the_context(here, refused):
    path = Path("test.jsonl")
    path.write_text(path.read_text() + json.dumps({"id": "long", "problem": "10" + "b" * 70, "answer": "1"}) + "\n")
    assert refused(trace=STARTED).startswith(
        "the prompt of problem 'long' has 71 tokens and at most 63 fit in the model's context"
    )
    path.write_text(path.read_text().replace("b" * 70, "b" * 20))
    message = refused("models.base.context=16", trace=STARTED)
    assert message.startswith("the prompt of problem 'long' has 21 tokens and at most 15 fit")


def test_responses_of_an_interrupted_write(here, refused):
    """A temporary file is no response file; one of the right name that is not whole is told and kept."""
    sampled = Study(config.load("tiny.yaml")).responses("base", "test")
    sampled.add([Response("test/0", 0, "t", 1, -1.0, "end", "1", True)])
    (shard,) = sampled.directory.glob("*.parquet")
    folder = sampled.directory.relative_to("runs/tiny").as_posix()
    whole = shard.read_bytes()
    for damaged in (whole[:-50], whole[:30], b""):
        shard.write_bytes(damaged)
        message = refused(trace=[".lock", f"{folder}/set.json", f"{folder}/shard-00000.parquet"])
        assert message.startswith(f"runs/tiny/{folder}/shard-00000.parquet: damaged or cut short (")
        assert shard.read_bytes() == damaged
    shard.rename(shard.with_name(".shard-00000.parquet.tmp"))
    assert run.main(["tiny.yaml", "--plan"]) == 0


def test_responses_made_with_other_settings(here, refused):
    sampled = Study(config.load("tiny.yaml")).responses("base", "test")
    sampled.add([Response("test/0", 0, "t", 1, -1.0, "end", "1", True)])
    path = sampled.directory / "set.json"
    path.write_text(path.read_text().replace('"top_k": 50', '"top_k": 20'))
    before = {p.relative_to(here / "runs/tiny").as_posix() for p in (here / "runs/tiny").rglob("*") if p.is_file()}
    assert "made with other settings: sampling.top_k is 20 there and 50 here" in refused(trace=[".lock", *before])


def test_a_result_that_is_damaged(here, refused):
    folder = Study(config.load("tiny.yaml")).training("rl")
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{")
    trace = [".lock", f"models/{folder.name}/result.json"]
    assert refused(trace=trace) == f"{folder}/result.json: damaged; remove the folder to train again"


def test_where_nothing_can_be_written(here, refused):
    Path("file").touch()
    assert refused("output=file") == "file/tiny: results cannot be written there: Not a directory"
    assert refused("output=file/deeper") == "file/deeper/tiny: results cannot be written there: Not a directory"


def test_a_full_disk(here, refused, monkeypatch):
    """/dev/full is a disk that is."""
    Path("runs/tiny").mkdir(parents=True)
    Path("runs/tiny/.config.yaml.tmp").symlink_to("/dev/full")
    message = refused(trace=[".lock"])
    assert message == "the study's folder: No space left on device; put that right, and the same command goes on"
    os.unlink("runs/tiny/.config.yaml.tmp")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(responses.pq, "write_table", full)
        study = Study(config.load("tiny.yaml"))
        folder = study.responses("base", "test").directory
        trace = [*STARTED, folder.relative_to("runs/tiny").as_posix() + "/set.json"]
        message = refused("sampling.samples=4", "sampling.slots=16", trace=trace)
    assert message.startswith(f"{folder}: responses cannot be written: the disk is full; what was added before is kept")
    assert not any(p.name.endswith(".tmp") for p in folder.iterdir())


def test_an_error_that_is_no_bad_input_keeps_its_traceback(here, monkeypatch):
    for error in (OSError(errno.EIO, "I/O error"), ZeroDivisionError("a bug")):

        def broken(args, error=error):
            raise error

        monkeypatch.setattr(run, "run", broken)
        with pytest.raises(type(error)):
            run.main(["tiny.yaml"])


def test_another_process_runs_the_same_study(here, refused, capsys):
    with run.only_one(Path("runs/tiny")):
        assert refused(trace=[".lock"]) == (
            "runs/tiny: another process runs this study; wait for it or give the study another name"
        )
        assert run.main(["tiny.yaml", "--plan"]) == 0  # looking does no harm
    with run.only_one(Path("runs/tiny")):  # it is free again
        pass


def test_a_mesh_that_the_devices_do_not_make(here, refused):
    assert refused("mesh={data: 1, fsdp: 64}", trace=[".lock", "config.yaml"]).startswith(
        "mesh: data × fsdp × tensor is 1 × 64 × 1, but"
    )


@pytest.mark.parametrize("device", ["tpu", "gpu"])
def test_no_such_device(here, device):
    nothing_there = {"CUDA_VISIBLE_DEVICES": "", "TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "rlvd_jax.run", "tiny.yaml", f"device={device}"],
        env=tiny_study.environment(here / "compiled") | nothing_there,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("rlvd_jax: ")]
    assert len(told) == 1 and told[0].startswith(f"rlvd_jax: device: there is no {device} that JAX can use here (")
    assert "Traceback" not in done.stderr and not Path("runs").exists()


def test_a_device_that_this_process_cannot_change_to(here, refused):
    import jax

    if jax.default_backend() != "cpu":
        pytest.skip("JAX runs on an accelerator here")
    try:
        message = refused("device=gpu")
    finally:
        jax.config.update("jax_platforms", "cpu")
    assert message == "device: JAX runs on cpu in this process already, so it cannot take the gpu"


# ---- the command line --------------------------------------------------------------------------------------------


def test_the_order_of_arguments_does_not_matter(here, capsys):
    orders = [
        ["tiny.yaml", "study=x", "sampling.samples=30", "--plan"],
        ["--plan", "tiny.yaml", "study=x", "sampling.samples=30"],
        ["tiny.yaml", "--plan", "study=x", "--quiet", "sampling.samples=30"],
        ["tiny.yaml", "study=x", "--plan", "sampling.samples=30"],
    ]
    plans = set()
    for order in orders:
        assert run.main(order) == 0
        plans.add(capsys.readouterr().out)
    (plan,) = plans
    assert plan.startswith("x in runs/x\n") and "1.4 k" in plan  # 6 × 30 × 8 tokens


def test_without_a_config_it_is_the_demo(here, monkeypatch):
    seen = []
    monkeypatch.setattr(run, "run", lambda args: seen.append((args.config, args.overrides, args.plan, args.quiet)) or 0)
    for arguments in ([], ["seed=1", "study=b"], ["demo", "seed=1"], ["--plan", "seed=1"], ["tiny.yaml", "--quiet"]):
        assert run.main(arguments) == 0
    assert seen == [
        ("demo", [], False, False),
        ("demo", ["seed=1", "study=b"], False, False),
        ("demo", ["seed=1"], False, False),
        ("demo", ["seed=1"], True, False),
        ("tiny.yaml", [], False, True),
    ]


def test_which_file_a_config_is(here):
    demo = run.config_path("demo")
    assert demo.name == "demo.yaml" and config.load(demo).study == "demo"
    (here / "demo").mkdir()  # a folder of that name is no config
    assert run.config_path("demo") == demo
    assert run.config_path("tiny.yaml") == Path("tiny.yaml")
    Path("plain").write_text(tiny_study.CONFIG)
    assert run.config_path("plain") == Path("plain")
    with pytest.raises(UserError, match=r"nothing: neither a file nor a config of the package \(known: demo, "):
        run.config_path("nothing")


def test_stopped_by_the_user(here, monkeypatch, capsys):
    def stopped(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", stopped)
    assert run.main(["tiny.yaml"]) == 130
    assert capsys.readouterr().err == "\nstopped; the same command goes on from here\n"

    monkeypatch.setattr(run, "run", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as caught:
        run.main(["tiny.yaml"])
    assert caught.value.code == 128 + signal.SIGTERM


def test_a_whole_run(monkeypatch):
    whole = tiny_study.whole()
    process = whole.process
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""  # --quiet
    monkeypatch.chdir(whole.directory)
    study = whole.study()
    lines = process.stdout.splitlines()
    assert lines[0] == "tiny: 18 steps, 0 done; results in runs/tiny"
    assert [line for line in lines if line.startswith("[") and "report" not in line] == [
        f"[{i + 1}/18] {step.name}" for i, step in enumerate(study.steps)
    ]
    assert all(study.done(step) for step in study.steps)
    accuracy = np.mean([row["correct"] for row in study.responses("base", "train").table().to_pylist()])
    table = process.stdout[process.stdout.index("train: 8 questions") :]
    assert re.search(rf"^  base +{100 * accuracy:.1f} \[", table, re.MULTILINE)
    assert re.fullmatch(r"page: runs/tiny/report/index.html \(\d+ min \d+ s\)", lines[-1])
    assert Path("runs/tiny/report/index.html").is_file()
    kept = config.load("runs/tiny/config.yaml")
    assert kept == study.config
    assert not any(p.name.endswith(".tmp") for p in Path("runs").rglob("*"))


def test_a_study_is_not_continued_in_other_arithmetic(tmp_path):
    study = SimpleNamespace(root=tmp_path, config=SimpleNamespace(dtype="auto"))
    run.check_arithmetic(study, "float32")
    run.check_arithmetic(study, "float32")
    with pytest.raises(UserError, match=r"was begun in float32, and dtype: auto is bfloat16"):
        run.check_arithmetic(study, "bfloat16")
    study.config.dtype = "bfloat16"  # said in the config, it is part of every identity
    run.check_arithmetic(study, "bfloat16")
