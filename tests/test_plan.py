import json
import math
import re
import subprocess
import sys

import local_hub
import pytest
import tiny_study

from rlvd_jax import config
from rlvd_jax.plan import amount, cost, plan, sampling_memory, size, training_memory
from rlvd_jax.qwen2.config import Qwen2Config
from rlvd_jax.responses import Response
from rlvd_jax.study import Step, Study


@pytest.fixture
def here(tmp_path, monkeypatch):
    tiny_study.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def study(*overrides) -> Study:
    return Study(config.load("tiny.yaml", overrides))


def lines(text: str) -> dict[str, list[str]]:
    """Step → its cells."""
    return {cells[0]: cells[1:] for line in text.splitlines() if len(cells := re.split(r"\s{2,}", line)) > 1}


def test_the_plan_of_a_study_that_has_not_run(here):
    text = plan(study())
    assert text.startswith("tiny in runs/tiny\n")
    rows = lines(text)
    assert rows.pop("step") == ["state", "sample tokens", "train tokens", "memory/device"]
    assert list(rows) == [step.name for step in study().steps]
    assert [cells[0] for cells in rows.values()] == ["next", *["to do"] * 17]
    assert rows["sample base on test"][1] == "1.2 k"  # 6 questions × 24 samples × at most 8 tokens
    # 4 steps of 4 × 6 responses, and three evaluations of 6 × 4: 168 × 8 and 96 × 8 tokens
    assert rows["train rl"][1:3] == ["1.3 k", "768"]
    assert rows["train base-from-base"][1] == "512"  # 2 epochs × 8 questions × 4 responses × 8 tokens
    assert rows["train reasoning-only"][1] == "256"
    assert not (here / "runs").exists(), "planning leaves no trace"
    assert max(map(len, text.splitlines())) <= 120


def test_what_is_done_and_what_is_partly_there(here):
    s = study()
    there = s.responses("base", "test")
    there.add([Response(f"test/{i}", k, "", 3, -1.0, "end", "1", True) for i in range(6) for k in range(24)])
    s.responses("base", "train").add([Response("train/3", k, "", 5, -1.0, "end", "1", True) for k in range(20)])
    s.training("rl").mkdir(parents=True)
    (s.training("rl") / "result.json").write_text("{}")
    rows = lines(plan(study()))
    assert rows["sample base on test"] == ["done"] and rows["train rl"] == ["done"]
    # 172 responses are left, at the mean length of those that are there; other models are taken to be alike.
    assert rows["sample base on train"][:2] == ["next, 20 of 192 there", str(172 * 5)]
    assert rows["sample rl on train"][:2] == ["to do", str(192 * 5)]
    assert rows["sample rl on test"][:2] == ["to do", str(144 * 3)]
    assert rows["sample wise on test"][:2] == ["to do", str(96 * 3)]
    assert rows["train base-from-base"][1] == str(2 * 8 * 4 * 5)


BIG = Qwen2Config(
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=11008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    head_dim=128,
    tie_word_embeddings=True,
)
"""Qwen2.5-3B."""


def paper(tmp_path, *overrides) -> Study:
    """The paper's settings for the 3B model, on problems and a checkpoint that are here."""
    (tmp_path / "big").mkdir(exist_ok=True)
    (tmp_path / "big" / "config.json").write_text(json.dumps(BIG.to_dict()))
    for name, count in (("train", 7500), ("test", 500)):
        rows = [json.dumps({"problem": "p", "answer": "1"}) for _ in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    text = f"""
study: paper
output: {tmp_path}
device: gpu
problems: {{train: {{file: {tmp_path}/train.jsonl}}, test: {{file: {tmp_path}/test.jsonl}}}}
models:
  base: {{from: {tmp_path}/big}}
  rl: {{grpo: {{start: base, problems: train, evaluate_on: test}}}}
  pupil: {{sft: {{student: base, teacher: base, problems: train}}}}
responses: [{{models: [base, rl, pupil], problems: [test]}}]
"""
    path = tmp_path / "paper.yaml"
    path.write_text(text)
    return Study(config.load(path, overrides))


def test_costs_at_the_papers_size(tmp_path):
    s = paper(tmp_path)
    weights = BIG.parameters
    assert weights == 3_085_938_688
    step = cost(s, Step("respond", "base", "test", 256))
    assert (step.sampled, step.trained) == (500 * 256 * 4000, 0)
    # bfloat16 weights, and keys and values of 4,288 positions in 36 layers, 2 heads of 128: of one response, to which
    # pages add as many, or of all of a GPU's slots
    cache = 4288 * 36 * 2 * 2 * 128 * 2
    assert 2 * weights + 2 * cache < step.memory < 2 * weights + 2 * cache + 2**28
    assert step.most == pytest.approx(2 * weights + 4096 * cache, rel=0.03) and step.most > 2 * weights + 4096 * cache
    fewer = cost(paper(tmp_path, "sampling.slots=64"), Step("respond", "base", "test", 256))
    assert fewer.memory == step.memory and fewer.most == pytest.approx(2 * weights + 64 * cache, rel=0.03)
    assert cost(paper(tmp_path, "device=auto"), Step("respond", "base", "test", 256)) == step
    tpu = cost(paper(tmp_path, "device=tpu"), Step("respond", "base", "test", 256))
    assert tpu.most == pytest.approx(2 * weights + 1024 * cache, rel=0.03)
    row = next(x for x in plan(s).splitlines() if x.startswith("sample base on test"))
    assert row.endswith(f"{size(step.memory)} to {size(step.most)}")

    step = cost(s, Step("train", "rl"))
    assert step.sampled == (225 * 280 + 10 * 500 * 10) * 4000  # evaluated at step 0, 25, ..., 225
    assert step.trained == 225 * 280 * 4000
    # The training state is 12 bytes a weight at least while it samples, 16 and activations while it trains.
    assert step.memory > 16 * weights
    update = training_memory(BIG, 2, 4256, False)
    least, most = sampling_memory(BIG, 2, s.config.sampling, 280, "gpu")
    assert (step.memory, step.most) == (max(update, least + 12 * weights), most + 12 * weights)
    twice = cost(paper(tmp_path, "models.rl.grpo.updates=2"), Step("train", "rl"))
    assert (twice.sampled, twice.trained) == (step.sampled, 2 * step.trained)
    hard = cost(paper(tmp_path, "models.rl.grpo.hard_samples=40"), Step("train", "rl"))
    assert (hard.sampled - step.sampled, hard.trained) == (225 * 28 * 30 * 4000, step.trained)
    none = cost(paper(tmp_path, "models.rl.grpo.evaluate_every="), Step("train", "rl"))
    assert none.sampled == 225 * 280 * 4000
    for rows in (1, 16):  # where sampling takes most, and where training does
        own = f"models.rl.grpo.micro_rows={rows}"
        plain, reference = (
            cost(paper(tmp_path, own, f"models.rl.grpo.kl={kl}"), Step("train", "rl")) for kl in (0, 0.1)
        )
        assert reference.memory == plain.memory + 2 * weights and reference.most == plain.most + 2 * weights

    step = cost(s, Step("train", "pupil"))
    assert (step.sampled, step.trained) == (0, 5 * 7500 * 8 * 4000)
    # Float32 weights, gradient and two moments, the bfloat16 copy, and for 16,000 tokens the residual stream of 36
    # layers and three blocks of logits at most.
    state = 18 * weights + 16000 * 36 * 2048 * 2
    assert state < step.memory < state + 3 * 2**29 + 4 * 2**30 and step.most == step.memory
    assert training_memory(BIG, 4, 4096, False) > training_memory(BIG, 2, 4096, False) - 2 * weights

    slow = paper(tmp_path, "device=cpu")  # float32 there
    step = cost(slow, Step("respond", "base", "test", 256))
    assert step.memory == step.most == pytest.approx(4 * weights + 1024 * 2 * cache, rel=0.03)


def test_amounts():
    shown = {0: "0", 12.4: "12", 999: "999", 1000: "1.0 k", 1_234_567: "1.2 M", 5.12e8: "512.0 M", 7.68e9: "7.7 G"}
    assert {value: amount(value) for value in shown} == shown
    assert math.isclose(float(amount(252e9).split()[0]), 252)


def test_planning_needs_no_device_and_no_weights(tmp_path):
    """A checkpoint of the hub: its config.json alone is asked for, and JAX starts no device."""
    files = {
        "config.json": json.dumps(BIG.to_dict()).encode(),
        "model.safetensors": b"weights",
        "tokenizer.json": b"{}",
    }
    tiny_study.write(tmp_path)
    code = (
        "import sys; from rlvd_jax.run import main; status = main(sys.argv[1:]); "
        "from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized(); sys.exit(status)"
    )
    with local_hub.serve(models={"some/model": files}) as server:
        done = subprocess.run(
            [sys.executable, "-c", code, "--plan", "tiny.yaml", "models.base.from=some/model", "device=tpu"],
            cwd=tmp_path,
            env=local_hub.environment(tmp_path / "hub", server.url),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert server.asked == ["some/model/config.json"]
    rows = lines(done.stdout)
    assert rows["sample base on test"][0] == "next" and rows["sample base on test"][-1].endswith(" GiB")
    assert rows["sample wise on test"][-1].endswith(" MiB")
    assert done.stderr == "" and not (tmp_path / "runs").exists()
