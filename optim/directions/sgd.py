"""Gradient descent with momentum."""

from __future__ import annotations

import optax

from optim import options
from optim.options import ROLES
from optim.rules import Rule, check_numbers


def sgd(
    learning_rate: optax.ScalarOrSchedule, *, momentum: float = 0.9, nesterov: bool = False, weight_decay: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    """m <- momentum m + g;  w <- w - rate (m + weight_decay w), with nesterov `g + momentum m` in place of m.

    Sources: Polyak 1964; Sutskever et al. 2013 for Nesterov's form. The decay is decoupled, unlike that of torch.optim.SGD.
    """
    check_numbers(options.SGD, learning_rate=learning_rate, momentum=momentum, weight_decay=weight_decay)
    return optax.chain(
        optax.trace(momentum, nesterov) if momentum else optax.identity(),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def rules(chosen: options.SGD, *, roles: tuple[str, ...] = ROLES, name: str = "all") -> tuple[Rule, ...]:
    """One rule for every parameter of `roles`."""
    return (
        Rule(
            name=name,
            roles=roles,
            direction=lambda _: optax.trace(chosen.momentum, chosen.nesterov) if chosen.momentum else optax.identity(),
            learning_rate=chosen.learning_rate,
            weight_decay=chosen.weight_decay,
            decay_roles=chosen.decay_roles,
            schedule=chosen.schedule,
        ),
    )
