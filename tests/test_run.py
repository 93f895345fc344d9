"""The main command as a user runs it: a whole run, several processes, and mistakes."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from stvit_video import run
from stvit_video.models import create_model, load_pretrained
from tests.conftest import REPOSITORY, make_once

Arguments = Callable[..., list[str]]
Refused = Callable[[list[str]], str]


def command(*words: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    words = (sys.executable, "-m", *launcher, "stvit_video.run", *words)
    return subprocess.run(words, capture_output=True, text=True, timeout=600, cwd=REPOSITORY, env=env)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, started as a user would, that generates its own data and tests 2 x 3 views."""

    def make(folder: Path) -> None:
        words = "DATA.GENERATE_CLIPS [40,16,11] TRAIN.EPOCHS 2 DATA.WORKERS 1 TEST.BATCH_SIZE 3"
        views = "TEST.CLIPS 2 TEST.CROPS 3 TEST.SHORT_SIDE 72"
        places = ["DATA.ROOT", f"{folder}/data", "OUTPUT_DIR", f"{folder}/run"]
        result = command("--cfg", "configs/sample_stvit.yaml", *words.split(), *views.split(), *places)
        assert result.returncode == 0, result.stderr
        (folder / "stdout").write_text(result.stdout)

    return make_once(tmp_path_factory, "finished", make)


def test_a_run_writes_all_documented_files(finished: Path) -> None:
    found = {path.name for path in (finished / "run").iterdir()}
    assert {
        "config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "results.json", "curves.png",
        "confusion.png", "failures.csv", "model.safetensors",
    } <= found  # fmt: skip
    assert any(name.startswith("events.out.tfevents") for name in found)
    results = json.loads((finished / "run" / "results.json").read_text())
    assert results["videos"] == results["scored"] == 11
    assert results["coverage"] == 1.0
    assert results["views"] == {"clips": 2, "crops": 3}
    assert results["gflops_per_video"] == pytest.approx(6 * results["gflops"])
    assert 0 <= results["top1"] <= results["top5"] <= 100
    assert results["top1"] * 11 / 100 == pytest.approx(round(results["top1"] * 11 / 100))
    rows = [json.loads(line) for line in (finished / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all({"step", "epoch", "split"} <= row.keys() for row in rows)
    assert {row["split"] for row in rows} == {"train", "val"}
    said = (finished / "stdout").read_text()
    assert "M parameters" in said
    assert "GFLOPs a clip" in said
    assert "top-1" in said


def test_final_weights_rebuild_the_model_that_was_tested(finished: Path) -> None:
    from safetensors import safe_open

    with safe_open(finished / "run" / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    model = create_model(metadata["name"], **json.loads(metadata["arguments"]))
    assert load_pretrained(model, finished / "run" / "model.safetensors", min_coverage=1.0).coverage == 1.0
    assert json.loads(metadata["classes"])[4] == "clockwise"


def test_a_finished_run_is_not_run_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def times() -> dict[Path, int]:  # without the lock, which another worker's test may take and leave
        files = [path for path in (finished / "run").rglob("*") if not path.name.startswith(".lock")]
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    assert run.main(evaluation(finished, "train", finished / "run")) == 0
    assert "is finished" in capsys.readouterr().out
    assert before == times()


def evaluation(finished: Path, mode: str, output: Path, *more: str) -> list[str]:
    views = (
        "TEST.CLIPS 2 TEST.CROPS 3 TEST.SHORT_SIDE 72 TEST.BATCH_SIZE 3 TRAIN.EPOCHS 2 DATA.GENERATE_CLIPS [40,16,11]"
    )
    words = [*views.split(), "DATA.ROOT", f"{finished}/data", "MODE", mode, "OUTPUT_DIR", str(output), *more]
    return ["--cfg", str(REPOSITORY / "configs" / "sample_stvit.yaml"), *words]


def test_equal_paths_written_differently_are_the_same_run(
    small_run: Arguments, small_set: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["TRAIN.MAX_STEPS", "1", "DATA.VAL_LIST", ""]
    assert run.main(small_run(*words)) == 0
    monkeypatch.chdir(small_set.parent)
    assert run.main(small_run(*words, "DATA.ROOT", small_set.name)) == 0
    assert "is finished" in capsys.readouterr().out
    assert run.main(small_run(*words, "DATA.ROOT", ".")) == 2


@pytest.mark.parametrize(
    "processes", [pytest.param(2, marks=pytest.mark.long), 3, pytest.param(4, marks=pytest.mark.long)]
)
def test_any_number_of_processes_gives_the_same_figures(finished: Path, tmp_path: Path, processes: int) -> None:
    """11 videos in batches of 3 are no whole number for any rank; the reference is the test after training."""
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m")
    init = ("MODEL.INIT", str(finished / "run" / "model.safetensors"), "DEVICE", "cpu")
    result = command(*evaluation(finished, "test", tmp_path / "out", *init), launcher=launcher)
    assert result.returncode == 0, result.stderr
    expected = json.loads((finished / "run" / "results.json").read_text())
    got = json.loads((tmp_path / "out" / "results.json").read_text())
    assert got.pop("processes") == processes
    for name in got.keys() - {"clips_per_second"}:
        assert got[name] == expected[name], name
    for name in ("predictions.csv", "per_class.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (finished / "run" / name).read_bytes()


def test_two_processes_train_like_one(small_run: Arguments, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    assert run.main(small_run("DATA.VAL_LIST", "", "DEVICE", "cpu")) == 0
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")
    words = small_run("DATA.VAL_LIST", "", "DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "two"))
    result = command(*words, launcher=launcher)
    assert result.returncode == 0, result.stderr
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "two"))
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-4


def test_a_bad_video_is_recorded_and_the_run_continues(small_set: Path, tmp_path: Path, small_run: Arguments) -> None:
    root = tmp_path / "damaged"
    shutil.copytree(small_set, root)
    (root / "videos" / "test_00003.mp4").write_bytes(b"broken")
    (root / "videos" / "train_00000.mp4").unlink()
    assert run.main(small_run("DATA.ROOT", str(root))) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["videos"], results["scored"], results["failed"]) == (16, 15, 1)
    assert results["coverage"] == 15 / 16
    rows = list(csv.DictReader((tmp_path / "run" / "failures.csv").open()))
    assert [(Path(row["path"]).name, row["stage"]) for row in rows] == [
        ("test_00003.mp4", "test"),
        ("train_00000.mp4", "train"),
    ]
    assert all(row["message"] for row in rows)


def test_too_many_bad_videos_stop_the_run(
    small_set: Path, tmp_path: Path, small_run: Arguments, refused: Refused
) -> None:
    root = tmp_path / "damaged"
    shutil.copytree(small_set, root)
    for i in range(0, 16, 4):
        (root / "videos" / f"test_{i:05d}.mp4").write_bytes(b"broken")
    said = refused(small_run("DATA.ROOT", str(root)))
    assert "4 of 16 test videos could not be read, more than DATA.MAX_FAILURES 0.1" in said
    assert not (tmp_path / "run" / "results.json").exists()
    assert len((tmp_path / "run" / "failures.csv").read_text().splitlines()) == 5


def test_a_list_of_no_videos_stops_at_once(
    small_set: Path, tmp_path: Path, small_run: Arguments, refused: Refused
) -> None:
    root = tmp_path / "pages"
    shutil.copytree(small_set, root)
    for path in (root / "videos").glob("train_*.mp4"):
        path.write_text("<html>404</html>")
    for workers in ("0", "1"):
        said = refused(small_run("DATA.ROOT", str(root), "DATA.WORKERS", workers, "OVERWRITE", "True"))
        assert "10 training videos in a row could not be read, the first" in said


def test_wrong_use_is_one_line(small_run: Arguments, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("videos/train_00000.mp4\n")
    (tmp_path / "empty.csv").touch()
    (tmp_path / "range.csv").write_text("videos/train_00000.mp4 8\n" * 8)
    (tmp_path / "text.pth").write_text("<html>")
    (tmp_path / "file").touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").touch()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.yaml").write_bytes(b"MODEL: {\0")
    cases = {
        "Did you mean TRAIN.EPOCHS": ["TRAIN.EPOCS", "3"],
        "it takes an int": ["TRAIN.EPOCHS", "soon"],
        "has no label": ["DATA.TRAIN_LIST", str(tmp_path / "list.csv")],
        "is empty": ["DATA.TEST_LIST", str(tmp_path / "empty.csv")],
        "allowed: 0 to 7": ["DATA.TRAIN_LIST", str(tmp_path / "range.csv")],
        "are missing: DATA.TRAIN_LIST": ["DATA.TRAIN_LIST", "absent.csv"],
        "is a web page": ["MODEL.INIT", str(tmp_path / "text.pth")],
        f"are missing: MODEL.INIT {tmp_path}/absent.pth.": ["MODEL.INIT", str(tmp_path / "absent.pth")],
        "Did you mean vit_sample_patch8": ["MODEL.NAME", "vit_sample_patch"],
        "not a positive multiple": ["DATA.FRAMES", "7"],
        "files that are not a run's": ["OUTPUT_DIR", str(tmp_path / "photos")],
        "that is not a run's, or is damaged": ["OUTPUT_DIR", str(tmp_path / "damaged")],
        "is a file; give a folder": ["OUTPUT_DIR", str(tmp_path / "file")],
        "cannot be written": ["OUTPUT_DIR", str(tmp_path / "file" / "run")],
        "is missing; give MODEL.INIT FILE": ["MODE", "test"],
    }
    for says, words in cases.items():
        output = [] if "OUTPUT_DIR" in words else ["OUTPUT_DIR", str(tmp_path / f"out {len(says)}{says[:3]}")]
        said = refused(small_run(*output, *words))
        assert says in said
    assert (tmp_path / "photos" / "me.jpg").exists()
    assert "is missing" in refused(["MODE", "test"])
    assert "unrecognized" in refused([*small_run(), "--turbo"])
    assert "is not there; give a .yaml file" in refused(["--cfg", "absent.yaml"])
    assert "--cfg is given 2 times" in refused(["--cfg", "a.yaml", "--cfg", "b.yaml"])
    assert "--cfg FILE is missing; write --cfg configs/finetune.yaml" in refused(["configs/finetune.yaml"])
    assert "Did you mean OPTIM.LR?" in refused([*small_run(), "--lr", "1e-3"])


def test_results_are_never_overwritten_without_being_asked(
    finished: Path, tmp_path: Path, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished / "run", copy)
    assert "OVERWRITE True" in refused(evaluation(finished, "test", copy))
    said = refused(evaluation(finished, "train", copy, "OPTIM.LR", "0.5"))
    assert "holds a run with other settings: OPTIM.LR 0.0005 (now 0.5)" in said
    assert (copy / "results.json").read_bytes() == (finished / "run" / "results.json").read_bytes()
    (copy / "results.json").unlink()
    assert "TRAIN.RESUME is never" in refused(evaluation(finished, "train", copy, "TRAIN.RESUME", "never"))
    (copy / "results.json").write_text("{}")
    assert run.main(evaluation(finished, "test", copy, "OVERWRITE", "True")) == 0
    assert json.loads((copy / "results.json").read_text())["videos"] == 11
    assert (copy / "model.safetensors").exists()


def test_weights_of_another_network_are_not_tested(finished: Path, tmp_path: Path, refused: Refused) -> None:
    small = create_model("stvit_vit_sample_patch8", num_frames=8, image_size=64, num_classes=8)
    headless = {name: value for name, value in small.state_dict().items() if not name.startswith("head.")}
    torch.save(headless, tmp_path / "headless.pth")
    words = ("MODEL.INIT", str(tmp_path / "headless.pth"))
    assert "head.proj.weight (new)" in refused(evaluation(finished, "test", tmp_path / "out", *words))
    words = ("MODEL.INIT", str(finished / "run" / "model.safetensors"), "MODEL.FIRST_RESIDUAL", "False")
    assert "trained with first_residual None" in refused(evaluation(finished, "test", tmp_path / "out", *words))
    assert not (tmp_path / "out").exists()
    torch.save(
        create_model("vit_tiny_patch16", num_frames=8, image_size=64, num_classes=8).state_dict(), tmp_path / "w.pth"
    )
    said = refused(evaluation(finished, "test", tmp_path / "out", "MODEL.INIT", str(tmp_path / "w.pth")))
    assert "width 192, this model 96, depth 12, this model 8: use stvit_vit_tiny_patch16" in said


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def test_no_space_left_is_one_line(small_disk: Path, small_run: Arguments, refused: Refused) -> None:
    said = refused(small_run("OUTPUT_DIR", str(small_disk / "run"), "DATA.VAL_LIST", ""))
    assert "No space left on device" in said
    assert "free space" in said
    assert not list((small_disk / "run" / "checkpoints").iterdir())
    generate = ["DATA.GENERATE", "sample", "DATA.GENERATE_CLIPS", "[600,8,8]", "DATA.ROOT", str(small_disk / "set")]
    assert "No space left on device" in refused(
        small_run(*generate, "OVERWRITE", "True", "OUTPUT_DIR", f"{small_disk}/b")
    )


def test_a_mistake_changes_no_folder(small_run: Arguments, refused: Refused, tmp_path: Path) -> None:
    """No new folder, so that the corrected command starts, and not the run that OVERWRITE would replace."""
    uneven = ["TRAIN.BATCH_SIZE", "9", "TRAIN.ACCUMULATE", "2"]
    for words in (["MODEL.NAME", "vit"], ["DATA.TEST_LIST", "absent.csv"], uneven):
        refused(small_run(*words))
        assert not (tmp_path / "run").exists()
    assert run.main(small_run()) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != ".lock"}
    refused(small_run("OVERWRITE", "True", "DATA.VAL_LIST", "absent.csv"))
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != ".lock"}


def test_keys_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--keys"]) == 0
    assert "TRAIN.EPOCHS" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        ([], ["TRAIN_LIST", "VAL_LIST", "TEST_LIST", "CLASSES", "INIT"]),
        (["DATA.VAL_LIST", "", "DATA.CLASSES", ""], ["TRAIN_LIST", "TEST_LIST", "INIT"]),
        (
            ["MODEL.INIT", "absent.pth", "DATA.TRAIN_LIST", ""],
            ["TRAIN_LIST", "VAL_LIST", "TEST_LIST", "CLASSES", "INIT"],
        ),
        (["MODE", "test", "MODEL.INIT", "absent.pth"], ["TEST_LIST", "CLASSES", "INIT"]),
        (["MODE", "transfer", "MODEL.INIT", "absent.pth"], ["TRAIN_LIST", "TEST_LIST", "CLASSES", "INIT"]),
        (
            ["MODE", "transfer", "MODEL.INIT", "absent.pth", "TRANSFER.FINETUNE", "True"],
            ["TRAIN_LIST", "VAL_LIST", "TEST_LIST", "CLASSES", "INIT"],
        ),
    ],
)
def test_all_missing_files_are_listed_at_once(
    tmp_path: Path, refused: Refused, words: list[str], missing: list[str]
) -> None:
    cfg = ["--cfg", str(REPOSITORY / "configs" / "k400_stvit_vit_s.yaml")]
    said = refused([*cfg, "DATA.ROOT", f"{tmp_path}/k400", "OUTPUT_DIR", f"{tmp_path}/run", *words])
    named = said.partition("are missing: ")[2].partition(". Put them there")[0].split(", ")
    assert [name.split()[0].split(".")[1] for name in named] == missing
    assert f"DATA.TEST_LIST {tmp_path}/k400/test.csv" in named
    assert f"lines `path label`, paths starting from DATA.ROOT {tmp_path}/k400" in said
    assert "this runs now: python -m stvit_video.run --cfg configs/sample_stvit.yaml" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["MODEL.NAME", "vit"], ["DATA.SIZE", "60"], ["MODEL.INIT", "absent.pth"]])
@pytest.mark.parametrize("mode", [["MODE", "train"], ["MODE", "test"], ["MODE", "transfer"], ["--dry-run"]])
def test_mistakes_are_found_before_data_are_generated(
    tmp_path: Path, refused: Refused, words: list[str], mode: list[str]
) -> None:
    cfg = ["--cfg", str(REPOSITORY / "configs" / "sample_stvit.yaml"), "DATA.ROOT", str(tmp_path / "set")]
    init = [] if "MODEL.INIT" in words else ["MODEL.INIT", __file__]
    said = refused([*cfg, "OUTPUT_DIR", str(tmp_path / "run"), *words, *init, *mode])
    assert words[1] in said
    assert not list(tmp_path.iterdir())


def test_a_test_needs_its_weights_before_its_data(finished: Path, tmp_path: Path, refused: Refused) -> None:
    words = ["--cfg", str(REPOSITORY / "configs" / "sample_stvit.yaml"), "DATA.ROOT", str(tmp_path / "set")]
    none = refused([*words, "MODE", "test", "OUTPUT_DIR", str(tmp_path / "none")])
    assert f"{tmp_path / 'none' / 'model.safetensors'} is missing; give MODEL.INIT" in none
    mode = ["MODE", "test", "MODEL.INIT", "absent.pth", "OUTPUT_DIR", str(tmp_path / "other")]
    assert "absent.pth is missing" in refused([*words, *mode])
    restart = ["MODEL.INIT", "absent.pth", "OUTPUT_DIR", str(finished / "run"), "OVERWRITE", "True"]
    assert "absent.pth is missing" in refused([*words, *restart])
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_does_not_need_its_initial_weights(
    small_run: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    """Its load report is kept in the run folder."""
    model = create_model("stvit_vit_sample_patch8", num_frames=1, image_size=64, num_classes=8)
    torch.save(model.state_dict(), tmp_path / "image.pth")
    words = small_run("MODEL.INIT", str(tmp_path / "image.pth"), "DATA.VAL_LIST", "")

    def stop(*rest: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("stvit_video.runs.preflight.save_weights", stop)
    assert run.main(words) == 1
    monkeypatch.undo()
    report = (tmp_path / "run" / "load_report.json").read_text()
    assert json.loads(report)["source"] == str(tmp_path / "image.pth")
    assert "pos_embed" in json.loads(report)["keys"]["loaded"]
    (tmp_path / "image.pth").unlink()
    assert run.main(words) == 0
    assert (tmp_path / "run" / "load_report.json").read_text() == report
    assert "MODEL.INIT" in refused([*words, "OVERWRITE", "True"])
    assert run.main(small_run("DATA.VAL_LIST", "", "OVERWRITE", "True")) == 0
    assert not (tmp_path / "run" / "load_report.json").exists()


def test_an_image_model_trains_on_class_folders_and_is_tested(small_run: Arguments, tmp_path: Path) -> None:
    from safetensors import safe_open

    words = small_run("DATA.CLASSES", "", "DATA.SAMPLING", "uniform", cfg="sample_image")
    assert run.main(words) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["videos"] == results["scored"] == 16
    weights = tmp_path / "run" / "model.safetensors"
    with safe_open(weights, "pt") as file:
        classes = json.loads(file.metadata()["classes"])
    assert classes == sorted(["disc", "square", "triangle", "star", "ring", "cross", "bar", "half-disc"])
    tested = ["MODE", "test", "MODEL.INIT", str(weights), "OUTPUT_DIR", str(tmp_path / "test")]
    assert run.main([*words, *tested]) == 0
    report = json.loads((tmp_path / "test" / "load_report.json").read_text())
    assert report["coverage"] == 1
    again = json.loads((tmp_path / "test" / "results.json").read_text())
    assert (again["top1"], again["videos"]) == (results["top1"], 16)


def test_cost_needs_no_data(capsys: pytest.CaptureFixture) -> None:
    config = str(REPOSITORY / "configs" / "k400_stvit_vit_s.yaml")
    assert run.main(["--cfg", config, "--cost"]) == 0
    printed = capsys.readouterr().out
    assert "no data found in data/k400: 400 classes assumed" in printed
    assert "16.107 GFLOPs a clip" in printed
    assert "0.35 GB for weights, gradients and optimiser" in printed
