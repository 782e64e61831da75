"""Figure 4 of the paper for a sweep: every metric against the scale or cost, precision against recall."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from admtrt.files import atomic_file

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from admtrt.evaluate.compare import Value
    from admtrt.evaluate.sweep import Row

_COLUMNS = 3
_PANEL = (3.6, 2.9)  # inches


def save_figure(rows: Sequence[Row], index: int, path: Path) -> None:
    """Draw one set of features of a sweep as PNG.

    One panel per metric shows value and error against the guidance scale, or against the evaluations of the
    networks where all scales are equal, with one line per combination of the other choices, and real images
    as a dashed line. The last panel shows precision against recall.

    Args:
        rows: one or more rows of the sweep.
        index: index of the set of features.
        path: the file.

    Raises:
        OutputError: if it cannot be written.
    """
    from matplotlib.figure import Figure

    names = list(rows[0].judged[index].metrics)
    both = {"precision", "recall"} <= {*names}
    panels = len(names) + both
    columns = min(_COLUMNS, panels)
    height = -(-panels // columns)
    figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * height), layout="constrained")
    axes: list[Any] = [figure.add_subplot(height, columns, place + 1) for place in range(panels)]
    axis = _axis(rows)
    lines = _lines(rows, axis)
    floor = rows[0].judged[index].floor
    for name, panel in zip(names, axes, strict=False):
        for label, line in lines.items():
            values = [row.judged[index].metrics[name] for row in line]
            _draw(panel, [axis.of(row) for row in line], values, label)
        if floor is not None and floor[name].value is not None:
            panel.axhline(floor[name].value, color="grey", linestyle="--", linewidth=1, label="real images")
        panel.set_xlabel(axis.title)
        panel.set_title(name, fontsize=10)
    if both:
        panel = axes[-1]
        for label, line in lines.items():
            pairs = [
                (row.judged[index].metrics["recall"].value, row.judged[index].metrics["precision"].value)
                for row in line
            ]
            known = [(recall, precision) for recall, precision in pairs if None not in (recall, precision)]
            panel.plot(
                *zip(*known, strict=True) if known else ([], []), marker="o", markersize=3, label=label
            )
        if floor is not None and floor["recall"].value is not None:
            panel.plot(
                floor["recall"].value, floor["precision"].value, "x", color="grey", label="real images"
            )
        panel.set_xlabel("recall")
        panel.set_ylabel("precision")
        panel.set_title("precision against recall", fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


@dataclass(frozen=True)
class _Axis:
    """The horizontal axis of a figure, that metrics are shown against.

    Attributes:
        title: of the axis.
        of: the place of a row.
        other: what the label of a line says in its place.
    """

    title: str
    of: Callable[[Row], float]
    other: Callable[[Row], str]


_SCALE = _Axis("guidance scale", lambda row: row.sampler.scale, lambda row: f"{row.evaluations} evaluations")
_COST = _Axis(
    "evaluations of the networks", lambda row: row.evaluations, lambda row: f"scale {row.sampler.scale:g}"
)


def _axis(rows: Sequence[Row]) -> _Axis:
    """The scale, unless only the evaluations differ."""
    scales, evaluations = ({axis.of(row) for row in rows} for axis in (_SCALE, _COST))
    return _COST if len(scales) == 1 < len(evaluations) else _SCALE


def _lines(rows: Sequence[Row], axis: _Axis) -> dict[str, list[Row]]:
    """Group rows that differ only along the axis, ascending, under a label of what they share.

    Rows at scale 0 have no guidance interval and are added to the lines of all intervals.
    """

    def shared(row: Row, interval: tuple[float, float] | None) -> str:
        label = f"{row.sampler.method}, {axis.other(row)}, {row.point.precision}"
        return label if interval is None else f"{label}, sigma {interval[0]:g} to {interval[1]:g}"

    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row.sampler.scale:
            lines.setdefault(shared(row, row.point.guidance_interval), []).append(row)
    for row in rows:
        if not row.sampler.scale:
            stem = shared(row, None)
            own = [line for label, line in lines.items() if label == stem or label.startswith(f"{stem}, ")]
            for line in own or [lines.setdefault(stem, [])]:
                line.append(row)
    return {label: sorted(line, key=axis.of) for label, line in lines.items()}


def _draw(panel: Any, places: Sequence[float], values: Sequence[Value], label: str) -> None:
    known = [(place, value) for place, value in zip(places, values, strict=True) if value.value is not None]
    panel.errorbar(
        [place for place, _ in known],
        [value.value for _, value in known],
        yerr=[value.error or 0.0 for _, value in known],
        marker="o",
        markersize=3,
        capsize=2,
        label=label,
    )
