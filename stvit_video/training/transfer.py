"""How well an image checkpoint transfers to videos before fine-tuning, beside the same network with random weights.

The features of each training and test video, the mean of the tokens before the classifier, are computed once; the test
list is scored by nearest neighbours and by a linear probe, and by the checkpoint's own image classifier where its
classes are the data's. Fine-tuning comes last.
"""

import json
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from stvit_video.common.accuracy import ACCURACIES
from stvit_video.common.charts import plot_transfer
from stvit_video.common.errors import UsageError
from stvit_video.common.files import write_json
from stvit_video.common.tables import format_table
from stvit_video.config.load import override
from stvit_video.data.failures import check_failures
from stvit_video.data.loader import build_test_loader, build_train_loader
from stvit_video.data.workers import Loader
from stvit_video.evaluation.evaluate import describe_videos
from stvit_video.evaluation.predictions import Predictions, probabilities
from stvit_video.evaluation.scores import fingerprint, read_features, weights_hash, write_features
from stvit_video.models import load_pretrained
from stvit_video.models.weights.files import Checkpoint
from stvit_video.models.zoo import build_model
from stvit_video.runs.checkpoint import check_all_loaded
from stvit_video.runs.fingerprint import check_start
from stvit_video.runs.folder import build_run_folder
from stvit_video.runs.lists import LABELS
from stvit_video.runs.preflight import OpenRun, build_filled_batch, open_run
from stvit_video.runtime.world import on_main
from stvit_video.training.loop import train

FINETUNE = "finetune"  # folder of the training run inside OUTPUT_DIR
ScoreRow = dict[str, Any]  # method, weights, top1 and top5 (or map) in percent, coverage as a share


def nearest_neighbours(train: Predictions, features: Tensor, classes: int, k: int, temperature: float) -> Tensor:
    """Return class scores (N, classes) of features (N, C): votes of the ``k`` nearest training videos by cosine."""
    known = F.normalize(train.scores, dim=1).T
    votes = torch.zeros(len(features), classes)
    for part, scores in zip(F.normalize(features, dim=1).split(1024), votes.split(1024), strict=True):
        nearest, places = (part @ known).topk(min(k, known.shape[1]), dim=1)
        # exp(similarity / temperature) as in Wu et al. (arXiv 1805.01978), relative to the best: no overflow.
        weights = ((nearest - nearest[:, :1]) / temperature).exp()
        if train.labels.ndim == 2:  # the share of the votes for each class: videos are ranked by it
            for neighbour, weight in zip(places.T, (weights / weights.sum(dim=1, keepdim=True)).T, strict=True):
                scores.addcmul_(train.labels[neighbour], weight[:, None])
        else:
            scores.scatter_add_(1, train.labels[places], weights)
    return votes


def linear_probe(train: Predictions, features: Tensor, classes: int, weight_decay: float) -> Tensor:
    """Return logits (N, classes) of a linear classifier fitted to the training features, standardised, by L-BFGS.

    Of a multi-label set, it is a logistic regression for each class.
    """
    mean, std = train.scores.mean(dim=0), train.scores.std(dim=0).clamp_min(1e-6)
    inputs = (train.scores - mean) / std
    bias = torch.zeros(classes, requires_grad=True)
    weight = torch.zeros(classes, inputs.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")
    many = train.labels.ndim == 2

    def fit(logits: Tensor, labels: Tensor) -> Tensor:
        return classes * F.binary_cross_entropy_with_logits(logits, labels) if many else F.cross_entropy(logits, labels)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = fit(F.linear(inputs, weight, bias), train.labels) + weight_decay * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return F.linear((features - mean) / std, weight, bias).detach()


def pooled_features(model: nn.Module, clips: Tensor) -> Tensor:
    """Return the mean (B, C) of the tokens of clips (B, 3, T, H, W) that would enter the classifier."""
    return model.forward_features(clips).mean(dim=1)  # type: ignore[operator]


def frame_probabilities(image_model: nn.Module, clips: Tensor, multi_label: bool = False) -> Tensor:
    """Return class probabilities (B, classes) of clips (B, 3, T, H, W), averaged over the frames."""
    frames = clips.transpose(1, 2).flatten(0, 1).unsqueeze(2)  # (B*T, 3, 1, H, W)
    return probabilities(image_model(frames), multi_label).unflatten(0, (len(clips), -1)).mean(dim=1)


def transfer(run: OpenRun) -> None:
    """Run MODE transfer: describe both lists with the weights of MODEL.INIT, score the test list, fine-tune last."""
    world = run.world
    folder = run.folder
    networks, loaders, no_head = build_parts(run)
    tuning = build_finetuning(run)  # what is wrong is found before the folder is touched
    run.claim()
    if world.is_main:
        agree = f"image head: the {len(run.classes)} classes agree"
        print(f"no image head: {no_head}" if no_head else agree, flush=True)
    described = build_features(run, networks, loaders)
    rows = on_main(world, lambda: build_rows(run, described))

    def write(rows: list[ScoreRow], complete: bool) -> None:
        """Print the table, and write it as ``transfer.json`` and ``transfer.png``."""
        chance = chance_level(described["test_init"].labels, len(run.classes))
        plot_transfer(rows, chance, folder.path / "transfer.png")
        content = {
            "checkpoint": folder.settings["MODEL"]["INIT"],
            "model": folder.settings["MODEL"]["NAME"],
            "chance": chance,
            "image_head": no_head or None,
            "complete": complete,
            "rows": rows,
        }
        write_json(folder.transfer, content)
        columns = {key: f"{name} %" for key, name in (ACCURACIES | {"top5": "top-5"}).items() if key in rows[0]}
        headings = [f"method (chance {chance:.3g} %)", *columns.values(), "coverage %"]
        cells = [
            (row["method"], *(f"{row[key]:.2f}" for key in columns), f"{100 * row['coverage']:.1f}") for row in rows
        ]
        print(f"{format_table(headings, cells)}\nresults in {folder.transfer}", flush=True)

    on_main(world, lambda: write(rows, tuning is None))
    if tuning is None:
        return
    tuned = open_run(tuning, world, opened=run)
    if tuned is not None:  # else it is finished already
        train(tuned)
    results = on_main(world, lambda: json.loads((folder.path / FINETUNE / "results.json").read_text()))
    figures = {name: results[name] for name in rows[0] if name not in ("method", "weights") and name in results}
    most = "at most " if tuning.TRAIN.PATIENCE else ""
    tuned_row = {"method": f"fine-tuned ({most}{tuning.TRAIN.EPOCHS} epochs)", "weights": "fine-tuned", **figures}
    on_main(world, lambda: write([*rows, tuned_row], True))


def chance_level(labels: Tensor, classes: int) -> float:
    """Return the accuracy of guessing in percent; of mAP, about the mean share of the videos that have a class."""
    return 100 * float(labels.mean()) if labels.ndim == 2 else 100 / classes


def build_parts(run: OpenRun) -> tuple[dict[str, nn.Module], dict[str, Loader], str]:
    """Return the networks that describe videos, loaders of both lists, and why ``head`` is no such network, or "".

    ``init`` is the run's model, ``head`` the image model that the checkpoint holds, ``random`` an untrained ``init``.
    """
    cfg, views = run.cfg, {"clips": run.cfg.TEST.CLIPS, "crops": run.cfg.TEST.CROPS}
    assert run.checkpoint is not None, "MODE transfer opens MODEL.INIT"
    image_model, reason = build_image_model(cfg, run.checkpoint, run.classes, run.multi_label)
    networks = {"init": run.model}
    if image_model is not None:
        networks["head"] = image_model
    if cfg.TRANSFER.RANDOM_BASELINE:
        torch.manual_seed(cfg.SEED)
        networks["random"] = build_model(cfg, len(run.classes))
    how = {**views, "label_columns": run.label_columns}
    splits = ("train", "test")
    loaders = {split: build_test_loader(cfg, run.world, run.videos[split], split, **how) for split in splits}
    return networks, loaders, reason


def build_features(run: OpenRun, networks: dict[str, nn.Module], loaders: dict[str, Loader]) -> dict[str, Predictions]:
    """Return features or probabilities by list and network: from a file of the same fingerprint, or else computed."""
    cfg, world, described = run.cfg, run.world, {}
    loaded = weights_hash(run.checkpoint.tensors)  # type: ignore[union-attr]
    for kind, network in networks.items():
        for split, loader in loaders.items():
            if (kind, split) == ("head", "train"):
                continue  # the image head is not fitted to anything
            path = run.folder.path / "features" / f"{split}_{kind}.pt"
            weights = "random" if kind == "random" else loaded
            key = fingerprint(network, weights, loader.dataset, cfg.PRECISION, cfg.SEED)
            found, said = on_main(world, partial(read_features, path, key))
            if said and world.is_main:
                print(said, flush=True)
            if found is None:
                network.to(world.device).eval()
                describe = partial(pooled_features, network)
                if kind == "head":
                    describe = partial(frame_probabilities, network, multi_label=run.multi_label)
                found = describe_videos(describe, loader, world, cfg.PRECISION, f"{split} list, {kind}")
                network.cpu()
                on_main(world, partial(write_features, path, key, found))
            described[f"{split}_{kind}"] = found
    return described


def build_rows(run: OpenRun, described: dict[str, Predictions]) -> list[ScoreRow]:
    """Return the scores of the test list, ``failures.csv`` being written. Raises UsageError where too many failed."""
    cfg = run.cfg
    classes = len(run.classes)
    run.folder.write_failures(failure for part in described.values() for failure in part.failures)
    for what, split in (("training", "train"), ("test", "test")):
        part = described[f"{split}_init"]
        check_failures(len(part.failures), part.total, cfg.DATA.MAX_FAILURES, what)
    rows: list[ScoreRow] = []

    def add(method: str, weights: str, scored: Predictions) -> None:
        figures = {**scored.figures(), "coverage": scored.coverage}
        rows.append({"method": method, "weights": weights, **figures})

    if "test_head" in described:
        add("image head, averaged over frames", "checkpoint", described["test_head"])
    temperature, decay = cfg.TRANSFER.TEMPERATURE, cfg.TRANSFER.WEIGHT_DECAY
    for kind, weights, prefix in (("init", "checkpoint", ""), ("random", "random", "random weights, ")):
        if f"test_{kind}" in described:
            train, test = described[f"train_{kind}"], described[f"test_{kind}"]
            k = min(cfg.TRANSFER.NEIGHBOURS, len(train.labels))
            votes = nearest_neighbours(train, test.scores, classes, k, temperature)
            method = f"{prefix}k-nearest neighbours (k {k}, temperature {temperature:g})"
            add(method, weights, replace(test, scores=votes))
            logits = linear_probe(train, test.scores, classes, decay)
            add(f"{prefix}linear probe (weight decay {decay:g})", weights, replace(test, scores=logits))
    return rows


def build_image_model(
    cfg: CfgNode, checkpoint: Checkpoint, classes: list[str], multi_label: bool = False
) -> tuple[nn.Module | None, str]:
    """Return the image model of a checkpoint of one frame and exactly these classes; or None, and why not."""
    path, metadata = checkpoint.path, checkpoint.metadata
    frames, own = metadata.get("arguments", {}).get("num_frames"), checkpoint.classes
    if own is None:
        return None, f"{path} carries no class names"
    if frames != 1:
        return None, f"{path} is a model of {frames} frames, not of images"
    if metadata["multi_label"] != multi_label:
        return None, f"{path} was trained on images of {LABELS[not multi_label]} each"
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


def build_finetuning(run: OpenRun) -> CfgNode | None:
    """Return the configuration of MODE train in OUTPUT_DIR/finetune; None where TRANSFER.FINETUNE is not set."""
    if not run.cfg.TRANSFER.FINETUNE:
        return None
    output = str(run.folder.path / FINETUNE)
    changes = [("MODE", "train"), ("OUTPUT_DIR", output), ("MODEL.NEW_HEAD", True)]
    cfg = override(run.cfg, changes, "MODE transfer")
    folder = build_run_folder(cfg)
    # That run comes last, perhaps hours later: what would stop it is refused now.
    on_main(run.world, lambda: check_start(folder, run.lists, run.classes, run.multi_label))
    videos = run.videos["train"]
    build_train_loader(build_filled_batch(cfg, run.world, len(videos))[0], run.world, videos)
    return cfg
