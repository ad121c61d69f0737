"""A tiny model and what training it needs, for the tests of training; also run as a script that is killed."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
from flax import nnx

from rlvd_jax.config import GRPOConfig, MeshConfig, OptimizerConfig, SamplingConfig, SFTConfig
from rlvd_jax.problems import Problem
from rlvd_jax.qwen2 import Qwen2, Qwen2Config
from rlvd_jax.qwen2.mesh import make_mesh
from rlvd_jax.sampling import Sampler
from rlvd_jax.training import grpo, sft
from rlvd_jax.training.batches import Example
from rlvd_jax.training.step import Trainer


def run_on_four_devices(script: str) -> None:
    """Run a test's file in another process, on simulated devices."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "4",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    out = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=900)
    assert out.returncode == 0, out.stderr


CONFIG = Qwen2Config(
    vocab_size=24,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    tie_word_embeddings=True,
    max_position_embeddings=64,
)
END = 1
OPTIMIZER = OptimizerConfig(learning_rate=3e-2, warmup_steps=2, clip_norm=1.0, weight_decay=0.0)


def params(seed: int = 0) -> nnx.State:
    """Fresh weights, large enough to matter; the training that gets them may destroy them."""
    state = nnx.split(Qwen2(CONFIG, nnx.Rngs(seed)), nnx.Param)[1]
    return jax.tree.map(lambda x: x * 5 if x.ndim > 1 else x, state)


def mesh(**axes):
    return make_mesh(MeshConfig(**axes))


def leaves(tree) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def same(a, b) -> bool:
    """Bit for bit."""
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(leaves(a), leaves(b), strict=True))


def examples(number: int, seed: int = 0, policy: bool = False) -> list[Example]:
    """Random prompts of 2–6 and responses of 1–12 tokens."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(number):
        prompt, response = rng.integers(2, 24, rng.integers(2, 7)), rng.integers(2, 24, rng.integers(1, 13))
        extra = (rng.normal(-3, 0.3, len(response)), float(rng.normal())) if policy else ()
        made.append(Example(tuple(map(int, prompt)), response, *extra))
    return made


def all_reduced(program: str, collective: str = "all-reduce", loops: bool = True) -> tuple[int, int]:
    """Elements that a compiled program's all-reduces return, or others of its collectives: of those inside loops, each
    counted once, and outside. loops: whether it has any."""
    parts = dict(re.findall(r"^(?:ENTRY )?%([\w.-]+) [^\n]*\{\n(.*?)^\}", program, re.MULTILINE | re.DOTALL))
    inside, new = set(), set(re.findall(r"body=%([\w.-]+)", program))
    while new:
        inside |= new
        new = {name for part in new for name in re.findall(r"%([\w.-]+)", parts[part]) if name in parts} - inside

    def elements(part):
        results = re.findall(rf"= (.*) {collective}(?:-start)?\(", part)
        shapes = re.findall(r"\w\[([\d,]*)\]", " ".join(results))
        return sum(math.prod(int(n) for n in shape.split(",") if n) for shape in shapes)

    assert bool(inside) == loops, "the program is not written as it was"
    in_loops = sum(elements(parts[name]) for name in inside)
    return in_loops, sum(map(elements, parts.values())) - in_loops


class Grader:
    """A response is correct if it names the gold token; `at` is called with the number of the submission."""

    def __init__(self, at=lambda number: None):
        self.at, self.submissions = at, 0

    def submit(self, pairs):
        self.submissions += 1
        self.at(self.submissions)
        future = Future()
        future.set_result([SimpleNamespace(correct=gold in text.split()) for gold, text in pairs])
        return future


def decode(tokens) -> str:
    return " ".join(str(t) for t in tokens if t != END)


def questions(number: int = 5) -> grpo.Questions:
    problems = [Problem(id=f"q{i}", problem=f"say {i + 2}", answer=str(i + 2)) for i in range(number)]
    return grpo.Questions(problems, [(2 + i, 3, 4 + i % 2) for i in range(number)])


def sampler(**settings):
    settings = {"max_tokens": 8, "temperature": 1.0, "top_k": 0} | settings
    return Sampler(CONFIG, SamplingConfig(**settings), (END,))


def grpo_config(**changes) -> GRPOConfig:
    settings = {
        "start": "m",
        "problems": "p",
        "steps": 5,
        "questions": 3,
        "samples": 4,
        "optimizer": OPTIMIZER,
        "evaluate_every": 2,
        "evaluate_samples": 2,
        "checkpoint_every": 2,
        "row_tokens": 32,
    }
    return GRPOConfig(**settings | changes)


def run_grpo(directory, *, config=None, grader=None, samplers=None, evaluate=True, **changes):
    practice, testing = samplers or (sampler(), sampler(temperature=0.7))
    arguments = {
        "model": Qwen2(CONFIG),
        "params": params(),
        "mesh": mesh(),
        "questions": questions(),
        "sampler": practice,
        "grader": grader or Grader(),
        "decode": decode,
        "evaluation": grpo.Evaluation(questions(3), testing, 2) if evaluate else None,
        "directory": directory,
        "seed": 7,
        "progress": False,
    }
    return grpo.train(config or grpo_config(), **arguments | changes)


def sft_config(**changes) -> SFTConfig:
    settings = {
        "student": "m",
        "teacher": "t",
        "problems": "p",
        "epochs": 2,
        "batch": 4,
        "max_length": 32,
        "optimizer": OPTIMIZER.model_dump(),
        "checkpoint_every": 3,
    }
    return SFTConfig(**settings | changes)


def run_sft(directory, *, config=None, **changes):
    arguments = {
        "model": Qwen2(CONFIG),
        "params": params(),
        "mesh": mesh(),
        "examples": examples(18),
        "directory": directory,
        "seed": 7,
        "progress": False,
    }
    return sft.train(config or sft_config(), **arguments | changes)


@contextlib.contextmanager
def quick_compilation():
    """Half the time to compile, for code that runs once. Such programs round otherwise, so no other test gets them."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


def at(number: int, name: str):
    """Called with n = 1, 2, …: sends this process the named signal at the `number`-th."""

    def send(n):
        if n == number:
            os.kill(os.getpid(), getattr(signal, name))

    return send


def rows_of_a_micro_batch(run, monkeypatch) -> int:
    """Of the first batch of a training, `run()`, on a device that has room for two rows of 32 tokens at once."""

    class Enough(Exception):
        pass

    def place(self, batch):
        raise Enough(batch["tokens"].shape[1])

    monkeypatch.setattr(Trainer, "rows_at_once", lambda self, row_tokens: {32: 2}[row_tokens])
    monkeypatch.setattr(Trainer, "place", place)
    try:
        run()
    except Enough as shape:
        return shape.args[0]
    raise AssertionError("there was no batch")


def count_batches(call, patch=setattr):
    """Have `call` called with the number of each batch that is put on the devices."""
    place, numbers = Trainer.place, itertools.count(1)

    def counted(self, batch):
        call(next(numbers))
        return place(self, batch)

    patch(Trainer, "place", counted)


if __name__ == "__main__":  # what directory number: train there, and be killed at that submission or batch
    what, directory, number = sys.argv[1:]
    killer = at(int(number), "SIGKILL")
    if what == "grpo":
        run_grpo(Path(directory), grader=Grader(killer))
    else:
        count_batches(killer)
        run_sft(Path(directory))
