"""The options of samplers, each declared once: its values and what it does.

The command line, the checks and the documentation derive from these declarations. Heavy imports are avoided,
so that ``--help`` stays quick.
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
        help: one sentence for people.
        metavar: form of the value in the help; empty for a flag or if ``values`` are given.
    """

    name: str
    help: str
    values: tuple[Any, ...] = ()
    metavar: str = ""

    @property
    def flag(self) -> bool:
        """True for an option that is either on or off."""
        return not self.values and not self.metavar


_ALL = (
    Option("eta", "Noise of ddim, 0 to 1.", metavar="FLOAT"),
    Option(
        "direction",
        "ddim goes on along eps of the bounded x_0, or along the network's own.",
        get_args(Direction),
    ),
    Option("order", "Order of the solver.", get_args(Order)),
    Option("form", "Keep predictions of earlier steps, or evaluate inside of each step.", get_args(Form)),
    Option("sde", "Add noise at every step."),
    Option("variant", "The function B(h) of UniPC.", get_args(Variant)),
    Option("grid", "How the noise levels are spaced.", get_args(Grid)),
    Option("to", "End without noise, or at the smallest noise level of the training.", get_args(End)),
    Option("denoise_to_zero", "Spend the last evaluation at the smallest noise level."),
    Option(
        "threshold",
        "Bound x_0 by [-1, 1], or by a quantile of its own values, 99.5% unless the bundle has another.",
        get_args(Threshold),
    ),
    Option("threshold_max", "Largest dynamic threshold.", metavar="FLOAT"),
    Option("threshold_order", "Bound x_0 before or after the guide moves it.", get_args(ThresholdOrder)),
    Option("final_order", "How the order falls in the last steps.", get_args(FinalOrder)),
    Option("sigma", "Noise levels between those of the training, or the nearest of them.", get_args(Levels)),
    Option(
        "churn",
        "Noise added before each step: amount, lowest and highest noise level, factor of the noise.",
        metavar="AMOUNT[:LOW:HIGH[:NOISE]]",
    ),
    Option(
        "levels",
        "Indices of the levels of a consistency model; the last is where it ends.",
        metavar="I,J,...",
    ),
    Option("levels_of", "Number of levels that those indices count.", metavar="INTEGER"),
)
OPTIONS = {option.name: option for option in _ALL}
"""Options that only some solvers take, by name."""

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
"""The options, with their defaults, that every multistep solver takes beside its order."""
