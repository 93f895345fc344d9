"""What several test files share: videos made on the fly, a generated set, short runs, refusals."""

import fcntl
import functools
import os
import signal
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

# Two workers of pytest, and the processes that tests start, share the cores: one thread each is fastest. It has to be
# set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import av
import numpy as np
import pytest
import torch
from fvcore.common.config import CfgNode

from stvit_video import run
from stvit_video.common.errors import UsageError
from stvit_video.config import load_config
from stvit_video.data import sample
from stvit_video.data.lists.annotations import Video
from stvit_video.data.lists.catalogues import find_clips, find_videos
from stvit_video.data.lists.class_names import ClassNames
from stvit_video.data.lists.formats import read_catalogue
from stvit_video.data.lists.tables import Reading
from stvit_video.runs.checkpoint import CheckpointWriter
from stvit_video.training.trainer import Trainer

REPOSITORY = Path(__file__).parent.parent
# A shell that starts the tests in the background has them ignore Ctrl-C, and so all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def numbered_frames(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Return frames that carry their number: bit i of the number is the i-th block of the picture, black or white."""
    frames = np.full((count, height, width, 3), 128, np.uint8)
    for number in range(count):
        for bit in range(8):
            row, column = divmod(bit, 4)
            frames[number, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] = 255 * (number >> bit & 1)
    return frames


def read_number(frame: np.ndarray) -> int:
    """Return the number that a frame carries; works at any picture size."""
    height, width = frame.shape[:2]
    places = [(int((bit // 4 * 16 + 8) / 48 * height), int((bit % 4 * 16 + 8) / 64 * width)) for bit in range(8)]
    return sum(int(frame[y, x].mean() > 127) << bit for bit, (y, x) in enumerate(places))


def write_empty(root: Path, names: str) -> None:
    """Write empty files, whose paths ``names`` lists with blanks between them."""
    for name in names.split():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


@pytest.fixture
def write_clip(tmp_path: Path) -> Callable[..., Path]:
    """Encode frames (N, H, W, 3) with PyAV; returns the file's path."""

    def write(
        frames: np.ndarray,
        name: str = "clip.mp4",
        codec: str = "libx264",
        rate: int = 25,
        pixels: str = "yuv420p",
        **options: str,
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=rate, options={"crf": "10", **options})
            stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], pixels
            for i, picture in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = i, Fraction(1, rate)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return write


def copy_packets(
    source: Path, target: Path, change: Callable[[av.Packet], av.Packet] = lambda packet: packet, **options: str
) -> Path:
    """Write the packets of a video, as ``change`` returns them, to another file without encoding them again."""
    with av.open(str(source)) as given, av.open(str(target), "w", options=options) as written:
        stream = written.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.dts is not None:  # the last one is empty
                changed = change(packet)
                changed.stream = stream
                written.mux(changed)
    return target


@pytest.fixture
def write_sound(tmp_path: Path) -> Callable[..., Path]:
    """Encode a second of silence; returns the file's path."""

    def write(name: str) -> Path:
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("aac", rate=16000, layout="mono")
            for start in range(0, 16000, 1024):
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                frame.pts, frame.sample_rate = start, 16000
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return tmp_path / name

    return write


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder that ``make`` fills once a session, also where the session has several workers."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a folder of its own in the session's
        root = root.parent
    folder, done = root / name, root / f"{name}.done"
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample set with few videos, for every test that only reads it."""

    def make(folder: Path) -> None:
        sample.prepare(folder / "sample", sample.Spec(clips=(32, 16, 16), stills=(16, 16)), progress=False)

    return make_once(tmp_path_factory, "small", make) / "sample"


@pytest.fixture(scope="session")
def trained(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a run of one step on the small set, for every test that only reads them."""

    def make(folder: Path) -> None:
        assert run.main(small_arguments(small_set, folder / "run", "TRAIN.MAX_STEPS", "1", "DATA.VAL_LIST", "")) == 0

    return make_once(tmp_path_factory, "trained", make) / "run" / "model.safetensors"


def small_arguments(small_set: Path, output: Path, *overrides: str, cfg: str = "sample_stvit") -> list[str]:
    """Return arguments of the main command for a run of seconds on the small set, of four steps an epoch."""
    small = f"DATA.ROOT {small_set} DATA.GENERATE_CLIPS [32,16,16] DATA.WORKERS 0 TRAIN.EPOCHS 1 TRAIN.BATCH_SIZE 8"
    words = [*small.split(), "DATA.GENERATE", "", "OUTPUT_DIR", str(output), *overrides]
    return ["--cfg", str(REPOSITORY / "configs" / f"{cfg}.yaml"), *words]


@pytest.fixture
def small_run(small_set: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """``small_arguments`` of the small set, for a run in ``tmp_path``/run."""
    return functools.partial(small_arguments, small_set, tmp_path / "run")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str]:
    """Run the main command, check that it exits with 2 and one line on stderr, and return that line."""

    def check(arguments: list[str]) -> str:
        capsys.readouterr()
        assert run.main(arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: "), said
        assert said.count("\n") == 1, said
        return said

    return check


def refusal(function: Callable[..., object], *arguments: object) -> str:
    """Call a function that has to raise UsageError, check that its message is one short line, and return it."""
    with pytest.raises(UsageError) as error:
        function(*arguments)
    said = str(error.value)
    assert "\n" not in said
    assert len(said) < 500
    return said


def read_list(path: str | Path, root: str | Path = "", classes: Sequence[str] = (), **reading: Any) -> list[Video]:
    """Read a list as a run does; its classes are those that it names, unless they are given."""
    catalogue = read_catalogue(path, root, Reading(**reading))
    names = ClassNames(classes or catalogue.classes() or ())
    return find_videos(catalogue, root, names, functools.partial(find_clips, root))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Killed(Exception):
    """Raised in a test where a process would be killed."""


@pytest.fixture
def run_killed(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str], int], None]:
    """Run a command that is interrupted by ``Killed`` after a number of training steps."""

    def start(arguments: list[str], steps: int) -> None:
        take_step, save = Trainer.take_step, CheckpointWriter.save

        def save_at_once(self: CheckpointWriter, content: dict) -> None:
            """Wait for the write: else a checkpoint due during it would be written later."""
            save(self, content)
            self.wait()

        def die(self: Trainer, batches: object) -> torch.Tensor:
            if self.step == steps:
                raise Killed
            return take_step(self, batches)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "take_step", die)
            patch.setattr(CheckpointWriter, "save", save_at_once)
            with pytest.raises(Killed):
                run.main(arguments)

    return start


def data_config(small_set: Path, *overrides: str) -> CfgNode:
    """Return the sample configuration on the small set, without workers."""
    small = ["DATA.ROOT", str(small_set), "DATA.GENERATE", "", "TRAIN.BATCH_SIZE", "8", "DATA.WORKERS", "0"]
    return load_config(REPOSITORY / "configs" / "sample_stvit.yaml", [*small, *overrides])
