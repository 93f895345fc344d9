"""From a file to the requested frames, in a child process: a decoder that hangs, crashes or leaks ends with it alone.

``Decoding`` starts a child that runs ``serve``, sends it requests over a socket and copies frames out of memory that
both share. A child that does not answer in time is killed and replaced; some endless loops of decord end no other way.

The child calls ``answer`` for each ``FrameRequest``. That opens the file, calls the request's choice with the open
``Reader`` to get frame indices, and has the reader decode those. A request of ``Decoding.ask`` has a function of its
own, which is called instead.
"""

import contextlib
import importlib
import importlib.util
import itertools
import os
import signal
import socket
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from stvit_video.common.errors import RunFailure, UsageError
from stvit_video.data.decode.index import IndexCache
from stvit_video.data.decode.pictures import ImageReader, is_pattern
from stvit_video.data.decode.readers import AvReader, DecordReader, TorchCodecReader
from stvit_video.data.decode.types import (
    IMAGE_SUFFIXES,
    Choice,
    DecodeError,
    DecoderKilled,
    Frames,
    Indices,
    Reader,
    Times,
)
from stvit_video.data.shared_memory import open_memory_file
from stvit_video.runtime.stopping import end_with_parent, ignore_stop_signals

IN_FLIGHT = 2  # requests sent to the child at once; each has a slot of the shared memory
POLL_S = 0.5  # between two looks for an answer
START_S = 120.0  # for the child's imports, which may come from slow storage
# PyAV reads what FFmpeg shows. The others would return wrong frames of some files; those they refuse.
DECODERS: dict[str, Callable[[str, int | None, IndexCache | None], Reader]] = {
    "pyav": AvReader,
    "decord": DecordReader,
    "torchcodec": TorchCodecReader,
}


def find_decoder(name: str, option: str = "decoder") -> str:
    """Return the decoder to read with: the named one, with ``auto`` PyAV.

    Raises UsageError, naming the ``option``, for one that is unknown or not installed.
    """
    installed = tuple(key for key in DECODERS if key == "pyav" or importlib.util.find_spec(key))
    if name != "auto" and name not in installed:
        known = name in DECODERS
        problem = f"is not installed; pip install {name}, or" if known else "is unknown;"
        choices = ", ".join(installed if known else DECODERS)
        raise UsageError(f"{option}: decoder {name!r} {problem} choose auto, {choices}.")
    return "pyav" if name == "auto" else name


def open_video(
    path: str | os.PathLike[str],
    *,
    short_side: int | None = None,
    decoder: str = "pyav",
    cache: IndexCache | None = None,
) -> Reader:
    """Open a folder, or one with a pattern of names, as its images, and a file by its ending: as an image or a video.

    Much larger frames are reduced to ``short_side``. ``cache`` saves the pass over a file that is opened again. Raises
    DecodeError.
    """
    path = os.fspath(path)
    if is_pattern(path):
        return ImageReader(path, short_side)
    if not os.path.isfile(path) and not os.path.isdir(path):
        raise DecodeError(path, "is not a regular file" if os.path.exists(path) else "no such file")
    if os.path.isdir(path) or path.lower().endswith(IMAGE_SUFFIXES):
        return ImageReader(path, short_side)
    return DECODERS[decoder](path, short_side, cache)


@dataclass(frozen=True)
class FrameRequest:
    """Asks for frames of one file, or only about it. It is pickled to reach the decoding process."""

    path: str
    choice: Choice | None  # returns the indices of the frames to read, once the file is open; None: see ``question``
    short_side: int | None = None  # see ``open_video``
    decoder: str = "pyav"
    keep_open: bool = False  # more requests for this file follow
    judge: Callable[[Reader], object] | None = None  # called with the open file too, see ``Decoding.judgement``
    question: Callable[[str, IndexCache], Any] | None = None  # called instead of all this, see ``Decoding.ask``


def check_whole(video: Reader) -> Indices:
    """Read all of a video, and choose its first frame, which is then sent back. Raises DecodeError."""
    video.check()
    return np.zeros(1, np.int64)


def read_file(request: FrameRequest, opened: dict[Any, Reader] | None = None) -> Frames:
    """Return the chosen frames (N, H, W, 3) in the order of the choice. Raises DecodeError."""
    return answer({} if opened is None else opened, IndexCache(), request)[0]


def answer(opened: dict[Any, Reader], cache: IndexCache, request: FrameRequest) -> tuple[Frames, Any]:
    """Return the chosen frames (N, H, W, 3) in the order of the choice, and what the request's judge says of the file.

    ``opened`` keeps a file open from one request to the next, since opening a long video takes a pass through all of
    it. Raises DecodeError.
    """
    if request.question is not None:
        return np.empty((0, 0, 0, 3), np.uint8), request.question(request.path, cache)
    assert request.choice is not None
    path, key, keep_open = request.path, (request.path, request.short_side, request.decoder), False
    try:
        if key not in opened:
            _close(opened)
            opened[key] = open_video(path, short_side=request.short_side, decoder=request.decoder, cache=cache)
        video = opened[key]
        frames = video.frames(request.choice(video))
        judgement = request.judge and request.judge(video)
        keep_open = request.keep_open
        return frames, judgement
    except DecodeError as error:
        inside = "" if error.path == path else f"{os.path.basename(error.path)} "  # of a folder of images
        raise DecodeError(path, f"{inside}{error.message}", error.decoder) from error
    finally:  # after any other error too, such as a lack of memory
        if not keep_open:
            _close(opened)


def _close(opened: dict[Any, Reader]) -> None:
    while opened:
        opened.popitem()[1].close()


def _read_times(decoder: str, path: str, cache: IndexCache) -> Times:
    with open_video(path, decoder=decoder, cache=cache) as video:
        return video.times()


@dataclass(eq=False, repr=False)
class Decoding:
    """Reads frames in a child process, which starts with the first request. Not to be shared between threads.

    After a fork, and in a loader's workers, each process starts its own child.
    """

    decoder: str
    deadline_s: float  # for each request; a child that takes longer is killed
    short_side: int | None = None  # see ``open_video``
    cache: str | None = None  # a folder for indexes that took long; see ``IndexCache``
    judgement: Any = field(default=None, init=False)  # what the judge or question of the request answered last says
    on_progress: Callable[[], None] | None = field(default=None, init=False)  # called while a long file is indexed
    _child: "_Child | None" = field(default=None, init=False)
    _waiting: deque[FrameRequest] = field(default_factory=deque, init=False)  # sent to the child, not answered yet
    _stuck: set[str] = field(default_factory=set, init=False)  # paths that took too long; they are not tried again
    _killed: set[str] = field(default_factory=set, init=False)  # paths at which the child was killed once

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_child": None, "_waiting": deque()}

    def request(self, path: str, choice: Choice, keep_open: bool = False) -> FrameRequest:
        """Return a request for frames of ``path`` with this object's decoder and size."""
        return FrameRequest(path, choice, self.short_side, self.decoder, keep_open)

    def read(self, request: FrameRequest) -> Frames:
        """Return the chosen frames (N, H, W, 3). Raises DecodeError, also for a child that hangs or crashes."""
        (result,) = self.read_all([request])
        if isinstance(result, DecodeError):
            raise result
        return result

    def read_times(self, path: str) -> Times:
        """Return the times of a file's frames, in seconds after the first. Raises DecodeError as ``read``."""
        return self.ask(partial(_read_times, self.decoder), path)

    def ask(self, question: Callable[[str, IndexCache], Any], path: str) -> Any:
        """Return what a function, called in the child, says of a file. Raises DecodeError as ``read``."""
        self.read(FrameRequest(path, None, decoder=self.decoder, question=question))
        return self.judgement

    def read_all(self, requests: Iterable[FrameRequest]) -> Iterator[Frames | DecodeError]:
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
            self.close()
            raise

    def close(self) -> None:
        """End the child, which a next request would start again."""
        self._waiting.clear()
        if self._child is not None:
            self._child.stop()
        self._child = None

    def forget(self) -> None:
        """Try files again that took too long, or at which the child was killed."""
        self._stuck.clear()
        self._killed.clear()

    def _send(self, request: FrameRequest) -> None:
        if request.path in self._stuck:
            return
        child = self._child
        if child is None or child.parent != os.getpid() or not (self._waiting or child.process.poll() is None):
            child = self._child = _Child(self.cache, self.decoder)
        with contextlib.suppress(OSError):  # the child has died with a request before this: ``_receive`` finds out
            child.connection.send(request)

    def _receive(self) -> Frames | DecodeError:
        """Return the answer to the first request; where it ended the child, send the others again."""
        request = self._waiting.popleft()
        child = self._child
        if request.path in self._stuck:
            return DecodeError(request.path, f"took more than {self.deadline_s:g} s before and is not tried again")
        assert child is not None
        killed = False
        try:
            while wait_awake(child.connection, self.deadline_s):
                answer = child.connection.recv()
                if answer is None:  # a long file is being decoded for its index, and goes forward
                    if self.on_progress is not None:
                        self.on_progress()
                    continue
                if isinstance(answer, DecodeError):
                    return answer
                slot, shape, self.judgement = answer
                frames = np.empty(shape, np.uint8)
                left = frames.reshape(-1).data
                while left:
                    left = left[os.preadv(child.slots[slot].fileno(), [left], frames.nbytes - len(left)) :]
                return frames
            message = f"took more than {self.deadline_s:g} s (DATA.DEADLINE_S); its decoder was stopped"
            self._stuck.add(request.path)
        except (EOFError, OSError):
            message = f"made its decoder crash ({child.exit_status()})"
            if killed := child.process.returncode == -signal.SIGKILL:
                message = "does not fit into memory: its decoder was killed twice (signal 9)"
        child.stop()
        self._child = None
        again = killed and request.path not in self._killed
        if again:  # memory may have been short for another's sake
            self._killed.add(request.path)
            self._waiting.appendleft(request)
        for other in self._waiting:
            self._send(other)
        if again:
            return self._receive()
        return (DecoderKilled if killed else DecodeError)(request.path, message, request.decoder)


class _Child:
    """The child process: the parent's end of the socket, and files in memory to which the child writes arrays."""

    def __init__(self, cache: str | None, decoder: str) -> None:
        self.parent = os.getpid()
        ours, theirs = socket.socketpair()
        self.slots = [open_memory_file() for _ in range(IN_FLIGHT)]
        fds = (theirs.fileno(), *(slot.fileno() for slot in self.slots))
        # With ``-c``, modules are first looked for in the current folder, which may hold files of others.
        call = f"serve({cache!r}, {decoder!r}, *{fds})"
        command = f"import sys; sys.path = {sys.path}; from {__name__} import serve; {call}"
        starter = ThreadPoolExecutor(1)  # Linux ends a child with the thread that starts it, see ``end_with_parent``
        self.process = starter.submit(
            subprocess.Popen,
            [sys.executable, "-c", command],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal reaches the parent only, with which the child ends
        ).result()
        theirs.close()
        self.connection = Connection(ours.detach())
        self.stop = weakref.finalize(self, _end, self.process, self.connection, self.parent, starter)
        try:
            ready = self.connection.poll(START_S) and self.connection.recv()
        except (EOFError, OSError):
            ready = False
        if not ready:
            why = self.exit_status().replace("signal 9", "killed, as systems do where memory is short")
            raise RunFailure(f"a decoding process did not start within {START_S:g} s ({why})")

    def exit_status(self) -> str:
        """Say how the child ended."""
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "no answer"
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def wait_awake(connection: Connection, seconds: float) -> bool:
    """Return whether there is something to receive within ``seconds``; those of a suspended run do not count."""
    while seconds > 0 and not connection.poll(min(POLL_S, seconds)):
        seconds -= POLL_S
    return seconds > 0


def _end(process: subprocess.Popen, connection: Connection, parent: int, starter: Executor) -> None:
    """Kill the child."""
    if os.getpid() != parent:  # a fork inherits the finalizer but not the child
        return
    connection.close()
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel, for example on a dead network disk
        process.wait(timeout=1)
    starter.shutdown(wait=False)


def serve(cache_folder: str | None, decoder: str, socket_fd: int, *memory_fds: int) -> None:
    """Answer requests until the parent closes the socket: the main function of the child process."""
    end_with_parent(signal.SIGKILL)  # a hanging decoder would never see the closed socket
    ignore_stop_signals()
    if decoder != "pyav":
        importlib.import_module(decoder)  # which takes long, before the deadline of a file counts
    connection = Connection(socket_fd)
    try:
        connection.send(True)
    except OSError:  # the parent has ended meanwhile
        return
    opened: dict[Any, Reader] = {}
    cache = IndexCache(cache_folder, progress=lambda: connection.send(None))
    for slot, fd in itertools.cycle(enumerate(memory_fds)):
        try:
            request = connection.recv()
        except EOFError:
            return
        try:
            frames, judgement = answer(opened, cache, request)
        except DecodeError as error:
            connection.send(error)
        except MemoryError:
            connection.send(DecodeError(request.path, "does not fit into memory", request.decoder))
        else:
            left = np.ascontiguousarray(frames).reshape(-1).data
            while left:  # a call writes 2 GB at most
                left = left[os.pwrite(fd, left, frames.nbytes - len(left)) :]
            connection.send((slot, frames.shape, judgement))
