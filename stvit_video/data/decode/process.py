"""Decoding in a process of its own, so that a decoder that hangs, crashes or leaks takes nothing with it.

``Decoding`` starts a child that runs ``serve``, sends it requests over a socket and reads frames out of memory
that both share. A child that does not answer in time is killed and replaced; only a kill ends some of decord's loops.
"""

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Connection

import decord
import numpy as np

from stvit_video.data.decode.frames import Request, Shelf, TimesRequest, read_frames, read_times
from stvit_video.data.decode.types import Choice, DecodeError, Frames, Times
from stvit_video.runtime.signals import end_with_parent, ignore_stop_signals

IN_FLIGHT = 2  # requests that the child has; each has a half of the memory that both share
START_S = 120.0  # for the child's imports, which may come from slow storage
AnyRequest = Request | TimesRequest


class Decoding:
    """Reads frames in a child process that starts with the first request. Not to be shared between threads.

    Each request may take ``deadline_s`` seconds, tries ``decoders`` in turn and reduces frames to ``short_side``.
    After a fork, and in a loader's workers, each process starts a child of its own.
    """

    def __init__(self, decoders: tuple[str, ...], deadline_s: float, short_side: int | None = None) -> None:
        self.decoders, self.deadline_s, self.short_side = decoders, deadline_s, short_side
        self._child: _Child | None = None
        self._stuck: set[str] = set()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_child": None}  # a worker that is sent a copy starts its own

    def request(self, path: str, choice: Choice, more: bool = False) -> Request:
        """Return a request for frames of ``path`` in this process's own manner; ``more`` of them will follow."""
        return Request(path, choice, self.short_side, self.decoders, more)

    def read(self, request: Request) -> Frames:
        """Return the chosen frames (N, H, W, 3). Raises DecodeError, also for a child that hangs or crashes."""
        result = next(self.read_all([request]))
        if isinstance(result, DecodeError):
            raise result
        return result

    def read_times(self, path: str) -> Times:
        """Return when each frame is shown, in seconds after the first. Raises DecodeError as ``read``."""
        request = TimesRequest(path, self.decoders)
        self._send(request, alone=True)
        result = self._receive(deque([request]))
        if isinstance(result, DecodeError):
            raise result
        return result

    def read_all(self, requests: Iterable[Request]) -> Iterator[Frames | DecodeError]:
        """Yield the frames of each request, or why there are none.

        The next two are always with the child: it decodes one while the caller works, and finds the other waiting.
        """
        waiting: deque[AnyRequest] = deque()
        for request in requests:
            result = self._receive(waiting) if len(waiting) == IN_FLIGHT else None
            self._send(request, alone=not waiting)
            waiting.append(request)
            if result is not None:
                yield result
        while waiting:
            yield self._receive(waiting)

    def _send(self, request: AnyRequest, alone: bool) -> None:
        if request.path in self._stuck:
            return
        if self._child is None or self._child.parent != os.getpid():
            self._child = _Child()
        try:
            self._child.connection.send(request)
        except OSError:  # the child is dead; where it had other requests, the first of them will be told so
            if alone:
                self._child = _Child()
                self._child.connection.send(request)

    def _receive(self, waiting: deque[AnyRequest]) -> np.ndarray | DecodeError:
        """Return the answer to the first of ``waiting``, taking it off; where it fails, the others are sent again."""
        request = waiting.popleft()
        if request.path in self._stuck:
            return DecodeError(request.path, f"took more than {self.deadline_s:g} s before and is not tried again")
        assert self._child is not None
        try:
            if self._child.connection.poll(self.deadline_s):
                answer = self._child.connection.recv()
                return answer if isinstance(answer, DecodeError | np.ndarray) else self._child.take(*answer)
            message = f"took more than {self.deadline_s:g} s (DATA.DEADLINE_S); its decoder was stopped"
            self._stuck.add(request.path)
        except (EOFError, OSError):
            message = f"made its decoder crash ({self._child.fate()})"
        self._child.stop()
        self._child = None
        for other in waiting:
            self._send(other, alone=False)
        return DecodeError(request.path, message, "+".join(request.decoders))


class _Child:
    """The child process: its end of the socket, and the memory that it writes frames to."""

    def __init__(self) -> None:
        self.parent = os.getpid()
        ours, theirs = socket.socketpair()
        self._memory = tuple(_memory_file() for _ in range(IN_FLIGHT))
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve({theirs.fileno()}, {self._memory})"],
            pass_fds=(theirs.fileno(), *self._memory),
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal is for the parent; this process ends with it
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        theirs.close()
        self.connection = Connection(ours.detach())
        self._finalizer = weakref.finalize(self, _end, self._process, self._memory, self.parent)
        try:
            ready = self.connection.poll(START_S) and self.connection.recv()
        except (EOFError, OSError):
            ready = False
        if not ready:
            raise RuntimeError(f"The decoding process did not start within {START_S:g} s ({self.fate()}).")

    def take(self, slot: int, shape: tuple[int, ...]) -> Frames:
        """Return a copy of the frames of ``shape`` that the child has written to a slot of the memory."""
        frames = np.empty(shape, np.uint8)
        left = frames.reshape(-1).data
        while left:
            left = left[os.preadv(self._memory[slot], [left], frames.nbytes - len(left)) :]
        return frames

    def fate(self) -> str:
        """Say how the child ended."""
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "no answer"
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def stop(self) -> None:
        """Kill the child."""
        self.connection.close()
        self._finalizer()


def _end(process: subprocess.Popen, memory: Iterable[int], parent: int) -> None:
    if os.getpid() != parent:  # a fork's copy: the child is not its own
        return
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel, on a dead network disk for example
        process.wait(timeout=1)
    for descriptor in memory:
        os.close(descriptor)


def _memory_file() -> int:
    """Return a descriptor of a file in memory, which goes when the last process closes it."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("frames")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def serve(socket_fd: int, memory_fds: Sequence[int]) -> None:
    """Answer requests until the parent closes the socket; the whole life of the child process."""
    end_with_parent(signal.SIGKILL)  # one that hangs would never see the closed socket
    ignore_stop_signals()
    decord.logging.set_level(decord.logging.QUIET)  # what it says of a damaged file, it also raises
    connection = Connection(socket_fd)
    connection.send(True)
    shelf = Shelf()
    for slot in itertools.cycle(range(len(memory_fds))):
        try:
            request = connection.recv()
        except EOFError:
            return
        try:
            if isinstance(request, TimesRequest):  # times are few: they are sent, not shared
                connection.send(read_times(request))
                continue
            frames = read_frames(request, shelf)
        except DecodeError as error:
            connection.send(error)
        except MemoryError:
            connection.send(DecodeError(request.path, "does not fit into memory", "+".join(request.decoders)))
        else:
            _write(memory_fds[slot], frames)
            connection.send((slot, frames.shape))


def _write(memory_fd: int, frames: Frames) -> None:
    left = np.ascontiguousarray(frames).reshape(-1).data
    while left:  # a call writes 2 GB at most
        left = left[os.pwrite(memory_fd, left, frames.nbytes - len(left)) :]
