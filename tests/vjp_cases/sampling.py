"""Cases of linear maps along axes."""

from __future__ import annotations

import numpy as np
from torch.nn import functional as F

from vjp_cases.case import Case, ints

CASES = [
    Case(
        "Resize",
        (2, 2, 3),
        'y = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">'
        " (x, , c)",
        lambda x, c: F.interpolate(x, scale_factor=(3.0, 2.0)),
        {"c": np.float32([1, 1, 3, 2])},
    ),
    Case("Pad", (4, 5), "y = Pad (x, c)", lambda x, c: F.pad(x, (0, 3, 1, 2)), {"c": ints(0, 1, 0, 0, 2, 3)}),
    Case(
        "Pad",
        (4, 5),
        "y = Pad (x, c)",
        lambda x, c: F.pad(x, (-1, 2, 1, -2)),
        {"c": ints(0, 1, -1, 0, -2, 2)},
    ),
    Case(
        "Pad", (5,), "y = Pad (x, c, , a)", lambda x, c, a: F.pad(x, (2, 1)), {"c": ints(2, 1), "a": ints(-1)}
    ),
    *(
        Case(
            "Pad",
            (2, 4, 5),
            f'y = Pad <mode = "{mode}"> (x, c)',
            lambda x, c, torchs=torchs: F.pad(x, (2, 3, 1, 0), mode=torchs),
            {"c": ints(0, 0, 1, 2, 0, 0, 0, 3)},
        )
        for mode, torchs in (("reflect", "reflect"), ("edge", "replicate"), ("wrap", "circular"))
    ),
    *(
        Case(
            "Resize",
            (2, 5, 6),
            f"y = Resize <{attributes}, axes = [2, 3]> (x, , , c)",
            lambda x, c, options=options: F.interpolate(x, size=(4, 9), **options),
            {"c": ints(4, 9)},
        )
        for attributes, options in (
            ('mode = "linear"', {"mode": "bilinear"}),
            (
                'mode = "linear", coordinate_transformation_mode = "align_corners"',
                {"mode": "bilinear", "align_corners": True},
            ),
            ('mode = "cubic", cubic_coeff_a = -0.75', {"mode": "bicubic"}),
            ('mode = "linear", antialias = 1, exclude_outside = 1', {"mode": "bilinear", "antialias": True}),
            (
                'mode = "cubic", antialias = 1, cubic_coeff_a = -0.5, exclude_outside = 1',
                {"mode": "bicubic", "antialias": True},
            ),
            (
                'mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"',
                {"mode": "nearest"},
            ),
        )
    ),
    Case(
        "Resize",
        (2, 5),
        'y = Resize <mode = "linear", axes = [2]> (x, , c)',
        lambda x, c: F.interpolate(x, scale_factor=1.7, mode="linear", recompute_scale_factor=False),
        {"c": np.float32([1.7])},
    ),
]
