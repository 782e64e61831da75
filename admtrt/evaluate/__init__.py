"""How good samples are: metrics on features of a network that runs as an ONNX graph, without PyTorch."""
