"""Names of backends, apart from their declarations, so that ``--help`` lists them without loading those."""

NAMES = ("onnxruntime", "openvino", "onnxruntime-cuda", "onnxruntime-tensorrt", "onnxruntime-rtx", "tensorrt")
"""All backends, in order of preference."""
OF_FEATURES = ("onnxruntime", "openvino")
"""Backends that also compute features."""
