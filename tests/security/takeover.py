"""What code that has taken over the decoding process would try. The process imports it: keep imports light."""

import contextlib
import os
import resource
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def attempt(action: Callable[[], object]) -> str:
    try:
        action()
    except Exception as error:
        return type(error).__name__
    return "done"


def misbehave(path: str, cache: Any) -> dict[str, str]:
    """Try, in the child, what code that has taken it over would."""
    parent = os.getppid()
    file = f"{os.path.dirname(path)}/planted"
    return {
        "network": attempt(lambda: socket.create_connection(("127.0.0.1", 9), timeout=1)),
        "datagram": attempt(lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)),
        "program": attempt(lambda: subprocess.run(["true"], check=True)),
        "write": attempt(lambda: Path(file).write_text("")),
        "cut": attempt(lambda: os.truncate(path, 0)),
        "remove": attempt(lambda: os.remove(path)),
        "secrets": attempt(lambda: Path(f"/proc/{parent}/environ").read_bytes()),
        "stop": attempt(lambda: os.kill(parent, 0)),
        "index": attempt(lambda: (cache.folder / "a.safetensors").write_text("")),
        "read": attempt(lambda: Path(path).read_bytes()),
        "many files": attempt(lambda: [os.open(path, os.O_RDONLY) for _ in range(1000)]),
    }


def read_limits(path: str, cache: Any) -> list[int]:
    return [resource.getrlimit(kind)[1] for kind in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE)]


class TakesAllMemory:
    def __call__(self, video: object) -> Any:
        return np.zeros(2**42, np.uint8)


class LacksFiles:
    def __call__(self, video: object) -> Any:
        raise OSError(24, "Too many open files")


class Fails:
    def __call__(self, video: object) -> Any:
        raise RuntimeError("first line\nsecond line")


class Speaking:
    """Sends a message of its own from the child, as code that has taken it over could."""

    def __init__(self, content: bytes, hole: int = 0) -> None:
        self.content, self.hole = content, hole

    def __call__(self, path: str, cache: Any) -> None:
        answers = cache.progress.args[0]
        for name in os.listdir("/proc/self/fd") if self.hole else ():
            with contextlib.suppress(OSError):
                if "memfd:" in os.readlink(f"/proc/self/fd/{name}"):
                    os.ftruncate(int(name), self.hole)
        answers.send(self.content)
