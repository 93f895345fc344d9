"""Processes: who they are, how they meet, and how they stop."""
