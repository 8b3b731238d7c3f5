"""Spectral laws: planted ones are recovered, and those of runs are read from their checkpoints."""

from __future__ import annotations

import json
import math

import jax
import numpy as np
import pytest

from optim.directions.spectral_laws import Law, fit
from optim.layerwise.spectrum import spectral_quantile
from strata import ConfigError, StrataError
from trainer import spectra


@pytest.mark.parametrize("law", [Law(0.9, 0.25), Law(5e-5 * 3e11**0.66, 0.66)])
def test_a_planted_power_law_is_recovered(law):
    sizes = [77e6, 160e6, 354e6, 600e6, 1.2e9, 1.6e9, 2.8e9]
    found = fit(sizes, [law.at(size) for size in sizes])
    assert found.law.alpha == pytest.approx(law.alpha, rel=1e-9) and found.law.c == pytest.approx(law.c, rel=1e-6)
    assert found.r_squared == pytest.approx(1) and np.ptp(found.slopes) < 1e-9


def test_intervals_hold_the_truth_as_often_as_they_say():
    law, sizes, rng, hits = Law(2.0, 0.4), np.geomspace(1e6, 1e9, 6), np.random.default_rng(0), 0
    for _ in range(400):
        found = fit(sizes, law.at(sizes) * np.exp(rng.normal(size=6) * 0.1))
        hits += found.alpha_interval[0] <= law.alpha <= found.alpha_interval[1]
    assert 0.92 <= hits / 400 <= 0.98


def test_two_runs_give_a_line_without_an_interval():
    found = fit([1e6, 1e8], [1e-2, 1e-3])
    assert found.law.alpha == pytest.approx(0.5) and math.isnan(found.alpha_interval[0])


def test_one_size_gives_no_law():
    with pytest.raises(ValueError, match="two sizes"):
        fit([1e6, 1e6], [0.1, 0.2])


def measured(size, alpha):
    return spectra.Measured(f"run{size}", size, (3,), {("query", "mid", 0.5): 2.0 * size**-alpha, ("up", "final", 0.9): 0.1})


def test_laws_are_fitted_over_runs_and_printed_as_options(capsys):
    found = [measured(size, 0.3) for size in (10**6, 10**7, 10**8)]
    laws = spectra.fits(found)
    assert laws["query", "mid", 0.5].law.alpha == pytest.approx(0.3)
    spectra.show(found, laws)
    assert "query@mid=2,0.3000" in capsys.readouterr().out
    text = json.dumps(spectra.as_json(found, laws))
    assert json.loads(text)["laws"]["query@mid q=0.5"]["alpha"] == pytest.approx(0.3)
    assert spectra.fits(found[:1]) == {}


def test_a_law_that_rises_is_printed_as_the_constant_that_fits_best(capsys):
    found = [measured(size, -0.2) for size in (10**6, 10**7, 10**8)]
    spectra.show(found, spectra.fits(found))
    assert f"query@mid={2 * 1e7**0.2:.6g},0.0000" in capsys.readouterr().out


def test_the_momentum_of_a_transformation_of_optax_lies_under_its_parameter():
    arrays = ["optimizer/directions/all/blocks.up/nu", "optimizer/directions/all/blocks.up/mu", "params/blocks.up/mu"]
    assert spectra._momentum(arrays, "blocks.up") == arrays[1] and spectra._momentum(arrays, "blocks.down") is None


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    import trainer

    path = tmp_path_factory.mktemp("spectra") / "run"
    config = {
        "data": {"name": "bigram", "sequence_length": 8, "batch_size": 2, "vocabulary": 8},
        "model": {"width": 16, "layers": 2, "heads": 2},
        "optimizer": {"direction": {"name": "muon"}, "schedule": {"name": "constant"}},
        "train": {"steps": 4},
        "evaluate": {"every": 0},
        "checkpoint": {"every": 1},
        "log": {"sample_tokens": 0},
    }
    trainer.train(config, path)
    return path


def test_the_spectra_of_a_run_are_those_of_the_momentum_in_its_checkpoint(run, capsys):
    found = spectra.measure(run)
    assert found.steps == (4,) and {key[1] for key in found.values} == {"mid", "final"}
    assert {key[0] for key in found.values} >= {"query", "key", "value", "output", "up", "down"}
    from trainer.checkpoint import Checkpointer
    from trainer.manifest import read_manifest

    arrays = read_manifest(run / "checkpoints" / "4").arrays
    place = next(path for path in arrays if "/momentum/" in path and ".query." in path)
    wanted = jax.ShapeDtypeStruct(arrays[place][1], arrays[place][0])
    for name in reversed(place.split("/")):
        wanted = {name: wanted}
    momentum = jax.tree.leaves(Checkpointer(run / "checkpoints").restore(wanted, 4, partial=True).state)[0]
    for q in (0.1, 0.5):
        expected = spectral_quantile(momentum, q)
        assert found.values["query", "mid", q] == pytest.approx(float(expected[0]), rel=1e-4)
        assert found.values["query", "final", q] == pytest.approx(float(expected[1]), rel=1e-4)
    assert spectra.main([str(run)]) == 0 and "normalised singular values" in capsys.readouterr().out


def test_checkpoints_up_to_a_step_are_averaged_geometrically(run):
    """The values of several checkpoints are the geometric means of those of each."""
    both = spectra.measure(run, last=2)
    assert both.steps == (3, 4) and spectra.measure(run, last=1, until=3) == spectra.measure(run, last=9, until=3)
    three, four = spectra.measure(run, until=3), spectra.measure(run)
    assert three.steps == (3,) and four.steps == (4,) and three.values != four.values
    for key, value in both.values.items():
        assert value == pytest.approx(math.sqrt(three.values[key] * four.values[key]))
    with pytest.raises(StrataError, match="no checkpoint up to step 1"):
        spectra.measure(run, until=1)


def test_what_is_no_run_and_what_matches_nothing_are_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="not a run|does not exist"):
        spectra.measure(tmp_path)
    with pytest.raises(ConfigError, match="fits no matrix"):
        spectra.measure(run, kinds=["*.nothing=up"])
    with pytest.raises(ConfigError, match="--last"):
        spectra.main([str(run), "--last", "0"])


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(spectra, "measure", None)
    for out in (tmp_path / "missing" / "laws.json", tmp_path):
        with pytest.raises(ConfigError, match="--out = .*a directory that exists"):
            spectra.main([str(tmp_path), "--out", str(out)])
