"""Layer-aware Newton-Schulz: steps that the power laws give, their FLOPs, and time and FLOPs to one training loss.

    python -m benchmarks.newton_schulz_steps
    python -m benchmarks.newton_schulz_steps --pairs 0 --steps 0        # the table alone

The table takes GPT-style models of width 512 (M / 77 M)^0.44, as the sizes of arXiv:2606.04058 follow, and the laws and
thresholds of `optim.directions`; FLOPs are of the form of the iteration that runs, on an accelerator in bfloat16, or in
float32 where bfloat16 would round away the values that a configuration is chosen for. Two columns count a FLOP of the latter as
`FLOAT32_PRICE` of bfloat16: peaks, not measured. It says what the laws imply, not what training needs. The timing is of one
update of a small model's matrices with the steps that the table gives for a size, against five for all.

Then `configs/tiny.py` (other sizes with `--set`) trains three times side by side (`benchmarks.fixed_loss`): five steps for all,
as the laws predict for its size, and as measured. Told are the steps in use at the end, and FLOPs of Newton-Schulz and time to
one training loss; before its choice `measured` runs its last candidate, and those updates are billed as such.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from benchmarks.fixed_loss import Contestant, over, race, told
from benchmarks.measure import Patience, overrides, parser, show, shown_ratio, spread, timed, write_result
from strata.cpu import tune_cpu
from trainer import command

SIZES = (77e6, 354e6, 1e9, 2.8e9, 10e9, 30e9, 100e9, 300e9)
UNIFORM = 5
# A float32 product of full precision in bfloat16 ones: six passes of Precision.HIGHEST on TPU; on H100 and H200 SXM the dense
# peaks of the data sheet, 989.4 over 67 TFLOP/s, since the iteration asks for full precision and not for TF32.
FLOAT32_PRICE = {"TPU": 6.0, "H200": 989.4 / 67}
STEPS_OF = "optimizer.direction.newton_schulz"


def shape_of(size: float) -> tuple[int, int]:
    """Width and layers of a model of `size` parameters."""
    width = 64 * round(512 * (size / 77e6) ** 0.44 / 64)
    return width, max(4, round((size - 2 * 50304 * width) / (12 * width**2)))


def matrices(width: int, layers: int) -> dict[str, tuple[int, int, int]]:
    """Kinds of a block with their shape [layers, in, out]."""
    square = {kind: (layers, width, width) for kind in ("query", "key", "value", "output")}
    return square | {"up": (layers, width, 4 * width), "down": (layers, 4 * width, width)}


def declared(width: int, layers: int) -> dict[str, Any]:
    """As the parameters of a model."""
    import numpy as np

    from optim.roles import Parameter

    return {
        f"block.{kind}.kernel": Parameter(
            f"block.{kind}.kernel", shape, np.float32, "matrix", ("layer", "in", "out"), positions=tuple(range(layers))
        )
        for kind, shape in matrices(width, layers).items()
    }


def predicted(size: float) -> dict[str, Any]:
    """Steps of every matrix of a model of this size, and what they cost."""
    from optim.directions.layer_aware import predicted_choices
    from optim.directions.newton_schulz import flops
    from optim.directions.thresholds import configuration, needs_float32
    from optim.options import Predicted

    width, layers = shape_of(size)
    chosen = Predicted(model_size=int(size))
    lengths = {name: len(configuration(name)) for name in chosen.candidates}
    parameters = declared(width, layers)
    choices = predicted_choices(chosen, parameters)
    own = [(parameters[path].shape[1:], chosen.candidates[i]) for path, rows in choices.items() for i in rows]
    most = max((name for _, name in own), key=lengths.__getitem__)

    def total(of: Any, price: float = 1.0) -> float:
        """FLOPs with the configuration that `of` gives for each, those in float32 at a price."""
        found = 0.0
        for shape, name in own:
            wide = needs_float32(of(name), chosen.accept, *shape)
            found += flops(*shape, lengths[of(name)], "float32" if wide else "bfloat16") * (price if wide else 1)
        return found

    five = total(lambda name: f"jordan{UNIFORM}")
    return {
        "size": size,
        "width": width,
        "layers": layers,
        "steps": dict(sorted(Counter(lengths[name] for _, name in own).items())),
        "float32": sum(needs_float32(name, chosen.accept, *shape) for shape, name in own),
        "flops": total(lambda name: name),
        "over_five": total(lambda name: name) / five,
        "over_most": total(lambda name: name) / total(lambda name: most),
        "priced_over_five": {device: total(lambda name: name, price) / five for device, price in FLOAT32_PRICE.items()},
        "most": lengths[most],
    }


def timing(size: float, width: int, layers: int, pairs: int, count: int, patience: Patience) -> dict[str, Any]:
    """Time of Newton-Schulz over a small model's matrices with the steps of a model of `size`, over five for all."""
    import jax

    from optim.directions.layer_aware import grouped, predicted_choices
    from optim.options import Predicted

    chosen = Predicted(model_size=int(size))
    choices = predicted_choices(chosen, declared(width, layers))
    five = {path: (chosen.candidates.index("jordan5"),) * layers for path in choices}
    x = {path: jax.random.normal(jax.random.key(i), declared(width, layers)[path].shape) for i, path in enumerate(choices)}

    def runner(rows: Any) -> Any:
        compiled = jax.jit(lambda x: grouped(x, rows, chosen.candidates, accept=chosen.accept))
        return lambda: jax.block_until_ready(compiled(x))

    own, uniform = runner(choices), runner(five)
    ratios = []
    for update in (own, uniform, own, uniform):
        update()
    for pair in range(pairs):
        patience.wait()
        times = {}
        for update in (own, uniform) if pair % 2 == 0 else (uniform, own):
            times[update] = timed(update, count).seconds
        ratios.append(times[own] / times[uniform])
    return {"size": size, "width": width, "layers": layers, "over_five": spread(ratios)}


def entries(steps: int) -> dict[str, list[tuple[str, str]]]:
    """What trains side by side for `steps`."""
    measured = {"name": "measured", "every": max(1, steps // 40), "choose_at": max(1, steps // 10)}
    return {
        "five": [],
        "predicted": [(f"{STEPS_OF}.name", "predicted")],
        "measured": [(f"{STEPS_OF}.{name}", str(value)) for name, value in measured.items()],
    }


class Work(NamedTuple):
    """FLOPs of Newton-Schulz in the updates of a contestant."""

    before: float  # in each update before the choice
    last: float  # in each from it on, with the steps in use at the end
    choose_at: int  # the first update with chosen steps
    matrices: dict[int, int]  # how many take how many steps, at the end

    def up_to(self, step: int) -> float:
        """In the first `step` updates."""
        return self.before * min(step, self.choose_at - 1) + self.last * max(0, step - self.choose_at + 1)


def in_use(runner: Contestant) -> dict[str, list[list[int]]]:
    """Steps of each matrix of each layer by path, as a contestant ended."""
    import numpy as np

    import optim
    from optim.directions.layer_aware import predicted_choices
    from optim.directions.thresholds import configuration
    from optim.roles import parameters

    declared = {path: own for path, own in parameters(runner.setup.model).items() if own.role == "matrix"}
    chosen, spectra = runner.setup.config.optimizer.direction.newton_schulz, optim.spectra(runner.state["optimizer"])
    if chosen is None:
        return {path: [[UNIFORM] * max(1, len(own.split))] * own.layers for path, own in declared.items()}
    lengths = np.array([len(configuration(name)) for name in chosen.candidates])
    if spectra is not None:
        return {path: lengths[np.asarray(choice)].tolist() for path, choice in spectra.choice.items()}
    choices = predicted_choices(chosen, parameters(runner.setup.model))
    return {path: [[int(lengths[i])] * max(1, len(declared[path].split)) for i in own] for path, own in choices.items()}


def work(runner: Contestant) -> Work:
    """The FLOPs of a contestant as it ended; a choice that was checked again counts as the last one from the first on."""
    from optim.directions.newton_schulz import flops
    from optim.directions.thresholds import configuration
    from optim.roles import parameters

    declared, rows = parameters(runner.setup.model), in_use(runner)
    chosen = runner.setup.config.optimizer.direction.newton_schulz

    def total(steps: Mapping[str, list[list[int]]]) -> float:
        found = 0.0
        for path, layers in steps.items():
            widths = declared[path].split or declared[path].shape[-1:]
            found += sum(
                flops(declared[path].shape[-2], width, k) for own in layers for width, k in zip(widths, own, strict=True)
            )
        return found

    matrices = dict(sorted(Counter(k for layers in rows.values() for own in layers for k in own).items()))
    if getattr(chosen, "name", None) != "measured":
        return Work(total(rows), total(rows), 1, matrices)
    dearest = len(configuration(chosen.candidates[-1]))
    before = {path: [[dearest] * len(own) for own in layers] for path, layers in rows.items()}
    return Work(total(before), total(rows), chosen.choose_at, matrices)


def trained(changes: list[tuple[str, str]], chosen: Any, patience: Patience) -> dict[str, Any]:
    """Train the entries to one loss, for every seed, and print what each took."""
    races, used = [], {}
    for seed in range(chosen.seeds):
        how = {"steps": chosen.steps, "segment": chosen.segment, "window": chosen.window, "patience": patience}
        plain = [change for change in changes if not change[0].startswith(STEPS_OF)]
        sides = {name: [*(plain if name == "five" else changes), *own] for name, own in entries(chosen.steps).items()}
        found, runners = race(sides, seed=seed, **how)
        used = {name: work(runner) for name, runner in runners.items()}
        for name, own in found["entries"].items():
            own |= {"flops": used[name].last, "flops_to_loss": used[name].up_to(own["steps"]), "matrices": used[name].matrices}
        races.append(found)
    quantities = ("flops", "flops_to_loss", "steps", "seconds", "cpu_seconds")
    ratios = {name: {what: over(races, name, "five", what) for what in quantities} for name in used}
    rows = [
        [
            name,
            ", ".join(f"{count} x {k}" for k, count in used[name].matrices.items()),
            f"{own['flops']['median']:.2f}",
            f"{own['flops_to_loss']['median']:.2f}",
            shown_ratio(own["seconds"]),
            shown_ratio(own["cpu_seconds"]),
            f"{races[-1]['entries'][name]['final']:.4f}",
        ]
        for name, own in ratios.items()
    ]
    columns = ["", "matrices x steps", "FLOPs an update", "to the loss", "time", "CPU time", "final loss"]
    show(
        f"over five steps for all, to the training loss of {told(races)}",
        columns,
        rows,
        ["FLOPs: of Newton-Schulz, with the steps in use at the end; to the loss also those before a choice"],
    )
    return {"races": races, "ratios": ratios}


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--pairs", type=int, default=8, help="timed pairs; 0: the table alone")
    arguments.add_argument("--count", type=int, default=4, help="updates in a segment")
    arguments.add_argument("--width", type=int, default=256, help="of the model whose matrices are timed")
    arguments.add_argument("--layers", type=int, default=6, help="of the model whose matrices are timed")
    arguments.add_argument("--steps", type=int, default=400, help="of the training to one loss; 0: none")
    arguments.add_argument("--segment", type=int, default=10, help="training steps in a turn")
    arguments.add_argument("--window", type=int, default=20, help="steps of the trailing mean of the loss")
    arguments.add_argument("--seeds", type=int, default=1, help="trainings")
    arguments.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="change a field of the config")
    chosen = arguments.parse_args(argv)
    tune_cpu()
    table = [predicted(size) for size in SIZES]
    rows = [
        [
            f"{found['size'] / 1e9:g} B",
            f"{found['width']} x {found['layers']}",
            ", ".join(f"{count} x {k}" for k, count in found["steps"].items()),
            str(found["float32"]),
            f"{found['flops']:.3g}",
            f"{found['over_five']:.2f}",
            *(f"{priced:.2f}" for priced in found["priced_over_five"].values()),
            f"{found['over_most']:.2f} of {found['most']}",
        ]
        for found in table
    ]
    priced = [f"on {device}" for device in FLOAT32_PRICE]
    columns = ["size", "width x layers", "matrices x steps", "float32", "FLOPs", "over five", *priced, "over the most"]
    prices = ", ".join(f"{price:.3g} on {device}" for device, price in FLOAT32_PRICE.items())
    notes = [
        "exponents second hand, most constants assumed: see docs",
        f"float32: matrices that leave bfloat16 on an accelerator; a FLOP of theirs counts as {prices}, by peaks",
    ]
    show("steps that the laws give, FLOPs of an update", columns, rows, notes)
    result: dict[str, Any] = {"table": table, "timing": []}
    patience = Patience(chosen.patience)
    for size in (77e6, 10e9) if chosen.pairs else ():
        found = timing(size, chosen.width, chosen.layers, chosen.pairs, chosen.count, patience)
        result["timing"].append(found)
        print(f"steps of {size / 1e9:g} B on width {chosen.width}: {shown_ratio(found['over_five'])} of the time of five steps")
    if chosen.steps:
        result["training"] = trained(overrides(chosen.set), chosen, patience)
    options = {name: value for name, value in vars(chosen).items() if name not in ("out", "patience")}
    write_result("newton_schulz_steps", {"options": options} | result, chosen.out)


if __name__ == "__main__":
    command.run(main)
