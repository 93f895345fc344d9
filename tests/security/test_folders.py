"""Folders in which another user has put links, or which hold very many files."""

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stvit_video import run
from stvit_video.common.files import open_to_append, remove_leftovers, whole_file, write_atomically
from stvit_video.common.locks import Lock
from stvit_video.data import sample
from stvit_video.inference.annotate import Copies
from stvit_video.inference.prediction import Prediction
from stvit_video.runs.folder import RESULT_FILES, TRAINING_FILES
from stvit_video.runs.record import RunRecord
from stvit_video.runtime.limits import reserve_files
from tests.conftest import REPOSITORY, numbered_frames


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """Return a file that belongs to nothing here."""
    path = tmp_path / "victim"
    path.write_text("untouched")
    return path


def test_links_at_the_names_of_a_run_are_not_written_through(
    small_run: Callable[..., list[str]], tmp_path: Path, victim: Path
) -> None:
    arguments = small_run()
    folder = Path(arguments[arguments.index("OUTPUT_DIR") + 1])
    (folder / "checkpoints").mkdir(parents=True)
    names = {*RESULT_FILES["train"], *TRAINING_FILES, "config.yaml", "environment.json", "checkpoints/step_00000004.pt"}
    # These say that a run is here already.
    known = {"config.yaml", "results.json", *(name for name in names if name.endswith((".pt", ".safetensors")))}
    for path in (folder / name for name in names):
        for name in (f".{path.name}.tmp", f".{path.name}.{os.getpid()}.tmp"):
            path.with_name(name).symlink_to(victim)
    assert run.main(arguments) == 2  # the folder is no run's
    (folder / "config.yaml").write_text("{OUTPUT_DIR: x, MODEL: {}, DATA: {}}\n")
    for name in names - known:
        (folder / name).symlink_to(victim)
    assert run.main(arguments) == 0
    assert victim.read_text() == "untouched"


def test_a_lock_or_log_that_is_a_link_is_refused(tmp_path: Path, victim: Path) -> None:
    link = tmp_path / "run" / ".lock"
    link.parent.mkdir()
    link.symlink_to(victim)
    for opens in (lambda: Lock(link).take(0, str), lambda: open_to_append(link)):
        with pytest.raises(OSError, match="it is a link, and is not followed"):
            opens()
    link.unlink()
    link.symlink_to(tmp_path / "new")
    with pytest.raises(OSError, match="it is a link, and is not followed"):
        open_to_append(link)
    assert not (tmp_path / "new").exists()
    assert victim.read_text() == "untouched"


@pytest.mark.parametrize("name", [".lock", ".lock.1", "metrics.jsonl"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "dangling"])
def test_what_is_no_file_holds_no_run_up(
    kind: str, name: str, small_run: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = small_run("TRAIN.MAX_STEPS", "1", "DATA.VAL_LIST", "")
    path = Path(arguments[arguments.index("OUTPUT_DIR") + 1]) / name
    path.parent.mkdir()
    (path.parent / "config.yaml").write_text("{OUTPUT_DIR: x, MODEL: {}, DATA: {}}\n")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    code, error = run.main(arguments), capsys.readouterr().err
    assert not (path.parent / "nowhere").exists()
    if name == "metrics.jsonl" and kind != "folder":  # of a run without checkpoints, which starts anew
        assert code == 0
        assert path.is_file()
        assert not path.is_symlink()
    else:
        assert code == 2
        assert f"{name} " in error
        assert error.count("\n") == 1


def test_files_are_opened_to_append_under_their_path(tmp_path: Path) -> None:
    with open_to_append(tmp_path / "log") as file:
        assert file.name == str(tmp_path / "log")  # locks compare the open file with what lies there


def test_what_killed_writes_leave_is_removed(tmp_path: Path) -> None:
    for name, suffix in (("curves.png", ".png"), ("step_1.pt", ""), ("results.json", "")):
        with whole_file(tmp_path / name, suffix) as temporary:
            shutil.copy(temporary, tmp_path / "copy")
        os.rename(tmp_path / "copy", temporary)  # as a kill leaves it
    mine = tmp_path / ".notes.tmp.txt"
    mine.write_text("")
    remove_leftovers(tmp_path, "step_*.pt")
    assert len(list(tmp_path.glob(".*.tmp*"))) == 3
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"curves.png", "step_1.pt", "results.json", mine.name}


def test_the_mark_of_a_whole_set_is_not_made_through_a_link(tmp_path: Path) -> None:
    spec = sample.Spec(clips=(1, 1, 1), stills=(1, 1))
    sample.prepare(tmp_path / "set", spec, workers=1, progress=False)
    (tmp_path / "set" / "complete").unlink()
    (tmp_path / "set" / "complete").symlink_to(tmp_path / "victim")
    sample.prepare(tmp_path / "set", spec, workers=1, progress=False)
    assert not (tmp_path / "victim").exists()
    assert sample.is_complete(tmp_path / "set")


def test_a_user_without_home_and_a_system_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    (tmp_path / "results.json").write_text('{"top1": 50}')
    (tmp_path / "config.yaml").write_text("DATA: {ROOT: /}")
    assert RunRecord(tmp_path).roots == []
    monkeypatch.setattr(os, "listdir", lambda path: (_ for _ in ()).throw(FileNotFoundError(path)))
    reserve_files(1, "a run", "")


def test_files_are_whole_and_have_the_rights_of_new_ones(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "result").symlink_to(victim)
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "result", b"new")
        with pytest.raises(FileNotFoundError), whole_file(tmp_path / "half", ".png") as temporary:
            temporary.write_bytes((tmp_path / "missing").read_bytes())
        write_atomically(tmp_path / ("n" * 255), b"")
    finally:
        os.umask(before)
    assert victim.read_text() == "untouched"
    assert (tmp_path / "result").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "result").lstat().st_mode) == 0o640
    assert {path.name for path in tmp_path.iterdir()} == {"victim", "result", "n" * 255}


def test_a_folder_that_is_a_link_of_the_user_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    write_atomically(tmp_path / "runs" / "a", b"a")
    open_to_append(tmp_path / "runs" / "b").close()
    lock = Lock(tmp_path / "runs" / ".lock")
    assert lock.take(0, str)
    lock.close()
    assert sorted(os.listdir(tmp_path / "disk")) == ["a", "b"]


def test_equal_names_are_numbered_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[object] = []

    class Counted(dict[str, int]):
        def __contains__(self, name: object) -> bool:
            looks.append(name)
            return super().__contains__(name)

    copies = Copies(tmp_path, Counted())
    for i, name in enumerate(["a", "a-2", *["a"] * 1000]):
        copies.add(Prediction(f"{i}/{name}.mp4", []))  # none of them can be read
    assert copies.missing == 1002
    assert copies.used.keys() == {"a", *(f"a-{i}" for i in range(2, 1003))}
    assert len(looks) < 3000


@pytest.mark.long
@pytest.mark.parametrize(
    ("before", "code"),
    [
        ("umask 077", 0),
        ("unset HOME", 0),
        ("export HOME=/proc", 0),  # nothing can be written there
        ("export TMPDIR=/nonexistent", 0),
        ("export LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0", 0),
        ("export PYTHONIOENCODING=ascii", 0),
        ("ulimit -n 16", 0),
        ("ulimit -n 10", 1),
        ("ulimit -v 1000000", 1),
    ],
)
def test_a_command_in_odd_surroundings(
    before: str, code: int, trained: Path, write_clip: Callable[..., Path], tmp_path: Path
) -> None:
    clip = write_clip(numbered_frames(20), "größe 走.mp4")
    line = f'{before}; exec "$@"'
    words = ["-m", "stvit_video.predict", "--checkpoint", str(trained), str(clip), "--output", str(tmp_path / "o.json")]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        ["bash", "-c", line, "-", sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == code
    if code == 0:
        path = json.loads((tmp_path / "o.json").read_text("utf-8"))[0]["path"]
        assert os.fsencode(path) == os.fsencode(clip)  # its bytes, also where the locale has no such letters
