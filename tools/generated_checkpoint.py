"""A file like a published checkpoint, with generated weights: for trying commands without the download.

    python tools/generated_checkpoint.py PRESET OUT.pt [--half]

Names, shapes and layout are the published file's. The weights are those of ``admtrt/models/generated.py``: no
layer is zero, so every comparison is a real one, and the images are noise. ``--half`` stores fp16, as some
forks do.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from admtrt.errors import AdmtrtError
from admtrt.models.checkpoint import build_network, check_target, checkpoint_config_from_preset
from admtrt.models.generated import generate_weights
from admtrt.models.weights import write_pickle


def write_checkpoint(preset: str, path: Path, *, half: bool) -> None:
    """Write the file.

    Raises:
        ConfigError: for an unknown preset.
        OutputError: if the place is taken or cannot be written.
    """
    config = checkpoint_config_from_preset(preset)
    check_target(path, overwrite=False)
    network = build_network(config)
    generate_weights(network)
    write_pickle(path, (network.half() if half else network).state_dict())


def main() -> None:
    """Parse the command line; a user's fault ends with exit code 2 and its message."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset")
    parser.add_argument("out", type=Path)
    parser.add_argument("--half", action="store_true", help="store fp16")
    arguments = parser.parse_args()
    try:
        write_checkpoint(arguments.preset, arguments.out, half=arguments.half)
    except AdmtrtError as error:
        print(f"error: {error.message}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
