"""One network in training: optimiser steps on this process's share of the batch."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from admtrt.models.layers import set_gradient_checkpointing
from admtrt.training.data import batch
from admtrt.training.ema import Averages
from admtrt.training.metrics import Window
from admtrt.training.state import Groups, load_optimizer, optimizer_tensors
from admtrt.training.timesteps import Drawn, Stream, draw_noise, torch_seed

if TYPE_CHECKING:
    from accelerate import Accelerator
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from admtrt.data.image_set import ImageSet
    from admtrt.run_config import TrainingConfig
    from admtrt.training.engine import Division
    from admtrt.training.objectives import Objective


def learning_rate(settings: TrainingConfig, step: int) -> float:
    """The rate of the update from ``step`` to ``step + 1``: linear warm-up, times the annealing."""
    rate = settings.lr
    if settings.warmup_steps:
        rate *= min(1.0, (step + 1) / settings.warmup_steps)
    if settings.lr_schedule == "linear":
        rate *= 1 - step / settings.steps
    if settings.lr_schedule == "cosine":
        rate *= (1 + math.cos(math.pi * step / settings.steps)) / 2
    return rate


class Learner:
    """Weights, averages, optimiser and all other state that a step changes.

    Attributes:
        step: optimiser steps done, skipped ones included.
        nan_steps: number of consecutive skipped steps until now.
        window: metrics since the window was last replaced.
        averages: the EMA weights; empty outside the main process.

    Args:
        network: freshly initialised, the same in every process.
        objective: the objective, after :meth:`Objective.begin`.
        settings: the training configuration.
        accelerator: the engine.
        division: how batches are divided.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: Objective,
        settings: TrainingConfig,
        accelerator: Accelerator,
        division: Division,
    ) -> None:
        self.step = 0
        self.nan_steps = 0
        self.window = Window()
        self._settings = settings
        self._objective = objective
        self._accelerator = accelerator
        self._division = division
        set_gradient_checkpointing(network, enabled=settings.gradient_checkpointing)
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
        )
        self._layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        network.to(memory_format=self._layout)  # type: ignore[call-overload]  # missing in PyTorch's stubs
        self._network, self._optimizer = accelerator.prepare(network.train(), optimizer)
        self._plain_network = network
        rates = settings.ema_rates if accelerator.is_main_process else ()
        self.averages = Averages(rates, network.state_dict(), warmup=settings.ema_warmup)

    def update(self, data: ImageSet) -> None:
        """Take one optimiser step. If the loss or a gradient is not finite, every process skips it."""
        settings = self._settings
        drawn = self._objective.levels.draw(Stream.TIMESTEPS, settings.seed, self.step, settings.batch_size)
        self._optimizer.zero_grad()
        collected: list[dict[str, Tensor]] = []
        shards = self._division.shards_of(self._accelerator.process_index)
        for shard in shards:
            torch.manual_seed(torch_seed(Stream.DROPOUT, settings.seed, self.step, shard))
            last = shard == shards[-1]
            with contextlib.nullcontext() if last else self._accelerator.no_sync(self._network):
                values = self.values(data, shard, drawn, Stream.NOISE)
                weight = torch.from_numpy(drawn.weights[self._division.places(shard)]).to(
                    values["loss"].device
                )
                self._accelerator.backward((values["loss"] * weight).mean() / len(shards))
            collected.append({name: value.detach() for name, value in values.items()})
        norm = float(
            self._accelerator.clip_grad_norm_(self._network.parameters(), settings.grad_clip or math.inf)
        )
        gathered = self._gather(collected)
        losses_finite = all(np.isfinite(value).all() for value in gathered.values())
        changed = self._change(gathered, drawn, norm, losses_finite=losses_finite)
        self.step += 1
        self._objective.stepped(self._plain_network, self.step, changed=changed)

    def _change(
        self,
        values: dict[str, NDArray[np.float32]],
        drawn: Drawn,
        norm: float,
        *,
        losses_finite: bool,
    ) -> bool:
        """Apply the gradients and record the whole batch's values, or count a skipped step.

        Returns:
            Whether the network has changed.
        """
        scaler = self._accelerator.scaler
        finite = losses_finite and math.isfinite(norm)
        self.window.add_scalar("skipped", float(not finite))
        if not finite:
            # fp16 finds its loss scale by overflowing: no divergence as long as the scale can be lowered.
            searching = losses_finite and scaler is not None and scaler.get_scale() > 1
            self.nan_steps += not searching
            if scaler is not None:
                scaler.update()
            return False
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._settings, self.step)
        self._optimizer.step()
        self.averages.update(self._plain_network.state_dict(), self.step)
        self._objective.levels.record(drawn.levels, values["loss"])
        self.window.add(values, drawn)
        self.window.add_scalar("grad_norm", norm)
        self.nan_steps = 0
        return True

    def any_process(self, said: bool) -> bool:
        """True if ``flag`` is true in any process. All processes have to call it."""
        if self._accelerator.num_processes == 1:
            return said
        votes = torch.tensor([float(said)], device=self._accelerator.device)
        return bool(self._accelerator.gather(votes).any())

    @torch.no_grad()
    def evaluate(self, data: ImageSet) -> dict[str, float]:
        """Mean values on a batch of other images at its own noise levels, with the current weights."""
        seed, size = self._settings.seed, self._settings.batch_size
        drawn = self._objective.levels.held_out().draw(Stream.HELD_OUT_TIMESTEPS, seed, self.step, size)
        self._network.eval()
        shards = self._division.shards_of(self._accelerator.process_index)
        values = self._gather([self.values(data, shard, drawn, Stream.HELD_OUT_NOISE) for shard in shards])
        self._network.train()
        window = Window()
        window.add(values, drawn)
        return window.means()

    def values(self, data: ImageSet, shard: int, drawn: Drawn, noise_stream: Stream) -> dict[str, Tensor]:
        """The objective's values of one shard of the batch, by name, each of shape ``[N]``."""
        seed, places, device = self._settings.seed, self._division.places(shard), self._accelerator.device
        x_0, y = batch(data, seed, self.step, len(places), rank=shard, world=self._division.shards)
        noise = draw_noise(noise_stream, seed, self.step, places, tuple(x_0.shape[1:]))
        return self._objective(
            self._network,
            x_0.to(device, memory_format=self._layout),
            None if y is None else y.to(device),
            torch.from_numpy(drawn.levels[places]).to(device),
            noise.to(device, memory_format=self._layout),
        )

    def _gather(self, collected: list[dict[str, Tensor]]) -> dict[str, NDArray[np.float32]]:
        """Gather the values of the whole batch, in its order, from all micro-batches and processes."""
        names = list(collected[0])
        own = torch.cat([torch.stack([values[name] for name in names], dim=1) for values in collected])
        gathered = self._accelerator.gather(own).float().cpu().numpy()
        ordered = np.empty_like(gathered)
        ordered[self._division.gathered_places()] = gathered
        return dict(zip(names, ordered.T, strict=True))

    def state(self) -> tuple[Groups, dict[str, Any]]:
        """The state for :meth:`load` to continue bit for bit; complete in the main process only."""
        scaler = self._accelerator.scaler
        kept, told = self._objective.state()
        groups: Groups = {
            "model": self._plain_network.state_dict(),
            "optimizer": optimizer_tensors(self._optimizer),
            "timesteps": self._objective.levels.state(),
            **({"objective": kept} if kept else {}),
            **{f"ema-{rate}": average for rate, average in self.averages.states.items()},
        }
        values = {
            "step": self.step,
            "nan_steps": self.nan_steps,
            "window": self.window.state(),
            "scaler": None if scaler is None else scaler.state_dict(),
            **({"objective": told} if told else {}),
        }
        return groups, values

    def load(self, groups: Groups, values: dict[str, Any]) -> None:
        """Restore what :meth:`state` gave."""
        self._objective.load(groups.get("objective", {}), values.get("objective", {}))
        self._plain_network.load_state_dict(groups["model"])
        load_optimizer(self._optimizer, groups.get("optimizer", {}))
        self._objective.levels.load(groups.get("timesteps", {}))
        for rate in self.averages.states:
            self.averages.load(rate, groups[f"ema-{rate}"])
        self.step, self.nan_steps = values["step"], values["nan_steps"]
        self.window = Window.from_state(values["window"])
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(values["scaler"])
