"""The READMEs: their links, names, commands and Python.

Every command is parsed, and its configuration loaded. The tests marked ``long`` run them, shortened.
"""

import argparse
import importlib
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision

from stvit_video.config import load_config
from stvit_video.config.schema import BY_NAME
from stvit_video.models import create_model, load_pretrained
from tests.conftest import REPOSITORY

MAIN = REPOSITORY / "README.md"
FOLDERS = ("configs", "slurm", "stvit_video", "tests")
PAGES = [MAIN, *sorted(page for folder in FOLDERS for page in (REPOSITORY / folder).rglob("README.md"))]
PAGES = [page for page in PAGES if page.parent.name != "golden"]  # about files alone
OTHERS = PAGES[1:]
PYTHON = {".venv/bin/python", "python"}
# Programs that are not this package's: only that the files exist which they are given.
PROGRAMS = {"apt-get", "sudo", "tar", "python3", "source", "pip", "pytest", "ruff", "mypy", ".ci/run"}
TO_BE_MADE = ("configs/NAME.yaml", "slurm/profiles/mine.yaml")  # files that the reader makes
LARGEST_PICTURE = 300_000

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())


def blocks(page: Path, *languages: str) -> list[str]:
    """Return the code blocks of a page in these languages; those in a list lose its indentation."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, name, text in found if name in languages]


def commands(page: Path) -> list[str]:
    """Return the command lines of a page."""
    lines = [line for block in blocks(page, "bash", "") for line in block.splitlines() if line.strip()]
    return [line for line in lines if not line.startswith("#")]


def all_commands() -> list[Any]:
    """Return the parameters of a test that takes each command of each page."""
    return [
        pytest.param(line, id=f"{page.relative_to(REPOSITORY).parent}-{number}")
        for page in PAGES
        for number, line in enumerate(commands(page))
    ]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_main_readme_is_short() -> None:
    assert len(MAIN.read_text().splitlines()) <= 200


def test_main_readme_opens_with_two_complete_commands() -> None:
    complete = [line for line in commands(MAIN) if line.startswith("python3 -m venv")]
    assert complete == commands(MAIN)[:2]
    assert complete[0].endswith("-m stvit_video.run --cfg configs/sample_stvit.yaml")
    assert complete[1].endswith("-m pytest")


def test_main_readme_leads_to_every_other() -> None:
    found, open_pages = {MAIN}, [MAIN]
    while open_pages:
        page = open_pages.pop()
        for link in re.findall(r"\]\(([^)#:]+\.md)[^)]*\)", page.read_text()):
            target = (page.parent / link).resolve()
            if target not in found:
                found.add(target)
                open_pages.append(target)
    assert found >= set(PAGES)


@each_page
def test_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
        assert target.suffix not in (".png", ".gif") or target.stat().st_size <= LARGEST_PICTURE, link


@each_page
def test_named_files_exist(page: Path) -> None:
    text = page.read_text()
    for name in TO_BE_MADE:
        text = text.replace(name, "")
    for name in re.findall(r"(?<![\w/.])(?:configs|stvit_video|slurm|tests)/[\w/]+\.(?:yaml|py|sh|md)", text):
        inside = "stvit_video/" if page.is_relative_to(REPOSITORY / "stvit_video") else ""
        assert (REPOSITORY / name).is_file() or (REPOSITORY / inside / name).is_file(), name
    for name in re.findall(r"`(?:[\w/]+/)?(\w+\.py)`", text):
        assert list(REPOSITORY.glob(f"*/**/{name}")), name


def test_map_of_the_package_is_complete() -> None:
    rooms = re.findall(r"^\| `(\w+)/` \|", MAIN.read_text(), re.MULTILINE)
    assert sorted(rooms) == sorted(folder.parent.name for folder in (REPOSITORY / "stvit_video").glob("*/__init__.py"))


@each_page
def test_named_keys_exist(page: Path) -> None:
    keys = set(BY_NAME)
    sections = "|".join(sorted({key.split(".")[0] for key in keys if "." in key}))
    for name in re.findall(rf"\b(?:{sections})\.[A-Z][A-Z_]+\b", page.read_text()):
        assert name in keys, name


class Parsed(BaseException):
    """Raised in place of running a command, with its options."""


@pytest.mark.parametrize("line", all_commands())
def test_command_parses(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command accepts its options, and its configuration with these overrides is valid."""
    monkeypatch.chdir(REPOSITORY)
    words = shlex.split(line.rpartition("&&")[2], comments=True)
    while "=" in words[0]:  # variables of the environment
        words = words[1:]
    for word in words:
        assert not word.endswith(".yaml") or word in TO_BE_MADE or Path(word).is_file(), word
    if words[1:2] == ["slurm/submit.py"]:
        check_submission(words[2:], monkeypatch)
    elif words[0] in PYTHON | {".venv/bin/torchrun"} and words[words.index("-m") + 1].startswith("stvit_video."):
        place = words.index("-m") + 1
        check_command(words[place], words[place + 1 :], monkeypatch)
    else:
        script = words[0].endswith(".sh") and Path(words[0]).is_file()
        assert script or words[0] in PROGRAMS or words[1:3] == ["-m", "pytest"], line


def parse(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Return the options that the ``main`` of a module reads from words, before it does anything with them."""

    def parse_only(original: Callable[..., argparse.Namespace]) -> Callable[..., None]:
        def replacement(*arguments: Any) -> None:
            raise Parsed(original(*arguments))

        return replacement

    with monkeypatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, parse_only(getattr(argparse.ArgumentParser, name)))
        with pytest.raises(Parsed) as parsed:
            importlib.import_module(module).main(words)
    return parsed.value.args[0]


def check_command(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = parse(module, words, monkeypatch)
    configs = [word for option, word in pairwise(words) if option == "--cfg"]
    for config in configs:
        load_config(config, getattr(options, "overrides", ()))


def check_submission(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[0] in ("status", "logs", "cancel", "resume"):
        parse("stvit_video.slurm.cli", words, monkeypatch)
    else:
        dry = words if "--dry-run" in words else [*words, "--dry-run"]
        assert importlib.import_module("stvit_video.slurm.cli").main(dry) == 0


# What makes a command short, by what it names; nothing else of it is changed but where data lies.
SMALL = "DATA.SIZE 64 DATA.FRAMES 4 DATA.STRIDE 1 DATA.SHORT_SIDE [64,64] TEST.SHORT_SIDE 64 TEST.CLIPS 1 TEST.CROPS 1"
SHORT = {
    "run --cfg configs/sample_": "DATA.GENERATE= TRAIN.MAX_STEPS 1 TRAIN.BATCH_SIZE 8 DATA.WORKERS 0",
    "benchmark loader": f"{SMALL} --clips 2 --rounds 1",
    "benchmark model": f"{SMALL} --largest-batch 1 --rounds 1",
    "benchmark e2e": "DATA.GENERATE= TRAIN.BATCH_SIZE 2 TEST.BATCH_SIZE 1 --clips 2 --rounds 1",
    "benchmark stream": f"{SMALL} --rounds 1",
    "benchmark engine": "DATA.GENERATE= TRAIN.BATCH_SIZE 8 --steps 1 --rounds 1",
    "run --cfg configs/k400_": f"{SMALL} TRAIN.MAX_STEPS 1 TRAIN.BATCH_SIZE 1 DATA.WORKERS 0",
    "run --cfg configs/ssv2_": f"{SMALL} TRAIN.MAX_STEPS 1 TRAIN.BATCH_SIZE 1 DATA.WORKERS 0",
    "tradeoff": "--list",  # tests/test_tradeoff.py trains a plan
    "configs/finetune": "TRAIN.EPOCHS 1 DATA.WORKERS 0",
}


@pytest.fixture(scope="module")
def here(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with everything that the README's reader is said to have, and the runs that the pages name."""
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
    for name in ("new.mp4", "long.mp4"):
        shutil.copy(videos[0], folder / name)
    execute(commands(MAIN)[0].rpartition("&& ")[2], folder)
    execute(".venv/bin/python -m stvit_video.run --cfg configs/sample_full.yaml", folder)
    return folder


def execute(line: str, folder: Path) -> None:
    """Run a command in ``folder``, shortened."""
    words = shlex.split(line.replace("/data/videos", str(folder / "videos")))
    assert words[0] in PYTHON, line
    assert words[1] == "-m", line
    extra = [word for name, found in SHORT.items() if f"stvit_video.{name}" in line for word in found.split()]
    if "configs/finetune" in line:
        extra = SHORT["configs/finetune"].split()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert importlib.import_module(words[2]).main([*words[3:], *extra]) == 0, line


@pytest.mark.long
def test_commands_of_the_main_readme_run(here: Path) -> None:
    lines = commands(MAIN)[2:]
    assert len(lines) >= 5
    for line in lines:
        execute(line, here)
    assert (here / "report.html").is_file()
    assert (here / "seen" / "report.html").is_file()


@pytest.mark.long
def test_commands_of_the_other_pages_run(here: Path) -> None:
    torch.save(torchvision.models.swin_t().state_dict(), here / "swin_tiny.pth")
    own = [line for page in OTHERS for line in commands(page) if line.startswith(".venv/bin/python -m stvit_video")]
    lines = [line for line in dict.fromkeys(own) if line not in commands(MAIN) and "data.sample" not in line]
    assert len(lines) > 15
    for line in lines:
        execute(line, here)


@each_page
def test_python_compiles(page: Path) -> None:
    for code in blocks(page, "python"):
        compile(code, str(page), "exec")


def run_python(page: Path, word: str, folder: Path, **names: object) -> dict[str, Any]:
    """Run the page's first block of Python that has a word; return what it defines."""
    code = next(code for code in blocks(page, "python") if word in code)
    script = folder / f"{word}.py"
    script.write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return runpy.run_path(str(script), names)


@pytest.mark.parametrize("page", [MAIN, REPOSITORY / "stvit_video" / "models" / "README.md"], ids=["main", "models"])
def test_python_that_loads_weights_runs(page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = timm.create_model("deit_small_patch16_224").state_dict()
    torch.save({"model": state}, tmp_path / "deit_small_patch16_224.pth")
    found = run_python(page, "create_model", tmp_path, clips=torch.zeros(1, 3, 16, 224, 224))
    assert found["logits"].shape == (1, 400)
    assert found["seen"].assignment.ndim == 3
    assert "timm ViT layout" in capsys.readouterr().out


def test_python_of_streams_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chunks = torch.randn(2, 3, 20, 224, 224).split([14, 4, 2], dim=2)
    found = run_python(REPOSITORY / "stvit_video" / "models" / "README.md", "stream.push", tmp_path, chunks=chunks)
    assert found["logits"].shape == (2, 1, 400)
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize("page", [MAIN, REPOSITORY / "stvit_video" / "inference" / "README.md"], ids=["main", "own"])
def test_python_that_predicts_runs(page: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_python(page, "Predictor", here)
    assert capsys.readouterr().out.startswith("[(")


def test_python_with_opencv_runs(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = [np.full((72, 96, 3), (0, 128, 255), np.uint8)] * 130  # BGR
    reads = iter([(True, picture) for picture in shown])
    capture = SimpleNamespace(read=lambda: next(reads, (False, None)), get=lambda key: 25.0)
    names = {"COLOR_BGR2RGB": 4, "CAP_PROP_FPS": 5, "cvtColor": lambda picture, code: picture[..., ::-1]}
    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(VideoCapture=lambda source: capture, **names))
    found = run_python(REPOSITORY / "stvit_video" / "inference" / "README.md", "cv2", here)
    assert capsys.readouterr().out.count("[(") == 2
    assert len(found["frames"]) == 2
    assert found["frames"][0][0, 0].tolist() == [255, 128, 0]


def test_python_of_torch_hub_runs(here: Path) -> None:
    found = run_python(REPOSITORY / "stvit_video" / "inference" / "README.md", "torch.hub", here)
    assert found["predictor"](here / "new.mp4").top(1)


def test_the_example_of_adapters_gives_weights_that_load(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    sizes = {"num_frames": 4, "image_size": 64, "num_classes": 3}
    model, clips = create_model("stvit_vit_tiny_patch16", **sizes), torch.zeros(2, 3, 4, 64, 64)
    given = {"model": model, "clips": clips, "labels": torch.tensor([0, 2])}
    run_python(REPOSITORY / "stvit_video" / "models" / "README.md", "LoraConfig", tmp_path, **given)
    assert load_pretrained(create_model("stvit_vit_tiny_patch16", **sizes), tmp_path / "tuned.pth").coverage == 1


def test_the_example_of_a_reducer_works_in_a_model(tmp_path: Path) -> None:
    found = run_python(REPOSITORY / "stvit_video" / "models" / "README.md", "FirstTokens", tmp_path)
    model = create_model("stvit_vit_tiny_patch16", num_frames=4, image_size=64, num_classes=3, reducer="random")
    model.reducer = found["FirstTokens"](model.reducer.grid, (2, 2, 2))
    assert model(torch.zeros(1, 3, 4, 64, 64)).shape == (1, 3)
