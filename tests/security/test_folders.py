"""Folders in which another user has put links, or which hold very many files."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stvit_video import run
from stvit_video.common.files import open_to_append, whole_file, write_atomically
from stvit_video.common.locks import Lock
from stvit_video.inference.annotate import Copies
from stvit_video.inference.predictor import Prediction
from stvit_video.runs.folder import RESULT_FILES, TRAINING_FILES
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
