"""A trained model out of what a run left: its folder, or a file of weights."""

from dataclasses import dataclass
from pathlib import Path

from fvcore.common.config import CfgNode
from torch import nn

from stvit_video.config import default_config, load_config
from stvit_video.engine.evaluate import check_all_loaded
from stvit_video.engine.run_folder import RunFolder
from stvit_video.errors import UsageError
from stvit_video.models import create_model, load_pretrained
from stvit_video.models.checkpoints import read_metadata, read_state_dict


@dataclass(frozen=True)
class Trained:
    """A model with its weights, its classes' names, and the configuration that says how it takes its clips."""

    model: nn.Module
    classes: list[str]
    cfg: CfgNode
    weights: Path
    note: str = ""  # what had to be assumed


def open_checkpoint(path: str | Path) -> Trained:
    """Load the model of a run's folder, or of a ``.safetensors`` that a run left.

    The run's ``config.yaml``, in the folder or beside the file, says how clips are taken; without it the defaults do,
    and ``note`` says so. Raises UsageError where there are no weights, or they do not say what model they are of.
    """
    weights = find_weights(Path(path))
    read_state_dict(weights)  # what is wrong with a file is said in its own words
    metadata = read_metadata(weights)
    if not metadata:
        raise UsageError(
            f"Checkpoint {weights} does not say which model it is of; give the folder of a finished run, or the "
            f"model.safetensors or checkpoints/best.safetensors that a run leaves."
        )
    model = create_model(metadata["name"], **metadata["arguments"])
    check_all_loaded(load_pretrained(model, weights, min_coverage=0.9), model)
    model.eval()
    count = metadata["arguments"]["num_classes"]
    classes = metadata["classes"] if metadata["classes"] else [str(label) for label in range(count)]
    cfg, note = find_config(weights, metadata["arguments"])
    return Trained(model, list(classes), cfg, weights, note)


def find_weights(path: Path) -> Path:
    """Return the file of weights that ``path`` names, or that a run's folder holds: the last ones, else the best."""
    if path.is_file():
        return path
    folder = RunFolder(path)
    if not path.is_dir():
        raise UsageError(f"--checkpoint {path} does not exist; give the folder of a run or a .safetensors file.")
    for weights in (folder.weights, folder.best_weights):
        if weights.is_file():
            return weights
    raise UsageError(
        f"--checkpoint {path} holds no weights ({folder.weights.name}, or {folder.best_weights.relative_to(path)} of a "
        f"run that goes on); give the folder of a run that was trained."
    )


def find_config(weights: Path, arguments: dict) -> tuple[CfgNode, str]:
    """Return the configuration of the run that ``weights`` lie in, or the defaults and a note that they are assumed.

    Frames and size are always those of the model.
    """
    places = [folder / "config.yaml" for folder in (weights.parent, weights.parent.parent)]
    found = next((place for place in places if place.is_file()), None)
    cfg = load_config(found).clone() if found else default_config()
    cfg.defrost()
    size = arguments["image_size"]
    if not isinstance(size, int):
        if size[0] != size[1]:
            raise UsageError(f"{weights} takes frames of {size[0]} x {size[1]}; only square ones can be cut so far.")
        size = size[0]
    if size != cfg.DATA.SIZE:
        cfg.TEST.SHORT_SIDE = size
    cfg.DATA.FRAMES, cfg.DATA.SIZE = arguments["num_frames"], size
    cfg.freeze()
    note = ""
    if found is None:
        note = (
            f"No config.yaml beside {weights}: frames are taken as the defaults say, every "
            f"{cfg.DATA.STRIDE}th, and colours normalised as for ImageNet."
        )
    return cfg, note
