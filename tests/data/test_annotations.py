"""Lists of videos, right and wrong."""

from pathlib import Path

import pytest

from stvit_video.data.annotations import Video, check_files, check_labels, read_classes, read_folder, read_list
from stvit_video.errors import UsageError


@pytest.mark.parametrize("separator", [" ", ",", "\t", ", ", "  "])
def test_separators_and_paths_with_spaces(tmp_path: Path, separator: str) -> None:
    (tmp_path / "list.csv").write_text(f"a.mp4{separator}3\n\nmy videos/b c.mp4{separator}0\r\n")
    assert read_list(tmp_path / "list.csv", "root") == [Video("root/a.mp4", 3), Video("root/my videos/b c.mp4", 0)]


def test_absolute_paths_stay_and_a_byte_order_mark_is_no_part_of_the_path(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(b"\xef\xbb\xbf/v/\xc3\xa4.mp4 1\n")
    assert read_list(tmp_path / "list.csv", "root") == [Video("/v/ä.mp4", 1)]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"a.mp4 1\nb.mp4\n", "line 2: 'b.mp4' has no label"),
        (b"a.mp4 walking\n", "line 1: 'a.mp4 walking' has no label"),
        (b"a.mp4 1.5\n", "has no label"),
        (b"a.mp4 -1\n", "label -1 is negative"),
        (b"3\n", "has no label"),
        (b"a.mp4 --5\n", "has no label"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
    ],
)
def test_wrong_lists_are_named_by_line(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(UsageError) as error:
        read_list(tmp_path / "list.csv")
    assert says in str(error.value)


def test_labels_out_of_range_and_missing_files(tmp_path: Path) -> None:
    videos = [Video(str(tmp_path / f"{i}.mp4"), i) for i in range(4)]
    check_labels(videos, 4, "list")
    with pytest.raises(UsageError, match=r"label 3 of .*3\.mp4 is out of range; allowed: 0 to 2"):
        check_labels(videos, 3, "list")
    with pytest.raises(UsageError, match=r"4 of 4 files looked at are missing, the first .*0\.mp4"):
        check_files(videos, 0.5, "list")
    for video in videos[:2]:
        Path(video.path).touch()
    check_files(videos, 0.5, "list")


def test_class_names(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("riding a bike\nskiing\n\n")
    assert read_classes(tmp_path / "classes.txt") == ["riding a bike", "skiing"]
    (tmp_path / "classes.txt").write_text("\n")
    with pytest.raises(UsageError, match="is empty"):
        read_classes(tmp_path / "classes.txt")
    with pytest.raises(UsageError, match="is not a file"):
        read_list(tmp_path / "absent.csv")


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
    found = [(str(Path(video.path).relative_to(folders)), video.label) for video in read_folder(folders)]
    assert found == [("cat/v.MP4", 0), ("dog/a.png", 1), ("dog/b.JPG", 1), ("dog/more/c.webp", 1)]
    named = read_folder(folders, ["ant", "eel", "dog", "cat"])
    assert {(Path(video.path).relative_to(folders).parts[0], video.label) for video in named} == {
        ("dog", 2),
        ("cat", 3),
    }


def test_a_hidden_folder_above_hides_nothing(folders: Path) -> None:
    folders.rename(folders.with_name(".cache"))
    assert len(read_folder(folders.with_name(".cache"))) == 4


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
