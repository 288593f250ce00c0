"""Exit points, stages and descriptors of any encoder."""
