"""What rounding costs: triangular inversion by method, and delta rules where they are ill-conditioned.

`python -m benchmarks.linear_attention --inverse` and `--reflections` run these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kernels
from benchmarks.measure import show
from kernels.inverse import METHODS


def key_matrix(kind: str, size: int, seed: int) -> np.ndarray:
    """L of a chunk as a delta rule gives it, float32: random keys with decay, correlated keys, uniform numbers, beta = 2."""
    rng = np.random.default_rng(seed)
    k = rng.standard_normal((size, 64))
    if kind == "correlated keys":
        k = 0.5 * k + rng.standard_normal(64)
    if kind == "identical keys, beta = 2":
        k = np.ones((size, 64))
    k /= np.linalg.norm(k, axis=1, keepdims=True)
    product = 2 * k @ k.T if "beta" in kind else k @ k.T
    if kind == "random keys, decay":
        total = np.cumsum(-0.1 * rng.random(size))
        product = product * np.exp(np.minimum(total[:, None] - total, 0))
    if kind == "uniform in [0, 0.5)":
        product = 0.5 * rng.random((size, size))
    return np.tril(product, -1).astype(np.float32)


def inversion(sizes: list[int], seeds: int) -> list[dict[str, Any]]:
    """Worst relative Frobenius error of every method over the seeds; None where it is not a finite number."""
    kinds = ("random keys, decay", "correlated keys", "uniform in [0, 0.5)", "identical keys, beta = 2")
    rows = []
    for size in sizes:
        for method in METHODS:
            for operand in (None, "float16", "bfloat16"):
                errors: dict[str, float | None] = {}
                for kind in kinds:
                    lower = np.stack([key_matrix(kind, size, seed) for seed in range(seeds)])
                    exact = np.linalg.inv(np.eye(size) + lower.astype(np.float64))
                    found = kernels.triangular_inverse(jnp.asarray(lower), method, operand_dtype=operand)
                    difference = np.linalg.norm(np.asarray(found, np.float64) - exact, axis=(1, 2))
                    worst = float(np.max(difference / np.linalg.norm(exact, axis=(1, 2))))
                    errors[kind] = worst if np.isfinite(worst) else None
                rows.append({"size": size, "method": method, "operands": operand or "float32", "errors": errors})
    for size in sizes:
        shown = [
            [row["method"], row["operands"], *("not finite" if e is None else f"{e:.0e}" for e in row["errors"].values())]
            for row in rows
            if row["size"] == size
        ]
        show(f"(I + L)^-1, {size} x {size}, worst relative error of {seeds}", ["", "operands", *kinds], shown)
    return rows


def reflections(lengths: list[int], seeds: int) -> list[dict[str, Any]]:
    """Worst relative RMS over the seeds of `delta_rule` in float32 with one key, beta = 2 and no decay, against float64.

    One head, K = 16, V = 8. `results` are output and final state, `gradients` those of all inputs for a sum of sines of the
    output and a sum of the state.
    """

    def run(backend: str) -> Callable[[tuple[Any, ...]], Any]:
        def objective(x: tuple[Any, ...]) -> tuple[jax.Array, Any]:
            o, final = kernels.delta_rule(*x, output_final_state=True, backend=backend)
            return jnp.sum(jnp.sin(o)) + jnp.sum(final), (o, final)

        return jax.jit(jax.grad(objective, has_aux=True))

    def worst(found: Any, exact: Any) -> float:
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
        return max(float(np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(y)) for x, y in pairs)

    rows = []
    for length in lengths:
        errors = {name: {"results": 0.0, "gradients": 0.0} for name in ("xla", "reference")}
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            key = rng.standard_normal(16)
            k = np.broadcast_to(key / np.linalg.norm(key), (1, length, 1, 16))
            q, v = (rng.standard_normal((1, length, 1, size)) for size in (16, 8))
            x = tuple(y.astype(np.float32) for y in (q, k, v, np.full((1, length, 1), 2.0)))
            with jax.enable_x64(True):
                exact = jax.tree.map(np.asarray, run("reference")(tuple(y.astype(np.float64) for y in x)))
            for name, kept in errors.items():
                for what, found, wanted in zip(("gradients", "results"), run(name)(x), exact, strict=True):
                    kept[what] = max(kept[what], worst(found, wanted))
        rows.append({"length": length, "errors": errors})
    columns = [f"{name}, {what}" for name in ("xla", "reference") for what in ("results", "gradients")]
    shown = [[row["length"], *(f"{e:.0e}" for kept in row["errors"].values() for e in kept.values())] for row in rows]
    show(f"one key, beta = 2, no decay, float32, worst relative error of {seeds}", ["T", *columns], shown)
    return rows
