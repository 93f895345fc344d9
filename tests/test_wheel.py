"""The wheel: what it holds, and that it runs the README's first job away from the repository."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.long


def run(*words: str, cwd: Path, path: Path | None = None) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    result = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the package, built outside the repository, where a build would leave files."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(
        REPOSITORY / "stvit_video", folder / "source" / "stvit_video", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder / "source" / name)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), "./source", cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_it_holds_the_package_its_types_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [archive.read(name).decode() for name in names if name.endswith("/METADATA")]
        (entry_points,) = [archive.read(name).decode() for name in names if name.endswith("/entry_points.txt")]
    found = [path for path in (REPOSITORY / "stvit_video").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    files = {path.relative_to(REPOSITORY).as_posix() for path in found}
    assert any(name.endswith(".html") for name in files)  # the pages' templates are no modules
    assert files <= set(names)
    assert "stvit_video/py.typed" in names
    assert {name.split("/")[0] for name in names} <= {"stvit_video", metadata_folder(names)}
    assert "Provides-Extra: export" in metadata
    assert "stvit-video = stvit_video.__main__:main" in entry_points


def test_what_it_imports_it_requires(wheel: Path) -> None:
    """Imports at the top of modules only: what is optional is imported where it is used."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA")]
    required = {re.split(r"[^\w.-]", line.split(": ")[1])[0].lower() for line in metadata.splitlines()
                if line.startswith("Requires-Dist: ") and "extra ==" not in line}  # fmt: skip
    providers = packages_distributions()
    for path in (REPOSITORY / "stvit_video").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in {name.split(".")[0] for name in names} - {"stvit_video", *sys.stdlib_module_names}:
                assert required & {provider.lower() for provider in providers[name]}, f"{name} in {path}"


@pytest.mark.slow
def test_in_an_empty_environment_it_brings_all_that_it_needs(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", str(tmp_path / "venv"), cwd=tmp_path)
    python = str(tmp_path / "venv" / "bin" / "python")
    run(python, "-m", "pip", "--disable-pip-version-check", "install", "-q", str(wheel), cwd=tmp_path)
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    small = ["DATA.GENERATE_CLIPS", "[16,8,8]", "TRAIN.EPOCHS", "1", "TRAIN.BATCH_SIZE", "8"]
    run(python, "-m", "stvit_video.run", "--cfg", "configs/sample_stvit.yaml", *small, cwd=tmp_path)
    run(python, "-m", "stvit_video.report", "runs/sample_stvit", cwd=tmp_path)
    assert (tmp_path / "report.html").is_file()


def metadata_folder(names: list[str]) -> str:
    (folder,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    return folder


def test_installed_it_runs_the_first_job_and_predicts(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "-q", "--no-deps", "--target", str(site), str(wheel), cwd=tmp_path)
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    python = (sys.executable, "-W", "ignore")
    where = run(*python, "-c", "import stvit_video; print(stvit_video.__file__)", cwd=tmp_path, path=site)
    assert Path(where.strip()).is_relative_to(site)
    small = ["DATA.GENERATE_CLIPS", "[16,8,8]", "TRAIN.EPOCHS", "1", "TRAIN.BATCH_SIZE", "8"]
    run(*python, "-m", "stvit_video.run", "--cfg", "configs/sample_stvit.yaml", *small, cwd=tmp_path, path=site)
    results = json.loads((tmp_path / "runs" / "sample_stvit" / "results.json").read_text())
    assert results["scored"] == 8
    words = ["data/sample/videos/test_00000.mp4", "--checkpoint", "runs/sample_stvit", "--output", "found.json"]
    run(*python, "-m", "stvit_video.predict", *words, cwd=tmp_path, path=site)
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert len(found["top"]) == 5
    run(*python, "-m", "stvit_video.report", "runs/sample_stvit", cwd=tmp_path, path=site)
    assert (tmp_path / "report.html").is_file()
