"""Build options of an engine: batch profiles, targets, limits and flags, and which library supports them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from admtrt.config_base import Config
from admtrt.config_values import Positive
from admtrt.errors import EngineError

if TYPE_CHECKING:
    from admtrt.contract import Precision
    from admtrt.runtime.engines.library import Library

HardwareLevel = Literal["ampere_plus", "same_compute_capability"]
_LARGEST_BATCH = 65536
_TURING = 75
FIRST_PORTABLE = 80
"""The lowest compute capability that portable plans run on."""
PORTABLE = f"SM{FIRST_PORTABLE} and later"
Batch = Annotated[int, Field(ge=1, le=_LARGEST_BATCH)]


class BatchProfile(Config):
    """The range of batch sizes of one profile; kernels are tuned for ``best``."""

    smallest: Batch
    best: Batch
    largest: Batch

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if not self.smallest <= self.best <= self.largest:
            raise ValueError(f"{self} is not in order; expected smallest:best:largest")
        return self

    def __str__(self) -> str:
        return f"{self.smallest}:{self.best}:{self.largest}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse ``1:4:16``, or ``4`` for exactly that batch size.

        Raises:
            EngineError: if the text has neither form.
            ConfigError: if the sizes are out of range or not ascending.
        """
        match = re.fullmatch(r"(\d{1,18})(?::(\d{1,18}):(\d{1,18}))?", text, re.ASCII)
        if match is None:
            raise EngineError(
                f"batch {text!r} is neither a size nor smallest:best:largest", hint="Write e.g. 1:4:16."
            )
        sizes = [int(size or match[1]) for size in match.groups()]
        return cls.from_dict(
            dict(zip(("smallest", "best", "largest"), sizes, strict=True)), source=f"batch {text}"
        )


class BuildOptions(Config):
    """Options of a build. Every field is part of a plan's key.

    Attributes:
        profiles: at least one; the plan takes the batch sizes of all profiles.
        targets: compute capabilities (89 for 8.9) for TensorRT-RTX; empty means portable, 8.0 and later.
        workspace: limit of the kernels' scratch memory, in MiB; None leaves it to the library.
        optimization_level: 0 (quick build) to 5 (every tactic tried).
        tf32: let fp32 products round their inputs to 10 bits on tensor cores.
        version_compatible: later versions of TensorRT run the plan too.
        hardware_compatible: other GPUs run the plan too.
        refit: the weights of the finished plan can be replaced.
        strip: leave the weights out; they are read from the ONNX file when the plan is opened.
    """

    profiles: Annotated[tuple[BatchProfile, ...], Field(min_length=1)] = (
        BatchProfile(smallest=1, best=4, largest=16),
    )
    targets: tuple[Positive, ...] = ()
    workspace: Annotated[int, Field(ge=1, le=2**30)] | None = None
    optimization_level: Annotated[int, Field(ge=0, le=5)] = 3
    tf32: bool = False
    version_compatible: bool = False
    hardware_compatible: HardwareLevel | None = None
    refit: bool = False
    strip: bool = False

    @model_validator(mode="after")
    def _check_agreement(self) -> Self:
        if self.refit and self.strip:
            raise ValueError(
                "refit and strip exclude each other: a stripped plan takes back its own weights only"
            )
        if self.strip and self.version_compatible:
            raise ValueError(
                "strip and version_compatible exclude each other: the runtime that such a plan brings along "
                "cannot put weights in"
            )
        for option, values in (("--batch", self.profiles), ("--target", self.targets)):
            if len(set(values)) != len(values):
                raise ValueError(f"one {option} is given twice")
        return self


def targets_text(targets: tuple[int, ...]) -> str:
    """Describe the compute capabilities of a TensorRT-RTX plan for people; none means portable."""
    return ", ".join(f"SM{target}" for target in targets) or PORTABLE


def check_options(options: BuildOptions, library: Library, precision: Precision) -> None:
    """Refuse options that a library does not support, before any work.

    Raises:
        EngineError: naming the option and an alternative.
    """
    if library.flavor == "rtx":
        _check_rtx(options, library, precision)
    elif options.targets:
        raise EngineError(
            f"--target is an option of TensorRT-RTX; {library} builds for the GPU at hand",
            hint="Leave it out, use --hardware-compatible, or build with --library rtx.",
        )


def _check_rtx(options: BuildOptions, library: Library, precision: Precision) -> None:
    refused = {
        "--version-compatible": (options.version_compatible, "a plan runs on the version that built it only"),
        "--hardware-compatible": (
            options.hardware_compatible,
            "its plans are portable; narrow with --target",
        ),
        "--refit": (options.refit, "it builds no refittable plans without a GPU"),
        "--strip": (options.strip, "it leaves no convolution's weights out without a GPU"),
    }
    for option, (given, reason) in refused.items():
        if given:
            raise EngineError(
                f"{library} does not offer {option}: {reason}",
                hint="Leave it out, or build with --library tensorrt.",
            )
    for target in options.targets:
        if target not in library.targets:
            raise EngineError(
                f"{library} cannot build for SM{target}; its targets are "
                + ", ".join(f"SM{known}" for known in library.targets),
                hint="Data-centre GPUs such as SM90 and SM100 are served by --library tensorrt.",
            )
    if _TURING in options.targets and precision != "fp16":
        raise EngineError(
            f"SM75 takes plans in which every matrix product is fp16, not {precision}, "
            "and one refused target fails the whole plan",
            hint="Leave --target 75 out, or build with --precision fp16.",
        )
