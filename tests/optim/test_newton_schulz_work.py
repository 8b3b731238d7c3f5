"""The work of layer-aware Newton-Schulz: what a program does for a stack, and what the benchmark bills."""

from __future__ import annotations

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import optim
from benchmarks.newton_schulz_steps import work
from optim.directions.layer_aware import grouped, switched
from optim.directions.newton_schulz import flops
from optim.options import Measured
from optim.roles import parameters
from optim.rules import resolved

FEW, MANY = 2, 6
CANDIDATES = (f"jordan{FEW}", f"jordan{MANY}")


class Blocks(nnx.Module):
    """Three layers of a square matrix, and of two matrices of two widths side by side."""

    def __init__(self):
        self.query = nnx.Param(jnp.ones((3, 12, 12)), role="matrix", axes=("layer", "embed", "heads"))
        self.up = nnx.Param(jnp.ones((3, 12, 30)), role="matrix", axes=("layer", "embed", "mlp"), split=(10, 20))


def programs(value):
    """The programs in a parameter of an equation."""
    if isinstance(value, (tuple, list)):
        return [program for own in value for program in programs(own)]
    return [value.jaxpr] if hasattr(value, "jaxpr") else [value] if hasattr(value, "eqns") else []


def bill(program):
    """FLOPs of the products that a program always does, those of the branches of each switch in it, and how often it is met."""
    always, switches = 0, []
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            (over, _), _ = equation.params["dimension_numbers"]
            shared = math.prod(equation.invars[0].aval.shape[axis] for axis in over)
            always += 2 * shared * math.prod(equation.outvars[0].aval.shape)
        elif equation.primitive.name == "cond":
            switches.append((1, [bill(own.jaxpr)[0] for own in equation.params["branches"]]))
        else:
            assert equation.primitive.name != "while"  # without a known number of turns
            turns = equation.params["length"] if equation.primitive.name == "scan" else 1
            for inner in programs(list(equation.params.values())):
                one, met = bill(inner)
                always += turns * one
                switches += [(turns * count, branches) for count, branches in met]
    return always, switches


def test_rows_of_a_stack_with_mixed_choices_do_the_work_of_their_own_steps():
    x = {"a": jnp.ones((4, 12, 12)), "b": jnp.ones((4, 10, 30))}

    def spent(*choice):
        always, switches = bill(jax.make_jaxpr(lambda x: grouped(x, dict.fromkeys(x, choice), CANDIDATES))(x).jaxpr)
        assert not switches
        return always

    def expected(few, many):
        return sum(few * flops(*shape, FEW) + many * flops(*shape, MANY) for shape in ((12, 12), (10, 30)))

    assert spent(0, 0, 0, 0) == expected(4, 0) < spent(0, 0, 1, 0) == expected(3, 1) < spent(1, 1, 1, 1) == expected(0, 4)


def test_a_measured_choice_is_a_branch_that_only_its_own_matrices_take():
    """Under `jax.vmap` a switch would do the work of all its branches and select."""
    declared = parameters(Blocks())
    x = {"query": jnp.ones((3, 12, 12)), "up[0]": jnp.ones((3, 12, 10)), "up[1]": jnp.ones((3, 12, 20))}
    choice = {"query": jnp.zeros((3, 1), jnp.int32), "up": jnp.zeros((3, 2), jnp.int32)}
    chosen = Measured(candidates=CANDIDATES)
    always, switches = bill(jax.make_jaxpr(lambda x, choice: switched(x, choice, chosen, declared))(x, choice).jaxpr)
    assert always == 0 and [times for times, _ in switches] == [3, 3, 3]
    for n, (_, branches) in zip((12, 10, 20), switches, strict=True):
        assert branches == pytest.approx([flops(12, n, FEW), flops(12, n, MANY)])


@pytest.fixture
def ended():
    """A contestant of the benchmark as it ended, with choices that are given."""

    def contestant(newton_schulz=None, choices=None):
        model = Blocks()
        direction = {"name": "muon", "newton_schulz": newton_schulz}
        optimizer = resolved({"direction": direction, "schedule": {"name": "constant"}})
        tx, params = optim.build(optimizer, model), nnx.to_pure_dict(nnx.state(model, nnx.Param))
        state = tx.init(params)
        if choices:
            muon = state.directions["matrix"]
            found = muon.steps._replace(choice={path: jnp.asarray(rows, jnp.int32) for path, rows in choices.items()})
            state = state._replace(directions=state.directions | {"matrix": muon._replace(steps=found)})
        setup = SimpleNamespace(model=model, config=SimpleNamespace(optimizer=optimizer))
        return SimpleNamespace(setup=setup, state={"optimizer": state})

    return contestant


def test_a_measured_run_is_billed_its_last_candidate_before_its_choice(ended):
    measured = {"name": "measured", "candidates": list(CANDIDATES), "every": 1, "choose_at": 5}
    found = work(ended(measured, {"query": [[0], [0], [1]], "up": [[0, 1], [0, 0], [0, 0]]}))
    before = 3 * sum(flops(12, n, MANY) for n in (12, 10, 20))
    own = {12: (2, 1), 10: (3, 0), 20: (2, 1)}
    last = sum(few * flops(12, n, FEW) + many * flops(12, n, MANY) for n, (few, many) in own.items())
    assert found.last == last < before and found.matrices == {FEW: 7, MANY: 2}
    # The fifth update is the first with what was chosen.
    assert [found.up_to(k) for k in (0, 1, 4, 5, 40)] == [0, before, 4 * before, 4 * before + last, 4 * before + 36 * last]


def test_a_run_that_chooses_nothing_costs_the_same_in_every_update(ended):
    found = work(ended())
    assert found.matrices == {5: 9} and found.up_to(7) == 7 * found.last == 7 * 3 * sum(flops(12, n, 5) for n in (12, 10, 20))
    kinds = {"name": "predicted", "model_size": 10**8, "kinds": ["query=query", "up=up"]}
    found = work(ended(kinds))
    assert sum(found.matrices.values()) == 9 and found.up_to(7) == 7 * found.last > 0
