"""Jobs on SLURM, through submitit: what ``slurm/submit.py`` does. Training knows nothing of it."""
