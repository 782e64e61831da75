"""Guides as users define them: a loss as a module, or a second network."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from torch import nn

from admtrt.contract import LEVEL_INPUT
from admtrt.errors import ConfigError, LossError
from admtrt.schedule.guides import GuideConfig, Kind, LossPlace

if TYPE_CHECKING:
    from admtrt.models.unet import UNet

Through = Literal["unet", "x_t"]
_KINDS: Mapping[Through, Kind] = {"unet": "denoiser", "x_t": "noisy"}
STATE_INPUT = "x_t"
_FIRST: Mapping[Through, tuple[str, ...]] = {"unet": ("x0",), "x_t": ("x", "t")}
_FREE: Mapping[Through, tuple[str, ...]] = {"unet": (STATE_INPUT, LEVEL_INPUT), "x_t": ()}


@dataclass(frozen=True, eq=False)
class Guide:
    """A loss whose gradient guides samples.

    Attributes:
        name: of the guide in the bundle.
        loss: ``forward(x0, ...)`` -> [N], smaller is better; each value may depend on its own sample only. x0
            is float32 [N, C, H, W]. The other parameters are named as in ``targets``. A parameter ``x_t``
            receives the state, a parameter ``sqrt_one_minus_alpha_bar`` that number, float32 [N].
        targets: further float32 inputs by name, with their shape without the batch.
        through: ``unet`` for a loss of the x_0 that the UNet predicts, differentiated through the UNet;
            ``x_t`` for a loss of the state, ``forward(x, t, ...)`` with t in the UNet's unit.
        place, scale, normalise, clip: see :class:`~admtrt.schedule.guides.GuideConfig`; ``clip`` exists for
            ``unet`` only. The default place is ``shift`` (DPS) for ``unet`` and ``score`` for ``x_t``.
        kind: name of the built-in loss, for the manifest.

    Raises:
        LossError: if the parameters of the loss are not the targets, or a choice is unknown.
    """

    name: str
    loss: nn.Module
    targets: Mapping[str, Sequence[int]] = field(default_factory=dict)
    through: Through = "unet"
    place: LossPlace | None = None
    scale: float = 1.0
    normalise: str = "none"
    clip: bool = True
    kind: str = "custom"

    def __post_init__(self) -> None:
        if self.through not in _KINDS:
            raise LossError(f"guide '{self.name}': through is {self.through!r}; expected unet or x_t")
        if not isinstance(self.loss, nn.Module):
            raise LossError(
                f"guide '{self.name}': the loss is a {type(self.loss).__name__}; expected a torch.nn.Module"
            )
        first, free = _FIRST[self.through], _FREE[self.through]
        names = self.parameters
        if names[: len(first)] != first:
            raise LossError(
                f"guide '{self.name}': forward takes ({', '.join(names)}); expected {', '.join(first)} first"
            )
        asked = [name for name in names[len(first) :] if name not in free]
        if set(asked) != set(self.targets):
            raise LossError(
                f"guide '{self.name}': forward takes {', '.join(asked) or 'nothing'} besides "
                f"{', '.join(first)}, but the targets are {', '.join(self.targets) or 'none'}",
                hint="Give targets={name: sizes} with the names of forward's parameters.",
            )
        self.config  # noqa: B018 - raises if invalid

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameters of the loss's ``forward``, in order."""
        return tuple(inspect.signature(self.loss.forward).parameters)

    @property
    def config(self) -> GuideConfig:
        """Description for the manifest.

        Raises:
            ExportError: for an invalid choice.
        """
        fields = {
            "kind": _KINDS[self.through],
            "loss": self.kind,
            "place": self.place or ("shift" if self.through == "unet" else "score"),
            "scale": self.scale,
            "normalise": self.normalise,
            "clip": self.clip,
            "targets": {name: list(sizes) for name, sizes in self.targets.items()},
            "level_input": LEVEL_INPUT in self.parameters,
        }
        try:
            return GuideConfig.from_dict(fields, source=f"guide '{self.name}'")
        except ConfigError as error:
            raise LossError(error.message) from None

    def named(self, name: str) -> Guide:
        """The same by another name."""
        return replace(self, name=name)


@dataclass(frozen=True, eq=False)
class Reference:
    """A second evaluation that guidance extrapolates away from: classifier-free guidance, autoguidance.

    Attributes:
        name: of the guide in the bundle.
        network: another UNet, smaller or trained for less; None for the UNet itself with its null class.
        scale: 1 is no guidance; value = reference + scale (value - reference).
    """

    name: str
    network: UNet | None = None
    scale: float = 1.5

    @property
    def config(self) -> GuideConfig:
        """Description for the manifest."""
        loss = "null" if self.network is None else "weak"
        network = None if self.network is None else self.network.config
        return GuideConfig(
            kind="reference", loss=loss, place="reference", scale=self.scale, clip=False, network=network
        )

    def named(self, name: str) -> Reference:
        """The same by another name."""
        return replace(self, name=name)


AnyGuide = Guide | Reference
