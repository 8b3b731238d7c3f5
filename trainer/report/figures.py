"""The figures of a report: curves with bands, effects and speed to a loss; heat maps and U-curves have files of their own."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from strata import ConfigError
from trainer.report import statistics
from trainer.report.analysis import Report
from trainer.report.curves import curve_names
from trainer.report.drawing import COLOURS, Drawing, add_legend, called, family_of, finish, look, new_figure, titled
from trainer.report.heat_maps import heat_maps
from trainer.report.records import Record
from trainer.report.results import Results
from trainer.report.u_curves import u_curves
from trainer.sweep import outcome as outcomes
from trainer.sweep.experiment import Arm, Metric


def draw(report: Report) -> list[Drawing]:
    """Every figure that the runs have data for. Raises `ConfigError` where Matplotlib is missing."""
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        raise ConfigError("a report needs SciPy and Matplotlib: pip install 'strata-lm[report]'") from None
    results = report.results
    families = _families(results).items()
    found = [_curves(results, *family, split, name) for split, name in curve_names(results) for family in families]
    found += [_effects(report), *(_speed(results, *family) for family in families)]
    found += [*heat_maps(results), *u_curves(results)]
    return [drawing for drawing in found if drawing is not None]


def _families(results: Results) -> dict[str, list[Arm]]:
    """Arms by what their names have before a colon: those of another task are drawn apart, as are "text: a" and "text: b"."""
    found: dict[str, list[Arm]] = {}
    for arm in results.arms:
        found.setdefault(family_of(arm.name), []).append(arm)
    return found


def _looks(results: Results, arms: Sequence[Arm]) -> dict[str, dict[str, Any]]:
    """Of arms, the same in every figure of curves. Those that have curves come first: they take colours of their own."""

    def curved(arm: str) -> bool:
        runs = results.with_rows(arm)
        return any(len(_shared_curve(runs, split, name)[0]) > 1 for split, name in curve_names(results))

    names = sorted((arm.name for arm in arms), key=lambda name: not curved(name))
    return {name: look(index) for index, name in enumerate(names)}


def _shared_curve(records: Sequence[Record], split: str, name: str) -> tuple[list[int], np.ndarray]:
    """Steps that every run has a finite value at, and the values [run, step]."""
    curves = [dict(_finite(record, Metric(name, split))) for record in records]
    curves = [curve for curve in curves if curve]
    if not curves:
        return [], np.zeros((0, 0))
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return steps, np.array([[curve[step] for step in steps] for curve in curves])


def _finite(record: Record, metric: Metric) -> list[tuple[int, float]]:
    """What of a run's curve can be drawn."""
    return [(step, value) for step, value in outcomes.series(record.rows, metric) if math.isfinite(value)]


def _band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The 95 % interval of the mean at each step; None for one run."""
    n = len(values)
    if n < 2:
        return None
    with np.errstate(over="ignore"):  # the square of what is nearly too large for a float
        half = statistics.t_quantile(0.975, n - 1) * values.std(0, ddof=1) / math.sqrt(n)
    return values.mean(0) - half, values.mean(0) + half


def _curves(results: Results, family: str, arms: Sequence[Arm], split: str, name: str) -> Drawing | None:
    title = titled(f"{split} {name}", family)
    figure, axes = new_figure(f"{title}, mean over seeds with 95 % interval")
    axis, drawn, smallest = axes[0, 0], 0, math.inf
    looks = _looks(results, arms)
    for arm in arms:
        steps, values = _shared_curve(results.with_rows(arm.name), split, name)
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
    shares = any(not metric.lower_is_better for metric in (results.metric, *results.also) if metric.name == name)
    if not shares and smallest > 0 and max(float(np.max(y)) for y in tops) / smallest > 20:
        axis.set_yscale("log")
    add_legend(figure, axis)
    ends = "; ".join(f"{line.get_label()} ends at {line.get_ydata()[-1]:.4g}" for line in axis.lines)
    return finish(figure, called(f"curve-{split}-{name}", family), title, f"{title} by step. {ends}.")


def _effects(report: Report) -> Drawing | None:
    """Improvements of all claims with their intervals, and the paper's own."""
    shown = [verdict for verdict in report.verdicts if verdict.summary.n]
    if not shown:
        return None
    figure, axes = new_figure(
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
        title = f"{verdict.word}: {claim.arm} against {claim.against}"
        axis.set_title(title if len(title) < 75 else f"{title[:72]}...", fontsize=8, loc="left")
        axis.set_xlabel((claim.metric or report.results.metric).label, fontsize=7)
    alt = "; ".join(f"{v.evidence.claim.statement}: {v.summary.mean:.4g}" for v in shown)
    return finish(figure, "effects", "improvements", f"Improvement of every claim, positive in its direction. {alt}.")


def _speed(results: Results, family: str, arms: Sequence[Arm]) -> Drawing | None:
    """Steps that an arm needs to a value, over the values that all arms pass."""
    metric = dataclasses.replace(results.metric, kind="value", target=None)
    curves = {}
    for arm in arms:
        runs = [_finite(record, metric) for record in results.with_rows(arm.name)]
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
    figure, axes = new_figure(titled(f"steps to a {metric.split} {metric.name}, mean over seeds", family))
    axis, looks = axes[0, 0], _looks(results, arms)
    for name, points in lines.items():
        axis.plot(*np.array(points).T, label=name, linewidth=1.4, **looks[name])
    axis.set_xlabel(f"{metric.split} {metric.name} reached by all seeds")
    axis.set_ylabel("steps")
    if metric.lower_is_better:
        axis.invert_xaxis()
    add_legend(figure, axis)
    alt = f"Steps that each arm needs until {metric.split} {metric.name} reaches a value."
    return finish(figure, called("speed", family), titled("speed to a value", family), alt)
