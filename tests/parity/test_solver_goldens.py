"""Fast solvers against numbers of the public implementations, through the runtime's own step.

Cases of equal length share a batch, whatever their solver, grid, threshold and guidance.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import solver_goldens as goldens
import torch
from goldens import relative_error
from solver_goldens import CASES, COUNT, META, OFFERED
from solver_rows import walk

from admtrt.bundle import Bundle
from admtrt.export.pack import bundle_from_checkpoints
from admtrt.models.checkpoint import CheckpointConfig, LoadedNetwork
from admtrt.models.classifier import log_prob_gradient
from admtrt.models.denoiser import TorchDenoiser
from admtrt.models.solvers import trajectory
from admtrt.runtime import sampler as step_core
from admtrt.runtime.backends.choice import BackendChoice
from admtrt.runtime.backends.opening import open_denoiser
from admtrt.runtime.sampler import Denoiser, advance
from admtrt.runtime.slots import Slots

PATH = 4e-4
"""Of a sample's largest probe: errors grow where a threshold cuts, and shrink towards the end."""
LABELS = np.array(META["labels"], dtype=np.int64)
NAMES = list(CASES)
DISCRETE = [name for name in CASES if CASES[name]["family"] != "consistency"]
CONTINUOUS = [name for name in CASES if CASES[name]["family"] == "consistency"]


def by_length(names: list[str]) -> Iterator[list[str]]:
    names = sorted(names, key=lambda name: CASES[name]["nfe"])
    return (list(group) for _, group in groupby(names, lambda name: CASES[name]["nfe"]))


@cache
def bundle(kind: str) -> Path:
    """The goldens' networks as a bundle; the process of a sample is the one of its table."""
    unet, classifier = goldens.network(kind, torch.float32), goldens.network("classifier", torch.float32)
    process = {"variance_type": "learned_range" if unet.config.learn_sigma else "fixed_large"}
    stored = CheckpointConfig.from_dict({"kind": "unet", "unet": unet.config.to_dict(), "diffusion": process})
    guide = CheckpointConfig.from_dict(
        {"kind": "classifier", "classifier": classifier.config.to_dict(), "diffusion": process}
    )
    path = Path(tempfile.mkdtemp(prefix="admtrt-tests-")) / kind
    bundle_from_checkpoints(
        LoadedNetwork(module=unet, config=stored),
        None if kind == "cm" else LoadedNetwork(module=classifier, config=guide),
        path,
    )
    return path


def drawn_by_goldens(slots: Slots, inputs: Any) -> np.ndarray | None:
    """The goldens' noise; a sample's seed is its case's place and its row."""
    if inputs.noise_steps is None:
        return None
    rows = []
    for seed, position in zip(slots.seeds, slots.position.tolist(), strict=True):
        name, row = NAMES[seed // COUNT], seed % COUNT
        rows.append(goldens.noise(name, position + 1)[row])
    return np.stack(rows)


def slots_of(names: list[str]) -> Slots:
    schedules = [goldens.schedule_of(name) for name in names for _ in range(COUNT)]
    first = [
        schedule.init_scale * goldens.start(name) + schedule.init_noise * goldens.noise(name, 0)
        for name, schedule in zip(names, schedules[::COUNT], strict=True)
    ]
    labels = np.tile(LABELS, len(names))
    return Slots(
        x=np.concatenate(first).astype(np.float32),
        schedules=schedules,
        position=np.zeros(len(schedules), dtype=np.int64),
        seeds=[NAMES.index(name) * COUNT + row for name in names for row in range(COUNT)],
        conditions={"unet": {"y": labels}, "classifier_gradient": {"y": labels}},
    )


def run(names: list[str], denoiser: Denoiser) -> None:
    """Draw the cases, all of one length, in one batch; compare every evaluation and the end."""
    slots = slots_of(names)
    assert {len(schedule) for schedule in slots.schedules} == {CASES[names[0]]["nfe"]}
    for place in range(len(slots.schedules[0])):
        probes = slots.x.reshape(len(slots), -1)[:, META["probes"]].reshape(len(names), COUNT, -1)
        for name, found in zip(names, probes, strict=True):
            t = np.float32(CASES[name]["t"][place])
            given = goldens.schedule_of(name).model_t[place]
            assert abs(given - t) <= np.spacing(max(abs(t), np.float32(1e-6))), (name, place, given, t)
            error = relative_error(found, goldens.stored(name, "path")[place])
            assert error <= max(PATH, CASES[name]["tolerance"]), (name, place, error)
        advance(slots, denoiser)
    assert slots.finished.all()
    for name, final in zip(names, slots.x.reshape(len(names), COUNT, *slots.x.shape[1:]), strict=True):
        error = relative_error(final, goldens.stored(name, "final"))
        assert error <= CASES[name]["tolerance"], (name, error)


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("unet", "onnxruntime"),
        pytest.param("unet", "openvino", marks=pytest.mark.slow),
        pytest.param("cm", "onnxruntime", marks=pytest.mark.slow),  # of a small network, as OpenVINO
        ("cm", "openvino"),
    ],
)
def test_exported_graphs(kind: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_core, "draw_noise", drawn_by_goldens)
    denoiser = open_denoiser(Bundle.open(bundle(kind)), BackendChoice(backend, threads=1))
    for names in by_length(CONTINUOUS if kind == "cm" else DISCRETE):
        run(names, denoiser)


def test_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_core, "draw_noise", drawn_by_goldens)
    unet, cm, classifier = (goldens.network(name, torch.float32) for name in ("unet", "cm", "classifier"))
    for names in by_length(DISCRETE):
        run(names, TorchDenoiser(unet, classifier))
    for names in by_length(CONTINUOUS):
        run(names, TorchDenoiser(cm))


CLOSE = dict.fromkeys(CASES, 1e-11) | {
    # The original adds noise of sqrt(S'^2 - S_min^2) after its last evaluation. There S' equals S_min up to
    # rounding, so the noise is 1e-8 of S_min instead of 0.
    name: 2e-9 for name in OFFERED if name.startswith("cm.multistep")
}  # fmt: skip


def float64_networks(name: str, *, guided: bool) -> Any:
    """The goldens' networks in float64, which are given t in float32 as the originals were."""
    network = goldens.network("cm" if CASES[name]["family"] == "consistency" else "unet", torch.float64)
    classifier, y = goldens.network("classifier", torch.float64), torch.from_numpy(LABELS)

    @torch.no_grad()
    def networks(x: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor | None]:
        times = torch.full((COUNT,), t, dtype=torch.float64).float().double()
        return network(x, times, y=y), log_prob_gradient(classifier, x, times, y) if guided else None

    return networks


def drawn_in_float64(name: str) -> tuple[torch.Tensor, Callable[[int], torch.Tensor]]:
    """x_T, and the noise by the number of remaining evaluations."""
    nfe = CASES[name]["nfe"]
    x_T = torch.from_numpy(goldens.start(name)).double()
    return x_T, lambda left: torch.from_numpy(goldens.noise(name, nfe - left)).double()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_tables_in_float64(name: str) -> None:
    sampler, process, rows = goldens.sampler_of(name), goldens.process_of(name), goldens.rows_of(name)
    networks = float64_networks(name, guided=bool(sampler.scale))
    (*_, x) = walk(rows, process, sampler, networks, *drawn_in_float64(name))
    assert relative_error(x.numpy(), goldens.stored(name, "final")) < CLOSE[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFERED)
def test_paper_forms_in_float64(name: str) -> None:
    sampler, process = goldens.sampler_of(name), goldens.process_of(name)
    networks = float64_networks(name, guided=bool(sampler.scale))
    (*_, end) = trajectory(process, sampler, networks, *drawn_in_float64(name))
    assert relative_error(end.x.numpy(), goldens.stored(name, "final")) < CLOSE[name]
