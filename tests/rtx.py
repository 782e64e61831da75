"""The pytest mark of tests that need TensorRT-RTX."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

NEEDS_RTX = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed (pip install '.[rtx]')"
)
