"""What this process may use of its machine or container: memory, cores, open files; and what other processes took."""

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from stvit_video.common.errors import UsageError

CGROUPS = Path("/sys/fs/cgroup")
STATES = {
    "D": ", waiting for a disk or a network file system (state D)",
    "T": ", being stopped (state T; SIGCONT continues it)",
}


def _cgroup_values(controller: str, *names: str) -> Iterator[str]:
    """Yield what the files called one of ``names`` hold in this process's control group and the groups around it."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controller not in (controllers or controller).split(","):
                continue
            root = CGROUPS / controllers  # version 2 has no controllers here, and one tree for all
            # In a container, the path may be that on the host, and the root the container's own group.
            folder = root / group.lstrip("/")
            for place in (folder, *folder.parents):
                for name in names:
                    with suppress(OSError):
                        yield (place / name).read_text().strip()
                if place == root:
                    break


def memory_limit() -> tuple[int, str]:
    """Return how many bytes this process and its children may use, and what sets this limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = _cgroup_values("memory", "memory.max", "memory.limit_in_bytes")
    limits = [int(value) for value in found if value.isdecimal()]
    least = min(limits, default=total)
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if 0 < space < min(least, total):
        return space, "ulimit -v"
    return (least, "the container") if least < total else (total, "the machine")


def describe_memory() -> str:
    """Return a clause for errors about memory: what there is, and what this process uses of it."""
    limit, owner = memory_limit()
    used = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"this process took up to {used / 1e9:.2f} GB, and {owner} gives {limit / 1e9:.2f} GB in all"


def usable_cores() -> int:
    """Return how many cores this process may keep busy."""
    cores = float(len(os.sched_getaffinity(0)))
    for value in _cgroup_values("cpu", "cpu.max"):
        quota, _, period = value.partition(" ")
        if quota.isdecimal():
            cores = min(cores, int(quota) / int(period))
    quotas, periods = (_cgroup_values("cpu", f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    for quota, period in zip(quotas, periods, strict=False):
        if quota.isdecimal():
            cores = min(cores, int(quota) / int(period))
    return max(1, round(cores))


def reserve_files(count: int, what: str, remedy: str) -> None:
    """Raise the limit of open files so that ``count`` more can be opened. Raises UsageError where it cannot be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        needed = len(os.listdir("/proc/self/fd")) + count
    except FileNotFoundError:  # no /proc: more than a command has open
        needed = 64 + count
    if needed <= soft or soft == resource.RLIM_INFINITY:
        return
    try:  # only root may raise the hard limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, needed if 0 <= hard < needed else hard))
    except (ValueError, OSError):
        raise UsageError(
            f"{what} takes up to {needed} open files, and this process may have {hard}; raise the limit (ulimit -n "
            f"{needed}){remedy}."
        ) from None


def largest_child() -> int:
    """Return the most bytes that any ended child of this process has used."""
    return 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def offer_to_oom_killer(score: int = 500) -> None:
    """Have Linux end this process, and not its parent, where memory runs out: the parent can say so and save."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(score))


def describe_state(process: int) -> str:
    """Return why a process does nothing, as far as the system says it; else nothing."""
    with suppress(OSError):
        return STATES.get(Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][:1], "")
    return ""
