"""The environment that figures were measured in: command, versions, machine, source."""

import contextlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "torchvision", "pytorchvideo", "decord", "decord2", "av", "fvcore", "numpy", "submitit")


def environment() -> dict[str, Any]:
    """Return the command, the versions of packages, the machine, and the state of the source."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "command": [sys.executable, *sys.orig_argv[1:]],
        "python": platform.python_version(),
        "packages": versions,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "git": _git_state(),
    }


def _git_state() -> dict[str, Any] | None:
    """Return commit and cleanliness of the checkout this package runs from, None where it is not one."""
    queries = (("rev-parse", "HEAD"), ("status", "--porcelain"))
    options: dict[str, Any] = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "timeout": 10}
    try:
        commit, status = (subprocess.run(["git", *query], **options) for query in queries)
    except (OSError, subprocess.TimeoutExpired):
        return None
    changed = len(status.stdout.splitlines())
    return None if commit.returncode else {"commit": commit.stdout.strip(), "changed_files": changed}
