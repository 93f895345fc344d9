"""Weights files on the Hugging Face hub; needs the package ``huggingface_hub``."""

import importlib
import re
from pathlib import Path
from typing import Any

from stvit_video.common.errors import UsageError, first_line

SCHEME = "hf://"


def is_hub_address(name: str) -> bool:
    """Return whether a checkpoint is given as ``hf://OWNER/NAME`` or ``hf://OWNER/NAME/FILE``."""
    return name.startswith(SCHEME)


def check_exists(checkpoint: str) -> None:
    """Raise UsageError where a checkpoint is not a file, a folder or on the hub, before torch is imported."""
    if not is_hub_address(checkpoint) and not Path(checkpoint).exists():
        raise UsageError(f"Checkpoint {checkpoint} does not exist; give the folder of a run or a .safetensors file.")


def pull(address: str) -> Path:
    """Download the file of ``hf://OWNER/NAME[/FILE]``, by default model.safetensors, once; return its path.

    Raises UsageError where the package is missing or the file cannot be downloaded.
    """
    owner, _, rest = address.removeprefix(SCHEME).partition("/")
    name, _, file = rest.partition("/")
    repository = _check_repository(f"{owner}/{name}")
    hub = _import_hub()
    try:
        return Path(hub.hf_hub_download(repository, file or "model.safetensors"))
    except _errors(hub) as error:
        raise UsageError(f"Checkpoint {address} cannot be fetched ({first_line(error)}).") from error


def push(path: Path, repository: str) -> str:
    """Upload a file to the repository ``OWNER/NAME`` and return its address; a new repository is private.

    A ``.safetensors`` is named model.safetensors, the default of ``pull``. Raises UsageError as ``pull`` does.
    """
    _check_repository(repository)
    hub = _import_hub()
    name = "model.safetensors" if path.suffix == ".safetensors" else path.name
    try:
        hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_file(path_or_fileobj=str(path), path_in_repo=name, repo_id=repository)
    except _errors(hub) as error:
        raise UsageError(f"--push {repository} failed ({first_line(error)}); the file is kept at {path}.") from error
    return f"{SCHEME}{repository}" if name == "model.safetensors" else f"{SCHEME}{repository}/{name}"


def check_push(repository: str) -> None:
    """Raise UsageError where an upload to ``repository`` cannot work."""
    _check_repository(repository)
    _import_hub()


def _check_repository(name: str) -> str:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII):
        raise UsageError(
            f"Hub repository {name.rstrip('/')!r} is not of the form OWNER/NAME; a checkpoint there is "
            f"{SCHEME}OWNER/NAME[/FILE]."
        )
    return name


def _import_hub() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise UsageError(
            "The Hugging Face hub needs a package that is missing; pip install huggingface_hub."
        ) from error


def _errors(hub: Any) -> tuple[type[Exception], ...]:
    """Return the errors that the package raises for names, permissions and connections."""
    return (hub.errors.HfHubHTTPError, hub.errors.LocalEntryNotFoundError, hub.errors.HFValidationError, OSError)
