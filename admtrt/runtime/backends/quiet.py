"""Libraries that tell their makers that they are used are kept from it, before they are imported."""

from __future__ import annotations

import os
import sys


def silence() -> None:
    """Switch off ONNX Runtime's telemetry, unless the environment says otherwise, and OpenVINO's."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    # Without this package OpenVINO has a stand-in of its own; with it, it sends at its import.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
