"""Checkpoints by name: a directory here, or a repository of the hub that `huggingface_hub` reaches."""

from __future__ import annotations

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


def _ask(name, what):
    """Ask the hub, first what was downloaded before, then over the network."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        try:
            return what(True)
        except LocalEntryNotFoundError:
            return what(False)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name}: no such directory here, and the hub gave no checkpoint of that name ({reason})"
        ) from None


def resolve(name: str | Path) -> Path:
    """The directory of a checkpoint: a local one as it is, else a hub name, whose files are downloaded."""
    if path := local(name):
        return path
    import huggingface_hub

    revision = config_directory(name).name  # the files that the study was planned with
    return Path(
        _ask(
            name,
            lambda offline: huggingface_hub.snapshot_download(
                str(name), revision=revision, allow_patterns=list(PATTERNS), local_files_only=False
            ),
        )
    )


def config_directory(name: str | Path) -> Path:
    """A directory with at least the checkpoint's config.json; of a hub name, called by the commit it is of."""
    if path := local(name):
        return path
    import huggingface_hub

    return Path(
        _ask(
            name,
            lambda offline: huggingface_hub.hf_hub_download(str(name), "config.json", local_files_only=offline),
        )
    ).parent
