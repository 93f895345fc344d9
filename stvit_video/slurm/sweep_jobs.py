"""The runs of a sweep (``stvit_video.tradeoff``) as jobs, on this machine or on a SLURM cluster."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from fvcore.common.config import CfgNode

from stvit_video.common.errors import UsageError
from stvit_video.slurm.jobs import ENDED, Follower, read_job
from stvit_video.slurm.request import JobRequest, check_cluster, open_job_folders, read_profile, submit
from stvit_video.sweeps.runs import JobRunner

NO_LIMIT = "365-00"  # days; runs on this machine have no time limit
POLL_S = {"local": 0.2, "slurm": 5.0}


class SweepJob(Follower):
    """The job of a run. Nothing is printed while it is followed: the sweep prints what its runs do."""

    @property
    def log(self) -> Path:
        return self.job.log()

    def is_active(self) -> bool:
        if self.job.cluster == "local":  # seen twice: a process that starts has no command line for a moment
            before, self.ended = self.ended, self.job.state()[0] in ENDED
            return not (before and self.ended)
        self.update()  # SLURM may queue a job again after it has reported an end
        return not self.ended

    def cancel(self) -> None:
        try:
            self.job.cancel()
        except UsageError as error:  # the job may have ended meanwhile
            print(f"warning: {error}", file=sys.stderr, flush=True)

    def describe_failure(self) -> str:
        """Return why the job ended without results; empty where its log says it."""
        if failure := self.job.first_failure():
            number = failure["code"] - 128
            killed = f"ended by {signal.Signals(number).name}" if number in signal.valid_signals() else ""
            return str(failure["problem"] or killed)
        if self.job.events("stopped"):
            return "stopped by a signal; the same command continues"
        return f"its job {self.job.id} ended as {self.job.state()[0]}"

    def report(self, text: str) -> None:
        pass


def build_job_runner(cluster: str, logs: Path, jobs: int, gpus: int | None, profile_file: Path | None) -> JobRunner:
    """Return what submits the runs of a sweep, ``jobs`` at a time, each with ``gpus`` GPUs.

    By default that is one GPU, or none where DEVICE is cpu or, on this machine, where there is no GPU. Raises
    UsageError where the cluster cannot be used from here.
    """
    profile = read_profile(profile_file, time=NO_LIMIT if cluster == "local" else None)
    logs = logs.absolute()

    def build_request(cfg: CfgNode) -> JobRequest:
        usable = cfg.DEVICE != "cpu" and (cluster == "slurm" or torch.cuda.is_available())
        count = int(usable) if gpus is None else gpus
        return JobRequest(
            profile=profile,
            nodes=1,
            gpus_per_node=count,
            tasks_per_node=max(1, count),
            cpus_per_task=profile.cpus_per_task or cfg.DATA.WORKERS + 1,
            name="stvit-tradeoff",
        )

    def build_job(cfg: CfgNode, sharing: int) -> SweepJob:
        request = build_request(cfg)
        folders = open_job_folders([cfg], request, cluster, logs)
        with _share_of_cores(sharing if cluster == "local" else 0):
            return SweepJob(submit(folders, request, cluster, logs)[0])

    def find(run: Path) -> SweepJob | None:
        job = read_job(run.absolute())
        return SweepJob(job) if job is not None and job.state()[0] not in ENDED else None

    if cluster == "slurm":
        check_cluster(cluster, 1, JobRequest(profile, 1, 0, 1, 1, "stvit-tradeoff"))
    return JobRunner(build_job, find, jobs, POLL_S[cluster])


@contextmanager
def _share_of_cores(sharing: int) -> Iterator[None]:
    """Let processes that are started meanwhile use the cores of one of ``sharing`` runs; 0 changes nothing."""
    before = os.environ.get("OMP_NUM_THREADS")
    if sharing:
        os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // sharing))
    try:
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS", None)
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
