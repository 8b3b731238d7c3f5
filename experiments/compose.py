"""What adds up: a part of every kind together, against each alone and against all without it.

    python -m trainer.sweep experiments/compose.py --scale smoke           minutes
    python -m trainer.sweep experiments/compose.py --part 1                laptop, the headline: plain, Muon, all
    python -m trainer.sweep experiments/compose.py                         laptop, with part 2: each alone, each left out
    python -m trainer.report experiments/compose.py

No paper: gains are published one at a time, over baselines that lack the others. `PARTS` names what is put together; each
claims a gain by itself in the experiment of its name. Two questions for each part: does it help a plain model, and does it
still help beside all the others? A part that helps alone and not beside the rest is not worth its complexity there.

Controls: every arm has its rate tuned over a grid, by AdamW or by Muon, since what is put together wants another rate than its
parts: over a first grid of three, all parts together took the smallest rate of Muon, and were 0.09 lower there than at Muon's
own; without LayerNorm Scaling the smallest of four. Parts cost time, so seconds to the plain model's best loss stand beside the
loss. Against "it adds up" would count: all no lower than the best single part, which is taken beforehand to be Muon.
"""

from experiments import text
from trainer.sweep import Arm, Claim, Experiment, Metric, Rule, Scale, Tuning, axis

RATE = "optimizer.direction.learning_rate"
REST = {"name": "adamw", "learning_rate": 3e-3, "weight_decay": 0.0}
GDN = {"name": "gated_delta_net"}
PARTS = {
    "muon": {"optimizer.direction": {"name": "muon", "learning_rate": 0.02, "rest": REST}},
    "lns": {"model.placement": {"name": "lns"}},
    "noble": {"model.linear": {"name": "noble"}},
    "hybrid": {"model.mixer": {"name": "hybrid", "pattern": [GDN, GDN, GDN, {"name": "attention"}]}},
    "llr": {"optimizer.layerwise": {"name": "llr", "interval": 40, "ramp": 20}},
}
RANK = {"smoke": 4, "laptop": 16, "gpu": 48, "paper": 64}
SOURCES = {
    "muon": "Jordan 2024 [P]; experiments/muon_recall.py",
    "lns": "arXiv:2502.05795, table of perplexities [table]; experiments/mix_ln.py",
    "noble": "arXiv:2603.06492, abstract [P]; experiments/noble.py",
    "hybrid": "arXiv:2510.26692, abstract [recalled]; experiments/linear_attention.py",
    "llr": "arXiv:2605.22297, table of the authors' README [readme]; experiments/heavy_tail_lr.py",
}


def together(names) -> dict:
    """The changes of several parts, which touch different components."""
    return {path: value for name in names for path, value in PARTS[name].items()}


def arm(title: str, names, **rest) -> Arm:
    """An arm of these parts; NOBLE's rank follows the scale, and small matrices of the smoke scale are measured too."""
    by_scale = {scale: {"model.linear.rank": rank} for scale, rank in RANK.items()} if "noble" in names else {}
    if "llr" in names:
        by_scale["smoke"] = by_scale.get("smoke", {}) | {"optimizer.layerwise.smallest": 8}
    return Arm(title, together(names), by_scale=by_scale, **rest)


def schedule(steps: int) -> dict:
    """Cosine to zero."""
    return {"train.steps": steps, "optimizer.schedule": {"name": "cosine", "warmup": max(1, steps // 20), "final": 0.0}}


def get_experiment() -> Experiment:
    """Plain, Muon, all; then each alone and each left out."""
    adamw = {"optimizer.direction": {"name": "adamw", "learning_rate": 3e-3}}
    grids = {False: [1e-3, 3e-3, 1e-2, 3e-2], True: [0.0025, 0.005, 0.01, 0.02, 0.04]}
    seconds = Metric(kind="seconds_to", target="plain", at="best")
    single = [name for name in PARTS if name != "muon"]

    def tuned(title: str, names: list[str], **rest) -> Arm:
        return arm(title, names, tune=Tuning(space=axis(RATE, grids["muon" in names]), scales=["laptop"]), **rest)

    def lower(one: str, other: str, source: str, statement: str) -> Claim:
        return Claim(statement=statement, source=source, arm=one, against=other, rule=Rule(effect=0.02))

    return Experiment(
        name="compose",
        question="Do the parts that help alone still help together?",
        config="configs/tiny.py",
        arms=[
            tuned("plain", []),
            tuned("muon", ["muon"]),
            tuned("all", list(PARTS)),
            *(tuned(name, [name], part=2) for name in single),
            *(tuned(f"all but {name}", [other for other in PARTS if other != name], part=2) for name in PARTS),
        ],
        scales={
            "smoke": Scale(seeds=2, changes=text.SMOKE | adamw | schedule(12), minutes=0.3),
            "laptop": Scale(
                seeds=5,
                changes=text.LAPTOP | adamw | schedule(400),
                minutes=1.2,
                note="4 layers of width 128 on bytes of the standard library, 400 steps of 8 x 128, one run at a time",
            ),
            "gpu": Scale(seeds=3, changes=text.GPU | adamw | schedule(700), minutes=0.8),
            "paper": Scale(
                seeds=3,
                changes=text.corpus("fineweb", batch_size=512, sequence_length=1024, micro_batches=4)
                | text.shape(768, 12, 12)
                | adamw
                | schedule(5_200),
                vocabulary=50_304,
                note="a common size of the parts' papers: about 130 M parameters, 2.7 B tokens",
            ),
        },
        also=[seconds, Metric("timing.step_seconds", split="train", at="median", unit="s")],
        claims=[
            lower("muon", "plain", SOURCES["muon"], "Muon alone ends lower than a tuned plain model"),
            lower("all", "muon", "no paper", "All parts together end lower than Muon alone"),
            *(lower(name, "plain", SOURCES[name], f"{name} alone ends lower than a plain model") for name in single),
            *(lower("all", f"all but {name}", "no paper", f"{name} still helps beside all others") for name in PARTS),
        ],
    )
