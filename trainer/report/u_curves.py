"""U-curves: the metric over one number, such as a learning rate, that a tuning tried or that arms differ in."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainer.report.drawing import MARKERS, Drawing, add_legend, called, family_of, finish, look, new_figure, titled
from trainer.report.records import Record
from trainer.report.results import Results
from trainer.sweep import outcome as outcomes
from trainer.sweep.experiment import Metric


def u_curves(results: Results) -> list[Drawing]:
    """The metric over one number that arms, or the points of a tuning, differ in; tunings by family of arms."""
    metric = dataclasses.replace(results.metric, kind="value", target=None)
    families: dict[tuple[str, str], dict[str, list[tuple[float, float | None, str]]]] = {}
    for choice in results.choices:
        arm = next((arm for arm in results.arms if arm.name == choice.arm), None)
        if arm is None or arm.tune is None or len(arm.tune.space.paths) != 1:
            continue
        path = arm.tune.space.paths[0]
        for record in _ended(results.of(arm.name, "tune")):
            x = _at(record.config, path)
            mark = "chosen" if record.point == choice.chosen else ""
            point = (x, _final(results, record, metric), mark)
            families.setdefault((path, family_of(arm.name)), {}).setdefault(f"{arm.name} (tuning)", []).append(point)
    for path in dict.fromkeys(path for arm in results.arms for path in arm.changes):
        groups: dict[str, list[tuple[float, float | None, str]]] = {}
        for arm in results.arms:
            if path in arm.changes:
                rest = ", ".join(f"{p.rsplit('.', 1)[-1]}={_words(v)}" for p, v in arm.changes.items() if p != path) or "all"
                for record in _ended(results.of(arm.name)):
                    groups.setdefault(rest, []).append((_at(record.config, path), _final(results, record, metric), ""))
        for name, points in groups.items():
            if len({x for x, _, _ in points if x is not None}) > 2:
                families.setdefault((path, ""), {})[name] = points
    families = {key: lines for key, lines in families.items() if _drawable(lines)}
    last = [path.rsplit(".", 1)[-1] for path in dict.fromkeys(path for path, _ in families)]
    found = []
    for (path, family), lines in families.items():
        short = path.rsplit(".", 1)[-1]
        name = short if last.count(short) == 1 else path.replace(".", "-")
        found.append(_u_curve(called(f"u-curve-{name}", family), path, family, lines, metric))
    return found


def _words(value: Any) -> str:
    """A value of a config; a component by its name, with what else is given of it."""
    if isinstance(value, dict) and "name" in value:
        rest = ", ".join(f"{key}={_words(item)}" for key, item in value.items() if key != "name")
        return f"{value['name']} ({rest})" if rest else str(value["name"])
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_words, value))}]"
    return str(value)


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


def _u_curve(
    name: str, path: str, family: str, lines: dict[str, list[tuple[float, float | None, str]]], metric: Metric
) -> Drawing:
    figure, axes = new_figure(titled(f"{metric.split} {metric.name} over {path.rsplit('.', 1)[-1]}", family))
    axis, xs, ringed = axes[0, 0], [], False
    words = []
    for index, (line, points) in enumerate(lines.items()):
        points = [(x, y, mark) for x, y, mark in points if x is not None]
        xs += [x for x, _, _ in points]
        known = [(x, y) for x, y, _ in points if y is not None]
        means = [(x, float(np.mean([y for other, y in known if other == x]))) for x in sorted({x for x, _ in known})]
        style = look(index)
        if known:
            axis.plot(*zip(*known, strict=True), MARKERS[index % len(MARKERS)], color=style["color"], markersize=4, alpha=0.6)
        if means:
            axis.plot(*zip(*means, strict=True), label=line, linewidth=1.4, **style)
            words.append(f"{line}: " + ", ".join(f"{y:.4g} at {x:g}" for x, y in means))
        for x in sorted({x for x, y, _ in points if y is None}):
            axis.plot([x], [0.97], "x", color=style["color"], transform=axis.get_xaxis_transform(), markersize=7)
        for x in sorted({x for x, y, mark in points if mark and y is not None}):
            ring = dict(color=style["color"], fillstyle="none", linestyle="", markersize=10)
            axis.plot([x], [dict(means)[x]], "o", label=None if ringed else "chosen by tuning", **ring)
            ringed = True
    if xs and min(xs) > 0 and max(xs) / min(xs) >= 4:  # as of three values by factors of two
        axis.set_xscale("log")
        if len(tried := sorted(set(xs))) <= 12:  # the values themselves, whose powers of ten would run into each other
            axis.set_xticks(tried, [f"{x:g}" for x in tried], rotation=45)
            axis.minorticks_off()
    axis.set_xlabel(path)
    axis.set_ylabel(f"{metric.split} {metric.name}")
    add_legend(figure, axis)
    alt = f"{metric.label} over {path}; a cross on top is a run without a number. {'; '.join(words)}."
    return finish(figure, name, titled(f"{metric.name} over {path}", family), alt)
