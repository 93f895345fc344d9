"""Entry points of ``torch.hub``: every model by its name, and ``trained`` for weights.

model = torch.hub.load(REPOSITORY, "stvit_vit_small_patch16", num_frames=16, image_size=224, num_classes=400)
predictor = torch.hub.load(REPOSITORY, "trained", "runs/sample_stvit")
"""

from functools import partial, update_wrapper

from stvit_video.models import create_model, list_models
from stvit_video.predict import Predictor

dependencies = ["torch", "torchvision", "pytorchvideo", "decord", "av", "fvcore", "numpy", "PIL", "safetensors", "yaml"]


def trained(checkpoint: str, **settings: object) -> Predictor:
    """Return the predictor of a run's folder, a ``.safetensors`` or ``hf://OWNER/NAME``; see ``Predictor.load``."""
    return Predictor.load(checkpoint, **settings)  # type: ignore[arg-type]


globals().update({_name: update_wrapper(partial(create_model, _name), create_model) for _name in list_models()})
