"""A run is opened once: each list, each root and each checkpoint is read a single time."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from stvit_video import run
from stvit_video.data.lists import videos
from stvit_video.models import create_model
from stvit_video.models.weights import files
from stvit_video.runs import checkpoint


@pytest.fixture
def kinetics(small_set: Path, tmp_path: Path) -> Path:
    """The small set's videos, listed as Kinetics publishes its lists: by class and YouTube id."""
    root = tmp_path / "kinetics"
    (root / "clips").mkdir(parents=True)
    for split in ("train", "val", "test"):
        lines = ["label,youtube_id,time_start,time_end,split"]
        for line in (small_set / "motion" / f"{split}.csv").read_text().splitlines():
            path, label = line.rsplit(maxsplit=1)
            name = Path(path).stem
            (root / "clips" / f"{name}_000000_000010.mp4").symlink_to((small_set / path).resolve())
            lines.append(f"class {label},{name},0,10,{split}")
        (root / f"{split}.csv").write_text("\n".join(lines))
    return root


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts reads by name from here on: lists and checkpoints by file, the walk of a root."""
    counts: Counter[str] = Counter()

    def count(module: Any, name: str, key: Callable[..., str]) -> None:
        original = getattr(module, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            counts[key(*arguments)] += 1
            return original(*arguments, **named)

        monkeypatch.setattr(module, name, counted)

    count(videos, "read_catalogue", lambda path, *_: f"list {Path(path).name}")
    count(videos, "find_clips", lambda *_: "walk")
    count(files, "safe_open", lambda path, *_: f"file {Path(path).name}")
    count(torch, "load", lambda file, **_: f"file {getattr(file, 'name', file)}".split("/")[-1])
    count(checkpoint, "read_checked", lambda path: f"file {path.name}")
    return counts


@pytest.mark.parametrize("mode", ["train", "test", "transfer"])
def test_a_run_reads_each_list_and_checkpoint_once(
    mode: str, kinetics: Path, small_run: Callable[..., list[str]], tmp_path: Path, reads: Counter[str]
) -> None:
    model = create_model("stvit_vit_sample_patch8", num_frames=8, image_size=64, num_classes=8)
    save_file(model.state_dict(), tmp_path / "init.safetensors")
    lists = [word for name in ("TRAIN", "VAL", "TEST") for word in (f"DATA.{name}_LIST", f"{name.lower()}.csv")]
    words = ["DATA.ROOT", str(kinetics), "DATA.CLASSES", "", *lists, "MODE", mode, "TRAIN.MAX_STEPS", "1"]
    assert run.main(small_run(*words, "MODEL.INIT", str(tmp_path / "init.safetensors"))) == 0
    splits = {"train": ["train", "val", "test"], "test": ["test", "train"], "transfer": ["train", "test"]}[mode]
    expected = {f"list {split}.csv": 1 for split in splits} | {"walk": 1, "file init.safetensors": 1}
    assert {name: number for name, number in reads.items() if name in expected or "list" in name} == expected


def test_a_run_continues_from_a_checkpoint_that_is_read_once(
    small_run: Callable[..., list[str]], run_killed: Callable[[list[str], int], None], reads: Counter[str]
) -> None:
    words = small_run("TRAIN.EPOCHS", "2", "DATA.VAL_LIST", "")
    run_killed(words, 5)
    assert run.main(words) == 0
    assert reads["file step_00000004.pt"] == 1
