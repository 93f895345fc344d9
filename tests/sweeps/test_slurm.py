"""A sweep on a real SLURM of two virtual nodes."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.slurm.cluster import Cluster, wait_until, why_not
from tests.sweeps.plans import write_plan


@pytest.mark.slurm
@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_killed_sweep_finds_its_jobs_again(small_set: Path, tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix="stvit-sweep-", dir="/tmp"))  # short: SLURM's sockets lie in it
    cluster, output = Cluster(folder), tmp_path / "out"
    rows = {"full": {"MODEL.NAME": "vit_sample_patch8"}, "paper": {"MODEL.PRESET": "paper"}}
    plan = write_plan(tmp_path, small_set, seeds=[0], rows=rows)
    profile = REPOSITORY / "slurm" / "profiles" / "local.yaml"
    words = ["--plan", str(plan), "--output", str(output), "--rounds", "0", "--profile", str(profile)]
    command = [sys.executable, "-m", "stvit_video.tradeoff", *words, "--cluster", "slurm"]
    up = cluster.script("up")
    try:
        if up.returncode == 2:
            pytest.skip(up.stderr.strip())
        assert up.returncode == 0, up.stderr
        first = subprocess.Popen(command, env=cluster.env, stdout=subprocess.DEVNULL)
        wait_until(lambda: all((output / row / "seed0" / "slurm" / "job.json").exists() for row in rows), "two jobs")
        first.kill()
        first.wait()
        submitted = {row: json.loads((output / row / "seed0" / "slurm" / "job.json").read_text()) for row in rows}
        found = subprocess.run(command, env=cluster.env, capture_output=True, text=True, timeout=240)
        assert found.returncode == 0, found
        assert found.stdout.count("is still running") == 2 or "2 of 2 runs are finished" in found.stdout
        for row, job in submitted.items():
            assert job["cluster"] == "slurm"
            assert json.loads((output / row / "seed0" / "slurm" / "job.json").read_text()) == job
            assert (output / row / "seed0.txt").read_text()
    finally:
        cluster.script("down")
        shutil.rmtree(folder, ignore_errors=True)
