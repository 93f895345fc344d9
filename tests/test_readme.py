"""The README's commands and its Python, as printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import timm
import torch

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


def test_its_python_runs(tmp_path: Path) -> None:
    (code,) = blocks("python")
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
