"""Shared by all packages: errors, command lines, files, tables, charts, progress."""
