"""Post-training quantization: float ONNX graph in, INT8 or FP8 graph with Q/DQ nodes out."""
