"""stvit_video.visualize: the page is correct, overlays follow a moving object, and it works in a browser."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from stvit_video import run
from stvit_video.data import sample, sprites
from stvit_video.data.decode.frames import FrameRequest, read_file
from stvit_video.data.decode.types import Reader
from stvit_video.inference.load import open_checkpoint
from stvit_video.models import create_model
from stvit_video.pages.clip_page import read_clip
from stvit_video.pages.explain import Explanation, explain, trajectories
from stvit_video.pages.html import printable
from stvit_video.predict import Predictor
from stvit_video.runs.checkpoint import save_weights
from stvit_video.visualize import main
from tests.conftest import REPOSITORY
from tests.pages.browser import assert_self_contained, dump, probed, screenshot

CLASSES = ["left", "right", "up <b>&</b>", "down", "</script>", "grün", "growing", "shrinking"]
FRAMES, SIDE, RADIUS = 16, 64, 11


def disc_mask(frame: int) -> np.ndarray:
    """The mask (SIDE, SIDE) of a disc that moves from left to right and down."""
    x, y = 14 + 2.4 * frame, 20 + 1.2 * frame
    return np.hypot(np.arange(SIDE) + 0.5 - x, (np.arange(SIDE) + 0.5 - y)[:, None]) < RADIUS


def disc_frames() -> np.ndarray:
    masks = np.stack([disc_mask(i) for i in range(FRAMES)])
    return np.where(masks[..., None], np.array([250, 240, 235]), np.array([20, 30, 40])).astype(np.uint8)


def colour_model() -> nn.Module:
    """Return a model of known weights: semantic tokens attend to bright image tokens, more so those of bright regions.

    All blocks are the identity; image tokens, queries and keys are the mean brightness.
    """
    torch.manual_seed(0)  # the classifier stays random
    model = create_model("stvit_vit_sample_patch8", num_frames=8, image_size=SIDE, num_classes=8, pooling="mean")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "head.proj.weight")):
                parameter.zero_()
        model.patch_embed.proj.weight[0] = 1 / model.patch_embed.proj.weight[0].numel()
        for block in model.blocks:
            dim = block.attn.qkv.weight.shape[1]
            for head in range(3):
                block.attn.qkv.weight[head * 32, 0], block.attn.qkv.bias[head * 32] = 0.2, 3.0  # query
                block.attn.qkv.weight[dim + head * 32, 0] = 0.5  # key
    return model


@pytest.fixture(scope="module")
def known_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of ``colour_model``, for clips of every second frame."""
    folder = tmp_path_factory.mktemp("known_run run")
    save_weights(folder / "model.safetensors", colour_model(), CLASSES)
    text = (REPOSITORY / "configs" / "sample_stvit.yaml").read_text()
    (folder / "config.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def disc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videos") / "a disc.mp4"
    sample.write_video(path, disc_frames())
    return path


def token_masks(masks: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """Return the share of each token (t, h, w) that masks (T, H, W) cover."""
    (T, H, W), (t, h, w) = masks.shape, grid
    return masks.reshape(t, T // t, h, H // h, w, W // w).mean(axis=(1, 3, 5))


def explained(run_folder: Path, video: Path) -> tuple[Explanation, np.ndarray]:
    """Return the explanation of a video's middle clip, and the indices of its frames."""
    trained = open_checkpoint(run_folder)
    clip = read_clip(trained.input, video)
    return explain(trained.model, clip.tensor), clip.indices


def test_tokens_assigned_to_the_disc_move_with_it(known_run: Path, disc: Path) -> None:
    seen, indices = explained(known_run, disc)
    masks = np.stack([disc_mask(i) for i in indices])
    assert not (masks[0] & masks[-1]).any()
    share = token_masks(masks, (4, 8, 8))
    owners = seen.owners
    mine = np.unique(owners[0][share[0] > 0.9])  # the semantic tokens on the disc in the first frame
    assert len(mine)
    for moment in range(4):  # in all later frames, the image tokens of the same semantic tokens lie on the disc
        owned = np.isin(owners[moment], mine) & (seen.drawn[moment] > 1)
        chance = share[moment].mean()
        assert share[moment][owned].mean() > 4 * chance, moment
        weight = seen.assignment[mine][:, moment].sum(axis=0)
        assert (weight * share[moment]).sum() / weight.sum() > 4 * chance, moment
    centres = [np.array(np.nonzero(mask)).mean(axis=1)[::-1] / SIDE for mask in masks[::2]]
    ways = trajectories(seen.assignment, seen.regions)
    nearest = np.linalg.norm(ways - np.array(centres), axis=-1).min(axis=0)
    assert (nearest < RADIUS / SIDE).all(), "no region's token looks at the disc"


def test_untrained_model_does_not_follow_the_disc(disc: Path, tmp_path: Path) -> None:
    model = create_model("stvit_vit_sample_patch8", num_frames=8, image_size=SIDE, num_classes=8)
    save_weights(tmp_path / "model.safetensors", model, CLASSES)
    (tmp_path / "config.yaml").write_text((REPOSITORY / "configs" / "sample_stvit.yaml").read_text())
    seen, indices = explained(tmp_path, disc)
    share = token_masks(np.stack([disc_mask(i) for i in indices]), (4, 8, 8))
    for moment in range(4):
        weight = seen.drawn[moment]
        assert (weight * share[moment]).sum() / weight.sum() < 2 * share[moment].mean()


def sprite_mask(split: str, index: int) -> np.ndarray:
    """Return the mask (frames, H, W) of the sprite in a video of the sample set, drawn again in white on black."""
    rng = np.random.default_rng([0, sample.SPLITS.index(split), index])
    motion, shape = sample.video_labels(index)
    frames, white = np.zeros((sprites.FRAMES, sprites.SIDE, sprites.SIDE, 3)), np.ones(3)
    sprites.paint(frames, shape, sprites.trajectory(motion, rng), white, white)
    return frames[..., 0] > 0.5


@pytest.mark.slow
def test_a_trained_model_draws_on_the_sprite(tmp_path: Path) -> None:
    """After two epochs of the README's first command, tokens draw from the sprite and predictions are mostly right."""
    sample.prepare(tmp_path / "data", sample.Spec(clips=(3072, 16, 64), stills=(16, 16)), progress=False)
    words = f"DATA.ROOT {tmp_path}/data OUTPUT_DIR {tmp_path}/run TRAIN.EPOCHS 2".split()
    config = str(REPOSITORY / "configs" / "sample_stvit.yaml")
    assert run.main(["--cfg", config, "DATA.GENERATE", "", *words]) == 0
    shares, chances = [], []
    for i in range(64):
        seen, indices = explained(tmp_path / "run", tmp_path / "data" / "videos" / f"test_{i:05d}.mp4")
        cover = token_masks(sprite_mask("test", i)[indices], (4, 8, 8))
        shares.append((seen.drawn * cover).sum() / seen.drawn.sum())
        chances.append(cover.mean())
    assert np.mean(np.array(shares) > chances) > 0.9
    assert np.mean(shares) > 1.5 * np.mean(chances)
    videos = [tmp_path / "data" / "videos" / f"test_{i:05d}.mp4" for i in range(64)]
    answers = [found.top(1)[0][0] for found in Predictor.load(tmp_path / "run").predict(videos)]
    right = np.mean([answer == sample.video_labels(i)[0] for i, answer in enumerate(answers)])
    tested = json.loads((tmp_path / "run" / "results.json").read_text())["top1"]
    assert 100 * right == tested > 50  # chance is 12.5


def test_sprite_mask_is_where_the_sprite_is(small_set: Path) -> None:
    for index in (0, 10, 11):  # left, up, down: the median over time is the background

        def all_frames(video: Reader) -> np.ndarray:
            return np.arange(video.length)

        path = str(small_set / "videos" / f"test_{index:05d}.mp4")
        frames = read_file(FrameRequest(path, all_frames)).astype(float)
        seen = np.abs(frames - np.median(frames, axis=0)).max(axis=-1) > 30
        mask = sprite_mask("test", index)
        assert mask.shape == seen.shape
        assert (mask & seen).sum() / (mask | seen).sum() > 0.8


@pytest.fixture(scope="module")
def page(known_run: Path, disc: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page that the command writes for the disc, in a folder with a non-ASCII name."""
    output = tmp_path_factory.mktemp("out") / "Übersicht 1"
    words = [str(disc), "--checkpoint", str(known_run), "--output", str(output), "--class", "</script>"]
    command = [sys.executable, "-m", "stvit_video.visualize", *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=REPOSITORY)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(f"open {output / 'report.html'}\n")
    return output / "report.html"


def script_data(page: Path) -> dict[str, Any]:
    """Return the data of a page's script."""
    (line,) = (line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("const DATA = "))
    return json.loads(line.removeprefix("const DATA = ").removesuffix(";"))


def test_command_writes_a_page_a_picture_and_a_video(page: Path) -> None:
    assert sorted(path.name for path in page.parent.iterdir()) == ["overlays.mp4", "overlays.png", "report.html"]
    assert_self_contained(page)
    with Image.open(page.parent / "overlays.png") as overview:
        assert overview.width > 1000
        assert overview.height > 600

    def all_frames(video: Reader) -> np.ndarray:
        return np.arange(video.length)

    frames = read_file(FrameRequest(str(page.parent / "overlays.mp4"), all_frames))
    assert len(frames) == 8
    text = page.read_text(encoding="utf-8")
    assert "256 image tokens become 64 semantic tokens" in text
    assert "Explained here: <b>&lt;/script&gt;</b>" in text
    assert text.count("</script>") == text.count("<script nonce=") == 1, "a class name has become a tag"


@pytest.mark.browser
def test_the_page_works_in_a_browser(page: Path) -> None:
    dom = dump(
        page,
        """note("images", [...document.images].filter((image) => image.complete && image.naturalWidth).length);
        note("tokens", document.querySelectorAll(".slot button").length);
        note("overflow", document.documentElement.scrollWidth - innerWidth);
        const view = document.getElementById("view"), box = view.getBoundingClientRect();
        note("first", document.querySelector("[name=layer]:checked").value === "drawn" ? 1 : 0);
        note("share", Math.min(box.height, box.width) / innerHeight);
        note("below", document.querySelector(".controls").getBoundingClientRect().bottom - innerHeight);
        const at = {clientX: box.left + box.width * 0.99, clientY: box.top + box.height * 0.01};
        view.dispatchEvent(new MouseEvent("click", at));
        note("clicked", state.token); note("owner", DATA.tokens.owners[7]);
        note("shown", state.layer === "token" ? 1 : 0);
        const slider = document.getElementById("number");
        slider.value = 12; slider.dispatchEvent(new Event("input")); note("slid", state.token);
        document.querySelectorAll(".slot button")[37].click();
        const frame = document.getElementById("frame"); frame.value = 5; frame.dispatchEvent(new Event("input"));
        note("frame", new URLSearchParams(location.hash.slice(1)).get("frame"));
        note("token", new URLSearchParams(location.hash.slice(1)).get("token"));
        note("bottom", document.querySelector(".scores").getBoundingClientRect().bottom);""",
    )
    assert 'data-ready="yes"' in dom
    assert probed(dom, "images") >= 8
    assert probed(dom, "tokens") == 64
    assert probed(dom, "overflow") <= 0
    assert (probed(dom, "frame"), probed(dom, "token")) == (5, 37)
    assert probed(dom, "bottom") <= 900, "the scores are not on the first screen"
    assert probed(dom, "first") == 1, "does not open on where the model looked"
    assert probed(dom, "share") > 0.7, "the picture does not fill the screen"
    assert probed(dom, "below") <= 0
    assert probed(dom, "shown") == 1
    assert (probed(dom, "clicked"), probed(dom, "slid")) == (probed(dom, "owner"), 12)


@pytest.mark.browser
def test_the_page_fits_a_phone(page: Path) -> None:
    dom = dump(
        page,
        """const check = () => document.documentElement.scrollWidth - innerWidth, over = [check()];
        for (const choice of document.querySelectorAll("[name=layer]")) { choice.click(); over.push(check()); }
        note("overflow", Math.max(...over)); note("views", over.length);
        note("width", document.getElementById("view").getBoundingClientRect().width);""",
        size=(390, 844),
    )
    assert probed(dom, "overflow") <= 0
    assert probed(dom, "views") == 9
    assert probed(dom, "width") >= 385


@pytest.mark.browser
def test_one_token_has_the_colours_of_the_scale(page: Path, known_run: Path, disc: Path) -> None:
    """The browser paints it: the mean of a square is the colour of its value."""
    dom = dump(
        page,
        """const canvas = document.createElement("canvas"), picture = document.getElementById("view");
        for (let i = 0; i < 200 && !picture.src.startsWith("data:image/png"); i++)
          await new Promise((after) => setTimeout(after, 10));
        await picture.decode();
        canvas.width = DATA.width; canvas.height = DATA.height;
        const brush = canvas.getContext("2d"); brush.drawImage(picture, 0, 0);
        for (let i = 0; i < 64; i++) {
          const side = DATA.width / 8;
          const pixels = brush.getImageData(i % 8 * side, Math.floor(i / 8) * side, side, side).data;
          for (let k = 0; k < 3; k++) {
            let sum = 0;
            for (let j = k; j < pixels.length; j += 4) sum += pixels[j];
            note("c" + i + "-" + k, 4 * sum / pixels.length);
          }
        }""",
        fragment="#layer=token&frame=4&token=20",
    )
    seen, _ = explained(known_run, disc)
    ratios = seen.assignment[20, 2] * seen.assignment[0].size
    data = script_data(page)["tokens"]
    top = float(data["scale"]["ticks"][-1][1])
    assert (ratios > 1).any()
    for place, ratio in enumerate(ratios.ravel()):
        colour = [probed(dom, f"c{place}-{channel}") for channel in range(3)]
        if ratio > 1.02:
            share = np.log(ratio) / np.log(top)
            scale = np.array(data["scale"]["colours"]).T
            expected = [np.interp(share, np.linspace(0, 1, scale.shape[1]), channel) for channel in scale]
            assert np.abs(np.subtract(colour, expected)).max() < 4, place
        elif ratio <= 1:
            assert np.ptp(colour) < 3, "painted"


def test_overlays_on_the_screen_follow_the_disc(page: Path) -> None:
    fixed = page.with_name("fixed.html")  # Chromium's window is lower when it prints the page than for a picture
    style = "<style>.viewer { grid-template-columns: 600px 1fr !important; }</style></head>"
    fixed.write_text(page.read_text("utf-8").replace("</head>", style), "utf-8")
    box = dump(
        fixed,
        """const box = document.getElementById("view").getBoundingClientRect();
        for (const side of ["left", "top", "width", "height"]) note(side, box[side]);""",
        fragment="#layer=drawn&frame=0",
    )
    left, top, width, height = (round(probed(box, side)) for side in ("left", "top", "width", "height"))
    side = min(width, height)
    centres = []
    for frame in (0, 7):
        shot = screenshot(fixed, fragment=f"#layer=drawn&frame={frame}")
        with Image.open(shot) as screen:
            view = np.asarray(screen.convert("RGB").crop((left, top, left + side, top + side)).resize((SIDE, SIDE)))
        painted = np.ptp(view.astype(int), axis=-1) > 40  # the frame is grey, so colour is overlay
        mask = disc_mask(2 * frame)
        assert painted.any(), "no overlay is visible"
        overlap = (painted & mask).sum() / painted.sum()
        assert overlap > 3 * mask.mean(), (frame, overlap)
        centre, true = (np.array(np.nonzero(where)).mean(axis=1) for where in (painted, mask))
        assert np.abs(centre - true).max() < 8, "more than an image token away from the disc"
        centres.append(centre)
    assert np.linalg.norm(centres[1] - centres[0]) > SIDE / 4


def test_dense_and_image_models_say_what_is_missing(disc: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    dense = create_model("vit_sample_patch8", num_frames=1, image_size=64, num_classes=8)
    save_weights(tmp_path / "dense.safetensors", dense, CLASSES)
    arguments = [
        "--checkpoint",
        str(tmp_path / "dense.safetensors"),
        "--output",
        str(tmp_path / "out"),
        "--class",
        "grün",
    ]
    assert main([str(disc), *arguments]) == 0
    said = capsys.readouterr().out
    assert said.count("This model has no semantic tokens") == 1
    assert "No config.yaml" in said or "no config.yaml" in said
    text = (tmp_path / "out" / "report.html").read_text()
    assert "This model has no semantic tokens" in text
    assert 'id="chooser"' not in text
    assert not (tmp_path / "out" / "overlays.mp4").exists()
    assert "Explained here: <b>grün</b>" in text


def test_start_chooses_the_clip(known_run: Path, disc: Path) -> None:
    video_input = open_checkpoint(known_run).input
    assert read_clip(video_input, disc).indices.tolist() == list(range(0, 15, 2))
    clip = read_clip(video_input, disc, start=0.3)
    assert clip.indices.tolist() == [3, 5, 7, 9, 11, 13, 15, 15]
    np.testing.assert_allclose(clip.times, clip.indices / 10)
    error = np.abs(clip.frames[0].astype(int) - disc_frames()[3]).mean()
    assert error < 6, "not the frame that it is said to be"


def test_videos_are_opened_in_the_decoding_process_only(
    known_run: Path, disc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder that hangs is then stopped at the deadline."""
    monkeypatch.setattr("stvit_video.pages.clip_page.open_video", lambda path: pytest.fail(path))
    monkeypatch.setattr("stvit_video.data.decode.frames.open_video", lambda path, *options: pytest.fail(path))
    assert read_clip(open_checkpoint(known_run).input, disc).length == FRAMES


def test_folder_of_images_has_no_times(known_run: Path, tmp_path: Path) -> None:
    for i in range(FRAMES):
        Image.fromarray(disc_frames()[i]).save(tmp_path / f"{i}.png")
    clip = read_clip(open_checkpoint(known_run).input, tmp_path)
    assert (clip.times, clip.length, clip.indices.tolist()) == (None, FRAMES, list(range(0, 15, 2)))
    assert clip.labels[1] == "no. 3"


def test_frames_by_a_pattern_of_their_names(known_run: Path, tmp_path: Path) -> None:
    for i, frame in enumerate(disc_frames()):
        Image.fromarray(frame).save(tmp_path / f"img_{i:02}.png")
        Image.fromarray(255 - frame).save(tmp_path / f"other_{i:02}.png")
    words = [str(tmp_path / "img_{:02}.png"), "--checkpoint", str(known_run), "--output", str(tmp_path / "out")]
    assert main(words) == 0
    assert "of the 16 in the file" in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_an_image_of_several_classes_and_of_a_hostile_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = create_model("stvit_vit_sample_patch8", num_frames=1, image_size=64, num_classes=8)
    with torch.no_grad():
        model.head.proj.weight.zero_()
        model.head.proj.bias.copy_(torch.tensor([3.0, -3.0, 2.0, -3.0, -9.0, -9.0, -9.0, -9.0]))
    save_weights(tmp_path / "many.safetensors", model, ["sky <i>", "b", "sea", *"defgh"], None, True)
    picture = tmp_path / "<img src=x onerror=alert(1)> & 'co'.png"
    Image.fromarray(disc_frames()[0]).save(picture)
    words = [str(picture), "--checkpoint", str(tmp_path / "many.safetensors"), "--output", str(tmp_path / "out")]
    assert main(words) == 0
    assert "sky <i>, 95.3 %; sea, 88.1 %" in capsys.readouterr().out
    page = tmp_path / "out" / "report.html"
    text = page.read_text("utf-8")
    assert "<img src=x" not in text
    heading = text[text.index("<h1>") : text.index("</h1>")]
    assert "sky &lt;i&gt;" in heading
    assert "sea" in heading
    assert "each class by itself" in text
    assert script_data(page)["labels"] == ["0.00 s"]


def refusal(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1, said
    return said


def test_mistakes_are_refused_in_one_line(
    known_run: Path, disc: Path, tmp_path: Path, capsys: pytest.CaptureFixture, write_sound: Callable[..., Path]
) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("no video\n")
    (tmp_path / "cut.safetensors").write_bytes((known_run / "model.safetensors").read_bytes()[:5000])
    save_file({"head.proj.weight": torch.zeros(3, 3)}, tmp_path / "bare.safetensors")
    torch.save(colour_model().state_dict(), tmp_path / "weights.pth")
    (tmp_path / "empty run").mkdir()
    (tmp_path / "images").mkdir()
    Image.fromarray(disc_frames()[0]).save(tmp_path / "images" / "1.png")
    Image.fromarray(disc_frames()[1]).save(tmp_path / "images" / "2.png")
    run_folder, video = ["--checkpoint", str(known_run)], str(disc)
    cases = [
        ([str(tmp_path / "none.mp4"), *run_folder], "does not exist"),
        ([str(text), *run_folder], "text.mp4"),
        ([str(write_sound("sound.mp4")), *run_folder], "sound.mp4"),
        ([video, "--checkpoint", str(tmp_path / "none")], "none"),
        ([video, "--checkpoint", "hf://nobody"], "not of the form OWNER/NAME"),
        ([video, "--checkpoint", str(tmp_path / "empty run")], "empty run"),
        ([video, "--checkpoint", str(tmp_path / "cut.safetensors")], "cut.safetensors"),
        ([video, "--checkpoint", str(tmp_path / "bare.safetensors")], "which model"),
        ([video, "--checkpoint", str(tmp_path / "weights.pth")], "which model"),
        ([video, *run_folder, "--class", "grun"], "Did you mean grün?"),
        ([video, *run_folder, "--class", "8"], "0 to 7"),
        ([video, *run_folder, "--start", "99"], "after the end"),
        ([video, *run_folder, "--start", "nan"], "--start"),
        ([str(tmp_path / "images"), *run_folder, "--start", "1"], "without times"),
        ([video, *run_folder, "--output", str(text)], "cannot be written"),
        ([video], "--checkpoint"),
    ]
    for arguments, expected in cases:
        if "--output" not in arguments:
            arguments += ["--output", str(tmp_path / "never")]
        assert expected in refusal(arguments, capsys), arguments
    assert not (tmp_path / "never" / "report.html").exists()


def test_the_video_itself_is_never_replaced(
    known_run: Path, disc: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    video = tmp_path / "overlays.mp4"
    video.write_bytes(disc.read_bytes())
    said = refusal([str(video), "--checkpoint", str(known_run), "--output", str(tmp_path)], capsys)
    assert "replace" in said
    assert video.read_bytes() == disc.read_bytes()


@pytest.mark.parametrize("name", [b"a$_$b.mp4", b"caf\xe9.mp4", "動き.mp4".encode()])
def test_file_with_any_name_is_drawn(known_run: Path, disc: Path, tmp_path: Path, name: bytes) -> None:
    """Names may contain a $, and need not be UTF-8."""
    video = tmp_path / os.fsdecode(name)
    video.write_bytes(disc.read_bytes())
    assert main([str(video), "--checkpoint", str(known_run), "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "overlays.png").stat().st_size > 10_000


def test_data_of_the_script_survive_hostile_names(page: Path) -> None:
    (line,) = (line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("const DATA = "))
    assert "<" not in line
    assert "&" not in line
    (title,) = (layer["title"] for layer in script_data(page)["layers"] if layer["key"] == "gradcam")
    assert title == "Grad-CAM of “</script>”"
    assert printable("caf\udce9.mp4").encode("utf-8").startswith(b"caf")
