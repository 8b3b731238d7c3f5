"""The recipe of `configs/tiny.py`: AdamW, Muon, and every layerwise rate at equal tokens, each with its own tuned rate.

    python -m trainer.sweep experiments/recipes.py --scale smoke     minutes
    python -m trainer.sweep experiments/recipes.py --part 1          laptop, the headline: AdamW, Muon, Muon with LLR
    python -m trainer.sweep experiments/recipes.py --part 2          and the other layerwise rates
    python -m trainer.sweep experiments/recipes.py                   and, part 3, a control of LLR
    python -m trainer.report experiments/recipes.py

No paper is re-run here: the question is which recipe the project's first config should have, and the table is what a user
compares with. The laptop runs are `configs/tiny.py` itself, all 4.1 M bytes of it, scored on all held-out files. The controls:
every arm has its rate of matrices tuned over three or four values, a factor of two apart, on a seed that the comparison does
not use, and grids were made longer where a choice was at their edge; a multiplier of 1 to 5 (LLR) starts its grid lower, one of
at most 1 (LANTON) higher, so that none wins by larger rates of matrices alone. The rate of everything else under Muon, 3e-3, is
not tuned, and LLR as released multiplies that of embedding and head by 5; `muon, llr, ends at least` leaves it.
Each layerwise rate is compared with the direction that it multiplies. Multipliers measure every 100 updates, a tenth of a run.
"""

from experiments import text
from trainer.sweep import Arm, Claim, Experiment, Metric, Rule, Scale, Tuning, axis

RATE = "optimizer.direction.learning_rate"
ADAMW = {"name": "adamw", "learning_rate": 3e-3, "weight_decay": 0.1}
MUON = {"name": "muon", "learning_rate": 0.02, "rest": {"name": "adamw", "learning_rate": 3e-3, "weight_decay": 0.0}}


def arms() -> list[Arm]:
    """Two directions, and the rates by layer on the one that each is meant for."""

    def grid(*rates: float) -> Tuning:
        return Tuning(space=axis(RATE, list(rates)), scales=["laptop"])

    def layerwise(name: str, direction: dict, **fields) -> dict:
        return {"optimizer.direction": direction, "optimizer.layerwise": {"name": name, **fields}}

    small = {"smoke": {"optimizer.layerwise.smallest": 8}}
    return [
        Arm("adamw", {"optimizer.direction": ADAMW}, tune=grid(3e-3, 6e-3, 1.2e-2)),
        Arm("muon", {"optimizer.direction": MUON}, tune=grid(0.01, 0.02, 0.04, 0.08)),
        Arm("muon, llr", layerwise("llr", MUON), tune=grid(0.0025, 0.005, 0.01, 0.02), by_scale=small),
        Arm(
            "muon, llr, ends at least",
            layerwise("llr", MUON, outer="least"),
            tune=grid(0.0025, 0.005, 0.01, 0.02),
            by_scale=small,
            part=3,
            control="is it the rate of embedding and head?",
        ),
        Arm(
            "muon, temp balance",
            layerwise("temp_balance", MUON, interval=100),
            tune=grid(0.01, 0.02, 0.04),
            by_scale=small,
            part=2,
        ),
        Arm("muon, lanton", layerwise("lanton", MUON), tune=grid(0.02, 0.04, 0.08, 0.16), part=2),
        Arm(
            "adamw, alpha decay",
            layerwise("alpha_decay", ADAMW, interval=100),
            tune=grid(3e-3, 6e-3, 1.2e-2),
            by_scale=small,
            part=2,
        ),
    ]


def get_experiment() -> Experiment:
    """Three headline arms."""

    def lower(arm: str, against: str, source: str) -> Claim:
        statement = f"{arm} ends lower than {against}"
        return Claim(statement=statement, source=source, arm=arm, against=against, rule=Rule(effect=0.02))

    each = Metric("timing.step_seconds", split="train", at="median", unit="s")
    return Experiment(
        name="recipes",
        question="Which recipe ends lowest on configs/tiny.py at equal tokens, each with its own tuned rate?",
        config="configs/tiny.py",
        arms=arms(),
        scales={
            "smoke": Scale(seeds=2, changes=text.SMOKE, minutes=0.15),
            "laptop": Scale(
                seeds=3,
                changes=text.QUIET,
                slots=2,
                minutes=4.5,
                note="configs/tiny.py as it is, 1,000 steps of 16 x 256 bytes, scored on all held-out files",
            ),
            "gpu": Scale(seeds=3, changes=text.GPU, minutes=0.8),
        },
        metric=Metric("bpb", unit="bits per byte"),
        also=[each],
        claims=[
            lower("muon", "adamw", "configs/tiny.py, one run each at rates that were not tuned [measured here]"),
            lower("muon, llr", "muon", "arXiv:2605.22297, abstract: also with Muon; perplexities not found"),
            lower("muon, temp balance", "muon", "arXiv:2312.00359, whose direction is not Muon"),
            lower("muon, lanton", "muon", "arXiv:2510.14009, whose base is an LMO of its own [2nd]"),
            lower("adamw, alpha decay", "adamw", "arXiv:2506.14562, README: 23.32 to 22.66 at 135 M on C4 [readme]"),
        ],
    )
