"""MixUp and CutMix of a batch of clips, by torchvision's v2 transforms."""

import torch
from fvcore.common.config import CfgNode
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2

from stvit_video.common.errors import UsageError
from stvit_video.data.clips.transforms import torch_draws_from
from stvit_video.runtime.world import World


class Mix:
    """Shuffles the clips of a batch, then mixes each, and its label, with the one before it."""

    def __init__(
        self,
        *,
        mixup: float,  # alpha of MixUp; 0 leaves it out
        cutmix: float,  # alpha of CutMix; 0 leaves it out
        probability: float,  # of mixing a batch at all
        switch: float,  # probability of CutMix where both are used
        num_classes: int,
    ) -> None:
        kinds = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        self.transforms = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha > 0]
        self.probability, self.switch, self.num_classes = probability, switch, num_classes

    def __call__(self, clips: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Map clips (B, 3, T, H, W) and labels (B,) to mixed clips and the share of each class (B, classes)."""
        with torch_draws_from(seed):
            if torch.rand(()) >= self.probability:
                return clips, F.one_hot(labels, self.num_classes).float()
            transform = self.transforms[-1 if torch.rand(()) < self.switch else 0]
            # Clips of one video are neighbours in a batch; mixing them with each other would add little variety.
            order = torch.randperm(len(labels)).to(clips.device)
            # tv_tensors.Video says that the last two of the five dimensions are H and W.
            mixed, shares = transform(tv_tensors.Video(clips[order]), labels[order])
        return mixed.as_subclass(Tensor), shares


def build_mix(cfg: CfgNode, world: World, num_classes: int) -> Mix | None:
    """Return the mixing configured by TRAIN.MIXUP and TRAIN.CUTMIX; None where both are 0."""
    if cfg.TRAIN.MIXUP == 0 and cfg.TRAIN.CUTMIX == 0:
        return None
    parts = world.size * cfg.TRAIN.ACCUMULATE * cfg.DATA.REPEATS
    if cfg.TRAIN.BATCH_SIZE // parts < 2:
        raise UsageError(
            f"TRAIN.BATCH_SIZE {cfg.TRAIN.BATCH_SIZE} over {world.size} processes x TRAIN.ACCUMULATE "
            f"{cfg.TRAIN.ACCUMULATE} x DATA.REPEATS {cfg.DATA.REPEATS} leaves no other video to mix with; raise it to "
            f"{2 * parts}, or set TRAIN.MIXUP and TRAIN.CUTMIX to 0."
        )
    return Mix(
        mixup=cfg.TRAIN.MIXUP,
        cutmix=cfg.TRAIN.CUTMIX,
        probability=cfg.TRAIN.MIX_PROBABILITY,
        switch=cfg.TRAIN.MIX_SWITCH,
        num_classes=num_classes,
    )
