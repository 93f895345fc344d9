"""Models, their names and their weights. The names below are imported when they are asked for: with torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stvit_video.models.weights.load import load_pretrained
    from stvit_video.models.weights.report import LoadReport
    from stvit_video.models.zoo import create_model, list_models

__all__ = ["LoadReport", "create_model", "list_models", "load_pretrained"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "zoo" if name in ("create_model", "list_models") else "weights.load"
    return getattr(import_module(f"{__name__}.{home}"), name)
