"""The versions that setup.cfg allows: the least are known and tested, and private parts of a library are bounded."""

import ast
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path

import av
import pytest
from packaging.version import Version

from tests.conftest import REPOSITORY
from tests.minima import constraints, least, requirements

PATCHED_FFMPEG = Version("8.1.2")  # without CVE-2026-8461
# What the package uses though its library calls it private, by library.
PRIVATE = {
    "python": {"_asdict", "_exit", "_option_string_actions", "_replace"},
    "submitit": {"_make_submission_file_text", "_parse_node_list", "_requeue", "_submitit_command_str"},
    "torch": {
        *("_adaptive_avg_pool3d", "_dynamo", "_foreach_lerp_", "_has_any_global_hook", "_modules", "_pytree"),
        *("_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks"),
    },
    "torchvision": {"_functional_tensor"},
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name.strip("_") != ""


def names_in(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield the private names in a file, and whether it defines them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        found: list[tuple[str, bool]] = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found = [(node.name, True)]
        elif isinstance(node, ast.Attribute | ast.Name):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
            found = [(name, isinstance(node.ctx, ast.Store))]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            parts = [*module.split("."), *chain(*(alias.name.split(".") for alias in node.names))]
            found = [(part, False) for part in parts if part != "__future__"]
        yield from ((name, is_own) for name, is_own in found if is_private(name))


def test_every_requirement_has_a_least_version_and_the_constraints_are_those() -> None:
    assert len(requirements()) > 25
    least_versions = {one.name: least(one) for one in requirements()}
    lines = [line.partition(";")[0].strip() for line in constraints()]
    assert sorted(lines) == sorted(f"{name}=={number}" for name, number in least_versions.items())
    assert "tests/minima.py" in (REPOSITORY / "tests" / "torch_versions.sh").read_text()


def test_private_parts_of_libraries_are_known_and_their_versions_bounded_above() -> None:
    names = {name for file in (REPOSITORY / "stvit_video").rglob("*.py") for name in names_in(file)}
    own = {name for name, is_own in names if is_own}
    # A new one: find a public way, or name it above and bound its library in setup.cfg.
    assert {name for name, _ in names} - own == set().union(*PRIVATE.values())
    bounded = {one.name for one in requirements() if any(bound.operator == "<" for bound in one.specifier)}
    assert PRIVATE.keys() - {"python"} <= bounded


@pytest.mark.parametrize("requirement", requirements(), ids=lambda one: one.name)
def test_what_is_installed_is_what_is_allowed(requirement: object) -> None:
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        pytest.skip(f"{requirement.name} is not installed")
    assert requirement.specifier.contains(installed, prereleases=True)


def test_ffmpeg_of_the_least_pyav_is_patched() -> None:
    """The wheels of PyAV bring it; 18.0 is the first with this version."""
    assert Version(av.ffmpeg_version_info.split("-")[0].lstrip("n")) >= PATCHED_FFMPEG
    assert min(Version(least(one)) for one in requirements() if one.name == "av") >= Version("18.0")
