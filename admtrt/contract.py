"""The graphs' inputs and outputs, in one literal each: names, dtypes, shapes and the one dynamic axis.

Dummy inputs, checks, engine profiles and documentation all derive from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, get_args

from pydantic import Field

from admtrt.config import Config
from admtrt.errors import RequestError
from admtrt.schedule import COEFFICIENTS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from admtrt.config import ClassifierConfig, UNetConfig

BATCH = "N"
"""Name of the dynamic axis."""
NODE_SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata of a node: the PyTorch modules that it comes from, the outermost first."""

GraphName = Literal["unet", "classifier_gradient", "update"]
DType = Literal["float32", "int64"]
Precision = Literal["fp32", "fp16", "bf16"]
"""What a graph computes in; inputs and outputs are float32 whatever it is."""
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def precision_named(name: str, what: str) -> Precision:
    """The precision of this name.

    Raises:
        RequestError: if there is none; ``what`` says where the name was given.
    """
    for precision in PRECISIONS:
        if precision == name:
            return precision
    raise RequestError(f"{what} {name!r} is unknown; expected {', '.join(PRECISIONS)}")


class TensorSpec(Config):
    """One input or output: ``shape`` holds sizes, and ``"N"`` for the batch."""

    name: str
    dtype: DType
    shape: tuple[Annotated[int, Field(ge=1)] | Literal["N"], ...]

    def sized(self, batch: int) -> tuple[int, ...]:
        """The shape at a batch size."""
        return tuple(batch if isinstance(size, str) else size for size in self.shape)

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{', '.join(str(size) for size in self.shape)}]"


class GraphSpec(Config):
    """Inputs and outputs of a graph, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def _tensor(name: str, *sizes: int, dtype: DType = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=(BATCH, *sizes))


def unet_spec(config: UNetConfig) -> GraphSpec:
    """``x`` and ``t`` (in the model's units), ``y`` and ``low_res`` where conditioned; ``out``."""
    size = config.image_size
    inputs = [_tensor("x", config.in_channels, size, size), _tensor("t")]
    if config.num_classes is not None:
        inputs.append(_tensor("y", dtype="int64"))
    if config.low_res_size is not None:
        inputs.append(_tensor("low_res", config.in_channels, config.low_res_size, config.low_res_size))
    return GraphSpec(inputs=tuple(inputs), outputs=(_tensor("out", config.out_channels, size, size),))


def classifier_gradient_spec(config: ClassifierConfig) -> GraphSpec:
    """``x``, ``t``, ``y``; ``grad`` = d log p(y | x_t) / dx_t of each sample, unscaled, and ``log_prob``."""
    image = (config.in_channels, config.image_size, config.image_size)
    return GraphSpec(
        inputs=(_tensor("x", *image), _tensor("t"), _tensor("y", dtype="int64")),
        outputs=(_tensor("grad", *image), _tensor("log_prob")),
    )


def update_spec(config: UNetConfig) -> GraphSpec:
    """``x``, the UNet's ``out``, ``grad``, ``noise``, a row of coefficients; ``x_prev`` and ``pred_x0``."""
    image = (config.in_channels, config.image_size, config.image_size)
    out = (config.out_channels, config.image_size, config.image_size)
    return GraphSpec(
        inputs=(
            _tensor("x", *image),
            _tensor("out", *out),
            _tensor("grad", *image),
            _tensor("noise", *image),
            _tensor("coefficients", len(COEFFICIENTS)),
        ),
        outputs=(_tensor("x_prev", *image), _tensor("pred_x0", *image)),
    )


def bundle_specs(unet: UNetConfig, classifier: ClassifierConfig | None) -> Mapping[GraphName, GraphSpec]:
    """The graphs that a bundle of these networks holds."""
    specs: dict[GraphName, GraphSpec] = {"unet": unet_spec(unet), "update": update_spec(unet)}
    if classifier is not None:
        specs["classifier_gradient"] = classifier_gradient_spec(classifier)
    return specs
