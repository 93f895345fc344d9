"""The README's commands and its Python, as printed."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision

from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_it_opens_with_exactly_two_complete_one_line_commands() -> None:
    complete = [block.strip() for block in blocks("bash") if block.startswith("python3 -m venv")]
    assert [block.count("\n") for block in complete] == [0, 0]
    assert complete == [block.strip() for block in blocks("bash")][:2]
    assert complete[0].endswith("-m stvit_video.run --cfg configs/sample_stvit.yaml")
    assert complete[1].endswith("-m pytest")


def test_every_file_it_names_exists() -> None:
    for name in re.findall(
        r"(?<!/)(?:configs|stvit_video)/[\w/]+\.(?:yaml|py)", README.replace("configs/NAME.yaml", "")
    ):
        assert (REPOSITORY / name).is_file(), name
    for name in re.findall(r"`(\w+\.py)`", README):
        assert list((REPOSITORY / "stvit_video").rglob(name)), name


def test_its_links_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert (REPOSITORY / link).is_file(), link


# What makes a command short, by what it names; nothing else of it is changed but where data lies.
SMALL = "DATA.SIZE 64 DATA.FRAMES 4 DATA.STRIDE 1 DATA.SHORT_SIDE [64,64] TEST.SHORT_SIDE 64 TEST.CLIPS 1 TEST.CROPS 1"
SHORT = {
    "configs/sample_": "DATA.GENERATE= TRAIN.MAX_STEPS 1 TRAIN.BATCH_SIZE 8 DATA.WORKERS 0",
    "stvit_video.benchmark loader": f"{SMALL} --clips 2 --rounds 1",
    "stvit_video.benchmark model": f"{SMALL} --largest-batch 1 --rounds 1",
    "stvit_video.run --cfg configs/k400_stvit": f"{SMALL} TRAIN.MAX_STEPS 1 TRAIN.BATCH_SIZE 1 DATA.WORKERS 0",
    "stvit_video.tradeoff": "--list",  # tests/test_tradeoff.py trains a plan
    "configs/finetune": "TRAIN.EPOCHS 1 DATA.WORKERS 0",
}


@pytest.fixture(scope="module")
def here(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with every file that the README assumes."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("configs", "slurm", "stvit_video", "hubconf.py"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "data").mkdir()
    (folder / "data" / "sample").symlink_to(small_set)
    (folder / "videos").mkdir()
    videos = sorted((small_set / "videos").glob("*.mp4"))
    for split, some in (("train", videos[:8]), ("val", videos[8:10]), ("test", videos[10:12])):
        lines = [f"{path} {i % 2}" for i, path in enumerate(some)]
        (folder / "videos" / f"{split}.csv").write_text("\n".join(lines) + "\n")
    for i, path in enumerate(videos[:12]):
        own = folder / "my_videos" / f"class {i % 2}" / path.name
        own.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, own)
    shutil.copy(videos[0], folder / "new.mp4")
    torch.save(torchvision.models.swin_t().state_dict(), folder / "swin_tiny.pth")
    for name in ("sample_stvit", "sample_full"):
        execute(f".venv/bin/python -m stvit_video.run --cfg configs/{name}.yaml", folder)
    return folder


def execute(line: str, folder: Path) -> None:
    """Run a line of the README in ``folder``, made short."""
    words = shlex.split(line.replace("/data/videos", str(folder / "videos")))
    assert words[0] == ".venv/bin/python", line
    extra = [word for name, found in SHORT.items() if name in line for word in found.split()]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", *words[1:], *extra],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, f"{line}\n{run.stdout}\n{run.stderr}"


@pytest.mark.long
def test_every_command_in_it_runs(here: Path) -> None:
    lines = [line for block in blocks("bash")[2:] for line in block.strip().splitlines()]
    assert len(lines) > 10
    for line in lines:
        execute(line, here)
    assert (here / "report.html").is_file()
    assert (here / "seen" / "report.html").is_file()
    code = next(block for block in blocks("python") if "Predictor" in block)
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=here, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("[(")


def test_its_python_runs(tmp_path: Path) -> None:
    code = next(block for block in blocks("python") if "create_model" in block)
    state = timm.create_model("deit_small_patch16_224").state_dict()
    torch.save({"model": state}, tmp_path / "deit_small_patch16_224.pth")
    clips = "import torch\nclips = torch.zeros(1, 3, 16, 224, 224)\n"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", clips + code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "timm ViT layout" in result.stdout
