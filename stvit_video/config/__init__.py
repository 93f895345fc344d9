"""Configurations: every key once, loading and checking."""

from stvit_video.config.load import load_config

__all__ = ["load_config"]
