"""From frames to clips."""
