"""Figures as SVG: curves with bands, effects, speed to a loss, heat maps over layers, U-curves of rates."""

from __future__ import annotations

import dataclasses
import importlib
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from strata import ConfigError
from trainer.diagnostics.pictures import LAYOUTS, Layout
from trainer.report import statistics
from trainer.report.analysis import Report
from trainer.report.results import Record, Results
from trainer.sweep import outcome as outcomes
from trainer.sweep.experiment import Arm, Metric

# Okabe and Ito's palette, told apart by colour-blind readers too; line styles repeat it in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C6D31")
STYLES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*"
WIDTH, HEIGHT = 5.2, 3.4  # inches: a phone shows this at nearly its own size
LEGEND_ROW = 0.17  # inches
MOST_PANELS = 6


@dataclasses.dataclass(frozen=True)
class Drawing:
    """One figure.

    Attributes:
      name: of its file, without suffix.
      alt: what it shows, for those who do not see it.
    """

    name: str
    title: str
    alt: str
    svg: str


def draw(report: Report) -> list[Drawing]:
    """Every figure that the runs have data for. Raises `ConfigError` where Matplotlib is missing."""
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        raise ConfigError("a report needs SciPy and Matplotlib: pip install 'strata-lm[report]'") from None
    results = report.results
    families = _families(results).items()
    found = [_curves(results, *family, split, name) for split, name in _curve_names(results) for family in families]
    found += [_effects(report), *(_speed(results, *family) for family in families)]
    found += [*_heat_maps(results), *_u_curves(results)]
    return [drawing for drawing in found if drawing is not None]


def _families(results: Results) -> dict[str, list[Arm]]:
    """Arms by what their names have before a colon: those of another task are drawn apart, as are "text: a" and "text: b"."""
    found: dict[str, list[Arm]] = {}
    for arm in results.arms:
        head, colon, _ = arm.name.partition(": ")
        found.setdefault(head if colon else "", []).append(arm)
    return found


def _curve_names(results: Results) -> list[tuple[str, str]]:
    """The metric itself, and the training loss."""
    names = [(results.metric.split, results.metric.name), ("train", "loss")]
    names += [(metric.split, metric.name) for metric in results.also if metric.kind == "value"]
    return list(dict.fromkeys(names))


def _figure(title: str, rows: int = 1, columns: int = 1, height: float = HEIGHT) -> tuple[Any, Any]:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "strata", "font.family": "sans-serif", "font.size": 9})
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.suptitle(title, fontsize=10)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _drawing(figure: Any, name: str, title: str, alt: str) -> Drawing:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return Drawing(name, title, alt, svg[svg.index("<svg") :])


def _look(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": STYLES[index // len(COLOURS) % len(STYLES)]}


def _looks(results: Results, arms: Sequence[Arm]) -> dict[str, dict[str, Any]]:
    """Of arms, the same in every figure of curves. Those that have curves come first: they take colours of their own."""

    def curved(arm: str) -> bool:
        runs = _with_curve(results, arm)
        return any(len(_shared_curve(runs, split, name)[0]) > 1 for split, name in _curve_names(results))

    names = sorted((arm.name for arm in arms), key=lambda name: not curved(name))
    return {name: _look(index) for index, name in enumerate(names)}


def _legend(figure: Any, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        columns = 1 if max(map(len, labels)) > 24 else 2
        rows = -(-len(labels) // columns)
        figure.set_figheight(figure.get_figheight() + LEGEND_ROW * max(0, rows - 4))  # the axes keep their size
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def _with_curve(results: Results, arm: str) -> list[Record]:
    """Runs with a curve; those that failed or diverged are in no mean."""
    return [record for record in results.of(arm) if record.rows and record.state not in ("failed", "diverged")]


def _shared_curve(records: Sequence[Record], split: str, name: str) -> tuple[list[int], np.ndarray]:
    """Steps that every run has a row of, and the values [run, step]."""
    wanted = Metric(name, split)
    curves = [dict(outcomes.series(record.rows, wanted)) for record in records]
    curves = [curve for curve in curves if curve]
    if not curves:
        return [], np.zeros((0, 0))
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return steps, np.array([[curve[step] for step in steps] for curve in curves])


def _band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The 95 % interval of the mean at each step; None for one run."""
    n = len(values)
    if n < 2:
        return None
    half = statistics.t_quantile(0.975, n - 1) * values.std(0, ddof=1) / math.sqrt(n)
    return values.mean(0) - half, values.mean(0) + half


def _curves(results: Results, family: str, arms: Sequence[Arm], split: str, name: str) -> Drawing | None:
    title = _titled(f"{split} {name}", family)
    figure, axes = _figure(f"{title}, mean over seeds with 95 % interval")
    axis, drawn, smallest = axes[0, 0], 0, math.inf
    looks = _looks(results, arms)
    for arm in arms:
        steps, values = _shared_curve(_with_curve(results, arm.name), split, name)
        if len(steps) < 2:
            continue
        drawn += 1
        smallest = min(smallest, float(values.min()))
        axis.plot(steps, values.mean(0), label=f"{arm.name} (n = {len(values)})", linewidth=1.4, **looks[arm.name])
        if band := _band(values):
            axis.fill_between(steps, *band, color=looks[arm.name]["color"], alpha=0.18, linewidth=0)
    if not drawn:
        return None
    axis.set_xlabel("step")
    axis.set_ylabel(name)
    tops = [line.get_ydata() for line in axis.lines]
    if smallest > 0 and max(float(np.max(y)) for y in tops) / smallest > 20:
        axis.set_yscale("log")
    _legend(figure, axis)
    ends = "; ".join(f"{line.get_label()} ends at {line.get_ydata()[-1]:.4g}" for line in axis.lines)
    return _drawing(figure, _called(f"curve-{split}-{name}", family), title, f"{title} by step. {ends}.")


def _titled(title: str, family: str) -> str:
    return f"{family}: {title}" if family else title


def _called(name: str, family: str) -> str:
    """The name of a family's drawing, which is a file's too."""
    return "-".join(f"{name} {family}".replace("/", "-").split())


def _effects(report: Report) -> Drawing | None:
    """Improvements of all claims with their intervals, and the paper's own."""
    shown = [verdict for verdict in report.verdicts if verdict.summary.n]
    if not shown:
        return None
    figure, axes = _figure(
        "improvement: pairs, 95 % interval (thin: of the family)", len(shown), 1, height=0.75 + 0.95 * len(shown)
    )
    for axis, verdict in zip(axes[:, 0], shown, strict=True):
        found, claim = verdict.summary, verdict.evidence.claim
        axis.axvline(0, color="#888888", linewidth=0.8)
        axis.plot(verdict.evidence.improvements, [0.0] * found.n, "o", color="#999999", markersize=3.5, alpha=0.8)
        if all(map(math.isfinite, verdict.family)):  # at the level at which the claim is decided among the others
            axis.plot(verdict.family, [0, 0], color=COLOURS[0], linewidth=0.8)
        if found.n > 1:
            axis.plot([found.low, found.high], [0, 0], color=COLOURS[0], linewidth=2.4)
        axis.plot([found.mean], [0], "D", color=COLOURS[0], markersize=6)
        if claim.paper_effect is not None:
            axis.plot([claim.paper_effect], [0], "*", color=COLOURS[1], markersize=10)
            axis.annotate("paper", (claim.paper_effect, 0), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=7)
        axis.set_yticks([])
        axis.set_ylim(-1, 1)
        axis.spines["left"].set_visible(False)
        title = f"{claim.arm} against {claim.against}: {verdict.word}"
        axis.set_title(title if len(title) < 75 else f"{title[:72]}...", fontsize=8, loc="left")
        axis.set_xlabel((claim.metric or report.results.metric).label, fontsize=7)
    alt = "; ".join(f"{v.evidence.claim.statement}: {v.summary.mean:.4g}" for v in shown)
    return _drawing(figure, "effects", "improvements", f"Improvement of every claim, positive in its direction. {alt}.")


def _speed(results: Results, family: str, arms: Sequence[Arm]) -> Drawing | None:
    """Steps that an arm needs to a value, over the values that all arms pass."""
    metric = dataclasses.replace(results.metric, kind="value", target=None)
    curves = {}
    for arm in arms:
        runs = [outcomes.series(record.rows, metric) for record in _with_curve(results, arm.name)]
        if runs := [run for run in runs if len(run) > 1]:
            curves[arm.name] = runs
    if len(curves) < 2:
        return None
    better = min if metric.lower_is_better else max
    worse = max if metric.lower_is_better else min
    starts = [worse(y for _, y in run[:1]) for runs in curves.values() for run in runs]
    ends = [better(y for _, y in run) for runs in curves.values() for run in runs]
    start, end = better(starts), better(ends)
    if not (math.isfinite(start) and math.isfinite(end)) or start == end:
        return None
    lines = {}
    for name, runs in curves.items():
        points = []
        for target in np.linspace(start, end, 60):
            steps = [outcomes.crossing(run, float(target), metric.lower_is_better) for run in runs]
            if all(step is not None for step in steps):
                points.append((float(target), float(np.mean(steps))))
        if len(points) > 1:  # one is no line
            lines[name] = points
    if not lines:
        return None
    figure, axes = _figure(_titled(f"steps to a {metric.split} {metric.name}, mean over seeds", family))
    axis, looks = axes[0, 0], _looks(results, arms)
    for name, points in lines.items():
        axis.plot(*np.array(points).T, label=name, linewidth=1.4, **looks[name])
    axis.set_xlabel(f"{metric.split} {metric.name} reached by all seeds")
    axis.set_ylabel("steps")
    if metric.lower_is_better:
        axis.invert_xaxis()
    _legend(figure, axis)
    alt = f"Steps that each arm needs until {metric.split} {metric.name} reaches a value."
    return _drawing(figure, _called("speed", family), _titled("speed to a value", family), alt)


def _arrays(record: Record) -> dict[tuple[str, str], list[tuple[int, np.ndarray]]]:
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


def _heat_maps(results: Results) -> list[Drawing]:
    """Layer x step of every number that rows hold over layers, such as rates, one panel an arm, mean over the seeds whose rows
    hold it most often. None of what is the same everywhere.
    """
    panels: dict[tuple[str, str], dict[str, tuple[list[int], np.ndarray]]] = {}
    for arm in results.arms:
        runs = [_arrays(record) for record in _with_curve(results, arm.name)]
        for key in dict.fromkeys(key for run in runs for key in run):
            tables = [dict(run[key]) for run in runs if key in run]
            most = max(map(len, tables))
            tables = [table for table in tables if len(table) == most]
            steps = sorted(set.intersection(*(set(table) for table in tables)))
            widths = {len(table[step]) for table in tables for step in steps}
            if len(steps) > 1 and len(widths) == 1:
                mean = np.mean([[table[step] for step in steps] for table in tables], axis=0)
                title = arm.name if len(tables) == len(runs) else f"{arm.name} ({len(tables)} of {len(runs)} seeds)"
                panels.setdefault(key, {})[title] = (steps, mean.T)
    varied = {key: arms for key, arms in panels.items() if len({x for _, table in arms.values() for x in table.flat}) > 1}
    return [_heat_map(split, name, arms) for (split, name), arms in varied.items()]


def _heat_map(split: str, name: str, arms: dict[str, tuple[list[int], np.ndarray]]) -> Drawing:
    from matplotlib.colors import LogNorm, Normalize

    shown = dict(list(arms.items())[:MOST_PANELS])
    figure, axes = _figure(f"{name} by layer and step", len(shown), 1, height=0.6 + 1.6 * len(shown))
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
    return _drawing(figure, file, f"{name} by layer and step", alt)


def _u_curves(results: Results) -> list[Drawing]:
    """The metric over one number that arms, or the points of a tuning, differ in."""
    metric = dataclasses.replace(results.metric, kind="value", target=None)
    families: dict[str, dict[str, list[tuple[float, float | None, str]]]] = {}
    for choice in results.choices:
        arm = next((arm for arm in results.arms if arm.name == choice.arm), None)
        if arm is None or arm.tune is None or len(arm.tune.space.paths) != 1:
            continue
        path = arm.tune.space.paths[0]
        for record in _ended(results.of(arm.name, "tune")):
            x = _at(record.config, path)
            mark = "chosen" if record.point == choice.chosen else ""
            point = (x, _final(results, record, metric), mark)
            families.setdefault(path, {}).setdefault(f"{arm.name} (tuning)", []).append(point)
    for path in dict.fromkeys(path for arm in results.arms for path in arm.changes):
        groups: dict[str, list[tuple[float, float | None, str]]] = {}
        for arm in results.arms:
            if path in arm.changes:
                rest = ", ".join(f"{p.rsplit('.', 1)[-1]}={v}" for p, v in arm.changes.items() if p != path) or "all"
                for record in _ended(results.of(arm.name)):
                    groups.setdefault(rest, []).append((_at(record.config, path), _final(results, record, metric), ""))
        for name, points in groups.items():
            if len({x for x, _, _ in points if x is not None}) > 2:
                families.setdefault(path, {})[name] = points
    families = {path: lines for path, lines in families.items() if _drawable(lines)}
    last = [path.rsplit(".", 1)[-1] for path in families]
    names = [name if last.count(name) == 1 else path.replace(".", "-") for name, path in zip(last, families, strict=True)]
    return [_u_curve(name, path, lines, metric) for name, (path, lines) in zip(names, families.items(), strict=True)]


def _ended(records: Sequence[Record]) -> list[Record]:
    """Those whose cross would not say that they failed while they are still to come."""
    return [record for record in records if record.state in outcomes.OVER]


def _drawable(lines: dict[str, list[tuple[float, float | None, str]]]) -> bool:
    return any(x is not None and y is not None for points in lines.values() for x, y, _ in points)


def _at(config: Any, path: str) -> float | None:
    """A number in a config, or among the arguments of a measurement."""
    for step in path.split(".") if "measurement" not in config else ("arguments", path):
        config = config.get(step) if isinstance(config, dict) else None
    return float(config) if isinstance(config, int | float) and not isinstance(config, bool) else None


def _final(results: Results, record: Record, metric: Metric) -> float | None:
    """None for a run that did not finish with a number: it is drawn as a cross on top."""
    number = results.value(record, metric) if record.state == "finished" else None
    return None if number is None else number[0]


def _u_curve(name: str, path: str, lines: dict[str, list[tuple[float, float | None, str]]], metric: Metric) -> Drawing:
    figure, axes = _figure(f"{metric.split} {metric.name} over {path.rsplit('.', 1)[-1]}")
    axis, xs, ringed = axes[0, 0], [], False
    words = []
    for index, (line, points) in enumerate(lines.items()):
        points = [(x, y, mark) for x, y, mark in points if x is not None]
        xs += [x for x, _, _ in points]
        known = [(x, y) for x, y, _ in points if y is not None]
        means = [(x, float(np.mean([y for other, y in known if other == x]))) for x in sorted({x for x, _ in known})]
        look = _look(index)
        if known:
            axis.plot(*zip(*known, strict=True), MARKERS[index % len(MARKERS)], color=look["color"], markersize=4, alpha=0.6)
        if means:
            axis.plot(*zip(*means, strict=True), label=line, linewidth=1.4, **look)
            words.append(f"{line}: " + ", ".join(f"{y:.4g} at {x:g}" for x, y in means))
        for x in sorted({x for x, y, _ in points if y is None}):
            axis.plot([x], [0.97], "x", color=look["color"], transform=axis.get_xaxis_transform(), markersize=7)
        for x in sorted({x for x, y, mark in points if mark and y is not None}):
            ring = dict(color=look["color"], fillstyle="none", linestyle="", markersize=10)
            axis.plot([x], [dict(means)[x]], "o", label=None if ringed else "chosen by tuning", **ring)
            ringed = True
    if xs and min(xs) > 0 and max(xs) / min(xs) >= 4:  # as of three values by factors of two
        axis.set_xscale("log")
        if len(tried := sorted(set(xs))) <= 12:  # the values themselves, whose powers of ten would run into each other
            axis.set_xticks(tried, [f"{x:g}" for x in tried], rotation=45)
            axis.minorticks_off()
    axis.set_xlabel(path)
    axis.set_ylabel(f"{metric.split} {metric.name}")
    _legend(figure, axis)
    alt = f"{metric.label} over {path}; a cross on top is a run without a number. {'; '.join(words)}."
    return _drawing(figure, f"u-curve-{name}", f"{metric.name} over {path}", alt)
