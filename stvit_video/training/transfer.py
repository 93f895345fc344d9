"""What a checkpoint is worth on the listed videos before it is trained, beside the same network with random weights.

The checkpoint is loaded into the video model and frozen. Each training and test video is described once, by the mean
of the tokens that would enter the classifier, and the test list is scored by nearest neighbours and by a linear probe.
Where the checkpoint's classes are the data's, its own image classifier is scored too. Fine-tuning, if asked for, comes
last.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from stvit_video.common.charts import plot_transfer
from stvit_video.common.errors import UsageError
from stvit_video.common.files import write_json
from stvit_video.data.failures import check_failures
from stvit_video.data.lists.videos import build_classes
from stvit_video.data.loader import build_test_loader, build_train_loader
from stvit_video.evaluation.features import Describer, describe_list, frame_probabilities, pooled_features
from stvit_video.evaluation.metrics import Predictions
from stvit_video.evaluation.score_cache import file_hash
from stvit_video.models import LoadReport, load_pretrained
from stvit_video.models.weights.files import read_metadata
from stvit_video.models.zoo import build_model
from stvit_video.runs.folder import RunFolder
from stvit_video.runs.preflight import build_cost, build_data, check_inputs, check_model, report_model
from stvit_video.runs.weights import check_all_loaded
from stvit_video.runtime.world import World, on_main
from stvit_video.training.loop import train

Row = dict[str, Any]  # method, weights, top1, top5, coverage


def nearest_neighbours(train: Predictions, features: Tensor, classes: int, k: int, temperature: float) -> Tensor:
    """Return class scores (N, classes) of features (N, C): votes of the ``k`` nearest training videos by cosine.

    A vote weighs exp(similarity / temperature), as in Wu et al. (arXiv 1805.01978).
    """
    known = F.normalize(train.scores, dim=1).T
    votes = torch.zeros(len(features), classes)
    for part, scores in zip(F.normalize(features, dim=1).split(1024), votes.split(1024), strict=True):
        nearest, places = (part @ known).topk(min(k, known.shape[1]), dim=1)
        weights = ((nearest - nearest[:, :1]) / temperature).exp()  # relative to the best: no overflow
        scores.scatter_add_(1, train.labels[places], weights)
    return votes


def linear_probe(train: Predictions, features: Tensor, classes: int, weight_decay: float) -> Tensor:
    """Return logits (N, classes) of a linear classifier fitted to the training features, standardised, by L-BFGS."""
    mean, std = train.scores.mean(dim=0), train.scores.std(dim=0).clamp_min(1e-6)
    inputs, layer = (train.scores - mean) / std, torch.nn.Linear(train.scores.shape[1], classes)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(layer(inputs), train.labels) + weight_decay * layer.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return layer((features - mean) / std)


def transfer(cfg: CfgNode, world: World) -> None:
    """Run MODE transfer: describe both lists with the weights of MODEL.INIT, score the test list, fine-tune last."""
    if not cfg.MODEL.INIT:
        raise UsageError("MODE transfer needs a checkpoint to evaluate; give MODEL.INIT FILE.")
    check_model(cfg)
    build_data(cfg, world)
    check_inputs(cfg)
    folder = RunFolder(cfg.OUTPUT_DIR)
    on_main(world, lambda: folder.check(cfg))
    classes = build_classes(cfg)
    model, report = build_checkpoint_model(cfg, len(classes))
    image_model, reason = build_image_model(cfg, classes)
    loaders = {
        split: build_test_loader(cfg, world, split, len(classes), clips=cfg.TEST.CLIPS, crops=cfg.TEST.CROPS)
        for split in ("train", "test")
    }
    tuned = build_finetuning(cfg, world, len(classes)) if cfg.TRANSFER.FINETUNE else None
    on_main(world, lambda: folder.claim(cfg))
    on_main(world, lambda: folder.write_load_report(report.to_json()))
    if world.is_main:
        print(report, flush=True)
        report_model(cfg, build_cost(cfg, model), world, len(classes))
        print(f"no image head: {reason}" if reason else f"image head: the {len(classes)} classes agree", flush=True)
    weights = on_main(world, lambda: file_hash(cfg.MODEL.INIT))
    described = {
        f"{split}_{describer.kind}": describe_list(
            describer, split, loader, folder.path / "features", world, cfg.PRECISION, cfg.SEED
        )
        for describer in build_describers(cfg, model, image_model, weights, len(classes))
        for split, loader in loaders.items()
        if (describer.kind, split) != ("head", "train")  # the image head is not fitted to anything
    }
    rows = on_main(world, lambda: build_rows(cfg, folder, described, len(classes)))
    content = {
        "checkpoint": cfg.MODEL.INIT,
        "model": cfg.MODEL.NAME,
        "chance": 100 / len(classes),
        "image_head": reason or None,
        "complete": tuned is None,
        "rows": rows,
    }
    on_main(world, lambda: write_transfer(folder, content))
    if tuned is not None:
        train(tuned, world)
        content.update(complete=True, rows=[*rows, on_main(world, lambda: build_finetuned_row(tuned))])
        on_main(world, lambda: write_transfer(folder, content))


def build_checkpoint_model(cfg: CfgNode, num_classes: int) -> tuple[nn.Module, LoadReport]:
    """Return the video model with the weights of MODEL.INIT, and what became of them; its classifier is not used."""
    torch.manual_seed(cfg.SEED)  # for the weights that the file does not hold
    model = build_model(cfg, num_classes)
    report = load_pretrained(model, cfg.MODEL.INIT, min_coverage=cfg.MODEL.INIT_MIN_COVERAGE, new_head=True)
    return model, report


def build_image_model(cfg: CfgNode, classes: list[str]) -> tuple[nn.Module | None, str]:
    """Return the image model that MODEL.INIT holds, with its own classifier; or None, and the reason in one line.

    It applies where the file says that it is of one frame, and of exactly these classes in this order.
    """
    reason = compare_classes(cfg.MODEL.INIT, classes)
    if reason:
        return None, reason
    image = cfg.clone()
    image.defrost()
    image.DATA.FRAMES = 1
    if cfg.MODEL.REGIONS is not None:
        image.MODEL.REGIONS = [1, *cfg.MODEL.REGIONS[1:]]
    image.freeze()
    try:
        model = build_model(image, len(classes))
        check_all_loaded(load_pretrained(model, cfg.MODEL.INIT, min_coverage=0.9), model)
    except UsageError as error:
        return None, f"the image model of MODEL.NAME does not take the checkpoint ({error})"
    return model, ""


def compare_classes(checkpoint: str, classes: list[str]) -> str:
    """Return why the classifier of ``checkpoint`` cannot be scored on data of ``classes``; empty where it can."""
    metadata = read_metadata(checkpoint)
    frames, own = metadata.get("arguments", {}).get("num_frames"), metadata.get("classes")
    if not isinstance(own, list):
        return f"{checkpoint} carries no class names"
    if frames != 1:
        return f"{checkpoint} is a model of {frames} frames, not of images"
    if own != classes:
        differing = next((pair for pair in zip(own, classes, strict=False) if pair[0] != pair[1]), None)
        shown = f"{differing[0]!r} where the data has {differing[1]!r}" if differing else "the first ones agree"
        return f"{checkpoint} has other classes ({len(own)} against {len(classes)}; {shown})"
    return ""


def build_describers(
    cfg: CfgNode, model: nn.Module, image_model: nn.Module | None, weights: str, num_classes: int
) -> list[Describer]:
    """Return what describes the videos: ``init``, and where they apply ``head`` (class probabilities) and ``random``.

    ``weights`` is the hash of the checkpoint.
    """
    describers = [Describer("init", model, weights, pooled_features(model))]
    if image_model is not None:
        describers.append(Describer("head", image_model, weights, frame_probabilities(image_model)))
    if cfg.TRANSFER.RANDOM_BASELINE:
        torch.manual_seed(cfg.SEED)
        network = build_model(cfg, num_classes)
        describers.append(Describer("random", network, "random", pooled_features(network)))
    return describers


def build_rows(cfg: CfgNode, folder: RunFolder, described: dict[str, Predictions], num_classes: int) -> list[Row]:
    """Score the test list in every way that ``described`` allows; write ``failures.csv`` first.

    Raises UsageError where too many videos failed.
    """
    folder.write_failures(failure for part in described.values() for failure in part.failures)
    for what, split in (("training", "train"), ("test", "test")):
        part = described[f"{split}_init"]
        check_failures(len(part.failures), part.total, cfg.DATA.MAX_FAILURES, what)
    rows = []
    if "test_head" in described:
        rows.append(make_row("image head, averaged over frames", "checkpoint", described["test_head"]))
    temperature, decay = cfg.TRANSFER.TEMPERATURE, cfg.TRANSFER.WEIGHT_DECAY
    for kind, weights, prefix in (("init", "checkpoint", ""), ("random", "random", "random weights, ")):
        if f"test_{kind}" not in described:
            continue
        train, test = described[f"train_{kind}"], described[f"test_{kind}"]
        k = min(cfg.TRANSFER.NEIGHBOURS, len(train.labels))
        votes = nearest_neighbours(train, test.scores, num_classes, k, temperature)
        logits = linear_probe(train, test.scores, num_classes, decay)
        for method, scores in (
            (f"{prefix}k-nearest neighbours (k {k}, temperature {temperature:g})", votes),
            (f"{prefix}linear probe (weight decay {decay:g})", logits),
        ):
            rows.append(make_row(method, weights, replace(test, scores=scores)))
    return rows


def make_row(method: str, weights: str, scored: Predictions) -> Row:
    """Return a row of the table: percentages, but for ``coverage``, which is a share."""
    return {
        "method": method,
        "weights": weights,
        "top1": scored.top(1),
        "top5": scored.top(5),
        "coverage": scored.coverage,
    }


def build_finetuning(cfg: CfgNode, world: World, num_classes: int) -> CfgNode:
    """Return the configuration of MODE train in OUTPUT_DIR/finetune, after making sure that it can start."""
    tuned = cfg.clone()
    tuned.defrost()
    tuned.MODE, tuned.OUTPUT_DIR, tuned.MODEL.NEW_HEAD = "train", str(Path(cfg.OUTPUT_DIR) / "finetune"), True
    tuned.freeze()
    on_main(world, lambda: RunFolder(tuned.OUTPUT_DIR).check(tuned))
    build_train_loader(tuned, world, num_classes)
    if tuned.DATA.VAL_LIST:
        build_test_loader(tuned, world, "val", num_classes)
    return tuned


def build_finetuned_row(tuned: CfgNode) -> Row:
    """Return the row of the finished training run of ``tuned``."""
    results = json.loads(RunFolder(tuned.OUTPUT_DIR).results.read_text())
    figures = {name: results[name] for name in ("top1", "top5", "coverage")}
    return {"method": f"fine-tuned ({tuned.TRAIN.EPOCHS} epochs)", "weights": "fine-tuned", **figures}


def write_transfer(folder: RunFolder, content: dict[str, Any]) -> None:
    """Print the table, and write it as ``transfer.json`` and ``transfer.png``."""
    rows, chance = content["rows"], content["chance"]
    plot_transfer(rows, chance, folder.path / "transfer.png")
    write_json(folder.transfer, content)
    print(f"{describe_rows(rows, chance)}\nresults in {folder.transfer}", flush=True)


def describe_rows(rows: list[Row], chance: float) -> str:
    """Return the rows as an aligned table; ``chance`` in percent."""
    head = f"method (chance {chance:.3g} %)"
    width = max(len(head), *(len(row["method"]) for row in rows))
    lines = [f"{head:{width}}  top-1 %  top-5 %  coverage %"]
    for row in rows:
        lines.append(f"{row['method']:{width}}  {row['top1']:7.2f}  {row['top5']:7.2f}  {100 * row['coverage']:10.1f}")
    return "\n".join(lines)
