"""Inverting unit triangular matrices for chunked delta rules (Huawei CSL, arXiv:2605.21325): error and cost of six methods.

    python -m trainer.sweep experiments/triangular_inverse.py --scale smoke       seconds
    python -m trainer.sweep experiments/triangular_inverse.py                     laptop: 60 runs of a few seconds
    python -m trainer.report experiments/triangular_inverse.py

I + L with L = tril(beta k k', -1), the matrix of a chunk of DeltaNet: unit keys with a chosen mean cosine, beta = 1; the last
level has equal keys and beta = 2, the worst that DeltaNet allows. A step of a run is a level: the cosine in per cent, 100 for
the last. `digits` is -log10 of the worst relative Frobenius error against float64, 0 where nothing is right, by the type that
operands of products are rounded to (sums stay float32, as on a matrix unit).

What the authors say (their blog and code `gdn-tri-inverse` [read], of the paper the abstract alone [claim]): Neumann's product
(MCH) is unstable, the recursive block inverse (MBH, here `ladder`) and their MXR (`mxr`, Neumann on 16 x 16 blocks, then block
merges) are logarithmically stable, MXR the noisier one; inversion by MXR is up to 4.3 times as fast as SGLang's on an NPU. What
would count against it: MXR losing its digits where the ladder keeps them, which the third and fourth claims look for.

Controls: levels of correlation, since random keys hide every difference; exact substitution as the method that cannot fail;
time is of whole batches, compiled, on whatever device this runs on: no NPU was at hand, so the 4.3 is not tested.
"""

import math
import time

from trainer.sweep import Arm, Claim, Experiment, Metric, Rule, Scale

CLAIMED = "arXiv:2605.21325, authors' blog and code [read]"
METHODS = {  # part 1: the comparison of the authors
    "ladder": "the authors' MBH",
    "mxr": "the authors' choice",
    "neumann": "the authors' MCH",
    "substitution16": "",
    "substitution": "",
    "newton_schulz": "",
}
OPERANDS = ("float32", "float16", "bfloat16")
KEY_SIZE = 64
EQUAL = 100
"""The level of equal keys and beta = 2."""


def key_matrices(level: int, size: int, count: int, seed: int):
    """float32 [count, size, size], strictly lower: beta k k' of unit keys whose mean cosine is `level` per cent."""
    import numpy as np

    draw = np.random.default_rng([seed, level])
    noise, common = draw.standard_normal((count, size, KEY_SIZE)), draw.standard_normal((count, 1, KEY_SIZE))
    cosine = level / 100
    keys = math.sqrt(1 - cosine) * noise + math.sqrt(cosine) * common
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    beta = 2 if level == EQUAL else 1
    return np.tril(beta * keys @ keys.swapaxes(-1, -2), -1).astype(np.float32)


def digits(found, exact) -> float:
    """-log10 of the worst relative Frobenius error of a batch, between 0 and 16; 0 where a number is not finite."""
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        difference = np.linalg.norm(np.asarray(found, np.float64) - exact, axis=(-1, -2))
        error = float(np.max(difference / np.linalg.norm(exact, axis=(-1, -2))))
    return min(16.0, max(0.0, -math.log10(max(error, 1e-16)))) if math.isfinite(error) else 0.0


def invert(run, *, method: str, size: int, matrices: int, levels: list[int], repeats: int) -> None:
    """One row a level: `digits` by operand type, and the time of one batch in float32."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import kernels

    def compiled(operand: str):
        rounded = None if operand == "float32" else operand
        return jax.jit(lambda lower: kernels.triangular_inverse(lower, method, operand_dtype=rounded))

    calls = {operand: compiled(operand) for operand in OPERANDS}
    for level in levels:
        lower = key_matrices(level, size, matrices, run.seed)
        exact, lower = np.linalg.inv(np.eye(size) + lower.astype(np.float64)), jnp.asarray(lower)
        found = {operand: digits(call(lower), exact) for operand, call in calls.items()}
        seconds = []
        for _ in range(repeats):
            begin = time.perf_counter()
            jax.block_until_ready(calls["float32"](lower))
            seconds.append(time.perf_counter() - begin)
        milliseconds = 1e3 * sorted(seconds)[len(seconds) // 2]
        run.write(level, digits=found, timing={"milliseconds": milliseconds, "doublings": math.log2(milliseconds)})


def kept(operand: str, level: int = 80) -> Metric:
    """Digits at one level."""
    return Metric(f"digits.{operand}", at=level, lower_is_better=False, unit="digits, cosine in %", log_base=10)


def get_experiment() -> Experiment:
    """Six methods."""
    half, fast = kept("float16"), Metric("timing.doublings", at="median", unit="log2 ms", log_base=2)
    levels = [0, 20, 50, 80, 95, EQUAL]

    def sizes(size: int, matrices: int, repeats: int) -> dict:
        return {"size": size, "matrices": matrices, "repeats": repeats, "levels": levels}

    return Experiment(
        name="triangular_inverse",
        question="Which inversion of a chunk's triangular matrix keeps its digits, by precision and correlation of the keys?",
        arms=[
            Arm(
                name,
                {"method": name},
                measure="experiments.triangular_inverse:invert",
                control="exact, row by row" if name == "substitution" else "",
                part=1 if known else 2,
            )
            for name, known in METHODS.items()
        ],
        scales={
            "smoke": Scale(seeds=3, arguments=sizes(32, 4, 2), minutes=0.1),
            "laptop": Scale(seeds=10, arguments=sizes(64, 64, 15), minutes=0.15, note="64 matrices of 64 x 64 a level"),
            "gpu": Scale(
                seeds=5, arguments=sizes(64, 8192, 30), minutes=0.25, note="16 sequences of 4096 tokens, 8 heads, chunks of 64"
            ),
            "paper": Scale(
                seeds=10, arguments=sizes(128, 4096, 30), minutes=0.5, note="the largest chunk of the authors' code, on one GPU"
            ),
        },
        metric=half,
        also=[kept("float32"), kept("bfloat16"), kept("float16", 0), kept("float16", 95), kept("float32", EQUAL), fast],
        claims=[
            Claim(
                statement="The block ladder keeps digits on correlated keys that Neumann's product loses (float16 operands)",
                source=CLAIMED,
                arm="ladder",
                against="neumann",
                rule=Rule(effect=1.0),
            ),
            Claim(
                statement="MXR keeps digits on correlated keys that Neumann's product loses (float16 operands)",
                source=CLAIMED,
                arm="mxr",
                against="neumann",
                rule=Rule(effect=1.0),
            ),
            Claim(
                statement="MXR is noisier than the ladder (float16 operands)",
                source=CLAIMED,
                arm="ladder",
                against="mxr",
                rule=Rule(effect=0.5),
            ),
            Claim(
                statement="Exact substitution on 16 x 16 blocks keeps a digit that MXR loses (bfloat16 operands)",
                source="docs/triangular_inverse.md: 7e-3 against 4 [measured here]",
                arm="substitution16",
                against="mxr",
                metric=kept("bfloat16"),
                rule=Rule(margin=1.0, effect=1.5),
            ),
            Claim(
                statement="MXR takes less time than substitution row by row",
                source="arXiv:2605.21325, abstract: up to 4.3 times over SGLang's on an NPU [claim]",
                arm="mxr",
                against="substitution",
                metric=fast,
                rule=Rule(effect=0.5),
            ),
        ],
    )
