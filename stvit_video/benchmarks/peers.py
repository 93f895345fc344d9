"""The models that are timed: of configurations, of this package by name, and of other libraries.

Nothing is downloaded: speed does not depend on the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torchvision
from fvcore.common.config import CfgNode
from pytorchvideo.models import hub
from torch import Tensor, nn

from stvit_video.common.errors import UsageError, nearest
from stvit_video.config.load import load_config
from stvit_video.models.layers import Grid
from stvit_video.models.zoo import build_model, create_model, list_models

CLASSES = 400  # of peers, and of configurations without MODEL.NUM_CLASSES
VIDEO = ("swin3d_", "mvit_")  # torchvision's video transformers
MVIT_SIZE = (16, 224, 224)  # the published MViT models take no other
PYTORCHVIDEO = ("mvit_base_16x4",)
LIBRARIES = ("stvit_video", "torchvision", "pytorchvideo", "timm")


@dataclass(frozen=True)
class TimedModel:
    """A model of clips (B, 3, T, H, W), and the size of its clips."""

    name: str
    model: nn.Module
    input_size: Grid


class FramesAsBatch(nn.Module):
    """An image model applied to each frame of a clip (B, 3, T, H, W); the logits are averaged."""

    def __init__(self, image_model: nn.Module) -> None:
        super().__init__()
        self.image_model = image_model

    def forward(self, x: Tensor) -> Tensor:
        logits = self.image_model(x.transpose(1, 2).flatten(0, 1))
        return logits.unflatten(0, (-1, x.shape[2])).mean(dim=1)


def build_timed_models(
    words: Sequence[tuple[str, str]], overrides: Sequence[str]
) -> tuple[CfgNode, list[TimedModel], list[CfgNode]]:
    """Return the first configuration, the models in the order of the command line, and all configurations.

    ``words`` are ("cfg", file) and ("peer", "library:model"). Peers take clips of the first configuration's size,
    unless they are made for one size.
    """
    cfgs = [load_config(value, overrides) for kind, value in words if kind == "cfg"]
    size = (cfgs[0].DATA.FRAMES, cfgs[0].DATA.SIZE, cfgs[0].DATA.SIZE)
    models: list[TimedModel] = []
    waiting = iter(cfgs)
    for kind, value in words:
        if kind == "cfg":
            cfg = next(waiting)
            sides = (cfg.DATA.FRAMES, cfg.DATA.SIZE, cfg.DATA.SIZE)
            found = TimedModel(Path(value).stem, build_model(cfg, cfg.MODEL.NUM_CLASSES or CLASSES), sides)
        else:
            found = build_peer(value, size)
        same = sum(other.name.split(" #")[0] == found.name for other in models)
        name = f"{found.name} #{same + 1}" if same else found.name
        models.append(TimedModel(name, found.model, found.input_size))
    return cfgs[0], models, cfgs


def build_peer(name: str, size: Grid) -> TimedModel:
    """Return a peer such as "torchvision:swin3d_t", "timm:vit_small_patch16_224" or "stvit_video:swin_tiny".

    A preset may follow: "stvit_video:stvit_swin_tiny:fast". Raises UsageError for names that the library lacks.
    """
    library, _, model = name.partition(":")
    if library not in LIBRARIES or not model:
        raise UsageError(
            f"--peer {name}: the library is one of {', '.join(LIBRARIES)}; write LIBRARY:MODEL, as "
            f"torchvision:swin3d_t.{nearest(library, list(LIBRARIES))}"
        )
    preset = ""
    if library == "stvit_video":
        model, colon, preset = model.partition(":")
        if colon and not preset:
            raise UsageError(f"--peer {name} ends in a colon; name a preset behind it, or leave it out.")
        known = list_models()
    elif library == "torchvision":
        known = [found for found in torchvision.models.list_models(torchvision.models.video) if found.startswith(VIDEO)]
    elif library == "pytorchvideo":
        known = list(PYTORCHVIDEO)
    else:
        try:
            import timm
        except ModuleNotFoundError as error:
            raise UsageError(f"--peer {name} needs timm, which is not installed; pip install timm.") from error
        known = timm.list_models("vit_*")
    if model not in known:
        listed = ", ".join(known) if library != "timm" else "timm.list_models('vit_*'); timm has no such ViT"
        raise UsageError(f"--peer {name}: choose one of {listed}.{nearest(model, known)}")
    if library == "stvit_video":
        chosen = {"preset": preset} if preset else {}
        built = create_model(model, num_frames=size[0], image_size=size[1:], num_classes=CLASSES, **chosen)
        return TimedModel(name.partition(":")[2], built, size)
    if library == "torchvision":
        built = torchvision.models.get_model(model, weights=None, num_classes=CLASSES)
        return TimedModel(name, built, MVIT_SIZE if model.startswith("mvit") else size)
    if library == "pytorchvideo":
        return TimedModel(name, getattr(hub, model)(pretrained=False), MVIT_SIZE)
    built = timm.create_model(model, pretrained=False, num_classes=CLASSES, img_size=size[1:])
    return TimedModel(f"{name}, {size[0]} frames as a batch", FramesAsBatch(built), size)
