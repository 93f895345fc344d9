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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from fvcore.common.config import CfgNode

from stvit_video.benchmarks.peers import CLASSES
from stvit_video.common.errors import UsageError, nearest
from stvit_video.config.load import load_config, parse_overrides
from stvit_video.config.schema import flatten
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
    try:
        content = _read(path)
        build = partial(_build_row, path.parent / content["cfg"], overrides)
        _refuse_own_keys([name for name, _ in parse_overrides(overrides)], "the command line")
        load_config(path.parent / content["cfg"], overrides)  # a wrong word for all rows is not blamed on the first row
        rows = [
            build(name, row or {}, "twin" if name == content["twin"] else "preset")
            for name, row in content["rows"].items()
        ]
        _build_checks(content["twin"], rows, START in content)
        start = build(START, content[START], START) if START in content else None
    except UsageError as error:
        raise UsageError(f"Plan {path}: {error}") from error
    return Plan(path, tuple(content["seeds"]), tuple(rows), start)


class _Loader(yaml.SafeLoader):
    """A loader that refuses a key given twice, where YAML would keep the last one only."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise yaml.YAMLError(f"{twice} is given twice")
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict[Any, Any]:
    """Return the content of a plan; its rows are mappings, not yet checked."""
    try:
        content = _Loader(path.read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise UsageError(f"it cannot be read ({error.strerror}); give a .yaml file.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date
        raise UsageError(f"it is not YAML that can be used ({' '.join(str(error).split())}); correct it.") from error
    content = content if isinstance(content, dict) else {}
    if unknown := [str(key) for key in content if key not in PLAN_KEYS]:
        parts = ", ".join(PLAN_KEYS)
        raise UsageError(f"{unknown[0]} is no part of a plan; those are {parts}.{nearest(unknown[0], list(PLAN_KEYS))}")
    if missing := [key for key in NEEDED_KEYS if key not in content]:
        raise UsageError(f"it has no {', '.join(missing)}; it needs {', '.join(NEEDED_KEYS)}. Add the rest.")
    seeds, rows = content["seeds"], content["rows"]
    if not isinstance(content["cfg"], str):
        raise UsageError(f"cfg is {content['cfg']!r}; give a configuration file, from the plan's folder.")
    whole = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds is {seeds!r}; give different whole numbers from 0 on, as [0, 1].")
    if not isinstance(rows, dict) or not all(row is None or isinstance(row, dict) for row in rows.values()):
        raise UsageError("rows is not a mapping of mappings; write `NAME: {KEY: VALUE}` for each row.")
    for name in rows:
        if not isinstance(name, str) or not ROW_NAME.fullmatch(name):
            raise UsageError(
                f"row {name!r} cannot name a folder; use up to 64 letters, digits, -, + or _, and quote what YAML "
                f"takes for a number."
            )
    if START in content and not isinstance(content[START], dict):
        raise UsageError(f"start is {content[START]!r}; give KEY: VALUE pairs as for a row, or leave it out.")
    return content


def _refuse_own_keys(names: Sequence[str], origin: str) -> None:
    for name in names:
        if name in OWN_KEYS:
            raise UsageError(
                f"{name} in {origin}: this command sets {', '.join(OWN_KEYS)} for each run itself; leave it out, and "
                f"use --output, or seeds in the plan."
            )


def _build_row(cfg_file: Path, overrides: Sequence[str], name: str, content: dict[Any, Any], kind: str) -> PlanRow:
    """Return a row, checked as a configuration is; a relation makes another ``kind`` of a preset."""
    origin = f"row {name} of the plan"
    relations = [key for key in RELATIONS if key in content]
    if len(relations) > 1 or (relations and kind != "preset"):
        which = f"is the {kind}" if kind != "preset" else "has control_of and neighbour_of"
        raise UsageError(f"row {name} {which}; a row is one of them or neither. Remove {relations[-1]}.")
    pairs: list[tuple[str, Any]] = []
    for key, value in content.items():
        if key not in RELATIONS:  # each entry by itself: a key may stand in its section and by its full name
            pairs += (flatten({key: value}) or {str(key): value}).items()  # an empty mapping is refused, not dropped
    names, common = [key for key, _ in pairs], [key for key, _ in parse_overrides(overrides)]
    _refuse_own_keys(names, origin)
    for key in names:
        if names.count(key) > 1:
            raise UsageError(f"{key} stands twice in {origin}, as a section's key and by its full name; remove one.")
        if key in common:
            raise UsageError(
                f"{key} on the command line, where it holds for all rows, is what row {name} differs in; remove it, or "
                f"change the plan."
            )
    try:
        cfg = load_config(cfg_file, overrides, values=pairs, origin=origin)
    except UsageError as error:
        raise UsageError(str(error) if origin in str(error) else f"In {origin}: {error}") from error
    if cfg.MODE != "train":
        raise UsageError(f"{cfg_file} has MODE {cfg.MODE}; give a configuration with MODE train.")
    if cfg.TRAIN.RESUME != "auto":
        raise UsageError(
            f"TRAIN.RESUME {cfg.TRAIN.RESUME} in {origin}: this command continues runs that were interrupted; leave it "
            f"at auto."
        )
    of = content[relations[0]] if relations else []
    kind = RELATIONS[relations[0]] if relations else kind
    return PlanRow(name, kind, tuple(of if isinstance(of, list) else [of]), cfg)


def _build_checks(twin: Any, rows: Sequence[PlanRow], has_start: bool) -> None:
    """Raise UsageError where rows could not be compared, are the same, or would not begin as the plan says."""
    names, presets = [row.name for row in rows], [row.name for row in rows if row.kind == "preset"]
    if twin not in names:
        known = ", ".join(names) or "none: add rows"
        raise UsageError(f"twin {twin!r} is no row; name one of {known}.{nearest(str(twin), names)}")
    baseline = rows[names.index(twin)]
    for i, row in enumerate(rows):
        strange = [of for of in row.of if of not in presets] or ([] if row.of else ["nothing"])
        if row.kind in RELATIONS.values() and strange:
            raise UsageError(
                f"row {row.name} is a {row.kind} of {strange[0]!r}, which is no row that is judged; name one or "
                f"several of {', '.join(presets) or 'none: add one'}.{nearest(str(strange[0]), presets)}"
            )
        for key in COMMON_KEYS:
            value, expected = (flatten(cfg)[key] for cfg in (row.cfg, baseline.cfg))
            if value != expected:
                raise UsageError(
                    f"row {row.name} has {key} {value!r} and {twin} {expected!r}, so that figures could not be "
                    f"compared; give all rows the same."
                )
        for earlier in rows[:i]:
            if earlier.cfg == row.cfg:
                raise UsageError(
                    f"rows {earlier.name} and {row.name} have the same settings, so one of them would be trained "
                    f"twice; remove one, or correct what it differs in."
                )
        if not has_start:
            continue
        if row.name == START:
            raise UsageError(f"a row is named {START}, as the folder of the run before them; rename it.")
        if row.cfg.MODEL.INIT:
            raise UsageError(f"row {row.name} has a MODEL.INIT, and start gives all rows their weights; remove one.")
        if row.cfg.MODEL.INIT_DEPTH is not None:
            raise UsageError(
                f"row {row.name} has MODEL.INIT_DEPTH {row.cfg.MODEL.INIT_DEPTH}, and would take the start's weights "
                f"up to there only; set it to null in the configuration."
            )


def build_class_count(row: PlanRow) -> int | None:
    """Return how many classes a row's data have; None where there are no data yet."""
    try:
        return len(build_lists(row.cfg).classes)
    except UsageError:
        return row.cfg.MODEL.NUM_CLASSES


def build_row_cost(row: PlanRow) -> RowCost:
    """Build a row's model and count its cost. Raises UsageError, naming the row, where it cannot be built."""
    try:
        model = build_model(row.cfg, build_class_count(row) or CLASSES)
        cost = measure_cost(model, (row.cfg.DATA.FRAMES, row.cfg.DATA.SIZE, row.cfg.DATA.SIZE))
    except UsageError as error:
        raise UsageError(f"Row {row.name}: {error}") from error
    with torch.no_grad():
        _, seen = model.eval()(torch.zeros(1, 3, *cost.input_size), return_intermediates=True)
    stages = [stage for stage in seen.tokens if stage != "final"]  # final may be the mean of all tokens
    return RowCost(cost.parameters, cost.gflops, seen.tokens[stages[-1]].shape[1])
