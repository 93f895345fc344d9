"""Pictures and pages: what a model saw in a video, and what runs came to."""
