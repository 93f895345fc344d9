"""What a configuration key is, and which values it takes."""

import contextlib
import math
from dataclasses import dataclass
from typing import Any

from stvit_video.errors import UsageError, nearest


@dataclass(frozen=True)
class Key:
    """One configuration key; ``kind`` is the type where the default is None, which means "not set"."""

    name: str
    default: Any
    about: str
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    kind: type | None = None
    length: int | None = None
    element: type = int  # of a list whose default is empty or not set

    @property
    def type(self) -> type:
        return self.kind or type(self.default)


def coerce(key: Key, value: Any, origin: str) -> Any:
    """Return ``value`` in the key's type; an integer serves as a float, a number or string as nothing else."""
    if value in (None, "None") and key.default is None:  # YAML's null is Python's None to those who type it
        return None
    if key.type is float and isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):  # YAML reads 1e-3, without a point, as a string
            value = float(value)
    if key.type is list and isinstance(value, tuple | list):
        value = [_coerce_element(key, element, origin) for element in value]
    if key.type is str and value is None:
        value = ""
    if key.type is str and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)  # a folder or list may be named by digits
    if type(value) is not key.type:
        raise UsageError(
            f"{key.name} in {origin} is {value!r}, a {type(value).__name__}; it takes a {key.type.__name__} "
            f"({key.about}), for example {key.default!r}."
        )
    return value


def _coerce_element(key: Key, value: Any, origin: str) -> Any:
    """Return an element of a list key as a number of the default's type; others hold ``key.element``."""
    kind = type(key.default[0]) if key.default else key.element
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise UsageError(f"{key.name} in {origin} holds {value!r}; it takes {kind.__name__} values ({key.about}).")
    return value


def check_value(key: Key, value: Any) -> None:
    """Raise UsageError, with the reason, for a value that the key does not take; not set is always allowed."""
    if value is None:
        return
    if key.choices and value not in key.choices:
        allowed = ", ".join(choice or "''" for choice in key.choices)
        raise UsageError(f"{key.name} is {value!r}; allowed: {allowed}.{nearest(str(value), list(key.choices))}")
    _check_numbers(key, value if isinstance(value, list) else [value])


def _check_numbers(key: Key, values: list[Any]) -> None:
    if key.length is not None and len(values) != key.length:
        raise UsageError(f"{key.name} has {len(values)} values; it takes {key.length} ({key.about}).")
    for value in values:
        if (key.low is None and key.high is None) or isinstance(value, bool):
            continue
        if not isinstance(value, int | float):
            raise UsageError(f"{key.name} holds {value!r}; it takes numbers ({key.about}).")
        if (
            (key.low is not None and value < key.low)
            or (key.high is not None and value > key.high)
            or not math.isfinite(value)
        ):
            bounds = f"at least {key.low}" if key.high is None else f"{key.low} to {key.high}"
            raise UsageError(f"{key.name} is {value}; allowed: {bounds} ({key.about}).")
