"""ONNX graphs: exported, read, recognized, converted and run for reference."""
