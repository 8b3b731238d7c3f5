"""A direction of which only the layers from a cut on are updated; the state of the others stays as it is, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optim.roles import Parameter
from optim.sampling import Cuts
from strata import ConfigError, Problem

_source = "the optimizer's layer sampling"


class Freezable:
    """Slices the state of a direction by layer.

    Arrays of the state that stand under a parameter's path and carry its layers on their first axis are sliced. Those that
    stand under no path, such as Adam's count, exist once for each bucket of layers: layers of one bucket are always active
    together, so a moment is corrected for the updates that it had.

    Args:
      direction: over a dict of arrays by path.
      declared: its parameters.
      cuts: of the model.
    """

    def __init__(self, direction: optax.GradientTransformationExtraArgs, declared: Mapping[str, Parameter], cuts: Cuts):
        self.direction, self.declared, self.cuts = direction, declared, cuts

    def init(self, params: Mapping[str, Any]) -> Any:
        """The direction's state, with a leading axis of buckets on what belongs to no parameter."""
        count = len(self.cuts.first)
        return self._walk(
            self.direction.init(params), None, shared=lambda leaf: jnp.broadcast_to(leaf[None], (count, *leaf.shape))
        )

    def update(
        self, gradients: Mapping[str, Any], state: Any, params: Mapping[str, Any] | None, cut: int, **extra: Any
    ) -> tuple[dict[str, Any], Any]:
        """Updates of the active rows of each active parameter, and the whole state.

        Args:
          gradients: of the active rows, by path; wholly frozen parameters are absent.
          state: as `init` gives.
          params: as `gradients`, or None.
          cut: the first active layer.
        """
        frozen = {path: self.cuts.frozen(parameter, cut) for path, parameter in self.declared.items()}
        moved: dict[str, list[Any]] = {path: [] for path in gradients}
        for bucket, ranges in self._slabs(state, cut):
            # Rows count from the first layer; those of `gradients` from the first active one.
            rows = {
                path: (max(a, frozen[path]), b) for path, (a, b) in ranges.items() if path in gradients and b > frozen[path]
            }
            if not rows:
                continue

            def own(tree: Mapping[str, Any], rows: Mapping[str, tuple[int, int]] = rows) -> dict[str, Any]:
                return {path: self._rows(tree[path], path, a - frozen[path], b - frozen[path]) for path, (a, b) in rows.items()}

            before = self._walk(state, rows, shared=lambda leaf, bucket=bucket: leaf[bucket])
            updates, after = self.direction.update(own(gradients), before, params and own(params), **extra)
            state = self._merge(state, after, rows, bucket)
            for path, leaf in updates.items():
                moved[path].append(leaf)
        joined = {path: parts[0] if len(parts) == 1 else jnp.concatenate(parts) for path, parts in moved.items()}
        return joined, state

    def check(self, name: str) -> None:
        """That the state of no layer mixes with another's, tried on shapes at the first cut and one in the middle.

        Args:
          name: of the group, for the message.

        Raises:
          ConfigError: an update fails, or changes the shape of the state.
        """
        example = {path: jax.ShapeDtypeStruct(p.shape, jnp.dtype(p.dtype)) for path, p in self.declared.items()}
        first = self.cuts.first
        for cut in sorted({first[min(1, len(first) - 1)], first[len(first) // 2]}):

            def active(whole: Mapping[str, Any], cut: int = cut) -> dict[str, Any]:
                frozen = {path: self.cuts.frozen(parameter, cut) for path, parameter in self.declared.items()}
                return {
                    path: self._rows(whole[path], path, frozen[path], parameter.layers)
                    for path, parameter in self.declared.items()
                    if frozen[path] < parameter.layers
                }

            try:
                before, moving = jax.eval_shape(self.init, example), jax.eval_shape(active, example)
                _, after = jax.eval_shape(lambda g, s, cut=cut: self.update(g, s, g, cut), moving, before)
                kept = jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype), before, after)
                fault = "" if all(jax.tree.leaves(kept)) else "its state changes shape"
            except Exception as error:
                fault = f"{type(error).__name__}: {error}".splitlines()[0]
            if fault:
                message = (
                    f"the direction of group {name!r} cannot leave the layers below {cut} out: {fault}. Arrays of its state "
                    "must stand under their parameter with the layers on the first axis, or belong to no parameter"
                )
                raise ConfigError([Problem("optimizer.sampling.name", message, self.cuts.options.name)], source=_source)

    def _slabs(self, state: Any, cut: int) -> list[tuple[int, dict[str, tuple[int, int]]]]:
        """Buckets with the rows that each updates: one call for all of them where nothing is counted."""
        whole = {path: (0, parameter.layers) for path, parameter in self.declared.items()}
        if not self._counted(state):
            return [(0, whole)]
        ranges = {path: self.cuts.buckets_of(parameter) for path, parameter in self.declared.items()}
        return [
            (bucket, {path: found[bucket] for path, found in ranges.items() if found[bucket][1]})
            for bucket, first in enumerate(self.cuts.first)
            if first >= cut
        ]

    def _counted(self, state: Any) -> bool:
        found: list[Any] = []
        self._walk(state, None, shared=lambda leaf: found.append(leaf) or leaf)
        return bool(found)

    def _rows(self, leaf: Any, path: str, start: int, end: int) -> Any:
        parameter = self.declared[path]
        return leaf if not parameter.stacked or (start, end) == (0, leaf.shape[0]) else leaf[start:end]

    def _walk(self, node: Any, rows: Mapping[str, tuple[int, int]] | None, shared: Any) -> Any:
        """A state with the rows of every leaf under a path (None: all), and `shared` of every leaf under none."""
        if isinstance(node, dict) and node and set(node) <= set(self.declared):
            kept = node if rows is None else {path: leaf for path, leaf in node.items() if path in rows}
            if rows is None:
                return kept
            return {
                path: jax.tree.map(lambda x, path=path: self._rows(x, path, *rows[path]), leaf) for path, leaf in kept.items()
            }
        if isinstance(node, dict):
            return {name: self._walk(child, rows, shared) for name, child in node.items()}
        if isinstance(node, tuple):
            children = [self._walk(child, rows, shared) for child in node]
            return type(node)(*children) if hasattr(node, "_fields") else tuple(children)
        if isinstance(node, list):
            return [self._walk(child, rows, shared) for child in node]
        if node is None:
            return None
        if not hasattr(node, "shape"):
            raise TypeError(
                f"layer sampling cannot freeze a state of {type(node).__name__}; it knows arrays, tuples, lists, dicts"
            )
        return shared(node)

    def _merge(self, whole: Any, part: Any, rows: Mapping[str, tuple[int, int]], bucket: int) -> Any:
        if isinstance(whole, dict) and whole and set(whole) <= set(self.declared):
            return {
                path: jax.tree.map(lambda x, y, path=path: self._put(x, y, path, *rows[path]), leaf, part[path])
                if path in part
                else leaf
                for path, leaf in whole.items()
            }
        if isinstance(whole, dict):
            return {name: self._merge(child, part[name], rows, bucket) for name, child in whole.items()}
        if isinstance(whole, (tuple, list)):
            children = [self._merge(one, other, rows, bucket) for one, other in zip(whole, part, strict=True)]
            return type(whole)(*children) if hasattr(whole, "_fields") else type(whole)(children)
        return None if whole is None else whole.at[bucket].set(part)

    def _put(self, whole: Any, part: Any, path: str, start: int, end: int) -> Any:
        if not self.declared[path].stacked or (start, end) == (0, whole.shape[0]):
            return part
        return jnp.concatenate([whole[:start], part, whole[end:]])
