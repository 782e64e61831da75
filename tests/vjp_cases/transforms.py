"""Cases of Fourier transforms and overlapping patches."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from vjp_cases.case import Case, ints

PAIR = "u = Unsqueeze (x, tail) p = DFT <axis = 2, onesided = 1> (u)"


def parts(x: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(x)


CASES = [
    *(
        Case(
            "DFT",
            (3, 5, 2),
            f"y = DFT <axis = {axis}, inverse = {inverse}> (x)",
            lambda x, axis=axis, transform=transform: parts(
                transform(torch.view_as_complex(x.contiguous()), dim=axis)
            ),
        )
        for axis in (1, 2)
        for inverse, transform in ((0, torch.fft.fft), (1, torch.fft.ifft))
    ),
    Case(
        "DFT",
        (3, 5),
        "u = Unsqueeze (x, tail) y = DFT <axis = 2> (u)",
        lambda x, tail: parts(torch.fft.fft(x)),
        {"tail": ints(3)},
    ),
    *(
        Case(
            "DFT",
            (3, size),
            PAIR + " y = Mul (p, p)",
            lambda x, tail: parts(torch.fft.rfft(x)) ** 2,
            {"tail": ints(3)},
        )
        for size in (5, 6)
    ),
    *(
        Case(
            "DFT",
            (3, size),
            f"{PAIR} q = Mul (p, p) y = DFT <axis = 2, inverse = 1, onesided = 1> (q, n)",
            lambda x, tail, n, size=size: torch.fft.irfft(
                torch.view_as_complex(parts(torch.fft.rfft(x)) ** 2), n=size
            )[..., None],
            {"tail": ints(3), "n": np.int64(size)},
        )
        for size in (5, 6)
    ),
    Case(
        "DFT",
        (3, 4, 2),
        "y = DFT (x, , axis)",
        lambda x, axis: parts(torch.fft.fft(torch.view_as_complex(x.contiguous()), dim=2)),
        {"axis": np.int64(2)},
        opset=20,
    ),
    *(
        Case(
            "Col2Im",
            (12, blocks),
            f"y = Col2Im <strides = [{stride}, 1], pads = [1, 0, 1, 0], dilations = [1, {dilation}]>"
            " (x, s, b)",
            lambda x, s, b, stride=stride, dilation=dilation: F.fold(
                x, (5, 6), (3, 2), (1, dilation), (1, 0), (stride, 1)
            ),
            {"s": ints(5, 6), "b": ints(3, 2)},
        )
        for stride, dilation, blocks in ((1, 1, 25), (2, 1, 15), (2, 3, 9))
    ),
]
