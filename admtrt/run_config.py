"""The configuration of a training run: data, process, networks, training and sampling in one file."""

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
"""The networks that can be trained; the network of a consistency model is a UNet."""


def network_section(task: Task) -> Literal["unet", "classifier", "upsampler"]:
    """The section of the trained network; it is also the kind of network."""
    return "unet" if task == "consistency" else task


def sampler_for(process: DiffusionConfig | EdmConfig, sampler: SamplerConfig | None = None) -> SamplerConfig:
    """A sampler whose unset fields are chosen to fit a process.

    For a process of kind ``edm``: the network's own method, that method's evaluations, and no guidance. For a
    discrete process shorter than the default number of steps: every step.
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
    # The fitted fields do not count as set, so that they are fitted again to another process.
    return SamplerConfig.model_construct(_fields_set=given, **(sampler.model_dump() | fitted))


def _fit(sampler: SamplerConfig, info: ValidationInfo) -> SamplerConfig:
    diffusion: DiffusionConfig | EdmConfig | None = info.data.get("diffusion")  # absent if it was refused
    return sampler if diffusion is None else sampler_for(diffusion, sampler)


FittedSampler = Annotated[SamplerConfig, AfterValidator(_fit), Field(validate_default=True)]
"""Sampler fitted to the process in the preceding field ``diffusion``, see :func:`sampler_for`."""


class DataConfig(Config):
    """Training images.

    ``source`` is a path, or ``digits`` for the images shipped with scikit-learn. ``kind`` is the kind of
    data, for paths that do not show it. ``label_from`` selects where the class of each file in a folder comes
    from; ``on_bad_file`` what to do with files that are not valid images. ``resize`` allows images whose size
    is not ``image_size``. ``hold_out`` is the fraction kept for evaluation; every network holds out the same
    images.

    ``exif_rotation`` rotates images by their EXIF orientation. ``background`` is the grey level, 0 to 255,
    put behind transparent pixels if ``channels`` includes no alpha channel. The original code does neither:
    to train on the same pixels, set ``exif_rotation = false`` and ``background = "none"``.
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

    ``loss`` applies to UNets: ``simple`` (MSE), ``hybrid`` (IDDPM's L_hybrid), ``vlb`` (the variational
    bound, rescaled by the number of steps) or ``kl`` (the bound in bits per dim). Training keeps one EMA of
    the weights for each of ``ema_rates``; the first is exported. With ``ema_warmup`` an EMA averages at most
    about the last tenth of the steps. ``lr_schedule`` ``linear`` and ``cosine`` anneal to 0.
    ``snr_weighting`` weights the squared error by the signal-to-noise ratio: ``min-snr`` as Hang et al. 2023,
    ``p2`` as Choi et al. 2022.

    ``compile`` compiles the network with torch.compile, ``channels_last`` stores images in the memory format
    channels-last, and ``tf32`` lets devices with TF32 round the inputs of float32 matrix products. Each
    changes the speed and the last bits of results.

    For a process of kind ``edm``, the log of the noise level S is drawn from a normal distribution with
    ``sigma_mean`` and ``sigma_std``. The squared error of x_0 is weighted as in Karras et al. 2022,
    (S^2 + d^2) / (S d)^2 with d = ``sigma_data``, or by another ``weighting`` of openai/consistency_models in
    S^-2 (``snr``).
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
    """Training settings of a UNet, which may start from the weights of ``init``, a file or diffusers' folder.

    An unconditional UNet may start from a class-conditional one; the label embedding is dropped.
    """

    init: str | None = later(None)


class ConsistencyTrainingConfig(TrainingConfig):
    """Training settings of a consistency model (Song et al. 2023); the defaults are for distillation.

    ``teacher`` is the file of a UNet trained with the same ``[unet]`` on the same process; one step of Heun's
    method with it leads from a noise level to the next (consistency distillation). Without a teacher, that
    step uses the training image (consistency training). ``levels`` is the number of levels of Karras et al.'s
    grid. With ``first_levels`` the number of levels grows from there as in the paper, section 5, and
    ``target_ema`` is the rate at the start. ``distance`` ``pseudo_huber`` is from Song & Dhariwal 2023;
    ``huber_c`` None means their 0.00054 sqrt(C H W). The weighting ``inverse-step`` is also theirs,
    1 / (S_n - S_{n+1}).
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
    """Training settings of a classifier, with other defaults."""

    lr: Annotated[float, Field(gt=0)] = 3e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.05


def with_sizes_of_data(given: Any) -> Any:
    """Content of a training file, in which networks without sizes get those of the section ``data``.

    Content of another form is returned unchanged, for validation to refuse it.
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
        """The network of this task, or None if the file has no section for it."""
        network: UNetConfig | ClassifierConfig | None = getattr(self, network_section(task))
        return network

    def process(self, task: Task) -> DiffusionConfig | EdmConfig:
        """The process of a trained network; that of a consistency model has the boundary condition."""
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
