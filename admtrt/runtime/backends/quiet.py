"""Switch off telemetry of ONNX Runtime and OpenVINO before they are imported."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from admtrt.errors import EngineError, MissingDependencyError


def silence() -> None:
    """Switch off the telemetry of ONNX Runtime, unless the environment sets it, and of OpenVINO."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    # OpenVINO sends telemetry when imported if this package is there; without it, it uses a stub.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def import_silent(library: str, *, extra: str, purpose: str) -> Any:
    """Import a library with its telemetry switched off.

    Args:
        library: name of the module and of its package.
        extra: the extra of admtrt that installs it.
        purpose: what needs the library, for the message.

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
