"""Which back-end serves which op: (op, back-end) -> a function and the reason why it cannot serve a given call.

`auto` is fail-closed: a back-end is taken only when it says that it can serve the call, and `explain` tells what the others
said, those that are never taken unasked included, and which chunk size is taken. A back-end asked for by name either serves
or raises with its reason; nothing is swapped silently.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from kernels.mosaic_gpu import limits as mosaic_gpu
from kernels.tpu import limits as tpu
from kernels.tuning import LEGAL, Tuned, tuned
from strata.errors import ConfigError

if TYPE_CHECKING:
    from kernels.arguments import Call, Tensors

OPS = (
    "linear_attention",
    "retention",
    "lightning_attention",
    "simple_gla",
    "gla",
    "delta_rule",
    "gated_delta_rule",
    "kda",
    "lightnet",
)
BACKENDS = ("reference", "xla", "tpu", "mosaic_gpu")
PALLAS = ("tpu", "mosaic_gpu")
AUTOMATIC = ("tpu", "xla")
"""Order in which `auto` asks."""
UNASKED = {
    "mosaic_gpu": "by name only: its kernels have run in the interpreter alone, not on a GPU",
    "reference": "by name only: exact and slow",
}
"""Back-ends that `auto` does not take although they could serve, and why."""


class Implementation(NamedTuple):
    """`entry` is "module:callable" taking (call, tensors); `refusal` gives the reason why a call cannot be served, or None."""

    entry: str
    refusal: Callable[[Call], str | None]


class Choice(NamedTuple):
    """The back-end of a call, what the others said, how it was tuned (None where there is nothing to tune), and the dtype that
    its kernels are given (None where it is that of the call).
    """

    backend: str
    refusals: dict[str, str]
    tuned: Tuned | None = None
    converted: str | None = None

    def __str__(self) -> str:
        how = [str(self.tuned)] * (self.tuned is not None) + [f"computed in {self.converted}"] * (self.converted is not None)
        lines = [", ".join([f"back-end: {self.backend}", *how])]
        return "\n".join(lines + [f"  not {name}: {reason}" for name, reason in self.refusals.items()])


_implementations: dict[tuple[str, str], Implementation] = {}


def register(backend: str, entry: str, refusal: Callable[[Call], str | None], ops: tuple[str, ...] = OPS) -> None:
    """Let `backend` serve `ops`. Registering a pair again replaces it."""
    for op in ops:
        _implementations[op, backend] = Implementation(entry, refusal)


def converted(call: Call, backend: str) -> Call:
    """The call that a back-end is given: Pallas kernels compute float16 in float32, as states and sums leave its range."""
    return dataclasses.replace(call, dtype="float32") if backend in PALLAS and call.dtype == "float16" else call


def refusal(call: Call, backend: str) -> str | None:
    """Why `backend` cannot serve `call`; None when it can."""
    if backend not in BACKENDS:
        return f"there is no back-end of this name; expected one of auto, {', '.join(BACKENDS)}"
    if call.varies and backend in PALLAS:
        return "JAX refuses Pallas kernels within a jax.shard_map that checks how arrays vary: give it check_vma=False"
    found = _implementations.get((call.op, backend))
    return f"{call.op} is not built for it in this version" if found is None else found.refusal(converted(call, backend))


def _not_split(call: Call, backend: str) -> str | None:
    """A Pallas kernel is fine on many devices within `jax.shard_map`; elsewhere it would not compile on a mesh."""
    if call.devices > 1 and backend in PALLAS:
        return (
            f"there are {call.devices} devices and Pallas kernels are not split by themselves: call it within "
            "jax.shard_map(..., check_vma=False) over all axes"
        )
    return None


def _chosen(call: Call, backend: str, refusals: dict[str, str]) -> Choice:
    given = converted(call, backend)
    how = tuned(given, backend) if backend in LEGAL else None
    return Choice(backend, refusals, how, None if given is call else given.dtype)


def choose(call: Call, backend: str = "auto") -> Choice:
    """The back-end that serves `call`.

    Raises:
      ConfigError: the back-end asked for by name cannot serve; or, for `auto`, none can; or a tuning table is malformed.
    """
    if backend != "auto":
        reason = refusal(call, backend)
        if reason is not None:
            raise ConfigError(f'kernels.{call.op}: backend="{backend}" cannot serve this call: {reason}')
        return _chosen(call, backend, {})
    unasked = {name: refusal(call, name) or reason for name, reason in UNASKED.items()}
    refusals: dict[str, str] = {}
    for name in AUTOMATIC:
        reason = refusal(call, name) or _not_split(call, name) or (tpu.untried(call) if name == "tpu" else None)
        if reason is None:
            return _chosen(call, name, refusals | unasked)
        refusals[name] = reason
    said = "".join(f"\n  {name}: {reason}" for name, reason in (refusals | unasked).items())
    raise ConfigError(f"kernels.{call.op}: no back-end can serve this call:{said}")


def run(call: Call, backend: str, tensors: Tensors) -> tuple[Any, Any]:
    """o [B,T,HV,V] in the dtype of v, and the final state, by a back-end that `choose` gave."""
    module, _, name = _implementations[call.op, backend].entry.partition(":")
    serve = getattr(importlib.import_module(module), name)
    given = converted(call, backend)
    if given is call:
        return serve(call, tensors)
    q, k, v = (x.astype(given.dtype) for x in (tensors.q, tensors.k, tensors.v))
    o, final_state = serve(given, tensors._replace(q=q, k=k, v=v))
    return o.astype(call.dtype), final_state


def _no_pallas_to_interpret(call: Call) -> str | None:
    return None if call.interpret is None else "interpret= is about Pallas kernels, and this back-end has none"


register("reference", "kernels.reference.recurrence:run", _no_pallas_to_interpret)
register("xla", "kernels.xla.chunked:run", _no_pallas_to_interpret)
register("tpu", "kernels.tpu.chunked:run", tpu.refusal)
register("mosaic_gpu", "kernels.mosaic_gpu.chunked:run", mosaic_gpu.refusal)
