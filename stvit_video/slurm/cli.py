"""The command ``python slurm/submit.py``."""

import itertools
import json
import os
import socket
import sys
import time
from argparse import SUPPRESS, Namespace
from collections.abc import Sequence
from pathlib import Path

from fvcore.common.config import CfgNode

import stvit_video
from stvit_video.common.cli import Parser, run_command
from stvit_video.common.errors import UsageError, nearest
from stvit_video.config.load import load_config
from stvit_video.slurm.follow import describe_status, follow, print_log, summarise
from stvit_video.slurm.jobs import Job, cancel, expand_grid, find_jobs, resume, submit
from stvit_video.slurm.request import Request, read_profile

VERBS = {"status": "say how it is", "logs": "print its log", "cancel": "end it", "resume": "submit it again"}
FORM = (
    "--cfg FILE --nodes N --gpus-per-node G [--profile FILE] [--wait] [KEY VALUE ...]; "
    "or status, logs, cancel, resume RUN"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Submit, or act on what was submitted. Exit codes: 0 well; 1 a job failed; 2 wrong use; 130 Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = act if given and given[0] in VERBS else dispatch
    return run_command(command, given, stopped="no longer following; the job goes on, if it was submitted")


def dispatch(arguments: Sequence[str] | None) -> int:
    """Submit what the command line asks for."""
    options = read_options(arguments or [])
    configs, base = build_configs(options)
    request = build_request(options, configs)
    logs = base / "slurm"
    if options.dry_run:
        print(request.sbatch_text(logs, len(configs)))
        print("\n".join(["runs:", *(f"  {cfg.OUTPUT_DIR}" for cfg in configs), request.describe(len(configs))]))
        return 0
    about = {"command": sys.orig_argv, "submitted": time.time(), "host": socket.gethostname(), "git": git_state()}
    jobs = submit(configs, request, options.cluster, logs, about, copy=options.copy_source)
    if len(jobs) > 1:
        (logs / "array.json").write_text(json.dumps([str(job.run) for job in jobs], indent=2))
    tell(jobs, base, request)
    return wait(jobs, base) if options.wait or options.cluster == "debug" else 0


def read_options(arguments: Sequence[str]) -> Namespace:
    """Parse the command line of a submission."""
    parser = Parser(prog="python slurm/submit.py", form=FORM, description=f"Submit runs; or {', '.join(VERBS)} RUN.")
    parser.add_argument("--cfg", nargs="+", action="extend", metavar="FILE", help="configuration; several: an array")
    parser.add_argument("--nodes", type=int, default=1, help="machines (default: %(default)s)")
    parser.add_argument("--gpus-per-node", type=int, metavar="G", help="GPUs of each, a process each; 0: none")
    parser.add_argument("--tasks-per-node", type=int, metavar="T", help="processes a machine where there are no GPUs")
    parser.add_argument("--cpus-per-task", type=int, metavar="C", help="default: the profile's, else DATA.WORKERS + 1")
    parser.add_argument("--profile", metavar="FILE", help="what the site needs: slurm/profiles/NAME.yaml")
    parser.add_argument("--partition", metavar="NAME", help="in place of the profile's")
    parser.add_argument("--time", metavar="TIME", help="in place of the profile's: minutes, H:MM:SS or D-HH")
    parser.add_argument("--array", metavar="GRID", help="'OPTIM.LR=1e-3,3e-4 SEED=0,1': a run each, as one array")
    parser.add_argument("--cluster", default="slurm", choices=("slurm", "local", "debug"), help="local, debug: here")
    parser.add_argument("--copy-source", action="store_true", help="run from a copy of the package as it is now")
    parser.add_argument("--wait", action="store_true", help="follow the jobs; Ctrl-C leaves them running")
    parser.add_argument("--dry-run", action="store_true", help="print the script and what it takes; submit nothing")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY VALUE", help=SUPPRESS)
    options, rest = parser.parse_known_args(arguments)
    if unknown := [word for word in rest if word.startswith("--")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if not options.cfg:
        meant = nearest(arguments[0], list(VERBS)) if arguments else ""
        parser.error(f"--cfg FILE is missing{', or' + meant.lower() if meant else ''}")
    # argparse gives the KEY VALUE words that follow --cfg FILE to it, and those after a later option to nobody.
    first = [options.cfg[0], *itertools.takewhile(lambda word: word.endswith((".yaml", ".yml")), options.cfg[1:])]
    options.overrides = [*options.cfg[len(first) :], *options.overrides, *rest]
    options.cfg = first
    for name in ("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task"):
        value = getattr(options, name)
        if value is not None and value < (name == "nodes" or name.endswith("task")):
            parser.error(f"--{name.replace('_', '-')} {value} is too small")
    return options


def build_configs(options: Namespace) -> tuple[list[CfgNode], Path]:
    """Return each run's configuration, with absolute paths, and the folder that holds them all."""
    points = list(expand_grid(options.array)) if options.array else [[]]
    configs = []
    for file in options.cfg:
        for point in points:
            cfg = load_config(file, [*options.overrides, *point]).clone()
            cfg.defrost()
            parts = ([Path(file).stem] if len(options.cfg) > 1 and "OUTPUT_DIR" in str(options.overrides) else []) + (
                [",".join(point).replace("/", "_")] if point else []
            )
            cfg.OUTPUT_DIR = os.path.abspath(Path(cfg.OUTPUT_DIR, *parts))
            cfg.DATA.ROOT = os.path.abspath(cfg.DATA.ROOT)
            if cfg.MODEL.INIT:
                cfg.MODEL.INIT = os.path.abspath(cfg.MODEL.INIT)
            configs.append(cfg)
    folders = [cfg.OUTPUT_DIR for cfg in configs]
    if len(set(folders)) < len(folders):
        raise UsageError("Several runs have the same OUTPUT_DIR; give each configuration its own, or a grid of points.")
    return configs, Path(os.path.commonpath(folders))


def build_request(options: Namespace, configs: Sequence[CfgNode]) -> Request:
    """Return what the jobs ask for."""
    profile = read_profile(options.profile, partition=options.partition, time=options.time)
    _ = profile.minutes
    if options.gpus_per_node is None:
        raise UsageError("--gpus-per-node is missing; give the GPUs of a machine, or 0 to run on its CPUs.")
    if options.gpus_per_node and options.tasks_per_node not in (None, options.gpus_per_node):
        raise UsageError(
            f"--tasks-per-node {options.tasks_per_node} with --gpus-per-node {options.gpus_per_node}: each GPU has one "
            f"process; leave the first away."
        )
    workers = max(cfg.DATA.WORKERS for cfg in configs)
    return Request(
        profile=profile,
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        tasks_per_node=options.gpus_per_node or options.tasks_per_node or 1,
        cpus_per_task=options.cpus_per_task or profile.cpus_per_task or workers + 1,
        source=str(Path(stvit_video.__file__).parent.parent),
        name=f"stvit-{Path(options.cfg[0]).stem}",
    )


def git_state() -> object:
    """Return commit and cleanliness of the checkout that is submitted."""
    from stvit_video.runs.environment import environment

    return environment()["git"]


def tell(jobs: Sequence[Job], base: Path, request: Request) -> None:
    """Print what was submitted and where to look."""
    print(request.describe(len(jobs)))
    for job in jobs:
        print(f"job {job.id}: run {job.run}, log {job.log()}")
    print(f"to look at: python slurm/submit.py {'|'.join(VERBS)} {base}", flush=True)


def wait(jobs: Sequence[Job], base: Path) -> int:
    """Follow jobs to their end; of several, print and keep a table."""
    well = follow(jobs)
    if len(jobs) > 1:
        print(summarise(jobs, base / "summary.csv"))
    return 0 if well else 1


def act(arguments: Sequence[str] | None) -> int:
    """Do what a verb says with a run folder."""
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
        print("\n".join(f"job {job.id}: run {job.run}, log {job.log()}" for job in jobs), flush=True)
        return wait(jobs, base) if options.wait else 0
    for job in jobs:
        if verb == "status":
            print(describe_status(job))
        elif verb == "logs":
            print_log(job, options.rank, options.lines)
        else:
            cancel(job)
            print(f"job {job.id} is being cancelled; what it has trained stays in {job.run}")
    if verb == "status" and len(jobs) > 1:
        print(summarise(jobs, base / "summary.csv"))
    return 0
