"""Names of the command-line options that describe a checkpoint, for hints."""

from __future__ import annotations

from typing import NamedTuple


class OptionNames(NamedTuple):
    """Names of the options for one checkpoint.

    Attributes:
        prefix: prefix of the options for a preset and for single settings.
        config: the option for a file that describes the network.
    """

    prefix: str = "--"
    config: str = "--config"
