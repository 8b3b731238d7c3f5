"""Step time of Drop-Muon against Muon: every cut that can be drawn, weighted by its probability, over the full step.

    python -m benchmarks.drop_muon
    python -m benchmarks.drop_muon --set model.layers=12 --set optimizer.sampling.buckets=6 --steps 0      # no training

The same training step is compiled for each cut and without layer sampling; segments alternate and ratios are taken within each
round. The ceiling counts forward pass and both gradients of the blocks as equal and nothing else
(`optim.sampling.Cuts.ceiling`); it is shown for other numbers of buckets too, and beside it the share of head and embedding
in the FLOPs of a full step, with the ceiling that the head, which is in every step, leaves.

Then both train side by side on the text of `configs/tiny.py` (`benchmarks.fixed_loss`): updates of fewer layers are cheaper and
do less, so what counts is the time to one training loss, which is told whichever way it falls.

Target: at least 90 % of the ceiling with uniform draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.fixed_loss import over, race, told
from benchmarks.measure import Patience, Timed, batch_of, overrides, parser, show, shown_ratio, spread, timed, write_result
from strata.cpu import tune_cpu
from trainer import command

BASE = [("model.layers", "8"), ("optimizer.schedule.name", "constant")]
DROP = ("optimizer.sampling.name", "drop_muon")
RACE = {"Muon": [], "Drop-Muon": [DROP]}


def plainly(changes: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The changes that make sense without layer sampling."""
    return [change for change in changes if not change[0].startswith("optimizer.sampling")]


def steppers(changes: list[tuple[str, str]]) -> tuple[dict[str, Callable[[], None]], dict[str, Any]]:
    """A function for each cut, and one for the full step, that does an update and waits for it; and what they belong to."""
    import jax
    import jax.numpy as jnp

    import optim
    from optim.options import DropMuon
    from optim.sampling import Cuts
    from trainer.config import load
    from trainer.flops import training_flops
    from trainer.setup import assemble

    base = [("data.name", "bigram"), ("data.vocabulary", "257"), *BASE]
    part = assemble(load("configs/tiny.py", [*base, DROP, *changes]).config)
    whole = assemble(load("configs/tiny.py", [*base, *plainly(changes)]).config)
    batch = batch_of(whole.config, whole.model.vocab_size)

    def stepper(setup: Any, state: Any, cut: int | None) -> Callable[[], None]:
        rates = setup.put_scalars(optim.rates(setup.config.optimizer, setup.config.train.steps)(1))
        held, step = [jax.tree.map(jnp.copy, state)], setup.jitted_train_step(cut)

        def run() -> None:
            with jax.set_mesh(setup.mesh):
                held[0], metrics = step(held[0], batch, rates)
            jax.block_until_ready((held[0], metrics))

        return run

    cuts, layers = part.cuts, part.config.model.layers
    states = []
    for setup in (whole, part):
        with jax.set_mesh(setup.mesh):
            states.append(setup.initial_state(setup.initial_params()))
    found = {"Muon": stepper(whole, states[0], None)}
    found |= {f"cut {cut}": stepper(part, states[1], cut) for cut in cuts.first}
    head = training_flops(whole.model, whole.config.data.sequence_length).head_share
    buckets = sorted({1, 2, 4, 8, len(cuts.first), layers})
    facts = {
        "layers": layers,
        "cuts": list(cuts.first),
        "probabilities": cuts.probabilities(1).tolist(),
        "ceiling": cuts.ceiling,
        "ceiling_beside_head": cuts.ceiling_beside(head),
        "uniform_ceilings": {b: Cuts(DropMuon(buckets=b), layers, None).ceiling for b in buckets if b <= layers},
        "flops_share": {"head": head, "embedding": 0.0},  # rows of the embedding are looked up
    }
    return found, facts


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--pairs", type=int, default=10, help="rounds")
    arguments.add_argument("--count", type=int, default=4, help="updates in a segment")
    arguments.add_argument("--steps", type=int, default=400, help="of the training to one loss; 0: none")
    arguments.add_argument("--segment", type=int, default=10, help="training steps in a turn")
    arguments.add_argument("--window", type=int, default=20, help="steps of the trailing mean of the loss")
    arguments.add_argument("--seeds", type=int, default=1, help="trainings")
    arguments.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="change a field of the config")
    chosen = arguments.parse_args(argv)
    tune_cpu()
    changes, patience = overrides(chosen.set), Patience(chosen.patience)
    runs, facts = steppers(changes)
    for run in runs.values():
        run()
    found: dict[str, list[Timed]] = {name: [] for name in runs}
    for pair in range(chosen.pairs):
        patience.wait()
        for name in list(runs) if pair % 2 == 0 else reversed(runs):
            found[name].append(timed(runs[name], chosen.count))
    weights = dict(zip(facts["cuts"], facts["probabilities"], strict=True))

    def ratios(which: str) -> dict[str, Any]:
        whole = [getattr(one, which) for one in found["Muon"]]
        drawn = [sum(p * getattr(found[f"cut {cut}"][i], which) for cut, p in weights.items()) for i in range(len(whole))]
        return spread([one / other for one, other in zip(whole, drawn, strict=True)])

    ratio, by_cpu = ratios("seconds"), ratios("cpu")
    milliseconds = {name: spread([1e3 * one.seconds for one in own]) for name, own in found.items()}
    others = spread([one.others for own in found.values() for one in own if one.others is not None] or [0.0])
    show("one training step", ["", "ms"], [[name, f"{own['median']:.2f}"] for name, own in milliseconds.items()])
    ceilings = [[count, f"{value:.3f}"] for count, value in facts["uniform_ceilings"].items()]
    show(f"ceiling of {facts['layers']} layers, uniform draws", ["buckets", "ceiling"], ceilings, ["many of many layers: 1.5"])
    print(
        f"Drop-Muon: {shown_ratio(ratio)} times as fast a step as Muon, {ratio['median'] / facts['ceiling']:.1%} of the "
        f"ceiling of {facts['ceiling']:.3f} for {len(facts['cuts'])} buckets; by CPU time {by_cpu['median']:.3f} times, "
        f"{by_cpu['median'] / facts['ceiling']:.1%}"
    )
    print(
        f"share of a full step's FLOPs: head {facts['flops_share']['head']:.1%}, embedding 0.0% (rows are looked up); with the "
        f"head in every step the ceiling is {facts['ceiling_beside_head']:.3f}"
    )
    print(f"others used {others['median']:.2f} cores meanwhile")
    races = []
    for seed in range(chosen.seeds) if chosen.steps else ():
        entries = {name: [*BASE, *own, *(changes if own else plainly(changes))] for name, own in RACE.items()}
        how = {"steps": chosen.steps, "segment": chosen.segment, "window": chosen.window, "patience": patience}
        races.append(race(entries, seed=seed, **how)[0])
    if races:
        taken = {name: over(races, "Drop-Muon", "Muon", name) for name in ("steps", "seconds", "cpu_seconds")}
        print(
            f"to the training loss of {told(races)}: Drop-Muon takes {shown_ratio(taken['seconds'])} of Muon's time "
            f"({shown_ratio(taken['cpu_seconds'])} of its CPU time) in {shown_ratio(taken['steps'])} of its steps"
        )
    options = {name: value for name, value in vars(chosen).items() if name not in ("out", "patience")}
    result = {"options": options, "model": facts, "milliseconds": milliseconds, "ratio": ratio, "cpu_ratio": by_cpu}
    write_result("drop_muon", result | {"others": others, "races": races}, chosen.out)


if __name__ == "__main__":
    command.run(main)
