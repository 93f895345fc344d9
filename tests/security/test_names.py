"""Names of files, classes and runs that would be commands of a terminal, a page or a table."""

import io
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from stvit_video.common.cli import run_command
from stvit_video.common.errors import RunFailure, UsageError
from stvit_video.common.tables import format_table
from stvit_video.predict import main as predict

CLEAR = "\x1b[2J\x9b31m\x07\u202e\udcff\r\x00"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "iso-8859-1"])
def test_output_commands_no_terminal(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)

    def command(arguments: Sequence[str] | None) -> int:
        print(f"a{CLEAR}b…\tc\n日", flush=True)
        print("\rbar 50 %", end="", file=sys.stderr)
        raise UsageError(f"file a\n{CLEAR} is none")

    assert run_command(command) == 2
    assert run_command(lambda _: (_ for _ in ()).throw(RunFailure(CLEAR))) == 1
    printed, said = (stream.buffer.getvalue().decode(encoding) for stream in streams.values())  # type: ignore[attr-defined]
    escaped = r"\x1b[2J\x9b31m\x07\u202e\udcff\r\x00"
    assert printed.startswith(f"a{escaped}b")
    assert (printed.count("\n"), printed.count("\tc")) == (2, 1)
    assert said == f"\rbar 50 %error: file a\\n{escaped} is none\nerror: {escaped}\n"


def test_a_missing_file_is_named_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(["--checkpoint", f"{tmp_path}/a\n{CLEAR.strip(chr(0))}.safetensors", "video.mp4"]) == 2
    said = capsys.readouterr().err
    assert (said.count("\n"), said.count("\x1b"), said.count("\\n\\x1b[2J")) == (1, 0, 1)


def test_a_cell_of_a_table_is_one_line() -> None:
    assert format_table(["name", "n"], [["a\x1b[2J\nb | 99", 1]]).splitlines()[1:] == [r"a\x1b[2J\nb | 99  1"]
