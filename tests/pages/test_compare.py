"""stvit_video.compare: steps to a target, the chart, and folders that are not runs."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from stvit_video import compare


def write_run(folder: Path, slope: float) -> str:
    folder.mkdir()
    rows = [{"step": step, "split": "train", "top1": min(100.0, slope * step)} for step in range(8, 801, 8)]
    rows += [{"step": step, "split": "val", "top1": min(100.0, slope * step)} for step in range(200, 801, 200)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_steps_to_the_target_are_counted_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    runs = [write_run(tmp_path / "slow", 0.1), write_run(tmp_path / "fast", 0.25)]
    picture = tmp_path / "both.png"
    assert compare.main([*runs, "--target", "50", "--window", "16", "--output", str(picture)]) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert lines["slow"] == ["504", "600"]  # the mean of steps 496 and 504 is what 500 would be
    assert lines["fast"] == ["208", "200"]
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("count", [1, 2, 8, 24])
def test_the_legend_names_each_run_once_and_covers_no_curve(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, dpi: drawn.append(self))
    runs = [write_run(tmp_path / f"run {number}", 0.1) for number in range(count)]
    assert compare.main([*runs, "--output", str(tmp_path / "x.png")]) == 0
    (figure,) = drawn
    figure.draw_without_rendering()
    (axes,), (legend,) = figure.axes, figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [f"run {number}" for number in range(count)]
    box = legend.get_window_extent()
    assert box.y1 <= axes.get_tightbbox().y0
    assert box.y0 >= 0
    assert axes.get_window_extent().height > 300  # of 450: the figure grows instead


def test_target_that_is_never_reached(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = write_run(tmp_path / "slow", 0.1)
    assert compare.main([run, "--output", str(tmp_path / "x.png")]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[1:] == ["never", "never"]


@pytest.mark.parametrize("output", ["x.png", "x.jpg", "absent/x.png"])
def test_wrong_run_or_output_is_one_line(tmp_path: Path, output: str, capsys: pytest.CaptureFixture) -> None:
    assert compare.main([str(tmp_path), "--output", str(tmp_path / output)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_rows_and_windows_that_cannot_be_averaged(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = write_run(tmp_path / "run", 0.1)
    (tmp_path / "run" / "metrics.jsonl").open("a").write('{"epoch": 3}\n')  # of another program
    words = [run, "--output", str(tmp_path / "x.png")]
    assert compare.main(words) == 0
    assert compare.main([*words, "--window", "0"]) == 2
    assert "--window 0 is out of range; give a number from 1 on" in capsys.readouterr().err
    (tmp_path / "run" / "metrics.jsonl").write_text('{"epoch": 3}\n')
    for folder in (run, f"{run}/metrics.jsonl"):  # the second is a file
        assert compare.main([folder, *words[1:]]) == 2
        assert "no metrics.jsonl with training rows" in capsys.readouterr().err


def test_run_shorter_than_the_window_has_no_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short").mkdir()
    rows = [{"step": 8, "epoch": 1.0, "split": "train", "top1": 100.0}, {"step": 8, "epoch": 1.0, "split": "train"}]
    (tmp_path / "short" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert compare.main(["short"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[1].split() == ["short", "-", "-"]
    assert "note: short has fewer steps than --window 64" in said
