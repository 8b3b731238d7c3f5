"""Two reports beside each other: the same experiment on other code, another machine, another scale."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from strata import ConfigError
from trainer.report import statistics
from trainer.report.analysis import Report, analyse, to_json
from trainer.report.reading import read_results
from trainer.report.tables import Table, interval, number
from trainer.sweep.plan import flat


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What differs, as tables."""

    other: str
    notes: list[str]
    tables: list[Table]


def read_other(target: str, *, scale: str | None, runs: str) -> dict[str, Any]:
    """A `report.json`, or whatever a report can be made of, as its JSON."""
    path = Path(target)
    if path.is_file() and path.suffix == ".json":
        try:
            found = json.loads(path.read_text())
            found["arms"], found["claims"], found["metrics"], found["runs"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--compare {target}: not a report.json ({type(error).__name__}: {error})") from None
        return found
    if path.is_dir() and (path / "report.json").is_file():
        return read_other(str(path / "report.json"), scale=scale, runs=runs)
    return json.loads(json.dumps(to_json(analyse(read_results(target, scale=scale, runs=runs)))))


def compare(report: Report, other: Mapping[str, Any], name: str) -> Comparison:
    """Arms of one name by the metrics that both reports have; claims of one statement by their verdicts.

    Where the two share seeds, differences are paired by seed, since one seed means one initialisation and one order of data;
    otherwise Welch's interval of two independent samples is given.
    """
    here = json.loads(json.dumps(to_json(report)))
    notes = [] if other["finished"] else [f"{name} is of a sweep that is not finished"]
    if other["scale"] != here["scale"]:
        notes.append(f"the scales differ: {here['scale']} here, {other['scale']} there")
    for what, key in (("code", "versions"), ("machines", "machines")):
        one, two = _union(here["arms"], key), _union(other["arms"], key)
        if one != two:
            notes.append(f"{what} here: {', '.join(sorted(one)) or 'none'}; there: {', '.join(sorted(two)) or 'none'}")
    there = {arm["name"]: arm for arm in other["arms"]}
    missing = [arm["name"] for arm in here["arms"] if arm["name"] not in there]
    extra = [arm for arm in there if arm not in {a["name"] for a in here["arms"]}]
    notes += [f"only here: {', '.join(missing)}"] if missing else []
    notes += [f"only there: {', '.join(extra)}"] if extra else []
    for arm in here["arms"]:
        if changed := _changed(here, other, arm["name"]):
            notes.append(f"{arm['name']} has other settings there: {', '.join(changed)}")
    found = Comparison(name, notes, [_arms(here, other, there), _claims(here, other)])
    return found


def _arms(here: Mapping[str, Any], other: Mapping[str, Any], there: Mapping[str, Any]) -> Table:
    labels = [metric["label"] for metric in other["metrics"]]
    rows = []
    for arm in here["arms"]:
        if arm["name"] not in there:
            continue
        for index, metric in enumerate(here["metrics"]):
            if metric["label"] not in labels:
                continue
            one = arm["values"][index]
            two = there[arm["name"]]["values"][labels.index(metric["label"])]
            rows.append([arm["name"], metric["label"], *_difference(one, two)])
    header = ["arm", "metric", "here", "there", "here - there [95 %]", "by"]
    return Table(
        header, rows, "Differences in the metric's own direction; an interval without zero was not adjusted for many rows."
    )


def _difference(one: Mapping[str, float], two: Mapping[str, float]) -> list[str]:
    shared = sorted(one.keys() & two.keys(), key=int)
    a, b = statistics.summarise(list(one.values())), statistics.summarise(list(two.values()))
    cells = [f"{number(a.mean)} (n = {a.n})", f"{number(b.mean)} (n = {b.n})"]
    if len(shared) > 1:
        paired = statistics.summarise([one[seed] - two[seed] for seed in shared])
        equal = " (equal bit for bit)" if all(one[seed] == two[seed] for seed in shared) else ""
        return [*cells, f"{number(paired.mean, 4)} {interval(paired.low, paired.high)}{equal}", f"{len(shared)} pairs by seed"]
    difference, low, high, _ = statistics.welch(list(one.values()), list(two.values()))
    by = "Welch" if not math.isnan(low) else "one run, no interval" if a.n and b.n else "no run"
    return [*cells, f"{number(difference, 4)} {interval(low, high)}".strip(" –"), by]


def _claims(here: Mapping[str, Any], other: Mapping[str, Any]) -> Table:
    there = {(claim["statement"], claim["metric"]): claim for claim in other["claims"]}
    rows = []
    for claim in here["claims"]:
        match = there.get((claim["statement"], claim["metric"]))
        if match is None:
            continue
        rules = "" if match["rule"] == claim["rule"] else f"the rule differs: {match['rule']}"
        rows.append([claim["statement"], *(_verdict(c) for c in (claim, match)), rules])
    return Table(["claim", "here", "there", ""], rows)


def _verdict(claim: Mapping[str, Any]) -> str:
    low, high = (math.nan if x is None else x for x in claim["interval95"])
    return f"{claim['verdict']}: {number(claim['mean'], 4)} {interval(low, high)}, {claim['pairs']} pairs"


def _union(arms: list[Mapping[str, Any]], key: str) -> set[str]:
    return {name for arm in arms for name in arm[key]}


def _changed(here: Mapping[str, Any], other: Mapping[str, Any], arm: str) -> list[str]:
    """Config keys of an arm that differ, without the seed and what changes no number."""
    one = next((run["config"] for run in here["runs"] if run["arm"] == arm and run["stage"] == "compare"), None)
    two = next((run["config"] for run in other["runs"] if run["arm"] == arm and run["stage"] == "compare"), None)
    if one is None or two is None:
        return []
    a, b = flat(one), flat(two)
    skipped = ("seed", "log.", "checkpoint.")
    keys = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key) and not key.startswith(skipped)]
    return [f"{key}: {json.dumps(a.get(key))} here, {json.dumps(b.get(key))} there" for key in keys[:12]]
