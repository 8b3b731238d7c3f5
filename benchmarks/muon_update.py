"""Time of one Muon update: Strata against optax.contrib.muon, on the same 24 matrices given to both as separate leaves.

    python -m benchmarks.muon_update
    python -m benchmarks.muon_update --shapes 6x256x256,... --pairs 20

A set of shapes is `COUNTxROWSxCOLUMNS` joined by `+`; the default sets are the matrices of four transformer blocks at several
widths, and squares, rectangles and thin matrices alone. Both run five steps of Jordan's polynomial, momentum, Nesterov, apply
the update and donate weights and state. Weights are float32; inside Newton-Schulz optax stays there, and Strata does on CPU but
takes bfloat16 elsewhere, as Muon's own code, so that a ratio on an accelerator is one of different precisions (`dtype`).
Segments alternate and the ratio is taken within each pair. Beside it: the same matrices stacked as the models here hold them;
and the share of the whole update, clipping and AdamW of the other parameters included, in a training step of
`configs/tiny.py` (`--set model.width=256 ...`), timed in turns as well.

Targets: never slower at any shape; goal at most 0.55 of optax's time on CPU and 0.5 on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.measure import (
    QUIET,
    Patience,
    Timed,
    batch_of,
    overrides,
    parser,
    quiet_only,
    show,
    shown_ratio,
    spread,
    timed,
    write_result,
)
from strata.cpu import tune_cpu
from trainer import command

SETS = {
    "blocks of width 128": "16x128x128+4x128x512+4x512x128",
    "blocks of width 256": "16x256x256+4x256x1024+4x1024x256",
    "blocks of width 512": "16x512x512+4x512x2048+4x2048x512",
    "squares 64": "24x64x64",
    "squares 384": "24x384x384",
    "rectangles 256 : 1024": "24x256x1024",
    "rectangles 1024 : 256": "24x1024x256",
    "nearly square 256 : 320": "24x256x320",
    "thin 32 : 2048": "24x32x2048",
}

Shape = tuple[int, int, int]


def parse(text: str) -> list[Shape]:
    """`4x256x1024+...` as (count, rows, columns). Raises `SystemExit` with what is wrong."""
    try:
        shapes = [tuple(int(word) for word in part.split("x")) for part in text.split("+")]
        if any(len(shape) != 3 or min(shape) < 1 for shape in shapes):
            raise ValueError
    except ValueError:
        raise SystemExit(
            f"error: --shapes {text}: expected COUNTxROWSxCOLUMNS joined by +, such as 16x256x256+4x256x1024"
        ) from None
    return shapes


def updaters(shapes: list[Shape]) -> dict[str, Callable[[], None]]:
    """Functions that do one update of their own weights and wait for it, by contestant."""
    import jax
    import optax

    import optim

    separate, stacked = {}, {}
    for i, (count, rows, columns) in enumerate(shapes):
        stack = jax.random.normal(jax.random.key(i), (count, rows, columns))
        stacked[f"stack{i}"] = stack
        separate |= {f"matrix{i}_{j}": stack[j] for j in range(count)}
    contestants = {
        "Strata": (optim.muon(0.02), separate),
        "optax": (optax.contrib.muon(0.02), separate),
        "Strata, stacked": (optim.muon(0.02), stacked),
    }

    def updater(transformation: Any, weights: Any) -> Callable[[], None]:
        # A spectrum of gradients, not zeros: the time does not depend on it, but denormal numbers would show.
        gradients = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), weights)
        state = jax.jit(transformation.init)(weights)

        def step(weights: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
            updates, state = transformation.update(gradients, state, weights)
            return optax.apply_updates(weights, updates), state

        compiled = jax.jit(step, donate_argnums=(0, 1))
        held = [jax.tree.map(lambda x: x.copy(), weights), state]

        def run() -> None:
            held[:] = compiled(*held, gradients)
            jax.block_until_ready(held)

        return run

    return {name: updater(*own) for name, own in contestants.items()}


def alternated(
    runners: dict[str, Callable[[], None]], pairs: int, seconds: float, patience: Patience
) -> dict[str, list[Timed]]:
    """Segments of about `seconds` of every runner in turns; what a call took in each."""
    for update in (*runners.values(), *runners.values()):  # compiles
        update()
    lengths = {name: max(1, round(seconds / timed(update, 2).seconds)) for name, update in runners.items()}
    found: dict[str, list[Timed]] = {name: [] for name in runners}
    for pair in range(pairs):
        patience.wait()
        for name in list(runners) if pair % 2 == 0 else reversed(runners):
            found[name].append(timed(runners[name], lengths[name]))
    return found


def race(shapes: list[Shape], pairs: int, seconds: float, patience: Patience) -> dict[str, Any]:
    """Alternate the contestants and sum up."""
    found = alternated(updaters(shapes), pairs, seconds, patience)
    theirs = found["optax"]
    result: dict[str, Any] = {"shapes": shapes}
    for name, own in found.items():
        ratios = [one.seconds / other.seconds for one, other in zip(own, theirs, strict=True)]
        busy = [None if None in (a.others, b.others) else max(a.others, b.others) for a, b in zip(own, theirs, strict=True)]
        quiet = quiet_only(ratios, busy)
        result[name] = {
            "milliseconds": spread([1e3 * one.seconds for one in own]),
            "over_optax": spread(ratios),
            "over_optax_quiet": spread(quiet) if quiet else None,
        }
    return result


def share_of_step(changes: list[tuple[str, str]], pairs: int, seconds: float, patience: Patience) -> dict[str, Any]:
    """The update of `configs/tiny.py` over its whole training step."""
    import jax
    import jax.numpy as jnp
    import optax

    import optim
    from trainer.config import load
    from trainer.setup import assemble

    config = load("configs/tiny.py", [("data.name", "bigram"), ("data.vocabulary", "257"), *changes]).config
    setup = assemble(config)
    batch = batch_of(config, setup.model.vocab_size)
    rates, transformation = setup.put_scalars(optim.rates(config.optimizer, config.train.steps)(1)), setup.transformation()

    def alone(state: Any, gradients: Any) -> Any:
        updates, optimizer = transformation.update(gradients, state["optimizer"], state["params"], rates=rates)
        return state | {"params": optax.apply_updates(state["params"], updates), "optimizer": optimizer}

    with jax.set_mesh(setup.mesh):
        states = [setup.initial_state(setup.initial_params())]
        states.append(jax.tree.map(jnp.copy, states[0]))
        gradients = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), states[0]["params"])
    step, update = setup.jitted_train_step(), jax.jit(alone, donate_argnums=0)

    def whole() -> None:
        with jax.set_mesh(setup.mesh):
            states[0], metrics = step(states[0], batch, rates)
        jax.block_until_ready((states[0], metrics))

    def own() -> None:
        with jax.set_mesh(setup.mesh):
            states[1] = update(states[1], gradients)
        jax.block_until_ready(states[1])

    found = alternated({"step": whole, "update": own}, pairs, seconds, patience)
    ratios = [a.seconds / b.seconds for a, b in zip(found["update"], found["step"], strict=True)]
    milliseconds = {name: spread([1e3 * one.seconds for one in own]) for name, own in found.items()}
    return {"milliseconds": milliseconds, "share": spread(ratios), "width": config.model.width, "tokens": batch["tokens"].size}


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    import jax

    arguments = parser(__doc__)
    arguments.add_argument("--shapes", nargs="+", default=None, help="sets of shapes, such as 16x256x256+4x256x1024")
    arguments.add_argument("--pairs", type=int, default=12, help="segments of every contestant")
    arguments.add_argument("--seconds", type=float, default=0.5, help="length of a segment")
    arguments.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="change a field of the step's config"
    )
    chosen = arguments.parse_args(argv)
    tune_cpu()
    sets = {text: text for text in chosen.shapes} if chosen.shapes else SETS
    parsed = {name: parse(text) for name, text in sets.items()}
    patience = Patience(chosen.patience)
    found = {name: race(shapes, chosen.pairs, chosen.seconds, patience) for name, shapes in parsed.items()}
    rows = []
    for name, result in found.items():
        quiet = result["Strata"]["over_optax_quiet"]
        rows.append(
            [
                name,
                f"{result['optax']['milliseconds']['median']:.2f}",
                f"{result['Strata']['milliseconds']['median']:.2f}",
                shown_ratio(result["Strata"]["over_optax"]),
                f"{shown_ratio(quiet)} n={quiet['count']}" if quiet else "none",
                shown_ratio(result["Strata, stacked"]["over_optax"]),
            ]
        )
    columns = ["24 matrices", "optax ms", "Strata ms", "Strata / optax", "in quiet pairs", "stacked / optax"]
    inside = {"optax": "float32", "Strata": "float32" if jax.default_backend() == "cpu" else "bfloat16"}
    notes = [
        f"ratios: median [95 %] of times within pairs; quiet: others use <= {QUIET} cores.",
        f"inside Newton-Schulz: {', '.join(f'{name} {dtype}' for name, dtype in inside.items())}",
    ]
    show("one Muon update, five Newton-Schulz steps", columns, rows, notes)
    step = share_of_step(overrides(chosen.set), chosen.pairs, chosen.seconds, patience)
    milliseconds = {name: own["median"] for name, own in step["milliseconds"].items()}
    print(
        f"share of step time: the update {milliseconds['update']:.2f} ms of {milliseconds['step']:.2f} ms, "
        f"{shown_ratio(step['share'])}, width {step['width']}, {step['tokens']:,} tokens a step"
    )
    options = {"pairs": chosen.pairs, "seconds": chosen.seconds, "set": chosen.set}
    write_result("muon_update", {"options": options, "dtype": inside, "sets": found, "step": step}, chosen.out)


if __name__ == "__main__":
    command.run(main)
