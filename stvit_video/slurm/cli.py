"""Submit runs to SLURM, or act on submitted ones.

``python slurm/submit.py --cfg FILE --nodes N --gpus-per-node G [--profile FILE] [--wait] [KEY VALUE ...]; or status,
logs, cancel, resume RUN; or extract [OPTIONS] -- WORDS``
"""

import itertools
import os
import re
import shutil
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fvcore.common.config import CfgNode

from stvit_video.common.cli import Parser, as_called, number, run_command
from stvit_video.common.errors import UsageError, nearest
from stvit_video.common.files import write_json
from stvit_video.config.load import load_config, override
from stvit_video.config.schema import BY_NAME
from stvit_video.slurm.extraction import submit_extraction
from stvit_video.slurm.jobs import ClusterJob, check_owner, describe_status, find_jobs, follow, last_lines, summarise
from stvit_video.slurm.request import add_sizes, build_request, open_job_folders, resume, submit

VERBS = {"status": "say how it is", "logs": "print its log", "cancel": "end it", "resume": "submit it again"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Submit runs, or act on submitted ones. Exit codes: 0 done; 1 a job failed; 2 wrong use; 130 Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = run_verb if given and given[0] in VERBS else submit_runs
    if given and given[0] == "extract":
        command, given = submit_extraction, given[1:]
    return run_command(command, given, stopped="no longer following; the job goes on, if it was submitted")


def submit_runs(arguments: Sequence[str] | None) -> int:
    """Submit the runs of a command line."""
    options = read_options(arguments or [])
    configs, base = build_configs(options)
    logs = base / "slurm"
    workers = max(cfg.DATA.WORKERS for cfg in configs)
    request = build_request(options, workers, f"stvit-{Path(options.files[0]).stem}")
    if options.dry_run:
        runs = (f"  {cfg.OUTPUT_DIR}" for cfg in configs)
        print(request.sbatch_text(logs, len(configs)), "runs:", *runs, request.describe(len(configs)), sep="\n")
        return 0
    folders = open_job_folders(configs, request, options.cluster, logs)
    if options.copy_source:  # later changes do not affect waiting jobs
        copy = next(path for number in itertools.count(1) if not (path := logs / f"source{number}").exists())
        package = Path(request.source, "stvit_video")
        shutil.copytree(package, copy / package.name, ignore=shutil.ignore_patterns("__pycache__"))
        request = replace(request, source=str(copy))
    jobs = submit(folders, request, options.cluster, logs)
    if len(jobs) > 1:
        write_json(logs / "array.json", [str(job.run) for job in jobs])
    print(request.describe(len(jobs)))
    return report(jobs, base, options.wait or options.cluster == "debug")


def read_options(arguments: Sequence[str]) -> Namespace:
    """Parse the command line of a submission."""
    parser = Parser(__doc__, BY_NAME)
    add = parser.add_argument
    add("--cfg", nargs="+", action="extend", dest="files", metavar="FILE", help="several: an array")
    add_sizes(parser)
    add("--array", metavar="GRID", help="'OPTIM.LR=1e-3,3e-4 SEED=0,1': a run each, as one array")
    add("--copy-source", action="store_true", help="run from a copy of the package as it is now")
    add("overrides", nargs="*", default=[], metavar="KEY VALUE", help="last one wins")
    options = parser.parse_intermixed_args(arguments)
    if not options.files:
        meant = nearest(arguments[0], list(VERBS)) if arguments else ""
        parser.error(f"--cfg FILE is missing{', or' + meant.lower() if meant else ''}")
    # argparse takes KEY VALUE words after --cfg FILE for files.
    files = [options.files[0], *itertools.takewhile(lambda word: word.endswith((".yaml", ".yml")), options.files[1:])]
    options.overrides = [*options.files[len(files) :], *options.overrides]
    options.files = files
    return options


def expand_grid(text: str) -> list[list[str]]:
    """Return the overrides of each point of a grid: ``OPTIM.LR=1e-3,3e-4 SEED=0,1`` has four."""
    axes = []
    for word in text.split() or [text]:
        key, equals, values = word.partition("=")
        if not (key and equals and values):
            raise UsageError(f"--array {text!r}: {word!r} is not KEY=VALUE,VALUE; write 'OPTIM.LR=1e-3,3e-4 SEED=0,1'.")
        axes.append([f"{key}={value}" for value in re.split(r",(?![^\[]*\])", values)])  # not at commas in brackets
    return [list(point) for point in itertools.product(*axes)]


def build_configs(options: Namespace) -> tuple[list[CfgNode], Path]:
    """Return each run's configuration, with an absolute OUTPUT_DIR, and the common folder of all runs."""
    points = expand_grid(options.array) if options.array else [[]]
    by_file = len(options.files) > 1 and "OUTPUT_DIR" in str(options.overrides)
    configs = []
    for file, point in itertools.product(options.files, points):
        cfg = load_config(file, [*options.overrides, *point])
        parts = [Path(file).stem] if by_file else []
        parts += [",".join(point).replace("/", "_")] if point else []
        configs.append(override(cfg, [("OUTPUT_DIR", os.path.abspath(Path(cfg.OUTPUT_DIR, *parts)))], "--array"))
    folders = [cfg.OUTPUT_DIR for cfg in configs]
    if len(set(folders)) < len(folders):
        raise UsageError("Several runs have the same OUTPUT_DIR; give each configuration its own, or a grid of points.")
    return configs, Path(os.path.commonpath(folders))


def report(jobs: Sequence[ClusterJob], base: Path, wait: bool) -> int:
    """Print the jobs. With ``wait``, follow them, and write a table of several. Return the exit code."""
    for job in jobs:
        print(f"job {job.id}: run {job.run}, log {job.log()}")
    print(as_called(f"to look at: python slurm/submit.py {'|'.join(VERBS)} {base}"), flush=True)
    all_done = not wait or follow(jobs)
    if wait and len(jobs) > 1:
        print(summarise(jobs, base / "summary.csv"))
    return 0 if all_done else 1


def run_verb(arguments: Sequence[str] | None) -> int:
    """Apply one of VERBS to the jobs of a run folder."""
    verb, *rest = arguments or []
    parser = Parser(f"``python slurm/submit.py {verb} RUN``: {VERBS[verb]}")
    parser.add_argument("run", type=Path, help="OUTPUT_DIR of a run, or of an array")
    if verb == "logs":
        parser.add_argument("--rank", type=int, default=0, help="of which task (default: %(default)s)")
        parser.add_argument("--lines", type=number(int, 1), default=40, help="how many (default: %(default)s)")
    if verb == "resume":
        parser.add_argument("--wait", action="store_true", help="follow the jobs")
    options = parser.parse_args(rest)
    base = options.run.absolute()
    jobs = find_jobs(base)
    if verb == "resume":
        jobs = [resume(job) for job in jobs if not job.is_done()] or jobs
        return report(jobs, base, options.wait)
    for job in jobs:
        if verb == "status":
            print(describe_status(job))
        elif verb == "logs":
            print(f"==> {job.log(options.rank)} <==", *last_lines(job.log(options.rank), options.lines), sep="\n")
        else:
            check_owner(job.run, job.path, job.path / "job.json")
            job.cancel()
            print(f"job {job.id} is being cancelled; what it has trained stays in {job.run}")
    if verb == "status" and len(jobs) > 1:
        print(summarise(jobs, base / "summary.csv"))
    return 0
