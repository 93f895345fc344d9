"""Class folders, right and wrong, and what counts as a video in a folder."""

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from stvit_video.common.errors import UsageError
from stvit_video.data.decode.frames import open_video
from stvit_video.data.lists.annotations import Video
from stvit_video.data.lists.class_names import ClassNames
from stvit_video.data.lists.folders import class_folders, find_media, read_file, read_folder
from stvit_video.data.streams import find_sources
from tests.conftest import write_empty


@pytest.mark.parametrize("name", ["yoga/a b.MP4", "yoga/a.JPG"])
def test_one_file_is_labelled_by_its_folder(tmp_path: Path, name: str) -> None:
    assert read_file(tmp_path / name, ClassNames(["ski", "yoga"])) == [Video(str(tmp_path / name), 1)]
    with pytest.raises(UsageError, match=r"'yoga' is none of the 1 class names; .* `path label`.* Did you mean yogi\?"):
        read_file(tmp_path / name, ClassNames(["yogi"]))
    with pytest.raises(UsageError, match=r"'yoga' is none of the 0 class names; .* `path label`"):
        read_file(tmp_path / name, ClassNames([]))


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Class folders with sub-folders, hidden files, other files, an empty class and endings in capitals."""
    root = tmp_path / "set"
    names = "dog/b.JPG dog/a.png dog/more/c.webp dog/.hidden.png dog/notes.txt cat/v.MP4 cat/.cache/x.png .git/d/e.png"
    write_empty(root, f"{names} README.png")
    (root / "eel").mkdir()
    return root


def test_class_folders_are_labelled_in_order(folders: Path) -> None:
    found = [(str(Path(video.path).relative_to(folders)), video.label) for video in read_folder(folders)[0]]
    assert found == [("cat/v.MP4", 0), ("dog/a.png", 1), ("dog/b.JPG", 1), ("dog/more/c.webp", 1)]
    named, _ = read_folder(folders, ClassNames(["ant", "eel", "dog", "cat"]))
    assert {(Path(video.path).relative_to(folders).parts[0], video.label) for video in named} == {
        ("dog", 2),
        ("cat", 3),
    }


def test_a_hidden_folder_above_hides_nothing(folders: Path) -> None:
    folders.rename(folders.with_name(".cache"))
    assert len(read_folder(folders.with_name(".cache"))[0]) == 4


def test_class_folders_may_be_named_by_another_system(tmp_path: Path) -> None:
    lay(tmp_path, "cafe\u0301/a.mp4")
    assert [video.label for video in read_folder(tmp_path, ClassNames(["bar", "caf\u00e9"]))[0]] == [1]


def test_wrong_class_folders_are_named(folders: Path) -> None:
    with pytest.raises(UsageError, match=r"set/eel is none of the 3 classes \(dog to eels\).*Did you mean eels\?"):
        read_folder(folders, ClassNames(["dog", "cat", "eels"]))
    with pytest.raises(UsageError, match="no class folders; put files at"):
        read_folder(folders / "eel")
    for name in ("cat", "dog"):
        for path in (folders / name).rglob("[!.]*.*"):
            path.unlink()
    with pytest.raises(UsageError, match=r"none of its 3 class folders holds an image or a video; .*\.jpg"):
        read_folder(folders)


def lay(root: Path, *names: str) -> Path:
    """Make files; ``{}`` in a name stands for 1, 2 and 3."""
    for name in names:
        for number in (1, 2, 3) if "{}" in name else (0,):
            path = root / name.format(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
    return root


@pytest.mark.parametrize(
    ("names", "frames", "found", "passed_over"),
    [
        (["a/v/img_{}.jpg", "a/w/{}.png", "b/v/f {}.tif"], 8, "a/v a/w b/v", ""),
        (["a/v/img_{}.jpg", "a/w/1.png"], 1, "a/v/img_1.jpg a/v/img_2.jpg a/v/img_3.jpg a/w/1.png", ""),
        (["a/{}.jpg", "b/{}.png"], 8, "a/1.jpg a/2.jpg a/3.jpg b/1.png b/2.png b/3.png", ""),
        (["a/v.mp4", "a/v.jpg", "b/w.avi", "b/cover.png"], 8, "a/v.mp4 b/w.avi", "a/v.jpg b/cover.png"),
        (["a/v.mp4", "a/v.jpg", "b/w.avi", "b/cover.png"], 1, "a/v.mp4 b/w.avi", "a/v.jpg b/cover.png"),
        (["a/v/{}.jpg", "a/w/1.jpg", "a/top.jpg"], 8, "a/v", "a/top.jpg a/w/1.jpg"),
        (["a/v/rgb/{}.jpg", "a/v/flow_x/{}.jpg", "a/v/u/{}.jpg"], 8, "a/v/rgb", "a/v/flow_x/ a/v/u/"),
        (["a/rgb_frames/v/{}.jpg", "a/flow_frames/v/{}.jpg"], 8, "a/rgb_frames/v", "a/flow_frames/"),
        (["a/u/{}.jpg", "a/w/{}.jpg"], 8, "a/u a/w", ""),
        (["a/{}.mp4", "a/1/{}.jpg", "a/thumbs/{}.jpg", "a/x/{}.jpg"], 8, "a/1.mp4 a/2.mp4 a/3.mp4",
         "a/1/ a/thumbs/ a/x/1.jpg a/x/2.jpg a/x/3.jpg"),
        (["a/v/v.mp4", "a/v/t{}.jpg", "a/v/f/{}.jpg"], 8, "a/v/v.mp4",
         "a/v/f/1.jpg a/v/f/2.jpg a/v/f/3.jpg a/v/t1.jpg a/v/t2.jpg a/v/t3.jpg"),
        (["a/v.divx", "a/notes.txt", "a/Thumbs.db", "a/._v.mp4", "__MACOSX/a/._v.mp4", "top.mp4", "list.csv"], 8,
         "a/v.divx", "__MACOSX/ a/._v.mp4 a/Thumbs.db a/notes.txt top.mp4"),
    ],
    ids=[
        "frames", "one frame", "stills", "previews", "previews, one frame", "lone pictures", "flow folders",
        "flow above", "videos u and w", "frames beside videos", "folder a video", "systems' files",
    ],
)  # fmt: skip
def test_videos_are_told_from_pictures(
    tmp_path: Path, names: list[str], frames: int, found: str, passed_over: str
) -> None:
    videos, notes = read_folder(lay(tmp_path, *names), frames=frames)
    assert [str(Path(video.path).relative_to(tmp_path)) for video in videos] == found.split()
    line = next((note for note in notes if "passed over" in note), "")
    assert f"passed over: {len(passed_over.split()):,} file" in line or not (passed_over or line)
    parts = [find_media(str(folder), frames=frames) for folder in tmp_path.iterdir() if folder.is_dir()]
    if passed_over and "top" not in passed_over and "cover" not in passed_over:
        spare = sorted(path.removeprefix(f"{tmp_path}/") for part in parts for path in part.passed_over)
        assert spare == passed_over.split()


def test_notes_say_what_was_taken_for_what(tmp_path: Path) -> None:
    lay(tmp_path / "set", "a/v/img_{}.jpg", "a/w/1.jpg", "b/v/{}.jpg", "b/notes.txt")
    _, notes = read_folder(tmp_path / "set", frames=8)
    assert notes == [
        f"{tmp_path}/set: folders of pictures, each the frames of a video: 2",
        f"{tmp_path}/set: passed over: 2 files (1 .jpg, 1 .txt): a/w/1.jpg, b/notes.txt",
    ]
    _, notes = read_folder(lay(tmp_path / "stills", "a/{}.jpg"), frames=8)
    assert notes == [f"{tmp_path}/stills: pictures, each shown in all 8 frames of a clip: 3"]


def test_a_pattern_names_the_frames(tmp_path: Path) -> None:
    lay(tmp_path, "a/v/left_{}.jpg", "a/v/right_{}.jpg", "a/w/right_1.jpg")
    (video,), _ = read_folder(tmp_path, frames=8, pattern="left_{:05}.jpg")
    assert video.path == f"{tmp_path}/a/v/left_{{:05}}.jpg"


def test_links_find_no_file_twice(tmp_path: Path) -> None:
    root = lay(tmp_path / "set", "a/1.mp4", "b/2.mp4")
    lay(tmp_path / "disk", "3.mp4")
    for link, target in {"a/up": "..", "b/loop": ".", "c": "a", "all": "..", "b/far": "../../disk"}.items():
        (root / link).symlink_to(target)
    (tmp_path / "disk" / "back").symlink_to("../disk")
    assert class_folders(root) == ["a", "b"]
    videos, notes = read_folder(root, frames=8)
    assert [Path(video.path).name for video in videos] == ["1.mp4", "2.mp4", "3.mp4"]
    assert "passed over: 5 files (5 folders)" in notes[0]


def test_files_are_known_by_their_content(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3)).astype(np.uint8)
    pictures = [Image.fromarray(frame) for frame in noise]
    codecs = {"avi": "mpeg4", "matroska": "mpeg4", "mov": "mpeg4", "mpegts": "mpeg2video", "flv": "flv1"}
    pictures[0].save(folder / "moving.gif", save_all=True, append_images=pictures[1:], duration=100)
    for kind, codec in codecs.items():
        with av.open(str(folder / kind), "w", format=kind) as container:
            stream = container.add_stream(codec, 25)
            stream.width = stream.height = 64
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_image(picture)))
            container.mux(stream.encode())
    lay(folder, "model.bin", "empty", "letter.unknown")
    pictures[0].save(folder / "still", "JPEG")
    videos, notes = read_folder(tmp_path, frames=8)
    assert [Path(video.path).name for video in videos] == ["avi", "flv", "matroska", "mov", "moving.gif", "mpegts"]
    assert {open_video(video.path).length for video in videos} == {3}
    assert "passed over: 4 files" in notes[0]


def test_numbers_are_classes_in_their_order(tmp_path: Path) -> None:
    lay(tmp_path, *(f"{number}/v.mp4" for number in range(12)))
    assert class_folders(tmp_path) == [str(number) for number in range(12)]
    assert all(Path(video.path).parent.name == str(video.label) for video in read_folder(tmp_path)[0])


def test_commands_read_folders_as_lists_do(tmp_path: Path) -> None:
    lay(tmp_path, "in/v/{}.jpg", "in/w.mp4", "in/w.jpg", "frames/{}.jpg")
    paths, _, unused = find_sources([str(tmp_path / "in"), str(tmp_path / "frames")])
    assert [str(Path(path).relative_to(tmp_path)) for path in paths] == ["in/v", "in/w.mp4", "frames"]
    assert "passed over: 1 file (1 .jpg)" in unused
