"""The options of a whole optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from optim.options.roles import Problems
from strata import components, option, options, part


@options
class Optimizer:
    """A recipe: direction x layerwise rate x layer sampling x schedule x clipping."""

    direction: object = part("optimizer.direction", "adamw", "from gradients to updates, with its rate and weight decay")
    layerwise: object = part(
        "optimizer.layerwise", None, "multipliers of rate or decay by layer; None: the same for all", added="0.2"
    )
    sampling: object = part("optimizer.sampling", None, "layers that an update touches; None: all of them", added="0.2")
    schedule: object = part("optimizer.schedule", "cosine", "multiplier of every rate over the run")
    clip_norm: float | None = option(1.0, "largest global norm of the gradient; None: no clipping", above=0)

    def parts(self) -> Iterator[tuple[str, Any]]:
        """Every chosen part of the recipe by the field that holds it, the common schedule first."""
        for name in ("schedule", "layerwise", "sampling", "direction"):
            yield from components(getattr(self, name), name)

    def schedules(self) -> Iterator[tuple[str, Any]]:
        """Every schedule of the recipe by the field that holds it, the common one first."""
        yield from ((path, chosen) for path, chosen in self.parts() if type(chosen).kind == "optimizer.schedule")

    def problems(self) -> Iterator[Problems]:
        """Parts that do not fit each other."""
        yield self._draw_problems()
        yield self._sampling_problems()
        yield self._decay_problems()

    def _draw_problems(self) -> Problems:
        """What draws layers says which can be drawn, and with what probability."""
        missing = [name for name in ("buckets", "probabilities") if not hasattr(self.sampling, name)]
        if missing and self.sampling is not None:
            kind = type(self.sampling)
            message = (
                f"{kind.__module__}.{kind.__qualname__} lacks {' and '.join(missing)}, which every layer sampling has; see "
                "optim.options.Sampling"
            )
            yield "sampling.name", message

    def _sampling_problems(self) -> Problems:
        """Under layer sampling no layer sees another."""
        for path, chosen in self.parts() if self.sampling is not None else ():
            if getattr(chosen, "per_layer", True) is False:
                message = (
                    f"under {self.sampling.name} an update would depend on which layers were drawn beside it; leave it true"
                )
                yield f"{path}.per_layer", message

    def _decay_problems(self) -> Problems:
        """What multiplies the decay needs one."""
        decay, roles = getattr(self.direction, "weight_decay", None), getattr(self.direction, "decay_roles", ("matrix",))
        if getattr(self.layerwise, "of_decay", False) and decay is not None and (not decay or "matrix" not in roles):
            name, wanted = ("decay_roles", "name 'matrix' there") if decay else ("weight_decay", "set it above 0")
            message = f"{self.layerwise.name} multiplies the weight decay of matrices, and no matrix decays: {wanted}"
            yield f"direction.{name}", message

    @property
    def depends_on_steps(self) -> bool:
        """Whether any part looks at the length of the run, so that a longer run is another one."""
        return any(getattr(chosen, "depends_on_steps", False) for _, chosen in self.parts())

    @property
    def needs_second_gradient(self) -> bool:
        """Whether `update` wants `gradient_difference`: the layerwise rate says so by an attribute of this name."""
        return bool(getattr(self.layerwise, "needs_second_gradient", False))

    def problems_over(self, steps: int) -> Iterator[Problems]:
        """What cannot work in a run of `steps` updates, a check for each part."""
        yield from (self._part_over(path, chosen, steps) for path, chosen in self.parts())

    def _part_over(self, path: str, chosen: Any, steps: int) -> Problems:
        """Of its lowest layers only as many updates are expected under layer sampling."""
        if not hasattr(chosen, "problems_over"):
            return
        why = ""
        if type(chosen).kind == "optimizer.newton_schulz" and (activity := getattr(self.sampling, "least_activity", 1.0)) < 1:
            why = f"; {self.sampling.name} updates the lowest layers in {activity:.0%} of {steps} steps"
            steps = math.floor(activity * steps + 1e-9)
        yield from ((f"{path}.{name}", message + why) for name, message in chosen.problems_over(steps))

    def milestones(self, steps: int) -> dict[int, str]:
        """Updates after which the state is worth keeping under a name, by every schedule of the recipe.

        The common schedule names first. A name that stands for another step already gets the place of its schedule behind it,
        such as `stable-direction.rest.schedule`; a step keeps its first name.
        """
        found: dict[int, str] = {}
        for path, schedule in self.schedules():
            for step, name in schedule.milestones(steps).items():
                found.setdefault(step, f"{name}-{path}" if name in found.values() else name)
        return found
