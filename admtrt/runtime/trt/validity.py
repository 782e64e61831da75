"""Ask TensorRT-RTX whether a plan is valid here, and say what to do about each of its reasons."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from admtrt.errors import PlanError
from admtrt.installing import pip_install
from admtrt.runtime.engines.library import logger_of

if TYPE_CHECKING:
    from admtrt.runtime.engines.device import Gpu
    from admtrt.runtime.engines.library import Library

REASONS = {
    "VERSION_MISMATCH": ("another version of the library built it", "{again}"),
    "UNSUPPORTED_CC": ("it was not built for this GPU", "{build} --target {target}"),
    "OLD_CUDA_DRIVER": ("the NVIDIA driver is too old", "Update the driver; see: admtrt doctor"),
    "OLD_CUDA_RUNTIME": (
        "the CUDA runtime is too old",
        "Upgrade the library with: {upgrade}. Then build again.",
    ),
    "INSUFFICIENT_GPU_MEMORY": (
        "the GPU has too little memory",
        "End other programs on the GPU, or build for smaller batches: {build} --batch 1",
    ),
    "MALFORMED_ENGINE": ("it is damaged, or no plan", "{again}"),
    "CUDA_ERROR": ("CUDA does not start", "Install the driver or the library again; see: admtrt doctor"),
}
"""Meaning of each bit of ``EngineInvalidityDiagnostics``, and the hint for it."""


def check_validity(
    runtime: Any, plan: bytes, *, subject: str, library: Library, gpu: Gpu, build: str
) -> None:
    """Ask the library whether it would open a plan here. It reads only the plan's header.

    Args:
        runtime: the library's ``Runtime``.
        plan: the bytes of the plan.
        subject: names the plan and the graph, for messages.
        library: TensorRT-RTX.
        gpu: this machine's GPU.
        build: the command that rebuilds the plan once its file is deleted.

    Raises:
        PlanError: if it would not, with the library's message, its reasons and a hint for each.
    """
    logger = logger_of(library.module)
    logger.clear()
    validity, diagnostics = runtime.get_engine_validity(plan)
    if validity != library.module.EngineValidity.INVALID:
        return
    known = library.module.EngineInvalidityDiagnostics.__members__
    named = [name for name in REASONS if name in known and int(diagnostics) & int(known[name])]
    reasons = [REASONS[name][0] for name in named] or [f"it gives no known reason ({int(diagnostics)})"]
    again = f"Build it again with: {build}"
    hints = [
        REASONS[name][1].format(
            again=again,
            build=f"Build it with: {build}",
            target=gpu.compute_capability,
            upgrade=pip_install("--upgrade", "tensorrt-rtx-cu13"),
        )
        for name in named
    ]
    said = logger.said(everything=True)
    raise PlanError(
        f"{library} refuses {subject} on {gpu}: {', '.join(reasons)}"
        + (f". It says: {said}" if said else ""),
        hint=" ".join(dict.fromkeys(hints)) or again,
    )
