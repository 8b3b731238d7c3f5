"""Each linear-attention mixer against its equation, token by token in float64, written here from its paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.construct import resolve_model
from strata import implementation

WIDTH, LENGTH, ROWS = 16, 9, 2
Array = np.ndarray


def same(x: Array) -> Array:
    return x


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def softplus(x: Array) -> Array:
    return np.log1p(np.exp(x))


def unit(x: Array) -> Array:
    return x / np.sqrt(np.square(x).sum(axis=-1, keepdims=True) + 1e-6)


def rms(x: Array, epsilon: float, gain: Any = 1.0) -> Array:
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + epsilon) * gain


def flat(x: Array) -> Array:
    return x.reshape(*x.shape[:2], -1)


def projected(x: Array, w: Any, site: str, heads: int, act: Callable[[Array], Array], taps: int, bias: Any = 0.0) -> Array:
    """`act(sum_j c_j (x W)_(t-j) + bias)` by heads, j < taps; without taps `act(x W)`: [B, T, heads, size]."""
    u = x @ w[f"{site}.kernel"]
    if taps:
        kernel, past = w[f"{site}_convolution.kernel"], u
        u = np.zeros_like(past) + bias
        for t in range(LENGTH):
            for j in range(min(taps, t + 1)):
                u[:, t] += kernel[j] * past[:, t - j]
    return act(u).reshape(*x.shape[:2], heads, -1)


def recurrence(q: Array, k: Array, v: Array, decay: Any = 1.0, beta: Array | None = None, scale: float | None = None) -> Array:
    """S = Diag(decay) S, then S + k v' or S + beta k (v - k' S)'; o = scale q S, scale = K^(-1/2) unless given.

    Value head h reads query head h // (value heads / heads). decay broadcasts to [B, T, value heads, K].
    """
    q, k = (np.repeat(u, v.shape[2] // u.shape[2], axis=2) for u in (q, k))
    decay, o = np.broadcast_to(decay, k.shape), np.zeros(v.shape)
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    for b in range(v.shape[0]):
        for h in range(v.shape[2]):
            S = np.zeros((k.shape[-1], v.shape[-1]))
            for t in range(LENGTH):
                S = decay[b, t, h][:, None] * S
                written = v[b, t, h] if beta is None else beta[b, t, h] * (v[b, t, h] - k[b, t, h] @ S)
                S = S + np.outer(k[b, t, h], written)
                o[b, t, h] = scale * q[b, t, h] @ S
    return o


def step(logits: Array, w: Any) -> tuple[Array, Array]:
    """Mamba's decay e^(-A dt) and dt = softplus(logits + b); A one number a head."""
    dt = softplus(logits + w["decay.dt_bias"])
    rate = np.exp(w["decay.A_log"])
    return np.exp(-(rate if logits.ndim == 3 else rate[:, None]) * dt), dt


# x the input, w the parameters by name, o the options; H heads of queries and keys, J of values. Each ends before `out`.


def linear_attention(x, w, o, H, J):
    act = silu if o.convolution else same
    q, k, v = (projected(x, w, site, n, act, o.convolution) for site, n in (("query", H), ("key", H), ("value", J)))

    def phi(u, side):
        if o.feature_map == "hedgehog":
            y = np.einsum("bthk,hkl->bthl", u, w[f"{side}_features.kernel"]) + w[f"{side}_features.bias"]
            e = np.exp(np.concatenate([2 * y, -2 * y], axis=-1))
            return e / e.sum(axis=-1, keepdims=True)
        elu1 = lambda u: np.where(u > 0, u + 1, np.exp(u))  # noqa: E731
        return {"identity": same, "elu1": elu1, "relu": lambda u: u * (u > 0)}[o.feature_map](u)

    q, k = phi(q, "query"), phi(k, "key")
    out = recurrence(q, k, v)
    if o.normalizer:
        weights = recurrence(q, k, np.ones((*v.shape[:3], 1)))
        out = np.divide(out, weights, out=np.zeros_like(out), where=weights > 0)
    if o.output_norm:
        out = rms(out, o.norm_epsilon, w["readout.norm.scale"])
    return flat(out) * silu(x @ w["gate.kernel"]) if o.gate else flat(out)


def retention(x, w, o, H, J):
    act = silu if o.convolution else same
    q, k, v = (projected(x, w, site, n, act, o.convolution) for site, n in (("query", H), ("key", H), ("value", J)))
    half = q.shape[-1] // 2
    angle = np.outer(np.arange(LENGTH), o.rope_theta ** (-np.arange(half) / half))[:, None]
    turned = lambda u: (u[..., :half] + 1j * u[..., half:]) * np.exp(1j * angle)  # noqa: E731
    q, k = (np.concatenate([turned(u).real, turned(u).imag], axis=-1) for u in (q, k))
    gamma = 1 - 2.0 ** (-5 - np.arange(J))
    out = flat(rms(recurrence(q, k, v, gamma[:, None]), o.norm_epsilon, w["readout.norm.scale"]))
    return out * silu(x @ w["gate.kernel"]) if o.gate else out


def lightning(x, w, o, H, J):
    q, k = (projected(x, w, site, H, silu, o.convolution) for site in ("query", "key"))
    v = projected(x, w, "value", J, silu if o.convolution else same, o.convolution)
    decay = np.exp(-8 * np.arange(J) / J * (1 - o.depth_fraction))
    return rms(flat(recurrence(q, k, v, decay[:, None])), o.norm_epsilon) * (x @ w["gate.kernel"])


def simple_gla(x, w, o, H, J):
    def read(site, heads):
        bias = w[f"{site}_convolution.bias"] if o.convolution else 0.0
        return projected(x, w, site, heads, silu, o.convolution, bias)

    q, k, v = read("query", H), read("key", H), read("value", J)
    decay, dt = step(x @ w["step_gate.kernel"], w)
    out = recurrence(q, k, dt[..., None] * v, decay[..., None], scale=1.0)
    out = flat(out + w["skip"][:, None] * v if o.skip else out)
    return rms(out * silu(x @ w["gate.kernel"]) if o.gate else out, o.norm_epsilon, w["readout.norm.scale"])


def gla(x, w, o, H, J):
    act = silu if o.convolution else same
    q, k, v = (projected(x, w, site, n, act, o.convolution) for site, n in (("query", H), ("key", H), ("value", J)))
    logits = x @ w["decay.narrow"] @ w["decay.wide"] + w["decay.bias"]
    decay = sigmoid(logits) ** (1 / o.gate_normalizer)
    out = flat(rms(recurrence(q, k, v, decay.reshape(*v.shape[:3], -1)), o.norm_epsilon, w["readout.norm.scale"]))
    return out * silu(x @ w["gate.kernel"]) if o.gate else out


def delta(x, w, o, H, J, decay=1.0):
    q, k, v = (projected(x, w, site, n, silu, o.convolution) for site, n in (("query", H), ("key", H), ("value", J)))
    beta = (2 if o.negative_eigenvalues else 1) * sigmoid(x @ w["strength.kernel"])
    return flat(rms(recurrence(unit(q), unit(k), v, decay, beta), o.norm_epsilon, w["readout.norm.scale"]))


def delta_net(x, w, o, H, J):
    out = delta(x, w, o, H, J)
    return out * silu(x @ w["gate.kernel"]) if o.gate else out


def gated_delta_net(x, w, o, H, J):
    out = delta(x, w, o, H, J, step(x @ w["step_gate.kernel"], w)[0][..., None])
    return out * silu(x @ w["gate.kernel"]) if o.gate else out


def kda(x, w, o, H, J):
    logits = x @ w["step_gate.narrow"] @ w["step_gate.wide"]
    out = delta(x, w, o, H, J, step(logits.reshape(*x.shape[:2], J, -1), w)[0])
    return out * sigmoid(x @ w["gate.narrow"] @ w["gate.wide"] + w["gate.bias"]) if o.gate else out


def lightnet(x, w, o, H, J):
    q, k, v = (
        projected(x, w, site, n, act, o.convolution)
        for site, n, act in (("query", H, silu), ("key", H, same), ("value", J, same))
    )
    q, k = (np.repeat(u, J // H, axis=2) for u in (q, k))
    sums = np.cumsum(np.exp(k)[..., None] * v[..., None, :], axis=1) / np.cumsum(np.exp(k), axis=1)[..., None]
    out = q.shape[-1] ** -0.5 * np.einsum("bthk,bthkv->bthv", q, sums)
    out = rms(flat(out), o.norm_epsilon, w["readout.norm.scale"])
    return out * silu(x @ w["gate.narrow"] @ w["gate.wide"]) if o.gate else out


# Equation, options, heads of queries and keys, heads of values: first as published, then what the options change.
EQUATIONS: dict[str, tuple[Callable[..., Array], dict[str, Any], int, int]] = {
    "linear_attention": (linear_attention, {}, 2, 2),
    "hedgehog": (linear_attention, {"feature_map": "hedgehog", "value_heads": 4, "convolution": 3}, 2, 4),
    "relu": (linear_attention, {"feature_map": "relu", "output_norm": True}, 2, 2),
    "identity": (
        linear_attention,
        {"feature_map": "identity", "normalizer": False, "output_norm": True, "gate": True, "norm_epsilon": 0.1},
        2,
        2,
    ),
    "retention": (retention, {}, 2, 2),
    "retention_bare": (retention, {"rope_theta": 50.0, "gate": False, "convolution": 2, "value_heads": 4}, 2, 4),
    "lightning": (lightning, {"depth_fraction": 0.25, "norm_epsilon": 0.1, "value_heads": 4}, 2, 4),
    "simple_gla": (simple_gla, {}, 1, 4),
    "simple_gla_bare": (simple_gla, {"skip": False, "gate": False, "convolution": 0, "heads": 2}, 2, 4),
    "gla": (gla, {}, 2, 2),
    "gla_bare": (gla, {"gate": False, "gate_normalizer": 2.0, "convolution": 2, "value_heads": 4}, 2, 4),
    "delta_net": (delta_net, {}, 2, 2),
    "delta_net_gated": (delta_net, {"gate": True, "negative_eigenvalues": True, "convolution": 0, "value_heads": 4}, 2, 4),
    "gated_delta_net": (gated_delta_net, {}, 2, 2),
    "gated_delta_net_bare": (
        gated_delta_net,
        {"gate": False, "negative_eigenvalues": True, "convolution": 0, "value_heads": 4},
        2,
        4,
    ),
    "kda": (kda, {"expand_v": 1.5, "value_heads": 4}, 2, 4),
    "kda_bare": (kda, {"gate": False, "negative_eigenvalues": True, "convolution": 0}, 2, 2),
    "lightnet": (lightnet, {}, 2, 2),
    "lightnet_bare": (lightnet, {"gate": False, "convolution": 2, "value_heads": 4}, 2, 4),
}


def errors(form: str) -> tuple[float, float]:
    """The largest difference between a mixer and its equation, and the largest output."""
    equation, changed, heads, value_heads = EQUATIONS[form]
    # In chunks of 4, so that a row has several.
    mixer = {"name": equation.__name__, "chunk_size": 4} | changed
    layer = resolve_model({"width": WIDTH, "heads": 2, "mixer": mixer}).at(0)
    abstract = nnx.eval_shape(lambda: implementation(layer.mixer)(layer.mixer, layer, rngs=nnx.Rngs(params=0)))
    rng, drawn, w = np.random.default_rng(1), {}, {}
    for path, variable in nnx.to_flat_state(nnx.state(abstract)):
        value = (float(path[-1] == "scale") + 0.3 * rng.standard_normal(variable.shape)).astype(np.float32)
        drawn[path], w[".".join(map(str, path))] = jnp.asarray(value), value.astype(np.float64)
    state = nnx.State(nnx.to_pure_dict(nnx.from_flat_state(drawn)))

    def forward(state: Any, x: jax.Array) -> jax.Array:
        module = nnx.merge(nnx.graphdef(abstract), state)
        return module(x, module.prepare(LENGTH, None))

    x = rng.standard_normal((ROWS, LENGTH, WIDTH)).astype(np.float32)
    expected = equation(x.astype(np.float64), w, layer.mixer, heads, value_heads) @ w["out.kernel"]
    return float(np.abs(jax.jit(forward)(state, x) - expected).max()), float(np.abs(expected).max())


@pytest.mark.parametrize("form", EQUATIONS)
def test_a_mixer_is_its_equation(form):
    error, largest = errors(form)
    assert error < 1e-5 * max(largest, 1.0), (error, largest)
