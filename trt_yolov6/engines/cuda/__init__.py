"""The little of CUDA that engines need: memory, streams, graphs and one kernel."""
