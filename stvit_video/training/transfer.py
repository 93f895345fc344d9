"""How well an image checkpoint transfers to videos before fine-tuning, beside the same network with random weights.

The checkpoint is loaded into the video model and frozen. The features of each training and test video, the mean of the
tokens before the classifier, are computed once; the test list is scored by nearest neighbours and by a linear probe.
Where the checkpoint's classes are the data's, its own image classifier is scored too. Fine-tuning comes last.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stvit_video.common.charts import plot_transfer
from stvit_video.common.errors import UsageError
from stvit_video.common.files import write_json
from stvit_video.common.tables import format_table
from stvit_video.config.load import override
from stvit_video.data.failures import check_failures
from stvit_video.data.loader import build_test_loader, build_train_loader
from stvit_video.evaluation.evaluate import describe_videos
from stvit_video.evaluation.scores import Predictions, fingerprint, read_features, weights_hash, write_features
from stvit_video.models import load_pretrained
from stvit_video.models.weights.files import Checkpoint
from stvit_video.models.zoo import build_model
from stvit_video.runs.folder import RunFolder, build_run_folder
from stvit_video.runs.preflight import OpenRun, open_run
from stvit_video.runs.weights import check_all_loaded
from stvit_video.runtime.world import World, on_main
from stvit_video.training.loop import train

FINETUNE = "finetune"  # folder of the training run inside OUTPUT_DIR
ScoreRow = dict[str, Any]  # method, weights, top1, top5, coverage


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


@dataclass(frozen=True)
class Describer:
    """A frozen network and the map from it and clips (B, 3, T, H, W) to a row of features or probabilities each.

    ``kind`` is its name in files; ``weights`` identifies its weights: a hash, or how they were drawn.
    """

    kind: str
    network: nn.Module
    weights: str
    describe: Callable[[nn.Module, Tensor], Tensor]


def pooled_features(model: nn.Module, clips: Tensor) -> Tensor:
    """Return the mean (B, C) of the tokens of clips (B, 3, T, H, W) that would enter the classifier."""
    return model.forward_features(clips).mean(dim=1)  # type: ignore[operator]


def frame_probabilities(image_model: nn.Module, clips: Tensor) -> Tensor:
    """Return class probabilities (B, classes) of clips (B, 3, T, H, W), averaged over the frames."""
    frames = clips.transpose(1, 2).flatten(0, 1).unsqueeze(2)  # (B*T, 3, 1, H, W)
    probabilities = image_model(frames).float().softmax(dim=1)
    return probabilities.unflatten(0, (len(clips), -1)).mean(dim=1)


@dataclass(frozen=True)
class Transfer:
    """What MODE transfer scores, and how."""

    folder: RunFolder
    num_classes: int
    describers: list[Describer]
    loaders: dict[str, DataLoader]  # by split: train, test
    no_image_head: str  # why the checkpoint's own classifier is not scored; empty where it is
    neighbours: int
    temperature: float
    weight_decay: float  # of the linear probe
    precision: str
    seed: int
    max_failures: float

    def describe(self, world: World) -> dict[str, Predictions]:
        """Return the features or probabilities of both lists, by split and describer: from a cached file, or computed.

        A cached file is used only where the fingerprint of everything that it depends on agrees; a line says which.
        """
        described = {}
        for describer in self.describers:
            network = describer.network
            for split, loader in self.loaders.items():
                if (describer.kind, split) == ("head", "train"):
                    continue  # the image head is not fitted to anything
                path = self.folder.path / "features" / f"{split}_{describer.kind}.pt"
                key = fingerprint(network, describer.weights, loader.dataset, self.precision, self.seed)  # type: ignore[arg-type]
                found, said = on_main(world, partial(read_features, path, key))
                if said and world.is_main:
                    print(said, flush=True)
                if found is None:
                    network.to(world.device).eval()
                    describe, title = partial(describer.describe, network), f"{split} list, {describer.kind}"
                    found = describe_videos(describe, loader, world, self.precision, title)
                    network.cpu()
                    on_main(world, partial(write_features, path, key, found))
                described[f"{split}_{describer.kind}"] = found
        return described

    def score(self, described: dict[str, Predictions]) -> list[ScoreRow]:
        """Score the test list in every way that ``described`` allows; write ``failures.csv`` first.

        Raises UsageError where too many videos failed.
        """
        self.folder.write_failures(failure for part in described.values() for failure in part.failures)
        for what, split in (("training", "train"), ("test", "test")):
            part = described[f"{split}_init"]
            check_failures(len(part.failures), part.total, self.max_failures, what)
        rows = []
        if "test_head" in described:
            rows.append(make_row("image head, averaged over frames", "checkpoint", described["test_head"]))
        for kind, weights, prefix in (("init", "checkpoint", ""), ("random", "random", "random weights, ")):
            if f"test_{kind}" not in described:
                continue
            train, test = described[f"train_{kind}"], described[f"test_{kind}"]
            k = min(self.neighbours, len(train.labels))
            votes = nearest_neighbours(train, test.scores, self.num_classes, k, self.temperature)
            logits = linear_probe(train, test.scores, self.num_classes, self.weight_decay)
            for method, scores in (
                (f"{prefix}k-nearest neighbours (k {k}, temperature {self.temperature:g})", votes),
                (f"{prefix}linear probe (weight decay {self.weight_decay:g})", logits),
            ):
                rows.append(make_row(method, weights, replace(test, scores=scores)))
        return rows


def transfer(run: OpenRun) -> None:
    """Run MODE transfer: describe both lists with the weights of MODEL.INIT, score the test list, fine-tune last."""
    world, folder = run.world, run.folder
    task, tuning = build_transfer(run), build_finetuning(run)  # what is wrong is found before the folder is touched
    run.claim()
    if world.is_main:
        reason = task.no_image_head
        print(f"no image head: {reason}" if reason else f"image head: the {task.num_classes} classes agree", flush=True)
    described = task.describe(world)
    rows = on_main(world, lambda: task.score(described))
    content = {
        "checkpoint": folder.settings["MODEL"]["INIT"],
        "model": folder.settings["MODEL"]["NAME"],
        "chance": 100 / task.num_classes,
        "image_head": task.no_image_head or None,
        "complete": tuning is None,
        "rows": rows,
    }
    on_main(world, lambda: write_transfer(folder, content))
    if tuning is None:
        return
    tuned = open_run(tuning, world, opened=run)
    if tuned is not None:  # else it is finished already
        train(tuned)
    results = on_main(world, lambda: json.loads((folder.path / FINETUNE / "results.json").read_text()))
    row = {"method": f"fine-tuned ({tuning.TRAIN.EPOCHS} epochs)", "weights": "fine-tuned"}
    row |= {name: results[name] for name in ("top1", "top5", "coverage")}
    content |= {"complete": True, "rows": [*rows, row]}
    on_main(world, lambda: write_transfer(folder, content))


def build_transfer(run: OpenRun) -> Transfer:
    """Return the scoring of a run's checkpoint, with loaders of its lists."""
    cfg, checkpoint = run.cfg, run.checkpoint
    assert checkpoint is not None, "MODE transfer opens MODEL.INIT"
    image_model, reason = build_image_model(cfg, checkpoint, run.classes)
    weights = weights_hash(checkpoint.tensors)
    describers = [Describer("init", run.model, weights, pooled_features)]
    if image_model is not None:
        describers.append(Describer("head", image_model, weights, frame_probabilities))
    if cfg.TRANSFER.RANDOM_BASELINE:
        torch.manual_seed(cfg.SEED)
        network = build_model(cfg, len(run.classes))
        describers.append(Describer("random", network, "random", pooled_features))
    views = {"clips": cfg.TEST.CLIPS, "crops": cfg.TEST.CROPS}
    return Transfer(
        folder=run.folder,
        num_classes=len(run.classes),
        describers=describers,
        loaders={
            split: build_test_loader(cfg, run.world, run.videos[split], split, **views) for split in ("train", "test")
        },
        no_image_head=reason,
        neighbours=cfg.TRANSFER.NEIGHBOURS,
        temperature=cfg.TRANSFER.TEMPERATURE,
        weight_decay=cfg.TRANSFER.WEIGHT_DECAY,
        precision=cfg.PRECISION,
        seed=cfg.SEED,
        max_failures=cfg.DATA.MAX_FAILURES,
    )


def build_image_model(cfg: CfgNode, checkpoint: Checkpoint, classes: list[str]) -> tuple[nn.Module | None, str]:
    """Return the image model that a checkpoint holds, with its own classifier; or None, and the reason in one line.

    It applies where the file says that it is of one frame, and of exactly these classes in this order.
    """
    path, metadata = checkpoint.path, checkpoint.metadata
    frames, own = metadata.get("arguments", {}).get("num_frames"), metadata.get("classes")
    if not isinstance(own, list):
        return None, f"{path} carries no class names"
    if frames != 1:
        return None, f"{path} is a model of {frames} frames, not of images"
    if own != classes:
        differing = next((pair for pair in zip(own, classes, strict=False) if pair[0] != pair[1]), None)
        shown = f"{differing[0]!r} where the data has {differing[1]!r}" if differing else "the first ones agree"
        return None, f"{path} has other classes ({len(own)} against {len(classes)}; {shown})"
    image_settings: list[tuple[str, Any]] = [("DATA.FRAMES", 1)]
    if cfg.MODEL.REGIONS is not None:
        image_settings.append(("MODEL.REGIONS", [1, *cfg.MODEL.REGIONS[1:]]))
    try:
        model = build_model(override(cfg, image_settings, "MODE transfer"), len(classes))
        check_all_loaded(load_pretrained(model, checkpoint, min_coverage=0.9), model)
    except UsageError as error:
        return None, f"the image model of MODEL.NAME does not take the checkpoint ({error})"
    return model, ""


def make_row(method: str, weights: str, scored: Predictions) -> ScoreRow:
    """Return a row of the table: percentages, but for ``coverage``, which is a share."""
    figures = {"top1": scored.top(1), "top5": scored.top(5), "coverage": scored.coverage}
    return {"method": method, "weights": weights, **figures}


def build_finetuning(run: OpenRun) -> CfgNode | None:
    """Return the configuration of MODE train in OUTPUT_DIR/finetune; None where TRANSFER.FINETUNE is not set.

    Raises UsageError where that run could not start: it comes last, perhaps hours later.
    """
    if not run.cfg.TRANSFER.FINETUNE:
        return None
    output = str(run.folder.path / FINETUNE)
    changes = [("MODE", "train"), ("OUTPUT_DIR", output), ("MODEL.NEW_HEAD", True)]
    cfg = override(run.cfg, changes, "MODE transfer")
    on_main(run.world, build_run_folder(cfg).check)
    build_train_loader(cfg, run.world, run.videos["train"])
    return cfg


def write_transfer(folder: RunFolder, content: dict[str, Any]) -> None:
    """Print the table, and write it as ``transfer.json`` and ``transfer.png``."""
    rows, chance = content["rows"], content["chance"]
    plot_transfer(rows, chance, folder.path / "transfer.png")
    write_json(folder.transfer, content)
    print(f"{describe_rows(rows, chance)}\nresults in {folder.transfer}", flush=True)


def describe_rows(rows: list[ScoreRow], chance: float) -> str:
    """Return the rows as an aligned table; ``chance`` in percent."""
    cells = [
        [row["method"], f"{row['top1']:.2f}", f"{row['top5']:.2f}", f"{100 * row['coverage']:.1f}"] for row in rows
    ]
    return format_table([f"method (chance {chance:.3g} %)", "top-1 %", "top-5 %", "coverage %"], cells)
