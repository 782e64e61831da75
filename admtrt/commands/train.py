"""``admtrt train``: a UNet, its classifier or upsampler, or a consistency model, from one TOML file."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from admtrt.commands.options import Command, Group
from admtrt.commands.requirements import require
from admtrt.console import Output, table

if TYPE_CHECKING:
    from collections.abc import Callable

    from admtrt.run_config import Task

train_app = typer.Typer(cls=Group, help="Train a network on images.", no_args_is_help=True)

_HELP = {
    "unet": "Train the UNet of section 'unet' with the settings of section 'train_unet'.",
    "classifier": (
        "Train the noisy classifier of section 'classifier' with the settings of section 'train_classifier'."
    ),
    "upsampler": "Train the upsampler of section 'upsampler' with the settings of section 'train_upsampler'.",
    "consistency": (
        "Make a consistency model of the UNet of section 'unet', with the settings of section "
        "'train_consistency': from a teacher, or from the images alone."
    ),
}

_SHOWN = ("loss", "accuracy", "held_out_loss", "held_out_accuracy", "images_per_second", "lr")
"""Metrics in the result table; --json and metrics.jsonl have all."""

_Config = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="Data, process, networks and settings.")]
_Out = Annotated[
    Path, typer.Option(help="Folder of the weights, metrics, samples and state; networks may share it.")
]
_Data = Annotated[str | None, typer.Option(help="Path of the images, or 'digits' (data.source).")]
_Steps = Annotated[int | None, typer.Option(help="Optimiser steps of the whole run.")]
_BatchSize = Annotated[int | None, typer.Option(help="Images per optimiser step, over all processes.")]
_Lr = Annotated[float | None, typer.Option(help="Learning rate.")]
_Precision = Annotated[str | None, typer.Option(help="fp32, bf16, or fp16 (CUDA only).")]
_Seed = Annotated[int | None, typer.Option(help="Seed of all random numbers.")]
_Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override any key; may be repeated."),
]
_Teacher = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="UNet trained by admtrt with kind edm, to distil (train_consistency.teacher). Default: none, "
        "consistency training.",
    ),
]
_Init = Annotated[
    str | None,
    typer.Option(
        metavar="CHECKPOINT",
        help="Start from the weights of a file or of diffusers' folder (train_unet.init); its network and "
        "process are used if [unet] and [diffusion] are missing.",
    ),
]
_Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out, if there is one.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out, if there is one.")]
_OF_TASKS = {"teacher": "consistency", "init": "unet"}
"""Options that only one task has."""
_Json = Annotated[bool, typer.Option("--json", help="Print the outcome as one JSON document.")]


def _overrides(
    task: Task, set_: list[str] | None, data: str | None, settings: dict[str, float | str | None]
) -> list[str]:
    """Overrides of the configuration file. Flags come after ``--set`` and win."""
    flags = {"data.source": data, **{f"train_{task}.{key}": value for key, value in settings.items()}}
    given = (
        f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in flags.items() if value is not None
    )
    return [*(set_ or []), *given]


def _command(task: Task) -> Callable[..., None]:
    def command(
        config: _Config,
        out: _Out,
        data: _Data = None,
        steps: _Steps = None,
        batch_size: _BatchSize = None,
        lr: _Lr = None,
        precision: _Precision = None,
        seed: _Seed = None,
        teacher: _Teacher = None,
        init: _Init = None,
        set_: _Set = None,
        resume: _Resume = False,
        overwrite: _Overwrite = False,
        json_: _Json = False,
    ) -> None:
        settings = {
            "steps": steps,
            "batch_size": batch_size,
            "lr": lr,
            "precision": precision,
            "seed": seed,
            "teacher": teacher,
            "init": init,
        }
        from admtrt.config_files import load_config
        from admtrt.run_config import RunConfig

        run_config = load_config(RunConfig, config, _overrides(task, set_, data, settings))
        require("torch", "accelerate", "safetensors", extra="train", purpose="Training")
        from accelerate import PartialState

        from admtrt.training.engine import leave_engine
        from admtrt.training.loop import train

        output = Output(json=json_)
        result = train(task, run_config, out, output=output, resume=resume, overwrite=overwrite)
        state = PartialState()
        if state.is_main_process:
            shown = {name: result.metrics[name] for name in _SHOWN if name in result.metrics}
            rows = [
                [name, "not finite" if value is None else f"{value:.6g}"] for name, value in shown.items()
            ]
            rows += [["weights", str(path)] for path in result.weights]
            output.result(
                {
                    "kind": task,
                    "step": result.step,
                    "metrics": result.metrics,
                    "weights": [str(path) for path in result.weights],
                    "folder": str(result.folder),
                },
                table(f"{task}: trained to step {result.step}", ["metric", "value"], rows),
            )
        leave_engine()

    signature = inspect.signature(command, eval_str=True)
    taken = [one for one in signature.parameters.values() if _OF_TASKS.get(one.name, task) == task]
    command.__signature__ = signature.replace(parameters=taken)  # type: ignore[attr-defined]
    return command


for _task in ("unet", "classifier", "upsampler", "consistency"):
    train_app.command(_task, cls=Command, help=_HELP[_task])(_command(_task))
