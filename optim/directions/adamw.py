"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

import optax

from optim import options
from optim.options import ROLES
from optim.rules import Rule, check_numbers


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """`optax.adamw` with the defaults of language models (Loshchilov and Hutter 2017, arXiv:1711.05101).

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    w <- w - rate (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + epsilon) + weight_decay w)
    """
    check_numbers(options.AdamW, learning_rate=learning_rate, b1=b1, b2=b2, epsilon=epsilon, weight_decay=weight_decay)
    return optax.adamw(learning_rate, b1, b2, epsilon, weight_decay=weight_decay)


def rules(chosen: options.AdamW, *, roles: tuple[str, ...] = ROLES, name: str = "all") -> tuple[Rule, ...]:
    """One rule for every parameter of `roles`."""
    return (
        Rule(
            name=name,
            roles=roles,
            direction=lambda parameters: optax.scale_by_adam(chosen.b1, chosen.b2, chosen.epsilon),
            learning_rate=chosen.learning_rate,
            weight_decay=chosen.weight_decay,
            decay_roles=chosen.decay_roles,
            schedule=chosen.schedule,
        ),
    )
