"""A real SLURM of virtual nodes for the tests, and quick runs that can be paused at a step."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.conftest import REPOSITORY

SCRIPT = REPOSITORY / "slurm" / "local_cluster.sh"
SUBMIT = REPOSITORY / "slurm" / "submit.py"
# Dropout, augmentation and mixing show a step that is repeated or left out; four steps per epoch.
SETTINGS = [
    *("TRAIN.BATCH_SIZE", "8", "TRAIN.EPOCHS", "3", "TRAIN.VAL_EVERY", "3", "DEVICE", "cpu", "DATA.GENERATE", ""),
    *("DATA.WORKERS", "0", "MODEL.DROPOUT", "0.2", "MODEL.DROP_PATH", "0.2", "DATA.ERASE", "0.3"),
    *("TRAIN.MIXUP", "0.8", "CHECKPOINT.EVERY_STEPS", "1", "PARALLEL.TIMEOUT_S", "60"),
]


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 90) -> None:
    """Return as soon as ``condition`` holds; fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def processes(*words: str) -> list[int]:
    """Return the processes with all ``words`` in their command line, also inside virtual nodes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if all(word in line for word in words):
            found.append(int(path.parent.name))
    return found


def settings(small_set: Path, output: Path, *extra: str) -> list[str]:
    """Return the KEY VALUE words of a run of 12 steps."""
    return ["DATA.ROOT", str(small_set), *SETTINGS, "OUTPUT_DIR", str(output), *extra]


CONFIG = ["--cfg", str(REPOSITORY / "configs" / "sample_stvit.yaml")]


class Cluster:
    """The cluster in a folder. All waits are bounded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SUBMITIT"))}
        self.env = {
            **kept,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "SLURM_CONF": str(folder / "slurm.conf"),
        }

    def script(self, verb: str, **settings: str) -> subprocess.CompletedProcess[str]:
        command = [str(SCRIPT), verb, str(self.folder)]
        return subprocess.run(command, env={**self.env, **settings}, capture_output=True, text=True, timeout=90)

    def __call__(self, *command: str, seconds: float = 60) -> str:
        """Run a client and return its output."""
        found = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=seconds)
        assert found.returncode == 0, f"{command}: {found.stderr}"
        return found.stdout.strip()

    def start(self, *words: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """Start slurm/submit.py."""
        command = [sys.executable, str(SUBMIT), *words]
        return subprocess.Popen(
            command, env={**self.env, **(env or {})}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def submit(self, *words: str, seconds: float = 180, env: dict[str, str] | None = None) -> tuple[int, str]:
        """Run slurm/submit.py; return its exit code and its output."""
        process = self.start(*words, env=env)
        try:
            return finish(process, seconds)
        finally:
            process.kill()

    def state(self, job: str) -> str:
        return self("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}")

    def slurmd(self, node: str) -> int:
        """Return the pid of a node's slurmd."""
        found = processes("slurmd -D", str(self.folder), f"-N {node}")
        names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in found}
        return next(pid for pid, name in names.items() if name == "slurmd")

    def inside(self, node: str, *command: str) -> str:
        """Run a command in the mount namespace of a node."""
        return self("nsenter", "--mount", "--target", str(self.slurmd(node)), *command)


def finish(process: subprocess.Popen[str], seconds: float = 180) -> tuple[int, str]:
    said, _ = process.communicate(timeout=seconds)
    return process.returncode, said


def hold(output: Path, step: int) -> list[int]:
    """Pause the training processes of a run after a step; return them."""
    checkpoints = output / "checkpoints"
    wait_until(lambda: any(int(p.stem[5:]) >= step for p in checkpoints.glob("step_*.pt")), f"step {step} of {output}")
    pids = processes("-m stvit_video.run", str(output))
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    return pids


def let_go(pids: Sequence[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            continue


def why_not() -> str:
    """Return why no cluster can be started here, empty where it can."""
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} absent: apt-get install slurmctld slurmd slurm-client munge"
    return "" if os.getuid() == 0 else "virtual nodes need root"
