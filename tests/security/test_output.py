"""Where commands print: a reader that goes away, a full disk and closed outputs."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import REPOSITORY

KEYS = f"{sys.executable} -m stvit_video.run --keys"


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


@pytest.mark.parametrize("option", ["--keys", "--help"])
def test_output_that_no_one_reads(option: str) -> None:
    read, write = os.pipe()
    os.close(read)
    # Without a buffer, argparse itself drops the help that it cannot write.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "stvit_video.run", option]
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
