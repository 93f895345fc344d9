"""The weights that a run starts from, tests or transfers."""

import json
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode
from torch import nn

from stvit_video.common.errors import UsageError
from stvit_video.common.files import write_atomically
from stvit_video.config.clip_settings import NOT_ADOPTED
from stvit_video.models import LoadReport, load_pretrained
from stvit_video.models.weights.files import Checkpoint, pack_weights
from stvit_video.models.zoo import IMPLIED_ARGUMENTS


def save_weights(path: Path, model: nn.Module, classes: list[str], views: dict[str, Any] | None = None) -> None:
    """Write a ``.safetensors`` with all that building and using the model again takes; see ``pack_weights``."""
    write_atomically(path, pack_weights(model, classes, views))


def check_all_loaded(report: LoadReport, model: nn.Module) -> None:
    """Raise UsageError unless the checkpoint holds all of this network's weights: others would be tested as random.

    Only the time embedding, which starts at zero, may be new: so an image model is tested on video.
    """
    strange = [f"{key} ({status})" for status in ("new", "wrong shape", "unused") for key in report.keys[status]]
    strange = [key for key in strange if key != "time_embed (new)"]
    if strange:
        raise UsageError(
            f"{report.source} is not a whole checkpoint of {model.name}: {', '.join(strange[:8])}"
            f"{' ...' if len(strange) > 8 else ''}. Give the MODEL settings that it was trained with."
        )
    given, built = report.arguments, dict(model.arguments, name=model.name)  # type: ignore[arg-type]
    for key in sorted(given.keys() | built.keys()) if given else ():
        old, new = (arguments.get(key, IMPLIED_ARGUMENTS.get(key)) for arguments in (given, built))
        if key not in NOT_ADOPTED and json.dumps(old) != json.dumps(new):
            raise UsageError(f"{report.source} was trained with {key} {old!r}, not {new!r}; set MODEL to match it.")


def build_weights(cfg: CfgNode, model: nn.Module, checkpoint: Checkpoint, classes: list[str]) -> LoadReport:
    """Load a checkpoint into the model as the configured mode asks.

    Raises UsageError in MODE train where its classifier is for other classes and MODEL.NEW_HEAD is not set, and in MODE
    test where it is not a whole checkpoint of the model.
    """
    if cfg.MODE == "test":
        report = load_pretrained(model, checkpoint, min_coverage=0.9)
        check_all_loaded(report, model)
        return report
    least = cfg.MODEL.INIT_MIN_COVERAGE
    if cfg.MODE == "transfer":  # its classifier is not used
        return load_pretrained(model, checkpoint, min_coverage=least, new_head=True)
    known = checkpoint.metadata.get("classes")
    if known not in (None, classes) and not cfg.MODEL.NEW_HEAD and cfg.MODEL.INIT_DEPTH is None:
        raise UsageError(
            f"{cfg.MODEL.INIT}: its classifier is for other classes ({', '.join(map(str, known[:4]))} ...) than the "
            f"data's ({', '.join(classes[:4])} ...). Set MODEL.NEW_HEAD True to train a new one."
        )
    options = {"new_head": cfg.MODEL.NEW_HEAD, "motion": cfg.MODEL.INIT_MOTION, "depth": cfg.MODEL.INIT_DEPTH}
    return load_pretrained(model, checkpoint, min_coverage=least, **options)
