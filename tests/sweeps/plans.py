"""Small plans, and jobs that leave the files of a finished run without training one."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from fvcore.common.config import CfgNode

from stvit_video.models.cost import measure_cost
from stvit_video.models.zoo import build_model
from stvit_video.runs.folder import RunFolder, build_run_folder
from stvit_video.slurm.jobs import SETTLE_S, ClusterJob
from stvit_video.sweeps import sweep
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


@contextmanager
def stub_jobs(failing: Sequence[str] = ()) -> Iterator[list[CfgNode]]:
    """Have jobs end at once, and leave the files of a finished run; those of rows in ``failing`` an error in their log.

    Yields the configurations that were submitted.
    """
    submitted: list[CfgNode] = []

    def submit(folders: list[RunFolder], request: object, cluster: str, logs: Path) -> list[ClusterJob]:
        job = ClusterJob(folders[0].path, cluster, f"stub{len(submitted)}", logs, "key")
        cfg = CfgNode(yaml.safe_load((job.path / "config.yaml").read_text()))
        submitted.append(cfg)
        if job.run.parent.name in failing:
            job.log().write_text("begins\nerror: no_such_weight\n")
            job.add_failure(0, 0, "here", 2, "")
            return [job]
        job.log().write_text("done\n")
        job.add_event(0, "done")
        run = build_run_folder(cfg)
        cost = measure_cost(build_model(cfg, 8), (cfg.DATA.FRAMES, cfg.DATA.SIZE, cfg.DATA.SIZE))
        figures = {"top1": 50.0 + 7 * cfg.SEED + cost.gflops, "gflops": cost.gflops, "parameters": cost.parameters}
        run.results.write_text(json.dumps({**figures, "coverage": 1.0}))
        run.weights.touch()
        return [job]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "submit", submit)
        patch.setitem(SETTLE_S, "FAILED", 0.0)
        yield submitted
