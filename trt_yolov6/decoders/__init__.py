"""Detectors of every family behind one `Detections` value.

layouts.py    how outputs are laid out, and the arithmetic that reads each layout
families.py   the table of families: the layouts each is exported in, the images it takes
recognition.py  which family a graph is of: by its outputs, its metadata and what leads to them
inputs.py     inputs beside the image, which some exports have, made constants
"""
