"""Relaxed recursive transformers (Bae et al. 2024, arXiv:2410.20672): half the layers of a trained model, looped twice, and
relaxed.

    python -m trainer.sweep experiments/relaxed_recursive.py --scale smoke     minutes
    python -m trainer.sweep experiments/relaxed_recursive.py --part 1          laptop, the headline and its donors
    python -m trainer.sweep experiments/relaxed_recursive.py                   laptop, with part 2: starts, ranks, teacher
    python -m trainer.report experiments/relaxed_recursive.py

The claims, on Gemma 2B uptrained with 15 or 60 B tokens of SlimPajama: a looped half started from the donor beats a model of
its own size from scratch by up to 13.5 points of few-shot accuracy [2nd]; low-rank matrices close most of the gap to the full
size, 58.4 against 58.6 at rank 512 [table, 2nd]; starting them by SVD beats zero by up to 6.5 points [2nd]; stepwise is the
start for plain loops, average for relaxed ones [table]; distillation from the full model helps (figure). Accuracy there, loss
here.

Every arm continues from the donor of its own seed, which the sweep trains first. Controls: `same size` has the looped model's
blocks once, from scratch, distilled as in the paper, with the updates of donor and uptraining together; `full size, trained on`
is the donor with the same further updates, the ceiling; `random layers` and `fresh` say what the donor's weights are worth.

Each claim about two looped arms compares arms that differ in one thing; `same size`, also at another rate, and `full size,
trained on` are other models at equal updates. The paper's plain loops, `recursive`, differ from `relaxed` in start,
norms and low-rank matrices, so that the headline holds `relaxed` against `recursive, own norms`, which lacks the matrices
alone; part 2 takes the norms away (`recursive, average`), then changes the start (`recursive`). Distillation is taken from
both kinds. Against the claims would count: `same size` as low as the relaxed model, or zero adapters as low as SVD.
"""

from experiments import text
from trainer.sweep import Arm, Claim, Experiment, Metric, Rule, RunOf, Scale

PAPER = "arXiv:2410.20672"
DONOR = "full size"
LAYERS = {"smoke": 4, "laptop": 8, "gpu": 12, "paper": 18}
STEPS = {"smoke": (8, 6), "laptop": (400, 300), "gpu": (600, 400), "paper": (14_300, 14_300)}
"""Of the donor, and of uptraining. The paper's donors are released models of up to 3 T tokens, not trained again here."""
RANK = {"smoke": 4, "laptop": 16, "gpu": 48, "paper": 512}
LOOPS = 2


def adamw(rate: float, steps: int) -> dict:
    """The paper's optimizer, rate and batch are not known."""
    return {
        "train.steps": steps,
        "optimizer.direction": {"name": "adamw", "learning_rate": rate},
        "optimizer.schedule": {"name": "cosine", "warmup": max(1, steps // 20)},
    }


def looped(
    name: str,
    convert: str | None,
    share: float = 0.0,
    *,
    adapters: str = "svd",
    teacher: bool = True,
    own_norms: bool | None = None,
    **rest,
) -> Arm:
    """A looped model: `share` of the scale's rank, 0 for plain loops; started from the donor unless `convert` is None.

    `own_norms`: every depth has norms of its own; None: relaxed models have, plain loops have not.
    """
    start = {"train.teacher.run": RunOf(DONOR)} if teacher else {}
    if convert is not None:
        conversion = {"name": "looped", "initial": convert, "adapters": adapters}
        start |= {"init_from.run": RunOf(DONOR), "init_from.convert": conversion}
    by_scale = {}
    for scale, (_, steps) in STEPS.items():
        rank = round(share * RANK[scale])
        share_norms = not rank if own_norms is None else not own_norms
        depth = {"name": "recursive", "loops": LOOPS, "rank": rank, "share_norms": share_norms}
        by_scale[scale] = {"model.depth": depth, **adamw(1e-3, steps)}
    return Arm(name, start, by_scale=by_scale, **({"part": 2} | rest))


def arms() -> list[Arm]:
    """Donor and headline, then the ablations."""
    onward = {scale: adamw(1e-3, steps) for scale, (_, steps) in STEPS.items()}
    whole = {scale: adamw(3e-3, sum(steps)) for scale, steps in STEPS.items()}
    small = {scale: whole[scale] | {"model.layers": layers // LOOPS} for scale, layers in LAYERS.items()}
    distilled = {"train.teacher.run": RunOf(DONOR)}
    return [
        Arm(DONOR, by_scale={scale: adamw(3e-3, steps) for scale, (steps, _) in STEPS.items()}, control="donor and teacher"),
        looped("relaxed", "average", 1, part=1),
        looped("recursive, own norms", "average", own_norms=True, part=1, control="the relaxed model without its matrices"),
        Arm("same size", distilled, by_scale=small, control="the looped model's blocks once, from scratch, with all updates"),
        Arm("full size, trained on", {"init_from.run": RunOf(DONOR)}, by_scale=onward, part=2, control="the ceiling"),
        looped("recursive", "stepwise"),
        looped("recursive, average", "average"),
        looped("recursive, lower", "lower"),
        looped("recursive, random layers", "random", control="what the choice of layers is worth"),
        looped("recursive, fresh", None, control="what the donor's weights are worth"),
        looped("relaxed, zero", "average", 1, adapters="zero"),
        looped("relaxed, quarter rank", "average", 0.25),
        looped("relaxed, twice the rank", "average", 2),
        looped("recursive, no teacher", "stepwise", teacher=False, control="what distillation is worth to plain loops"),
        looped("relaxed, no teacher", "average", 1, teacher=False, control="what distillation is worth"),
    ]


def get_experiment() -> Experiment:
    """Three headline arms and their donor."""
    gemma = text.shape(2048, 18, 8, 16_384) | {"model.kv_heads": 1}

    def lower(arm: str, against: str, source: str, setting: str = "", effect: float = 0.02) -> Claim:
        statement = f"{arm} ends lower than {against}"
        return Claim(
            statement=statement, source=source, arm=arm, against=against, rule=Rule(effect=effect), paper_setting=setting
        )

    gemma_setting = "Gemma 2B, few-shot accuracy"
    return Experiment(
        name="relaxed_recursive",
        question="How much of a trained model do half its layers keep when they are looped, started from it, and relaxed?",
        config="configs/tiny.py",
        arms=arms(),
        scales={
            "smoke": Scale(seeds=2, changes=text.SMOKE | {"model.layers": LAYERS["smoke"]}, minutes=0.2),
            "laptop": Scale(
                seeds=5,
                changes=text.LAPTOP | text.shape(96, LAYERS["laptop"], 3),
                slots=2,
                minutes=2.2,
                note="8 layers of width 96 on bytes of the standard library: 400 steps of the donor, 300 after it",
            ),
            "gpu": Scale(seeds=3, changes=text.GPU | text.shape(384, LAYERS["gpu"], 6), minutes=0.6),
            "paper": Scale(
                seeds=1,
                changes=text.corpus("slimpajama", batch_size=512, sequence_length=2048, micro_batches=16) | gemma,
                vocabulary=256_000,
                note="Gemma 2B's shape, 15 B tokens after a donor of as many, not of 3 T; one seed, so no verdict",
            ),
        },
        metric=Metric(unit="nats/token"),
        claims=[
            lower(
                "relaxed",
                "recursive, own norms",
                f"{PAPER}: 58.4 at rank 512 (60 B tokens, distilled), 51.7 plain (15 B, not distilled) [table, 2nd]",
                gemma_setting,
            ),
            lower("recursive, own norms", "recursive, average", "the norms alone, not in what was read of the paper", "", 0.01),
            lower("relaxed", "same size", f"{PAPER}: up to 13.5 points [2nd]", gemma_setting),
            lower("recursive", "same size", f"{PAPER}, abstract [abs]", gemma_setting),
            Claim(
                statement="relaxed ends at most 0.02 higher than full size, trained on",
                source=f"{PAPER}: 58.4 at rank 512 against 58.6 [table, 2nd]",
                arm="relaxed",
                against="full size, trained on",
                rule=Rule(at_most_worse=0.02),
                paper_setting=gemma_setting,
            ),
            lower("relaxed", "relaxed, zero", f"{PAPER}: up to 6.5 points at rank 512 [2nd]", gemma_setting, 0.01),
            lower("recursive", "recursive, average", f"{PAPER}, figure: stepwise for plain loops [table]", gemma_setting),
            lower("recursive", "recursive, random layers", "the control of the choice of layers", "", 0.01),
            *(
                lower(kind, f"{kind}, no teacher", f"{PAPER}, figure: with and without distillation", gemma_setting, 0.01)
                for kind in ("relaxed", "recursive")
            ),
        ],
    )
