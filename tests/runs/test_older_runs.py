"""Run folders of an earlier version (commit 4d977bd) resume, are tested, predict and report as they did.

``runs_4d977bd.tar.xz`` holds two runs of two epochs from one start, ``finished`` and ``interrupted`` after the first.
Their weights are multiples of 1/32, all but the classifier frozen, so that the files compress.
"""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from stvit_video import predict, report, run

ARCHIVE = Path(__file__).parent / "runs_4d977bd.tar.xz"
Arguments = Callable[..., list[str]]


@pytest.fixture
def older(small_set: Path, tmp_path: Path) -> Path:
    """The folder of both runs, their data being the small set."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    for name in ("finished", "interrupted"):
        file = tmp_path / name / "config.yaml"
        settings = yaml.safe_load(file.read_text())
        settings["DATA"]["ROOT"], settings["OUTPUT_DIR"] = str(small_set), str(tmp_path / name)
        file.write_text(yaml.safe_dump(settings))
    return tmp_path


def same_command(folder: Path, *overrides: str) -> list[str]:
    return ["--cfg", str(folder / "config.yaml"), *overrides]


def test_an_interrupted_run_continues_to_the_same_weights(
    older: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(older)  # MODEL.INIT is relative, and no longer needed
    assert run.main(same_command(older / "interrupted")) == 0
    assert "continuing at step 4" in capsys.readouterr().out
    expected, found = (load_file(older / name / "model.safetensors") for name in ("finished", "interrupted"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0, msg=name)


def test_a_finished_run_is_reported_tested_and_predicts(
    older: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(older)
    finished = older / "finished"
    assert run.main(same_command(finished)) == 0
    assert "is finished" in capsys.readouterr().out
    recorded = json.loads((finished / "results.json").read_text())
    weights = ["MODEL.INIT", str(finished / "model.safetensors"), "OUTPUT_DIR", str(older / "again")]
    assert run.main(same_command(finished, "MODE", "test", *weights)) == 0
    found = json.loads((older / "again" / "results.json").read_text())
    same = ("top1", "top5", "coverage", "videos", "views", "parameters", "gflops")
    assert {name: found[name] for name in same} == {name: recorded[name] for name in same}
    rows = [(older / name / "predictions.csv").read_text().splitlines() for name in ("finished", "again")]
    assert [row.split(",")[1:3] for row in rows[0]] == [row.split(",")[1:3] for row in rows[1]]

    video = yaml.safe_load((finished / "config.yaml").read_text())["DATA"]["ROOT"] + "/videos/test_00000.mp4"
    assert predict.main([video, "--checkpoint", str(finished), "--output", str(older / "found.json")]) == 0
    top = json.loads((older / "found.json").read_text())[0]["top"][0]["class"]
    by_path = {Path(row.split(",")[0]).name: row.split(",")[2] for row in rows[0][1:]}
    assert top == by_path["test_00000.mp4"]
    assert report.main([str(finished), "--output", str(older / "report.html")]) == 0
    assert "12.5" in (older / "report.html").read_text()


@pytest.mark.parametrize(
    ("key", "lines", "says"),
    [
        ("TRAIN_LIST", slice(24), "was at a learning rate of"),  # all that it recorded of its length
        ("CLASSES", slice(None, None, -1), "the classes are in another order"),
    ],
)
def test_an_interrupted_run_does_not_continue_on_other_data(
    older: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[[list[str]], str], key: str, lines: slice, says: str
) -> None:
    """Nor does it claim to be finished on them."""
    monkeypatch.chdir(older)
    for name in ("interrupted", "finished")[: 1 if key == "TRAIN_LIST" else 2]:
        file = older / name / "config.yaml"
        settings = yaml.safe_load(file.read_text())
        place = Path(settings["DATA"]["ROOT"]) / settings["DATA"][key]
        (older / place.name).write_text("\n".join(place.read_text().splitlines()[lines]))
        settings["DATA"][key] = str(older / place.name)
        file.write_text(yaml.safe_dump(settings))
        assert says in refused(same_command(older / name))
