"""A run of training: data, process, networks, training and sampling in one file."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from admtrt.config import ClassifierConfig, DiffusionConfig, EdmConfig, ProcessConfig, UNetConfig
from admtrt.config_base import Config, later
from admtrt.config_values import BatchSize, Fraction, ImageSize, OptionalGrey, Positive, PositiveFloat
from admtrt.schedule.sampler import SamplerConfig
from admtrt.schedule.solvers import SOLVERS
from admtrt.schedule.solvers.registry import own_solver

Task = Literal["unet", "classifier", "upsampler", "consistency"]
"""Networks that can be trained; a consistency model is a UNet."""


def network_section(task: Task) -> Literal["unet", "classifier", "upsampler"]:
    """The section of the network that is trained, and so its kind."""
    return "unet" if task == "consistency" else task


def sampler_for(process: DiffusionConfig | EdmConfig, sampler: SamplerConfig | None = None) -> SamplerConfig:
    """A sampler with what was not given of it fitted to a process.

    Of a process of kind ``edm`` that is the network's own method, its evaluations and no guidance; of a
    discrete one that is shorter than the default number of steps, every step.
    """
    sampler = SamplerConfig() if sampler is None else sampler
    given = sampler.model_fields_set
    fitted: dict[str, str | float] = {}
    if isinstance(process, EdmConfig):
        if "method" not in given:
            fitted["method"] = own_solver(process).name
        solver = SOLVERS[str(fitted.get("method", sampler.method))]
        fitted["steps"] = solver.edm_steps or solver.default_steps
        if sampler.levels is not None:
            fitted["steps"] = str(len(sampler.levels) - 1)
        fitted["scale"] = 0.0
    elif SOLVERS[sampler.method].steps == "evaluations":
        fitted["steps"] = SOLVERS[sampler.method].default_steps
    else:
        fitted["steps"] = str(min(int(SamplerConfig.model_fields["steps"].default), process.steps))
    fitted = {name: value for name, value in fitted.items() if name not in given}
    if not fitted:
        return sampler
    # Not among the fields that were set: with another process they are fitted again.
    return SamplerConfig.model_construct(_fields_set=given, **(sampler.model_dump() | fitted))


def _fit(sampler: SamplerConfig, info: ValidationInfo) -> SamplerConfig:
    diffusion: DiffusionConfig | EdmConfig | None = info.data.get("diffusion")  # absent where it was refused
    return sampler if diffusion is None else sampler_for(diffusion, sampler)


FittedSampler = Annotated[SamplerConfig, AfterValidator(_fit), Field(validate_default=True)]
"""Sampler fitted to the process of the field ``diffusion`` before it, see :func:`sampler_for`."""


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
    background: OptionalGrey = 255
    on_bad_file: Literal["refuse", "skip"] = "refuse"
    hold_out: Fraction = 0.0


Weighting = Literal["karras", "snr", "snr+1", "truncated-snr", "uniform", "inverse-step"]
SnrWeighting = Literal["none", "min-snr", "p2"]


class TrainingConfig(Config):
    """Training settings of one network.

    ``loss`` applies to UNets: ``simple`` (MSE), ``hybrid`` (IDDPM's L_hybrid), ``vlb`` (the bound itself,
    rescaled by the number of steps) or ``kl`` (the bound in bits per dim). ``ema_rates`` are averaged
    side by side; the first is the one that is exported; with ``ema_warmup`` none remembers more than about
    the last tenth of the steps. ``lr_schedule`` ``linear`` and ``cosine`` anneal to 0. ``snr_weighting``
    weights the squared error by the signal-to-noise ratio: ``min-snr`` as Hang et al. 2023, ``p2`` as Choi
    et al. 2022.

    ``compile`` has torch.compile fuse the network, ``channels_last`` lays images out as convolutions like
    them, and ``tf32`` lets devices that have it round the inputs of float32 matrix products: each changes
    speed, and the last bits.

    On a process of kind ``edm`` the log of the noise level S is normal with ``sigma_mean`` and ``sigma_std``,
    and the squared error of x_0 is weighted as Karras et al. 2022 do, (S^2 + d^2) / (S d)^2 with
    d = ``sigma_data``, or by another ``weighting`` of openai/consistency_models in S^-2 (``snr``).
    """

    steps: Positive = 1000
    batch_size: BatchSize = 128
    accumulate: BatchSize = 1
    lr: Annotated[float, Field(gt=0)] = 1e-4
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    ema_rates: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)] = (0.9999,)
    grad_clip: Annotated[float, Field(gt=0)] | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: bool = False
    loss: Literal["simple", "hybrid", "vlb", "kl"] = "hybrid"
    timestep_sampler: Literal["uniform", "loss_second_moment", "stratified"] = "uniform"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    log_every: Positive = 50
    checkpoint_every: Positive = 1000
    sample_every: Annotated[int, Field(ge=0)] = 0
    max_nan_steps: Positive = 10
    tensorboard: bool = False
    weighting: Weighting = later("karras")
    sigma_mean: float = later(-1.2)
    sigma_std: PositiveFloat = later(1.2)
    snr_weighting: SnrWeighting = later("none")
    ema_warmup: bool = later(False)
    compile: bool = later(False)
    channels_last: bool = later(False)
    tf32: bool = later(False)


class UNetTrainingConfig(TrainingConfig):
    """The same for a UNet, which may start from the weights of ``init``, a file or diffusers' folder.

    An unconditional UNet may start from a class-conditional one, without its labels.
    """

    init: str | None = later(None)


class ConsistencyTrainingConfig(TrainingConfig):
    """The same for a consistency model (Song et al. 2023), with its defaults for distillation.

    ``teacher`` is the file of a UNet trained with the same ``[unet]`` on the same process, whose step of
    Heun's method leads from a noise level to the next; without one, the image does (consistency training).
    ``levels`` of Karras et al.'s grid are trained on; with ``first_levels`` they grow from that number as in
    the paper, section 5, and ``target_ema`` is the rate at their beginning. ``distance`` ``pseudo_huber`` is
    that of Song & Dhariwal 2023, with ``huber_c`` None for their 0.00054 sqrt(C H W), and the weighting
    ``inverse-step`` theirs, 1 / (S_n - S_{n+1}).
    """

    ema_rates: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)] = (0.999,)
    weighting: Weighting = "uniform"
    teacher: str | None = None
    levels: Annotated[int, Field(ge=2, le=100_000)] = 40
    first_levels: Annotated[int, Field(ge=2, le=100_000)] | None = None
    target_ema: Fraction = 0.95
    distance: Literal["l2", "pseudo_huber"] = "l2"
    huber_c: PositiveFloat | None = None

    @model_validator(mode="after")
    def _check_levels(self) -> Self:
        if self.first_levels is not None and self.first_levels > self.levels:
            raise ValueError(f"first_levels {self.first_levels} is above levels {self.levels}")
        if self.huber_c is not None and self.distance != "pseudo_huber":
            raise ValueError("huber_c belongs to the distance 'pseudo_huber'")
        return self


class ClassifierTrainingConfig(TrainingConfig):
    """The same for a classifier, with the defaults that suit one."""

    lr: Annotated[float, Field(gt=0)] = 3e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.05


def with_sizes_of_data(given: Any) -> Any:
    """Content of a training file, whose networks have the sizes of ``data`` where they say none.

    What has another form is returned as it is: validation tells what is wrong with it.
    """
    data = given.get("data") if isinstance(given, dict) else None
    if not isinstance(data, dict):
        return given
    known = {"image_size": data.get("image_size"), "in_channels": data.get("channels")}
    known = {key: value for key, value in known.items() if value is not None}
    networks = {name: given[name] for name in ("unet", "classifier", "upsampler") if name in given}
    filled = {name: known | one if isinstance(one, dict) else one for name, one in networks.items()}
    return {**given, **filled}


class RunConfig(Config):
    """One file for a UNet, its classifier and its upsampler: data, process, networks, training, sampling."""

    data: DataConfig
    diffusion: ProcessConfig = DiffusionConfig()
    unet: UNetConfig | None = None
    classifier: ClassifierConfig | None = None
    upsampler: UNetConfig | None = None
    train_unet: UNetTrainingConfig = UNetTrainingConfig()
    train_classifier: ClassifierTrainingConfig = ClassifierTrainingConfig()
    train_upsampler: TrainingConfig = TrainingConfig()
    train_consistency: ConsistencyTrainingConfig = later(ConsistencyTrainingConfig())
    sampler: FittedSampler = SamplerConfig()

    @model_validator(mode="before")
    @classmethod
    def _take_sizes_of_data(cls, given: Any) -> Any:
        return with_sizes_of_data(given)

    def network(self, task: Task) -> UNetConfig | ClassifierConfig | None:
        """Network of this section, if there is such a section."""
        network: UNetConfig | ClassifierConfig | None = getattr(self, network_section(task))
        return network

    def process(self, task: Task) -> DiffusionConfig | EdmConfig:
        """The process of a trained network: a consistency model is held to its boundary."""
        if task == "consistency" and isinstance(self.diffusion, EdmConfig):
            return self.diffusion.model_copy(update={"boundary": True})
        return self.diffusion

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
