"""Pallas kernels have first derivatives, by hand; what is asked for a second one says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from strata.errors import ConfigError


def first_only(rule: Callable[..., Any]) -> Callable[..., Any]:
    """A forward or backward rule of a `jax.custom_vjp` whose first argument is static, for which JAX has no derivative.

    Raises, when it is differentiated itself:
      ConfigError: with the way out.
    """
    once = jax.custom_jvp(rule, nondiff_argnums=(0,))

    @once.defjvp
    def refuse(form: Any, primals: Any, tangents: Any) -> Any:
        raise ConfigError(
            "a second derivative through a Pallas kernel of linear attention, which has the first alone: "
            'give the op backend="xla", or "reference" for forward mode'
        )

    return once
