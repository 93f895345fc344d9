"""Loading and checking configurations.

Experiment files hold differences only and may inherit through ``_BASE_``; overrides from the command line come last.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from stvit_video.common.errors import UsageError, nearest
from stvit_video.config.clip_settings import adopted_settings
from stvit_video.config.schema import BY_NAME, KEYS, check_value, coerce, flatten, value_of


def default_config() -> CfgNode:
    """Return a configuration of defaults."""
    cfg = CfgNode()
    for key in KEYS:
        _set(cfg, key.name, list(key.default) if isinstance(key.default, list) else key.default)
    return cfg


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
        content = CfgNode.load_yaml_with_base(str(path))
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, AssertionError, RecursionError) as error:
        reason = str(error).replace("\n", " ") or type(error).__name__
        raise UsageError(f"Configuration {path} is not a YAML mapping of keys ({reason}); correct the file.") from error
    except OSError as error:
        raise UsageError(f"Configuration {path}: _BASE_ names {error.filename}, which is not a file.") from error
    if not isinstance(content or {}, dict):
        raise UsageError(f"Configuration {path} is not a YAML mapping of keys; write lines `KEY: value`.")
    cfg, given = default_config(), set()
    file_values = flatten(content or {}).items()
    for pairs, place in ((file_values, str(path)), (parse_overrides(overrides), "the command line"), (values, origin)):
        for name, value in pairs:
            _assign(cfg, name, value, place)
            given.add(name)
    if cfg.MODEL.NAME == "auto":
        for name, value in adopted_settings(cfg.MODEL.INIT, list(BY_NAME)).items():
            if name not in given or name == "MODEL.NAME":  # explicit settings override those of the checkpoint
                _assign(cfg, name, value, f"MODEL.INIT {cfg.MODEL.INIT}")
    if not cfg.OUTPUT_DIR:
        cfg.OUTPUT_DIR = str(Path("runs") / path.stem)
    check(cfg)
    cfg.freeze()
    return cfg


def override(cfg: CfgNode, values: Iterable[tuple[str, Any]], origin: str) -> CfgNode:
    """Return a checked and frozen copy of ``cfg`` with (key, value) pairs from ``origin`` on top. Raises UsageError."""
    changed = cfg.clone()
    changed.defrost()
    for name, value in values:
        _assign(changed, name, value, origin)
    check(changed)
    changed.freeze()
    return changed


def parse_overrides(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) from ``KEY VALUE`` pairs and ``KEY=VALUE`` words; values are read as YAML."""
    words = list(words)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if not equals:
            if not words:
                raise UsageError(f"Override {word!r} has no value; write {word} VALUE or {word}=VALUE.")
            value = words.pop(0)
        if name in BY_NAME and BY_NAME[name].type is str and not value.startswith(("[", "None")):
            yield name, value  # as it was typed: a folder may be named by digits
            continue
        try:
            yield name, yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"Override {name}: {value!r} is not a value; quote it.") from error


def _assign(cfg: CfgNode, name: str, value: Any, origin: str) -> None:
    key = BY_NAME.get(name)
    if key is None:
        raise UsageError(
            f"Key {name} in {origin} is unknown.{nearest(name, list(BY_NAME))} "
            f"All keys are listed by: python -m stvit_video.run --keys"
        )
    _set(cfg, name, coerce(key, value, origin))


def check(cfg: CfgNode) -> None:
    """Raise UsageError, with the reason, for values out of range and combinations that cannot work."""
    for key in KEYS:
        check_value(key, value_of(cfg, key.name))
    for name in ("DATA.SHORT_SIDE", "DATA.CROP_AREA", "DATA.CROP_RATIO"):
        low, high = value_of(cfg, name)
        if low > high:
            raise UsageError(f"{name} is [{low}, {high}]; give the smaller end of the range first.")
    if cfg.DATA.CROP == "short_side" and cfg.DATA.SHORT_SIDE[0] < cfg.DATA.SIZE:
        raise UsageError(
            f"DATA.SHORT_SIDE {list(cfg.DATA.SHORT_SIDE)} reaches below DATA.SIZE {cfg.DATA.SIZE}, so a crop would not "
            f"fit; raise the first number to {cfg.DATA.SIZE} or lower DATA.SIZE."
        )
    if cfg.TEST.SHORT_SIDE < cfg.DATA.SIZE:
        raise UsageError(f"TEST.SHORT_SIDE {cfg.TEST.SHORT_SIDE} is below DATA.SIZE {cfg.DATA.SIZE}; raise it.")
    shares, lists = cfg.DATA.SPLIT, [cfg.DATA.TRAIN_LIST, cfg.DATA.VAL_LIST, cfg.DATA.TEST_LIST]
    if shares is not None and (sum(shares) != 100 or not shares[0] or not shares[2]):
        raise UsageError(
            f"DATA.SPLIT is {list(shares)}; allowed: whole percentages of training, validation and test that add up to "
            f"100, only validation being 0, for example [70, 15, 15]."
        )
    if shares is not None and lists != (expected := [lists[0], lists[0] if shares[1] else "", lists[0]]):
        raise UsageError(
            f"DATA.SPLIT {list(shares)} splits one list, but DATA.TRAIN_LIST, VAL_LIST and TEST_LIST are {lists}; "
            f"set them to {expected}, or DATA.SPLIT None."
        )
    if cfg.COMPILE == "model" and cfg.PARALLEL.STRATEGY == "fsdp":
        raise UsageError("COMPILE model with PARALLEL.STRATEGY fsdp, which shards block by block; set COMPILE blocks.")
    if cfg.TEST.CROPS == 2:
        raise UsageError("TEST.CROPS is 2; allowed: 1 (centre) or 3 (both ends and the centre).")
    if not cfg.DATA.ROOT:
        raise UsageError("DATA.ROOT is empty; give the folder that holds the videos: DATA.ROOT /path/to/videos.")


def _set(cfg: CfgNode, name: str, value: Any) -> None:
    *sections, leaf = name.split(".")
    for section in sections:
        if section not in cfg:
            cfg[section] = CfgNode()
        cfg = cfg[section]
    cfg[leaf] = value
