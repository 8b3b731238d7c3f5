"""Spectral scaling laws of Muon (arXiv:2606.04058): how singular values of the momentum fall with size, and whether steps of
Newton-Schulz by layer are worth it at equal loss.

    python -m trainer.sweep experiments/muon_spectra.py --scale smoke      minutes
    python -m trainer.sweep experiments/muon_spectra.py --part 1           laptop, the headline: steps by layer, five, three
    python -m trainer.sweep experiments/muon_spectra.py                    laptop, with part 2: sizes and laws, more controls
    python -m trainer.report experiments/muon_spectra.py

The claims. Normalised singular values of the momentum follow `s_q = c M^-alpha` by kind of matrix and depth: alpha about 0.25
before the last layers, up to 0.96 in the last [P, abstract; 0.38 to 0.66 for its attention S], with R2 above 0.98 [S]. A matrix
therefore needs as many steps as the law gives for its median, and half of the directions are enough: the top 50 % are "about
full Muon", 25 % take 10 to 20 % more tokens [S]. A replication: five steps 3.7131, three of Jordan's 3.7194 at 77 M, one seed
[S], so that below a billion the recipe saves work and no loss.

Controls. For the laws: a flat spectrum has s = 1 / sqrt(rank), which alone gives an alpha of 0.22 for the paper's shapes and
0.27 for those of `laptop`; so laws must predict a size that they were not fitted to, against the width alone, with constants
from the same runs. For the steps: a fixed number that is as cheap; two steps, which should hurt, since a scale that does not
see them sees nothing; and for the stricter rule, three quarters of the directions, the same steps with attention and the
feed-forward layer exchanged, 6 % more work. All have one rate; fewer steps leave smaller updates, so five and layer-aware steps
also run at half of it and at twice. Work is FLOPs of Newton-Schulz up to the loss that an arm and five steps both reach at that
seed. Against the claims would count: the width predicting as well, the fixed number ending as low, or layer-aware steps ending
more than 0.01 higher than five.

The laws that choices go by at `smoke` and `laptop` are this project's, fitted to three small widths on a seed that the
comparison does not use; the paper's own, for batches of about 2^20 tokens in place of 1,024, are an arm. At `laptop` half of
the directions need four steps in two of 24 matrices and three in the others, so that the fixed three are nearly the same: the
paper's point lies above a billion parameters. Three quarters need three to five. `gpu` and `paper` take the paper's laws, which
are of the median alone; steps that are measured in the run stand beside them and cannot be exchanged by options.
"""

import math
import statistics
from collections.abc import Iterable

from experiments import text
from optim.directions.spectral_laws import BUCKETS, MEDIAN_LAWS
from trainer.sweep import Arm, Claim, Experiment, Metric, Rule, RunOf, Scale

PAPER = "arXiv:2606.04058"
ITERATIONS, BY_LAYER = "optimizer.direction.iterations", "optimizer.direction.newton_schulz"
RATE = "optimizer.direction.learning_rate"
GPT = {"model.ffn": {"name": "gelu"}}
"""Two matrices in the feed-forward layer, so that kinds are the paper's."""
FOUND, MAIN, CHEAP, STRICT = "experiments.muon_spectra", "five steps", "as cheap a fixed number", "steps for three quarters"
DOUBLINGS = Metric("work.doublings", unit="log2 FLOPs over five steps", log_base=2)
ALPHA = Metric("alpha", at=50, lower_is_better=False, unit="of the median")
ERROR = Metric("error", at=50, unit="doublings of the median")

STEPS = {"smoke": 12, "laptop": 500, "gpu": 800, "paper": 1500}
AS_CHEAP = {"smoke": 3, "laptop": 3, "gpu": 3, "paper": 4}
SIZES = {  # width, layers, heads beside the size that the arms of steps have
    "smoke": [(8, 4, 2), (12, 4, 2), (20, 4, 2), (24, 4, 2), (28, 4, 2), (32, 4, 2)],
    "laptop": [(32, 4, 1), (48, 4, 2), (64, 4, 2), (80, 4, 2), (96, 4, 3), (112, 4, 4)],
    "gpu": [(128, 4, 2), (160, 4, 2), (192, 5, 3), (224, 5, 4), (256, 6, 4), (320, 7, 5)],
    "paper": [(512, 8, 8), (768, 12, 12), (1024, 20, 16), (1280, 24, 20), (2048, 28, 32), (2560, 32, 40)],
}
CANDIDATES = ["jordan2", "jordan3", "jordan4", "jordan5", "jordan6"]
PAPERS = {BY_LAYER: {"name": "predicted", "candidates": CANDIDATES}}
OURS = ["smoke", "laptop"]
"""Scales whose choices go by laws of this project."""
PILOT = {
    0.5: {
        "query": [(11.1, 0.448), (5.76, 0.439), (9.32, 0.446), (0.831, 0.247)],
        "key": [(15.7, 0.473), (8.07, 0.453), (1.57, 0.299), (1.57, 0.287)],
        "value": [(13, 0.511), (1.71, 0.336), (0.469, 0.221), (3.08, 0.362)],
        "output": [(5.04, 0.397), (0.307, 0.169), (0.775, 0.242), (4.09, 0.383)],
        "up": [(44.5, 0.53), (19.4, 0.458), (9.33, 0.393), (10, 0.393)],
        "down": [(15.5, 0.444), (6.13, 0.351), (8.87, 0.385), (143, 0.652)],
    },
    0.75: {
        "query": [(89.2, 0.718), (4.18, 0.519), (1.24, 0.377), (0.0474, 0.107)],
        "key": [(49, 0.674), (2.51, 0.461), (0.289, 0.249), (0.21, 0.209)],
        "value": [(21.5, 0.671), (0.00639, 0), (0.00824, 0), (0.00909, 0)],
        "output": [(0.321, 0.266), (0.00973, 0), (0.0112, 0), (0.00943, 0)],
        "up": [(87.5, 0.634), (31.5, 0.548), (13, 0.463), (9.06, 0.427)],
        "down": [(11.4, 0.473), (3.99, 0.359), (6.67, 0.405), (264, 0.779)],
    },
}
"""c and alpha before N/4, N/2, 3N/4 and the last layer, of the median and of the rank three quarters down: `python -m
trainer.spectra --last 3 --until 450` over runs of `laptop`, widths 32, 64 and 96, seed 1000."""


def pace(steps: int) -> dict:
    """Constant, then down over the last tenth, as in the paper; a checkpoint and quantiles every tenth of the run."""
    tenth = max(1, steps // 10)
    return {
        "train.steps": steps,
        "optimizer.schedule": {"name": "wsd", "warmup": tenth // 2, "decay": 0.1},
        "checkpoint.every": tenth,
        "checkpoint.keep_latest": 4,
        "checkpoint.keep_best": 0,
        "diagnostics.every": tenth,
        "diagnostics.names": ["momentum_spectrum", "newton_schulz"],
        "diagnostics.quantiles": [0.1, 0.25, 0.5, 0.75, 0.9],
    }


# ---- measurements


def quantiles(measurement, *, run: str) -> None:
    """Spectra of one run, over its three checkpoints before the decay: a row a quantile (the step, in per cent).

    `s.KIND.DEPTH` is the normalised singular value of that descending rank, `middle` and `last` their geometric means over the
    layers before the last and in it; `parameters` and `width` of the model.
    """
    from trainer import load, spectra

    config = load(run).config
    found = spectra.measure(run, 3, until=config.train.steps - config.checkpoint.every)
    for q in sorted({q for _, _, q in found.values}):
        cells = {(kind, depth): value for (kind, depth, own), value in found.values.items() if own == q}
        middle, last = ([s for (_, depth), s in cells.items() if (depth == "final") == final] for final in (False, True))
        means = {"middle": geometric(middle), "last": geometric(last)}
        measurement.write(round(100 * q), s=nested(cells), **means, parameters=found.size, width=config.model.width)


def nested(cells: dict) -> dict:
    """By kind, then by depth."""
    return {kind: {depth: x for (own, depth), x in cells.items() if own == kind} for kind, _ in cells}


def geometric(values) -> float:
    """The geometric mean."""
    return math.exp(statistics.fmean(math.log(value) for value in values))


def collected(directories: Iterable[str]) -> list:
    """The spectra of several runs, as `trainer.spectra` has them, with the widths of their models; by size."""
    from pathlib import Path

    from trainer.metrics.jsonl import read_metrics
    from trainer.spectra import Measured

    found = []
    for directory in directories:
        rows = read_metrics(Path(directory) / "metrics.jsonl")
        cells = {
            (kind, depth, row["step"] / 100): value
            for row in rows
            for kind, own in row["s"].items()
            for depth, value in own.items()
        }
        found.append((Measured(directory, rows[0]["parameters"], (), cells), rows[0]["width"]))
    return sorted(found, key=lambda pair: pair[0].size)


def exponents(run, *, last: bool, **spectra: str) -> None:
    """Laws over all sizes, of the layers before the last or of the last: a row a quantile, means over kinds and depths.

    `alpha`; `flat`, what the width alone gives; `r_squared`; `by.KIND.DEPTH`, each alpha.
    """
    from optim.directions.spectral_laws import fit
    from trainer.spectra import fits

    found = collected(spectra.values())
    flat = fit([one.size for one, _ in found], [width**-0.5 for _, width in found]).law.alpha
    laws = {key: law for key, law in fits([one for one, _ in found]).items() if (key[1] == "final") == last}
    for q in sorted({key[2] for key in laws}):
        own = {key: law for key, law in laws.items() if key[2] == q}
        alphas = {(kind, depth): law.law.alpha for (kind, depth, _), law in own.items()}
        fitted = sum(law.r_squared for law in own.values()) / len(own)
        run.write(round(100 * q), alpha=sum(alphas.values()) / len(own), flat=flat, r_squared=fitted, by=nested(alphas))


def next_size(run, *, by: str, **spectra: str) -> None:
    """The largest size predicted from the others: a row a quantile, `error` in doublings, root mean square over matrices.

    `by`: "laws" fitted to the smaller sizes; the "paper"'s exponents (of the median, for every quantile), or the "width"
    alone, either with the constant that fits the smaller sizes best. `bias`: the mean, positive where it predicts too much.
    """
    from optim.directions.spectral_laws import fit

    *smaller, (largest, width) = collected(spectra.values())
    misses: dict[float, list[float]] = {}
    for (kind, depth, q), actual in largest.values.items():
        values = [one.values[kind, depth, q] for one, _ in smaller]
        if by == "laws":
            found = fit([one.size for one, _ in smaller], values).law.at(largest.size)
        elif by == "paper":
            alpha = MEDIAN_LAWS[kind, depth].alpha
            found = geometric(v * (one.size / largest.size) ** alpha for v, (one, _) in zip(values, smaller, strict=True))
        else:
            found = geometric(v * (own / width) ** 0.5 for v, (_, own) in zip(values, smaller, strict=True))
        misses.setdefault(q, []).append(math.log2(found / actual))
    for q, own in sorted(misses.items()):
        run.write(round(100 * q), error=math.sqrt(sum(x * x for x in own) / len(own)), bias=sum(own) / len(own))


def flops_up_to(directory: str):
    """FLOPs of Newton-Schulz in the updates of a run up to a step, as a function of the step."""
    from pathlib import Path

    from optim.directions.layer_aware import predicted_choices
    from optim.directions.newton_schulz import flops, polynomials
    from optim.directions.thresholds import configuration
    from optim.roles import parameters
    from trainer import load
    from trainer.metrics.jsonl import read_metrics

    found = load(directory)
    direction, declared = found.config.optimizer.direction, parameters(found.model)
    chosen = direction.newton_schulz
    matrices = {path: own for path, own in declared.items() if own.role == "matrix"}

    def an_update(steps_of) -> float:
        return sum(flops(*own.shape[-2:], int(k)) for path, own in matrices.items() for k in steps_of(path, own.layers))

    if chosen is None:
        count = len(polynomials(direction.polynomials, direction.iterations))
        each = an_update(lambda path, layers: [count] * layers)
        return lambda step: each * step
    lengths = [len(configuration(name)) for name in chosen.candidates]
    if chosen.name == "predicted":
        choices = predicted_choices(chosen, declared)
        each = an_update(lambda path, layers: [lengths[i] for i in choices[path]])
        return lambda step: each * step
    rows = [row for row in read_metrics(Path(directory) / "metrics.jsonl") if "newton_schulz" in row]
    sites = rows[-1]["newton_schulz"]["steps"]  # frozen from the step of the choice on
    before = an_update(lambda path, layers: [lengths[-1]] * layers)
    after = an_update(lambda path, layers: next(own for site, own in sites.items() if f".{site}." in path))
    return lambda step: before * min(step, chosen.choose_at - 1) + after * max(0, step - chosen.choose_at + 1)


def work(measurement, *, run: str, against: str) -> None:
    """Work of a run to a loss, over that of another one: the larger of their two last losses, which both reach.

    One row: `work.doublings`, log2 of the ratio of FLOPs of Newton-Schulz up to there; `work.steps`, the ratio of updates;
    `work.all`, the ratio of FLOPs over the whole runs.
    """
    from pathlib import Path

    from trainer.metrics.jsonl import read_metrics
    from trainer.sweep.outcome import crossing, series

    directories = [run, against]
    curves = [series(read_metrics(Path(directory) / "metrics.jsonl"), Metric()) for directory in directories]
    target = max(curve[-1][1] for curve in curves)
    own, other = (crossing(curve, target) for curve in curves)
    mine, theirs = (flops_up_to(directory) for directory in directories)
    last = curves[0][-1][0]
    ratios = {"doublings": math.log2(mine(own) / theirs(other)), "steps": own / other, "all": mine(last) / theirs(last)}
    measurement.write(last, work=ratios, target=target)


# ---- arms


def predicted(q: float, exchange: bool = False) -> dict:
    """Steps by this project's laws of a quantile; exchanged, attention has those of the feed-forward layer and vice versa."""
    others = {"query": "up", "key": "down", "value": "up", "output": "down", "up": "query", "down": "value"}
    own = {kind: PILOT[q][others[kind] if exchange else kind] for kind in others}
    laws = [
        f"{kind}@{depth}={c},{alpha}" for kind, pairs in own.items() for depth, (c, alpha) in zip(BUCKETS, pairs, strict=True)
    ]
    return {BY_LAYER: {"name": "predicted", "candidates": CANDIDATES, "laws": laws}}


def step_arms() -> list[Arm]:
    """One size, steps of Newton-Schulz in several ways, and the work of each to a loss of five steps."""
    measured = {}
    for scale, steps in STEPS.items():
        when = {"every": max(1, steps // 50), "choose_at": 2 * max(1, steps // 10)}
        measured[scale] = {BY_LAYER: {"name": "measured", "candidates": CANDIDATES[: 5 if scale == "paper" else 4], **when}}
    fixed = {scale: {ITERATIONS: count} for scale, count in AS_CHEAP.items()}
    strict, exchanged = predicted(0.75), predicted(0.75, exchange=True)
    median = {scale: predicted(0.5) if scale in OURS else PAPERS for scale in SIZES}
    found = [
        Arm(MAIN),
        Arm("layer-aware steps", by_scale=median),
        Arm(CHEAP, by_scale=fixed, control="a fixed number of about the same work"),
        Arm("two steps", {ITERATIONS: 2}, part=2, control="too few: does this scale see it at all?"),
        Arm("measured steps", by_scale=measured, part=2),
        Arm(STRICT, strict, part=2, scales=OURS),
        Arm("steps exchanged", exchanged, part=2, scales=OURS, control="the same steps on the wrong matrices"),
        Arm("paper's laws", PAPERS, part=2, scales=OURS),
    ]
    how = {"measure": f"{FOUND}:work", "minutes": {"laptop": 0.1, "gpu": 0.05}}
    for arm in [arm for arm in found if arm.name != "two steps"]:
        directories = {"run": RunOf(arm.name), "against": RunOf(MAIN)}
        control = "itself" if arm.name == MAIN else ""
        found.append(Arm(f"work: {arm.name}", directories, part=arm.part, scales=arm.scales, control=control, **how))
    for name, changes in ((MAIN, {}), ("layer-aware steps", predicted(0.5))):
        for factor, rate in (("half", 0.01), ("twice", 0.04)):
            own = {"part": 2, "scales": ["laptop"], "control": "is the rate that all have a good one?"}
            found.append(Arm(f"{name}, {factor} the rate", changes | {RATE: rate}, **own))
    return found


def size_arms() -> list[Arm]:
    """Other sizes, the spectra of each, and what laws over them say."""
    how = {"minutes": {"laptop": 0.2, "gpu": 0.2}, "part": 2}
    found, names = [], [MAIN]
    for number in range(len(SIZES["paper"])):
        shapes = {scale: text.shape(*sizes[number]) for scale, sizes in SIZES.items()}
        names.append(f"size {number + 1}")
        found.append(Arm(names[-1], by_scale=shapes, part=2, minutes={"laptop": 1.2, "gpu": 0.6}))
    found += [Arm(f"spectra: {name}", {"run": RunOf(name)}, measure=f"{FOUND}:quantiles", **how) for name in names]
    over = {f"spectra_{number}": RunOf(f"spectra: {name}") for number, name in enumerate(names)}
    for name, last in (("middle layers", False), ("last layer", True)):
        found.append(Arm(f"exponents, {name}", over | {"last": last}, measure=f"{FOUND}:exponents", **how))
    for name, by, control in (
        ("fitted laws", "laws", ""),
        ("paper's exponents", "paper", ""),
        ("width alone", "width", "a flat spectrum"),
    ):
        arguments = over | {"by": by}
        found.append(Arm(f"next size: {name}", arguments, measure=f"{FOUND}:next_size", control=control, **how))
    return found


def claims() -> list[Claim]:
    """Of the steps, then of the laws."""
    beyond = "not in what was read of the paper"

    def claim(statement: str, source: str, arm: str, against: str, effect: float, **rest) -> Claim:
        return Claim(statement=statement, source=source, arm=arm, against=against, rule=Rule(effect=effect), **rest)

    def lower(arm: str, against: str, source: str, effect: float = 0.01, **rest) -> Claim:
        return claim(f"{arm} end lower than {against}", source, arm, against, effect, **rest)

    def no_higher(arm: str, against: str, source: str, allowed: float = 0.01, **rest) -> Claim:
        statement, rule = f"{arm} end at most {allowed:g} higher than {against}", Rule(at_most_worse=allowed)
        return Claim(statement=statement, source=source, arm=arm, against=against, rule=rule, **rest)

    def predicts(name: str, source: str) -> Claim:
        statement = f"{name} predict the next size better than the width alone"
        source = f"{PAPER}, {source} [S]; against a flat spectrum [D]"
        return claim(statement, source, f"next size: {name}", "next size: width alone", 0.1, metric=ERROR)

    return [
        claim(
            "Layer-aware steps take less work of Newton-Schulz to the loss of five steps",
            f"{PAPER}, abstract: as many steps as each layer needs [P]; numbers not found",
            *("work: layer-aware steps", f"work: {MAIN}", 0.1),
            metric=DOUBLINGS,
        ),
        lower("layer-aware steps", CHEAP, f"the control of equal work, {beyond}"),
        no_higher(
            *("layer-aware steps", MAIN, f"{PAPER}: half of the directions are enough [S]"),
            paper_effect=0.0,
            paper_setting="a replication at 77 M, one seed: three of Jordan's steps 0.0063 higher than five of You's",
        ),
        lower(MAIN, "two steps", f"{PAPER}: too few directions cost, a quarter 10 to 20 % more tokens [S]", 0.02),
        no_higher("layer-aware steps", STRICT, f"{PAPER}: half is about full Muon [S]", scales=OURS),
        lower(STRICT, "steps exchanged", f"the control of the assignment, {beyond}", scales=OURS),
        claim(
            "Singular values of the last layer fall faster with size than those of the layers before it",
            f"{PAPER}: 0.38 to 0.96 against about 0.25 [S]; 0.25 and 0.96 in the abstract [P]",
            *("exponents, last layer", "exponents, middle layers", 0.1),
            metric=ALPHA,
            paper_effect=0.34,
            paper_setting="seven sizes, 77 M to 2.8 B; the mean over six kinds",
        ),
        predicts("paper's exponents", "its exponents"),
        predicts("fitted laws", "R2 above 0.98"),
    ]


def get_experiment() -> Experiment:
    """Three headline arms and the work of each; seven sizes and their laws."""
    muon = {"name": "muon", "learning_rate": 0.02, "rest": {"name": "adamw", "learning_rate": 3e-3, "weight_decay": 0.0}}
    decayed = ["embedding", "head", "vector", "scalar", "table"]  # the paper's AdamW decays all that Muon does not serve [S]
    rest = {"name": "adamw", "learning_rate": 0.002, "weight_decay": 0.01, "decay_roles": decayed}
    papers = {"name": "muon", "learning_rate": 0.01, "nesterov": False, "weight_decay": 0.01, "rest": rest}
    ours = GPT | {"optimizer.direction": muon}
    return Experiment(
        name="muon_spectra",
        question="Do singular values of Muon's momentum follow laws in size, and are steps by layer worth it at equal loss?",
        config="configs/tiny.py",
        arms=[*step_arms(), *size_arms()],
        scales={
            "smoke": Scale(seeds=2, changes=text.SMOKE | ours | pace(STEPS["smoke"]), minutes=0.2),
            "laptop": Scale(
                seeds=5,
                changes=text.LAPTOP | ours | pace(STEPS["laptop"]),
                slots=2,
                minutes=2.2,
                note="seven widths from 32 to 128, 4 layers, on bytes of the standard library, 500 steps of 8 x 128",
            ),
            "gpu": Scale(
                seeds=3,
                changes=text.GPU | ours | pace(STEPS["gpu"]),
                minutes=0.8,
                note="seven sizes, 4 layers of width 128 to 8 of 384; the paper's laws ask for about three steps",
            ),
            "paper": Scale(
                seeds=3,
                changes=text.corpus("fineweb", batch_size=2048, sequence_length=512, micro_batches=16)
                | text.shape(1792, 27, 28)
                | GPT
                | {"optimizer.direction": papers}
                | pace(STEPS["paper"]),
                vocabulary=50_304,
                note="the paper's seven sizes, 77 M to 2.8 B, steps at 1.2 B; 1,500 updates of 2^20 tokens (inferred) "
                "without Nesterov; Jordan's polynomials in place of You's; spectra of steps 1,050 to 1,350",
            ),
        },
        also=[
            Metric(kind="steps_to", target=MAIN),
            Metric("timing.step_seconds", split="train", at="median", unit="s"),
            *(DOUBLINGS, Metric("work.all", unit="FLOPs over five steps"), ALPHA, ERROR),
            Metric("flat", at=50, unit="alpha of the width alone"),
            *(Metric("r_squared", at=50), Metric("middle", at=50), Metric("last", at=50)),
        ],
        claims=claims(),
    )
