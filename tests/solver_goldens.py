"""The goldens of fast solvers: each case as one of our samplers, its networks, inputs and stored numbers.

Made with the public code of DPM-Solver, UniPC, EDM, consistency_models and diffusers;
``tests/data/README.md`` says how.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
import unoffered_rows
from goldens import arrays, classifier_config, metadata, unet_config

from admtrt.config import DiffusionConfig, EdmConfig
from admtrt.models.classifier import Classifier
from admtrt.models.generated import generate_weights, standard_normal
from admtrt.models.unet import UNet
from admtrt.schedule.levels import levels_of
from admtrt.schedule.rows import Rows
from admtrt.schedule.sampler import SamplerConfig
from admtrt.schedule.solvers import SOLVERS
from admtrt.schedule.table import SamplingSchedule, lower, sampling_schedule

META = metadata("solvers")
CASES: dict[str, dict[str, Any]] = META["cases"]
SIZE, COUNT = META["image_size"], len(META["labels"])
SHAPE = (3, SIZE, SIZE)
_GRIDS = {"time_uniform": "time_uniform", "logSNR": "logsnr", "time_quadratic": "quadratic"}


def _offered(name: str, case: dict[str, Any]) -> bool:
    """True if the case is one of our samplers; the others are forms that are not offered."""
    return not (
        name.startswith("dpm.")
        or case.get("sampler") in ("dpm", "ancestral", "progdist")
        or case.get("solver_type") in ("taylor", "heun")
        or "published_time" in name
        or "unclipped" in name
    )


OFFERED = [name for name, case in CASES.items() if _offered(name, case)]


def sampler_of(name: str) -> SamplerConfig:
    """The case as one of our samplers; for forms that are not offered, everything except the rows."""
    case = CASES[name]
    family, threshold = case["family"], case.get("threshold")
    chosen: dict[str, Any] = {"scale": META["scale"] if case.get("guided") else 0.0}
    if family == "consistency":
        threshold = "static" if case["clip"] else "none"
    chosen["clip"] = threshold != "none"
    if threshold == "dynamic":
        chosen["threshold"] = "dynamic"
    if family in ("dpm_solver", "unipc"):
        extra = int(case.get("denoise_to_zero", False))
        chosen |= {
            "method": "dpmpp" if family == "dpm_solver" else "unipc",
            "order": case["order"],
            "steps": str(case["steps"] + extra),
            "grid": _GRIDS[case["grid"]],
            "to": "sigma_min",
        }
        if extra:
            chosen["denoise_to_zero"] = True
        falls = case.get("lower_order_final", True)
        usual = "dpm-solver" if family == "dpm_solver" else "falling"
        if case.get("method") == "singlestep":
            chosen["form"] = "single"
        else:
            chosen["final_order"] = usual if falls else "full"
        if family == "unipc":
            chosen["variant"] = case["variant"]
    elif family == "diffusers":
        unipc = case["scheduler"] == "unipc"
        chosen |= {
            "method": "unipc" if unipc else "dpmpp",
            "order": case["order"],
            "steps": str(case["steps"]),
            "grid": "trained",
            "to": case["final"],
            "final_order": "falling" if unipc else "diffusers",
        }
        if unipc:
            chosen["variant"] = case["variant"]
        if case["scheduler"] == "sde-dpmsolver++":
            chosen["sde"] = True
    elif family == "edm":
        chosen |= {"method": case["solver"], "steps": str(case["nfe"]), "sigma": case["levels"]}
    elif case["sampler"] in ("onestep", "multistep"):
        chosen |= {"method": "consistency", "steps": str(case["nfe"])}
        if case["sampler"] == "multistep":
            chosen |= {"levels": tuple(case["ts"]), "levels_of": case["steps"]}
    else:
        method = case["sampler"] if name in OFFERED else "euler"  # it has the bound and the guide of the case
        chosen |= {"method": method, "steps": str(case["nfe"])}
    if name in OFFERED and case.get("churn"):
        chosen["churn"] = (case["churn"], case["s_min"], case["s_max"], case["s_noise"])
    return SamplerConfig.from_dict(chosen)


def process_of(name: str) -> DiffusionConfig | EdmConfig:
    """The process of the case's networks."""
    case = CASES[name]
    if case["family"] == "consistency":
        return EdmConfig(boundary=case["distillation"])
    return DiffusionConfig(schedule=case["schedule"], mean_type=case["mean"])


def rows_of(name: str) -> Rows:
    """The rows of the case, from our solver or from a form that is not offered."""
    sampler, levels = sampler_of(name), levels_of(process_of(name))
    if name in OFFERED:
        return SOLVERS[sampler.method].rows(levels, sampler, None)
    return unoffered_rows.rows_of(CASES[name], levels, sampler)


@cache
def schedule_of(name: str) -> SamplingSchedule:
    """The table of the case."""
    process, sampler = process_of(name), sampler_of(name)
    if name in OFFERED:
        return sampling_schedule(process, sampler)
    return lower(rows_of(name), levels_of(process), process, sampler)


@cache
def network(which: str, dtype: torch.dtype) -> UNet | Classifier:
    """The network ``unet``, ``classifier`` or ``cm`` with the goldens' weights."""
    config = META[which] | {"image_size": SIZE}
    module = Classifier(classifier_config(config)) if which == "classifier" else UNet(unet_config(config))
    generate_weights(module, META["salt"])
    module = module.to(dtype)
    if dtype is torch.float64:
        for part in module.modules():
            if hasattr(part, "frequencies"):
                half = len(part.frequencies)
                exponents = torch.arange(half, dtype=dtype) / half
                part.frequencies = torch.exp(-math.log(10_000) * exponents)
    return module.eval().requires_grad_(False)


def start(name: str) -> np.ndarray:
    """The initial state, float32 [2, 3, S, S]."""
    return standard_normal(f"input:xT.{name}", (COUNT, *SHAPE), META["salt"])


def noise(name: str, draw: int) -> np.ndarray:
    """The noise after evaluation ``draw`` - 1, float32 [2, 3, S, S]."""
    return standard_normal(f"input:noise.{name}.{draw}", (COUNT, *SHAPE), META["salt"])


def stored(name: str, what: str) -> np.ndarray:
    """``final`` float64 [2, 3, S, S], or ``path`` float64 [evaluations, 2, probes]."""
    return arrays("solvers")[f"{name}.{what}"]
