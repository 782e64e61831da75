"""admtrt: ADM diffusion models from training to guided sampling without PyTorch.

``import admtrt`` loads neither torch nor onnx nor an engine library; the names below are resolved on
first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from admtrt.bundle import Bundle as Bundle
    from admtrt.errors import AdmtrtError as AdmtrtError
    from admtrt.export.gradient import export_hessian_vector as export_hessian_vector
    from admtrt.export.gradient import export_input_gradient as export_input_gradient
    from admtrt.export.gradient import export_vector_jacobian as export_vector_jacobian
    from admtrt.export.guides.guide import Guide as Guide
    from admtrt.export.guides.guide import Reference as Reference
    from admtrt.runtime.drawn import Samples as Samples
    from admtrt.runtime.drawn import Step as Step
    from admtrt.runtime.frames import Frames as Frames
    from admtrt.runtime.image_inputs import Known as Known
    from admtrt.runtime.latents import Latents as Latents
    from admtrt.runtime.pipeline import Pipeline as Pipeline
    from admtrt.runtime.two_stage import TwoStage as TwoStage

__version__ = "0.1.0"
__all__ = [
    "AdmtrtError", "Bundle", "Frames", "Guide", "Known", "Latents", "Pipeline", "Reference", "Samples",
    "Step", "TwoStage", "__version__",
    "export_hessian_vector", "export_input_gradient", "export_vector_jacobian",
]  # fmt: skip

_HOMES = {
    "AdmtrtError": "admtrt.errors",
    "Bundle": "admtrt.bundle",
    "Frames": "admtrt.runtime.frames",
    "Guide": "admtrt.export.guides.guide",
    "Known": "admtrt.runtime.image_inputs",
    "Latents": "admtrt.runtime.latents",
    "Pipeline": "admtrt.runtime.pipeline",
    "Reference": "admtrt.export.guides.guide",
    "Samples": "admtrt.runtime.drawn",
    "Step": "admtrt.runtime.drawn",
    "TwoStage": "admtrt.runtime.two_stage",
    "export_hessian_vector": "admtrt.export.gradient",
    "export_input_gradient": "admtrt.export.gradient",
    "export_vector_jacobian": "admtrt.export.gradient",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'admtrt' has no attribute {name!r}")
    from importlib import import_module

    try:
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if not _HOMES[name].startswith("admtrt.export") or error.name is None:
            raise
        from admtrt.errors import MissingDependencyError

        raise MissingDependencyError(error.name, extra="export", purpose=name) from None
