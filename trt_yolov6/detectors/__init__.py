"""Detectors of every family, decoded into one `Detections` value.

spec.py            `DetectorSpec`: a detector's input, classes and output layout
layouts.py         output layouts, and the arithmetic that reads each
families.py        the table of families: their layouts and preprocessing
recognition.py     the family of a graph, by its outputs, metadata and operators
metadata.py        a graph's metadata: names, sizes, thresholds
candidates.py      outputs that were filtered or suppressed on the device
suppression.py     greedy non-maximum suppression
detections.py      the `Detections` value, and post-processing of raw outputs
labels.py          a data set's labelled boxes as `Detections`
overlap.py         IoU of boxes, in NumPy
box_similarity.py  IoU, GIoU, CIoU and SIoU for losses, in PyTorch
"""
