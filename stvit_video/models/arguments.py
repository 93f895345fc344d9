"""What the models' constructors accept: one table, checked before anything is built."""

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any


@dataclass(frozen=True)
class Rule:
    """An argument's type, range, and length where it is a sequence; "int or pair" style choices list two lengths."""

    kind: type  # int, float, bool or str
    low: float = 0.0
    below: float = float("inf")
    lengths: tuple[int, ...] = (1,)  # 1: a single value; others: a sequence of so many
    optional: bool = False

    def describe(self) -> str:
        """Return what is allowed, in words."""
        if self.kind in (bool, str):
            return "True or False" if self.kind is bool else "text"
        what = "whole number" if self.kind is int else "number"
        reach = f"from {self.low:g}" + (f" to below {self.below:g}" if self.below < float("inf") else " on")
        forms = [f"a {what}" if length == 1 else f"{length} {what}s" for length in self.lengths]
        return f"{' or '.join(forms)} {reach}" + (", or None" if self.optional else "")


SIZE, COUNT, SHARE = Rule(int, 1, lengths=(1, 2)), Rule(int, 1), Rule(float, 0, 1)
GRID, STAGES = Rule(int, 1, lengths=(3,), optional=True), Rule(int, 1, lengths=(4,))
FLAG, TEXT = Rule(bool), Rule(str)
RULES: dict[str, Rule] = {
    "num_frames": COUNT, "image_size": SIZE, "num_classes": COUNT, "patch_size": COUNT, "tubelet": COUNT, "dim": COUNT,
    "depth": COUNT, "depths": STAGES, "num_heads": Rule(int, 1, lengths=(1, 4)), "mlp_ratio": Rule(float, 0.01),
    "dropout": SHARE, "drop_path": SHARE, "base_depth": COUNT, "stgm_depth": COUNT, "units": COUNT,
    "frames_per_centre": COUNT, "regions": GRID, "window": Rule(int, 1, lengths=(3,)),
    "window_frames": Rule(int, 1, lengths=(4,), optional=True), "layer_scale": Rule(float, 0, optional=True),
    "offsets": FLAG, "global_centres": FLAG, "first_residual": FLAG, "fc_norm": FLAG, "recover": FLAG,
    "pooling": TEXT, "stem": TEXT, "init": TEXT, "base_attention": TEXT, "positions": TEXT, "preset": TEXT,
    "reducer": TEXT,
}  # fmt: skip


def check_argument(name: str, value: Any) -> Any:
    """Return ``value`` as plain numbers, sequences as tuples; raise ValueError where the argument's rule forbids it."""
    rule = RULES[name]
    if value is None and rule.optional:
        return None
    single = not isinstance(value, tuple | list)
    values = [value] if single else list(value)
    if len(values) in rule.lengths and single == (len(values) == 1) and all(_fits(rule, item) for item in values):
        convert = {int: int, float: float}.get(rule.kind, lambda item: item)
        return convert(value) if single else tuple(convert(item) for item in values)
    raise ValueError(f"{name} is {value!r}; allowed: {rule.describe()}.")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} {value!r} is unknown; choose one of {', '.join(choices)}.")


def _fits(rule: Rule, value: Any) -> bool:
    if rule.kind in (bool, str):
        return isinstance(value, rule.kind)
    number = isinstance(value, Integral if rule.kind is int else Real) and not isinstance(value, bool)
    return number and rule.low <= value < rule.below
