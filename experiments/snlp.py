"""SNLP (arXiv:2605.17842): the last layers all at once. What speed costs in loss, and what its regulariser does.

    python -m trainer.sweep experiments/snlp.py --scale smoke              minutes
    python -m trainer.sweep experiments/snlp.py --part 1                   laptop, the headline: half of the layers
    python -m trainer.sweep experiments/snlp.py                            laptop, with part 2: more ways, scaled identity
    python -m trainer.report experiments/snlp.py

The claims. First version: the regulariser lowers *sequential* perplexity by 4.7 to 23.4 % (abstract [P]). That was scored on
128-token windows cut out of a stream, where the trained context is 2048; the second version dropped it and re-scored:
sequential perplexity 15.21 to 15.36 at 0.5 B, 17.65 to 17.57 without its embedding tricks, and speed-ups of 1.2 to 2.58 times
that cost 0 to 17 % perplexity at batch 1 [A]. So each measurement scores full contexts and windows of a sixteenth, the authors'
ratio, and the two claims about them stand side by side.

Two kinds of arms: models that are trained, with and without the regulariser, and measurements of those, a way to run the same
weights each: N layers of the suffix, K sweeps, the first estimate, layers merged into one. A measurement times one sequence
against the sequential pass, alternating in one process: `timing.speedup`. Masks are the sequential model's in every way to run
it, which they are not in the released evaluator [A]. `blend` has the learned residual scales of the paper's model, with which
the identity is the wrong correction: the scaled one, an arm of ours, is exact for constant branches [C]. Against the claims
would count: no speed at batch 1, or a regulariser that helps no sweep. On two processor cores layers leave nothing idle, so the
loss of speed there says little of a GPU.
"""

from experiments import text
from trainer.sweep import Arm, Claim, Experiment, Metric, Rule, RunOf, Scale

LAYERS = {"smoke": 8, "laptop": 8, "gpu": 24, "paper": 32}
WINDOW = 16
"""Full contexts over short ones, 2048 / 128."""
V1 = "arXiv:2605.17842v1, abstract: 4.7 to 23.4 % lower perplexity [P]"
V2 = "arXiv:2605.17842v2, README of the released code [A]"


def parallel(share: float, **rest) -> dict:
    """The last `share` of the layers in parallel, by scale."""
    return {scale: {"depth": {"name": "layer_parallel", "layers": round(share * n), **rest}} for scale, n in LAYERS.items()}


WAYS = {  # part 1, then part 2
    "sequential": {scale: {"depth": {"name": "sequential"}} for scale in LAYERS},
    "half, 1 sweep": parallel(1 / 2),
    "half, 2 sweeps": parallel(1 / 2, sweeps=2),
    "quarter, 1 sweep": parallel(1 / 4),
    "three quarters, 2 sweeps": parallel(3 / 4, sweeps=2),
    "half, 1 sweep, batched start": parallel(1 / 2, start="batched"),
    "half, 1 sweep, pairs merged": parallel(1 / 2, fused=2),
}
HEADLINE = 3


def speed_and_loss(measurement, *, run: str, depth: dict, batches: int, rounds: int) -> None:
    """Held-out loss of a finished run in one way to run it, and the time of one sequence against the sequential pass.

    One row: `loss`, `bpb`, `perplexity`; `short`, the same over windows of a sixteenth of the context; `timing.milliseconds`
    and `timing.speedup`, the median ratio of passes that alternate.
    """
    import dataclasses
    import statistics
    import time

    import jax
    from flax import nnx

    from models.transformer import depth_options
    from trainer import load
    from trainer.evaluate import evaluate
    from trainer.setup import assemble

    found = load(run)
    model, config = found.model, found.config
    own = depth_options(depth, model.options)
    length = config.data.sequence_length
    short = max(2, length // WINDOW)
    data = dataclasses.replace(config.data, sequence_length=short, batch_size=config.data.batch_size * (length // short))
    windows = assemble(dataclasses.replace(config, data=data, evaluate=dataclasses.replace(config.evaluate, batch_size=None)))
    scores = []
    for setup in (found.setup, windows):
        with jax.set_mesh(setup.mesh):
            scores.append(evaluate(setup, found.params, setup.jitted_evaluation_step(depth=own), batches))
    graph, state = nnx.split(model)
    tokens = jax.random.randint(jax.random.key(measurement.seed), (1, length), 0, model.vocab_size)
    sequential = depth_options({"name": "sequential"}, model.options)

    def compiled(way):
        return (
            jax.jit(lambda state, tokens: nnx.merge(graph, state).hidden(tokens, depth=way)[0]).lower(state, tokens).compile()
        )

    calls = {"base": compiled(sequential), "own": compiled(own)}
    seconds = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name in calls if number % 2 else reversed(calls):
            begin = time.perf_counter()
            jax.block_until_ready(calls[name](state, tokens))
            if number >= 2:  # the first rounds warm up
                seconds[name].append(time.perf_counter() - begin)
    speedup = statistics.median(base / own for base, own in zip(seconds["base"], seconds["own"], strict=True))
    timing = {"milliseconds": 1e3 * statistics.median(seconds["own"]), "speedup": speedup}
    measurement.write(found.step, **scores[0], short=scores[1], timing=timing)


def measured(weights: str, ways: list[str], **rest) -> list[Arm]:
    """A measurement of an arm's run for every way."""
    how = {"measure": "experiments.snlp:speed_and_loss", "minutes": {"laptop": 0.15, "gpu": 0.15}}
    return [Arm(f"{weights}: {way}", {"run": RunOf(weights)}, by_scale=WAYS[way], **how, **rest) for way in ways]


def arms() -> list[Arm]:
    """Trained models, and ways to run them."""
    # As configs/snlp.py: two compared layers at 0.5, so that the whole weight is about 1, as in the released runs.
    regular = {"name": "layer_parallel", "forward": "sequential", "regularizer": 0.5}
    regularised = {scale: {"model.depth": {**regular, "layers": n // 2, "stride": n // 4}} for scale, n in LAYERS.items()}
    ways = list(WAYS)
    found = [Arm("baseline"), Arm("idn", by_scale=regularised)]
    for weights in ("baseline", "idn"):
        found += measured(weights, ways[:HEADLINE])
        found += measured(weights, ways[HEADLINE:], part=2)
    found.append(
        Arm("blend", {"model.placement": {"name": "blend"}}, part=2, control="the residual scales of the paper's model")
    )
    found += measured("blend", ["sequential", "half, 1 sweep"], part=2)
    scaled = parallel(1 / 2, correction="scaled")
    name = "blend: half, 1 sweep, scaled identity"
    found.append(
        Arm(
            name,
            {"run": RunOf("blend")},
            measure="experiments.snlp:speed_and_loss",
            by_scale=scaled,
            part=2,
            minutes={"laptop": 0.15},
        )
    )
    return found


def schedule(steps: int) -> dict:
    """Constant, then down to zero over the last half, about as in the released runs."""
    return {"train.steps": steps, "optimizer.schedule": {"name": "wsd", "warmup": max(1, steps // 25), "decay": 0.5}}


def get_experiment() -> Experiment:
    """Two trained arms and their measurements."""
    muon = {"optimizer.direction": {"name": "muon", "learning_rate": 0.02, "rest": {"name": "adamw", "learning_rate": 3e-3}}}
    short = Metric("short.loss", unit="nats/token, windows of a sixteenth")
    speedup = Metric("timing.speedup", lower_is_better=False, unit="over sequential")
    half, full = "half, 1 sweep", "sequential"
    half_billion = text.shape(640, 32, 5) | {"model.ffn": {"name": "relu2"}}
    return Experiment(
        name="snlp",
        question="What does running half of the layers at once cost, does it gain time, and what does the regulariser do?",
        config="configs/tiny.py",
        arms=arms(),
        scales={
            "smoke": Scale(
                seeds=2,
                changes=text.SMOKE | {"model.layers": LAYERS["smoke"]} | muon | schedule(8),
                arguments={"batches": 1, "rounds": 3},
                minutes=0.25,
            ),
            "laptop": Scale(
                seeds=5,
                changes=text.LAPTOP
                | text.shape(96, LAYERS["laptop"], 3)
                | muon
                | {"data.sequence_length": 256, "data.batch_size": 4, "evaluate.batch_size": 8}
                | schedule(400),
                arguments={"batches": 16, "rounds": 30},
                minutes=2.2,
                note="8 layers of width 96, contexts of 256 bytes against windows of 16; one run at a time",
            ),
            "gpu": Scale(
                seeds=3,
                changes=text.GPU
                | text.shape(384, LAYERS["gpu"], 6)
                | muon
                | {"data.batch_size": 32, "data.sequence_length": 1024}
                | schedule(800),
                arguments={"batches": 8, "rounds": 50},
                minutes=0.8,
                note="24 layers of width 384; in pieces: --part 1 --stop_after 8",
            ),
            "paper": Scale(
                seeds=3,
                changes=text.corpus("climbmix", batch_size=256, sequence_length=2048, micro_batches=8)
                | half_billion
                | muon
                | schedule(4800),
                arguments={"batches": 256, "rounds": 150},
                vocabulary=32_768,
                note="the paper's 0.5 B model without embedding tricks: 157 M parameters in 32 blocks, 2.5 B tokens",
            ),
        },
        also=[short, speedup, Metric("timing.milliseconds", unit="ms")],
        claims=[
            Claim(
                statement="The regulariser lowers the sequential loss on short windows",
                source=V1,
                arm=f"idn: {full}",
                against=f"baseline: {full}",
                metric=short,
                rule=Rule(effect=0.02),
                paper_effect=0.048,
                paper_setting="0.5 B and 3 B, windows of 128 tokens: 4.7 to 23.4 %",
            ),
            Claim(
                statement="The regulariser lowers the sequential loss at full context",
                source=f"{V1}; dropped in v2, where it moved by -0.5 to +2.4 % [A]",
                arm=f"idn: {full}",
                against=f"baseline: {full}",
                rule=Rule(effect=0.02),
                paper_effect=0.005,
                paper_setting="0.5 B without embedding tricks, v2: 17.65 to 17.57",
            ),
            Claim(
                statement="With the regulariser one sweep over half of the layers ends lower",
                source="arXiv:2605.17842, the authors' notes, 128-token windows: 1734 to 76 at 8 of 32 layers; 4873 at 16 [A]",
                arm=f"idn: {half}",
                against=f"baseline: {half}",
                rule=Rule(effect=0.02),
            ),
            Claim(
                statement="A second sweep over half of the layers lowers the loss",
                source=V2,
                arm="idn: half, 2 sweeps",
                against=f"idn: {half}",
                rule=Rule(effect=0.01),
            ),
            Claim(
                statement="One sweep over half of the layers takes less time than the sequential pass at batch 1",
                source=f"{V2}: 1.6 times at N = 16 of 32, HCN",
                arm=f"idn: {half}",
                against=f"idn: {full}",
                metric=speedup,
                rule=Rule(effect=0.1),
                paper_effect=0.6,
                paper_setting="0.5 B, one sequence of 2048 tokens on a GPU",
            ),
            Claim(
                statement="With learned residual scales the scaled identity ends lower than the identity",
                source="exact for constant branches [C]; no run in the paper",
                arm="blend: half, 1 sweep, scaled identity",
                against="blend: half, 1 sweep",
                rule=Rule(effect=0.01),
            ),
        ],
    )
