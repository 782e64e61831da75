"""Checkpoints in ``admtrt inspect``: files and diffusers' folders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from admtrt.commands.requirements import require
from admtrt.console import table
from admtrt.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from admtrt.console import Output
    from admtrt.presets import Kind

_SUFFIXES = (".safetensors", ".pt", ".pth")
_CONFIGS = ("unet/config.json", "config.json")


def is_checkpoint(path: Path) -> bool:
    """True if a path looks like a checkpoint, by its name and contents, and not like a bundle."""
    if path.is_dir():
        return not (path / "manifest.json").exists() and any((path / name).is_file() for name in _CONFIGS)
    return path.suffix.lower() in _SUFFIXES


def show_checkpoint(path: Path, output: Output) -> None:
    """Show a checkpoint's settings, as stored in it or inferred from its tensors.

    Raises:
        CheckpointError: if it cannot be used, or its settings cannot be determined.
    """
    require("torch", "safetensors", extra="export", purpose="Inspecting a checkpoint")
    from admtrt.commands.checkpoints import Description, identify_described
    from admtrt.models.checkpoint import open_checkpoint
    from admtrt.runtime.request import numbered_names

    stored = open_checkpoint(path)
    notes: list[str] = []
    kinds: tuple[Kind, ...] = ("unet", "upsampler", "classifier")
    try:
        found = identify_described(stored, kinds=kinds, description=Description(), note=notes.append).config
    except CheckpointError as error:
        if stored.embedded is not None:
            raise
        hint = "Say what it is, and keep it: admtrt convert CHECKPOINT unet.safetensors --set KEY=VALUE"
        raise CheckpointError(error.message, hint=hint) from None
    for note in notes:
        output.note(note)
    parameters = sum(value.numel() for value in stored.tensors.values())
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in stored.tensors.values()})
    data: dict[str, Any] = {
        "checkpoint": str(path),
        "made_from": stored.made_from,
        "tensors": len(stored.tensors),
        "parameters": parameters,
        "dtypes": dtypes,
        "notes": notes,
        "config": found.to_dict(),
    }
    sections = {"network": found.network, "process": found.diffusion, "sampler": found.sampler}
    rows = [
        [section, key, _text(value)]
        for section, config in sections.items()
        for key, value in config.to_dict().items()
        if value is not None
    ]
    names = numbered_names(found.class_names)
    output.result(
        data,
        table(f"{path}: {found.kind}", ("section", "setting", "value"), rows),
        f"{len(stored.tensors)} tensors, {parameters / 1e6:.1f} M parameters, {', '.join(dtypes)}",
        *([f"classes: {names}"] if names else []),
    )


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
