"""Gradient rules of pooling: the maximum or the mean of windows of an image.

With g the gradient of the output and dx the gradient of the input:

- MaxPool: dx = sum of g over the windows in which x is the first maximum
- AveragePool: dx = sum of g / (number of positions counted) over the windows that contain x
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import onnx_ir as ir

from admtrt.errors import ExportError
from admtrt.export.nodes import dims_of, input_of, int_attribute, ints_attribute
from admtrt.export.vjp.rule import only, rule
from admtrt.export.vjp.sampling import enlarged

if TYPE_CHECKING:
    from admtrt.export.tape import Tape
    from admtrt.export.vjp.rule import Gradients


class _Windows(NamedTuple):
    """The windows of a pooling along each spatial axis: image size, number of windows, geometry."""

    sizes: list[int]
    counts: list[int]
    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    before: list[int]
    after: list[int]

    @property
    def tile(self) -> bool:
        """True if the windows cover every position exactly once."""
        covered = [count * k for count, k in zip(self.counts, self.kernel, strict=True)]
        plain = not any(self.before) and {*self.dilations} == {1}
        return plain and self.strides == self.kernel and covered == self.sizes

    @property
    def reach(self) -> list[int]:
        """End of the last window, counted from the start of the padding."""
        axes = zip(self.counts, self.strides, self.dilations, self.kernel, strict=True)
        return [(count - 1) * stride + dilation * (k - 1) + 1 for count, stride, dilation, k in axes]


def _windows(node: ir.Node) -> _Windows:
    kernel = ints_attribute(node, "kernel_shape", ())
    rank = len(kernel)
    if "auto_pad" in node.attributes and node.attributes["auto_pad"].as_string() not in ("NOTSET", ""):
        raise ExportError(f"{node.op_type} '{node.name}' uses auto_pad", hint="Give explicit padding.")
    sizes = [size or 0 for size in dims_of(input_of(node, 0))[1:]]
    counts = [size or 0 for size in dims_of(node.outputs[0])[2:]]
    if not all(sizes) or not all(counts):
        raise ExportError(f"{node.op_type} '{node.name}' pools an axis of unknown size")
    pads = ints_attribute(node, "pads", [0] * (2 * rank))
    strides, dilations = (ints_attribute(node, name, [1] * rank) for name in ("strides", "dilations"))
    return _Windows(sizes[1:], counts, kernel, strides, dilations, pads[:rank], pads[rank:])


@rule("MaxPool")
def _max_pool(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """A window's gradient goes to its first maximum, as in PyTorch: a one-hot product, no scatter."""
    x, windows = input_of(node, 0), _windows(node)
    g = only(incoming)
    back = _to_tiles(tape, x, g, windows) if windows.tile else _to_windows(tape, x, g, windows)
    return [back]


def _to_tiles(tape: Tape, x: ir.Value, g: ir.Value, windows: _Windows) -> ir.Value:
    counts, kernel, rank = windows.counts, windows.kernel, len(windows.kernel)
    apart = [size for pair in zip(counts, kernel, strict=True) for size in pair]
    channels = dims_of(x)[1] or 0
    windows_last = [0, 1, *range(2, 2 * rank + 1, 2), *range(3, 2 * rank + 2, 2)]
    values = tape.op("Transpose", tape.op("Reshape", x, tape.ints(-1, channels, *apart)), perm=windows_last)
    values = tape.op("Reshape", values, tape.ints(-1, channels, *counts, math.prod(kernel)))
    chosen = _one_hot_largest(tape, values, math.prod(kernel), behind=0)
    spread = tape.op("Mul", chosen, tape.op("Reshape", g, tape.ints(-1, channels, *counts, 1)))
    back = tape.op("Reshape", spread, tape.ints(-1, channels, *counts, *kernel))
    back = tape.op("Transpose", back, perm=[windows_last.index(axis) for axis in range(2 * rank + 2)])
    return tape.reshape_like(back, x)


def _to_windows(tape: Tape, x: ir.Value, g: ir.Value, windows: _Windows) -> ir.Value:
    """Extract windows that overlap, pad or leave gaps, with one strided slice per kernel position."""
    assert x.dtype is not None
    channels, rank, places = dims_of(x)[1] or 0, len(windows.kernel), math.prod(windows.kernel)
    after = [
        max(r - size - p, 0) for r, size, p in zip(windows.reach, windows.sizes, windows.before, strict=True)
    ]
    padded = x
    if any(windows.before) or any(after):
        least = tape.array(np.array(-np.inf, x.dtype.numpy()))
        padded = tape.op("Pad", x, tape.ints(0, 0, *windows.before, 0, 0, *after), least)
    axes, steps = tape.ints(*range(2, 2 + rank)), tape.ints(*windows.strides)
    parts = []
    for place in itertools.product(*map(range, windows.kernel)):
        starts = [d * index for d, index in zip(windows.dilations, place, strict=True)]
        ends = [
            s + (n - 1) * step + 1 for s, n, step in zip(starts, windows.counts, windows.strides, strict=True)
        ]
        part = tape.op("Slice", padded, tape.ints(*starts), tape.ints(*ends), axes, steps)
        parts.append(tape.op("Unsqueeze", part, tape.ints(2)))
    chosen = _one_hot_largest(tape, tape.op("Concat", *parts, axis=2), places, behind=rank)
    spread = tape.op("Mul", chosen, tape.op("Unsqueeze", g, tape.ints(2)))
    spread = tape.op("Reshape", spread, tape.ints(-1, channels * places, *windows.counts))
    weights = np.eye(places, dtype=x.dtype.numpy()).reshape(places, 1, *windows.kernel)
    return _put_back(tape, spread, np.tile(weights, (channels, *[1] * (rank + 1))), windows, channels)


def _one_hot_largest(tape: Tape, values: ir.Value, places: int, *, behind: int) -> ir.Value:
    """One-hot of the first maximum along an axis, given the number of axes after it."""
    assert values.dtype is not None
    taken = tape.op("ArgMax", values, axis=-1 - behind, keepdims=1)
    numbers = tape.array(np.arange(places).reshape(-1, *[1] * behind))
    return tape.cast(tape.op("Equal", taken, numbers), values.dtype)


def _put_back(
    tape: Tape,
    value: ir.Value,
    weights: np.ndarray[tuple[int, ...], np.dtype[np.generic]],
    windows: _Windows,
    channels: int,
) -> ir.Value:
    """Sum over the windows that contain a position: a depthwise ConvTranspose, cropped to the image."""
    back = tape.op(
        "ConvTranspose", value, tape.array(weights), kernel_shape=windows.kernel, strides=windows.strides,
        dilations=windows.dilations, group=channels,
    )  # fmt: skip
    ends = [p + size for p, size in zip(windows.before, windows.sizes, strict=True)]
    short = [max(end - r, 0) for end, r in zip(ends, windows.reach, strict=True)]
    rank = len(windows.kernel)
    if any(short):  # positions that no window reaches
        back = tape.op("Pad", back, tape.ints(*[0] * (rank + 2), 0, 0, *short))
    if not any(windows.before) and all(e >= r for e, r in zip(ends, windows.reach, strict=True)):
        return back
    return tape.op(
        "Slice", back, tape.ints(*windows.before), tape.ints(*ends), tape.ints(*range(2, 2 + rank))
    )


@rule("AveragePool")
def _average_pool(tape: Tape, node: ir.Node, incoming: Gradients) -> Gradients:
    """Every position gets its share of each window that contains it."""
    x, windows, g = input_of(node, 0), _windows(node), only(incoming)
    assert x.dtype is not None
    if windows.tile:
        share = tape.op("Mul", g, tape.scalar(1 / math.prod(windows.kernel), x))
        return [enlarged(tape, share, windows.kernel)]
    with_pads = bool(int_attribute(node, "count_include_pad", 0))
    counts = np.ones([1, 1, *windows.counts])
    for axis in range(len(windows.kernel)):
        first, size = -windows.before[axis], windows.sizes[axis]
        low, high = (first, size + windows.after[axis]) if with_pads else (0, size)
        starts = first + np.arange(windows.counts[axis]) * windows.strides[axis]
        places = starts[:, None] + np.arange(windows.kernel[axis]) * windows.dilations[axis]
        within = ((places >= low) & (places < high)).sum(axis=1)
        counts = counts * within.reshape([-1 if a == axis + 2 else 1 for a in range(counts.ndim)])
    channels = dims_of(x)[1] or 0
    share = tape.op("Mul", g, tape.array((1 / counts).astype(x.dtype.numpy())))
    weights = np.ones((channels, 1, *windows.kernel), x.dtype.numpy())
    return [_put_back(tape, share, weights, windows, channels)]
