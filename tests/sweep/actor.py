"""Acts as a run: `python actor.py CONFIG WORKDIR`. What it does stands in `WORKDIR.script`, one word an attempt; without
that in ACTOR_WORD. Its loss falls by step and is lowest for a learning rate of 1e-3.

finish            makes all its steps
slow              the same, after a third of a second
crawl             the same, a tenth of a second a step, until it is told to stop
crash             makes half of what is left and exits 1
die               the same, and is gone without a word
hang              sleeps until it is told to stop, saves, exits 75
deaf              makes half of what is left and then hears nothing
diverge, data     exits 3 and 4 as the trainer does
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

from trainer.metrics.jsonl import MetricsWriter
from trainer.run_directory import RunDirectory


def main(config: Path, workdir: Path) -> int:
    text = config.read_text()
    config = json.loads(text)
    steps, rate = config["train"]["steps"], config["optimizer"]["direction"]["learning_rate"]
    told = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: told.append(1))
    script = workdir.with_name(f"{workdir.name}.script")
    words = script.read_text().split() if script.is_file() else []
    word = words[0] if words else os.environ.get("ACTOR_WORD", "finish")
    if len(words) > 1:
        script.write_text(" ".join(words[1:]))
    if word == "data":
        print("error: the data is damaged", file=sys.stderr)
        return 4
    with RunDirectory(workdir) as run:
        done = (run.read_status() or {"step": 0})["step"]
        run.write_config(text, {})
        run.write_status("running", done)
        with MetricsWriter(run.metrics) as metrics:
            time.sleep(0.3 if word == "slow" else 0)
            last = steps if word in ("finish", "slow", "crawl") else done + (steps - done + 1) // 2
            for step in range(done + 1, last + 1):
                time.sleep(0.1 if word == "crawl" else 0)
                loss = 1 / step + abs(math.log10(rate) + 3)
                timing = {"step_seconds": 0.01, "time": time.time()}
                metrics.write({"step": step, "split": "train", "loss": loss, "timing": timing})
                metrics.write({"step": step, "split": "val", "loss": loss})
                if told and word == "crawl":
                    run.write_status("preempted", step, "SIGTERM")
                    return 75
        run.write_status("running", last)
        stamp = workdir.with_name("times.jsonl")
        with open(stamp, "a") as file:
            file.write(json.dumps({"run": workdir.name, "cpus": sorted(os.sched_getaffinity(0)), "time": time.time()}) + "\n")
        if word in ("finish", "slow", "crawl"):
            run.write_status("finished", last)
            return 0
        if word == "diverge":
            run.write_status("failed", last, "Diverged: the loss of step 2 is not finite")
            return 3
        if word == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        while word == "deaf":
            time.sleep(0.02)
        if word == "hang":
            while not told:
                time.sleep(0.02)
            run.write_status("preempted", last, "SIGTERM")
            return 75
        run.write_status("failed", last, "StrataError: it broke")
        print("error: it broke", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
