"""Configuration: types, names, ranges, inheritance, overrides."""

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from stvit_video.common.errors import UsageError
from stvit_video.config.load import default_config, load_config
from stvit_video.config.schema import KEYS, describe_keys
from stvit_video.inference.load import open_checkpoint
from stvit_video.models import create_model
from stvit_video.models.weights.files import header
from tests.conftest import REPOSITORY

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))


@pytest.fixture
def cfg_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("DATA:\n  ROOT: videos\n")
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_files_load_and_open_with_their_command(path: Path) -> None:
    load_config(path)
    head = path.read_text().split("\nMODEL")[0]
    assert f"python -m stvit_video.run --cfg configs/{path.name}" in head


def test_both_forms_of_override_and_their_types(cfg_file: Path) -> None:
    words = ["TRAIN.EPOCHS", "3", "OPTIM.LR=1e-4", "DATA.FLIP", "False", "MODEL.REGIONS", "[2, 4, 4]", "OUTPUT_DIR=a=b"]
    cfg = load_config(cfg_file, [*words, "OPTIM.CLIP_GRAD", "5", "MODEL.NUM_CLASSES", "None", "TRAIN.EPOCHS=4"])
    assert cfg.TRAIN.EPOCHS == 4
    assert cfg.OPTIM.LR == 1e-4
    assert cfg.DATA.FLIP is False
    assert cfg.MODEL.REGIONS == [2, 4, 4]
    assert cfg.OUTPUT_DIR == "a=b"
    assert cfg.OPTIM.CLIP_GRAD == 5.0
    assert isinstance(cfg.OPTIM.CLIP_GRAD, float)
    assert load_config(cfg_file, ["OUTPUT_DIR", "007"]).OUTPUT_DIR == "007"


def test_base_files_are_inherited_from_their_own_folder(cfg_file: Path, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    child = tmp_path / "sub" / "child.yaml"
    child.write_text("_BASE_: ../mine.yaml\nTRAIN:\n  EPOCHS: 7\n")
    cfg = load_config(child)
    assert (cfg.DATA.ROOT, cfg.TRAIN.EPOCHS, cfg.OUTPUT_DIR) == ("videos", 7, "runs/child")
    both = tmp_path / "both.yaml"
    both.write_text("_BASE_: [sub/child.yaml, third.yaml]\n")
    (tmp_path / "third.yaml").write_text("TRAIN:\n  EPOCHS: 8\n")
    assert (load_config(both).DATA.ROOT, load_config(both).TRAIN.EPOCHS) == ("videos", 8)


def test_an_empty_section_changes_nothing(cfg_file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text(f"_BASE_: {cfg_file}\nDATA: {{}}\n")
    assert load_config(tmp_path / "empty.yaml").DATA == load_config(cfg_file).DATA


def test_the_result_cannot_be_changed(cfg_file: Path) -> None:
    with pytest.raises(AttributeError):
        load_config(cfg_file).TRAIN.EPOCHS = 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["TRAIN.EPOCH", "3"], "Did you mean TRAIN.EPOCHS?"),
        (["MODLE.NAME", "x"], "Did you mean MODEL.NAME?"),
        (["NONSENSE", "3"], "--keys"),
        (["TRAIN.EPOCHS", "=", "3"], "without blanks around ="),
        (["TRAIN.EPOCHS", "=3"], "without blanks around ="),
        (["DATA.ROOT", "my", "videos"], "If it belongs to my, quote that: 'my videos'"),
        (["DATA.SHORT_SIDE", "256", "320"], "for example '[256, 320]', as one word"),
        (["DATA.SHORT_SIDE", "[256,", "320]", "SEED", "1"], "quote it: DATA.SHORT_SIDE '[256, 320]'."),
        (["MODEL.REGIONS", "2 4 4"], "for example '[1, 2, 2]', as one word"),
        (["train"], "Key train in the command line is unknown. Did you mean MODE train?"),
        (["TRAIN.EPOCHS:3"], "Did you mean TRAIN.EPOCHS?"),
        (["TRAIN.EPOCHS", "many"], "(str); it takes an int"),
        (["TRAIN.EPOCHS", "1.5"], "(float); it takes an int"),
        (["DATA.FLIP", "1"], "it takes a bool"),
        (["OPTIM.LR", "fast"], "it takes a float"),
        (["TRAIN", "3"], "Key TRAIN in the command line is unknown"),
        (["TRAIN.EPOCHS"], "has no value"),
        (["TRAIN.EPOCHS="], "has no value"),
        ([""], "Key  in the command line is unknown. All keys"),
        (["TRAIN.EPOCHS", "0"], "at least 1"),
        (["OPTIM.LR", "-1"], "at least 0"),
        (["OPTIM.LR", ".nan"], "allowed: at least 0"),
        (["DEVICE", "gpu"], "allowed: auto, cpu, cuda."),
        (["MODE", "trian"], "Did you mean train?"),
        (["PRECISION", "fp8"], "allowed: fp32, tf32, bf16, fp16"),
        (["MODEL.REGIONS", "[2, 4]"], "has 2 values; it takes 3"),
        (["DATA.SHORT_SIDE", "[320, 256]"], "smaller end"),
        (["DATA.MEAN", "[a, b, c]"], "it takes float values"),
        (["DATA.SIZE", "300"], "below DATA.SIZE"),
        (["TEST.SHORT_SIDE", "100"], "below DATA.SIZE"),
        (["TEST.CROPS", "2"], "1 (centre) or 3"),
        (["DATA.ROOT", ""], "DATA.ROOT is empty"),
        (["DATA.ROOT", "[a"], "quote it"),
        (["CHECKPOINT.KEEP", "1"], "at least 2"),
        (["MODEL.REGIONS", "[0, 4, 4]"], "at least 1"),
        (["MODEL.REGIONS", "[2.0, 4, 4]"], "it takes int values"),
        (["DATA.SHORT_SIDE", "[256.5, 320]"], "it takes int values"),
        (["OPTIM.BETAS", "[0.9, 1.0]"], "0 to 0.9999"),
        (["TEST.WEIGHTS", "best", "DATA.VAL_LIST", ""], "TEST.WEIGHTS best needs validation"),
        (["TEST.WEIGHTS", "average"], "TEST.WEIGHTS average with TRAIN.EMA 0.0"),
    ],
)
def test_mistakes_are_named_with_what_is_allowed(cfg_file: Path, words: list[str], says: str) -> None:
    with pytest.raises(UsageError) as error:
        load_config(cfg_file, words)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("DATA: [1", "is not YAML that can be used in line 1"),
        ("just text", "is not a mapping, but 'just text'; write `KEY: VALUE` lines"),
        ("- a\n- b\n", "is not a mapping"),
        ("", "broken.yaml is empty"),
        ("DATA:\n\tROOT: x\n", "in line 2 (found character '\\t' that cannot start any token: indent with blanks)"),
        ("DATA:\n  ROOT:x\n", "DATA is a section; name one of its keys, and a blank behind the colon: DATA.ROOT"),
        ("DATA:\n  SIZE: 1\n  SIZE: 2\n", "in line 2 (SIZE is given twice)"),
        ("MODEL: stvit_vit_tiny\n", "MODEL is a section; name one of its keys: MODEL.NAME"),
        ("TRAIN:\n  LR: 0.1\n", "Did you mean OPTIM.LR?"),
        ("_BASE_: absent.yaml\n", "absent.yaml is not there"),
        ("_BASE_: broken.yaml\n", "its _BASE_ is 'broken.yaml'; name another .yaml file"),
        ("_BASE_: [broken.yaml]\n", "name another .yaml file"),
        ("DATA:\n  ROTO: x\n", "Did you mean DATA.ROOT?"),
        ("DATA: 3\n", "Key DATA in"),
        ("MODE: {a: 1}\n", "MODE in"),
        ("_BASE_: .\n", "is a folder; give a .yaml file. In it: broken.yaml."),
        ("DATA:\n  ROOT: {a: 1}\n", "DATA.ROOT"),
        ("MODEL:\n  NAME: !!python/object/apply:os.getcwd []\n", "is not YAML that can be used"),
    ],
)
def test_broken_files_are_one_clear_line(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(UsageError) as error:
        load_config(path)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "given",
    ["finetune", "finetune.yaml", "configs/finetune", "fine-tune", "config/finetune.yaml", "Finetune.yml", "fintune"],
)
def test_a_missing_file_suggests_one_of_like_name(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(UsageError) as error:
        load_config(given)
    assert str(error.value).endswith(f"{given} is not there; give a .yaml file. Did you mean configs/finetune.yaml?")


def test_every_key_is_described_once() -> None:
    assert len({key.name for key in KEYS}) == len(KEYS)
    assert all(key.about for key in KEYS)
    lines = describe_keys().splitlines()
    assert [line.split()[0] for line in lines if line[0] != " "] == ["key", *(key.name for key in KEYS)]
    assert default_config().TRAIN.EPOCHS == 30


@pytest.mark.parametrize(
    ("views", "arguments", "says"),
    [
        ({"OVERWRITE": True, "OUTPUT_DIR": "another run"}, {}, "sets 'OVERWRITE'; weights may say how clips are seen"),
        ({"DATA.STRIDE": 2, "DATA.DECODER": "decord"}, {}, "sets 'DATA.DECODER'"),
        ({"LOG.WANDB\n": "x"}, {}, "sets 'LOG.WANDB\\n'"),
        ({"TEST.CLIPS": 10**6}, {}, "sets TEST.CLIPS 1000000; weights may ask for at most 1000"),
        ({"DATA.STRIDE": "2; rm"}, {}, "it takes an int"),
        ({"DATA.MEAN": [0.5, float("inf"), 0.5]}, {}, "allowed: 0 to 1"),
        (["OVERWRITE"], {}, "its views are ['OVERWRITE'], not settings by key"),
        ({}, {"new_head": True}, "was built with new_head=True, for which there is no key"),
        ({}, {"init_min_coverage": 0.0}, "was built with init_min_coverage=0.0, for which there is no key"),
    ],
)
def test_weights_say_how_clips_are_seen_and_nothing_else(
    views: object, arguments: dict[str, object], says: str, tmp_path: Path
) -> None:
    model = create_model("stvit_vit_sample_patch8", num_frames=4, image_size=32, num_classes=2)
    described = header(model, ["a", "b"])
    described["arguments"] = json.dumps({**json.loads(described["arguments"]), **arguments})
    weights = tmp_path / "given.safetensors"
    save_file(model.state_dict(), weights, metadata={**described, "views": json.dumps(views)})
    finetune = REPOSITORY / "configs" / "finetune.yaml"
    with pytest.raises(UsageError) as error:
        load_config(finetune, ["DATA.ROOT", "videos", "MODEL.NAME", "auto", "MODEL.INIT", str(weights)])
    assert says in str(error.value)
    if not arguments:  # of which the network is built here
        with pytest.raises(UsageError) as error:
            open_checkpoint(weights)
        assert says in str(error.value)
