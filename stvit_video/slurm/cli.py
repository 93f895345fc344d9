"""The command ``python slurm/submit.py``."""

import itertools
import os
import shutil
import socket
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fvcore.common.config import CfgNode

import stvit_video
from stvit_video.common.cli import Parser, run_command
from stvit_video.common.errors import UsageError, nearest
from stvit_video.common.files import write_json
from stvit_video.config.load import load_config
from stvit_video.slurm.follow import describe_status, follow, summarise, tail
from stvit_video.slurm.jobs import (
    ClusterJob,
    cancel,
    expand_grid,
    find_jobs,
    open_job_folders,
    resume,
    submit,
)
from stvit_video.slurm.request import JobRequest, read_profile

VERBS = {"status": "say how it is", "logs": "print its log", "cancel": "end it", "resume": "submit it again"}
FORM = (
    "--cfg FILE --nodes N --gpus-per-node G [--profile FILE] [--wait] [KEY VALUE ...]; "
    "or status, logs, cancel, resume RUN"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Submit runs, or act on submitted ones. Exit codes: 0 done; 1 a job failed; 2 wrong use; 130 Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = run_verb if given and given[0] in VERBS else submit_runs
    return run_command(command, given, stopped="no longer following; the job goes on, if it was submitted")


def submit_runs(arguments: Sequence[str] | None) -> int:
    """Submit the runs of a command line."""
    options = read_options(arguments or [])
    configs, base = build_configs(options)
    request, logs = build_request(options, configs), base / "slurm"
    if options.dry_run:
        print(request.sbatch_text(logs, len(configs)))
        print("\n".join(["runs:", *(f"  {cfg.OUTPUT_DIR}" for cfg in configs), request.describe(len(configs))]))
        return 0
    from stvit_video.runs.folder import environment

    git = environment()["git"]
    about = {"command": sys.orig_argv, "submitted": time.time(), "host": socket.gethostname(), "git": git}
    folders = open_job_folders(configs, request, options.cluster, logs)
    if options.copy_source:  # later changes do not affect waiting jobs
        package = Path(stvit_video.__file__).parent
        copy = next(path for number in itertools.count(1) if not (path := logs / f"source{number}").exists())
        shutil.copytree(package, copy / package.name, ignore=shutil.ignore_patterns("__pycache__"))
        request = replace(request, source=str(copy))
    jobs = submit(folders, request, options.cluster, logs, about)
    if len(jobs) > 1:
        write_json(logs / "array.json", [str(job.run) for job in jobs])
    print(request.describe(len(jobs)))
    print_jobs(jobs)
    print(f"to look at: python slurm/submit.py {'|'.join(VERBS)} {base}", flush=True)
    return wait(jobs, base) if options.wait or options.cluster == "debug" else 0


def read_options(arguments: Sequence[str]) -> Namespace:
    """Parse the command line of a submission."""
    parser = Parser(prog="python slurm/submit.py", form=FORM, description=f"Submit runs; or {', '.join(VERBS)} RUN.")
    help_cfg = "configuration; several: an array"
    parser.add_argument("--cfg", nargs="+", action="extend", dest="files", metavar="FILE", help=help_cfg)
    parser.add_argument("--nodes", type=int, default=1, help="machines (default: %(default)s)")
    parser.add_argument("--gpus-per-node", type=int, metavar="G", help="GPUs of each, one process per GPU; 0: none")
    parser.add_argument("--tasks-per-node", type=int, metavar="T", help="processes per machine where there are no GPUs")
    parser.add_argument("--cpus-per-task", type=int, metavar="C", help="default: the profile's, else DATA.WORKERS + 1")
    parser.add_argument("--profile", metavar="FILE", help="what the site needs: slurm/profiles/NAME.yaml")
    parser.add_argument("--partition", metavar="NAME", help="instead of the profile's")
    parser.add_argument("--time", metavar="TIME", help="instead of the profile's: minutes, H:MM:SS or D-HH")
    parser.add_argument("--array", metavar="GRID", help="'OPTIM.LR=1e-3,3e-4 SEED=0,1': a run each, as one array")
    parser.add_argument("--cluster", default="slurm", choices=("slurm", "local", "debug"), help="local, debug: here")
    parser.add_argument("--copy-source", action="store_true", help="run from a copy of the package as it is now")
    parser.add_argument("--wait", action="store_true", help="follow the jobs; Ctrl-C leaves them running")
    parser.add_argument("--dry-run", action="store_true", help="print the script and what it takes; submit nothing")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY VALUE", help="last one wins")
    options = parser.parse_intermixed_args(arguments)
    if not options.files:
        meant = nearest(arguments[0], list(VERBS)) if arguments else ""
        parser.error(f"--cfg FILE is missing{', or' + meant.lower() if meant else ''}")
    # argparse takes KEY VALUE words after --cfg FILE for files.
    files = [options.files[0], *itertools.takewhile(lambda word: word.endswith((".yaml", ".yml")), options.files[1:])]
    options.overrides = [*options.files[len(files) :], *options.overrides]
    options.files = files
    for name in ("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task"):
        value = getattr(options, name)
        if value is not None and value < (name == "nodes" or name.endswith("task")):
            parser.error(f"--{name.replace('_', '-')} {value} is too small")
    return options


def build_configs(options: Namespace) -> tuple[list[CfgNode], Path]:
    """Return each run's configuration, with absolute paths, and the common folder of all runs."""
    points = expand_grid(options.array) if options.array else [[]]
    by_file = len(options.files) > 1 and "OUTPUT_DIR" in str(options.overrides)
    configs = []
    for file, point in itertools.product(options.files, points):
        cfg = load_config(file, [*options.overrides, *point]).clone()
        cfg.defrost()
        parts = [Path(file).stem] if by_file else []
        parts += [",".join(point).replace("/", "_")] if point else []
        cfg.OUTPUT_DIR = os.path.abspath(Path(cfg.OUTPUT_DIR, *parts))
        cfg.DATA.ROOT = os.path.abspath(cfg.DATA.ROOT)
        if cfg.MODEL.INIT:
            cfg.MODEL.INIT = os.path.abspath(cfg.MODEL.INIT)
        configs.append(cfg)
    folders = [cfg.OUTPUT_DIR for cfg in configs]
    if len(set(folders)) < len(folders):
        raise UsageError("Several runs have the same OUTPUT_DIR; give each configuration its own, or a grid of points.")
    return configs, Path(os.path.commonpath(folders))


def build_request(options: Namespace, configs: Sequence[CfgNode]) -> JobRequest:
    """Return what each job asks for."""
    profile = read_profile(options.profile, partition=options.partition, time=options.time)
    gpus, tasks = options.gpus_per_node, options.tasks_per_node
    if gpus is None:
        raise UsageError("--gpus-per-node is missing; give the GPUs of a machine, or 0 to run on its CPUs.")
    if gpus and tasks not in (None, gpus):
        raise UsageError(
            f"--tasks-per-node {tasks} with --gpus-per-node {gpus}: each GPU has one process; omit --tasks-per-node."
        )
    return JobRequest(
        profile=profile,
        nodes=options.nodes,
        gpus_per_node=gpus,
        tasks_per_node=gpus or tasks or 1,
        cpus_per_task=options.cpus_per_task or profile.cpus_per_task or max(cfg.DATA.WORKERS for cfg in configs) + 1,
        source=str(Path(stvit_video.__file__).parent.parent),
        name=f"stvit-{Path(options.files[0]).stem}",
    )


def print_jobs(jobs: Sequence[ClusterJob]) -> None:
    """Print id, run folder and log of each job."""
    print("\n".join(f"job {job.id}: run {job.run}, log {job.log()}" for job in jobs), flush=True)


def wait(jobs: Sequence[ClusterJob], base: Path) -> int:
    """Follow jobs to their end; of several, print and write a table. Return the exit code."""
    all_done = follow(jobs)
    if len(jobs) > 1:
        print(summarise(jobs, base / "summary.csv"))
    return 0 if all_done else 1


def run_verb(arguments: Sequence[str] | None) -> int:
    """Apply one of VERBS to the jobs of a run folder."""
    verb, *rest = arguments or []
    parser = Parser(prog=f"python slurm/submit.py {verb}", form="RUN", description=VERBS[verb])
    parser.add_argument("run", type=Path, help="OUTPUT_DIR of a run, or of an array")
    if verb == "logs":
        parser.add_argument("--rank", type=int, default=0, help="of which task (default: %(default)s)")
        parser.add_argument("--lines", type=int, default=40, help="how many (default: %(default)s)")
    if verb == "resume":
        parser.add_argument("--wait", action="store_true", help="follow the jobs")
    options = parser.parse_args(rest)
    if verb == "logs" and options.lines < 1:
        parser.error(f"--lines {options.lines} shows none; give a whole number from 1 on")
    base = options.run.absolute()
    jobs = find_jobs(base)
    if verb == "resume":
        jobs = [resume(job) for job in jobs if not job.is_done()] or jobs
        print_jobs(jobs)
        return wait(jobs, base) if options.wait else 0
    for job in jobs:
        if verb == "status":
            print(describe_status(job))
        elif verb == "logs":
            log = job.log(options.rank)
            print("\n".join([f"==> {log} <==", *tail(log, options.lines)]))
        else:
            cancel(job)
            print(f"job {job.id} is being cancelled; what it has trained stays in {job.run}")
    if verb == "status" and len(jobs) > 1:
        print(summarise(jobs, base / "summary.csv"))
    return 0
