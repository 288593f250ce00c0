"""Images in: folders, tensors, datasets and loaders become one kind of source that yields batches."""
