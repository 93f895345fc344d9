"""What a command's arguments name: files, folders, patterns, cameras and streams."""

import glob
import os
from collections.abc import Sequence

from stvit_video.common.errors import UsageError
from stvit_video.data.decode.types import IMAGE_SUFFIXES, VIDEO_SUFFIXES, natural_order
from stvit_video.data.lists.annotations import MEDIA_SUFFIXES
from stvit_video.data.streams.live import is_live


def find_sources(names: Sequence[str], images: bool = False) -> tuple[list[str], str | None]:
    """Return the files that ``names`` stand for, without duplicates, or else the one camera, stream or pipe.

    A file is itself, whatever its ending. A folder stands for the videos in it and below, with ``images`` for the
    images too; a folder of images alone is one video, its frames. A pattern (``*``, ``?``, ``[...]``, ``**``) stands
    for what it matches. Any other name is returned as it is: reading it fails later, with an error of its own.
    Raises UsageError for a folder or pattern without files, and for a stream beside other names.
    """
    live = [name for name in names if is_live(name)]
    if live:
        if len(names) > 1:
            raise UsageError(f"{live[0]} is a camera or stream, which does not end; give it alone.")
        return [], live[0]
    found: list[str] = []
    for name in names:
        if os.path.isdir(name):
            inside = _in_folder(name, images)
            if not inside:
                suffixes = ", ".join(MEDIA_SUFFIXES if images else VIDEO_SUFFIXES)
                raise UsageError(f"Folder {name} holds no videos; give one with files ending in {suffixes}.")
            found += inside
        elif not os.path.lexists(name) and glob.has_magic(name):
            found += _matching(name, images)
        else:
            found.append(name)
    return list(dict.fromkeys(found)), None


def _in_folder(folder: str, images: bool) -> list[str]:
    suffixes = MEDIA_SUFFIXES if images else VIDEO_SUFFIXES
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            os.path.join(parent, name) for name in files if name.lower().endswith(suffixes) and not name.startswith(".")
        ]
    if found:
        return sorted(found, key=natural_order)
    if not images and any(name.lower().endswith(IMAGE_SUFFIXES) for name in os.listdir(folder)):
        return [folder]  # a video that was cut into its frames
    return []


def _matching(pattern: str, images: bool) -> list[str]:
    found: list[str] = []
    for name in sorted(glob.glob(pattern, recursive=True), key=natural_order):
        found += _in_folder(name, images) if os.path.isdir(name) else [name]
    if not found:
        raise UsageError(f"Nothing matches {pattern}; give a pattern that does, or a file or folder.")
    return found
