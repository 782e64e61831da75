"""Cases of pooling."""

from __future__ import annotations

from typing import Any

from torch.nn import functional as F

from vjp_cases.case import Case


def pools(kernel: Any, stride: Any, pad: Any, dilation: Any, ceil: bool) -> list[Case]:
    """Max and average pooling of [2, 7, 8] with these windows; the average has no dilation in PyTorch."""

    def pair(value: Any) -> list[int]:
        return list(value) if isinstance(value, tuple) else [value, value]

    attributes = f"kernel_shape = {pair(kernel)}, strides = {pair(stride)}, pads = {pair(pad) * 2}"
    attributes += f", ceil_mode = {int(ceil)}"
    largest = Case(
        "MaxPool",
        (2, 7, 8),
        f"y = MaxPool <{attributes}, dilations = {pair(dilation)}> (x)",
        lambda x: F.max_pool2d(x, kernel, stride, pad, dilation, ceil),
    )
    if dilation != 1 or ceil:  # with ceil_mode ONNX Runtime counts what PyTorch does not
        return [largest]
    return [
        largest,
        *(
            Case(
                "AveragePool",
                (2, 7, 8),
                f"y = AveragePool <{attributes}, count_include_pad = {int(counted)}> (x)",
                lambda x, counted=counted: F.avg_pool2d(x, kernel, stride, pad, ceil, counted),
            )
            for counted in (False, True)
        ),
    ]


CASES = [
    Case(
        "MaxPool",
        (2, 4, 6),
        "y = MaxPool <kernel_shape = [2, 3], strides = [2, 3]> (x)",
        lambda x: F.max_pool2d(x, (2, 3)),
    ),
    Case(
        "MaxPool", (3, 8), "y = MaxPool <kernel_shape = [4], strides = [4]> (x)", lambda x: F.max_pool1d(x, 4)
    ),
    Case(
        "AveragePool",
        (2, 4, 6),
        "y = AveragePool <kernel_shape = [2, 3], strides = [2, 3]> (x)",
        lambda x: F.avg_pool2d(x, (2, 3)),
    ),
    *(
        case
        for kernel, stride, pad, dilation, ceil in (
            (3, 2, 1, 1, False),
            (3, 1, 1, 1, False),
            (2, 2, 0, 1, False),
            (2, 3, 0, 1, False),
            (3, 2, 0, 1, True),
            (2, 2, 0, 2, False),
            ((3, 2), (1, 2), (1, 0), (2, 1), True),
        )
        for case in pools(kernel, stride, pad, dilation, ceil)
    ),
]
