"""Entry points of ``torch.hub``: every model by its name, and ``trained`` for weights.

model = torch.hub.load(REPOSITORY, "stvit_vit_small_patch16", num_frames=16, image_size=224, num_classes=400)
predictor = torch.hub.load(REPOSITORY, "trained", "runs/sample_stvit")
"""

# torch.hub.list takes every public function here for a model.
from functools import partial as _partial
from functools import update_wrapper as _update_wrapper

from stvit_video.models import create_model as _create_model
from stvit_video.models import list_models as _list_models
from stvit_video.predict import Predictor as _Predictor

dependencies = ["torch", "torchvision", "pytorchvideo", "decord", "av", "fvcore", "numpy", "PIL", "safetensors", "yaml"]


def trained(checkpoint: str, **settings: object) -> _Predictor:
    """Return the predictor of a run's folder, a ``.safetensors`` or ``hf://OWNER/NAME``; see ``Predictor.load``."""
    return _Predictor.load(checkpoint, **settings)  # type: ignore[arg-type]


globals().update({_name: _update_wrapper(_partial(_create_model, _name), _create_model) for _name in _list_models()})
