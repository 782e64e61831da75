"""A run of training: data, process, networks, training and sampling in one file."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from admtrt.config import (
    BatchSize,
    ClassifierConfig,
    Config,
    DiffusionConfig,
    Fraction,
    ImageSize,
    Positive,
    UNetConfig,
    none_from_text,
)
from admtrt.schedule.sampler import SamplerConfig


def _fit_steps(sampler: SamplerConfig, info: ValidationInfo) -> SamplerConfig:
    diffusion: DiffusionConfig | None = info.data.get("diffusion")  # absent where it was refused
    if diffusion is None or "steps" in sampler.model_fields_set:
        return sampler
    steps = min(int(SamplerConfig.model_fields["steps"].default), diffusion.steps)
    fitted = sampler.model_dump() | {"steps": str(steps)}
    # Not among the fields that were set: with another process it is fitted again.
    return SamplerConfig.model_construct(_fields_set=sampler.model_fields_set, **fitted)


FittedSampler = Annotated[SamplerConfig, AfterValidator(_fit_steps), Field(validate_default=True)]
"""Sampler for the process of the field ``diffusion`` before it: where no steps are given, and the process is
shorter than their default, every step."""


class DataConfig(Config):
    """Training images.

    ``source`` is a path, or ``digits`` for the images shipped with scikit-learn; ``kind`` says what stands
    there where that is not plain from the path. ``label_from`` chooses how files of a folder are classed;
    ``on_bad_file`` what happens with files that are no images. ``resize`` allows images whose size is not
    ``image_size``. ``hold_out`` is the fraction kept for evaluation, the same for every network.

    ``exif_rotation`` turns images as their EXIF data say. ``background`` is the grey level, 0 to 255, behind
    transparent pixels where ``channels`` has no place for them. The original code does neither: for what it
    trained on, set ``exif_rotation = false`` and ``background = "none"``.
    """

    source: str
    kind: Literal["auto", "digits", "folder", "idx", "npz"] = "auto"
    image_size: ImageSize
    channels: Annotated[int, Field(ge=1, le=4)] = 3
    label_from: Literal["auto", "folder", "prefix", "none"] = "auto"
    random_crop: bool = False
    random_flip: bool = False
    resize: bool = True
    exif_rotation: bool = True
    background: Annotated[int, Field(ge=0, le=255)] | None = 255
    on_bad_file: Literal["refuse", "skip"] = "refuse"
    hold_out: Fraction = 0.0

    @field_validator("background", mode="before")
    @classmethod
    def _none_from_text(cls, value: Any) -> Any:
        return none_from_text(value)


class TrainingConfig(Config):
    """How one network is trained.

    ``loss`` applies to UNets: ``simple`` (MSE), ``hybrid`` (IDDPM's L_hybrid), ``vlb`` (the bound itself,
    rescaled by the number of steps) or ``kl`` (the bound in bits per dim). ``ema_rates`` are averaged
    side by side; the first is the one that is exported. ``lr_schedule`` ``linear`` anneals to 0.
    """

    steps: Positive = 1000
    batch_size: BatchSize = 128
    accumulate: BatchSize = 1
    lr: Annotated[float, Field(gt=0)] = 1e-4
    lr_schedule: Literal["constant", "linear"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    ema_rates: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)] = (0.9999,)
    grad_clip: Annotated[float, Field(gt=0)] | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: bool = False
    loss: Literal["simple", "hybrid", "vlb", "kl"] = "hybrid"
    timestep_sampler: Literal["uniform", "loss_second_moment"] = "uniform"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    log_every: Positive = 50
    checkpoint_every: Positive = 1000
    sample_every: Annotated[int, Field(ge=0)] = 0
    max_nan_steps: Positive = 10
    tensorboard: bool = False


class ClassifierTrainingConfig(TrainingConfig):
    """The same for a classifier, with the defaults that suit one."""

    lr: Annotated[float, Field(gt=0)] = 3e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.05


class RunConfig(Config):
    """One file for a UNet, its classifier and its upsampler: data, process, networks, training, sampling."""

    data: DataConfig
    diffusion: DiffusionConfig = DiffusionConfig()
    unet: UNetConfig | None = None
    classifier: ClassifierConfig | None = None
    upsampler: UNetConfig | None = None
    train_unet: TrainingConfig = TrainingConfig()
    train_classifier: ClassifierTrainingConfig = ClassifierTrainingConfig()
    train_upsampler: TrainingConfig = TrainingConfig()
    sampler: FittedSampler = SamplerConfig()

    @model_validator(mode="after")
    def _check_agreement(self) -> Self:
        for name in ("unet", "classifier", "upsampler"):
            network = getattr(self, name)
            if network is None:
                continue
            if network.image_size != self.data.image_size:
                sizes = f"{network.image_size} differs from data.image_size {self.data.image_size}"
                raise ValueError(f"{name}.image_size {sizes}")
            if network.in_channels != self.data.channels:
                channels = f"{network.in_channels} differs from data.channels {self.data.channels}"
                raise ValueError(f"{name}.in_channels {channels}")
        for name in ("unet", "upsampler"):
            if getattr(self, name) is not None:
                self.diffusion.check_variance(getattr(self, name), name)
                if getattr(self, name).null_class is not None:
                    raise ValueError(f"{name}.null_class: training drops no labels, so none would be learned")
        if self.unet is not None and self.unet.low_res_size is not None:
            raise ValueError("unet.low_res_size belongs in the section 'upsampler'")
        if self.upsampler is not None and self.upsampler.low_res_size is None:
            raise ValueError("upsampler.low_res_size is required: the size of the images that it enlarges")
        return self
