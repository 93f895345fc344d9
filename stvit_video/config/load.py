"""Loading and checking configurations.

Experiment files hold differences only and may inherit through ``_BASE_``; overrides from the command line come last.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from stvit_video.common.errors import UsageError, nearest
from stvit_video.config.clip_settings import adopted_settings, config_beside
from stvit_video.config.schema import BY_NAME, KEYS, complete, flatten


def default_config() -> CfgNode:
    """Return a configuration of defaults."""
    return _nest({key.name: key.default for key in KEYS})


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, values: Iterable[tuple[str, Any]] = (), origin: str = ""
) -> CfgNode:
    """Return defaults, then the file at ``path`` (and its ``_BASE_``), then overrides, checked and frozen.

    Last come (key, value) pairs from ``origin``, which error messages name.
    Raises UsageError for a missing file, an unknown key (with the nearest known one), a wrong type or value.
    """
    path = Path(path)
    if not path.is_file():
        found = sorted(str(file) for file in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise UsageError(
            f"Configuration {path} is not a file; give a .yaml file.{nearest(str(path), found)}"
            + (f" In {path.parent}: {', '.join(Path(f).name for f in found)}." if found else "")
        )
    try:
        given = _read(flatten(CfgNode.load_yaml_with_base(str(path)) or {}).items(), str(path))
    except OSError as error:
        raise UsageError(f"Configuration {path}: _BASE_ names {error.filename}, which is not a file.") from error
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError, AssertionError, RecursionError) as error:
        reason = str(error).replace("\n", " ") or type(error).__name__
        raise UsageError(f"Configuration {path} is not a YAML mapping of keys ({reason}); correct the file.") from error
    given |= {**_read(parse_overrides(overrides), "the command line"), **_read(values, origin)}
    if given.get("MODEL.NAME") == "auto":
        init = given.get("MODEL.INIT", "")
        adopted = _read(adopted_settings(init).items(), f"MODEL.INIT {init}")
        # Explicit settings override those of the checkpoint.
        given = {**adopted, **given, "MODEL.NAME": adopted.get("MODEL.NAME", "auto")}
    given["OUTPUT_DIR"] = given.get("OUTPUT_DIR") or str(Path("runs") / path.stem)
    given = {**_values_before(path, given), **given}
    return _check(_nest({**flatten(default_config()), **given}))


def _values_before(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Return the values that stand for keys which are newer than the run that is continued or tested.

    Its record is the file at ``path`` itself, or lies in OUTPUT_DIR, or beside the weights of a test.
    """
    files = [path] if path.name == "config.yaml" else []
    files += [] if given.get("OVERWRITE") else [Path(given["OUTPUT_DIR"]) / "config.yaml"]
    files += (
        [config_beside(Path(given["MODEL.INIT"]))] if given.get("MODE") == "test" and given.get("MODEL.INIT") else []
    )
    for file in filter(Path.is_file, files):
        try:
            recorded = flatten(yaml.safe_load(file.read_text()))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):
            continue
        if {"OUTPUT_DIR", "SEED", "DATA.ROOT", "MODEL.NAME"} <= recorded.keys():
            return {name: value for name, value in complete(recorded).items() if name not in recorded}
    return {}


def override(cfg: CfgNode, values: Iterable[tuple[str, Any]], origin: str) -> CfgNode:
    """Return a checked and frozen copy of ``cfg`` with (key, value) pairs from ``origin`` on top. Raises UsageError."""
    return _check(_nest({**flatten(cfg), **_read(values, origin)}))


def _read(pairs: Iterable[tuple[str, Any]], origin: str) -> dict[str, Any]:
    """Return the values of (key, value) pairs, each in its key's type, by key."""
    values = {}
    for name, value in pairs:
        if name not in BY_NAME:
            raise UsageError(
                f"Key {name} in {origin} is unknown.{nearest(name, BY_NAME)} "
                f"All keys are listed by: python -m stvit_video.run --keys"
            )
        values[name] = BY_NAME[name].read(value, origin)
    return values


def _nest(values: dict[str, Any]) -> CfgNode:
    """Return values by full name as a frozen configuration."""
    cfg = CfgNode()
    for name, value in values.items():
        section, _, leaf = name.rpartition(".")
        node = cfg.setdefault(section, CfgNode()) if section else cfg
        node[leaf] = list(value) if isinstance(value, list) else value
    cfg.freeze()
    return cfg


def parse_overrides(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) from ``KEY VALUE`` pairs and ``KEY=VALUE`` words; values are read as YAML."""
    left = iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        try:
            value = value if equals else next(left)
        except StopIteration:
            raise UsageError(f"Override {word!r} has no value; write {word} VALUE or {word}=VALUE.") from None
        if name in BY_NAME and BY_NAME[name].type is str and not value.startswith(("[", "None")):
            yield name, value  # as it was typed: a folder may be named by digits
            continue
        try:
            yield name, yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"Override {name}: {value!r} is not a value; quote it.") from error


def _check(cfg: CfgNode) -> CfgNode:
    """Return ``cfg``; raise UsageError, with the reason, for a combination of values that cannot work."""
    data = cfg.DATA
    for name in ("SHORT_SIDE", "CROP_AREA", "CROP_RATIO"):
        low, high = data[name]
        if low > high:
            raise UsageError(f"DATA.{name} is [{low}, {high}]; give the smaller end of the range first.")
    if data.CROP == "short_side" and data.SHORT_SIDE[0] < data.SIZE:
        raise UsageError(f"DATA.SHORT_SIDE {data.SHORT_SIDE} begins below DATA.SIZE {data.SIZE}; raise it to that.")
    if cfg.TEST.SHORT_SIDE < data.SIZE:
        raise UsageError(f"TEST.SHORT_SIDE {cfg.TEST.SHORT_SIDE} is below DATA.SIZE {data.SIZE}; raise it.")
    shares, lists = data.SPLIT, [data.TRAIN_LIST, data.VAL_LIST, data.TEST_LIST]
    if shares is not None and (sum(shares) != 100 or not shares[0] or not shares[2]):
        raise UsageError(
            f"DATA.SPLIT is {shares}; allowed: whole percentages of training, validation and test that add up to 100, "
            f"only validation being 0, for example [70, 15, 15]."
        )
    if shares is not None and lists != (expected := [lists[0], lists[0] if shares[1] else "", lists[0]]):
        raise UsageError(
            f"DATA.SPLIT {shares} splits one list, but DATA.TRAIN_LIST, VAL_LIST and TEST_LIST are {lists}; set them "
            f"to {expected}, or DATA.SPLIT None."
        )
    if data.GROUP not in ("", "auto"):
        try:
            groups = re.compile(data.GROUP).groups
        except re.error as error:
            raise UsageError(
                f"DATA.GROUP {data.GROUP!r} is no regular expression ({error}); give one, or auto."
            ) from error
        if not groups:
            raise UsageError(f"DATA.GROUP {data.GROUP!r} has no group; put what names the recording in parentheses.")
    if cfg.COMPILE == "model" and cfg.PARALLEL.STRATEGY == "fsdp":
        raise UsageError("COMPILE model with PARALLEL.STRATEGY fsdp, which shards block by block; set COMPILE blocks.")
    if cfg.TEST.CROPS == 2:
        raise UsageError("TEST.CROPS is 2; allowed: 1 (centre) or 3 (both ends and the centre).")
    trains = cfg.MODE == "train" or (cfg.MODE == "transfer" and cfg.TRANSFER.FINETUNE)
    if trains and cfg.TEST.WEIGHTS == "best" and not data.VAL_LIST:
        raise UsageError("TEST.WEIGHTS best needs validation; give DATA.VAL_LIST, or TEST.WEIGHTS last.")
    if trains and cfg.TEST.WEIGHTS == "average" and not cfg.TRAIN.EMA:
        raise UsageError("TEST.WEIGHTS average with TRAIN.EMA 0.0; give TRAIN.EMA 0.999, or TEST.WEIGHTS last.")
    if cfg.TRAIN.PATIENCE and cfg.MODE == "train" and not data.VAL_LIST:
        raise UsageError(
            f"TRAIN.PATIENCE {cfg.TRAIN.PATIENCE} ends a training by its validation, and DATA.VAL_LIST is empty; give "
            f"a validation list, or TRAIN.PATIENCE 0."
        )
    if cfg.TRAIN.BALANCED and cfg.OPTIM.CLASS_WEIGHTS == "balanced":
        raise UsageError(
            "TRAIN.BALANCED True and OPTIM.CLASS_WEIGHTS balanced both make up for rare classes, together twice; set "
            "one of them."
        )
    if not data.ROOT:
        raise UsageError("DATA.ROOT is empty; give the folder that holds the videos: DATA.ROOT /path/to/videos.")
    return cfg
