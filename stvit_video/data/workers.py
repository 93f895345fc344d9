"""Batches in the order of a sampler, read by processes that may die, hang or lack memory: then one line says so.

Each worker has a socket of its own. It writes a batch to a file in memory and sends the descriptor, so that the batch
is neither copied nor limited by /dev/shm, which Docker makes 64 MB small; PyTorch's loader waits for ever there.
"""

import atexit
import mmap
import multiprocessing
import os
import signal
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import torch

from stvit_video.common.errors import RunFailure, describe_shortage
from stvit_video.data.dataset import Batch, Sample, SampleKey, VideoDataset
from stvit_video.data.decode.process import POLL_S, START_S
from stvit_video.data.shared_memory import read_shared, write_shared
from stvit_video.runtime.limits import describe_memory, describe_state, largest_child, offer_to_oom_killer
from stvit_video.runtime.stopping import end_with_parent, ignore_stop_signals

AHEAD = 2  # batches that each worker is asked for at once
SPARE_S = 30.0  # beside the decoder's deadlines: to end it, to start another and to crop
FILES_PER_WORKER = 3  # descriptors of the main process: a socket and two pipes

Keys = Sequence[SampleKey] | Sequence[int]


class LoaderFailure(RunFailure):
    """A batch will not come: a loader process has died, hangs, or lacks something that the machine is short of."""

    goes_on = True


class Loader:
    """The batches of a data set, read by ``workers`` processes, or by this one where there are none.

    Processes start with the first batch and stay for the next epochs. Any number of them gives the same batches.
    """

    def __init__(
        self,
        dataset: VideoDataset,
        batch_sampler: Any,  # an EpochSampler or ShardedBatches
        collate_fn: Callable[[list[Sample]], Batch],
        workers: int,
        device: torch.device,
    ) -> None:
        self.dataset, self.batch_sampler, self.collate_fn = dataset, batch_sampler, collate_fn
        self.workers, self.device = workers, device
        self._started: list[_Worker] = []
        self._epochs = 0

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def close(self) -> None:
        """End the processes, which a next epoch would start again."""
        while self._started:
            self._started.pop().stop()

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()

    def batches(self, stop: Callable[[], bool] = lambda: False) -> Iterator[Batch]:
        """Yield the batches; end early where ``stop`` while one is waited for. Raises LoaderFailure."""
        if self.workers == 0:
            return (self.collate_fn(self.dataset.__getitems__(keys)) for keys in self.batch_sampler)
        if not self._started:  # here, since they end with the thread that starts them
            self._started = [_Worker(i, self) for i in range(self.workers)]
        return self._pinned(stop) if self.device.type == "cuda" else self._received(stop)

    def _received(self, stop: Callable[[], bool]) -> Iterator[Batch]:
        """Yield batches in order; each worker has the keys of its next AHEAD ones."""
        self._epochs = epoch = self._epochs + 1
        for worker in self._started:  # what an epoch that was left early had asked for
            while worker.asked:
                if not worker.wait(stop):
                    return
                worker.receive()
        todo = iter(self.batch_sampler)
        order: deque[_Worker] = deque()
        for worker, keys in zip(islice(cycle(self._started), AHEAD * self.workers), todo, strict=False):
            worker.ask(keys)
            order.append(worker)
        while order:
            worker = order.popleft()
            if not worker.wait(stop):
                return
            batch = worker.receive()
            keys = next(todo, None)
            if keys is not None:
                worker.ask(keys)
                order.append(worker)
            yield batch
            del batch  # before the next one, or memory would hold both
            assert epoch == self._epochs, "another iterator of this loader has begun"

    def _pinned(self, stop: Callable[[], bool]) -> Iterator[Batch]:
        """Yield batches in pinned memory, to which a thread copies the next one meanwhile."""
        closed = threading.Event()
        batches = self._received(lambda: closed.is_set() or stop())

        def pin() -> Batch | None:
            batch = next(batches, None)
            return None if batch is None else batch.pin_memory()

        def start() -> None:
            torch.cuda.set_device(self.device)
            torch.set_num_threads(1)  # of this thread: a copy needs no more, and others need the cores

        with ThreadPoolExecutor(1, initializer=start) as pool:
            try:
                coming = pool.submit(pin)
                while (batch := coming.result()) is not None:
                    coming = pool.submit(pin)
                    yield batch
            finally:
                closed.set()


class _Worker:
    """A loader process, as the main process sees it."""

    def __init__(self, number: int, loader: Loader) -> None:
        self.dataset = loader.dataset
        self.asked: deque[Keys] = deque()  # of batches that have not been received
        # Batches begun, videos of the last one that are done, signs of life of the decoder.
        self.progress = memoryview(mmap.mmap(-1, 24)).cast("Q")
        self.connection, theirs = multiprocessing.Pipe()
        # A fork: the list of videos is not copied, and a worker starts in milliseconds.
        self.process = multiprocessing.get_context("fork").Process(
            target=_serve, args=(theirs, self.progress, os.getpid(), loader.dataset, loader.collate_fn), daemon=True
        )
        self.name = f"loader worker {number + 1} of {loader.workers}"
        # Keys that a run may change when it continues.
        accumulate = " or raise TRAIN.ACCUMULATE" if self.dataset.stage == "train" else ""
        self.advice = f"raise that limit, lower DATA.WORKERS {loader.workers}{accumulate}"
        try:
            self.process.start()
        except OSError as error:
            raise LoaderFailure(
                f"{self.name} cannot start: {describe_shortage(error) or error}; {self.advice}"
            ) from None
        theirs.close()
        self.name += f" (process {self.process.pid})"
        # Between two videos, a worker may wait for two decoders, of which the first is stopped; at first it starts one.
        self.patience = 2 * loader.dataset.decoding.deadline_s + SPARE_S
        self.stop = weakref.finalize(self, _end, self.process, self.connection, os.getpid())
        # At the end, before multiprocessing waits for its processes: these ignore the signal that should end them.
        atexit.register(self.stop)

    def ask(self, keys: Keys) -> None:
        """Send the keys of a batch."""
        self.asked.append(keys)
        try:
            self.connection.send(keys)
        except OSError:
            raise self._death() from None

    def wait(self, stop: Callable[[], bool]) -> bool:
        """Return whether the next batch can be received; False for ``stop``. Raises LoaderFailure for no progress."""
        seen, quiet = self.progress.tolist(), 0.0
        # Only looks are counted: no time passes for a run that is suspended and continued.
        while not self.connection.poll(POLL_S):
            if stop():
                return False
            now = self.progress.tolist()
            quiet = quiet + POLL_S if now == seen else 0.0
            seen = now
            if quiet > self.patience + (START_S if now[:2] <= [1, 0] else 0):
                state = describe_state(self.process.pid or 0)
                self.stop()
                raise LoaderFailure(
                    f"{self.name} has done nothing for {quiet:.0f} s{state} and was ended{self._where()}; see that "
                    f"its storage answers, or raise DATA.DEADLINE_S"
                )
        return True

    def receive(self) -> Batch:
        """Return the batch that has come. Raises LoaderFailure for a dead worker, and what a worker raised."""
        try:
            answer = self.connection.recv()
            file = None if isinstance(answer, Exception) else recv_handle(self.connection)
        except (EOFError, ConnectionError):
            raise self._death() from None
        except (RuntimeError, OSError):  # the message has come, but its descriptor cannot
            raise LoaderFailure(f"no place for a batch of {self.name}: out of open files (ulimit -n)") from None
        self.asked.popleft()
        if file is not None:
            return read_shared(file, answer)
        if isinstance(answer, RunFailure):
            memory = f"; {describe_memory()}" if "out of memory" in str(answer) else ""
            raise LoaderFailure(f"{self.name}: {answer}{memory}; {self.advice}")
        raise answer

    def _death(self) -> LoaderFailure:
        self.process.join(timeout=5)
        code = self.process.exitcode or 0
        if code == -signal.SIGKILL:
            return LoaderFailure(
                f"{self.name} was killed{self._where()}, as systems do where memory is short: loader processes took "
                f"up to {largest_child() / 1e9:.2f} GB each; {describe_memory()}; {self.advice}"
            )
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return LoaderFailure(f"{self.name} crashed ({how}){self._where()}; DATA.WORKERS 0 needs no such processes")

    def _where(self) -> str:
        """Return " at FILE", the video that the worker was at; nothing where its batch was done."""
        keys, done = self.asked[0] if self.asked else (), self.progress[1]
        if done >= len(keys):
            return ""
        key = keys[done]
        path = self.dataset.videos[key if isinstance(key, int) else key.index].path
        return f" at {path} (video {done + 1} of {len(keys)} in its batch)"


def _end(process: BaseProcess, connection: Connection, parent: int) -> None:
    """Kill a worker, which ignores SIGTERM."""
    if os.getpid() == parent:  # a fork inherits the finalizer but not the worker
        connection.close()
        process.kill()
        process.join(timeout=1)


def _serve(
    connection: Connection,
    progress: memoryview,
    parent: int,
    dataset: VideoDataset,
    collate: Callable[[list[Sample]], Batch],
) -> None:
    """Answer with batches until the main process ends: the main function of a worker."""

    def count_video() -> None:
        progress[1] += 1

    def count_sign() -> None:
        progress[2] += 1

    ignore_stop_signals()
    end_with_parent(signal.SIGKILL)
    if os.getppid() != parent:  # it has died before
        return
    offer_to_oom_killer()
    torch.set_num_threads(1)
    dataset.on_video, dataset.decoding.on_progress = count_video, count_sign
    while True:
        try:
            keys = connection.recv()
            progress[0], progress[1] = progress[0] + 1, 0
            try:
                file, spans = write_shared(collate(dataset.__getitems__(keys)))
            except RunFailure as error:
                connection.send(error)
            except Exception as error:
                shortage = describe_shortage(error)
                text = f"in a loader worker:\n{traceback.format_exc().rstrip()}"
                connection.send(RunFailure(shortage) if shortage else RuntimeError(text))
            else:
                with file:
                    connection.send(spans)
                    send_handle(connection, file.fileno(), parent)
        except (EOFError, ConnectionError):
            return
