"""Lists of videos and their labels."""
