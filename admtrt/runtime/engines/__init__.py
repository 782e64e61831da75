"""Engines: ONNX graphs built into plans by TensorRT or TensorRT-RTX, and the store that keeps the plans."""
