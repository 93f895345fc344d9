"""The large configurations: the GFLOPs that their comments state are those of their models."""

import re
from pathlib import Path

import pytest
import torch

from stvit_video.config import load_config
from stvit_video.models.cost import count_gflops
from stvit_video.models.zoo import build_model
from stvit_video.runs.preflight import build_filled_batch
from stvit_video.runtime.world import World
from tests.conftest import REPOSITORY

LARGE = sorted(path for path in (REPOSITORY / "configs").glob("*.yaml") if path.name.startswith(("k400_", "ssv2_")))
# Models that check values, which a model without weights (on the device "meta") does not have.
WITH_VALUES = ("stvit_vit_", "stvit_r_")
HEAVY = ("k400_stvit_r_swin_s", "k400_stvit_vit_b")


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.long] if path.stem in HEAVY else []) for path in LARGE],
    ids=lambda path: path.stem,
)
def test_stated_gflops_are_the_models_own(path: Path) -> None:
    cfg = load_config(path)
    head = re.sub(r"\n# ", " ", path.read_text())
    clip, video = re.search(r"([\d.]+) GFLOPs per clip.*? ([\d,]+) per video", head).groups()
    model = build_model(cfg, num_classes=400)
    if not cfg.MODEL.NAME.startswith(WITH_VALUES):
        model = model.to("meta")
    gflops = count_gflops(model, (cfg.DATA.FRAMES, cfg.DATA.SIZE, cfg.DATA.SIZE))
    assert gflops == pytest.approx(float(clip), abs=0.051)
    assert gflops * cfg.TEST.CLIPS * cfg.TEST.CROPS == pytest.approx(float(video.replace(",", "")), abs=0.51)
    saving = re.search(r"(\d+) % below the dense baseline, (\w+)\)", head)
    assert bool(saving) == cfg.MODEL.NAME.startswith("stvit")
    if saving:
        twin = load_config(path.with_name(f"{saving[2]}.yaml"))
        full = float(re.search(r"# ([\d.]+) GFLOPs", path.with_name(f"{saving[2]}.yaml").read_text())[1])
        assert re.sub("^stvit_(r_)?", "", cfg.MODEL.NAME) == twin.MODEL.NAME
        assert 100 * (1 - gflops / full) == pytest.approx(int(saving[1]), abs=0.6)


def test_two_training_videos_fill_a_batch_of_every_configuration() -> None:
    """Three videos of each of two classes leave two for training."""
    one = World(0, 1, torch.device("cpu"))
    for path in (REPOSITORY / "configs").glob("*.yaml"):
        cfg, _ = build_filled_batch(load_config(path), one, videos=2)
        assert cfg.TRAIN.BATCH_SIZE == 2 * cfg.DATA.REPEATS, path
        assert cfg.TRAIN.BATCH_SIZE % cfg.TRAIN.ACCUMULATE == 0, path


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_something_something_has_no_mirror_images(path: Path) -> None:
    cfg = load_config(path)
    assert ((True, "dense") if "k400" in path.name else (False, "uniform")) == (cfg.DATA.FLIP, cfg.DATA.SAMPLING)
