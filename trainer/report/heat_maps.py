"""Heat maps of what runs measure layer by layer: rates, norms, spectra, gradients."""

from __future__ import annotations

from typing import Any

import numpy as np

from trainer.diagnostics.pictures import LAYOUTS, Layout
from trainer.report.drawing import Drawing, finish, new_figure
from trainer.report.records import Record
from trainer.report.results import Results

MOST_PANELS = 6


def arrays(record: Record) -> dict[tuple[str, str], list[tuple[int, np.ndarray]]]:
    """Numbers over layers: every list in a row, by split and name; of a list of lists, such as quantiles of a spectrum a
    layer, the vector that pictures of a single run show too.
    """
    found: dict[tuple[str, str], list[tuple[int, np.ndarray]]] = {}

    def collect(split: str, step: int, name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                collect(split, step, f"{name}/{key}", item)
        elif isinstance(value, list) and len(value) > 1:
            try:
                array = np.array(value, float)  # None becomes NaN
            except (TypeError, ValueError):  # texts, rows of several lengths
                return
            if array.ndim == 2 and array.size:
                layout = _layout(name)
                name, array = f"{name}, {layout.vector_label}", layout.vector(array)
            if array.ndim == 1 and len(array) > 1:
                found.setdefault((split, name), []).append((step, array))

    for row in record.rows:
        for name, value in row.items():
            if name not in ("step", "split", "timing"):
                collect(row["split"], row["step"], name, value)
    return found


def _layout(name: str) -> Layout:
    """That of the longest beginning of a name that has one."""
    parts = name.partition(",")[0].split("/")
    beginnings = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((LAYOUTS[beginning] for beginning in beginnings if beginning in LAYOUTS), Layout())


def heat_maps(results: Results) -> list[Drawing]:
    """Layer x step of every number that rows hold over layers, such as rates, one panel an arm, mean over the seeds whose rows
    hold it most often. None of what is the same everywhere.
    """
    panels: dict[tuple[str, str], dict[str, tuple[list[int], np.ndarray]]] = {}
    for arm in results.arms:
        runs = [arrays(record) for record in results.with_rows(arm.name)]
        for key in dict.fromkeys(key for run in runs for key in run):
            tables = [dict(run[key]) for run in runs if key in run]
            most = max(map(len, tables))
            tables = [table for table in tables if len(table) == most]
            steps = sorted(set.intersection(*(set(table) for table in tables)))
            widths = {len(table[step]) for table in tables for step in steps}
            if len(steps) > 1 and len(widths) == 1:
                with np.errstate(invalid="ignore"):  # infinities of both signs have no mean, and are left blank
                    mean = np.mean([[table[step] for step in steps] for table in tables], axis=0)
                title = arm.name if len(tables) == len(runs) else f"{arm.name} ({len(tables)} of {len(runs)} seeds)"
                panels.setdefault(key, {})[title] = (steps, mean.T)
    varied = {key: arms for key, arms in panels.items() if len({x for _, table in arms.values() for x in table.flat}) > 1}
    return [_heat_map(split, name, arms) for (split, name), arms in varied.items()]


def _heat_map(split: str, name: str, arms: dict[str, tuple[list[int], np.ndarray]]) -> Drawing:
    from matplotlib.colors import LogNorm, Normalize

    shown = dict(list(arms.items())[:MOST_PANELS])
    figure, axes = new_figure(f"{name} by layer and step", len(shown), 1, height=0.6 + 1.6 * len(shown))
    values = np.concatenate([table.ravel() for _, table in shown.values()])
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    norm = LogNorm(low, high) if low > 0 and high / low > 30 else Normalize(low, high)
    for axis, (arm, (steps, table)) in zip(axes[:, 0], shown.items(), strict=True):
        axis.grid(False)
        edges = [steps[0] - 0.5, *((a + b) / 2 for a, b in zip(steps, steps[1:], strict=False)), steps[-1] + 0.5]
        mesh = axis.pcolormesh(edges, np.arange(len(table) + 1) - 0.5, table, norm=norm, cmap="viridis", rasterized=True)
        axis.set_title(arm, fontsize=8, loc="left")
        axis.set_ylabel(_layout(name).rows)
    axes[-1, 0].set_xlabel("step")
    figure.colorbar(mesh, ax=list(axes[:, 0]), shrink=0.9)
    more = f" The first {MOST_PANELS} of {len(arms)} arms." if len(arms) > len(shown) else ""
    alt = f"Heat map of {split} {name}, layers upwards, steps to the right, one panel an arm.{more}"
    file = f"heat-{split}-{name}".replace("/", "-").replace(", ", "-").replace(" ", "-")
    return finish(figure, file, f"{name} by layer and step", alt)
