"""Extraction of features as a job: the files are those of one process."""

import subprocess
import sys
from pathlib import Path

import pytest

from stvit_video import extract
from stvit_video.slurm.cli import main
from tests.conftest import REPOSITORY


def words_for(small_set: Path, trained: Path, output: str) -> list[str]:
    return [str(small_set / "videos"), "--checkpoint", str(trained), "--output", output, "--set", "TEST.CLIPS=1"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


@pytest.fixture(scope="module")
def alone(small_set: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The features that one process writes."""
    output = tmp_path_factory.mktemp("alone") / "features"
    assert extract.main(words_for(small_set, trained, str(output))) == 0
    return output


def test_a_local_job_writes_the_files_of_one_process(
    small_set: Path, trained: Path, alone: Path, tmp_path: Path
) -> None:
    sizes = ["--cluster", "local", "--gpus-per-node", "0", "--tasks-per-node", "2", "--wait"]
    command = [sys.executable, str(REPOSITORY / "slurm" / "submit.py"), "extract", *sizes, "--"]
    command += words_for(small_set, trained, "features")  # below the folder of the command
    with open(tmp_path / "said", "w") as said:  # a pipe would be read until the job has ended
        subprocess.run(command, check=True, cwd=tmp_path, stdout=said, stderr=said, timeout=300)
    assert f"features in {tmp_path / 'features'}" in (tmp_path / "said").read_text()
    assert contents(tmp_path / "features") == contents(alone)
    assert len(contents(alone)) > 10
    assert (tmp_path / "features" / "index.csv").read_bytes() == (alone / "index.csv").read_bytes()


def test_what_a_submission_says_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["a.mp4", "--checkpoint", "run", "--output", str(tmp_path / "features")]
    assert main(["extract", "--nodes", "3", "--gpus-per-node", "2", "--dry-run", "--", *words]) == 0
    said = capsys.readouterr().out
    assert "#SBATCH --job-name=stvit-extract-features" in said
    assert "#SBATCH --nodes=3" in said
    assert "6 GPU(s)" in said
    for given, line in (
        (["--gpus-per-node", "0"], "-- VIDEO... is missing"),
        (["--gpus-per-node", "0", "--", "a.mp4"], "--checkpoint, --output"),
        (["--", *words], "--gpus-per-node is missing"),
    ):
        assert main(["extract", *given]) == 2
        error = capsys.readouterr().err
        assert line in error
        assert error.count("\n") == 1
