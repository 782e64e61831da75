"""The default backend. A module of its own, so that ``--help`` loads nothing else."""

DEFAULT_BACKEND = "onnxruntime"
