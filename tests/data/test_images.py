"""Images and folders of images as videos."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stvit_video.data.decode.frames import FrameRequest, open_video, read_file
from stvit_video.data.decode.pictures import order_frames
from stvit_video.data.decode.types import DecodeError
from tests.data.choices import Frozen


def read_image(path: Path, short_side: int | None = None) -> np.ndarray:
    reader = open_video(str(path), short_side=short_side)
    assert reader.length == 1
    return reader.frames(np.array([0]))[0]


@pytest.fixture
def picture() -> np.ndarray:
    """A picture (40, 60, 3) whose corners differ: dark at the top left, red to the right, green downwards."""
    y, x = np.mgrid[:40, :60]
    return np.stack([x * 4, y * 6, np.full_like(x, 20)], axis=-1).astype(np.uint8)


def test_lossless_images_of_every_mode_are_read_in_rgb(tmp_path: Path, picture: np.ndarray) -> None:
    image = Image.fromarray(picture)
    for name in ("a.png", "a.PNG", "a.bmp", "a.ppm"):
        image.save(tmp_path / name)
        np.testing.assert_array_equal(read_image(tmp_path / name), picture)
    image.convert("RGBA").save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(read_image(tmp_path / "alpha.png"), picture)
    gray = np.asarray(image.convert("L"))
    image.convert("L").save(tmp_path / "gray.png")
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "deep.png")  # 16 bits
    for name in ("gray.png", "deep.png"):
        np.testing.assert_array_equal(read_image(tmp_path / name), np.repeat(gray[..., None], 3, axis=2))
    image.quantize(8).save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_image(tmp_path / "palette.png"), np.asarray(image.quantize(8).convert("RGB")))


def test_lossy_images_are_close_and_upright(tmp_path: Path, picture: np.ndarray) -> None:
    image = Image.fromarray(picture)
    for name in ("a.jpg", "a.webp"):
        image.save(tmp_path / name, quality=95)
        assert np.abs(read_image(tmp_path / name).astype(int) - picture).mean() < 4
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown rotated by 90 degrees clockwise
    image.save(tmp_path / "turned.jpg", quality=95, exif=exif)
    turned = read_image(tmp_path / "turned.jpg")
    assert turned.shape == (60, 40, 3)
    assert np.abs(turned.astype(int) - np.rot90(picture, -1)).mean() < 4


def test_large_images_are_reduced_with_antialiasing(tmp_path: Path, picture: np.ndarray) -> None:
    stripes = np.zeros((80, 120, 3), np.uint8)
    stripes[:, ::2] = 255  # without antialiasing: all white, or all black
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    small = read_image(tmp_path / "stripes.png", 20)
    assert small.shape == (20, 30, 3)
    assert np.abs(small.astype(int) - 127).max() < 12
    Image.fromarray(picture).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 40).shape == read_image(tmp_path / "a.png", 400).shape == (40, 60, 3)


def test_an_animation_is_its_first_frame(tmp_path: Path, picture: np.ndarray) -> None:
    write = Image.fromarray(picture)
    write.save(tmp_path / "moving.webp", save_all=True, append_images=[write.rotate(180)], lossless=True)
    np.testing.assert_array_equal(read_image(tmp_path / "moving.webp"), picture)


def test_a_folder_of_images_is_a_video_in_natural_order(tmp_path: Path, picture: np.ndarray) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(1, 13):
        Image.fromarray(picture // number).save(folder / f"img_{number}.png")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_text("not a frame")
    reader = open_video(str(folder))
    assert reader.length == 12
    np.testing.assert_array_equal(reader.frames(np.arange(12)), [picture // number for number in range(1, 13)])
    small = open_video(str(folder), short_side=20).frames(np.array([0, 11]))
    assert small.shape == (2, 20, 30, 3)
    with pytest.raises(DecodeError, match="without a frame rate"):
        reader.times()
    Image.fromarray(picture[:30]).save(folder / "img_5.png")
    with pytest.raises(DecodeError, match=r"img_5\.png is of another size"):
        reader.frames(np.array([3, 4]))
    (folder / "img_7.png").write_bytes(b"damaged")
    with pytest.raises(DecodeError, match="cannot be read as an image"):
        open_video(str(folder)).frames(np.array([6]))


@pytest.mark.parametrize(
    "names",
    [
        "img_00001.jpg img_00002.jpg img_00010.jpg",
        "0.5.jpg 1.5.jpg 2.0.jpg 10.0.jpg",
        "1.0.png 1.05.png 1.1.png 1.15.png",
        "0,5.png 1,25.png 1,5.png",
        "1.8.jpg 1.9.jpg 1.10.jpg 1.11.jpg",
        "v1.2.9.jpg v1.2.10.jpg",
        "-10.jpg -3.jpg -1.5.jpg 0.jpg 2.jpg",
        "t_-2.0.jpg t_-0.5.jpg t_0.0.jpg",
        "img-1.jpg img-3.jpg img-10.jpg",
        "1.jpg 2.jpg 03.jpg 10.PNG",
        "frame_0000_9.5.jpg frame_0001_10.0.jpg",
        "frame1_crop224.jpg frame2_crop224.jpg frame10_crop224.jpg",
        "10-01-58.jpg 10-01-59.jpg 10-02-58.jpg 10-02-59.jpg",
        "a.jpg b.jpg c.jpg",
    ],
)
def test_frames_are_in_the_order_of_their_numbers(names: str) -> None:
    assert order_frames(sorted(names.split(), reverse=True)) == names.split()


@pytest.mark.parametrize(
    ("frames", "others"),
    [
        ("img_1.jpg img_2.jpg", "flow_x_1.jpg flow_x_2.jpg flow_y_1.jpg flow_y_2.jpg"),
        ("img_1.jpg img_2.jpg", "x_1.jpg x_2.jpg y_1.jpg y_2.jpg cover.jpg"),
        ("1.jpg 2.jpg", "1_flow.png 2_flow.png mask_1.png mask_2.png thumb.png"),
        ("frame_01.tiff frame_02.tiff", ".frame_03.tiff 3.txt"),
    ],
)
def test_other_pictures_are_no_frames(frames: str, others: str) -> None:
    assert order_frames([*others.split(), *frames.split()]) == frames.split()


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ("1.jpg 01.jpg 2.jpg", r"one frame twice \(01.jpg and 1.jpg\)"),
        ("1.jpg 1.png 2.jpg", r"one frame twice \(1.jpg and 1.png\)"),
        ("left_1.jpg left_2.jpg right_1.jpg right_2.jpg", r"pictures of 2 kinds \(2 left_{}, 2 right_{}\)"),
        ("cam1_1.jpg cam1_2.jpg cam2_1.jpg cam2_2.jpg", r"frames of 2 videos \(2 cam1_{}, 2 cam2_{}\)"),
    ],
)
def test_frames_that_are_not_clear_are_refused(tmp_path: Path, picture: np.ndarray, names: str, says: str) -> None:
    for name in names.split():
        Image.fromarray(picture).save(tmp_path / name)
    with pytest.raises(DecodeError, match=f"holds {says}; .*DATA.FRAME_PATTERN"):
        open_video(str(tmp_path))


@pytest.mark.parametrize("pattern", ["left_{:05d}.png", "left_%05d.png", "left_*"])
def test_a_pattern_chooses_the_frames(tmp_path: Path, picture: np.ndarray, pattern: str) -> None:
    for number in (1, 2, 10):
        Image.fromarray(picture // number).save(tmp_path / f"left_{number}.png")
        Image.fromarray(picture * 0).save(tmp_path / f"right_{number}.png")
    reader = open_video(f"{tmp_path}/{pattern}")
    assert reader.segments() == [(0, 3)]
    np.testing.assert_array_equal(reader.frames(np.arange(3)), [picture // number for number in (1, 2, 10)])
    with pytest.raises(DecodeError, match="no images that match"):
        open_video(f"{tmp_path}/up_{{}}.png")
    for name in ("What is it? [abc].mp4", "100 %d.mp4", "a{1}.avi"):  # absent files
        with pytest.raises(DecodeError, match="no such file"):
            open_video(f"{tmp_path}/{name}")


def test_floating_point_images_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((20, 30), 0.5, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DecodeError, match=r"cannot be read as an image \(its pixels are floating-point numbers"):
        open_video(tmp_path / "a.tif")


def test_the_damaged_frame_of_a_folder_is_named(tmp_path: Path, picture: np.ndarray) -> None:
    for number in range(3):
        Image.fromarray(picture).save(tmp_path / f"{number}.jpg")
    (tmp_path / "1.jpg").write_bytes(b"")
    with pytest.raises(DecodeError, match=r": 1\.jpg cannot be read as an image") as error:
        read_file(FrameRequest(str(tmp_path), Frozen((0, 1))))
    assert error.value.path == str(tmp_path)


def test_damaged_images_give_a_reason(tmp_path: Path, picture: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(DecodeError, match="no such file"):
        open_video(str(tmp_path / "absent.png"))
    for kind in ("jpg", "png", "webp", "bmp", "ppm"):
        path = tmp_path / f"whole.{kind}"
        Image.fromarray(picture).save(path)
        whole = path.read_bytes()
        noise = [rng.bytes(len(whole)), whole[:20] + rng.bytes(len(whole) - 20)]
        for content in (b"", b"<html>", whole[: len(whole) // 2], whole[:10], *noise[: 1 if kind in "bmpppm" else 2]):
            (tmp_path / f"a.{kind}").write_bytes(content)
            with pytest.raises(DecodeError) as error:
                open_video(str(tmp_path / f"a.{kind}"))
            assert "cannot be read as an image" in error.value.message
            assert "\n" not in error.value.message
