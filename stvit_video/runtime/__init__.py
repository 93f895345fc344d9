"""The processes of a run: rank and launcher, process group, parallelism, precision, and how a run is stopped."""
