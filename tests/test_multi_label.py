"""Sets of several labels a video, from the list to the page; torchmetrics, torch and closed forms are the oracles."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torchmetrics.functional.classification import binary_average_precision, multilabel_average_precision

from stvit_video import compare, predict, report, run
from stvit_video.data.clips.transforms import Mix
from stvit_video.evaluation.evaluate import _join
from stvit_video.evaluation.predictions import MultiLabelPredictions, average_precision
from stvit_video.inference.load import open_checkpoint
from stvit_video.pages.explain import explain
from stvit_video.sweeps.plan import SweepRow
from stvit_video.sweeps.table import columns
from stvit_video.training.losses import classification_loss
from stvit_video.training.transfer import linear_probe, nearest_neighbours
from tests.conftest import small_arguments
from tests.test_run import command

Refused = Callable[[list[str]], str]
CLASSES = ["walk, run", 'say "é"', "<b>sit</b>", "never", "last"]
NEVER = 3  # a class that no video has


def predictions(scores: torch.Tensor, labels: torch.Tensor) -> MultiLabelPredictions:
    return MultiLabelPredictions(scores, labels, torch.arange(len(labels)), len(labels))


def random_scores(videos: int, classes: int, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores, of a few different values where there are ``steps``, and labels, of which one class has none."""
    scores = torch.rand(videos, classes)
    labels = (torch.rand(videos, classes) < 0.3).float()
    labels[0, 0] = 1
    labels[:, 1:2] = 0
    return (scores * steps).round() / steps if steps else scores, labels


@pytest.mark.parametrize(("videos", "classes", "steps"), [(200, 7, 0), (200, 7, 5), (40, 157, 1), (1, 3, 0), (9, 2, 2)])
@pytest.mark.filterwarnings("ignore:No positive samples:UserWarning")
def test_map_equals_torchmetrics(videos: int, classes: int, steps: int) -> None:
    scores, labels = random_scores(videos, classes, steps)
    each = multilabel_average_precision(scores, labels.int(), classes, average=None)
    found = average_precision(scores, labels)
    torch.testing.assert_close(found.nan_to_num(0).float(), each, atol=1e-6, rtol=0)
    assert torch.equal(found.isnan(), labels.sum(dim=0) == 0)
    figures = predictions(scores, labels).figures()
    mean = multilabel_average_precision(scores, labels.int(), classes, average="macro")
    assert figures["map"] == pytest.approx(100 * float(mean), abs=1e-4)
    assert figures["classes_without_positives"] == int((labels.sum(dim=0) == 0).sum()) >= 1
    positive = labels.sum(dim=0) > 0
    assert figures["map_with_positives"] == pytest.approx(100 * float(each[positive].mean()), abs=1e-4)


def test_one_class_is_a_set_too() -> None:
    scores, labels = torch.rand(50, 1), (torch.rand(50, 1) < 0.5).float()
    expected = 100 * float(binary_average_precision(scores[:, 0], labels[:, 0].int()))
    assert predictions(scores, labels).figures()["map"] == pytest.approx(expected, abs=1e-4)


def test_shards_of_any_order_give_the_same_figures() -> None:
    scores, labels = random_scores(10, 4, 3)
    whole = predictions(scores, labels)
    for parts in (
        [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]],
        [[8, 9, 0, 1], [2, 3, 4, 5, 6, 7]],
        [[6, 7], [0, 1], [2, 3, 4, 5, 8, 9]],
    ):
        rows = [(torch.tensor(part), labels[part], scores[part], torch.ones(len(part), 2)) for part in parts]
        joined = _join([([row], []) for row in rows], total=10)
        assert joined.figures() == whole.figures()
        assert joined.loss == whole.loss == pytest.approx(float(F.binary_cross_entropy(scores, labels)), abs=1e-5)


def test_the_loss_is_that_of_a_sigmoid_for_each_class() -> None:
    logits, labels = torch.randn(6, 5) * 3, (torch.rand(6, 5) < 0.3).float()
    expected = torch.nn.MultiLabelSoftMarginLoss()(logits, labels)
    torch.testing.assert_close(classification_loss(logits, labels, 0.0, multi_label=True), expected)
    smoothed = labels * 0.9 + 0.05
    expected = torch.nn.BCEWithLogitsLoss()(logits, smoothed)
    torch.testing.assert_close(classification_loss(logits, labels, 0.1, multi_label=True), expected)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_clips_have_the_labels_of_both(kind: str) -> None:
    """Clip i is the number i everywhere: the mean of a mixed clip says which two it is of, and their shares."""
    clips = torch.arange(4.0)[:, None, None, None, None].expand(4, 3, 2, 12, 12)
    labels = torch.tensor([[1.0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]])
    for seed in range(10):
        settings = {"mixup": 0.0, "cutmix": 0.0, "probability": 1.0, "switch": 0.5, kind: 1.0}
        mixed, shares = Mix(**settings, num_classes=4)(clips, labels, seed)
        # The labels' sums, 2, 2, 0 and 2, and the pixels' mean are mixed with the same share.
        for clip, share in zip(mixed, shares, strict=True):
            pairs = [(a, b) for a in range(4) for b in range(4) if a != b]
            weights = [(clip.mean() - b) / (a - b) for a, b in pairs]
            fits = [
                torch.allclose(w * labels[a] + (1 - w) * labels[b], share, atol=1e-5)
                for w, (a, b) in zip(weights, pairs, strict=True)
            ]
            assert any(fits)
    untouched = Mix(mixup=1.0, cutmix=0.0, probability=0.0, switch=0.5, num_classes=4)(clips, labels, 0)
    assert torch.equal(untouched[1], labels)


def test_neighbours_vote_for_all_of_their_labels() -> None:
    angles = torch.tensor([0.0, 0.2, 0.5, 3.0])
    labels = torch.tensor([[1.0, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]])
    train = predictions(torch.stack([angles.cos(), angles.sin()], dim=1), labels)
    votes = nearest_neighbours(train, torch.tensor([[3.0, 0.0]]), classes=3, k=3, temperature=0.1)[0]
    weights = ((angles[:3].cos() - 1) / 0.1).exp()
    expected = torch.stack([weights[0], weights[0] + weights[1], torch.tensor(0.0)]) / weights.sum()
    torch.testing.assert_close(votes, expected)


def test_the_linear_probe_is_a_logistic_regression_for_each_class() -> None:
    """At the optimum, residuals and features balance the decay, in each class by itself."""
    features, labels = torch.randn(60, 5), (torch.rand(60, 3) < 0.4).float()
    logits = linear_probe(predictions(features, labels), features, 3, weight_decay=0.01)
    standard = (features - features.mean(dim=0)) / features.std(dim=0)
    design = torch.cat([standard, torch.ones(60, 1)], dim=1)
    weight = torch.linalg.lstsq(design, logits).solution  # (6, 3), the fitted layer
    gradient = design.T @ (logits.sigmoid() - labels) / 60 + 0.02 * torch.cat([weight[:5], torch.zeros(1, 3)])
    assert gradient.abs().max() < 1e-3


def labels_of(number: int) -> list[int]:
    """Return the classes of a video; every sixth has none of them."""
    return [k for k in range(len(CLASSES)) if k != NEVER and (number * (k + 2)) % 5 < 2 and number % 6 != 1]


def write_lists(root: Path, small_set: Path) -> None:
    """Write a list for each split that gives the videos of the small set several labels, or none."""
    (root / "names.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
    for split in ("train", "val", "test"):
        files = sorted((small_set / "videos").glob(f"{split}_*.mp4"))
        rows = [f"{file},{'|'.join(map(str, labels_of(i)))}" for i, file in enumerate(files)]
        (root / f"{split}.csv").write_text("\n".join(["path,labels", *rows]) + "\n")


def multi_label_arguments(root: Path, output: Path, *overrides: str) -> list[str]:
    lists = "DATA.TRAIN_LIST train.csv DATA.VAL_LIST val.csv DATA.TEST_LIST test.csv DATA.CLASSES names.txt"
    return small_arguments(root, output, *lists.split(), "TRAIN.MAX_STEPS", "1", "TEST.BATCH_SIZE", "3", *overrides)


@pytest.fixture(scope="module")
def trained(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with lists of several labels a video, and a run of one step on them, with all that mixes labels."""
    root = tmp_path_factory.mktemp("multi")
    write_lists(root, small_set)
    mixed = "TRAIN.MIXUP 0.8 TRAIN.CUTMIX 1.0 TRAIN.EMA 0.9 OPTIM.LABEL_SMOOTHING 0.1 DATA.REPEATS 2"
    assert run.main(multi_label_arguments(root, root / "run", *mixed.split())) == 0
    return root


def read_rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.filterwarnings("ignore:No positive samples:UserWarning")
def test_a_run_is_measured_by_the_map_of_its_predictions(trained: Path, small_set: Path) -> None:
    """The probabilities that ``predict`` writes, with the labels of the list, give the figures of the run's test."""
    folder, output = trained / "run", trained / "found.json"
    videos = sorted(map(str, (small_set / "videos").glob("test_*.mp4")))
    assert predict.main([*videos, "--checkpoint", str(folder), "--top", "9", "--output", str(output)]) == 0
    found = [{row["class"]: row["score"] for row in video["top"]} for video in json.loads(output.read_text())]
    scores = torch.tensor([[row[name] for name in CLASSES] for row in found], dtype=torch.float64)
    assert not torch.allclose(scores.sum(dim=1), torch.ones(len(scores)).double(), atol=0.01)
    labels = torch.tensor([[int(k in labels_of(i)) for k in range(len(CLASSES))] for i in range(len(videos))])
    results = json.loads((folder / "results.json").read_text())
    mean = multilabel_average_precision(scores, labels, len(CLASSES), average="macro")
    assert results["map"] == pytest.approx(100 * float(mean), abs=1e-4)
    assert (results["classes_without_positives"], results["scored"]) == (1, 16)
    assert "top1" not in results

    each = multilabel_average_precision(scores, labels, len(CLASSES), average=None)
    rows = read_rows(folder / "per_class.csv")
    assert [row["class"] for row in rows] == CLASSES
    assert [int(row["videos"]) for row in rows] == labels.sum(dim=0).tolist()
    for k, row in enumerate(rows):
        expected = "" if k == NEVER else pytest.approx(100 * float(each[k]), abs=1e-4)
        assert (row["average_precision"] and float(row["average_precision"])) == expected
    rows = read_rows(folder / "predictions.csv")
    assert [json.loads(row["labels"]) for row in rows] == [[CLASSES[k] for k in labels_of(i)] for i in range(16)]
    assert [row["predicted"] for row in rows] == [CLASSES[k] for k in scores.argmax(dim=1).tolist()]
    assert [row["label_probability"] == "" for row in rows] == [not labels_of(i) for i in range(16)]

    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {row["split"]: {"top1", "map"} & row.keys() for row in log} == {"train": set(), "val": {"map"}}
    assert not (folder / "confusion.png").exists()
    for name in ("average_precision.png", "curves.png"):
        Image.open(folder / name).verify()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_test_of_the_weights_gives_the_same_figures(trained: Path, tmp_path: Path, processes: int) -> None:
    weights = ["MODE", "test", "MODEL.INIT", str(trained / "run" / "model.safetensors")]
    words = multi_label_arguments(trained, tmp_path / "again", *weights)
    if processes == 1:
        assert run.main(words) == 0
    else:
        launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m")
        assert command(*words, launcher=launcher).returncode == 0
    before, now = (json.loads((path / "results.json").read_text()) for path in (trained / "run", tmp_path / "again"))
    for name in ("map", "map_with_positives", "classes_without_positives", "coverage", "scored"):
        assert now[name] == before[name], name
    for name in ("predictions.csv", "per_class.csv", "scores.npy"):
        assert (tmp_path / "again" / name).read_bytes() == (trained / "run" / name).read_bytes()


def test_weights_say_that_each_class_is_by_itself(trained: Path) -> None:
    with safe_open(trained / "run" / "model.safetensors", "pt") as file:
        assert file.metadata()["multi_label"] == "true"
    model = open_checkpoint(trained / "run").model
    clip = torch.randn(3, *model.input_size)
    with torch.no_grad():
        expected = model(clip[None])[0].sigmoid()
    found = explain(model, clip, multi_label=True).probabilities
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=0)


def test_the_page_shows_precision_by_class(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, folder = tmp_path / "page.html", trained / "run"
    assert report.main([str(folder), "--output", str(page)]) == 0
    text, said = page.read_text(encoding="utf-8"), capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    assert f"mAP {results['map']:.1f} % on 16 test videos" in said
    assert f"count as 0 in its mAP: 1; {results['map_with_positives']:.1f} % over the others" in said
    assert "Average precision by class, lowest first" in text
    table = re.findall(r'<td class="name">(.*?)</td>.*?<td>(\S+) %</td><td class="soft">(\w+) video', text)
    rows = read_rows(folder / "per_class.csv")
    known = sorted((row for row in rows if row["videos"] != "0"), key=lambda row: float(row["average_precision"]))
    shown = [(f"{float(row['average_precision']):.1f}", row["videos"]) for row in known]
    assert [cells[1:] for cells in table] == [*shown, ("–", "no")]
    assert {"&lt;b&gt;sit&lt;/b&gt;", "never"} <= {name for name, *_ in table}
    assert not any(word in text for word in ("top-1", "Top-1", "Confusion"))
    assert "<b>no label</b>; most likely" in text

    assert compare.main([str(folder), "--target", "0", "--output", str(tmp_path / "compared.png")]) == 0
    assert re.search(r"run +- +1\n", capsys.readouterr().out)
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints"))
    assert compare.main([str(folder), str(tmp_path / "copy"), "--output", str(tmp_path / "compared.png")]) == 0
    assert "not compared: both scored 16 videos, and mAP is compared on 30 or more." in capsys.readouterr().out


def test_runs_of_both_kinds_are_not_ranked(
    trained: Path, finished_single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [str(trained / "run"), str(finished_single)]
    assert report.main([*both, "--output", str(tmp_path / "page.html")]) == 0
    assert "Measured differently, so not to be ranked" in capsys.readouterr().out
    assert compare.main([*both, "--output", str(tmp_path / "compared.png")]) == 2
    assert "are not comparable" in capsys.readouterr().err


@pytest.fixture
def finished_single(trained: Path, tmp_path: Path) -> Path:
    """The folder of a run with one label a video, as its files say."""
    folder = tmp_path / "single"
    folder.mkdir()
    about = {"top1": 12.5, "top5": 50.0, "videos": 16, "scored": 16}
    (folder / "results.json").write_text(json.dumps(about))
    config = (trained / "run" / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config)
    (folder / "metrics.jsonl").write_text('{"step": 1, "epoch": 1.0, "split": "train", "top1": 12.5}\n')
    return folder


def test_lists_and_weights_of_different_kinds_are_refused(trained: Path, tmp_path: Path, refused: Refused) -> None:
    lists = {name: (trained / name).read_text() for name in ("train.csv", "val.csv", "test.csv")}
    weights = ["MODE", "test", "MODEL.INIT", str(trained / "run" / "model.safetensors")]
    for name, text in lists.items():
        (tmp_path / name).write_text(re.sub(r",\S*", ",4", text.removeprefix("path,labels\n")))
    (tmp_path / "names.txt").write_text((trained / "names.txt").read_text())
    single = multi_label_arguments(tmp_path, tmp_path / "run", *weights)
    assert "was trained on videos of several labels each" in refused(single)
    (tmp_path / "test.csv").write_text(re.sub(r",[\d|]+", ",", lists["test.csv"]))
    empty = refused(multi_label_arguments(tmp_path, tmp_path / "run", *weights, "DATA.MULTI_LABEL", "True"))
    assert "none of its 16 videos has a label" in empty


def test_a_run_does_not_continue_with_labels_of_another_kind(
    trained: Path, small_set: Path, tmp_path: Path, refused: Refused, run_killed: Callable[[list[str], int], None]
) -> None:
    write_lists(tmp_path, small_set)
    words = multi_label_arguments(tmp_path, tmp_path / "run", "TRAIN.MAX_STEPS", "2", "CHECKPOINT.EVERY_STEPS", "1")
    run_killed(words, 1)
    for name in ("train.csv", "val.csv", "test.csv"):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(re.sub(r",\S*", ",4", text.removeprefix("path,labels\n")))
    assert "a video has one label, and had several labels" in refused(words)


def test_transfer_is_measured_by_map(trained: Path, tmp_path: Path) -> None:
    weights = ["MODE", "transfer", "MODEL.INIT", str(trained / "run" / "model.safetensors")]
    words = multi_label_arguments(trained, tmp_path / "transfer", *weights, "TRANSFER.RANDOM_BASELINE", "False")
    assert run.main(words) == 0
    content = json.loads((tmp_path / "transfer" / "transfer.json").read_text())
    positives = sum(len(labels_of(i)) for i in range(16))
    assert content["chance"] == pytest.approx(100 * positives / (16 * len(CLASSES)), abs=1e-4)
    assert [set(row) & {"map", "top1"} for row in content["rows"]] == [{"map"}, {"map"}]


def test_a_sweep_names_its_accuracy() -> None:
    row = SweepRow("small", "twin", (), {0: 40.0, 1: 42.0}, accuracy_key="map", gflops=1.0)
    found = {key: (heading, value) for key, heading, _, value in columns(row, row, "map")}
    assert found["map_seed1"] == ("seed 1", 42.0)
    assert found["mean"] == ("mean mAP", 41.0)
