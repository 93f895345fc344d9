"""Loading and checking configurations.

Experiment files hold differences only and may inherit through ``_BASE_``; overrides from the command line come last.
"""

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from stvit_video.common.errors import UsageError, nearest
from stvit_video.common.files import nearest_path
from stvit_video.config.clip_settings import adopted_settings, config_beside
from stvit_video.config.schema import BY_NAME, KEYS, SECTIONS, complete, flatten
from stvit_video.config.yaml_text import parse_yaml, read_text


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
    given = _read(read_file(path).items(), str(path))
    given |= {**_read(parse_overrides(overrides), "the command line"), **_read(values, origin)}
    if given.get("MODEL.NAME") == "auto":
        init = given.get("MODEL.INIT", "")
        adopted = _read(adopted_settings(init).items(), f"MODEL.INIT {init}")
        # Explicit settings override those of the checkpoint.
        given = {**adopted, **given, "MODEL.NAME": adopted.get("MODEL.NAME", "auto")}
    given["OUTPUT_DIR"] = given.get("OUTPUT_DIR") or str(Path("runs") / path.stem)
    given = {**_values_before(path, given), **given}
    return _check(_nest({**flatten(default_config()), **given}))


def read_yaml(path: Path, *, folders: Sequence[str] = ("configs",)) -> dict[Any, Any]:
    """Return the mapping that a YAML file holds. Raises UsageError, with a file of like name in ``folders``."""
    try:
        content = parse_yaml(read_text(path))
    except OSError as error:
        reasons: dict[type, str] = {FileNotFoundError: "is not there", IsADirectoryError: "is a folder"}
        reason = reasons.get(type(error), f"cannot be read ({error.strerror})")
        beside = [file for file in [path / "config.yaml"] if file.is_file()] or sorted(path.glob("*.yaml"))
        within = f" In it: {', '.join(file.name for file in beside)}." if beside else ""
        near = within if path.is_dir() else nearest_path(path, "*.yaml", folders)
        raise UsageError(f"{path} {reason}; give a .yaml file.{near}") from error
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        place = f" in line {mark.line + 1}" if mark else ""
        tab = ": indent with blanks" if "'\\t'" in reason else ""
        raise UsageError(f"{path} is not YAML that can be used{place} ({reason:.120}{tab}); correct it.") from error
    if not isinstance(content, dict):
        what = "is empty" if content is None else f"is not a mapping, but {content!r:.60}"
        raise UsageError(f"{path} {what}; write `KEY: VALUE` lines.")
    return content


def read_file(path: Path, *heirs: Path, known: dict[Path, dict[str, Any]] | None = None) -> dict[str, Any]:
    """Return the values of a configuration file by full name, on those of the files that ``_BASE_`` names.

    ``known`` are the values of files that were read, as several may name one.
    """
    known = {} if known is None else known
    try:
        content = read_yaml(path)
    except UsageError as error:
        raise UsageError(f"Configuration {f'{heirs[-1]}: its _BASE_ ' if heirs else ''}{error}") from error
    bases = content.pop("_BASE_", [])
    values: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:  # of several, the last one wins
        file = Path(os.path.normpath(path.parent / os.path.expanduser(str(base))))
        if not isinstance(base, str) or file in (path, *heirs):
            raise UsageError(f"Configuration {path}: its _BASE_ is {base!r:.80}; name another .yaml file.")
        known[file] = known.get(file) or read_file(file, *heirs, path, known=known)
        values |= known[file]
    return values | flatten(content)


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
            recorded = flatten(parse_yaml(read_text(file)))
        except (OSError, ValueError, yaml.YAMLError, AttributeError):
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
            raise UsageError(f"Key {name} in {origin} is unknown{_describe_unknown(name, value)}")
        values[name] = BY_NAME[name].read(value, origin)
    return values


def _describe_unknown(name: str, value: Any, part: str = "") -> str:
    """Return what may be meant by a name that is no key; ``part`` says what it may be a part of."""
    if name in SECTIONS:
        keys = [key for key in BY_NAME if key.startswith(f"{name}.")]
        blank = ", and a blank behind the colon" if isinstance(value, str) and ":" in value else ""
        return f": {name} is a section; name one of its keys{blank}: {', '.join(keys[:3])}, ..."
    chosen = [f" Did you mean {key.name} {name.lower()}?" for key in KEYS if name and name.lower() in key.choices]
    meant = chosen[0] if chosen else nearest(name, BY_NAME)
    return f".{meant}{part} All keys are listed by: python -m stvit_video.run --keys"


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
    before = ""
    for word in left:
        name, equals, given = word.partition("=")
        if name not in BY_NAME:
            part = f" If it belongs to {before}, quote that: '{before} {word}'." if before and name.islower() else ""
            raise UsageError(f"Key {name or word} in the command line is unknown{_describe_unknown(name, given, part)}")
        value = given if equals else next(left, None)
        forms = f"write {name} VALUE or {name}=VALUE, without blanks around ="
        key = BY_NAME[name]
        unset = key.type is str or key.default is None  # what may be empty
        if value is None or value.startswith("=") or not (value or unset):
            raise UsageError(f"Override {word!r} has no value; {forms}.")
        before = value if key.type is str else ""
        if key.type is str and not value.startswith(("[", "None")):
            yield name, value  # as it was typed: a folder may be named by digits
            continue
        try:
            yield name, parse_yaml(value)
        except yaml.YAMLError as error:
            more = " ".join(itertools.takewhile(lambda part: part not in BY_NAME, left))
            whole = f"{name} '{' '.join([value, more]).strip():.200}'"
            raise UsageError(f"Override {name}: {value!r:.200} is not a value; quote it: {whole}.") from error


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
        except (re.error, RecursionError, OverflowError) as error:
            raise UsageError(
                f"DATA.GROUP {data.GROUP!r:.80} is no regular expression ({error}); give one, or auto."
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
