"""Set up accelerate: device, precision, and the division of a batch into processes and micro-batches."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import TorchDynamoPlugin, broadcast_object_list, parse_flag_from_env

from admtrt.errors import AdmtrtError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from admtrt.run_config import Task, TrainingConfig


@dataclass(frozen=True)
class Division:
    """Division of an optimiser step's images: shard k gets every ``shards``-th image, starting from k.

    Attributes:
        batch_size: total number of images per step.
        processes: number of processes.
        accumulate: micro-batches per process.
    """

    batch_size: int
    processes: int
    accumulate: int

    @property
    def shards(self) -> int:
        """Total number of micro-batches per step."""
        return self.processes * self.accumulate

    def shards_of(self, process: int) -> range:
        """The shards of one process."""
        return range(process * self.accumulate, (process + 1) * self.accumulate)

    def places(self, shard: int) -> NDArray[np.int64]:
        """Positions of a shard's images in the whole batch."""
        return np.arange(shard, self.batch_size, self.shards)

    def gathered_places(self) -> NDArray[np.int64]:
        """Positions in the whole batch of the values gathered from all processes, in order."""
        return np.concatenate([self.places(shard) for shard in range(self.shards)])


def start_engine(task: Task, settings: TrainingConfig) -> tuple[Accelerator, Division]:
    """Start accelerate under a configuration.

    Raises:
        ConfigError: if the device cannot compute in the precision, or the batch cannot be divided.
    """
    # Set explicitly: otherwise accelerate would let CPU processes run independently.
    cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=cpu)
    if settings.precision == "fp16" and state.device.type == "cpu":
        raise ConfigError(
            f"train_{task}.precision is 'fp16', which a CPU would silently ignore",
            hint="Use 'fp32' or 'bf16', or a CUDA device.",
        )
    division = Division(settings.batch_size, state.num_processes, settings.accumulate)
    if settings.batch_size % division.shards:
        raise ConfigError(
            f"train_{task}.batch_size {settings.batch_size} cannot be divided among {state.num_processes} "
            f"processes of {settings.accumulate} micro-batches",
            hint=f"Use a multiple of {division.shards}: batch_size counts all images of one step.",
        )
    if settings.compile and state.device.type == "cpu" and not _has_cpp_compiler():
        raise ConfigError(
            f"train_{task}.compile is true, but torch.compile finds no C++ compiler here",
            hint="Install g++ or clang++, or leave it out: training is slower then, and as good.",
        )
    torch.set_float32_matmul_precision("high" if settings.tf32 else "highest")
    compiled = TorchDynamoPlugin(backend="inductor" if settings.compile else "no", dynamic=False)
    # A second training in this process may use another precision; there is no public API for the reset.
    AcceleratorState._reset_state()  # noqa: SLF001
    try:
        precision = "no" if settings.precision == "fp32" else settings.precision
        return Accelerator(mixed_precision=precision, cpu=cpu, dynamo_plugin=compiled), division
    except ValueError as error:
        raise ConfigError(
            f"train_{task}.precision '{settings.precision}' cannot be used here: {error}"
        ) from None


def _has_cpp_compiler() -> bool:
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++")))


def on_main_process(accelerator: Accelerator, action: Callable[[], None]) -> None:
    """Run ``action`` in the main process while the others wait; if it fails, all processes fail.

    Raises:
        AdmtrtError: in the main process, if ``action`` raises it.
        SystemExit: in the other processes, with that error's exit code, so that only one shows it.
    """
    failure: AdmtrtError | None = None
    if accelerator.is_main_process:
        try:
            action()
        except AdmtrtError as error:
            failure = error
    (code,) = broadcast_object_list([0 if failure is None else failure.exit_code])
    if code:
        leave_engine()
    if failure is not None:
        raise failure
    if code:
        raise SystemExit(code)


def leave_engine() -> None:
    """End a run of several processes together.

    A process that leaves early breaks the others' connections. A process that exits with open connections may
    be aborted by their threads.
    """
    state = PartialState()
    if state.num_processes > 1:
        state.wait_for_everyone()
        state.destroy_process_group()
