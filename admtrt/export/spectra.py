"""Decompose STFT into a convolution."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from admtrt.export.nodes import dims_of, input_of, int_attribute
from admtrt.export.passes import constant


def nodes_of_stft(graph: ir.Graph, stft: ir.Node) -> list[ir.Node]:
    """Nodes that compute the STFT of real signals; empty if they are complex, or its parameters computed.

    The kernels are the window times cos(2 pi k n / size) and -sin(2 pi k n / size), for each frequency k; the
    stride is the step between frames.
    """
    signal = input_of(stft, 0)
    dims, dtype = dims_of(signal), signal.dtype
    step, window, length = (_constant(stft, index) for index in (1, 2, 3))
    if dims[2:] not in ([], [1]) or dtype is None or step is None or (window is None and length is None):
        return []
    if len(stft.inputs) > 2 and stft.inputs[2] is not None and window is None:
        return []
    size = int(length.item()) if length is not None else len(window if window is not None else ())
    bins = size // 2 + 1 if int_attribute(stft, "onesided", 1) else size
    turns = np.exp(-2j * np.pi * np.outer(np.arange(bins), np.arange(size)) / size)
    turns *= np.ones(size) if window is None else window.astype(np.float64)
    kernels = np.stack([turns.real, turns.imag], 1).reshape(2 * bins, 1, size)
    tape = ir.tape.Tape()
    row = (
        tape.op("Transpose", [signal], attributes={"perm": [0, 2, 1]})
        if len(dims) == 3
        else tape.op("Unsqueeze", [signal, constant(graph, np.array([1]))])
    )
    frames = tape.op(
        "Conv",
        [row, constant(graph, kernels.astype(dtype.numpy()))],
        attributes={"kernel_shape": [size], "strides": [int(step.item())]},
    )
    turned = tape.op("Transpose", [frames], attributes={"perm": [0, 2, 1]})
    tape.op("Reshape", [turned, constant(graph, np.array([0, 0, bins, 2]))])
    return list(tape.nodes)


def _constant(node: ir.Node, index: int) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]] | None:
    """The value of an input; None if it is absent or computed."""
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None or value.const_value is None else value.const_value.numpy()
