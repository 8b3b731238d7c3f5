"""On an accelerator one step is in flight: nothing of a step is read, or waited for, before the next one is dispatched."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest

import trainer
from trainer import loop
from trainer.setup import Setup

STEPS = 6
LOCAL = {"shape", "dtype", "ndim", "size", "sharding", "is_ready", "copy_to_host_async"}  # what never waits for a device


class Watched:
    """Stands for an array on a device, and tells of everything that would wait for it. On CPU a transfer guard does not."""

    def __init__(self, value, tell):
        self.value, self.tell = value, tell

    def __getattr__(self, name):
        if name not in LOCAL:
            self.tell()
        return getattr(self.value, name)

    def __array__(self, *_, **__):
        self.tell()
        return np.asarray(self.value)


for _name in ("__float__", "__int__", "__bool__", "__index__", "__repr__", "__format__", "__getitem__", "__iter__"):
    setattr(Watched, _name, lambda self, *rest, name=_name: self.__getattr__(name)(*rest))


@pytest.fixture
def events(monkeypatch):
    """What the loop does in its order, repetitions left out: `dispatch 2`, `read 1`, ..."""
    found, steps, original = [], itertools.count(1), Setup.jitted_train_step

    def tell(event):
        if found[-1:] != [event]:
            found.append(event)

    def jitted(setup, *rest):
        update = original(setup, *rest)

        def dispatch(state, *inputs):
            step = next(steps)
            tell(f"dispatch {step}")
            real = jax.tree.map(lambda leaf: leaf.value if isinstance(leaf, Watched) else leaf, state)
            state, metrics = update(real, *inputs)

            def watched(leaf):
                return Watched(leaf, lambda: tell(f"read {step}"))

            return state if step == STEPS else jax.tree.map(watched, state), jax.tree.map(watched, metrics)

        return dispatch

    monkeypatch.setattr(Setup, "jitted_train_step", jitted)
    for name in ("start_trace", "stop_trace"):
        monkeypatch.setattr(jax.profiler, name, lambda *_, name=name: tell(name))
    return found


@pytest.fixture
def config(tiny):
    """A run that stops nowhere between its first step and its last."""

    def of(**changes):
        checkpoint = {"every": 0, "keep_best": 0}
        return tiny(train__steps=STEPS, evaluate__every=0, checkpoint=checkpoint, log__sample_tokens=0, **changes)

    return of


def one_behind():
    """Step k is read right after step k + 1 is dispatched; the last one at the end."""
    behind = [[f"dispatch {step}", f"read {step - 1}"] for step in range(2, STEPS + 1)]
    return ["dispatch 1", *itertools.chain(*behind), f"read {STEPS}"]


@pytest.mark.parametrize("every", [1, 1000])
def test_an_accelerator_is_one_step_ahead_and_no_more(config, events, tmp_path, monkeypatch, every):
    original = loop.Loop._steps

    def steps(self, *rest):
        self.one_ahead = True  # as where steps do not run in the caller's thread
        return original(self, *rest)

    monkeypatch.setattr(loop.Loop, "_steps", steps)
    trainer.train(config(log__every=every), tmp_path / "run")
    assert events == one_behind()


def test_on_a_cpu_a_row_is_timed_before_the_next_step_runs(config, events, tmp_path):
    trainer.train(config(log__every=1), tmp_path / "run")
    assert events == [event for step in range(1, STEPS + 1) for event in (f"dispatch {step}", f"read {step}")]


def test_a_cpu_is_not_waited_for_where_no_row_is_due(config, events, tmp_path):
    trainer.train(config(log__every=1000), tmp_path / "run")
    later = [f"dispatch {step}" for step in range(2, STEPS + 1)]
    assert events == ["dispatch 1", "read 1", *later, f"read {STEPS}"]


def test_a_trace_holds_its_steps_whole_and_no_others(config, events, tmp_path):
    trainer.train(config(log={"every": 1000, "profile": [3, 4]}), tmp_path / "run")
    at = {event: place for place, event in enumerate(events)}
    assert at["dispatch 2"] < at["read 2"] < at["start_trace"] < at["dispatch 3"]
    assert at["dispatch 4"] < at["read 4"] < at["stop_trace"] < at["dispatch 5"]
