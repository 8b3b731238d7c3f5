"""Starting from another run's weights: what fits in shape and is not the same model is refused, and what is lost is kept."""

from __future__ import annotations

import json

import pytest

import trainer
from strata import ConfigError
from trainer import config as configuration
from trainer import convert, runs
from trainer.data.tokenizer import train_bpe
from trainer.setup import assemble

LOOPS = {"name": "recursive", "loops": 2}
LOOPED = {"name": "looped", "initial": "average"}


@pytest.fixture
def text(tiny, tmp_path):
    """`text(words, **changes)`: a tiny run on one text, under a vocabulary of 270 learnt from `words`."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("the cat and the dog and the cat " * 40)

    def config(words, **changes):
        path = tmp_path / f"{words.split()[0]}.json"
        if not path.exists():
            train_bpe([words * 40], 270, path)
        files = {"name": "text_files", "files": [str(tmp_path / "texts" / "*.txt")], "split": "tail", "held_out": 0.3}
        data = files | {"tokenizer": str(path), "sequence_length": 8, "batch_size": 2}
        return tiny(data=data, log__sample_tokens=0, **CONSTANT, **changes)

    return config


CONSTANT = {"train__steps": 1, "evaluate__every": 0, "checkpoint__every": 0, "optimizer__schedule": {"name": "constant"}}
CATS, DOGS = "the cat and the ", "dog or frog or "


def test_weights_of_a_run_with_another_tokenizer_are_refused(text, tmp_path):
    trainer.train(text(CATS), tmp_path / "donor")
    source = {"run": str(tmp_path / "donor")}
    for name, changes, where in [
        ("plain", {"init_from": source}, "init_from.run"),
        ("converted", {"init_from": source | {"convert": LOOPED}, "model__depth": LOOPS}, "init_from.run"),
        ("taught", {"train__teacher": source}, "train.teacher.run"),
    ]:
        with pytest.raises(ConfigError, match=f"{where} = .*the run has another tokenizer") as error:
            trainer.train(text(DOGS, **changes), tmp_path / name)
        assert error.value.exit_code == 2 and "dog.json" in str(error.value)
    other = f"--config.data.tokenizer={tmp_path / 'dog.json'}"
    with pytest.raises(ConfigError, match="the run has another tokenizer"):
        convert.main(["--run", source["run"], "--out", str(tmp_path / "out"), other])
    same = assemble(configuration.resolve_config(text(CATS, init_from=source)))
    assert runs.params_for(same, tmp_path / "donor", None)[1] == 1
    # The file that the donor's config names is no longer what the donor was trained with.
    (tmp_path / "the.json").write_bytes((tmp_path / "dog.json").read_bytes())
    with pytest.raises(ConfigError, match="the run has another tokenizer"):
        trainer.train(text(DOGS, init_from=source), tmp_path / "replaced")


WINDOW, FULL = {"name": "attention", "window": 4}, {"name": "attention"}


def hybrid(*pattern):
    return {"name": "hybrid", "pattern": list(pattern)}


def test_weights_of_a_hybrid_in_another_order_are_refused(tiny, tmp_path):
    trainer.train(tiny(model__layers=4, model__mixer=hybrid(WINDOW, WINDOW, FULL, FULL), **CONSTANT), tmp_path / "donor")

    def heir(*pattern):
        source = {"run": str(tmp_path / "donor")}
        return tiny(model__layers=4, model__mixer=hybrid(*pattern), **CONSTANT, init_from=source)

    with pytest.raises(
        ConfigError, match="layer 1 is one of its block0 and of block1 here, so that layers would change places"
    ):
        trainer.train(heir(WINDOW, FULL, WINDOW, FULL), tmp_path / "permuted")
    wider = WINDOW | {"window": 8}
    same = assemble(configuration.resolve_config(heir(wider, wider, FULL, FULL)))
    assert runs.params_for(same, tmp_path / "donor", None)[1] == 1


def test_what_a_conversion_lost_is_said_and_kept(tiny, tmp_path, capsys):
    fields = CONSTANT | {"model__output_init": "normal"}
    trainer.train(tiny(**fields), tmp_path / "donor")
    trainer.train(
        tiny(**fields, model__depth=LOOPS, init_from={"run": str(tmp_path / "donor"), "convert": LOOPED}), tmp_path / "heir"
    )
    kept = json.loads((tmp_path / "heir" / "init_from.json").read_text())
    assert kept["step"] == 1 and 0.1 < max(kept["lost"].values()) <= 1 and "mixer.query.kernel" in kept["lost"]
    assert f"the conversion lost at most {max(kept['lost'].values()):.4f} of a parameter" in capsys.readouterr().err
