"""From a file to the requested frames, in a child process: a decoder that hangs, crashes or leaks ends with it alone.

``Decoding`` starts a child that runs ``serve``, sends it requests and copies frames out of memory that both share: see
``process``. A child that does not answer in time is killed and replaced; some endless loops of decord end no other way.

The child calls ``answer`` for each ``FrameRequest``. That opens the file, calls the request's choice with the open
``Reader`` to get frame indices, and has the reader decode those. A request of ``Decoding.ask`` has a function of its
own, which is called instead.
"""

import contextlib
import errno
import importlib
import importlib.util
import itertools
import os
import signal
import socket
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from stvit_video.common.errors import UsageError, describe_shortage
from stvit_video.data.decode.index import IndexCache
from stvit_video.data.decode.pictures import ImageReader, is_pattern
from stvit_video.data.decode.process import IN_FLIGHT, DecoderProcess, UntrueAnswer, send_answer, write_array
from stvit_video.data.decode.readers import AvReader, DecordReader, TorchCodecReader
from stvit_video.data.decode.types import (
    IMAGE_SUFFIXES,
    NO_MEMORY,
    Choice,
    DecodeError,
    DecoderKilled,
    Frames,
    Indices,
    Reader,
    Times,
    reason,
)
from stvit_video.runtime.confine import limit_memory
from stvit_video.runtime.stopping import end_with_parent, ignore_stop_signals

TOO_LARGE = (errno.ENOMEM, errno.EFBIG)
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
    frames = answer({} if opened is None else opened, IndexCache(), request)[0]
    assert frames is not None
    return frames


def answer(opened: dict[Any, Reader], cache: IndexCache, request: FrameRequest) -> tuple[Any, Any]:
    """Return the chosen frames (N, H, W, 3) in the order of the choice, and what the request's judge says of the file.

    To a question, return the array or None, and the plain value that it says. ``opened`` keeps a file open from one
    request to the next, since opening a long video takes a pass through all of it. Raises DecodeError.
    """
    path, key, keep_open = request.path, (request.path, request.short_side, request.decoder), False
    try:
        if request.question is not None:
            said = request.question(path, cache)
            return (said, None) if isinstance(said, np.ndarray) else (None, said)
        assert request.choice is not None
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
    _child: DecoderProcess | None = field(default=None, init=False)
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
        """Return what a function, called in the child, says of a file: times, or what JSON can hold.

        The caller checks the latter, see ``process``. Raises DecodeError as ``read``.
        """
        array = self.read(FrameRequest(path, None, decoder=self.decoder, question=question))
        return self.judgement if array is None else array

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
            if self.cache and os.path.isdir(os.path.dirname(os.path.abspath(self.cache))):
                with contextlib.suppress(OSError):  # the child may write to what is there when it starts
                    os.makedirs(self.cache, exist_ok=True)
            child = self._child = DecoderProcess(__name__, self.cache, self.decoder)
        with contextlib.suppress(OSError):  # the child has died with a request before this: ``_receive`` finds out
            child.send(request)

    def _receive(self) -> Frames | DecodeError:
        """Return the answer to the first request; where it ended the child, send the others again."""
        request = self._waiting.popleft()
        child = self._child
        if request.path in self._stuck:
            return DecodeError(request.path, f"took more than {self.deadline_s:g} s before and is not tried again")
        assert child is not None
        killed = False
        try:
            while child.wait(self.deadline_s):
                answer = child.receive()
                if answer is None:  # a long file is being decoded for its index, and goes forward
                    if self.on_progress is not None:
                        self.on_progress()
                    continue
                if answer.error:
                    return DecodeError(request.path, answer.error, answer.decoder)
                if (getattr(answer.array, "dtype", None) == np.uint8) is not (request.question is None):
                    raise UntrueAnswer
                self.judgement = answer.judgement
                return answer.array
            message = f"took more than {self.deadline_s:g} s (DATA.DEADLINE_S); its decoder was stopped"
            self._stuck.add(request.path)
        except UntrueAnswer:
            message = "made its decoder send what is no answer; it was stopped"
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


def serve(
    cache_folder: str | None, decoder: str, missing: list[str], requests_fd: int, answers_fd: int, *memory_fds: int
) -> None:
    """Answer requests until the parent closes their pipe: the main function of the child process.

    It has been confined before; ``missing`` says what of that the system lacks.
    """
    end_with_parent(signal.SIGKILL)  # a hanging decoder would never see the closed pipe
    ignore_stop_signals()
    if decoder != "pyav":
        importlib.import_module(decoder)  # which takes long, before the deadline of a file counts
    requests, answers = Connection(requests_fd, writable=False), socket.socket(fileno=answers_fd)
    opened: dict[Any, Reader] = {}
    cache = IndexCache(cache_folder, progress=partial(send_answer, answers))
    if missing:
        cache.note("confined", f"decoding processes are less confined: this system lacks {' and '.join(missing)}.")
    tempfile.tempdir = cache_folder or os.sep  # modules ask for one as they are imported; there is none to write to
    limit_memory()
    try:
        send_answer(answers)  # the child is ready
        for slot, fd in itertools.cycle(enumerate(memory_fds)):
            send_answer(answers, **_try_answer(opened, cache, requests.recv(), slot, fd))
    except (EOFError, ConnectionError):  # the parent has ended or has no more requests
        return


def _try_answer(
    opened: dict[Any, Reader], cache: IndexCache, request: FrameRequest, slot: int, fd: int
) -> dict[str, Any]:
    """Return the fields of the answer to a request, whose array is written to shared memory: see ``parse_answer``."""
    try:
        array, judgement = answer(opened, cache, request)
        written = {"type": None} if array is None else write_array(fd, array)
        return {"slot": slot, "judgement": judgement, **written}
    except DecodeError as error:
        return {"error": error.message, "decoder": error.decoder}
    except Exception as error:  # whatever a file makes a decoder do, one line says so
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in TOO_LARGE):
            return {"error": NO_MEMORY, "decoder": request.decoder}
        kind = type(error).__name__
        why = describe_shortage(error) or f"made its decoder fail ({kind}: {reason(error)})"
        return {"error": why, "decoder": request.decoder}
