"""The structure of FID's Inception, shared by all implementations: names and strides of the 2015-12-05 graph.

Source: TensorFlow's ``classify_image_graph_def.pb``. It differs from later Inceptions: average pools do not
count padding, and the last block has a max pool.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

SIZE = 299
"""Height and width that images are resized to."""
POOL, SPATIAL, CLASSES = 2048, 17 * 17 * 7, 1008
EPSILON = 0.001
"""Epsilon of every batch normalisation."""
_SPATIAL_BLOCK = "mixed_6"
SPATIAL_CHANNELS = 7

T = TypeVar("T")


class Operations(Protocol[T]):
    """Layers of the network; images are [N, C, H, W]."""

    def convolution(self, name: str, x: T, stride: int = 1, *, same: bool = True) -> T:
        """Convolution, batch normalisation, ReLU; ``same`` pads by half the kernel, otherwise no padding."""
        ...

    def average(self, x: T) -> T:
        """3x3 average pooling; padding is not counted."""
        ...

    def largest(self, x: T) -> T:
        """3x3 max pooling."""
        ...

    def halved(self, x: T) -> T:
        """3x3 max pooling, stride 2, no padding."""
        ...

    def joined(self, parts: list[T]) -> T:
        """Concatenation of channels."""
        ...


def inception(ops: Operations[T], x: T) -> tuple[T, T]:
    """The last feature map [N, 2048, 8, 8] and that of the spatial features [N, 192, 17, 17], after ReLU.

    Args:
        ops: how to compute.
        x: images [N, 3, 299, 299], scaled by (x - 128) / 128.
    """

    def chain(block: str, x: T, *names: str) -> T:
        for name in names:
            x = ops.convolution(f"{block}/{name}", x)
        return x

    x = ops.convolution("conv", x, 2, same=False)
    x = ops.convolution("conv_1", x, same=False)
    x = ops.halved(ops.convolution("conv_2", x))
    x = ops.convolution("conv_3", x, same=False)
    x = ops.halved(ops.convolution("conv_4", x, same=False))
    for block in ("mixed", "mixed_1", "mixed_2"):
        x = ops.joined(
            [
                chain(block, x, "conv"),
                chain(block, x, "tower/conv", "tower/conv_1"),
                chain(block, x, "tower_1/conv", "tower_1/conv_1", "tower_1/conv_2"),
                chain(block, ops.average(x), "tower_2/conv"),
            ]
        )
    x = ops.joined(
        [
            ops.convolution("mixed_3/conv", x, 2, same=False),
            ops.convolution(
                "mixed_3/tower/conv_2", chain("mixed_3", x, "tower/conv", "tower/conv_1"), 2, same=False
            ),
            ops.halved(x),
        ]
    )
    spatial = x
    for block in ("mixed_4", "mixed_5", "mixed_6", "mixed_7"):
        first = chain(block, x, "conv")
        if block == _SPATIAL_BLOCK:
            spatial = first
        x = ops.joined(
            [
                first,
                chain(block, x, *(f"tower/conv{end}" for end in ("", "_1", "_2"))),
                chain(block, x, *(f"tower_1/conv{end}" for end in ("", "_1", "_2", "_3", "_4"))),
                chain(block, ops.average(x), "tower_2/conv"),
            ]
        )
    tower = chain("mixed_8", x, "tower_1/conv", "tower_1/conv_1", "tower_1/conv_2")
    x = ops.joined(
        [
            ops.convolution("mixed_8/tower/conv_1", chain("mixed_8", x, "tower/conv"), 2, same=False),
            ops.convolution("mixed_8/tower_1/conv_3", tower, 2, same=False),
            ops.halved(x),
        ]
    )
    for block, pool in (("mixed_9", ops.average), ("mixed_10", ops.largest)):
        left = chain(block, x, "tower/conv")
        right = chain(block, x, "tower_1/conv", "tower_1/conv_1")
        x = ops.joined(
            [
                chain(block, x, "conv"),
                *(chain(block, left, name) for name in ("tower/mixed/conv", "tower/mixed/conv_1")),
                *(chain(block, right, name) for name in ("tower_1/mixed/conv", "tower_1/mixed/conv_1")),
                chain(block, pool(x), "tower_2/conv"),
            ]
        )
    return x, spatial


class _Names:
    """Operations that only record the names of the convolutions."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def convolution(self, name: str, x: None, stride: int = 1, *, same: bool = True) -> None:  # noqa: ARG002
        self.names.append(name)

    def average(self, x: None) -> None: ...

    def largest(self, x: None) -> None: ...

    def halved(self, x: None) -> None: ...

    def joined(self, parts: list[None]) -> None: ...


def convolution_names() -> list[str]:
    """The 94 convolutions in the order of computation."""
    names = _Names()
    inception(names, None)
    return names.names
