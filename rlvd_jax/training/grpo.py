"""GRPO: sample responses to questions, grade them, make the better ones of each group likelier, again and again.

One step: the sampler answers `questions` questions `samples` times each; the grader judges a response as soon as it has
ended, while the device goes on sampling; rewards become advantages within each group; all responses are packed into one
batch, and one optimiser step is made on it (`updates` steps, on the very same batch, as PPO's epochs and TRL's
num_iterations). Where there are several processes each samples and grades its share of every group, then all get the
others' and pack the same batch. Every draw is a function of the seed, the step, the question and the sample number, and
the order of the questions of the seed alone, so a run that was killed goes on from its last checkpoint to the very same
weights.

Two settings change what a question without a correct response teaches: `hard_samples` draws it again, and `solved_by`
puts a correct response of another model in its group. What the step reports of the policy's responses is always of the
first `samples` that it drew of each question.
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
from rlvd_jax.training.step import Trainer, TrainState, check_finite, discard, earns_unrolling, get_trainer

UPDATES = 100  # that earn back what it takes to compile each layer by itself: 10 to 20 s, and 0.2 s for each of a 1.5B
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
        settings = self.sampler.settings.identity()
        return settings | {"questions": self.questions.digest(), "samples": self.samples}


@dataclass
class Group:
    """The responses to one question, by sample number."""

    question: int  # position in Questions
    completions: list[Completion]
    texts: list[str]
    correct: np.ndarray  # bool [samples]
    lent: bool = False
    """Whether the last response is another model's."""

    def take(self, chosen) -> Group:
        """The responses at these positions."""
        completions, texts = ([some[i] for i in chosen] for some in (self.completions, self.texts))
        return Group(self.question, completions, texts, self.correct[chosen])


def put_together(parts: Sequence[Group]) -> Group:
    """One group from parts of it."""
    rows = [row for g in parts for row in zip(g.completions, g.texts, g.correct, strict=True)]
    completions, texts, correct = zip(*sorted(rows, key=lambda row: row[0].sample), strict=True)
    return Group(parts[0].question, list(completions), list(texts), np.array(correct))


@dataclass(frozen=True)
class Solved:
    """Correct responses of another model, to lend to groups that have none."""

    tokens: Sequence[Sequence[np.ndarray]]  # of each question its responses, which may be none; with their end tokens
    decode: Callable[[np.ndarray], str]
    end_tokens: Sequence[int]

    def digest(self) -> str:
        return hashlib.sha256(repr([[t.tolist() for t in some] for some in self.tokens]).encode()).hexdigest()[:16]

    def lend(self, group: Group, questions: Questions, seed: int) -> Group:
        """The group with one of its question's responses, drawn with the seed, in place of its last; the group itself
        if there is none."""
        there = self.tokens[group.question]
        if not there:
            return group
        rng = np.random.default_rng([seed, question_key(questions.problems[group.question].id)])
        tokens = there[rng.integers(len(there))]
        stop = "end" if tokens[-1] in self.end_tokens else "length"
        example = Completion(-1, -1, tokens, np.zeros(len(tokens), np.float32), stop)
        completions, texts = [*group.completions[:-1], example], [*group.texts[:-1], self.decode(tokens)]
        return Group(group.question, completions, texts, np.append(group.correct[:-1], True), lent=True)


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
        graded = [[] for _ in wanted]  # of each group: completions, texts and verdicts to come
        with self.timed("sample"), suppress(Stopped), closing(sampler.sample(requests, seed)) as completions:
            for completion in completions:
                self.interruption.check()
                i = mine[completion.request]
                text = self.decode(completion.tokens)
                verdict = self.grader.submit([(questions.problems[wanted[i][0]].answer, text)])
                graded[i].append((completion, text, verdict))
        self.interruption.agree()
        groups = []
        with self.timed("grade"):  # what is left of it once the last response has ended
            for (q, _), rows in zip(wanted, graded, strict=True):
                rows.sort(key=lambda row: row[0].sample)
                correct = [verdict.result()[0].correct for _, _, verdict in rows]
                groups.append(Group(q, [c for c, _, _ in rows], [t for _, t, _ in rows], np.array(correct, bool)))
        return groups

    def exchange(self, groups: list[Group]) -> list[Group]:
        """The groups with the responses of all processes, from each process's share of them."""
        if hosts.count() == 1:
            return groups
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


def draw_again(config: GRPOConfig, groups: list[Group], draw: Callable[[list[tuple[int, range]]], list[Group]]) -> None:
    """Have each group without a correct response grow by `config.samples` at a time, up to `config.hard_samples` in
    all, until it has one; in place. draw: a group for each (question, sample numbers)."""
    number = config.samples
    while number < (config.hard_samples or 0):
        hard = [i for i, g in enumerate(groups) if not g.correct.any()]
        if not hard:
            return
        more = min(config.samples, config.hard_samples - number)
        firsts = [groups[i].completions[0].sample + number for i in hard]
        new = draw([(groups[i].question, range(n, n + more)) for i, n in zip(hard, firsts, strict=True)])
        for i, further in zip(hard, new, strict=True):
            groups[i] = put_together([groups[i], further])
        number += more


def to_learn_from(config: GRPOConfig, group: Group, solved: Solved | None, questions: Questions, seed: int) -> Group:
    """`config.samples` of a group's responses: of one that was drawn again the first correct ones, at most half, and
    the first wrong ones; of one without a correct response all but the last and a solved example, if there is one."""
    if len(group.correct) > config.samples:
        right, wrong = np.flatnonzero(group.correct)[: config.samples // 2], np.flatnonzero(~group.correct)
        group = group.take(np.sort([*wrong[: config.samples - len(right)], *right]))
    return group if solved is None or group.correct.any() else solved.lend(group, questions, seed)


def advantages_of(config: GRPOConfig, groups: list[Group]) -> np.ndarray:
    """float32 [groups, samples]."""
    return advantages(rewards([g.correct for g in groups]), config.advantage, config.k)


def practise(
    config: GRPOConfig,
    rollouts: Rollouts,
    sampler: Sampler,
    questions: Questions,
    position: int,
    step: int,
    seed: int,
    solved: Solved | None = None,
) -> tuple[list[Group], list[Group]]:
    """(the groups to learn from, all groups that were drawn) from `position` of the questions' order on.

    With dynamic sampling, groups without influence teach nothing and further questions are drawn in their place, as
    many as the share of useful groups so far suggests, until there are `config.questions` useful groups, or `ROUNDS`
    times. A group is useful also if `hard_samples` or `solved_by` made it so.
    """

    def draw(wanted: list[tuple[int, range]]) -> list[Group]:
        return rollouts.exchange(rollouts.draw(sampler, questions, wanted, draw_seed(seed, "practice", step)))

    drawn: list[Group] = []
    learnt: list[Group] = []  # from each of `drawn`
    useful: list[Group] = []
    asked: Counter[int] = Counter()  # a question that comes again within a step gets new sample numbers
    numbers = config.hard_samples or config.samples  # of one time that it comes
    for _ in range(ROUNDS):
        missing = config.questions - len(useful)
        count = min(config.questions, math.ceil(missing * max(1, len(drawn)) / max(1, len(useful))))
        wanted = []
        for p in range(position + len(drawn), position + len(drawn) + count):
            q = question_at(p, len(questions.problems), seed)
            wanted.append((q, range(asked[q] * numbers, asked[q] * numbers + config.samples)))
            asked[q] += 1
        new = draw(wanted)
        draw_again(config, new, draw)
        drawn += new
        new = [to_learn_from(config, g, solved, questions, draw_seed(seed, "solved", step)) for g in new]
        learnt += new
        if config.dynamic_sampling:
            new = [
                g for g, has_influence in zip(new, advantages_of(config, new).any(axis=1), strict=True) if has_influence
            ]
        useful += new
        if len(useful) >= config.questions:
            break
    return useful[: config.questions] or learnt[: config.questions], drawn


def to_batch(
    config: GRPOConfig,
    groups: list[Group],
    questions: Questions,
    max_tokens: int,
    row_tokens: int,
    micro_rows: int,
    shards: int,
) -> dict[str, np.ndarray]:
    """The packed batch of some groups, with micro-batches of `micro_rows` rows on each of `shards` devices.

    Weights come from all responses. Those with advantage 0 have no influence without a KL term or an entropy bonus, so
    they are left out then and cost nothing; the metrics of the loss are over the tokens trained on.
    """
    drawn = 1.0 if config.solved_by else None  # by the policy
    examples = [
        Example(questions.prompts[g.question], c.tokens, c.logprobs, float(a), 0.0 if c.sample < 0 else drawn)
        for g, row in zip(groups, advantages_of(config, groups), strict=True)
        for c, a in zip(g.completions, row, strict=True)
    ]
    weights = token_weights([len(e.response) for e in examples], config.normalise, max_tokens)
    taught = [i for i, e in enumerate(examples) if e.advantage or config.kl or config.entropy] or [0]
    chosen = [examples[i] for i in taught]
    return pack(chosen, weights[taught], row_tokens=row_tokens, micro_rows=micro_rows, shards=shards)


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


def rollout_metrics(config: GRPOConfig, groups: list[Group], learnt: list[Group]) -> dict[str, float]:
    """What the responses of a step were like: the first `config.samples` of each question, whatever was drawn again.

    groups: all that were drawn; learnt: those that were learnt from. redrawn: responses drawn beyond these; rescued:
    questions that had a correct one among them only; solved_examples: responses that another model lent.
    """
    first = [g.take(range(config.samples)) for g in groups]
    correct = np.array([g.correct for g in first])  # [groups, samples]
    lengths = np.array([[len(c.tokens) for c in g.completions] for g in first])
    metrics = {
        "reward": rewards(correct).mean(),
        "all_right": correct.all(axis=1).mean(),
        "all_wrong": (~correct).all(axis=1).mean(),
        "length": lengths.mean(),
        "truncated": np.mean([c.stop == "length" for g in first for c in g.completions]),
        "questions": len(groups),
    }
    if config.hard_samples:
        metrics["redrawn"] = sum(len(g.correct) for g in groups) - correct.size
        metrics["rescued"] = sum(g.correct.any() for g in groups) - correct.any(axis=1).sum()
    if config.solved_by:
        metrics["solved_examples"] = sum(g.lent for g in learnt)
    for name, chosen in (("correct", correct), ("incorrect", ~correct)):
        if chosen.any():
            metrics[f"length_{name}"] = lengths[chosen].mean()
    return metrics


def record(
    board: Board, step: int, groups: list[Group], rollout: dict, learnt: dict, seconds: dict, questions: Questions
) -> dict:
    """Write a step to TensorBoard, with a correct and an incorrect response; → what the progress bar shows of it.

    groups: all that were drawn; rollout, learnt, seconds: metrics of the responses, of the update, and of the time."""
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
    solved: Solved | None = None,
    profile: range | None = None,
    save_last: bool = True,
    progress: bool = True,
) -> tuple[nnx.State, dict]:
    """Train a model by GRPO, or go on with it; → (weights of the step that is kept, what happened).

    model: whose architecture and dtype are used; it may be abstract. params: the weights to start from, which training
    takes over: don't use them again.
    sampler: draws the practice responses, at its own settings. decode: see `Rollouts`. evaluation: None means none,
    and then the last step is kept. directory: gets `checkpoints` to go on from and `events` for TensorBoard. solved:
    the responses of `config.solved_by`, where it is set. profile: the steps to trace, into `events` too. save_last:
    also checkpoint the last step; its weights are returned anyway, so a caller that writes them right away is done
    sooner without.

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
        "grpo": config.identity({"steps", "checkpoint_every", "row_tokens", "micro_rows", "unroll"}),
        "sampling": settings.identity(),
        "questions": questions.digest(),
        "evaluation": evaluation.identity() if evaluation else None,
        "model": model.config.to_dict() | {"dtype": jnp.dtype(model.dtype).name},
        "seed": seed,
    }
    if solved:
        identity["solved"] = solved.digest()

    objective = Objective(config.clip_low, config.clip_high, config.ratio, config.kl, config.entropy)
    trainer = get_trainer(
        model.config,
        jnp.dtype(model.dtype),
        mesh,
        config.optimizer,
        objective,
        settings.temperature,
        unroll=earns_unrolling(config.unroll, mesh, config.steps * config.updates, UPDATES),
    )
    micro_rows = config.micro_rows or trainer.rows_at_once(row_tokens)
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
                        position = done["position"]
                        groups, drawn = practise(config, rollouts, sampler, questions, position, step, seed, solved)
                        sampler.release()
                        with rollouts.timed("train"):
                            sizes = row_tokens, micro_rows, trainer.batch_shards
                            batch = to_batch(config, groups, questions, settings.max_tokens, *sizes)
                            state, learnt = learn(config, trainer, state, batch, reference)
                    check_finite(learnt, step + 1)
                    done = done | {"step": step + 1, "position": position + len(drawn)}
                    rollout = rollout_metrics(config, drawn, groups)
                    shown |= record(board, step + 1, drawn, rollout, learnt, rollouts.seconds, questions)
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
