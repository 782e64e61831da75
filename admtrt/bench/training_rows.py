"""One way to train a network, in a child process: sets up once and takes timed steps."""

from __future__ import annotations

import sys
import tempfile
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from admtrt.bench.remote import peak_memory
from admtrt.bench.torch_rows import (
    DTYPES,
    configure_torch,
    importing_from,
    original_classifier,
    original_unet,
)
from admtrt.bench.training import ADMTRT, EAGER, fixed
from admtrt.config import ClassifierConfig, DiffusionConfig, UNetConfig
from admtrt.data.image_set import ImageSet
from admtrt.errors import RequestError
from admtrt.images import from_uint8
from admtrt.models.classifier import Classifier
from admtrt.models.unet import UNet
from admtrt.training.engine import start_engine
from admtrt.training.learner import Learner
from admtrt.training.metrics import Window
from admtrt.training.tasks import make_objective, settle_losses

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from admtrt.bench.rows import Device
    from admtrt.bench.training import TrainingRow
    from admtrt.run_config import RunConfig, Task

_IMAGES = 1024  # generated; their content does not change the speed
_LOG_EVERY = 10  # steps, for the original and its imitation


class Trainer:
    """A training row.

    Args:
        row: the row, which says how to train.
        config: configuration of the run, including its batch size.
        task: the network to train.
        original: checkout of the original, for its row.
        scratch: folder for the original's logs.
        device: device of the training.
        threads: CPU threads.
    """

    def __init__(
        self,
        row: TrainingRow,
        config: RunConfig,
        task: Task,
        original: Path | None,
        scratch: Path,
        device: Device,
        threads: int,
    ) -> None:
        configure_torch(threads)
        torch.manual_seed(0)
        began = time.perf_counter()
        config = settle_losses(fixed(config, task, row))
        data = _generated_images(config)
        if row.name == ADMTRT:
            self._step = _our_step(config, task, data, device)
        elif row.name == EAGER:
            self._step = _eager_step(config, task, data, device, DTYPES[row.precision])
        else:
            self._step = _original_step(config, task, data, device, original, scratch)
        self._device: Device = device
        self.step()
        self._ready = time.perf_counter() - began
        self.step()

    def ready(self) -> float:
        """Seconds until the end of the first step, including compilation."""
        return self._ready

    def step(self) -> float:
        """Seconds of one more optimiser step."""
        began = time.perf_counter()
        self._step()
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def memory(self) -> int:
        """The largest resident memory so far, in bytes."""
        return peak_memory()


def _generated_images(config: RunConfig) -> ImageSet:
    rng, size = np.random.default_rng(0), config.data.image_size
    images = rng.integers(0, 256, (_IMAGES, size, size, config.data.channels), dtype=np.uint8)
    classes = max(
        (network.num_classes or 1 for network in (config.unet, config.classifier) if network is not None),
        default=1,
    )
    labels = rng.integers(0, classes, _IMAGES)
    return ImageSet(config.data, images, labels, tuple(map(str, range(classes))))


def _network(config: RunConfig, task: Task) -> UNet | Classifier:
    shape = config.network(task)
    return Classifier(shape) if isinstance(shape, ClassifierConfig) else UNet(_unet_config(shape))


def _unet_config(shape: UNetConfig | ClassifierConfig | None) -> UNetConfig:
    assert isinstance(shape, UNetConfig)  # a missing network has been refused
    return shape


def _our_step(config: RunConfig, task: Task, data: ImageSet, device: Device) -> Callable[[], None]:
    settings = getattr(config, f"train_{task}")
    accelerator, division = start_engine(task, settings)
    if accelerator.device.type != device:
        raise RequestError(f"training runs on {accelerator.device.type} here, not on {device}")
    objective = make_objective(task, config, accelerator.device)
    network = _network(config, task)
    objective.begin(network)
    learner = Learner(network, objective, settings, accelerator, division)

    def step() -> None:
        learner.update(data)
        if learner.step % settings.log_every == 0:
            learner.window = Window()

    return step


class _Batches:
    """Batches in the form of the original's loader, made in advance so that they cost no time."""

    def __init__(self, data: ImageSet, size: int, device: Device) -> None:
        assert isinstance(data.images, np.ndarray)
        assert data.labels is not None
        images = from_uint8(data.images[:size]).transpose(0, 3, 1, 2)
        repeated = -(-size // len(images))
        self.x = torch.from_numpy(np.ascontiguousarray(np.tile(images, (repeated, 1, 1, 1))[:size])).to(
            device
        )
        self.y = torch.from_numpy(np.resize(data.labels, size)).to(device)


def _eager_step(
    config: RunConfig, task: Task, data: ImageSet, device: Device, dtype: torch.dtype
) -> Callable[[], None]:
    """A plain loop like the original's: PyTorch's AdamW, averages updated per tensor, losses logged."""
    settings = getattr(config, f"train_{task}")
    batches = _Batches(data, settings.batch_size, device)
    network = _network(config, task).to(device).train()
    objective = make_objective(task, config, torch.device(device))
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    averages = [parameter.detach().clone() for parameter in network.parameters()]
    steps = config.diffusion.steps if isinstance(config.diffusion, DiffusionConfig) else None

    def step() -> None:
        noise = torch.randn_like(batches.x)
        if steps is None:
            drawn = objective.levels.draw(0, 0, 0, len(batches.x)).levels  # type: ignore[arg-type]
            levels = torch.from_numpy(drawn).to(device)
        else:
            levels = torch.randint(0, steps, (len(batches.x),), device=device)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            values = objective(network, batches.x, batches.y, levels, noise)
        optimizer.zero_grad()
        values["loss"].mean().backward()  # type: ignore[no-untyped-call]
        _log(values)
        sum(
            float(parameter.grad.norm()) ** 2
            for parameter in network.parameters()
            if parameter.grad is not None
        )
        optimizer.step()
        if task != "classifier":  # the original keeps no average of it
            for average, parameter in zip(averages, network.parameters(), strict=True):
                average.mul_(0.9999).add_(parameter.detach(), alpha=1 - 0.9999)

    return step


def _log(values: dict[str, Tensor]) -> None:
    for value in values.values():
        float(value.mean())
        value.detach().cpu().numpy()


def _original_step(
    config: RunConfig, task: Task, data: ImageSet, device: Device, checkout: Path | None, scratch: Path
) -> Callable[[], None]:
    """The step of the checkout's TrainLoop, or a copy of the step in its classifier script."""
    if checkout is None:
        raise RequestError("there is no original implementation", hint="Give its checkout with --original.")
    if not isinstance(config.diffusion, DiffusionConfig) or task not in ("unet", "classifier"):
        raise RequestError(f"the original trains no {task} on a process of kind '{config.diffusion.kind}'")
    _stand_in_for_mpi()
    settings = getattr(config, f"train_{task}")
    with importing_from(checkout):
        names = ("unet", "script_util", "train_util", "resample", "fp16_util", "logger", "dist_util")
        parts = SimpleNamespace(**{name: import_module(f"guided_diffusion.{name}") for name in names})
    store = Path(tempfile.mkdtemp(dir=scratch)) / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    parts.logger.configure(dir=str(scratch / "original-log"), format_strs=["log"])
    process = config.diffusion
    diffusion = parts.script_util.create_gaussian_diffusion(
        steps=process.steps,
        learn_sigma=process.learns_sigma,
        noise_schedule=process.schedule,
        predict_xstart=process.mean_type == "x_0",
        rescale_timesteps=process.rescale_timesteps,
        rescale_learned_sigmas=True,
    )
    batches = _Batches(data, settings.batch_size, device)
    shape = config.network(task)
    if isinstance(shape, ClassifierConfig):
        network = original_classifier(parts.unet, shape).to(device)
        return _original_classifier_step(parts, network, diffusion, batches, settings)
    network = original_unet(parts.unet, _unet_config(shape)).to(device)
    loop = parts.train_util.TrainLoop(
        model=network,
        diffusion=diffusion,
        data=None,
        batch_size=settings.batch_size,
        microbatch=-1,
        lr=settings.lr,
        ema_rate="0.9999",
        log_interval=_LOG_EVERY,
        save_interval=10**9,
        resume_checkpoint="",
        schedule_sampler=parts.resample.UniformSampler(diffusion),
    )
    conditional = _unet_config(shape).num_classes is not None

    def step() -> None:
        loop.run_step(batches.x, {"y": batches.y} if conditional else {})
        loop.step += 1
        if loop.step % _LOG_EVERY == 0:
            parts.logger.dumpkvs()

    return step


def _original_classifier_step(
    parts: SimpleNamespace, network: nn.Module, diffusion: Any, batches: _Batches, settings: Any
) -> Callable[[], None]:
    trainer = parts.fp16_util.MixedPrecisionTrainer(model=network, use_fp16=False)
    optimizer = torch.optim.AdamW(trainer.master_params, lr=settings.lr, weight_decay=settings.weight_decay)
    sampler, count = parts.resample.UniformSampler(diffusion), 0

    def step() -> None:
        nonlocal count
        t, _ = sampler.sample(len(batches.x), batches.x.device)
        logits = network(diffusion.q_sample(batches.x, t), timesteps=t)
        loss = F.cross_entropy(logits, batches.y, reduction="none")
        right = (logits.argmax(dim=1) == batches.y).float()
        parts.train_util.log_loss_dict(diffusion, t, {"train_loss": loss.detach(), "train_acc@1": right})
        trainer.zero_grad()
        trainer.backward(loss.mean())
        trainer.optimize(optimizer)
        count += 1
        if count % _LOG_EVERY == 0:
            parts.logger.dumpkvs()

    return step


def _stand_in_for_mpi() -> None:
    """Stub modules that the original imports but a single process does not need."""
    if find_spec("mpi4py") is None:
        stand_in = ModuleType("mpi4py")
        stand_in.MPI = SimpleNamespace(  # type: ignore[attr-defined]
            COMM_WORLD=SimpleNamespace(Get_rank=lambda: 0, Get_size=lambda: 1, rank=0, size=1)
        )
        sys.modules["mpi4py"] = stand_in
    if find_spec("blobfile") is None:
        sys.modules["blobfile"] = ModuleType("blobfile")  # only used to save and resume
