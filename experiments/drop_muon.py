"""Drop-Muon (arXiv:2510.02239): updating a random suffix of the layers. Less time to a loss than Muon, on text and on images?

    python -m trainer.sweep experiments/drop_muon.py --scale smoke         minutes
    python -m trainer.sweep experiments/drop_muon.py --part 1              laptop, the headline: text
    python -m trainer.sweep experiments/drop_muon.py                       laptop, with part 2: distributions, the image network
    python -m trainer.report experiments/drop_muon.py

The claim: up to 1.4 times faster to equal training accuracy than Muon, on small convolutional networks for MNIST, Fashion-MNIST
and CIFAR-10, channels 64, 128, 256, batch 8192, rate 0.1, uniform draws [P, S]. The submission was rejected (2, 2, 4, 8);
reviewers: only training accuracy is reported, final accuracy is often below Muon's, Muon is the only baseline [R]. A
distribution that favours deep cuts is worse [R]; uniform draws and ones that shift from early to late cuts are both reported
[R], which of them is better was not read.

Controls: time, not steps, since a step of Drop-Muon is cheaper by design; beside it equal work: `drop, equal work` makes as
many more steps as the formula of the cost allows, and ends its schedule there. `muon, fewer steps` is Muon with the work that
Drop-Muon needs for its steps: if its shorter schedule is as good, skipping layers bought nothing. Rates on text are tuned.

The image network is the paper's setting in small: scikit-learn's digits (pip install 'strata-lm[images]'), three convolutions,
`optim` used directly; test accuracy stands beside training accuracy. How soon 99 % are reached depends on the rate, of which
the last loss tells nothing there, so that tuning would give two arms unlike rates by chance: they are compared at equal ones, a
low one and one at which both are sooner.

Against the claim would count: Muon as fast to the same loss, or lower at equal work. Seconds are of updates alone and compare
runs one at a time on a quiet machine (one slot).
"""

import math

from experiments import text
from trainer.sweep import Arm, Claim, Experiment, Metric, Rule, Scale, Tuning, axis

RATE = "optimizer.direction.learning_rate"
PAPER = "arXiv:2510.02239, abstract [P]"
MUON = {"name": "muon", "learning_rate": 0.02, "rest": {"name": "adamw", "learning_rate": 3e-3, "weight_decay": 0.0}}
DROP = {"optimizer.sampling": {"name": "drop_muon", "buckets": 4}}
DEEP = {"distribution": "optimal", "smoothness": (1.0, 3.0, 6.0, 10.0)}
"""Cuts before the buckets in the shares 0.1, 0.2, 0.3 and 0.4: the form for an optimal draw gives any that grows with depth."""
IMAGE_RATES = {"low rate": 0.02, "high rate": 0.16}
"""At `paper` its 0.1 is the high one."""
LAYERS, BUCKETS = 8, 4
STEPS = {"smoke": 12, "laptop": 400, "gpu": 800, "paper": 5000}
CEILING = 3 / (1 + (BUCKETS + 1) / BUCKETS - (BUCKETS - 1) / (BUCKETS * LAYERS))
"""Work of a step over that of Drop-Muon's with uniform draws, embedding, head and optimizer not counted (`optim.cuts`)."""


def schedule(steps: int) -> dict:
    """Constant, then a linear decay over the last third, so that a loss on the way is seen at a common rate."""
    return {"train.steps": steps, "optimizer.schedule": {"name": "wsd", "warmup": max(1, steps // 20), "decay": 1 / 3}}


# ---- the image network


def digits_network(channels, seed: int):
    """Three 3 x 3 convolutions, each a layer of its own, on 8 x 8 images, the mean over positions, a head of ten classes.

    Kernels are [9 in, out], which is how Muon sees a convolution; by their roles the first one and the head go to AdamW.
    """
    from flax import nnx
    from jax import numpy as jnp

    class Digits(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            sizes = [1, *channels]
            self.kernels = nnx.List([])
            for place, (inner, outer) in enumerate(zip(sizes, sizes[1:], strict=False)):
                value = rngs.params.normal((9 * inner, outer)) * math.sqrt(2 / (9 * inner))
                role = "matrix" if place else "table"  # a first convolution is no matrix to Muon, and stands with layer 0
                self.kernels.append(
                    nnx.Param(value, role=role, axes=("embed", "mlp"), **({"positions": (place,)} if place else {}))
                )
            self.head = nnx.Param(jnp.zeros((channels[-1], 10)), role="head", axes=("embed", "vocab"))

    return Digits(nnx.Rngs(seed))


def digits_logits(params, images, cut: int):
    """[B, 8, 8, 1] to [B, 10]; layers below `cut` get no gradient, so that the backward pass ends there."""
    import jax
    from jax import lax
    from jax import numpy as jnp

    h = images
    for place in sorted(params["kernels"]):
        flat = params["kernels"][place]
        kernel = flat.reshape(3, 3, -1, flat.shape[-1])
        stride = 1 if place == 0 else 2
        h = lax.conv_general_dilated(h, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        h = jax.nn.relu(h)
        h = h / jnp.sqrt(jnp.mean(jnp.square(h), axis=(1, 2, 3), keepdims=True) + 1e-6)
        if place + 1 == cut:
            h = lax.stop_gradient(h)
    return jnp.mean(h, axis=(1, 2)) @ params["head"]


def digits(run, *, channels, batch: int, steps: int, every: int, learning_rate: float, rest: dict, sampling=None) -> None:
    """Train on scikit-learn's digits. Rows `train` are of the training set, with seconds a step; `val` of the test set."""
    import time

    import jax
    import numpy as np
    import optax
    from flax import nnx
    from jax import numpy as jnp
    from sklearn.datasets import load_digits

    import optim

    source = load_digits()
    order = np.random.default_rng(0).permutation(len(source.target))  # one split for every seed
    images, labels = (source.images / 8 - 1)[order, ..., None].astype(np.float32), source.target[order].astype(np.int32)
    train, test = (images[360:], labels[360:]), (images[:360], labels[:360])
    model = digits_network(channels, run.seed)
    direction = {"name": "muon", "learning_rate": learning_rate, "rest": rest}
    config = {"direction": direction, "schedule": {"name": "constant"}, "clip_norm": None}
    config |= {"sampling": sampling} if sampling else {}
    transformation, cuts = (make(config, model, steps=steps) for make in (optim.build, optim.cuts))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def objective(params, x, y, cut):
        logits = digits_logits(params, x, cut)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss, jnp.mean(jnp.argmax(logits, -1) == y)

    def update(params, state, x, y, cut):
        gradients, _ = jax.grad(objective, has_aux=True)(params, x, y, cut)
        how = {} if cuts is None else {"cut": cut}
        updates, state = transformation.update(gradients, state, params, **how)
        return optax.apply_updates(params, updates), state

    score = jax.jit(lambda params, x, y: objective(params, x, y, 0))
    state = transformation.init(params)
    batch = min(batch, len(train[0]))
    shapes = (params, state, train[0][:batch], train[1][:batch])
    firsts = (0,) if cuts is None else cuts.first
    compiled = {cut: jax.jit(update, static_argnums=4).lower(*shapes, cut).compile() for cut in firsts}
    draw, seconds, last = np.random.default_rng([run.seed, 1]), 0.0, 0
    for step in range(1, steps + 1):
        rows = draw.choice(len(train[0]), batch, replace=False)
        x, y = train[0][rows], train[1][rows]
        cut = 0 if cuts is None else cuts.cut(step, run.seed)
        begin = time.perf_counter()
        params, state = jax.block_until_ready(compiled[cut](params, state, x, y))
        seconds += time.perf_counter() - begin
        if step % every == 0 or step == steps:
            for split, (x, y) in (("train", train), ("val", test)):
                loss, right = score(params, x, y)
                timing = {"step_seconds": seconds / (step - last)} if split == "train" else None
                run.write(step, split, loss=float(loss), accuracy=float(right), timing=timing)
            seconds, last = 0.0, step


def image_arms() -> list[Arm]:
    """Muon and Drop-Muon over the three convolutions, each a bucket."""
    requires = {"sklearn": "pip install 'strata-lm[images]'"}
    where = {"measure": "experiments.drop_muon:digits", "part": 2, "minutes": {"laptop": 0.15}, "requires": requires}
    rest = {"name": "adamw", "learning_rate": 1e-2, "weight_decay": 0.0}
    arms = []
    for words, rate in IMAGE_RATES.items():
        for name, distribution in (("muon", None), ("drop, uniform", "uniform"), ("drop, shifted", "shifted")):
            sampled = {"sampling": {"name": "drop_muon", "buckets": 3, "distribution": distribution}} if distribution else {}
            changes = {"rest": rest, "learning_rate": rate, **sampled}
            arms.append(Arm(f"images: {name}, {words}", changes, by_scale={"paper": {"learning_rate": 5 * rate / 8}}, **where))
    return arms


def get_experiment() -> Experiment:
    """Text: three headline arms; images as the paper."""
    tune = Tuning(space=axis(RATE, [0.01, 0.02, 0.04]), scales=["laptop"])
    more = {scale: schedule(round(CEILING * steps)) for scale, steps in STEPS.items()}
    fewer = {scale: schedule(round(steps / CEILING)) for scale, steps in STEPS.items()}
    text_shape = {"model.layers": LAYERS, "optimizer.direction": MUON}

    def to_loss(scale: str, kind: str) -> Metric:
        """Seconds, or steps, to the loss that Muon has after half of its steps."""
        return Metric(kind=kind, target="muon", at=STEPS[scale] // 2)

    claims = [
        Claim(
            statement="At equal work Drop-Muon ends lower than Muon",
            source=PAPER,
            arm="drop, equal work",
            against="muon",
            rule=Rule(effect=0.02),
        ),
        Claim(
            statement="Drop-Muon ends lower than Muon with the steps that its work pays for",
            source="the control of equal work, not in the paper",
            arm="drop",
            against="muon, fewer steps",
            rule=Rule(effect=0.02),
        ),
        Claim(
            statement="Uniform draws end lower than draws that favour deep cuts",
            source="arXiv:2510.02239, appendix G.1: deep cuts are worse [R]",
            arm="drop",
            against="drop, deep",
            rule=Rule(effect=0.02),
        ),
        Claim(
            statement="Uniform draws end lower than draws that shift from early cuts to late ones",
            source="both are in arXiv:2510.02239 [R]; which is better was not read",
            arm="drop",
            against="drop, shifted",
            rule=Rule(effect=0.02),
        ),
    ]
    for scale in STEPS:
        claims += [
            Claim(
                statement=f"Drop-Muon needs at most {CEILING:.2f} times Muon's steps to that loss: the work is no more",
                source="the ceiling of optim.cuts [C]; no steps in the paper's abstract",
                arm="drop",
                against="muon",
                metric=to_loss(scale, "steps_to"),
                rule=Rule(at_most_worse=CEILING - 1, relative=True),
                scales=[scale],
            ),
            Claim(
                statement="Drop-Muon is sooner at the loss that Muon has after half of its steps",
                source=PAPER,
                arm="drop",
                against="muon",
                metric=to_loss(scale, "seconds_to"),
                rule=Rule(effect=2.0),
                paper_setting="1.4 times, to equal training accuracy on images",
                scales=[scale],
            ),
        ]
    accuracy = Metric("accuracy", split="train", kind="seconds_to", target=0.99, lower_is_better=False)
    final = Metric("accuracy", split="val", lower_is_better=False)
    reviewers = "not claimed in arXiv:2510.02239; reviewers saw it often lower [R]"
    for words in IMAGE_RATES:
        for statement, source, metric, effect in (
            ("Drop-Muon is sooner at 99 % of the training set", PAPER, accuracy, 0.05),
            ("Drop-Muon ends at a higher test accuracy", reviewers, final, 0.005),
        ):
            claims.append(
                Claim(
                    statement=f"Images, {words}: {statement}",
                    source=source,
                    arm=f"images: drop, uniform, {words}",
                    against=f"images: muon, {words}",
                    metric=metric,
                    rule=Rule(effect=effect),
                    paper_setting="1.4 times, to equal training accuracy",
                )
            )
    # The paper's batch is an eighth of its data.
    cnn = {"channels": [64, 128, 256], "batch": 192, "every": 2, "steps": 120}
    return Experiment(
        name="drop_muon",
        question="Does updating a random suffix of the layers reach a loss in less time than Muon, on text and on images?",
        config="configs/tiny.py",
        arms=[
            Arm("muon", tune=tune),
            Arm("drop", DROP, tune=tune),
            Arm("drop, equal work", DROP, by_scale=more, tune=tune, control="as many more steps as a cheaper step pays for"),
            Arm("muon, fewer steps", by_scale=fewer, tune=tune, part=2, control="Muon with the work of Drop-Muon's steps"),
            *(
                Arm(name, {"optimizer.sampling": DROP["optimizer.sampling"] | drawn}, tune=tune, part=2)
                for name, drawn in (("drop, deep", DEEP), ("drop, shifted", {"distribution": "shifted"}))
            ),
            *image_arms(),
        ],
        scales={
            "smoke": Scale(
                seeds=2,
                changes=text.SMOKE | text_shape | schedule(STEPS["smoke"]),
                arguments=cnn | {"channels": [4, 8, 8], "batch": 32, "steps": 6},
                minutes=0.2,
            ),
            "laptop": Scale(
                seeds=5,
                changes=text.LAPTOP | text.shape(96, LAYERS, 3) | text_shape | schedule(STEPS["laptop"]),
                arguments=cnn | {"channels": [32, 64, 128]},
                minutes=1.6,
                note="8 layers of width 96 on bytes of the standard library, 400 steps of 8 x 128, one run at a time; digits",
            ),
            "gpu": Scale(seeds=3, changes=text.GPU | text_shape | schedule(STEPS["gpu"]), arguments=cnn, minutes=0.8),
            "paper": Scale(
                seeds=5,
                changes=text.corpus("openwebtext", batch_size=512, sequence_length=1024, micro_batches=4)
                | text.shape(768, LAYERS, 12)
                | {"optimizer.direction": MUON}
                | schedule(STEPS["paper"]),
                arguments=cnn,
                vocabulary=50_304,
                note="the paper's channels, on digits in place of MNIST; text at about the size that its revision names",
            ),
        },
        also=[Metric("timing.step_seconds", split="train", at="median", unit="s"), final],
        claims=claims,
    )
