"""Detectors of every family, decoded into one `Detections` value.

spec.py            `DetectorSpec`: what a detector takes and gives
layouts.py         how outputs are laid out, and the arithmetic that reads each layout
families.py        the table of families: the layouts each is exported in, the images it takes
recognition.py     the family of a graph: from its outputs, its metadata and what leads to them
metadata.py        what a graph says of itself: names, sizes, thresholds
candidates.py      what is left of outputs when they leave the device: candidates, or the boxes kept
suppression.py     greedy non-maximum suppression
detections.py      the `Detections` value, and how raw outputs become one
labels.py          a data set's labelled boxes as `Detections`
overlap.py         IoU of boxes, in NumPy
box_similarity.py  IoU, GIoU, CIoU and SIoU for losses, in PyTorch
"""
