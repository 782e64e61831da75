"""Diffusers' folders against numbers of diffusers: networks, betas, timesteps, trajectories."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import diffusers_goldens as goldens
import numpy as np
import pytest
import torch
from diffusers_goldens import META, NETWORKS, TRAJECTORIES
from goldens import relative_error
from solver_rows import walk

from admtrt.bundle import Bundle
from admtrt.export.pack import bundle_from_checkpoints
from admtrt.models.checkpoint import LoadedNetwork
from admtrt.models.denoiser import TorchDenoiser
from admtrt.models.diffusers.scheduler import read_scheduler
from admtrt.models.solvers import trajectory
from admtrt.runtime import sampler as step_core
from admtrt.runtime.backends.choice import BackendChoice
from admtrt.runtime.backends.opening import open_denoiser
from admtrt.runtime.sampler import Denoiser, advance
from admtrt.runtime.slots import Slots
from admtrt.schedule.levels import levels_of
from admtrt.schedule.process import betas
from admtrt.schedule.spacing import spaced_timesteps
from admtrt.schedule.table import lower

if TYPE_CHECKING:
    from pathlib import Path

    from admtrt.models.checkpoint import CheckpointConfig
    from admtrt.models.unet import UNet

NETWORK, PATH = 2e-5, 1e-4
OF_OURS = [
    name
    for name, golden in TRAJECTORIES.items()
    if golden["method"] == "ddpm"
    or (
        golden["scheduler"].get("set_alpha_to_one", True)
        and golden["scheduler"].get("timestep_spacing", "leading") == "leading"
    )
]
"""Trajectories whose steps lead to the next timestep of the list."""


QUICK = ("ddpm.threshold", "ddim.clipped", "ddim.linspace", "ddim.zero_snr")
"""Of the default tests in float64; in float32 all are."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folders")
    for name in NETWORKS:
        goldens.write_folder(path / name, name)
    return path


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, folders: Path, tmp_path: Path) -> None:
    x, t, y = goldens.inputs_of(name)
    unet, _ = goldens.load(folders / name)
    out = unet(x, t, y).numpy()
    assert relative_error(out, goldens.stored(f"{name}.out")) < NETWORK
    spelled, _ = goldens.load(goldens.write_folder(tmp_path / "old", name, old=True))
    assert np.array_equal(spelled(x, t, y).numpy(), out)
    exact = goldens.in_float64(unet)(x.double(), t.double(), y).numpy()
    assert relative_error(exact, goldens.stored(f"{name}.out")) < 1e-11


@pytest.mark.parametrize("name", META["betas"])
def test_betas(name: str, folders: Path) -> None:
    said = META["betas"][name]["scheduler"]
    if "rescale_betas_zero_snr" in said:
        said = said | {"prediction_type": "v_prediction"}
    _, config = goldens.load(folders / "cifar")
    assert config.unet is not None
    process = read_scheduler(folders, said, config.unet).process
    assert process.kind == "discrete"
    assert np.abs(betas(process) - goldens.stored(f"betas.{name}")).max() < 1e-12


@pytest.mark.parametrize("golden", META["timesteps"])
def test_timesteps(golden: dict[str, Any]) -> None:
    said = golden["scheduler"]
    offset = said.get("steps_offset")
    text = f"{said.get('timestep_spacing', 'leading')}:{golden['steps']}" + (f"+{offset}" if offset else "")
    assert spaced_timesteps(said.get("num_train_timesteps", 1000), text) == tuple(golden["timesteps"][::-1])


@cache
def float64_network(path: Path) -> UNet:
    return goldens.in_float64(goldens.load(path)[0])


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TRAJECTORIES],
)
def test_rows_in_float64(name: str, folders: Path) -> None:
    process, sampler, quantile = goldens.process_and_sampler(name)
    unet = float64_network(folders / TRAJECTORIES[name]["network"])
    y = goldens.labels(name)
    asked = None if y is None else torch.from_numpy(y)

    def networks(x: torch.Tensor, t: float) -> tuple[torch.Tensor, None]:
        return unet(x, torch.full((2,), t, dtype=torch.float64), asked), None

    rows = goldens.rows_of(name)
    drawn = [torch.from_numpy(goldens.noise(name, k)).double() for k in range(len(rows))]
    x_T = torch.from_numpy(goldens.start(name)).double()
    with torch.no_grad():
        states = [
            x.numpy()
            for x in walk(
                rows, process, sampler, networks, x_T, lambda left: drawn[len(rows) - 1 - left],
                quantile=quantile,
            )
        ]  # fmt: skip
    states[-1] = states[-1] + goldens.last_noise(name)
    path = np.stack([goldens.probes(name, x) for x in states[1:]])
    assert np.abs(path - goldens.stored(f"{name}.path")).max() < 1e-9
    assert relative_error(states[-1], goldens.stored(f"{name}.final")) < 1e-9
    if name not in OF_OURS:
        return
    with torch.no_grad():  # the papers' steps, which verify compares graphs with
        paper = trajectory(
            process, sampler, networks, x_T, lambda left: drawn[len(rows) - 1 - left], quantile=quantile
        )
        final = [state.x.numpy() for state in paper][-1]
    assert relative_error(final + goldens.last_noise(name), goldens.stored(f"{name}.final")) < 1e-9


def draw(names: list[str], denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trajectories through the runtime's own step."""
    for name in names:
        process, sampler, _ = goldens.process_and_sampler(name)
        schedule = lower(goldens.rows_of(name), levels_of(process), process, sampler)
        y = goldens.labels(name)
        slots = Slots(
            x=goldens.start(name),
            schedules=[schedule] * 2,
            position=np.zeros(2, dtype=np.int64),
            seeds=[0, 1],
            conditions={"unet": {} if y is None else {"y": y}},
        )
        loose = TRAJECTORIES[name]["tolerance"] > PATH
        for place in range(len(schedule)):
            monkeypatch.setattr(step_core, "draw_noise", lambda *_, k=place, n=name: goldens.noise(n, k))
            advance(slots, denoiser)
            if loose and place < 3:
                found, expected = goldens.probes(name, slots.x), goldens.stored(f"{name}.path")[place]
                assert np.abs(found - expected).max() / np.abs(expected).max() < PATH, (name, place)
        error = relative_error(slots.x + goldens.last_noise(name), goldens.stored(f"{name}.final"))
        assert error < TRAJECTORIES[name]["tolerance"], (name, error)


def of_network(network: str) -> list[str]:
    return [name for name, golden in TRAJECTORIES.items() if golden["network"] == network]


@pytest.mark.parametrize("network", ["cifar", "classes"])
def test_pytorch(network: str, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet, _ = goldens.load(folders / network)
    for name in of_network(network):
        quantile = goldens.process_and_sampler(name)[2]
        draw([name], TorchDenoiser(unet, quantile=quantile), monkeypatch)


@cache
def bundle(folder: Path, quantile: float | None) -> Bundle:
    unet, config = goldens.load(folder)
    described: CheckpointConfig = config.model_copy(update={"threshold_quantile": quantile})
    path = folder.parent / f"{folder.name}-{quantile}.bundle"
    return bundle_from_checkpoints(LoadedNetwork(unet, described), None, path)


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_graphs(network: str, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, t, y = goldens.inputs_of(network)
    feeds = {"x": x.numpy(), "t": t.numpy()} | ({} if y is None else {"y": y.numpy()})
    for backend in ("onnxruntime", "openvino"):
        denoiser = open_denoiser(bundle(folders / network, None), BackendChoice(backend, threads=1))
        out = denoiser.run("unet", feeds)["out"]
        assert relative_error(out, goldens.stored(f"{network}.out")) < NETWORK, backend
        names = of_network(network)
        draw([name for name in names if goldens.process_and_sampler(name)[2] is None], denoiser, monkeypatch)
        for name in names:
            quantile = goldens.process_and_sampler(name)[2]
            if quantile is not None:
                own = open_denoiser(bundle(folders / network, quantile), BackendChoice(backend, threads=1))
                draw([name], own, monkeypatch)
