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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from stvit_video.common.errors import UsageError, nearest
from stvit_video.config.load import load_config, parse_overrides, read_yaml
from stvit_video.config.schema import flatten

NEEDED_KEYS = ("cfg", "seeds", "twin", "rows")
PLAN_KEYS = [*NEEDED_KEYS, "start"]
RELATIONS = {"control_of": "control", "neighbour_of": "neighbour"}
OWN_VALUES = {"MODE": "train", "OVERWRITE": False, "TRAIN.RESUME": "auto"}  # set by this command for each run
OWN_KEYS = (*OWN_VALUES, "OUTPUT_DIR", "SEED")
# Accuracies and speeds can only be compared where these are the same: all rows must have the baseline's.
COMMON_KEYS = (
    "DEVICE", "PRECISION", "COMPILE", "DATA.ROOT", "DATA.GENERATE", "DATA.GENERATE_CLIPS", "DATA.SPLIT",
    "DATA.TEST_LIST", "DATA.CLASSES", "TEST.CLIPS", "TEST.CROPS",
)  # fmt: skip
ROW_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]{0,63}")  # valid as a folder and as a cell of any table


@dataclass(eq=False)  # hashed by identity: a configuration has no hash
class SweepRow:
    """One model of the table: what the plan says of it, and its figures as far as they are known."""

    name: str
    kind: str  # start, twin (the dense baseline), preset, control or neighbour
    of: tuple[str, ...]  # the presets that a control or a neighbour belongs to
    accuracy: dict[int, float | None]  # percent by seed, None where that run is not finished
    cfg: CfgNode = field(default_factory=CfgNode)
    classes: int | None = None  # None where there are no data yet
    parameters: int = 0
    gflops: float = 0.0  # multiply-adds (1e9) per clip
    tokens: int = 0  # after their reduction, if there is one
    rate: float | None = None  # clips per second, None where it was not measured
    coverage: dict[int, float] = field(default_factory=dict)  # share of the test videos that could be read, by seed
    failures: dict[int, str] = field(default_factory=dict)  # why a run failed, by seed
    accuracy_key: str = "top1"  # of results.json

    @property
    def found(self) -> list[float]:
        return [value for value in self.accuracy.values() if value is not None]

    @property
    def mean(self) -> float | None:
        return sum(self.found) / len(self.found) if self.found else None

    @property
    def spread(self) -> float | None:
        """From the lowest to the highest seed; None for a single one."""
        return max(self.found) - min(self.found) if len(self.found) > 1 else None

    @property
    def seeds(self) -> str:
        """Which seeds are in the mean; empty where all are, and there are several."""
        if len(self.found) == 1:
            return "one seed only"
        return "" if len(self.found) == len(self.accuracy) else f"{len(self.found)} of {len(self.accuracy)} seeds"

    def describe_kind(self) -> str:
        return f"{self.kind} of {', '.join(self.of)}" if self.of else self.kind


@dataclass(frozen=True)
class Plan:
    """A plan that was read and checked: its rows, the dense baseline among them, and what is trained before them."""

    rows: list[SweepRow]
    twin: SweepRow
    start: SweepRow | None = None


def open_plan(path: Path, overrides: Sequence[str] = ()) -> Plan:
    """Read and check a plan, ``overrides`` being for all rows; UsageError, naming the row, for what could stop it."""
    try:
        content = _read(path)
        file = path.parent / str(content["cfg"])
        twin = content["twin"]
        names = list(content["rows"])
        if twin not in names:
            known = ", ".join(names) or "none: add rows"
            raise UsageError(f"twin {twin!r} is no row; name one of {known}.{nearest(str(twin), names)}")
        load_config(file, overrides)  # a wrong word for all rows is not blamed on the first row
        build = partial(_build_row, file, overrides, content["seeds"])
        rows = [build(name, row or {}, "twin" if name == twin else "preset") for name, row in content["rows"].items()]
        start = build("start", content["start"], "start") if "start" in content else None
        plan = Plan(rows, rows[names.index(twin)], start)
        _build_checks(plan)
    except UsageError as error:
        said = str(error)  # what is wrong with the file itself begins with its name
        raise UsageError(f"Plan {said}" if said.startswith(f"{path} ") else f"Plan {path}: {said}") from error
    return plan


def _read(path: Path) -> dict[Any, Any]:
    """Return the content of a plan; its rows are mappings, not yet checked."""
    content = read_yaml(path, folders=["configs/tradeoff"])
    if unknown := [str(key) for key in content if key not in PLAN_KEYS]:
        known = ", ".join(PLAN_KEYS)
        raise UsageError(f"{unknown[0]} is no part of a plan; those are {known}.{nearest(unknown[0], PLAN_KEYS)}")
    if missing := [key for key in NEEDED_KEYS if key not in content]:
        raise UsageError(f"it has no {', '.join(missing)}; it needs {', '.join(NEEDED_KEYS)}. Add the rest.")
    seeds = content["seeds"]
    rows = content["rows"]
    start = content.get("start", {})
    whole = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds is {seeds!r}; give different whole numbers from 0 on, as [0, 1].")
    if not isinstance(rows, dict) or not all(isinstance(row, dict | None) for row in rows.values()):
        raise UsageError("rows is not a mapping of mappings; write `NAME: {KEY: VALUE}` for each row.")
    if wrong := [name for name in rows if not isinstance(name, str) or not ROW_NAME.fullmatch(name)]:
        allowed = "use up to 64 letters, digits, -, + or _, and quote what YAML takes for a number"
        raise UsageError(f"row {wrong[0]!r} cannot name a folder; {allowed}.")
    if not isinstance(start, dict):
        raise UsageError(f"start is {start!r}; give KEY: VALUE pairs as for a row, or leave it out.")
    return content


def _build_row(
    file: Path, overrides: Sequence[str], seeds: Sequence[int], name: str, content: dict[Any, Any], kind: str
) -> SweepRow:
    """Return a row, checked as a configuration is; a relation makes another ``kind`` of a preset."""
    origin = f"row {name} of the plan"
    relations = [key for key in RELATIONS if key in content]
    if len(relations) > 1 or (relations and kind != "preset"):
        which = f"is the {kind}" if kind != "preset" else "has control_of and neighbour_of"
        raise UsageError(f"row {name} {which}; a row is one of them or neither. Remove {relations[-1]}.")
    # Each entry by itself: a key may stand in its section and by its full name.
    sections = [flatten({key: value}) or {str(key): value} for key, value in content.items() if key not in RELATIONS]
    pairs = [pair for section in sections for pair in section.items()]
    names = [key for key, _ in pairs]
    common = [key for key, _ in parse_overrides(overrides)]
    for key in [*common, *names]:
        if key in OWN_KEYS:
            own = ", ".join(OWN_KEYS)
            place = origin if key in names else "the command line"
            raise UsageError(f"{key} in {place}: the command sets {own}; leave it out, or use --output or seeds.")
        if names.count(key) > 1:
            raise UsageError(f"{key} stands twice in {origin}, in its section and by its full name; remove one.")
        if key in common and key in names:
            raise UsageError(f"{key} on the command line is for all rows, but row {name} differs in it; remove one.")
    try:
        cfg = load_config(file, overrides, values=[*OWN_VALUES.items(), *pairs], origin=origin)
    except UsageError as error:
        raise UsageError(str(error) if origin in str(error) else f"In {origin}: {error}") from error
    of = content[relations[0]] if relations else []
    kind = RELATIONS[relations[0]] if relations else kind
    return SweepRow(name, kind, tuple(of if isinstance(of, list) else [of]), dict.fromkeys(seeds), cfg)


def _build_checks(plan: Plan) -> None:
    """Raise UsageError where rows could not be compared, are the same, or would not begin as the plan says."""
    presets = [row.name for row in plan.rows if row.kind == "preset"]
    start = plan.start
    for i, row in enumerate(plan.rows):
        if row.kind in RELATIONS.values() and (wrong := [of for of in row.of or ["nothing"] if of not in presets]):
            known = f"name some of {', '.join(presets) or 'none: add one'}.{nearest(str(wrong[0]), presets)}"
            raise UsageError(f"row {row.name} is a {row.kind} of {wrong[0]!r}, which is no row that is judged; {known}")
        for key in COMMON_KEYS:
            value, expected = (flatten(cfg)[key] for cfg in (row.cfg, plan.twin.cfg))
            if value != expected:
                raise UsageError(
                    f"row {row.name} has {key} {value!r} and {plan.twin.name} {expected!r}; give all rows the same."
                )
        if same := [earlier.name for earlier in plan.rows[:i] if earlier.cfg == row.cfg]:
            raise UsageError(f"rows {same[0]} and {row.name} have the same settings; remove one, or correct it.")
        if start and row.name == start.name:
            raise UsageError("a row is named start, as the folder of the run before them; rename it.")
        if start and row.cfg.MODEL.INIT:
            raise UsageError(f"row {row.name} has a MODEL.INIT, and start gives all rows their weights; remove one.")
        if start and (depth := row.cfg.MODEL.INIT_DEPTH) is not None:
            whole = "would take the start's weights up to there only; set it to null in the configuration"
            raise UsageError(f"row {row.name} has MODEL.INIT_DEPTH {depth}, and {whole}.")
