"""The front door with clocks: what `benchmarks.start_time` starts. Prints its seconds as JSON after step 1 and leaves.

The clock begins where the parent took the time (`BENCHMARK_BEGIN`, seconds since the epoch), before this process existed.
Nothing heavy may be imported at the top: imports are one of the parts.
"""

from __future__ import annotations

import os
import sys
import time

begin = float(os.environ["BENCHMARK_BEGIN"])
entered = time.time()


def main(argv: list[str]) -> None:
    """Start as `trainer.cli.main` does, until the first step is over."""
    spent = {"interpreter": entered - begin}
    from trainer import cli
    from trainer import config as configuration

    arguments = cli.parse(argv)
    loaded = configuration.load(arguments.values["config"], arguments.overrides)
    read = time.time()
    spent["config"] = read - entered
    from trainer import devices

    devices.start(loaded.config)
    import jax

    from trainer import data, loop, setup
    from trainer.metrics.throughput import CompileClock

    spent["imports"] = time.time() - read

    within = [0.0]  # seconds of parts inside the part that is running, so that each second counts once

    def timed(part, owner, name):
        inner = getattr(owner, name)

        def outer(*given, **named):
            before = time.time()
            within.append(0.0)
            try:
                return inner(*given, **named)
            finally:
                took = time.time() - before
                spent[part] = spent.get(part, 0.0) + took - within.pop()
                within[-1] += took

        setattr(owner, name, outer)

    timed("data", data, "build")
    timed("assemble", loop, "assemble")
    timed("initial state", setup.Setup, "initial_params")
    timed("initial state", setup.Setup, "initial_state")
    timed("run directory", loop.Loop, "_write_first_files")
    compiling = CompileClock()
    make = setup.Setup.jitted_train_step

    def first_step_only(self):
        jitted = make(self)

        def step(*given):
            before, compiled = time.time(), compiling.seconds
            jax.block_until_ready(jitted(*given))
            end = time.time()
            spent["step 1: compile"] = compiling.seconds - compiled
            spent["step 1: run"] = end - before - spent["step 1: compile"]
            finish(end)

        return step

    def finish(end: float) -> None:
        total = end - begin
        print(json.dumps(spent | {"other": total - sum(spent.values()), "total": total}), flush=True)
        os._exit(0)

    import json

    setup.Setup.jitted_train_step = first_step_only
    loop.train(loaded.config, arguments.values["workdir"])


if __name__ == "__main__":
    main(sys.argv[1:])
