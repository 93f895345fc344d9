"""Who is measured: models of configurations, models of this package by name, and those of other libraries.

Nothing is downloaded: speed does not depend on the weights.
"""

from collections.abc import Callable, Sequence
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

CLASSES = 400  # of a model whose configuration does not say how many
VIDEO = ("swin3d_", "mvit_")  # of torchvision's; its others are no transformers
MVIT_SIZE = (16, 224, 224)  # what the published MViT models are built for
PYTORCHVIDEO = ("mvit_base_16x4",)


@dataclass(frozen=True)
class Contestant:
    """A model of clips (B, 3, T, H, W), and the size of its clips."""

    name: str
    model: nn.Module
    input_size: Grid


class FramesAsBatch(nn.Module):
    """An image model on each frame of a clip (B, 3, T, H, W), its logits averaged: no frame sees another."""

    def __init__(self, image_model: nn.Module) -> None:
        super().__init__()
        self.image_model = image_model

    def forward(self, x: Tensor) -> Tensor:
        logits = self.image_model(x.transpose(1, 2).flatten(0, 1))
        return logits.unflatten(0, (-1, x.shape[2])).mean(dim=1)


def build_contestants(
    words: Sequence[tuple[str, str]], overrides: Sequence[str]
) -> tuple[CfgNode, list[Contestant], list[CfgNode]]:
    """Return the first configuration, who is measured in the order of the command line, and all configurations.

    ``words`` are ("cfg", file) and ("peer", "library:model"); peers take clips of the first configuration's size where
    they are not made for one.
    """
    cfgs = [load_config(value, overrides) for kind, value in words if kind == "cfg"]
    size = (cfgs[0].DATA.FRAMES, cfgs[0].DATA.SIZE, cfgs[0].DATA.SIZE)
    contestants: list[Contestant] = []
    waiting = list(cfgs)
    for kind, value in words:
        if kind == "cfg":
            cfg = waiting.pop(0)
            sides = (cfg.DATA.FRAMES, cfg.DATA.SIZE, cfg.DATA.SIZE)
            found = Contestant(Path(value).stem, build_model(cfg, cfg.MODEL.NUM_CLASSES or CLASSES), sides)
        else:
            found = build_peer(value, size)
        same = sum(other.name.split(" #")[0] == found.name for other in contestants)
        name = f"{found.name} #{same + 1}" if same else found.name
        contestants.append(Contestant(name, found.model, found.input_size))
    return cfgs[0], contestants, cfgs


def build_peer(name: str, size: Grid) -> Contestant:
    """Return a peer such as "torchvision:swin3d_t", "timm:vit_small_patch16_224" or "stvit_video:swin_tiny".

    A preset may follow: "stvit_video:stvit_swin_tiny:fast". Raises UsageError for names that the library lacks.
    """
    library, _, model = name.partition(":")
    builders: dict[str, Callable[[str, str, Grid], Contestant]] = {
        "stvit_video": _own,
        "torchvision": _torchvision,
        "pytorchvideo": _pytorchvideo,
        "timm": _timm,
    }
    if library not in builders or not model:
        raise UsageError(
            f"--peer {name}: the library is one of {', '.join(builders)}; write LIBRARY:MODEL, as torchvision:swin3d_t."
            + nearest(library, list(builders))
        )
    return builders[library](name, model, size)


def _refuse(name: str, model: str, known: list[str]) -> UsageError:
    return UsageError(f"--peer {name}: choose one of {', '.join(known)}.{nearest(model, known)}")


def _own(name: str, model: str, size: Grid) -> Contestant:
    variant, colon, preset = model.partition(":")
    if colon and not preset:
        raise UsageError(f"--peer {name} ends in a colon; name a preset behind it, or leave it out.")
    if variant not in list_models():
        raise _refuse(name, variant, list_models())
    chosen = {"preset": preset} if preset else {}
    built = create_model(variant, num_frames=size[0], image_size=size[1:], num_classes=CLASSES, **chosen)
    return Contestant(name.partition(":")[2], built, size)


def _torchvision(name: str, model: str, size: Grid) -> Contestant:
    known = [found for found in torchvision.models.list_models(torchvision.models.video) if found.startswith(VIDEO)]
    if model not in known:
        raise _refuse(name, model, known)
    built = torchvision.models.get_model(model, weights=None, num_classes=CLASSES)
    return Contestant(name, built, MVIT_SIZE if model.startswith("mvit") else size)


def _pytorchvideo(name: str, model: str, size: Grid) -> Contestant:
    if model not in PYTORCHVIDEO:
        raise _refuse(name, model, list(PYTORCHVIDEO))
    return Contestant(name, getattr(hub, model)(pretrained=False), MVIT_SIZE)


def _timm(name: str, model: str, size: Grid) -> Contestant:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise UsageError(f"--peer {name} needs timm, which is not installed; pip install timm.") from error
    known = timm.list_models("vit_*")
    if model not in known:
        raise UsageError(f"--peer {name}: timm has no such ViT; choose one of timm.list_models('vit_*')."
                         + nearest(model, known))  # fmt: skip
    built = timm.create_model(model, pretrained=False, num_classes=CLASSES, img_size=size[1:])
    return Contestant(f"{name}, {size[0]} frames as a batch", FramesAsBatch(built), size)
