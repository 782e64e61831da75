"""Engines: build ONNX graphs into plans with TensorRT or TensorRT-RTX, and store the plans."""
