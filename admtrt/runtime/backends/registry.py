"""The table of backends. Each backend declares itself in its own file; this module lists the files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from admtrt.runtime.backends import onnxruntime, openvino, providers, tensorrt
from admtrt.runtime.backends.names import NAMES

if TYPE_CHECKING:
    from admtrt.runtime.backends.backend import Backend

FILES = (onnxruntime, openvino, providers, tensorrt)
_DECLARED = {backend.name: backend for file in FILES for backend in file.BACKENDS}
assert _DECLARED.keys() == set(NAMES), "the names of names.py are not those that the files declare"
BACKENDS: dict[str, Backend] = {name: _DECLARED[name] for name in NAMES}
"""All backends by name, in order of preference; ``auto`` chooses among them."""

PLAN_BACKENDS = tuple(backend.name for backend in BACKENDS.values() if backend.runs_plans)
"""Names of the backends that run plans."""
