"""What a study will do and what each step costs, without doing any of it (`--plan`)."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from rlvd_jax import hub
from rlvd_jax.config import SamplingConfig
from rlvd_jax.qwen2.config import Qwen2Config
from rlvd_jax.sampling.cache import choose_layout
from rlvd_jax.sampling.memory import Demand, weight_bytes
from rlvd_jax.study import DEMO_MODELS, Step, Study
from rlvd_jax.training.loss import LOGITS_AT_ONCE

PROMPT = 256  # tokens that a prompt is taken to have at most


@dataclass(frozen=True)
class Cost:
    """Of one step: tokens to sample and to train on at most, and device memory in bytes, the least that will do and the
    most that is taken where it is free."""

    sampled: float = 0
    trained: float = 0
    memory: float = 0
    most: float = 0


def architecture(study: Study, model: str) -> Qwen2Config:
    """Of a model, trained or not: that of the given model it comes from."""
    recipe = study.config.models[model]
    if recipe.from_ is None:
        return architecture(study, recipe.parent)
    return Qwen2Config.from_directory(DEMO_MODELS.get(recipe.from_) or hub.config_directory(recipe.from_))


def mean_length(study: Study, model: str, problems: str, most: int) -> float:
    """Tokens of a response: as measured on this study's responses to these problems, of this model if there are any,
    else the limit."""
    for name in dict.fromkeys([model, *study.config.models]):
        if (name, problems) in study.needed:
            there = study.responses(name, problems)
            if len(there):
                return float(np.mean(there.table(["tokens"])["tokens"]))
    return most


def sampling_memory(
    c: Qwen2Config, itemsize: int, sampling: SamplingConfig, responses: int, device: str
) -> tuple[float, float]:
    """(least, most) bytes on each device of a sampler with whole weights: for one response at a time, and with all its
    slots full of the longest responses. Between the two it fills what is free; on a CPU it does not ask. `auto` is
    reckoned as a GPU, whose samplers have the most slots."""
    platform = "gpu" if device == "auto" else device
    layout = choose_layout(c, jnp.float32 if itemsize == 4 else jnp.bfloat16, platform)
    tensor = sampling.tensor or 1
    demand = Demand(c, sampling, layout, itemsize, tensor, PROMPT)
    weights = weight_bytes(c, itemsize, tensor)
    most = weights + demand.bytes(demand.plan(responses, np.inf))
    return most if platform == "cpu" else weights + demand.least, most


def training_memory(c: Qwen2Config, itemsize: int, tokens: int, reference: bool) -> float:
    """Bytes on each device where weights are whole: float32 weights, gradient and two moments; the residual stream
    kept of each layer, one layer's activations, the logits of one chunk and their gradients."""
    state = c.parameters * (16 + (itemsize if reference else 0) + (itemsize if itemsize < 4 else 0))
    layer = tokens * (4 * c.hidden_size + 4 * c.intermediate_size + 4 * c.num_attention_heads * c.head_dim) * itemsize
    logits = 3 * 4 * min(LOGITS_AT_ONCE, tokens * c.vocab_size)
    return state + tokens * c.num_hidden_layers * c.hidden_size * itemsize + layer + logits


def cost(study: Study, step: Step) -> Cost:
    """What is left to do of a step costs this much."""
    config = study.config
    c = architecture(study, step.model)
    itemsize = 4 if config.dtype == "float32" or (config.dtype == "auto" and config.device == "cpu") else 2
    sampling = config.model_sampling(step.model)

    if step.kind == "respond":
        count = sum(len(s) for s in study.missing(step).values())
        length = mean_length(study, step.model, step.problems, sampling.max_tokens)
        least, most = sampling_memory(c, itemsize, sampling, count, config.device)
        return Cost(sampled=count * length, memory=least, most=most)
    model = config.models[step.model]
    if grpo := model.grpo:
        sampling = config.model_sampling(step.model, grpo.sampling)
        responses = grpo.questions * grpo.samples
        length = mean_length(study, grpo.start, grpo.problems, sampling.max_tokens)
        evaluations = 0
        if grpo.evaluate_on and grpo.evaluate_every:
            times = 1 + -(-grpo.steps // grpo.evaluate_every)
            evaluations = times * len(study.problems(grpo.evaluate_on)) * grpo.evaluate_samples
        row = grpo.row_tokens or sampling.max_tokens + PROMPT
        held = (12 + (itemsize if grpo.kl else 0)) * c.parameters  # weights and moments, and the start model
        update = training_memory(c, itemsize, row * (grpo.micro_rows or 1), grpo.kl > 0)
        drawing = sampling_memory(c, itemsize, sampling, responses, config.device)
        least, most = (max(update, held + memory) for memory in drawing)
        drawn = grpo.questions * (grpo.hard_samples or grpo.samples)
        return Cost(
            sampled=(grpo.steps * drawn + evaluations) * length,
            trained=grpo.steps * grpo.updates * responses * length,
            memory=least,
            most=most,
        )
    sft = model.sft
    most = config.model_sampling(sft.teacher).max_tokens
    length = mean_length(study, sft.teacher, sft.problems, most)
    examples = len(study.problems(sft.problems)) * min(sft.keep, sft.samples or config.sampling.samples)
    memory = training_memory(c, itemsize, min(sft.max_length, int(sft.batch * length)) * (sft.micro_rows or 1), False)
    return Cost(trained=sft.epochs * examples * length, memory=memory, most=memory)


def amount(value: float) -> str:
    """1,234,567 → 1.2 M."""
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}"


def cells(study: Study, step: Step, first: bool) -> list[str]:
    """Of a step that is to do: how far it is, tokens to sample and to train on."""
    state = "next" if first else "to do"
    if step.kind == "respond":
        total = len(study.problems(step.problems)) * step.samples
        left = sum(len(s) for s in study.missing(step).values())
        if left < total:
            state += f", {total - left:,} of {total:,} there"
    spent = cost(study, step)
    return [state, *(amount(x) if x else "" for x in (spent.sampled, spent.trained))]


def table(rows: list[list[str]]) -> str:
    """Columns; the third to fifth are numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = "<<>>><"
    lines = ["  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=False)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def size(memory: float) -> str:
    """Bytes in words."""
    return f"{memory / 2**30:.1f} GiB" if memory >= 2**30 else f"{memory / 2**20:.1f} MiB"


HEADING = ["step", "state", "sample tokens", "train tokens", "memory/device"]
TOKENS = "Tokens are the most there can be where no response of the study tells the usual length."


def plan(study: Study) -> str:
    """A table of the study's steps: state, tokens at most, device memory."""
    rows, first = [HEADING], True
    for step in study.steps:
        if study.done(step):
            rows.append([step.name, "done", "", "", ""])
        else:
            spent = cost(study, step)
            memory = size(spent.memory) + (f" to {size(spent.most)}" if spent.most > spent.memory else "")
            rows.append([step.name, *cells(study, step, first), memory])
            first = False
    notes = (
        f"{TOKENS}\nMemory is what the largest arrays take with whole weights on each device. Of two figures, the "
        "sampler\nneeds the first and fills what is free, up to the second."
    )
    return f"{study.config.study} in {study.root}\n{table(rows)}\n{notes}"
