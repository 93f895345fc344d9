"""What a process that reads other people's files gives up, by means of Linux that need no rights and no library.

Native decoders have had holes through which a file took over the process. What such a process cannot do any more,
whatever code it runs: open network connections, start programs, look into other processes, write files outside one
folder, or get rights back. PyPI's wrappers were no help: one needs the system's libseccomp, the other is unreleased.
"""

import ctypes
import errno
import os
import platform
import resource
import struct
import sys
from contextlib import suppress

from stvit_video.runtime.limits import memory_limit, offer_to_oom_killer

OPEN_FILES = 256
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
CAPABILITIES, READ_ALL = 0x20080522, 0b110  # version 3; CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH

# System calls that are refused, by number: socket, execve, execveat, ptrace, process_vm_readv, process_vm_writev, and
# io_uring_setup, which could make the others. Before them, what the kernel calls the machine.
REFUSED_CALLS = {
    "x86_64": (0xC000003E, (41, 59, 322, 101, 310, 311, 425)),
    "aarch64": (0xC00000B7, (198, 221, 281, 117, 270, 271, 425)),
}
X32 = 0x40000000  # from this number on, calls of another table on x86-64
# Instructions of a seccomp filter: load a word, compare, return.
LOAD, IF_EQUAL, IF_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM

LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # on all machines
WRITE_FILE, TRUNCATE = 1 << 1, 1 << 14
WRITE = WRITE_FILE | 0x1FF0  # and make, remove or rename what lies in a folder
TCP, SIGNALS_AND_SOCKETS = 3, 3  # to connect and listen; to signal processes, and abstract sockets


def confine(folder: str | None) -> list[str]:
    """Confine this thread and those that it starts, which write to ``folder`` alone; return what the system lacks."""
    offer_to_oom_killer(800)  # before a loader's worker, whose end is the end of the run
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NOFILE, OPEN_FILES)
    missing = []
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None, use_errno=True)
        _drop_capabilities(libc)
        if _prctl(libc, PR_SET_NO_NEW_PRIVS, 1):
            missing += [] if _restrict_files(libc, folder) else ["Landlock"]
            missing += [] if _refuse_calls(libc) else ["seccomp"]
            return missing
    return ["no_new_privs"]


def limit_memory() -> None:
    """Limit what this process may map, beyond what it has, and write to half of the memory of machine or container.

    The caller needs as much again for its copy of frames, so that more could not be used anyway.
    """
    share = max(memory_limit()[0] // 2, 2**31)
    with suppress(OSError), open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        _limit(resource.RLIMIT_AS, mapped + share)
    _limit(resource.RLIMIT_FSIZE, share)  # files in memory count too


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Give up what root may do, but for reading other users' files, which root's videos may be."""
    header = ctypes.create_string_buffer(struct.pack("II", CAPABILITIES, 0))
    data = ctypes.create_string_buffer(24)  # effective, permitted, inheritable; and the same for higher numbers
    if libc.capget(header, data) == 0:
        effective, permitted, *_ = struct.unpack("6I", data.raw)
        libc.capset(header, struct.pack("6I", effective & READ_ALL, permitted & READ_ALL, 0, 0, 0, 0))


def _prctl(libc: ctypes.CDLL, *arguments: int) -> bool:
    """Call prctl, and return whether it was done."""
    return libc.prctl(*(ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0)[:5])) == 0


def _restrict_files(libc: ctypes.CDLL, folder: str | None) -> bool:
    """Allow writing in ``folder`` alone, and no TCP or signals to others; return whether the kernel can do that."""
    version = libc.syscall(LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return False
    handled = WRITE | (TRUNCATE if version >= 3 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    attributes = struct.pack("QQQ", handled, TCP, SIGNALS_AND_SOCKETS)[:size]
    rules = libc.syscall(LANDLOCK_CREATE, attributes, size, 0)
    if rules < 0:
        return False
    try:
        for path, rights in ((folder, handled), (os.devnull, handled & (WRITE_FILE | TRUNCATE))):
            with suppress(OSError):  # without its folder, an index is not kept
                place = os.open(path or "", os.O_PATH)
                libc.syscall(LANDLOCK_ADD, rules, 1, struct.pack("=Qi", rights, place), 0)
                os.close(place)
        return bool(libc.syscall(LANDLOCK_RESTRICT, rules, 0) == 0)
    finally:
        os.close(rules)


def _refuse_calls(libc: ctypes.CDLL) -> bool:
    """Have the kernel refuse REFUSED_CALLS; return whether it can do that."""
    machine, calls = REFUSED_CALLS.get(platform.machine(), (0, ()))
    if not calls or sys.maxsize < 2**32:
        return False
    last = len(calls) + 5  # the last line refuses, the one before allows; jumps count the lines between
    lines = [(LOAD, 0, 0, 4), (IF_EQUAL, 0, last - 2, machine), (LOAD, 0, 0, 0), (IF_AT_LEAST, last - 4, 0, X32)]
    lines += [(IF_EQUAL, last - i - 1, 0, call) for i, call in enumerate(calls, start=len(lines))]
    lines += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    pointer = struct.pack("HxxxxxxQ", len(lines), ctypes.addressof(program))
    header = ctypes.create_string_buffer(pointer)
    return _prctl(libc, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(header))
