"""The backend that runs where none is asked for; apart from the others, so that ``--help`` stays quick."""

DEFAULT_BACKEND = "onnxruntime"
