"""Layers of one kind are stacked: the split of a stack into segments, and that layers run in order whatever it is."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import models
from models.placements.placement import Context
from models.stack import Stack, patterns


def fewest(kinds: tuple) -> tuple[int, int]:
    """Fewest blocks, then fewest segments, of all splits into repeated patterns: by trying every one."""

    @functools.cache
    def rest(start: int) -> tuple[int, int]:
        if start == len(kinds):
            return 0, 0
        found = []
        for end in range(start + 1, len(kinds) + 1):
            for period in range(1, end - start + 1):
                repeats, over = divmod(end - start, period)
                if not over and kinds[start:end] == kinds[start : start + period] * repeats:
                    blocks, parts = rest(end)
                    found.append((blocks + period, parts + 1))
        return min(found)

    return rest(0)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=9))
def test_patterns_are_the_smallest_split_and_spell_the_sequence(kinds):
    found = patterns(kinds)
    spelled = [kinds[p.start + i % p.period] for p in found for i in range(p.period * p.repeats)]
    assert spelled == kinds
    assert [p.start for p in found] == np.cumsum([0] + [p.period * p.repeats for p in found])[:-1].tolist()
    assert (sum(p.period for p in found), len(found)) == fewest(tuple(kinds))


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ("aaaa", [(0, 1, 4)]),
        ("aabbbb", [(0, 1, 2), (2, 1, 4)]),  # Mix-LN
        ("aaab" * 6, [(0, 4, 6)]),  # a hybrid: three linear, one softmax
        ("aab" * 2 + "cccc", [(0, 3, 2), (6, 1, 4)]),
        ("aaabbb", [(0, 1, 3), (3, 1, 3)]),
        ("abcab", [(0, 5, 1)]),
    ],
)
def test_known_stacks_have_the_segments_that_a_reader_expects(kinds, expected):
    assert [tuple(pattern) for pattern in patterns(kinds)] == expected


WINDOW, FULL = {"name": "attention", "window": 2}, {"name": "attention"}
HYBRID = {"name": "hybrid", "pattern": [WINDOW, WINDOW, FULL]}


def segments(config: dict) -> list[tuple[int, int]]:
    found = models.abstract(config, vocab_size=11).stack()
    return [(len(span.kinds), span.repeats) for span in found.spans(0, len(found) // found.loops)]


def test_mix_ln_is_two_segments_and_a_hybrid_is_one(config):
    assert segments(config(layers=8, placement={"name": "mix"})) == [(1, 2), (1, 6)]
    assert segments(config(layers=8, placement={"name": "mix", "alpha": 0.0})) == [(1, 8)]
    assert segments(config(layers=9, mixer=HYBRID)) == [(3, 3)]
    # Both at once: the first pattern, of two equal layers and another, is post-norm; the rest is pre-norm.
    assert segments(config(layers=9, mixer=HYBRID, placement={"name": "mix", "alpha": 1 / 3})) == [(1, 2), (1, 1), (3, 2)]
    # With loops a plan is one of unique layers.
    looped = config(layers=12, mixer=HYBRID, depth={"name": "recursive", "loops": 2})
    assert segments(looped) == [(3, 2)]


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({"layers": 8, "placement": {"name": "mix"}}, [[0, 1], [2, 3, 4, 5, 6, 7]]),
        ({"layers": 9, "mixer": HYBRID}, [[0, 1, 3, 4, 6, 7], [2, 5, 8]]),
        ({"layers": 6, "mixer": {"name": "hybrid", "pattern": [FULL, FULL, WINDOW, FULL, FULL, FULL]}}, [[0, 1, 3, 4, 5], [2]]),
        ({"layers": 12, "mixer": HYBRID, "depth": {"name": "recursive", "loops": 2}}, [[0, 1, 3, 4], [2, 5]]),
    ],
)
def test_layers_with_equal_options_are_stacked_together_wherever_they_stand(config, fields, layers):
    model = models.abstract(config(**fields), vocab_size=11)
    found = [block.mixer.query.kernel for block in model.blocks.values()]
    assert [list(kernel.get_metadata()["positions"]) for kernel in found] == layers
    assert [kernel.shape[0] for kernel in found] == [len(own) for own in layers]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["block0", "block1", "block2"]), min_size=1, max_size=9), st.integers(1, 3), st.data())
def test_spans_cover_any_range_of_layers_exactly_once_and_in_order(kinds, loops, data):
    stack = Stack({kind: _Empty() for kind in set(kinds)}, kinds, loops)
    assert [place.kind for place in stack.places] == kinds * loops
    for kind in set(kinds):
        assert stack.slots(kind, [p for p in stack.places if p.kind == kind]).tolist() == list(range(loops * kinds.count(kind)))
    first = data.draw(st.integers(0, len(stack)))
    stop = data.draw(st.integers(first, len(stack)))
    covered = []
    for span in stack.spans(first, stop):
        assert span.layer == first + len(covered)
        assert len({place.loop for place in stack.places[span.layer : span.layer + span.repeats * len(span.kinds)]}) == 1
        # What a scan takes of each kind, a repeat at a time and in the order of the pattern, is what stands at those layers.
        for repeat in range(span.repeats):
            rows = {kind: list(range(at.start, at.stop)) for kind, at in stack.rows(span, repeat).items()}
            covered += [(kind, rows[kind].pop(0)) for kind in span.kinds]
            assert not any(rows.values())
        whole = {kind: (at.start, at.stop) for kind, at in stack.rows(span).items()}
        parts = [stack.rows(span, repeat) for repeat in range(span.repeats)]
        assert whole == {kind: (parts[0][kind].start, parts[-1][kind].stop) for kind in whole}
    assert covered == [(p.kind, int(stack.slots(p.kind, [p])[0])) for p in stack.places[first:stop]]
    # As few scans as can be: one a segment and loop, and one more for each end inside a pattern.
    segments = loops * len(patterns(kinds))
    assert len(stack.spans(0, len(stack))) == segments
    assert len(stack.spans(first, stop)) <= segments + 2


class _Empty(nnx.Module):
    """A block without parameters."""

    mixer = None


MIXED = {
    "hybrid": {"layers": 7, "mixer": HYBRID},
    "hybrid_and_mix": {"layers": 7, "mixer": HYBRID, "placement": {"name": "mix", "alpha": 0.6}},
    "looped_hybrid": {"layers": 8, "mixer": {"name": "hybrid", "pattern": [WINDOW, FULL]}, "depth": {"name": "recursive"}},
}


@pytest.mark.parametrize(
    "fields", [pytest.param(v, id=n, marks=() if n == "hybrid_and_mix" else pytest.mark.slow) for n, v in MIXED.items()]
)
def test_layers_run_in_order_whatever_the_segments(config, awake, run, tokens, fields):
    """Each layer by itself, taken from the stack by its number, one after another."""
    model, rows = awake(config(width=8, heads=1, **fields)), tokens(2, 6)
    option = model.options
    plan = option.plan()

    def by_hand(state):
        model = nnx.merge(graph, state)
        stack = model.stack()
        h = e = model.embedding(rows, jnp.float32)
        for layer, place in enumerate(stack.places):
            block = stack.block(place.kind, jax.tree.map(lambda x: x[0], stack.gather(place.kind, [place])))
            assert block.mixer.window == plan[layer % len(plan)].mixer.window
            assert type(block.placement).__name__.lower().startswith(plan[layer % len(plan)].placement.name)
            h = block(h, Context(block.mixer.prepare(6, None), jnp.int32(layer), e))
        return model.head(model.final_norm(h))

    graph, state = nnx.split(model)
    expected = jax.jit(by_hand)(state)
    for unroll in (True, False):
        found = run(model, rows, depth={"name": option.depth.name, "unroll": unroll})
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
