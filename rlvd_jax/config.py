"""Every setting of a study, typed and documented where it is declared.

`load(path, overrides)` reads YAML, applies `key=value` overrides and returns a `StudyConfig`; whatever is
unknown, of a wrong type or impossible stops with one sentence that names the key and the nearest valid
one. The defaults are the paper's (Tables 6 and 7, appendix A.12).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import yaml
from pydantic import Field, field_validator, model_validator

from rlvd_jax.errors import UserError, nearest
from rlvd_jax.evaluation.published import ROWS
from rlvd_jax.prompts import render

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Settings(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def no_bool_for_a_number(cls, value, info):
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation not in (bool, bool | None):
            raise ValueError(f"neither true nor false can stand here, it is {str(value).lower()}")
        return value

    def written(self) -> dict:
        """The settings as plain data that reads back as the same; what is none by default and still is is left out."""

        def plain(value):
            if isinstance(value, Settings):
                return value.written()
            if isinstance(value, dict):
                return {key: plain(v) for key, v in value.items()}
            return [plain(v) for v in value] if isinstance(value, tuple) else value

        fields = type(self).model_fields.items()
        found = {f.alias or name: (plain(getattr(self, name)), f.default) for name, f in fields}
        return {name: value for name, (value, default) in found.items() if value is not None or default is not None}


class ProblemsConfig(Settings):
    """Where a set of problems comes from: exactly one of `file`, `hub` and `demo`."""

    file: str | None = None
    """JSON Lines with `problem` and `answer` (or `solution`); `id`, `level`, `subject` if there are any."""
    hub: str | None = None
    """A known set (math-train, math-500, aime25, gsm8k-train, gsm8k-test) or any hub data set `owner/name`."""
    demo: Literal["train", "test"] | None = None
    """The generated problems of the demo."""
    split: str | None = None
    """Hub only: the split, where the set is not one of the known ones."""
    levels: tuple[Annotated[int, Field(strict=True)], ...] | None = None
    """Keep these difficulty levels only."""
    limit: Positive | None = None
    """Keep this many problems, drawn evenly over the file with `seed`, in the file's order."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Which `limit` problems are kept."""

    @model_validator(mode="after")
    def one_source(self):
        if sum(x is not None for x in (self.file, self.hub, self.demo)) != 1:
            raise ValueError("give exactly one of file, hub and demo")
        return self


class SamplingConfig(Settings):
    """How responses are drawn (appendix A.12)."""

    samples: Positive = 256
    """Responses to each question."""
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.9
    """0 is greedy."""
    top_k: NonNegative = 50
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Then keep the smallest set of tokens with this share of the remaining probability."""
    max_tokens: Positive = 4000
    """Longest response, end token included."""
    slots: Positive | None = None
    """Responses in flight on each device; none: as many as memory and speed want, 4,096 at most."""
    tensor: Positive | None = None
    """Devices that share one copy of the weights while sampling; none: as few as hold them."""
    drafts: Annotated[int, Field(ge=0, le=63)] = 63
    """On a GPU or TPU whose last 64 responses are in flight, guess tokens of each, at most so many, from what followed
    where its text was most like its end, and check them in the same step, which has 64 rows for all: 1 of each of 32, 5
    of 10, 63 of the last. The same responses, in fewer steps where text repeats itself. Given up where it doesn't."""

    def identity(self) -> dict:
        """What a response depends on, as JSON-able data."""
        return self.model_dump(mode="json", exclude={"samples", "slots", "tensor", "drafts"})


class SamplingOverride(Settings):
    """What a model changes of the study's sampling settings."""

    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_k: NonNegative | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Positive | None = None


class OptimizerConfig(Settings):
    """AdamW with a constant rate after a linear warm-up, and clipping by the global norm."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    warmup_steps: NonNegative = 20
    b1: Fraction = 0.9
    b2: Fraction = 0.99
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip_norm: Annotated[float, Field(gt=0)] | None = 0.1
    """Largest global norm of the gradient; none: no clipping."""


class SFTOptimizerConfig(OptimizerConfig):
    """The same with the defaults of Table 7."""

    warmup_steps: NonNegative = 25
    b2: Fraction = 0.95
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4


class EvaluationSampling(SamplingOverride):
    """How the evaluations during training are sampled (appendix A.10.4)."""

    temperature: Annotated[float, Field(ge=0, le=10)] | None = 0.8
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 0.9


class GRPOConfig(Settings):
    """Reinforcement learning with verifiable rewards (section 4, appendix A.10, Table 6)."""

    start: str
    """The model that training starts from."""
    problems: str
    """The problems it practises on."""
    steps: Positive = 225
    """Batches of fresh responses."""
    questions: Positive = 28
    """Questions in a step."""
    samples: Annotated[int, Field(ge=2)] = 10
    """Responses to each of them: one group."""
    sampling: SamplingOverride = SamplingOverride()
    """Changes to the study's sampling settings for the practice responses."""
    optimizer: OptimizerConfig = OptimizerConfig()
    advantage: Literal["grpo", "dr_grpo", "pass_at_k"] = "grpo"
    """grpo: (r - mean) / (std + 1e-4) within the group; dr_grpo: r - mean (Liu et al., 2025); pass_at_k: the reward is
    that one of `k` responses is correct, on average over all k of the group (Chen et al., 2025)."""
    k: Positive = 4
    """Of advantage pass_at_k: a group with fewer than k wrong responses teaches nothing, as k of them always hold a
    correct one. Below `samples`."""
    normalise: Literal["batch", "sequence", "constant"] = "batch"
    """Each response token weighs one over: all response tokens of the batch; its response's tokens times the
    number of responses; max_tokens times the number of responses (Dr. GRPO)."""
    clip_low: Annotated[float, Field(ge=0)] = 0.2
    """The ratio is clipped below at 1 - clip_low ..."""
    clip_high: Annotated[float, Field(ge=0)] = 0.2
    """... and above at 1 + clip_high; a larger one is DAPO's clip-higher (Yu et al., 2025)."""
    ratio: Literal["token", "sequence"] = "token"
    """sequence: the geometric mean of the response's token ratios (GSPO, Zheng et al., 2025)."""
    kl: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL term to the start model (the k3 estimator); 0 keeps no reference model."""
    entropy: Annotated[float, Field(ge=0)] = 0.0
    """Weight of an entropy bonus (Mnih et al., 2016): the mean entropy of the next token's distribution at the sampling
    temperature, over response tokens weighed as in the loss, is added to what is maximised."""
    updates: Positive = 1
    """Optimiser steps on each batch of responses; 1 is on policy, so the ratio is 1."""
    dynamic_sampling: bool = False
    """Drop groups without influence (all rewards are equal) and draw further questions in their place (DAPO)."""
    hard_samples: Positive | None = None
    """A question with no correct response is drawn again, `samples` at a time up to this many in all, until one is
    correct; correct ones then take up to half of the group (as in Reinforce-Ada, Xiong et al., 2025)."""
    solved_by: str | None = None
    """A model whose graded responses to `problems` lend a group with no correct response one, chosen at random, in
    place of its last; it counts as on policy (cf. LUFFY, Yan et al., 2025, which corrects for that)."""
    solved_samples: Positive | None = None
    """Responses of `solved_by` to each question to choose from; none: the study's `sampling.samples`."""
    evaluate_every: Positive | None = 25
    """Steps between evaluations; none: no evaluation, the last step is the result."""
    evaluate_on: str | None = None
    """The problems evaluated on; none: no evaluation."""
    evaluate_samples: Positive = 10
    evaluate_sampling: EvaluationSampling = EvaluationSampling()
    keep: Literal["best", "last"] = "best"
    """best: the result is the evaluated step of highest accuracy (the earliest of equals)."""
    checkpoint_every: Positive = 25
    """Steps between checkpoints that a stopped run goes on from."""
    row_tokens: Positive | None = None
    """Tokens of one packed training row; none: the longest prompt and response together."""
    micro_rows: Positive | None = None
    """Packed rows a device works on at once; none: as many as its memory holds with nothing computed again, one on
    CPUs. More are faster, and change nothing but rounding."""
    unroll: bool | None = None
    """Compile each layer by itself instead of a loop over them; not on TPUs. On a GPU updates take a tenth less time,
    but each size of a batch longer to compile (1.5B: 17 to 28 s for 9). None: on GPUs, for 100 or more."""

    @model_validator(mode="after")
    def fit_together(self):
        if self.advantage == "pass_at_k" and self.k >= self.samples:
            raise ValueError(
                f"k is {self.k}, so all sets of k of the {self.samples} samples would be alike; set it below samples"
            )
        if self.hard_samples is not None and self.hard_samples <= self.samples:
            raise ValueError(
                f"hard_samples is {self.hard_samples}, in all, and {self.samples} samples are drawn of every question; "
                "set it above samples"
            )
        if self.solved_samples is not None and self.solved_by is None:
            raise ValueError("solved_samples says how many responses of solved_by to choose from; set solved_by too")
        return self

    def identity(self, aside: set[str]) -> dict:
        """What a training depends on, as JSON-able data without the settings in `aside`. Of settings that came later,
        those that change nothing are left out, so that what was trained before they came keeps its identity."""
        later = {"k", "entropy", "hard_samples", "solved_by", "solved_samples"}
        fields = type(self).model_fields
        off = {name for name in later if getattr(self, name) == fields[name].default}
        off |= {"k"} if self.advantage != "pass_at_k" else set()
        return self.model_dump(mode="json", exclude=aside | off)


class SFTConfig(Settings):
    """Distillation: supervised training on a teacher's graded responses (section 5.1, A.11, Table 7)."""

    student: str
    """The model that training starts from."""
    teacher: str
    """The model whose correct responses are learnt; the student itself is self-distillation."""
    problems: str
    """The problems that the teacher's responses answer."""
    samples: Positive | None = None
    """Responses of the teacher to each question to choose from; none: the study's `sampling.samples`."""
    keep: Positive = 8
    """At most this many correct responses a question, chosen at random with the study's seed."""
    only_solved_by: str | None = None
    """Drop the questions that this model never solves in its own responses to `problems` (section 6.1)."""
    epochs: Positive = 5
    batch: Positive = 4
    """Responses in an optimiser step."""
    max_length: Positive = 32768
    """Tokens of one packed training row; longer examples are left out and counted."""
    optimizer: SFTOptimizerConfig = SFTOptimizerConfig()
    checkpoint_every: Positive = 500
    """Steps between checkpoints that a stopped run goes on from."""
    micro_rows: Positive | None = None
    """Packed rows a device works on at once; none: as many as its memory holds with nothing computed again, one on
    CPUs. More are faster, and change nothing but rounding."""
    unroll: bool | None = None
    """Compile each layer by itself instead of a loop over them; not on TPUs. On a GPU updates take a tenth less time,
    but each size of a batch longer to compile (1.5B: 9 to 28 s for 4 to 9). None: on GPUs, for 4,000 or more."""


class ModelConfig(Settings):
    """A model: given (`from`) or derived from others by a recipe (`grpo`, `sft`)."""

    model_config = pydantic.ConfigDict(populate_by_name=True)

    from_: str | None = Field(None, alias="from")
    """A directory, a hub name, or demo-base and demo-teacher, the models in the package."""
    grpo: GRPOConfig | None = None
    sft: SFTConfig | None = None
    template: str | None = None
    """r1, qwen-math, question, or any text with {question} in it; none: the start's or the student's, question
    for a given model."""
    sampling: SamplingOverride = SamplingOverride()
    """Changes to the study's sampling settings for this model's responses and for those of models trained from it."""
    context: Positive | None = None
    """Longest prompt and response together; none: the parent's, for a given model its max_position_embeddings."""
    paper: str | None = None
    """The paper's row that this model repeats, `Qwen2.5-3B/base`: its published figures are printed beside."""

    @model_validator(mode="after")
    def one_recipe(self):
        if sum(x is not None for x in (self.from_, self.grpo, self.sft)) != 1:
            raise ValueError("give exactly one of from, grpo and sft")
        if self.template is not None:
            try:
                render(self.template, "")
            except UserError as error:
                raise ValueError(f"template: {error}") from None
        if self.paper is not None and self.paper not in ROWS:
            raise ValueError(f"the paper has no figures for '{self.paper}'{nearest(self.paper, ROWS)}")
        return self

    @property
    def parent(self) -> str | None:
        """The model that training starts from."""
        return self.grpo.start if self.grpo else self.sft.student if self.sft else None


class ResponsesConfig(Settings):
    """Response sets that the analysis needs: each model on each set of problems."""

    models: tuple[str, ...]
    problems: tuple[str, ...]
    samples: Positive | None = None
    """Responses to each question; none: the study's `sampling.samples`."""


class ComparisonConfig(Settings):
    """One model against another on the same questions: bins, transitions, differences (section 4)."""

    base: str
    other: str
    problems: tuple[str, ...]
    claim: Literal["rl", "new_knowledge", "reasoning_only"] | None = None
    """Which of the paper's claims this comparison tests: RL against its base model (section 4), distillation
    that brings new knowledge (section 6), or reasoning patterns alone."""


class GraderConfig(Settings):
    workers: Positive | None = None
    """Processes; none: one for each processor core."""
    deadline: Annotated[float, Field(gt=0)] = 5.0
    """Seconds for one response; what takes longer is wrong."""


class MeshConfig(Settings):
    """How devices are laid out; -1 takes the devices that the other axes leave."""

    data: Annotated[int, Field(ge=-1)] = -1
    fsdp: Positive = 1
    tensor: Positive = 1


class StudyConfig(Settings):
    """A study: models, responses, comparisons. Steps and their order follow from it."""

    study: Name
    """Its name, and the folder of its results under `output`."""
    output: str = "runs"
    """Where studies are kept."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Every random draw follows from it."""
    profile: str | None = None
    """first:last, the steps of each training to trace, both included, for TensorBoard's profile tab."""
    keep_checkpoints: bool = False
    """Keep the checkpoints of a finished training; each holds the optimiser's state too."""
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the arithmetic; auto: bfloat16 on accelerators, float32 on CPU. Trained weights are kept in float32."""
    save_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the checkpoints written for sampling and for users; auto: as `dtype`."""
    mesh: MeshConfig = MeshConfig()
    problems: dict[Name, ProblemsConfig]
    models: dict[Name, ModelConfig]
    sampling: SamplingConfig = SamplingConfig()
    responses: tuple[ResponsesConfig, ...]
    comparisons: tuple[ComparisonConfig, ...] = ()
    grader: GraderConfig = GraderConfig()
    hardest: Positive = 50
    """Questions in the plot of pass@k on the questions that the base model solves least (Figure 4)."""
    bootstrap: Positive = 2000
    """Resamples of the questions behind every interval."""

    @field_validator("problems", "models")
    @classmethod
    def some(cls, value):
        if not value:
            raise ValueError("needs at least one entry")
        return value

    @field_validator("profile", mode="before")
    @classmethod
    def two_steps(cls, value):
        steps = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", str(value))
        if value is not None and not (steps and int(steps[1]) <= int(steps[2])):
            raise ValueError(f"{value!r:.60} is not first:last, two steps counted from 1, as in 10:12")
        return value

    @model_validator(mode="after")
    def references(self):
        def check(name, known, where):
            if name is not None and name not in known:
                raise ValueError(f"{where}: '{name}' is not declared{nearest(name, known)}")

        for name, model in self.models.items():
            for recipe, fields in (
                (
                    model.grpo,
                    (
                        ("start", self.models),
                        ("problems", self.problems),
                        ("evaluate_on", self.problems),
                        ("solved_by", self.models),
                    ),
                ),
                (
                    model.sft,
                    (
                        ("student", self.models),
                        ("teacher", self.models),
                        ("problems", self.problems),
                        ("only_solved_by", self.models),
                    ),
                ),
            ):
                kind = "grpo" if recipe is model.grpo else "sft"
                for field, known in fields if recipe else ():
                    check(getattr(recipe, field), known, f"models.{name}.{kind}.{field}")
        for i, r in enumerate(self.responses):
            for m in r.models:
                check(m, self.models, f"responses.{i}.models")
            for p in r.problems:
                check(p, self.problems, f"responses.{i}.problems")
        for i, c in enumerate(self.comparisons):
            check(c.base, self.models, f"comparisons.{i}.base")
            check(c.other, self.models, f"comparisons.{i}.other")
            for p in c.problems:
                check(p, self.problems, f"comparisons.{i}.problems")
        sound = set()

        def visit(name, path):
            if name in path:
                circle = " → ".join([*path[path.index(name) :], name])
                raise ValueError(f"models.{name}: the recipe goes round in a circle: {circle}")
            if name not in sound:
                for other in self.needs(name):
                    visit(other, [*path, name])
                sound.add(name)

        for name, model in self.models.items():
            visit(name, [])
            if model.grpo and self.model_sampling(name, model.grpo.sampling).temperature == 0:
                raise ValueError(
                    f"models.{name}.grpo.sampling.temperature: at 0 all responses of a group are alike; set it above"
                )
        return self

    @property
    def profiled(self) -> range | None:
        """The steps that `profile` says."""
        if self.profile is None:
            return None
        first, last = map(int, self.profile.split(":"))
        return range(first, last + 1)

    def needs(self, name: str) -> list[str]:
        """The models whose weights or responses the recipe of model `name` uses, without repeats."""
        m = self.models[name]
        uses = [m.grpo.start, m.grpo.solved_by] if m.grpo else []
        if m.sft:
            uses = [m.sft.student, m.sft.teacher, m.sft.only_solved_by]
        return list(dict.fromkeys(u for u in uses if u))

    def ancestors(self, name: str) -> list[str]:
        """Every model that `name` depends on, directly or not."""
        found, todo = [], self.needs(name)
        while todo:
            model = todo.pop(0)
            if model not in found:
                found.append(model)
                todo += self.needs(model)
        return found

    def template(self, name: str) -> str:
        """The prompt template of a model: its own, else its parent's, else `question`."""
        model = self.models[name]
        if model.template is not None:
            return model.template
        return self.template(model.parent) if model.parent else "question"

    def context(self, name: str) -> int | None:
        """The context length of a model where a config sets one: its own, else its parent's."""
        model = self.models[name]
        return model.context or (self.context(model.parent) if model.parent else None)

    def model_sampling(self, name: str, override: SamplingOverride | None = None) -> SamplingConfig:
        """The sampling settings of a model's responses: the study's, then what its ancestors by training change, then
        its own changes, then `override`."""
        model = self.models[name]
        settings = self.model_sampling(model.parent) if model.parent else self.sampling
        changes = model.sampling.model_dump(exclude_none=True)
        changes |= override.model_dump(exclude_none=True) if override else {}
        return settings.model_copy(update=changes)


def _known_fields(path, root) -> list[str]:
    """The setting names valid at the place that `path` points to (model by model down the tree)."""
    import typing

    model = root
    for part in path:
        if not (isinstance(model, type) and issubclass(model, pydantic.BaseModel)):
            return []
        fields = {f.alias or n: f.annotation for n, f in model.model_fields.items()}
        annotation = fields.get(part)
        candidates = [annotation, *typing.get_args(annotation)]
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, pydantic.BaseModel)]
        model = nested[0] if nested else None
    if model is None:
        return []
    return [f.alias or n for n, f in model.model_fields.items()]


def _sentence(source: str, error: pydantic.ValidationError) -> str:
    """What is wrong first; an unknown key before all else, since it is often the missing one misspelt."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    kind, where, given = first["type"], list(first["loc"]), first.get("input")
    if kind == "extra_forbidden":
        # Names of models and problem sets and list positions are not settings: leave them out of the look-up.
        path = [
            p
            for i, p in enumerate(where[:-1])
            if isinstance(p, str) and not (i == 1 and where[0] in ("models", "problems"))
        ]
        known = _known_fields(path, StudyConfig)
        return f"{source}: '{'.'.join(map(str, where))}' is not a setting{nearest(str(where[-1]), known)}"
    if where[-1:] == ["[key]"]:  # a name as a key
        where, kind = where[:-2], "string_pattern_mismatch"
    key = ".".join(map(str, where))
    if kind == "string_pattern_mismatch":
        said = f"{given!r:.60} cannot be a name: letters, digits, dots, hyphens and underscores can"
    elif kind == "literal_error":
        choices = re.findall(r"'(.*?)'", first["ctx"]["expected"])
        said = f"{given!r:.60} is not a choice{nearest(str(given), choices)}"
    elif kind == "missing":
        said = "is missing"
    elif kind in ("tuple_type", "dict_type", "model_type"):
        said = f"should be a {'list' if kind == 'tuple_type' else 'mapping'}, not {given!r:.60}"
    else:
        message = re.sub(r"^(Value error|Assertion failed), ", "", first["msg"])
        said = message[0].lower() + message[1:] + ("" if kind == "value_error" else f", not {given!r:.60}")
    return f"{source}: {key}{': ' if key else ''}{said}"


def parse(data: dict, source: str) -> StudyConfig:
    """A `StudyConfig` from plain data; `source` names it in errors."""
    try:
        return StudyConfig.model_validate(data)
    except pydantic.ValidationError as error:
        raise UserError(_sentence(source, error)) from None


class _Loader(yaml.SafeLoader):
    """YAML as PyYAML reads it, but a key that is given twice is an error, not its last value, 1e-6 is a number, and
    10:12 a text, not a number of seconds."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        first = {}
        for key, _ in node.value:
            there = first.setdefault((key.tag, key.value), key) if isinstance(key, yaml.ScalarNode) else key
            if there is not key:
                said = f"'{key.value}' is given twice, first in line {there.start_mark.line + 1}"
                raise yaml.MarkedYAMLError(problem=said, problem_mark=key.start_mark)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
for _digit in "0123456789":
    _Loader.yaml_implicit_resolvers[_digit].insert(0, ("tag:yaml.org,2002:str", re.compile(r"\d+(:\d+)+$")))


def _read_yaml(text: str):
    """Plain data, no two parts of which are one object: anchors copy, so a change of one part stays there."""

    def copy(value):
        if isinstance(value, dict):
            return {key: copy(v) for key, v in value.items()}
        return [copy(v) for v in value] if isinstance(value, list) else value

    try:
        return copy(yaml.load(text, _Loader))
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply, or holds itself") from None


def override(data: dict, assignment: str) -> None:
    """Apply one `a.b.c=value` (the value is YAML) to nested plain data, in place."""
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise UserError(f"'{assignment}' is not an override: write key=value, for example sampling.samples=16")
    try:
        value = _read_yaml(text)
    except yaml.YAMLError:
        raise UserError(f"'{assignment}': the value is not YAML") from None
    at, parts = data, key.split(".")
    while True:
        if isinstance(at, list):
            part, parts = parts[0], parts[1:]
            if not re.fullmatch("[0-9]+", part) or int(part) >= len(at):
                raise UserError(f"'{assignment}': '{part}' is not a position in a list of {len(at)}, counted from 0")
            part = int(part)
        else:  # names may have dots in them: as many parts as make a key that is there, else one
            take = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in at), 1)
            part, parts = ".".join(parts[:take]), parts[take:]
        if not parts:
            at[part] = value
            return
        inner = at[part] if isinstance(at, list) else at.get(part)
        if not isinstance(inner, (dict, list)):
            inner = at[part] = {}
        at = inner


def load(path: str | Path, overrides=()) -> StudyConfig:
    """Read a study's YAML file and apply `key=value` overrides.

    Raises UserError (one sentence) if the file is missing or malformed, or a setting is unknown or impossible.
    """
    path = Path(path)
    try:
        data = _read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path}{line}: not valid YAML: {reason}") from None
    if not isinstance(data, dict):
        what = "empty" if data is None else f"a {type(data).__name__}"
        raise UserError(f"{path}: a study config is a mapping of settings, this is {what}")
    for assignment in overrides:
        override(data, assignment)
    return parse(data, str(path))
