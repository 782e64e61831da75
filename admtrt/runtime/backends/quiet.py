"""Libraries that tell their makers that they are used are kept from it, before they are imported."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from admtrt.errors import EngineError, MissingDependencyError


def silence() -> None:
    """Switch off ONNX Runtime's telemetry, unless the environment says otherwise, and OpenVINO's."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    # Without this package OpenVINO has a stand-in of its own; with it, it sends at its import.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def import_silent(library: str, *, extra: str, purpose: str) -> Any:
    """Import a library that was silenced.

    Args:
        library: name of the module, and of its package.
        extra: of admtrt, which installs it.
        purpose: what needs it.

    Raises:
        MissingDependencyError: if it is not installed.
        EngineError: if it cannot be loaded.
    """
    silence()
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError:
        raise MissingDependencyError(library, extra=extra, purpose=purpose) from None
    except ImportError as error:
        raise EngineError(f"{library} is installed and cannot be loaded: {error}") from None
