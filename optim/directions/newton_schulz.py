"""Newton-Schulz iteration: a matrix to nearly the nearest semi-orthogonal one, by odd polynomials of its singular values.

One step is `x <- a x + (b g + c g g) x` with `g = x x^T`, which maps every singular value s to `a s + b s^3 + c s^5`
and leaves the singular vectors alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from strata import ConfigError

Polynomial = tuple[float, float, float]

WHOLE_OVER = ("data",)
"""Mesh axes over which weights are not split: every device along them makes the same update."""

_jordan = (3.4445, -4.7750, 2.0315)
_quintic = (2.0, -1.5, 0.5)

SCHEMES: dict[str, tuple[Polynomial, ...]] = {
    # Keller Jordan, "Muon: an optimizer for hidden layers" (2024): the steepest slope at 0 whose limit stays in 1 +- 0.3.
    "jordan": (_jordan,) * 5,
    # Jiacheng You's five distinct quintics, the preset "dion" of optax.
    "you5": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # Jiacheng You's six, which never exceed 1.
    "you6": tuple(
        (a / 1024, b / 1024, c / 1024)
        for a, b, c in (
            (3955, -8306, 5008),
            (3735, -6681, 3463),
            (3799, -6499, 3211),
            (4019, -6385, 2906),
            (2677, -3029, 1162),
            (2172, -1833, 682),
        )
    ),
    # Polar Express (Amsel et al. 2025, arXiv:2505.16932), cushion 2, as in the releases of modded-nanogpt and Dion: a safety
    # factor of 1.02 is inside all but the last. They divide the input by 1.02 as well; here its norm is 1 for every scheme.
    "polar_express": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
    # DeepSeek-V4's hybrid (read in translations of its report): eight of Jordan's, then two that converge to 1.
    "deepseek": (_jordan,) * 8 + (_quintic,) * 2,
}


def polynomials(coefficients: str | Sequence[Polynomial] = "jordan", steps: int | None = None) -> tuple[Polynomial, ...]:
    """The polynomials of a run of Newton-Schulz, one (a, b, c) a step.

    Args:
      coefficients: a name of `SCHEMES`, or a list of triples.
      steps: their number. None: as many as the scheme has. Jordan's triple, and a list of one, is repeated; the last of
        Polar Express is repeated beyond its fifth (its paper, section 3); every other list has the length it has.

    Raises:
      ValueError: an unknown name, a list that is not of triples, or a number of steps that the scheme cannot have.
    """
    if isinstance(coefficients, str):
        if coefficients not in SCHEMES:
            raise ValueError(f"no Newton-Schulz coefficients are named {coefficients!r}; known: {', '.join(SCHEMES)}")
        name, chosen = coefficients, SCHEMES[coefficients]
    else:
        rows = np.asarray(coefficients, dtype=np.float64)
        if rows.ndim != 2 or rows.shape[1] != 3 or not len(rows):
            raise ValueError(f"Newton-Schulz coefficients are a list of (a, b, c), not of shape {rows.shape}")
        name, chosen = "the given list", tuple((float(a), float(b), float(c)) for a, b, c in rows)
    if steps is None or steps == len(chosen):
        return chosen
    if steps < 1:
        raise ValueError(f"Newton-Schulz takes at least one step, not {steps}")
    if name == "jordan" or len(chosen) == 1:
        return (chosen[0],) * steps
    if name == "polar_express" and steps > len(chosen):
        return chosen + (chosen[-1],) * (steps - len(chosen))
    raise ValueError(f"{name} has {len(chosen)} polynomials; give steps={len(chosen)} or None, not {steps}")


def scalar_map(s: Any, coefficients: str | Sequence[Polynomial] = "jordan", steps: int | None = None) -> np.ndarray:
    """What `newton_schulz` does to a normalised singular value: the composed polynomials, float64 on the host."""
    s = np.asarray(s, dtype=np.float64)
    for a, b, c in polynomials(coefficients, steps):
        s = a * s + b * s**3 + c * s**5
    return s


def newton_schulz(
    x: jax.Array,
    coefficients: str | Sequence[Polynomial] = "jordan",
    steps: int | None = None,
    *,
    dtype: Any = None,
    form: str | None = None,
) -> jax.Array:
    """Map the singular values of each matrix by a composition of polynomials, after dividing it by its Frobenius norm.

        x = u diag(s) v^T  ->  u diag(f(s / |s|)) v^T

    Args:
      x: float [..., m, n]; any number of leading axes, m and n in any order. A zero matrix stays zero, an empty one empty.
      coefficients: as in `polynomials`.
      steps: as in `polynomials`.
      dtype: of the products inside; the norm is always float32. None: float32 on CPU, bfloat16 elsewhere.
      form: "plain", or "gram" for the iteration on x x^T (Gram Newton-Schulz, Dao-AILab 2026), which is the same map
        at a cost that hardly depends on the longer side. None: whichever takes fewer products.

    Returns:
      An array like `x`, shape and dtype.

    Raises:
      ConfigError: `x` is no array of floating numbers.
      ValueError: fewer than two axes, or as `polynomials`.

    On CPU the leading axes run one matrix at a time, elsewhere as one batch: XLA:CPU runs batched products slower than plain
    ones. Under `jax.vmap` the batch stays a batch on every device.

    On the mesh in use (`jax.set_mesh`) several matrices are shared out over the devices, whole, and filled up with zeros where
    their number does not divide: left to itself the compiler gathers every matrix on every device, since each product needs all
    of one.
    """
    chosen = polynomials(coefficients, steps)
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        found = getattr(x, "dtype", type(x).__name__)
        raise ConfigError(f"newton_schulz takes an array of floating numbers, not {found}")
    if x.ndim < 2:
        raise ValueError(f"newton_schulz takes matrices [..., m, n], not shape {x.shape}")
    if form not in (None, "plain", "gram"):
        raise ValueError(f"form is 'plain', 'gram' or None, not {form!r}")
    if not x.size:
        return jnp.asarray(x)
    cpu = jax.default_backend() == "cpu"
    if dtype is None:
        dtype = jnp.float32 if cpu else jnp.bfloat16

    def orthogonalize(y: jax.Array) -> jax.Array:
        tall = y.shape[-2] > y.shape[-1]
        y = y.mT if tall else y
        gram = form == "gram" if form else gram_is_cheaper(y.shape[-2], y.shape[-1], len(chosen))
        unit = _of_norm_one(y.astype(jnp.float32)).astype(dtype)
        z = (_gram if gram else _plain)(unit, chosen).astype(x.dtype)
        return z.mT if tall else z

    def each(matrices: jax.Array) -> jax.Array:
        if not cpu:
            return orthogonalize(matrices)
        if len(matrices) == 1:
            return orthogonalize(matrices[0])[None]
        return jax.lax.map(orthogonalize, matrices)

    with jax.named_scope("newton_schulz"):
        matrices = x.reshape(-1, *x.shape[-2:])
        axes = _axes_that_share(len(matrices))
        if not axes:
            return each(matrices).reshape(x.shape)
        count = len(matrices)
        matrices = jnp.pad(matrices, ((0, -count % _devices(axes)), (0, 0), (0, 0)))
        # One mesh axis at a time, there and back: moving two at once, the compiler would gather everything after all.
        for i in range(1, len(axes)):
            matrices = _over(matrices, axes[:i])
        spec = PartitionSpec(axes)
        done = jax.shard_map(each, in_specs=spec, out_specs=spec, check_vma=False)(matrices)
        for i in range(len(axes) - 1, 0, -1):
            done = _over(done, axes[:i])
        return done[:count].reshape(x.shape)


def _of_norm_one(x: jax.Array) -> jax.Array:
    """Each float32 matrix divided by its Frobenius norm; zero stays zero.

    Where float32 might not hold the squares, the matrix is first multiplied by the power of two that brings its largest entry
    near 1. The sum over the others is kept as it is, since another one would be rounded in another order.
    """
    square = jnp.sum(x * x, axis=(-2, -1), keepdims=True)
    ordinary = (square > 2.0**-100) & (square < 2.0**100)
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    # A float whose mantissa is cleared is a power of two; at either end its inverse would not be a normal number.
    power = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(largest, jnp.int32) & 0x7F800000, jnp.float32)
    scale = jnp.where(ordinary, 1.0, 1.0 / jnp.clip(power, 2.0**-126, 2.0**126))
    scaled = x * scale
    square = jnp.where(ordinary, square, jnp.sum(scaled * scaled, axis=(-2, -1), keepdims=True))
    return scaled * jnp.where(square > 0, jax.lax.rsqrt(square), 0)


def _over(matrices: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """[N, m, n] with the first axis split over mesh axes, the others as the compiler has them."""
    free = PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(matrices, PartitionSpec(axes, free, free))


def _axes_that_share(count: int) -> tuple[str, ...]:
    """The axes of the mesh in use over whose devices `count` matrices are shared out: fewest a device, then fewest devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh is None or mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return ()
    sizes = [name for name, size in mesh.shape.items() if size > 1 and name not in WHOLE_OVER]
    choices = (names for number in range(len(sizes) + 1) for names in itertools.combinations(sizes, number))
    return min(choices, key=lambda names: (-(-count // _devices(names)), _devices(names)))


def _devices(axes: tuple[str, ...]) -> int:
    return math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in axes)


def newton_schulz_leaves(
    leaves: Sequence[jax.Array],
    coefficients: str | Sequence[Polynomial] = "jordan",
    steps: int | None = None,
    *,
    dtype: Any = None,
    group: bool | None = None,
) -> list[jax.Array]:
    """`newton_schulz` of each array; those with matrices of one shape, transposed or not, go as one batch.

    Args:
      leaves: float arrays [..., m, n].
      coefficients, steps, dtype: as in `newton_schulz`.
      group: whether to batch. None: not on CPU, where a batch is slower.
    """
    if group is None:
        group = jax.default_backend() != "cpu"
    if not group:
        return [newton_schulz(x, coefficients, steps, dtype=dtype) for x in leaves]
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, x in enumerate(leaves):
        groups.setdefault((*sorted(x.shape[-2:]), x.dtype), []).append(i)
    done: dict[int, jax.Array] = {}
    for members in groups.values():
        wide = [leaves[i].mT if leaves[i].shape[-2] > leaves[i].shape[-1] else leaves[i] for i in members]
        batch = jnp.concatenate([w.reshape(math.prod(w.shape[:-2]), *w.shape[-2:]) for w in wide])
        batch, start = newton_schulz(batch, coefficients, steps, dtype=dtype), 0
        for i, w in zip(members, wide, strict=True):
            count = math.prod(w.shape[:-2])
            part = batch[start : start + count].reshape(w.shape)
            done[i], start = part if w.shape == leaves[i].shape and leaves[i] is w else part.mT, start + count
    return [done[i] for i in range(len(leaves))]


def gram_is_cheaper(m: int, n: int, steps: int) -> bool:
    """Whether the Gram form takes fewer multiplications than the plain one for an m x n matrix.

    In units of min(m, n)^3 multiplications and with r = max / min, k plain steps cost k (2 r + 1) and k steps of the Gram form
    between two restarts cost 4 k - 3 + 2 r: less as soon as r > 1.5, whatever k > 1.
    """
    return steps > 1 and 2 * max(m, n) > 3 * min(m, n)


def flops(m: int, n: int, steps: int, dtype: Any = jnp.float32) -> float:
    """Floating-point operations of the products of `steps` on one m x n matrix, by the form that `newton_schulz` takes.

    Two for a multiplication with its addition; restarts of the Gram form are counted, symmetry of its products is not used.
    """
    short, ratio = min(m, n), max(m, n) / min(m, n)
    if gram_is_cheaper(m, n, steps):
        return 2 * short**3 * sum(4 * span - 3 + 2 * ratio for span in _spans(steps, dtype))
    return 2 * short**3 * steps * (2 * ratio + 1)


def _spans(steps: int, dtype: Any) -> list[int]:
    """Steps between restarts of the Gram form: at most three in float32, two in less.

    The Gram matrix holds squares of singular values, so its rounding error hides the small ones, and an eigenvalue that it
    makes negative grows by a^2 a step. Measured against the plain form on spectra with one large value, with few and with
    log-uniform values: float32 in spans of three is as exact, without restart five steps are off by 1e-3 and ten blow up;
    bfloat16 in spans of two is as exact or better, in spans of three the ten steps of "deepseek" blow up.
    """
    longest = 3 if jnp.finfo(dtype).bits >= 32 else 2
    count = -(-steps // longest)
    return [steps // count + (i < steps % count) for i in range(count)]


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    # A GPU would round float32 operands to TF32; bfloat16 ones are exact products summed in float32 anyway.
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None)


def _plain(x: jax.Array, chosen: Sequence[Polynomial]) -> jax.Array:
    for a, b, c in chosen:
        g = _product(x, x.mT)
        x = a * x + _product(b * g + c * _product(g, g), x)
    return x


def _gram(x: jax.Array, chosen: Sequence[Polynomial]) -> jax.Array:
    identity = jnp.eye(x.shape[-2], dtype=x.dtype)
    position = 0
    for span in _spans(len(chosen), x.dtype):
        g, q = _product(x, x.mT), None
        for k, (a, b, c) in enumerate(chosen[position : position + span]):
            # All factors are polynomials of one symmetric matrix, so they commute.
            p = b * g + c * _product(g, g) + a * identity
            q = p if q is None else _product(q, p)
            if k + 1 < span:
                g = _product(_product(g, p), p)
        x, position = _product(q, x), position + span
    return x
