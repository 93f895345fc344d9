"""Odd files and real clips against FFmpeg's own command line: number, order, pixels and times of their frames."""

import contextlib
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from stvit_video import check_videos
from stvit_video.data import open_video
from stvit_video.data.decode.frames import Decoding
from stvit_video.data.decode.types import DecodeError, Frames
from stvit_video.data.failures import read_ledger
from tests.conftest import make_once
from tests.data import odd_files
from tests.data.choices import Every, Frozen
from tests.data.odd_files import COMMAND, EDITED, ENCODED, find_file

# Every kind once; the others are in the long run.
QUICK = [
    "ten_bits.mkv",
    "vp9_hidden.webm",
    "late.ts",
    "packed.avi",
    "not_coded.avi",
    "not_coded.mp4",
    "hidden_vp8.webm",
    "middle.ts",
    "middle.mpg",
    "middle_vp8.webm",
    "cut.mp4",
    "cut_open_hevc.mkv",
    "edited_inside.mov",
    "no_key_table.mp4",
    "half_zero.mp4",
    "half_zero_mjpeg.avi",
    "missing.ts",
    "missing_b_frames.flv",
    "truncated.avi",
    "no_moov.mp4",
    "joined.ts",
    "restarted.flv",
    "hour.mp4",
    "hourly.mp4",
    "duplicate.mkv",
    "backwards.mkv",
    "jump.mp4",
    "turned_90.mp4",
    "mirrored.mp4",
    "turned_sei.mp4",
    "cover_first.mp4",
    "second_default.mkv",
]
ALL = [name for name in [*ENCODED, *EDITED] if not name.startswith("_")]
NAMES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.long) for name in ALL]
# Frames of 4:2:0 in fields, in 10 bits or of other sizes are converted to RGB with other weights for colours between
# pixels. Elsewhere, pixels are equal. Frames of two numbers differ by 18 levels and more.
TOLERANCES = dict.fromkeys(
    [
        "interlaced.mp4",
        "fields_hevc.mkv",
        "mpeg2.ts",
        "middle_mpeg2.ts",
        "half_zero.ts",
        "camera.dv",
        "ten_bits.mkv",
        "truncated.mkv",
        "hole.mkv",
        "bt2020.mp4",
        "svq1.mov",
        "odd_size.mkv",
        "size_changes.ts",
        "size_changes.h264",
        "size_changes.webm",
        "turned_sei.mp4",
    ],
    2,
)
# The lost part of this picture is what was in memory before: no two decodes of it need be equal.
UNDEFINED = {"half_zero_mjpeg.avi": 20}
CLIPS = "STVIT_VIDEO_REAL_CLIPS"  # the variable with the folder of real clips

pytestmark = pytest.mark.skipif(COMMAND is None, reason="no ffmpeg command: pip install imageio-ffmpeg, or apt-get")


@dataclass
class Shown:
    """What FFmpeg shows of a file."""

    path: Path
    frames: Frames  # (N, H, W, 3); empty where it shows nothing
    times: NDArray[np.float64]  # (N,) in seconds after the first frame; NaN where it states none

    @property
    def name(self) -> str:
        return self.path.name


def show(path: Path, stream: int = 0) -> Shown:
    """Have FFmpeg's command write all frames of a video stream, none of them twice and none left out."""
    assert COMMAND is not None
    words = f"-map 0:v:{stream} -vf showinfo -pix_fmt rgb24 -fps_mode passthrough -f rawvideo -"
    given = [COMMAND, "-nostdin", "-nostats", "-copyts", "-threads", "1", "-i", path, *words.split()]
    process = subprocess.run(given, capture_output=True)
    said = process.stderr.decode(errors="replace")
    rows = re.findall(r" n: *\d+ pts: *(\S+) ", said)
    if not rows:
        return Shown(path, np.empty((0, 0, 0, 3), np.uint8), np.empty(0))
    unit, parts = map(int, re.findall(r"config in time_base: (\d+)/(\d+)", said)[0])
    width, height = map(int, re.findall(r"Video: rawvideo.* (\d+)x(\d+)", said)[-1])
    frames = np.frombuffer(process.stdout, np.uint8).reshape(len(rows), height, width, 3)
    times = np.array([np.nan if row == "NOPTS" else int(row) * unit / parts for row in rows])
    return Shown(path, frames, times - times[0])


def decode(path: Path) -> Shown:
    """Do the same with FFmpeg's libraries as PyAV brings them, for a file on which its versions do not agree."""
    frames: list[av.VideoFrame] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for packet in container.demux(stream):
            with contextlib.suppress(av.FFmpegError):
                frames += packet.decode()
        unit = float(stream.time_base)
    pixels = [frame.to_ndarray(format="rgb24") for frame in frames]
    times = np.array([np.nan if frame.pts is None else frame.pts * unit for frame in frames])
    return Shown(path, np.array(pixels).reshape(len(pixels), odd_files.HEIGHT, odd_files.WIDTH, 3), times - times[:1])


@pytest.fixture(scope="module")
def find(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a file's name to its path."""
    quick = odd_files.find_sources(QUICK)
    folder = make_once(tmp_path_factory, "odd_files", lambda folder: odd_files.write_encoded(folder, quick))

    def find(name: str) -> Path:
        if not odd_files.find_sources([name]) <= quick:  # then all are wanted, sooner or later
            make_once(tmp_path_factory, "more_odd_files", lambda _: odd_files.write_encoded(folder, {*ENCODED} - quick))
        return find_file(folder, name)

    return find


@pytest.fixture(scope="module", params=NAMES)
def shown(request: pytest.FixtureRequest, find: Callable[[str], Path]) -> Shown:
    edited, path = EDITED.get(request.param), find(request.param)
    if edited and edited.versions:
        return decode(path)
    return show(path, edited.stream if edited else 0)


def check_frames(frames: Frames, expected: Frames, name: str) -> None:
    assert frames.shape == expected.shape
    difference = np.abs(frames.astype(np.int16) - expected).mean(axis=(1, 2, 3))
    assert difference.max() <= TOLERANCES.get(name, 0), np.flatnonzero(difference > TOLERANCES.get(name, 0))


def check_times(shown: Shown) -> None:
    """Check segments, and times inside of each: what FFmpeg says of the time between them depends on the container."""
    edited = EDITED.get(shown.name)
    with open_video(str(shown.path)) as video:
        times, segments = video.times(), video.segments()
    assert times.shape == (len(shown.frames),)
    assert np.isfinite(times).all()
    assert [0, *(stop for _, stop in segments)] == [*(start for start, _ in segments), len(times)]
    for start, stop in segments:
        assert (np.diff(times[start:stop]) >= 0).all()
    if edited and edited.starts is None:
        return
    assert tuple(start for start, _ in segments[1:]) == (edited.starts if edited else ())
    for start, stop in segments:
        expected, found = (part[start:stop] - part[start] for part in (shown.times, times))
        if np.isnan(expected).any():
            continue
        # Where two frames have one time, FFmpeg guesses that of the second.
        guessed = int((np.diff(expected) <= 0).sum()) + shown.name.startswith("duplicate")
        wrong = np.abs(found - expected) > 1e-3
        assert wrong.sum() <= guessed
        assert (np.abs(found - expected)[wrong] <= 2 / odd_files.RATE).all()


def test_frames_and_times_are_those_of_ffmpeg(shown: Shown) -> None:
    """Frames are read in order, then at random places, with repetitions, and one by one from the end."""
    length = len(shown.frames)
    if shown.name in EDITED and EDITED[shown.name].damaged is not False:
        check_damaged(shown)
        return
    assert length > 0
    with open_video(str(shown.path)) as video:
        assert video.length == length
        check_frames(video.frames(range(length)), shown.frames, shown.name)
    rng = np.random.default_rng(0)
    with open_video(str(shown.path)) as video:
        for count in (1, 3, 8):
            indices = rng.integers(0, length, count)
            check_frames(video.frames(indices), shown.frames[indices], shown.name)
        for index in (length - 1, length // 2, 0, length // 3):
            check_frames(video.frames([index]), shown.frames[[index]], shown.name)
        check_frames(np.stack(list(video.all_frames())), shown.frames, shown.name)
        check_frames(video.frames([length // 2]), shown.frames[[length // 2]], shown.name)
    check_times(shown)


def check_damaged(shown: Shown) -> None:
    """Check that each frame is an error or what FFmpeg shows, and that a file of which it shows none is refused."""
    errors = []
    try:
        with open_video(str(shown.path)) as video:
            assert video.length > 0
            for index in range(video.length):
                try:
                    frames = video.frames([index])
                    if index != UNDEFINED.get(shown.name):
                        check_frames(frames, shown.frames[[index]], shown.name)
                except DecodeError as error:
                    errors.append(error)
            if shown.name not in UNDEFINED:
                check_frames(np.stack(list(video.all_frames())), shown.frames, shown.name)
    except DecodeError as error:
        errors.append(error)
    assert errors or len(shown.frames)
    assert not any("\n" in str(error) for error in errors)


@pytest.fixture(scope="module")
def decord() -> Decoding:
    return Decoding("decord", deadline_s=20)


def test_decord_is_exact_or_refuses(shown: Shown, decord: Decoding) -> None:
    choices = [Every(), Frozen((len(shown.frames) // 2,)), Frozen((len(shown.frames) - 1, 0, 7, 3))]
    for choice in choices:
        try:
            frames = decord.read(decord.request(str(shown.path), choice))
        except DecodeError:
            continue
        indices = range(len(shown.frames)) if isinstance(choice, Every) else choice.indices
        assert shown.name not in UNDEFINED
        check_frames(frames, shown.frames[list(indices)], shown.name)


@pytest.mark.parametrize("names", [QUICK, pytest.param(ALL, marks=pytest.mark.long)], ids=["quick", "all"])
def test_check_videos_names_the_damaged_ones(
    names: list[str], find: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = {name: EDITED[name].damaged if name in EDITED else False for name in names}
    paths = [find(name) for name in names if damaged[name] is not None]
    (tmp_path / "list.txt").write_text("".join(f"{path} 0\n" for path in paths))
    arguments = [str(tmp_path / "list.txt"), "--output", str(tmp_path / "out"), "--workers", "1"]
    assert check_videos.main(arguments) == 0
    named = [Path(row.path).name for row in read_ledger(tmp_path / "out" / "failures.csv")]
    assert sorted(named) == sorted(path.name for path in paths if damaged[path.name])


def real_clips() -> list[Path]:
    folder = os.environ.get(CLIPS)
    return sorted(path for path in Path(folder).iterdir() if path.suffix in (".avi", ".mp4")) if folder else []


def check_clip(frames: Frames, expected: Frames) -> None:
    """Versions of FFmpeg round MPEG-4 differently in single pixels."""
    difference = np.abs(frames.astype(np.int16) - expected)
    assert difference.max() <= 2
    assert difference.mean() < 1e-4


@pytest.mark.skipif(CLIPS not in os.environ, reason=f"{CLIPS} is not set to a folder of real clips: tests/README.md")
@pytest.mark.parametrize("path", real_clips(), ids=lambda path: path.name)
def test_real_clips_are_read_whole(path: Path) -> None:
    shown = show(path)
    with open_video(str(path)) as video:
        assert video.length == len(shown.frames) > 30
        assert video.segments() == [(0, video.length)]
        np.testing.assert_allclose(video.times(), shown.times, atol=1e-3)
        for start in range(0, video.length, 32):
            indices = range(start, min(start + 32, video.length))
            check_clip(video.frames(indices), shown.frames[indices.start : indices.stop])
        indices = np.random.default_rng(0).permutation(video.length)[:16]
        check_clip(video.frames(indices), shown.frames[indices])
