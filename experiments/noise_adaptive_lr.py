"""LANTON (arXiv:2510.14009): smaller rates for layers with noisier gradients, on an LMO optimizer, against Muon and D-Muon.

    python -m trainer.sweep experiments/noise_adaptive_lr.py --scale smoke     minutes
    python -m trainer.sweep experiments/noise_adaptive_lr.py --part 1          laptop, the headline: D-Muon, LMO, LANTON
    python -m trainer.sweep experiments/noise_adaptive_lr.py                   laptop, with part 2
    python -m trainer.report experiments/noise_adaptive_lr.py

The claims: D-Muon's loss after 30 B tokens with 20 B on LLaMA 1.1 B, "1.5 times" [2nd], at about 4 % more time [2nd, quoting
appendix H]. The paper was rejected (2, 4, 8, 4 [2nd]); reviewers: the advantage is mainly early, the 1.5 compares different
schedules, the two noise estimators are never compared. No code is public, and several constants here are recalled or chosen
(docs/lanton.md).

"About 4 %" is tested as at most 8 %, so that 4 % can be told from the limit.

Controls: every headline arm has its rate tuned over a grid of equal length; Muon's has one rate more above, which its arm with
LANTON wants. `lmo` is LANTON's own base with one rate for all,
without which a gain over Muon could be the base's (signs for embeddings, no AdamW). Both estimators: the difference to the last
gradient, which also sees the drift, and to an independent one. `lanton, paper's interval` measures at every update. Muon with
the same layerwise rates shows whether they help on another base. Against the claim would count: `lmo` as low as LANTON, or
D-Muon as low at the same tuned effort.
"""

from experiments import text
from trainer.sweep import Arm, Claim, Experiment, Metric, Rule, Scale, Tuning, axis

RATE = "optimizer.direction.learning_rate"
LMO = {"name": "lmo", "learning_rate": 0.01}
REST = {"name": "adamw", "learning_rate": 3e-3, "weight_decay": 0.0}
MUON = {"name": "muon", "learning_rate": 0.02, "rest": REST}
D_MUON = {"name": "muon", "learning_rate": 3e-3, "scaling": "moonlight", "weight_decay": 0.1, "rest": REST}
"""Moonlight's form, with the rate of AdamW (arXiv:2502.16982)."""


def lanton(**changes) -> dict:
    """The layerwise rate on its own base."""
    return {"optimizer.direction": LMO, "optimizer.layerwise": {"name": "lanton", **changes}}


def schedule(steps: int) -> dict:
    """Cosine (recalled, low confidence); the multipliers of layerwise rates in the rows twelve times a run."""
    cosine = {"name": "cosine", "warmup": max(1, steps // 20)}
    shown = {"diagnostics.every": max(1, steps // 12), "diagnostics.names": ["multipliers"]}
    return {"train.steps": steps, "optimizer.schedule": cosine, **shown}


def get_experiment() -> Experiment:
    """Three headline arms."""
    lmo = Tuning(space=axis(RATE, [0.005, 0.01, 0.02, 0.04]), scales=["laptop"])
    moonlight = Tuning(space=axis(RATE, [1e-3, 3e-3, 1e-2, 3e-2]), scales=["laptop"])
    muon = Tuning(space=axis(RATE, [0.005, 0.01, 0.02, 0.04, 0.08]), scales=["laptop"])
    steps = Metric(kind="steps_to", target="d-muon", at="best")
    seconds = Metric(kind="seconds_to", target="d-muon", at="best")
    each = Metric("timing.step_seconds", split="train", at="median", unit="s")
    independent = "the theory's noise, at the cost of halved batches"

    def lower(arm: str, against: str, source: str, **rest) -> Claim:
        statement = f"{arm} ends lower than {against}"
        return Claim(statement=statement, source=source, arm=arm, against=against, rule=Rule(effect=0.015), **rest)

    return Experiment(
        name="noise_adaptive_lr",
        question="Do rates by a layer's gradient noise beat a tuned D-Muon, and their own base with one rate?",
        config="configs/tiny.py",
        arms=[
            Arm("d-muon", {"optimizer.direction": D_MUON}, tune=moonlight),
            Arm("lmo", {"optimizer.direction": LMO}, tune=lmo, control="LANTON's base with one rate for all"),
            Arm("lanton", lanton(), tune=lmo),
            Arm("muon", {"optimizer.direction": MUON}, tune=muon, part=2),
            Arm("lanton, independent", lanton(estimator="independent"), tune=lmo, part=2, control=independent),
            Arm("lanton, paper's interval", lanton(interval=1), part=2, control="noise measured at every update"),
            Arm("lanton, half the power", lanton(power=0.25), part=2, control="the exponent, which is recalled"),
            Arm(
                "muon, lanton", lanton() | {"optimizer.direction": MUON}, tune=muon, part=2, control="the rates on another base"
            ),
        ],
        scales={
            "smoke": Scale(seeds=2, changes=text.SMOKE | schedule(12), minutes=0.15),
            "laptop": Scale(
                seeds=5,
                changes=text.LAPTOP | schedule(500),
                minutes=1.4,
                note="4 layers of width 128 on bytes of the standard library, 500 steps of 8 x 128, one run at a time",
            ),
            "gpu": Scale(seeds=3, changes=text.GPU | schedule(800), minutes=0.8),
            "paper": Scale(
                seeds=3,
                changes=text.corpus("c4", batch_size=512, sequence_length=2048, micro_batches=8)
                | text.shape(2048, 22, 32, 5632)
                | schedule(28_600),
                vocabulary=32_000,
                note="about LLaMA 1.1 B over 30 B tokens of C4; batch and rates are not known",
            ),
        },
        also=[steps, seconds, each],
        claims=[
            lower("lanton", "d-muon", "arXiv:2510.14009 [2nd]"),
            Claim(
                statement="lanton reaches d-muon's best loss in fewer steps",
                source="arXiv:2510.14009: 30 B tokens against 20 B [2nd]",
                arm="lanton",
                against="d-muon",
                metric=steps,
                rule=Rule(effect=50),
                paper_setting="LLaMA 1.1 B on C4: 1.5 times",
            ),
            lower("lanton", "muon", "arXiv:2510.14009 [2nd]"),
            lower("lanton", "lmo", "the control of the base, not in what was read of the paper"),
            lower("lanton, independent", "lanton", "the comparison of estimators that a reviewer missed [2nd]"),
            lower("muon, lanton", "muon", "the control of another base, not in what was read of the paper"),
            *(
                Claim(
                    statement=f"a step of {arm} takes at most 8 % more time than one of d-muon",
                    source="arXiv:2510.14009, appendix H: about 4 % [2nd]",
                    arm=arm,
                    against="d-muon",
                    metric=each,
                    rule=Rule(at_most_worse=0.08, relative=True),
                    paper_setting="about 4 % more, the noise measured at every step; that of `lanton` at every tenth",
                )
                for arm in ("lanton", "lanton, paper's interval")
            ),
        ],
    )
