"""Where commands print: a reader that goes away, a full disk and closed outputs."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

KEYS = f"{sys.executable} -m stvit_video.run --keys"
# A program whose command is a line of Python.
COMMAND = """import os, signal, sys
from stvit_video.common.cli import run_command
raise SystemExit(run_command(lambda _: %s or 0))"""
NOTE = "print('a note', file=sys.stderr)"


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (f"{KEYS} > /dev/full", 2, "error: standard output cannot be written (No space left on device); send it"),
        (f"{KEYS} >&-", 0, ""),
        (f"{sys.executable} -m stvit_video.run --what 2>&-", 2, ""),
        (f"{sys.executable} -m stvit_video.run --what 2>/dev/full", 2, ""),
    ],
)
def test_output_that_cannot_be_written(line: str, code: int, said: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f"unset PYTHONUNBUFFERED; {line}"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr[: len(said) or None]) == (code, said)
    assert done.stderr.count("\n") == bool(said)


@pytest.mark.parametrize("closed", ["<&-", "<&- >&- 2>&-"])
def test_closed_and_full_streams_change_no_result(closed: str, trained: Path, small_set: Path, tmp_path: Path) -> None:
    video = small_set / "videos" / "test_00000.mp4"
    command = f"{sys.executable} -m stvit_video.predict {video} --checkpoint {trained} --output {tmp_path}/a.json"
    assert subprocess.run(["bash", "-c", f"{command} {closed}"], cwd=REPOSITORY).returncode == 0
    assert [row["error"] for row in json.loads((tmp_path / "a.json").read_text())] == [None]


def test_standard_input_that_is_closed_is_no_video(trained: Path) -> None:
    line = f"{sys.executable} -m stvit_video.predict - --checkpoint {trained} <&-"
    done = subprocess.run(["bash", "-c", line], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: - is standard input, which is closed; pipe a video in.\n")


@pytest.mark.parametrize("flush", ["", " or sys.stderr.flush()"])
def test_a_note_that_cannot_be_written_ends_nothing(flush: str) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", COMMAND % f"{NOTE}{flush} or {NOTE} or print('done')"]
        done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=full, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n")


@pytest.mark.parametrize("option", ["--keys", "--help"])
@pytest.mark.parametrize("buffer", ["", "-u"])
def test_output_that_no_one_reads(option: str, buffer: str) -> None:
    read, write = os.pipe()
    os.close(read)
    # Without a buffer, argparse itself drops the help that it cannot write.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, *buffer.split(), "-m", "stvit_video.run", option]
    done = subprocess.run(command, cwd=REPOSITORY, env=env, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_ctrl_c_before_the_command_begins_has_no_traceback() -> None:
    for seconds in (0.02, 0.04, 0.06, 0.08, 0.1):
        command = [sys.executable, "-m", "stvit_video.predict", "--checkpoint", "missing", "."]
        process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        said = process.communicate()[1]
        assert "Traceback" not in said or "stvit_video/" not in said  # Python's own start is not ours


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_command_that_a_signal_ends_says_so_in_one_line(number: str, code: int) -> None:
    command = [sys.executable, "-c", COMMAND % f"os.kill(os.getpid(), signal.{number})"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "stopped\n")


def test_the_line_begins_after_what_a_terminal_shows_of_ctrl_c() -> None:
    ours, its = pty.openpty()
    command = [sys.executable, "-c", COMMAND % "os.kill(os.getpid(), signal.SIGINT)"]
    assert subprocess.run(command, cwd=REPOSITORY, stderr=its).returncode == 130
    assert os.read(ours, 100) == b"\r\nstopped\r\n"
    os.close(ours)
    os.close(its)
