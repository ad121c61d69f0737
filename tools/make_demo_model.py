"""Makes the demo's two models, demo-base and demo-teacher: `python tools/make_demo_model.py`.

Data: the two corpora of `rlvd_jax/demo/world.py`, drawn as they are learnt, and nothing else; no problem of the demo's
test set that has several operators is in them. Loss on the responses only. Both models are a Qwen2.5 of 3 layers,
96 wide, 342,432 parameters, trained in float32 and saved in bfloat16 (0.7 MB with the tokenizer).

             seed   steps   problems     loss, nats a token   minutes on two cores
    base        1   2,000   157 a step   4.51 → 0.40          9.5, with other work on them
    teacher     2   1,200   122 a step   4.48 → 0.03          2.6

The seed gives the corpus and the first weights. Another processor rounds otherwise, so it makes another model of the
same kind: the shipped ones are those that the figures below belong to.

What came out, at the demo's settings (256 responses at temperature 0.9, top-k 50); questions by how many are right:

                              accuracy   pass@256   [0] [1–4] [5–16] [17–64] [65–128] [129–256]
    base      64 test            0.232      0.875     8    17     10       9        6        14
    base      384 training       0.217      0.893    41    92     69      66       57        59
    teacher   64 test            0.988      1.000     0     0      0       0        0        64

Half (0.49) of the base model's responses work the answer out, and 0.31 of those are right. It says `wait` 0.26 times a
response, 0.06 in right and 0.32 in wrong ones. The mean response has 10 tokens; one in 100,000 doesn't end within 40.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from rlvd_jax import tokenizer as tokenizers
from rlvd_jax.demo import world
from rlvd_jax.qwen2 import Qwen2, Qwen2Config
from rlvd_jax.qwen2.weights import save

MODELS = {
    # name: corpus, seed, optimiser steps
    "base": (world.base_corpus, 1, 2000),
    "teacher": (world.teacher_corpus, 2, 1200),
}
ROW = 64  # tokens of a packed row; the longest problem with its response takes 31
RATE = 3e-3  # the highest learning rate; it warms up over a twentieth of the steps and decays by a cosine
STEPS_A_CALL = 25  # scanned on the device


def architecture(hidden: int, layers: int) -> Qwen2Config:
    """A Qwen2.5 of the demo's vocabulary, which is padded to a multiple of 16 as the published ones are padded."""
    return Qwen2Config(
        vocab_size=-(-len(world.vocabulary()) // 16) * 16,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rope_theta=1e4,
        tie_word_embeddings=True,
        max_position_embeddings=128,
    )


def packed(corpus, rng, tokenizer, rows: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches without end: arrays [rows, ROW] int32, problems with their responses end to end in the corpus' order.

    `segments` counts a row's problems from 1 (0 is padding), `learn` is 1 for the tokens of responses, end token
    included.
    """
    encode = tokenizer.backend_tokenizer.encode_batch_fast
    end = tokenizer.eos_token_id
    names = ("tokens", "positions", "segments", "learn")
    batch, row, at, segment = {k: np.zeros((rows, ROW), np.int32) for k in names}, 0, 0, 0
    while True:
        prompts, responses = zip(*corpus(rng, 8192), strict=True)
        for prompt, response in zip(encode(prompts), encode(responses), strict=True):
            tokens = [*prompt.ids, *response.ids, end]
            if at + len(tokens) > ROW:
                row, at, segment = row + 1, 0, 0
                if row == rows:
                    yield batch
                    batch, row = {k: np.zeros((rows, ROW), np.int32) for k in names}, 0
            segment += 1
            place = row, slice(at, at + len(tokens))
            batch["tokens"][place] = tokens
            batch["positions"][place] = np.arange(len(tokens))
            batch["segments"][place] = segment
            batch["learn"][place] = np.arange(len(tokens)) >= len(prompt.ids)
            at += len(tokens)


def train(config: Qwen2Config, batches, seed: int, steps: int, name: str):
    """Weights learnt from `steps` batches, and the loss of each step: mean cross entropy of response tokens, nats."""
    graph, params = nnx.split(Qwen2(config, nnx.Rngs(seed)), nnx.Param)
    schedule = optax.warmup_cosine_decay_schedule(0, RATE, max(1, steps // 20), steps, RATE / 50)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b1=0.9, b2=0.98))

    def loss(params, batch):
        model = nnx.merge(graph, params)
        logits = model.logits(model(batch["tokens"], batch["positions"], batch["segments"]))[:, :-1]
        terms = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:])
        learn = batch["learn"][:, 1:]
        return (terms * learn).sum() / learn.sum()

    def step(state, batch):
        params, moments = state
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, moments = optimiser.update(gradient, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    several = jax.jit(lambda state, batches: jax.lax.scan(step, state, batches), donate_argnums=0)
    state, losses = (params, optimiser.init(params)), []
    with tqdm(total=steps, desc=name, unit="step") as bar:
        while len(losses) < steps:
            chunk = [next(batches) for _ in range(min(STEPS_A_CALL, steps - len(losses)))]
            state, values = several(state, jax.tree.map(lambda *x: np.stack(x), *chunk))
            losses += np.asarray(values).tolist()
            bar.update(len(chunk))
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return state[0], losses


def make(name: str, directory: Path, steps: int | None, rows: int, hidden: int, layers: int) -> list[float]:
    """Train the model `name` and write its Hugging Face directory; → the loss of each step."""
    corpus, seed, usual_steps = MODELS[name]
    config = architecture(hidden, layers)
    with tempfile.TemporaryDirectory() as source:
        world.write_tokenizer(source)
        (Path(source) / "config.json").write_text(json.dumps(config.to_dict()))
        tokenizer = tokenizers.load(source)
        end = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        (Path(source) / "config.json").write_text(json.dumps(config.to_dict() | end))
        (Path(source) / "generation_config.json").write_text(json.dumps(end | {"do_sample": True}, indent=2) + "\n")
        batches = packed(corpus, np.random.RandomState(seed), tokenizer, rows)
        params, losses = train(config, batches, seed, steps or usual_steps, name)
        save(params, config, directory, source=source, dtype=jnp.bfloat16)
    return losses


def main(arguments=None) -> None:
    here = Path(__file__).resolve().parents[1] / "rlvd_jax" / "demo"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(MODELS), help="make this one only")
    parser.add_argument("--out", type=Path, default=here, help="where base/ and teacher/ go (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="optimiser steps (default: as in MODELS)")
    parser.add_argument("--rows", type=int, default=40, help=f"rows of {ROW} tokens a step (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=96, help="width (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="default: %(default)s")
    options = parser.parse_args(arguments)
    for name in [options.only] if options.only else MODELS:
        directory = options.out / name
        losses = make(name, directory, options.steps, options.rows, options.hidden, options.layers)
        print(f"{name}: loss {np.mean(losses[:10]):.3f} → {np.mean(losses[-10:]):.3f} nats; written to {directory}")


if __name__ == "__main__":
    main()
