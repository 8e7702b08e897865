"""The authors' checkpoints, releases 0.1 to 0.4: what is in them, and how to read it.

A file holds a pickled tree of modules, in half precision, in training form or fused. `tree`
flattens it, `recognition` identifies the network, `weights` reads that network's weights.
Nothing outside this package knows the authors' names.
"""
