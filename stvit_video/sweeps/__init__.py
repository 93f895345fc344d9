"""Accuracy beside speed, over many runs."""
