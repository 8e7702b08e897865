"""Images in: decoding, letterbox, data sets in three formats, batches for an engine."""
