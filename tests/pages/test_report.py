"""stvit_video.report: figures are those of the files, mistakes show the right videos, and it works in a browser."""

import base64
import csv
import json
import re
import shutil
from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stvit_video import run
from stvit_video.common.charts import thin_out
from stvit_video.data.decode.frames import FrameRequest, read_file
from stvit_video.data.decode.types import Reader
from stvit_video.data.sample import video_labels
from stvit_video.data.sprites import MOTIONS
from stvit_video.models import create_model
from stvit_video.report import main
from stvit_video.runs.record import RunRecord, count_tokens
from tests.conftest import REPOSITORY
from tests.pages.browser import assert_self_contained, dump, probed

HEADER = ["path", "label", "predicted", "probability", "label_probability"]
Row = list[str | float]


def write_scores(folder: Path, rows: list[Row]) -> None:
    """Write predictions.csv and per_class.csv."""
    with open(folder / "predictions.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([HEADER, *rows])
    with open(folder / "per_class.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "videos", "correct", "top1"])
        for name in dict.fromkeys(row[1] for row in rows):
            own = [row for row in rows if row[1] == name]
            correct = sum(row[1] == row[2] for row in own)
            writer.writerow([name, len(own), correct, 100 * correct / len(own)])


@pytest.fixture(scope="module")
def trained(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short real run with invented scores of its 16 test videos, of which 4 are wrong."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    words = f"DATA.ROOT {small_set} DATA.WORKERS 0 TRAIN.EPOCHS 2 TRAIN.BATCH_SIZE 8 OUTPUT_DIR {folder}"
    config = str(REPOSITORY / "configs" / "sample_stvit.yaml")
    assert run.main(["--cfg", config, "DATA.GENERATE", "", *words.split()]) == 0
    rows: list[Row] = []
    for i in range(16):
        label, wrong = video_labels(i)[0], i in (2, 3, 7, 12)
        predicted = MOTIONS[(i + 1) % 8] if wrong else label
        sure = 0.5 + i / 40
        rows.append([str(small_set / "videos" / f"test_{i:05d}.mp4"), label, predicted, sure, 0.1 if wrong else sure])
    write_scores(folder, rows)
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({**results, "top1": 75.0}))
    return folder


@pytest.fixture
def hand_made(trained: Path, tmp_path: Path) -> Path:
    """The folder of a second run with known figures, without the files that older versions did not write."""
    folder = tmp_path / "other" / "tiny"
    shutil.copytree(trained, folder)
    for name in ("predictions.csv", "per_class.csv"):
        (folder / name).unlink()
    results = json.loads((folder / "results.json").read_text())
    results.update(model="vit_sample_patch8", top1=87.5, top5=99.0, gflops=0.339, gflops_per_video=0.678, scored=16)
    (folder / "results.json").write_text(json.dumps(results))
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("EPOCHS: 2", "EPOCHS: 5"))
    return folder


def written(runs: list[Path], tmp_path: Path) -> Path:
    page = tmp_path / "page.html"
    assert main([*map(str, runs), "--output", str(page)]) == 0
    assert_self_contained(page)
    return page


def inlined(text: str, kind: str) -> list[bytes]:
    return [base64.b64decode(content) for content in re.findall(rf"data:{re.escape(kind)};base64,([\w+/=]+)", text)]


def cells(text: str, row: str) -> list[str]:
    """Return the cells of a row in the table of figures."""
    match = re.search(rf'<th scope="row">{re.escape(row)}</th>(.*?)</tr>', text, re.S)
    assert match, row
    return re.findall(r"<td[^>]*>(.*?)</td>", match.group(1))


@pytest.mark.parametrize(
    ("name", "arguments", "counts"),
    [
        ("stvit_vit_sample_patch8", {}, (128, 32)),
        ("stvit_vit_sample_patch8", {"reducer": "tome"}, (128, 32)),
        ("stvit_vit_sample_patch8", {"reducer": "mean"}, (128, 32)),
        ("vit_sample_patch8", {}, (128, None)),
        ("stvit_swin_tiny", {}, (32, 18)),
        ("stvit_swin_tiny", {"reducer": "random"}, (32, 18)),
        ("swin_tiny", {}, (32, None)),
    ],
)
def test_tokens_are_counted_for_every_reducer(
    name: str, arguments: dict[str, str], counts: tuple[int, int | None]
) -> None:
    model = create_model(name, num_frames=4, image_size=64, num_classes=3, **arguments)
    assert count_tokens({"name": model.name, "arguments": model.arguments}) == counts


def test_a_run_has_its_figures_on_the_page(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = written([trained], tmp_path).read_text(encoding="utf-8")
    results = json.loads((trained / "results.json").read_text())
    assert cells(text, "top-1 (%)") == [f"{results['top1']:.1f}"]
    assert cells(text, "GFLOPs per clip") == [f"{results['gflops']:.3g}"]
    assert cells(text, "tokens per clip") == ["256 → 64"]
    assert cells(text, "videos scored") == ["16 of 16"]
    answer = f"{results['top1']:.1f} % of 16 test videos right"
    assert answer in text
    assert text.index(answer) < text.index("<table")
    assert answer in capsys.readouterr().out
    drawings = inlined(text, "image/svg+xml")
    assert len(drawings) == 2
    assert all(b"validation" in drawing and b"epoch" in drawing for drawing in drawings)


def test_confusion_and_classes_are_counted_from_the_predictions(trained: Path, tmp_path: Path) -> None:
    text = written([trained], tmp_path).read_text(encoding="utf-8")
    with open(trained / "predictions.csv", newline="") as file:
        expected = Counter((row["label"], row["predicted"]) for row in csv.DictReader(file))
    said = re.findall(r'title="(.+?) taken for (.+?): (\d+)"', text)
    assert len(said) == 64
    assert {(label, predicted): int(count) for label, predicted, count in said if count != "0"} == expected
    classes = re.findall(r'<td class="name">(.+?)</td>.*?(\d+) of (\d+)</td>', text)
    assert len(classes) == 8
    for name, correct, videos in classes:
        assert int(videos) == sum(count for (label, _), count in expected.items() if label == name)
        assert int(correct) == expected[name, name]
    shares = [int(correct) / int(videos) for _, correct, videos in classes]
    assert shares == sorted(shares)


def test_mistakes_show_the_frames_of_their_videos_surest_first(trained: Path, tmp_path: Path) -> None:
    text = written([trained], tmp_path).read_text(encoding="utf-8")
    assert "4 of 16 videos are wrong" in text
    paths = re.findall(r'<code class="soft">(.*?)</code>', text)
    assert [re.findall(r"test_(\d+)", path) for path in paths] == [["00012"], ["00007"], ["00003"], ["00002"]]
    pictures = [Image.open(BytesIO(content)) for content in inlined(text, "image/webp")]
    assert len(pictures) == 12

    def all_frames(video: Reader) -> np.ndarray:
        return np.arange(video.length)

    for path, shown in zip(paths, np.reshape(np.arange(12), (4, 3)), strict=True):
        frames = read_file(FrameRequest(path, all_frames)).astype(float)
        for third, number in enumerate(shown):
            picture = np.asarray(pictures[number].convert("RGB").resize((64, 64)), float)
            distances = np.abs(frames - picture).mean(axis=(1, 2, 3))
            assert len(frames) * third / 3 <= distances.argmin() <= len(frames) * (third + 1) / 3
            assert distances.min() < 12, path


def test_runs_on_different_tests_are_not_ranked(
    trained: Path, hand_made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = json.loads((hand_made / "results.json").read_text())
    (hand_made / "results.json").write_text(json.dumps({**results, "videos": 6}))
    written([trained, hand_made], tmp_path)
    said = capsys.readouterr().out
    assert "Highest" not in said
    assert "not to be ranked" in said
    assert "not tested on the same number of videos" in said


def test_equal_runs_are_level(trained: Path, tmp_path: Path) -> None:
    copied = tmp_path / "again" / "tiny"
    shutil.copytree(trained, copied)
    text = written([trained, copied], tmp_path).read_text(encoding="utf-8")
    assert "The difference of 0.0 points between" in text
    assert "Highest" not in text
    assert "Cheapest" not in text
    assert 'class="best"' not in text


def test_runs_are_compared(trained: Path, hand_made: Path, tmp_path: Path) -> None:
    text = written([trained, hand_made], tmp_path).read_text(encoding="utf-8")
    first = json.loads((trained / "results.json").read_text())
    assert cells(text, "top-1 (%)") == [f"{first['top1']:.1f}", "87.5"]
    assert cells(text, "GFLOPs per video") == [f"{first['gflops_per_video']:.3g}", "0.678"]
    best = re.findall(r'<td class="best">(.*?)</td>', text)
    assert "87.5" in best
    assert f"{first['gflops_per_video']:.3g}" in best
    assert "Highest is other/tiny: 87.5 %" in text
    assert "not compared: no predictions.csv of other/tiny" in text
    differing = re.findall(r"<tr><td><code>([A-Z_.]+)</code></td><td>(.*?)</td><td>(.*?)</td></tr>", text)
    assert differing == [("TRAIN.EPOCHS", "2", "5")]
    assert "no predictions.csv" in text
    assert "no per_class.csv" in text
    assert len(inlined(text, "image/jpeg")) == 1, "the older run's confusion.png, decoded"
    curves = inlined(text, "image/svg+xml")
    assert len(curves) == 3
    assert all(b"other/tiny" in drawing for drawing in curves)


def test_unequal_tests_and_unread_videos_are_reported(trained: Path, hand_made: Path, tmp_path: Path) -> None:
    results = json.loads((hand_made / "results.json").read_text())
    results.update(videos=20, failed=4)
    (hand_made / "results.json").write_text(json.dumps(results))
    ledger = "path,stage,decoder,message,first_seen\nlost.mp4,test,pyav,no such file,2026-01-01T00:00:00+00:00\n"
    (hand_made / "failures.csv").write_text(ledger)
    text = written([trained, hand_made], tmp_path).read_text(encoding="utf-8")
    assert "not tested on the same number of videos" in text
    assert "4 of 20 test videos could not be read" in text
    assert "Videos that could not be read: 1" in text
    assert "lost.mp4" in text


def test_a_tested_folder_of_an_old_version_is_enough(hand_made: Path, tmp_path: Path) -> None:
    for path in hand_made.iterdir():
        if path.name != "results.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (hand_made / "results.json").write_text('{"top1": 12.5}')
    text = written([hand_made], tmp_path).read_text(encoding="utf-8")
    assert "12.5 % of the test videos right" in text
    assert "metrics.jsonl" in text
    assert not inlined(text, "image/svg+xml")


def test_hostile_names_and_missing_videos(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs <1>"
    shutil.copytree(trained, folder)
    text_file = tmp_path / "text.mp4"
    text_file.write_text("no video")
    rows: list[Row] = [
        ["gone/<i>.mp4", "<script>alert(1)</script>", 'a "b" & c', 0.9, 0.05],
        [str(text_file), 'a "b" & c', "<script>alert(1)</script>", 0.8, 0.1],
        ["caf\udce9.mp4", "6", "7", 0.7, 0.1],
    ]
    write_scores(folder, rows)
    assert main([str(folder), "--output", str(tmp_path / "page.html"), "--videos", str(tmp_path)]) == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "not where it was when it was tested" in text
    assert "It cannot be read now" in text
    assert "<b>growing</b>" in text, "labels by number have names"
    assert "caf\ufffd.mp4" in text


def test_confusion_of_many_classes_is_a_picture(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    shutil.copytree(trained, folder)
    rows: list[Row] = [
        [f"{i}.mp4", f"class {i % 100}", f"class {(i if i % 5 else i + 1) % 100}", 0.5, 0.4] for i in range(300)
    ]
    write_scores(folder, rows)
    text = written([folder], tmp_path).read_text(encoding="utf-8")
    assert len(inlined(text, "image/png")) == 1
    assert 'class="matrix' not in text
    assert "class 0 taken for class 1 (3)" in text


def test_the_interval_is_wilsons(trained: Path) -> None:
    stats = pytest.importorskip("scipy.stats")
    record = RunRecord(trained)
    for correct, videos in ((0, 16), (5, 16), (16, 16), (995, 1000)):
        record.results.update(top1=100 * correct / videos, scored=videos)
        expected = stats.binomtest(correct, videos).proportion_ci(method="wilson")
        assert record.interval() == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-2)


def test_long_curves_are_averaged_not_cut() -> None:
    points = np.stack([np.arange(10_000.0), np.full(10_000, 3.0)], axis=1)
    x, y = thin_out(points)
    assert len(x) == len(y) <= 400
    assert (y == 3).all()
    assert x[0] < 30
    assert x[-1] > 9_970
    assert x.mean() == pytest.approx(points[:, 0].mean())


@pytest.mark.browser
def test_the_page_in_a_browser(trained: Path, hand_made: Path, tmp_path: Path) -> None:
    page = written([trained, hand_made], tmp_path)
    script = """note("overflow", document.documentElement.scrollWidth - innerWidth);
        note("answer", document.querySelector(".answer").getBoundingClientRect().bottom);
        note("figures", document.querySelector(".runs").getBoundingClientRect().bottom);
        note("broken", [...document.images].filter((image) => !image.complete || !image.naturalWidth).length);"""
    for size in ((1280, 800), (500, 900)):
        dom = dump(page, script, size=size)
        assert probed(dom, "overflow") <= 0
        assert probed(dom, "answer") < 250
        assert probed(dom, "broken") == 0
        if size[0] > 1000:
            assert probed(dom, "figures") <= size[1], "the figures are not on the first screen"


def test_mistakes_are_refused_in_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def broken(name: str, file: str, content: str) -> str:
        folder = tmp_path / name
        shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("checkpoints"))
        (folder / file).write_text(content)
        return str(folder)

    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    cases = [
        ([], "RUN"),
        (["nowhere"], "not a folder"),
        (["file"], "not a folder"),
        (["empty"], "no results.json"),
        ([str(trained), str(trained)], "given twice"),
        ([str(trained), "--output", "page.pdf"], "page.pdf"),
        ([str(trained), "--output", "none/page.html"], "none/page.html"),
        ([broken("a", "results.json", '{"top1": 3')], "results.json"),
        ([broken("b", "results.json", "[]")], "results.json"),
        ([broken("c", "results.json", "{}")], "no top1"),
        ([broken("d", "predictions.csv", "path,label\nx,y\n")], "predictions.csv"),
        ([broken("e", "predictions.csv", ",".join(HEADER) + "\nx,y,z,high,low\n")], "predictions.csv"),
        ([broken("f", "per_class.csv", "class,videos,correct,top1\nx,many,few,1\n")], "per_class.csv"),
        ([broken("g", "config.yaml", "a: [1")], "config.yaml"),
        ([broken("h", "model.safetensors", "cut short")], "model.safetensors"),
    ]
    for arguments, expected in cases:
        capsys.readouterr()
        assert main(arguments) == 2, arguments
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") == 1, said
        assert expected in said
    assert not list(tmp_path.glob("*.html"))
