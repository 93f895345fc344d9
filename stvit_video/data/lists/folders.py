"""Class folders: CLASS/FILE."""

import os
from collections.abc import Sequence
from pathlib import Path

from torchvision.datasets.folder import make_dataset

from stvit_video.common.errors import UsageError
from stvit_video.data.decode.types import MEDIA_SUFFIXES
from stvit_video.data.lists.annotations import Video, label_of


def class_folders(path: str | Path) -> list[str]:
    """Return the sorted names of the class folders in ``path``, without hidden ones; UsageError where there is none."""
    path = Path(path)
    names = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UsageError(f"Folder {path} has no class folders; put files at {path}/CLASS/FILE, one folder a class.")
    return names


def read_folder(path: str | Path, classes: Sequence[str] | None = None) -> list[Video]:
    """Read class folders of images and videos, their sub-folders included, sorted by path.

    A label is the folder's place in ``classes``, or else among the folders' sorted names; a class may have no files
    and no folder. Hidden and other files are skipped. Raises UsageError where a folder is not in ``classes``, or where
    there are no class folders or no images and videos at all.
    """
    path, folders = Path(path), class_folders(path)
    names = folders if classes is None else classes
    of_none = f"is of none of the {len(names)} classes ({names[0]} to {names[-1]}); rename it or correct DATA.CLASSES."
    labels = {name: label_of(name, names, f"Folder {path / name} {of_none}") for name in folders}

    def is_shown(name: str) -> bool:
        return f"{os.sep}." not in name.removeprefix(str(path)) and is_media(name)

    found = make_dataset(str(path), labels, is_valid_file=is_shown, allow_empty=True)
    if not found:
        raise UsageError(
            f"Folder {path}: none of its {len(folders)} class folders holds an image or a video; give files ending in "
            f"{', '.join(MEDIA_SUFFIXES)}."
        )
    return [Video(name, label) for name, label in found]


def read_file(path: str | Path, classes: Sequence[str]) -> list[Video]:
    """Return one image or video as a list, labelled by the folder it lies in; UsageError where that is no class."""
    folder = Path(path).absolute().parent.name
    refusal = (
        f"{path} is one file without a label: its folder {folder!r} is none of the {len(classes)} class names; put it "
        f"into the folder of its class, or give a text file with the line `path label`."
    )
    return [Video(str(path), label_of(folder, classes, refusal))]


def is_media(name: str | Path) -> bool:
    """Return whether a file is an image or a video by its ending."""
    return str(name).lower().endswith(MEDIA_SUFFIXES)
