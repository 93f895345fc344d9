"""Weights files on the Hugging Face hub; needs the package ``huggingface_hub``."""

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stvit_video.common.errors import UsageError, first_line
from stvit_video.common.files import nearest_path

SCHEME = "hf://"  # a checkpoint there is hf://OWNER/NAME or hf://OWNER/NAME/FILE
DEFAULT = "model.safetensors"


def check_exists(checkpoint: str) -> None:
    """Raise UsageError where a checkpoint is not a file, a folder or on the hub, before torch is imported."""
    if not checkpoint.startswith(SCHEME) and not Path(checkpoint).exists():
        remedy = f"give the folder of a run or a .safetensors file.{nearest_path(checkpoint)}"
        raise UsageError(f"Checkpoint {checkpoint} does not exist; {remedy}")


def pull(checkpoint: str) -> Path:
    """Return the path of a checkpoint; of the hub, a file, by default model.safetensors, is downloaded once.

    Raises UsageError where the package is missing or the file cannot be downloaded.
    """
    if not checkpoint.startswith(SCHEME):
        return Path(checkpoint)
    owner, name, file = (*checkpoint.removeprefix(SCHEME).split("/", 2), "", "")[:3]
    with open_hub(f"{owner}/{name}", f"Checkpoint {checkpoint} cannot be fetched") as hub:
        return Path(hub.hf_hub_download(f"{owner}/{name}", file or DEFAULT))


def push(path: Path, repository: str) -> str:
    """Upload a file to the repository ``OWNER/NAME`` and return its address; a new repository is private.

    A ``.safetensors`` is named model.safetensors, the default of ``pull``. Raises UsageError as ``pull`` does.
    """
    name = DEFAULT if path.suffix == ".safetensors" else path.name
    with open_hub(repository, f"--push {repository} failed; the file is kept at {path}") as hub:
        hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_file(path_or_fileobj=str(path), path_in_repo=name, repo_id=repository)
    return f"{SCHEME}{repository}" if name == DEFAULT else f"{SCHEME}{repository}/{name}"


@contextmanager
def open_hub(repository: str, failure: str = "") -> Iterator[Any]:
    """Provide the package; its errors become UsageErrors that begin with ``failure``.

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
        raise UsageError("The Hugging Face hub needs a package; pip install huggingface_hub.") from error
    errors = hub.errors  # of names, permissions and connections
    try:
        yield hub
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError, OSError) as error:
        raise UsageError(f"{failure} ({first_line(error)}).") from error
