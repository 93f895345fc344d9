"""Names of files, classes and runs that would be commands of a terminal, a page or a table."""

import base64
import csv
import io
import json
import os
import shutil
import sys
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from stvit_video.common.charts import Point, image_of_points, png_of_confusion, png_of_precision, svg_of_curves
from stvit_video.common.cli import run_command
from stvit_video.common.errors import RunFailure, UsageError
from stvit_video.common.tables import format_table, read_csv, to_csv
from stvit_video.common.text import printable
from stvit_video.compare import main as compare
from stvit_video.data.failures import Failure, failures_csv, read_ledger
from stvit_video.data.sample import write_video
from stvit_video.models.weights.report import LoadReport
from stvit_video.predict import main as predict
from stvit_video.report import main as report
from stvit_video.visualize import main as visualize
from tests.pages.browser import dump, probed

CLEAR = "\x1b[2J\x9b31m\x07\u202e\udcff\r\x00"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "iso-8859-1"])
def test_output_commands_no_terminal(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)

    def command(arguments: Sequence[str] | None) -> int:
        print(f"a{CLEAR}b…\tc\n日", flush=True)
        print("\rbar 50 %", end="", file=sys.stderr)
        raise UsageError(f"file a\n{CLEAR} is none")

    assert run_command(command) == 2
    assert run_command(lambda _: (_ for _ in ()).throw(RunFailure(CLEAR))) == 1
    printed, said = (stream.buffer.getvalue().decode(encoding) for stream in streams.values())  # type: ignore[attr-defined]
    escaped = r"\x1b[2J\x9b31m\x07\u202e\udcff\r\x00"
    assert printed.startswith(f"a{escaped}b")
    assert (printed.count("\n"), printed.count("\tc")) == (2, 1)
    assert said == f"\rbar 50 %error: file a\\n{escaped} is none\nerror: {escaped}\n"


def test_a_missing_file_is_named_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(["--checkpoint", f"{tmp_path}/a\n{CLEAR.strip(chr(0))}.safetensors", "video.mp4"]) == 2
    said = capsys.readouterr().err
    assert (said.count("\n"), said.count("\x1b"), said.count("\\n\\x1b[2J")) == (1, 0, 1)


def test_a_cell_of_a_table_is_one_line() -> None:
    assert format_table(["name", "n"], [["a\x1b[2J\nb | 99", 1]]).splitlines()[1:] == [r"a\x1b[2J\nb | 99  1"]


def test_all_that_is_not_seen_is_escaped() -> None:
    # The joiners that names need, and the Arabic, Syriac and Kaithi signs that Unicode counts as formats but are seen.
    shown = {0x200C, 0x200D, *range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD}
    unseen = [i for i in range(0x110000) if unicodedata.category(chr(i)) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    assert [i for i in unseen if printable(chr(i)) == chr(i)] == sorted(shown & set(unseen))
    assert printable("\u061c") == r"\u061c"
    assert printable("می\u200cخواهم 👩\u200d🚒") == "می\u200cخواهم 👩\u200d🚒"


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines that were printed, none of which may be one of a name."""
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if line.startswith("FORGED")]
    return lines


def test_names_make_no_lines_of_what_compare_prints(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [foreign.rename(foreign.with_name("a\nFORGED")), foreign.with_name("b\nFORGED")]
    shutil.copytree(*runs)
    header, row = "path,label,predicted,probability,label_probability\n", '"v\nFORGED.mp4","{}","{}",0.9,0.1\n'
    labels = (("c\nFORGED", "c\nFORGED"), ("c\nFORGED", "d\nFORGED"))
    for run, words, right in zip(runs, labels, (100.0, 0.0), strict=True):
        (run / "results.json").write_text(json.dumps({"top1": right, "scored": 1, "videos": 1, "failed": 1}))
        (run / "predictions.csv").write_text(header + row.format(*words))
        (run / "metrics.jsonl").write_text('{"split": "train", "epoch": 1, "step": 1, "top1": 50}\n')
    assert compare([*map(str, runs), "--output", str(tmp_path / "a.png")]) == 0
    said = "\n".join(lines_of(capsys))
    assert r"only a\nFORGED is right" in said
    assert r"v\nFORGED.mp4: c\nFORGED (b\nFORGED: d\nFORGED)" in said
    assert r"note: b\nFORGED has" in said
    assert said.count(r"\nFORGED: 1 of 1 test videos could not be read") == 2
    (runs[1] / "predictions.csv").write_text(header + row.format(*labels[1]).replace("v\n", "w\n"))
    assert compare([*map(str, runs), "--output", str(tmp_path / "a.png")]) == 0
    assert r"(first: w\nFORGED.mp4)" in "\n".join(lines_of(capsys))


def test_names_make_no_lines_of_predictions(
    trained: Path, small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "f\nFORGED"
    folder.mkdir()
    with safe_open(trained, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    names = [f"{name}\nFORGED" for name in json.loads(metadata["classes"])]
    save_file(tensors, folder / "m.safetensors", {**metadata, "classes": json.dumps(names)})
    shutil.copy(small_set / "videos" / "test_00000.mp4", folder / "v\nFORGED.mp4")
    (folder / "w\nFORGED.mp4").touch()
    words = ["--checkpoint", str(folder / "m.safetensors")]
    assert predict([str(folder), *words, "--annotate", str(folder / "out")]) == 1
    said = "\n".join(lines_of(capsys))
    assert r"annotated copy: " in said
    assert r"v\nFORGED.mp4: " in said
    assert visualize([str(folder / "v\nFORGED.mp4"), *words, "--output", str(folder / "shown")]) == 0
    assert r"v\nFORGED.mp4: " in "\n".join(lines_of(capsys))
    loaded = LoadReport("a", "b")
    loaded.add("unused", "t\nFORGED", 1)
    loaded.differ("n\nFORGED")
    assert not [line for line in str(loaded).splitlines() if line.startswith("FORGED")]


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A run whose files say that the user's video was tested."""
    (tmp_path / "private").mkdir()
    write_video(tmp_path / "private" / "a.mp4", np.zeros((4, 32, 32, 3), np.uint8), Fraction(10))
    folder = tmp_path / "downloads" / "run"
    folder.mkdir(parents=True)
    results = {"top1": 50.0, "views": {"clips": 1, "crops": 1}, "videos": 2, "scored": 2, "model": "m"}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.yaml").write_text(f"DATA: {{ROOT: {tmp_path / 'private'}}}\n")
    row = f"{tmp_path / 'private' / 'a.mp4'},a,b,0.9,0.1\n"
    (folder / "predictions.csv").write_text(f"path,label,predicted,probability,label_probability\n{row}")
    return folder


def frames_shown(folder: Path, *options: str) -> int:
    page = folder.parent / "page.html"
    assert report([str(folder), "--output", str(page), *options]) == 0
    return page.read_text().count("data:image/webp")


def test_frames_of_a_foreign_run_come_from_its_root_only(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert frames_shown(foreign) == 3
    assert f"frames of run are of videos below {tmp_path / 'private'}, its DATA.ROOT" in capsys.readouterr().out
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert frames_shown(foreign) == 0, "another's run"
    assert "--videos FOLDER" in capsys.readouterr().out
    assert frames_shown(foreign, "--videos", str(tmp_path / "private")) == 3
    monkeypatch.undo()
    monkeypatch.setenv("HOME", str(tmp_path / "private" / "home"))
    for root in ("/", str(tmp_path / "private"), str(tmp_path / "downloads")):
        (foreign / "config.yaml").write_text(f"DATA: {{ROOT: {root}}}\n")
        assert frames_shown(foreign) == 0, root
    (tmp_path / "downloads" / "a.mp4").symlink_to(tmp_path / "private" / "a.mp4")
    (foreign / "predictions.csv").write_text((foreign / "predictions.csv").read_text().replace("private", "downloads"))
    assert frames_shown(foreign) == 0, "a link out of the root"


@pytest.mark.parametrize("name", ["predictions.csv", "per_class.csv", "metrics.jsonl", "config.yaml", "failures.csv"])
@pytest.mark.parametrize("kind", ["pipe", "large"])
def test_records_that_are_no_files_or_fill_the_memory_are_refused(
    foreign: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (foreign / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(foreign / name)
    else:
        (foreign / name).touch()
        os.truncate(foreign / name, 2**40)
    for command in (report, compare):
        assert command([str(foreign), *([str(foreign.parent)] if command is compare else [])]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
    assert report([str(foreign)]) == 2
    assert f"{name} {'is no file' if kind == 'pipe' else 'has 1,099,511,627,776 bytes'}" in capsys.readouterr().err


def test_a_link_in_place_of_a_picture_shows_no_content(foreign: Path) -> None:
    secret = foreign.parent / "id_rsa"
    secret.write_bytes(b"PRIVATE KEY" * 99)
    (foreign / "confusion.png").symlink_to(secret)
    (foreign / "predictions.csv").unlink()
    frames_shown(foreign)
    assert base64.b64encode(b"PRIVATE KEY" * 9)[:60].decode() not in (foreign.parent / "page.html").read_text()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("results.json", '{"top1": 50, "views": 3}'),
        ("results.json", '{"top1": 50, "views": {"clips": "x"}}'),
        ("results.json", '{"top1": 50, "gflops_per_video": "x"}'),
        ("results.json", '{"top1": 50, "parameters": [], "scored": {}}'),
        ("results.json", '{"top1": 50, "top5": {}}'),
        ("results.json", "\udcff"),
        ("failures.csv", "what\n1\n"),
        ("metrics.jsonl", "3\n"),
        ("metrics.jsonl", '{"split": "train", "epoch": "x", "step": [], "loss": {}}\n'),
        ("environment.json", '{"git": 3, "gpus": 5, "command": 7}'),
        ("config.yaml", "DATA: 3\n"),
        ("config.yaml", "DATA: {ROOT: 3}\n"),
        ("predictions.csv", "path,label,predicted,probability,label_probability\na,b,c\n"),
        ("predictions.csv", 'path,label\n"' + "x" * 200_000),
        ("per_class.csv", "class,videos,correct\na,x,1\n"),
    ],
)
def test_a_run_of_nonsense_is_refused_in_one_line(
    name: str, content: str, foreign: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (foreign / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    code = report([str(foreign), "--output", str(foreign.parent / "page.html")])
    said = capsys.readouterr().err
    assert (code, said.count("\n"), said[:7]) == (2, 1, "error: ")


HOSTILE = (
    "<script>window.hit=1</script>",
    "</title><script>window.hit=1</script>",
    "</style></table><img src=x onerror=window.hit=1>",
    '" onmouseover="window.hit=1" autofocus onfocus="window.hit=1',
    "'><svg onload=window.hit=1>",
    "javascript:window.hit=1",
    "{{ 7 * 191 }}${7 * 191}",
    "$\\frac{$ $x_1$",
    "<!--<script>",
    "caf\udce9\x1b[2J\u202e",
)


@pytest.mark.browser
def test_names_run_no_script_in_a_page(foreign: Path) -> None:
    folder = foreign.rename(foreign.with_name("<img src=x onerror=hit=1>'\" onload=hit=1"))
    rows = [[name, name, HOSTILE[i - 1], "0.9", "0.1"] for i, name in enumerate(HOSTILE)]
    with open(folder / "predictions.csv", "w", newline="", errors="surrogateescape") as file:
        csv.writer(file).writerows([["path", "label", "predicted", "probability", "label_probability"], *rows])
    failed = [Failure(name, name, name, name, name) for name in HOSTILE]
    (folder / "failures.csv").write_bytes(failures_csv(failed))
    words = {"command": HOSTILE[:-1], "gpus": HOSTILE[:-1], "git": {"commit": "<svg onload=hit=1>"}}
    (folder / "environment.json").write_text(json.dumps(words))
    page = folder.parent / "page.html"
    assert report([str(folder), "--output", str(page)]) == 0
    script = """note("hit", Number("hit" in window)); note("rows", document.querySelectorAll("figcaption").length);
        document.querySelectorAll("*").forEach((one) => one.dispatchEvent(new Event("mouseover")));
        note("hit", Number("hit" in window)); note("scripts", document.body.querySelectorAll("script, svg").length);"""
    dom = dump(page, script)
    assert [probed(dom, name) for name in ("hit", "rows", "scripts")] == [0, len(HOSTILE), 0]
    assert "1337" not in dom
    # What is not escaped, by a mistake to come, does not run either.
    tag = "<script>window.hit=1</script><img src=x onerror=window.hit=1><b onmouseover=window.hit=1></b>"
    page.write_text(page.read_text().replace("<main>", f"<main>{tag}", 1))
    assert probed(dump(page, script), "hit") == 0
    page.write_text(page.read_text().replace("Content-Security-Policy", "None", 1))
    assert probed(dump(page, script), "hit") == 1, "the test would not see it"


@pytest.mark.parametrize("name", HOSTILE[-3:])
def test_names_in_pictures_are_plain_text(name: str) -> None:
    rows = [{"split": split, "epoch": 1.0, "step": 1, "loss": 1.0} for split in ("train", "val")]
    svg = svg_of_curves({name: rows, "b": rows}, "loss", name)
    assert svg is not None
    ElementTree.fromstring(svg)
    assert b"<script>" not in svg
    assert png_of_confusion(np.eye(2, dtype=int), [name, "b"], name)
    assert png_of_precision([1.0, 2.0], [name, "b"], name)
    assert image_of_points([Point(name, 1, 1, kind=name), Point("b", 2, 2)], name, name, name)


def test_csv_files_hold_no_formulas_and_are_read_as_written(tmp_path: Path) -> None:
    texts = [
        "=1+1",
        "+1+1",
        "-1+1",
        "@SUM(1)",
        "\t=1",
        "\r=1",
        "\n=1",
        "'=1",
        "''-a",
        "-a.mp4",
        "＝1",
        "'quoted'",
        "a",
        "",
    ]
    texts += ["caf\udce9", 'a "b", c']
    numbers = ["-0.5", "+1", "-1e-05", "-3", "-inf"]
    content = to_csv([{"=name": one, "value": -0.5} for one in texts + numbers], ["=name", "value"])
    (tmp_path / "a.csv").write_bytes(content)
    assert [(row["=name"], row["value"]) for row in read_csv(tmp_path / "a.csv")] == [
        (one, "-0.5") for one in texts + numbers
    ]
    cells = [cell for row in csv.reader(io.StringIO(content.decode("utf-8", "surrogateescape"), "")) for cell in row]
    assert {cell for cell in cells if cell and cell[0] in "=+-@\t\r\n\uff1d"} == {*numbers}
    failure = Failure("=a", "-b", "@c", "'=d\n", "+e")
    (tmp_path / "failures.csv").write_bytes(failures_csv([failure]))
    assert read_ledger(tmp_path / "failures.csv") == [failure]
