"""Names, records and folders of jobs: what they hold is never a command, an option or more jobs than one."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stvit_video.common.errors import UsageError
from stvit_video.common.text import printable
from stvit_video.slurm.cli import main
from stvit_video.slurm.jobs import find_jobs, last_lines
from stvit_video.slurm.request import JobRequest, read_profile
from tests.slurm.cluster import CONFIG

COMMANDS = ("\n%s\n", "$(%s)", "`%s`", "';%s;'", '"; %s; "', "\r\n%s")


def refused(capsys: pytest.CaptureFixture[str], code: int) -> str:
    """Check that a command has ended as wrong use, with one line, and return that."""
    said = capsys.readouterr().err
    assert code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


@pytest.fixture
def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put clients of SLURM on the path that write their words to a file, which is returned."""
    folder, called = tmp_path / "bin", tmp_path / "called"
    folder.mkdir()
    for name in ("sbatch", "scancel", "squeue", "sacct", "scontrol", "sinfo"):
        (folder / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {called}\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return called


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a run folder with the record of a job, with changes."""

    def write(**changes: Any) -> Path:
        run = tmp_path / "run"
        (run / "slurm").mkdir(parents=True, exist_ok=True)
        record = {"id": "7", "cluster": "slurm", "submission": "abc", "logs": str(run / "slurm"), **changes}
        (run / "slurm" / "job.json").write_text(json.dumps(record))
        return run

    return write


@pytest.mark.parametrize("words", [form % "touch PWNED" for form in COMMANDS])
def test_no_name_becomes_a_command_of_the_script(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    config = tmp_path / f"a{words}b.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(Path(CONFIG[1]).read_text())
    dry = ["--nodes", "1", "--gpus-per-node", "0", "--dry-run"]
    for given in (["--cfg", str(config), *dry], [*CONFIG, *dry, "OUTPUT_DIR", f"runs/{words}"]):
        code = main(given)
        said = capsys.readouterr()
        if code:
            assert code == 2
            assert said.err.count("\n") == 1
        script = said.out.partition("\nruns:")[0]
        path = f"{tmp_path}:{os.environ['PATH']}"
        subprocess.run(["bash"], input=script, text=True, env={"PATH": path}, check=True, cwd=tmp_path)
        assert not list(tmp_path.rglob("PWNED"))
        assert "\r" not in script


@pytest.mark.parametrize("name", ["50%", "%j", "a%%b", "back\\slash", "two\nlines", "\x1b[2J"])
def test_folders_that_slurm_would_read_otherwise_are_refused(name: str, tmp_path: Path) -> None:
    request = JobRequest(read_profile(None), 1, 0, 1, 1, "name")
    with pytest.raises(UsageError, match="a job's folder cannot have"):
        request.sbatch_text(tmp_path / name / "slurm", 1)


@pytest.mark.parametrize(
    "text",
    ['partition: "a\\n#SBATCH --uid=0"', 'srun: ["a\\nb"]', "sbatch: {'a b': 1}", "sbatch: {'x\\n': 1}",
     "setup: [[1]]", 'sbatch: {comment: "\\e[2J"}',
     'modules: ["a\\rb"]', 'python: "/x\\n/y"', "sbatch: {comment: {a: 1}}"],
)  # fmt: skip
def test_a_profile_holds_words_of_one_line(text: str, tmp_path: Path) -> None:
    profile = tmp_path / "site.yaml"
    profile.write_text(text + "\n")
    with pytest.raises(UsageError, match=r"text of one line|no option of sbatch|list of texts"):
        read_profile(profile)


@pytest.mark.parametrize("verb", ["cancel", "status", "logs", "resume"])
@pytest.mark.parametrize(
    "changes",
    [{"id": "--me"}, {"id": "1,2"}, {"id": "-u root"}, {"id": ""}, {"id": 7}, {"id": "7\n8"}, {"id": "7_*"},
     {"id": "٣"}, {"cluster": "other"}, {"submission": "../*"}, {"logs": "relative"}, {"logs": None}],
)  # fmt: skip
def test_a_record_names_one_job(
    verb: str, changes: dict[str, Any], job: Callable[..., Path], clients: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"{next(iter(changes))} is" in refused(capsys, main([verb, str(job(**changes))]))
    assert not clients.exists()


def test_a_record_that_is_no_record_is_said(
    job: Callable[..., Path], clients: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = job()
    for content in ("", "[]", "7", "{", '"id"', "[" * 100_000):
        (run / "slurm" / "job.json").write_text(content)
        refused(capsys, main(["cancel", str(run)]))
    (run / "slurm" / "job.json").unlink()
    (run / "slurm" / "array.json").write_text(json.dumps([str(run.parent / "other")]))
    assert "which is not in" in refused(capsys, main(["cancel", str(run)]))
    assert not clients.exists()


def test_damaged_records_are_passed_over(
    job: Callable[..., Path], clients: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = job()
    (run / "slurm" / "failures").mkdir()
    (run / "slurm" / "failures" / "abc.0.0.json").write_text('["a"]')
    (run / "slurm" / "history.jsonl").write_text('7\n{}\n{"submission": "abc", "event": "stopped"}\n\x1b[2J\n')
    (run / "metrics.jsonl").write_text('{"step": "\\u001b[2J", "loss": "high"}\n')
    assert main(["status", str(run)]) in (0, 2)
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert main(["cancel", str(run)]) == 0
    assert "scancel 7\n" in clients.read_text()


@pytest.mark.parametrize("verb", ["cancel", "resume"])
@pytest.mark.parametrize("part", ["", "slurm", "slurm/job.json"])
def test_folders_of_others_are_not_acted_on(
    verb: str, part: str, job: Callable[..., Path], clients: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    run = job()
    os.chown(run / part, 12345, -1)
    assert "belongs to user 12345" in refused(capsys, main([verb, str(run)]))
    assert not clients.exists()


@pytest.mark.parametrize(
    "changes",
    [{}, {"name": 7}, {"nodes": -1}, {"profile": {"setup": "touch PWNED"}}, {"profile": {"python": "a\nb"}},
     {"profile": {"unknown": 1}}, {"more": 1}],
)  # fmt: skip
def test_a_request_is_read_as_it_was_written(
    changes: dict[str, Any], job: Callable[..., Path], clients: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = {"profile": {}, "nodes": 1, "gpus_per_node": 0, "tasks_per_node": 1, "cpus_per_task": 1, "name": "a"}
    request |= {"source": "/", **changes} if changes else {}
    refused(capsys, main(["resume", str(job(request=request))]))
    assert "sbatch" not in clients.read_text()


def test_logs_do_not_move_the_cursor(tmp_path: Path) -> None:
    log = tmp_path / "7_0_log.out"
    log.write_bytes(b"\x1b]0;title\x07\x1b[2J\tloss 1\xff\n" + "a\u202eb\u009bc\n".encode())
    assert last_lines(log, 5) == ["\\x1b]0;title\\x07\\x1b[2J\tloss 1\ufffd", "a\\u202eb\\x9bc"]
    log.write_text("".join(f"step {i}\n" for i in range(300_000)))
    assert last_lines(log, 2) == ["step 299998", "step 299999"]
    assert 50_000 < len(last_lines(log, 10**6)) < 150_000
    assert printable("Ein Weg zu Ärger, 走る, 🎬") == "Ein Weg zu Ärger, 走る, 🎬"
    assert printable("a\udcff") == "a\\udcff"
    with pytest.raises(UsageError, match="holds no submitted job"):
        find_jobs(tmp_path)
