"""Files of weights from anyone: what they say of themselves is compared with the file before it is believed."""

import ctypes
import io
import json
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from stvit_video import predict, run
from stvit_video.evaluation import evaluate
from stvit_video.models import create_model
from stvit_video.models.weights.claims import check_claims
from stvit_video.models.weights.files import header, read_checkpoint
from stvit_video.runs.checkpoint import load_newest, pack
from stvit_video.training import loop
from tests.conftest import REPOSITORY, refusal, small_arguments
from tests.security.mutations import memory_mb, mutate, reset_peak, run_unharmed, unharmed

ARGUMENTS = {"num_frames": 4, "image_size": 32, "num_classes": 2}
NAME = "stvit_vit_sample_patch8"


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return create_model(NAME, **ARGUMENTS)


def write(model: torch.nn.Module, path: Path, **changed: Any) -> Path:
    """Write the weights of a model with parts of their metadata replaced: texts as they are, else as JSON."""
    described = header(model, ["a", "b"])
    described |= {key: value if isinstance(value, str) else json.dumps(value) for key, value in changed.items()}
    save_file(model.state_dict(), path, metadata=described)
    return path


def argument(**changed: Any) -> dict[str, Any]:
    return {"arguments": {**ARGUMENTS, **changed}}


@pytest.mark.parametrize("names", [["crane", "crane"], ["caf\udce9", "a\tb"], ["a\nb", "\u200f\x1b[2J"]])
def test_names_that_data_may_have_are_read_as_written(names: list[str], model: torch.nn.Module, tmp_path: Path) -> None:
    assert read_checkpoint(write(model, tmp_path / "a.safetensors", classes=names)).classes == names


def test_a_name_that_weights_may_not_have_is_refused_before_training(
    small_run: Callable[..., list[str]], refused: Callable[[list[str]], str], tmp_path: Path
) -> None:
    (tmp_path / "classes.txt").write_text("\n".join([*map(str, range(7)), "x" * 501]))
    assert "allowed: text of 500 characters" in refused(small_run("DATA.CLASSES", str(tmp_path / "classes.txt")))


CLAIMS = [
    ({"classes": ["a"] * 3}, "names 3 classes and its classifier has 2"),
    ({"classes": [str(i) for i in range(10**6)]}, "characters"),
    ({"classes": [str(i) for i in range(10**5)]}, "names 100000 classes and its classifier has 2"),
    ({"classes": ["a", 3]}, "a class is named 3"),
    ({"classes": ["a", "b" * 501]}, "characters"),
    ({"classes": "[" * 10**5}, "nested too deeply"),
    ({"classes": {"a": 1}}, "its metadata has classes"),
    ({"arguments": '{"num_classes": 2, "num_classes": 3}'}, "given twice"),
    ({"arguments": {"num_frames": 4, "image_size": 32}}, "arguments: num_classes"),
    ({"arguments": "9" * 5000, "name": NAME}, "cannot be read"),
    ({"weights": {"top1": 100}}, "its metadata has weights"),
    ({"multi_label": [1]}, "its metadata has multi_label"),
    (argument(num_classes=10**6) | {"classes": None}, "head.proj.weight is 2x96 in the file and 1000000x96"),
    (argument(num_classes=10**10) | {"classes": None}, "head.proj.weight is 2x96 in the file"),
    (argument(num_classes=10**30) | {"classes": None}, "cannot be built"),
    (argument(num_frames="4"), "arguments: num_frames"),
    (argument(depth=20000), "20000 blocks"),
    (argument(dim=2**20, num_heads=1), "in the file"),
    (argument(image_size=2**20), "clips of 4x1048576x1048576"),
    (argument(num_frames=4096, image_size=4096), "clips of"),
    (argument(mlp_ratio=1e300), "network"),
    (argument(norm_eps=float("inf")), "norm_eps"),
    (argument(regions=[2**20, 2**20, 2**20]), "regions of"),
    (argument(name="x"), "cannot be built"),
    ({"views": {"DATA.FRAMES": 64}}, "sets DATA.FRAMES 64 for a network of 4"),
    ({"views": {"TEST.CLIPS": 900, "TEST.CROPS": 3, "TEST.SHORT_SIDE": 4000}}, "asks for 900 clips of 4 frames"),
]


@pytest.mark.parametrize(("changed", "says"), CLAIMS)
def test_claims_are_compared_with_the_file(
    model: torch.nn.Module, changed: dict[str, Any], says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By all commands that read weights, without memory for what is claimed."""
    path = write(model, tmp_path / "given.safetensors", **changed)
    finetune = ["--cfg", str(REPOSITORY / "configs" / "finetune.yaml"), "DATA.ROOT", str(tmp_path)]
    with unharmed(tmp_path, seconds=10):
        assert predict.main(["video.mp4", "--checkpoint", str(path)]) == 2
        said = capfd.readouterr().err
        auto = [*finetune, "MODEL.NAME", "auto", "MODEL.INIT", str(path), "OUTPUT_DIR", str(tmp_path / "run")]
        assert run_unharmed(run.main, auto, capfd) == 2
    assert says in said, said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert len(said) < 1000


@pytest.mark.parametrize(
    ("name", "more"),
    [
        *((name, {}) for name in ("vit_tiny_patch16", "swin_tiny", "stvit_swin_tiny", "stvit_r_swin_small")),
        *(("stvit_vit_tiny_patch16", {"reducer": kind}) for kind in ("random", "tome", "spot")),
        ("stvit_swin_tiny", {"reducer": "random"}),
    ],
)
def test_a_network_without_memory_has_the_shapes_of_a_built_one(
    name: str, more: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda weight, **_: weight)  # most of the time, and no shape
    arguments = {"num_frames": 2, "image_size": 64, "num_classes": 3, **more}
    if name == "swin_tiny":
        arguments["depths"] = (1, 1, 1, 1)
    built = create_model(name, **arguments)
    shapes = {key: tuple(value.shape) for key, value in built.state_dict().items()}
    check_claims({"name": name, "arguments": arguments}, shapes, "it")
    shapes["head.proj.weight"] = (4, 1)
    assert "head.proj.weight is 4x1 in the file" in refusal(
        check_claims, {"name": name, "arguments": arguments}, shapes, "it"
    )


def nested(depth: int) -> dict[str, Any]:
    content: dict[str, Any] = {"a": torch.zeros(3)}
    for _ in range(depth):
        content = {"model": content, "x": content}
    return content


def circle() -> dict[str, Any]:
    content: dict[str, Any] = {"other": {}}
    content["other"]["again"] = content
    return content


@pytest.mark.parametrize(
    "content",
    [
        {"blocks.0.attn.qkv.weight": torch.zeros(1).expand(10**5, 10**5)},
        {"a": torch.zeros(256).as_strided((10**4, 10**6), (0, 0))},
        {str(i): torch.zeros(1000).view(-1) for i in range(2)} | {"x": torch.zeros(1).expand(3)},
        nested(300),
        circle(),
    ],
)
def test_what_takes_more_than_the_file_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "given.pt")
    with unharmed(tmp_path, seconds=5):
        refusal(read_checkpoint, tmp_path / "given.pt")


def test_an_archive_that_unpacks_to_more_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(6 * 10**6)}, buffer := io.BytesIO())
    with (
        zipfile.ZipFile(buffer) as given,
        zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed,
    ):
        for entry in given.infolist():
            packed.writestr(entry.filename, given.read(entry))
    del buffer
    with unharmed(tmp_path, peak_mb=20):
        assert "unpack to" in refusal(read_checkpoint, tmp_path / "a.pt")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("number", [bytes, bytearray, range])
def test_no_number_in_a_file_takes_memory(number: type, zipped: bool, tmp_path: Path) -> None:
    class Large:
        def __reduce__(self) -> tuple[object, ...]:
            return (list, (range(10**9),)) if number is range else (number, (10**9,))

    content = {"model": {"a": torch.zeros(3)}, "x": Large()}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with unharmed(tmp_path):
        if number is range:
            assert read_checkpoint(tmp_path / "a.pt").tensors.keys() == {"a"}
        else:
            assert "damaged" in refusal(read_checkpoint, tmp_path / "a.pt")


def test_tensors_take_no_more_than_the_file(tmp_path: Path) -> None:
    class Large:
        def __reduce__(self) -> tuple[object, ...]:
            return torch.Tensor, (10**9,)

    torch.save({"a": Large(), "b": torch.zeros(3)}, tmp_path / "a.pt")
    with unharmed(tmp_path):
        assert "the file has" in refusal(read_checkpoint, tmp_path / "a.pt")


@pytest.mark.parametrize("place", ["../other.safetensors", "/etc/passwd", "..", "", 3, ["x"]])
def test_an_index_names_files_beside_it_only(place: object, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "other.safetensors")
    (tmp_path / "in").mkdir()
    index = tmp_path / "in" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": place}}))
    refusal(read_checkpoint, index)


STATE = {"model": {"a": torch.zeros(2)}, "optimizer": {}, "average": None, "averaged": 0, "scheduler": {}, "scaler": {}}
STATE |= {"epoch": 0, "step": 1, "bad_steps": 0, "best": 0.0, "setup": {}}


@pytest.mark.parametrize(
    "changed",
    [
        *({key: "1"} for key in ("epoch", "step", "model", "setup", "best")),
        *({"setup": {key: 1.5}} for key in ("batch", "sampling", "classes", "lists", "settings", "header")),
    ],
)
def test_a_state_of_other_kinds_is_not_continued(changed: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "step_00000001.pt").write_bytes(pack(STATE))
    assert load_newest(tmp_path) is not None
    (tmp_path / "step_00000002.pt").write_bytes(pack({**STATE, **changed}))
    with pytest.warns(UserWarning, match="not a training state") as said:
        assert load_newest(tmp_path)["step"] == 1  # type: ignore[index]
    assert said[0].filename == "<step_00000002.pt>"  # no line of code is shown


VALUES = (None, True, -1, 0, 3, 10**6, 10**12, 1e300, "", "x\n\x1b[2J", [], [1] * 9, {}, {"a": {}}, "stgm", "max")


def change_metadata(content: bytes, rng: random.Random) -> bytes:
    """Return a ``.safetensors`` with one value of its metadata, or one of their arguments or views, replaced."""
    length = int.from_bytes(content[:8], "little")
    described = json.loads(content[8 : 8 + length])
    metadata = described["__metadata__"]
    key = rng.choice(list(metadata))
    if key in ("arguments", "views"):
        inner = json.loads(metadata[key])
        inner[rng.choice([*inner, "depth", "dim", "window", "regions", "DATA.STRIDE", "x"])] = rng.choice(VALUES)
        metadata[key] = json.dumps(inner)
    else:
        metadata[key] = rng.choice(
            (json.dumps(rng.choice(VALUES)), mutate(metadata[key].encode(), rng).decode("latin"))
        )
    changed = json.dumps(described).encode()
    return len(changed).to_bytes(8, "little") + changed + content[8 + length :]


def mutants(content: dict[str, bytes], count: int) -> Iterator[tuple[str, bytes]]:
    """Yield a name and changed content, of both formats in turn."""
    rng = random.Random(19)
    for i in range(count):
        suffix = (".safetensors", ".pt")[i % 2]
        change: Callable[[bytes, random.Random], bytes] = change_metadata if i % 4 == 0 else mutate
        yield f"given{suffix}", change(content[suffix], rng)


@pytest.mark.parametrize("count", [24, pytest.param(1000, marks=pytest.mark.long)])
def test_changed_weights_do_no_harm(
    trained: Path,
    small_set: Path,
    count: int,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By predict, the test and fine-tuning: an error of one line, or weights that can be used.

    A refused file may take 50 MB. One that loads may take what the unchanged file takes and 50 MB more. The test and
    fine-tuning end where the weights are loaded: the steps after it are those of any network.
    """
    monkeypatch.setattr(evaluate, "test", lambda opened: evaluate.build_tested_model(opened) and None)
    monkeypatch.setattr(loop, "build_dry_run", lambda opened: None)
    with safe_open(trained, "pt") as file:
        described = file.metadata()
    tensors = load_file(trained)
    torch.save({"model": tensors, "setup": {"header": described}}, buffer := io.BytesIO())
    content = {".safetensors": save(tensors, described), ".pt": buffer.getvalue()}
    video = next(small_set.rglob("*.mp4"))
    commands: list[Callable[[Path], tuple[Any, list[str]]]] = [
        lambda path: (predict.main, [str(video), "--checkpoint", str(path), "--device", "cpu"]),
        lambda path: (
            run.main,
            small_arguments(small_set, path.parent / "out", "MODE", "test", "MODEL.INIT", str(path)),
        ),
        lambda path: (
            run.main,
            small_arguments(
                *(small_set, path.parent / "out", "TRAIN.MAX_STEPS", "1", "DATA.VAL_LIST", ""),
                *("MODEL.INIT", str(path), "--dry-run"),
            ),
        ),
    ]
    folder = tmp_path / "in"
    folder.mkdir()
    kept = folder / "weights.safetensors"
    kept.write_bytes(content[".safetensors"])
    own = []  # MB that each takes for weights as they were, where all is imported
    for command in commands:
        main, words = command(kept)
        assert run_unharmed(main, words, capfd) == 0
        resident = resident_mb()
        run_unharmed(main, words, capfd)
        own.append(memory_mb("VmHWM") - resident)
    codes = []
    for i, (name, changed) in enumerate(mutants(content, count)):
        path = folder / name
        path.write_bytes(changed)
        main, words = commands[i % 3](path)
        with unharmed(folder, peak_mb=50 + own[i % 3], apart_from=[folder / "out"]):
            resident = resident_mb()
            codes.append(run_unharmed(main, words, capfd))
            assert codes[-1] == 0 or memory_mb("VmHWM") - resident <= 50, i
    # Each command takes some and refuses some; of a few files, all together do.
    for of_one in (codes[0::3], codes[1::3], codes[2::3]) if count > 100 else (codes,):
        assert {0, 2} <= set(of_one)
    assert np.mean([code == 2 for code in codes]) > 0.3


def resident_mb() -> float:
    """Return this process's resident memory and count its peak from now on.

    What was freed is given back before: else the allocator's share of earlier calls hides what the next one takes.
    """
    ctypes.CDLL(None).malloc_trim(0)
    return reset_peak()
