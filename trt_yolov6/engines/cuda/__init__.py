"""The little of CUDA that engines need: memory, streams, graphs, JPEGs and a few kernels."""
