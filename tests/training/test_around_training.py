"""Around training: interrupted tests that continue, result tables, dry runs, other logs, early ends."""

import csv
import importlib.machinery
import json
import math
import os
import shutil
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stvit_video import run
from stvit_video.common.cli import EXIT_STOPPED
from stvit_video.evaluation import evaluate
from stvit_video.evaluation.scores import PartialScores
from stvit_video.runs.folder import RunFolder
from stvit_video.runs.log import read_metrics
from tests.conftest import Killed

Arguments = Callable[..., list[str]]


def evaluation(trained: Path, output: Path) -> list[str]:
    """Overrides of a test of 16 videos in 8 batches."""
    return ["MODE", "test", "MODEL.INIT", str(trained), "OUTPUT_DIR", str(output), "TEST.BATCH_SIZE", "2"]


def test_defaults_given_explicitly_are_the_same_network(
    trained: Path, small_run: Arguments, refused: Callable[[list[str]], str], tmp_path: Path
) -> None:
    said = small_run("MODEL.PRESET", "paper", "MODEL.REDUCER", "stgm", *evaluation(trained, tmp_path / "test"))
    assert run.main(said) == 0
    other = small_run("MODEL.BASE_DEPTH", "3", *evaluation(trained, tmp_path / "other"))
    assert "was trained with base_depth None, not 3; set MODEL to match it" in refused(other)


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int, action: Callable[[], None]) -> list[int]:
    """Call ``action`` after a number of batches of a test; return the list of the sizes of the batches scored."""
    scored: list[int] = []
    add = PartialScores.add

    def count(self: PartialScores, row: Any) -> None:
        add(self, row)
        scored.append(len(row[0]))
        if len(scored) == after:
            action()

    monkeypatch.setattr(PartialScores, "add", count)
    return scored


def die() -> None:
    raise Killed


def test_a_stopped_test_continues_with_the_same_figures(
    small_run: Arguments, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    whole, stopped = (
        small_run(*evaluation(trained, tmp_path / "whole")),
        small_run(*evaluation(trained, tmp_path / "s")),
    )
    assert run.main(whole) == 0
    with monkeypatch.context() as patch:
        interrupt(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run.main(stopped) == EXIT_STOPPED
    assert "stopped by SIGTERM after 6 of 16 videos" in capfd.readouterr().err
    assert not (tmp_path / "s" / "results.json").exists()
    scored = interrupt(monkeypatch, 99, die)
    assert run.main(stopped) == 0
    assert sum(scored) == 10
    assert not (tmp_path / "s" / "checkpoints" / "test_parts").exists()
    for name in ("predictions.csv", "per_class.csv", "failures.csv"):
        assert (tmp_path / "s" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("s", "whole")]
    for one in results:
        assert one.pop("clips_per_second") > 0
    assert results[0] == results[1]


def test_a_test_stops_when_another_rank_stops(
    small_run: Arguments, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """At its next batch: the other rank would wait for the rest of its shard until the timeout."""
    scored = interrupt(monkeypatch, 3, lambda: monkeypatch.setattr(evaluate, "any_so_far", lambda *given: True))
    monkeypatch.setattr(evaluate, "any_of", lambda world, flag: True)
    assert run.main(small_run(*evaluation(trained, tmp_path / "told"))) == EXIT_STOPPED
    assert scored == [2, 2, 2]
    assert "after 6 of 16 videos" in capfd.readouterr().err


def test_a_killed_test_after_training_continues(
    small_run: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = small_run("TEST.BATCH_SIZE", "2", "DATA.VAL_LIST", "")
    write_at_once = PartialScores.__init__.__defaults__
    monkeypatch.setattr(PartialScores.__init__, "__defaults__", (0.0,))
    assert write_at_once != (0.0,)
    with monkeypatch.context() as patch:
        interrupt(patch, 5, die)
        with pytest.raises(Killed):
            run.main(arguments)
    scored = interrupt(monkeypatch, 99, die)
    assert run.main(arguments) == 0
    assert sum(scored) == 6


def test_parts_of_other_weights_views_or_lists_are_not_used(
    small_run: Arguments, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = evaluation(trained, tmp_path / "s")
    with monkeypatch.context() as patch:
        interrupt(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run.main(small_run(*words)) == EXIT_STOPPED
    scored = interrupt(monkeypatch, 99, die)
    for other in (["TEST.CLIPS", "2"], ["TEST.BATCH_SIZE", "8", "OUTPUT_DIR", str(tmp_path / "s")]):
        scored.clear()
        assert run.main(small_run(*words, *other, "OVERWRITE", str(other[0] != "TEST.CLIPS"))) == 0
        assert sum(scored) == 16


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "foreign"])
def test_a_damaged_part_is_scored_again_with_a_warning(tmp_path: Path, damage: str) -> None:
    parts = PartialScores(tmp_path / "parts", "key", 0)
    for first in (0, 2):
        parts.add((torch.tensor([first, first + 1]), torch.tensor([1, 0]), torch.full((2, 4), float(first))))
        parts.flush()
    assert sorted(int(row[0][0]) for row in parts.read()) == [0, 2]
    assert PartialScores(tmp_path / "parts", "other", 0).read() == []
    path = sorted((tmp_path / "parts").iterdir())[0]
    content = path.read_bytes()
    if damage == "foreign":
        torch.save([1, 2], path)
    else:
        place = content.index(torch.tensor([0, 1]).numpy().tobytes())
        flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        path.write_bytes({"cut": content[:100], "flipped": flipped, "text": b"no"}[damage])
    with pytest.warns(UserWarning, match="scored again"):
        assert [int(row[0][0]) for row in parts.read()] == [2]


def test_a_failed_video_is_tried_again(small_run: Arguments, trained: Path, tmp_path: Path) -> None:
    parts = []
    original = evaluate.PartialScores

    class Watched(original):  # type: ignore[misc, valid-type]
        def add(self, row: Any) -> None:
            parts.append(row[0].tolist())
            super().add(row)

    listed = tmp_path / "list.csv"
    root = Path(small_run()[small_run().index("DATA.ROOT") + 1])
    lines = (root / "motion" / "test.csv").read_text().splitlines()[:4]
    listed.write_text("\n".join([*lines[:3], "absent.mp4 1"]) + "\n")
    evaluate.PartialScores = Watched  # type: ignore[misc]
    try:
        words = [*evaluation(trained, tmp_path / "s"), "DATA.TEST_LIST", str(listed), "DATA.MAX_FAILURES", "0.5"]
        assert run.main(small_run(*words)) == 0
    finally:
        evaluate.PartialScores = original  # type: ignore[misc]
    assert parts == [[0, 1]]


def test_tables_agree_with_the_results(small_run: Arguments, trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "s"
    assert run.main(small_run(*evaluation(trained, output))) == 0
    results = json.loads((output / "results.json").read_text())
    videos, classes = (list(csv.DictReader((output / name).open())) for name in ("predictions.csv", "per_class.csv"))
    right = sum(row["label"] == row["predicted"] for row in videos)
    assert len(videos) == 16
    assert 100 * right / 16 == results["top1"]
    assert sum(int(row["correct"]) for row in classes) == right
    assert sum(int(row["videos"]) for row in classes) == 16
    assert {row["label"] for row in videos} <= {row["class"] for row in classes}
    assert all(float(row["probability"]) >= float(row["label_probability"]) for row in videos)


def test_a_dry_run_prints_the_run_and_writes_nothing(
    small_run: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[[list[str]], str]
) -> None:
    assert run.main([*small_run("TRAIN.ACCUMULATE", "2", "TEST.CLIPS", "2"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) <= 20
    assert "2 x clips (4, 3, 8, 64, 64) -> logits (4, 8), loss 2." in said
    assert "(chance 2.079)" in said  # ln 8
    assert "256 tokens a clip, then 64; training keeps" in said
    assert "weights: random, as MODEL.INIT is empty" in said
    assert f"a run begins in {tmp_path / 'run'}, which is new" in said
    assert "GFLOPs a clip" in said
    assert "peak memory" in said
    assert not (tmp_path / "run").exists()
    assert "TRAIN.BATCH_SIZE 9 does not divide" in refused(
        [*small_run("TRAIN.BATCH_SIZE", "9", "TRAIN.ACCUMULATE", "2"), "--dry-run"]
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["OPTIM.LR", "0.5"], "a run is refused: OUTPUT_DIR"),
        (["MODE", "test"], "a run is refused: OUTPUT_DIR"),
        (["DATA.TEST_LIST", "motion/val.csv", "OVERWRITE", "True"], "a run replaces what"),
        ([], "is finished: a run prints its results"),
    ],
)
def test_a_dry_run_works_beside_a_finished_run(
    trained: Path, small_run: Arguments, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    """It says what a run would do there, and changes no file."""
    folder = trained.parent
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    same = ["TRAIN.MAX_STEPS", "1", "DATA.VAL_LIST", "", "OUTPUT_DIR", str(folder)]
    assert run.main([*small_run(*same, *words), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert says in said
    assert ("100.0 % of the weights covered" if "MODE" in words else "weights: random") in said
    assert len(said.splitlines()) <= 20
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}


def test_a_folder_says_what_a_run_does_there(trained: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load((trained.parent / "config.yaml").read_text())

    def says(folder: Path, **changes: object) -> str:
        return RunFolder(folder, {**settings, **changes}).describe_start()

    assert says(trained.parent) == f"{trained.parent} is finished: a run prints its results and ends"
    assert says(trained.parent, OVERWRITE=True) == f"a run replaces what {trained.parent} holds (OVERWRITE True)"
    assert says(tmp_path / "new") == f"a run begins in {tmp_path / 'new'}, which is new"
    shutil.copytree(trained.parent, tmp_path / "stopped", ignore=shutil.ignore_patterns("results.json"))
    assert says(tmp_path / "stopped") == f"a run continues in {tmp_path / 'stopped'} from step_00000001.pt"


@pytest.mark.parametrize("mode", ["test", "transfer"])
def test_the_other_modes_have_a_dry_run_too(
    small_run: Arguments, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    words = [*evaluation(trained, tmp_path / "s")[2:], "MODE", mode]
    assert run.main([*small_run(*words), "--dry-run"]) == 0
    assert "test batch: clips (2, 3, 8, 64, 64) -> logits (2, 8)" in capsys.readouterr().out
    assert not (tmp_path / "s").exists()


def test_training_stops_at_max_steps_in_the_middle_of_an_epoch(small_run: Arguments, tmp_path: Path) -> None:
    assert (
        run.main(
            small_run("TRAIN.EPOCHS", "5", "TRAIN.MAX_STEPS", "6", "OPTIM.WARMUP_EPOCHS", "0", "OPTIM.LR", "0.001")
        )
        == 0
    )
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(row["split"], row["step"]) for row in rows] == [("train", 4), ("val", 4), ("train", 6), ("val", 6)]
    for row, step in ((rows[0], 4), (rows[2], 5)):  # the cosine ends with training; after it the last rate stays
        assert row["lr"] == pytest.approx(0.001 * 0.5 * (1 + math.cos(math.pi * (step + 0.5) / 6)))


def test_weights_and_biases_gets_the_same_rows_or_is_reported_missing(
    small_run: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[[list[str]], str]
) -> None:
    logged: list[tuple[dict, int]] = []
    begun: list[dict] = []
    board = types.SimpleNamespace(log=lambda values, step: logged.append((values, step)), finish=lambda: None)
    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    fake.init = lambda **settings: begun.append(settings) or board  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert run.main(small_run("LOG.WANDB", "project", "TRAIN.MAX_STEPS", "2")) == 0
    assert [step for _, step in logged] == [2, 2]
    assert {"loss/train", "lr/train", "epoch"} <= logged[0][0].keys()
    assert {"loss/val", "top1/val"} <= logged[1][0].keys()
    assert begun[0]["project"] == "project"
    assert begun[0]["resume"] == "allow"
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in refused(small_run("LOG.WANDB", "p", "OUTPUT_DIR", str(tmp_path / "other")))
