"""Several processes find each other by Slurm's environment, or by what the command line says, and in no other case."""

import jax
import pytest

from strata import ConfigError
from trainer import config as configuration
from trainer import devices


@pytest.fixture
def start(tiny, monkeypatch):
    """`start(**arguments)`: what JAX was told to join; nothing of this process is set up."""
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **named: joined.append((given, named)))
    monkeypatch.setattr(devices, "tune_cpu", lambda: None)
    monkeypatch.setattr(devices, "use_compilation_cache", lambda: None)
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    config = configuration.resolve_config(tiny())

    def run(**arguments):
        devices.start(config, **arguments)
        return joined

    return run


def slurm(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


def test_the_tasks_of_a_slurm_step_join_as_slurm_says(start, monkeypatch):
    slurm(monkeypatch, JOB_ID="7", NTASKS="2", PROCID="1", STEP_NUM_TASKS="2")
    assert start() == [((), {})]


@pytest.mark.parametrize("variables", [{}, {"JOB_ID": "7", "NTASKS": "2"}, {"NTASKS": "2", "STEP_NUM_TASKS": "1"}])
def test_a_process_alone_or_in_a_batch_script_joins_nothing(start, monkeypatch, variables):
    slurm(monkeypatch, **variables)
    assert start() == []


def test_the_command_line_goes_before_slurm(start, monkeypatch):
    slurm(monkeypatch, STEP_NUM_TASKS="8")
    with pytest.raises(ConfigError, match="go together"):
        start(coordinator="host:1234", process_count=2)
    assert start(coordinator="host:1234", process_count=2, process_index=0) == [(("host:1234", 2, 0), {})]
