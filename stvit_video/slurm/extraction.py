"""Extraction of features as a job of many processes, which share the videos and one output folder."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from submitit.core.utils import FailedJobError, UncompletedJobError
from submitit.helpers import DelayedSubmission

from stvit_video.common.cli import Parser
from stvit_video.common.errors import RunFailure, UsageError
from stvit_video.slurm.request import add_sizes, build_request, check_cluster, send

ABOUT = """Submit an extraction of features, which the same command goes on with after its end.

``python slurm/submit.py extract --nodes N --gpus-per-node G [--profile FILE] -- VIDEO... --checkpoint RUN --output
DIR``
"""


@dataclass(frozen=True)
class Extraction:
    """A task of the job: runs ``stvit_video.extract`` with ``words`` in ``folder``. submitit pickles it."""

    words: tuple[str, ...]
    folder: str
    source: str  # from which the package is imported

    def __call__(self) -> None:
        paths = os.pathsep.join(filter(None, (self.source, os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-P", "-m", "stvit_video.extract", *self.words]  # -P: nothing of ``folder``
        env = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
        if code := subprocess.run(command, cwd=self.folder, env=env).returncode:
            sys.exit(code)

    def checkpoint(self) -> DelayedSubmission:
        """Have submitit queue the job again before its time ends: what is done is kept."""
        return DelayedSubmission(self)


def submit_extraction(arguments: Sequence[str] | None) -> int:
    """Submit the extraction of a command line. Raises UsageError."""
    parser = Parser(ABOUT)
    add_sizes(parser)
    given = list(arguments or ())
    place = given.index("--") if "--" in given else len(given)
    options, words = parser.parse_args(given[:place]), given[place + 1 :]
    if not words:
        raise UsageError(f"-- VIDEO... is missing: the words for stvit_video.extract; use: {parser.usage}")
    needed = Parser(ABOUT)  # the job itself reads all options
    needed.add_argument("--checkpoint", required=True)
    needed.add_argument("--output", type=Path, required=True)
    output: Path = needed.parse_known_args(words)[0].output.absolute()
    request = build_request(options, 1, f"stvit-extract-{output.name}")
    logs = output.with_name(f"{output.name}.slurm")  # the folder itself holds features only
    if options.dry_run:
        print(request.sbatch_text(logs, 1), request.describe(1), sep="\n")
        return 0
    check_cluster(options.cluster, 1, request)
    logs.mkdir(parents=True, exist_ok=True)
    (job,) = send([Extraction(tuple(words), os.getcwd(), request.source)], request, options.cluster, logs)
    print(f"job {job.job_id}: features in {output}, logs in {logs}\n{request.describe(1)}", flush=True)
    if options.wait or options.cluster == "debug":
        try:
            job.results()
        except (FailedJobError, UncompletedJobError, SystemExit) as error:
            raise RunFailure(f"job {job.job_id} did not end well; its log: {job.paths.stdout}") from error
    return 0
