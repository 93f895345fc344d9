"""The console command and ``python -m stvit_video``: what they list, and that they run every command."""

import subprocess
import sys
import time
from importlib import import_module

import pytest

from stvit_video import __main__ as console
from stvit_video import __version__
from tests.conftest import REPOSITORY

COMMANDS = {
    "benchmark", "check-videos", "compare", "export", "extract", "predict", "report", "run", "slurm", "tradeoff",
    "visualize",
}  # fmt: skip


def test_every_command_is_listed_with_what_it_does() -> None:
    lines = [line.split(maxsplit=1) for line in console.describe_commands().splitlines() if line.startswith("  ")]
    assert {name for name, _ in lines} >= COMMANDS
    for name, about in lines:
        module = import_module(f"stvit_video.{console.find_commands()[name]}")
        assert module.__doc__.startswith(about)
        assert 10 < len(about) < 80
        assert callable(module.main)


def test_the_list_needs_no_torch_and_little_time() -> None:
    """The limit is for a machine that does other things too; alone it is a tenth of a second."""
    check = "import sys; from stvit_video.__main__ import main; main([]); print(sorted(sys.modules))"
    started = time.perf_counter()
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    taken = time.perf_counter() - started
    assert not {"torch", "numpy", "fvcore", "yaml"} & set(found.stdout.split("['")[1].split("', '"))
    assert taken < 2


@pytest.mark.parametrize("name", sorted(COMMANDS))
@pytest.mark.parametrize(
    ("program", "prefix"),
    [("/bin/stvit-video", "stvit-video"), ("/s/stvit_video/__main__.py", "python -m stvit_video")],
)
def test_help_says_how_the_command_was_called(
    name: str, program: str, prefix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [program])
    with pytest.raises(SystemExit) as left:
        console.main([name, "--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: {prefix} {name} ")
    assert "python -m stvit_video." not in said
    assert "slurm/submit.py" not in said


def test_a_wrong_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.main(["predikt", "x.mp4"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: predikt is no command; give one of benchmark, check-videos,")
    assert said.endswith(" Did you mean predict?\n")
    assert console.main(["check_videos"]) == 2  # as its module is named
    assert "the following arguments are required: LIST, --output" in capsys.readouterr().err
    assert console.main(["--version"]) == 0
    assert capsys.readouterr().out == f"stvit_video {__version__}\n"
