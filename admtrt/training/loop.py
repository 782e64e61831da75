"""The loop that trains one network, in one process or several."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from admtrt.brief import FEW, few
from admtrt.config import ClassifierConfig, EdmConfig, UNetConfig
from admtrt.console import progress_bar
from admtrt.data.image_set import ImageSet, load_data, require_classes, split
from admtrt.errors import ConfigError, RequestError, TrainingDivergedError
from admtrt.models.checkpoint import CheckpointConfig, build_network, save_checkpoint
from admtrt.models.matching import shapes_of_network
from admtrt.models.unet import UNet
from admtrt.run_config import network_section, sampler_for
from admtrt.runtime.machine import physical_memory
from admtrt.schedule.solvers import SOLVERS
from admtrt.schedule.table import sampling_schedule
from admtrt.training.engine import on_main_process, start_engine
from admtrt.training.folder import RunFolder
from admtrt.training.learner import Learner, learning_rate
from admtrt.training.metrics import MetricsLog, Window, summary_writer
from admtrt.training.sampling import draw_grid
from admtrt.training.start import begin_with, with_start
from admtrt.training.state import load_state, save_state
from admtrt.training.stopping import stop_requests
from admtrt.training.tasks import make_objective, settle_losses
from admtrt.training.timesteps import Stream, torch_seed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from accelerate import Accelerator

    from admtrt.console import Output
    from admtrt.run_config import RunConfig, Task, TrainingConfig
    from admtrt.schedule.sampler import SamplerConfig
    from admtrt.training.engine import Division


@dataclass(frozen=True)
class TrainingResult:
    """The result of a run.

    Attributes:
        task: the trained task.
        step: optimiser steps of the whole run, including those before a resume.
        metrics: the last logged line, with None for non-finite values; empty outside the main process.
        weights: the files of exported weights, one per EMA rate, in the order of the configuration.
        folder: the folder of metrics, samples and state.
    """

    task: Task
    step: int
    metrics: dict[str, Any]
    weights: tuple[Path, ...]
    folder: Path


def train(
    task: Task, config: RunConfig, out: Path, *, output: Output, resume: bool = False, overwrite: bool = False
) -> TrainingResult:
    """Train one network of a configuration and export its averaged weights.

    ``batch_size`` is the number of images of one optimiser step, over all processes and micro-batches: how
    it is divided changes memory and speed, not the result (up to rounding; dropout up to chance). All random
    numbers are functions of the seed and the step; PyTorch's global generator is reseeded in every step.

    Args:
        task: the network of ``config`` that is trained; ``consistency`` makes its UNet a consistency model.
        config: data, process, networks and settings.
        out: the folder that :class:`admtrt.training.folder.RunFolder` describes.
        output: receives notes for people.
        resume: continue the run in ``out``, if there is one. On one CPU process the weights are then bit for
            bit those of a run that was never interrupted.
        overwrite: replace the run in ``out``, if there is one.

    SIGINT and SIGTERM take effect at the end of a step, after its state has been saved.

    Raises:
        CheckpointError: if the checkpoint that it starts from cannot be used.
        ConfigError: if the configuration lacks the network or has a setting that cannot be used here.
        DataError: if the images cannot be used.
        OutputError: if ``out`` holds another run, or cannot be written.
        TrainingDivergedError: after ``max_nan_steps`` steps in a row without a finite loss and gradient, or
            if the last step was skipped.
        SystemExit: in other processes, if the main process refused the folder.
    """
    section = network_section(task)
    notes: list[str] = []
    config, start = with_start(task, config, notes.append)
    shape = config.network(task)
    if shape is None:
        raise ConfigError(
            f"the configuration has no section [{section}]",
            hint=f"Add [{section}] with the shape of the network.",
        )
    config = settle_losses(config)
    settings: TrainingConfig = getattr(config, f"train_{task}")
    if settings.tensorboard:
        summary_writer()
    sampler = _checked_sampler(task, config)
    accelerator, division = start_engine(task, settings)
    for note in notes if accelerator.is_main_process else ():
        output.note(note)
    objective = make_objective(task, config, accelerator.device)
    _check_memory(task, config, shape, accelerator, division)
    data = load_data(config.data)
    classes = shape.num_classes
    if classes is not None:
        require_classes(data, classes)
    described = _describe(task, shape, config, sampler, data.class_names)
    with RunFolder(out, task) as folder:
        on_main_process(accelerator, lambda: folder.prepare(config, resume=resume, overwrite=overwrite))
        torch.manual_seed(torch_seed(Stream.INITIAL_WEIGHTS, settings.seed))
        network = build_network(described)
        if start is not None:
            begin_with(network, start)
        objective.begin(network)
        learner = Learner(network, objective, settings, accelerator, division)
        if folder.state.exists():
            learner.load(*load_state(folder.state))
            if learner.step > settings.steps:
                raise ConfigError(
                    f"train_{task}.steps is {settings.steps}, "
                    f"but the run in {out} stands at step {learner.step}",
                    hint=f"Set it to {learner.step} or more.",
                )
        train_set, held_out = split(data, config.data.hold_out)
        if not accelerator.is_main_process:
            _run(task, settings, learner, train_set, held_out, None)
            return TrainingResult(task, learner.step, {}, (), folder.root)
        folder.write_config(config)
        folder.write_skipped(data.skipped)
        if data.skipped:
            _name_skipped(data, folder.skipped, output)
        metrics = MetricsLog(
            folder.metrics, learner.step, tensorboard=folder.tensorboard if settings.tensorboard else None
        )
        shown = held_out if len(held_out) else train_set
        recorder = _Recorder(folder, described, settings, learner, metrics, shown, accelerator.device, output)
        with contextlib.closing(metrics):
            _run(task, settings, learner, train_set, held_out, recorder)
        return TrainingResult(task, learner.step, metrics.last, recorder.weights, folder.root)


def _checked_sampler(task: Task, config: RunConfig) -> SamplerConfig:
    """The sampler that the checkpoint will recommend.

    A file may train both a consistency model and its teacher; a sampler for one does not fit the other.

    Raises:
        ConfigError: for an impossible sampler, which otherwise only the export would notice, hours later.
    """
    process, sampler = config.process(task), config.sampler
    of_consistency = SOLVERS[sampler.method].own_of == "consistency"
    if isinstance(process, EdmConfig) and process.boundary != of_consistency:
        sampler = sampler_for(process)
    if "levels_of" in SOLVERS[sampler.method].options and sampler.levels_of is None:
        sampler = sampler.model_copy(update={"levels_of": config.train_consistency.levels})
    try:
        sampling_schedule(process, sampler.unguided)
    except RequestError as error:
        raise ConfigError(f"[sampler] cannot be used: {error.message}", hint=error.hint) from None
    return sampler


def _check_memory(
    task: Task,
    config: RunConfig,
    network: UNetConfig | ClassifierConfig,
    accelerator: Accelerator,
    division: Division,
) -> None:
    """Refuse a run that does not fit into this machine's memory.

    Raises:
        ConfigError: if the weights, or the images of one micro-batch, are larger than its memory.
    """
    weights = 4 * sum(
        map(math.prod, shapes_of_network(_describe(task, network, config, config.sampler)).values())
    )
    if accelerator.device.type == "cpu":  # gradients, two moments and the averages are there, too
        weights *= 4 + len(getattr(config, f"train_{task}").ema_rates)
    pixels = config.data.channels * config.data.image_size**2
    images = 4 * pixels * division.batch_size // division.shards
    memory = physical_memory()
    for needed, what, keys in (
        (
            weights,
            "the weights and what training keeps of each",
            f"{network_section(task)}.model_channels or channel_mult",
        ),
        (images, "the images of one micro-batch", f"train_{task}.batch_size"),
    ):
        if needed > memory:
            raise ConfigError(
                f"{what} would take {needed / 2**30:.0f} GiB; this machine has {memory / 2**30:.0f}",
                hint=f"Lower {keys}.",
            )


def _name_skipped(data: ImageSet, listing: Path, output: Output) -> None:
    all_named = f", all named in {listing}" if len(data.skipped) > FEW else ""
    output.note(f"left out {len(data.skipped)} of {len(data) + len(data.skipped)} files{all_named}:")
    for line in few(f"{path}: {reason}" for path, reason in data.skipped):
        output.note(f"  {line}")


def _describe(
    task: Task,
    network: UNetConfig | ClassifierConfig,
    config: RunConfig,
    sampler: SamplerConfig,
    class_names: Sequence[str] = (),
) -> CheckpointConfig:
    return CheckpointConfig(
        kind=network_section(task),
        unet=network if isinstance(network, UNetConfig) else None,
        classifier=network if isinstance(network, ClassifierConfig) else None,
        diffusion=config.process(task),
        sampler=sampler,
        class_names=() if network.num_classes is None else tuple(class_names),
        run=config,
    )


class _Recorder:
    """Writes files and shows progress, in the main process.

    Args:
        shown: the images that an upsampler's sample grids enlarge.
    """

    def __init__(
        self,
        folder: RunFolder,
        described: CheckpointConfig,
        settings: TrainingConfig,
        learner: Learner,
        metrics: MetricsLog,
        shown: ImageSet,
        device: torch.device,
        output: Output,
    ) -> None:
        self.folder = folder
        self._described = described
        self._settings = settings
        self._learner = learner
        self._metrics = metrics
        self._shown = shown
        self._device = device
        self._output = output
        self._logged = (learner.step, time.monotonic())

    @property
    def weights(self) -> tuple[Path, ...]:
        """The files of the exported weights, one for each EMA rate."""
        _first, *further = self._learner.averages.states
        return (self.folder.weights(), *(self.folder.weights(rate) for rate in further))

    def log(self, held_out: dict[str, float]) -> str:
        """Write one line of metrics; returns a short text for the progress bar."""
        step, size = self._learner.step, self._settings.batch_size
        before, then = self._logged
        self._logged = (step, time.monotonic())
        means = self._learner.window.means()
        self._metrics.write(
            {
                "step": step,
                "images": step * size,
                "lr": learning_rate(self._settings, step - 1),
                **means,
                **{f"held_out_{name}": value for name, value in held_out.items()},
                "images_per_second": (step - before) * size / max(self._logged[1] - then, 1e-9),
            }
        )
        named = {
            "loss": means.get("loss"),
            "accuracy": means.get("accuracy"),
            "held out": held_out.get("loss"),
        }
        gist = "  ".join(f"{name} {value:.4f}" for name, value in named.items() if value is not None)
        if not sys.stderr.isatty():  # lines in a log, a progress bar on a terminal
            self._output.note(f"{self.folder.task}: step {step}/{self._settings.steps}  {gist}")
        return gist

    def draw(self) -> None:
        """Write a grid of samples of the exported weights."""
        network = build_network(self._described)
        assert isinstance(network, UNet)  # a classifier's sample_every is refused
        network.load_state_dict(next(iter(self._learner.averages.states.values())))
        draw_grid(
            network,
            self._device,
            self._described.diffusion,
            self._shown,
            self._settings.seed,
            self.folder.samples(self._learner.step),
        )

    def say_stopped(self, saved: int) -> None:
        """Say what is saved of a run that a signal ends."""
        kept = f"the state of step {saved} is kept; go on with --resume" if saved else "no state is kept"
        self._output.note(f"{self._described.kind}: stopped after step {self._learner.step}: {kept}")

    def save(self) -> None:
        """Write the state of training, then the exported weights."""
        save_state(self.folder.state, *self._learner.state())
        for path, (rate, state) in zip(self.weights, self._learner.averages.states.items(), strict=True):
            origin = {"step": self._learner.step, "ema_rate": rate}
            save_checkpoint(path, state, self._described.model_copy(update=origin))


def _run(
    task: Task,
    settings: TrainingConfig,
    learner: Learner,
    train_set: ImageSet,
    held_out: ImageSet,
    recorder: _Recorder | None,
) -> None:
    """Train to the last step; only the main process has a recorder."""
    if learner.step == settings.steps and recorder is not None:
        recorder.save()  # an earlier kill may have come between the state and the weights
    saved, gist, main = learner.step, "", recorder is not None
    try:
        with (
            stop_requests(shown=main) as stop,
            _bar(task, settings.steps, learner.step, shown=main) as progress,
        ):
            while learner.step < settings.steps and not stop.agreed:
                learner.update(train_set)
                step, last = learner.step, learner.step == settings.steps
                if learner.nan_steps >= settings.max_nan_steps or (last and learner.nan_steps):
                    raise _diverged(task, learner, saved, recorder)
                if step % settings.log_every == 0 or last:
                    held_out_values = learner.evaluate(held_out) if len(held_out) else {}
                    gist = recorder.log(held_out_values) if recorder is not None else ""
                    learner.window = Window()
                stop.agreed = not last and learner.any_process(stop.heard)
                if recorder is not None:
                    if settings.sample_every and step % settings.sample_every == 0:
                        recorder.draw()
                    due = last or stop.agreed or step % settings.checkpoint_every == 0
                    # During skipped steps the weights are suspect: keep the earlier state.
                    if due and not learner.nan_steps:
                        recorder.save()
                        saved = step
                progress(1, gist)
    except (KeyboardInterrupt, SystemExit):
        if recorder is not None:
            recorder.say_stopped(saved)
        raise


def _bar(
    task: Task, steps: int, done: int, *, shown: bool
) -> contextlib.AbstractContextManager[Callable[[int, str], None]]:
    return (
        progress_bar(f"training {task}", steps, done=done)
        if shown
        else contextlib.nullcontext(lambda *_: None)
    )


def _diverged(task: Task, learner: Learner, saved: int, recorder: _Recorder | None) -> TrainingDivergedError:
    kept = "No state had been saved yet. "
    if saved and recorder is not None:
        kept = f"The last good state, of step {saved}, is kept in {recorder.folder.state}. "
    return TrainingDivergedError(
        f"training of the {task} diverged: {learner.nan_steps} steps in a row, up to step {learner.step}, "
        "had no finite loss and gradient",
        hint=f"{kept}Lower train_{task}.lr, set train_{task}.grad_clip or use another precision.",
    )
