"""Checkpoints by name: a directory here, or a repository of the hub that `huggingface_hub` reaches."""

from __future__ import annotations

import json
from pathlib import Path

from rlvd_jax.errors import UserError

PATTERNS = ("*.json", "*.safetensors", "merges.txt", "*.jinja")


def local(name: str | Path) -> Path | None:
    """The directory that `name` means here; None if it can only be a hub name. UserError if it is neither."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") != 1:
        raise UserError(f"{name}: there is no such checkpoint directory, and it is not a hub name (owner/name)")
    return None


def resolve(name: str | Path) -> Path:
    """The directory of a checkpoint: a local one as it is, else a hub name, whose files are downloaded."""
    if path := local(name):
        return path
    import huggingface_hub

    path = config_directory(name)  # of the commit that the study was planned with
    if not _whole(path):
        _ask(
            name,
            lambda: huggingface_hub.snapshot_download(str(name), revision=path.name, allow_patterns=list(PATTERNS)),
        )
        if not any(path.glob("*.safetensors")):  # where the hub is out of reach, the client is content with less
            raise UserError(
                f"{name}: no safetensors file is here, and either the hub has none of it or it cannot be reached"
            )
    return path


def config_directory(name: str | Path) -> Path:
    """A directory with at least the checkpoint's config.json; of a hub name, called by the commit it is of.

    What was downloaded before is preferred, so that a study goes on with the weights that it began with.
    """
    if path := local(name):
        return path
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def config():
        try:
            return huggingface_hub.hf_hub_download(str(name), "config.json", local_files_only=True)
        except LocalEntryNotFoundError:
            return huggingface_hub.hf_hub_download(str(name), "config.json")

    return Path(_ask(name, config)).parent


def _whole(directory: Path) -> bool:
    """Whether the weights and a tokenizer are there."""
    index = directory / "model.safetensors.index.json"
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except FileNotFoundError:
        names = {"model.safetensors"}
    except (ValueError, KeyError, AttributeError):
        return True  # the loader says what is wrong with it
    tokenizer = any((directory / file).is_file() for file in ("tokenizer.json", "merges.txt"))
    return tokenizer and all((directory / file).is_file() for file in names)


def _ask(name, what):
    """Have `what` ask the hub; its errors as one sentence."""
    from huggingface_hub import errors

    try:
        return what()
    except errors.GatedRepoError:
        reason = "the hub asks to accept its terms there, and to set HF_TOKEN"
    except errors.RepositoryNotFoundError:
        reason = "the hub has no such model, or it is private and needs HF_TOKEN"
    except errors.LocalEntryNotFoundError:
        reason = "the hub cannot be reached and no earlier download is kept"
    except errors.EntryNotFoundError:
        reason = "what the hub has of that name has no config.json"
    except Exception as error:  # the client passes on what its HTTP library raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise UserError(f"{name}: no such directory here, and no checkpoint from the hub: {reason}")
