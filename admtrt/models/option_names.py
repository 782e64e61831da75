"""Command-line names of the options that describe a checkpoint: for advice that can be followed."""

from __future__ import annotations

from typing import NamedTuple


class OptionNames(NamedTuple):
    """Names of options.

    Attributes:
        prefix: how those for a preset and for single settings begin.
        config: the option for a file that describes the network.
    """

    prefix: str = "--"
    config: str = "--config"
