"""Fine-tuning on class folders as a new user does it, and the split of one folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from stvit_video import run
from stvit_video.common.errors import UsageError
from stvit_video.config import load_config
from stvit_video.config.clip_settings import view_settings
from stvit_video.config.load import override
from stvit_video.data.lists.videos import SPLITS, build_lists
from stvit_video.data.loader import build_train_loader
from stvit_video.inference.load import open_checkpoint
from stvit_video.models import create_model, load_pretrained
from stvit_video.models.zoo import build_model
from stvit_video.predict import Predictor
from stvit_video.runs.checkpoint import check_all_loaded, load_newest, save_weights
from stvit_video.runs.folder import describe_changes
from stvit_video.runs.preflight import build_filled_batch, build_fitting_sampling
from stvit_video.runtime.world import World
from tests.conftest import REPOSITORY, data_config

CONFIG = REPOSITORY / "configs" / "finetune.yaml"
CLASSES = ("vers la gauche", "wächst 動き")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, small_set: Path) -> Path:
    """A run folder of other classes and unusual settings, with random weights."""
    folder = tmp_path_factory.mktemp("pre trained")
    cfg = data_config(small_set, "MODEL.BASE_DEPTH", "3", "DATA.STRIDE", "1", "DATA.MEAN", "[0.4,0.5,0.6]")
    (folder / "config.yaml").write_text(cfg.dump())
    torch.manual_seed(0)
    save_weights(folder / "model.safetensors", build_model(cfg, 8), [str(i) for i in range(8)])
    return folder / "model.safetensors"


@pytest.fixture
def my_videos(tmp_path: Path, small_set: Path) -> Path:
    """Two classes of eight clips, left and growing, in a folder with spaces and accents in its name."""
    root = tmp_path / "mes vidéos (2)"
    for label, name in zip((0, 6), CLASSES, strict=True):
        (root / name).mkdir(parents=True)
        sources = [
            small_set / "videos" / f"{s}_{i:05d}.mp4"
            for s, n in (("train", 32), ("val", 16), ("test", 16))
            for i in range(label, n, 8)
        ]
        for i, source in enumerate(sources):
            shutil.copy(source, root / name / f"clip {i} ü.mp4")
    return root


def test_a_new_users_first_attempt(
    my_videos: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["DATA.ROOT", my_videos.name, "MODEL.INIT", str(checkpoint), "OUTPUT_DIR", "à moi", "TRAIN.EPOCHS", "2"]
    monkeypatch.chdir(tmp_path)
    assert run.main(["--cfg", str(CONFIG), *words, "DATA.WORKERS", "0"]) == 0
    said = capsys.readouterr().out
    assert f"2 classes: {CLASSES[0]} 8, {CLASSES[1]} 8\ntrain: 12 videos\nval: 2 videos\ntest: 2 videos\n" in said
    assert "DATA.SPLIT: 70 / 15 / 15 % of each class" in said
    results = json.loads((tmp_path / "à moi" / "results.json").read_text())
    assert results["videos"] == results["scored"] == 2
    predictor = Predictor.load(tmp_path / "à moi", device="cpu")
    assert predictor.classes == list(CLASSES)
    video = next((my_videos / CLASSES[0]).iterdir())
    assert sum(score for _, score in predictor(video).top()) == pytest.approx(1.0, abs=1e-5)
    before, after = load_file(checkpoint), load_file(tmp_path / "à moi" / "model.safetensors")
    assert len(after["head.proj.bias"]) == 2
    moved = (after["pos_embed"] - before["pos_embed"]).abs().max() / before["pos_embed"].abs().max()
    assert 0 < moved < 0.1  # it went on from the checkpoint, gently


def test_three_videos_per_class_are_enough(
    my_videos: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in my_videos.iterdir():
        for video in sorted(folder.iterdir())[3:]:
            video.unlink()
    words = ["DATA.ROOT", str(my_videos), "MODEL.INIT", str(checkpoint), "OUTPUT_DIR", str(tmp_path / "run")]
    words += ["TRAIN.EPOCHS", "1", "DATA.WORKERS", "0"]
    assert run.main(["--cfg", str(CONFIG), *words]) == 0
    assert "TRAIN.BATCH_SIZE 8 is lowered to 2: there are no more training videos" in capsys.readouterr().out
    assert run.main(["--cfg", str(CONFIG), *words]) == 0  # the same run: its settings are those that were given
    assert "is finished" in capsys.readouterr().out


def test_sampling_fits_short_videos(
    my_videos: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Clips of 8 frames with a stride of 4 are longer than the videos of 20 frames."""
    words = ["--cfg", str(CONFIG), "DATA.ROOT", str(my_videos), "MODEL.INIT", str(checkpoint), "DATA.STRIDE", "4"]
    words += ["TRAIN.EPOCHS", "1", "DATA.WORKERS", "0", "OUTPUT_DIR"]
    reason = "12 of 12 training videos are shorter than a clip of 29 frames"
    assert run.main([*words, str(tmp_path / "fit")]) == 0
    assert f"\nDATA.SAMPLING is uniform (DATA.SHORT_VIDEOS): {reason}\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "fit" / "results.json").read_text())["short_videos"] == 0
    assert Predictor.load(tmp_path / "fit").input.settings["DATA.SAMPLING"] == "uniform"
    assert load_newest(tmp_path / "fit" / "checkpoints")["setup"]["sampling"] == "uniform"
    recorded = ["--cfg", str(tmp_path / "fit" / "config.yaml"), "MODE", "test", "OUTPUT_DIR", str(tmp_path / "again")]
    assert run.main([*recorded, "MODEL.INIT", str(tmp_path / "fit" / "model.safetensors")]) == 0
    assert "DATA.SAMPLING is uniform (DATA.SHORT_VIDEOS): as for training\n" in capsys.readouterr().out
    tables = [(tmp_path / name / "predictions.csv").read_bytes() for name in ("fit", "again")]
    assert tables[0] == tables[1]

    assert run.main([*words, str(tmp_path / "still"), "DATA.SHORT_VIDEOS", "repeat"]) == 0
    said = capsys.readouterr().out
    assert f"\n{reason}; clips of them stand still at their end: lower DATA.STRIDE, or set DATA.SAMPLING" in said
    assert "on 2 of 2 videos (100.0 % coverage, 2 x 1 views, 2 shorter than a clip)" in said
    results = json.loads((tmp_path / "still" / "results.json").read_text())
    assert results["short_videos"] == 2
    assert results["gflops_per_video"] == results["gflops"]  # of the two clips, which are the same, one was scored


def test_a_run_that_continues_keeps_its_sampling(my_videos: Path, checkpoint: Path) -> None:
    """Also where it began before there was a choice."""
    cfg = load_config(CONFIG, ["DATA.ROOT", str(my_videos), "MODEL.INIT", str(checkpoint), "DATA.STRIDE", "4"])
    videos = {"train": build_lists(cfg).videos("train")}

    def chosen(state: dict | None) -> str:
        return build_fitting_sampling(cfg, World(0, 1, torch.device("cpu")), videos, state, None)[0].DATA.SAMPLING

    assert chosen(None) == "uniform"
    assert chosen({"setup": {}}) == "dense"
    assert [chosen({"setup": {"sampling": name}}) for name in ("dense", "uniform")] == ["dense", "uniform"]
    cfg = override(cfg, [("DATA.SHORT_VIDEOS", "repeat")], "a later start")
    assert chosen({"setup": {"sampling": "uniform"}}) == "uniform"


def test_the_network_and_its_clips_are_the_checkpoints(checkpoint: Path, my_videos: Path) -> None:
    words = ["DATA.ROOT", str(my_videos), "MODEL.INIT", str(checkpoint)]
    cfg = load_config(CONFIG, words)
    assert (cfg.MODEL.NAME, cfg.MODEL.BASE_DEPTH) == ("stvit_vit_sample_patch8", 3)
    assert (cfg.DATA.FRAMES, cfg.DATA.STRIDE, cfg.DATA.SIZE, cfg.DATA.SHORT_SIDE) == (8, 1, 64, [64, 72])
    assert (cfg.DATA.MEAN, cfg.DATA.FLIP, cfg.TEST.SHORT_SIDE) == ([0.4, 0.5, 0.6], False, 64)
    asked = load_config(CONFIG, [*words, "DATA.FRAMES", "16", "DATA.FLIP=True"])
    assert (asked.DATA.FRAMES, asked.DATA.FLIP, asked.DATA.STRIDE) == (16, True, 1)
    again = load_config_of_dump(cfg, my_videos.parent)
    assert again == cfg  # a run's config.yaml needs the checkpoint no more


def test_weights_say_whether_clips_may_be_mirrored(
    checkpoint: Path, my_videos: Path, tmp_path: Path, small_set: Path
) -> None:
    """Where left and right are classes; also weights copied without their run folder."""
    cfg = data_config(small_set, "DATA.FLIP", "False")
    save_weights(tmp_path / "alone.safetensors", build_model(cfg, 8), [*"01234567"], view_settings(cfg))
    words = ["DATA.ROOT", str(my_videos), "MODEL.INIT", str(tmp_path / "alone.safetensors")]
    assert load_config(CONFIG, words).DATA.FLIP is False
    assert load_config(CONFIG, [*words, "DATA.FLIP", "True"]).DATA.FLIP is True
    assert open_checkpoint(tmp_path / "alone.safetensors").input.settings["DATA.FLIP"] is False

    views = {key: value for key, value in view_settings(cfg).items() if key != "DATA.FLIP"}  # of an earlier version
    (tmp_path / "run").mkdir()
    save_weights(tmp_path / "run" / "model.safetensors", build_model(cfg, 8), [*"01234567"], views)
    (tmp_path / "run" / "config.yaml").write_text(cfg.dump())
    assert open_checkpoint(tmp_path / "run").input.settings["DATA.FLIP"] is False


def test_initialisation_is_not_part_of_the_settings(tmp_path: Path, my_videos: Path) -> None:
    model = create_model("swin_hard_patch4", num_frames=16, image_size=64, num_classes=8, init="normal")
    save_weights(tmp_path / "normal.safetensors", model, [*"01234567"])
    cfg = load_config(CONFIG, ["DATA.ROOT", str(my_videos), "MODEL.INIT", str(tmp_path / "normal.safetensors")])
    assert cfg.MODEL.NAME == "swin_hard_patch4"
    assert Path(cfg.MODEL.INIT).name == "normal.safetensors"
    again = build_model(cfg, 8)
    check_all_loaded(load_pretrained(again, cfg.MODEL.INIT), again)


def load_config_of_dump(cfg: object, folder: Path) -> object:
    path = folder / "resolved.yaml"
    path.write_text(cfg.dump())  # type: ignore[attr-defined]
    return load_config(path)


def test_an_image_checkpoint_does_not_set_the_frames(tmp_path: Path, my_videos: Path) -> None:
    model = create_model("vit_tiny_patch16", num_frames=1, image_size=96, num_classes=3)
    save_weights(tmp_path / "image.safetensors", model, [*"abc"])
    cfg = load_config(CONFIG, ["DATA.ROOT", str(my_videos), "MODEL.INIT", str(tmp_path / "image.safetensors")])
    assert (cfg.MODEL.NAME, cfg.DATA.FRAMES, cfg.DATA.SIZE, cfg.TEST.SHORT_SIDE) == ("vit_tiny_patch16", 16, 96, 96)
    assert cfg.DATA.SHORT_SIDE[0] == 96


def test_a_network_that_no_key_describes_is_refused(tmp_path: Path, my_videos: Path) -> None:
    model = create_model("vit_tiny_patch16", num_frames=4, image_size=32, num_classes=3, depth=2)
    save_weights(tmp_path / "short.safetensors", model, [*"abc"])
    with pytest.raises(UsageError, match="was built with depth=2, for which there is no key; use Python"):
        load_config(CONFIG, ["DATA.ROOT", str(my_videos), "MODEL.INIT", str(tmp_path / "short.safetensors")])


def test_a_run_that_continues_keeps_its_batch(small_set: Path) -> None:
    cfg = data_config(small_set, "TRAIN.BATCH_SIZE", "64", "DATA.REPEATS", "2")
    assert build_filled_batch(cfg, World(0, 1, torch.device("cpu")), 11)[0].TRAIN.BATCH_SIZE == 22
    two = World(0, 2, torch.device("cpu"))
    assert build_filled_batch(cfg, two, 11)[0].TRAIN.BATCH_SIZE == 20
    kept, _ = build_filled_batch(cfg, two, 11, {"setup": {"batch": 22}})
    assert kept.TRAIN.BATCH_SIZE == 22
    with pytest.raises(UsageError, match=r"does not divide by 2 processes.*continue a run with as many as it had"):
        build_train_loader(kept, two, [])


def test_a_text_list_is_split_too(my_videos: Path) -> None:
    lines = [
        f"{path.relative_to(my_videos)} {i}" for i, name in enumerate(CLASSES) for path in (my_videos / name).iterdir()
    ]
    (my_videos / "all.csv").write_text("\n".join(lines))
    lists = [word for split in SPLITS for word in (f"DATA.{split.upper()}_LIST", "all.csv")]
    cfg = load_config(CONFIG, ["DATA.ROOT", str(my_videos), "MODEL.NAME", "vit_tiny_patch16", *lists])
    found = [{video.path for video in build_lists(cfg).videos(split)} for split in SPLITS]
    assert [len(part) for part in found] == [12, 2, 2]
    assert len(set.union(*found)) == 16


def test_a_run_from_before_a_key_goes_on_without_it(my_videos: Path, tmp_path: Path) -> None:
    words = ["DATA.ROOT", str(my_videos), "MODEL.NAME", "vit_tiny_patch16", "OUTPUT_DIR", str(tmp_path / "run")]
    cfg = load_config(CONFIG, words)
    assert cfg.DATA.GROUP == "auto"
    recorded = yaml.safe_load(cfg.dump())
    del recorded["DATA"]["GROUP"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(recorded))
    tested = [*words[:-1], str(tmp_path / "test"), "MODE", "test", "MODEL.INIT"]
    for again in (
        load_config(CONFIG, words),
        load_config(tmp_path / "run" / "config.yaml"),
        load_config(CONFIG, [*tested, str(tmp_path / "run" / "model.safetensors")]),
        load_config(CONFIG, [*tested, str(tmp_path / "run" / "checkpoints" / "best.safetensors")]),
    ):
        assert again.DATA.GROUP == ""
    assert describe_changes(recorded, yaml.safe_load(load_config(CONFIG, words).dump())) == ""
    assert load_config(CONFIG, [*words, "OVERWRITE", "True"]).DATA.GROUP == "auto"
    assert load_config(CONFIG, [*words, "DATA.GROUP", "(x)"]).DATA.GROUP == "(x)"


def test_a_split_keeps_recordings_together(my_videos: Path) -> None:
    for name in CLASSES:
        for i, file in enumerate(sorted((my_videos / name).iterdir())):
            file.rename(file.with_name(f"v_{name}_g{i // 2:02d}_c{i % 2:02d}.mp4"))
    words = ["DATA.ROOT", str(my_videos), "MODEL.NAME", "vit_tiny_patch16"]
    found = [build_lists(load_config(CONFIG, words)).videos(split) for split in SPLITS]
    groups = [{Path(video.path).stem[:-4] for video in part} for part in found]
    assert [len(part) for part in found] == [8, 4, 4]
    assert len(set.union(*groups)) == sum(map(len, groups)) == 8


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["DATA.FRAME_PATTERN", "img"], "names no frames; give a template or a glob"),
        (["DATA.GROUP", "(x"], "is no regular expression"),
        (["DATA.GROUP", "x"], "has no group"),
        (["DATA.GROUP", "(x)"], "matches none of the paths"),
        (["DATA.SPLIT", "[70,15]"], "has 2 values; it takes 3"),
        (["DATA.SPLIT", "[70,15,10]"], "add up to 100"),
        (["DATA.SPLIT", "[85,15,0]"], "only validation being 0"),
        (["DATA.TEST_LIST", "test.csv"], "splits one list"),
        (["DATA.SPLIT", "[80,0,20]"], "set them to ['.', '', '.']"),
        (["MODEL.INIT", ""], "which is empty; give MODEL.INIT FILE"),
        (["MODEL.INIT", "{root}/gone.safetensors"], "needs files that are missing: MODEL.INIT"),
        (["MODEL.INIT", "{root}/swin_tiny.pth"], "does not say which model it is of; give MODEL.NAME too"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(
    words: list[str], expected: str, my_videos: Path, checkpoint: Path, refused: Callable[[list[str]], str]
) -> None:
    torch.save({"weight": torch.zeros(2)}, my_videos / "swin_tiny.pth")
    init = [] if "MODEL.INIT" in words else ["MODEL.INIT", str(checkpoint)]
    words = [word.format(root=my_videos) for word in words]
    assert expected in refused(["--cfg", str(CONFIG), "DATA.ROOT", str(my_videos), *init, *words])


def test_a_folder_that_is_split_already_is_refused(
    my_videos: Path, checkpoint: Path, tmp_path: Path, refused: Callable[[list[str]], str]
) -> None:
    for split in ("Train", "val"):
        shutil.copytree(my_videos, tmp_path / "both" / split)
    words = ["--cfg", str(CONFIG), "DATA.ROOT", str(tmp_path / "both"), "MODEL.INIT", str(checkpoint)]
    said = refused([*words, "OUTPUT_DIR", str(tmp_path / "run")])
    assert "is split already (Train, val); give DATA.SPLIT None" in said
    lists = ["DATA.SPLIT", "None", "DATA.TRAIN_LIST", "Train", "DATA.VAL_LIST", "val", "DATA.TEST_LIST", "val"]
    assert len(build_lists(load_config(words[1], [*words[2:], *lists])).videos("train")) == 16
