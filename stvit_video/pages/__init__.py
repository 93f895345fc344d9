"""Pages that show runs and clips."""
