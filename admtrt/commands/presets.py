"""``admtrt presets``: the published checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from admtrt.console import Output, table
from admtrt.schedule.solvers.registry import implied_solver

if TYPE_CHECKING:
    from admtrt.presets import Preset


def presets(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List the published checkpoints: files, sizes, cost of a step for one image, recommended samplers."""
    from rich.text import Text

    from admtrt.presets import PRESETS

    columns = ["preset", "size", "params", "GFLOP", "steps", "scale", "ddim25"]
    notes: dict[str, list[str]] = {}
    for preset in PRESETS.values():
        if preset.note:
            notes.setdefault(preset.note, []).append(preset.name)
    Output(json=json).result(
        {"presets": [_described(preset) for preset in PRESETS.values()]},
        table("Published checkpoints (NAME.pt)", columns, [_row(preset) for preset in PRESETS.values()]),
        Text(
            "Weights take 4 bytes a parameter in fp32. GFLOP: of a step for one image; a classifier's is its "
            "evaluation and its input gradient. scale: of guidance, with the steps beside it and with ddim25."
        ),
        *(Text(f"{', '.join(names)}: {note}") for note, names in notes.items()),
    )


def _row(preset: Preset) -> list[str]:
    fast, sampler = preset.fast_sampler, preset.sampler
    implied = implied_solver(sampler.steps).name
    return [
        preset.name,
        str(preset.network.image_size),
        f"{preset.parameters / 1e6:.0f} M",
        f"{preset.step_flops / 1e9:,.0f}",
        sampler.steps if implied == sampler.method else f"{sampler.method} {sampler.steps}",
        f"{sampler.scale:g}" if sampler.scale else "-",
        "-" if fast is None else f"{fast.scale:g}",
    ]


def _described(preset: Preset) -> dict[str, Any]:
    fast = preset.fast_sampler
    return {
        "name": preset.name,
        "file": preset.file,
        "kind": preset.kind,
        "parameters": preset.parameters,
        "weight_bytes": preset.weight_bytes,
        "forward_flops": preset.forward_flops,
        "step_flops": preset.step_flops,
        "sampler": preset.sampler.to_dict(),
        "fast_sampler": None if fast is None else fast.to_dict(),
        "guided_by": preset.guided_by,
        "note": preset.note,
        "network": preset.network.to_dict(),
        "diffusion": preset.diffusion.to_dict(),
    }
