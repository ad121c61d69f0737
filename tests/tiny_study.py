"""A whole study small enough for tests: checkpoints made by hand, problems, and the config over them.

The models know which token follows which, nothing else: layers that add nothing, one-hot embeddings, and a table of
log-probabilities as the output matrix. What a response may be, and how probable it is, is then known exactly.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save_file

from rlvd_jax import config
from rlvd_jax.demo import world
from rlvd_jax.study import Study

ROOT = Path(__file__).parents[1]
WORDS = world.vocabulary()
ID = {word: i for i, word in enumerate(WORDS)}
END = "<|endoftext|>"
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, WIDE = len(WORDS), 2, 2, 1, 16, 32

ANSWERS = {
    "train": ["00", "01", "02", "03", "00", "01", "04", "49"],
    "test": ["00", "01", "02", "03", "04", "49"],
}
"""Gold answers; no model ever answers 49."""

BASE = {"00": 0.45, "01": 0.3, "02": 0.15, "03": 0.08, "04": 0.02}
WISE = {"00": 0.1, "01": 0.1, "02": 0.2, "03": 0.3, "04": 0.3}
"""How probable each answer of a model is, at temperature 1."""


def follows(answers: dict[str, float]) -> dict[str, dict[str, float]]:
    """Word → the words after it and their probabilities."""
    return {
        "\\boxed{": answers,
        " ": {"\\boxed{": 0.5, "wait": 0.5},
        "wait": {" ": 0.5, "\\boxed{": 0.4, END: 0.1},
        "}": {END: 0.95, " ": 0.05},
        **{value: {"}": 1.0} for value in answers},
        **{operator: {"\\boxed{": 0.8, " ": 0.2} for operator in world.OPERATORS},
    }


def write_checkpoint(directory: Path, answers: dict[str, float], seed: int = 0) -> None:
    """A Hugging Face directory of a model that answers so."""
    table = np.full((len(WORDS), len(WORDS)), -12.0)  # [next, word]
    for word, after in follows(answers).items():
        for then, p in after.items():
            table[ID[then], ID[word]] = np.log(p)
    rng = np.random.default_rng(seed)
    random = lambda *shape: rng.normal(size=shape, scale=0.1)  # noqa: E731
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    tensors = {
        "model.embed_tokens.weight": np.eye(HIDDEN),
        "model.norm.weight": np.ones(HIDDEN),
        "lm_head.weight": table / np.sqrt(HIDDEN),  # the norm makes a one-hot vector as long as this
    }
    for i in range(LAYERS):
        layer = {
            "input_layernorm.weight": np.ones(HIDDEN),
            "post_attention_layernorm.weight": np.ones(HIDDEN),
            "self_attn.q_proj.weight": random(q, HIDDEN),
            "self_attn.q_proj.bias": random(q),
            "self_attn.k_proj.weight": random(kv, HIDDEN),
            "self_attn.k_proj.bias": random(kv),
            "self_attn.v_proj.weight": random(kv, HIDDEN),
            "self_attn.v_proj.bias": random(kv),
            "self_attn.o_proj.weight": np.zeros((HIDDEN, q)),
            "mlp.gate_proj.weight": random(WIDE, HIDDEN),
            "mlp.up_proj.weight": random(WIDE, HIDDEN),
            "mlp.down_proj.weight": np.zeros((HIDDEN, WIDE)),
        }
        tensors |= {f"model.layers.{i}.{name}": value for name, value in layer.items()}
    about = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": len(WORDS),
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "tie_word_embeddings": False,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-12,
        "eos_token_id": ID[END],
    }
    world.write_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps(about))
    tensors = {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def problem(split: str, i: int) -> dict:
    return {"id": f"{split}/{i}", "problem": f"{10 + i}{'bT'[: 1 + i % 2]}", "answer": ANSWERS[split][i]}


CONFIG = """
study: tiny
device: cpu
problems:
  train: {file: train.jsonl}
  test: {file: test.jsonl}
models:
  base: {from: ./base}
  wise: {from: ./wise}
  rl:
    grpo: {start: base, problems: train, steps: 4, questions: 4, samples: 6, evaluate_on: test, evaluate_every: 2,
           evaluate_samples: 4, keep: last, checkpoint_every: 1, optimizer: {learning_rate: 2e-3, warmup_steps: 1}}
  base-from-base:
    sft: &sft {student: base, teacher: base, problems: train, keep: 4, epochs: 2, batch: 4, max_length: 128,
               checkpoint_every: 1, optimizer: {learning_rate: 2e-3, warmup_steps: 1}}
  rl-from-rl: {sft: {<<: *sft, student: rl, teacher: rl}}
  base-from-rl: {sft: {<<: *sft, teacher: rl}}
  reasoning-only: {sft: {<<: *sft, teacher: wise, samples: 4, keep: 2, only_solved_by: base}}
sampling: {samples: 24, max_tokens: 8, slots: 32}
responses:
  - {models: [base, rl, base-from-base, rl-from-rl, base-from-rl], problems: [test, train]}
  - {models: [wise, reasoning-only], problems: [test], samples: 16}
comparisons:
  - {base: base, other: rl, problems: [test, train], claim: rl}
  - {base: base, other: reasoning-only, problems: [test], claim: reasoning_only}
bootstrap: 100
hardest: 3
"""


class Whole(NamedTuple):
    directory: Path
    cache: Path
    """What was compiled, for other processes."""
    process: subprocess.CompletedProcess

    def study(self) -> Study:
        """Its steps, to be looked at with `directory` as the working directory."""
        return Study(config.load("tiny.yaml"))


def write(directory: Path) -> Path:
    """Everything that the study needs, and its config; → the config's path. It runs in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, answers in (("base", BASE), ("wise", WISE)):
        write_checkpoint(directory / name, answers)
    for split, answers in ANSWERS.items():
        lines = [json.dumps(problem(split, i)) for i in range(len(answers))]
        (directory / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    (directory / "tiny.yaml").write_text(CONFIG)
    return directory / "tiny.yaml"


def environment(cache: Path) -> dict[str, str]:
    """Of a process that runs a study, one CPU device to it; what it compiles is kept for the next one in `cache`, and
    compiled with as much care as here (conftest.py)."""
    env = {k: v for k, v in os.environ.items() if k == "XLA_FLAGS" or not k.startswith(("JAX_", "XLA_"))}
    return env | {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def run(directory: Path, *arguments: str, cache: Path) -> subprocess.CompletedProcess:
    """The command, in a process of its own."""
    command = [sys.executable, "-m", "rlvd_jax.run", "tiny.yaml", *arguments]
    env = environment(cache)
    return subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True, timeout=280, check=False)


@functools.cache
def whole() -> Whole:
    """A study that ran from beginning to end with nothing in its way, once for all tests. Don't write there."""
    directory = Path(tempfile.mkdtemp(prefix="tiny-study-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    write(directory)
    cache = directory / "compiled"
    return Whole(directory, cache, run(directory, "--quiet", cache=cache))
