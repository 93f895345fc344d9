"""Where commands print: a reader that goes away, a full disk and closed outputs."""

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
        (f"{KEYS} | true", 141, ""),
        (f"{sys.executable} -m stvit_video.run --help | true", 141, ""),
        (f"{KEYS} > /dev/full", 2, "error: standard output cannot be written (No space left on device); send it"),
        (f"{KEYS} >&-", 0, ""),
        (f"{sys.executable} -m stvit_video.run --what 2>&-", 2, ""),
        (f"{sys.executable} -m stvit_video.run --what 2>/dev/full", 2, ""),
    ],
)
def test_output_that_cannot_be_written(line: str, code: int, said: str) -> None:
    line = (
        f"unset PYTHONUNBUFFERED; {line}; exit ${{PIPESTATUS[0]}}"  # without a buffer, argparse drops its help itself
    )
    done = subprocess.run(["bash", "-c", line], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stderr[: len(said) or None]) == (code, said)
    assert done.stderr.count("\n") == bool(said)


def test_ctrl_c_has_no_traceback_at_any_moment() -> None:
    for seconds in (0.03, 0.06, 0.1, 0.2, 0.4):
        command = [sys.executable, "-m", "stvit_video.predict", "--checkpoint", "missing", "."]
        process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        said = process.communicate()[1]
        assert "Traceback" not in said or "stvit_video/" not in said  # Python's own start is not ours
