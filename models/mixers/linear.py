"""The skeleton of linear-attention mixers: projections, short convolutions, one op of `kernels`, norm and gate, output.

A mixer of the family says which op it runs, what becomes of queries, keys and values before it (`write`), and what of its
result (`read`). Training and prefill run the chunked op, decoding its step; both from the state in the cache.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import kernels
from kernels.ops import GATES
from models import options
from models.layers.linear import projection
from models.mixers import sharded_op
from models.mixers.readout import Readout
from models.mixers.short_convolution import ShortConvolution, same_document

INPUTS = ("query", "key", "value")
AXES = {"query": "kv_heads", "key": "kv_heads", "value": "heads", "gate": "heads"}
"""Values may have more heads than queries and keys, and the output has those of the values."""

Written = tuple[jax.Array, jax.Array, jax.Array, tuple[jax.Array, ...]]
"""q, k [B, T, heads, key size], v [B, T, value heads, value size], and the gates of the op, [B, T, value heads, ...]."""


class LinearMixer(nnx.Module):
    """Base of the mixers.

    Attributes:
      op: name in `kernels`.
      activated: inputs that pass a SiLU, with a convolution before it or without.
      convolution_activated: whether a convolution ends in a SiLU for other inputs too.
      convolution_biased: whether convolutions have a bias.
      empty_key: what a key is where nothing may be written.
      norm_over, norm_gain, gate_activation, gate_first: as in `Readout`.
    """

    op = ""
    activated: tuple[str, ...] = ()
    convolution_activated = True
    convolution_biased = False
    empty_key = 0.0
    norm_over: str | None = "head"
    norm_gain = True
    gate_activation = "silu"
    gate_first = False

    def __init__(self, option: Any, model: options.Model, *, rngs: nnx.Rngs):
        sizes = option.sizes(model)
        self.option, self.taps = option, option.convolution
        self.heads, self.value_heads, self.key_size, self.value_size = sizes
        self.rows, self.columns = option.state(model)
        for site, shape in option.projections(model).items():
            axes = ("heads", "embed") if site == "out" else ("embed", AXES[site])
            # A gate of the feed-forward layer has the same name, and placements may start the two differently.
            setattr(self, site, projection(model, "output_gate" if site == "gate" else site, axes, shape, rngs=rngs))
        for site in INPUTS if self.taps else ():
            convolution = ShortConvolution(
                self._channels(site),
                self.taps,
                axis=AXES[site],
                activated=self.convolution_activated or site in self.activated,
                bias=self.convolution_biased,
                rngs=rngs,
            )
            setattr(self, f"{site}_convolution", convolution)
        self.readout = Readout(
            self.value_heads,
            self.value_size,
            over=self.norm_over,
            gain=self.norm_gain,
            epsilon=option.norm_epsilon,
            activation=self.gate_activation,
            gate_first=self.gate_first,
            rngs=rngs,
        )

    @classmethod
    def explain(cls, option: Any, model: options.Model, dtype: jnp.dtype, length: int, batch: int = 1) -> str:
        """Which back-end serves `batch` sequences on the mesh in use, and why.

        Raises:
          ConfigError: the one that is asked for cannot.
        """
        heads, value_heads = option.sizes(model)[:2]
        rows, columns = option.state(model)

        def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((batch, length, *shape), dtype)

        decay, delta = GATES[cls.op]
        keys, values = array(heads, rows, dtype=dtype), array(value_heads, columns, dtype=dtype)
        arrays = [keys, keys, values]
        if decay in ("scalar", "vector") and cls.op != "lightnet":
            arrays.append(array(value_heads, *((rows,) if decay == "vector" else ())))
        arrays += [array(value_heads)] * delta
        constant = jax.ShapeDtypeStruct((value_heads,), jnp.float32) if decay == "constant" else None
        settings = {"backend": option.backend, "chunk_size": option.chunk_size}
        choice = sharded_op.explain(cls.op, arrays, segment_ids=array(dtype=jnp.int32), decay=constant, **settings)
        why = "; ".join(f"not {name}: {reason}" for name, reason in choice.refusals.items())
        named = "asked for by name" if option.backend != "auto" else "the first in order"
        return f"{option.name}: {choice.backend} ({why or named})"

    def write(self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, shared: dict[str, Any]) -> Written:
        """What the op reads: by default no gates.

        Args:
          x: [B, T, width], the input of the mixer.
          q, k: [B, T, heads, key size]; v: [B, T, value heads, value size].
          shared: from `prepare` or `prepare_step`.
        """
        del x, shared
        return q, k, v, ()

    def read(self, o: jax.Array, v: jax.Array) -> jax.Array:
        """What the op gives [B, T, value heads, columns], and the values -> results [B, T, value heads, value size]."""
        del v
        return o

    def settings(self) -> dict[str, Any]:
        """Static keywords of the op and its step."""
        return {}

    def constant_decay(self) -> np.ndarray | None:
        """The logarithm of the decay of each value head, for the ops that take one; else None."""
        return None

    def empty_state(self, batch: int) -> Any:
        """The state before the first token: float32 [batch, value heads, rows, columns] of zeros."""
        return jnp.zeros((batch, self.value_heads, self.rows, self.columns), jnp.float32)

    def prepare(self, length: int, segment_ids: jax.Array | None) -> dict[str, Any]:
        """What every layer shares, for positions 0 to length - 1."""
        del length
        same = same_document(segment_ids, self.taps) if self.taps and segment_ids is not None else None
        return {"segment_ids": segment_ids, "same": same, "real": None}

    def __call__(self, x: jax.Array, shared: dict[str, Any]) -> jax.Array:
        """[B, T, width] -> [B, T, width]."""
        return self._mix(x, shared, None)[0]

    def init_cache(self, batch: int, length: int, dtype: jnp.dtype) -> dict[str, Any]:
        """The state of one layer, and the last inputs of its convolutions, [batch, taps - 1, channels] each.

        Its size does not depend on `length`.
        """
        del length
        sites = INPUTS if self.taps else ()
        past = {site: jnp.zeros((batch, self.taps - 1, self._channels(site)), dtype) for site in sites}
        return {"state": self.empty_state(batch), "past": past}

    def prepare_step(self, new: int, cache: Any, index: jax.Array, start: jax.Array) -> dict[str, Any]:
        """As `prepare`, for `new` tokens at positions index, index + 1, ...

        Args:
          new: number of tokens in this step.
          cache: of all layers of this kind.
          index: int32 [], tokens seen before.
          start: int32 [B], first position that belongs to each sequence; earlier ones are padding and leave no trace.
        """
        del cache
        positions = index + jnp.arange(new)
        return {"segment_ids": None, "same": None, "real": positions[None, :] >= start[:, None]}

    def step(self, x: jax.Array, shared: dict[str, Any], cache: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        """[B, n, width] and this layer's cache -> [B, n, width] and the cache n positions later."""
        return self._mix(x, shared, cache)

    def _mix(self, x: jax.Array, shared: dict[str, Any], cache: dict[str, Any] | None) -> tuple[jax.Array, Any]:
        batch, length, _ = x.shape
        inputs, past, real = {}, {}, shared["real"]
        for site in INPUTS:
            u = getattr(self, site)(x)
            if self.taps:
                convolution, before = getattr(self, f"{site}_convolution"), None if cache is None else cache["past"][site]
                u, past[site] = convolution(_masked(u, real), before, shared["same"])
            elif site in self.activated:
                u = jax.nn.silu(u)
            inputs[site] = u
        q, k = (inputs[site].reshape(batch, length, self.heads, self.key_size) for site in ("query", "key"))
        v = inputs["value"].reshape(batch, length, self.value_heads, self.value_size)
        q, k, written, gates = self.write(x, q, k, v, shared)
        # Where nothing is real, nothing is written and nothing decays: g = 0, beta = 0.
        k, written = _masked(k, real, self.empty_key), _masked(written, real)
        o, state = self._run(q, k, written, [_masked(gate, real) for gate in gates], shared, cache)
        mixed = self.readout(self.read(o, v), self._gate(x))
        return self.out(mixed), None if cache is None else {"state": state, "past": past}

    def _run(self, q: jax.Array, k: jax.Array, v: jax.Array, gates: list[jax.Array], shared: Any, cache: Any) -> Any:
        arrays, settings, decay = (q, k, v, *gates), self.settings(), self.constant_decay()
        if cache is not None and q.shape[1] == 1:
            step, constant = getattr(kernels, f"{self.op}_step"), {} if decay is None else {"decay": decay}
            o, state = step(*(array[:, 0] for array in arrays), cache["state"], **settings, **constant)
            return o[:, None], state
        return sharded_op.run(
            self.op,
            arrays,
            segment_ids=shared["segment_ids"],
            initial_state=None if cache is None else cache["state"],
            decay=decay,
            output_final_state=cache is not None,
            chunk_size=self.option.chunk_size,
            backend=self.option.backend,
            **settings,
        )

    def _gate(self, x: jax.Array) -> jax.Array | None:
        return self.gate(x) if self.option.gate else None

    def _channels(self, site: str) -> int:
        return self.value_heads * self.value_size if site == "value" else self.heads * self.key_size


def _masked(x: jax.Array, real: jax.Array | None, otherwise: float = 0.0) -> jax.Array:
    """`x` [B, T, ...] where `real` [B, T]."""
    return x if real is None else jnp.where(real.reshape(*real.shape, *(1,) * (x.ndim - 2)), x, otherwise)
