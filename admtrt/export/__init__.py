"""Export: PyTorch modules to clean ONNX graphs, their input gradients, and bundles."""
