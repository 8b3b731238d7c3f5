"""The mirrors of a run can be rebuilt from its directory."""

import pytest

import trainer
from strata import ConfigError
from trainer.mirror import main


def test_both_mirrors_are_rebuilt_from_a_run(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    trainer.train(tiny(), run)
    assert main(["--run", str(run), "--tensorboard", "--wandb", "offline"]) == 0
    assert list((run / "tensorboard").glob("events*")) and list((run / "wandb").glob("offline-run-*"))
    with pytest.raises(ConfigError, match="nothing to rebuild"):
        main(["--run", str(run)])
    with pytest.raises(ConfigError, match="not a run directory"):
        main(["--run", str(tmp_path), "--tensorboard"])
