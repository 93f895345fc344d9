"""Training, testing and what they leave in the run folder."""
