"""Images in, views out: sources, decoding, views, batches."""
