"""Pallas kernels have first derivatives, by hand; what is asked for a second one says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from strata.errors import ConfigError


def first_only(rule: Callable[..., Any]) -> Callable[..., Any]:
    """A forward or backward rule of a `jax.custom_vjp` whose first argument is static, for which JAX has no derivative.

    What the rule hands through stays the array that it is, so that a residual which is an argument is not kept twice.

    Raises, when it is differentiated itself:
      ConfigError: with the way out.
    """

    def once(form: Any, *arguments: Any) -> Any:
        given, tree = jax.tree.flatten(arguments)
        whole: list[Any] = []  # the rule's result, with the number of an argument where it hands one through

        def made(*given: Any) -> list[Any]:
            places = {id(x): place for place, x in enumerate(given)}
            result, form_of = jax.tree.flatten(rule(form, *tree.unflatten(given)))
            whole[:] = [form_of, [places.get(id(x)) for x in result]]
            return [x for x in result if id(x) not in places]

        kernels = jax.custom_jvp(made)
        kernels.defjvp(_refuse)
        new = iter(kernels(*given))
        form_of, passed = whole
        return form_of.unflatten([next(new) if place is None else given[place] for place in passed])

    return once


def _refuse(primals: Any, tangents: Any) -> Any:
    raise ConfigError(
        "a second derivative through a Pallas kernel of linear attention, which has the first alone: "
        'give the op backend="xla", or "reference" for forward mode'
    )
