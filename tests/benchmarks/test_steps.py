"""The contestants of the speed comparison compute the same thing, whatever form they are written in."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.steps import ablations, plain_jax, strata_step
from benchmarks.steps.sizes import Size
from models.layers import linear
from models.mixers import softmax
from trainer.setup import assemble
from trainer.step import evaluation_step

SIZE = Size(width=32, layers=3, heads=2, length=24, batch=2, vocabulary=17)
HOMES = {
    "query": "mixer", "key": "mixer", "value": "mixer", "out": "mixer", "gate": "ffn", "up": "ffn", "down": "ffn",
}  # fmt: skip


def as_strata(plain):
    """The plain script's parameters in Strata's tree."""
    block = {"mixer": {}, "ffn": {}, "placement": {}}
    for name, value in plain["blocks"].items():
        if name in HOMES:
            block[HOMES[name]][name] = {"kernel": value}
        else:
            block["placement"][name] = {"scale": value}
    return {
        "embedding": {"table": plain["embedding"]},
        "head_kernel": plain["head"],
        "final_norm": {"scale": plain["norm"]},
        "blocks": {"block0": block},
    }


def plain_loss(params):
    with jax.numpy_rank_promotion("allow"):
        return plain_jax.loss(params, *map(jnp.asarray, SIZE.rows()), SIZE.heads)


def strata_loss():
    """A function from the plain script's parameters to Strata's loss; the forms in use when it is made are its own."""
    setup = assemble(strata_step.config(SIZE))
    tokens, targets = SIZE.rows()
    rows = {"tokens": tokens, "targets": targets, "segment_ids": np.ones_like(tokens)}
    batch = setup.put_batch(rows | {"weights": np.ones(tokens.shape, np.float32)}, SIZE.batch)
    step = evaluation_step(setup.graph, None, None)
    return lambda params: step(as_strata(params), batch)["nats"] / SIZE.tokens


def assert_same(loss, reference):
    params = plain_jax.init(SIZE, jax.random.key(3))
    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    expected, slopes = jax.jit(jax.value_and_grad(reference))(params)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    for path, slope in jax.tree_util.tree_leaves_with_path(slopes):
        got = np.asarray(dict(jax.tree_util.tree_leaves_with_path(gradients))[path])
        np.testing.assert_allclose(got, slope, atol=3e-5 * float(jnp.max(jnp.abs(slope))), err_msg=str(path))


def test_stratas_step_computes_what_the_plain_script_does():
    assert_same(strata_loss(), plain_loss)


@pytest.mark.parametrize("name", ablations.FORMS)
def test_leaving_a_form_out_changes_the_program_and_not_what_it_computes(name, monkeypatch):
    monkeypatch.setattr(softmax, "QUERY_BLOCK", 8)  # so that 24 tokens are three blocks
    params, usual = plain_jax.init(SIZE, jax.random.key(3)), strata_loss()
    program = jax.jit(jax.grad(usual)).lower(params).as_text()
    homes = ((linear, "product"), (softmax, "MOST_BLOCKS"), (softmax, "_weighted"))
    for home, attribute in homes:
        monkeypatch.setattr(home, attribute, getattr(home, attribute))  # is put back afterwards
    ablations.FORMS[name][0]()
    jax.clear_caches()
    other = strata_loss()
    assert jax.jit(jax.grad(other)).lower(params).as_text() != program
    assert_same(other, plain_loss)


def test_pytorch_computes_the_same_loss():
    if importlib.util.find_spec("torch") is None:
        pytest.skip("PyTorch is not installed (extra `benchmark`)")
    import torch

    from benchmarks.steps import torch_eager

    params = jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf)), plain_jax.init(SIZE, jax.random.key(3)))
    model = torch_eager.Model(SIZE)
    blocks = params["blocks"]
    with torch.no_grad():
        model.embedding.weight.copy_(params["embedding"])
        model.head.weight.copy_(params["head"].T)
        model.norm.weight.copy_(params["norm"])
        for i, block in enumerate(model.blocks):
            block.qkv.weight.copy_(torch.cat([blocks[name][i].T for name in ("query", "key", "value")]))
            for name in ("out", "gate", "up", "down"):
                getattr(block, name).weight.copy_(blocks[name][i].T)
    tokens, targets = (torch.from_numpy(rows).long() for rows in SIZE.rows())
    loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(float(plain_loss(plain_jax.init(SIZE, jax.random.key(3)))), rel=1e-5)
