"""Records which graphs ONNX Runtime opens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime

if TYPE_CHECKING:
    import pytest


def opened_sessions(patch: pytest.MonkeyPatch) -> list[str]:
    """Names of the graphs that are opened from now on, in order; the list grows."""
    names: list[str] = []
    session = onnxruntime.InferenceSession

    def noted(path: str, **options: Any) -> Any:
        names.append(Path(path).stem)
        return session(path, **options)

    patch.setattr(onnxruntime, "InferenceSession", noted)
    return names
