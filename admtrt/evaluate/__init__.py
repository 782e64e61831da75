"""Metrics of sample quality on features of a network that runs as an ONNX graph, without PyTorch."""
