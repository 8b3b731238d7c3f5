"""Looking into traced programs."""

from collections.abc import Iterator
from typing import Any


def equations(program: Any) -> Iterator[Any]:
    """Every equation of a program, as `jax.make_jaxpr` gives it, and of those inside it: loops, branches, calls."""
    for equation in getattr(program, "jaxpr", program).eqns:
        yield equation
        for value in equation.params.values():
            for each in value if isinstance(value, tuple | list) else (value,):
                if hasattr(getattr(each, "jaxpr", each), "eqns"):
                    yield from equations(each)
