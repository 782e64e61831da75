"""The options of samplers, each declared once: its values and its help text.

The command line, the checks and the documentation are derived from these declarations. The module avoids
slow imports, so that ``--help`` stays fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

Order = Literal[1, 2, 3]
Form = Literal["multi", "single"]
Variant = Literal["bh1", "bh2"]
Grid = Literal["time_uniform", "logsnr", "quadratic", "karras", "trained", "respaced"]
End = Literal["zero", "sigma_min"]
Threshold = Literal["static", "dynamic"]
ThresholdOrder = Literal["before_guide", "after_guide"]
FinalOrder = Literal["falling", "dpm-solver", "diffusers", "full"]
Levels = Literal["interpolated", "rounded"]
Direction = Literal["clipped", "network"]


@dataclass(frozen=True)
class Option:
    """One option of a sampler.

    Attributes:
        name: name of the field of :class:`~admtrt.schedule.sampler.SamplerConfig`.
        values: the allowed values; empty for a number, a flag or a list.
        help: help text, one sentence.
        metavar: form of the value in the help; empty for a flag or if ``values`` are given.
    """

    name: str
    help: str
    values: tuple[Any, ...] = ()
    metavar: str = ""

    @property
    def flag(self) -> bool:
        """True for an option that is on or off."""
        return not self.values and not self.metavar


_ALL = (
    Option("eta", "Amount of noise of ddim, 0 to 1.", metavar="FLOAT"),
    Option(
        "direction",
        "The eps of a ddim step: recomputed from the clipped x_0, or the network's own.",
        get_args(Direction),
    ),
    Option("order", "Order of the solver.", get_args(Order)),
    Option(
        "form",
        "Multistep (reuse earlier predictions), or singlestep (evaluate inside each step).",
        get_args(Form),
    ),
    Option("sde", "Add noise at every step."),
    Option("variant", "The function B(h) of UniPC.", get_args(Variant)),
    Option("grid", "Spacing of the noise levels.", get_args(Grid)),
    Option("to", "End at zero noise, or at the smallest noise level of training.", get_args(End)),
    Option("denoise_to_zero", "Use the last evaluation to denoise from the smallest noise level to zero."),
    Option(
        "threshold",
        "Bound x_0 to [-1, 1], or by a quantile of its values: 99.5%, unless the bundle sets another.",
        get_args(Threshold),
    ),
    Option("threshold_max", "Upper limit of the dynamic threshold.", metavar="FLOAT"),
    Option("threshold_order", "Bound x_0 before or after the guide changes it.", get_args(ThresholdOrder)),
    Option("final_order", "How the order decreases in the last steps.", get_args(FinalOrder)),
    Option(
        "sigma",
        "Noise levels interpolated between those of training, or rounded to the nearest of them.",
        get_args(Levels),
    ),
    Option(
        "churn",
        "Noise added before each step: amount, lowest and highest noise level, factor of the noise.",
        metavar="AMOUNT[:LOW:HIGH[:NOISE]]",
    ),
    Option(
        "levels",
        "Indices of a consistency model's noise levels; sampling ends at the last.",
        metavar="I,J,...",
    ),
    Option(
        "levels_of", "Total number of noise levels that the indices of --levels refer to.", metavar="INTEGER"
    ),
)
OPTIONS = {option.name: option for option in _ALL}
"""All options that only some solvers have, by name."""

OF_MULTISTEP = {
    "grid": None,
    "to": "zero",
    "denoise_to_zero": False,
    "threshold": "static",
    "threshold_max": None,
    "threshold_order": "after_guide",
    "final_order": "falling",
    "sigma": "interpolated",
}
"""Options of every multistep solver besides its order, with their defaults."""
