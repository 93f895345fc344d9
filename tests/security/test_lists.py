"""Lists, class files, configurations, profiles and plans of other people: read within bounds, or refused."""

import json
import os
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from stvit_video import check_videos, run, tradeoff
from stvit_video.common.errors import UsageError
from stvit_video.config.load import load_config, read_yaml
from stvit_video.data import scan
from stvit_video.data.decode.types import DecodeError
from stvit_video.runs import preflight
from stvit_video.slurm import cli
from stvit_video.slurm.request import read_profile
from stvit_video.sweeps import rows
from tests.conftest import REPOSITORY, read_list, refusal
from tests.security.mutations import mutate, run_unharmed, unharmed

SAMPLE = REPOSITORY / "configs" / "sample_stvit.yaml"
DEEP = 100_000
LISTS = {  # by file name; the files that they name are those of ``data``, or missing
    "blanks.txt": "a/0.png 0\nb/1.png 1\n",
    "commas.csv": "path,label\na/0.png,waving\nb/1.png,running\n",
    "tabs.tsv": 'video\tlabel\n"a/0.png"\trun\nb/1.png\twalk\n',
    "frames.txt": "a/v1 30 3 0\nb/v2 50 4 1\n",
    "jester.csv": "1;Swiping Left\n2;Swiping Right\n",
    "kinetics.csv": "label,youtube_id,time_start,time_end,split\n"
    "abseiling,_4YTwq0-73Y,15,25,train\nyoga,a3_-tu7wXyz,1,11,train\n",
    "ucf101.txt": "a/v_ApplyEyeMakeup_g08_c01.avi 1\na/v_Archery_g08_c02.avi 2\n",
    "charades.csv": 'id,subject,actions,length\nYSKX3,N1,"c077 12.10 18.00;c079 11.80 17.30",33\n46GP8,N2,"",30\n',
    "epic.csv": "video_id,start_timestamp,stop_timestamp,start_frame,stop_frame,verb_class,noun_class\n"
    "P01_01,00:00:00.14,00:00:03.37,8,202,3,10\nP01_02,00:00:05.00,00:00:06.1,300,366,0,2\n",
    "hacs.csv": "classname,youtube_id,subset,start,end,label\nArchery,a-0123456_8,training,0.5,2.5,1\n"
    "Archery,b-0123456_8,training,1.5,3.5,-1\n",
    "pandas.csv": ",path,labels\n0,a/0.png,\"['Holding [something]', 'b']\"\n1,b/1.png,\"['b']\"\n",
    "ssv2.json": json.dumps([{"id": str(i), "label": "x", "template": f"Holding [something] {i}"} for i in range(3)]),
    "diving48.json": json.dumps(
        [{"vid_name": f"v{i}", "label": i, "start_frame": 0, "end_frame": 9} for i in range(3)]
    ),
    "activitynet.json": json.dumps(
        {"database": {"v1": {"subset": "training", "annotations": [{"label": "x", "segment": [0.5, 9]}]}}}
    ),
    "kinetics.json": json.dumps({"v1": {"annotations": {"label": "x", "segment": [0.0, 10.0]}, "subset": "train"}}),
    "objects.jsonl": '{"path": "a/0.png", "label": "x"}\n{"path": "b/1.png", "label": ["x", "y"]}\n',
}
CLASSES = {
    "names.txt": "a\nb\n",
    "ids.txt": "0 a\n1 b\n",
    "columns.csv": "id,key,instances\n0,a,[1]\n1,b,[2]\n",
    "labels.json": '{"a": 0, "b": 1}',
    "parts.json": '[["a", "x"], ["b", "y"]]',
}
PLAN = (
    "cfg: {sample}\nseeds: [0, 1]\ntwin: full\n"
    "rows:\n  full: {{MODEL.NAME: vit_sample_patch8}}\n  paper: {{MODEL.PRESET: paper}}\n"
)
# What lists and YAML of other people may hold in the place of a word.
FRAGMENTS = (
    *("[" * 2000, '{"a":' * 2000, "9" * 5000, "-1", "1e999", "NaN", "Infinity", "null", "true", "{}", "[]", "\0"),
    *("\\ud800", "\\u0000", "\x1b[2J", "\udcff", "../../../etc/passwd", "/dev/zero", "a" * 300, '"', "'", "[" * 40),
    *("&x [*x, *x]", "*x", "<<: *x", '!!int ""', "!!python/object/apply:os.system [touch HARM]", "!!binary ?", "? [x]"),
    *("!!timestamp x", "2020-13-45", "1:30", "0x" + "f" * 5000, "010", ".inf", "~", "['a', ['b']]", "[----1]", "\n"),
)


class NoDecoding:
    """Stands for the decoding process: no file can be read."""

    def __init__(self, *settings: object) -> None:
        pass

    def request(self, path: str, choice: object, keep_open: bool) -> str:
        return path

    def read_all(self, paths: Sequence[str]) -> list[DecodeError]:
        return [DecodeError(path, "cannot be opened as video", "pyav") for path in paths]


Command = tuple[Callable[[Sequence[str]], int], list[str]]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two pictures in class folders, for commands that end where lists are read and no model is built."""

    def stop(*arguments: object) -> None:
        raise UsageError("all lists were read")

    monkeypatch.setattr(scan, "Decoding", NoDecoding)
    monkeypatch.setattr(preflight, "build_model", stop)
    monkeypatch.setattr(rows, "list_rows", stop)
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "data"
    for name in ("a/0.png", "b/1.png"):
        (root / name).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / name)
    (root / "numbers.txt").write_text("a/0.png 0\nb/1.png 1\n")
    return root


def list_commands(file: Path, *words: str, classes: str = "") -> list[Command]:
    """Return the commands that read a list."""
    root = str(file.parent)
    lists = ["DATA.TRAIN_LIST", file.name, "DATA.VAL_LIST", "", "DATA.TEST_LIST", file.name, "DATA.CLASSES", classes]
    words = ("DATA.ROOT", root, "DATA.GENERATE", "", "DATA.MAX_FAILURES", "1.0", "OUTPUT_DIR", f"{root}/run", *words)
    return [
        (run.main, ["--cfg", str(SAMPLE), "--dry-run", *lists, *words]),
        (check_videos.main, [str(file), "--output", f"{root}/out", "--workers", "1"]),
    ]


def yaml_commands(file: Path) -> list[Command]:
    """Return the commands that read a file of YAML, as a configuration, a profile and a plan."""
    submit = ["--gpus-per-node", "0", "--dry-run"]
    return [
        (cli.main, ["--cfg", str(file), *submit]),
        (cli.main, ["--cfg", str(SAMPLE), "--profile", str(file), *submit]),
        (tradeoff.main, ["--plan", str(file), "--list"]),
    ]


def run_all(commands: Sequence[Command], data: Path, capfd: pytest.CaptureFixture) -> list[int]:
    """Return the exit codes of commands that do no harm."""
    codes = []
    for main, arguments in commands:
        with unharmed(data.parent, seconds=5, apart_from=[data / "out"]):
            codes.append(run_unharmed(main, arguments, capfd))
    return codes


def change(content: bytes, rng: random.Random) -> bytes:
    """Return text with changed bytes or, more often, with FRAGMENTS in the place of some of its words."""
    if rng.random() < 0.3:
        return mutate(content, rng)
    for _ in range(rng.choice((1, 1, 2, 4))):
        start = rng.randrange(len(content) + 1)
        stop = min(len(content), start + rng.choice((0, 1, 3, 8)))
        content = content[:start] + rng.choice(FRAGMENTS).encode("utf-8", "surrogateescape") + content[stop:]
    return content.decode("utf-8", "surrogateescape").encode("utf-16", "replace") if rng.random() < 0.05 else content


def examples() -> list[tuple[str, str, str]]:
    """Return every kind of text that is read: what it is, its file's name and its content."""
    plan, profile = PLAN.format(sample=SAMPLE), (REPOSITORY / "slurm" / "profiles" / "example.yaml").read_text()
    texts = {"sample.yaml": SAMPLE.read_text(), "profile.yaml": profile, "plan.yaml": plan}
    return [
        *(("list", name, text) for name, text in LISTS.items()),
        *(("classes", name, text) for name, text in CLASSES.items()),
        *(("yaml", name, text) for name, text in texts.items()),
    ]


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.long)])
def test_mutated_lists_and_yaml_do_no_harm(count: int, data: Path, capfd: pytest.CaptureFixture) -> None:
    kinds = examples()
    run_all(list_commands(data / "numbers.txt"), data, capfd)  # imports count once
    for number in range(count):
        kind, name, text = kinds[number % len(kinds)]
        rng = random.Random(number)
        file = data / name
        file.write_bytes(change(text.encode(), rng))
        commands = {
            "list": list_commands(file),
            "classes": list_commands(data / "numbers.txt", classes=name)[:1],
            "yaml": yaml_commands(file),
        }[kind]
        run_all([rng.choice(commands)], data, capfd)
        file.unlink()


@pytest.mark.parametrize(("kind", "name", "text"), examples(), ids=lambda value: str(value)[:20])
def test_the_texts_that_are_mutated_are_read(
    kind: str, name: str, text: str, data: Path, capfd: pytest.CaptureFixture
) -> None:
    file = data / name
    file.write_text(text)
    if kind == "yaml":
        place = ["sample.yaml", "profile.yaml", "plan.yaml"].index(name)
        assert run_all([yaml_commands(file)[place]], data, capfd) == [2 if name == "plan.yaml" else 0]
    elif kind == "list":
        assert read_list(file, data)
    else:
        main, arguments = list_commands(data / "numbers.txt", classes=name)[0]
        main(arguments)
        assert "all lists were read" in capfd.readouterr().err


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{BOMB}DATA: {{ROOT: *i}}\n", "more than 50,000 values"),
        (BOMB.replace("[x,x,x,x,x,x,x,x,x]", "{x: 1}").replace("[*", "{<<: [*").replace("]", "]}"), "more than 50,000"),
        ("DATA: &a {ROOT: x, B: *a}\n", "nested more than 50 deep"),
        ("DATA: " + "[" * DEEP, "maximum recursion depth"),
        ("DATA: " + "{a: " * 60 + "1" + "}" * 60, "nested more than 50 deep"),
        ("".join(f"key{number}: 1\n" for number in range(15_000)), "Key key0 .* is unknown"),
        ("k: 1\n" * 20_000, "k is given twice"),
        ("SEED: 1\n" + "# \n" * 100_000, "more than 200,000 bytes"),
        ("SEED: " + "9" * 5000, "SEED in .* takes an int"),
        ("SEED: " + "9" * 400, "SEED in .* takes an int"),
        ("OPTIM: {LR: 0x" + "f" * 10_000 + "}", "OPTIM.LR in .* takes a float"),
        ("SEED: 1" + ":10" * 20_000, "SEED in .* takes an int"),
        ("TRAIN: {EPOCHS: 010}", "TRAIN.EPOCHS in .* is '010'"),
        ("DATA: {FPS: 1:30}", "DATA.FPS in .* is '1:30'"),
        ("OPTIM: {LR: 1e400}", "OPTIM.LR is inf"),
        ('SEED: !!int ""', "SEED in .* is ''"),
        ("\nSEED: !!bool x", "in line 2"),
        ("SEED: !!timestamp x", "in line 1"),
        ("SEED: 2020-13-45", "month must be in 1..12"),
        ('DATA: {ROOT: !!python/object/apply:os.system ["touch HARM"]}', "could not determine a constructor"),
        ('OUTPUT_DIR: "\\ud800"', "half a letter"),
        ('OUTPUT_DIR: "a\\0b"', "zero byte"),
        ('_BASE_: "~no_such_user/x.yaml"', "is not there"),
        ('DATA: {ROOT: x, GROUP: "(' + "(" * 3000 + '"}', "is no regular expression"),
        ('DATA: {ROOT: x, GROUP: "(a{' + "9" * 30 + '})"}', "is no regular expression"),
        ("_BASE_: /dev/zero", "not a file"),
    ],
)
def test_yaml_is_bounded_and_each_of_its_values_is_checked(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "given.yaml"
    file.write_text(text)
    with unharmed(tmp_path, seconds=5), pytest.raises(UsageError, match=said) as error:
        load_config(file)
    assert len(str(error.value)) < 500


def test_a_file_that_many_name_as_their_base_is_read_once(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.yaml").write_text(f"_BASE_: [{number + 1}.yaml, {number + 1}.yaml]\n")
    (tmp_path / "30.yaml").write_text("{SEED: 5, DATA: {ROOT: x}}\n")
    with unharmed(tmp_path, seconds=5):
        assert load_config(tmp_path / "0.yaml").SEED == 5


def test_pipes_beside_videos_are_no_videos(data: Path) -> None:
    os.mkfifo(data / "pipe")  # no one writes to it
    (data / "ids.csv").write_text("id,label\n0,x\n1,y\n")
    assert [Path(video.path).name for video in read_list(data / "ids.csv", data)] == ["0.mp4", "1.mp4"]


def test_a_profile_is_bounded_too_and_takes_times_as_they_are_written(tmp_path: Path) -> None:
    file = tmp_path / "profile.yaml"
    for text in (
        "modules: [[1]]",
        f"{BOMB}partition: *i",
        "sbatch: " + "[" * DEEP,
        'time: !!int ""',
        "time: " + "9" * 5000 + ":00",
    ):
        file.write_text(text)
        refusal(partial(read_profile, warning_s=0), file)
    file.write_text("time: 24:00:00\naccount: 007\npartition: 12\n")
    profile = read_profile(file)
    assert (profile.minutes, profile.account, profile.partition) == (1440, "007", "12")


def test_aliases_and_merged_mappings_within_bounds_are_read(tmp_path: Path) -> None:
    file = tmp_path / "given.yaml"
    file.write_text("x: &x {SIZE: 64, ROOT: 007}\ny: {<<: *x, FRAMES: 8}\nz: [*x, 1, -2, 0.5, 1.0e-3, true, ~]\n")
    first = {"SIZE": 64, "ROOT": "007"}
    assert read_yaml(file) == {"x": first, "y": {**first, "FRAMES": 8}, "z": [first, 1, -2, 0.5, 1e-3, True, None]}


def test_a_configuration_comes_from_the_pipe_of_a_shell_but_from_no_device(data: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"{SEED: 5, DATA: {ROOT: x}}")
    os.close(writing)
    assert load_config(f"/dev/fd/{reading}").SEED == 5
    os.close(reading)
    os.mkfifo(data / "pipe")  # no one writes to it
    (data / "link").symlink_to("/dev/zero")
    for name in (str(data / "pipe"), str(data / "link"), "/dev/zero", "/dev/random"):
        for read in (load_config, read_profile, partial(read_list, root=data)):
            assert "file" in refusal(read, name)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("l.txt", "a/0.png " + "1 " * 5_000_000 + "0\n", "letters; allowed: 131,072"),
        ("l.txt", "a/0.png" + "," * 5_000_000 + "0\n", "letters; allowed: 131,072"),
        ("l.txt", "[a/0.png " + "1 " * 5_000_000 + "0\n", "letters; allowed: 131,072"),
        ("l.csv", "path,label\na/" + "x" * DEEP * 2 + ",0\n", "letters; allowed: 131,072"),
        ("l.txt", "a\0/0.mp4 0\nb/1.png 1\n", "no file has a zero byte"),
        ("l.txt", "a/0.png 999999\nb/1.png 0\n", "largest label is 999,999"),
        ("l.csv", "path,label,start_frame,stop_frame\na/0.png,0,0," + "9" * 400, "a whole number"),
        ("l.csv", "path,label,start,stop\na/0.png,0,0," + "9" * 400, "give seconds"),
        ("l.json", "[" * DEEP, "maximum recursion depth"),
        ("l.json", '{"database": ' + '{"a":' * DEEP, "maximum recursion depth"),
        ("l.json", '[{"path": "a", "label": ' + "9" * 5000 + "}]", "is not JSON"),
        ("l.json", '[{"path": "a\\ud800.mp4", "label": "x"}]', "surrogates not allowed"),
        ("l.json", '[{"path": "a\\u0000.mp4", "label": "x"}]', "no file has a zero byte"),
        ("l.json", '[{"path": "a.mp4", "label": {"x": 1}}]', "no short text or number"),
        ("l.json", '[{"path": "a.mp4", "label": [["x"]]}]', "no short text or number"),
        ("l.json", '[{"path": "a.mp4", "labels": "[' + "1," * 1_000_000 + '1]"}]', "no short text or number"),
        ("l.json", '[{"path": "a.mp4", "label": NaN}]', "is empty"),
        ("l.json", '{"v": {"annotations": {"label": "x", "segment": [0, Infinity]}}}', "no segment"),
        ("l.json", '{"v": {"annotations": {"label": "x", "segment": [NaN, 1]}}}', "no segment"),
        ("l.json", '{"v": {"annotations": {"label": "x", "segment": [0, ' + "9" * 400 + "]}}}", "no segment"),
        ("l.json", '{"v": {"annotations": {"label": ["x"], "segment": [0, 1]}}}', "no segment"),
        ("l.json", '{"v": {"annotations": null}}', "no list of segments"),
        ("l.json", '{"v": {"annotations": 5}}', "no list of segments"),
    ],
)
def test_lists_that_ask_for_much_or_for_nothing_are_refused(
    name: str, text: str, said: str, data: Path, capfd: pytest.CaptureFixture
) -> None:
    file = data / name
    file.write_text(text)
    main, arguments = list_commands(file)[0]
    with unharmed(data.parent, seconds=5):
        assert main(arguments) == 2
    assert said in capfd.readouterr().err


def test_a_class_file_with_fewer_names_than_labels_is_refused(data: Path, capfd: pytest.CaptureFixture) -> None:
    (data / "l.txt").write_text("a/0.png 7\nb/1.png 8\n")
    (data / "names.txt").write_text("a\nb\n")
    main, arguments = list_commands(data / "l.txt", classes="names.txt")[0]
    assert main(arguments) == 2
    assert "none of the 2 classes" in capfd.readouterr().err


@pytest.mark.parametrize(
    "labels",
    ["[" + "-" * 100_000 + "1]", "[" * 20_000 + "]" * 20_000, "[" + "1," * 60_000 + "1]", "[" + "9" * 5000 + "]"],
)
def test_labels_in_the_form_of_python_are_bounded(labels: str, data: Path, capfd: pytest.CaptureFixture) -> None:
    file = data / "l.csv"
    file.write_text(f'path,labels\na/0.png,"{labels}"\nb/1.png,"[0]"\n')
    codes = run_all(list_commands(file), data, capfd)
    assert 1 not in codes  # which would be the parser's lack of memory


@pytest.mark.parametrize(
    "text", ["9" * 5000 + " a\n0 b\n", "a," + "1" * 5000 + "\nb,0\n", "id,name\n0," + "x" * 140_000, '["\\ud800", "b"]',
             'id,name\n0,"x\n' + "1,bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb\n" * 10_000, "[" * DEEP]
)  # fmt: skip
def test_class_files_that_ask_for_much_are_refused(text: str, data: Path, capfd: pytest.CaptureFixture) -> None:
    (data / "classes.txt").write_text(text)
    assert run_all(list_commands(data / "numbers.txt", classes="classes.txt")[:1], data, capfd) == [2]
