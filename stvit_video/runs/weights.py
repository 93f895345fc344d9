"""Weights that a run starts from or tests."""

import json
from pathlib import Path

from fvcore.common.config import CfgNode
from torch import nn

from stvit_video.common.errors import UsageError
from stvit_video.config.clip_settings import NOT_ADOPTED
from stvit_video.models import LoadReport, load_pretrained
from stvit_video.models.weights.files import read_metadata
from stvit_video.models.zoo import UNSAID
from stvit_video.runs.folder import RunFolder


def check_all_loaded(report: LoadReport, model: nn.Module) -> None:
    """Raise UsageError unless the checkpoint is this network's own: to test other weights would be to test nothing.

    Only the time embedding, which starts at zero, may be new: an image model is tested on video with it.
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
        old, new = (arguments.get(key, UNSAID.get(key)) for arguments in (given, built))
        if key not in NOT_ADOPTED and json.dumps(old) != json.dumps(new):
            raise UsageError(f"{report.source} was trained with {key} {old!r}, not {new!r}; set MODEL to match it.")


def load_tested(cfg: CfgNode, folder: RunFolder, model: nn.Module) -> LoadReport:
    """Load what MODE test tests: the weights of MODEL.INIT, or else those that the folder holds. Raises UsageError."""
    source = cfg.MODEL.INIT or str(folder.weights)
    if not Path(source).is_file():
        raise UsageError(
            f"MODE test: no weights at {source}; give MODEL.INIT FILE, or the OUTPUT_DIR of a finished run."
        )
    report = load_pretrained(model, source, min_coverage=0.9)
    check_all_loaded(report, model)
    return report


def build_weights(cfg: CfgNode, model: nn.Module, classes: list[str]) -> LoadReport:
    """Load MODEL.INIT into the model as the configuration asks; a classifier of other classes is no silent start."""
    known = read_metadata(cfg.MODEL.INIT).get("classes") if Path(cfg.MODEL.INIT).is_file() else None
    if known not in (None, classes) and not cfg.MODEL.NEW_HEAD and cfg.MODEL.INIT_DEPTH is None:
        raise UsageError(
            f"{cfg.MODEL.INIT}: its classifier is for other classes ({', '.join(map(str, known[:4]))} ...) than the "
            f"data's ({', '.join(classes[:4])} ...). Set MODEL.NEW_HEAD True to train a new one."
        )
    return load_pretrained(
        model,
        cfg.MODEL.INIT,
        min_coverage=cfg.MODEL.INIT_MIN_COVERAGE,
        new_head=cfg.MODEL.NEW_HEAD,
        motion=cfg.MODEL.INIT_MOTION,
        depth=cfg.MODEL.INIT_DEPTH,
    )
