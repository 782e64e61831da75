"""``admtrt evaluate``: judge samples and networks against real images."""

from __future__ import annotations

import json as json_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from admtrt.commands.backend_report import BackendReport
from admtrt.commands.evaluate_features import features_app
from admtrt.commands.evaluate_samples import reference, samples
from admtrt.commands.evaluate_sweep import sweep
from admtrt.commands.options import (
    BackendName,
    Command,
    Group,
    PlanFolder,
    PrecisionName,
    Threads,
    UnetPreset,
    UnetSet,
    UnetWeights,
    steps_option,
)
from admtrt.commands.requirements import require
from admtrt.console import Output, progress_bar, table
from admtrt.errors import RequestError
from admtrt.runtime.backends.default import DEFAULT_BACKEND

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from admtrt.config import ProcessConfig, UNetConfig
    from admtrt.contract import GraphName
    from admtrt.data.image_set import ImageSet
    from admtrt.run_config import DataConfig
    from admtrt.runtime.sampler import Denoiser

evaluate_app = typer.Typer(
    cls=Group, help="Judge samples or a network against real images.", no_args_is_help=True
)
evaluate_app.add_typer(features_app, name="features")
for _command in (reference, samples, sweep):
    evaluate_app.command(cls=Command)(_command)

_BOUND = "the bound in bits per dim"


class _OpenedNetwork(NamedTuple):
    """An opened network, its largest batch, and its configuration."""

    open: Callable[[int], Denoiser]
    config: UNetConfig
    diffusion: ProcessConfig
    class_names: tuple[str, ...]


@evaluate_app.command(cls=Command)
def nll(
    unet: Annotated[
        Path | None, typer.Option(metavar="CHECKPOINT", help="UNet or upsampler, run in PyTorch.")
    ] = None,
    bundle: Annotated[Path | None, typer.Option(help="Bundle, whose exported UNet graph is run.")] = None,
    unet_preset: UnetPreset = None,
    unet_set: UnetSet = None,
    unet_weights: UnetWeights = None,
    backend: BackendName = DEFAULT_BACKEND,
    precision: PrecisionName = "fp32",
    threads: Threads = None,
    plans: PlanFolder = None,
    data: Annotated[str | None, typer.Option(help="Path of the images, or 'digits'.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIG.toml",
            help="Training file: its section data says how to read the images; its network is "
            "used for a checkpoint that contains no settings and matches no preset.",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="data.KEY=VALUE", help="Set any key of the section data; may be repeated."
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="bound|ode",
            help="The variational bound, or the likelihood of the probability-flow ODE, of a bundle that was "
            "exported with --likelihood.",
        ),
    ] = "bound",
    tolerance: Annotated[
        float | None, typer.Option(help="Tolerance of the ODE solver of --method ode. Default: 1e-5.")
    ] = None,
    images: Annotated[int | None, typer.Option(help="Number of random images. Default: all.")] = None,
    steps: Annotated[str | None, steps_option("Fewer steps, e.g. 250; all where left out.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images computed at once.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the noise and of the choice of images.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Negative log likelihood in bits per dim: the variational bound, or by the probability-flow ODE.

    Uses the held-out images of the data, or all if none are held out. With the same data and seed, a
    checkpoint and its bundle get the same images and noise. Both need the extra train with PyTorch, which
    computes the bound.
    """
    if (unet is None) == (bundle is None):
        raise RequestError("give either --unet, for a checkpoint, or --bundle, for its exported graph")
    if data is None and config is None:
        raise RequestError("there are no images", hint="Name them with --data, or give a file with --config.")
    if bundle is not None and (unet_preset is not None or unet_set or unet_weights is not None):
        raise RequestError(
            "--unet-preset, --unet-set and --unet-weights are for a checkpoint; a bundle carries its settings"
        )
    if bundle is None and (backend, precision, threads, plans) != (DEFAULT_BACKEND, "fp32", None, None):
        raise RequestError(
            "--backend, --precision, --threads and --plans are for a bundle; a checkpoint runs in PyTorch"
        )
    if method not in ("bound", "ode"):
        raise RequestError(f"--method {method!r} is unknown; expected bound or ode")
    flow = method == "ode"
    if flow and bundle is None:
        raise RequestError(
            "--method ode runs an exported graph, and this is a checkpoint",
            hint="Export it, and evaluate the bundle: admtrt export CHECKPOINT --likelihood --out BUNDLE",
        )
    if flow and steps is not None:
        raise RequestError("--steps is of the bound; the solver of --method ode chooses its own")
    if flow and (backend == "auto" or precision != "fp32"):
        raise RequestError(
            "--method ode needs a named backend and --precision fp32",
            hint="A likelihood is a difference of large numbers, which narrower types round away.",
        )
    if not flow and tolerance is not None:
        raise RequestError("--tolerance is of the solver of --method ode; the bound has none")
    output = Output(json=json)
    require("torch", "safetensors", extra="train", purpose="Evaluation, of a bundle as well,")
    from admtrt.bundle import Bundle
    from admtrt.runtime.backends.choice import BackendChoice
    from admtrt.runtime.backends.opening import open_denoiser
    from admtrt.verify.nll_images import load_images

    found_backends = BackendReport(output)
    graph: GraphName = "unet_vector_jacobian" if flow else "unet"
    if bundle is not None:
        choice = BackendChoice(backend, precision, threads, plans)  # type: ignore[arg-type]
        opened = Bundle.open(bundle)
        opened.graph_entry(graph)

        def open_graph(batch: int) -> Denoiser:
            return open_denoiser(opened, choice.for_batches(batch), graphs=[graph], progress=found_backends)

        manifest = opened.manifest
        judged = _OpenedNetwork(open_graph, manifest.network, manifest.diffusion, manifest.class_names)
    else:
        assert unet is not None
        judged = _from_checkpoint(unet, unet_preset, unet_set or (), unet_weights, config, output)
    if not flow:
        _evaluations(judged.diffusion, steps)  # raises now for an impossible respacing
    data_config = _data_config(data, config, set_ or (), judged.config)
    chosen = load_images(data_config, judged.config, judged.class_names)
    subject = str(bundle if bundle is not None else unet)
    title = f"{subject} on {data_config.source}"
    about = {"network": subject, "data": data_config.to_dict(), "seed": seed, "method": method}
    common = {"count": images, "batch_size": batch_size, "seed": seed}
    if flow:
        found, shown = _flow(judged, chosen, tolerance or 1e-5, common)
    else:
        found, shown = _bound(judged, chosen, steps, common)
    output.result(
        {**about, "chosen": found_backends.to_list(), **found}, table(title, ["quantity", "value"], shown)
    )


def _evaluations(process: ProcessConfig, steps: str | None) -> int:
    """Network evaluations per image for the bound."""
    from admtrt.schedule.process import require_discrete, retained_timesteps

    return len(retained_timesteps(require_discrete(process, _BOUND, "network").steps, steps or ""))


def _bound(
    judged: _OpenedNetwork, data: ImageSet, steps: str | None, common: dict[str, Any]
) -> tuple[dict[str, Any], list[list[str]]]:
    """The variational bound: JSON data, and rows for people."""
    from admtrt.schedule.process import require_discrete
    from admtrt.verify.nll import evaluate_nll

    length = _evaluations(judged.diffusion, steps)
    denoiser = judged.open(_largest_batch(data, common))
    with progress_bar("evaluating", _images(data, common) * length) as progress:
        found = evaluate_nll(
            denoiser,
            judged.config,
            require_discrete(judged.diffusion, _BOUND, "network"),
            data,
            steps=steps or "",
            progress=lambda count: progress(count, ""),
            **common,
        )
    rows = [
        ["bits per dim", _with_error(found.bits_per_dim, found.standard_error)],
        ["of which the prior", f"{found.prior:.6f}"],
        ["of which the decoder (last step)", f"{found.terms[-1]:.4f}"],
        ["images, steps", f"{found.images}, {length}"],
    ]
    return {"steps": length, **found.to_dict()}, rows


def _flow(
    judged: _OpenedNetwork, data: ImageSet, tolerance: float, common: dict[str, Any]
) -> tuple[dict[str, Any], list[list[str]]]:
    """The likelihood by the probability-flow ODE: JSON data, and rows for people."""
    from admtrt.verify.nll_ode import evaluate_flow

    denoiser = judged.open(_largest_batch(data, common))
    with progress_bar("evaluating", _images(data, common)) as progress:
        found = evaluate_flow(
            denoiser, judged.config, judged.diffusion, data, tolerance=tolerance, progress=progress, **common
        )
    rows = [
        ["bits per dim", _with_error(found.bits_per_dim, found.standard_error)],
        ["of which the prior", f"{found.prior:.4f}"],
        ["error of the solver", f"{found.solver_error:.1e}, tolerance {found.tolerance:g}"],
        ["images, evaluations of each", f"{found.images}, {found.evaluations:.0f}"],
    ]
    return found.to_dict(), rows


def _images(data: ImageSet, common: dict[str, Any]) -> int:
    return len(data) if common["count"] is None else int(common["count"])


def _largest_batch(data: ImageSet, common: dict[str, Any]) -> int:
    return max(1, min(int(common["batch_size"]), _images(data, common)))


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _from_checkpoint(
    path: Path,
    preset: str | None,
    settings: Sequence[str],
    weights: str | None,
    config: Path | None,
    output: Output,
) -> _OpenedNetwork:
    from admtrt.commands.checkpoints import describes_networks, load_pair
    from admtrt.models.checkpoint import read_checkpoint_config
    from admtrt.models.denoiser import TorchDenoiser
    from admtrt.models.unet import UNet

    # The file may be another network's, given for its data: the checkpoint's own settings win.
    said = preset is not None or path.is_dir() or read_checkpoint_config(path) is not None
    loaded, _ = load_pair(
        path,
        None,
        unet_preset=preset,
        classifier_preset=None,
        config=None if said or config is None or not describes_networks(config) else config,
        unet_set=settings,
        unet_weights=weights,
        note=output.note,
    )
    assert isinstance(loaded.module, UNet)
    denoiser = TorchDenoiser(loaded.module)
    return _OpenedNetwork(
        lambda _: denoiser, loaded.module.config, loaded.config.diffusion, loaded.config.class_names
    )


def _data_config(
    source: str | None, file: Path | None, settings: Sequence[str], network: UNetConfig
) -> DataConfig:
    from admtrt.config_files import apply_overrides, load_config, read_toml
    from admtrt.run_config import DataConfig, RunConfig

    other = next((item for item in settings if not item.startswith("data.")), None)
    if other is not None:
        raise RequestError(
            f"--set {other} concerns no images", hint="Keys of the section data are used: data.KEY."
        )
    if file is not None and (source is None or "data" in read_toml(file)):
        given = [] if source is None else [f"data.source={json_.dumps(source, ensure_ascii=False)}"]
        return load_config(RunConfig, file, [*settings, *given]).data
    data = {"source": source, "image_size": network.image_size, "channels": network.in_channels}
    apply_overrides({"data": data}, settings)
    return DataConfig.from_dict(data, source="--data")
