#!/usr/bin/env python3
"""Submit runs to SLURM, follow and resume them: ``python slurm/submit.py --help``, slurm/README.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package beside this file, installed or not

from stvit_video.slurm.cli import main

if __name__ == "__main__":
    sys.exit(main())
