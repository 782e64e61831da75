"""Names of backends, apart from what declares them, so that ``--help`` can list them without loading it."""

NAMES = ("onnxruntime", "openvino", "onnxruntime-cuda", "onnxruntime-tensorrt", "onnxruntime-rtx", "tensorrt")
"""In order of preference."""
OF_FEATURES = ("onnxruntime", "openvino")
"""Those that compute features, too."""
