"""Mix-LN (Li et al. 2024, arXiv:2412.13795): post-LN in the first quarter of the layers and pre-LN after them.

    python -m trainer.sweep experiments/mix_ln.py --scale smoke            two minutes
    python -m trainer.sweep experiments/mix_ln.py --part 1                 laptop, the headline: pre, Mix-LN, LayerNorm Scaling
    python -m trainer.sweep experiments/mix_ln.py                          laptop, with part 2: placements, alpha, controls
    python -m trainer.report experiments/mix_ln.py

The claim: Mix-LN ends lower than pre-LN, post-LN, DeepNorm and sandwich at equal rates, from 71 M to 1 B parameters [table]:
perplexity 34.77 to 33.12 at 71 M (0.049 nats), 18.65 to 18.18 at 1 B (0.026); alpha = 1/4 is best and 1 diverges. Against it:
the authors of LayerNorm Scaling, of the same group, report Mix-LN diverging at 350 M and 1 B in longer runs [table], and the
paper's own table of initial scales, where the gain falls from 0.072 nats to 0.028 once projections that write to the stream
start smaller by sqrt(2 L), and to nothing with a scaled embedding too [table].

Controls: the peak rate of every arm is tuned on a seed that the comparison does not use. `scaled` shrinks every projection into
the stream, those of post-LN layers too, where the released code leaves these out [code]. As in the paper, every projection
starts normal; `scaled` and this framework's zero start are arms, as the paper's gain may be one of initial scale. LNS and peri
are the rivals that came after. DeepNorm is the paper's, not the baseline of Mix-LN's released code, which multiplies where it
should divide. Against the claim would count: pre-LN with its own best rate as low as Mix-LN, or `pre, scaled` as low.

Rows of diagnostics hold gradient norms and angular distances by layer: the report draws them, `python -m trainer.inspect --run
RUN` draws more. A deep narrow model, since in four layers there is one post-LN block.
"""

from experiments import text
from trainer.sweep import Arm, Claim, Experiment, Metric, Rule, Scale, Tuning, axis

RATE = "optimizer.direction.learning_rate"
NORMAL = {"model.output_init": "normal"}
RECIPE = NORMAL | {
    # As in the released scripts: Adam, no weight decay, warm-up over a tenth, cosine to a tenth, no clipping.
    "optimizer.direction": {"name": "adamw", "learning_rate": 3e-3, "weight_decay": 0.0, "b2": 0.999},
    "optimizer.clip_norm": None,
    "diagnostics.names": ["gradient_norm", "angular_distance", "stream"],
}


# What the paper's models have and those of the smaller scales do not.
PAPER = {"model.mixer.qk_norm": False, "model.embedding_std": 0.632}


def schedule(steps: int) -> dict:
    """The scale's length, warm-up over a tenth of it and four rows of diagnostics."""
    cosine = {"name": "cosine", "warmup": max(1, steps // 10), "final": 0.1}
    return {"train.steps": steps, "optimizer.schedule": cosine, "diagnostics.every": steps // 4}


def placement(name: str, **rest) -> dict:
    """Changes for a placement."""
    return {"model.placement": {"name": name, **rest}}


def get_experiment() -> Experiment:
    """Three headline arms, then every placement, alpha, and what the initial scales do."""
    tune = Tuning(space=axis(RATE, [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]), scales=["laptop"])
    source = "arXiv:2412.13795, table of perplexities [table]"
    setting = "71 M parameters, 1.1 B tokens of C4"
    paper = text.corpus("c4", batch_size=512, sequence_length=256)
    return Experiment(
        name="mix_ln",
        question="Does post-LN in the first quarter of the layers, pre-LN after them, end lower than either and later rivals?",
        config="configs/tiny.py",
        arms=[
            Arm("pre", placement("pre"), tune=tune),
            Arm("mix 1/4", placement("mix", alpha=0.25), tune=tune),
            Arm("lns", placement("lns"), tune=tune, control="a later rival without a regime of its own"),
            Arm("post", placement("post"), tune=tune, part=2),
            Arm("deepnorm", placement("deepnorm"), tune=tune, part=2),
            Arm("sandwich", placement("sandwich"), tune=tune, part=2),
            Arm("peri", placement("peri"), tune=tune, part=2, control="a later rival"),
            Arm("mix 1/12", placement("mix", alpha=1 / 12), tune=tune, part=2),
            Arm("mix 1/2", placement("mix", alpha=0.5), tune=tune, part=2),
            Arm("pre, scaled", {"model.output_init": "scaled"}, tune=tune, part=2, control="is it the initial scale?"),
            Arm(
                "mix 1/4, scaled",
                placement("mix", alpha=0.25) | {"model.output_init": "scaled"},
                tune=tune,
                part=2,
                control="is it the initial scale?",
            ),
            Arm("pre, zero", {"model.output_init": "zero"}, tune=tune, part=2, control="this framework's own start"),
        ],
        scales={
            # Six layers: a twelfth of four is none.
            "smoke": Scale(seeds=2, changes=text.SMOKE | {"model.layers": 6} | RECIPE | schedule(12), minutes=0.15),
            "laptop": Scale(
                seeds=5,
                changes=text.LAPTOP | text.shape(64, 12, 2) | RECIPE | schedule(600),
                slots=2,
                minutes=2.5,
                note="12 layers of width 64 on bytes of the standard library, 600 steps of 8 x 128",
            ),
            "gpu": Scale(
                seeds=3,
                changes=text.GPU | text.shape(256, 24, 4) | RECIPE | schedule(700),
                minutes=0.8,
                note="24 layers of width 256; in pieces: --part 1 --stop_after 8",
            ),
            "paper": Scale(
                seeds=3,
                changes=paper | text.shape(512, 12, 8, 1368) | RECIPE | PAPER | {RATE: 1e-3} | schedule(10_000),
                vocabulary=32_000,
                note="the paper's 71 M model",
            ),
            "paper_1b": Scale(
                seeds=1,
                changes=paper | text.shape(2048, 24, 32, 5461) | RECIPE | PAPER | {RATE: 5e-4} | schedule(100_000),
                vocabulary=32_000,
                note="the paper's 1 B model, where others saw Mix-LN diverge; one seed, so no verdict",
            ),
        },
        metric=Metric(unit="nats/token"),
        also=[Metric("gradient_norm.variation", split="diagnostics"), Metric("stream.growth", split="diagnostics")],
        claims=[
            Claim(
                statement="Mix-LN ends lower than pre-LN",
                source=source,
                arm="mix 1/4",
                against="pre",
                rule=Rule(effect=0.02),
                paper_effect=0.049,
                paper_setting=setting,
            ),
            Claim(
                statement="LayerNorm Scaling ends lower than pre-LN",
                source="arXiv:2502.05795, table of perplexities: 26.73 to 25.76 at 130 M [table]",
                arm="lns",
                against="pre",
                rule=Rule(effect=0.02),
                paper_effect=0.037,
                paper_setting="130 M parameters, 2.2 B tokens of C4",
            ),
            Claim(
                statement="LayerNorm Scaling ends lower than Mix-LN",
                source="arXiv:2502.05795, table of perplexities: 26.07 to 25.76 at 130 M [table]",
                arm="lns",
                against="mix 1/4",
                rule=Rule(effect=0.02),
                paper_effect=0.012,
                paper_setting="130 M parameters, 2.2 B tokens of C4",
            ),
            *(
                Claim(
                    statement=f"Mix-LN ends lower than {name}",
                    source=source,
                    arm="mix 1/4",
                    against=against,
                    rule=Rule(effect=0.02),
                    paper_effect=effect,
                    paper_setting=where,
                )
                for name, against, effect, where in (
                    ("post-LN", "post", 0.060, setting),
                    ("DeepNorm", "deepnorm", 0.051, f"{setting}; their DeepNorm is not the published one"),
                    ("sandwich", "sandwich", 0.041, "250 M parameters, other runs"),
                )
            ),
            Claim(
                statement="Mix-LN ends lower than pre-LN when projections into the stream start scaled down as well",
                source="arXiv:2412.13795, table of initial scales: 30.63 to 29.77 at 130 M, shorter runs [table]",
                arm="mix 1/4, scaled",
                against="pre, scaled",
                rule=Rule(effect=0.02),
                paper_effect=0.028,
                paper_setting="130 M parameters, shorter runs",
            ),
        ],
    )
