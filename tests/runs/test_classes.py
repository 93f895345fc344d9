"""The classes of a checkpoint and of the data are compared by name, wherever a classifier of a file is used."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stvit_video import run
from stvit_video.data.lists.annotations import Video
from stvit_video.models.weights.files import read_checkpoint
from stvit_video.runs.checkpoint import pack
from stvit_video.runs.classes import check_classes, label_by_place, place_classes
from tests.conftest import refusal, small_arguments

Refused = Callable[[list[str]], str]


def relabel(small_set: Path, folder: Path, names: list[str]) -> list[str]:
    """Write the motion lists with labels that count in the order of ``names``, other classes left out."""
    folder.mkdir(parents=True, exist_ok=True)
    own = (small_set / "motion" / "classes.txt").read_text().split("\n")
    (folder / "classes.txt").write_text("\n".join(names))
    for split in ("train", "val", "test"):
        lines = [line.rsplit(maxsplit=1) for line in (small_set / "motion" / f"{split}.csv").read_text().splitlines()]
        kept = [f"{path} {names.index(own[int(label)])}" for path, label in lines if own[int(label)] in names]
        (folder / f"{split}.csv").write_text("\n".join(kept))
    lists = [
        word for split in ("train", "val", "test") for word in (f"DATA.{split.upper()}_LIST", f"{folder}/{split}.csv")
    ]
    return [*lists, "DATA.CLASSES", f"{folder}/classes.txt"]


def read_predictions(folder: Path) -> list[list[str]]:
    with open(folder / "predictions.csv", newline="") as file:
        return list(csv.reader(file))


@pytest.fixture
def names(small_set: Path) -> list[str]:
    return (small_set / "motion" / "classes.txt").read_text().split()


@pytest.fixture
def scored(small_set: Path, trained: Path, tmp_path: Path) -> Callable[..., Path]:
    """Run MODE test with weights on given lists; returns the run's folder."""

    def test(name: str, *words: str, init: Path = trained) -> Path:
        view = ["MODE", "test", "MODEL.INIT", str(init)]
        assert run.main(small_arguments(small_set, tmp_path / name, *view, *words)) == 0
        return tmp_path / name

    return test


def test_a_test_maps_the_classes_by_name(
    small_set: Path, names: list[str], scored: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lists in another order, and of some of the classes, give each video what the lists as trained give it."""
    expected = read_predictions(scored("same"))
    sorted_otherwise = scored("other", *relabel(small_set, tmp_path / "lists", sorted(names, reverse=True)))
    assert read_predictions(sorted_otherwise) == expected
    assert "in the checkpoint's order, by name" in capsys.readouterr().out
    part = names[5:2:-1]
    found = read_predictions(scored("part", *relabel(small_set, tmp_path / "part lists", part)))
    assert found == [row for row in expected if row[1] in (*part, "label")]
    assert len(found) == 7
    assert "test has no video of 5 of 8 classes" in capsys.readouterr().out


def test_training_goes_on_with_the_classes_of_the_checkpoint(
    small_set: Path, trained: Path, names: list[str], tmp_path: Path
) -> None:
    words = [
        "MODEL.INIT",
        str(trained),
        "MODEL.INIT_DEPTH",
        "None",
        "TRAIN.MAX_STEPS",
        "1",
        "TEST.CLIPS",
        "1",
        "TEST.CROPS",
        "1",
    ]
    other = relabel(small_set, tmp_path / "lists", sorted(names))
    for name, lists in (("same", ["DATA.VAL_LIST", ""]), ("other", [*other, "DATA.VAL_LIST", ""])):
        assert run.main(small_arguments(small_set, tmp_path / name, *words, *lists)) == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("same", "other"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    with safe_open(tmp_path / "other" / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["classes"]) == names
    assert read_predictions(tmp_path / "same") == read_predictions(tmp_path / "other")


@pytest.mark.parametrize("mode", ["test", "train"])
def test_other_classes_are_refused_with_both_lists(
    mode: str, small_set: Path, trained: Path, names: list[str], tmp_path: Path, refused: Refused
) -> None:
    words = relabel(small_set, tmp_path / "lists", names)
    renamed = [{"left": "Left", "down": "fall"}.get(name, name) for name in names]
    (tmp_path / "lists" / "classes.txt").write_text("\n".join(renamed))
    init = ["MODE", mode, "MODEL.INIT", str(trained), "MODEL.INIT_DEPTH", "None"]
    said = refused(small_arguments(small_set, tmp_path / "run", *init, *words))
    assert f"{trained}: its classifier is for other classes than the data's: only the file has left, down, only" in said
    assert "only the data has Left, fall; 'left' and 'Left' are spelled differently" in said
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_weights_without_class_names_say_how_their_outputs_are_taken(
    trained: Path, scored: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(load_file(trained), tmp_path / "bare.safetensors")
    scored("bare", init=tmp_path / "bare.safetensors")
    said = "it names no classes: its 8 outputs are taken for those of the data in order (left, right, up, down and 4"
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "bare" / "load_report.json").read_text()


@pytest.mark.parametrize(
    ("known", "classes", "part", "places"),
    [
        (["a", "b"], ["a", "b"], False, [0, 1]),
        (["a", "b"], ["b", "a"], False, [1, 0]),
        (["1", "0"], ["0", "1"], False, [1, 0]),
        (["caf\u00e9", "b"], ["b", "cafe\u0301"], False, [1, 0]),
        (["a", "b", "c"], ["c", "a"], True, [2, 0]),
        (["a", "b", "c"], ["c", "a"], False, None),
        (["a", "b"], ["a", "b", "c"], True, None),
        (["a", "b"], ["A", "b"], False, None),
        (["crane", "b", "crane"], ["crane", "b", "crane"], False, [0, 1, 2]),  # as ImageNet has
        (["crane", "b", "crane"], ["b", "crane", "crane"], False, None),
        (["crane", "b", "crane"], ["b", "crane"], True, None),
        (["a", "b", "c"], ["a", "a", "b"], False, None),
    ],
)
def test_places_are_those_of_equal_names(known: list[str], classes: list[str], part: bool, places: object) -> None:
    assert place_classes(known, classes, part=part) == places


@pytest.mark.parametrize(
    ("known", "classes", "says"),
    [
        (["a", "b", "c"], ["a", "b"], "only the file has c. Stop."),
        (["a", "b"], ["a", "b", "c"], "only the data has c. Stop."),
        (["a", "b"], ["b", "a"], "the same names in another order. Stop."),
        (["0", "1"], ["a", "b", "c"], "only the file has 0, 1, only the data has a, b, c. Stop."),
        (["Brush hair", "b"], ["brush_hair", "b"], "; 'Brush hair' and 'brush_hair' are spelled differently"),
        (["a", "a"], ["a", "b"], "the file has several of one name (a)"),
        (
            [f"class {i}" * 9 for i in range(400)],
            [f"c {i}" for i in range(400)],
            "class 3class 3class 3class 3class 3class and 396 more, only",
        ),
    ],
)
def test_a_refusal_shows_what_differs(known: list[str], classes: list[str], says: str) -> None:
    assert says in refusal(check_classes, "FILE", known, classes, "Stop.")


def test_numbers_for_names_are_said() -> None:
    for known, classes, owner in ((["0", "1"], ["a", "b"], "its"), (["a", "b"], ["0", "1"], "the data's")):
        said = check_classes("FILE", known, classes, "", by_place=True)
        assert re.fullmatch(rf"{owner} classes are numbers: they are taken for places among .* \(a, b\)", said)
        assert "only the file has" in refusal(check_classes, "FILE", known, classes, "")
    assert check_classes("FILE", ["a", "b"], ["a", "b"], "") == ""


def test_labels_follow_their_classes() -> None:
    videos = [Video("a", 1), Video("b", 0, labels=(0, 2)), Video("c", -1, labels=())]
    moved = label_by_place(videos, [4, 0, 1])
    assert [(video.label, video.labels) for video in moved] == [(0, None), (1, (1, 4)), (-1, ())]


@pytest.mark.parametrize(
    ("content", "config"),
    [
        ({"setup": {"classes": ["b", "a"]}}, {}),
        ({"class_to_idx": {"a": 1, "b": 0}}, {}),
        ({"meta": {"CLASSES": ("b", "a")}}, {}),
        ({}, {"id2label": {"0": "b", "1": "a"}}),
    ],
)
def test_class_names_of_other_files_are_found(content: dict, config: dict, tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(pack({"model": {"head.weight": torch.zeros(2, 3)}, **content}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", **config}))
    assert read_checkpoint(tmp_path / "x.pth").classes == ["b", "a"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "id2label": {"0": "LABEL_0"}}))
    assert content or read_checkpoint(tmp_path / "x.pth").classes is None
