"""Post-training quantization: float ONNX graph in, INT8 graph with Q/DQ nodes out."""
