"""Metrics of sample quality on features of an ONNX network, without PyTorch."""
