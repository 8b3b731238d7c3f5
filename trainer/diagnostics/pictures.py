"""Rows of diagnostics as pictures: layer x step heat maps, and the last row's matrices. Imports no JAX; needs Matplotlib."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from strata import ConfigError

WIDTH, HEIGHT, DOTS = 4.8, 3.0, 130  # inches, and dots an inch: sharp at the width of a phone
LOGARITHMIC = 100.0
"""Positive values that span more than this factor are coloured on a logarithmic scale."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a diagnostic is labelled, and which vector over layers stands for one with two axes in the course of training."""

    rows: str = "layer"
    columns: str = "column"
    vector: Callable[[np.ndarray], np.ndarray] = lambda matrix: over_columns(np.mean, matrix)
    vector_label: str = "mean over columns"


LAYOUTS = {
    "angular_distance": Layout("state l", "n", lambda matrix: matrix[:-1, 1], "d(l, 1)"),
    "angular_distance.influence": Layout(),
    "attention_entropy": Layout(columns="head", vector_label="mean over heads"),
    "effective_rank": Layout("state"),
    "gradient_norm.states": Layout("state"),
    "logit_lens": Layout("state"),
    "loop_change": Layout("after loop"),
    "massive_activation": Layout("state"),
    "momentum_spectrum": Layout(
        columns="quantile", vector=lambda matrix: matrix[:, (matrix.shape[1] - 1) // 2], vector_label="middle quantile"
    ),
    "newton_schulz.steps": Layout(columns="matrix"),
    "newton_schulz.quantiles": Layout(
        columns="quantile", vector=lambda matrix: matrix[:, matrix.shape[1] // 2], vector_label="median"
    ),
    "skip_effect.later": Layout(
        "layer left out", "later layer", lambda matrix: over_columns(np.max, matrix), "largest over later layers"
    ),
    "stream": Layout("state"),
}
"""By dotted path or a part of it from its beginning, the longest that is here; any other has the default."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """One PNG."""

    diagnostic: str
    name: str  # of the file, without its suffix
    title: str
    png: bytes


def pictures(rows: Sequence[Mapping[str, Any]]) -> Iterator[Picture]:
    """Every picture of a run, diagnostic by diagnostic.

    Args:
      rows: of diagnostics, in the order of their steps; at least one.

    Raises:
      ConfigError: Matplotlib is not installed; the message names the extra.
    """
    require_matplotlib()
    names = dict.fromkeys(key for row in rows for key in row if key not in ("step", "split", "timing"))
    for diagnostic in names:
        with_it = [row for row in rows if diagnostic in row]
        for path, last in leaves(with_it[-1][diagnostic]):
            history = [(row["step"], _at(row[diagnostic], path)) for row in with_it]
            steps, values = zip(*((step, value) for step, value in history if np.shape(value) == np.shape(last)), strict=True)
            yield from _of_values(diagnostic, path, steps, np.stack(values))


def leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """The arrays of a nested dict with their paths."""
    if isinstance(tree, Mapping):
        for name, item in tree.items():
            yield from leaves(item, (*path, name))
    else:
        yield path, np.array(tree, float)


def require_matplotlib() -> None:
    """Raises `ConfigError` if Matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ConfigError("trainer.inspect draws with Matplotlib, which is not here: pip install -e '.[report]'") from None


def _at(tree: Any, path: tuple[str, ...]) -> np.ndarray | None:
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            return None
        tree = tree[name]
    return np.array(tree, float)  # null, which stands for a number that is not finite, becomes NaN


def _of_values(diagnostic: str, path: tuple[str, ...], steps: Sequence[int], values: np.ndarray) -> Iterator[Picture]:
    """`values` [steps], [steps, layers] or [steps, layers, columns]."""
    name = ".".join([diagnostic, *path])
    title = name.replace("_", " ").replace(".", ": ", 1)
    beginnings = (".".join([diagnostic, *path[:i]]) for i in range(len(path), -1, -1))
    layout = next((LAYOUTS[beginning] for beginning in beginnings if beginning in LAYOUTS), Layout())
    if values.ndim == 1:
        yield Picture(diagnostic, name, title, _lines(title, "step", steps, values))
    elif values.ndim == 2:
        yield Picture(diagnostic, name, title, _over_training(title, steps, values, layout.rows))
    else:
        shown = np.stack([layout.vector(matrix) for matrix in values])
        caption = f"{title}, {layout.vector_label}"
        yield Picture(diagnostic, name, caption, _over_training(caption, steps, shown, layout.rows))
        caption = f"{title}, step {steps[-1]:,}"
        yield Picture(diagnostic, f"{name}.last", caption, _heat(caption, layout.columns, layout.rows, values[-1]))


def _over_training(title: str, steps: Sequence[int], values: np.ndarray, rows: str) -> bytes:
    """[steps, layers]: a heat map, or with a single step a curve over layers."""
    if len(steps) == 1:
        return _lines(f"{title}, step {steps[0]:,}", rows, range(values.shape[1]), values[0])
    return _heat(title, "step", rows, values.T, [f"{step:,}" for step in steps])


def _lines(title: str, label: str, places: Sequence[int], values: np.ndarray) -> bytes:
    figure, axes = _figure(title)
    axes.plot(places, values, marker="o", markersize=4, color="#2a5d9f")
    axes.set_xlabel(label)
    axes.margins(x=0.03)
    axes.grid(alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=bool((values == values.round()).all()))
    if np.isfinite(values).all() and (values > 0).all() and values.max() > LOGARITHMIC * values.min():
        axes.set_yscale("log")
    return _png(figure)


def _heat(title: str, columns: str, rows: str, matrix: np.ndarray, labels: Sequence[str] | None = None) -> bytes:
    """[rows, columns], row 0 at the bottom, where the network begins; grey where there is no value."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, TwoSlopeNorm

    finite = matrix[np.isfinite(matrix)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    scale: dict[str, Any] = {"cmap": colormaps["viridis"].with_extremes(bad="#d8d8d8")}
    if low < 0 < high:
        largest = max(-low, high)
        scale = {"cmap": colormaps["RdBu_r"].with_extremes(bad="#d8d8d8"), "norm": TwoSlopeNorm(0, -largest, largest)}
    elif low > 0 and high > LOGARITHMIC * low:
        scale["norm"] = LogNorm(low, high)
    figure, axes = _figure(title)
    image = axes.imshow(np.ma.masked_invalid(matrix), aspect="auto", origin="lower", interpolation="nearest", **scale)
    axes.set_xlabel(columns)
    axes.set_ylabel(rows)
    axes.yaxis.get_major_locator().set_params(integer=True)
    if labels is None:
        axes.xaxis.get_major_locator().set_params(integer=True)
    else:
        shown = np.unique(np.linspace(0, len(labels) - 1, min(6, len(labels))).round().astype(int))
        axes.set_xticks(shown, [labels[i] for i in shown])
    bar = figure.colorbar(image, ax=axes)
    bar.ax.tick_params(labelsize=8)
    return _png(figure)


def _figure(title: str) -> tuple[Any, Any]:
    # Without pyplot: no state of the whole process, no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DOTS, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8)
    return figure, axes


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def over_columns(reduce: Callable[..., np.ndarray], matrix: np.ndarray) -> np.ndarray:
    """Of each row's finite values; NaN for a row that has none."""
    found = [row[np.isfinite(row)] for row in matrix]
    return np.array([reduce(row) if row.size else np.nan for row in found])
