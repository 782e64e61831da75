"""The configurations of networks and processes; their defaults are defined only here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from admtrt.config_base import Config, later
from admtrt.config_values import (
    Fraction,
    ImageSize,
    Multipliers,
    OptionalBeta,
    OptionalHeads,
    OptionalPositive,
    OptionalSize,
    Positive,
    PositiveFloat,
    Sizes,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def level_sizes(image_size: int, levels: int, *, rounds_up: bool) -> tuple[int, ...]:
    """Height and width of each level's feature maps, finest first.

    Halving an odd size depends on the layer: pooling rounds down, a strided convolution rounds up.
    """
    sizes = [image_size]
    for _ in range(levels - 1):
        sizes.append((sizes[-1] + rounds_up) // 2)
    return tuple(sizes)


class BackboneConfig(Config):
    """Options that the UNet and the classifier share: the shape of the encoder.

    ``attention_resolutions`` are sizes in pixels (32 = attention where feature maps are 32x32), as in the
    paper. ``num_head_channels`` takes precedence over ``num_heads``. TOML has no null: write ``"none"`` for
    None. Lists may have the format of the original's flags, ``"1,2,4"``.

    Four options have ADM's values by default; diffusers' networks use others. ``downsample_padding`` says
    whether a strided convolution pads on both sides or only ``after`` the image. ``frequency_shift`` is the
    shift of the time embedding's frequencies, exp(-ln(1e4) i / (half - shift)). ``norm_eps`` and
    ``norm_groups`` are the epsilon and the number of groups of the normalisations.
    """

    image_size: ImageSize
    in_channels: Annotated[int, Field(ge=1, le=4)] = 3
    # The bounds are far above any network in use, and low enough to build it without its weights in seconds.
    model_channels: Annotated[int, Field(ge=1, le=8192)] = 128
    num_res_blocks: Annotated[int, Field(ge=1, le=32)] = 2
    channel_mult: Multipliers = (1, 2, 3, 4)
    attention_resolutions: Sizes = (32, 16, 8)
    num_heads: Positive = 4
    num_head_channels: OptionalHeads = None
    new_attention_order: bool = False
    conv_resample: bool = True
    resblock_updown: bool = False
    scale_shift_norm: bool = True
    rescale_residuals: bool = False
    dropout: Fraction = 0.0
    downsample_padding: Literal["both", "after"] = later("both")
    frequency_shift: Literal[0, 1] = later(0)
    norm_eps: Annotated[float, Field(gt=0.0, le=1.0)] = later(1e-5)
    norm_groups: Annotated[int, Field(ge=1, le=8192)] = later(32)

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(int(mult * self.model_channels) for mult in self.channel_mult)

    @property
    def num_blocks(self) -> int:
        """Number of residual blocks of the encoder, without those that only downsample."""
        return len(self.channel_mult) * self.num_res_blocks

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """Height and width of the feature maps of each level, finest first."""
        rounds_up = self.strided and self.downsample_padding == "both"
        return level_sizes(self.image_size, len(self.channel_mult), rounds_up=rounds_up)

    @property
    def strided(self) -> bool:
        """True if strided convolutions halve the feature maps, rather than pooling or residual blocks."""
        return self.conv_resample and not self.resblock_updown

    def _head_counts(self) -> tuple[int, ...]:
        return (self.num_heads,)

    def _can_be_halved(self) -> bool:
        return self.level_sizes[-1] > 0

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        given = self.model_fields_set
        if "num_heads" in given and "num_head_channels" not in given and self.num_head_channels is not None:
            raise ValueError(
                f"num_heads {self.num_heads} would be ignored beside the default num_head_channels "
                f"{self.num_head_channels}; set num_head_channels to 'none' as well"
            )
        return self

    @model_validator(mode="after")
    def _check_shape(self) -> Self:
        if not self.channel_mult:
            raise ValueError("channel_mult is empty; give one multiplier for each level")
        halvings = len(self.channel_mult) - 1
        if not self._can_be_halved():
            raise ValueError(
                f"image_size {self.image_size} cannot be halved {halvings} times for the "
                f"{halvings + 1} levels of channel_mult; use a multiple of {1 << halvings} or fewer levels"
            )
        for channels in self.level_channels:
            if channels < 1 or channels % self.norm_groups:
                raise ValueError(
                    f"a level has {channels} channels (model_channels {self.model_channels} x channel_mult "
                    f"{list(self.channel_mult)}); group normalisation needs multiples of {self.norm_groups}"
                )
        if self.model_channels % 2:
            raise ValueError("model_channels must be even: half of the time embedding is sines, half cosines")
        if self.model_channels // 2 <= self.frequency_shift:
            raise ValueError(f"frequency_shift {self.frequency_shift} leaves no frequency of one")
        if self.downsample_padding == "after" and not self.strided:
            raise ValueError(
                "downsample_padding 'after' is of strided convolutions; conv_resample is "
                f"{self.conv_resample}, resblock_updown {self.resblock_updown}"
            )
        unused = sorted(set(self.attention_resolutions) - set(self.level_sizes))
        if unused:
            raise ValueError(
                f"attention_resolutions {unused} are no level's size; "
                f"the levels are {list(self.level_sizes)} pixels"
            )
        attending = {
            c
            for c, s in zip(self.level_channels, self.level_sizes, strict=True)
            if s in self.attention_resolutions
        }
        for channels in sorted(attending | {self.level_channels[-1]}):
            for width, name in self._head_divisors():
                if channels % width:
                    raise ValueError(
                        f"attention over {channels} channels cannot be divided by {name} {width}"
                    )
        return self

    def _head_divisors(self) -> list[tuple[int, str]]:
        if self.num_head_channels is not None:
            return [(self.num_head_channels, "num_head_channels")]
        return [(heads, "num_heads") for heads in self._head_counts()]


class UNetConfig(BackboneConfig):
    """The ADM UNet; with ``low_res_size`` it is an upsampler conditioned on an image of that size.

    ``num_classes`` makes it class-conditional, ``learn_sigma`` doubles the output channels,
    ``num_heads_upsample`` overrides ``num_heads`` in the decoder. ``null_class`` is the index of the class
    that means "no class" (classifier-free guidance); it cannot be requested.
    """

    num_classes: OptionalPositive = None
    learn_sigma: bool = True
    num_heads_upsample: OptionalHeads = None
    low_res_size: OptionalSize = None
    null_class: Annotated[int, Field(ge=0)] | None = later(None)

    @property
    def out_channels(self) -> int:
        """Channels of the network's output: C, or 2C if sigma is learned."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def classes(self) -> int | None:
        """Number of classes that can be requested, without the null class; None without classes."""
        return (
            self.num_classes if self.num_classes is None or self.null_class is None else self.num_classes - 1
        )

    def own_labels(self, labels: NDArray[np.int64] | None) -> NDArray[np.int64] | None:
        """The network's indices of requested classes, int64 [N]; None if the network has no classes."""
        if labels is None or self.num_classes is None or self.null_class is None:
            return None if self.num_classes is None else labels
        return labels + (labels >= self.null_class)

    def _head_counts(self) -> tuple[int, ...]:
        return (self.num_heads, self.num_heads_upsample or self.num_heads)

    def _can_be_halved(self) -> bool:
        # The decoder concatenates feature maps that it doubled with those that the encoder halved.
        return self.image_size % (1 << (len(self.channel_mult) - 1)) == 0

    @model_validator(mode="after")
    def _check_null_class(self) -> Self:
        if self.null_class is not None and not self.null_class < (self.num_classes or 0) > 1:
            raise ValueError(
                f"null_class {self.null_class} is none of several classes: num_classes is {self.num_classes}"
            )
        return self

    @model_validator(mode="after")
    def _check_low_res(self) -> Self:
        if self.low_res_size is not None and self.low_res_size >= self.image_size:
            raise ValueError(f"low_res_size {self.low_res_size} is not below image_size {self.image_size}")
        return self


class ClassifierConfig(BackboneConfig):
    """The noisy classifier: the UNet's encoder with a pooling head over ``num_classes``."""

    num_classes: Annotated[int, Field(ge=2)]
    resblock_updown: bool = True
    num_head_channels: OptionalHeads = 64
    pool: Literal["attention", "adaptive", "spatial", "spatial_v2"] = "attention"

    @model_validator(mode="after")
    def _check_pool(self) -> Self:
        if self.pool == "attention" and self.num_head_channels is None:
            raise ValueError("pool 'attention' needs num_head_channels")
        return self


class NoiseConfig(Config):
    """The noise schedule of a process; :func:`admtrt.schedule.process.betas` computes the betas.

    ``beta_start`` and ``beta_end`` are the betas of the first and the last step, for any number of steps.
    Without them, a linear schedule has ADM's betas, scaled by 1000 / steps. ``zero_terminal_snr`` shifts and
    scales sqrt(alpha_bar) so that it is 0 at the last step (Lin et al. 2024, algorithm 1).
    """

    steps: Annotated[int, Field(ge=2, le=1_000_000)] = 1000
    schedule: Literal["linear", "cosine", "scaled_linear", "sigmoid"] = "linear"
    beta_start: OptionalBeta = later(None)
    beta_end: OptionalBeta = later(None)
    zero_terminal_snr: bool = later(False)

    @model_validator(mode="after")
    def _check_betas(self) -> Self:
        ends = (self.beta_start, self.beta_end)
        if (ends[0] is None) != (ends[1] is None):
            missing = "beta_start" if ends[0] is None else "beta_end"
            raise ValueError(f"beta_start and beta_end belong together; there is no {missing}")
        if self.schedule == "cosine" and ends[0] is not None:
            raise ValueError("a cosine schedule has no beta_start and beta_end; leave them out")
        if self.schedule in ("scaled_linear", "sigmoid") and ends[0] is None:
            raise ValueError(f"schedule '{self.schedule}' needs beta_start and beta_end")
        if self.schedule == "linear" and ends[0] is None and self.steps <= 20:
            raise ValueError(
                f"a linear schedule of {self.steps} steps has beta >= 1; use 21 steps or more, or 'cosine'"
            )
        return self


class DiffusionConfig(NoiseConfig):
    """The diffusion process and what the network's output means.

    ``mean_type`` ``v`` is sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans & Ho 2022).
    ``variance_type`` ``learned_range`` interpolates between beta~ and beta (IDDPM eq. 15).
    ``rescale_timesteps`` gives the network t * 1000 / steps; IDDPM forks with T = 4000 were trained so.
    """

    kind: Literal["discrete"] = later("discrete")
    mean_type: Literal["eps", "x_0", "previous_x", "v"] = "eps"
    variance_type: Literal["learned_range", "learned", "fixed_small", "fixed_large"] = "learned_range"
    rescale_timesteps: bool = False

    @model_validator(mode="after")
    def _check_signal(self) -> Self:
        if self.zero_terminal_snr and self.mean_type not in ("v", "x_0"):
            raise ValueError(
                f"zero_terminal_snr leaves nothing of x_0 at the last step, where mean_type "
                f"'{self.mean_type}' says nothing of it; it goes with 'v' and 'x_0'"
            )
        return self

    @property
    def time_factor(self) -> float:
        """The networks' ``t`` divided by the timestep."""
        return 1000.0 / self.steps if self.rescale_timesteps else 1.0

    @property
    def learns_sigma(self) -> bool:
        """True if the network outputs variance channels."""
        return self.variance_type.startswith("learned")

    def check_variance(self, network: UNetConfig, name: str = "unet") -> None:
        """Refuse a UNet whose variance channels do not match the process: either has them and the other not.

        Raises:
            ValueError: naming both keys.
        """
        if network.learn_sigma != self.learns_sigma:
            raise ValueError(
                f"{name}.learn_sigma is {network.learn_sigma} but diffusion.variance_type is "
                f"'{self.variance_type}'"
            )


class EdmConfig(Config):
    """A continuous process with the preconditioning of Karras et al. 2022, as in openai/consistency_models.

    With ``boundary`` the network is a consistency model: its scalings make it the identity at ``sigma_min``
    (Song et al. 2023, appendix C). The network's input t is 250 times the log of the noise level.
    """

    kind: Literal["edm"] = "edm"
    boundary: bool
    sigma_data: PositiveFloat = 0.5
    sigma_min: PositiveFloat = 0.002
    sigma_max: PositiveFloat = 80.0
    rho: Annotated[float, Field(ge=1)] = 7.0

    @model_validator(mode="after")
    def _check_ends(self) -> Self:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min:g} is not below sigma_max {self.sigma_max:g}")
        return self

    @property
    def time_factor(self) -> float:
        """Always 1: networks of this kind have no timesteps, see :attr:`DiffusionConfig.time_factor`."""
        return 1.0

    @property
    def learns_sigma(self) -> bool:
        """Always False: networks of this kind output no variance channels."""
        return False

    def check_variance(self, network: UNetConfig, name: str = "unet") -> None:
        """See :meth:`DiffusionConfig.check_variance`."""
        if network.learn_sigma:
            raise ValueError(f"{name}.learn_sigma is True but diffusion.kind 'edm' has no variance channels")


def _kind_of(process: Any) -> str | None:
    """The tag of a process; None for any other value."""
    if isinstance(process, dict):
        return str(process.get("kind", "discrete"))
    return getattr(process, "kind", None)


ProcessConfig = Annotated[
    Annotated[DiffusionConfig, Tag("discrete")] | Annotated[EdmConfig, Tag("edm")], Discriminator(_kind_of)
]
"""The process of a network, by its ``kind``. Older files have no ``kind``: they are discrete."""
