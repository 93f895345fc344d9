"""What an image checkpoint is worth on video before it is trained: nearest neighbours and a linear probe.

The checkpoint is loaded into the video model and frozen. Each training and test video is described once, by the mean
of the tokens that would enter the classifier.
"""

import json
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor

from stvit_video.data.loader import build_classes, build_test_loader
from stvit_video.distributed import World, on_main
from stvit_video.engine.checkpoint import write_atomically
from stvit_video.engine.evaluate import check_failures, describe_videos
from stvit_video.engine.metrics import Predictions
from stvit_video.engine.run_folder import RunFolder
from stvit_video.engine.start import build_data, report_model
from stvit_video.errors import UsageError
from stvit_video.models import load_pretrained
from stvit_video.models.zoo import build_model


def nearest_neighbours(train: Predictions, features: Tensor, classes: int, k: int, temperature: float) -> Tensor:
    """Return class scores (N, classes) of features (N, C): votes of the ``k`` nearest training videos by cosine.

    A vote weighs exp(similarity / temperature), as in Wu et al. (arXiv 1805.01978).
    """
    similarity = F.normalize(features, dim=1) @ F.normalize(train.scores, dim=1).T
    nearest, places = similarity.topk(min(k, similarity.shape[1]), dim=1)
    weights = ((nearest - nearest[:, :1]) / temperature).exp()  # relative to the best: no overflow
    votes = torch.zeros(len(features), classes)
    return votes.scatter_add_(1, train.labels[places], weights)


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
    """Run MODE transfer: describe both lists with the frozen weights of MODEL.INIT, and score the test list."""
    if not cfg.MODEL.INIT:
        raise UsageError("MODE transfer needs a checkpoint to evaluate; give MODEL.INIT FILE.")
    build_data(cfg, world)
    folder = RunFolder(cfg.OUTPUT_DIR)
    classes = build_classes(cfg)
    model = build_model(cfg, len(classes))
    report = load_pretrained(model, cfg.MODEL.INIT, min_coverage=cfg.MODEL.INIT_MIN_COVERAGE, new_head=True)
    on_main(world, lambda: folder.claim(cfg))
    if world.is_main:
        print(report, flush=True)
        report_model(cfg, model, world, len(classes))
    model = model.to(world.device).eval()
    described = {
        split: describe_videos(
            lambda clips: model.forward_features(clips).mean(dim=1),  # type: ignore[operator]
            build_test_loader(cfg, world, split, len(classes), clips=cfg.TEST.CLIPS, crops=cfg.TEST.CROPS),
            world,
            cfg.PRECISION,
            f"features of the {split} list",
        )
        for split in ("train", "test")
    }
    on_main(world, lambda: write_transfer(cfg, folder, described["train"], described["test"], len(classes)))


def write_transfer(cfg: CfgNode, folder: RunFolder, train: Predictions, test: Predictions, classes: int) -> None:
    """Score the test features both ways; print the table and write ``transfer.json``."""
    folder.write_failures(train.failures + test.failures)
    for what, described in (("training", train), ("test", test)):
        check_failures(len(described.failures), described.total, cfg.DATA.MAX_FAILURES, what)
    k, temperature, decay = cfg.TRANSFER.NEIGHBOURS, cfg.TRANSFER.TEMPERATURE, cfg.TRANSFER.WEIGHT_DECAY
    scores = {
        f"k-nearest neighbours (k {k}, temperature {temperature:g})": nearest_neighbours(
            train, test.scores, classes, k, temperature
        ),
        f"linear probe (weight decay {decay:g})": linear_probe(train, test.scores, classes, decay),
    }
    rows: list[dict[str, Any]] = []
    for method, values in scores.items():
        judged = Predictions(values, test.labels, test.indices, test.total, test.failures)
        rows.append({"method": method, "top1": judged.top(1), "top5": judged.top(5), "coverage": judged.coverage})
    content = {"checkpoint": cfg.MODEL.INIT, "model": cfg.MODEL.NAME, "chance": 100 / classes, "rows": rows}
    write_atomically(folder.path / "transfer.json", json.dumps(content, indent=2).encode())
    print(f"{'untrained on these videos':48} top-1 %  top-5 %  coverage %   (chance {100 / classes:.1f} %)")
    for row in rows:
        print(f"{row['method']:48} {row['top1']:7.2f}  {row['top5']:7.2f}  {100 * row['coverage']:10.1f}", flush=True)
