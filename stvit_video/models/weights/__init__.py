"""Weights: files, published layouts, resizing, loading."""
