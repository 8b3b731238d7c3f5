"""WSD-S (Wen et al. 2024, arXiv:2410.05192): one run that ends several times, against WSD and a cyclic cosine, compute counted.

    python -m trainer.sweep experiments/wsd_s.py --scale smoke            seconds
    python -m trainer.sweep experiments/wsd_s.py --part 1                 laptop, the toy: four minutes
    python -m trainer.sweep experiments/wsd_s.py                          laptop, with part 2: the trainer on text
    python -m trainer.report experiments/wsd_s.py

The claim: at equal total compute, checkpoints for several budgets out of one WSD-S run are better than those of WSD, whose
decays are thrown away when training goes on, and of a cyclic cosine (abstract [P]; curves up to 1.2 B parameters [R, S]; no
table of losses was found, reviewers saw single seeds and equal final losses at 0.6 B [R]). Against it would count: WSD being as
good at the same total of updates, or the cosine at the last budget.

Part 1 is the paper's toy, the bigram river valley [R for the claim, its form is ours]: SGD on a table of next-symbol logits of
a Markov chain. Symbols with one successor are flat directions (the river, progress is the sum of rates), uncertain ones sharp
(the hill, height follows the rate). Its floor is the entropy rate, losses are exact expectations and not samples, and the peak
rate of every schedule is tuned on other seeds. Part 2 is the trainer on text; there as well the rates of what is compared are
tuned to the last loss, on three seeds: the first alone would take 1e-2, worse on the others.

`updates` counts what all budgets together cost. WSD and its decays share a trunk, so a WSD checkpoint is that of a run of its
own: WSD costs T3 + D1 + D2 updates, and "WSD, equal compute" ends at a T3 that makes the total that of WSD-S. "cosine, each
budget" is the expensive control, a run of its own for every budget.
"""

from experiments import text
from trainer.sweep import Arm, Claim, Experiment, Metric, Rule, Scale, Tuning, axis

PAPER = "arXiv:2410.05192, abstract [P]"
DECAY = 0.1  # of the budget, as the paper's decays lengthen
BUDGETS = {"smoke": (20, 40, 80), "laptop": (1000, 2000, 4000)}
TEXT = {"laptop": (150, 300, 600), "gpu": (200, 400, 800), "paper": (12_500, 25_000, 50_000)}
"""Of the paper's own budgets, 50, 100 and 200 B tokens of about 4 M a step, the memory is unverified."""


def decay_steps(budget: int) -> int:
    """Updates of the decay before a budget."""
    return round(DECAY * budget)


def same_compute(budgets: tuple[int, int, int]) -> tuple[int, int, int]:
    """Budgets of WSD with the first two unchanged whose total, decays that are thrown away included, is the last budget."""
    first, second, last = budgets
    return first, second, last - decay_steps(first) - decay_steps(second)


def river_valley(
    run, *, schedule: dict, budgets: list[int], restart: bool, learning_rate: float, vocabulary: int, batch: int
) -> None:
    """SGD on a softmax table. A row `val` a budget: loss, excess over the floor, its parts, updates so far; `train`: the curve.

    With `restart` every budget is a run of its own, of which the longest is drawn; batches depend on the seed and the number of
    the update alone, so runs that share a schedule up to some update share their weights there.
    """
    import math

    import numpy as np

    from optim import schedules
    from trainer.config import load
    from trainer.data.bigram import draw_chain
    from trainer.data.options import Bigram

    chain = draw_chain(Bigram(vocabulary=vocabulary, table_seed=run.seed))
    truth, share = chain.matrix(), chain.stationary
    certain = chain.entropies < 1e-12
    pairs = (share[:, None] * truth).ravel() / truth.sum() * len(truth)

    def excess(logits):
        """Of every symbol, weighted by how often it comes: nats over the entropy."""
        normal = logits - logits.max(1, keepdims=True)
        log_q = normal - np.log(np.exp(normal).sum(1, keepdims=True))
        return share * (-(truth * log_q).sum(1) - chain.entropies)

    def numbers(logits, rate, updates):
        each = excess(logits)
        total = float(each.sum())
        parts = {"river": float(each[certain].sum()), "hill": float(each[~certain].sum())}
        found = {"loss": chain.entropy_rate + total, "excess": total, "log2_excess": math.log2(total), **parts}
        return found | {"learning_rate": rate, "updates": updates}

    def train(steps, shown):
        """Yields `(update, logits, rate)` at the updates in `shown`."""
        changes = [("optimizer.schedule", schedule), ("train.steps", steps)]
        option = load("configs/bigram.py", [(path, _json(value)) for path, value in changes]).config.optimizer.schedule
        fraction = getattr(schedules, option.name)(option, steps)
        logits = np.zeros_like(truth)
        for step in range(1, steps + 1):
            draw = np.random.default_rng([run.seed, step])
            seen = draw.multinomial(batch, pairs).reshape(truth.shape)
            q = np.exp(logits - logits.max(1, keepdims=True))
            q /= q.sum(1, keepdims=True)
            rate = learning_rate * float(fraction(step))
            logits -= rate / batch * (seen.sum(1, keepdims=True) * q - seen)
            if step in shown:
                yield step, logits, rate

    curve = {round(budgets[-1] * i / 80) for i in range(1, 81)}
    spent = budgets[-1]
    if restart:
        for budget in budgets[:-1]:
            *_, (_, logits, rate) = train(budget, {budget})
            run.write(budget, **numbers(logits, rate, budget))
        trunk = schedule["name"] == "wsd"
        spent += sum(decay_steps(budget) if trunk else budget for budget in budgets[:-1])
    for step, logits, rate in train(budgets[-1], curve | set(budgets)):
        if step in curve:
            run.write(step, "train", **numbers(logits, rate, step))
        if step == budgets[-1] or (step in budgets and not restart):
            run.write(step, **numbers(logits, rate, spent if step == budgets[-1] else step))


def _json(value) -> str:
    import json

    return json.dumps(value)


def schedules_of(budgets: tuple[int, int, int]) -> dict[str, dict]:
    """The schedule of every arm; `wsd` and `cosine` see one budget at a time."""
    inverse = {"shape": "inverse", "final": 0.1}
    return {
        "WSD-S": {"name": "wsd_s", "budgets": list(budgets), "decay": DECAY, **inverse},
        "WSD": {"name": "wsd", "decay": DECAY, **inverse},
        "cyclic cosine": {"name": "cyclic_cosine", "budgets": list(budgets), "final": 0.1},
        "cosine, each budget": {"name": "cosine", "final": 0.1},
    }


CONTROLS = {
    "WSD": "decays thrown away, not counted",
    "WSD, equal compute": "decays thrown away, and paid for",
    "cosine, each budget": "a run of its own for every budget: 1.75 times the updates",
}


def toy_arms() -> list[Arm]:
    """One measurement a schedule, its rate tuned."""
    rates = axis("learning_rate", [8.0, 16.0, 24.0, 32.0, 48.0])
    arms = []
    for name in ("WSD-S", "WSD, equal compute", "cyclic cosine", "WSD", "cosine, each budget"):
        by_scale = {}
        for scale, budgets in BUDGETS.items():
            own = same_compute(budgets) if "equal compute" in name else budgets
            by_scale[scale] = {"budgets": list(own), "schedule": schedules_of(own)[name.removesuffix(", equal compute")]}
        restart = {"restart": name.startswith(("WSD,", "cosine")) or name == "WSD", "learning_rate": 16.0}
        tune = Tuning(space=rates, seeds=(1000, 1001, 1002), scales=["laptop"])
        measure = "experiments.wsd_s:river_valley"
        control = CONTROLS.get(name, "")
        where = {"by_scale": by_scale, "scales": list(BUDGETS), "minutes": {"laptop": 0.07}}
        arms.append(Arm(name, restart, measure=measure, tune=tune, control=control, **where))
    return arms


def text_arms() -> list[Arm]:
    """Runs of the trainer; one that ends at an earlier budget is an arm of its own."""
    rates = axis("optimizer.direction.learning_rate", [1e-3, 3e-3, 1e-2, 3e-2])
    tune = Tuning(space=rates, seeds=(1000, 1001, 1002), scales=["laptop"])
    arms = []

    def arm(name: str, index: int, which: str, budgets_of=lambda budgets: budgets, tune=None) -> None:
        by_scale = {}
        for scale, budgets in TEXT.items():
            own = budgets_of(budgets)
            by_scale[scale] = {
                "train.steps": own[index],
                "optimizer.schedule": {**schedules_of(own)[which], "warmup": own[0] // 10},
            }
        control = CONTROLS.get(which if which == name else name.removeprefix("text: "), "")
        arms.append(Arm(f"text: {name}", by_scale=by_scale, tune=tune, control=control, part=2, scales=list(TEXT)))

    arm("WSD-S", 2, "WSD-S", tune=tune)
    arm("WSD, equal compute", 2, "WSD", same_compute, tune=tune)
    arm("cyclic cosine", 2, "cyclic cosine", tune=tune)
    arm("WSD to the second budget", 1, "WSD")
    arm("WSD to the last budget", 2, "WSD")
    return arms


def claims() -> list[Claim]:
    """The toy's in doublings of the excess over the floor, where 0.03 is 2 %; those on text in nats."""
    relative = Rule(effect=0.03)

    def toy(statement: str, against: str, scale: str, budget: int | None = None) -> Claim:
        metric = Metric("log2_excess", at=budget or "last", unit="log2 nats over the floor", log_base=2)
        found = {"statement": statement, "source": PAPER, "arm": "WSD-S", "against": against, "rule": relative}
        return Claim(**found, metric=metric, scales=[scale])

    found = []
    for scale, (_, second, last) in BUDGETS.items():
        found += [
            toy("Toy: at equal total compute WSD-S ends lower than WSD", "WSD, equal compute", scale),
            toy("Toy: WSD-S ends lower than a cyclic cosine", "cyclic cosine", scale, last),
            toy("Toy: at the second of three budgets WSD-S is lower than a cyclic cosine", "cyclic cosine", scale, second),
        ]
    for scale, (_, second, last) in TEXT.items():
        for statement, against, budget in (
            ("Text: at equal total compute WSD-S ends lower than WSD", "text: WSD, equal compute", None),
            ("Text: WSD-S ends lower than a cyclic cosine", "text: cyclic cosine", last),
            ("Text: at the second budget WSD-S is lower than a cyclic cosine", "text: cyclic cosine", second),
        ):
            metric = Metric(at=budget or "last", unit="nats/token")
            rule = Rule(effect=0.01)
            found.append(
                Claim(
                    statement=statement,
                    source=PAPER,
                    arm="text: WSD-S",
                    against=against,
                    metric=metric,
                    rule=rule,
                    scales=[scale],
                )
            )
    return found


def get_experiment() -> Experiment:
    """The toy at two scales, text at three."""
    adamw = {"optimizer.direction": {"name": "adamw", "learning_rate": 3e-3}}
    llama = text.shape(768, 12, 12) | {"optimizer.direction": {"name": "adamw", "learning_rate": 6e-4}}
    return Experiment(
        name="wsd_s",
        question="Does one WSD-S run serve several budgets better than WSD or a cyclic cosine at the same total of updates?",
        config="configs/tiny.py",
        arms=[*toy_arms(), *text_arms()],
        scales={
            "smoke": Scale(seeds=3, arguments={"vocabulary": 16, "batch": 32}, note="the toy"),
            "laptop": Scale(
                seeds=5,
                changes=text.LAPTOP | adamw | {"evaluate.every": TEXT["laptop"][0]},
                arguments={"vocabulary": 64, "batch": 64},
                slots=2,
                minutes=2.0,
                note="the toy with 64 symbols, budgets 1000, 2000, 4000; text with budgets 150, 300, 600 (part 2)",
            ),
            "gpu": Scale(seeds=3, changes=text.GPU | adamw | {"evaluate.every": TEXT["gpu"][0]}, minutes=0.5),
            "paper": Scale(
                seeds=3,
                changes=text.corpus("pile", batch_size=1024, sequence_length=4096, micro_batches=8)
                | llama
                | {"evaluate.every": TEXT["paper"][0]},
                vocabulary=50_432,
                note="about the paper's smallest model, 0.1 B parameters; the batch of 4 M tokens is unverified",
            ),
        },
        also=[Metric(name, unit="toy") for name in ("excess", "river", "hill", "updates")],
        claims=claims(),
    )
