"""Prompts: the paper's three templates (appendix A.10.1), the tokens that end a response, and draw keys."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from rlvd_jax.errors import UserError, nearest

TEMPLATES = {
    "r1": (
        "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. "
        "The Assistant first thinks about the reasoning process in the mind and then provides the User with the answer."
        " The reasoning process is enclosed within <think> </think> and the answer is enclosed within "
        "<answer> </answer> tags. User: {question} Assistant: <think>"
    ),
    "qwen-math": (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    ),
    "question": "{question}",
}

END_TOKENS = ("<|endoftext|>", "<|im_end|>")
"""Texts of tokens that end a response wherever the tokenizer knows them."""


def render(template: str, question: str) -> str:
    """The prompt of a question: a name in `TEMPLATES`, or any text of your own with `{question}` in it.

    Only `{question}` is replaced; other braces, in the template or in the question, are plain text. Raises UserError
    for an unknown name.
    """
    text = TEMPLATES.get(template, template)
    if "{question}" not in text:
        raise UserError(
            f"'{template}' is neither a template nor a text with {{question}}{nearest(template, TEMPLATES)}"
        )
    return text.replace("{question}", question)


def tokenize(tokenizer, template: str, problems: Sequence, longest: int) -> list[tuple[int, ...]]:
    """Token ids of each problem's prompt.

    Special tokens written in the template are parsed as such, and none is added: a prompt has a beginning-of-text
    token only if the template spells it. Raises UserError for a prompt of more than `longest` tokens, or of none.
    """
    texts = [render(template, problem.problem) for problem in problems]
    if not texts:
        return []
    prompts = [tuple(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    for problem, ids in zip(problems, prompts, strict=True):
        if len(ids) > longest:
            raise UserError(
                f"the prompt of problem '{problem.id}' has {len(ids)} tokens and at most {longest} fit in the model's "
                "context: leave the problem out, or allow shorter responses where they take up the room"
            )
        if not ids:
            raise UserError(f"the prompt of problem '{problem.id}' has no tokens: the tokenizer knows none of its text")
    return prompts


def stop_token_ids(tokenizer, directory: str | Path, template: str) -> tuple[int, ...]:
    """Ids of every token that ends a response of the model in `directory`, ascending.

    The files disagree in real checkpoints (Qwen2.5's base models end with `<|endoftext|>`, its chat template with
    `<|im_end|>`), so it is the union of `eos_token_id` in config.json and generation_config.json, the tokenizer's own
    end token, `END_TOKENS`, and, where the template asks for `<answer> </answer>` (r1), `</answer>`. Texts that the
    tokenizer does not hold as one token are left out: Qwen2.5 spells `</answer>` with several, so there an r1 response
    ends as any other. A later turn that a model goes on to write is part of its response, as in the paper.

    Raises UserError if there is none, or a file is not JSON.
    """
    ids = set()
    for name in ("config.json", "generation_config.json"):
        path = Path(directory) / name
        try:
            given = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: cannot be read as a JSON object: {error}") from None
        ids.update(given if isinstance(given, list) else [given])
    ids.add(tokenizer.eos_token_id)
    texts = END_TOKENS + (("</answer>",) if "</answer>" in render(template, "") else ())
    vocabulary = tokenizer.get_vocab()
    ids.update(vocabulary.get(text) for text in texts)
    ids.discard(None)
    if not ids:
        raise UserError(f"{directory}: neither the configuration nor the tokenizer names a token that ends a response")
    return tuple(sorted(ids))


def question_key(problem_id: str) -> int:
    """The key of a question's random draws: an unsigned 32-bit integer, a function of its id alone."""
    return int.from_bytes(hashlib.sha256(problem_id.encode()).digest()[:4], "little")
