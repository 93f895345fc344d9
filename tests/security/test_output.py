"""Where commands print: a reader that goes away, a full disk and closed outputs."""

import subprocess
import sys

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
