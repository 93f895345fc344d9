"""Nothing is waited for without end: loader workers that hang, and videos whose reading hangs, in every part."""

import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from stvit_video import predict, run
from stvit_video.data import workers
from stvit_video.data.dataset import Sample, VideoDataset
from stvit_video.data.decode.frames import Decoding, FrameRequest
from stvit_video.data.decode.types import Choice
from stvit_video.data.failures import read_ledger
from stvit_video.runs.checkpoint import list_checkpoints
from tests.data.choices import hang

SMALL = ["TRAIN.MAX_STEPS", "1", "TEST.CLIPS", "1", "TEST.CROPS", "1", "TRANSFER.RANDOM_BASELINE", "False"]
LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("mode", "stage"),
    [
        ("train", "train"),
        pytest.param("train", "val", marks=LONG),
        pytest.param("train", "test", marks=LONG),
        ("test", "test"),
        pytest.param("transfer", "train", marks=LONG),
        pytest.param("transfer", "test", marks=LONG),
    ],
)
def test_a_worker_that_hangs_ends_the_run(
    mode: str,
    stage: str,
    small_run: Callable[..., list[str]],
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    read, begin = VideoDataset.__getitems__, workers._Worker.__init__

    def read_or_hang(self: VideoDataset, keys: list) -> list[Sample]:
        time.sleep(600 if self.stage == stage else 0)
        return read(self, keys)

    def begin_impatient(self: workers._Worker, number: int, loader: workers.Loader) -> None:
        begin(self, number, loader)
        if loader.dataset.stage == stage:
            self.patience = 1.0  # of minutes

    monkeypatch.setattr(VideoDataset, "__getitems__", read_or_hang)
    monkeypatch.setattr(workers._Worker, "__init__", begin_impatient)
    monkeypatch.setattr(workers, "POLL_S", 0.1)
    monkeypatch.setattr(workers, "START_S", 0.0)
    arguments = small_run(*SMALL, "MODE", mode, "DATA.WORKERS", "1")
    assert run.main([*arguments, *(["MODEL.INIT", str(trained)] if mode != "train" else [])]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in lines)
    assert re.fullmatch(
        rf"error: loader worker 1 of 1 \(process \d+\) has done nothing for 1 s and was ended at \S+/{stage}_0\d+.mp4 "
        rf"\(video 1 of \d+ in its batch\).*; the same command, without OVERWRITE, continues",
        lines[-1],
    )
    assert bool(list_checkpoints(tmp_path / "run" / "checkpoints")) == (mode == "train" and stage != "train")


@pytest.fixture
def hung(monkeypatch: pytest.MonkeyPatch) -> str:
    """The end of the name of videos whose reading does not end."""
    request = Decoding.request

    def hanging(self: Decoding, path: str, choice: Choice, keep_open: bool = False) -> FrameRequest:
        found = request(self, path, choice, keep_open)
        return replace(found, choice=hang) if path.endswith("_00003.mp4") else found

    monkeypatch.setattr(Decoding, "request", hanging)
    return "_00003.mp4"


@LONG
@pytest.mark.parametrize("mode", ["train", "transfer"])
@pytest.mark.parametrize("count", ["0", "1"])
def test_a_video_that_hangs_is_in_the_ledger(
    mode: str, count: str, hung: str, small_run: Callable[..., list[str]], trained: Path, tmp_path: Path
) -> None:
    words = ["MODE", mode, "DATA.WORKERS", count, "DATA.DEADLINE_S", "1", "TRAIN.BATCH_SIZE", "32"]
    assert run.main(small_run(*SMALL, *words, *(["MODEL.INIT", str(trained)] if mode != "train" else []))) == 0
    rows = {(row.stage, row.path.rpartition("/")[2]): row.message for row in read_ledger(tmp_path / "run/failures.csv")}
    stages = ("train", "val", "test") if mode == "train" else ("train", "test")
    for stage in stages:
        assert rows[stage, stage + hung] == "took more than 1 s (DATA.DEADLINE_S); its decoder was stopped"


def test_a_video_that_hangs_is_no_prediction(
    hung: str, small_set: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = [str(small_set / "videos" / f"test_0000{number}.mp4") for number in (3, 4)]
    assert predict.main([*videos, "--checkpoint", str(trained), "--set", "DATA.DEADLINE_S=1"]) == 1
    said = capsys.readouterr().out
    assert f"test{hung}: error: took more than 1 s (DATA.DEADLINE_S); its decoder was stopped\n" in said
    assert "1 could not be read" in said
