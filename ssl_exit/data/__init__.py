"""Images to batches: sources, preprocessing, content hashes."""
