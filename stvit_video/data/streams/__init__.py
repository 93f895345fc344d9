"""Long videos and cameras in windows."""
