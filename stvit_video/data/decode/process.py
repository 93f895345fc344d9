"""The decoding process as its caller sees it: how it is started, what it inherits, and how its answers are read.

It runs native code on other people's files, so that the caller does not trust what it says. Requests are pickled;
answers are not: each is one JSON object in one message, and its array lies in memory that both share. The caller
checks what both say before it allocates anything.
"""

import contextlib
import json
import math
import os
import select
import socket
import subprocess
import sys
import weakref
from concurrent.futures import Executor, ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stvit_video.common.errors import RunFailure, describe_shortage
from stvit_video.data.shared_memory import open_memory_file

IN_FLIGHT = 2  # requests sent to the child at once; each has a slot of the shared memory
POLL_S = 0.5  # between two looks for an answer
START_S = 120.0  # for the child's imports, which may come from slow storage
ANSWER_BYTES = 2**16  # of a message
MESSAGE_CHARACTERS = 2000  # of an error
# What Python, decoders and numeric libraries look for. Tokens, keys and passwords of the user are not among it.
KEPT_VARIABLES = (
    *("HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "VIRTUAL_ENV"),
    *("CONDA_PREFIX", "LD_LIBRARY_PATH", "LD_PRELOAD", "NVIDIA_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "CUDA_HOME"),
)
KEPT_PREFIXES = ("LC_", "PYTHON", "OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_", "NUMEXPR_", "MALLOC_", "DECORD_")

# GNU's allocator gives freed memory back to the system, from which a child that imports little would fetch it again for
# each clip.
HEAP = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**26)}

Array = NDArray[np.uint8] | NDArray[np.float64]  # frames (N, H, W, 3), or times (N,)


class UntrueAnswer(Exception):
    """What the child sends is no answer: other code than ours speaks."""


class Answer(NamedTuple):
    """What the child says: none of this while a file is still being indexed."""

    array: Any = None  # an Array, or None
    judgement: Any = None  # JSON
    error: str = ""
    decoder: str = ""  # of the error


def send_answer(socket: socket.socket, **answer: Any) -> None:
    """Send an answer from the child: the fields of one message."""
    if "error" in answer:
        answer["error"] = answer["error"][:MESSAGE_CHARACTERS]
    socket.send(json.dumps(answer, default=np.generic.item).encode())


def write_array(fd: int, array: Array) -> dict[str, Any]:
    """Write an array to shared memory, and return the fields of an answer that describe it."""
    left = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    while left:  # a call writes 2 GB at most
        left = left[os.pwrite(fd, left, array.nbytes - len(left)) :]
    return {"shape": array.shape, "type": array.dtype.name}


def parse_answer(message: bytes, slots: list[int]) -> Answer | None:
    """Return the answer in a message, its array copied out of one of the ``slots``; None for a sign of life.

    Raises UntrueAnswer, before anything larger than the memory that is there is allocated.
    """
    try:
        said = json.loads(message)
        if said == {}:
            return None
        if "error" in said:
            return Answer(error=str(said["error"])[:MESSAGE_CHARACTERS], decoder=str(said["decoder"]))
        if said["type"] is None:
            return Answer(None, said["judgement"])
        slot = slots[range(len(slots))[said["slot"]]]
        return Answer(_read_array(slot, said["shape"], said["type"]), said["judgement"])
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError, OSError) as error:
        raise UntrueAnswer from error


def _read_array(fd: int, shape: list[int], kind: str) -> Array:
    is_frames = kind == "uint8" and len(shape) == 4 and shape[3] == 3 and min(shape[1:]) > 0
    if not (is_frames or (kind == "float64" and len(shape) == 1)) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(shape)
    found = os.fstat(fd)
    # A file may have holes, which take no memory until they are read.
    if math.prod(shape) * np.dtype(kind).itemsize > min(found.st_size, 512 * found.st_blocks):
        raise ValueError(shape)
    array = np.empty(shape, kind)
    left = array.reshape(-1).view(np.uint8).data
    while left:
        count = os.preadv(fd, [left], array.nbytes - len(left))
        if not count:  # the file has been cut meanwhile
            raise ValueError(shape)
        left = left[count:]
    if not is_frames and not np.isfinite(array).all():
        raise ValueError(shape)
    return array


class DecoderProcess:
    """A child process that answers requests with ``serve``, a function of the module of that name."""

    def __init__(self, module: str, cache: str | None, decoder: str) -> None:
        self.parent = os.getpid()
        try:
            starter = ThreadPoolExecutor(1)  # Linux ends a child with the thread that starts it: ``end_with_parent``
            requests, self._requests = Pipe(duplex=False)
            # Of this kind, a message comes whole or not at all: one that never ends would hold the caller up.
            self._answers, answers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.slots = [open_memory_file() for _ in range(IN_FLIGHT)]
            fds = (requests.fileno(), answers.fileno(), *(slot.fileno() for slot in self.slots))
            # With ``-c``, modules are first looked for in the current folder, which may hold files of others.
            command = (
                # What is imported before ``confine`` may start programs, as torch does, which TorchCodec imports.
                f"import sys; sys.path = {sys.path}; {'import torchcodec; ' if decoder == 'torchcodec' else ''}"
                f"from stvit_video.runtime.confine import confine; missing = confine({cache!r}); "
                f"from {module} import serve; serve({cache!r}, {decoder!r}, missing, *{fds})"
            )
            self.process = starter.submit(
                subprocess.Popen,
                [sys.executable, "-c", command],
                pass_fds=fds,
                env=kept_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # which is the caller's to write to
                start_new_session=True,  # Ctrl-C in a terminal reaches the parent only, with which the child ends
            ).result()
        except OSError as error:
            raise RunFailure(f"a decoding process cannot start: {describe_shortage(error) or error}") from None
        requests.close()
        answers.close()
        self.stop = weakref.finalize(self, _end, self.process, self._requests, self._answers, self.parent, starter)
        try:
            ready = self.wait(START_S) and self.receive() is None
        except (EOFError, OSError, UntrueAnswer):
            ready = False
        if not ready:
            why = self.exit_status().replace("signal 9", "killed, as systems do where memory is short")
            raise RunFailure(f"a decoding process did not start within {START_S:g} s ({why})")

    def send(self, request: object) -> None:
        """Send a request. Raises OSError where the child has ended."""
        self._requests.send(request)

    def wait(self, seconds: float) -> bool:
        """Return whether there is something to receive within ``seconds``; those of a suspended run do not count."""
        poll = select.poll()
        poll.register(self._answers, select.POLLIN)
        while seconds > 0 and not poll.poll(1000 * min(POLL_S, seconds)):
            seconds -= POLL_S
        return seconds > 0

    def receive(self) -> Answer | None:
        """Return an answer, or None for a sign of life. Raises EOFError for a dead child, and UntrueAnswer."""
        message = self._answers.recv(ANSWER_BYTES)
        if not message:
            raise EOFError
        return parse_answer(message, [slot.fileno() for slot in self.slots])

    def exit_status(self) -> str:
        """Say how the child ended."""
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "no answer"
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def kept_environment() -> dict[str, str]:
    """Return the variables that the child gets: KEPT_VARIABLES and those that begin with one of KEPT_PREFIXES."""
    kept = {
        name: value for name, value in os.environ.items() if name in KEPT_VARIABLES or name.startswith(KEPT_PREFIXES)
    }
    # It starts no programs: ``ctypes``, for one, would look for libraries by a compiler. And torch, which a sampler may
    # import, makes a folder of that name as it is imported: one that is there.
    return {**HEAP, **kept, "PATH": "", "TORCHINDUCTOR_CACHE_DIR": os.sep}


def _end(
    process: subprocess.Popen, requests: Connection, answers: socket.socket, parent: int, starter: Executor
) -> None:
    """Kill the child."""
    if os.getpid() != parent:  # a fork inherits the finalizer but not the child
        return
    requests.close()
    answers.close()
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel, for example on a dead network disk
        process.wait(timeout=1)
    starter.shutdown(wait=False)
