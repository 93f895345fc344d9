"""The plan of a table of accuracy beside speed: rows that differ from one configuration, each trained with some seeds.

    cfg: ../sample_hard.yaml       # relative to the plan's folder
    seeds: [0, 1]
    twin: full                     # the dense baseline, which all other rows are compared with
    start: {TRAIN.EPOCHS: 10}      # optional: a run that is trained first, whose weights all rows start from (needs a
                                   # configuration with MODEL.INIT_DEPTH null, as sample_hard_finetune.yaml)
    rows:
      full: {MODEL.NAME: vit_hard_patch8}
      paper: {MODEL.PRESET: paper}                                  # neither of the kinds below: gets a verdict
      paper-fewer-frames: {DATA.FRAMES: 4, control_of: paper}       # paper should be above it; [paper, fast]: both
      paper-tome: {MODEL.REDUCER: tome, neighbour_of: paper}        # another method, shown beside paper

The whole plan is checked before anything is trained.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from fvcore.common.config import CfgNode

from stvit_video.common.errors import UsageError, nearest
from stvit_video.config.load import load_config, parse_overrides
from stvit_video.config.schema import BY_NAME, value_of
from stvit_video.data.lists.videos import build_lists
from stvit_video.models.cost import measure_cost
from stvit_video.models.zoo import build_model

NEEDED_KEYS = ("cfg", "seeds", "twin", "rows")
START = "start"
PLAN_KEYS = (*NEEDED_KEYS, START)
RELATIONS = {"control_of": "control", "neighbour_of": "neighbour"}
OWN_KEYS = ("MODE", "OUTPUT_DIR", "OVERWRITE", "SEED")  # set by this command for each run
# Accuracies and speeds can only be compared where these are the same: all rows must have the baseline's.
COMMON_KEYS = (
    "DEVICE", "PRECISION", "COMPILE", "DATA.ROOT", "DATA.GENERATE", "DATA.GENERATE_CLIPS", "DATA.SPLIT",
    "DATA.TEST_LIST", "DATA.CLASSES", "TEST.CLIPS", "TEST.CROPS",
)  # fmt: skip
ROW_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]{0,63}")  # valid as a folder and as a cell of any table
ASSUMED_CLASSES = 400  # where there are no data yet; the classifier's share of the cost is small


@dataclass(frozen=True, eq=False)  # hashed by identity: a configuration has no hash
class PlanRow:
    """One model of the table. ``kind`` is start, twin, preset, control or neighbour, the latter two ``of`` presets."""

    name: str
    kind: str
    of: tuple[str, ...]
    cfg: CfgNode


@dataclass(frozen=True)
class Plan:
    """A plan that was read and checked. ``start`` is trained before the ``rows``, or None."""

    path: Path
    seeds: tuple[int, ...]
    rows: tuple[PlanRow, ...]
    start: PlanRow | None = None

    @property
    def baseline(self) -> PlanRow:
        return next(row for row in self.rows if row.kind == "twin")


@dataclass(frozen=True)
class RowCost:
    """Parameters, multiply-adds (1e9) per clip, and how many tokens the last blocks work on."""

    parameters: int
    gflops: float
    tokens: int


def open_plan(path: Path, overrides: Sequence[str] = ()) -> Plan:
    """Read and check a plan; ``overrides`` are KEY VALUE words that hold for every row.

    Raises UsageError for whatever could stop a row later, naming the row.
    """
    content = _read(path)
    unknown = [str(key) for key in content if key not in PLAN_KEYS]
    if unknown:
        raise UsageError(
            f"Plan {path}: {', '.join(unknown)} is no part of a plan; those are {', '.join(PLAN_KEYS)}."
            + nearest(unknown[0], list(PLAN_KEYS))
        )
    missing = [key for key in NEEDED_KEYS if key not in content]
    if missing:
        raise UsageError(f"Plan {path} has no {', '.join(missing)}; it needs {', '.join(NEEDED_KEYS)}. Add the rest.")
    seeds, rows = content["seeds"], content["rows"]
    if not isinstance(content["cfg"], str):
        raise UsageError(f"Plan {path}: cfg is {content['cfg']!r}; give a configuration file, from the plan's folder.")
    whole = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(f"Plan {path}: seeds is {seeds!r}; give different whole numbers from 0 on, as [0, 1].")
    _check_rows(path, rows)
    builder = _RowBuilder(path, path.parent / content["cfg"], tuple(overrides))
    built = [
        builder.build(name, row or {}, "twin" if name == content["twin"] else "preset") for name, row in rows.items()
    ]
    _check_relations(path, content["twin"], built)
    _build_comparisons(path, built)
    start = _build_start(builder, content[START], built) if START in content else None
    return Plan(path, tuple(seeds), tuple(built), start)


def _read(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
        twice = _find_twice(yaml.compose(text, Loader=yaml.SafeLoader))
    except OSError as error:
        raise UsageError(f"Plan {path} cannot be read ({error.strerror}); give a .yaml file.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date
        reason = " ".join(str(error).split())
        raise UsageError(f"Plan {path} is not YAML that can be used ({reason}); correct the file.") from error
    if not isinstance(content, dict):
        raise UsageError(f"Plan {path} is not a YAML mapping; it needs {', '.join(PLAN_KEYS)}. Add them.")
    if twice:
        raise UsageError(f"Plan {path}: {twice} is given twice, and YAML would keep the last one only; remove one.")
    return content


def _find_twice(node: yaml.Node | None) -> str | None:
    """Return a key that stands twice in one mapping anywhere in the file."""
    if not isinstance(node, yaml.MappingNode):
        return None
    names = [key.value for key, _ in node.value]
    twice = next((str(name) for name in names if names.count(name) > 1), None)
    return twice or next(filter(None, (_find_twice(value) for _, value in node.value)), None)


def _check_rows(path: Path, rows: Any) -> None:
    if not isinstance(rows, dict) or not all(row is None or isinstance(row, dict) for row in rows.values()):
        raise UsageError(f"Plan {path}: rows is not a mapping of mappings; write `NAME: {{KEY: VALUE}}` for each row.")
    for name in rows:
        if not isinstance(name, str) or not ROW_NAME.fullmatch(name):
            raise UsageError(
                f"Plan {path}: row {name!r} cannot name a folder; use up to 64 letters, digits, -, + or _, and quote "
                f"what YAML takes for a number."
            )


def _refuse_own_keys(names: Sequence[str], origin: str) -> None:
    own = [name for name in names if name in OWN_KEYS]
    if own:
        raise UsageError(
            f"{own[0]} in {origin}: this command sets {', '.join(OWN_KEYS)} for each run itself; leave it out, and use "
            f"--output, or seeds in the plan."
        )


class _RowBuilder:
    """Makes rows from the plan's configuration file and the KEY VALUE words of the command line."""

    def __init__(self, path: Path, cfg_file: Path, overrides: tuple[str, ...]) -> None:
        self.path, self.cfg_file, self.overrides = path, cfg_file, overrides
        self.common = [name for name, _ in parse_overrides(overrides)]
        _refuse_own_keys(self.common, "the command line")
        load_config(cfg_file, overrides)  # a wrong word for all rows is not blamed on the first row

    def build(self, name: str, content: dict[Any, Any], kind: str) -> PlanRow:
        """Return a row, checked as a configuration is; a relation makes another ``kind`` of a preset."""
        path, origin = self.path, f"row {name} of {self.path}"
        relations = [key for key in RELATIONS if key in content]
        if len(relations) > 1 or (relations and kind != "preset"):
            which = f"is the {kind}" if kind != "preset" else "has control_of and neighbour_of"
            raise UsageError(
                f"Plan {path}: row {name} {which}; a row is one of them or neither. Remove {relations[-1]}."
            )
        pairs = list(_flatten({key: value for key, value in content.items() if key not in RELATIONS}))
        names = [key for key, _ in pairs]
        _refuse_own_keys(names, origin)
        twice = next((key for key in names if names.count(key) > 1), None)
        if twice:
            raise UsageError(f"{twice} stands twice in {origin}, as a section's key and by its full name; remove one.")
        both = next((key for key in names if key in self.common), None)
        if both:
            raise UsageError(
                f"{both} on the command line, where it holds for all rows, is what row {name} of {path} differs in; "
                f"remove it, or change the plan."
            )
        of = content[relations[0]] if relations else []
        kind = RELATIONS[relations[0]] if relations else kind
        return PlanRow(name, kind, tuple(of if isinstance(of, list) else [of]), self._build_cfg(pairs, origin))

    def _build_cfg(self, pairs: list[tuple[str, Any]], origin: str) -> CfgNode:
        try:
            cfg = load_config(self.cfg_file, self.overrides, values=pairs, origin=origin)
        except UsageError as error:
            said = str(error)
            raise UsageError(said if origin in said else f"In {origin}: {said}") from error
        if cfg.MODE != "train":
            raise UsageError(
                f"{self.cfg_file} has MODE {cfg.MODE}; a plan takes a configuration with MODE train. Give another."
            )
        if cfg.TRAIN.RESUME != "auto":
            raise UsageError(
                f"TRAIN.RESUME {cfg.TRAIN.RESUME} in {origin}: this command continues runs that were interrupted; "
                f"leave it at auto."
            )
        return cfg


def _flatten(content: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (key, value) with full names, also of a key that is given both in its section and by its full name."""
    for key, value in content.items():
        if isinstance(value, dict) and f"{prefix}{key}" not in BY_NAME:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _build_start(builder: _RowBuilder, content: Any, rows: Sequence[PlanRow]) -> PlanRow:
    """Return the run whose weights the rows start from; the rows must name no others."""
    path = builder.path
    if not isinstance(content, dict):
        raise UsageError(f"Plan {path}: start is {content!r}; give KEY: VALUE pairs as for a row, or leave it out.")
    for row in rows:
        model = row.cfg.MODEL
        if row.name == START:
            raise UsageError(f"Plan {path}: a row is named {START}, as the folder of the run before them; rename it.")
        if model.INIT:
            raise UsageError(
                f"Plan {path}: row {row.name} has a MODEL.INIT, and start gives all rows the weights that they start "
                f"from; remove one of them."
            )
        if model.INIT_DEPTH is not None:
            raise UsageError(
                f"Plan {path}: row {row.name} has MODEL.INIT_DEPTH {model.INIT_DEPTH}, and would take the start's "
                f"weights up to there only; set it to null in {builder.cfg_file}."
            )
    return builder.build(START, content, START)


def _check_relations(path: Path, twin: Any, rows: Sequence[PlanRow]) -> None:
    names, presets = [row.name for row in rows], [row.name for row in rows if row.kind == "preset"]
    if twin not in names:
        raise UsageError(
            f"Plan {path}: twin {twin!r} is no row; name one of {', '.join(names) or 'none: add rows'}."
            + nearest(str(twin), names)
        )
    for row in rows:
        strange = [of for of in row.of if of not in presets] or ([] if row.of else ["nothing"])
        if row.kind in RELATIONS.values() and strange:
            raise UsageError(
                f"Plan {path}: row {row.name} is a {row.kind} of {strange[0]!r}, which is no row that is judged; name "
                f"one or several of {', '.join(presets) or 'none: add one'}.{nearest(str(strange[0]), presets)}"
            )


def _build_comparisons(path: Path, rows: Sequence[PlanRow]) -> None:
    """Raise UsageError where figures of rows could not be compared, or two rows are the same."""
    baseline = next(row for row in rows if row.kind == "twin")
    for i, row in enumerate(rows):
        other = next((key for key in COMMON_KEYS if value_of(row.cfg, key) != value_of(baseline.cfg, key)), None)
        if other is not None:
            raise UsageError(
                f"Plan {path}: row {row.name} has {other} {value_of(row.cfg, other)!r} and {baseline.name} "
                f"{value_of(baseline.cfg, other)!r}, so that figures could not be compared; give all rows the same."
            )
        same = next((earlier for earlier in rows[:i] if earlier.cfg == row.cfg), None)
        if same is not None:
            raise UsageError(
                f"Plan {path}: rows {same.name} and {row.name} have the same settings, so one of them would be trained "
                f"twice; remove one, or correct what it differs in."
            )


def build_class_count(row: PlanRow) -> int | None:
    """Return how many classes a row's data have; None where there are no data yet."""
    try:
        return len(build_lists(row.cfg).classes)
    except UsageError:
        return row.cfg.MODEL.NUM_CLASSES


def build_row_cost(row: PlanRow, classes: int | None = None) -> RowCost:
    """Build a row's model and count its cost. Raises UsageError, naming the row, where it cannot be built.

    ``classes`` are by default those of the data, or ASSUMED_CLASSES.
    """
    try:
        model = build_model(row.cfg, classes or build_class_count(row) or ASSUMED_CLASSES)
        cost = measure_cost(model, (row.cfg.DATA.FRAMES, row.cfg.DATA.SIZE, row.cfg.DATA.SIZE))
    except UsageError as error:
        raise UsageError(f"Row {row.name}: {error}") from error
    with torch.no_grad():
        _, seen = model.eval()(torch.zeros(1, 3, *cost.input_size), return_intermediates=True)
    stages = [stage for stage in seen.tokens if stage != "final"]  # final may be the mean of all tokens
    return RowCost(cost.parameters, cost.gflops, seen.tokens[stages[-1]].shape[1])
