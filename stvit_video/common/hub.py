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
    hub, errors = prepare_hub(f"{owner}/{name}")
    try:
        return Path(hub.hf_hub_download(f"{owner}/{name}", file or "model.safetensors"))
    except errors as error:
        raise UsageError(f"Checkpoint {address} cannot be fetched ({first_line(error)}).") from error


def push(path: Path, repository: str) -> str:
    """Upload a file to the repository ``OWNER/NAME`` and return its address; a new repository is private.

    A ``.safetensors`` is named model.safetensors, the default of ``pull``. Raises UsageError as ``pull`` does.
    """
    hub, errors = prepare_hub(repository)
    name = "model.safetensors" if path.suffix == ".safetensors" else path.name
    try:
        hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_file(path_or_fileobj=str(path), path_in_repo=name, repo_id=repository)
    except errors as error:
        raise UsageError(f"--push {repository} failed ({first_line(error)}); the file is kept at {path}.") from error
    return f"{SCHEME}{repository}" if name == "model.safetensors" else f"{SCHEME}{repository}/{name}"


def prepare_hub(repository: str) -> tuple[Any, tuple[type[Exception], ...]]:
    """Return the package, and the errors that it raises for names, permissions and connections.

    Raises UsageError where it is missing, or ``repository`` is not of the form OWNER/NAME.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository, re.ASCII):
        raise UsageError(
            f"Hub repository {repository.rstrip('/')!r} is not of the form OWNER/NAME; a checkpoint there is "
            f"{SCHEME}OWNER/NAME[/FILE]."
        )
    try:
        hub: Any = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise UsageError(
            "The Hugging Face hub needs a package that is missing; pip install huggingface_hub."
        ) from error
    return hub, (hub.errors.HfHubHTTPError, hub.errors.LocalEntryNotFoundError, hub.errors.HFValidationError, OSError)
