"""Read the process and the recommended sampler of a ``scheduler_config.json``.

Any scheduler with betas is accepted; the recommended sampler is DDPM or DDIM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from admtrt.config import DiffusionConfig, EdmConfig
from admtrt.errors import CheckpointError, ConfigError, RequestError
from admtrt.models.diffusers.values import Values
from admtrt.schedule.process import retained_timesteps
from admtrt.schedule.sampler import SamplerConfig

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from admtrt.config import UNetConfig

DEFAULTS: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "variance_type": None,
    "clip_sample": True,
    "prediction_type": "epsilon",
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "clip_sample_range": 1.0,
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
    "set_alpha_to_one": True,
    "predict_epsilon": True,  # DDPM before v0.10
}
_CONSISTENCY: Mapping[str, Any] = {
    "num_train_timesteps": 40,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "s_noise": 1.0,
    "rho": 7.0,
    "clip_denoised": True,
}
_BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
_OWN = ("DDPMScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDIMParallelScheduler")
_SAME_DEFAULTS = (
    *_OWN, "DDIMInverseScheduler", "PNDMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverMultistepInverseScheduler", "DPMSolverSinglestepScheduler", "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler", "SASolverScheduler", "UniPCMultistepScheduler",
    "RePaintScheduler",
)  # fmt: skip
"""Classes with these default betas."""
_OTHER_PROCESSES = ("ScoreSde", "KarrasVe", "FlowMatch", "EDM", "CogVideoX")
"""Prefixes of classes without betas, or that use betas for something else."""
_OF_SOLVERS = frozenset(
    {
        "skip_prk_steps", "solver_order", "algorithm_type", "solver_type", "lower_order_final",
        "euler_at_final", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas",
        "final_sigmas_type", "lambda_min_clipped", "interpolation_type", "predict_x0", "disable_corrector",
        "solver_p", "timestep_type", "flow_shift", "sigma_min", "sigma_max", "eta", "tensor_format",
        "timestep_values",
    }
)  # fmt: skip
"""Keys that only concern a solver, or are unused: files carry them from one scheduler to the next."""
_SCHEDULES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "cosine",
    "sigmoid": "sigmoid",
}
_MEANS = {"epsilon": "eps", "sample": "x_0", "v_prediction": "v"}
_VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "learned_range": "learned_range",
}
_PIPELINE_STEPS = 50  # default steps of DDIM
_ONE_STEP = 1  # default steps of consistency models


@dataclass(frozen=True)
class Scheduler:
    """A process and its sampler as described by a file.

    Attributes:
        process: the network's process.
        sampler: the recommended sampler.
        quantile: quantile of dynamic thresholds; None without them.
        notes: notes for the user.
    """

    process: DiffusionConfig | EdmConfig
    sampler: SamplerConfig
    quantile: float | None
    notes: tuple[str, ...]


def read_scheduler(file: Path, data: Mapping[str, Any], network: UNetConfig) -> Scheduler:
    """Read the process and the sampler of a file.

    Args:
        file: for messages.
        data: the content of the file.
        network: the network whose output the file describes.

    Raises:
        CheckpointError: naming the file, a key and its value.
    """
    name = data.get("_class_name", _OWN[0])
    if not isinstance(name, str) or name.startswith(_OTHER_PROCESSES):
        raise CheckpointError(
            f"{file} is of the class {str(name)[:60]!r}, which has another process than ADM",
            hint="Processes that are made of betas can be used, and that of consistency models.",
        )
    try:
        if name == "CMStochasticIterativeScheduler":
            return _consistency(Values(file, data, _CONSISTENCY), network)
        return _discrete(Values(file, data, DEFAULTS), name, network)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error.message}") from None


def _discrete(values: Values, name: str, network: UNetConfig) -> Scheduler:
    if name not in _SAME_DEFAULTS:
        missing = [key for key in _BETAS if key not in values.data]
        if missing:
            raise CheckpointError(
                f"{values.file} is of the class {name[:60]!r} and lacks {', '.join(missing)}, whose defaults "
                "there are not known",
                hint="Write them into the file.",
            )
    if name in _OWN:
        values.check_unknown(_OF_SOLVERS)
    else:
        values.notes.append(
            f"the process of {name[:60]} is taken, not its sampler: DDPM with every step is recommended"
        )
    values.fixed("trained_betas", None, reason="ADM's betas come from a formula")
    if values.data.get("use_flow_sigmas"):
        raise CheckpointError(f"{values.file}: use_flow_sigmas is true; ADM has no flows")
    process = _process(values, network)
    sampler, quantile = _sampler(values, name, process)
    if name.startswith("DDIM") and not values.flag("set_alpha_to_one"):
        values.notes.append("set_alpha_to_one is false: here the last step leads to the image all the same")
    return Scheduler(process, sampler, quantile, tuple(values.notes))


def _process(values: Values, network: UNetConfig) -> DiffusionConfig:
    steps = values.whole("num_train_timesteps", 2, 1_000_000)
    schedule = values.choice("beta_schedule", _SCHEDULES)
    ends = {key: values.number(key) for key in ("beta_start", "beta_end")}
    for key, value in ends.items():
        if not 0 < value < 1:
            raise values.refused(key, "expected a number between 0 and 1")
    # ADM's own betas, which a classifier for it may have been trained with.
    usual = schedule == "linear" and steps == 1000 and (ends["beta_start"], ends["beta_end"]) == (1e-4, 0.02)
    mean = _mean(values)
    without_signal = values.flag("rescale_betas_zero_snr")
    if without_signal and mean == "eps":
        raise values.refused(
            "rescale_betas_zero_snr",
            "it goes with prediction_type 'v_prediction' and 'sample', and here that is 'epsilon'",
        )
    return DiffusionConfig.from_dict(
        {
            "steps": steps,
            "schedule": schedule,
            **({} if usual or schedule == "cosine" else ends),
            "zero_terminal_snr": without_signal,
            "mean_type": mean,
            "variance_type": _variance(values, network),
        },
        source="its process",
    )


def _mean(values: Values) -> str:
    if "prediction_type" not in values.data and values["predict_epsilon"] is False:
        return "x_0"
    mean: str = values.choice("prediction_type", _MEANS)
    return mean


def _variance(values: Values, network: UNetConfig) -> str:
    """The variance type, which has to fit the number of output channels."""
    if values["variance_type"] is None:
        if network.learn_sigma:
            raise values.refused(
                "variance_type", "the network has variance channels", hint="Write 'learned_range' there."
            )
        return "fixed_small"
    large = values["variance_type"] == "fixed_large_log"
    hint = "Its standard deviation is not a number there; write 'fixed_large'." if large else ""
    variance: str = values.choice("variance_type", _VARIANCES, hint=hint)
    if network.learn_sigma != (variance == "learned_range"):
        has = "variance channels" if network.learn_sigma else "no variance channels"
        raise values.refused("variance_type", f"the network has {has} (out_channels {network.out_channels})")
    return variance


def _sampler(values: Values, name: str, process: DiffusionConfig) -> tuple[SamplerConfig, float | None]:
    """The defaults of diffusers' pipelines: DDPM takes every step, DDIM 50."""
    chosen: dict[str, Any] = {"method": "ddpm", "steps": str(process.steps), "scale": 0.0}
    spacing = values.choice("timestep_spacing", {kind: kind for kind in ("leading", "linspace", "trailing")})
    offset = values.whole("steps_offset", 0, 1_000_000)
    if name.startswith("DDIM"):
        text = f"{spacing}:{min(_PIPELINE_STEPS, process.steps)}"
        text += f"+{offset}" if spacing == "leading" and offset else ""
        chosen |= {"method": "ddim", "steps": text}
        try:
            retained_timesteps(process.steps, text)
        except RequestError as error:
            raise values.refused("steps_offset", error.message) from None
    thresholding, clip, bound = (
        values.flag("thresholding"),
        values.flag("clip_sample"),
        _positive(values, "clip_sample_range"),
    )
    if not thresholding:
        return SamplerConfig.from_dict(
            chosen | {"clip": bound if clip else False}, source="its sampler"
        ), None
    most, ratio = _positive(values, "sample_max_value"), values.number("dynamic_thresholding_ratio")
    if most < 1:
        raise values.refused("sample_max_value", "with thresholding it is 1 or more")
    if not 0 < ratio < 1:
        raise values.refused("dynamic_thresholding_ratio", "expected a number between 0 and 1")
    if most > 1:  # 1 is plain clipping
        chosen |= {"threshold": "dynamic", "threshold_max": most}
    return SamplerConfig.from_dict(chosen, source="its sampler"), ratio if most > 1 else None


def _positive(values: Values, key: str) -> float:
    number = values.number(key)
    if number <= 0:
        raise values.refused(key, "expected a number above 0")
    return number


def _consistency(values: Values, network: UNetConfig) -> Scheduler:
    """Consistency models, converted from openai/consistency_models."""
    values.check_unknown()
    values.fixed("s_noise", 1.0)
    levels = values.whole("num_train_timesteps", 2, 100_000)
    process = EdmConfig.from_dict(
        {
            "boundary": True,
            **{key: values.number(key) for key in ("sigma_min", "sigma_max", "sigma_data", "rho")},
        },
        source="its process",
    )
    if network.learn_sigma:
        raise CheckpointError(
            f"{values.file} is of consistency models, which have no variance channels; the network has "
            f"out_channels {network.out_channels}"
        )
    sampler = SamplerConfig.from_dict(
        {
            "method": "consistency",
            "steps": _ONE_STEP,
            "scale": 0.0,
            "levels_of": levels,
            "clip": values.flag("clip_denoised"),
        },
        source="its sampler",
    )
    return Scheduler(process, sampler, None, tuple(values.notes))
