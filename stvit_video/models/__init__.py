"""Models, their names and their weights."""

from stvit_video.models.weights.load import LoadReport, load_pretrained
from stvit_video.models.zoo import create_model, list_models

__all__ = ["LoadReport", "create_model", "list_models", "load_pretrained"]
