"""Backend `onnxruntime`: the graph itself, on a CPU or through a GPU provider."""
