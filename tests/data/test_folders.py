"""Class folders, right and wrong."""

from pathlib import Path

import pytest

from stvit_video.common.errors import UsageError
from stvit_video.data.lists.annotations import Video
from stvit_video.data.lists.folders import read_file, read_folder


@pytest.mark.parametrize("name", ["yoga/a b.MP4", "yoga/a.JPG"])
def test_one_file_is_labelled_by_its_folder(tmp_path: Path, name: str) -> None:
    assert read_file(tmp_path / name, ["ski", "yoga"]) == [Video(str(tmp_path / name), 1)]
    with pytest.raises(UsageError, match=r"'yoga' is none of the 1 class names; .* `path label`.* Did you mean yogi\?"):
        read_file(tmp_path / name, ["yogi"])
    with pytest.raises(UsageError, match=r"'yoga' is none of the 0 class names; .* `path label`"):
        read_file(tmp_path / name, [])


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Class folders with sub-folders, hidden files, other files, an empty class and endings in capitals."""
    root = tmp_path / "set"
    names = "dog/b.JPG dog/a.png dog/more/c.webp dog/.hidden.png dog/notes.txt cat/v.MP4 cat/.cache/x.png .git/d/e.png"
    for name in [*names.split(), "README.png"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "eel").mkdir()
    return root


def test_class_folders_are_labelled_in_order(folders: Path) -> None:
    found = [(str(Path(video.path).relative_to(folders)), video.label) for video in read_folder(folders)[0]]
    assert found == [("cat/v.MP4", 0), ("dog/a.png", 1), ("dog/b.JPG", 1), ("dog/more/c.webp", 1)]
    named, _ = read_folder(folders, ["ant", "eel", "dog", "cat"])
    assert {(Path(video.path).relative_to(folders).parts[0], video.label) for video in named} == {
        ("dog", 2),
        ("cat", 3),
    }


def test_a_hidden_folder_above_hides_nothing(folders: Path) -> None:
    folders.rename(folders.with_name(".cache"))
    assert len(read_folder(folders.with_name(".cache"))[0]) == 4


def test_wrong_class_folders_are_named(folders: Path) -> None:
    with pytest.raises(UsageError, match=r"set/eel is of none of the 3 classes \(dog to eels\).*Did you mean eels\?"):
        read_folder(folders, ["dog", "cat", "eels"])
    with pytest.raises(UsageError, match="no class folders; put files at"):
        read_folder(folders / "eel")
    for name in ("cat", "dog"):
        for path in (folders / name).rglob("[!.]*.*"):
            path.unlink()
    with pytest.raises(UsageError, match=r"none of its 3 class folders holds an image or a video; .*\.jpg"):
        read_folder(folders)
