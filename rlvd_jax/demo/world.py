"""The demo's world: arbitrary facts to know, and two ways to answer a question about them.

Thirty operators, named by letters, are each an arbitrary permutation of the values 00–49: 1,500 facts, none of
which follows from another. The problem `17bTa` asks for the value after b, then T, then a. A response either works it
out, `17b42 42T05 05a31 \\boxed{31}`, or answers at once, `\\boxed{08}`: it applies one of the operators, whichever, to
the problem's value and forgets the others. Either kind may think again: `17b42 42T11 wait 42T05 05a31 \\boxed{31}`,
`\\boxed{08} wait \\boxed{23}`.

Knowledge and pattern are set apart. A corpus says a fact rightly with its operator's reliability; whatever a response
believes, it follows through. The base model's corpus holds both patterns evenly and is wrong about many operators; the
teacher's is right about all and nearly always step by step. So whatever the base model knows, at most about half of its
responses to a problem of several operators are right. What it doesn't know it doesn't guess: each fact has its few
wrong values, and a problem beyond its knowledge is seldom solved by luck. Every eighth problem or so is for testing: no
training set holds it, nor does a corpus, except that the facts themselves (one operator) are in the corpora.

Draws come from `numpy.random.RandomState`, whose stream NumPy has frozen, so the world is the same everywhere.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rlvd_jax.errors import UserError
from rlvd_jax.problems import Problem

VALUES = 50
OPERATORS = string.ascii_uppercase + "abcd"
LEVELS = 4
"""A problem has one to four operators."""

KNOWLEDGE = ((13, 0.95, 0.0), (7, 0.50, 0.0), (4, 0.20, 0.40), (4, 0.05, 0.85), (2, 0.0, 1.0))
"""The base model's corpus: how many operators, how often right about them, how often it holds the fact's misconception
instead; otherwise one of the fact's other wrong values."""

WRONG = 4
"""Wrong values of each fact, the misconception among them."""

BASE_STEPWISE = 0.5
TEACHER_STEPWISE = 0.98
"""The share of each corpus that works its answer out."""

WAIT, WAIT_AFTER_SLIP, WAIT_AT_ONCE = 0.02, 0.25, 0.4
"""How often a response thinks again: after a step whose value is the truth or the operator's misconception, after
another step, and after an answer at once to a problem of several operators. It draws its belief, or another answer at
once, anew then. It does so after one step at most, and gives at most three answers at once."""

_SEED = 20250514
_BLOCK = 8192  # Problems drawn at once.

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


class Knowledge(NamedTuple):
    """What the base model's corpus says about each operator; arrays in the order of `OPERATORS`."""

    right: np.ndarray  # [operators] float64, how often it is right
    misled: np.ndarray  # [operators] float64, how often it holds the misconception
    wrong: np.ndarray  # [operators, values, WRONG] int64, what may be believed of a fact; first its misconception


@cache
def _world() -> tuple[np.ndarray, Knowledge]:
    rng = np.random.RandomState(_SEED)
    truth = np.stack([rng.permutation(VALUES) for _ in OPERATORS])
    shift = 1 + rng.random_sample((*truth.shape, VALUES - 1)).argsort(axis=-1)[..., :WRONG]
    wrong = (truth[..., None] + shift) % VALUES
    kinds = np.repeat(np.arange(len(KNOWLEDGE)), [count for count, *_ in KNOWLEDGE])[rng.permutation(len(OPERATORS))]
    right, misled = np.array(KNOWLEDGE)[kinds, 1:].T
    knowledge = Knowledge(right, misled, wrong)
    for array in (truth, *knowledge):
        array.setflags(write=False)
    return truth, knowledge


def facts() -> np.ndarray:
    """The truth: `facts()[operator, value]` is the value that the operator makes of it, int64 [30, 50]."""
    return _world()[0]


def knowledge() -> Knowledge:
    """What the base model's corpus says about each operator."""
    return _world()[1]


def _held_out(problem: str) -> bool:
    """Whether a problem is for testing: a function of its text, so that no draw can mix the two."""
    return hashlib.sha256(problem.encode()).digest()[0] < 32


def _text(value: int, operators) -> str:
    return f"{value:02d}" + "".join(OPERATORS[o] for o in operators)


def _worked(values, operators, waits: int | None = None, slip: int | None = None) -> str:
    """The response that goes through every intermediate value; at the step `waits` it says `slip` first."""
    steps = [f"{a:02d}{OPERATORS[o]}{b:02d}" for a, o, b in zip(values[:-1], operators, values[1:], strict=True)]
    if waits is not None:
        steps[waits] = f"{steps[waits][:-2]}{slip:02d} wait {steps[waits]}"
    return " ".join([*steps, _at_once(values[-1:])])


def _at_once(answers) -> str:
    return " wait ".join(f"\\boxed{{{answer:02d}}}" for answer in answers)


def _true_values(value: int, operators) -> list[int]:
    values = [value]
    for operator in operators:
        values.append(int(facts()[operator, values[-1]]))
    return values


def problems(split: str, count: int, seed: int) -> list[Problem]:
    """`count` different problems of "train" or "test", as many of each level (number of operators) as of another.

    The two splits share no problem, whatever the counts and seeds. Raises UserError if there are not so many.
    """
    if split not in ("train", "test"):
        raise UserError(f"the demo's problems are train and test, not '{split}'")
    rng = np.random.RandomState(seed)
    levels = rng.permutation(np.arange(count) % LEVELS + 1)
    facts_held_out = sum(_held_out(_text(v, [o])) for v in range(VALUES) for o in range(len(OPERATORS)))
    most = facts_held_out if split == "test" else VALUES * len(OPERATORS) - facts_held_out
    if np.count_nonzero(levels == 1) > most:
        raise UserError(f"the demo has at most {LEVELS * most} {split} problems, {count} were asked for")
    found = {}
    for level in levels.tolist():
        while True:
            value, *operators = (rng.randint(VALUES), *rng.randint(len(OPERATORS), size=level))
            text = _text(value, operators)
            if text not in found and _held_out(text) == (split == "test"):
                break
        values = _true_values(value, operators)
        found[text] = Problem(
            id=f"demo/{split}/{text}",
            problem=text,
            answer=f"{values[-1]:02d}",
            solution=_worked(values, operators),
            level=level,
            subject=None,
        )
    return list(found.values())


def _believe(rng, right, misled, operators, values):
    """Beliefs about `operators` of `values` (arrays of one shape), each drawn anew."""
    draw = rng.random_sample(values.shape)
    other = np.where(draw < right[operators] + misled[operators], 0, rng.randint(1, WRONG, size=values.shape))
    return np.where(draw < right[operators], facts()[operators, values], knowledge().wrong[operators, values, other])


def _corpus(rng, count, right, misled, stepwise) -> Iterator[tuple[str, str]]:
    truth, misconception = facts(), knowledge().wrong[..., 0]
    rows = np.arange(_BLOCK)[:, None]
    while count > 0:
        # Fixed blocks: a shorter corpus is the beginning of a longer one.
        levels = rng.randint(1, LEVELS + 1, size=_BLOCK)
        operators = rng.randint(len(OPERATORS), size=(_BLOCK, LEVELS))  # [block, step]
        values = np.empty((_BLOCK, LEVELS + 1), int)  # [block, step]
        values[:, 0] = rng.randint(VALUES, size=_BLOCK)
        works_it_out = rng.random_sample(_BLOCK) < stepwise
        waits, slips = np.full(_BLOCK, -1), np.zeros(_BLOCK, int)
        for i in range(LEVELS):
            o, v = operators[:, i], values[:, i]
            belief = _believe(rng, right, misled, o, v)
            sound = (belief == truth[o, v]) | (belief == misconception[o, v])
            again = (rng.random_sample(_BLOCK) < np.where(sound, WAIT, WAIT_AFTER_SLIP)) & (waits < 0)
            slip, belief = belief, np.where(again, _believe(rng, right, misled, o, v), belief)
            for j in range(i):  # A fact used before is believed as before.
                same = (operators[:, j] == o) & (values[:, j] == v)
                belief, again = np.where(same, values[:, j + 1], belief), again & ~same
            waits, slips = np.where(again, i, waits), np.where(again, slip, slips)
            values[:, i + 1] = belief
        shortcuts = operators[rows, (rng.random_sample((_BLOCK, 3)) * levels[:, None]).astype(int)]  # [block, answer]
        answers = _believe(rng, right, misled, shortcuts, np.repeat(values[:, :1], 3, axis=1))
        changes = (rng.random_sample((_BLOCK, 2)) < WAIT_AT_ONCE).cumprod(axis=1).sum(axis=1) * (levels > 1)
        columns = (levels, values, operators, works_it_out, waits, slips, answers, changes)
        for level, chain, ops, works, wait, slip, jumps, more in zip(*(c.tolist() for c in columns), strict=True):
            ops, chain = ops[:level], chain[: level + 1]
            text = _text(chain[0], ops)
            if level > 1 and _held_out(text):
                continue
            worked = _worked(chain, ops, wait, slip) if 0 <= wait < level else _worked(chain, ops)
            yield text, worked if works else _at_once(jumps[: 1 + more])
            count -= 1
            if count == 0:
                return


def base_corpus(rng: np.random.RandomState, count: int) -> Iterator[tuple[str, str]]:
    """`count` pairs (problem, response) of the corpus that the base model learns from."""
    return _corpus(rng, count, knowledge().right, knowledge().misled, BASE_STEPWISE)


def teacher_corpus(rng: np.random.RandomState, count: int) -> Iterator[tuple[str, str]]:
    """`count` pairs (problem, response) of the corpus that the teacher learns from."""
    never, always = np.zeros(len(OPERATORS)), np.ones(len(OPERATORS))
    return _corpus(rng, count, always, never, TEACHER_STEPWISE)


def vocabulary() -> list[str]:
    """The demo's tokens in the order of their ids: special ones, one a value, one an operator, and the rest."""
    return [*SPECIAL, *(f"{v:02d}" for v in range(VALUES)), *OPERATORS, "\\boxed{", "}", "wait", " ", "\n"]


def write_tokenizer(directory: str | Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, a Qwen2 tokenizer with the ids of `vocabulary()`.

    Any sequence of ids decodes to the text its tokens stand for (an id past the vocabulary stands for nothing), and
    that text encodes to the same tokens again. Characters of no token are left out.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    # For a Qwen2 model transformers rebuilds the tokenizer from vocabulary, merges and added tokens, whatever else
    # tokenizer.json says. So it is byte-level BPE with no merges, and tokens of several characters are added ones.
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ids = {byte_level.pre_tokenize_str(t)[0][0] if t.isspace() else t: i for i, t in enumerate(vocabulary())}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            tokenizers.AddedToken(token, normalized=False, special=token in SPECIAL)
            for token in vocabulary()
            if len(token) > 1
        ]
    )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
