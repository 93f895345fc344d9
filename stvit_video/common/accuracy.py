"""What the accuracy of a run is called: its key in ``results.json`` and ``metrics.jsonl``, and its name."""

from collections.abc import Collection

ACCURACIES = {"map": "mAP", "top1": "top-1"}  # the first is that of a multi-label set; both in percent


def accuracy_key(figures: Collection[str]) -> str:
    """Return the key of the accuracy among those of a run's figures; top-1 where there is none."""
    return next((key for key in ACCURACIES if key in figures), "top1")
