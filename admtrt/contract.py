"""The inputs and outputs of every graph: names, dtypes, shapes and the dynamic axis.

Dummy inputs, checks, engine profiles and documentation all derive from here.
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from pydantic import Field

from admtrt.config_base import Config
from admtrt.errors import RequestError
from admtrt.schedule.edits import EDIT
from admtrt.schedule.guides import GUIDE_GRAPH, columns_with_guides
from admtrt.schedule.table import UPDATE, UPDATE_FULL

if TYPE_CHECKING:
    from collections.abc import Mapping

    from admtrt.config import ClassifierConfig, UNetConfig
    from admtrt.schedule.guides import GuideConfig

    Guides = Mapping[str, GuideConfig]

BATCH = "N"
"""Name of the dynamic axis."""
NODE_SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata key of a node: its PyTorch modules, the outermost first."""

GraphName = Annotated[
    str,
    Field(
        pattern=r"^(unet|classifier_gradient|update|update_full|threshold|edit|edit_low_pass"
        r"|unet_vector_jacobian|guide\.[a-z][a-z0-9_]{0,31})$"
    ),
]
"""Name of a graph; a guide's graph is ``guide.NAME``."""
CLASSIFIER_GRADIENT: GraphName = "classifier_gradient"
_NETWORKS = ("unet", CLASSIFIER_GRADIENT, "unet_vector_jacobian")
FURTHER: tuple[GraphName, ...] = ("unet_vector_jacobian",)
"""Optional graphs of a bundle, in the CPU form only; sampling does not run them."""
QUANTILE = 0.995
"""Default quantile of |x_0| for dynamic thresholding (Imagen)."""
MOST_TOP_K = 3840
"""The largest K of TensorRT's TopK."""
X0_WEIGHTS = ("x0_from_x", "x0_from_out")
"""Inputs of guides by a loss of x_0: the weights of the state and of the network's output in x_0."""
GUIDE_CLIP, LEVEL_INPUT = "guide_clip", "sqrt_one_minus_alpha_bar"
"""Further inputs: the bound of that x_0, and sqrt(1 - alpha_bar) for losses that take it."""
DType = Literal["float32", "int64"]
Precision = Literal["fp32", "fp16", "bf16"]
"""Precision of a graph's arithmetic; inputs and outputs are always float32."""
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def is_network(graph: str) -> bool:
    """True for a network's graph; the small graphs always compute in float32."""
    return graph in _NETWORKS or graph.startswith(GUIDE_GRAPH)


def graph_of(name: str, guide: GuideConfig) -> GraphName:
    """The graph that a guide runs: its own, or the UNet's with the null class."""
    return "unet" if guide.kind == "reference" and guide.network is None else f"{GUIDE_GRAPH}{name}"


def guide_input(name: str, guide: GuideConfig) -> str:
    """Name of a guide's tensor in ``update_full`` and ``threshold``."""
    return f"{'out' if guide.kind == 'reference' else 'grad'}.{name}"


def precision_named(name: str, what: str) -> Precision:
    """Convert a name to a precision.

    Raises:
        RequestError: if it is unknown; ``what`` says where the name was given.
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


def unet_vector_jacobian_spec(config: UNetConfig) -> GraphSpec:
    """The UNet's inputs and ``cotangent``; ``grad`` = d sum(out cotangent) / dx, and ``out``."""
    unet = unet_spec(config)
    (out,) = unet.outputs
    cotangent = out.model_copy(update={"name": "cotangent"})
    return GraphSpec(inputs=(*unet.inputs, cotangent), outputs=(_tensor("grad", *event_shape(config)), out))


def guide_spec(unet: UNetConfig, guide: GuideConfig) -> GraphSpec:
    """Inputs and outputs of a guide's graph.

    A loss of x_0 takes the UNet's inputs, the weights of x_0, its bound and the loss's targets. It returns
    ``grad`` = - d loss / dx_t of each sample, the UNet's ``out``, and ``value`` = - loss. A loss of x_t
    returns no ``out``. A reference is another UNet.
    """
    if guide.kind == "reference":
        return unet_spec(guide.network or unet)
    event = event_shape(unet)
    targets = [_tensor(name, *sizes) for name, sizes in guide.targets.items()]
    grad, value = _tensor("grad", *event), _tensor("value")
    if guide.kind == "noisy":
        return GraphSpec(inputs=(_tensor("x", *event), _tensor("t"), *targets), outputs=(grad, value))
    network = unet_spec(unet)
    numbers = [*X0_WEIGHTS, GUIDE_CLIP, *([LEVEL_INPUT] if guide.level_input else [])]
    return GraphSpec(
        inputs=(*network.inputs, *map(_tensor, numbers), *targets),
        outputs=(grad, *network.outputs, value),
    )


def event_shape(config: UNetConfig) -> tuple[int, ...]:
    """Shape of one sample, (C, H, W)."""
    return (config.in_channels, config.image_size, config.image_size)


def threshold_quantile(config: UNetConfig, chosen: float | None = None) -> float:
    """The quantile of the graph ``threshold`` for samples of a network, see :func:`quantile_of`."""
    return quantile_of(math.prod(event_shape(config)), chosen)


def quantile_of(size: int, chosen: float | None = None) -> float:
    """The threshold quantile for samples of ``size`` values.

    The network's choice, else 0.995, or for large samples the lowest quantile that TensorRT's TopK allows.
    """
    if chosen is not None:
        return chosen
    if largest_values(size, QUANTILE) <= MOST_TOP_K:
        return QUANTILE
    return math.ceil((size - MOST_TOP_K) / (size - 1) * 1e4) / 1e4


def largest_values(size: int, quantile: float) -> int:
    """Number of the largest of ``size`` values that computing a quantile needs."""
    return size - math.floor(quantile * (size - 1))


def update_spec(config: UNetConfig) -> GraphSpec:
    """``x``, the UNet's ``out``, ``grad``, ``noise``, a row of coefficients; ``x_prev`` and ``pred_x0``."""
    event = event_shape(config)
    return GraphSpec(
        inputs=(
            *_state_inputs(config),
            _tensor("noise", *event),
            _tensor("coefficients", len(UPDATE)),
        ),
        outputs=(_tensor("x_prev", *event), _tensor("pred_x0", *event)),
    )


def _state_inputs(config: UNetConfig) -> tuple[TensorSpec, ...]:
    """The inputs common to all updates: the state, the UNet's output and the classifier's gradient."""
    event = event_shape(config)
    return _tensor("x", *event), _tensor("out", config.out_channels, *event[1:]), _tensor("grad", *event)


def _guide_inputs(config: UNetConfig, guides: Guides) -> tuple[TensorSpec, ...]:
    """The tensor of each guide: a gradient, or the output of another network."""
    event = event_shape(config)
    inputs = []
    for name, guide in guides.items():
        channels = (guide.network or config).out_channels if guide.kind == "reference" else event[0]
        inputs.append(_tensor(guide_input(name, guide), channels, *event[1:]))
    return tuple(inputs)


NO_GUIDES: Guides = MappingProxyType({})


def update_full_spec(config: UNetConfig, guides: Guides = NO_GUIDES) -> GraphSpec:
    """As ``update``, with the memory ``saved``, ``h1``, ``h2``, the threshold ``r`` and ``saved_next``.

    Each guide adds its tensor and its columns.
    """
    event = event_shape(config)
    return GraphSpec(
        inputs=(
            *_state_inputs(config),
            *_guide_inputs(config, guides),
            _tensor("noise", *event),
            *(_tensor(name, *event) for name in ("saved", "h1", "h2")),
            _tensor("r"),
            _tensor("coefficients", len(columns_with_guides(UPDATE_FULL, tuple(guides)))),
        ),
        outputs=(_tensor("x_prev", *event), _tensor("pred_x0", *event), _tensor("saved_next", *event)),
    )


def threshold_spec(config: UNetConfig, guides: Guides = NO_GUIDES) -> GraphSpec:
    """``r``, the threshold of every sample, from the inputs of ``update_full`` that determine x_0."""
    return GraphSpec(
        inputs=(
            *_state_inputs(config),
            *_guide_inputs(config, guides),
            _tensor("coefficients", len(columns_with_guides(UPDATE_FULL, tuple(guides)))),
        ),
        outputs=(_tensor("r"),),
    )


def edit_spec(config: UNetConfig) -> GraphSpec:
    """``x_edited``: ``x_prev`` with the noised ``reference`` where ``mask`` is 1, or with more noise."""
    event = event_shape(config)
    return GraphSpec(
        inputs=(
            _tensor("x_prev", *event),
            _tensor("mask", 1, *event[1:]),
            _tensor("reference", *event),
            _tensor("noise2", *event),
            _tensor("coefficients", len(EDIT)),
        ),
        outputs=(_tensor("x_edited", *event),),
    )


def edit_low_pass_spec(config: UNetConfig) -> GraphSpec:
    """The same with a low-pass filter in place of the mask: ``rows`` and ``columns`` are its matrices."""
    event = event_shape(config)
    return GraphSpec(
        inputs=(
            _tensor("x_prev", *event),
            _tensor("rows", event[1], event[1]),
            _tensor("columns", event[2], event[2]),
            _tensor("reference", *event),
            _tensor("noise2", *event),
            _tensor("coefficients", len(EDIT)),
        ),
        outputs=(_tensor("x_edited", *event),),
    )


def further_specs(unet: UNetConfig) -> dict[GraphName, GraphSpec]:
    """The specs of the graphs in :data:`FURTHER`."""
    return {"unet_vector_jacobian": unet_vector_jacobian_spec(unet)}


def bundle_specs(
    unet: UNetConfig, classifier: ClassifierConfig | None, guides: Guides = NO_GUIDES, *, schema: int = 2
) -> dict[GraphName, GraphSpec]:
    """The specs of a bundle's graphs. Of the small graphs, schema 1 has only ``update``."""
    specs: dict[GraphName, GraphSpec] = {"unet": unet_spec(unet), "update": update_spec(unet)}
    if schema >= 2:
        specs["update_full"] = update_full_spec(unet, guides)
        specs["threshold"] = threshold_spec(unet, guides)
        specs["edit"] = edit_spec(unet)
        specs["edit_low_pass"] = edit_low_pass_spec(unet)
    if classifier is not None:
        specs[CLASSIFIER_GRADIENT] = classifier_gradient_spec(classifier)
    for name, guide in guides.items():
        if graph_of(name, guide) != "unet":
            specs[graph_of(name, guide)] = guide_spec(unet, guide)
    return specs
