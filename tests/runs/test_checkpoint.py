"""Checkpoints: written atomically, the newest valid one first, old ones deleted."""

import errno
import os
import threading
import time
from pathlib import Path

import pytest
import torch

from stvit_video.common.errors import UsageError
from stvit_video.common.files import write_atomically
from stvit_video.runs import checkpoint
from stvit_video.runs.checkpoint import CheckpointWriter, list_checkpoints, load_newest, pack, save_checkpoint


def state(step: int) -> dict:
    weights = {"w": torch.full((1000,), float(step))}
    numbers = dict.fromkeys(("averaged", "epoch", "bad_steps", "best"), 0)
    parts = {name: {} for name in ("optimizer", "average", "scheduler", "scaler", "setup")}
    return {"model": weights, "step": step, **numbers, **parts}


def test_checkpoints_are_found_in_order_of_steps(tmp_path: Path) -> None:
    for step in (9, 10, 100_000_000, 999_999_999):  # longer than the padding: names no longer sort as numbers
        save_checkpoint(tmp_path, state(step), keep=3)
    assert load_newest(tmp_path)["step"] == 999_999_999
    assert [int(path.stem.split("_")[1]) for path in list_checkpoints(tmp_path)] == [999_999_999, 100_000_000, 10]


@pytest.mark.parametrize("damage", ["cut", "empty", "zeroed", "flipped", "text", "folder", "foreign"])
def test_a_damaged_newest_is_skipped_with_a_warning(tmp_path: Path, damage: str) -> None:
    save_checkpoint(tmp_path, state(1), keep=2)
    newest = save_checkpoint(tmp_path, state(2), keep=2)
    content = newest.read_bytes()
    newest.unlink()
    match damage:
        case "folder":
            newest.mkdir()
        case "flipped":  # one bit of a weight, where the file's structure is untouched
            place = content.index(torch.full((1000,), 2.0).numpy().tobytes()) + 2000
            newest.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        case "foreign":
            newest.write_bytes(pack({"model": {}}))
        case _:
            newest.write_bytes(
                {"cut": content[: len(content) // 2], "empty": b"", "zeroed": bytes(len(content)), "text": b"<html>"}[
                    damage
                ]
            )
    with pytest.warns(UserWarning, match="trying the one before"):
        assert load_newest(tmp_path)["step"] == 1
    save_checkpoint(tmp_path, state(2), keep=2)  # training comes there again
    assert load_newest(tmp_path)["step"] == 2


def test_any_flipped_bit_is_detected(tmp_path: Path) -> None:
    """Also in the directory at the end of the zip archive, which has no checksum of its own."""
    save_checkpoint(tmp_path, state(1), keep=2)
    newest = save_checkpoint(tmp_path, state(2), keep=2)
    content = newest.read_bytes()
    assert torch.load(newest, weights_only=True)["step"] == 2  # it is torch's own format all the same
    places = [*range(0, len(content) - 400, 997), *range(len(content) - 400, len(content))]
    for place in places:
        newest.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        with pytest.warns(UserWarning, match="trying the one before"):
            assert load_newest(tmp_path)["step"] == 1


def test_training_does_not_wait_for_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that is due while the last one is being written comes after it."""
    go, written = threading.Event(), []

    def write(folder: Path, content: dict, keep: int) -> Path:
        assert go.wait(60)
        written.append(content["step"])
        return folder

    monkeypatch.setattr(checkpoint, "save_checkpoint", write)
    with CheckpointWriter(tmp_path, keep=2, every_steps=2, every_minutes=0) as writer:
        taken = []
        for step in range(1, 8):
            if writer.is_due(step):
                writer.save(state(step))
                taken.append(step)
            if step == 5:
                go.set()
                assert writer.pending is not None
                writer.pending.result(60)
    assert taken == written == [2, 6]


def test_a_checkpoint_is_due_after_some_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)
    with CheckpointWriter(tmp_path, keep=2, every_steps=0, every_minutes=1) as writer:
        assert not writer.is_due(1)
        now += 60
        assert writer.is_due(2)
        writer.save(state(2))
        writer.wait()
        assert not writer.is_due(3)
    assert load_newest(tmp_path)["step"] == 2


def test_a_run_restarted_before_damaged_files_keeps_its_new_checkpoints(tmp_path: Path) -> None:
    for step in (5, 6):
        save_checkpoint(tmp_path, state(step), keep=2)
        (tmp_path / f"step_{step:08d}.pt").write_bytes(b"cut")
    (tmp_path / ".step_00000009.pt.tmp").write_bytes(b"of a write that was killed")
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, state(step), keep=2)
    assert [int(path.stem.split("_")[1]) for path in list_checkpoints(tmp_path)] == [6, 5, 3, 2]
    assert not list(tmp_path.glob(".*"))
    with pytest.warns(UserWarning, match="trying the one before"):
        assert load_newest(tmp_path)["step"] == 3


def test_no_usable_checkpoint_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_checkpoint(tmp_path, state(1), keep=2)
    with monkeypatch.context() as patch:  # the disk does not give it now: that is no damage
        patch.setattr(checkpoint, "read_checked", lambda path: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
        with pytest.raises(OSError, match="I/O error"):
            load_newest(tmp_path)
    path.write_bytes(pack({"model": {}}))
    with pytest.raises(UsageError, match="none can be used"), pytest.warns(UserWarning, match="not a training state"):
        load_newest(tmp_path)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_to_resume_is_none(tmp_path: Path) -> None:
    assert load_newest(tmp_path) is None
    assert load_newest(tmp_path / "absent") is None
