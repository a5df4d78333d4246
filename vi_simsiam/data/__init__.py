"""Images, the random views made of them, and the loaders that put them into batches."""
