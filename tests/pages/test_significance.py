"""Which run is better, and whether by chance: the statistics, and the answers of stvit_video.compare."""

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stvit_video import compare
from stvit_video.evaluation.predictions import average_precision
from stvit_video.evaluation.significance import NotComparable, compare_runs, paired_difference, resampled_precision
from stvit_video.runs.record import RunRecord

CLASSES = ["jump", "sit", "walk"]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_run(folder: Path, right: str, labels: str = "", first: int = 0, seed: int = 0, **results: Any) -> str:
    """Write the files of a test; in ``right``, x is a video with a right prediction, . one with a wrong one."""
    folder.mkdir(parents=True)
    rows = []
    for i, mark in enumerate(right):
        label = int(labels[i]) if labels else i % 3
        predicted = label if mark == "x" else (label + 1) % 3
        figures = {"probability": round(0.4 + i / 1000, 3), "label_probability": 0.1}
        names = {"label": CLASSES[label], "predicted": CLASSES[predicted]}
        rows.append({"path": f"videos/{first + i}.mp4", **names, **figures})
    write_rows(folder / "predictions.csv", rows)
    write_rows(folder / "per_class.csv", [{"class": name, "videos": 1, "correct": 1, "top1": 100} for name in CLASSES])
    about = {"top1": 100 * right.count("x") / len(right), "top5": 100.0, "videos": len(right), "scored": len(right)}
    views = {"clips": 1, "crops": 1}
    cost = {"gflops_per_video": 1080.4, "clips_per_second": 1234.5, "views": views}
    (folder / "results.json").write_text(json.dumps({**about, **cost, **results}))
    (folder / "config.yaml").write_text(f"DATA: {{TEST_LIST: test.csv, ROOT: .}}\nSEED: {seed}\n")
    return str(folder)


@pytest.fixture
def said(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what compare prints of runs, and make sure that it draws nothing of runs that were only tested."""
    monkeypatch.chdir(tmp_path)

    def compared(*words: str) -> str:
        assert compare.main(list(words)) == 0
        assert not Path("comparison.png").exists()
        return capsys.readouterr().out

    return compared


@pytest.mark.parametrize(("only_one", "only_two"), [(0, 0), (1, 0), (5, 0), (6, 2), (40, 17), (300, 360)])
def test_p_is_that_of_mcnemars_exact_test(only_one: int, only_two: int) -> None:
    unequal, fewer = only_one + only_two, min(only_one, only_two)
    tail = sum(math.comb(unequal, k) for k in range(fewer + 1)) / 2**unequal
    points, (low, high), p = paired_difference(only_one, only_two, 1000)
    assert p == pytest.approx(min(1.0, 2 * tail))
    assert points == pytest.approx((only_one - only_two) / 10)
    assert low < points < high


def test_the_interval_covers_the_true_difference_95_times_of_100() -> None:
    generator = np.random.default_rng(1)
    for shares in ((0.1, 0.1, 0.8), (0.2, 0.05, 0.75), (0.02, 0.01, 0.97), (0.5, 0.2, 0.3)):
        truth = 100 * (shares[0] - shares[1])
        intervals = [paired_difference(one, two, 200)[1] for one, two, _ in generator.multinomial(200, shares, 500)]
        assert 0.92 < np.mean([low <= truth <= high for low, high in intervals]) < 0.985, shares


def test_resampled_precision_is_that_of_the_list_with_its_repetitions() -> None:
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 12, 40) / 12  # many are equal
    labels = generator.random(40) < 0.3
    weights = generator.multinomial(40, np.full(40, 1 / 40), size=20).T.astype(np.int32)
    found = resampled_precision(scores, labels, weights)
    for column, counts in zip(found, weights.T, strict=True):
        rows = np.repeat(np.arange(40), counts)
        expected = average_precision(torch.tensor(scores[rows])[:, None], torch.tensor(labels[rows])[:, None].float())
        assert column == pytest.approx(float(expected), abs=1e-6)


def test_the_answer_comes_first_and_names_the_videos(tmp_path: Path, said: Any) -> None:
    """Also where lists are in another order."""
    good, bad = write_run(tmp_path / "good", "x" * 30 + ".." + "xxxx"), write_run(tmp_path / "bad", "x" * 20 + "." * 16)
    rows = (tmp_path / "bad" / "predictions.csv").read_text().splitlines()
    (tmp_path / "bad" / "predictions.csv").write_text("\n".join([rows[0], *rows[:0:-1]]) + "\n")
    text = said(bad, good)
    assert text.startswith("good is better than bad by 38.9 points (95 %: 19.9 to 53.8, p < 0.001, 36 videos).\n")
    assert "only good is right on 14 videos:\n  videos/35.mp4: walk (bad: jump)\n  videos/34.mp4: " in text
    assert "only bad is right on 0 videos" in text
    assert "1,080" in text
    assert "only good" not in said(bad, good, write_run(tmp_path / "third", "x" * 36))

    near = write_run(tmp_path / "near", "x" * 29 + "..." + "xxxx")
    text = said(near, good)
    assert text.startswith("The difference of 2.8 points between good and near is within chance (95 %: -6.3 to 11.5, ")
    assert "p = 1.000, 36 videos)" in text.splitlines()[0]
    assert "only good is right on 1 video:\n" in text


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"right": "x.x.", "first": 50}, "no video was scored by both"),
        ({"right": "x.x.", "labels": "0122"}, "label videos/3.mp4 differently"),
        (
            {"right": "x.x.", "top1": 75.0},
            "predictions.csv of other gives 50.00 % of 4 videos, its results.json 75.00",
        ),
    ],
)
def test_runs_of_other_tests_are_not_ranked(other: dict[str, Any], reason: str, tmp_path: Path, said: Any) -> None:
    line = said(write_run(tmp_path / "run", "xxx."), write_run(tmp_path / "other", **other)).splitlines()[0]
    assert "run and other are not compared: " in line or "other and run are not compared: " in line
    assert reason in line
    assert "better" not in line


def test_unequal_tests_are_compared_on_what_both_scored_and_said(tmp_path: Path, said: Any) -> None:
    whole = write_run(tmp_path / "whole", "x" * 30 + "." * 10)
    part = write_run(tmp_path / "part", "." * 20, videos=40, failed=20, views={"clips": 10, "crops": 3})
    text = said(whole, part)
    assert text.startswith("whole is better than part by 100.0 points")
    assert "p < 0.001, 20 videos)" in text.splitlines()[0]
    assert "20 of 40 test videos could not be read" in text
    assert "not tested with the same views (whole 1 x 1, part 10 x 3)" in text

    (tmp_path / "part" / "predictions.csv").unlink()
    assert "not compared: no predictions.csv of part" in said(whole, part).splitlines()[0]
    (tmp_path / "part" / "results.json").write_text('{"top1": 12.5}')  # of an old version
    assert "not compared: no predictions.csv of part" in said(whole, part).splitlines()[0]


def test_videos_that_a_list_names_twice_stay_two(tmp_path: Path) -> None:
    for name, right in (("one", "xx.x"), ("two", "...x")):
        write_run(tmp_path / name, right, labels="0000")
        file = tmp_path / name / "predictions.csv"
        file.write_text(re.sub(r"videos/\d", "videos/0", file.read_text()))
    found = compare_runs(RunRecord(tmp_path / "one"), RunRecord(tmp_path / "two"))
    assert (found.points, found.videos) == (50.0, 4)


def test_sentences_of_the_smallest_cases(tmp_path: Path, said: Any) -> None:
    one, equal, wrong = (write_run(tmp_path / name, right) for name, right in (("a", "x"), ("b", "x"), ("c", ".")))
    assert said(one).startswith("accuracy in %"), "nothing is compared"
    level = "The difference of 0.0 points between a and b is within chance (95 %: -92.4 to 92.4, p = 1.000, 1 video)."
    assert said(one, equal).startswith(level)
    assert said(wrong, one).startswith("The difference of 100.0 points between a and c is within chance (95 %: -73.4 ")


def test_many_comparisons_ask_for_a_smaller_p_and_seeds_are_grouped(tmp_path: Path, said: Any) -> None:
    first = write_run(tmp_path / "first", "x" * 40, seed=1)
    runs = [write_run(tmp_path / f"other{i}", "x" * 34 + "." * 6, seed=i) for i in (2, 3)]  # p = 0.031
    assert "first is better than other2" in said(first, runs[0])
    text = said(first, *runs)
    assert "between first and other2 is within chance, if barely (95 %: 1.8 to" in text
    assert "3 runs make 3 pairs: differences with p below 0.017 are real." in text
    assert "Seeds of one configuration: first, other2, other3: mean 90.0 %, from 85.0 to 100.0 %." in text


def test_tables_fit_into_100_columns(tmp_path: Path, said: Any) -> None:
    names = ["a" * 70, "kinetics400_stvit_vit_small_patch16_8x8_from_imagenet21k_with_mixup_and_more"]
    macro = {"macro_top1": 33.3, "macro_f1": 22.2, "videos": 19881, "failed": 19877}
    text = said(*(write_run(tmp_path / name, "xx..", **macro) for name in names))
    _, *table = text.split("\n\n")[:-2]  # in parts
    assert max(map(len, "\n".join(table).splitlines())) <= 100
    for figure in ("macro", "33.3", "F1", "22.2", "4 of 19,881", "1,080", "1234.5"):
        assert figure in "\n".join(table)


def write_multi_label(folder: Path, scores: np.ndarray, labels: np.ndarray) -> RunRecord:
    folder.mkdir()
    names = [json.dumps([CLASSES[i] for i in np.flatnonzero(row)]) for row in labels]
    rows = [
        {"path": f"{i}.mp4", "labels": name, "predicted": CLASSES[row.argmax()], "probability": 0.5}
        for i, (name, row) in enumerate(zip(names, scores, strict=True))
    ]
    write_rows(folder / "predictions.csv", [{**row, "label_probability": ""} for row in rows])
    counts = zip(CLASSES, labels.sum(axis=0), strict=True)
    write_rows(folder / "per_class.csv", [{"class": name, "videos": n, "average_precision": 1.0} for name, n in counts])
    mean = float(average_precision(torch.tensor(scores), torch.tensor(labels).float()).nan_to_num(0).mean())
    about = {"map": 100 * mean, "videos": len(rows), "scored": len(rows), "classes_without_positives": 0}
    (folder / "results.json").write_text(json.dumps(about))
    np.save(folder / "scores.npy", scores)
    return RunRecord(folder)


def test_map_is_compared_by_a_bootstrap(tmp_path: Path, said: Any) -> None:
    generator = np.random.default_rng(3)
    labels = generator.random((120, 3)) < 0.4
    noise = generator.random((120, 3)).astype(np.float32)
    good = write_multi_label(tmp_path / "good", labels * 0.4 + noise, labels)
    bad = write_multi_label(tmp_path / "bad", noise[::-1].copy(), labels)
    found = compare_runs(bad, good)
    assert (found.better, found.worse, found.real) == ("good", "bad", True)
    assert found.points == pytest.approx(good.accuracy - bad.accuracy, abs=1e-3)
    assert found.interval[0] < found.points < found.interval[1]
    assert found == compare_runs(bad, good), "the resamples have a fixed seed"
    near = write_multi_label(tmp_path / "near", labels * 0.4 + noise + 0.02 * noise[::-1], labels)
    assert not compare_runs(good, near).real
    text = said("good", "bad")
    assert re.match(r"good is better than bad by [\d.]+ points \(95 %: [\d.]+ to [\d.]+, p < 0.001, 120 videos\)", text)
    few = [write_multi_label(tmp_path / f"few{i}", noise[i : i + 29], labels[:29]) for i in (0, 1)]
    with pytest.raises(NotComparable, match="both scored 29 videos, and mAP is compared on 30 or more"):
        compare_runs(*few)
    (tmp_path / "bad" / "scores.npy").unlink()
    assert "not compared: no scores.npy of bad" in said("good", "bad")
