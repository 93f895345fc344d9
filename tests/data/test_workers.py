"""Loader processes that find no room, die, hang or fail; all with real processes, signals and limits."""

import ctypes
import os
import pickle
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stvit_video.common.errors import UsageError
from stvit_video.data import workers
from stvit_video.data.dataset import Batch, Sample, VideoDataset
from stvit_video.data.lists.videos import build_lists
from stvit_video.data.loader import build_train_loader
from stvit_video.data.shared_memory import read_shared, write_shared
from stvit_video.data.workers import Loader, LoaderFailure
from stvit_video.evaluation.evaluate import describe_videos
from stvit_video.runtime import limits
from stvit_video.runtime.world import World
from tests.conftest import data_config

CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 1 << 18


def build_loader(small_set: Path) -> Loader:
    """Return a loader with two workers and four batches of eight videos."""
    cfg = data_config(small_set, "DATA.WORKERS", "2")
    return build_train_loader(cfg, World(0, 1, torch.device("cpu")), build_lists(cfg).videos("train"))


@pytest.fixture
def loader(small_set: Path) -> Loader:
    return build_loader(small_set)


def processes(loader: Loader) -> list[int]:
    return [worker.process.pid or 0 for worker in loader._started]


def in_a_fork(work: Callable[[], object]) -> object:
    """Return what ``work`` returns in a process of its own, whose limits and mounts end with it."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            result = work()
        except BaseException as error:
            result = f"{type(error).__name__}: {error}"
        os.write(writer, pickle.dumps(result))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        result = pickle.load(file)  # noqa: S301
    os.waitpid(child, 0)
    return result


@pytest.mark.parametrize("options", ["size=1m", "ro"])
def test_batches_need_no_room_in_dev_shm(loader: Loader, options: str) -> None:
    def load() -> list[int] | None:
        libc = ctypes.CDLL(None)
        if libc.unshare(CLONE_NEWNS) or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None):
            return None
        mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", "/dev/shm"]
        if subprocess.run(mount, capture_output=True).returncode:
            return None
        loader.dataset.views = large  # 12 MB a batch
        return [batch.pixels.numel() for batch in loader]

    large = replace(loader.dataset.views, size=256, short_side=(256, 256))
    found = in_a_fork(load)
    if found is None:
        pytest.skip("only root can mount another /dev/shm")
    assert found == [8 * 8 * 256 * 256 * 3] * 4


def test_shared_objects_are_equal_and_use_no_descriptor() -> None:
    value = {"a": torch.arange(70_000), "b": [torch.zeros(0, dtype=torch.uint8), "text"], "c": torch.ones(3, 5).T}
    before = len(os.listdir("/proc/self/fd"))
    file, spans = write_shared(value)
    found = read_shared(os.dup(file.fileno()), spans)
    file.close()
    assert torch.equal(found["a"], value["a"])
    assert torch.equal(found["c"], value["c"])
    assert (found["b"][0].numel(), found["b"][1]) == (0, "text")
    found["a"] += 1  # it can be written to
    del found
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_scored_batch_leaves_no_memory_behind(loader: Loader) -> None:
    mapped = []

    def describe(clips: torch.Tensor) -> torch.Tensor:
        mapped.append(Path("/proc/self/maps").read_text().count("/memfd:frames"))
        return torch.zeros(len(clips), 4)

    found = describe_videos(describe, loader, World(0, 1, torch.device("cpu")), "fp32")
    assert found.indices.tolist() == list(range(32))
    assert mapped == [mapped[0]] * 4  # the present batch alone


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (signal.SIGKILL, r"was killed.*memory.*lower DATA\.WORKERS 2 or raise TRAIN\.ACCUMULATE"),
        (signal.SIGSYS, r"crashed \(signal SIGSYS\)"),  # SIGSEGV would have pytest print a traceback
    ],
)
def test_a_worker_that_dies_is_named(loader: Loader, number: signal.Signals, says: str) -> None:
    list(loader)
    first = processes(loader)[0]
    os.kill(first, number)
    with pytest.raises(LoaderFailure, match=rf"loader worker 1 of 2 \(process {first}\) {says}"):
        list(loader)


def test_a_batch_that_does_not_come_is_found_by_its_deadline(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    list(loader)
    monkeypatch.setattr(workers, "POLL_S", 0.1)
    for worker in loader._started:  # which are impatient only now, since reading may be slow
        worker.patience = 1.0
        os.kill(worker.process.pid or 0, signal.SIGSTOP)
    with pytest.raises(LoaderFailure, match=r"loader worker . of 2 .* has done nothing for 1 s, being stopped"):
        list(loader)


def test_a_decoder_that_goes_forward_is_waited_for(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = list[object]()

    def index_long_file(self: VideoDataset, keys: list) -> list[Sample]:
        begun.append(keys)
        for _ in range(20 if len(begun) == 2 else 0):  # in all longer than the deadline
            time.sleep(0.1)
            self.decoding.on_progress()
        return [Sample(None, 0, key.index, (), []) for key in keys]

    monkeypatch.setattr(VideoDataset, "__getitems__", index_long_file)
    monkeypatch.setattr(workers, "POLL_S", 0.1)
    monkeypatch.setattr(workers, "SPARE_S", 1.5)
    loader.dataset.decoding.deadline_s = 0.0
    assert [batch.missing for batch in loader] == [8] * 4


def test_a_wait_for_a_batch_can_be_ended(loader: Loader) -> None:
    list(loader)
    for process in processes(loader):
        os.kill(process, signal.SIGSTOP)
    assert list(loader.batches(lambda: True)) == []
    for process in processes(loader):
        os.kill(process, signal.SIGCONT)
    assert len(list(loader)) == 4  # the next epoch is whole


def test_pinned_batches_are_those_of_the_workers(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: the thread that pins reads ahead, also over epochs and where one is left early."""
    expected = [batch.indices.tolist() for batch in loader]
    loader.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(Batch, "pin_memory", lambda batch: batch)
    next(iter(loader))
    for _ in range(2):
        assert [batch.indices.tolist() for batch in loader] == expected
    os.kill(processes(loader)[0], signal.SIGKILL)
    with pytest.raises(LoaderFailure, match="was killed"):
        list(loader)


def test_errors_of_workers_reach_the_main_process(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, keys: object) -> None:
        raise error

    monkeypatch.setattr(type(loader.dataset), "__getitems__", fail)
    error: Exception = ArithmeticError("a mistake of ours")
    with pytest.raises(RuntimeError, match=r"in a loader worker:\nTraceback(.|\n)*ArithmeticError: a mistake of ours"):
        next(iter(loader))
    loader.close()
    error = MemoryError("no 7 GB")
    says = r"loader worker 1 of 2 \(process \d+\): out of memory \(no 7 GB\); this process took up to .* in all; raise"
    with pytest.raises(LoaderFailure, match=says):
        next(iter(loader))


def test_an_earlier_iterator_is_not_continued(loader: Loader) -> None:
    first, second = iter(loader), iter(loader)
    next(first)
    assert len(list(second)) == 4
    with pytest.raises(AssertionError, match="another iterator"):
        next(first)


def test_workers_end_with_their_loader(small_set: Path) -> None:
    loader = build_loader(small_set)
    next(iter(loader))
    started = [worker.process for worker in loader._started]
    del loader
    for process in started:
        process.join(timeout=60)
        assert process.exitcode == -signal.SIGKILL


def test_room_for_open_files_is_made_or_asked_for(small_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> int:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, hard))
        build_loader(small_set)
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert int(str(in_a_fork(build))) > 8

    def refuse(*given: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda which: (40, 40))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    with pytest.raises(UsageError, match=r"DATA\.WORKERS 2 takes up to \d+ open files.* may have 40; raise the limit"):
        build_loader(small_set)


@pytest.mark.parametrize("left", [0, 1])
def test_batches_that_find_no_descriptor_end_with_one_line(loader: Loader, left: int) -> None:
    def load() -> None:
        list(loader)
        lowest = os.dup(0)  # numbers of descriptors are given out from the lowest on
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + left, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        os.close(lowest)
        list(loader)

    says = str(in_a_fork(load))
    assert says.startswith("LoaderFailure: no place for a batch of loader worker 1 of 2"), says
    assert says.endswith("out of open files (ulimit -n)")


def test_limits_of_a_container_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CGROUPS", tmp_path)
    assert limits.memory_limit()[1] == "the machine"
    (tmp_path / "memory.max").write_text("900000000\n")
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert limits.memory_limit() == (900_000_000, "the container")
    assert limits.usable_cores() == 1
    for name in ("memory.max", "cpu.max"):
        (tmp_path / name).write_text("max 100000" if name == "cpu.max" else "max")
    assert limits.memory_limit()[1] == "the machine"
    assert limits.usable_cores() == len(os.sched_getaffinity(0))
