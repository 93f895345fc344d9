"""Class folders, CLASS/FILE, and what counts as a video in a folder."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stvit_video.common.errors import UsageError, nearest
from stvit_video.data.decode.pictures import is_picture, match_frames
from stvit_video.data.decode.types import MEDIA_SUFFIXES, VIDEO_SUFFIXES
from stvit_video.data.lists.annotations import Video
from stvit_video.data.lists.class_names import ClassNames

ENOUGH = 64  # entries of a folder, all of them pictures, that show it to hold frames: it is not read further
# Folders that systems and archives add, and folders of pictures that are no frames.
FOREIGN_FOLDERS = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
FRAMES_FOLDER = re.compile(r"(.*[_-])?(rgb|images?|imgs?|frames?|jpe?gs?|colou?r)([_-].*)?", re.IGNORECASE)
FLOW_FOLDER = re.compile(r"(.*[_-])?(flow|depth|masks?)([_-].*)?|optical_?flow|tvl1|flow[xyuv]|[xyuv]", re.IGNORECASE)
PREVIEW_FOLDER = re.compile(r"thumb(nail)?s?|previews?|covers?|posters?|screenshots?", re.IGNORECASE)
# Files that are certainly no video, whose content is not looked at: there may be one beside each video.
NO_MEDIA = (
    ".txt", ".csv", ".tsv", ".json", ".jsonl", ".md", ".xml", ".yaml", ".yml", ".html", ".srt", ".vtt", ".nfo", ".ini",
    ".log", ".db", ".pkl", ".npy", ".npz", ".pt", ".pth", ".h5", ".hdf5", ".mat", ".wav", ".mp3", ".m4a", ".aac",
    ".flac", ".zip", ".tar", ".gz", ".xz", ".7z", ".rar", ".part", ".tmp", ".crdownload", ".ytdl", ".md5", ".py",
    ".sh", ".bin", ".info", ".description",
)  # fmt: skip
# The first bytes of videos: offset, what stands there.
SIGNATURES = (
    (8, b"AVI "), (4, b"ftyp"), (4, b"moov"), (4, b"mdat"), (0, b"\x1aE\xdf\xa3"), (0, b"FLV\x01"), (0, b"GIF8"),
    (0, b"\0\0\x01\xba"), (0, b"\0\0\x01\xb3"), (0, b"0&\xb2u\x8ef\xcf\x11"), (28, b"\x80theora"), (0, b".RMF"),
    (0, b"YUV4MPEG2"),
)  # fmt: skip
STILL_BRANDS = (b"heic", b"heix", b"mif1", b"msf1", b"avif", b"M4A ", b"M4B ")  # of "ftyp": images and sound


@dataclass
class Found:
    """What lies in a folder and below, as paths in the order of their folders and then of their names."""

    videos: list[str] = field(default_factory=list)  # files, and folders of frames
    pictures: list[str] = field(default_factory=list)  # that are not frames of a video
    passed_over: list[str] = field(default_factory=list)
    frame_folders: int = 0  # how many of the videos are folders of frames


def is_media(name: str | Path) -> bool:
    """Return whether a file is an image or a video by its ending."""
    return str(name).lower().endswith(MEDIA_SUFFIXES)


def is_path(name: str) -> bool:
    """Return whether a list calls a video by its path, with a folder or an ending, and not by an id."""
    return "/" in name or "\\" in name or is_media(name)


def is_video(path: str) -> bool:
    """Return whether a file is a video, by its ending or, where that is not known, by its first bytes."""
    name = os.path.basename(path)
    if name.lower().endswith(VIDEO_SUFFIXES):
        return True
    if name.lower().endswith(NO_MEDIA) or is_media(name) or not os.path.isfile(path):  # a pipe may have no writer
        return False
    try:
        with open(path, "rb") as file:
            start = file.read(400)
    except OSError:
        return False
    is_stream = len(start) > 376 and start[0] == start[188] == start[376] == 0x47  # MPEG transport stream
    is_known = any(start[offset:].startswith(text) for offset, text in SIGNATURES)
    return is_stream or (is_known and not (start[4:8] == b"ftyp" and start[8:12] in STILL_BRANDS))


def find_media(root: str, *, frames: int = 1, pattern: str = "", base: str = "") -> Found:
    """Return the videos and pictures in the folder ``root`` and below.

    Where a clip has several ``frames``, a folder below root that holds two pictures or more is a video, as a path that
    ends in ``pattern`` where there is one. With one frame every picture is a picture, but for those of a pattern.
    Passed over are hidden files, files of other kinds, previews of videos, optical flow, and links back into ``base``,
    the whole set (root where it is not given), so that no file is found twice. Hidden folders are skipped.
    """
    found = Found()
    frame_folders: list[str] = []
    entered: set[str] = set()  # folders, those behind links by their real paths
    # A folder, the stems of the videos beside it, and whether it lies in the folder of a video.
    waiting: list[tuple[str, set[str], bool]] = [(root, set(), False)]
    while waiting:
        folder, beside, within = waiting.pop()
        try:
            videos, pictures, rest, folders = list_folder(folder, quick=frames > 1 and not pattern and folder != root)
        except OSError:  # it may not be read
            found.passed_over.append(folder + os.sep)
            continue
        within = within or bool(videos and folder != root)
        stems = {os.path.splitext(name)[0] for name in videos} if pictures or folders else set()
        # Videos' frames or previews lie beside them: the videos are taken.
        shown = {name: os.path.splitext(name)[0] for name in pictures}
        is_spare = within or (bool(beside) and beside.issuperset(shown.values()))
        spare = {name for name, stem in shown.items() if is_spare or stem in stems}
        kept = [name for name in pictures if name not in spare]
        matching = match_frames(kept, pattern) if pattern else kept if frames > 1 else []
        if len(matching) > 1 and folder != root:
            frame_folders.append(os.path.join(folder, pattern) if pattern else folder)
            spare |= set(kept) - set(matching)
            kept = []
        elif frames > 1 and folder != root:  # a lone picture
            spare, kept = set(pictures), []
        found.videos += [os.path.join(folder, name) for name in sorted(videos)]
        found.pictures += [os.path.join(folder, name) for name in sorted(kept)]
        found.passed_over += [os.path.join(folder, name) for name in sorted((*rest, *spare))]
        parallel = all(FRAMES_FOLDER.fullmatch(name) or FLOW_FOLDER.fullmatch(name) for name in folders)
        for name, is_link in folders.items():
            path = os.path.join(folder, name)
            is_flow = parallel and FLOW_FOLDER.fullmatch(name) and "rgb" not in name.lower()
            is_flow = is_flow and len(folders) + len(name) > 2  # a lone folder "x" is a video of that name
            is_preview = (stems or beside) and PREVIEW_FOLDER.fullmatch(name)
            is_unused = bool(name in FOREIGN_FOLDERS or name in stems or is_flow or is_preview)
            real = os.path.realpath(path) if is_link else path
            is_unused = is_unused or (is_link and (real in entered or _leads_back(path, base or root)))
            entered.add(real)
            if is_unused:
                found.passed_over.append(path + os.sep)
            else:
                waiting.append((path, stems, within))
    found.videos += frame_folders
    found.frame_folders = len(frame_folders)
    for paths in (found.videos, found.pictures, found.passed_over):
        paths.sort(key=os.path.split)
    return found


def list_folder(folder: str, quick: bool) -> tuple[list[str], list[str], list[str], dict[str, bool]]:
    """Return the names of a folder's videos, pictures and other files, and of its folders, which may be links.

    Where it is read ``quick``, it is not read further once it is certain to hold frames alone.
    """
    videos: list[str] = []
    pictures: list[str] = []
    others: list[str] = []
    folders: dict[str, bool] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if entry.is_dir():
                if name[0] != ".":
                    folders[name] = entry.is_symlink()
            elif name[0] == ".":
                others.append(name)
            elif name.lower().endswith(VIDEO_SUFFIXES):
                videos.append(name)
            elif is_picture(name):
                pictures.append(name)
            elif is_video(entry.path):
                videos.append(name)
            else:
                others.append(name)
            if quick and len(pictures) >= ENOUGH and not (videos or folders):
                break
    return videos, pictures, others, folders


def _leads_back(link: str, root: str) -> bool:
    """Return whether a link goes to a folder above ``root``, or to one in it whose files are found there anyway."""
    real, root = os.path.realpath(link), os.path.realpath(root)
    if os.path.commonpath([real, root]) == real:
        return True
    way = os.path.relpath(real, root).split(os.sep)
    return way[0] != os.pardir and not any(name[0] == "." for name in way)


def class_folders(path: str | Path) -> list[str]:
    """Return the sorted names of the class folders in ``path``, numbers by their value; UsageError without any.

    Hidden folders, FOREIGN_FOLDERS and links back are none.
    """
    path = Path(path)
    with os.scandir(path) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and _is_class(entry, str(path)))
    if not names:
        raise UsageError(f"Folder {path} has no class folders; put files at {path}/CLASS/FILE, one folder a class.")
    return sorted(names, key=int) if are_numbers(names) else names


def _is_class(entry: os.DirEntry[str], root: str) -> bool:
    if entry.name[0] == "." or entry.name in FOREIGN_FOLDERS:
        return False
    return not (entry.is_symlink() and _leads_back(entry.path, root))


def are_numbers(names: Iterable[str]) -> bool:
    """Return whether all names of classes are whole numbers."""
    return all(name.isascii() and name.isdecimal() for name in names)


def read_folder(
    path: str | Path, classes: ClassNames | None = None, *, frames: int = 1, pattern: str = ""
) -> tuple[list[Video], list[str]]:
    """Read class folders of images and videos, their sub-folders included, sorted by path; see ``find_media``.

    A label is the folder's place in ``classes``, or else among ``class_folders``; a class may have no files and no
    folder. Pictures that are not frames are samples where they are not beside videos. The second value are sentences
    that say what was taken for what. Raises UsageError where a folder is not in ``classes``, or where there are no
    class folders or no images and videos at all.
    """
    path, folders = Path(path), class_folders(path)
    names = classes or ClassNames(folders)
    labels = {name: names.label_of(name, f"Folder {path / name}") for name in folders}
    found = {
        name: find_media(str(path / name), frames=frames, pattern=pattern, base=str(path)) for name in sorted(folders)
    }
    with os.scandir(path) as entries:
        passed_over = [
            entry.path + os.sep * entry.is_dir()
            for entry in entries
            if (entry.name[0] != "." and entry.name not in labels if entry.is_dir() else is_media(entry.name))
        ]
    passed_over += [file for part in found.values() for file in part.passed_over]
    frame_folders = sum(part.frame_folders for part in found.values())
    has_videos = any(part.videos for part in found.values())
    videos = []
    pictures = []
    for name, part in found.items():
        # Cover art and the like: pictures beside videos of several frames, or beside as many videos of their class.
        is_beside = has_videos if frames > 1 else len(part.videos) >= len(part.pictures)
        pictures += [] if is_beside else part.pictures
        passed_over += part.pictures if is_beside else []
        files = part.videos if is_beside else sorted([*part.videos, *part.pictures], key=os.path.split)
        videos += [Video(file, labels[name]) for file in files]
    unused = [f"{path}: {describe_passed_over(passed_over, str(path))}"] if passed_over else []
    if not videos:
        raise UsageError(
            f"Folder {path}: none of its {len(folders)} class folders holds an image or a video; give files ending in "
            f"{', '.join(MEDIA_SUFFIXES)}.{''.join(f' {line}' for line in unused)}"
        )
    notes = [f"{path}: folders of pictures, each the frames of a video: {frame_folders:,}"] if frame_folders else []
    if pictures:
        shown = f"shown in all {frames} frames of a clip" if frames > 1 else "a sample"
        notes.append(f"{path}: pictures, each {shown}: {len(pictures):,}")
    return videos, notes + unused


def describe_passed_over(paths: Sequence[str], root: str) -> str:
    """Return a line with the number of files and folders that are not used, by ending, and the first of them."""
    endings = Counter(
        "folders" if path.endswith(os.sep) else os.path.splitext(path)[1].lower() or "without ending" for path in paths
    )
    kinds = ", ".join(f"{count:,} {ending}" for ending, count in endings.most_common(5))
    first = ", ".join(os.path.relpath(path, root) for path in paths[:3])
    return (
        f"passed over: {len(paths):,} file{'s'[: len(paths) > 1]} ({kinds}): {first}{', ...' if len(paths) > 3 else ''}"
    )


def read_file(path: str | Path, classes: ClassNames) -> list[Video]:
    """Return one image or video as a list, labelled by the folder it lies in; UsageError where that is no class."""
    folder = Path(path).absolute().parent.name
    label = classes.find(folder)
    if label is None:
        raise UsageError(
            f"{path} is one file without a label: its folder {folder!r} is none of the {len(classes.names)} class "
            f"names; put it into the folder of its class, or give a text file with the line `path label`."
            f"{nearest(folder, classes.names)}"
        )
    return [Video(str(path), label)]
