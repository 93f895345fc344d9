"""Steps whose loss or gradients are not finite: skipped, counted, and the end of the run when there are too many."""

import torch
from torch import Tensor

from stvit_video.data.annotations import Video
from stvit_video.data.dataset import Batch
from stvit_video.engine.stopping import Diverged


def nan_if_not_finite(loss: Tensor) -> Tensor:
    """Return a factor of 1, or NaN where the loss is not finite.

    It makes the gradients of that process NaN for certain, so that every process sees it in their sum and all skip the
    step together, without a message of their own.
    """
    return torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def suspects(videos: list[Video], batch: Batch, logits: Tensor, loss: Tensor) -> list[str]:
    """Return the paths of the videos whose logits are not finite; of the whole batch if only its loss is not."""
    if loss.isfinite():
        return []
    rows = (~logits.detach().isfinite()).any(dim=1).view(len(batch.indices), -1).any(dim=1).cpu()
    indices = batch.indices[rows] if rows.any() else batch.indices
    return [videos[index].path for index in indices.tolist()]


def refuse(count: int, most: int, step: int, paths: list[str]) -> None:
    """Raise Diverged where more than ``most`` steps have been bad; ``paths`` are the videos of the last."""
    if count <= most:
        return
    raise Diverged(
        f"{count} steps had a loss or gradients that are not finite, the last step {step} with the video(s) "
        f"{', '.join(paths[:8])}{' ...' if len(paths) > 8 else ''}; TRAIN.MAX_BAD_STEPS {most} are allowed. Look at "
        f"these videos, lower OPTIM.LR, raise OPTIM.WARMUP_EPOCHS, or use PRECISION fp32."
    )
