"""A run continues, and is finished, on its own lists alone; results say which weights they are of."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stvit_video import run
from stvit_video.data.lists.annotations import Section, Video
from stvit_video.models.weights.files import read_checkpoint
from stvit_video.runs.checkpoint import load_newest
from stvit_video.runs.fingerprint import find_change, record_lists
from stvit_video.runs.folder import describe_changes
from stvit_video.runs.log import read_metrics

Arguments = Callable[..., list[str]]
Refused = Callable[[list[str]], str]
RunKilled = Callable[[list[str], int], None]
ABC = ["a", "b", "c"]
VIDEOS = [Video(f"/data/{name}/{i}.mp4", label) for label, name in enumerate(ABC) for i in range(3)]


@pytest.mark.parametrize(
    ("videos", "classes", "says"),
    [
        (VIDEOS, ABC, None),
        (VIDEOS[2:], ABC, "has 7 videos, not 9: 2 missing, as a/0.mp4 (a)"),
        ([*VIDEOS, Video("/data/c/9.mp4", 2)], ABC, "has 10 videos, not 9: 1 new, as c/9.mp4 (c)"),
        ([*VIDEOS, VIDEOS[0]], ABC, "has 10 videos, not 9: 1 new, as a/0.mp4 (a)"),
        (VIDEOS[::-1], ABC, "has 9 videos: in another order, as c/2.mp4 (c) in the place of a/0.mp4 (a)"),
        (
            [Video(video.path, (video.label + 1) % 3) for video in VIDEOS],
            ABC,
            "has 9 videos: 9 missing, as a/0.mp4 (a); 9 new, as a/0.mp4 (b)",
        ),
        (VIDEOS, ["b", "a", "c"], "classes are in another order (label 0 was 'a', now 'b')"),
        ([Video(v.path, (1, 0, 2)[v.label]) for v in VIDEOS], ["b", "a", "c"], "classes are in another order"),
        (VIDEOS, ["a", "b", "z"], "class 'c' is now 'z'"),
        (VIDEOS, [*ABC, "d"], "1 of the classes new (d)"),
        (
            [Video(VIDEOS[0].path, 0, section=Section(1, 2)), *VIDEOS[1:]],
            ABC,
            "1 missing, as a/0.mp4 (a); 1 new, as a/0.mp4#t=1,2 (a)",
        ),
        (
            [Video(v.path, v.label, labels=(v.label, 2)) for v in VIDEOS],
            ABC,
            "9 missing, as a/0.mp4 (a); 9 new, as a/0.mp4 (a, c)",
        ),
    ],
)
def test_what_differs_is_said_with_an_example(videos: list[Video], classes: list[str], says: str | None) -> None:
    then, now = record_lists("/data", {"train": VIDEOS}, ABC), record_lists("/data/", {"train": videos}, classes)
    part, words = find_change(then, now, ABC, classes) or ("", None)
    assert part == ("" if says is None else "classes" if "class" in says else "train")
    assert words == says or says in words


def test_the_same_videos_below_another_root_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    roots = ("data", str(tmp_path / "data"), "/mnt/other", ".")
    found = [record_lists(root, {"test": [Video(str(Path(root) / "a.mp4"), 0)]}, ABC) for root in roots]
    found.append(
        record_lists("data", {"test": [Video(str(tmp_path / "data" / "a.mp4"), 0)]}, ABC)
    )  # absolute in the list
    assert all(one == found[0] for one in found)
    moved = ({"DATA": {"ROOT": root, "TRAIN_LIST": name}} for root, name in (("/a", "/a/b.csv"), ("/c", "b.csv")))
    assert describe_changes(*moved, ["DATA.ROOT"]) == ""


@pytest.fixture
def interrupted(
    small_set: Path, small_run: Arguments, run_killed: RunKilled, tmp_path: Path
) -> tuple[Path, list[str], list[str]]:
    """A root with lists, the arguments of a run on them that was killed in its second epoch, and its training lines."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "videos").symlink_to(small_set / "videos")
    for split in ("train", "val", "test"):
        shutil.copy(small_set / "motion" / f"{split}.csv", root)
    shutil.copy(small_set / "motion" / "classes.txt", root)
    lists = "DATA.TRAIN_LIST train.csv DATA.VAL_LIST val.csv DATA.TEST_LIST test.csv DATA.CLASSES classes.txt"
    words = small_run("DATA.ROOT", str(root), *lists.split(), "TRAIN.EPOCHS", "2")
    run_killed(words, 5)
    return root, words, (root / "train.csv").read_text().splitlines()


def test_a_run_continues_on_its_own_data_alone(
    interrupted: tuple[Path, list[str], list[str]],
    refused: Refused,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, words, lines = interrupted
    way_on = f"with MODEL.INIT {tmp_path}/run/checkpoints/step_00000004.pt"

    def refuses(name: str, content: list[str], *says: str) -> None:
        """Change a list, look at what is refused, and put the list back."""
        before = (root / name).read_text()
        (root / name).write_text("\n".join(content))
        said = refused(words)
        if name == "val.csv":
            assert run.main([*words, "--dry-run"]) == 0
            assert f"a run is refused: {said.removeprefix('error: ')}" in capsys.readouterr().out
        (root / name).write_text(before)
        assert [one for one in (*says, way_on, "OVERWRITE True") if one not in said] == []
        assert len(said) < 660

    refuses("train.csv", lines[8:], "has 24 videos, not 32: 8 missing, as videos/train_00000.mp4")
    refuses("train.csv", [*lines, *(f"./{line}" for line in lines)], "has 64 videos, not 32: ")
    refuses("train.csv", random.Random(0).sample(lines, 32), "has 32 videos: in another order")
    moved = f"{lines[0][:-1]}{(int(lines[0][-1]) + 1) % 8}"
    refuses(
        "train.csv", [moved, *lines[1:]], "1 missing, as videos/train_00000.mp4 (", "1 new, as videos/train_00000.mp4 ("
    )
    refuses("val.csv", (root / "val.csv").read_text().splitlines()[1:], "the validation list has 15 videos, not 16")
    names = (root / "classes.txt").read_text().split()
    refuses("classes.txt", names[::-1], f"in another order (label 0 was {names[0]!r}, now {names[-1]!r})")
    refuses("classes.txt", ["leftwards", *names[1:]], "class 'left' is now 'leftwards'", "MODEL.NEW_HEAD True")
    said = refused([*words, "TRAIN.EPOCHS", "3"])
    assert f"2 (now 3); give another OUTPUT_DIR ({way_on} MODEL.INIT_DEPTH None MODEL.INIT_MOTION 0.0 to go on" in said
    config = tmp_path / "run" / "config.yaml"
    recorded = config.read_text()
    config.write_text(recorded.replace("LR: 0.0005", "LR: 0.5"))  # the checkpoint knows better
    assert "settings: OPTIM.LR 0.0005 (now 0.5)" in refused(["--cfg", str(config)])
    config.write_text(recorded)

    # Training from its weights, as the refusals advise.
    other = [
        *words,
        "OUTPUT_DIR",
        str(tmp_path / "other"),
        "MODEL.INIT",
        way_on.split()[-1],
        "MODEL.INIT_DEPTH",
        "None",
    ]
    (root / "classes.txt").write_text("\n".join(["leftwards", *names[1:]]))
    assert "its classifier is for other classes" in refused([*other, "--dry-run"])
    (root / "classes.txt").write_text("\n".join(names))
    assert run.main([*other, "--dry-run"]) == 0
    assert "several networks" not in capsys.readouterr().out

    # The root may move, the test list may change, and what changes no clip may change.
    elsewhere = root.rename(tmp_path / "elsewhere")
    (elsewhere / "test.csv").write_text("\n".join((elsewhere / "test.csv").read_text().splitlines()[:10]))
    words += ["DATA.ROOT", str(elsewhere), "CHECKPOINT.KEEP", "3"]
    assert run.main(words) == 0
    said = capsys.readouterr().out
    assert "the test list has 10 videos, not 16: 6 missing" in said
    assert f"note: changed since the last checkpoint: CHECKPOINT.KEEP 2 (now 3), DATA.ROOT '{root}'" in said
    assert "continuing at step 4" in said
    assert json.loads((tmp_path / "run" / "results.json").read_text())["videos"] == 10

    # The finished run answers with its results for the data that it had, and says it where they are gone.
    assert run.main(words) == 0
    assert "is finished" in capsys.readouterr().out
    for name, says in (("train", "training list has 31 videos, not 32"), ("test", "test its weights on the new list")):
        whole = (elsewhere / f"{name}.csv").read_text()
        (elsewhere / f"{name}.csv").write_text(whole.partition("\n")[2])
        assert says in refused(words)
        (elsewhere / f"{name}.csv").write_text(whole)
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # which say what differs
    (elsewhere / "val.csv").write_text(f"{lines[0]}\n")
    assert "is finished, but on other data: the validation list is another" in refused(words)
    assert run.main([*words, "DATA.ROOT", str(root)]) == 0
    assert "its data are gone" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["best", "average"])
def test_results_say_which_weights_they_are_of(
    kind: str, small_run: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    options = ["TRAIN.EPOCHS", "2"] if kind == "best" else ["TRAIN.EMA", "0.5", "DATA.VAL_LIST", ""]
    words = small_run(*options, "TRAIN.BATCH_SIZE", "16", "TEST.WEIGHTS", kind)
    assert run.main(words) == 0
    out = tmp_path / "run"
    results = json.loads((out / "results.json").read_text())
    tested, state = read_checkpoint(out / "model.safetensors"), load_newest(out / "checkpoints")
    assert results["weights"] == tested.metadata["weights"]["weights"] == kind
    if kind == "best":
        val = [row for row in read_metrics(out / "metrics.jsonl") if row["split"] == "val"]
        best = max(val, key=lambda row: row["top1"])
        assert (results["weights_step"], results["weights_validation"]) == (best["step"], best["top1"])
        expected = load_file(out / "checkpoints" / "best.safetensors")
    else:
        assert results["weights_step"] == 2
        expected = state["average"]
    for name, value in expected.items():
        assert torch.equal(tested.tensors[name], value), name
    said = capsys.readouterr().out
    assert f"testing the {'best weights in validation' if kind == 'best' else 'moving average of the weights'}" in said
    again = ["MODE", "test", "MODEL.INIT", str(out / "model.safetensors"), "OUTPUT_DIR", str(tmp_path / "again")]
    assert run.main([*words, *again]) == 0
    found = json.loads((tmp_path / "again" / "results.json").read_text())
    assert {name: found[name] for name in ("weights", "weights_step", "top1")} == {
        name: results[name] for name in ("weights", "weights_step", "top1")
    }
    other = "average" if kind == "best" else "best"
    words = small_run(*again, "TEST.WEIGHTS", other, "OUTPUT_DIR", str(tmp_path / "third"))
    assert f"TEST.WEIGHTS {other} is chosen when training ends" in refused(words)


def test_a_path_may_be_written_in_another_way() -> None:
    plain, dotted = (record_lists("data", {"train": [Video(f"data/{p}", 0)]}, ABC) for p in ("a.mp4", "./a.mp4"))
    assert plain == dotted
