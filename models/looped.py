"""A trained sequential model's parameters as those of a looped one (Bae et al. 2024, arXiv:2410.20672)."""

from __future__ import annotations

import dataclasses

import numpy as np

from models import options
from models.conversion import Flat, Path, by_layer, places
from strata import ConfigError


def sources(initial: str, layers: int, unique: int, seed: int = 0) -> list[list[int]]:
    """The donor's layers that each unique layer is made from: one that is copied, or one a loop that are averaged.

    Args:
      initial: `stepwise` takes layers at equal steps, first and last included; `lower` the first ones; `upper` the last ones;
        `random` a sorted draw; `average` the mean of those that the unique layer will stand for.
      layers: of the donor, and executed ones of the looped model.
      unique: layers of the looped model.
      seed: of `random`.
    """
    if initial == "average":
        return [list(range(k, layers, unique)) for k in range(unique)]
    chosen = {
        # Half rounds to even, as in the authors' code: 8.5 is layer 8.
        "stepwise": np.round(np.linspace(0, layers - 1, unique)).astype(int),
        "lower": np.arange(unique),
        "upper": np.arange(layers - unique, layers),
        "random": np.sort(np.random.default_rng(seed).choice(layers, unique, replace=False)),
    }[initial]
    return [[int(layer)] for layer in chosen]


def looped(
    option: options.Looped, donor: options.Model, params: Flat, target: options.Model, fresh: Flat, *, seed: int = 0
) -> tuple[Flat, dict[str, float]]:
    """Parameters of a looped model from those of a sequential one; see `models.conversion.convert`.

    Shared matrices W' are copied or averaged, and with `adapters="svd"` each executed layer's low-rank matrix is the best one
    of its rank for W - W', scaled so that the adapter's own factor does not matter. Parameters that executed layers own, such
    as unshared norm gains and gates, are the donor's.

    Returns:
      The looped model's parameters by path, and for each projection the part of the donor's matrices that is lost,
      |W - W' - adapter| / |W| in Frobenius norm over all executed layers.

    Raises:
      ConfigError: the two models cannot be matched, with every reason.
    """
    unique, loops = target.unique_layers, target.depth.loops
    _check(donor, target, option.adapters)
    wanted = sources(option.initial, donor.layers, unique, seed)
    _check_sources(donor, wanted, option.initial)
    old = by_layer(donor, params)
    out = {path: np.array(value) for path, value in fresh.items()}
    out |= {path: value for path, value in params.items() if path[0] != "blocks"}
    lost = _Lost()
    for k, (kind, index, count) in enumerate(places(target)):
        prefix = ("blocks", kind)
        slots = [loop * count + index for loop in range(loops)]  # of the executed layers that this one stands for
        for path in old[k]:
            wholes = [old[loop * unique + k][path] for loop in range(loops)]
            adapter = next((path[:i] for i in range(1, len(path)) if prefix + path[:i] + ("adapter", "down") in out), None)
            home = prefix + (path if adapter is None else adapter + ("main",) + path[len(adapter) :])
            if out[home].shape[0] != count:  # every executed layer has its own
                for slot, whole in zip(slots, wholes, strict=True):
                    out[home][slot] = whole
                continue
            out[home][index] = np.mean([old[source][path] for source in wanted[k]], axis=0, dtype=np.float64)
            for slot, whole in zip(slots, wholes, strict=True):
                rest = whole.astype(np.float64) - out[home][index]
                if adapter is not None and path[-1] == "kernel":
                    rest = rest - _adapt(out, prefix + adapter + ("adapter",), slot, rest, option.adapters, target)
                if whole.ndim >= 2:
                    lost.add(".".join(map(str, path)), rest, whole)
    return out, lost.shares()


class _Lost:
    """Squared Frobenius norms of what is lost and of the whole, by parameter."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, name: str, rest: np.ndarray, whole: np.ndarray) -> None:
        sums = self._sums.setdefault(name, [0.0, 0.0])
        sums[0] += float(np.sum(rest**2))
        sums[1] += float(np.sum(whole.astype(np.float64) ** 2))

    def shares(self) -> dict[str, float]:
        return {name: (rest / whole) ** 0.5 if whole else 0.0 for name, (rest, whole) in self._sums.items()}


def _adapt(out: Flat, prefix: Path, slot: int, residual: np.ndarray, adapters: str, target: options.Model) -> np.ndarray:
    """Set one adapter; returns the matrix that it adds. `residual` is [in, out] in float64."""
    down, up = prefix + ("down",), prefix + ("up",)
    scale = target.depth.adapter_scale
    if adapters == "svd":
        left, sizes, right = np.linalg.svd(residual, full_matrices=False)
        rank = out[down].shape[-1]
        out[down][slot] = left[:, :rank]
        out[up][slot] = sizes[:rank, None] * right[:rank] / scale
    return scale * out[down][slot].astype(np.float64) @ out[up][slot].astype(np.float64)


def _check(donor: options.Model, target: options.Model, adapters: str) -> None:
    problems = []
    if donor.depth.loops != 1:
        problems.append(f"the donor is looped already ({donor.depth.loops} loops); only a sequential one can be converted")
    elif donor.depth.adapter_rank:
        problems.append(
            f"the donor has low-rank matrices of its own (model.depth.rank = {donor.depth.adapter_rank}), and the looped model "
            "has no second ones to keep them in"
        )
    if donor.layers != target.layers:
        problems.append(f"the donor has {donor.layers} layers and the looped model executes {target.layers}")
    for field in dataclasses.fields(donor):
        ours, theirs = getattr(target, field.name), getattr(donor, field.name)
        if field.name not in ("depth", "layers") and ours != theirs:
            problems.append(f"model.{field.name} is {theirs!r} in the donor and {ours!r} in the looped model")
    if not problems:
        plan, unique = donor.plan(), target.unique_layers
        for layer, kind in enumerate(plan):
            if _bare(kind) != _bare(target.plan()[layer % unique]):
                problems.append(f"layer {layer} of the donor is of another kind than layer {layer % unique}, its stand-in")
    if adapters == "svd" and target.depth.adapter_rank and donor.linear.name != "dense":
        problems.append(f"model.linear is {donor.linear.name}, whose branch no low-rank matrix replaces; take zero adapters")
    if problems:
        raise ConfigError("cannot be converted: " + "; ".join(problems))


def _check_sources(donor: options.Model, wanted: list[list[int]], initial: str) -> None:
    """A block can be copied from a layer of its own kind only; the mean takes in those that it stands for, which are."""
    plan = [_bare(kind) for kind in donor.plan()]
    problems = [
        f"block {k} would start from layer {layer} of the donor, which is of another kind"
        for k, layers in enumerate(wanted)
        for layer in layers
        if plan[layer] != plan[k]
    ]
    if problems:
        fitting = "average or lower" if initial != "lower" else "average"
        raise ConfigError(f"cannot be converted with initial = {initial!r}: {'; '.join(problems)}. Take {fitting}.")


def _bare(model: options.Model) -> options.Model:
    return dataclasses.replace(model, depth=options.SequentialDepth())
