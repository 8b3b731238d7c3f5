"""`trainer.inspect`: pictures of every diagnostic, on a page that needs nothing else, also for a run without rows."""

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

import optim
import trainer
from strata import ConfigError, StrataError
from trainer import inspect
from trainer.diagnostics.options import Diagnostics
from trainer.metrics import MetricsWriter, read_metrics

MEASURED = {"name": "measured", "every": 3, "choose_at": 5, "candidates": ["jordan2", "jordan7"]}
DRAWS = "the extra `report` (Matplotlib) is not installed"


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib", reason=DRAWS)


@pytest.fixture(scope="module")
def trained():
    """Where the run is that all tests copy, once it is there."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "run"


@pytest.fixture
def run(tiny, trained, tmp_path):
    """A finished run with rows at steps 2, 4 and 6 and checkpoints at 4, 6 and 7."""
    if not trained.exists():
        config = tiny(
            optimizer__direction={"name": "muon", "newton_schulz": MEASURED},
            optimizer__layerwise={"name": "lanton", "interval": 1},
            diagnostics__every=2,
            train__steps=7,
            checkpoint={"every": 2, "keep_latest": 3, "keep_best": 0},
        )
        trainer.train(config, trained)
    return Path(shutil.copytree(trained, tmp_path / "run"))


def without_rows(directory, names):
    """Take the rows of diagnostics out of a run, and let its config have only some of them."""
    config = json.loads((directory / "config.json").read_text())
    config["diagnostics"]["names"] = names
    (directory / "config.json").write_text(json.dumps(config))
    path = directory / "metrics.jsonl"
    kept = [line for line in path.read_text().splitlines(True) if json.loads(line)["split"] != "diagnostics"]
    path.write_text("".join(kept))


def test_a_checkpoint_measured_afterwards_gives_the_row_that_training_wrote(run):
    recorded = {row["step"]: row for row in inspect.recorded(run)}
    assert list(recorded) == [2, 4, 6]
    measured = inspect.measured(run, every=True)
    assert [row["step"] for row in measured] == [4, 6, 7]
    for row in measured[:2]:
        assert row == {name: value for name, value in recorded[row["step"]].items() if name != "timing"}
    assert [row["step"] for row in inspect.measured(run)] == [7]


def test_multipliers_and_steps_of_every_layer_are_those_of_the_optimizers_state(run):
    rows = {row["step"]: row for row in inspect.recorded(run)}
    opened = trainer.load(run)
    states = dict(inspect.states(opened, every=True))
    path = "blocks.block0.mixer.query.kernel"
    for step in (4, 6):
        rate = optim.multipliers(states[step]["optimizer"])["rate"]
        found = rows[step]["multipliers"]["rate"]
        np.testing.assert_allclose(found["mixer.query"], rate[path], rtol=1e-5)
        assert len(found["mixer.query"]) == 2 and found["head_kernel"] == pytest.approx(float(rate["head_kernel"]), rel=1e-5)
        spectra = optim.spectra(states[step]["optimizer"])
        assert rows[step]["newton_schulz"]["steps"]["mixer.query"] == [(2, 7)[int(i)] for i in spectra.choice[path][:, 0]]
        quantiles = np.exp(spectra.log_quantiles[path][:, 0])
        np.testing.assert_allclose(rows[step]["newton_schulz"]["quantiles"]["mixer.query"], quantiles, rtol=1e-5)
    assert rows[2]["newton_schulz"]["steps"]["mixer.query"] == [7, 7]
    assert rows[2]["newton_schulz"]["quantiles"]["mixer.query"] == [[None] * 5] * 2  # nothing was measured yet
    assert 2 in [steps for site in rows[6]["newton_schulz"]["steps"].values() for steps in site]
    assert min(min(found[site]) for site in ("mixer.query", "ffn.up", "ffn.down")) < 1


def test_every_diagnostic_is_drawn_and_the_page_holds_all_pictures(run, matplotlib, capsys):
    assert inspect.main(["--run", str(run)]) == 0
    page = run / "inspect" / "index.html"
    assert capsys.readouterr().out.strip() == str(page)
    text, files = page.read_text(), list((run / "inspect").glob("*.png"))
    assert all(file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for file in files)
    drawn = {file.name.split(".")[0] for file in files}
    assert drawn == set(Diagnostics().chosen) - {"loop_change"}  # the run has no loops
    assert text.count("data:image/png;base64,") == len(files) and 'name="viewport"' in text
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    names = {file.name for file in files}
    assert {f"multipliers.rate.{site}.png" for site in ("mixer.query", "ffn.down", "head_kernel")} <= names
    assert {"newton_schulz.steps.mixer.query.png", "newton_schulz.quantiles.ffn.up.last.png"} <= names
    for name in drawn:
        assert f'<h2 id="{name}">' in text
    assert "exp(entropy) of the normalised singular values" in text and "steps 2 to 6" in text


def test_a_run_without_rows_is_measured_at_its_newest_checkpoint(run, matplotlib, capsys):
    without_rows(run, ["stream", "momentum_spectrum"])
    (run / "inspect").mkdir()
    (run / "inspect" / "of_an_earlier_call.png").write_bytes(b"")
    assert inspect.main(["--run", str(run)]) == 0
    said = capsys.readouterr()
    assert "its newest checkpoint is measured instead" in said.err
    text = (run / "inspect" / "index.html").read_text()
    assert "1 row, step 7, measured now" in text and text.count("<h2") == 2
    assert not (run / "inspect" / "of_an_earlier_call.png").exists()
    assert all(row["split"] != "diagnostics" for row in read_metrics(run / "metrics.jsonl"))


def test_rows_of_changing_shape_and_undefined_values_are_drawn(tmp_path, matplotlib):
    from trainer.diagnostics.pictures import pictures

    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        writer.write({"step": 1, "split": "diagnostics", "stream": {"rms": [1.0, 2.0]}, "gone": {"x": [1.0]}})
        writer.write({"step": 2, "split": "diagnostics", "stream": {"rms": [1.0, None, 3.0]}, "spread": {"a": [None, None]}})
        writer.write({"step": 3, "split": "diagnostics", "stream": {"rms": [1.0, 2.0, 900.0]}})
        writer.write({"step": 4, "split": "diagnostics", "heads": [[1.0, None], [-1.0, 2.0]], "growth": 2.0})
        writer.write({"step": 5, "split": "diagnostics", "growth": None})  # a run that diverges
    drawn = {picture.name: picture for picture in pictures(inspect.recorded(tmp_path))}
    assert set(drawn) == {"stream.rms", "gone.x", "spread.a", "heads", "heads.last", "growth"}
    assert drawn["gone.x"].title == "gone: x"


def test_what_stands_for_a_matrix_skips_undefined_values():
    from trainer.diagnostics.pictures import LAYOUTS, over_columns

    matrix = np.array([[np.nan, 1.0, 3.0], [np.nan, np.nan, 2.0], [np.nan] * 3])
    np.testing.assert_array_equal(over_columns(np.mean, matrix), [2.0, 2.0, np.nan])
    np.testing.assert_array_equal(LAYOUTS["skip_effect.later"].vector(matrix), [3.0, 2.0, np.nan])
    np.testing.assert_array_equal(LAYOUTS["momentum_spectrum"].vector(matrix[:, 1:]), [1.0, np.nan, np.nan])


def test_without_matplotlib_the_extra_is_named(run, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[report\]'") as error:
        inspect.main(["--run", str(run)])
    assert error.value.exit_code == 2


def test_what_is_no_run_is_refused(tmp_path, tiny, matplotlib):
    with pytest.raises(ConfigError, match="does not exist"):
        inspect.main(["--run", str(tmp_path / "nowhere")])
    with pytest.raises(ConfigError, match="has no config.json"):
        inspect.main(["--run", str(tmp_path)])
    (tmp_path / "config.json").write_text(json.dumps(tiny()))
    with pytest.raises(StrataError, match="no checkpoint yet"):
        inspect.main(["--run", str(tmp_path)])
