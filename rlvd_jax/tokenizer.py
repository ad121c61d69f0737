"""Tokenizers of Hugging Face directories: loaded, checked against the model, and decoding many responses at once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from rlvd_jax.errors import UserError


def load(directory: str | Path):
    """The tokenizer of a model directory, a `transformers` fast tokenizer.

    Raises UserError if its files are missing or malformed, or if it has ids that the model (`vocab_size` in
    config.json) has no embedding for.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is missing: it isn't needed here
    import transformers

    directory = Path(directory)
    if not (directory / "tokenizer.json").is_file() and not (
        (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file()
    ):
        raise UserError(f"{directory}: no tokenizer: neither tokenizer.json nor vocab.json with merges.txt is there")
    try:
        # Some versions of transformers take any large tokenizer for a Mistral one whose pattern is wrong, and warn.
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            directory, local_files_only=True, fix_mistral_regex=False
        )
        backend = tokenizer.backend_tokenizer
    except Exception as error:  # The Rust library raises Exception itself.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{directory}: its tokenizer cannot be loaded: {reason}") from error
    try:
        rows = json.loads((directory / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    except FileNotFoundError:
        return tokenizer
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory}/config.json: no vocab_size can be read from it ({error!r})") from None
    token, largest = max(backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    if largest >= rows:
        raise UserError(
            f"{directory}: the tokenizer does not match the model: '{token}' has id {largest}, and the model has "
            f"embeddings for {rows} ids"
        )
    return tokenizer


def decode(tokenizer, responses: Iterable[Sequence[int]]) -> list[str]:
    """The text of each sequence of token ids, special tokens left out; ids past the vocabulary stand for nothing."""
    ids = [r.tolist() if hasattr(r, "tolist") else list(r) for r in responses]
    return tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=True)
