"""GRPO: sample responses to questions, grade them, make the better ones of each group likelier, again and again.

One step: the sampler answers `questions` questions `samples` times each; the grader judges a group as soon as its last
response has ended, while the device goes on sampling; rewards become advantages within each group; all
responses are packed into one batch, and one optimiser step is made on it (`updates` steps, on the very same batch, as
PPO's epochs and TRL's num_iterations). Where there are several processes each samples and grades its share of every
group, then all get the others' and pack the same batch. Every draw is a function of the seed, the step, the question
and the sample number, and the order of the questions of the seed alone, so a run that was killed goes on from its last
checkpoint to the very same weights.
"""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tqdm import tqdm

from rlvd_jax import hosts
from rlvd_jax.board import Board
from rlvd_jax.config import GRPOConfig
from rlvd_jax.errors import UserError
from rlvd_jax.grading import Grader
from rlvd_jax.problems import Problem
from rlvd_jax.prompts import question_key
from rlvd_jax.qwen2 import Qwen2
from rlvd_jax.sampling import Completion, Request, Sampler
from rlvd_jax.training.batches import Example, pack, token_weights
from rlvd_jax.training.checkpoints import Checkpoints
from rlvd_jax.training.interruption import Interruption, Stopped
from rlvd_jax.training.loss import Objective
from rlvd_jax.training.profile import Profile
from rlvd_jax.training.rewards import advantages, rewards
from rlvd_jax.training.step import Trainer, TrainState, check_finite, discard, get_trainer

ROUNDS = 10  # of dynamic sampling in a step; then it trains on the groups that there are


@dataclass(frozen=True)
class Questions:
    """Problems and their prompts in tokens, in the same order."""

    problems: Sequence[Problem]
    prompts: Sequence[tuple[int, ...]]

    def digest(self) -> str:
        """Changes whenever a problem, its answer or its prompt does."""
        text = repr([(p.id, p.answer, tuple(t)) for p, t in zip(self.problems, self.prompts, strict=True)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Evaluation:
    """What is measured between steps: `samples` responses to each question, drawn by a sampler of its own settings."""

    questions: Questions
    sampler: Sampler
    samples: int

    def identity(self) -> dict:
        settings = self.sampler.settings.model_dump(mode="json", exclude={"samples", "slots", "tensor"})
        return settings | {"questions": self.questions.digest(), "samples": self.samples}


@dataclass
class Group:
    """The responses to one question, by sample number."""

    question: int  # position in Questions
    completions: list[Completion]
    texts: list[str]
    correct: np.ndarray  # bool [samples]


class Rollouts:
    """Samples responses and has them graded meanwhile.

    decode: from a response's tokens, the end token included, to the text that is graded.
    """

    def __init__(self, grader: Grader, decode: Callable[[np.ndarray], str], interruption: Interruption):
        self.grader, self.decode, self.interruption = grader, decode, interruption
        self.seconds: dict[str, float] = defaultdict(float)  # spent on each part since it was last cleared

    @contextmanager
    def timed(self, part: str):
        start = time.perf_counter()
        with jax.profiler.TraceAnnotation(part):
            yield
        self.seconds[part] += time.perf_counter() - start

    def draw(self, sampler: Sampler, questions: Questions, wanted: list[tuple[int, range]], seed: int) -> list[Group]:
        """A group for each (question, sample numbers) in `wanted`, under the weights that the sampler has; of each this
        process's share of the responses. Called by all processes together."""
        shares = hosts.share([samples for _, samples in wanted])
        mine = [i for i, samples in enumerate(shares) if samples]
        asked = [wanted[i][0] for i in mine]
        requests = [
            Request(questions.prompts[q], question_key(questions.problems[q].id), shares[i])
            for q, i in zip(asked, mine, strict=True)
        ]
        groups = [Group(q, [], [], np.zeros(len(s), bool)) for (q, _), s in zip(wanted, shares, strict=True)]
        verdicts = {}
        with self.timed("sample"), suppress(Stopped), closing(sampler.sample(requests, seed)) as completions:
            for completion in completions:
                self.interruption.check()
                i = mine[completion.request]
                group, gold = groups[i], questions.problems[groups[i].question].answer
                group.completions.append(completion)
                if len(group.completions) == len(group.correct):
                    group.completions.sort(key=lambda c: c.sample)
                    group.texts = [self.decode(c.tokens) for c in group.completions]
                    verdicts[i] = self.grader.submit([(gold, text) for text in group.texts])
        self.interruption.agree()
        with self.timed("grade"):  # what is left of it once the last response has ended
            for i, verdict in verdicts.items():
                groups[i].correct[:] = [v.correct for v in verdict.result()]
        return groups

    def exchange(self, groups: list[Group]) -> list[Group]:
        """The groups with the responses of all processes, from each process's share of them."""
        if hosts.count() == 1:
            return groups

        def put_together(parts: tuple[Group, ...]) -> Group:
            rows = [row for g in parts for row in zip(g.completions, g.texts, g.correct, strict=True)]
            completions, texts, correct = zip(*sorted(rows, key=lambda row: row[0].sample), strict=True)
            return Group(parts[0].question, list(completions), list(texts), np.array(correct))

        with self.timed("exchange"):  # with the wait for the slowest
            return [put_together(parts) for parts in zip(*hosts.gather(groups), strict=True)]


def draw_seed(seed: int, purpose: str, step: int) -> int:
    """64 bits for the draws of one step and one purpose."""
    entropy = [seed & 0xFFFFFFFFFFFFFFFF, *purpose.encode(), step]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


@functools.lru_cache(maxsize=2)
def _permutation(number: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed & 0xFFFFFFFFFFFFFFFF, epoch]).permutation(number)


def question_at(position: int, number: int, seed: int) -> int:
    """The question at a position of the endless order, in which each epoch is a permutation of all `number`."""
    epoch, place = divmod(position, number)
    return int(_permutation(number, seed, epoch)[place])


def practise(
    config: GRPOConfig, rollouts: Rollouts, sampler: Sampler, questions: Questions, position: int, step: int, seed: int
) -> tuple[list[Group], list[Group]]:
    """(the groups to learn from, all groups that were drawn) from `position` of the questions' order on.

    With dynamic sampling, groups of equal rewards teach nothing and further questions are drawn in their place, as many
    as the share of useful groups so far suggests, until there are `config.questions` useful groups, or `ROUNDS` times.
    """
    drawn: list[Group] = []
    useful: list[Group] = []
    asked: Counter[int] = Counter()  # a question that comes again within a step gets new sample numbers
    for _ in range(ROUNDS):
        missing = config.questions - len(useful)
        count = min(config.questions, math.ceil(missing * max(1, len(drawn)) / max(1, len(useful))))
        wanted = []
        for p in range(position + len(drawn), position + len(drawn) + count):
            q = question_at(p, len(questions.problems), seed)
            wanted.append((q, range(asked[q] * config.samples, (asked[q] + 1) * config.samples)))
            asked[q] += 1
        new = rollouts.exchange(rollouts.draw(sampler, questions, wanted, draw_seed(seed, "practice", step)))
        drawn += new
        useful += [g for g in new if 0 < g.correct.sum() < len(g.correct)] if config.dynamic_sampling else new
        if len(useful) >= config.questions:
            break
    return useful[: config.questions] or drawn[: config.questions], drawn


def to_batch(
    config: GRPOConfig, groups: list[Group], questions: Questions, max_tokens: int, row_tokens: int, shards: int
) -> dict[str, np.ndarray]:
    """The packed batch of some groups.

    Weights come from all responses. Those with advantage 0 have no influence without a KL term, so they are left
    out then and cost nothing; the metrics of the loss are over the tokens trained on.
    """
    advantage = advantages(rewards([g.correct for g in groups]), config.advantage)
    examples = [
        Example(questions.prompts[g.question], c.tokens, c.logprobs, float(a))
        for g, row in zip(groups, advantage, strict=True)
        for c, a in zip(g.completions, row, strict=True)
    ]
    weights = token_weights([len(e.response) for e in examples], config.normalise, max_tokens)
    taught = [i for i, e in enumerate(examples) if e.advantage or config.kl] or [0]
    chosen = [examples[i] for i in taught]
    return pack(chosen, weights[taught], row_tokens=row_tokens, micro_rows=config.micro_rows, shards=shards)


def learn(config: GRPOConfig, trainer: Trainer, state: TrainState, batch, reference) -> tuple[TrainState, dict]:
    """`config.updates` optimiser steps on a batch; the metrics are the last one's, |Δ logp| the first one's."""
    batch = trainer.place(batch)
    if config.updates > 1:
        batch["old"] = trainer.logprobs(state.params, batch)
    if config.kl:
        batch["reference"] = trainer.logprobs(reference, batch)
    state, first = trainer.update(state, batch)
    last = first
    for _ in range(config.updates - 1):
        state, last = trainer.update(state, batch)
    return state, jax.device_get(last | {k: v for k, v in first.items() if k.startswith("delta_logp")})


def evaluate(evaluation: Evaluation, rollouts: Rollouts, params, step: int, seed: int) -> dict:
    """Accuracy and length on the evaluation's questions, with each question's number of correct responses."""
    evaluation.sampler.load(params)
    wanted = [(q, range(evaluation.samples)) for q in range(len(evaluation.questions.problems))]
    groups = rollouts.draw(evaluation.sampler, evaluation.questions, wanted, draw_seed(seed, "evaluation", step))
    evaluation.sampler.release()
    completions = [c for g in groups for c in g.completions]
    lengths, cut = sum(len(c.tokens) for c in completions), sum(c.stop == "length" for c in completions)
    of_all = hosts.gather((np.array([g.correct.sum() for g in groups]), lengths, cut))
    correct, lengths, cut = (sum(values) for values in zip(*of_all, strict=True))
    responses = len(correct) * evaluation.samples
    return {
        "step": step,
        "samples": evaluation.samples,
        "correct": correct.tolist(),
        "accuracy": int(correct.sum()) / responses,
        "length": lengths / responses,
        "truncated": cut / responses,
    }


def rollout_metrics(groups: list[Group]) -> dict[str, float]:
    """What the responses of a step were like."""
    correct = np.array([g.correct for g in groups])  # [groups, samples]
    lengths = np.array([[len(c.tokens) for c in g.completions] for g in groups])
    metrics = {
        "reward": rewards(correct).mean(),
        "all_right": correct.all(axis=1).mean(),
        "all_wrong": (~correct).all(axis=1).mean(),
        "length": lengths.mean(),
        "truncated": np.mean([c.stop == "length" for g in groups for c in g.completions]),
        "questions": len(groups),
    }
    for name, chosen in (("correct", correct), ("incorrect", ~correct)):
        if chosen.any():
            metrics[f"length_{name}"] = lengths[chosen].mean()
    return metrics


def record(board: Board, step: int, groups: list[Group], learnt: dict, seconds: dict, questions: Questions) -> dict:
    """Write a step to TensorBoard, with a correct and an incorrect response; → what the progress bar shows of it."""
    rollout = rollout_metrics(groups)
    tokens = sum(len(c.tokens) for g in groups for c in g.completions)
    rates = {"tokens_per_second": tokens / sum(seconds.values()), "sampled_per_second": tokens / seconds["sample"]}
    for part, values in (("train", learnt), ("rollout", rollout), ("time", seconds | rates)):
        board.scalars(step, {f"{part}/{name}": value for name, value in values.items()})
    for name, wanted in (("correct", True), ("incorrect", False)):
        group = next((g for g in groups if wanted in g.correct), None)
        if group is not None:
            i = int(np.flatnonzero(group.correct == wanted)[0])
            problem, completion = questions.problems[group.question], group.completions[i]
            heading = f"{problem.id}: {problem.problem}\nanswer: {problem.answer}\n"
            heading += f"response {completion.sample}, {len(completion.tokens)} tokens, stop: {completion.stop}\n\n"
            board.text(step, f"responses/{name}", heading + group.texts[i])
    return {
        "reward": f"{rollout['reward']:+.2f}",
        "length": f"{rollout['length']:.0f}",
        "Δlogp": f"{learnt['delta_logp']:.1e} (max {learnt['delta_logp_max']:.1e})",
        "s": "+".join(f"{seconds[part]:.1f}" for part in ("load", "sample", "grade", "train")),
        "tokens/s": f"{rates['tokens_per_second']:,.0f}",
    }


def train(
    config: GRPOConfig,
    *,
    model: Qwen2,
    params: nnx.State,
    mesh: Mesh,
    questions: Questions,
    sampler: Sampler,
    grader: Grader,
    decode: Callable[[np.ndarray], str],
    evaluation: Evaluation | None,
    directory: str | Path,
    seed: int,
    profile: range | None = None,
    save_last: bool = True,
    progress: bool = True,
) -> tuple[nnx.State, dict]:
    """Train a model by GRPO, or go on with it; → (weights of the step that is kept, what happened).

    model: whose architecture and dtype are used; it may be abstract. params: the weights to start from, which training
    takes over: don't use them again.
    sampler: draws the practice responses, at its own settings. decode: see `Rollouts`. evaluation: None means none,
    and then the last step is kept. directory: gets `checkpoints` to go on from and `events` for TensorBoard. profile:
    the steps to trace, into `events` too. save_last: also checkpoint the last step; its weights are returned anyway, so
    a caller that writes them right away is done sooner without.

    What happened is JSON-able: "kept", the step of the weights; "step", the last one; "position", questions drawn;
    "evaluations", a list of `evaluate`'s results. Raises UserError if the settings can't work together or the directory
    holds a run of other settings, and, after saving a checkpoint, KeyboardInterrupt or SystemExit when told to stop.
    """
    settings = sampler.settings
    if settings.temperature == 0:
        raise UserError("grpo.sampling.temperature is 0: all responses of a group would be the same, set it above 0")
    longest = max(len(p) for p in questions.prompts) + settings.max_tokens
    longest = min(longest, model.config.max_position_embeddings)
    row_tokens = config.row_tokens or -(-longest // 128) * 128
    if row_tokens < longest:
        raise UserError(f"grpo.row_tokens is {row_tokens}, but a prompt and its response may have {longest} tokens")
    identity = {  # what may change when a run goes on is left out
        "grpo": config.model_dump(mode="json", exclude={"steps", "checkpoint_every", "row_tokens", "micro_rows"}),
        "sampling": settings.model_dump(mode="json", exclude={"samples", "slots", "tensor"}),
        "questions": questions.digest(),
        "evaluation": evaluation.identity() if evaluation else None,
        "model": model.config.to_dict() | {"dtype": jnp.dtype(model.dtype).name},
        "seed": seed,
    }

    objective = Objective(config.clip_low, config.clip_high, config.ratio, config.kl)
    trainer = get_trainer(model.config, jnp.dtype(model.dtype), mesh, config.optimizer, objective, settings.temperature)
    reference = jax.tree.map(lambda x: jnp.array(x, model.dtype, copy=True), params) if config.kl else None
    directory = Path(directory)
    with Interruption() as interruption, Checkpoints(directory / "checkpoints", identity) as checkpoints:
        rollouts = Rollouts(grader, decode, interruption)
        if checkpoints.latest is None:
            state, done = trainer.init(params), {"step": 0, "position": 0, "evaluations": [], "best": None}
            first_step = 0
        else:
            discard(params)
            state, done = checkpoints.restore(trainer.abstract_state)
            first_step = done["step"] + 1
        bar = tqdm(total=config.steps, initial=done["step"], desc="GRPO", unit="step", disable=not progress)
        events = directory / "events"
        with Board(events, first_step) as board, Profile(profile, events) as tracer, bar:
            shown = {}
            try:
                while True:
                    step, ended = done["step"], done["step"] >= config.steps
                    every = config.evaluate_every if evaluation else None
                    evaluated = step in [e["step"] for e in done["evaluations"]]
                    if every and (step % every == 0 or ended) and not evaluated:
                        bar.set_description("GRPO (evaluating)")
                        weights = hosts.on_local_devices(state.params, model.dtype)
                        result = evaluate(evaluation, rollouts, weights, step, seed)
                        del weights
                        bar.set_description("GRPO")
                        done = done | {"evaluations": [*done["evaluations"], result]}
                        if config.keep == "best":  # the earliest of equals
                            done["best"] = max(done["evaluations"], key=lambda e: sum(e["correct"]))["step"]
                        board.scalars(step, {f"eval/{k}": result[k] for k in ("accuracy", "length", "truncated")})
                        shown["accuracy"] = f"{result['accuracy']:.3f}"
                    due = step == done["best"] or (step and step % config.checkpoint_every == 0)
                    if save_last if ended else due:
                        checkpoints.save(state, done, done["best"])
                    if ended:
                        break
                    interruption.agree()

                    rollouts.seconds.clear()
                    with tracer.step(step + 1):
                        with rollouts.timed("load"):
                            sampler.load(hosts.on_local_devices(state.params, model.dtype))
                        groups, drawn = practise(config, rollouts, sampler, questions, done["position"], step, seed)
                        sampler.release()
                        with rollouts.timed("train"):
                            shards = trainer.batch_shards
                            batch = to_batch(config, groups, questions, settings.max_tokens, row_tokens, shards)
                            state, learnt = learn(config, trainer, state, batch, reference)
                    check_finite(learnt, step + 1)
                    done = done | {"step": step + 1, "position": done["position"] + len(drawn)}
                    shown |= record(board, step + 1, drawn, learnt, rollouts.seconds, questions)
                    bar.set_postfix(shown)
                    bar.update()
            except Stopped:
                checkpoints.save(state, done, done["best"])
                checkpoints.wait()
                interruption.leave()

        kept = done["step"] if done["best"] is None else done["best"]
        weights = state.params
        if kept != done["step"]:
            del state, weights  # make room
            weights = checkpoints.params(kept, trainer.abstract_state.params)
        return weights, done | {"kept": kept}
