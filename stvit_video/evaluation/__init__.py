"""Exact multi-view testing."""
