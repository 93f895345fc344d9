"""Objects with large arrays, passed between processes in files that are in memory.

They are Linux's memfd: not limited by the size of /dev/shm, and gone when the last process closes them.
"""

import io
import mmap
import os
import pickle
import tempfile
from typing import IO, Any

ALIGNMENT = 64  # of arrays in a file, in bytes

Spans = list[tuple[int, int]]  # start and stop in a file, in bytes


def open_memory_file() -> IO[bytes]:
    """Return a file in memory, where the system has them; it vanishes when the last process closes it."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("frames"), "r+b", 0)
    return tempfile.TemporaryFile(buffering=0)


class _Pickler(pickle.Pickler):
    """Pickles tensors as arrays, whose content protocol 5 leaves to the caller."""

    def reducer_override(self, value: Any) -> Any:
        import torch  # decoding processes, which need no tensors, start without it

        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, torch.Tensor) else NotImplemented


def write_shared(value: Any) -> tuple[IO[bytes], Spans]:
    """Return a file with ``value``, and where in it each of its arrays lies, and last the pickled object itself."""
    stream, arrays = io.BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(stream, protocol=5, buffer_callback=arrays.append).dump(value)
    file, spans, start = open_memory_file(), Spans(), 0
    for content in (*(array.raw() for array in arrays), stream.getbuffer()):
        spans.append((start, start + content.nbytes))
        while content:  # a call writes 2 GB at most
            written = os.pwrite(file.fileno(), content, start)
            start, content = start + written, content[written:]
        start += -start % ALIGNMENT
    return file, spans


def read_shared(fd: int, spans: Spans) -> Any:
    """Return the object in a file, which is closed; its arrays stay in the file's memory, which each of them keeps."""
    try:
        memory = memoryview(mmap.mmap(fd, spans[-1][1], flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)))
    finally:
        os.close(fd)
    *arrays, pickled = (memory[start:stop] for start, stop in spans)
    return pickle.loads(pickled, buffers=arrays)  # noqa: S301 (from a process of this run)
