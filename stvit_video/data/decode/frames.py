"""From a file to the requested frames, in a child process: a decoder that hangs, crashes or leaks ends with it alone.

``Decoding`` starts a child that runs ``serve``, sends it requests over a socket and copies frames out of memory that
both share. A child that does not answer in time is killed and replaced; some endless loops of decord end no other way.

The child calls ``read_file`` for each ``FrameRequest``. That opens the file (``open_video``, or the ``ReaderCache``),
calls the request's choice with the open ``Reader`` to get frame indices, and has the reader (``readers.py``) decode
those; where one decoder fails, it tries the next.
"""

import contextlib
import importlib.util
import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import decord
import numpy as np
from numpy.typing import NDArray

from stvit_video.common.errors import UsageError
from stvit_video.data.decode.readers import AvReader, DecordReader, ImageReader, TorchCodecReader
from stvit_video.data.decode.types import IMAGE_SUFFIXES, Choice, DecodeError, Frames, Reader, Times
from stvit_video.runtime.stopping import end_with_parent, ignore_stop_signals

IN_FLIGHT = 2  # requests sent to the child at once; each has a slot of the shared memory
START_S = 120.0  # for the child's imports, which may come from slow storage
# In the order in which they are tried. PyAV comes first: it gives the same pixels as decord in two thirds of the time,
# is right where groups of pictures are open, reads AV1, and reports damaged frames instead of repeating others.
DECODERS: dict[str, Callable[[str, int | None], Reader]] = {
    "pyav": AvReader,
    "decord": DecordReader,
    "torchcodec": TorchCodecReader,
}


def find_decoders(name: str, option: str = "decoder") -> tuple[str, ...]:
    """Return the decoders to try in order: the named one, or with ``auto`` all that are installed.

    Raises UsageError, naming the ``option``, for one that is unknown or not installed.
    """
    installed = tuple(key for key in DECODERS if key != "torchcodec" or importlib.util.find_spec("torchcodec"))
    if name == "auto":
        return installed
    if name not in DECODERS:
        raise UsageError(f"{option}: decoder {name!r} is unknown; choose auto, {', '.join(DECODERS)}.")
    if name not in installed:
        raise UsageError(
            f"{option}: decoder {name!r} is not installed; pip install {name}, or choose auto, {', '.join(installed)}."
        )
    return (name,)


def open_video(path: str, short_side: int | None = None, decoder: str = "decord") -> Reader:
    """Open a folder as its images, and a file by its ending: as an image, or else as a video.

    Much larger frames are reduced to ``short_side``. Raises DecodeError.
    """
    if not os.path.isfile(path) and not os.path.isdir(path):
        raise DecodeError(path, "is not a regular file" if os.path.exists(path) else "no such file")
    if os.path.isdir(path) or path.lower().endswith(IMAGE_SUFFIXES):
        return ImageReader(path, short_side)
    reader = DECODERS[decoder](path, short_side)
    if reader.length == 0:
        raise DecodeError(path, "has no frames", decoder)
    return reader


@dataclass(frozen=True)
class FrameRequest:
    """Asks for frames of one file, or for the times of all. It is pickled to reach the decoding process."""

    path: str
    choice: Choice | None  # returns the indices of the frames to read, once the file is open; None: asks for times
    short_side: int | None = None  # see ``open_video``
    decoders: tuple[str, ...] = ("pyav", "decord")  # in the order in which they are tried
    keep_open: bool = False  # more requests for this file follow

    def answer(self, reader: Reader) -> NDArray[Any]:
        """Return the chosen frames (N, H, W, 3) in the order of the choice, or the times (length,) in seconds."""
        if self.choice is None:
            return reader.times()
        indices = self.choice(reader)
        ascending, positions = np.unique(indices, return_inverse=True)  # readers accept no other order or repetitions
        decoded = reader.frames(ascending)
        return decoded if np.array_equal(ascending, indices) else decoded[positions]


class ReaderCache:
    """Keeps a file open from one request to the next, since opening a long video takes a pass through all of it."""

    def __init__(self) -> None:
        self._key: tuple[str, int | None, str] | None = None
        self._reader: Reader | None = None

    def open(self, request: FrameRequest, decoder: str) -> Reader:
        """Return a reader of the request's file: the open one where it fits, else another."""
        key = (request.path, request.short_side, decoder)
        if self._reader is None or self._key != key:
            self.close()
            self._key, self._reader = key, open_video(*key)
        return self._reader

    def close(self) -> None:
        """Close the open reader, if there is one."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()


def read_file(request: FrameRequest, cache: ReaderCache | None = None) -> NDArray[Any]:
    """Return the answer to a request. Raises DecodeError with what each decoder reported.

    Decoders are tried in turn. Each makes its own choice, since they may not agree on how long a damaged file is.
    """
    cache = cache or ReaderCache()
    errors: list[DecodeError] = []
    for decoder in request.decoders:
        keep_open = False
        try:
            answer = request.answer(cache.open(request, decoder))
            keep_open = request.keep_open
            return answer
        except DecodeError as error:
            errors.append(error)
            if error.decoder in ("", "pillow"):  # no video decoder can help
                break
        finally:  # after any other error too, such as a lack of memory
            if not keep_open:
                cache.close()
    messages = list(dict.fromkeys(error.message for error in errors))
    message = messages[0] if len(messages) == 1 else "; ".join(f"{e.decoder}: {e.message}" for e in errors)
    raise DecodeError(request.path, message, "+".join(dict.fromkeys(error.decoder for error in errors)))


class Decoding:
    """Reads frames in a child process, which starts with the first request. Not to be shared between threads.

    After a fork, and in a loader's workers, each process starts its own child.
    """

    def __init__(
        self,
        decoders: tuple[str, ...],  # in the order in which they are tried
        deadline_s: float,  # for each request; a child that takes longer is killed
        short_side: int | None = None,  # see ``open_video``
    ) -> None:
        self.decoders, self.deadline_s, self.short_side = decoders, deadline_s, short_side
        self._child: _Child | None = None
        self._waiting: deque[FrameRequest] = deque()  # sent to the child, and not answered yet
        self._stuck: set[str] = set()  # paths that took longer than the deadline; they are not tried again

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_child": None, "_waiting": deque()}

    def request(self, path: str, choice: Choice, keep_open: bool = False) -> FrameRequest:
        """Return a request for frames of ``path`` with this object's decoders and size."""
        return FrameRequest(path, choice, self.short_side, self.decoders, keep_open)

    def read(self, request: FrameRequest) -> NDArray[Any]:
        """Return the chosen frames (N, H, W, 3). Raises DecodeError, also for a child that hangs or crashes."""
        (result,) = self.read_all([request])
        if isinstance(result, DecodeError):
            raise result
        return result

    def read_times(self, path: str) -> Times:
        """Return the times of a file's frames, in seconds after the first. Raises DecodeError as ``read``."""
        return self.read(FrameRequest(path, None, None, self.decoders))

    def read_all(self, requests: Iterable[FrameRequest]) -> Iterator[NDArray[Any] | DecodeError]:
        """Yield the answer to each request, or the reason why there is none. Read it to the end before the next.

        The child always has the next two requests: it decodes one while the caller works on the last answer.
        """
        # The child answers in order: a request in between would get the answer to another.
        assert not self._waiting, "requests are still being answered"
        try:
            for request in requests:
                result = self._receive() if len(self._waiting) == IN_FLIGHT else None
                self._send(request)
                self._waiting.append(request)
                if result is not None:
                    yield result
            while self._waiting:
                yield self._receive()
        except BaseException:  # the caller has given up, and answers may be left in the socket
            self._waiting.clear()
            self._stop_child()
            raise

    def _send(self, request: FrameRequest) -> None:
        if request.path in self._stuck:
            return
        if self._child is None or self._child.parent != os.getpid():
            self._child = _Child()
        try:
            self._child.connection.send(request)
        except OSError:  # the child is dead; if it had other requests, ``_receive`` finds out at the first of them
            if not self._waiting:
                self._child = _Child()
                self._child.connection.send(request)

    def _receive(self) -> NDArray[Any] | DecodeError:
        """Return the answer to the first request; where it ended the child, send the others again."""
        request = self._waiting.popleft()
        if request.path in self._stuck:
            return DecodeError(request.path, f"took more than {self.deadline_s:g} s before and is not tried again")
        assert self._child is not None
        try:
            if self._child.connection.poll(self.deadline_s):
                answer = self._child.connection.recv()
                return answer if isinstance(answer, DecodeError | np.ndarray) else self._child.read_slot(*answer)
            message = f"took more than {self.deadline_s:g} s (DATA.DEADLINE_S); its decoder was stopped"
            self._stuck.add(request.path)
        except (EOFError, OSError):
            message = f"made its decoder crash ({self._child.exit_status()})"
        self._stop_child()
        for other in self._waiting:
            self._send(other)
        return DecodeError(request.path, message, "+".join(request.decoders))

    def _stop_child(self) -> None:
        if self._child is not None:
            self._child.stop()
            self._child = None


class _Child:
    """The child process: the parent's end of the socket, and the memory to which the child writes frames."""

    def __init__(self) -> None:
        self.parent = os.getpid()
        ours, theirs = socket.socketpair()
        self._memory = tuple(_memory_file() for _ in range(IN_FLIGHT))
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve({theirs.fileno()}, {self._memory})"],
            pass_fds=(theirs.fileno(), *self._memory),
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal reaches the parent only, with which the child ends
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
            raise RuntimeError(f"The decoding process did not start within {START_S:g} s ({self.exit_status()}).")

    def read_slot(self, slot: int, shape: tuple[int, ...]) -> Frames:
        """Return a copy of the frames of ``shape`` in a slot of the shared memory."""
        frames = np.empty(shape, np.uint8)
        left = frames.reshape(-1).data
        while left:
            left = left[os.preadv(self._memory[slot], [left], frames.nbytes - len(left)) :]
        return frames

    def exit_status(self) -> str:
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
    if os.getpid() != parent:  # a fork inherits the finalizer but not the child
        return
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel, for example on a dead network disk
        process.wait(timeout=1)
    for descriptor in memory:
        os.close(descriptor)


def _memory_file() -> int:
    """Return a descriptor of a file in memory, which vanishes when the last process closes it."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("frames")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def serve(socket_fd: int, memory_fds: Sequence[int]) -> None:
    """Answer requests until the parent closes the socket: the main function of the child process."""
    end_with_parent(signal.SIGKILL)  # a hanging decoder would never see the closed socket
    ignore_stop_signals()
    decord.logging.set_level(decord.logging.QUIET)  # it raises what it would print about a damaged file
    connection = Connection(socket_fd)
    connection.send(True)
    cache = ReaderCache()
    for slot in itertools.cycle(range(len(memory_fds))):
        try:
            request = connection.recv()
        except EOFError:
            return
        try:
            answer = read_file(request, cache)
        except DecodeError as error:
            connection.send(error)
        except MemoryError:
            connection.send(DecodeError(request.path, "does not fit into memory", "+".join(request.decoders)))
        else:
            if request.choice is None:
                connection.send(answer)  # times: small enough for the socket
                continue
            left = np.ascontiguousarray(answer).reshape(-1).data
            while left:  # a call writes 2 GB at most
                left = left[os.pwrite(memory_fds[slot], left, answer.nbytes - len(left)) :]
            connection.send((slot, answer.shape))
