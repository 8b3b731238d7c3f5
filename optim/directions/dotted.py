"""Any optax transformation by its dotted name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optim import options
from optim.options import ROLES
from optim.roles import Parameter
from optim.rules import Rule
from strata import ConfigError, Problem

_source = "the optimizer's direction"
_whole = "per_layer = false applies it to the whole tree at once"


def transformation(name: str, arguments: dict[str, Any] | None = None) -> optax.GradientTransformation:
    """Call the function of a dotted name, which gives updates of positive sign before the rate, such as `optax.scale_by_lion`.

    Only what is optax's, or is annotated to give a transformation, is called: a config is data and may be another's.

    Raises:
      ConfigError: it cannot be imported, is not a function, does not say that it gives a transformation, takes a learning rate
        of its own (the recipe has one), refuses the arguments, or gives something else than a transformation.
    """
    function = _function(name)
    if not _makes_transformations(function):
        message = "is neither optax's nor annotated to give an optax.GradientTransformation, so it is not called"
        raise ConfigError([Problem("optimizer.direction.transformation", message, name)], source=_source)
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        parameters = {}
    if "learning_rate" in parameters:
        message = "has a learning rate of its own, and a sign; name its scale_by_* form, which the recipe gives a rate"
        raise ConfigError([Problem("optimizer.direction.transformation", message, name)], source=_source)
    try:
        found = function(**(arguments or {}))
    except Exception as error:
        message = f"{name} refuses them: {type(error).__name__}: {error}"
        raise ConfigError([Problem("optimizer.direction.arguments", message, arguments)], source=_source) from error
    if not isinstance(found, optax.GradientTransformation):
        message = f"gives a {type(found).__name__}, not an optax.GradientTransformation"
        raise ConfigError([Problem("optimizer.direction.transformation", message, name)], source=_source)
    return found


def _makes_transformations(function: Callable[..., Any]) -> bool:
    given = getattr(function, "__annotations__", {}).get("return", "")
    own = (getattr(function, "__module__", None) or "").partition(".")[0] == "optax"
    return own or "GradientTransformation" in (given if isinstance(given, str) else getattr(given, "__name__", ""))


def _function(name: str) -> Callable[..., Any]:
    module, _, attribute = name.rpartition(".")
    try:
        owner = importlib.import_module(module)
    except Exception as error:
        message = f"importing {module} raised {type(error).__name__}: {error}"
        raise ConfigError([Problem("optimizer.direction.transformation", message, name)], source=_source) from error
    found = getattr(owner, attribute, None)
    if not callable(found):
        message = f"{module} has no function {attribute}"
        raise ConfigError([Problem("optimizer.direction.transformation", message, name)], source=_source)
    return found


def by_layer(inner: optax.GradientTransformation, parameters: Mapping[str, Parameter]) -> optax.GradientTransformationExtraArgs:
    """A transformation applied to each layer of each parameter by itself, the layers of a stack under one `jax.vmap`.

    A stack of L matrices is treated as L separate ones, whatever the transformation sums over. The state is by path that of
    the parameter alone, with the layers on the first axis of every array of a stacked one, counts included.

    Args:
      inner: of arrays.
      parameters: by path.
    """
    inner = optax.with_extra_args_support(inner)

    def each(function: Callable[..., Any], path: str) -> Callable[..., Any]:
        return jax.vmap(function) if parameters[path].stacked else function

    def init(params: Mapping[str, Any]) -> dict[str, Any]:
        return {path: each(inner.init, path)(leaf) for path, leaf in params.items()}

    def update(
        updates: Mapping[str, Any], state: Mapping[str, Any], params: Mapping[str, Any] | None = None, **extra: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        moved, after = {}, {}
        for path, leaf in updates.items():
            own = each(lambda g, s, p: inner.update(g, s, p, **extra), path)
            moved[path], after[path] = own(leaf, state[path], None if params is None else params[path])
        return moved, after

    return optax.GradientTransformationExtraArgs(init, update)


def looks_across(found: optax.GradientTransformation) -> bool:
    """Whether the update of one parameter depends on another, by trying: two updates of two small matrices."""
    normal = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)

    @jax.jit
    def updates_of_one(other: jax.Array) -> jax.Array:
        params = {"one": jnp.asarray(normal[0]), "other": other}
        state, moved = found.init(params), []
        for _ in range(2):
            updates, state = found.update(params, state, params)
            moved.append(updates["one"])
        return jnp.stack(moved)

    # A limit may let a moderate gradient pass; what is no number shows in any norm or count.
    tried = (normal[1], -1e4 * normal[1], np.full_like(normal[1], np.nan))
    with jax.ensure_compile_time_eval():  # an optimizer may be built while something is traced
        plain, *others = [np.asarray(updates_of_one(other)) for other in tried]
    return not all(np.array_equal(plain, other, equal_nan=True) for other in others)


def rules(chosen: options.Optax, *, roles: tuple[str, ...] = ROLES, name: str = "all") -> tuple[Rule, ...]:
    """One rule for every parameter of `roles`.

    Raises:
      ConfigError: as `transformation`; from the rule's direction, it does not run on the parameters' shapes, or not on one
        layer at a time although `per_layer` asks for it.
    """
    found = transformation(chosen.transformation, chosen.arguments)

    def refused(message: str) -> ConfigError:
        problem = Problem("optimizer.direction.transformation", message.splitlines()[0], chosen.transformation)
        return ConfigError([problem], source=_source)

    def direction(parameters: Mapping[str, Parameter]) -> optax.GradientTransformation:
        example = {path: jax.ShapeDtypeStruct(p.shape, jnp.dtype(p.dtype)) for path, p in parameters.items()}

        def traced(tried: optax.GradientTransformation) -> tuple[Any, Exception | None]:
            try:
                return jax.eval_shape(lambda g: tried.update(g, tried.init(g), g)[1], example), None
            except Exception as error:
                return None, error

        _, error = traced(found)
        if error is not None:
            message = f"does not run on the parameters of group {name!r}: {type(error).__name__}: {error}"
            raise refused(message) from error
        if not chosen.per_layer:
            return found
        layered = by_layer(found, parameters)
        state, error = traced(layered)
        if error is not None:
            message = f"does not run on one layer at a time: {type(error).__name__}: {error}".splitlines()[0]
            raise refused(f"{message}; {_whole}") from error
        if looks_across(found):
            raise refused(f"its update of one parameter depends on the others, which a layer alone has not; {_whole}")
        drawn = (
            jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) or leaf.dtype == jnp.uint32
            for leaf in jax.tree.leaves(state)
        )
        if any(drawn):
            raise refused(f"it draws random numbers, and every layer would draw the same ones; {_whole}")
        return layered

    return (
        Rule(
            name=name,
            roles=roles,
            direction=direction,
            learning_rate=chosen.learning_rate,
            weight_decay=chosen.weight_decay,
            decay_roles=chosen.decay_roles,
            schedule=chosen.schedule,
        ),
    )
