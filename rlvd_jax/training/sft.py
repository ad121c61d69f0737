"""SFT: learn a teacher's responses, packed into rows, for a number of epochs (section 5.1, appendix A.11)."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from rlvd_jax.board import Board
from rlvd_jax.config import SFTConfig
from rlvd_jax.errors import UserError
from rlvd_jax.qwen2 import Qwen2
from rlvd_jax.training.batches import Example, supervised
from rlvd_jax.training.checkpoints import Checkpoints
from rlvd_jax.training.interruption import Interruption, Stopped
from rlvd_jax.training.profile import Profile
from rlvd_jax.training.step import check_finite, discard, earns_unrolling, get_trainer

UPDATES = 4000  # that earn back what it takes to compile each layer by itself, for each of several lengths of rows
LOG_EVERY = 10  # steps; the metrics of so many are fetched from the device at once and averaged


def make_examples(
    responses: Iterable[tuple[Sequence[int], str, str]],
    encode: Callable[[str], Sequence[int]],
    end_token: int,
    max_length: int,
) -> tuple[list[Example], int]:
    """(examples, how many were left out because they have more than `max_length` tokens).

    responses: (prompt's tokens, text, stop) each; encode: a text's tokens, no special ones added. A response that ended
    by itself (stop "end") gets `end_token` as its last; one that was cut off does not, so nobody learns to stop there.
    """
    examples, left_out = [], 0
    for prompt, text, stop in responses:
        tokens = np.array([*encode(text), *([end_token] if stop == "end" else [])], np.int32)
        if not len(tokens) or len(prompt) + len(tokens) > max_length:
            left_out += 1
        else:
            examples.append(Example(prompt, tokens))
    return examples, left_out


def train(
    config: SFTConfig,
    *,
    model: Qwen2,
    params: nnx.State,
    mesh: Mesh,
    examples: Sequence[Example],
    directory: str | Path,
    seed: int,
    profile: range | None = None,
    save_last: bool = True,
    progress: bool = True,
) -> tuple[nnx.State, dict]:
    """Train a model on examples, or go on with it; → (weights, what happened).

    model, params, mesh, directory, profile, save_last and the exceptions are as in `grpo.train`. What happened is
    JSON-able: "step", the optimiser steps made, and "data", the position in the examples.
    """
    if not examples:
        raise UserError("sft: there is no example to learn from; is there a correct response that fits max_length?")
    identity = {  # what may change when a run goes on is left out
        "sft": config.model_dump(mode="json", exclude={"checkpoint_every", "micro_rows", "unroll"}),
        "examples": digest(examples),
        "model": model.config.to_dict() | {"dtype": jnp.dtype(model.dtype).name},
        "seed": seed,
    }
    epoch = -(-len(examples) // config.batch)  # steps
    steps = config.epochs * epoch
    unroll = earns_unrolling(config.unroll, mesh, steps, UPDATES)
    trainer = get_trainer(model.config, jnp.dtype(model.dtype), mesh, config.optimizer, unroll=unroll)
    batches = iter(
        supervised(
            examples,
            batch=config.batch,
            epochs=config.epochs,
            seed=seed,
            row_tokens=config.max_length,
            micro_rows=config.micro_rows or trainer.rows_at_once(config.max_length),
            shards=trainer.batch_shards,
        )
    )
    directory = Path(directory)
    with Interruption() as interruption, Checkpoints(directory / "checkpoints", identity) as checkpoints:
        if checkpoints.latest is None:
            state, done = trainer.init(params), {"step": 0, "data": batches.get_state()}
        else:
            discard(params)
            state, done = checkpoints.restore(trainer.abstract_state)
            batches.set_state(done["data"])
        bar = tqdm(total=steps, initial=done["step"], desc="SFT", unit="step", disable=not progress)
        events = directory / "events"
        with Board(events, done["step"] + 1) as board, Profile(profile, events) as tracer, bar:
            window, start = [], time.perf_counter()
            try:
                for batch in batches:
                    step = done["step"] + 1
                    with tracer.step(step) as traced:
                        state, metrics = trainer.update(state, trainer.place(batch))
                        if traced:  # the trace is to end after the device's work
                            jax.block_until_ready(metrics)
                    window.append(metrics)
                    done = {"step": step, "data": batches.get_state()}
                    saves = save_last if step == steps else step % config.checkpoint_every == 0
                    if step % LOG_EVERY == 0 or saves or step == steps:
                        mean = jax.tree.map(lambda *x: float(np.mean(x)), *jax.device_get(window))
                        check_finite(mean, step)
                        rate = len(window) * mean["tokens"] / (time.perf_counter() - start)
                        scalars = {f"train/{name}": value for name, value in mean.items()}
                        board.scalars(step, scalars | {"train/epoch": step / epoch, "time/tokens_per_second": rate})
                        bar.set_postfix({"loss": f"{mean['loss']:.3f}", "tokens/s": f"{rate:,.0f}"})
                        window, start = [], time.perf_counter()
                    bar.update()
                    if saves:
                        checkpoints.save(state, done)
                    interruption.agree()
            except Stopped:
                for metrics in jax.device_get(window):
                    check_finite(metrics, done["step"])
                checkpoints.save(state, done)
                checkpoints.wait()
                interruption.leave()
        return state.params, done


def digest(examples: Sequence[Example]) -> str:
    """Changes whenever an example does."""
    h = hashlib.sha256()
    for e in examples:
        for part in (e.prompt, e.response):
            h.update(np.asarray(part, np.int32).tobytes() + b"|")
    return h.hexdigest()[:16]
