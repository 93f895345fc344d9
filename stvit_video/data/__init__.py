"""From a list of videos to batches of clips: annotations, sampling, decoding, transforms, dataset, loader."""
