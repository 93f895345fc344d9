"""Weights: files, layouts, resizing, loading."""
