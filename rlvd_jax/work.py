"""The steps of a study that need a device: sample and grade responses, train by GRPO, train by SFT."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from rlvd_jax import hosts, prompts, tokenizer
from rlvd_jax.config import MeshConfig
from rlvd_jax.errors import UserError
from rlvd_jax.grading import Grader
from rlvd_jax.qwen2 import Qwen2, Qwen2Config, weights
from rlvd_jax.qwen2.mesh import make_mesh
from rlvd_jax.responses import Response, ResponseSet
from rlvd_jax.sampling import Completion, Request, Sampler
from rlvd_jax.study import Step, Study
from rlvd_jax.training import grpo, sft
from rlvd_jax.training.interruption import Interruption, Stopped

SHARD = 8192  # responses in a shard at most ...
SHARD_SECONDS = 120  # ... and the longest that a finished response waits to be written
LENT = 8  # solved examples of a question that GRPO has to choose from; more would be moved and held for nothing


@dataclasses.dataclass
class Loaded:
    """A model ready for work."""

    name: str
    model: Qwen2
    tokenizer: object
    directory: Path
    template: str
    end_tokens: tuple[int, ...]
    sampler: Sampler | None = None
    """Holds the weights from the first draws on; `model` is abstract then."""

    def decode(self, tokens: np.ndarray) -> str:
        return tokenizer.decode(self.tokenizer, [tokens])[0]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @property
    def end_token(self) -> int:
        """What ends a response in training: the tokenizer's end token where it ends this model's responses too."""
        eos = self.tokenizer.eos_token_id
        return eos if eos in self.end_tokens else self.end_tokens[0]


class Work:
    """Runs a study's steps on the devices there are; where these belong to several processes, in all of them."""

    def __init__(self, study: Study, grader: Grader, progress: bool = True):
        self.study, self.config, self.grader, self.progress = study, study.config, grader, progress
        self.mesh = make_mesh(self.config.mesh)
        # Each process samples by itself, with weights of the sampler's own, so what it loads is split over its devices.
        local = jax.local_devices()
        self.local_mesh = make_mesh(MeshConfig(fsdp=len(local)), local)
        self.dtype = self._dtype(self.config.dtype)
        self.save_dtype = self.dtype if self.config.save_dtype == "auto" else self._dtype(self.config.save_dtype)
        self._loaded: Loaded | None = None

    @staticmethod
    def _dtype(name: str):
        if name == "auto":
            return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
        return jnp.dtype(name)

    def run(self, step: Step) -> None:
        """Do one step; returns at once where it is done already."""
        if hosts.from_first(lambda: self.study.done(step)):
            return
        if step.kind == "respond":
            self.respond(step)
        elif self.config.models[step.model].grpo:
            self.grpo(step.model)
        else:
            self.sft(step.model)

    # ---- models ------------------------------------------------------------------------------------

    def load(self, name: str, trains: str | None = None) -> Loaded:
        """Model `name` with its tokenizer, ready to sample; the one loaded last is kept.

        trains: the model that is to be trained from it: then its weights are float32 and lie on the mesh of all
        devices, and the template and context are those of the model to be.
        """
        if not trains and self._loaded and self._loaded.name == name:
            return self._loaded
        self._loaded = None
        directory = self.study.checkpoint(name)
        words = tokenizer.load(directory)
        template = self.study.template(trains or name)
        with tqdm(desc=f"load {name}", unit="weight", leave=False, disable=not self.progress) as bar:

            def progress(done, total):
                bar.total = total
                bar.update(done - bar.n)

            param_dtype = jnp.float32 if trains else self.dtype
            mesh = self.mesh if trains else self.local_mesh
            model = weights.load(directory, param_dtype=param_dtype, dtype=self.dtype, mesh=mesh, progress=progress)
        if context := self.config.context(trains or name):
            model.config = dataclasses.replace(model.config, max_position_embeddings=context)
        end_tokens = prompts.stop_token_ids(words, directory, template)
        loaded = Loaded(name, model, words, directory, template, end_tokens)
        if not trains:
            self._loaded = loaded
        return loaded

    def prompts(self, loaded: Loaded, problems) -> list[tuple[int, ...]]:
        longest = loaded.model.config.max_position_embeddings - 1
        return prompts.tokenize(loaded.tokenizer, loaded.template, problems, longest)

    def sampler(self, loaded: Loaded, settings) -> Sampler:
        return Sampler(loaded.model.config, settings, loaded.end_tokens, dtype=self.dtype)

    # ---- responses ---------------------------------------------------------------------------------

    def respond(self, step: Step) -> None:
        """Sample and grade what is missing of a response set; each process its share."""
        study = self.study
        problems = {p.id: p for p in study.problems(step.problems)}
        there = study.responses(step.model, step.problems)
        missing = hosts.from_first(lambda: there.missing(problems, step.samples))
        loaded = self.load(step.model)
        incomplete = [problems[id] for id in missing]
        shares = zip(incomplete, self.prompts(loaded, incomplete), hosts.share(list(missing.values())), strict=True)
        mine = [(p, prompt, samples) for p, prompt, samples in shares if samples]
        asked = [p for p, _, _ in mine]
        requests = [Request(prompt, prompts.question_key(p.id), samples) for p, prompt, samples in mine]
        if not loaded.sampler:
            loaded.sampler = self.sampler(loaded, self.config.model_sampling(step.model))
            loaded.model, params = self._give_up(loaded)
            loaded.sampler.load(params, give_up=True)  # its own copy is enough
        sampler = loaded.sampler
        if hosts.count() > 1:
            hosts.from_first(there.start_writing)
            there.share_writing(hosts.index(), hosts.count())
        writer = _Writer(there, self.grader, loaded, asked)
        total = sum(len(r.samples) for r in requests)
        bar = tqdm(total=total, desc=step.name, unit="resp", smoothing=0.05, disable=not self.progress)
        with bar, Interruption() as interruption:
            tokens, start = 0, time.perf_counter()

            def rate():
                return f"{tokens / (time.perf_counter() - start):,.0f} tokens/s"

            try:
                drawn = contextlib.closing(sampler.sample(requests, self.config.seed))
                with contextlib.suppress(Stopped), drawn as completions:
                    for completion in completions:
                        writer.add(completion)
                        tokens += len(completion.tokens)
                        if bar.update():
                            bar.set_postfix_str(rate(), refresh=False)
                        interruption.check()
                    bar.set_postfix_str(rate())
            except Exception:
                with contextlib.suppress(Exception):  # what came before the error is kept, if it can be
                    writer.close()
                raise
            writer.close()
            try:
                interruption.agree()
            except Stopped:
                interruption.leave()

    # ---- training ----------------------------------------------------------------------------------

    def grpo(self, name: str) -> None:
        config, recipe = self.config, self.config.models[name].grpo
        loaded = self.load(recipe.start, trains=name)

        def questions(problems):
            return grpo.Questions(problems, self.prompts(loaded, problems))

        evaluation = None
        if recipe.evaluate_on and recipe.evaluate_every:
            evaluation = grpo.Evaluation(
                questions(self.study.problems(recipe.evaluate_on)),
                self.sampler(loaded, config.model_sampling(name, recipe.evaluate_sampling)),
                recipe.evaluate_samples,
            )
        directory = self.study.training(name)
        practice = questions(self.study.problems(recipe.problems))
        sampler = self.sampler(loaded, config.model_sampling(name, recipe.sampling))
        solved = self._solved(name, loaded, practice, sampler.settings.max_tokens) if recipe.solved_by else None
        model, params = self._give_up(loaded)
        params, happened = grpo.train(
            recipe,
            model=model,
            params=params,
            mesh=self.mesh,
            questions=practice,
            sampler=sampler,
            grader=self.grader,
            decode=loaded.decode,
            evaluation=evaluation,
            directory=directory,
            seed=config.seed,
            solved=solved,
            profile=config.profiled,
            save_last=config.keep_checkpoints,
            progress=self.progress,
        )
        self._finish(params, model.config, loaded.directory, directory, happened)

    def _solved(self, name: str, loaded: Loaded, practice: grpo.Questions, max_tokens: int) -> grpo.Solved:
        """What `solved_by` lends to model `name`: of each question up to `LENT` correct responses at random, as long as
        the model's own may be. UserError if there are none."""
        recipe, study = self.config.models[name].grpo, self.study
        samples = recipe.solved_samples or self.config.sampling.samples
        correct = hosts.from_first(lambda: drawn_correct(study, recipe.solved_by, recipe.problems, samples, LENT))
        tokens = []
        for problem, prompt in zip(practice.problems, practice.prompts, strict=True):
            responses = [(prompt, r.text, r.stop) for r in correct.get(problem.id, [])]
            longest = min(len(prompt) + max_tokens, loaded.model.config.max_position_embeddings)
            examples, _ = sft.make_examples(responses, loaded.encode, loaded.end_token, longest)
            tokens.append([e.response for e in examples])
        if not any(tokens):
            raise UserError(
                f"models.{name}.grpo.solved_by: '{recipe.solved_by}' has no correct response of at most {max_tokens} "
                f"tokens to any of '{recipe.problems}', so it has nothing to lend"
            )
        return grpo.Solved(tokens, loaded.decode, loaded.end_tokens)

    def sft(self, name: str) -> None:
        recipe = self.config.models[name].sft
        loaded = self.load(recipe.student, trains=name)
        chosen, counts = hosts.from_first(lambda: choose(self.study, name))
        problems = self.study.problems(recipe.problems)
        of_id = {p.id: prompt for p, prompt in zip(problems, self.prompts(loaded, problems), strict=True)}
        examples, left_out = sft.make_examples(
            ((of_id[r.problem_id], r.text, r.stop) for r in chosen),
            loaded.encode,
            loaded.end_token,
            recipe.max_length,
        )
        directory = self.study.training(name)
        model, params = self._give_up(loaded)
        params, happened = sft.train(
            recipe,
            model=model,
            params=params,
            mesh=self.mesh,
            examples=examples,
            directory=directory,
            seed=self.config.seed,
            profile=self.config.profiled,
            save_last=self.config.keep_checkpoints,
            progress=self.progress,
        )
        happened = {"step": happened["step"], **counts, "too_long": left_out, "examples": len(examples)}
        self._finish(params, model.config, loaded.directory, directory, happened)

    def _give_up(self, loaded: Loaded) -> tuple[Qwen2, nnx.State]:
        """An abstract model and its weights, with no other reference to them: training takes them over."""
        graphdef, params = nnx.split(loaded.model, nnx.Param)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        loaded.model = None
        return nnx.merge(graphdef, abstract), params

    def _finish(self, params, model: Qwen2Config, source: Path, directory: Path, happened: dict) -> None:
        """Write the trained model, then result.json, which says that the training is finished."""
        weights.save(params, model, directory / "model", source=source, dtype=self.save_dtype)

        def finish():
            temporary = directory / ".result.json.tmp"
            temporary.write_text(json.dumps(happened, indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, directory / "result.json")
            if not self.config.keep_checkpoints:
                shutil.rmtree(directory / "checkpoints", ignore_errors=True)

        hosts.from_first(finish)


def drawn_correct(study: Study, model: str, problems: str, samples: int, keep: int) -> dict[str, list[Response]]:
    """Problem → up to `keep` of the correct ones among a model's first `samples` responses, at random with the study's
    seed, in their order; problems without any are left out."""
    correct: dict[str, list[Response]] = {}
    for r in study.responses(model, problems).responses():
        if r.correct and r.sample < samples:
            correct.setdefault(r.problem_id, []).append(r)
    for id, found in correct.items():
        rng = np.random.default_rng([study.config.seed, prompts.question_key(id)])
        correct[id] = [found[i] for i in sorted(rng.permutation(len(found))[:keep])]
    return correct


def choose(study: Study, name: str) -> tuple[list[Response], dict]:
    """The teacher's responses that model `name` learns from, and how many questions were left (sections 5.1, 6.1).

    Of each question up to `keep` correct responses at random; without the questions that `only_solved_by` never
    solves. Raises UserError if none are left.
    """
    recipe = study.config.models[name].sft
    problems = [p.id for p in study.problems(recipe.problems)]
    allowed = set(problems)
    if recipe.only_solved_by:
        rows = study.responses(recipe.only_solved_by, recipe.problems).table(["problem_id", "sample", "correct"])
        rows = rows.to_pylist()
        most = study.config.sampling.samples
        allowed &= {r["problem_id"] for r in rows if r["correct"] and r["sample"] < most}
    samples = recipe.samples or study.config.sampling.samples
    correct = drawn_correct(study, recipe.teacher, recipe.problems, samples, recipe.keep)
    correct = {id: correct[id] for id in problems if id in correct and id in allowed}
    chosen = [r for found in correct.values() for r in found]
    if not chosen:
        raise UserError(
            f"models.{name}.sft: '{recipe.teacher}' solved none of the questions that are left of "
            f"'{recipe.problems}', so there is nothing to learn"
        )
    return chosen, {"questions": len(problems), "allowed": len(allowed), "answered": len(correct)}


class _Writer:
    """Takes completions, has them graded while the device goes on, and writes them as shards."""

    def __init__(self, there: ResponseSet, grader: Grader, loaded: Loaded, problems):
        self.there, self.grader, self.loaded, self.problems = there, grader, loaded, problems
        self.waiting: list[Completion] = []
        self.grading = None
        self.since = time.monotonic()

    def add(self, completion: Completion) -> None:
        self.waiting.append(completion)
        if len(self.waiting) >= SHARD or time.monotonic() - self.since > SHARD_SECONDS:
            self._submit()

    def _submit(self) -> None:
        self._write()
        completions, self.waiting, self.since = self.waiting, [], time.monotonic()
        if not completions:
            return
        texts = tokenizer.decode(self.loaded.tokenizer, [c.tokens for c in completions])
        golds = [self.problems[c.request].answer for c in completions]
        self.grading = completions, texts, self.grader.submit(zip(golds, texts, strict=True))

    def _write(self) -> None:
        """Wait for the verdicts on the last batch, and write it."""
        if self.grading is None:
            return
        completions, texts, verdicts = self.grading
        self.grading = None
        self.there.add(
            [
                Response(
                    problem_id=self.problems[c.request].id,
                    sample=c.sample,
                    text=text,
                    tokens=len(c.tokens),
                    logprob=float(c.logprobs.sum(dtype=np.float64)),
                    stop=c.stop,
                    answer=verdict.answer,
                    correct=verdict.correct,
                )
                for c, text, verdict in zip(completions, texts, verdicts.result(), strict=True)
            ]
        )

    def close(self) -> None:
        """Grade and write all that is left."""
        self._submit()
        self._write()
