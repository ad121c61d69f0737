"""A study as a graph of steps: which models, response sets and analyses it needs, in which order, and what is done.

A step is identified by a hash of everything its result depends on, and the hash is part of the name of its folder. So
what is done is known by looking, a changed setting redoes exactly what depends on it, and nothing computed is ever
overwritten:

    runs/<study>/models/<model>-<hash>/       checkpoint in `model`, TensorBoard events, result.json
    runs/<study>/responses/<model>-<problems>-<hash>/
    runs/<study>/report/

This module only looks and plans, and imports no JAX; work.py and publish.py do the work.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Literal

from rlvd_jax import hub
from rlvd_jax import problems as problem_sets
from rlvd_jax.config import StudyConfig
from rlvd_jax.errors import UserError
from rlvd_jax.problems import Problem
from rlvd_jax.prompts import TEMPLATES
from rlvd_jax.responses import ResponseSet

DEMO_MODELS = {f"demo-{name}": Path(__file__).parent / "demo" / name for name in ("base", "teacher")}


def digest(value) -> str:
    """A short hash of JSON-able data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def fingerprint(directory: Path) -> str:
    """A hash of a checkpoint: its small files whole, and of each safetensors file the size, header and 64 samples."""
    h = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix in (".json", ".txt", ".jinja") and path.name != "SOURCE.json":
            h.update(path.name.encode() + path.read_bytes())
        elif path.suffix == ".safetensors":
            size = path.stat().st_size
            h.update(f"{path.name}{size}".encode())
            with open(path, "rb") as file:
                for i in range(65):
                    file.seek(size * i // 65)
                    h.update(file.read(1 << 14))
    return h.hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class Step:
    """One thing to do: train a model, or sample and grade a model's responses to a set of problems."""

    kind: Literal["train", "respond"]
    model: str
    problems: str | None = None
    samples: int = 0

    @property
    def name(self) -> str:
        if self.kind == "train":
            return f"train {self.model}"
        return f"sample {self.model} on {self.problems}"


class Study:
    """A study's steps, their folders and identities. `config` is checked already (config.py)."""

    def __init__(self, config: StudyConfig):
        self.config = config
        self.root = Path(config.output) / config.study
        self._problems: dict[str, list[Problem]] = {}
        self._identities: dict[str, str] = {}

    # ---- what there is ---------------------------------------------------------------------------

    def problems(self, name: str) -> list[Problem]:
        if name not in self._problems:
            self._problems[name] = problem_sets.load(self.config.problems[name])
        return self._problems[name]

    def template(self, model: str) -> str:
        """The text of a model's prompt template."""
        template = self.config.template(model)
        return TEMPLATES.get(template, template)

    @cached_property
    def needed(self) -> dict[tuple[str, str], int]:
        """(model, problems) → responses to each question that anything in the study asks for."""
        needed: dict[tuple[str, str], int] = {}

        def need(model, problems, samples):
            needed[model, problems] = max(needed.get((model, problems), 0), samples)

        for (model, problems), samples in self.analysed.items():
            need(model, problems, samples)
        for model in self.config.models.values():
            if (grpo := model.grpo) and grpo.solved_by:
                need(grpo.solved_by, grpo.problems, grpo.solved_samples or self.config.sampling.samples)
            if sft := model.sft:
                need(sft.teacher, sft.problems, sft.samples or self.config.sampling.samples)
                if sft.only_solved_by:
                    need(sft.only_solved_by, sft.problems, self.config.sampling.samples)
        return needed

    @cached_property
    def analysed(self) -> dict[tuple[str, str], int]:
        """(model, problems) → responses to each question that the analysis uses."""
        analysed: dict[tuple[str, str], int] = {}
        for entry in self.config.responses:
            for model in entry.models:
                for problems in entry.problems:
                    samples = entry.samples or self.config.sampling.samples
                    analysed[model, problems] = max(analysed.get((model, problems), 0), samples)
        for c in self.config.comparisons:
            for model in (c.base, c.other):
                for problems in c.problems:
                    analysed.setdefault((model, problems), self.config.sampling.samples)
        return analysed

    @cached_property
    def steps(self) -> list[Step]:
        """Every step, each after what it needs; a model's responses follow it as closely as they can."""
        used = {m for m, _ in self.needed}
        used |= {a for m in used for a in self.config.ancestors(m)}
        unused = [m for m in self.config.models if m not in used and self.config.models[m].from_ is None]
        order: list[str] = []

        def visit(model):
            for other in self.config.needs(model):
                visit(other)
            if model not in order:
                order.append(model)

        for model in self.config.models:
            if model in used or model in unused:
                visit(model)
        steps = []
        for model in order:
            if self.config.models[model].from_ is None:
                steps.append(Step("train", model))
            steps += [Step("respond", model, p, n) for (m, p), n in self.needed.items() if m == model]
        return steps

    # ---- identity ----------------------------------------------------------------------------------

    def identity(self, model: str) -> str:
        """Of a model's weights and how it is prompted."""
        if model not in self._identities:
            self._identities[model] = digest(self._model_settings(model))
        return self._identities[model]

    def _model_settings(self, model: str) -> dict:
        c, recipe = self.config, self.config.models[model]
        if recipe.from_ is not None:
            return {
                "checkpoint": self._given_identity(recipe.from_),
                "template": self.template(model),
                "context": c.context(model),
            }
        common = {
            "seed": c.seed,
            "dtype": c.dtype,
            "save_dtype": c.save_dtype,
            "template": self.template(model),
            "context": c.context(model),
            "parent": self.identity(recipe.parent),
        }
        if grpo := recipe.grpo:
            aside = {"checkpoint_every", "micro_rows", "unroll"}
            whole = {"start", "problems", "sampling", "evaluate_on", "evaluate_sampling"}  # below, as they come out
            if grpo.solved_by:
                whole |= {"solved_by", "solved_samples"}
                samples = grpo.solved_samples or c.sampling.samples
                common["solved"] = [self.set_settings(grpo.solved_by, grpo.problems), samples]
            return common | {
                "grpo": grpo.identity(aside | whole),
                "problems": problem_sets.digest(self.problems(grpo.problems)),
                "sampling": c.model_sampling(model, grpo.sampling).identity(),
                "evaluation": grpo.evaluate_on
                and [
                    problem_sets.digest(self.problems(grpo.evaluate_on)),
                    c.model_sampling(model, grpo.evaluate_sampling).identity(),
                ],
            }
        sft = recipe.sft
        aside = {"checkpoint_every", "micro_rows", "unroll", "student", "teacher", "problems", "only_solved_by"}
        how = sft.model_dump(mode="json", exclude=aside)
        return common | {
            "sft": how | {"samples": sft.samples or c.sampling.samples},
            "teacher": self.set_settings(sft.teacher, sft.problems),
            "filter": sft.only_solved_by and [self.set_settings(sft.only_solved_by, sft.problems), c.sampling.samples],
        }

    @staticmethod
    def _given_identity(name: str) -> str:
        """Of a local directory its contents, of a hub name its commit, so that planning downloads no weights."""
        directory = DEMO_MODELS.get(name) or hub.local(name)
        return fingerprint(directory) if directory else f"{name}@{hub.config_directory(name).name}"

    def set_settings(self, model: str, problems: str) -> dict:
        """What identifies a response set (responses.py)."""
        return {
            "model": model,
            "weights": self.identity(model),
            "problems": problem_sets.digest(self.problems(problems)),
            "template": self.template(model),
            "sampling": self.config.model_sampling(model).identity(),
            "seed": self.config.seed,
            "dtype": self.config.dtype,
        }

    def digest(self) -> str:
        """Of all that the study's results depend on."""
        steps = [self.set_settings(s.model, s.problems) if s.problems else self.identity(s.model) for s in self.steps]
        return digest([self.config.written() | {"output": None}, steps])

    # ---- folders -----------------------------------------------------------------------------------

    def given(self, model: str) -> Path:
        """The directory of a given model's checkpoint, downloaded if need be."""
        name = self.config.models[model].from_
        return DEMO_MODELS.get(name) or hub.resolve(name)

    def training(self, model: str) -> Path:
        """The folder of a model's training."""
        return self.root / "models" / f"{model}-{self.identity(model)[:8]}"

    def checkpoint(self, model: str) -> Path:
        """The Hugging Face directory of a model, given or trained."""
        if self.config.models[model].from_ is not None:
            return self.given(model)
        return self.training(model) / "model"

    def responses(self, model: str, problems: str) -> ResponseSet:
        settings = self.set_settings(model, problems)
        return ResponseSet(self.root / "responses" / f"{model}-{problems}-{digest(settings)[:8]}", settings)

    @property
    def report(self) -> Path:
        return self.root / "report"

    # ---- what is done ------------------------------------------------------------------------------

    def result(self, model: str) -> dict | None:
        """What happened in a finished training; None if it isn't finished."""
        try:
            return json.loads((self.training(model) / "result.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            raise UserError(f"{self.training(model)}/result.json: damaged; remove the folder to train again") from None

    def missing(self, step: Step) -> dict[str, list[int]]:
        """Of a response set: problem → sample numbers that are not there yet."""
        ids = [p.id for p in self.problems(step.problems)]
        return self.responses(step.model, step.problems).missing(ids, step.samples)

    def done(self, step: Step) -> bool:
        if step.kind == "train":
            return self.result(step.model) is not None
        return not self.missing(step)
