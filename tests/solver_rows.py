"""The equations of :mod:`admtrt.schedule.table` in float64, row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from admtrt.contract import quantile_of
from admtrt.schedule.levels import levels_of
from admtrt.schedule.table import UPDATE_FULL, float64_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from admtrt.config import DiffusionConfig, EdmConfig
    from admtrt.models.solvers import Networks
    from admtrt.schedule.rows import Rows
    from admtrt.schedule.sampler import SamplerConfig


def walk(
    rows: Rows,
    process: DiffusionConfig | EdmConfig,
    sampler: SamplerConfig,
    networks: Networks,
    x_T: Tensor,
    noise: Callable[[int], Tensor],
    image: Tensor | None = None,
    quantile: float | None = None,
) -> Iterator[Tensor]:
    """The networks' inputs, then the result; arguments as for :func:`admtrt.models.solvers.trajectory`."""
    table = float64_table(rows, process, sampler)
    x = rows.init_scale * x_T
    if rows.init_noise:
        x = x + rows.init_noise * noise(len(rows))
    if image is not None:
        x = x + levels_of(process).c_in(rows.levels[0]) * image
    saved = h1 = h2 = torch.zeros_like(x)
    for place, level in enumerate(rows.levels):
        yield x
        c = {column: float(table[column][place]) for column in UPDATE_FULL}
        out, g = networks(x, level.t)
        value, *learned = out.split(x.shape[1], dim=1)
        g = torch.zeros_like(x) if g is None else g
        y = c["x0_from_x"] * x + c["x0_from_out"] * value + c["x0_from_grad"] * g
        r = torch.full((len(x),), c["clip"], dtype=x.dtype)
        if c["bound"] > c["clip"]:
            values = y.abs().flatten(1)
            found = torch.quantile(values, quantile_of(values.shape[1], quantile), dim=1)
            r = torch.maximum(r, found).clamp(max=c["bound"])
        r = r.view(-1, 1, 1, 1)
        d = torch.maximum(torch.minimum(y, r), -r) * (c["clip"] / r)
        m = d + c["x0_shift"] * g
        log_w = c["log_weight"] + (c["log_weight_from_v"] * learned[0] if learned else torch.zeros_like(x))
        memory = {"x": x, "saved": saved, "h1": h1, "h2": h2}
        x = sum(c[f"prev_from_{name}"] * tensor for name, tensor in memory.items())
        x = x + c["prev_from_x0"] * d + c["prev_from_out"] * value
        x = x + (c["guidance"] * log_w.exp() + c["shift"]) * g
        if c["noise"]:
            x = x + c["noise"] * (log_w / 2).exp() * noise(len(rows) - 1 - place)
        saved = sum(c[f"saved_from_{name}"] * tensor for name, tensor in {**memory, "x0": m}.items())
        h1, h2 = m, h1
    yield x
