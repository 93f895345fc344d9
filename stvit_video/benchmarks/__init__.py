"""What ``python -m stvit_video.benchmark`` measures."""
