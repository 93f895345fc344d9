"""What ``python -m stvit_video.benchmark model|train|e2e`` measures."""
