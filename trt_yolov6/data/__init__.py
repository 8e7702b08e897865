"""Images in: decoding, letterbox, COCO-format data sets, batches for an engine."""
