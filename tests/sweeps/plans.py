"""Small plans, and jobs that leave the files of a finished run without training one."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from fvcore.common.config import CfgNode

from stvit_video.models.cost import measure_cost
from stvit_video.models.zoo import build_model
from stvit_video.runs.folder import build_run_folder
from stvit_video.sweeps.runs import JobRunner
from tests.conftest import REPOSITORY

ROWS = {
    "full": {"MODEL.NAME": "vit_sample_patch8"},
    "paper": {"MODEL.PRESET": "paper"},
    "paper-fewer-frames": {"MODEL": {"NAME": "vit_sample_patch8"}, "DATA.FRAMES": 4, "control_of": "paper"},
}
PLAN = {"cfg": "../base.yaml", "seeds": [0, 1], "twin": "full", "rows": ROWS}


def write_plan(folder: Path, root: Path, **changes: object) -> Path:
    """Write PLAN with changes, and the configuration that it starts from: two steps on the set in ``root``."""
    base = {
        "_BASE_": str(REPOSITORY / "configs" / "sample_stvit.yaml"),
        "DATA": {"ROOT": str(root), "GENERATE": "", "WORKERS": 0, "VAL_LIST": ""},
        "TRAIN": {"MAX_STEPS": 2, "BATCH_SIZE": 8},
        "CHECKPOINT": {"EVERY_STEPS": 1},
        "DEVICE": "cpu",
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    (folder / "plans").mkdir(exist_ok=True)
    plan = folder / "plans" / "small.yaml"
    plan.write_text(yaml.safe_dump({**PLAN, **changes}, sort_keys=False))
    return plan


@dataclass
class StubJob:
    log: Path

    def is_active(self) -> bool:
        return False

    def cancel(self) -> None:
        raise AssertionError("there is nothing to cancel")

    def describe_failure(self) -> str:
        return ""


@dataclass
class StubJobs:
    """Submits jobs that end at once; those of rows in ``failing`` with an error in their log."""

    failing: Sequence[str] = ()
    submitted: list[CfgNode] = field(default_factory=list)

    def runner(self, jobs: int = 1) -> JobRunner:
        return JobRunner(self.submit, lambda path: None, jobs, 0.0)

    def submit(self, cfg: CfgNode, sharing: int) -> StubJob:
        self.submitted.append(cfg)
        folder = build_run_folder(cfg)
        folder.claim()
        log = folder.path.parent.parent / f"{len(self.submitted)}.log"
        if folder.path.parent.name in self.failing:
            log.write_text("begins\nerror: no_such_weight\n")
            return StubJob(log)
        log.write_text("done\n")
        cost = measure_cost(build_model(cfg, 8), (cfg.DATA.FRAMES, cfg.DATA.SIZE, cfg.DATA.SIZE))
        figures = {"top1": 50.0 + 7 * cfg.SEED + cost.gflops, "gflops": cost.gflops, "parameters": cost.parameters}
        folder.results.write_text(json.dumps({**figures, "coverage": 1.0}))
        folder.weights.touch()
        return StubJob(log)
