"""Training many runs, and setting their accuracy beside their speed: ``python -m stvit_video.tradeoff``."""
