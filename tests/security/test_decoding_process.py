"""The decoding process has no secrets, rights or network, and what it answers is not trusted."""

import json
import os
import resource
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stvit_video.data.decode import frames
from stvit_video.data.decode.frames import Decoding
from stvit_video.data.decode.process import ANSWER_BYTES, Answer, UntrueAnswer, parse_answer
from stvit_video.data.decode.types import DecodeError
from stvit_video.runtime import confine
from tests.conftest import REPOSITORY, numbered_frames, read_number
from tests.data.choices import Frozen
from tests.security.takeover import Fails, LacksFiles, Speaking, TakesAllMemory, misbehave, read_limits

SECRETS = ("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "SSH_AUTH_SOCK", "https_proxy")
HAS_LANDLOCK = confine.ctypes.CDLL(None).syscall(confine.LANDLOCK_CREATE, None, 0, 1) >= 1


@pytest.fixture
def path(write_clip: Callable[..., Path]) -> str:
    return str(write_clip(numbered_frames(8)))


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Decoding]:
    for name in SECRETS:
        monkeypatch.setenv(name, "secret")
    (tmp_path / "index").mkdir()
    decoding = Decoding("pyav", 20, cache=str(tmp_path / "index"))
    yield decoding
    decoding.close()


@pytest.mark.skipif(not HAS_LANDLOCK, reason="this kernel has no Landlock")
def test_a_decoder_that_is_taken_over_can_do_little(decoding: Decoding, path: str) -> None:
    found = decoding.ask(misbehave, path)
    assert {found.pop(name) for name in ("index", "read")} == {"done"}
    assert found.pop("many files") == "OSError"
    if confine.ctypes.CDLL(None).syscall(confine.LANDLOCK_CREATE, None, 0, 1) < 6:
        found.pop("stop")
    assert set(found.values()) == {"PermissionError"}, found.items()


def test_the_child_has_no_secrets_and_no_rights(decoding: Decoding, path: str) -> None:
    assert read_number(decoding.read(decoding.request(path, Frozen((3,))))[0]) == 3
    assert decoding._child is not None
    child = Path(f"/proc/{decoding._child.process.pid}")
    environ = (child / "environ").read_bytes()
    assert b"HOME=" in environ
    assert b"secret" not in environ
    assert "NoNewPrivs:\t1" in (child / "status").read_text()
    assert int((child / "oom_score_adj").read_text()) >= 800
    limits = (child / "limits").read_text().splitlines()
    for name, value in (("core file size", "0"), ("open files", str(confine.OPEN_FILES))):
        (line,) = (line for line in limits if line.startswith(f"Max {name} "))
        assert line.split()[-3:-1] == [value, value]


def test_memory_is_limited(decoding: Decoding, path: str) -> None:
    space, size = decoding.ask(read_limits, path)
    assert 0 < size < space < 2 * confine.memory_limit()[0] + 2**33


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (TakesAllMemory(), "does not fit into memory"),
        (LacksFiles(), "out of open files"),
        (Fails(), "made its decoder fail (RuntimeError: first line)"),
    ],
)
def test_what_a_child_lacks_is_said_in_one_line(
    decoding: Decoding, path: str, choice: Any, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DecodeError) as caught:
        decoding.read(decoding.request(path, choice))
    assert caught.value.message.startswith(message)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""
    assert read_number(decoding.read(decoding.request(path, Frozen((1,))))[0]) == 1


def frames_of(shape: list[Any], **other: Any) -> bytes:
    return json.dumps({"slot": 0, "shape": shape, "type": "uint8", "judgement": None, **other}).encode()


LIES = {
    "pickle": b"cos\nsystem\n(S'touch RAN'\ntR.",
    "not text": bytes(range(256)),
    "deep": b"[" * 60_000,
    "long": b" " * 100_000 + b"{}",
    "list": b"[]",
    "number": b"1",
    "more than there is": frames_of([1000, 4000, 4000, 3]),
    "beyond all": frames_of([10**30, 1, 1, 3]),
    "negative": frames_of([-1, -1, 1, 3]),
    "fractions": frames_of([1.5, 1, 1, 3]),
    "no pixels": frames_of([1, 0, 0, 3]),
    "objects": frames_of([1], type="object"),
    "another slot": frames_of([0, 1, 1, 3], slot=7),
    "another file": frames_of([0, 1, 1, 3], slot="/etc/passwd"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_message_is_no_answer(lie: str) -> None:
    slot = os.memfd_create("frames")
    with pytest.raises(UntrueAnswer):
        parse_answer(LIES[lie][:ANSWER_BYTES], [slot])
    os.close(slot)


@pytest.mark.parametrize("array", [None, np.zeros(3)])
def test_an_answer_to_another_request_is_none(array: Any, path: str) -> None:
    class Child:
        parent, stop = os.getpid(), staticmethod(lambda: None)

        def wait(self, seconds: float) -> bool:
            return True

        def receive(self) -> Answer:
            return Answer(array, True)

    decoding = Decoding("pyav", 1.0)
    decoding._child = Child()  # type: ignore[assignment]
    decoding._waiting.append(decoding.request(path, Frozen((0,))))
    answer = decoding._receive()
    assert isinstance(answer, DecodeError)
    assert "is no answer" in answer.message


def test_a_lying_child_costs_one_video_and_no_memory(decoding: Decoding, path: str) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    huge = frames_of([300, 1000, 1000, 3])
    for speaking in (Speaking(LIES["pickle"]), Speaking(LIES["no pixels"]), Speaking(huge, 10**9)):
        with pytest.raises(DecodeError, match="made its decoder send what is no answer; it was stopped"):
            decoding.ask(speaking, path)
    assert read_number(decoding.read(decoding.request(path, Frozen((5,))))[0]) == 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 50_000


def test_times_from_the_child_are_numbers(path: str) -> None:
    file = os.memfd_create("frames")
    for values, good in (((0.0, 0.5), True), ((0.0, float("inf")), False), ((float("nan"), 1.0), False)):
        os.pwrite(file, struct.pack("dd", *values), 0)
        message = frames_of([2], type="float64")
        if good:
            answer = parse_answer(message, [file])
            assert answer is not None
            assert answer.array.tolist() == [0.0, 0.5]
        else:
            with pytest.raises(UntrueAnswer):
                parse_answer(message, [file])
    os.close(file)


def test_what_a_system_lacks_is_said_once(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Decoding goes on, less confined, and the index folder of a run notes it."""
    for _ in range(2):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        reader, writer = os.pipe()
        os.close(writer)
        monkeypatch.setattr(frames, "end_with_parent", lambda number: None)
        monkeypatch.setattr(frames, "ignore_stop_signals", lambda: None)
        monkeypatch.setattr(frames, "limit_memory", lambda: None)
        frames.serve(str(tmp_path / "index"), "pyav", ["Landlock", "seccomp"], reader, theirs.detach())
        assert ours.recv(100) == b"{}"
        ours.close()
    said = "note: decoding processes are less confined: this system lacks Landlock and seccomp.\n"
    assert capfd.readouterr().err == said


def test_no_process_takes_modules_from_the_current_folder(tmp_path: Path) -> None:
    """``python -m`` and spawned processes would look there first."""
    (tmp_path / "uploads").mkdir()
    for name in ("numpy", "av", "decord", "torch", "pickle", "socket", "threading", "yaml"):
        (tmp_path / "uploads" / f"{name}.py").write_text("open('RAN', 'w').close()")
    script = tmp_path / "script.py"
    script.write_text(
        "from stvit_video.data import sample\n"
        "if __name__ == '__main__':\n"
        f"    sample.prepare({str(tmp_path / 'set')!r}, sample.Spec((1, 1, 1), (1, 1)), progress=False)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    env.pop("PYTHONSAFEPATH", None)
    for command in (["-m", "stvit_video.run", "--keys"], [str(script)]):
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path / "uploads", env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert not (tmp_path / "uploads" / "RAN").exists()


def test_decoders_are_imported_only_where_chosen() -> None:
    code = (
        "import sys, stvit_video.data.loader, stvit_video.predict; print({'decord', 'torchcodec'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    assert frames.find_decoder("auto") == "pyav"
