"""Whether each step of a study fits on a TPU slice that is not here, and what to change if not (`--plan --target`).

Updates are compiled for the slice (targets.py), with every response as long as it can be; what sampling needs is
reckoned as the sampler itself does (sampling/memory.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from rlvd_jax import targets
from rlvd_jax.config import GRPOConfig, MeshConfig, SamplingConfig, SFTConfig
from rlvd_jax.plan import HEADING, PROMPT, TOKENS, architecture, cells, size, table
from rlvd_jax.qwen2.config import Qwen2Config
from rlvd_jax.qwen2.mesh import make_mesh
from rlvd_jax.sampling import decoder
from rlvd_jax.sampling.cache import choose_layout, page_size
from rlvd_jax.sampling.memory import SHARE, Demand, devices_of_model, weight_bytes
from rlvd_jax.study import Step, Study
from rlvd_jax.training.batches import LEAST_ROW, Example, pack
from rlvd_jax.training.loss import Objective
from rlvd_jax.training.step import Trainer


@dataclass(frozen=True)
class Part:
    """What a part of a step needs on each device, in bytes, and whether it fits: how then, or what to change if not."""

    memory: float
    fits: bool
    said: str = ""


def choose_mesh(config: MeshConfig, devices: int) -> tuple[MeshConfig, str]:
    """(a mesh of all devices, what to say about it): the config's where it says one that multiplies to their number,
    else one that splits weights over all of them."""
    split = config.fsdp * config.tensor
    data = devices // split if config.data == -1 else config.data
    if (config.model_fields_set or devices == 1) and data * split == devices:
        return MeshConfig(data=data, fsdp=config.fsdp, tensor=config.tensor), ""
    tensor = config.tensor if devices % config.tensor == 0 else 1
    chosen = MeshConfig(data=1, fsdp=devices // tensor, tensor=tensor)
    said = f"does not multiply to {devices} devices" if config.model_fields_set else "is not set"
    return chosen, f"The config's mesh {said}: this is for {settings_of(chosen)}, which the run must be given too."


def settings_of(mesh: MeshConfig) -> str:
    """As on the command line."""
    return f"mesh.data={mesh.data} mesh.fsdp={mesh.fsdp} mesh.tensor={mesh.tensor}"


def longest_response(sampling: SamplingConfig, context: int) -> int:
    """Tokens of the longest response with its prompt."""
    return min(sampling.max_tokens + PROMPT, context)


def largest_batch(recipe: GRPOConfig | SFTConfig, longest: int, trainer: Trainer) -> dict[str, np.ndarray]:
    """The batch of an update in which every response and its prompt have `longest` tokens (training/batches.py)."""
    is_grpo = isinstance(recipe, GRPOConfig)
    row_tokens = recipe.max_length if not is_grpo else recipe.row_tokens or -(-longest // LEAST_ROW) * LEAST_ROW
    response = np.zeros(min(longest, row_tokens) - 1, np.int32)
    drawn = {"logp": np.zeros(len(response), np.float32), "advantage": 1.0} if is_grpo else {}
    number = recipe.questions * recipe.samples if is_grpo else recipe.batch
    batch = pack(
        [Example((0,), response, **drawn)] * number,
        np.ones(number, np.float32),
        row_tokens=row_tokens,
        micro_rows=recipe.micro_rows or trainer.rows_at_once(row_tokens),
        shards=trainer.batch_shards,
    )
    if is_grpo and recipe.updates > 1:
        batch["old"] = batch["logp"]
    if is_grpo and recipe.kl:
        batch["reference"] = batch["logp"]
    if is_grpo and recipe.solved_by:
        batch["drawn"] = batch["weight"]
    return batch


def sampling_part(
    c: Qwen2Config,
    dtype,
    sampling: SamplingConfig,
    responses: int,
    target: targets.Target,
    *,
    held: float = 0,
    loads: bool = False,
) -> Part:
    """Of drawing so many responses on all devices of a target. held: bytes of each that something else takes; loads:
    the model is read for it, split over a host's devices, and given up as the sampler takes its weights."""
    here = len(target.devices) // target.hosts
    tensor = devices_of_model(c, sampling, dtype.itemsize, target.memory, here)
    demand = Demand(c, sampling, choose_layout(c, dtype, "tpu"), dtype.itemsize, tensor, PROMPT)
    weights = weight_bytes(c, dtype.itemsize, tensor)
    held += weights
    free = SHARE * target.memory - held
    loading = max(0, decoder.loading_bytes(c, dtype.itemsize, tensor, here) - weights) if loads else 0
    least = max(demand.least, loading)
    if free < least:
        share = f"{size(SHARE * target.memory)} that the sampler may fill"
        if free < max(demand.least / 8, loading):
            said = f"its weights leave no room in the {share}: take chips with more memory"
        else:
            said = f"one response of {demand.length:,} tokens is too long for the {share}: lower sampling.max_tokens"
        return Part(held + least, False, said)
    plan = demand.plan(-(-responses * tensor // len(target.devices)), free)
    said = f"{plan.slots:,} slots"
    if plan.pages:
        longest = plan.pages * page_size(demand.layout) // demand.length
        said += f", room for {longest:,} of the longest responses" if longest < plan.slots else ""
    if tensor > 1:
        said += f", weights split over {tensor} devices"
    return Part(held + max(demand.bytes(plan), loading), True, said)


class TargetPlan:
    """The steps of a study on one target. say: is told what is being compiled."""

    def __init__(self, study: Study, target: targets.Target, say: Callable[[str], None]):
        self.study, self.target, self.say = study, target, say
        self.axes, self.note = choose_mesh(study.config.mesh, len(target.devices))
        self.mesh = make_mesh(self.axes, target.devices)
        self.split = self.axes.fsdp * self.axes.tensor  # devices that share one copy of the weights
        self.dtype = jnp.dtype(jnp.float32 if study.config.dtype == "float32" else jnp.bfloat16)
        self._peaks: dict[tuple, tuple[float, bool]] = {}

    def parts(self, step: Step) -> dict[str, Part]:
        """The parts of a step by their names in the table."""
        config, c, itemsize = self.study.config, architecture(self.study, step.model), self.dtype.itemsize
        if step.kind == "respond":
            left = sum(len(s) for s in self.study.missing(step).values())
            sampling = config.model_sampling(step.model)
            return {step.name: sampling_part(c, self.dtype, sampling, left, self.target, loads=True)}
        grpo = config.models[step.model].grpo
        if not grpo:
            return {step.name: self.update(step.model, c, 0)}
        evaluated = len(self.study.problems(grpo.evaluate_on)) if grpo.evaluate_on and grpo.evaluate_every else 0
        # Beside each other: the trained weights and their moments, and the start model split like them; a sampler's
        # weights are there for its draws only.
        start = itemsize * c.parameters / self.split * (grpo.kl > 0)
        update = self.update(step.model, c, start)
        held = 12 * c.parameters / self.split + start
        most = max(grpo.questions * grpo.samples, evaluated * grpo.evaluate_samples)
        sampling = config.model_sampling(step.model, grpo.sampling)
        drawn = sampling_part(c, self.dtype, sampling, most, self.target, held=held)
        return {f"{step.name}: update": update, f"{step.name}: sampling": drawn}

    def update(self, model: str, c: Qwen2Config, held: float) -> Part:
        """Of an optimiser step of a model's training, beside so many bytes that something else takes."""
        config = self.study.config
        recipe = config.models[model].grpo or config.models[model].sft
        if isinstance(recipe, GRPOConfig):
            sampling = config.model_sampling(model, recipe.sampling)
            objective = Objective(recipe.clip_low, recipe.clip_high, recipe.ratio, recipe.kl, recipe.entropy)
            longest = longest_response(sampling, config.context(model) or c.max_position_embeddings)
        else:
            sampling, objective = config.model_sampling(recipe.teacher), None
            longest = sampling.max_tokens + PROMPT
        temperature = sampling.temperature if objective else 1.0
        trainer = Trainer(c, self.dtype, self.mesh, recipe.optimizer, objective, temperature)
        batch = largest_batch(recipe, longest, trainer)
        # The numbers of the optimiser make no difference to memory, so models trained alike are compiled for once.
        key = c, objective, recipe.optimizer.clip_norm is None, tuple((k, x.shape) for k, x in sorted(batch.items()))
        if key not in self._peaks:
            self.say(f"compiling the update of {model} for {self.target.name}, which may take a minute")
            self._peaks[key] = targets.peak_memory(trainer, batch)
        peak, fits = self._peaks[key]
        _, rows, row = batch["tokens"].shape
        rows //= trainer.batch_shards
        if fits and peak + held <= self.target.memory:
            said = f"rows of {row:,} tokens"
            return Part(peak + held, True, f"{rows} {said} at a time" if rows > 1 else said)
        return Part(peak + held, False, self.advice(model, c, recipe, rows, row, peak, held))

    def advice(
        self,
        model: str,
        c: Qwen2Config,
        recipe: GRPOConfig | SFTConfig,
        rows: int,
        row: int,
        peak: float,
        held: float,
    ) -> str:
        """What to change where an update of so many rows of so many tokens does not fit: what costs least first."""
        where = f"models.{model}.{'grpo' if isinstance(recipe, GRPOConfig) else 'sft'}"
        devices, tensor = len(self.target.devices), self.axes.tensor
        if self.split < devices:
            return f"split the weights over all devices, mesh.data=1 mesh.fsdp={devices // tensor}"
        if rows > 1:
            return f"set {where}.micro_rows=1"
        # What is neither weights, gradient and moments nor held beside the update grows with the row.
        state = 16 * c.parameters / self.split
        fitting = int(row * (self.target.memory - held - state) / max(1, peak - state)) // LEAST_ROW * LEAST_ROW
        if fitting < row // 4:
            beside = f" and the start model's weights {size(held)}" if held else ""
            return f"weights, gradient and moments take {size(state)}{beside}, so take chips with more memory, or more"
        if isinstance(recipe, SFTConfig):
            return f"set {where}.max_length to about {fitting:,}, and longer responses are left out"
        settings = f"{where}.row_tokens and {where}" if recipe.row_tokens else where
        return f"rows of about {fitting:,} tokens fit in place of {row:,}, so lower {settings}.sampling.max_tokens"


def plan_on(study: Study, target: targets.Target, say: Callable[[str], None]) -> str:
    """A table of the study's steps on a target: what each device needs, whether it fits, and what to change if not."""
    on = TargetPlan(study, target, say)
    rows, first, wrong = [[*HEADING, "fits"]], True, {}
    for step in study.steps:
        if study.done(step):
            rows.append([step.name, "done", "", "", "", ""])
            continue
        rest = cells(study, step, first)
        first = False
        for title, part in on.parts(step).items():
            rows.append([title, *rest, size(part.memory), f"yes, {part.said}" if part.fits else "no"])
            rest = [""] * len(rest)
            if not part.fits:
                wrong.setdefault(part.said, []).append(title)
    devices = f"{len(target.devices)} device{'s' if len(target.devices) > 1 else ''}"
    hosts = f" on {target.hosts} hosts" if target.hosts > 1 else ""
    heading = f"{study.config.study} in {study.root}, on {target.name}: {devices} of "
    heading += f"{target.memory / targets.GIB:.2f} GiB{hosts}, {settings_of(on.axes)}"
    notes = (
        f"{TOKENS} Updates were compiled for {target.name} with responses of the greatest length; sampling is "
        "reckoned from its largest arrays."
    )
    told = [f"Does not fit: {', '.join(titles)}: {said}." for said, titles in wrong.items()]
    return "\n".join([heading, table(rows), *told, *([on.note] if on.note else []), notes])
