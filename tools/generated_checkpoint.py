"""A checkpoint with generated weights: for trying commands without a download or training.

    python tools/generated_checkpoint.py PRESET OUT.pt [--half] [--overwrite]
    python tools/generated_checkpoint.py RUN.toml OUT.safetensors --kind unet [--overwrite]

For a preset, names, shapes and layout are the published file's; ``--half`` stores fp16, as some forks do. For
a file of ``admtrt train``, the network is the one that it would train. The weights are those of
``admtrt/models/generated.py``: no layer is zero, so every comparison is a real one; the images are noise.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Literal

from admtrt.config_files import load_config
from admtrt.errors import AdmtrtError, ConfigError
from admtrt.models.checkpoint import (
    build_network,
    check_target,
    checkpoint_config_from_preset,
    save_checkpoint,
)
from admtrt.models.generated import generate_weights
from admtrt.models.settings import CheckpointConfig
from admtrt.models.weights import write_pickle
from admtrt.run_config import RunConfig


def write_checkpoint(preset: str, path: Path, *, half: bool, overwrite: bool) -> None:
    """Write the file.

    Raises:
        ConfigError: for an unknown preset.
        OutputError: if the place is taken or cannot be written.
    """
    config = checkpoint_config_from_preset(preset)
    check_target(path, overwrite=overwrite)
    network = build_network(config)
    generate_weights(network)
    write_pickle(path, (network.half() if half else network).state_dict())


def write_untrained(run: Path, kind: Literal["unet", "classifier"], path: Path, *, overwrite: bool) -> None:
    """Write the network that a file of ``admtrt train`` describes.

    Raises:
        ConfigError: if the file cannot be read or has no such network.
        OutputError: if the place is taken or cannot be written.
    """
    config = load_config(RunConfig, run)
    if getattr(config, kind) is None:
        raise ConfigError(f"{run} has no section [{kind}]")
    check_target(path, overwrite=overwrite)
    described = CheckpointConfig(
        kind=kind,
        unet=config.unet if kind == "unet" else None,
        classifier=config.classifier if kind == "classifier" else None,
        diffusion=config.diffusion,
        sampler=config.sampler,
    )
    network = build_network(described)
    generate_weights(network)
    save_checkpoint(path, network.state_dict(), described)


def main() -> None:
    """Parse the command line; a user's fault ends with exit code 2 and its message."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", metavar="PRESET or RUN.toml")
    parser.add_argument("out", type=Path)
    parser.add_argument("--half", action="store_true", help="store fp16")
    parser.add_argument("--kind", choices=["unet", "classifier"], help="of a TOML; unet if left out")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT, if it exists")
    arguments = parser.parse_args()
    described = arguments.source.endswith(".toml")
    if described and arguments.half:
        parser.error("--half is for presets")
    if not described and arguments.kind is not None:
        parser.error("--kind is for a TOML: a preset is of one kind")
    suffix = ".safetensors" if described else ".pt"
    if arguments.out.suffix != suffix:
        parser.error(f"OUT is {arguments.out}; expected a name that ends in {suffix}")
    try:
        if described:
            write_untrained(
                Path(arguments.source), arguments.kind or "unet", arguments.out, overwrite=arguments.overwrite
            )
        else:
            write_checkpoint(
                arguments.source, arguments.out, half=arguments.half, overwrite=arguments.overwrite
            )
    except AdmtrtError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
