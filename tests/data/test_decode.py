"""The decoder, on files whose frames carry their number."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stvit_video.data.decode import DecodeError, ImageReader, VideoReader, open_video
from tests.conftest import numbered_frames, read_number


@pytest.mark.parametrize("options", [{}, {"g": "250", "bf": "3", "b-pyramid": "normal"}, {"g": "1"}], ids=str)
def test_frames_are_the_ones_asked_for_in_the_order_asked(write_clip: Callable[..., Path], options: dict) -> None:
    path = str(write_clip(numbered_frames(90), **options))
    orders = [list(range(90)), [89], [60, 3, 3, 77, 0, 60], list(range(0, 90, 7)), list(range(89, -1, -11))]
    for indices in orders:
        with VideoReader(path) as reader:
            assert len(reader) == 90
            assert [read_number(frame) for frame in reader.frames(indices)] == indices


@pytest.mark.parametrize(("height", "width"), [(240, 320), (320, 240)])
def test_large_files_are_resized_in_the_decoder(write_clip: Callable[..., Path], height: int, width: int) -> None:
    frames = numbered_frames(12).repeat(height // 48 + 1, axis=1).repeat(width // 64 + 1, axis=2)
    path = str(write_clip(frames[:, :height, :width]))
    with VideoReader(path, short_side=120) as reader:
        small = reader.frames([1, 5])
    assert min(small.shape[1:3]) == 120
    assert small.shape[1] / small.shape[2] == pytest.approx(height / width, rel=0.01)
    with VideoReader(path, short_side=400) as reader:  # never enlarged there
        assert reader.frames([0]).shape == (1, height, width, 3)


def test_unreadable_files_say_why(write_clip: Callable[..., Path], tmp_path: Path) -> None:
    whole = write_clip(numbered_frames(60)).read_bytes()
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, len(whole), dtype=np.uint8).tobytes()
    cases = {
        "empty.mp4": b"",
        "text.mp4": b"not a video\n" * 50,
        "cut.mp4": whole[: len(whole) // 2],  # the index stands at the end
        "header.mp4": whole[:40],
        "noise.mp4": noise,
        "damaged.mp4": whole[:48] + noise[48 : len(whole) * 3 // 4] + whole[len(whole) * 3 // 4 :],
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        for side in (None, 32):
            with pytest.raises(DecodeError) as error, VideoReader(str(tmp_path / name), side) as reader:
                reader.frames(range(0, len(reader), 4))
            assert error.value.path == str(tmp_path / name)
            assert "\n" not in error.value.message
    with pytest.raises(DecodeError, match="no such file"):
        VideoReader(str(tmp_path / "absent.mp4"))
    with pytest.raises(DecodeError, match="no such file"):
        VideoReader(str(tmp_path))


def read_image(path: Path, short_side: int | None = None) -> np.ndarray:
    with open_video(str(path), short_side) as reader:
        assert isinstance(reader, ImageReader)
        assert len(reader) == 1
        return reader.frames([0])[0]


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


def test_lossy_images_are_near_and_upright(tmp_path: Path, picture: np.ndarray) -> None:
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


def test_an_image_is_one_frame_as_often_as_asked(tmp_path: Path, picture: np.ndarray) -> None:
    Image.fromarray(picture).save(tmp_path / "a.png")
    with open_video(str(tmp_path / "a.png")) as reader:
        np.testing.assert_array_equal(reader.frames(np.zeros(3, np.int64)), [picture] * 3)
        with pytest.raises(DecodeError, match="has one frame only"):
            reader.frames([0, 1])
    write = Image.fromarray(picture)
    write.save(tmp_path / "moving.webp", save_all=True, append_images=[write.rotate(180)], lossless=True)
    np.testing.assert_array_equal(read_image(tmp_path / "moving.webp"), picture)


def test_damaged_images_say_why(tmp_path: Path, picture: np.ndarray) -> None:
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
    Image.fromarray(picture).save(tmp_path / "a.png")
    (tmp_path / "a.mp4").write_bytes((tmp_path / "a.png").read_bytes())
    with pytest.raises(DecodeError):  # opened as what its ending says
        open_video(str(tmp_path / "a.mp4"))
