"""Figure 4 of the paper for a sweep: metrics against the guidance scale, and precision against recall."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from admtrt.files import atomic_file

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from admtrt.evaluate.compare import Value
    from admtrt.evaluate.sweep import Row

_COLUMNS = 3
_PANEL = (3.6, 2.9)  # inches


def save_figure(rows: Sequence[Row], index: int, path: Path) -> None:
    """Draw one set of features of a sweep as PNG.

    One panel per metric shows value and error against the scale, one line per combination of the other
    choices, and real images as a dashed line. The last panel shows precision against recall.

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
    lines = _lines(rows)
    floor = rows[0].judged[index].floor
    for name, panel in zip(names, axes, strict=False):
        for label, line in lines.items():
            values = [row.judged[index].metrics[name] for row in line]
            _draw(panel, [row.sampler.scale for row in line], values, label)
        if floor is not None and floor[name].value is not None:
            panel.axhline(floor[name].value, color="grey", linestyle="--", linewidth=1, label="real images")
        panel.set_xlabel("guidance scale")
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


def _lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group rows that differ only in the scale, ascending, under a label of what they share.

    Rows at scale 0 have no guidance interval and are added to the lines of all intervals.
    """
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row.sampler.scale:
            lines.setdefault(_shared(row, row.point.guidance_interval), []).append(row)
    for row in rows:
        if not row.sampler.scale:
            stem = _shared(row, None)
            own = [line for label, line in lines.items() if label == stem or label.startswith(f"{stem}, ")]
            for line in own or [lines.setdefault(stem, [])]:
                line.append(row)
    return {label: sorted(line, key=lambda row: row.sampler.scale) for label, line in lines.items()}


def _shared(row: Row, interval: tuple[float, float] | None) -> str:
    label = f"{row.sampler.method}, {row.evaluations} steps, {row.point.precision}"
    return label if interval is None else f"{label}, sigma {interval[0]:g} to {interval[1]:g}"


def _draw(panel: Any, scales: Sequence[float], values: Sequence[Value], label: str) -> None:
    known = [(scale, value) for scale, value in zip(scales, values, strict=True) if value.value is not None]
    panel.errorbar(
        [scale for scale, _ in known],
        [value.value for _, value in known],
        yerr=[value.error or 0.0 for _, value in known],
        marker="o",
        markersize=3,
        capsize=2,
        label=label,
    )
